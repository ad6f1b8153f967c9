"""What is kept of a run: one SQLite file with its trials, its curves, its searcher's state and its spec."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

from corenas.errors import UserError
from corenas.objectives import State, Trial
from corenas.space import SearchSpace

_VERSION = 3
_LONGEST_PATH = 500
"""Of SQLite are 512 bytes of a file's path, with what it calls those beside it."""
_SCHEMA = f"""
BEGIN;
CREATE TABLE IF NOT EXISTS notes (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS trials (
    id INTEGER PRIMARY KEY, search INTEGER NOT NULL, arch TEXT NOT NULL, fidelity REAL NOT NULL, metrics TEXT NOT NULL,
    state TEXT NOT NULL, seconds REAL NOT NULL, error TEXT, extra TEXT NOT NULL, UNIQUE (search, arch, fidelity)
);
CREATE TABLE IF NOT EXISTS curves (
    stage TEXT NOT NULL, done INTEGER NOT NULL, figures TEXT NOT NULL, PRIMARY KEY (stage, done)
);
PRAGMA user_version = {_VERSION};
COMMIT;
"""
_COLUMNS = "arch, metrics, state, seconds, error, fidelity, extra"
_NUMBER, _NONE = (int, float), type(None)
_FIGURES = {str: (*_NUMBER, _NONE)}
_CHOICES = {str: (*_NUMBER, str, bool)}
_FOUND = {"arch": _CHOICES, "metrics": _FIGURES}
_SHAPES: Mapping[str, Any] = {
    "spec": {str: Any},
    "seconds": {str: _NUMBER},
    "versions": {str: (*_NUMBER, str, _NONE)},
    "searches": [str],
    "splits": {str: int},
    "plugins": {str: str},
    "metrics": {str: {str: Any}},
    "objectives": {"objectives": [{"metric": str, "direction": str, "weight": _NUMBER}]},
    "device": str,
    "cut": str,
    "searcher": {"state": {str: Any}, "told": int, "seconds": _NUMBER},
    "trust": _FIGURES,
    "result": ({"best": _FOUND, "front": [_FOUND], "table": [_FOUND], "trials": int}, _NONE),
}
"""What notes have to be, by their names: a type, several, [of each item], {key: of its value}, {str: of all values}."""
_TRIAL = {"arch": _CHOICES, "metrics": _FIGURES, "state": str, "seconds": _NUMBER, "error": (str, _NONE),
          "fidelity": _NUMBER, "extra": {str: Any}}  # fmt: skip


