"""NSGA-II against Deb et al. 2002: who survives, who breeds, and the front of a problem whose front is known."""

import itertools
from pathlib import Path

import attrs
import numpy as np
import pytest

from corenas.contracts import Problem, Searcher
from corenas.objectives import Constraint, Objective, Objectives, Trial, hypervolume
from corenas.plugins import load_catalogue
from corenas.space import Arch, SearchSpace
from corenas.testing.components import spec_fragments
from corenas.testing.distributions import distribution_checks
from corenas.testing.searchers import additive, drive, large_space, learning_searcher_checks, simple_problem
from corenas.variables import Categorical
from corenas_searcher_nsga2 import NSGA2, corenas_searchers

BOTH = Objectives((Objective("gain"), Objective("cost", "min")), pareto=True)


@pytest.mark.parametrize("check", learning_searcher_checks)
def test_conforms(check):
    check(NSGA2())


@pytest.mark.parametrize("check", distribution_checks)
def test_the_distribution_conforms(check):
    check("corenas_searcher_nsga2")


def test_options_are_a_searcher_under_its_name():
    assert corenas_searchers() == {"nsga2": NSGA2}
    assert isinstance(NSGA2(), Searcher)


def trial(number, gain, cost, state="done"):
    return Trial(Arch({"n": number}), {"gain": float(gain), "cost": float(cost)}, state)


def survivors(trials, n, constraints=()):
    space = SearchSpace([Categorical("n", (*range(100),))])
    search = NSGA2(population=n).start(Problem(space, BOTH, 100, constraints=constraints), np.random.default_rng(0))
    search.tell(trials)
    search.ask(1)
    return search.parents


def test_survivors_are_fronts_in_order_and_of_the_last_the_least_crowded():
    first = [trial(i, gain, gain**2) for i, gain in enumerate((0, 4, 5, 9))]
    second = [trial(10 + i, gain - 1, gain**2 + 1) for i, gain in enumerate((0, 4, 5, 9))]
    kept = survivors([*second, *first], 6)
    assert {t.arch["n"] for t in kept[:4]} == {0, 1, 2, 3}
    # Deb's distances of the second front: infinite for both ends, the inner two cut off.
    assert {t.arch["n"] for t in kept[4:]} == {10, 13}
    # Inside the first front: (5 - 0) / 9 + (25 - 0) / 81 for the second, (9 - 4) / 9 + (81 - 16) / 81 for the third.
    assert [t.arch["n"] for t in kept[2:4]] == [2, 1]


def test_what_breaks_a_constraint_comes_last_the_least_broken_first():
    constraint = Constraint("cost", high=10.0)
    near, far = trial(1, 99, 11, "infeasible"), trial(2, 99, 20, "infeasible")
    inside = [trial(3, 1, 5), trial(4, 0, 6)]
    failed = Trial(Arch({"n": 5}), state="failed", error="no luck")
    assert survivors([far, near, failed, *inside], 10, [constraint]) == [*inside, near, far]
    assert survivors([far, near, failed, *inside], 3, [constraint]) == [*inside, near]


def test_parents_are_those_who_win_a_binary_tournament():
    space = SearchSpace([Categorical(f"x{i}", (*range(10),)) for i in range(4)])
    problem = Problem(space, BOTH, 1000)
    search = NSGA2(population=10, crossover_prob=0.0, mutation_prob=0.0).start(problem, np.random.default_rng(0))
    search.parents = [Trial(space.arch({"x0": n}), {"gain": -n, "cost": 0.0}) for n in range(10)]
    wins = np.bincount([search._parent()["x0"] for _ in range(20_000)], minlength=10) / 20_000
    # The better of two: rank k wins with (2 (10 - k) - 1) / 100.
    assert np.allclose(wins, [(2 * (10 - k) - 1) / 100 for k in range(10)], atol=0.01)


