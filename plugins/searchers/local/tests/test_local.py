"""Local search climbs to where no neighbour is better, and starts anew from there."""

import itertools
from pathlib import Path

import attrs
import numpy as np
import pytest

from corenas.contracts import Searcher
from corenas.objectives import Trial
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
    learning_searcher_checks,
    simple_problem,
)
from corenas.variables import Categorical, Condition, Int
from corenas_searcher_local import Local, corenas_searchers

OPTIONS = [Local(), Local(first=3, neighbours="step", move="best")]


@pytest.mark.parametrize("check", learning_searcher_checks)
@pytest.mark.parametrize("searcher", OPTIONS, ids=["default", "steps"])
def test_conforms(searcher, check):
    check(searcher)


@pytest.mark.parametrize("check", distribution_checks)
def test_the_distribution_conforms(check):
    check("corenas_searcher_local")


def test_options_are_a_searcher_under_its_name():
    assert corenas_searchers() == {"local": Local}
    assert isinstance(Local(), Searcher)


def neighbours(space, arch, step=False):
    """All archs that differ in one of the variables that are active in both, by comparing with every arch."""
    found = set()
    for other in space:
        both = space.active(space.encode([arch, other])).all(axis=0)
        changed = [key for key, on in zip(space.keys, both, strict=True) if on and arch[key] != other[key]]
        if len(changed) == 1:
            choices = sorted(space[changed[0]].choices)
            apart = abs(choices.index(arch[changed[0]]) - choices.index(other[changed[0]]))
            found |= {other} if apart == 1 or not step else set()
    return found


def tree():
    whens = [[Condition("depth", frozenset(range(i + 1, 4)))] if i else [] for i in range(3)]
    return SearchSpace([Int("depth", 1, 3), *(Categorical(f"k{i}", (3, 5, 7), when=w) for i, w in enumerate(whens))])


@pytest.mark.parametrize("step", [False, True], ids=["all", "step"])
def test_it_asks_all_neighbours_of_the_best_and_no_others(step):
    space = tree()
    problem = simple_problem(space)
    searcher = Local(first=1, neighbours="step" if step else "all", move="best")
    for seed in range(5):
        search = searcher.start(problem, np.random.default_rng(seed))
        (start,) = search.ask(1)
        search.tell([Trial(start, {"gain": 1.0})])
        around = []
        while search.restarts == 1 and (asked := search.ask(1)) and search.restarts == 1:
            around += asked
            search.tell([Trial(arch, {"gain": 0.0}) for arch in asked])
        wanted = neighbours(space, start, step)
        assert {*around} <= wanted
        # What a deeper arch has newly active is drawn: of the deeper neighbours one for each depth.
        mine, all_ = ({arch for arch in some if arch["depth"] <= start["depth"]} for some in (around, wanted))
        assert mine == all_
        assert {arch["depth"] for arch in around} == {arch["depth"] for arch in wanted}
        assert len(around) == len({*around})


def best_neighbour(space, arch, gain):
    rows = [space.arch({**arch, v.key: choice}) for v in space.variables for choice in v.choices]
    return max((row for row in rows if row != arch), key=gain)


def test_with_best_each_move_is_to_the_best_of_all_neighbours():
    space = flat_space()
    rng = np.random.default_rng(3)
    tables = rng.random((9, 4, 4))  # neighbours in the row count together: there are local optima

    def gain(arch):
        codes = space.encode([arch])[0]
        return float(sum(table[a, b] for table, (a, b) in zip(tables, itertools.pairwise(codes), strict=True)))

    problem = simple_problem(space, 2000)
    search = Local(first=1, move="best").start(problem, np.random.default_rng(0))
    here, path = None, []
    while search.restarts < 2:
        asked = search.ask(5)
        if search.here and search.here.arch != here and search.restarts < 2:
            here = search.here.arch
            path.append(here)
        search.tell([Trial(arch, {"gain": gain(arch)}) for arch in asked])
    assert len(path) > 3
    for before, after in itertools.pairwise(path):
        assert after == best_neighbour(space, before, gain)
    assert gain(best_neighbour(space, path[-1], gain)) <= gain(path[-1])


def test_with_first_it_moves_as_soon_as_a_neighbour_is_better():
    space = flat_space()
    problem = simple_problem(space, 500)
    search = Local(first=5).start(problem, np.random.default_rng(0))
    best, measure = -1.0, additive(space)
    for _ in range(60):
        (arch,) = search.ask(1)
        if search.here is not None:
            assert search.here.metrics["gain"] == best
            assert sum(arch[key] != search.here.arch[key] for key in arch) == 1
        trial = measure(arch)
        best = max(best, trial.metrics["gain"])
        search.tell([trial])
    assert best > 0.9


def test_it_starts_anew_at_a_local_optimum():
    space = flat_space()
    problem = simple_problem(space, 400)
    search = Local(first=4).start(problem, np.random.default_rng(0))
    told = drive(search, problem, additive(space), rounds=400, batch=1)
    top = max(range(len(told)), key=lambda at: told[at].metrics["gain"])
    assert told[top].metrics["gain"] == 1.0  # an additive function has one optimum
    assert search.restarts >= 2
    assert len({*archs(told)}) == 400


def test_moves_that_leave_the_constraints_are_not_made():
    space = flat_space()
    problem = attrs.evolve(simple_problem(space, 300), space=Inside(space, lambda codes: codes.sum(axis=1) % 2 == 0))
    told = drive(Local().start(problem, np.random.default_rng(0)), problem, additive(space))
    assert all(sum(space.encode([trial.arch])[0]) % 2 == 0 for trial in told)
    assert max(trial.metrics["gain"] for trial in told) > 0.9


def test_the_readme_shows_a_spec_that_is_right():
    (spec,) = spec_fragments(Path(__file__).parents[1] / "README.md")
    assert load_catalogue().options("searchers", spec["searcher"]) == Local(neighbours="step")
