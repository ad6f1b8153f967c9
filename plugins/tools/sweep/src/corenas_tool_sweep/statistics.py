"""What a population of archs says, as pure functions of arrays: distributions, distances, good ranges, tests.

Errors are (n,), smaller is better; weights are (n,) and sum to 1; bins are (n,) numbers of cost bins from 0. What
draws at random is given its generator, and enumerates instead where there are few enough cases.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
from attrs import frozen
from scipy import stats

CHUNK = 2_000_000
"""The most numbers of a matrix of random draws that are held at once."""
SAME = 1e-9
"""Two statistics that differ by less, relative to the larger, are equal: sums in another order are not exact."""


# -- distributions ----------------------------------------------------------------------------------------------------


def equal_weights(n: int) -> np.ndarray:
    """Return weights that are all the same."""
    return np.full(n, 1 / n)


def edf(errors: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct errors in order and the weight of those at most as large: right-continuous steps to 1."""
    at, place = np.unique(errors, return_inverse=True)
    return at, np.minimum(np.cumsum(np.bincount(place, weights, len(at))), 1.0)


def share_at_most(errors: np.ndarray, weights: np.ndarray, error: float) -> float:
    """Return the EDF at an error."""
    return float(weights[errors <= error].sum())


def area(errors: np.ndarray, weights: np.ndarray, up_to: float) -> float:
    """Return the area under the EDF from 0 up to an error, as a share of the whole: the mean error in disguise."""
    return float(1 - (weights * np.minimum(1, errors / up_to)).sum())


def effective_size(weights: np.ndarray) -> float:
    """Return how many equally weighted archs say as much (Kish)."""
    return float(1 / (weights**2).sum())


def band(n: float, alpha: float = 0.05) -> float:
    """Return the half-width of a band around an EDF (Dvoretzky, Kiefer, Wolfowitz; Massart's constant)."""
    return math.sqrt(math.log(2 / alpha) / (2 * n))


def critical_distance(n: float, m: float, alpha: float = 0.05) -> float:
    """Return the distance of two EDFs that equal populations of n and m archs exceed with probability alpha (Smirnov).

    The limit of many archs, a little too large below 50; populations with weights count by their effective size.
    """
    return math.sqrt(math.log(2 / alpha) / 2 * (n + m) / (n * m))


def distance(errors: np.ndarray, weights: np.ndarray, others: np.ndarray, other_weights: np.ndarray) -> float:
    """Return the largest difference of two EDFs (Kolmogorov, Smirnov)."""
    at, place = np.unique(np.concatenate([errors, others]), return_inverse=True)
    steps = np.bincount(place, np.concatenate([weights, -other_weights]), len(at))
    return float(np.abs(np.cumsum(steps)).max())


# -- equal cost -------------------------------------------------------------------------------------------------------


def bins_of(costs: np.ndarray, low: float, high: float, k: int) -> np.ndarray:
    """Return which of k bins of equal width each cost lies in; the upper edge belongs to the last."""
    if high <= low:
        return np.zeros(len(costs), np.int64)
    return np.clip(np.floor((costs - low) / (high - low) * k).astype(np.int64), 0, k - 1)


def bin_weights(bins: np.ndarray) -> np.ndarray:
    """Return weights under which every bin that is there weighs the same (Radosavovic et al., arXiv:1905.13214)."""
    there, place, counts = np.unique(bins, return_inverse=True, return_counts=True)
    return 1 / (len(there) * counts[place])


def quantile_bins(costs: np.ndarray, k: int) -> np.ndarray:
    """Return which of at most k bins of about as many archs each cost lies in; equal costs share a bin."""
    edges = np.unique(np.quantile(costs, np.arange(1, k) / k))
    return np.unique(np.searchsorted(edges, costs, side="right"), return_inverse=True)[1]


# -- the best of a few ------------------------------------------------------------------------------------------------


def chance_of_best(errors: np.ndarray, weights: np.ndarray, m: int) -> np.ndarray:
    """Return the chance of each arch to be the best of m drawn with replacement: no bootstrap, its limit.

    With S_r the weight of rank r and all worse ones it is S_r^m - S_{r+1}^m; equal errors share it by weight.
    """
    _, place = np.unique(errors, return_inverse=True)
    of_rank = np.bincount(place, weights)
    worse = np.append(np.cumsum(of_rank[::-1])[::-1], 0.0)
    worse /= worse[0]
    chance = worse[:-1] ** m - worse[1:] ** m
    return chance[place] * weights / of_rank[place]


def drawn(n: int, fraction: float) -> int:
    """Return how many archs a share is, at least one; above 1 it is a count, as in pycls."""
    return max(1, int(fraction if fraction > 1 else fraction * n))


def expected_best(errors: np.ndarray, weights: np.ndarray, m: int) -> float:
    """Return the mean error of the best of m archs: one point of the curve of random search."""
    return float((chance_of_best(errors, weights, m) * errors).sum())


