import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from corenas.contracts import Problem
from corenas.objectives import Objective, Objectives, Trial
from corenas.plugins import load_catalogue
from corenas.space import SearchSpace
from corenas.testing.components import spec_fragments
from corenas.testing.distributions import distribution_checks
from corenas.testing.searchers import additive, archs, drive, large_space, searcher_checks, simple_problem
from corenas.variables import Categorical
from corenas_searcher_bayesian import Bayesian
from corenas_searcher_bayesian.process import Process, seeded

SMALL = Bayesian(initial=20, population=40, generations=5)


@pytest.mark.parametrize("check", searcher_checks)
def test_conforms(check):
    """With few asks of its process: it takes a second where hundreds of trials were told."""
    check(Bayesian(initial=360, population=40, generations=3, most=60))


@pytest.mark.parametrize("check", distribution_checks)
def test_the_distribution_conforms(check):
    check("corenas_searcher_bayesian")


@pytest.mark.parametrize("pareto", [False, True])
def test_with_its_process_it_resumes_in_the_midst_of_a_batch(pareto):
    problem, measure = simple_problem(budget=80, pareto=pareto), additive(large_space())
    first, second = (SMALL.start(problem, np.random.default_rng(seed)) for seed in (0, 1))
    before = torch.get_rng_state()
    drive(first, problem, measure, rounds=5, batch=5)
    asked = first.ask(4)
    first.tell([measure(arch) for arch in asked[:1]])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for search in (first, second):
        search.tell([measure(arch) for arch in asked[1:]])
    told = drive(first, problem, measure, rounds=2, batch=4)
    assert told == drive(second, problem, measure, rounds=2, batch=4)
    assert len({*archs(told)}) == 8
    assert torch.equal(before, torch.get_rng_state())


def test_it_finds_better_archs_than_random_draws():
    problem, space = simple_problem(budget=60), large_space()
    measure = additive(space)
    told = drive(SMALL.start(problem, np.random.default_rng(0)), problem, measure, batch=10)
    drawn = [measure(arch) for arch in space.decode(space.draw(np.random.default_rng(5), 400))]
    assert max(trial.metrics["gain"] for trial in told) > max(trial.metrics["gain"] for trial in drawn)


def test_a_posterior_is_that_of_the_textbook():
    """Mean and deviation of a process by the formulas, at the scales that were fitted."""
    rng = np.random.default_rng(0)
    rows = np.eye(4)[rng.integers(4, size=(30, 6))].reshape(30, 24)
    gains = rows @ rng.normal(size=(24, 1)) + 0.1 * rng.normal(size=(30, 1))
    with seeded(0):
        process = Process(rows, gains)
    (model,) = process.models
    new = np.eye(4)[rng.integers(4, size=(5, 6))].reshape(5, 24)
    scales = model.covar_module.lengthscale.detach().numpy()[0]
    mean, noise = model.mean_module.constant.item(), model.likelihood.noise.item()

    def kernel(a, b):
        return np.exp(-0.5 * (((a[:, None] - b[None]) / scales) ** 2).sum(axis=2))

    inverse = np.linalg.inv(kernel(rows, rows) + noise * np.eye(30))
    targets = (gains[:, 0] - gains.mean()) / gains.std()
    means = mean + kernel(new, rows) @ inverse @ (targets - mean)
    deviations = np.sqrt(1 - np.einsum("ij,jk,ik->i", kernel(new, rows), inverse, kernel(new, rows)))
    assert process.bound(new, np.ones(1), 0.0) == pytest.approx(means, abs=1e-4)
    assert process.bound(new, np.ones(1), 2.0) == pytest.approx(means + 2 * deviations, abs=1e-3)


class Window:
    """Part of a space: archs whose choices sum up to 8."""

    def __init__(self):
        self.space = SearchSpace([Categorical(f"v.{i}", (0, 1, 2, 3)) for i in range(8)])
        self.variables = self.space.variables

    def draw(self, rng, n):
        codes = self.space.draw(rng, 30 * n + 200)
        return self.admit(codes)[:n]

    def admit(self, codes):
        return codes[codes.sum(axis=1) == 8]

    def sample(self, rng):
        return self.space.decode(self.draw(rng, 1))[0]


def test_it_asks_only_what_obeys_the_constraints_and_learns_from_failures():
    window = Window()

    def measure(arch):
        codes = window.space.encode([arch])[0]
        assert codes.sum() == 8
        if arch["v.7"] == 3:
            return Trial(arch, state="failed", error="no memory")
        return Trial(arch, {"gain": math.nan if arch["v.6"] == 3 else float(codes @ np.arange(8))})

    problem = Problem(window, Objectives((Objective("gain"),)), 60)
    told = drive(SMALL.start(problem, np.random.default_rng(0)), problem, measure, batch=10)
    assert len(told) == 60
    unlucky = [trial.arch["v.7"] == 3 or trial.arch["v.6"] == 3 for trial in told]
    assert sum(unlucky[20:]) < sum(unlucky[:20]) * 2
    assert (
        max(t.metrics["gain"] for t in told if t.ok and math.isfinite(t.metrics["gain"])) == 45
    )  # 2 * 7 + 2 * 6 + 3 * 5 + 1 * 4


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