@pytest.mark.parametrize(("budget", "population"), [(10, 20), (300, 30), (20_000, 100)])
def test_a_generation_is_a_tenth_of_the_trials_from_twenty_to_a_hundred(budget, population):
    assert len(NSGA2().start(simple_problem(budget=budget), np.random.default_rng(0)).ask(1000)) == population


def test_a_generation_is_bred_when_all_of_the_one_before_is_told():
    search = NSGA2(population=10).start(simple_problem(), np.random.default_rng(0))
    assert [len(search.ask(7)) for _ in range(4)] == [7, 3, 0, 0]
    search = NSGA2(population=10, generations=3).start(simple_problem(), np.random.default_rng(0))
    assert len(drive(search, simple_problem(), additive(large_space()), rounds=50, batch=4)) == 30


def test_one_variable_of_a_child_is_drawn_again_in_the_mean():
    space = SearchSpace([Categorical(f"x{i}", (0, 1, 2, 3)) for i in range(40)])
    search = NSGA2(crossover_prob=0.0).start(Problem(space, BOTH, 100), np.random.default_rng(0))
    search.parents = [Trial(space.default(), {"gain": 1.0, "cost": 1.0})]
    children = space.encode([search._child() for _ in range(500)])
    changed = (children != space.encode([space.default()])).sum(axis=1)
    assert np.mean(changed) == pytest.approx(0.75, abs=0.12)  # one draw in four is the old choice


@pytest.mark.parametrize("seed", range(2))
def test_it_finds_the_front_of_a_problem_whose_front_is_known(seed):
    """Leading ones, trailing zeros: the front is 1…10…0, with every number of ones."""
    space = SearchSpace([Categorical(f"x{i}", (0, 1)) for i in range(12)])

    def measure(arch):
        bits = [*arch.values()]
        ones = len([*itertools.takewhile(bool, bits)])
        zeros = len([*itertools.takewhile(lambda bit: not bit, reversed(bits))])
        return Trial(arch, {"gain": float(ones), "cost": -float(zeros)})

    problem = Problem(space, BOTH, 1000)
    told = drive(NSGA2(50).start(problem, np.random.default_rng(seed)), problem, measure, rounds=100, batch=50)
    front = BOTH.front(told)
    assert {(t.metrics["gain"], -t.metrics["cost"]) for t in front} == {(float(n), 12.0 - n) for n in range(13)}


def test_its_front_is_better_than_that_of_random_draws():
    space, problem = large_space(), simple_problem(pareto=True)
    lead = []
    for seed in range(3):
        told = drive(NSGA2().start(problem, np.random.default_rng(seed)), problem, additive(space))
        drawn = [*map(additive(space), space.decode(space.draw(np.random.default_rng(100 + seed), 400)))]
        mine, theirs = (
            hypervolume(np.array([[t.metrics["gain"], -t.metrics["cost"]] for t in trials]), (0, -1))
            for trials in (told, drawn)
        )
        lead.append(mine - theirs)
    assert min(lead) > 0.02


def test_infeasible_trials_lead_into_a_window_that_random_draws_miss():
    space = SearchSpace([Categorical(f"x{i}", (0, 1, 2, 3)) for i in range(30)])
    window = Constraint("sum", low=85.0)  # of 90; 45 in the mean, 6 its deviation
    problem = Problem(space, Objectives((Objective("x0"),)), 1500, constraints=[window])

    def measure(arch):
        metrics = {"sum": float(sum(arch.values())), "x0": float(arch["x0"])}
        return Trial(arch, metrics, "done" if window.met(metrics) else "infeasible")

    told = drive(NSGA2(20).start(problem, np.random.default_rng(0)), problem, measure, rounds=75)
    assert any(t.ok for t in told)
    blind = attrs.evolve(problem, constraints=())
    assert not any(t.ok for t in drive(NSGA2(20).start(blind, np.random.default_rng(0)), blind, measure, rounds=75))


def test_the_readme_shows_a_spec_that_is_right():
    (spec,) = spec_fragments(Path(__file__).parents[1] / "README.md")
    assert load_catalogue().options("searchers", spec["searcher"]) == NSGA2(population=40)