def _fits(value: Any, shape: Any) -> bool:
    """Return whether plain data has a shape."""
    if isinstance(shape, tuple):
        return any(_fits(value, one) for one in shape)
    if isinstance(shape, list):
        return isinstance(value, list) and all(_fits(item, shape[0]) for item in value)
    if isinstance(shape, dict):
        shapes = shape.items() if isinstance(value, dict) else ()
        return isinstance(value, dict) and all(
            all(_fits(item, inner) for item in value.values()) if key is str else _fits(value.get(key), inner)
            for key, inner in shapes
        )
    return shape is Any or type(value) is shape


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
            if path is not None and tables:
                self._check()
            if not readonly:
                self._db.execute("PRAGMA journal_mode=WAL")
                # A killed process loses nothing by it. Of a machine that loses power the last writes may be missing,
                # never some from between, and none is waited for: 20 ms each on a busy disk.
                self._db.execute("PRAGMA synchronous=NORMAL")
                self._db.executescript(_SCHEMA)

    def _check(self) -> None:
        """Raise UserError with the tables in which SQLite finds pages that are damaged."""
        lost = []
        for table in ("notes", "trials", "curves"):
            try:
                found = self._db.execute(f"PRAGMA integrity_check({table})").fetchall()
            except (sqlite3.Error, UnicodeDecodeError):
                found = []
            lost += [] if found == [("ok",)] else [table]
        if lost:
            self._db.close()
            raise self._damaged(" and ".join(lost))

    def _damaged(self, part: str) -> UserError:
        hint = "put back a copy, or begin anew: --fresh; best/ and supernet.pt are files of their own, and whole"
        return UserError(f"this database is damaged: of its {part} not all can be read", file=str(self.path), hint=hint)

    def _loaded(self, part: str, shape: Any, text: Any) -> Any:
        """Return JSON as plain data. Raises UserError if it is none, or of another shape."""
        try:
            value = json.loads(text)
        except (ValueError, TypeError, RecursionError):  # a type that is none of SQLite's text, too
            raise self._damaged(part) from None
        if not _fits(value, shape):
            raise self._damaged(part)
        return value

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, UnicodeDecodeError) as error:
            hint = "is the disk full, may it be written? of a broken file put back a copy, or begin anew: --fresh"
            if self.path is not None and len(os.fsencode(self.path.absolute())) > _LONGEST_PATH:
                hint = f"SQLite takes no path of more than {_LONGEST_PATH} bytes: another folder, --out DIR"
            raise UserError(f"cannot use this database: {error}", file=str(self.path), hint=hint) from error

    def set(self, key: str, value: Any) -> None:
        """Keep plain data under a name."""
        self._write("INSERT OR REPLACE INTO notes VALUES (?, ?)", key, json.dumps(value))

    def get(self, key: str, default: Any = None) -> Any:
        """Return what was kept under a name."""
        rows = self._read("SELECT value FROM notes WHERE key = ?", key, part=f"notes `{key}`")
        shape = _SHAPES.get(key.partition(":")[0], Any)  # "searcher:1" is the state of the second search
        return self._loaded(f"notes `{key}`", shape, rows[0][0]) if rows else default

    def add(self, trial: Trial, search: int = 0) -> None:
        """Store a trial of one of a run's searches."""
        arch, metrics, extra = (json.dumps(dict(part)) for part in (trial.arch, trial.metrics, trial.extra))
        row = arch, metrics, trial.state, trial.seconds, trial.error, trial.fidelity, extra, search
        self._write(f"INSERT INTO trials ({_COLUMNS}, search) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", *row)

    def trials(self, search: int | None = None) -> list[Trial]:
        """Return the trials of one of a run's searches, or of all, in the order in which they were made."""
        if search is None:
            rows = self._read(f"SELECT {_COLUMNS} FROM trials ORDER BY id", part="trials")
        else:
            rows = self._read(f"SELECT {_COLUMNS} FROM trials WHERE search = ? ORDER BY id", search, part="trials")
        return [self._trial(*row) for row in rows]

    def _trial(self, arch: Any, metrics: Any, state: Any, seconds: Any, error: Any, fidelity: Any, extra: Any) -> Trial:
        arch, metrics, extra = (self._loaded("trials", Any, text) for text in (arch, metrics, extra))
        data = {"arch": arch, "metrics": metrics, "state": state, "seconds": seconds, "error": error,
                "fidelity": fidelity, "extra": extra}  # fmt: skip
        if not _fits(data, _TRIAL) or state not in get_args(State) or not 0 < fidelity <= 1:
            raise self._damaged("trials")
        return Trial.from_json(data)

    def check_trials(self, space: SearchSpace, metrics: Iterable[str] = ()) -> None:
        """Raise UserError if a trial is of no arch of a space, or one that is done lacks one of some metrics."""
        trials, needed = self.trials(), {*metrics}
        try:
            space.encode([trial.arch for trial in trials])
        except (KeyError, ValueError, TypeError):
            raise self._damaged("trials") from None
        if any(len(t.arch) != len(space.keys) or (t.ok and not needed <= t.metrics.keys()) for t in trials):
            raise self._damaged("trials")

    def forget_trials(self) -> None:
        """Delete all trials, and what searches and the checks of their rankings have kept."""
        self._write("DELETE FROM trials")
        self._write("DELETE FROM notes WHERE key LIKE 'searcher:%' OR key LIKE 'trust:%'")

    def point(self, stage: str, done: int, figures: Mapping[str, float]) -> None:
        """Store a point of a stage's curve; one that is there already is replaced."""
        self._write("INSERT OR REPLACE INTO curves VALUES (?, ?, ?)", stage, done, json.dumps(dict(figures)))

    def curve(self, stage: str) -> list[tuple[int, dict[str, float]]]:
        """Return a stage's curve: how far it had come, and its figures then."""
        query = "SELECT done, figures FROM curves WHERE stage = ? ORDER BY done"
        rows = self._read(query, stage, part="curves")
        return [(done, self._loaded("curves", _FIGURES, figures)) for done, figures in rows]

    def _write(self, sql: str, *values: Any) -> None:
        with self._reported(), self._db:
            self._db.execute(sql, values)

    def _read(self, sql: str, *values: Any, part: str) -> list[tuple[Any, ...]]:
        with self._reported():
            try:
                return self._db.execute(sql, values).fetchall()
            except sqlite3.OperationalError as error:
                if "decode" in str(error):  # text that is no UTF-8
                    raise self._damaged(part) from None
                raise

    def close(self) -> None:
        """Close the file."""
        self._db.close()
