"""What a run is asked to do: one TOML file, read with all its mistakes at once, each with file, line and key."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import tomli
from attrs import field, frozen
from attrs.validators import ge, lt, optional

from corenas import errors
from corenas.errors import Fault, UserError
from corenas.options import structure, to_table
from corenas.plugins import Catalogue
from corenas.settings import FORMATS, Calibration, Device, Export, SearchSettings, Train
from corenas.space import SearchSpace


def _file_name(instance: object, attribute: object, name: str) -> None:
    if not re.fullmatch(r"[\w-][\w.-]*", name):
        raise ValueError(f"expected letters, digits, '-', '_' or '.', found {name!r}")


@frozen
class Spec:
    """A whole spec.

    task: the data and what is learnt from it
    backbone: the network
    algorithm: how the supernet is trained
    name: of the run, and of its folder in runs/
    seed: of everything that is random
    device: where the run computes
    mutator: how the archs of a training step are drawn
    searcher: how archs are proposed
    evaluators: what measures archs, beside flops, params and activations
    train: how the supernet's weights are trained
    search: what is searched for, and how long
    calibration: how batch-norm statistics are recomputed before an arch is measured
    export: what is written in the end
    space: a file, or the space itself; with `file`, `fix` holds variables at a choice and `narrow` leaves fewer
    """

    task: Any = field(metadata={"kind": "tasks"})
    backbone: Any = field(metadata={"kind": "backbones"})
    space: Any
    algorithm: Any = field(metadata={"kind": "algorithms"})
    mutator: Any = field(default=None, metadata={"kind": "mutators"})
    searcher: Any = field(default=None, metadata={"kind": "searchers"})
    evaluators: tuple[Any, ...] = field(default=(), metadata={"kind": "evaluators"})
    name: str | None = field(default=None, validator=optional(_file_name))
    seed: int = field(default=0, validator=[ge(0), lt(1 << 32)])
    device: Device = Device()
    train: Train = Train()
    search: SearchSettings = SearchSettings()
    calibration: Calibration = Calibration()
    export: Export = Export()

    def to_table(self, catalogue: Catalogue) -> dict[str, Any]:
        """The spec with every default written out, as TOML: what a run directory keeps."""

        def named(options: Any) -> dict[str, Any]:
            return {"type": catalogue.name_of(options), **to_table(options)}

        table: dict[str, Any] = {"name": self.name, "seed": self.seed}
        for attribute in attrs.fields(Spec):
            value = getattr(self, attribute.name)
            if attrs.has(type(value)):
                table[attribute.name] = named(value) if "kind" in attribute.metadata else to_table(value)
        table["evaluators"] = [named(evaluator) for evaluator in self.evaluators]
        table["space"] = self.space.to_table()
        return table


@frozen
class Sources:
    """The texts that a spec was read from, to tell where a mistake stands.

    spec, space: file name and text; `space` is None where the space stands in the spec
    overrides: the keys that were set from outside
    """

    spec: tuple[str, str]
    space: tuple[str, str] | None = None
    overrides: tuple[errors.Path, ...] = ()

    def locate(self, fault: Fault) -> Fault:
        """The mistake with file and line: of its key, else of the nearest table around it."""
        if fault.file is not None or not fault.key or str(fault.key[0]).startswith("--"):
            return fault
        (file, text), key = self.spec, fault.key
        if self.space is not None and key[:1] == ("space",) and key[1:2] not in ((), ("file",), ("fix",), ("narrow",)):
            (file, text), key = self.space, key[1:]
        elif any(_split(key)[: len(override)] == override for override in self.overrides):
            return attrs.evolve(fault, file="--set")
        lines = key_lines(text)
        key = _as_written(key, lines)
        # `fix` and `narrow` name variables by dotted keys, which may stand there in quotes or as tables.
        around = [path[:n] for path in (key, _split(key)) for n in range(1, len(path) + 1)]
        path = max((path for path in around if path in lines), key=lambda path: len(_split(path)), default=())
        return attrs.evolve(fault, key=key, file=file, line=lines.get(path, 1))

    def located(self, error: UserError) -> UserError:
        """An error with a place for each of its mistakes, each mistake once, in the order of the files."""
        faults = {(f.file, f.dotted, f.message): f for f in map(self.locate, error.faults)}
        return UserError(faults=sorted(faults.values(), key=lambda f: (f.file or "", f.line or 0)))


def _split(key: errors.Path) -> tuple[str, ...]:
    return tuple(".".join(map(str, key)).split("."))


def _as_written(key: errors.Path, lines: Mapping[errors.Path, int]) -> errors.Path:
    """A key as it stands in the file: `blocks[2]` may come from the pattern `block`."""
    path: errors.Path = ()
    for part in key:
        if path and path[-1] == "blocks" and isinstance(part, int) and path not in lines:
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
    keys = tuple(tuple(item.partition("=")[0].strip().split(".")) for item in overrides)
    sources = Sources((str(path), text), None, keys)
    raw, spec = table.get("space"), None
    if "space" in table:
        table["space"], sources, more = _space(raw, sources, Path(path).parent)
        faults += more
    try:
        spec = structure(table, Spec, catalogue.options)
        for stage, key, example in (("train", "mutator", "uniform"), ("search", "searcher", "random")):
            if stage in spec.algorithm.stages and getattr(spec, key) is None:
                faults.append(Fault("required key is missing", (key,), hint=f'this algorithm has a stage "{stage}"; '
                                    f'for instance {key} = "{example}"'))  # fmt: skip
        faults += [fault.under("export", "formats") for fault in format_faults(spec.export.formats, catalogue)]
    except UserError as error:
        faults += error.faults
    faults += _layout_faults(table, catalogue)
    if faults:
        raise sources.located(UserError(faults=faults))
    assert spec is not None
    return attrs.evolve(spec, name=spec.name or Path(path).stem), sources


def format_faults(names: Sequence[str], catalogue: Catalogue) -> list[Fault]:
    """The formats that neither the core nor an exporter writes, keys being their places."""
    known = [*FORMATS, *catalogue.names("exporters")]
    return [Fault(f"no format {name!r}", (i,), hint=errors.did_you_mean(name, known, "formats"))
            for i, name in enumerate(names) if name not in known]  # fmt: skip


def _layout_faults(table: Mapping[str, Any], catalogue: Catalogue) -> list[Fault]:
    """Where the space's tables are not those of the backbone; also where other tables have mistakes."""
    name = table.get("backbone")
    name = name.get("type") if isinstance(name, dict) else name
    component = catalogue.components.get(("backbones", name)) if isinstance(name, str) else None
    layout = getattr(component.cls, "layout", None) if component else None
    if layout is None or not isinstance(table.get("space"), SearchSpace):
        return []
    try:
        structure(table["space"].tree, layout)
    except UserError as error:
        return error.under("space").faults
    return []


