import json
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
import scipy.stats

from corenas.constrained import FeasibleSpace
from corenas.contracts import Problem
from corenas.cost import Cost
from corenas.mutable import LayerCost
from corenas.objectives import Constraint, Objective, Objectives, Trial, hypervolume
from corenas.plugins import load_catalogue
from corenas.space import SearchSpace
from corenas.testing.components import spec_fragments
from corenas.testing.distributions import distribution_checks
from corenas.testing.searchers import Inside, additive, archs, drive, large_space, searcher_checks, simple_problem
from corenas.variables import Categorical, Condition, Float, Int
from corenas_searcher_bayesian import Bayesian
from corenas_searcher_bayesian.process import Process, chosen, volume_in_direction
from corenas_searcher_bayesian.search import Features

SMALL = Bayesian(initial=20, population=40, generations=5)


@pytest.mark.parametrize("check", searcher_checks)
def test_conforms(check):
    """With few asks of its process."""
    check(Bayesian(initial=300, population=20, generations=3, most=60))


@pytest.mark.parametrize("check", distribution_checks)
def test_the_distribution_conforms(check):
    check("corenas_searcher_bayesian")


@pytest.mark.parametrize("pareto", [False, True])
def test_with_its_process_it_resumes_in_the_midst_of_a_batch(pareto):
    problem, measure = simple_problem(budget=80, pareto=pareto), additive(large_space())
    first, second = (SMALL.start(problem, np.random.default_rng(seed)) for seed in (0, 1))
    drive(first, problem, measure, rounds=5, batch=5)
    asked = first.ask(4)
    first.tell([measure(arch) for arch in asked[:1]])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for search in (first, second):
        search.tell([measure(arch) for arch in asked[1:]])
    told = drive(first, problem, measure, rounds=2, batch=4)
    assert told == drive(second, problem, measure, rounds=2, batch=4)
    assert len({*archs(told)}) == 8


def test_it_finds_better_archs_than_random_draws():
    problem, space = simple_problem(budget=60), large_space()
    measure = additive(space)
    told = drive(SMALL.start(problem, np.random.default_rng(0)), problem, measure, batch=10)
    drawn = [measure(arch) for arch in space.decode(space.draw(np.random.default_rng(5), 400))]
    assert max(trial.metrics["gain"] for trial in told) > max(trial.metrics["gain"] for trial in drawn)


def kernel(first, second, scales):
    """The Gaussian kernel, pair by pair."""
    return np.exp(-0.5 * (((first[:, None] - second[None]) / scales) ** 2).sum(axis=2))


def some_data(seed=0):
    rng = np.random.default_rng(seed)
    rows = np.eye(4)[rng.integers(4, size=(30, 6))].reshape(30, 24)
    targets = rows @ rng.normal(size=24) + 0.1 * rng.normal(size=30)
    new = np.eye(4)[rng.integers(4, size=(5, 6))].reshape(5, 24)
    return rows, (targets - targets.mean()) / targets.std(), new


def test_a_posterior_is_that_of_the_textbook():
    """Mean, deviation and joint samples of a process by the formulas, at the scales that were fitted."""
    rows, targets, new = some_data()
    process = Process(rows, targets)
    inverse = np.linalg.inv(kernel(rows, rows, process.scales) + process.noise * np.eye(30))
    near = kernel(new, rows, process.scales)
    means = process.mean + near @ inverse @ (targets - process.mean)
    covariance = kernel(new, new, process.scales) - near @ inverse @ near.T
    mean, deviation = process(new)
    assert mean == pytest.approx(means, abs=1e-6)
    assert deviation == pytest.approx(np.sqrt(np.diag(covariance)), abs=1e-6)
    draws = np.concatenate([process.samples(new, np.random.default_rng(seed)) for seed in range(60)])
    assert np.cov(draws.T) == pytest.approx(covariance, abs=5 * np.sqrt(2 / len(draws)) * covariance.max())
    assert draws.mean(axis=0) == pytest.approx(means, abs=0.05)


def test_scales_and_noise_are_most_probable_given_the_targets():
    """By scipy's multivariate normal: nearby scales are less probable, and so is another constant."""
    rows, targets, _ = some_data(1)
    process = Process(rows, targets)
    prior, deviation = np.sqrt(2) + np.log(24) / 2, np.sqrt(3)

    def log_probability(scales, noise, mean):
        covariance = kernel(rows, rows, scales) + noise * np.eye(len(rows))
        data = scipy.stats.multivariate_normal.logpdf(targets, np.full(len(rows), mean), covariance)
        known = scipy.stats.lognorm.logpdf(scales, deviation, scale=np.exp(prior)).sum()
        return data + known + scipy.stats.lognorm.logpdf(noise, 1.0, scale=np.exp(-4))

    best = log_probability(process.scales, process.noise, process.mean)
    rng = np.random.default_rng(2)
    for _ in range(20):
        scales = process.scales * np.exp(0.3 * rng.standard_normal(24))
        assert log_probability(scales, process.noise, process.mean) < best
    assert log_probability(process.scales, process.noise, process.mean + 0.5) < best
    for factor in (0.5, 2.0):
        assert log_probability(process.scales, factor * process.noise, process.mean) < best
    given = np.log([*process.scales, process.noise]) + 0.1
    slopes = scipy.optimize.approx_fprime(given, lambda at: process._loss(at)[0], 1e-6)
    assert process._loss(given)[1] == pytest.approx(slopes, abs=1e-3)