def spread_of_best(errors: np.ndarray, weights: np.ndarray, m: int) -> float:
    """Return the standard deviation of the error of the best of m archs."""
    chance = chance_of_best(errors, weights, m)
    mean = (chance * errors).sum()
    return math.sqrt(max(0.0, float((chance * (errors - mean) ** 2).sum())))


def good_range(values: np.ndarray, chance: np.ndarray, quantiles: Sequence[float]) -> np.ndarray:
    """Return quantiles of the values that the best arch has, each one of the values."""
    return np.quantile(values, quantiles, method="inverted_cdf", weights=chance)


def mass(codes: np.ndarray, chance: np.ndarray, k: int) -> np.ndarray:
    """Return for each of k choices how often the best arch has it."""
    return np.bincount(codes, chance, k)


def shuffled_mass(
    codes: np.ndarray, chance: np.ndarray, bins: np.ndarray, k: int, draws: int, rng: np.random.Generator
) -> np.ndarray:
    """Return `mass` for choices that are shuffled within bins, (draws, k): what a variable without effect gives."""
    matter = np.flatnonzero(chance > chance.max() * 1e-6)  # a handful of archs hold all of it
    totals = []
    for some in shuffles_within(codes, bins, draws, rng):
        totals.append(np.stack([(some[:, matter] == code) @ chance[matter] for code in range(k)], 1))
    return np.concatenate(totals)


# -- permutations -----------------------------------------------------------------------------------------------------


def _of_bins(bins: np.ndarray) -> list[np.ndarray]:
    return [np.flatnonzero(bins == number) for number in np.unique(bins)]


