"""The oracles of SWEEP.md, sections 3, 5 and 6: worked out by hand there, or by libraries here."""

import itertools

import numpy as np
import pytest
from scipy import stats

from corenas_tool_sweep import statistics as st

DEPTH = np.array([2, 3, 2, 3, 4, 4])
FLOPS = np.array([110, 120, 150, 250, 280, 350.0])
A = np.array([12, 11, 10, 8, 9, 7.0])
B_FLOPS = np.array([180, 220, 260, 310, 330, 390.0])
B = np.array([11, 8, 9, 7.5, 7, 6.5])
BINS, B_BINS = st.bins_of(FLOPS, 100, 400, 3), st.bins_of(B_FLOPS, 100, 400, 3)
EQUAL, ONE = st.equal_weights(6), np.zeros(6, int)
WEIGHTS, B_WEIGHTS = st.bin_weights(BINS), st.bin_weights(B_BINS)
RNG = np.random.default_rng


def test_the_plain_distribution_is_that_of_the_worked_example():
    at, shares = st.edf(A, EQUAL)
    assert at.tolist() == [7, 8, 9, 10, 11, 12]
    assert shares == pytest.approx(np.arange(1, 7) / 6)
    assert st.share_at_most(A, EQUAL, 8) == pytest.approx(1 / 3)
    assert A.mean() == 9.5
    assert st.area(A, EQUAL, 12) == pytest.approx(0.2083, abs=5e-5)
    assert st.share_at_most(B, EQUAL, 8) == pytest.approx(2 / 3)
    assert st.distance(A, EQUAL, B, EQUAL) == pytest.approx(1 / 3)


def test_at_equal_cost_the_advantage_of_one_population_is_gone():
    assert pytest.approx([1 / 9, 1 / 9, 1 / 9, 1 / 6, 1 / 6, 1 / 3]) == WEIGHTS
    assert st.effective_size(WEIGHTS) == pytest.approx(4.909, abs=5e-4)
    assert st.edf(A, WEIGHTS)[1] == pytest.approx([1 / 3, 1 / 2, 2 / 3, 7 / 9, 8 / 9, 1])
    assert (WEIGHTS * A).sum() == pytest.approx(8.8333, abs=5e-5)
    assert st.area(A, WEIGHTS, 12) == pytest.approx(0.2639, abs=5e-5)
    assert pytest.approx([1 / 3, 1 / 6, 1 / 6, 1 / 9, 1 / 9, 1 / 9]) == B_WEIGHTS
    assert st.edf(B, B_WEIGHTS)[1] == pytest.approx([1 / 9, 2 / 9, 1 / 3, 1 / 2, 2 / 3, 1])
    assert (B_WEIGHTS * B).sum() == pytest.approx(8.8333, abs=5e-5)
    assert st.distance(A, WEIGHTS, B, B_WEIGHTS) == pytest.approx(1 / 9)


def test_one_bin_gives_back_the_plain_distribution_and_the_upper_edge_is_in_the_last():
    assert st.bin_weights(st.bins_of(FLOPS, 110, 350, 1)) == pytest.approx(EQUAL)
    assert st.bins_of(FLOPS, 110, 350, 4).max() == 3
    assert st.bins_of(np.array([5.0, 5.0]), 5, 5, 4).tolist() == [0, 0]


def test_relabelling_within_bins_is_exact_where_it_can_be():
    found = st.compare(A, B, BINS, B_BINS, 10_000, RNG(0))
    assert found.distance == pytest.approx(1 / 9)
    assert found.distance_p == 1
    assert found.mean == pytest.approx(0, abs=1e-12)
    better = st.compare(A, B - 2, BINS, B_BINS, 10_000, RNG(0))
    assert (better.distance, better.distance_p) == (pytest.approx(1 / 2), pytest.approx(12 / 96))
    assert (better.mean, better.mean_p) == (pytest.approx(2.0), pytest.approx(1 / 96))


