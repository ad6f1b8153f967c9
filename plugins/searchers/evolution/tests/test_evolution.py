import itertools
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest

from corenas.contracts import Problem, Searcher
from corenas.errors import UserError
from corenas.objectives import Objective, Objectives, Trial
from corenas.options import structure
from corenas.plugins import load_catalogue
from corenas.space import SearchSpace
from corenas.testing.components import spec_fragments
from corenas.testing.distributions import distribution_checks
from corenas.testing.searchers import (
    additive,
    archs,
    drive,
    large_space,
    learning_searcher_checks,
    simple_problem,
    tiny_space,
)
from corenas.variables import Categorical
from corenas_searcher_evolution import Evolution, corenas_searchers


@pytest.mark.parametrize("check", learning_searcher_checks)
@pytest.mark.parametrize("searcher", [Evolution(), Evolution(12, 3, 4, 5, 0.3)], ids=["paper", "small"])
def test_conforms(searcher, check):
    check(searcher)


@pytest.mark.parametrize("check", distribution_checks)
def test_the_distribution_conforms(check):
    check("corenas_searcher_evolution")


def test_options_are_a_searcher_under_its_name():
    assert corenas_searchers() == {"evolution": Evolution}
    assert isinstance(Evolution(), Searcher)


class Watched:
    """A space that notes how each arch was made: ("sample",), ("mutate", parent) or ("cross", first, second)."""

    def __init__(self, space):
        self.space = space
        self.variables = space.variables
        self.made = []

    def sample(self, rng):
        return self._noted(self.space.sample(rng), "sample")

    def mutate(self, arch, prob, rng):
        assert prob == 0.1
        return self._noted(self.space.mutate(arch, prob, rng), "mutate", arch)

    def cross(self, first, second, rng):
        return self._noted(self.space.cross(first, second, rng), "cross", first, second)

    def _noted(self, arch, *how):
        self.made.append((arch, how))
        return arch


def spos_space(layers=20):
    return SearchSpace([Categorical(f"layers.{i}", (0, 1, 2, 3)) for i in range(layers)])


def generations(search, measure, n, population=50):
    """The first n generations, each a list of trials, told in portions of 7."""
    for _ in range(n):
        trials = []
        while len(trials) < population:
            told = [measure(arch) for arch in search.ask(min(7, population - len(trials)))]
            search.tell(told)
            trials += told
        yield trials


def test_each_generation_is_25_mutated_25_crossed_from_the_ten_best_of_all_before():
    """The reference's loop (megvii-model/SinglePathOneShot, src/Search/search.py), told from outside."""
    space = Watched(spos_space())
    measure = additive(space.space)
    search = Evolution().start(Problem(space, Objectives((Objective("gain"),)), 1000), np.random.default_rng(0))
    history, full = [], 0
    for number, trials in enumerate(generations(search, measure, 20)):
        how = dict(reversed([(arch, how) for arch, how in space.made]))  # the first time that it came up
        kinds = [how[trial.arch][0] for trial in trials]
        if number == 0:
            assert kinds == ["sample"] * 50
        else:
            crossed = kinds.count("cross")
            assert kinds == ["mutate"] * 25 + ["cross"] * crossed + ["sample"] * (25 - crossed)
            draws = [kind for _, (kind, *_) in space.made].count("cross")
            assert draws == 250 if crossed < 25 else draws <= 250  # like parents: the tries ran out
            full += crossed == 25
            parents = {parent for _, (_, *parents) in space.made for parent in parents}
            ranked = sorted(history, key=lambda trial: -trial.metrics["gain"])
            tenth = ranked[9].metrics["gain"]
            assert parents <= {trial.arch for trial in ranked if trial.metrics["gain"] >= tenth}
            assert len(parents) == 10  # 75 draws or more: none is passed over
        assert not {trial.arch for trial in trials} & {trial.arch for trial in history}
        history += trials
        space.made.clear()
    assert full >= 5
    assert len({trial.arch for trial in history}) == 1000
    best = [max(trial.metrics["gain"] for trial in history[:n]) for n in (50, 1000)]
    assert best[0] < 0.8, best
    assert best[1] > 0.95, best


