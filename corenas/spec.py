"""What a run is asked to do: one TOML file, read with all its mistakes at once, each with file, line and key."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import attrs
import tomli
from attrs import field, frozen
from attrs.validators import ge, lt, optional

from corenas.errors import Fault, UserError, did_you_mean
from corenas.errors import Path as KeyPath
from corenas.options import structure, to_table
from corenas.plugins import Catalogue
from corenas.settings import Calibration, Device, Export, Retrain, SearchSettings, Source, Train
from corenas.space import OVERRIDE, SearchSpace


def _file_name(instance: object, attribute: object, name: str) -> None:
    if not re.fullmatch(r"[\w-][\w.-]*", name):
        raise ValueError(f"expected letters, digits, '-', '_' or '.', found {name!r}")


@frozen
class Spec:
    """A whole spec.

    task: the data and what is learnt from it
    backbone: the network
    algorithm: how the supernet is trained, and which stages a run has
    name: of the run, and of its folder in runs/
    seed: of everything that is random
    device: where the run computes
    supernet: the run of a supernet that was trained before, to be searched again; what this spec leaves out is as it
        was there
    mutator: how the archs of a training step are drawn
    distiller: what paths learn from a teacher, for algorithms that have one
    searcher: how archs are proposed
    evaluators: what measures archs, beside flops, params and activations
    executor: where trials are measured; left out, in this process
    train: how the supernet's weights are trained
    search: what is searched for, and how long
    calibration: how batch-norm statistics are recomputed before an arch is measured
    retrain: how the arch that was found is trained again, where the algorithm does so
    export: what is written in the end
    space: a file, or the space itself; with `file`, `fix` holds variables at a choice and `narrow` leaves fewer
    """

    task: Any = field(metadata={"kind": "tasks"})
    backbone: Any = field(metadata={"kind": "backbones"})
    space: Any
    algorithm: Any = field(metadata={"kind": "algorithms"})
    supernet: Source | None = None
    mutator: Any = field(default=None, metadata={"kind": "mutators"})
    distiller: Any = field(default=None, metadata={"kind": "distillers"})
    searcher: Any = field(default=None, metadata={"kind": "searchers"})
    evaluators: tuple[Any, ...] = field(default=(), metadata={"kind": "evaluators"})
    executor: Any = field(default=None, metadata={"kind": "executors"})
    name: str | None = field(default=None, validator=optional(_file_name))
    seed: int = field(default=0, validator=[ge(0), lt(1 << 32)])
    device: Device = Device()
    train: Train = Train()
    search: SearchSettings = SearchSettings()
    calibration: Calibration = Calibration()
    retrain: Retrain = Retrain()
    export: Export = Export()

    def to_table(self, catalogue: Catalogue) -> dict[str, Any]:
        """The spec with every default written out, as TOML: what a run directory keeps."""
        rest = to_table(attrs.evolve(self, space=None), catalogue.name_of)
        return {**rest, "space": self.space.to_table()}

    def overridden(self, choices: Mapping[str, Any]) -> Spec:
        """The spec with the choices of variables named `spec:…` in the places that they name.

        Raises UserError, keys being the variables', for one that names no place, or a choice that is refused there.
        """
        spec, faults = self, []
        for key in filter(lambda key: key.startswith(OVERRIDE), choices):
            path, choice = key.removeprefix(OVERRIDE).split("."), choices[key]
            try:
                if path[0] not in _SEARCHABLE:
                    raise ValueError(f"only keys under {', '.join(_SEARCHABLE)} can be searched")
                spec = _evolved(spec, path, choice)
            except (ValueError, TypeError, UserError) as error:
                faults.append(Fault(str(error), (key,)))
        if faults:
            raise UserError(faults=faults)
        return spec


_SEARCHABLE = ("train", "task", "backbone")
"""What a training of one arch depends on."""


def _evolved(item: Any, path: Sequence[str], value: Any) -> Any:
    """A nest of options with the value in one place. Raises ValueError if there is no such place."""
    key, *rest = path
    if attrs.has(type(item)) and key in {field.name for field in attrs.fields(type(item))}:
        return attrs.evolve(item, **{key: _evolved(getattr(item, key), rest, value) if rest else value})
    if isinstance(item, Mapping) and key in item:
        return {**item, key: _evolved(item[key], rest, value) if rest else value}
    raise ValueError(f"the spec has no key {key!r} there")


@frozen
class Sources:
    """The texts that a spec was read from, to tell where a mistake stands.

    spec, space: file name and text; `space` is None where the space stands in the spec
    overrides: the keys that were set from outside
    """

    spec: tuple[str, str]
    space: tuple[str, str] | None = None
    overrides: tuple[KeyPath, ...] = ()

    def locate(self, fault: Fault) -> Fault:
        """The mistake with file and line: of its key, else of the nearest table around it."""
        if fault.file is not None or not fault.key or str(fault.key[0]).startswith("--"):
            return fault
        (file, text), key = self.spec, fault.key
        if self.space is not None and key[:1] == ("space",) and key[1:2] not in ((), ("file",), ("fix",), ("narrow",)):
            (file, text), key = self.space, key[1:]
        elif any(_split(key)[: len(override)] == override for override in self.overrides):
            return attrs.evolve(fault, file="--set")
        places = _places(text)
        key = _as_written(key, places)
        around = (_split(key)[:n] for n in range(len(_split(key)), 0, -1))
        return attrs.evolve(fault, key=key, file=file, line=next((places[p] for p in around if p in places), 1))

    @contextmanager
    def locating(self) -> Iterator[None]:
        """Gives the mistakes that are raised inside their places; each is told once, in the order of the files."""
        try:
            yield
        except UserError as error:
            faults = {(f.file, f.dotted, f.message): f for f in map(self.locate, error.faults)}
            raise UserError(faults=sorted(faults.values(), key=lambda f: (f.file or "", f.line or 0))) from None


def _split(key: KeyPath) -> tuple[str, ...]:
    return tuple(".".join(map(str, key)).split("."))


@lru_cache(maxsize=2)
def _places(text: str) -> dict[tuple[str, ...], int]:
    # `fix` and `narrow` name variables by dotted keys, which may stand there in quotes or as tables.
    return {_split(path): line for path, line in key_lines(text).items()}


def _as_written(key: KeyPath, places: Mapping[tuple[str, ...], int]) -> KeyPath:
    """A key as it stands in the file: `blocks[2]` may come from the pattern `block`."""
    path: KeyPath = ()
    for part in key:
        if path and path[-1] == "blocks" and isinstance(part, int) and _split(path) not in places:
            path = (*path[:-1], "block")
        else:
            path = (*path, part)
    return path


def load_spec(path: str | Path, catalogue: Catalogue, overrides: Sequence[str] = ()) -> tuple[Spec, Sources]:
    """Read a spec file. Raises UserError with every mistake that can be found without data and without torch.

    overrides: "train.epochs=3" and the like; a value is TOML, or text where it is no TOML
    """
    text, table = _read(Path(path), "spec")
    faults = _override(table, overrides)
    table, base = _over_base(table)
    keys = tuple(tuple(item.partition("=")[0].strip().split(".")) for item in overrides)
    sources, spec = Sources((str(path), text), None, keys), None
    if "space" in table:
        raw, table["space"] = table["space"], None
        try:
            file, whole, changes = _space_parts(raw, Path(path).parent)
            sources = attrs.evolve(sources, space=file)
            table["space"] = _space(whole, changes)
        except UserError as error:  # what has a file has its place already
            faults += [fault if fault.file else fault.under("space") for fault in error.faults]
    try:
        spec = structure(table, Spec, catalogue.options)
        for key in spec.algorithm.needs:
            if getattr(spec, key) is None:
                hint = f"this algorithm needs one; installed {key}s: {', '.join(catalogue.names(f'{key}s')) or 'none'}"
                faults.append(Fault("required key is missing", (key,), hint=hint))
        faults += _base_faults(spec, base, catalogue)
        for arch in (spec.space.smallest(), spec.space.largest()) if spec.space is not None else ():
            try:
                spec.overridden(arch)
            except UserError as error:
                faults += error.under("space").faults
        known = catalogue.names("exporters")
        faults += [Fault(f"no format {name!r}", ("export", "formats", i), hint=did_you_mean(name, known, "formats"))
                   for i, name in enumerate(spec.export.formats) if name not in known]  # fmt: skip
    except UserError as error:
        faults += error.faults
    faults += _layout_faults(table, catalogue)
    if faults:
        with sources.locating():
            raise UserError(faults=faults)
    assert spec is not None
    return attrs.evolve(spec, name=spec.name or Path(path).stem), sources


def _over_base(table: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """A spec's table over that of the run whose supernet it uses; and that table, None where it uses none."""
    source = table.get("supernet")
    if not isinstance(source, dict) or not isinstance(source.get("from"), str):
        return table, None
    folder = Path(source["from"])
    if not (folder / "supernet.pt").exists() or not (folder / "spec.toml").exists():
        raise UserError(f"{folder} is no run that has trained a supernet", key=("supernet", "from"))
    base = {
        key: item for key, item in _read(folder / "spec.toml", "spec")[1].items() if key not in ("name", "supernet")
    }
    space = table.get("space")
    if isinstance(space, dict) and space.keys() <= {"fix", "narrow"}:
        table = {**table, "space": {**base["space"], **space}}
    return {**base, **table}, base


