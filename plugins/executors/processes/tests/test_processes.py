"""What processes promise, and that a search in them finds what it finds in one."""

import os
import subprocess
import sys
import time

import pytest

from corenas.testing.distributions import distribution_checks
from corenas.testing.executors import Fragile, executor_checks, searched
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


SHORT = {"searcher": "random", "budget": 8, "batch": 8}


@pytest.mark.slow
def test_a_killed_process_loses_nothing_and_an_arch_that_kills_two_is_a_failed_trial(tmp_path):
    alone = searched(Fragile(tmp_path), **SHORT)
    once, fatal = (alone[row].arch["width"] for row in (1, 5))
    found = searched(Fragile(tmp_path, fatal, once), Processes(workers=2), **SHORT)
    assert (tmp_path / str(once)).exists()
    assert [trial.arch for trial in found] == [trial.arch for trial in alone]
    failed = {trial.arch["width"]: trial.error for trial in found if not trial.ok}
    # A worker may still be on its way to `once` when `fatal` ends both: then `once` dies of itself the second time.
    assert {fatal} <= {*failed} <= {fatal, once}
    assert all(error.startswith("its worker died twice") for error in failed.values())


@pytest.mark.parametrize("check", executor_checks)
def test_conforms(check):
    check(Processes(workers=1))


@pytest.mark.parametrize("check", distribution_checks)
def test_the_distribution_conforms(check):
    check("corenas_executor_processes")
