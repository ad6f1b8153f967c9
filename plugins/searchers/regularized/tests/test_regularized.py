"""Regularized evolution against Real et al. 2019, algorithm 1."""

import json
from pathlib import Path

import attrs
import numpy as np
import pytest

from corenas.contracts import Searcher
from corenas.objectives import Objective, Objectives, Trial
from corenas.plugins import load_catalogue
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
from corenas_searcher_regularized import Regularized, corenas_searchers


@pytest.mark.parametrize("check", learning_searcher_checks)
def test_conforms(check):
    check(Regularized())


@pytest.mark.parametrize("check", distribution_checks)
def test_the_distribution_conforms(check):
    check("corenas_searcher_regularized")


def test_options_are_a_searcher_under_its_name():
    assert corenas_searchers() == {"regularized": Regularized}
    assert isinstance(Regularized(), Searcher)


def differences(first, second):
    return sum(first[key] != second[key] for key in first)


def test_after_the_first_population_each_arch_differs_in_one_variable_from_one_of_the_latest():
    problem = simple_problem(flat_space())
    search = Regularized(20, 5).start(problem, np.random.default_rng(0))
    told = drive(search, problem, additive(flat_space()), rounds=200, batch=1)
    for at in range(20, 200):
        near = [i for i in range(at) if differences(told[i].arch, told[at].arch) == 1]
        assert near
        assert max(near) >= at - 20, "its parent is dead"


@pytest.mark.parametrize(("budget", "population", "sample"), [(10, 20, 5), (400, 50, 12), (20_000, 100, 25)])
def test_left_out_options_hang_on_the_trials_and_are_the_papers_for_many(budget, population, sample):
    search = Regularized().start(simple_problem(budget=budget), np.random.default_rng(0))
    assert (search.population, search.sample) == (population, sample)


def test_the_oldest_dies_however_good_it_is_and_the_best_of_the_sample_breeds():
    problem = simple_problem(flat_space())
    search = Regularized(population=3, sample=100).start(problem, np.random.default_rng(0))
    best, *others = archs(drive(search, problem, additive(flat_space()), rounds=1, batch=3))
    search = Regularized(population=3, sample=100).start(problem, np.random.default_rng(0))
    search.begun = 3
    search.tell([Trial(best, {"gain": 9.0}), *(Trial(arch, {"gain": n / 10}) for n, arch in enumerate(others))])
    assert differences(search.ask(1)[0], best) == 1
    search.tell([Trial(flat_space().arch({"x.0": 3, "x.9": 3}), {"gain": 0.5})])
    assert best not in [trial.arch for trial in search.members]
    assert differences(search.ask(1)[0], flat_space().arch({"x.0": 3, "x.9": 3})) == 1


def test_mutants_change_each_variable_as_often_to_any_other_choice():
    space = flat_space()
    search = Regularized(1, 1).start(simple_problem(space), np.random.default_rng(0))
    search.tell([Trial(space.default(), {"gain": 1.0})])
    parent = search.members[0].arch
    mutants = [search._mutant(np.zeros(1)) for _ in range(3000)]
    changes = [next((key, arch[key]) for key in arch if arch[key] != parent[key]) for arch in mutants]
    counts = np.array([changes.count((key, choice)) for key in parent for choice in range(4) if choice != parent[key]])
    assert len(counts) == 30
    assert ((counts - 100) ** 2 / 100).sum() < 58.3  # 0.1% with 29 degrees of freedom


def test_several_objectives_are_added_up_by_their_weights():
    objectives = Objectives((Objective("gain", weight=2.0), Objective("cost", "min", weight=3.0)), pareto=True)
    problem = attrs.evolve(simple_problem(flat_space()), objectives=objectives)
    search = Regularized(10, 200).start(problem, np.random.default_rng(0))
    told = drive(search, problem, additive(flat_space()), rounds=1, batch=10)
    best = max(told, key=lambda t: 2 * t.metrics["gain"] - 3 * t.metrics["cost"])
    assert all(differences(arch, best.arch) == 1 for arch in search.ask(5))


def test_where_no_change_of_one_variable_is_inside_more_are_made_at_once():
    space = flat_space()
    problem = attrs.evolve(
        simple_problem(space, 150), space=Inside(space, lambda codes: codes.sum(axis=1) % 7 == (3 * codes[:, 0]) % 7)
    )
    told = drive(Regularized(10, 3).start(problem, np.random.default_rng(0)), problem, additive(space))
    assert len(told) == 150


def test_a_run_stopped_between_ask_and_tell_goes_on_the_same_way():
    problem, measure = simple_problem(flat_space()), additive(flat_space())
    first, second = (Regularized(10, 3).start(problem, np.random.default_rng(seed)) for seed in (0, 1))
    drive(first, problem, measure, rounds=5, batch=7)
    asked = first.ask(7)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for search in (first, second):
        search.tell([*map(measure, asked)])
    assert archs(drive(first, problem, measure, rounds=5)) == archs(drive(second, problem, measure, rounds=5))


def test_the_readme_shows_a_spec_that_is_right():
    (spec,) = spec_fragments(Path(__file__).parents[1] / "README.md")
    assert load_catalogue().options("searchers", spec["searcher"]) == Regularized(population=50, sample=10)