def test_the_distances_of_all_relabellings_are_those_of_the_worked_example():
    errors, bins = np.concatenate([A, B]), np.concatenate([BINS, B_BINS])
    places = [np.flatnonzero(bins == i) for i in range(3)]
    found = []
    for some in itertools.product(*(itertools.combinations(p, n) for p, n in zip(places, (3, 2, 1), strict=True))):
        own = np.isin(np.arange(12), np.concatenate(some))
        weights = st.bin_weights(bins[own]), st.bin_weights(bins[~own])
        found.append(round(st.distance(errors[own], weights[0], errors[~own], weights[1]), 6))
    assert sorted(found) == [round(1 / 9, 6)] * 16 + [round(1 / 3, 6)] * 80


def test_distance_and_its_p_agree_with_scipy_for_equal_weights():
    rng = RNG(1)
    first, second = rng.normal(size=7), rng.normal(0.8, size=6)
    mine = st.compare(first, second, np.zeros(7, int), np.zeros(6, int), 10_000, rng)
    theirs = stats.ks_2samp(first, second, method="exact")
    assert (mine.distance, mine.distance_p) == (pytest.approx(theirs.statistic), pytest.approx(theirs.pvalue))
    assert stats.ks_2samp(A, B).pvalue == pytest.approx(0.9307, abs=5e-5)
    plain = st.compare(A, B, ONE, ONE, 10_000, rng)
    assert plain.distance == pytest.approx(stats.ks_2samp(A, B).statistic)
    assert 0.8 < plain.distance_p < 0.9307  # four errors are in both, which scipy's table does not know
    drawn = st.compare(first, second, np.zeros(7, int), np.zeros(6, int), 1_000, rng)
    assert drawn.distance_p == pytest.approx(theirs.pvalue, abs=0.05)


@pytest.mark.parametrize(("n", "width", "critical"), [
    (32, 0.240, None), (100, 0.136, 0.192), (250, 0.086, 0.121), (500, 0.061, 0.086), (1000, 0.043, None),
])  # fmt: skip
def test_bands_and_critical_distances_are_those_of_the_page_and_of_scipy(n, width, critical):
    assert st.band(n) == pytest.approx(width, abs=5e-4)
    found = st.critical_distance(n, n)
    if critical is not None:
        assert found == pytest.approx(critical, abs=5e-4)
    # Smirnov's limit: that of the one-sample distribution with nm / (n + m) for n.
    assert stats.kstwobign.sf(found * np.sqrt(n / 2)) == pytest.approx(0.05, abs=1e-4)
    rng = RNG(0)
    beyond = [
        st.distance(*(x for _ in "ab" for x in (rng.random(n), st.equal_weights(n)))) >= found for _ in range(2000)
    ]
    assert np.mean(beyond) == pytest.approx(0.045, abs=0.02)  # a little less than 5%: the limit is too large for few
    assert st.critical_distance(100, 50) > st.critical_distance(100, 100)


def test_the_chance_of_each_rank_to_be_best_is_that_of_the_worked_example():
    assert st.drawn(6, 0.25) == 1
    assert st.drawn(6, 3) == 3
    once = st.chance_of_best(A, EQUAL, 1)
    assert once == pytest.approx(EQUAL)
    assert st.good_range(DEPTH, once, [0.025, 0.5, 0.975]).tolist() == [2, 3, 4]
    assert st.good_range(FLOPS, once, [0.025, 0.975]).tolist() == [110, 350]
    chance = st.chance_of_best(A, EQUAL, 3)
    assert chance[np.argsort(A)] == pytest.approx(np.array([91, 61, 37, 19, 7, 1]) / 216)
    assert st.mass(DEPTH - 2, chance, 3) == pytest.approx([0.0926, 0.3148, 0.5926], abs=5e-5)
    assert st.good_range(DEPTH, chance, [0.025, 0.5, 0.975]).tolist() == [2, 4, 4]
    assert st.good_range(FLOPS, chance, [0.025, 0.5, 0.975]).tolist() == [120, 280, 350]
    assert (chance * A).sum() == pytest.approx(8.0417, abs=5e-5)


