"""Which file and which line a key of a spec comes from, and how `--set` overrides one."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import tomli
from attrs import field, frozen

import corenas
from corenas.errors import Fault, KeyPath, UserError, did_you_mean, dotted_key, regular

SPECS = Path(corenas.__file__).parent / "spec"
"""Where the specs are that corenas comes with; in `space/` are its spaces."""


@frozen
class KeySource:
    """The file and the line that a key was read from, and the key as it is called there."""

    file: str
    line: int | None
    key: KeyPath


@frozen
class Sources:
    """The sources of a spec's keys, which may come from several files: the spec, its space, the command line.

    keys: dotted key of the spec -> its source
    tables: those around a key that the command line sets, which stand nowhere else if they are no keys
    """

    keys: dict[str, KeySource] = field(factory=dict)
    tables: set[str] = field(factory=set)

    def add(self, file: str, text: str, *prefix: str) -> None:
        """Take in the keys of a file; `prefix` is what they stand under in the spec."""
        for key, line in key_lines(text).items():
            self.keys[dotted_key(*prefix, *key)] = KeySource(file, line, key)

    def override(self, table: dict[str, Any], assignment: str) -> None:
        """Do in a spec's table what `--set KEY=VALUE` asks for. Raises UserError if there is no such place."""
        key, sign, text = assignment.partition("=")
        path = _key_path(key)
        if not sign or not all(path):
            raise UserError(f"expected KEY=VALUE, found {assignment!r}", key=("--set",))
        name = dotted_key(*path)
        for inner in [known for known in self.keys if known.startswith(f"{name}.")]:
            del self.keys[inner]
        self.keys[name] = KeySource("--set", None, path)
        self.tables.update(dotted_key(*path[:n]) for n in range(1, len(path)))
        try:
            (value,) = tomli.loads(f"x = {text}").values()  # one, however many lines there are
        except (ValueError, RecursionError):  # TOMLDecodeError is a ValueError
            value = text
        try:
            _with(table, path, with_home(value))
        except (LookupError, TypeError, ValueError):
            raise UserError("no table to set this in", key=path) from None

    def locate(self, fault: Fault) -> Fault:
        """Return the mistake with the file and line of its key, else of the nearest table around it."""
        if fault.file is not None or not fault.key or str(fault.key[0]).startswith("--"):
            return fault
        key: KeyPath = ()
        for part in fault.key:  # `blocks[2]` may come from the pattern `block`
            pattern = (*key[:-1], "block")
            from_pattern = key[-1:] == ("blocks",) and dotted_key(*pattern) in self.keys
            key = pattern if from_pattern else (*key, part)
        if (name := dotted_key(*key)) in self.tables and name not in self.keys:
            return attrs.evolve(fault, file="--set")
        known = next(n for n in range(len(key), -1, -1) if dotted_key(*key[:n]) in self.keys)
        source = self.keys[dotted_key(*key[:known])]
        return attrs.evolve(fault, key=(*source.key, *key[known:]), file=source.file, line=source.line)

    @contextmanager
    def locating(self) -> Iterator[None]:
        """Give the mistakes that are raised inside their files and lines; each once, in the order of the files."""
        try:
            yield
        except UserError as error:
            faults = {(f.file, f.dotted, f.message): f for f in map(self.locate, error.faults)}
            raise UserError(faults=sorted(faults.values(), key=lambda f: (f.file or "", f.line or 0))) from None


def _key_path(text: str) -> tuple[str, ...]:
    """Return the parts of a dotted key of TOML, quoted or not, else what stands between its dots."""
    path: list[str] = []
    try:
        table: Any = tomli.loads(f"{text} = 0")
        while isinstance(table, dict):
            ((part, table),) = table.items()
            path.append(part)
    except ValueError:
        path = text.strip().split(".")
    return tuple(path)


def _with(item: Any, path: Sequence[str], value: Any) -> Any:
    """Put a value into a table or list. Raises what these raise if there is no such place."""
    if not path:
        return value
    part, *rest = path
    key: Any = int(part) if isinstance(item, list) else part
    inner = item.get(key, {}) if isinstance(item, dict) else item[key]
    if rest and isinstance(inner, str):  # `mutator = "uniform"` is short for a table
        inner = {"file" if part == "space" else "type": inner}
    item[key] = _with(inner, rest, value)
    return item


def with_home(item: Any) -> Any:
    """Return a spec's table, or what is in it, with paths that begin with `~` as they are on this machine."""
    if isinstance(item, str):
        return os.path.expanduser(item) if item.startswith("~/") else item
    if isinstance(item, dict):
        return {key: with_home(inner) for key, inner in item.items()}
    return [with_home(inner) for inner in item] if isinstance(item, list) else item


