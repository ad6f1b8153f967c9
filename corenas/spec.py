"""What a run is asked to do: one TOML file, read with all its mistakes at once, each with file, line and key."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import tomli
from attrs import field, frozen
from attrs.validators import ge, lt, optional

from corenas.errors import Fault, UserError, collecting, did_you_mean, dotted, refuse
from corenas.errors import Path as KeyPath
from corenas.options import structure, to_table
from corenas.plugins import Catalogue
from corenas.settings import Calibration, Device, Export, Retrain, SearchSettings, Source, Train
from corenas.space import Choice, SearchSpace, flatten
from corenas.variables import OVERRIDE


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
        return {**to_table(attrs.evolve(self, space=None), catalogue.name_of), "space": self.space.to_table()}

    def overridden(self, choices: Mapping[str, Any]) -> Spec:
        """The spec with the choices of variables named `spec:…` in the places that they name.

        Raises UserError, keys being the variables', for one that names no place, or a choice that is refused there.
        """
        spec, faults = self, []
        for key in filter(lambda key: key.startswith(OVERRIDE), choices):
            path = key.removeprefix(OVERRIDE).split(".")
            try:
                if path[0] not in _SEARCHABLE:
                    raise ValueError(f"only keys under {', '.join(_SEARCHABLE)} can be searched")
                spec = _evolved(spec, path, choices[key])
            except (ValueError, TypeError, UserError) as error:
                faults.append(Fault(str(error), (key,)))
        refuse(faults)
        return spec


_STAGES = ("train", "search", "derive", "retrain")
_NEEDS = ("mutator", "distiller", "searcher")
_SEARCHABLE = ("train", "task", "backbone")
"""What a training of one arch depends on."""


def _evolved(item: Any, path: Sequence[str], value: Any) -> Any:
    """A nest of options with the value in one place. Raises ValueError if there is no such place."""
    if not path:
        return value
    key, *rest = path
    if attrs.has(type(item)) and key in (fields := attrs.fields_dict(attrs.resolve_types(type(item)))):
        inner = _evolved(getattr(item, key), rest, value) if rest else structure(value, fields[key].type or Any)
        return attrs.evolve(item, **{key: inner})
    if isinstance(item, Mapping) and key in item:
        return {**item, key: _evolved(item[key], rest, value)}
    raise ValueError(f"the spec has no key {key!r} there")


Places = dict[str, tuple[str, int | None, KeyPath]]
"""Dotted key -> its file, its line there, and the key as it is called there."""


@frozen
class Sources:
    """Where the keys of a spec were read, to tell where a mistake stands."""

    places: Places

    def locate(self, fault: Fault) -> Fault:
        """The mistake with file and line: of its key, else of the nearest table around it."""
        if fault.file is not None or not fault.key or str(fault.key[0]).startswith("--"):
            return fault
        key: KeyPath = ()
        for part in fault.key:  # `blocks[2]` may come from the pattern `block`
            pattern = (*key[:-1], "block")
            key = pattern if key[-1:] == ("blocks",) and dotted(*pattern) in self.places else (*key, part)
        n = next(n for n in range(len(key), -1, -1) if dotted(*key[:n]) in self.places)
        file, line, written = self.places[dotted(*key[:n])]
        return attrs.evolve(fault, key=(*written, *key[n:]), file=file, line=line)

    @contextmanager
    def locating(self) -> Iterator[None]:
        """Gives the mistakes that are raised inside their places; each is told once, in the order of the files."""
        try:
            yield
        except UserError as error:
            faults = {(f.file, f.dotted, f.message): f for f in map(self.locate, error.faults)}
            raise UserError(faults=sorted(faults.values(), key=lambda f: (f.file or "", f.line or 0))) from None


def _places(file: str, text: str, *prefix: str) -> Places:
    """Where the keys of a file stand; the prefix is that of its keys in the spec."""
    return {dotted(*prefix, *key): (file, line, key) for key, line in key_lines(text).items()}


def load_spec(path: str | Path, catalogue: Catalogue, overrides: Sequence[str] = ()) -> tuple[Spec, Sources]:
    """Read a spec file. Raises UserError with every mistake that can be found without data and without torch.

    overrides: "train.epochs=3" and the like; a value is TOML, or text where it is no TOML
    """
    file = Path(path)
    text, table = _read(file, "spec", file=str(path))
    sources = Sources(_places(str(path), text))
    with sources.locating():
        spec = _spec(table, file.parent, catalogue, overrides, sources.places)
    return attrs.evolve(spec, name=spec.name or file.stem), sources


def _spec(table: dict[str, Any], folder: Path, catalogue: Catalogue, overrides: Sequence[str], places: Places) -> Spec:
    faults: list[Fault] = []

    def override(items: Iterable[str]) -> None:
        for item in items:
            with collecting(faults):
                _override(table, item, places)

    override(item for item in overrides if item.startswith("supernet"))
    table, base = _over_base(table)
    override(item for item in overrides if not item.startswith("supernet"))  # in what that run gives
    if "space" in table:
        raw, table["space"] = table["space"], None
        with collecting(faults, "space"):
            table["space"] = _space(raw, folder, places)
            _check_layout(table["space"], table.get("backbone"), catalogue)
    try:
        spec = structure(table, Spec, catalogue.options)
    except UserError as error:
        raise UserError(faults=[*faults, *error.faults]) from None
    stages, needs = spec.algorithm.stages, {*spec.algorithm.needs}
    known = [stage for stage in _STAGES if stage in stages]
    if [*stages] != known or ("derive" in stages and ("train" not in stages or "search" in stages)):
        text = f"this algorithm has the stages {stages!r}: expected some of {', '.join(_STAGES)}, in this order"
        faults.append(Fault(text, ("algorithm",), hint="derive comes after train, and without search"))
    if unknown := sorted(needs - {*_NEEDS}):
        faults.append(Fault(f"this algorithm needs {unknown}: expected some of {', '.join(_NEEDS)}", ("algorithm",)))
    for key in _NEEDS:
        if getattr(spec, key) is None and (key in needs or (key == "searcher" and "search" in stages)):
            hint = did_you_mean("", catalogue.names(f"{key}s"), f"this algorithm needs one; installed {key}s")
            faults.append(Fault("required key is missing", (key,), hint=hint))
    overriding = [v for v in spec.space.variables if v.key.startswith(OVERRIDE)] if spec.space is not None else []
    for variable in overriding:
        for choice in dict.fromkeys((*variable.choices[:100], variable.choices[-1])):
            with collecting(faults, "space"):
                spec.overridden({variable.key: choice})
    for i, name in enumerate(spec.export.formats):
        try:
            catalogue.find("exporters", name)
        except UserError as error:
            faults += [attrs.evolve(fault, key=("export", "formats", i)) for fault in error.faults]
    if base is not None:  # data cut by another seed would be seen in training
        trained = structure({**base, "space": None}, Spec, catalogue.options)
        faults += [Fault("the supernet was trained with another one", (key,), hint=f"leave `{key}` out")
                   for key in ("task", "backbone", "seed") if getattr(spec, key) != getattr(trained, key)]  # fmt: skip
        if "derive" in spec.algorithm.stages:
            text = "this algorithm finds its arch while it trains"
            faults.append(Fault(text, ("algorithm",), hint="leave `supernet` out"))
    refuse(faults)
    return spec


def _over_base(table: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """A spec's table over that of the run whose supernet it uses; and that table, None where it uses none."""
    source = table.get("supernet")
    if not isinstance(source, dict) or not isinstance(source.get("from"), str):
        return table, None
    folder, place = Path(source["from"]), ("supernet", "from")
    if not (folder / "supernet.pt").exists():
        raise UserError(f"{folder} is no run that has trained a supernet", key=place)
    _, trained = _read(folder / "spec.toml", "spec", key=place)
    base = {key: item for key, item in trained.items() if key not in ("name", "supernet")}
    space = table.get("space")
    if isinstance(space, dict) and space.keys() <= {"fix", "narrow"}:
        table = {**table, "space": {**base["space"], **space}}
    return copy.deepcopy({**base, **table}), base