def test_the_chance_at_equal_cost_is_that_of_the_worked_example():
    chance = st.chance_of_best(A, WEIGHTS, 3)
    assert chance[np.argsort(A)] == pytest.approx(np.array([4104, 999, 513, 152, 56, 8]) / 5832)
    assert st.mass(DEPTH - 2, chance, 3) == pytest.approx([0.0274, 0.1809, 0.7917], abs=5e-5)
    assert st.good_range(FLOPS, chance, [0.025, 0.5, 0.975]).tolist() == [150, 350, 350]
    means = [[st.expected_best(A, weights, m) for m in (1, 2, 6)] for weights in (EQUAL, WEIGHTS)]
    assert means[0] == pytest.approx([9.5, 8.5278, 7.4397], abs=5e-5)
    assert means[1] == pytest.approx([8.8333, 7.8673, 7.1049], abs=5e-5)
    assert st.expected_best(A, WEIGHTS, 3) == pytest.approx(7.4707, abs=5e-5)
    assert st.chance_of_best(np.array([7, 7, 9.0]), np.full(3, 1 / 3), 2) == pytest.approx([4 / 9, 4 / 9, 1 / 9])


def test_the_closed_form_is_what_a_million_draws_give():
    errors = np.array([3, 1, 2, 2, 5, 4, 1, 6.0])
    weights = np.array([1, 2, 3, 4, 5, 6, 7, 8.0]) / 36
    rng = RNG(0)
    draws = rng.choice(8, (1_000_000, 4), p=weights)
    best = draws[np.arange(len(draws)), np.argmin(errors[draws], 1)]
    seen = np.bincount(best, minlength=8) / len(draws)
    # Among equal errors a draw takes the first of m, which is either in proportion to its weight.
    assert np.abs(seen - st.chance_of_best(errors, weights, 4)).max() < 0.002
    assert st.spread_of_best(errors, weights, 4) == pytest.approx(errors[best].std(), abs=0.005)


@pytest.mark.parametrize("n", [100, 300, 1000])
def test_a_quarter_of_the_archs_always_describes_about_the_best_dozen(n):
    chance = st.chance_of_best(np.arange(n), st.equal_weights(n), st.drawn(n, 0.25))
    assert chance[0] == pytest.approx(0.22, abs=0.005)
    assert chance[:12].sum() == pytest.approx(0.95, abs=0.02)
    assert chance[:15].sum() == pytest.approx(0.975, abs=0.015)
    assert 1 / (chance**2).sum() == pytest.approx(8, abs=0.3)


def test_the_test_of_a_variable_is_that_of_the_worked_example():
    left = st.residuals(A, BINS)
    codes = DEPTH - 2
    all_orders = np.round(st.effect(codes, st.orders_within(left, BINS)), 9)
    assert sorted(all_orders) == [0.25] * 4 + [0.75] * 4 + [1.75] * 4  # each of six arrangements twice
    assert st.effect(codes, left) == pytest.approx(0.25)
    assert st.effect_p_values([codes], left, BINS, 10_000, RNG(0)) == [1]
    assert st.effect_p_values([codes], left, BINS, 11, RNG(0))[0] == pytest.approx(1)  # drawn: the same here


def test_how_far_a_ranking_can_be_trusted_covers_the_truth():
    covered = 0
    for seed in range(200):
        first, second = RNG(seed).multivariate_normal([0, 0], [[1, 0.8], [0.8, 1]], 30).T
        _, (low, high) = st.rank_agreement(first, second)
        covered += low <= 2 / np.pi * np.arcsin(0.8) <= high  # tau of a normal
    assert 180 <= covered <= 199
    assert st.rank_agreement(np.arange(4), np.arange(4)) == (1, (-1, 1))


def test_bands_are_as_wide_as_the_table_says():
    widths = {32: 0.240, 100: 0.136, 250: 0.086, 500: 0.061, 1000: 0.043}
    assert {n: round(st.band(n), 3) for n in widths} == widths


def test_holm_agrees_with_its_definition():
    assert st.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert st.holm([]) == []


def test_what_order_the_archs_come_in_changes_nothing_nor_does_a_monotone_map_change_ranges():
    rng = RNG(2)
    errors, values = rng.gamma(3.0, size=120), rng.integers(1, 6, 120)
    order = rng.permutation(120)
    weights = st.bin_weights(rng.integers(0, 4, 120))
    chance = st.chance_of_best(errors, weights, 30)
    assert st.chance_of_best(errors[order], weights[order], 30) == pytest.approx(chance[order])
    assert st.chance_of_best(np.exp(errors), weights, 30) == pytest.approx(chance)
    assert st.edf(errors[order], weights[order])[1] == pytest.approx(st.edf(errors, weights)[1])
    assert [*st.good_range(values, chance, [0.1, 0.9])] == [*st.good_range(values[order], chance[order], [0.1, 0.9])]


