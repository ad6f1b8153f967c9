"""What processes promise, and that a search in them finds what it finds in one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from attrs import frozen

from corenas.contracts import Problem
from corenas.objectives import Objective, Objectives, Trial
from corenas.plugins import load_catalogue
from corenas.search import run_search
from corenas.space import SearchSpace
from corenas.testing.distributions import distribution_checks
from corenas.testing.executors import executor_checks
from corenas_executor_processes import Processes


def square(number):
    return number * number, os.getpid(), os.environ["OMP_NUM_THREADS"]


def test_work_is_done_in_other_processes_in_the_order_in_which_it_was_given():
    with Processes(workers=2).start() as executor:
        found = [*executor.map(square, range(6))]
    assert [number for number, _, _ in found] == [0, 1, 4, 9, 16, 25]
    assert os.getpid() not in {pid for _, pid, _ in found}
    assert {threads for _, _, threads in found} == {"1"}


def test_what_goes_wrong_there_arrives_here():
    with Processes(workers=1).start() as executor, pytest.raises(TypeError):
        executor.submit(square, None).result()


ENDLESS = """
import os, time
from corenas_executor_processes import Processes
executor = Processes(workers=1).start()
print(executor.submit(os.getpid).result(), flush=True)
time.sleep(60)
"""


def is_gone(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return False


def test_workers_end_with_a_process_that_is_killed():
    with subprocess.Popen([sys.executable, "-c", ENDLESS], stdout=subprocess.PIPE, text=True) as parent:
        worker = int(parent.stdout.readline())
        assert not is_gone(worker)
        parent.kill()
    deadline = time.monotonic() + 30
    while not is_gone(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert is_gone(worker)


@frozen
class Fragile:
    """Measures archs; at one its process dies, once or always."""

    folder: Path
    fatal: int = -1
    once: int = -1
    batch: int = 1

    def __call__(self, trials):
        for trial in trials:
            width, mark = trial.arch["width"], self.folder / "died"
            if width == self.fatal or (width == self.once and not mark.exists()):
                if width == self.once:
                    mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return [Trial(trial.arch, {"gain": float(trial.arch["width"] % 7)}) for trial in trials]


def searched(measure, executor=None):
    space, best = SearchSpace.from_table({"width": [*range(40)]}), Objectives((Objective("gain"),))
    searcher = load_catalogue().options("searchers", "random")
    live = searcher.start(Problem(space, best, budget=8), np.random.default_rng(0))
    return run_search(live, measure, 8, batch=8, executor=executor, objectives=best)


@pytest.mark.slow
def test_a_killed_process_loses_nothing_and_an_arch_that_kills_two_is_a_failed_trial(tmp_path):
    alone = searched(Fragile(tmp_path))
    once, fatal = (alone[row].arch["width"] for row in (1, 5))
    found = searched(Fragile(tmp_path, fatal, once), Processes(workers=2))
    assert (tmp_path / "died").exists()
    assert [trial.arch for trial in found] == [trial.arch for trial in alone]
    (failed,) = (trial for trial in found if not trial.ok)
    assert failed.arch["width"] == fatal
    assert failed.error.startswith("its worker died twice")


@pytest.mark.parametrize("check", executor_checks)
def test_conforms(check):
    check(Processes(workers=1))


@pytest.mark.parametrize("check", distribution_checks)
def test_the_distribution_conforms(check):
    check("corenas_executor_processes")