def _base_faults(spec: Spec, base: Mapping[str, Any] | None, catalogue: Catalogue) -> list[Fault]:
    """Where a spec is not that of the supernet which it uses: data cut by another seed would be seen in training."""
    if base is None:
        return []
    trained = structure({**base, "space": None}, Spec, catalogue.options)
    faults = [Fault("the supernet was trained with another one", (key,), hint=f"leave `{key}` out")
              for key in ("task", "backbone", "seed") if getattr(spec, key) != getattr(trained, key)]  # fmt: skip
    if "derive" in spec.algorithm.stages:
        faults.append(
            Fault("this algorithm finds its arch while it trains", ("algorithm",), hint="leave `supernet` out")
        )
    return faults


def _layout_faults(table: Mapping[str, Any], catalogue: Catalogue) -> list[Fault]:
    """Where the space's tables are not those of the backbone; also where other tables have mistakes."""
    backbone = table.get("backbone")
    name = backbone.get("type") if isinstance(backbone, dict) else backbone
    component = catalogue.components.get(("backbones", name)) if isinstance(name, str) else None
    layout = getattr(component.cls, "layout", None) if component else None
    if layout is not None and isinstance(table.get("space"), SearchSpace):
        try:
            structure(table["space"].tree, layout)
        except UserError as error:
            return error.under("space").faults
    return []


