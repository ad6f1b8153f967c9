import json
from pathlib import Path

import numpy as np
import pytest

from corenas.constrained import FeasibleSpace
from corenas.contracts import Problem
from corenas.cost import Cost
from corenas.errors import UserError
from corenas.mutable import LayerCost
from corenas.objectives import Constraint, Objective, Objectives, Trial
from corenas.plugins import load_catalogue
from corenas.space import SearchSpace
from corenas.testing.components import spec_fragments
from corenas.testing.distributions import distribution_checks
from corenas.testing.searchers import additive, archs, drive, large_space, learning_searcher_checks, simple_problem
from corenas.variables import Categorical, Float
from corenas_searcher_nevergrad import Nevergrad


@pytest.mark.parametrize("check", learning_searcher_checks)
def test_conforms(check):
    check(Nevergrad())


@pytest.mark.parametrize("check", distribution_checks)
def test_the_distribution_conforms(check):
    check("corenas_searcher_nevergrad")


@pytest.mark.parametrize(
    "optimizer", ["NGOpt", "TwoPointsDE", "PSO", "CMA", "cGA", "RandomSearch", "Cobyla", "LogBFGSCMAPlus"]
)
def test_optimizers_of_any_kind_go_on_where_they_were(optimizer):
    """Some draw from numpy's global generator, some run a whole minimizer in a thread of their own."""
    problem, measure = simple_problem(budget=80), additive(large_space())
    first, second = (Nevergrad(optimizer).start(problem, np.random.default_rng(seed)) for seed in (0, 1))
    drive(first, problem, measure, rounds=3, batch=9)
    asked = first.ask(5)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for search in (first, second):
        search.tell([measure(arch) for arch in asked])
    told = drive(first, problem, measure, rounds=4, batch=9)
    assert len(told) == (36 if optimizer != "Cobyla" else 4)
    assert told == drive(second, problem, measure, rounds=4, batch=9)


def test_an_unknown_name_is_answered_with_close_ones():
    with pytest.raises(UserError, match="did you mean 'TwoPointsDE'") as caught:
        Nevergrad("TwoPointDE").start(simple_problem(), np.random.default_rng(0))
    assert caught.value.faults[0].dotted == "searcher.optimizer"


def test_every_choice_of_every_variable_comes_up():
    space = SearchSpace([*(Categorical(f"v.{k}", tuple(range(k))) for k in (1, 2, 3, 7)), Float("x", 0.5, 2.0)])
    problem = Problem(space, Objectives((Objective("gain"),)), 300)
    told = drive(Nevergrad("RandomSearch").start(problem, np.random.default_rng(0)), problem,
                 lambda arch: Trial(arch, {"gain": arch["x"]}))  # fmt: skip
    codes = space.encode(archs(told))
    for column, k in enumerate((1, 2, 3, 7)):
        shares = np.bincount(codes[:, column].astype(int), minlength=k) / len(told)
        assert shares.min() > 0
    assert np.ptp(codes[:, 4]) > 0.8


class Window:
    """Part of a space: archs of 20 choices of 0 to 3 that sum up to 10, one of 100,000."""

    def __init__(self):
        self.space = SearchSpace([Categorical(f"v.{i}", (0, 1, 2, 3)) for i in range(20)])
        self.variables = self.space.variables

    def draw(self, rng, n):
        codes = np.zeros((n, 20), int)
        for row in codes:
            np.add.at(row, rng.permutation(np.repeat(np.arange(20), 3))[:10], 1)
        return codes

    def admit(self, codes):
        return codes[codes.sum(axis=1) == 10]

    def sample(self, rng):
        return self.space.decode(self.draw(rng, 1))[0]

    def mutated(self, codes, prob, rng):
        return self.draw(rng, len(codes))

    def mutate(self, arch, prob, rng):
        return self.sample(rng)


def test_inside_narrow_constraints_it_asks_what_is_near_and_still_learns():
    window = Window()
    weights = np.arange(20.0)

    def measure(arch):
        codes = window.space.encode([arch])[0]
        assert codes.sum() == 10
        return Trial(arch, {"gain": float(weights @ codes)})

    problem = Problem(window, Objectives((Objective("gain"),)), 300)
    told = drive(Nevergrad().start(problem, np.random.default_rng(0)), problem, measure)
    rng = np.random.default_rng(1)
    drawn = [measure(window.sample(rng)).metrics["gain"] for _ in range(300)]
    assert len(told) == 300
    assert max(trial.metrics["gain"] for trial in told) > max(drawn)


def test_in_a_thousandth_of_a_space_it_asks_what_is_near_what_the_optimizer_made():
    space = SearchSpace([Categorical(f"v.{i}", (1, 2, 3, 4)) for i in range(30)])
    prices = np.random.default_rng(1).integers(100, 1000, size=30)
    cost = Cost.adding([LayerCost(params=int(n) * space.value(f"v.{i}")) for i, n in enumerate(prices)], space)
    low, high = np.quantile(cost(space.draw(np.random.default_rng(2), 100_000))["params"], [0.2, 0.201])
    region = FeasibleSpace(space, cost, [Constraint("params", low, high)])
    problem = Problem(region, Objectives((Objective("gain"),)), 100)
    search = Nevergrad("RandomSearch").start(problem, np.random.default_rng(0))
    moved = []
    for _ in range(50):
        _, codes = search._asked()
        moved.append((search._inside(codes) != codes).sum())
    assert region.method == "tables"
    assert np.mean(moved) < 8  # of an arch that is drawn, 22 in the mean
    told = drive(search, problem, lambda arch: Trial(arch, {"gain": float(arch["v.0"])}))
    assert len(told) == 100
    assert all(low <= spent["params"] <= high for spent in cost.of(archs(told)))


def test_what_was_measured_elsewhere_is_told_and_not_asked():
    problem, measure = simple_problem(budget=60), additive(large_space())
    known = [measure(arch) for arch in large_space().decode(large_space().draw(np.random.default_rng(3), 30))]
    for name in ("NgIohTuned", "cGA"):
        search = Nevergrad(name).start(problem, np.random.default_rng(0))
        search.tell(known)
        assert not {*archs(drive(search, problem, measure, rounds=2))} & {*archs(known)}


def test_the_readme_shows_a_spec_that_is_right():
    fragments = spec_fragments(Path(__file__).parents[1] / "README.md")
    found = [load_catalogue().options("searchers", spec["searcher"]) for spec in fragments]
    assert found == [Nevergrad("TwoPointsDE", workers=20)]