def _check_layout(space: SearchSpace, backbone: Any, catalogue: Catalogue) -> None:
    """Raises UserError where the space's tables are not those of the backbone, whatever else is wrong with that."""
    name = backbone.get("type") if isinstance(backbone, dict) else backbone
    component = catalogue.components.get(("backbones", str(name)))
    layout = getattr(component.cls, "layout", None) if component else None
    if layout is not None:
        structure(space.tree, layout)


def _read(path: Path, noun: str, **where: Any) -> tuple[str, dict[str, Any]]:
    """The text and the table of a file. Raises UserError: for one that cannot be read with the place given."""
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise ValueError("this is no file")  # /dev/zero never ends
        text = path.read_text(encoding="utf-8-sig")
        return text, tomli.loads(text)
    except FileNotFoundError:
        near = did_you_mean(path.name, [p.name for p in path.parent.glob("*.toml")], f"in {path.parent}")
        raise UserError(f"no such {noun} file", hint=near, **where) from None
    except tomli.TOMLDecodeError as error:
        raise UserError(f"this is no TOML: {error.msg}", file=str(path), line=error.lineno) from None
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error).partition(":")[0]
        raise UserError(f"cannot read this {noun} file: {reason}", **where) from None


def _override(table: dict[str, Any], item: str, places: Places) -> None:
    """Does what `--set` asks for, a dotted key and a value. Raises UserError."""
    key, sign, text = item.partition("=")
    path = tuple(key.strip().split("."))
    if not sign or not all(path):
        raise UserError(f"expected KEY=VALUE, found {item!r}", key=("--set",))
    name = dotted(*path)
    for inner in [place for place in places if place.startswith(f"{name}.")]:
        del places[inner]
    places[name] = ("--set", None, path)
    try:
        value = tomli.loads(f"x = {text}")["x"]
    except (ValueError, RecursionError):  # TOMLDecodeError is a ValueError
        value = text
    try:
        _set(table, path, value)
    except (LookupError, TypeError, ValueError):
        raise UserError("no table to set this in", key=path) from None


