"""What every executor promises: `@pytest.mark.parametrize("check", executor_checks)` in a plugin's tests.

Each check takes the options of an executor. Needs no torch.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from concurrent import futures
from pathlib import Path

import numpy as np
from attrs import frozen

from corenas.contracts import Executor, Problem
from corenas.errors import UserError
from corenas.objectives import Objective, Objectives, Trial
from corenas.plugins import load_catalogue
from corenas.space import Arch, SearchSpace
from corenas.testing.components import component_checks

PATIENCE = 120.0
"""Seconds after which a task that has not come back counts as lost."""


def square(n: int) -> int:
    """A task; later ones are done sooner."""
    time.sleep(0.02 / (1 + n))
    return n * n


def wrong(text: str) -> None:
    """A task that ends in the user's mistake, with the key that it is about."""
    raise UserError(text, key=("executor",), hint="this is a test")


def broken(n: int) -> float:
    """A task that raises an exception of Python's."""
    return 1 / n


def trial_of(arch: Arch, fidelity: float = 1.0) -> Trial:
    """A task as the search loop has it."""
    return Trial(arch, {"gain": float(arch["a"])}, fidelity=fidelity)


@frozen
class Fragile:
    """Measures archs of one `width`; of one its worker dies, once or always.

    folder: where a file is left for each width that killed a worker
    """

    folder: Path
    fatal: int = -1
    once: int = -1
    batch: int = 1

    def __call__(self, trials: Sequence[Trial]) -> list[Trial]:
        """Return the trials with their gain."""
        for trial in trials:
            width, mark = trial.arch["width"], self.folder / f"{trial.arch['width']}"
            if width == self.fatal or (width == self.once and not mark.exists()):
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return [Trial(trial.arch, {"gain": float(-((trial.arch["width"] - 17) ** 2))}) for trial in trials]


def searched(
    measure: Fragile,
    executor: Executor | None = None,
    searcher: str = "evolution",
    budget: int = 30,
    batch: int = 6,
) -> list[Trial]:
    """Return the trials of a search of 40 widths, measured by an executor or here."""
    from corenas.search import run_search  # which imports torch

    space, best = SearchSpace.from_table({"width": [*range(40)]}), Objectives((Objective("gain"),))
    options = load_catalogue().options("searchers", searcher)
    live = options.start(Problem(space, best, budget=budget), np.random.default_rng(0))
    return [*run_search(live, measure, budget, batch=batch, executor=executor, objectives=best)]


def runs_tasks_in_any_number(executor: Executor) -> None:
    """`start` gives a `concurrent.futures.Executor`; each future has its own task's result, more tasks than workers."""
    with executor.start() as workers:
        assert isinstance(workers, futures.Executor)
        running = [workers.submit(square, n) for n in range(40)]
        assert [future.result(PATIENCE) for future in running] == [n * n for n in range(40)]
        assert [*workers.map(square, range(5))] == [0, 1, 4, 9, 16]


def brings_back_trials(executor: Executor) -> None:
    """What the search sends and gets is the same afterwards: archs, fidelities, trials."""
    archs = [Arch({"a": a, "b": "x"}) for a in range(3)]
    with executor.start() as workers:
        running = [workers.submit(trial_of, arch, 0.5) for arch in archs]
        assert [future.result(PATIENCE) for future in running] == [trial_of(arch, 0.5) for arch in archs]


def brings_back_exceptions(executor: Executor) -> None:
    """An exception arrives as itself, a user's mistake with its key and hint; the workers go on."""
    with executor.start() as workers:
        mistake, accident = workers.submit(wrong, "no such thing").exception(PATIENCE), workers.submit(broken, 0)
        assert isinstance(mistake, UserError)
        assert [(f.message, f.key, f.hint) for f in mistake.faults] == [
            ("no such thing", ("executor",), "this is a test")
        ]
        assert isinstance(accident.exception(PATIENCE), ZeroDivisionError)
        assert workers.submit(square, 3).result(PATIENCE) == 9


def ends_when_it_is_told_to(executor: Executor) -> None:
    """`shutdown` waits for what runs and refuses what comes later; tasks can be cancelled; it starts again."""
    workers = executor.start()
    running = [workers.submit(square, n) for n in range(4)]
    for future in [workers.submit(square, n) for n in range(50)]:
        future.cancel()
    workers.shutdown(wait=True)
    assert [future.result(0) for future in running] == [0, 1, 4, 9]
    try:
        workers.submit(square, 1)
    except RuntimeError:
        pass
    else:
        raise AssertionError("takes tasks after its shutdown")
    with executor.start() as again:
        assert again.submit(square, 2).result(PATIENCE) == 4


executor_checks = [
    *component_checks,
    runs_tasks_in_any_number,
    brings_back_trials,
    brings_back_exceptions,
    ends_when_it_is_told_to,
]
"""What every executor keeps to."""