def spos_reference(layers, epochs, rng):
    """The reference's search in its own terms: tuples of genes, lists kept sorted. The mean gain of each epoch."""
    seen, top, means = set(), [], []

    def stacked(draw, num, tries=math.inf):
        found = []
        while len(found) < num and tries > 0:
            tries -= 1
            cand = draw()
            if cand not in seen:
                seen.add(cand)
                found.append(cand)
        return found

    def anything():
        return tuple(rng.randrange(4) for _ in range(layers))

    def mutation():
        return tuple(rng.randrange(4) if rng.random() < 0.1 else gene for gene in rng.choice(top))

    def crossover():
        return tuple(rng.choice(pair) for pair in zip(rng.choice(top), rng.choice(top), strict=True))

    candidates = stacked(anything, 50)
    for _ in range(epochs):
        means.append(np.mean(candidates) / 3)
        top = sorted([*top, *candidates], key=sum, reverse=True)[:10]
        candidates = stacked(mutation, 25, 250) + stacked(crossover, 25, 250)
        candidates += stacked(anything, 50 - len(candidates))
    return means


def test_its_generations_improve_as_fast_as_those_of_the_reference():
    space = spos_space(40)
    problem = simple_problem(space)
    ours, theirs = [], []
    for seed in range(20):
        search = Evolution().start(problem, np.random.default_rng(seed))
        trials = generations(search, additive(space), 8)
        ours.append([np.mean([trial.metrics["gain"] for trial in some]) for some in trials])
        theirs.append(spos_reference(40, 8, random.Random(seed)))
    error = np.sqrt((np.var(ours, axis=0) + np.var(theirs, axis=0)) / 20)
    assert np.mean(theirs, axis=0)[-1] > 0.7
    assert (np.abs(np.mean(ours, axis=0) - np.mean(theirs, axis=0)) < 4 * error).all()


def test_children_differ_from_their_parents_as_mutation_and_crossover_say():
    space = Watched(spos_space())
    search = Evolution().start(Problem(space, Objectives((Objective("gain"),)), 1000), np.random.default_rng(1))
    trials = [trial for some in generations(search, additive(space.space), 5) for trial in some]
    assert trials
    changed = []
    for arch, (kind, *parents) in space.made:
        if kind == "mutate":
            changed.append(sum(arch[key] != parents[0][key] for key in arch))
        if kind == "cross":
            assert all(arch[key] in (parents[0][key], parents[1][key]) for key in arch)
    # 20 genes, drawn again with 0.1, another choice in 3 of 4 draws: 1.5 in the mean, some 100 children.
    assert 1.1 < np.mean(changed) < 1.9
    assert max(changed) < 10


def test_what_mutation_and_crossover_do_not_find_is_random():
    """Parents that are all alike leave crossover nothing new, and ten tries an arch are all that it gets."""
    space = Watched(spos_space())
    options = Evolution(population=20, parents=1, mutation=5, crossover=10)
    search = options.start(Problem(space, Objectives((Objective("gain"),)), 100), np.random.default_rng(0))
    list(generations(search, additive(space.space), 1, population=20))
    space.made.clear()
    asked = search.ask(20)
    made = [how[0] for _, how in space.made]
    assert made.count("cross") == 100
    assert 5 <= made.count("mutate") <= 50
    how = {arch: kind for arch, (kind, *_) in reversed(space.made)}
    assert [how[arch] for arch in asked] == ["mutate"] * 5 + ["sample"] * 15


def test_the_next_generation_waits_until_all_of_this_one_is_told():
    measure = additive(large_space())
    search = Evolution(population=10, mutation=5, crossover=5).start(simple_problem(), np.random.default_rng(0))
    first, second = search.ask(6), search.ask(6)
    assert (len(first), len(second)) == (6, 4)
    assert search.ask(1) == []
    search.tell([measure(arch) for arch in first])
    assert search.ask(1) == []
    search.tell([measure(arch) for arch in second])
    assert len(search.ask(100)) == 10