def _set(item: Any, path: Sequence[str], value: Any) -> Any:
    """A table or list with the value in one place. Raises what these raise where there is no such place."""
    if not path:
        return value
    part, *rest = path
    place: Any = int(part) if isinstance(item, list) else part
    inner = item.get(place, {}) if isinstance(item, dict) else item[place]
    if rest and isinstance(inner, str):  # `mutator = "uniform"` is short for a table
        inner = {"file" if part == "space" else "type": inner}
    item[place] = _set(inner, rest, value)
    return item


_CHANGES = {
    "fix": (SearchSpace.fix, Mapping[str, Choice]), "narrow": (SearchSpace.narrow, Mapping[str, tuple[Choice, ...]]),
}  # fmt: skip
"""What may stand beside a space: how it changes the space, and the type of its table, keys dotted."""


def _space(raw: Any, folder: Path, places: Places) -> SearchSpace:
    """The space that a spec names or holds. Raises UserError, keys relative to it."""
    table = {"file": raw} if isinstance(raw, str) else raw
    if not isinstance(table, dict):
        raise UserError("expected a file name or a table")
    changes = {name: table.pop(name, {}) for name in _CHANGES}
    if "file" in table:
        table = _space_file(table, folder, places)
    space, faults = SearchSpace.from_table(table), []
    for name, (change, choices) in _CHANGES.items():
        with collecting(faults, name):
            space = change(space, structure(flatten(structure(changes[name], dict), lists=False), choices))
    refuse(faults)
    return space


def _space_file(table: Mapping[str, Any], folder: Path, places: Places) -> dict[str, Any]:
    """The table in the file that a spec takes its space from, with the variables of the spec beside its name."""
    own = {key: item for key, item in table.items() if key.startswith(OVERRIDE)}
    hint = "with `file`, only `fix`, `narrow` and variables of the spec (`spec:…`) may stand beside it"
    refuse(Fault("unknown key", (key,), hint=hint) for key in table.keys() - own.keys() - {"file"})
    file = folder / structure(table["file"], str)
    text, read = _read(file, "space", key=("file",))
    places |= _places(str(file), text, "space")
    return {**read, **own}


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
    marked, opened, expected, line = f'"{_OWN}" = 1\n', "", "key", 1
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
    return {key: line for key, line in _lines(tomli.loads(marked), ()).items() if key[-1:] not in ((_OWN,), (-1,))}


def _lines(item: Any, key: KeyPath) -> dict[KeyPath, int]:
    """The lines of an item of the marked text and of all that is inside. What has no line of its own has the first."""
    if isinstance(item, int):
        return {key: item}
    lines: dict[KeyPath, int] = {}
    first = 0 if isinstance(item, dict) or not isinstance(item[0], int) else -1  # the place of a list's own line
    for part, inner in item.items() if isinstance(item, dict) else enumerate(item, first):
        lines |= _lines(inner, (*key, part))
    return {key: min(lines.values()), **lines}
