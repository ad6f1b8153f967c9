"""The directory of a run: who may work in it, and whether it was begun with this spec and this data."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import tomli_w
import torch

import corenas
from corenas import distributed
from corenas.contracts import Emit, Note
from corenas.errors import UserError
from corenas.space import flatten
from corenas.store import Store

_OWN = ("spec.toml", "run.sqlite", "run.sqlite-wal", "run.sqlite-shm", "supernet.pt", "retrain*.pt", "best*",
        "report.html")  # fmt: skip
"""What a run writes into its directory; some of it under a name ending in `.part` first."""
_held: list[int] = []
"""Handles that hold a lock. Workers that read data do not: they may outlive a run that is killed, by seconds."""
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: [*map(os.close, _held)])


def check_folder(folder: Path, fresh: bool) -> None:
    """Raise UserError for a folder that holds something else than a run, or a run that lost its database."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    database = folder / "run.sqlite"
    if not database.exists() and not (folder / "spec.toml").exists():
        raise UserError("this folder is not empty and holds no run", file=str(folder), hint="another one: --out DIR")
    if not fresh and (not database.exists() or (database.stat().st_size == 0 and (folder / "spec.toml").exists())):
        raise UserError("the database of this run is gone", file=str(database),
                        hint="put back a copy of it, or begin anew: --fresh")  # fmt: skip


@contextmanager
def opened(folder: Path, table: Mapping[str, Any], data: Mapping[str, Any], fresh: bool, emit: Emit) -> Iterator[Store]:
    """The store of a run directory that is new or was begun with this spec and this data, for this process alone.

    Of several processes under torchrun the first one has it, the others have an empty one.
    Raises UserError, in all processes, if another program works in it or it belongs to another spec.
    """
    store = Store()
    versions = {"corenas": corenas.__version__, "torch": torch.__version__, "python": platform.python_version(),
                "threads": torch.get_num_threads(), "processes": distributed.world()}  # fmt: skip

    def enter() -> None:
        nonlocal store
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _lock(folder, after)
            if fresh:
                _empty(folder)
            store = Store(folder / "run.sqlite")  # before all else: it is what marks the folder as a run
            after.callback(store.close)
            _begin(store, folder, table, data, emit, versions["threads"])
            store.note("versions", versions)
        except OSError as error:
            text = f"cannot write into this run directory: {error.strerror}"
            raise UserError(text, file=str(folder), hint="another one: --out DIR") from error

    with ExitStack() as after:
        distributed.on_rank_zero(enter)
        yield store


def _lock(folder: Path, after: ExitStack) -> None:
    """Only one program at a time works in a run directory."""
    with suppress(ImportError):  # no such locks on Windows
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
        _held.append(handle)
        after.callback(os.close, handle)
        after.callback(_held.remove, handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError("another corenas is at work in this run directory", file=str(folder)) from None


def _empty(folder: Path) -> None:
    """Delete what a run has written, and nothing else."""
    for name in _OWN:
        for path in [*folder.glob(name), *folder.glob(f"{name}.part")]:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _begin(
    store: Store, folder: Path, table: Mapping[str, Any], data: Mapping[str, Any], emit: Emit, threads: int
) -> None:
    """Refuse what was begun with another spec or data, and note what it is begun with. A run that is new is noted."""
    plain = json.loads(json.dumps(table))
    begun = store.noted("spec", plain)
    if begun != plain:
        ours, theirs = flatten(plain), flatten(begun)
        keys = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
        changes = ", ".join(f"{key} ({theirs.get(key)} then, {ours.get(key)} now)" for key in keys[:8])
        raise UserError(f"this run was begun with another spec: {changes}", file=str(folder),
                        hint="--out DIR for another directory, --fresh to begin anew")  # fmt: skip
    for name, found in data.items():
        before = store.noted(name, found)
        if before != found:
            what = "supernet" if name == "supernet" else "data"
            text = f"the {what} has changed since this run was begun: {before} then, {found} now"
            raise UserError(text, file=str(folder), hint="put it back, or --fresh to begin anew")
        store.note(name, found)
    before = store.noted("versions", {}).get("threads")
    if before not in (None, threads):
        emit(Note(f"begun with {before} threads and goes on with {threads}: sums come out in another order, "
                  f"and results may differ in the last digits; device.threads = {before} keeps them"))  # fmt: skip
    (folder / "spec.toml.part").write_text(tomli_w.dumps(table), encoding="utf-8")
    os.replace(folder / "spec.toml.part", folder / "spec.toml")
    store.note("spec", plain)


def check_checkpoint(store: Store, path: Path, stage: str, every: int) -> None:
    """Raise UserError for a checkpoint that was there and is no more: training anew would take its time again."""
    written = any(figures.get("epoch", 0) % every == 0 for _, figures in store.curve(stage))
    if written and not path.exists():
        raise UserError("this checkpoint is gone, and training had come further", file=str(path),
                        hint="put back a copy of it, or begin anew: --fresh")  # fmt: skip