DEEPEST = 50
"""How deep tables and lists may stand in each other; those of a space are some ten deep."""


def is_deep(item: Any, most: int) -> bool:
    """Return whether tables and lists stand in each other deeper than allowed."""
    if not isinstance(item, dict | list):
        return False
    inner = item.values() if isinstance(item, dict) else item
    return most == 0 or any(is_deep(each, most - 1) for each in inner)


def read_toml(path: Path, noun: str, **where: Any) -> tuple[str, dict[str, Any]]:
    """Return the text and the table of a file.

    noun: what the file is to the user, for messages
    Raises UserError if it cannot be read (its place is what `where` says) or is no TOML.
    """
    try:
        text = regular(path).read_text(encoding="utf-8-sig")
        table = tomli.loads(text)
        if is_deep(table, DEEPEST):
            raise ValueError(f"tables and lists stand in each other more than {DEEPEST} deep")
        return text, table
    except FileNotFoundError:
        if path.is_symlink():
            text = f"cannot read this {noun} file: it is a link to {os.readlink(path)}, which is not there"
            raise UserError(text, **where) from None
        near = did_you_mean(path.name, _beside(path.parent), f"TOML files in {path.parent}")
        shipped = path.with_suffix("").name
        if noun == "spec" and (SPECS / f"{shipped}.toml").exists():
            near = f"corenas new spec {shipped} writes the one that corenas comes with; {near}"
        raise UserError(f"no such {noun} file", hint=near, **where) from None
    except tomli.TOMLDecodeError as error:
        raise UserError(f"this is no TOML: {error.msg}", file=str(path), line=error.lineno) from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        text = f"cannot read this {noun} file: line {line} is not in UTF-8, in which TOML is written"
        raise UserError(text, **where, hint="save it as UTF-8") from None
    except IsADirectoryError:
        files = ", ".join(_beside(path)[:20]) or "none"
        raise UserError(
            f"cannot read this {noun} file: Is a directory", **where, hint=f"TOML files in it: {files}"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error).partition(":")[0]
        raise UserError(f"cannot read this {noun} file: {reason}", **where) from None


def _beside(folder: Path) -> list[str]:
    """Return the TOML files of a folder."""
    return sorted(file.name for file in folder.glob("*.toml"))


_TOKEN = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}|\'\'\'.*?\'{3,5}|"(?:\\.|[^"\\\n])*"|\'[^\'\n]*\'|#[^\n]*|[\[\]{},=\n]|[^\s\[\]{},=#"\']+',
    re.DOTALL,
)
_OWN_LINE = "line #"
"""The key under which a table says its own line."""


def key_lines(text: str) -> dict[KeyPath, int]:
    """Return the line on which each key of a TOML text that parses is written, array items by number.

    tomli reads the text again with each value replaced by the number of its line, and with one item more in each array
    and in each table that is written as such: its own line.
    """
    marked, opened, expected, line = f'"{_OWN_LINE}" = 1\n', "", "key", 1
    for token in _TOKEN.findall(text + "\n"):
        if token == "\n" and not opened:
            marked += f'\n"{_OWN_LINE}" = {line}\n' if expected == "header" else "\n"
            expected = "key"
        elif token in "=,":
            marked += token
            expected = "value" if token == "=" or opened[-1] == "[" else "key"
        elif token in "]}" and opened:
            marked += token
            opened, expected = opened[:-1], "end"
        elif token in "[{" and expected == "value":
            marked += f"[{line}," if token == "[" else f'{{"{_OWN_LINE}" = {line},'
            opened, expected = opened + token, "value" if token == "[" else "key"
        elif token[0] not in "#\n" and expected != "end":  # a date and its time are two tokens
            marked += str(line) if expected == "value" else token
            expected = {"value": "end", "key": "header" if token == "[" else "key"}.get(expected, expected)
        line += token.count("\n")
    markers = (_OWN_LINE,), (-1,)
    return {key: line for key, line in _lines(tomli.loads(marked), ()).items() if key[-1:] not in markers}


def _lines(item: Any, key: KeyPath) -> dict[KeyPath, int]:
    """Return the lines of an item of the marked text and of all inside. What has no line of its own has the first."""
    if isinstance(item, int):
        return {key: item}
    lines: dict[KeyPath, int] = {}
    if isinstance(item, Mapping):
        parts: Any = item.items()
    else:
        has_own_line = isinstance(item[0], int)
        parts = enumerate(item, -1 if has_own_line else 0)
    for part, inner in parts:
        lines |= _lines(inner, (*key, part))
    return {key: min(lines.values()), **lines}