def test_a_number_of_generations_ends_the_search():
    problem = simple_problem(budget=1000)
    search = Evolution(generations=3).start(problem, np.random.default_rng(0))
    assert len(drive(search, problem, additive(large_space()), rounds=100)) == 150
    assert search.ask(1) == []


def test_a_run_stopped_between_ask_and_tell_goes_on_the_same_way():
    problem, measure = simple_problem(), additive(large_space())
    first, second = (Evolution().start(problem, np.random.default_rng(seed)) for seed in (0, 1))
    drive(first, problem, measure, rounds=4)
    asked = first.ask(20)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for search in (first, second):
        search.tell([measure(arch) for arch in asked])
    assert drive(first, problem, measure, rounds=9) == drive(second, problem, measure, rounds=9)


@pytest.mark.parametrize("unfit", [
    {"state": "failed", "error": "no memory"},
    {"state": "infeasible", "metrics": {"gain": 9.0, "cost": 0.0}},
    {"state": "stopped", "metrics": {"gain": 9.0, "cost": 0.0}},
    {"metrics": {"gain": math.nan, "cost": 0.0}},
    {"metrics": {"gain": math.inf, "cost": 0.0}},
], ids=["failed", "infeasible", "stopped", "nan", "inf"])  # fmt: skip
@pytest.mark.parametrize("pareto", [False, True])
def test_trials_that_do_not_count_never_breed(unfit, pareto):
    space = Watched(spos_space())
    objectives = simple_problem(pareto=pareto).objectives
    search = Evolution().start(Problem(space, objectives, 200), np.random.default_rng(0))
    measure = additive(space.space)
    turn = itertools.count()
    bad = set()

    def mixed(arch):
        if next(turn) % 2:
            return measure(arch)
        bad.add(arch)
        return Trial(arch, **unfit)

    for _ in generations(search, mixed, 3):
        assert not bad & {parent for _, (_, *parents) in space.made for parent in parents}


def test_trials_told_from_an_earlier_run_breed_and_are_not_asked_again():
    space = tiny_space()
    problem = simple_problem(space)
    known = [*space][:4]
    search = Evolution().start(problem, np.random.default_rng(0))
    search.tell([additive(space)(arch) for arch in known])
    assert set(archs(drive(search, problem, additive(space)))) == set(space) - set(known)


def test_pareto_parents_lie_on_the_front():
    """`gain` and `cost` share variables: the parents are archs that no other beats in both."""
    problem, measure = simple_problem(pareto=True, budget=1000), additive(large_space())
    search = Evolution().start(problem, np.random.default_rng(0))
    told = drive(search, problem, measure, rounds=20, batch=50)
    front = {(t.metrics["gain"], t.metrics["cost"]) for t in told
             if not any(o.metrics["gain"] >= t.metrics["gain"] and o.metrics["cost"] <= t.metrics["cost"]
                        and o.metrics != t.metrics for o in told)}  # fmt: skip
    parents = [(trial["metrics"]["gain"], trial["metrics"]["cost"]) for trial in search.state_dict()["best"]]
    assert len(front) >= 10
    assert len(parents) == 10
    assert set(parents) <= front


@pytest.mark.parametrize(("table", "key", "text"), [
    ({"mutation": 40, "crossover": 20}, "population", "mutation 40 and crossover 20 are more than population 50"),
    ({"population": 0, "mutation": 0, "crossover": 0}, "population", "must be >= 1"),
    ({"parents": 0}, "parents", "must be >= 1"),
    ({"mutation_prob": 1.5}, "mutation_prob", "must be <= 1"),
    ({"mutation": -1}, "mutation", "must be >= 0"),
    ({"generations": 0}, "generations", "must be >= 1"),
    ({"parents": "12"}, "parents", "expected a whole number"),
])  # fmt: skip
def test_wrong_options_are_named(table, key, text):
    with pytest.raises(UserError) as caught:
        structure(table, Evolution)
    assert [fault.dotted for fault in caught.value.faults] == [key]
    assert text in str(caught.value)


def test_the_readme_shows_a_spec_that_is_right():
    fragments = spec_fragments(Path(__file__).parents[1] / "README.md")
    assert [load_catalogue().options("searchers", spec["searcher"]) for spec in fragments] == [Evolution()]
