"""The directory of a run: who may work in it, which files in it are its own, and what it was begun with."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import tomli_w
import torch

import corenas
from corenas import distributed
from corenas.checkpoint import Checkpoint
from corenas.contracts import Emit, Note
from corenas.errors import UserError
from corenas.optim import Schedule, hangs_on_length
from corenas.options import structure
from corenas.run.spec import parse_duration
from corenas.space import flatten
from corenas.store import Store

_held: list[int] = []
"""Handles that hold a lock. Workers that read data do not: they may outlive a run that is killed, by seconds."""
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: [*map(os.close, _held)])


class OwnFiles:
    """The list, in the directory itself, of the files that a run has written there; it touches no others.

    Names are relative to the directory; one that ends in a slash is a folder with all that is in it.
    """

    NAME, PART = ".corenas", ".corenas.part"
    _TITLE = "# A run directory of corenas. What is listed here is its own; --fresh deletes that and nothing else."

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / self.NAME

    def exists(self) -> bool:
        """Return whether the directory is that of a run."""
        with suppress(OSError, UnicodeDecodeError):
            return self.path.read_text(encoding="utf-8").startswith(self._TITLE)
        return False

    def begin(self) -> None:
        """Make an empty list. Raises UserError if a file of another kind has its name."""
        if self.path.exists() and not self.exists():
            raise UserError("this file is none of a run's", file=str(self.path), hint="another directory: --out DIR")
        self._write([])

    def _write(self, names: Sequence[str]) -> None:
        """Replace the list, whole or not at all: half a name could be that of a file of the user's."""
        temporary = self.path.with_name(self.PART)
        try:
            temporary.write_text("".join(f"{line}\n" for line in (self._TITLE, *names)), encoding="utf-8")
            os.replace(temporary, self.path)
        except OSError:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise

    def names(self) -> list[str]:
        """Return what is listed, the newest last; no place outside of the directory, whoever has written that there."""
        listed = self.path.read_text(encoding="utf-8").splitlines()[1:] if self.exists() else []
        return [name for name in listed if (parts := Path(name).parts) and ".." not in parts and not Path(name).anchor]

    def claim(self, *names: str) -> None:
        """List files, before they are written. Raises UserError if one is there that the run has not written."""
        own = {*self.names()}
        new = [name for name in names if name not in own]
        for name in new:
            path = self.folder / name
            if path.exists() or path.is_symlink():
                text = "this file was not written by this run, which needs its name"
                raise UserError(text, file=str(path), hint="move it, or take another directory: --out DIR")
        if not self.exists():
            self.begin()
        if new:
            self._write([*self.names(), *new])

    def delete(self, under: str = "") -> None:
        """Delete what is listed, or what of it is in one folder, and folders that are then empty.

        Killed meanwhile it leaves a run that is whole but for its spec, which is in the database too, or no database.
        """
        names = [name for name in self.names() if name.startswith(under)]
        first = {"spec.toml": 0, "run.sqlite": 1}
        names.sort(key=lambda name: first.get(name, 2))
        for name in names:
            path = self.folder / name
            if not path.parent.resolve().is_relative_to(self.folder.resolve()):
                continue  # a link of the user's leads elsewhere
            if name.endswith("/"):
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        parents = {parent for name in names for parent in Path(name).parents if parent != Path()}
        for parent in sorted(parents, key=lambda parent: len(parent.parts), reverse=True):
            with suppress(OSError):  # something of the user's is in it
                (self.folder / parent).rmdir()

    @contextmanager
    def replacing(self, folder: Path) -> Iterator[Path]:
        """Yield an empty folder; what is written into it then replaces what the run had written in its place.

        It appears whole, unless there is something of the user's beside which its files are put one by one.
        """
        temporary = _part_of(folder)
        name = f"{temporary.relative_to(self.folder)}/"
        self.delete(name)  # what a killed process has left
        self.claim(name)
        try:
            temporary.mkdir(parents=True)
            yield temporary
            self._place(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _place(self, temporary: Path, folder: Path) -> None:
        name = folder.relative_to(self.folder)
        files = sorted(path.relative_to(temporary) for path in temporary.rglob("*") if path.is_file())
        self.delete(f"{name}/")
        self.claim(*(f"{name / file}" for file in files))
        if not folder.exists():
            os.replace(temporary, folder)
            return
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary / file, folder / file)

    def foreign(self) -> list[str]:
        """Return what else is in the directory."""
        own = {*self.names(), self.NAME, self.PART}
        folders = tuple(name for name in own if name.endswith("/"))
        paths = (str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if not path.is_dir())
        return sorted(path for path in paths if path not in own and not path.startswith(folders))