def _read(path: Path, noun: str) -> tuple[str, dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        folder = path.parent if path.parent.is_dir() else None
        near = errors.did_you_mean(path.name, (p.name for p in folder.glob("*.toml")), "there are") if folder else None
        raise UserError(f"no such {noun} file", file=str(path), hint=near or f"no folder {path.parent}") from None
    except (OSError, ValueError) as error:
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else getattr(error, "strerror", error)
        raise UserError(f"cannot read this {noun} file: {reason}", file=str(path)) from None
    try:
        return text, tomli.loads(text)
    except tomli.TOMLDecodeError as error:
        raise UserError(f"this is no TOML: {error.msg}", file=str(path), line=error.lineno) from None
    except (RecursionError, ValueError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else "a number is too long"
        raise UserError(f"this cannot be read: {reason}", file=str(path)) from None


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
        inner: Any = table
        for part in parts[:-1]:
            inner = _step(inner, part)
        if isinstance(inner, dict):
            inner[parts[-1]] = value
        elif isinstance(inner, list) and (place := _place(inner, parts[-1])) is not None:
            inner[place] = value
        else:
            faults.append(Fault("no table to set this in", tuple(parts)))
    return faults


def _step(inner: Any, part: str) -> Any:
    place: Any = _place(inner, part) if isinstance(inner, list) else part
    if place is None or not isinstance(inner, dict | list):
        return None
    item = inner[place] if isinstance(inner, list) else inner.setdefault(place, {})
    if isinstance(item, str) and part != "type":  # `mutator = "uniform"` is short for a table
        item = inner[place] = {"file" if part == "space" else "type": item}
    return item


def _place(items: list[Any], part: str) -> int | None:
    return int(part) if part.isascii() and part.isdigit() and len(part) < 10 and int(part) < len(items) else None


def _space(raw: Any, sources: Sources, folder: Path) -> tuple[SearchSpace | None, Sources, list[Fault]]:
    """The space of a spec, None if it has mistakes; with the mistakes, keys relative to the spec."""
    raw = {"file": raw} if isinstance(raw, str) else raw
    if not isinstance(raw, dict):
        return None, sources, [Fault("expected a file name or a table", ("space",))]
    inner = {key: value for key, value in raw.items() if key not in ("file", "fix", "narrow")}
    if "file" in raw:
        if inner:
            hint = "with `file`, only `fix` and `narrow` may stand beside it"
            return None, sources, [Fault("unknown key", ("space", key), hint=hint) for key in inner]
        if not isinstance(raw["file"], str):
            return None, sources, [Fault("expected a file name", ("space", "file"))]
        path = folder / raw["file"]
        try:
            text, inner = _read(path, "space")
        except UserError as error:  # a file that is not there is a mistake in the spec, a broken one its own
            return None, sources, [f if f.line else Fault(f"{f.message} {path}", ("space", "file"), hint=f.hint)
                                   for f in error.faults]  # fmt: skip
        sources = attrs.evolve(sources, space=(str(path), text))
    faults: list[Fault] = []
    try:
        space = SearchSpace.from_table(inner)
    except UserError as error:
        return None, sources, error.under("space").faults
    for name in ("fix", "narrow"):
        wanted = raw.get(name, {})
        if not isinstance(wanted, dict):
            faults.append(Fault("expected a table of keys and choices", ("space", name)))
            continue
        flat = _dotted(wanted)
        lists = {key for key, value in flat.items() if isinstance(value, list)}
        wrong = lists if name == "fix" else flat.keys() - lists
        expected = "one choice" if name == "fix" else "a list of choices"
        faults += [Fault(f"expected {expected}, found {flat[key]!r}", ("space", name, key)) for key in sorted(wrong)]
        try:
            space = space if wrong else space.fix(flat) if name == "fix" else space.narrow(flat)
        except UserError as error:
            faults += error.under("space", name).faults
    return (None if faults else space), sources, faults


def _dotted(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one with dotted keys; lists stay whole."""
    flat: dict[str, Any] = {}
    for key, item in table.items():
        flat |= _dotted(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item}
    return flat


_TOKEN = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}|\'\'\'.*?\'{3,5}|"(?:\\.|[^"\\\n])*"|\'[^\'\n]*\'|#[^\n]*|[\[\]{},=.\n]|[^\s\[\]{},=#."\']+',
    re.DOTALL,
)


def key_lines(text: str) -> dict[errors.Path, int]:
    """The line on which each key of a TOML text that parses is written, array items by number."""
    lines: dict[errors.Path, int] = {}
    table: errors.Path = ()  # the table that the last header opened
    counts: dict[errors.Path, int] = {}  # arrays of tables: the number of their last item
    frames: list[tuple[str, errors.Path, int]] = []  # open inline tables and arrays: kind, path, item
    key: list[str] = []
    state, line, pending = "key", 1, ()
    tokens = [*_TOKEN.finditer(text)]
    at = 0

    def note(path: errors.Path) -> None:
        for end in range(1, len(path) + 1):
            lines.setdefault(path[:end], line)

    def numbered(parts: Sequence[str]) -> errors.Path:
        path: errors.Path = ()
        for part in parts:
            path = (*path, part)
            if path in counts:
                path = (*path, counts[path])
        return path

    while at < len(tokens):
        token = tokens[at].group()
        at += 1
        if token.startswith("#"):
            continue
        if token == "\n":
            if not frames:
                state, key = "key", []
        elif state == "key" and not frames and token == "[":
            double = tokens[at].group() == "["
            at += double
            parts = []
            while tokens[at].group() != "]":
                if tokens[at].group() != ".":
                    parts.append(_unquoted(tokens[at].group()))
                at += 1
            at += 1 + double
            if double:
                array = (*numbered(parts[:-1]), parts[-1])
                counts[array] = counts.get(array, -1) + 1
                table = (*array, counts[array])
            else:
                table = numbered(parts)
            note(table)
            lines[table] = line
        elif state == "key":
            if token == "=":
                base = frames[-1][1] if frames else table
                path = (*base, *key)
                note(path)
                lines[path] = line
                state, key = "value", []
                pending = path
            elif token == "}":
                frames.pop()
                state = "value"
            elif token not in (".", ","):
                key.append(_unquoted(token))
        elif token in "[{":
            kind, start = ("array", -1) if token == "[" else ("table", 0)
            if frames and frames[-1][0] == "array":
                pending = _next_item(frames, lines, line)
            frames.append((kind, pending, start))
            state = "key" if kind == "table" else "value"
        elif token in "]}":
            frames.pop()
        elif token == ",":
            if frames and frames[-1][0] == "table":
                state = "key"
        elif frames and frames[-1][0] == "array":
            previous = tokens[at - 2].group()
            if previous in ("[", ",", "\n") or previous.startswith("#"):  # 1.5 is three tokens, one item
                _next_item(frames, lines, line)
        line += token.count("\n")
    return lines


def _next_item(frames: list[tuple[str, errors.Path, int]], lines: dict[errors.Path, int], line: int) -> errors.Path:
    kind, path, item = frames[-1]
    frames[-1] = (kind, path, item + 1)
    lines.setdefault((*path, item + 1), line)
    return (*path, item + 1)


def _unquoted(token: str) -> str:
    return str(next(iter(tomli.loads(f"{token} = 0")))) if token[0] in "\"'" else token
