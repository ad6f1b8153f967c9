"""Kendall's tau, its interval, and which trials a trust check looks at."""

import math

import numpy as np
import pytest
from scipy.stats import kendalltau

from corenas.objectives import Objective, Objectives, Trial
from corenas.ranking import Ranking, kendall_tau, tau_interval
from corenas.run.trust import agreement, spread_trials
from corenas.space import Arch


@pytest.mark.parametrize("seed", range(5))
def test_tau_is_that_of_scipy_ties_included(seed):
    rng = np.random.default_rng(seed)
    first, second = rng.integers(0, 8, 30), rng.normal(size=30).round(1)
    assert kendall_tau(first, second) == pytest.approx(kendalltau(first, second).statistic)


def test_a_list_of_ties_ranks_nothing():
    assert math.isnan(kendall_tau([1, 1, 1], [1, 2, 3]))
    assert tau_interval(math.nan, 20) == tau_interval(0.5, 4) == (-1.0, 1.0)


def test_the_interval_holds_the_true_tau_in_95_of_100_samples():
    rng, rho, n = np.random.default_rng(0), 0.6, 20
    true = 2 / math.pi * math.asin(rho)  # of a bivariate normal
    inside = 0
    for _ in range(1000):
        x, noise = rng.normal(size=(2, n))
        low, high = tau_interval(kendall_tau(x, rho * x + math.sqrt(1 - rho**2) * noise), n)
        inside += low <= true <= high
    assert 920 <= inside <= 980


def test_a_ranking_is_followed_from_one_time_to_the_next_and_goes_on_from_its_state():
    scores = iter([[1, 2, 3], [1, 3, 2], [1, 3, 2]])
    ranking = Ranking([Arch({"a": i}) for i in range(3)], lambda model, archs: next(scores))
    assert ranking.follow(None) is None
    assert ranking.follow(None) == pytest.approx(1 / 3)
    again = Ranking(ranking.archs, ranking.score)
    again.load_state_dict(ranking.state_dict())
    assert again.follow(None) == 1


def trials(n):
    """The first third on the front, a second front behind it, the rest far behind; one without a number."""
    rows = [(i // 3 + 10 * (i % 3), 10.0 * (i // 3) - (i % 3)) for i in range(n)]
    found = [Trial(Arch({"a": i}), {"flops": f, "top1": t}) for i, (f, t) in enumerate(rows)]
    return [*found, Trial(Arch({"a": -1}), {"flops": 1, "top1": math.nan}), Trial(Arch({"a": -2}), state="failed")]


def test_trials_are_spread_over_the_front_from_the_least_to_the_most_flops():
    objectives = Objectives((Objective("top1"),))
    chosen = spread_trials(trials(60), objectives, 5)
    front = sorted(trial.metrics["flops"] for trial in trials(60)[:60] if trial.arch["a"] % 3 == 0)
    flops = [trial.metrics["flops"] for trial in chosen]
    assert (
        flops == [front[0], front[5], front[10], front[14], front[19]] or flops[0] == front[0] < flops[-1] == front[-1]
    )
    assert len(chosen) == 5
    assert len(spread_trials(trials(60), objectives, 25)) == 25
    assert len(spread_trials(trials(60), objectives, 100)) == 60


def test_a_search_that_ranks_by_size_alone_is_seen():
    objectives = Objectives((Objective("top1"),))
    chosen = spread_trials(trials(30), objectives, 10)
    alone = [trial.metrics["flops"] for trial in chosen]
    found = agreement(chosen, alone, objectives)
    assert found["tau_of_flops"] == pytest.approx(1.0)
    assert found["interval"][0] < found["tau"]
    assert [row["alone"] for row in found["trials"]] == alone
