"""Trials in several processes of this machine."""

from __future__ import annotations

import os
import threading
import time
from concurrent import futures

from attrs import field, frozen
from attrs.validators import ge, optional

from corenas.hookspecs import hookimpl


@frozen
class Processes:
    """Measures trials in processes of this machine, by loky.

    workers: how many; left out, as many as there are cores
    threads: of torch in each worker
    """

    workers: int | None = field(default=None, validator=optional(ge(1)))
    threads: int = field(default=1, validator=ge(1))

    def start(self) -> futures.Executor:
        """The workers; they are started when something is submitted."""
        from loky import ProcessPoolExecutor
        from loky.backend import get_context

        environment = {name: str(self.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        workers, context = self.workers or os.cpu_count(), get_context("loky")
        return ProcessPoolExecutor(
            workers, context=context, env=environment, initializer=_end_with, initargs=(os.getpid(),)
        )


def _end_with(parent: int) -> None:
    """End this worker soon after its parent: of one that is killed (SIGKILL, out of memory) loky's workers wait on."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    if os.name == "posix":  # Windows gives the number of a parent that is gone
        threading.Thread(target=watch, daemon=True).start()


@hookimpl
def corenas_executors() -> dict[str, type]:
    """The executor "processes"."""
    return {"processes": Processes}
