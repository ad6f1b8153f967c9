"""Columns of CSV, SQLite and Parquet files."""

from __future__ import annotations

import csv
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, TypeAlias

from corenas.errors import UserError, did_you_mean, regular

Columns: TypeAlias = Mapping[str, Sequence[Any]]
Wanted: TypeAlias = Callable[[Sequence[str]], Sequence[str]]
"""Which columns are read of those that there are. Raises UserError if one is missing."""


def read_columns(file: Path, wanted: Wanted, table: str | None = None) -> Columns:
    """Return columns of a file; cells of CSV are text. Raises UserError if it cannot be read."""
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        raise UserError(f"a file of this kind is not read: expected {', '.join(_READERS)}", file=str(file))
    if table is not None and reader is not _sqlite:
        raise UserError("`table` is for SQLite files", file=str(file), hint="leave it out")
    try:
        with regular(file).open("rb"):
            pass
        return reader(file, wanted, table)
    except OSError as error:
        hint = "a relative name is looked for in the working directory"
        raise UserError(f"cannot read this file: {error.strerror or error}", file=str(file), hint=hint) from None


def _csv(file: Path, wanted: Wanted, table: str | None) -> Columns:
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            rows = csv.reader(lines)
            names = next(rows, [])
            places = [(name, names.index(name)) for name in wanted(names)]
            cells: list[list[str]] = [[] for _ in places]
            for row in filter(None, rows):
                if len(row) != len(names):
                    raise UserError(f"{len(row)} cells under {len(names)} columns", file=str(file), line=rows.line_num)
                for column, (_, place) in zip(cells, places, strict=True):
                    column.append(row[place])
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"this is no CSV: {error}", file=str(file)) from None
    return {name: column for (name, _), column in zip(places, cells, strict=True)}


def _sqlite(file: Path, wanted: Wanted, table: str | None) -> Columns:
    try:
        with closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True)) as connection:
            found = connection.execute("select name from sqlite_master where type in ('table', 'view') order by name")
            tables = [name for (name,) in found if not name.startswith("sqlite_")]
            if table is None and len(tables) == 1:
                table = tables[0]
            if table not in tables:
                text = "which table is meant?" if table is None else f"no table {table!r}"
                hint = f"table: one of {', '.join(tables)}" if table is None else did_you_mean(table, tables, "tables")
                raise UserError(text, file=str(file), hint=hint)
            columns = connection.execute("select name from pragma_table_info(?)", [table])
            names = wanted([name for (name,) in columns])
            listed = ", ".join(map(_quoted, names))
            rows = connection.execute(f"select {listed} from {_quoted(table)}").fetchall()
    except sqlite3.Error as error:
        raise UserError(f"this is no SQLite file that can be read: {error}", file=str(file)) from None
    return dict(zip(names, zip(*rows, strict=True) if rows else [()] * len(names), strict=True))


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _parquet(file: Path, wanted: Wanted, table: str | None) -> Columns:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        return _parquet_by_pandas(file, wanted)
    try:
        names = [*wanted(parquet.read_schema(file).names)]
        return parquet.read_table(file, columns=names).to_pydict()
    except ArrowException as error:
        raise UserError(f"this is no Parquet file: {error}", file=str(file)) from None


def _parquet_by_pandas(file: Path, wanted: Wanted) -> Columns:
    try:
        import pandas

        frame = pandas.read_parquet(file)
    except ImportError:
        hint = 'pip install "corenas-evaluator-table[parquet]"; CSV and SQLite files need nothing'
        raise UserError("Parquet files are read by pyarrow", file=str(file), hint=hint) from None
    except ValueError as error:
        raise UserError(f"this is no Parquet file: {error}", file=str(file)) from None
    return {name: frame[name].tolist() for name in wanted([*map(str, frame.columns)])}


_READERS: Mapping[str, Callable[[Path, Wanted, str | None], Columns]] = {
    ".csv": _csv,
    **dict.fromkeys([".sqlite", ".sqlite3", ".db"], _sqlite),
    ".parquet": _parquet,
}