def test_a_variable_that_only_moves_cost_matters_only_where_cost_is_left_in():
    seen = {"ignored": 0, "kept": 0}
    for seed in range(60):
        rng = RNG(seed)
        z = rng.normal(size=300)
        errors = -1.5 * z + rng.normal(size=300)
        codes = st.quantile_bins(0.7 * z + 0.71 * rng.normal(size=300), 5)
        cost, one = np.exp(z), np.zeros(300, int)
        seen["ignored"] += st.effect_p_values([codes], st.residuals(errors, one), one, 200, rng)[0] < 0.05
        bins = st.quantile_bins(cost, 4)
        seen["kept"] += st.effect_p_values([codes], st.residuals(errors, bins, cost), bins, 200, rng)[0] < 0.05
    assert seen["ignored"] == 60
    assert seen["kept"] <= 9  # of 60 at 5%: above 9 in less than 1 of 1000 runs


def test_an_effect_of_a_standard_deviation_is_found_among_250_archs():
    found = 0
    for seed in range(20):
        rng = RNG(seed)
        codes = rng.integers(0, 5, 250)
        errors, one = rng.normal(size=250) + (codes == 2), np.zeros(250, int)
        found += st.effect_p_values([codes], st.residuals(errors, one), one, 500, rng)[0] < 0.05
    assert found == 20  # power 1.0 in SWEEP.md, section 6


def test_intervals_of_a_difference_cover_it_and_words_follow_from_them():
    covered = 0
    for seed in range(100):
        rng = RNG(seed)
        bins = rng.integers(0, 3, (2, 90))
        first, second = rng.normal(bins[0], 1.0), rng.normal(bins[1] + 0.5, 1.0)
        low, high = st.difference_interval(first, second, *bins, rng, resamples=300)
        covered += low <= -0.5 <= high
    assert 88 <= covered <= 99
    words = [st.verdict(interval, 0.2) for interval in ((-2, -1), (-1, 0.1), (0.3, 1), (-1, 1))]
    assert words == ["better", "no worse", "worse", "undecided"]


def test_the_noise_of_an_accuracy_is_as_the_page_says():
    floors = [st.noise_floor(95, 359), st.noise_floor(93, 10_000), st.noise_floor(75, 5_000)]
    assert [round(floor, 2) for floor in floors] == [1.15, 0.26, 0.61]


@pytest.mark.parametrize(("choices", "share"), [(3, 0.03), (5, 0.18), (8, 0.45)])
def test_a_good_range_cuts_an_end_of_a_variable_without_effect_as_often_as_the_page_warns(choices, share):
    rng = RNG(choices)
    chance = st.chance_of_best(np.arange(100.0), st.equal_weights(100), 25)
    codes = np.concatenate([*st.shuffles_within(np.arange(100) % choices, np.zeros(100, int), 2000, rng)])
    masses = np.stack([(codes == code) @ chance for code in range(choices)], 1)
    below = np.cumsum(masses, 1)
    cut = (below[:, 0] < 0.025) | (below[:, -2] > 0.975)
    assert cut.mean() == pytest.approx(share, abs=0.04)


def test_bands_at_equal_cost_hold_the_curve_at_least_as_often_as_they_say():
    inside = 0
    for seed in range(200):
        rng = RNG(seed)
        cost = rng.beta(2, 4, 200)
        errors, bins = 1 - cost + rng.normal(0, 0.2, 200), st.bins_of(cost, 0, 0.8, 4)
        weights = st.bin_weights(bins)
        pool = rng.beta(2, 4, 20_000)  # the truth, nearly
        pool_bins = st.bins_of(pool, 0, 0.8, 4)
        truth = 1 - pool + rng.normal(0, 0.2, 20_000)
        gap = st.distance(errors, weights, truth, st.bin_weights(pool_bins))
        inside += gap <= st.band(st.effective_size(weights))
    assert inside >= 190
