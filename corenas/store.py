"""What is kept of a run: one SQLite file with its trials, its curves, its searcher's state and its spec."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from corenas.errors import UserError
from corenas.objectives import Trial
from corenas.space import Arch

_VERSION = 3
_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS notes (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS trials (
    id INTEGER PRIMARY KEY, search INTEGER NOT NULL, arch TEXT NOT NULL, fidelity REAL NOT NULL, metrics TEXT NOT NULL,
    state TEXT NOT NULL, seconds REAL NOT NULL, error TEXT, extra TEXT NOT NULL, UNIQUE (search, arch, fidelity)
);
CREATE TABLE IF NOT EXISTS curves (
    stage TEXT NOT NULL, done INTEGER NOT NULL, figures TEXT NOT NULL, PRIMARY KEY (stage, done)
);
PRAGMA user_version = {_VERSION};
"""
_COLUMNS = "arch, metrics, state, seconds, error, fidelity, extra"


def strict_json(content: Any, indent: int | None = None) -> str:
    """Return plain data as JSON; what is no number, or infinite, is null there."""
    return json.dumps(json.loads(json.dumps(content), parse_constant=lambda name: None), indent=indent)


class Store:
    """The database of a run directory. Each write is one transaction; a killed process loses at most the one it was in.

    path: the file, made if need be; None keeps everything in memory
    readonly: nothing is written, so that the medium need not be writable either
    Raises UserError if the file cannot be opened, read or written.
    """

    def __init__(self, path: Path | None = None, readonly: bool = False) -> None:
        self.path = path
        if readonly and (path is None or not path.exists()):
            raise UserError("no such run", file=path and str(path.parent), hint="it has no run.sqlite")
        with self._reported():
            name = ":memory:" if path is None else path.absolute().as_uri()
            if readonly and not Path(f"{path}-wal").exists():  # else a file beside it has to be made to read this one
                name += "?immutable=1"
            self._db = sqlite3.connect(name, uri=True)
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            (tables,) = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if version != _VERSION and (tables or readonly):
                self._db.close()
                raise UserError(
                    "this database is empty, or of another version of corenas",
                    file=str(path),
                    hint="put back a copy of it, or begin anew: --fresh",
                )
            if not readonly:
                self._db.execute("PRAGMA journal_mode=WAL")
                self._db.executescript(_SCHEMA)

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            hint = "is the disk full? of a file that is broken put back a copy, or begin anew: --fresh"
            raise UserError(f"cannot use this database: {error}", file=str(self.path), hint=hint) from error

    def set(self, key: str, value: Any) -> None:
        """Keep plain data under a name."""
        self._write("INSERT OR REPLACE INTO notes VALUES (?, ?)", key, json.dumps(value))

    def get(self, key: str, default: Any = None) -> Any:
        """Return what was kept under a name."""
        rows = self._read("SELECT value FROM notes WHERE key = ?", key)
        return json.loads(rows[0][0]) if rows else default

    def add(self, trial: Trial, search: int = 0) -> None:
        """Store a trial of one of a run's searches."""
        arch, metrics, extra = (json.dumps(dict(part)) for part in (trial.arch, trial.metrics, trial.extra))
        row = arch, metrics, trial.state, trial.seconds, trial.error, trial.fidelity, extra, search
        self._write(f"INSERT INTO trials ({_COLUMNS}, search) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", *row)

    def trials(self, search: int | None = None) -> list[Trial]:
        """Return the trials of one of a run's searches, or of all, in the order in which they were made."""
        if search is None:
            rows = self._read(f"SELECT {_COLUMNS} FROM trials ORDER BY id")
        else:
            rows = self._read(f"SELECT {_COLUMNS} FROM trials WHERE search = ? ORDER BY id", search)
        return [
            Trial(Arch(json.loads(arch)), json.loads(metrics), state, seconds, error, fidelity, json.loads(extra))
            for arch, metrics, state, seconds, error, fidelity, extra in rows
        ]

    def point(self, stage: str, done: int, figures: Mapping[str, float]) -> None:
        """Store a point of a stage's curve; one that is there already is replaced."""
        self._write("INSERT OR REPLACE INTO curves VALUES (?, ?, ?)", stage, done, json.dumps(dict(figures)))

    def curve(self, stage: str) -> list[tuple[int, dict[str, float]]]:
        """Return a stage's curve: how far it had come, and its figures then."""
        rows = self._read("SELECT done, figures FROM curves WHERE stage = ? ORDER BY done", stage)
        return [(done, json.loads(figures)) for done, figures in rows]

    def _write(self, sql: str, *values: Any) -> None:
        with self._reported(), self._db:
            self._db.execute(sql, values)

    def _read(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._reported():
            return self._db.execute(sql, values).fetchall()

    def close(self) -> None:
        """Close the file."""
        self._db.close()