def shuffles_within(items: np.ndarray, bins: np.ndarray, draws: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Give matrices (some, n) of the items shuffled within bins, `draws` rows in all."""
    places = _of_bins(bins)
    rows = max(1, CHUNK // max(1, len(items)))
    for start in range(0, draws, rows):
        some = np.tile(items, (min(rows, draws - start), 1))
        for place in places:
            some[:, place] = rng.permuted(some[:, place], axis=1)
        yield some


def orders_within(items: np.ndarray, bins: np.ndarray) -> np.ndarray:
    """Return the items in all orders within bins, (orders, n): the product of the factorials of the bins' sizes."""
    places = _of_bins(bins)
    rows = [np.concatenate(order) for order in itertools.product(*(itertools.permutations(place) for place in places))]
    some = np.tile(items, (len(rows), 1))
    some[:, np.concatenate(places)] = items[np.array(rows, np.int64)]
    return some


def _exceeding(found: np.ndarray, observed: float) -> int:
    return int((found >= observed - SAME * max(1.0, abs(observed))).sum())


def _p_value(found: np.ndarray, observed: float, exact: bool) -> float:
    beyond = _exceeding(found, observed)
    return beyond / len(found) if exact else (1 + beyond) / (len(found) + 1)


@frozen
class Comparison:
    """How two populations differ, and how often relabelling them within cost bins gives as much.

    distance: of their EDFs
    distance_p, mean_p: chance of one as large, or of a difference of means as large, if the labels said nothing
    mean: of the first, less that of the second: below 0 the first is better
    """

    distance: float
    distance_p: float
    mean: float
    mean_p: float


def compare(
    first: np.ndarray,
    second: np.ndarray,
    first_bins: np.ndarray,
    second_bins: np.ndarray,
    draws: int,
    rng: np.random.Generator,
) -> Comparison:
    """Return how two populations differ at equal cost; with one bin for all it is the plain difference.

    Each bin has to hold archs of both. All relabellings are tried if they are at most `draws`.
    """
    errors, bins = np.concatenate([first, second]), np.concatenate([first_bins, second_bins])
    labels = np.arange(len(errors)) < len(first)
    order = np.argsort(errors, kind="stable")
    errors, bins, labels = errors[order], bins[order], labels[order]
    own, other = np.zeros(len(errors)), np.zeros(len(errors))
    places = _of_bins(bins)
    for place in places:
        count = int(labels[place].sum())
        own[place] = 1 / (len(places) * count)
        other[place] = -1 / (len(places) * (len(place) - count))
    ends = np.flatnonzero(np.append(errors[1:] != errors[:-1], True))  # where a group of equal errors ends

    def of(some: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        steps = np.where(some, own, other)
        return np.abs(np.cumsum(steps, 1)[:, ends]).max(1), steps @ errors

    cases = math.prod(math.comb(len(place), int(labels[place].sum())) for place in places)
    exact = cases <= draws
    rows = [_labellings(labels, places)] if exact else shuffles_within(labels, bins, draws, rng)
    distances, means = (np.concatenate(parts) for parts in zip(*map(of, rows), strict=True))
    (observed,), (mean,) = of(labels[None])
    p = _p_value(distances, observed, exact), _p_value(np.abs(means), abs(mean), exact)
    return Comparison(float(observed), p[0], float(mean), p[1])


def _labellings(labels: np.ndarray, places: Sequence[np.ndarray]) -> np.ndarray:
    """Return all ways to give each bin as many labels as it has, (ways, n)."""
    choices = [itertools.combinations(place, int(labels[place].sum())) for place in places]
    rows = [np.concatenate(some).astype(np.int64) for some in itertools.product(*choices)]
    ways = np.zeros((len(rows), len(labels)), bool)
    for way, row in zip(ways, rows, strict=True):
        way[row] = True
    return ways


def difference_interval(
    first: np.ndarray,
    second: np.ndarray,
    first_bins: np.ndarray,
    second_bins: np.ndarray,
    rng: np.random.Generator,
    resamples: int = 2000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Return the bootstrap interval of the difference of means at equal cost, resampled within bins."""
    means = [
        np.mean([some[rng.choice(place, (resamples, len(place)))].mean(1) for place in _of_bins(bins)], 0)
        for some, bins in ((first, first_bins), (second, second_bins))
    ]
    low, high = np.quantile(means[0] - means[1], [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def verdict(interval: tuple[float, float], margin: float) -> str:
    """Return what an interval of (new error - old error) says: better, no worse, worse or undecided."""
    low, high = interval
    if high < 0:
        return "better"
    if high <= margin:
        return "no worse"
    return "worse" if low > margin else "undecided"


# -- variables --------------------------------------------------------------------------------------------------------


def residuals(errors: np.ndarray, bins: np.ndarray, costs: np.ndarray | None = None) -> np.ndarray:
    """Return errors less a cubic in the logarithm of cost, less the mean of their bin.

    costs: None leaves the cubic out. Bins alone leave cost in: a variable that only moves it would seem to matter.
    """
    left = errors.astype(float)
    if costs is not None and len({*costs.tolist()}) > 4:
        z = np.log(costs)
        z = (z - z.mean()) / z.std()
        design = np.vander(z, 4)
        left = left - design @ np.linalg.lstsq(design, left, rcond=None)[0]
    place = np.unique(bins, return_inverse=True)[1]
    return left - (np.bincount(place, left) / np.bincount(place))[place]


def effect(codes: np.ndarray, left: np.ndarray) -> np.ndarray:
    """Return the sum over choices of (sum of residuals)^2 / count; residuals may be (n,) or (rows, n)."""
    hot = np.eye(codes.max() + 1)[codes]
    counts = hot.sum(0)
    there = counts > 0
    return ((left @ hot)[..., there] ** 2 / counts[there]).sum(-1)


def effect_p_values(
    columns: Sequence[np.ndarray], left: np.ndarray, bins: np.ndarray, draws: int, rng: np.random.Generator
) -> list[float]:
    """Return for each variable (codes of its choices) the chance of an effect as large if it had none.

    Residuals are shuffled within bins, the same shuffles for all variables; all orders if they are at most `draws`.
    """
    cases = math.prod(math.factorial(min(len(place), 20)) for place in _of_bins(bins))
    exact = cases <= draws
    rows = [orders_within(left, bins)] if exact else shuffles_within(left, bins, draws, rng)
    beyond, total = np.zeros(len(columns), np.int64), 0
    observed = [float(effect(codes, left)) for codes in columns]
    for some in rows:
        total += len(some)
        beyond += [_exceeding(effect(codes, some), seen) for codes, seen in zip(columns, observed, strict=True)]
    return [float(count / total if exact else (1 + count) / (total + 1)) for count in beyond]


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values that hold for all together (Holm 1979)."""
    given = np.asarray(p_values, float)
    order = np.argsort(given, kind="stable")
    adjusted = np.empty(len(given))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(np.arange(len(given), 0, -1) * given[order]))
    return adjusted.tolist()


def quartile_codes(values: np.ndarray) -> np.ndarray:
    """Return in which quarter of the values each lies; equal values share one."""
    return quantile_bins(values, 4)


# -- proxies ----------------------------------------------------------------------------------------------------------


def rank_agreement(proxy: np.ndarray, truth: np.ndarray) -> tuple[float, tuple[float, float]]:
    """Return Kendall's tau of two rankings and its 95% interval.

    The variance of its atanh is .437 / (n - 4) (Fieller et al. 1957).
    """
    tau = float(stats.kendalltau(proxy, truth).statistic)
    if len(proxy) < 5 or not abs(tau) < 1:
        return tau, (-1.0, 1.0)
    half = 1.96 * math.sqrt(0.437 / (len(proxy) - 4))
    return tau, (math.tanh(math.atanh(tau) - half), math.tanh(math.atanh(tau) + half))


# -- noise ------------------------------------------------------------------------------------------------------------


def noise_floor(percent: float, images: int) -> float:
    """Return the standard deviation of one accuracy from so many images, in points."""
    return math.sqrt(percent * (100 - percent) / images)
