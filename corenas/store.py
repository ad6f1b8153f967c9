"""What is kept of a run: one SQLite file with its trials, its searcher's state and what it was asked."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from corenas.contracts import Trial
from corenas.errors import UserError
from corenas.space import Arch

_SCHEMA = """
CREATE TABLE IF NOT EXISTS notes (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS trials (
    id INTEGER PRIMARY KEY, arch TEXT NOT NULL UNIQUE, metrics TEXT NOT NULL, state TEXT NOT NULL,
    seconds REAL NOT NULL, error TEXT
);
"""


class Store:
    """The database of a run directory. Each write is one transaction; a killed process loses at most the one it was in.

    path: the file, made if need be; None keeps everything in memory
    Raises UserError if the file cannot be opened, read or written.
    """

    def __init__(self, path: Path | None = None, readonly: bool = False) -> None:
        self.path = path
        if readonly and (path is None or not path.exists()):
            raise UserError("no such run", file=path and str(path.parent), hint="it has no run.sqlite")
        with self._reported():
            self._db = sqlite3.connect(":memory:" if path is None else path)
            if not readonly:
                self._db.execute("PRAGMA journal_mode=WAL")
                self._db.executescript(_SCHEMA)

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            hint = "is the disk full, or the file broken? nothing that was stored before is lost"
            raise UserError(f"cannot use this database: {error}", file=str(self.path), hint=hint) from error

    def note(self, key: str, value: Any) -> None:
        """Keep plain data under a name."""
        with self._reported(), self._db:
            self._db.execute("INSERT OR REPLACE INTO notes VALUES (?, ?)", (key, json.dumps(value)))

    def noted(self, key: str, default: Any = None) -> Any:
        """What was kept under a name."""
        with self._reported():
            row = self._db.execute("SELECT value FROM notes WHERE key = ?", (key,)).fetchone()
        return default if row is None else json.loads(row[0])

    def add(self, trial: Trial) -> None:
        """Store a trial."""
        row = trial.to_json()
        values = (json.dumps(row["arch"]), json.dumps(row["metrics"]), row["state"], row["seconds"], row["error"])
        with self._reported(), self._db:
            self._db.execute("INSERT INTO trials (arch, metrics, state, seconds, error) VALUES (?, ?, ?, ?, ?)", values)

    def trials(self) -> list[Trial]:
        """All trials, in the order in which they were made."""
        with self._reported():
            rows = self._db.execute("SELECT arch, metrics, state, seconds, error FROM trials ORDER BY id").fetchall()
        return [Trial(Arch(json.loads(a)), json.loads(m), state, s, error) for a, m, state, s, error in rows]

    def close(self) -> None:
        """Close the file."""
        self._db.close()
