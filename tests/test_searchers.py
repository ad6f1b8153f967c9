"""Every installed searcher, killed and begun again, makes the trials that it would have made, however it is run."""

from contextlib import closing

import attrs
import numpy as np
import pytest

from corenas.contracts import TrialDone
from corenas.plugins import load_catalogue
from corenas.search import run_search
from corenas.store import Store
from corenas.testing.searchers import additive, large_space, simple_problem

CATALOGUE = load_catalogue()
SEARCHERS = sorted(c.name for c in CATALOGUE.components.values() if c.kind == "searchers")
TRIALS = {1: 20, 20: 75}
"""How many trials a search of batches of so many has."""


class Killed(BaseException):
    """The end of a process."""


def search(name, batch, store=None, kill_at=None, executor=None):
    """Run a search, or what is left of it; a trial after which it is killed is in the store, and nothing later."""
    problem = simple_problem(budget=TRIALS[batch], pareto=batch > 1)
    done = 0

    def emit(event):
        nonlocal done
        done += isinstance(event, TrialDone)
        if done == kill_at:
            raise Killed

    searcher = CATALOGUE.options("searchers", name).start(problem, np.random.default_rng(7))
    measure = additive(large_space())
    trials = run_search(
        searcher, measure, problem.budget, batch=batch, store=store or Store(), executor=executor, emit=emit
    )
    return [attrs.evolve(trial, seconds=0.0) for trial in trials]


@pytest.fixture(scope="module")
def processes():
    with CATALOGUE.options("executors", {"type": "processes", "workers": 2}).start() as executor:
        yield executor


@pytest.mark.parametrize("batch", TRIALS)
@pytest.mark.parametrize("name", SEARCHERS)
def test_a_killed_search_ends_with_the_trials_of_one_that_was_not(name, batch, processes, tmp_path):
    whole = search(name, batch)
    assert len(whole) >= TRIALS[batch]
    for kills, executor in ((5, TRIALS[batch] // 2), None), ((TRIALS[batch] // 2,), processes):
        file = tmp_path / f"{len(kills)}.sqlite"
        for kill_at in kills:  # the second counts from where the first was killed
            with closing(Store(file)) as store, pytest.raises(Killed):
                search(name, batch, store, kill_at, executor)
        with closing(Store(file)) as store:
            assert search(name, batch, store, executor=executor) == whole
