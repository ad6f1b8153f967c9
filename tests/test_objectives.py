"""Objectives: what is allowed, what is better, which trade-offs are left."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corenas.objectives import Constraint, Objective, Objectives, Trial, amount, hypervolume, parse_amount
from corenas.space import Arch

BOTH = (Objective("top1"), Objective("flops", "min"))


def trial(i, state="done", **metrics):
    return Trial(Arch({"i": i}), metrics, state)


def names(trials):
    return [t.arch["i"] for t in trials]


def test_a_constraint_includes_its_bounds_and_is_broken_by_what_is_no_number():
    window = Constraint("flops", 10, 20)
    assert [window.met({"flops": x}) for x in (9.9, 10, 15, 20, 20.1, math.nan)] == [0, 1, 1, 1, 0, 0]
    assert window.met({"params": 3}), "not measured yet"


@pytest.mark.parametrize(
    ("low", "high", "numbers", "expected"),
    [
        (10, 20, [15, 20, 30, 5], [0, 0, 0.5, 0.5]), (-math.inf, 20, [22, -3], [0.1, 0]), (10, math.inf, [9], [0.1]),
        (0, 0, [3, 0], [3, 0]),
    ],
)  # fmt: skip
def test_a_violation_is_relative_to_the_nearer_bound(low, high, numbers, expected):
    assert Constraint("m", low, high).violation(np.array(numbers)) == pytest.approx(expected)


def test_of_equal_trials_the_cheaper_wins_then_the_earlier():
    some = [trial(0, top1=5.0, flops=9), trial(1, top1=5.0, flops=3), trial(2, top1=4.0, flops=1),
            trial(3, top1=5.0, flops=3, params=1), trial(4, top1=5.0, flops=3, params=1)]  # fmt: skip
    assert names(Objectives(BOTH[:1]).best(some, 5)) == [3, 4, 1, 0, 2]
    assert names(Objectives(BOTH[:1]).leaders(some)) == [3]
    unknown = [trial(0, top1=5.0), trial(1, top1=5.0)]
    assert names(Objectives(BOTH[:1]).best(unknown, 2)) == [0, 1]
    bins = Objectives(BOTH[:1], pareto=True, bin_metric="top1", bin_width=1)
    assert names(bins.front(some)) == [2, 3]


def test_the_leaders_of_a_front_are_on_it_whatever_came_before():
    rng = np.random.default_rng(0)
    pareto = Objectives((*BOTH, Objective("latency", "min")), pareto=True)
    for _ in range(50):
        some = [trial(i, **dict(zip(("top1", "flops", "latency"), rng.integers(4, size=3).tolist(), strict=True)))
                for i in range(20)]  # fmt: skip
        kept = []
        for each in some:
            kept = pareto.leaders([*kept, each])
        assert {t.arch["i"] for t in kept} <= {*names(pareto.front(some))}
        assert kept[0].metrics["top1"] == max(t.metrics["top1"] for t in some)
        assert kept[1].metrics["flops"] == min(t.metrics["flops"] for t in some)
        assert kept == pareto.leaders(some)


def test_constraints_read_as_people_write_them():
    assert str(Constraint("flops", high=2e8)) == "flops at most 200M"
    assert str(Constraint("top1", low=75.5)) == "top1 at least 75.5"
    assert str(Constraint("flops", 1.5e9, 2e9)) == "flops from 1.5G to 2G"


@pytest.mark.parametrize(
    ("text", "number"),
    [(3, 3), (2e8, 2e8), ("200M", 2e8), (" 1.5G ", 1.5e9), ("1.5 G", 1.5e9), ("2e3k", 2e6), ("7", 7), ("4B", 4e9),
     ("-3k", -3000), ("1T", 1e12), ("12K", 12000)],
)  # fmt: skip
def test_an_amount_is_a_number_in_plain_units(text, number):
    assert parse_amount(text) == number


@pytest.mark.parametrize(
    "text",
    ["", "M", "200m", "lots", "nan", "inf", "infM", "1e400", "60%", "0x10", "1 2", True, math.nan, math.inf, 10**400,
     [3], None, {}],
)  # fmt: skip
def test_what_is_no_amount_raises_value_error(text):
    with pytest.raises(ValueError):
        parse_amount(text)


def test_a_bad_amount_is_told_with_an_example():
    with pytest.raises(ValueError, match="""expected an amount such as 2e8 or "200M", found '200m'"""):
        parse_amount("200m")


@given(st.floats(1e-3, 1e15))
@settings(derandomize=True)
def test_an_amount_written_and_read_is_the_same_to_four_digits(number):
    assert parse_amount(amount(number)) == pytest.approx(number, rel=1e-3)


def test_the_score_weighs_gains_and_only_finished_trials_have_one():
    objectives = Objectives((Objective("top1"), Objective("latency", "min", 0.5)))
    assert objectives.score(trial(0, top1=70.0, latency=20.0)) == 60
    assert objectives.score(trial(0, "infeasible", top1=70.0, latency=20.0)) == -math.inf
    assert objectives.score(trial(0, top1=math.nan, latency=20.0)) == -math.inf


def test_the_best_come_first_each_arch_once_and_ties_go_to_the_earlier():
    trials = [trial(0, top1=1), trial(1, top1=2), trial(2, top1=2), trial(0, top1=2), trial(3, "failed", top1=9)]
    objectives = Objectives((Objective("top1"),))
    assert names(objectives.best(trials, 9)) == [1, 2, 0]
    same = [trial(0, top1=1), trial(1, top1=1), trial(0, top1=1)]
    assert names(objectives.best(same, 2)) == [0, 1]
    assert names(objectives.front(trials)) == [1]
    assert objectives.best([], 3) == []


def test_a_trial_without_a_number_never_counts():
    trials = [trial(0, top1=math.nan, flops=1), trial(1, top1=50, flops=9), trial(2, top1=40, flops=math.inf)]
    for objectives in (
        Objectives(BOTH),
        Objectives(BOTH, pareto=True),
        Objectives(BOTH, pareto=True, bin_metric="flops", bin_width=5),
    ):
        assert names(objectives.best(trials, 9)) == [1]
        assert names(objectives.front(trials)) == [1]


points = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=25)


@given(points)
@settings(derandomize=True, deadline=None)
def test_the_front_is_what_brute_force_finds(points):
    def beats(a, b):
        return a != b and a[0] >= b[0] and a[1] <= b[1]

    trials = [trial(i, top1=a, flops=b) for i, (a, b) in enumerate(points)]
    expected = [i for i, p in enumerate(points) if not any(beats(q, p) for q in points)]
    objectives = Objectives(BOTH, pareto=True)
    assert names(objectives.front(trials)) == expected
    ranked = names(objectives.best(trials, len(trials)))
    assert sorted(ranked) == [*range(len(points))]
    assert set(ranked[: len(expected)]) == set(expected)
    left = [i for i in range(len(points)) if i not in expected]
    second = {i for i in left if not any(beats(points[j], points[i]) for j in left)}
    assert set(ranked[len(expected) : len(expected) + len(second)]) == second


def test_of_one_front_the_less_crowded_come_first():
    flops = [0, 1, 2, 9, 10]  # gains rise with flops: all five are on the front
    trials = [trial(i, top1=f, flops=f) for i, f in enumerate(flops)]
    # Deb et al. 2002: the ends are infinitely far from others, then the sum of (after - before) / span
    assert names(Objectives(BOTH, pareto=True).best(trials, 5)) == [0, 4, 2, 3, 1]


def test_bins_keep_the_best_of_each_window_of_a_metric():
    objectives = Objectives((Objective("top1"),), pareto=True, bin_metric="flops", bin_width=10)
    trials = [trial(i, top1=t, flops=f) for i, (t, f) in enumerate([(5, 1), (7, 9), (7, 8), (1, 10), (9, 35), (2, 19)])]
    assert names(objectives.front(trials)) == [2, 5, 4], "of two that are as good the cheaper"
    assert names(objectives.best(trials, 4)) == [4, 2, 5, 1]


def test_thousands_of_trials_are_ranked_in_a_moment():
    gains = np.random.default_rng(0).random((3000, 2))
    trials = [trial(i, top1=a, flops=b) for i, (a, b) in enumerate(gains.tolist())]
    front = Objectives(BOTH, pareto=True).front(trials)
    order = sorted(front, key=lambda t: t.metrics["flops"])
    assert [t.metrics["top1"] for t in order] == sorted(t.metrics["top1"] for t in order)


def union_of_boxes(points, reference):
    """By inclusion and exclusion over all subsets."""
    edges = np.maximum(np.array(points) - reference, 0)
    subsets = itertools.chain(*(itertools.combinations(edges, k) for k in range(1, len(edges) + 1)))
    return sum((-1) ** (len(some) + 1) * np.prod(np.min(some, axis=0)) for some in subsets)


@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
def test_hypervolume_is_that_of_the_union_of_boxes(objectives):
    rng = np.random.default_rng(objectives)
    for n in (1, 3, 8):
        points = rng.integers(0, 6, (n, objectives)).astype(float)  # with ties, and some not above the reference
        reference = np.ones(objectives)
        assert hypervolume(points, reference) == pytest.approx(union_of_boxes(points, reference))
    assert hypervolume(np.zeros((0, objectives)), reference) == 0
