import numpy as np
import pytest

from corenas.contracts import Problem
from corenas.objectives import Objective, Objectives
from corenas.space import SearchSpace
from corenas.testing.searchers import searcher_checks
from corenas_tool_sweep.statistics import bins_of
from corenas_tool_sweep.stratified import Stratified

SPACE = SearchSpace.from_table({f"w{i}": [*range(1, 11)] for i in range(6)})


def cost(codes):
    """Rare at both ends, as the costs of a space are."""
    return {"flops": (codes + 1).sum(1), "params": codes.sum(1), "activations": codes.sum(1)}


@pytest.mark.parametrize("check", searcher_checks)
def test_conforms(check):
    check(Stratified(pool=5))


@pytest.fixture(scope="module")
def asked():
    problem = Problem(SPACE, Objectives((Objective("top1"),)), 200, cost)
    return Stratified(bins=5, pool=200).start(problem, np.random.default_rng(0)).ask(200)


def test_each_bin_of_cost_has_as_many_archs(asked):
    flops = cost(SPACE.encode([proposal.arch for proposal in asked]))["flops"].astype(float)
    counts = np.bincount(bins_of(flops, flops.min(), flops.max(), 5))
    assert counts.min() >= 20  # 2 of plain draws: the edges are those of what was chosen, not of the pool
    assert len({proposal.arch for proposal in asked}) == 200
    early = flops[:50]  # one that ends early is balanced too
    assert np.bincount(bins_of(early, flops.min(), flops.max(), 5)).min() >= 5


def test_weighed_by_their_inclusion_they_are_like_the_space(asked):
    flops = cost(SPACE.encode([proposal.arch for proposal in asked]))["flops"]
    weights = 1 / np.array([proposal.extra["inclusion"] for proposal in asked])
    weights /= weights.sum()
    assert (weights * flops).sum() == pytest.approx(33, abs=1.0)  # six times the mean of 1 to 10
    assert np.sqrt((weights * (flops - 33) ** 2).sum()) == pytest.approx(np.sqrt(6 * 99 / 12), rel=0.15)
    assert flops.std() > 1.3 * np.sqrt(6 * 99 / 12)