def _part_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.part")


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes one which is empty or not there; if anything is raised there is nothing of it.

    Raises UserError as `refuse_filled` does.
    """
    refuse_filled(folder)
    around = _part_of(folder)
    around.mkdir(parents=True, exist_ok=True)
    with ExitStack() as after:
        _lock(around, after)
        if any(around.iterdir()):
            raise UserError("this was not written by corenas, which needs its name", file=str(around), hint="move it")
        OwnFiles(around).begin()
        after.callback(_remove_part, around)
        inside = around / folder.name
        inside.mkdir()
        yield inside
        if folder.exists():
            folder.rmdir()
        os.replace(inside, folder)


def refuse_filled(folder: Path) -> None:
    """Raise UserError unless a folder is empty or not there. What a killed process has left beside it is deleted.

    So it does while another process writes it.
    """
    around = _part_of(folder)
    if OwnFiles(around).exists():
        with ExitStack() as after:
            _lock(around, after)
            _remove_part(around)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError("this is no empty folder", file=str(folder), hint="another one: --to DIR")


def _remove_part(around: Path) -> None:
    """Delete what `appearing` makes beside a folder; what says whose it is goes last."""
    for path in around.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
    for name in (OwnFiles.PART, OwnFiles.NAME):
        (around / name).unlink(missing_ok=True)
    with suppress(OSError):
        around.rmdir()


def check_folder(folder: Path, fresh: bool) -> None:
    """Raise UserError for a folder that holds something else than a run, or a run that lost its database."""
    if not folder.is_dir() or {path.name for path in folder.iterdir()} <= {OwnFiles.PART}:
        return
    database = folder / "run.sqlite"
    if not OwnFiles(folder).exists():
        text = "this folder is not empty and holds no run"
        if database.exists():
            text = "this run was begun by another version of corenas, which listed no files as its own"
        raise UserError(text, file=str(folder), hint="another one: --out DIR")
    lost = not database.exists() or database.stat().st_size == 0
    if not fresh and lost and (folder / "spec.toml").exists():
        hint = "put back a copy of it, or begin anew: --fresh"
        raise UserError("the database of this run is gone", file=str(database), hint=hint)


@contextmanager
def opened(folder: Path, table: Mapping[str, Any], data: Mapping[str, Any], fresh: bool, emit: Emit) -> Iterator[Store]:
    """Open the store of a run directory that is new or was begun with this spec and this data, for this process alone.

    Of several processes under torchrun the first one has it, the others have an empty one.
    Raises UserError, in all processes, if another program works in it or it belongs to another spec.
    """
    store = Store()
    processes = distributed.world()  # what enters is by itself, and would count one

    def enter() -> None:
        nonlocal store
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _lock(folder, after)
            files = OwnFiles(folder)
            if fresh or not (folder / "run.sqlite").exists():  # new, or what emptied it was killed
                _empty(files, emit)
                files.begin()
            files.claim("run.sqlite", "run.sqlite-wal", "run.sqlite-shm", "spec.toml", "spec.toml.part")
            store = Store(folder / "run.sqlite")
            after.callback(store.close)
            _begin(store, table, data, folder, emit)
            _keep_versions(store, processes, emit)
            (folder / "spec.toml.part").write_text(tomli_w.dumps(table), encoding="utf-8")
            os.replace(folder / "spec.toml.part", folder / "spec.toml")
        except OSError as error:
            text = f"cannot write into this run directory: {error.strerror}"
            raise UserError(text, file=str(folder), hint="another one: --out DIR") from error

    with ExitStack() as after:
        distributed.on_rank_zero(enter)
        yield store


def _lock(folder: Path, after: ExitStack) -> None:
    """Let only one program at a time work in a run directory."""
    with suppress(ImportError):  # no such locks on Windows
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
        _held.append(handle)
        after.callback(os.close, handle)
        after.callback(_held.remove, handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError("another corenas is at work in this folder", file=str(folder)) from None


def _empty(files: OwnFiles, emit: Emit) -> None:
    """Delete what a run has written, and tell what stays."""
    files.delete()
    if foreign := files.foreign():
        shown = ", ".join(foreign[:8]) + (f" and {len(foreign) - 8} more" if len(foreign) > 8 else "")
        emit(Note(f"what this run has not written stays in {files.folder}: {shown}"))


_FREE = re.compile(
    r"executor(\..*)?|export\..*|device\.threads|plugins|name|(retrain\.)?(train\.(workers|validate)|task\.data\.(root|file))"
)
"""Keys that may change as a run goes on: no result hangs on them, or, as on threads, it is told that it does."""


def is_place(key: str) -> bool:
    """Return whether a key says where data lies; whether it is the same data, its fingerprint says."""
    return re.fullmatch(r"(retrain\.)?task\.data\.(root|file)", key) is not None


_LENGTHS = ("search.trials", "search.budget")


def _why_no_longer_search(key: str, before: Any, now: Any, store: Store) -> str | None:
    """Return why a search cannot go on with another length; None where it can."""
    if store.curve("retrain"):
        return "the network that this search has found is retrained already"
    if key == "search.trials":
        longer = isinstance(before, int) and now > before
    else:
        longer = now is None or (
            before is not None and (parse_duration(now) or 0) > (parse_duration(before) or math.inf)
        )
    return None if longer else "a search goes on for longer, not for less"


def _why_no_longer_training(before: Any, table: Mapping[str, Any], store: Store, folder: Path) -> str | None:
    """Return why the supernet of a run cannot be trained for more epochs than before; None where it can."""
    train = table["train"]
    if not isinstance(before, int) or train["epochs"] <= before:
        return "a training goes on for more epochs, not for fewer"
    schedule = structure(train["schedule"], Schedule)
    if hangs_on_length(schedule):
        return f"the {schedule.type} schedule of this run has ended with its last epoch; a constant one goes on"
    if train.get("stop") is not None:
        return "train.stop says when this training ends"
    if store.curve("retrain"):
        return "a network that was found has been retrained; [retrain] in a run of its own can go on from the supernet"
    checkpoint = Checkpoint(folder / "supernet.pt")
    if not checkpoint.found:
        return "there is no supernet that could be trained on"
    return "this algorithm trains in phases, and the first is over" if checkpoint.place[0] > 0 else None


def _begin(store: Store, table: Mapping[str, Any], data: Mapping[str, Any], folder: Path, emit: Emit) -> None:
    """Refuse what was begun with another spec or data, and keep what it is begun with. A run that is new is kept."""
    plain = json.loads(json.dumps(table))
    begun = store.get("spec", plain)
    ours, theirs = flatten(plain), flatten(begun)
    changed = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    known = data.get("data") is not None  # whether other data would be noticed
    keys = [key for key in changed if not _FREE.fullmatch(key) or (is_place(key) and not known)]
    why = {key: _why_no_longer_search(key, theirs.get(key), ours.get(key), store) for key in keys if key in _LENGTHS}
    keys = [key for key in keys if why.get(key, "") is not None]
    hint = "--out DIR for another directory, --fresh to begin anew"
    if {*keys} <= {*why}:
        hint = "; ".join([*dict.fromkeys(reason for reason in why.values() if reason), f"or {hint}"])
    if keys == ["train.epochs"]:
        why = _why_no_longer_training(theirs.get("train.epochs"), plain, store, folder)
        if why is None:
            text = f"{len(store.trials())} trials that were measured with its weights so far are gone"
            emit(Note(f"the supernet is trained on; {text}"))
            store.forget_trials()
            store.set("result", None)
            keys = []
        else:
            hint = f"{why}; or {hint}"
    if not keys and any(key.startswith(("search.", "export.")) for key in changed):
        store.set("result", None)  # it is made anew of what is there, and of what comes
    if keys:
        inner = [key for key in keys if not any(other.startswith(f"{key}.") for other in keys)]
        was, now = ({key: values.get(key, "left out") for key in inner} for values in (theirs, ours))
        changes = ", ".join(f"{key} ({was[key]} then, {now[key]} now)" for key in inner[:8])
        raise UserError(f"this run was begun with another spec: {changes}", file=str(folder), hint=hint)
    for name, now in data.items():
        then = store.get(name, now)
        if then != now:
            what = {"supernet": "supernet", "backbone": "file of the backbone's weights"}.get(name, "data")
            text = f"the {what} has changed since this run was begun: {then} then, {now} now"
            raise UserError(text, file=str(folder), hint="put it back, or --fresh to begin anew")
        store.set(name, now)
    store.set("spec", plain)


def check_base(base: Path, fingerprint: str | None) -> None:
    """Raise UserError if the run whose supernet is used was trained on other data: what it saw would be test data."""
    if fingerprint is None or not (base / "run.sqlite").exists():
        return
    store = Store(base / "run.sqlite", readonly=True)
    then = store.get("data", fingerprint)
    store.close()
    if then not in (None, fingerprint):
        text = f"the supernet of {base} was trained on other data, or cut otherwise: {then} then, {fingerprint} now"
        raise UserError(text, key=("task", "data"), hint="the same data, wherever it lies")


def _keep_versions(store: Store, processes: int, emit: Emit) -> None:
    """Keep the versions that a run computes with; tell if it goes on with another number of threads."""
    threads = torch.get_num_threads()
    before = store.get("versions", {}).get("threads")
    if before not in (None, threads):
        text = f"begun with {before} threads and goes on with {threads}: sums come out in another order, and results"
        emit(Note(f"{text} may differ in the last digits; device.threads = {before} keeps them"))
    versions = {
        "corenas": corenas.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": threads,
        "processes": processes,
    }
    store.set("versions", versions)


def check_checkpoint(store: Store, path: Path, stage: str, every: int) -> None:
    """Raise UserError for a checkpoint that was there and is no more: training anew would take its time again."""
    written = any(figures.get("epoch", 0) % every == 0 for _, figures in store.curve(stage))
    if written and not path.exists():
        hint = "put back a copy of its own, or begin anew: --fresh"
        raise UserError("this checkpoint is gone, and training had come further", file=str(path), hint=hint)
