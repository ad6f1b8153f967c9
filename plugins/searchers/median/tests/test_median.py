from pathlib import Path

import numpy as np
import pytest

from corenas.contracts import Searcher
from corenas.errors import UserError
from corenas.objectives import Trial
from corenas.plugins import load_catalogue
from corenas.testing.components import spec_fragments
from corenas.testing.distributions import distribution_checks
from corenas.testing.searchers import searcher_checks, simple_problem
from corenas_searcher_median import Median, corenas_searchers


@pytest.mark.parametrize("check", searcher_checks)
@pytest.mark.parametrize("searcher", [Median(), Median((0.5,), 1)], ids=["three", "two"])
def test_conforms(searcher, check):
    check(searcher)


@pytest.mark.parametrize("check", distribution_checks)
def test_the_distribution_conforms(check):
    check("corenas_searcher_median")


def test_options_are_a_searcher_under_its_name():
    assert corenas_searchers() == {"median": Median}
    assert isinstance(Median(), Searcher)
    for wrong in ((0.5, 0.2), (0.0, 0.5), (0.5, 1.0), (0.5, 0.5)):
        with pytest.raises(UserError, match="growing"):
            Median(wrong)


def told(search, proposals, scores):
    metric = search.problem.objectives.objectives[0].metric
    pairs = zip(proposals, scores, strict=True)
    search.tell([Trial(p.arch, {metric: s, "flops": 1.0}, fidelity=p.fidelity) for p, s in pairs])


def test_what_is_worse_than_the_median_of_those_before_it_is_stopped():
    search = Median((0.25, 0.5), warmup=3).start(simple_problem(budget=100), np.random.default_rng(0))
    first = search.ask(6)
    assert {p.fidelity for p in first} == {0.25}
    told(search, first, [1, 2, 3, 1.9, 2, 10])  # medians before each of the last: 2, 1.95, 2
    going = search.ask(5)
    # The first three are in the warm-up; the fourth is below the median of 1, 2, 3.
    assert [p.arch for p in going] == [first[i].arch for i in (0, 1, 2, 4, 5)]
    assert {p.fidelity for p in going} == {0.5}
    told(search, going, [5, 4, 3, 3, 4])  # medians: -, -, -, 4, 3.5
    last = search.ask(4)
    assert [p.arch for p in last] == [first[i].arch for i in (0, 1, 2, 5)]
    assert {p.fidelity for p in last} == {1.0}
    told(search, last, [0, 0, 0, 0])
    assert {p.fidelity for p in search.ask(3)} == {0.25}


def test_what_has_failed_does_not_go_on_and_does_not_count():
    search = Median((0.5,), warmup=1).start(simple_problem(budget=100), np.random.default_rng(0))
    (one,) = search.ask(1)
    search.tell([Trial(one.arch, state="failed", error="x", fidelity=0.5)])
    assert search.going == []
    assert search.scores == [[], []]


def test_the_readme_shows_a_spec_that_is_right():
    (spec,) = spec_fragments(Path(__file__).parents[1] / "README.md")
    options = load_catalogue().options("searchers", spec["searcher"])
    assert isinstance(options, Median)
