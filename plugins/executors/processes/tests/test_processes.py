"""What processes promise, and that a search in them finds what it finds in one."""

import os

import pytest

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


@pytest.mark.parametrize("check", executor_checks)
def test_conforms(check):
    check(Processes(workers=1))


@pytest.mark.parametrize("check", distribution_checks)
def test_the_distribution_conforms(check):
    check("corenas_executor_processes")
