"""What `corenas show` says: the options of components and of the spec's own tables, with what they mean."""

from __future__ import annotations

import inspect
import json
import shutil
import typing
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import attrs

from corenas.contracts import COMPONENTS
from corenas.errors import UserError, did_you_mean, regular
from corenas.options import expectation, explanations, key_of, structure, to_table
from corenas.plugins import Catalogue, load_catalogue
from corenas.run.spec import Spec, space_file
from corenas.run.toml import KeySource, Sources
from corenas.space import SearchSpace
from corenas_tool_inspect.archs import from_file
from corenas_tool_inspect.table import print_json


def command(options: Namespace) -> None:
    """Print it."""
    catalogue = load_catalogue(files=options.plugin)
    found, lines = show(catalogue, options.kind, options.name)
    if options.name and options.kind.rstrip("s") == "backbone":
        drawing, more = _drawing(catalogue.find("backbones", options.name).cls, options)
        found, lines = {**found, "space": drawing}, [*lines, *more]
    if options.json:
        print_json(found)
    else:
        print("\n".join(lines))


def show(catalogue: Catalogue, kind: str | None, name: str | None) -> tuple[Any, list[str]]:
    """What there is, the components of a kind, or one of them: as plain data and as lines of text.

    Raises UserError for a kind, a table or a name that is not there.
    """
    kinds = [*COMPONENTS]
    tables = {**_tables(), "spec": Spec}
    if kind is None:
        found = {each: catalogue.names(each) for each in kinds}
        lines = [f"{each:<12} {', '.join(names) or 'none installed'}" for each, names in found.items()]
        return found, [*lines, f"{'tables':<12} {', '.join(sorted(tables))}"]
    if kind in tables:
        return {kind: _options(tables[kind])}, [*_lines(tables[kind], "")]
    plural = kind if kind.endswith("s") else f"{kind}s"
    if plural not in kinds:
        raise UserError(f"no kind {kind!r}", hint=did_you_mean(kind, [*kinds, *tables], "kinds and tables of a spec"))
    components = [catalogue.find(plural, each) for each in ([name] if name else catalogue.names(plural))]
    lines = []
    for component in components:
        lines += [f"{component.name} ({component.distribution} {component.version})", *_lines(component.cls, "  "), ""]
    return {plural: {component.name: _options(component.cls) for component in components}}, lines


def _drawing(cls: Any, options: Namespace) -> tuple[Any, list[str]]:
    """The space of a file, or else a backbone's example, drawn; nothing where there is none."""
    from corenas_tool_inspect.drawing import drawn, lines

    if options.image < 1:
        raise UserError(f"images have a side of at least 1 pixel, not {options.image}", key=("--image",))
    example = getattr(cls, "example", None)
    file = None if options.space is None else str(space_file(options.space))
    if file is not None:
        backbone, space = cls(), from_file(file, SearchSpace.from_table)
        title, image = options.space, (getattr(backbone, "in_channels", None) or 3, options.image, options.image)
    elif example is not None:
        backbone, space = structure(example["backbone"], cls), SearchSpace.from_table(example["space"])
        title, image = "an example", (1, 28, 28)
    else:
        return None, []
    with _sources(file).locating() if file else nullcontext():
        drawing = {"title": title, **drawn(backbone, space, image)}
    width = shutil.get_terminal_size((10_000, 0)).columns  # a pipe has none: programs find whole tables
    return drawing, [f"{title}:", *lines(drawing, width)]


def _sources(file: str) -> Sources:
    """Return where the keys of a space that is drawn from its file come from."""
    sources = Sources({"": KeySource(file, 1, ())})
    sources.add(file, regular(Path(file)).read_text("utf-8"), "space")
    return sources


def _tables() -> dict[str, type]:
    """The classes of a spec's tables, by their names."""
    return {f.name: type(f.default) for f in attrs.fields(Spec) if attrs.has(type(f.default))}


def _options(cls: type) -> list[dict[str, Any]]:
    """The options of a class, those of classes inside it under `options`; `table` says which table of a spec it is."""
    attrs.resolve_types(cls)
    texts, tables = explanations(cls), {table: name for name, table in _tables().items()}
    rows = []
    for attribute in attrs.fields(cls):
        default: Any = attribute.default
        if isinstance(default, attrs.Factory):  # type: ignore[arg-type]
            default = [] if default.takes_self else default.factory()
        name = key_of(attribute)
        row: dict[str, Any] = {"option": name, "expects": expectation(attribute.type)}
        row["required"] = default is attrs.NOTHING
        if not row["required"]:
            row["default"] = to_table(default)
        row["meaning"] = texts.get(attribute.name, "")
        inner = next(_classes(attribute.type), None)
        if inner is not None:
            row["options"] = _options(inner)
            row |= {"table": tables[inner]} if inner in tables else {}
        rows.append(row)
    return rows


def _classes(t: Any) -> Iterator[type]:
    """The options classes that a type has somewhere: of `tuple[str | Goal, ...]` that is `Goal`."""
    if attrs.has(t):
        yield t
    for arm in typing.get_args(t):
        yield from _classes(arm)


def _lines(cls: type, indent: str) -> Iterator[str]:
    """A class's summary and options as text."""
    for line in inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0].splitlines():
        yield f"{indent}{line}"
    yield from _option_lines(_options(cls), f"{indent}  ")


def _option_lines(rows: Sequence[dict[str, Any]], indent: str) -> Iterator[str]:
    for row in rows:
        default = "none" if row.get("default") is None else json.dumps(row["default"])
        yield f"{indent}{row['option']}: {row['meaning']}"
        yield f"{indent}  {row['expects']}, {'required' if row['required'] else f'default {default}'}"
        if "table" in row:
            yield f"{indent}    its options: corenas show {row['table']}"
        else:
            yield from _option_lines(row.get("options", []), f"{indent}    ")
