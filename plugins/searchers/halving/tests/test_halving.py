"""Successive halving and Hyperband against the table of the paper, and who is promoted."""

import json
from pathlib import Path

import numpy as np
import pytest

from corenas.contracts import Searcher
from corenas.objectives import Trial
from corenas.plugins import load_catalogue
from corenas.testing.components import spec_fragments
from corenas.testing.distributions import distribution_checks
from corenas.testing.searchers import additive, drive, large_space, measured, searcher_checks, simple_problem
from corenas_searcher_halving import Halving, corenas_searchers


@pytest.mark.parametrize("check", searcher_checks)
@pytest.mark.parametrize("searcher", [Halving(), Halving(2, 0.25, 40, hyperband=False)], ids=["hyperband", "halving"])
def test_conforms(searcher, check):
    check(searcher)


@pytest.mark.parametrize("check", distribution_checks)
def test_the_distribution_conforms(check):
    check("corenas_searcher_halving")


def test_options_are_a_searcher_under_its_name():
    assert corenas_searchers() == {"halving": Halving}
    assert isinstance(Halving(), Searcher)


def rungs(searcher, budget, batch=1000):
    """What a search asks: (archs, fidelity) of each rung."""
    problem = simple_problem(budget=budget)
    found = []
    search = searcher.start(problem, np.random.default_rng(0))
    for trial in drive(search, problem, additive(large_space()), rounds=10_000, batch=batch):
        if not found or found[-1][1] != trial.fidelity:
            found.append([0, trial.fidelity])
        found[-1][0] += 1
    return [(n, pytest.approx(fidelity)) for n, fidelity in found]


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_brackets_are_those_of_the_paper(batch):
    # Li et al. 2018, R = 81, eta = 3, in shares of R: n = ceil(5 / (s + 1) 3^s) for s = 4, 3, 2, 1, 0. Their table 1
    # has 27, 9, 6 and 5 for s < 4, since their code cuts off 5 / (s + 1) before it multiplies.
    table = [
        *((81, 1 / 81), (27, 1 / 27), (9, 1 / 9), (3, 1 / 3), (1, 1)),
        *((34, 1 / 27), (11, 1 / 9), (3, 1 / 3), (1, 1)),
        *((15, 1 / 9), (5, 1 / 3), (1, 1)),
        *((8, 1 / 3), (2 + 5, 1)),
    ]
    asked = rungs(Halving(min_fidelity=1 / 81, archs=81), 25, batch)
    assert asked[: len(table)] == table


def test_without_hyperband_every_bracket_begins_on_the_lowest_rung():
    asked = rungs(Halving(2, 0.25, 8, hyperband=False), 18)
    assert asked[:9] == [(8, 0.25), (4, 0.5), (2, 1.0)] * 3


def test_the_best_are_promoted_best_first_and_with_more_effort():
    problem = simple_problem()
    search = Halving(3, 1 / 3, 9).start(problem, np.random.default_rng(0))
    first = search.ask(9)
    order = np.random.default_rng(1).permutation(9)
    search.tell([Trial(p.arch, {"gain": float(n)}, fidelity=p.fidelity) for p, n in zip(first, order, strict=True)])
    second = search.ask(9)
    assert [p.arch for p in second] == [first[int(np.flatnonzero(order == n)[0])].arch for n in (8, 7, 6)]
    assert [p.fidelity for p in second] == [1.0] * 3


def test_what_failed_is_not_promoted_and_a_rung_without_any_that_counts_ends_its_bracket():
    problem = simple_problem()
    search = Halving(3, 1 / 3, 9).start(problem, np.random.default_rng(0))
    first = search.ask(9)
    states = ["done" if i == 4 else "failed" for i in range(9)]
    search.tell([Trial(p.arch, {"gain": 1.0}, s, fidelity=1 / 3) for p, s in zip(first, states, strict=True)])
    assert [p.arch for p in search.ask(9)] == [first[4].arch]
    search = Halving(3, 1 / 3, 9).start(problem, np.random.default_rng(0))
    search.tell([Trial(p.arch, state="failed", fidelity=p.fidelity) for p in search.ask(9)])
    assert {p.fidelity for p in search.ask(9)} == {1.0}  # the second bracket, which begins with all the effort


def test_fidelities_are_exact_and_none_is_under_the_least():
    for eta, least, lowest in ((3, 1 / 9, 1 / 9), (3, 0.12, 1 / 3), (2, 0.1, 1 / 8), (3, 1.0, 1.0), (10, 0.001, 0.001)):
        search = Halving(eta, least).start(simple_problem(), np.random.default_rng(0))
        assert search.ask(1)[0].fidelity == pytest.approx(lowest, rel=1e-12)


def test_of_several_objectives_the_fronts_are_promoted():
    problem, measure = simple_problem(pareto=True), additive(large_space())
    search = Halving(3, 1 / 3, 30).start(problem, np.random.default_rng(0))
    told = measured(search.ask(30), measure)
    search.tell(told)
    promoted = [p.arch for p in search.ask(30)]
    front = [t.arch for t in problem.objectives.front(told)]
    assert {*promoted} <= {*front} or {*front} <= {*promoted}


def test_it_finds_better_archs_than_as_much_effort_spent_on_random_ones():
    """Where a ninth of the effort tells archs apart, with some noise."""
    space, problem = large_space(), simple_problem(budget=60)
    exact = additive(space)

    def noisy(arch, fidelity):
        rng = np.random.default_rng([int(arch.digest, 16), round(fidelity * 81)])
        return {"gain": exact(arch).metrics["gain"] + 0.05 * (1 - fidelity) * rng.standard_normal()}

    lead = []
    for seed in range(20):
        search = Halving(hyperband=False).start(problem, np.random.default_rng(seed))
        spent, found = 0.0, 0.0
        while spent < 60 and (asked := search.ask(20)):
            told = [Trial(p.arch, noisy(p.arch, p.fidelity), fidelity=p.fidelity) for p in asked]
            search.tell(told)
            spent += sum(t.fidelity for t in told)
            found = max([found, *(t.metrics["gain"] for t in told if t.fidelity == 1)])
        drawn = space.decode(space.draw(np.random.default_rng(100 + seed), 60))
        lead.append(found - max(exact(arch).metrics["gain"] for arch in drawn))
    assert np.mean(lead) > 2 * np.std(lead) / np.sqrt(20)


def test_a_rung_that_was_interrupted_goes_on_where_it_was():
    problem, measure = simple_problem(), additive(large_space())
    first, second = (Halving().start(problem, np.random.default_rng(seed)) for seed in (0, 1))
    drive(first, problem, measure, rounds=4, batch=11)  # 27 archs: in the middle of a rung
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert drive(first, problem, measure, 15, 4) == drive(second, problem, measure, 15, 4)


def test_the_readme_shows_a_spec_that_is_right():
    (spec,) = spec_fragments(Path(__file__).parents[1] / "README.md")
    assert load_catalogue().options("searchers", spec["searcher"]) == Halving(min_fidelity=0.1, archs=27)
