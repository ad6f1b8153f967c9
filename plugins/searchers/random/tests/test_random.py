from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from corenas.contracts import Searcher
from corenas.objectives import Trial
from corenas.plugins import load_catalogue
from corenas.space import SearchSpace
from corenas.testing.components import spec_fragments
from corenas.testing.distributions import distribution_checks
from corenas.testing.searchers import additive, archs, drive, searcher_checks, simple_problem, tiny_space
from corenas.variables import Categorical
from corenas_searcher_random import Random, corenas_searchers


@pytest.mark.parametrize("check", searcher_checks)
def test_conforms(check):
    check(Random())


@pytest.mark.parametrize("check", distribution_checks)
def test_the_distribution_conforms(check):
    check("corenas_searcher_random")


def test_options_are_a_searcher_under_its_name():
    assert corenas_searchers() == {"random": Random}
    assert isinstance(Random(), Searcher)


def test_every_order_of_a_tiny_space_is_as_likely_as_any_other():
    space = SearchSpace([Categorical("a", (1, 2, 3))])
    problem = simple_problem(space)
    orders = Counter(
        tuple(arch["a"] for arch in Random().start(problem, np.random.default_rng(seed)).ask(3)) for seed in range(1200)
    )
    assert sum((orders[order] - 200) ** 2 / 200 for order in orders) < 20.5  # 0.1% with 5 degrees of freedom
    assert len(orders) == 6


def test_archs_that_were_measured_elsewhere_are_not_asked():
    space = tiny_space()
    known = [*space][:2]
    search = Random().start(simple_problem(space), np.random.default_rng(0))
    search.tell([Trial(arch, {"gain": 1.0}) for arch in known])
    assert set(archs(drive(search, simple_problem(space), additive(space)))) == set(space) - set(known)


def test_the_readme_shows_a_spec_that_is_right():
    fragments = spec_fragments(Path(__file__).parents[1] / "README.md")
    assert [load_catalogue().options("searchers", spec["searcher"]) for spec in fragments] == [Random()]