def test_of_two_that_are_alike_the_second_improves_nothing():
    """Expected improvement of several together: samples of which two candidates are equal, and a third less good."""
    rng = np.random.default_rng(0)
    good, other = rng.standard_normal((2, 4000))
    worth = np.stack([good, good + 0.01, other - 0.2], axis=1)
    assert chosen(worth, np.zeros(4000), 2, 0) == [1, 2]
    assert chosen(worth, np.zeros(4000), 2, 1) == [1, 0]  # the last one is pending, no candidate
    assert chosen(worth[:, [0, 2, 1]], np.zeros(4000), 1, 1) == [1]  # what is like a pending one waits
    assert chosen(worth, np.full(4000, 9.0), 3, 0)[0] == 1  # nothing improves: the largest mean


@pytest.mark.parametrize("goals", [2, 3])
def test_hypervolume_is_the_mean_over_directions(goals):
    rng = np.random.default_rng(0)
    gains = rng.random((6, goals))
    directions = np.abs(rng.standard_normal((100_000, goals)))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    worth = volume_in_direction(np.broadcast_to(gains, (100_000, *gains.shape)), directions).max(axis=1)
    factor = math.pi ** (goals / 2) / (2**goals * math.gamma(goals / 2 + 1))
    assert factor * worth.mean() == pytest.approx(hypervolume(gains, (0,) * goals), rel=0.02)


def test_features_are_one_hot_and_those_of_many_numbers_their_place():
    when = [Condition("op", frozenset({"conv"}))]
    variables = [Categorical("op", ("conv", "skip")), Int("size", 0, 20, when=when), Float("lr", 1.0, 3.0)]
    space = SearchSpace(variables)
    rows = Features(space)(
        space.encode([space.arch({"op": "conv", "size": 5, "lr": 1.5}), space.arch({"op": "skip", "lr": 3.0})])
    )
    assert rows.tolist() == [[1, 0, 1, 0.25, 1, 0.25], [0, 1, 0, 0, 1, 1]]


def test_it_asks_only_what_obeys_the_constraints_and_learns_from_failures():
    space = SearchSpace([Categorical(f"v.{i}", (0, 1, 2, 3)) for i in range(8)])
    window = Inside(space, lambda codes: codes.sum(axis=1) == 8)

    def measure(arch):
        codes = space.encode([arch])[0]
        assert codes.sum() == 8
        if arch["v.7"] == 3:
            return Trial(arch, state="failed", error="no memory")
        return Trial(arch, {"gain": math.nan if arch["v.6"] == 3 else float(codes @ np.arange(8))})

    problem = Problem(window, Objectives((Objective("gain"),)), 60)
    told = drive(SMALL.start(problem, np.random.default_rng(0)), problem, measure, batch=10)
    assert len(told) == 60
    unlucky = [(arch["v.6"] == 3) | (arch["v.7"] == 3) for arch in archs(told)]
    by_chance = (window.draw(np.random.default_rng(9), 4000)[:, 6:] == 3).any(axis=1).mean()
    assert np.mean(unlucky[20:]) < 0.7 * by_chance
    assert (
        max(t.metrics["gain"] for t in told if t.ok and math.isfinite(t.metrics["gain"])) == 45
    )  # 2 * 7 + 2 * 6 + 3 * 5 + 1 * 4


def test_in_a_thousandth_of_a_space_it_breeds_and_learns():
    space = SearchSpace([Categorical(f"v.{i}", (1, 2, 3, 4)) for i in range(30)])
    prices, gains = np.random.default_rng(1).integers(100, 1000, size=(2, 30))
    cost = Cost.adding([LayerCost(params=int(n) * space.value(f"v.{i}")) for i, n in enumerate(prices)], space)
    low, high = np.quantile(cost(space.draw(np.random.default_rng(2), 100_000))["params"], [0.2, 0.201])
    region = FeasibleSpace(space, cost, [Constraint("params", low, high)])
    measure = lambda arch: Trial(arch, {"gain": float(space.encode([arch])[0] @ gains)})  # noqa: E731
    problem = Problem(region, Objectives((Objective("gain"),)), 60)
    told = drive(SMALL.start(problem, np.random.default_rng(0)), problem, measure, batch=10)
    assert region.method == "tables"
    assert len(told) == 60
    assert all(low <= spent["params"] <= high for spent in cost.of(archs(told)))
    drawn = space.encode(region.decode(region.draw(np.random.default_rng(5), 2000))) @ gains
    assert np.mean([trial.metrics["gain"] for trial in told[20:]]) > np.quantile(drawn, 0.95)
    assert max(trial.metrics["gain"] for trial in told) > drawn.max()


def test_a_front_is_better_than_a_random_one():
    problem, space = simple_problem(budget=40, pareto=True), large_space()
    measure = additive(space)
    told = drive(SMALL.start(problem, np.random.default_rng(0)), problem, measure, batch=10)
    drawn = [measure(arch) for arch in space.decode(space.draw(np.random.default_rng(5), 40))]

    def volume(trials):
        front = sorted(problem.objectives.front(trials), key=lambda trial: trial.metrics["cost"])
        ends = [*(trial.metrics["cost"] for trial in front[1:]), 1.0]
        return sum(t.metrics["gain"] * (end - t.metrics["cost"]) for t, end in zip(front, ends, strict=True))

    assert volume(told) > 1.1 * volume(drawn)


def test_the_readme_shows_a_spec_that_is_right():
    fragments = spec_fragments(Path(__file__).parents[1] / "README.md")
    assert [load_catalogue().options("searchers", spec["searcher"]) for spec in fragments] == [Bayesian(initial=30)]