def _read(path: Path, noun: str) -> tuple[str, dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        return text, tomli.loads(text)
    except FileNotFoundError:
        there = [p.name for p in path.parent.glob("*.toml")]
        near = did_you_mean(path.name, there, "there are") if path.parent.is_dir() else None
        raise UserError(f"no such {noun} file", file=str(path), hint=near or f"no folder {path.parent}") from None
    except tomli.TOMLDecodeError as error:
        raise UserError(f"this is no TOML: {error.msg}", file=str(path), line=error.lineno) from None
    except (OSError, ValueError, RecursionError) as error:
        told = {UnicodeDecodeError: "it is not UTF-8 text", RecursionError: "it is nested too deeply"}
        reason = told.get(type(error)) or getattr(error, "strerror", None) or str(error).partition(":")[0]
        raise UserError(f"cannot read this {noun} file: {reason}", file=str(path)) from None


def _override(table: dict[str, Any], overrides: Sequence[str]) -> list[Fault]:
    faults = []
    for item in overrides:
        key, sign, text = item.partition("=")
        parts = key.strip().split(".")
        if not sign or not all(parts):
            faults.append(Fault(f"expected KEY=VALUE, found {item!r}", ("--set",)))
            continue
        try:
            value = tomli.loads(f"x = {text}")["x"]
        except (ValueError, RecursionError):  # TOMLDecodeError is a ValueError
            value = text
        try:
            _set(table, parts, value)
        except (LookupError, TypeError, ValueError, RecursionError):
            faults.append(Fault("no table to set this in", tuple(parts)))
    return faults


def _set(inner: Any, parts: Sequence[str], value: Any) -> None:
    """Sets what a dotted key means in a table or list. Raises what these raise where it means nothing."""
    part, *rest = parts
    place: Any = int(part) if isinstance(inner, list) and part.isdecimal() else part
    if not rest:
        inner[place] = value
        return
    item = inner.setdefault(place, {}) if isinstance(inner, dict) else inner[place]
    if isinstance(item, str) and part != "type":  # `mutator = "uniform"` is short for a table
        item = inner[place] = {"file" if part == "space" else "type": item}
    _set(item, rest, value)


def _space_parts(raw: Any, folder: Path) -> tuple[tuple[str, str] | None, dict[str, Any], dict[str, Any]]:
    """The file that a spec takes its space from (name and text), the space as a table, and its `fix` and `narrow`."""
    table = {"file": raw} if isinstance(raw, str) else raw
    if not isinstance(table, dict):
        raise UserError("expected a file name or a table")
    changes = {name: table.pop(name, {}) for name in ("fix", "narrow")}
    if "file" not in table:
        return None, table, changes
    name = table.pop("file")
    own = {key: table.pop(key) for key in [*table] if key.startswith(OVERRIDE)}
    if table:
        hint = "with `file`, only `fix`, `narrow` and variables of the spec (`spec:…`) may stand beside it"
        raise UserError(faults=[Fault("unknown key", (key,), hint=hint) for key in table])
    if not isinstance(name, str):
        raise UserError("expected a file name", key=("file",))
    try:
        text, table = _read(folder / name, "space")
    except UserError as error:  # a file that is not there is a mistake in the spec, a broken one its own
        (fault,) = error.faults
        if fault.line:
            raise
        raise UserError(f"{fault.message} {fault.file}", key=("file",), hint=fault.hint) from None
    return (str(folder / name), text), {**table, **own}, changes


_Fixed = Mapping[str, Annotated[Any, "one choice", lambda choice: not isinstance(choice, list)]]
_Narrowed = Mapping[str, Annotated[Any, "a list of choices", lambda choices: isinstance(choices, list)]]


def _space(table: dict[str, Any], changes: Mapping[str, Any]) -> SearchSpace:
    space, faults = SearchSpace.from_table(table), []
    for name, change, choices in (("fix", SearchSpace.fix, _Fixed), ("narrow", SearchSpace.narrow, _Narrowed)):
        wanted = changes[name]
        try:
            space = change(space, structure(_dotted(wanted) if isinstance(wanted, dict) else wanted, choices))
        except UserError as error:
            faults += error.under(name).faults
    if faults:
        raise UserError(faults=faults)
    return space


def _dotted(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one with dotted keys; lists stay whole."""
    flat: dict[str, Any] = {}
    for key, item in table.items():
        flat |= _dotted(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item}
    return flat


_TOKEN = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}|\'\'\'.*?\'{3,5}|"(?:\\.|[^"\\\n])*"|\'[^\'\n]*\'|#[^\n]*|[\[\]{},=\n]|[^\s\[\]{},=#"\']+',
    re.DOTALL,
)
_OWN = "line #"
"""The key under which a table says its own line."""


def key_lines(text: str) -> dict[KeyPath, int]:
    """The line on which each key of a TOML text that parses is written, array items by number.

    tomli reads the text again with each value replaced by the number of its line, and with one item more in each array
    and in each table that is written as such: its own line.
    """
    marked, opened, expected, line = "", "", "key", 1
    for token in _TOKEN.findall(text + "\n"):
        if token == "\n" and not opened:
            marked += f'\n"{_OWN}" = {line}\n' if expected == "header" else "\n"
            expected = "key"
        elif token in "=,":
            marked += token
            expected = "value" if token == "=" or opened[-1] == "[" else "key"
        elif token in "]}" and opened:
            marked += token
            opened, expected = opened[:-1], "end"
        elif token in "[{" and expected == "value":
            marked += f"[{line}," if token == "[" else f'{{"{_OWN}" = {line},'
            opened, expected = opened + token, "value" if token == "[" else "key"
        elif token[0] not in "#\n" and expected != "end":  # a date and its time are two tokens
            marked += str(line) if expected == "value" else token
            expected = {"value": "end", "key": "header" if token == "[" else "key"}.get(expected, expected)
        line += token.count("\n")
    lines: dict[KeyPath, int] = {}
    for key, item in tomli.loads(marked).items():
        _note(item, (key,), lines)
    return lines


def _note(item: Any, path: KeyPath, lines: dict[KeyPath, int]) -> int:
    """Notes the line of an item and of all that is inside. A table that no header opens is where its first key is."""
    own: Any = item
    if not isinstance(item, int):
        table = isinstance(item, dict)
        own = item.pop(_OWN, None) if table else item.pop(0) if isinstance(item[0], int) else None
        for key, inner in item.items() if table else enumerate(item):
            first = _note(inner, (*path, key), lines)
            own = own or first
    lines[path] = own
    return own
