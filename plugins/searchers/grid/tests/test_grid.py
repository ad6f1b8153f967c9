"""The grid is whole where it fits, evenly spread where not, and says its share."""

from pathlib import Path

import attrs
import numpy as np
import pytest

from corenas.contracts import Searcher
from corenas.objectives import Trial
from corenas.options import structure
from corenas.plugins import load_catalogue
from corenas.space import SearchSpace
from corenas.testing.components import spec_fragments
from corenas.testing.distributions import distribution_checks
from corenas.testing.searchers import (
    Inside,
    additive,
    archs,
    drive,
    flat_space,
    large_space,
    searcher_checks,
    simple_problem,
    tiny_space,
)
from corenas.variables import Categorical, Condition, Float, Int
from corenas_searcher_grid import Grid, corenas_searchers


@pytest.mark.parametrize("check", searcher_checks)
def test_conforms(check):
    check(Grid())


@pytest.mark.parametrize("check", distribution_checks)
def test_the_distribution_conforms(check):
    check("corenas_searcher_grid")


def test_options_are_a_searcher_under_its_name():
    assert corenas_searchers() == {"grid": Grid}
    assert isinstance(Grid(), Searcher)


def conditional(blocks=3):
    depth = Int("depth", 1, blocks)
    whens = [[Condition("depth", frozenset(range(i + 1, blocks + 1)))] if i else [] for i in range(blocks)]
    return SearchSpace([depth, *(Categorical(f"k.{i}", (3, 5, 7), when=when) for i, when in enumerate(whens))])


def asked(space, budget, options=Grid(), seed=0):
    problem = simple_problem(space, budget)
    return options.start(problem, np.random.default_rng(seed)).ask(budget)


def test_a_space_that_fits_is_asked_whole_in_any_order_and_its_share_is_all():
    space = conditional()
    proposals = asked(space, 100)
    assert {proposal.arch for proposal in proposals} == {*space}
    assert len(proposals) == space.size == 3 + 9 + 27
    assert {proposal.extra["share"] for proposal in proposals} == {1.0}
    assert archs(proposals) != archs(asked(space, 100, seed=1))


@pytest.mark.parametrize("seed", range(3))
def test_of_a_larger_space_one_arch_is_asked_of_each_equal_part(seed):
    space = conditional(5)
    order = {arch: place for place, arch in enumerate(space)}
    assert len(order) == 363
    proposals = asked(space, 33, seed=seed)
    # Of every eleven in the order of the space one; inactive variables come first there as here.
    assert sorted(order[proposal.arch] // 11 for proposal in proposals) == [*range(33)]
    assert {proposal.extra["share"] for proposal in proposals} == {1 / 11}


def test_of_a_huge_space_the_first_variables_are_spread_evenly_and_the_others_uniform():
    space = SearchSpace([Categorical(f"x{i}", (0, 1, 2, 3)) for i in range(100)])
    codes = space.encode([proposal.arch for proposal in asked(space, 1024)])
    assert (np.bincount(codes[:, 0]) == 256).all()
    assert len({tuple(row) for row in codes[:, :5].tolist()}) == 1024
    later = np.stack([np.bincount(column, minlength=4) for column in codes[:, 5:].T])
    chi2 = ((later - 256) ** 2 / 256).sum()
    assert 200 < chi2 < 380  # 285 in the mean, 24 its deviation


def test_the_share_of_a_huge_space_is_of_all_its_archs():
    space = large_space()
    assert asked(space, 50)[0].extra["share"] == pytest.approx(50 / space.size)


def test_levels_are_evenly_spaced_with_both_ends_and_a_continuous_variable_has_five():
    space = SearchSpace([Int("n", 1, 9), Float("lr", 0.01, 1.0, log=True), Categorical("a", ("x", "y"))])
    found = [proposal.arch for proposal in asked(space, 1000, Grid(3))]
    assert {arch["n"] for arch in found} == {1, 5, 9}
    assert sorted({arch["lr"] for arch in found}) == pytest.approx([0.01, 0.1, 1.0])
    assert len(found) == 3 * 3 * 2
    assert len({arch["lr"] for arch in archs(asked(space, 1000))}) == 5


def test_archs_outside_the_constraints_are_no_part_of_the_grid():
    space = flat_space()
    holds = lambda codes: codes.sum(axis=1) <= 2  # noqa: E731
    problem = attrs.evolve(simple_problem(space, 500), space=Inside(space, holds))
    proposals = Grid().start(problem, np.random.default_rng(0)).ask(500)
    assert len(proposals) == 1 + 10 + 10 + 45
    assert proposals[0].extra["share"] == 1.0


def test_archs_that_were_measured_elsewhere_are_not_asked():
    space = tiny_space()
    known = [*space][:2]
    search = Grid().start(simple_problem(space), np.random.default_rng(0))
    search.tell([Trial(arch, {"gain": 1.0}) for arch in known])
    assert {*archs(drive(search, simple_problem(space), additive(space)))} == {*space} - {*known}


def test_one_level_is_refused():
    with pytest.raises(Exception, match="levels"):
        structure({"levels": 1}, Grid)


def test_the_readme_shows_a_spec_that_is_right():
    (spec,) = spec_fragments(Path(__file__).parents[1] / "README.md")
    assert load_catalogue().options("searchers", spec["searcher"]) == Grid(3)
