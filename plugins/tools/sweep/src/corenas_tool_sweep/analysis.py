"""What a sweep finds out about its populations: figures as plain data, which the page, the plots and the JSON show."""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import numpy as np
from attrs import field, frozen

from corenas_tool_sweep import statistics as st
from corenas_tool_sweep.population import Column, Population
from corenas_tool_sweep.settings import Normalise, Sweep

LEAST_FOR_RANGES, LEAST_FOR_NARROWING = 32, 100
"""Archs below which no good range is given, and below which nothing is narrowed (power: SWEEP.md, section 6)."""
MOST_CHOICES = 12
"""A variable of more numbers is tested by quarters."""
SHUFFLES = 500
"""Shuffled variables behind the range that chance gives."""


@frozen(eq=False)
class AtCost:
    """Populations at equal cost.

    edges: of the bins
    kept: for each population which archs lie within, their indices
    bins: for each population the bins of these
    """

    by: str
    edges: np.ndarray
    kept: Sequence[np.ndarray]
    bins: Sequence[np.ndarray]

    def errors(self, populations: Sequence[Population], i: int) -> np.ndarray:
        """Return the errors of those of a population that lie within."""
        return populations[i].errors[self.kept[i]]

    def weights(self, i: int) -> np.ndarray:
        """Return the weights of those of a population that lie within."""
        return st.bin_weights(self.bins[i])


@frozen(eq=False)
class Variable:
    """What is known of a variable in a population.

    key: its name
    n: archs that use it and have not failed
    p, holm: of the test of its effect at equal cost; None where there is nothing to test
    choices: for each choice, or quarter, its label, how many archs have it, how many of all have failed, its mean
        residual error and how often the best arch has it
    good: quantiles of the good range; None for choices without order, and below 32 archs
    chance: the range that a variable without effect would have, and how often one would be as narrow
    full: smallest and largest value
    verdict: in words
    matters: whether its effect is beyond doubt (Holm p below alpha) and the archs are enough to narrow it
    """

    key: str
    n: int
    p: float | None
    choices: Sequence[Mapping[str, Any]]
    good: Sequence[float] | None
    chance: Mapping[str, Any] | None
    full: Sequence[Any] | None
    holm: float | None = None
    verdict: str = ""
    matters: bool = False


@frozen(eq=False)
class Analysis:
    """All that a sweep finds out.

    at_cost: cost -> the populations at equal cost, where they can be brought to it
    variables: for each population its variables, those that matter most first
    pairs: how two populations differ
    notes: what a reader has to know
    """

    sweep: Sweep
    populations: Sequence[Population]
    at_cost: Mapping[str, AtCost]
    variables: Sequence[Sequence[Variable]]
    pairs: Sequence[Mapping[str, Any]]
    notes: Sequence[str] = field(factory=list)

    @property
    def main(self) -> AtCost | None:
        """The populations at equal cost, by the cost that was asked for."""
        return self.at_cost.get((self.sweep.normalise or Normalise()).by)


def analyse(populations: Sequence[Population], sweep: Sweep) -> Analysis:
    """Return what a sweep finds out."""
    notes: list[str] = []
    costs = [cost for cost in sweep.complexity if all(cost in population.costs for population in populations)]
    normalise = sweep.normalise or Normalise()
    if normalise.by not in costs:
        asked = sweep.normalise is not None
        notes += [f"no population at equal cost: not all of them have {normalise.by}"] if asked or costs else []
    at_cost = {}
    for cost in costs:
        found = at_equal_cost(populations, cost, normalise)
        if found is not None:
            at_cost[cost] = found
        if cost == normalise.by:
            notes += _notes_of_bins(found, populations, normalise)
    main = at_cost.get(normalise.by)
    variables = [_variables(populations, i, sweep, main) for i in range(len(populations))]
    pairs = [
        compare_pair(populations, i, j, sweep, main) for i, j in itertools.combinations(range(len(populations)), 2)
    ]
    return Analysis(sweep, populations, at_cost, variables, pairs, [*notes, *_notes(populations)])


def generator(sweep: Sweep, *names: str) -> np.random.Generator:
    """Return the generator of one purpose."""
    return np.random.default_rng([sweep.seed, zlib.crc32("/".join(names).encode())])


# -- equal cost -------------------------------------------------------------------------------------------------------


def at_equal_cost(populations: Sequence[Population], by: str, asked: Normalise) -> AtCost | None:
    """Return populations at equal cost, in as many bins up to those asked for as all can fill; None below two.

    Of each population those count that lie in the range that is common to all, or in the range asked for.
    """
    costs = [population.costs[by] for population in populations]
    if not all(np.isfinite(cost).any() for cost in costs):
        return None
    low, high = max(np.nanmin(cost) for cost in costs), min(np.nanmax(cost) for cost in costs)
    if asked.range is not None and asked.by == by:
        low, high = asked.range
    kept = [np.flatnonzero((cost >= low) & (cost <= high)) for cost in costs]
    for k in range(asked.bins if low < high else 0, 1, -1):
        bins = [st.bins_of(cost[some], low, high, k) for cost, some in zip(costs, kept, strict=True)]
        if all(np.bincount(own, minlength=k).min() >= asked.min_per_bin for own in bins):
            return AtCost(by, np.linspace(low, high, k + 1), kept, bins)
    return None


def _notes_of_bins(found: AtCost | None, populations: Sequence[Population], asked: Normalise) -> list[str]:
    if found is None:
        text = f"two bins of {asked.by} would hold less than {asked.min_per_bin} archs of a population"
        return [f"{text}: figures are of all archs alike, whatever they cost"]
    notes = []
    if len(found.edges) - 1 < asked.bins:
        k = len(found.edges) - 1
        notes.append(f"{k} bins of {asked.by}, not {asked.bins}: more would hold less than {asked.min_per_bin} archs")
    for population, kept in zip(populations, found.kept, strict=True):
        if outside := len(population) - len(kept):
            notes.append(f"{outside:,} archs of {population.name} lie outside the common range of {asked.by}")
    return notes


# -- pairs ------------------------------------------------------------------------------------------------------------


def compare_pair(
    populations: Sequence[Population], i: int, j: int, sweep: Sweep, main: AtCost | None
) -> dict[str, Any]:
    """Return how two populations differ, in points of error: below 0 the second is better."""
    first, second = populations[i], populations[j]
    rng = generator(sweep, "pair", first.name, second.name)
    draws = min(sweep.permutations, max(200, 20_000_000 // (len(first) + len(second))))
    one = np.zeros(len(first), np.int64), np.zeros(len(second), np.int64)
    views = {"plain": (first.errors, second.errors, *one)}
    if main is not None:
        views["equal_cost"] = (main.errors(populations, i), main.errors(populations, j), main.bins[i], main.bins[j])
    result: dict[str, Any] = {"first": first.name, "second": second.name}
    for name, arrays in views.items():
        found = st.compare(*arrays, draws, rng)
        low, high = st.difference_interval(*arrays, rng)
        result[name] = {
            "distance": found.distance,
            "distance_p": found.distance_p,
            "critical_distance": st.critical_distance(
                *(st.effective_size(st.bin_weights(bins)) for bins in arrays[2:])
            ),
            "difference": -found.mean,
            "difference_p": found.mean_p,
            "interval": [-high, -low],
            "verdict": st.verdict((-high, -low), sweep.narrow.margin),
        }
    return result


def confirmation(old: Population, new: Population, sweep: Sweep) -> dict[str, Any]:
    """Return how new archs of a narrowed space compare with the archs that suggested it, at equal cost.

    What both have does not count as new.
    """
    known = {*old.rows()}
    fresh = new.take(np.array([row not in known for row in new.rows()]))
    populations, normalise = [old, fresh], sweep.normalise or Normalise()
    has_cost = len(fresh) and all(normalise.by in population.costs for population in populations)
    main = at_equal_cost(populations, normalise.by, normalise) if has_cost else None
    pair = compare_pair(populations, 0, 1, sweep, main) if len(fresh) > 1 else {}
    view = "equal_cost" if "equal_cost" in pair else "plain"
    return {"archs": len(fresh), "view": view, **pair.get(view, {"verdict": "undecided"})}


# -- variables --------------------------------------------------------------------------------------------------------


def _variables(populations: Sequence[Population], i: int, sweep: Sweep, main: AtCost | None) -> list[Variable]:
    """Return what is known of a population's variables, those that matter most first."""
    population = populations[i]
    keys = population.asked(sweep.variables, sweep.derived)
    at_cost = None if main is None or sweep.normalise is None else (main.kept[i], main.bins[i])
    # Variables that the same archs use are tested together, with the same shuffles.
    groups: dict[bytes, list[str]] = {}
    for key in keys:
        groups.setdefault(population.variables[key].active.tobytes(), []).append(key)
    p_values = {}
    for same in groups.values():
        p_values |= _p_values(population, same, sweep)
    found = [_variable(population, key, sweep, p_values.get(key), at_cost) for key in keys]
    tested = [variable for variable in found if variable.p is not None]
    adjusted = dict(zip((v.key for v in tested), st.holm([v.p for v in tested if v.p is not None]), strict=True))
    judged = [_judged(variable, adjusted.get(variable.key), population, sweep) for variable in found]
    return sorted(judged, key=lambda variable: 2.0 if variable.p is None else variable.p)


def _used(population: Population, column: Column) -> np.ndarray:
    """Return which archs a test of a variable is about."""
    return np.flatnonzero(column.active & ~population.failed & np.isfinite(population.errors))


def _codes(column: Column, some: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Return the choice, or the quarter, of some archs, and what these are called: only those that occur."""
    own = column.take(some)
    if own.ordered and (not own.choices or len({*own.values.tolist()}) > MOST_CHOICES):
        codes = st.quartile_codes(own.values)
        parts = [own.values[codes == code] for code in range(codes.max() + 1)]
        return codes, [f"{part.min():.3g} to {part.max():.3g}" for part in parts]
    there, codes = np.unique(own.codes(), return_inverse=True)
    return codes, [label(own.choices[code]) for code in there]


def label(choice: Any) -> str:
    """Return a choice as people write it."""
    return f"{choice:.6g}" if isinstance(choice, float) else str(choice)


def _cost_bins(population: Population, some: np.ndarray, sweep: Sweep) -> tuple[np.ndarray, np.ndarray | None]:
    """Return bins of cost of some archs, and the cost; one bin for all where it is not known."""
    by = (sweep.normalise or Normalise()).by
    by = by if by in population.costs else next(iter(population.costs), None)
    if by is None or not np.isfinite(population.costs[by][some]).all() or (population.costs[by][some] <= 0).any():
        return np.zeros(len(some), np.int64), None
    cost = population.costs[by][some]
    return st.quantile_bins(cost, 8 if len(some) >= 200 else 4), cost


def _p_values(population: Population, keys: Sequence[str], sweep: Sweep) -> dict[str, float]:
    """Return the p value of each variable that has something to test; all are used by the same archs."""
    some = _used(population, population.variables[keys[0]])
    columns = {key: _codes(population.variables[key], some)[0] for key in keys} if len(some) >= 8 else {}
    columns = {key: codes for key, codes in columns.items() if codes.max() > 0}
    if not columns:
        return {}
    bins, cost = _cost_bins(population, some, sweep)
    left = st.residuals(population.errors[some], bins, cost)
    draws = min(sweep.permutations, max(1000, 20_000_000 // len(some)))
    rng = generator(sweep, "variables", population.name, *keys)
    return dict(zip(columns, st.effect_p_values([*columns.values()], left, bins, draws, rng), strict=True))


def _variable(
    population: Population, key: str, sweep: Sweep, p: float | None, at_cost: tuple[np.ndarray, np.ndarray] | None
) -> Variable:
    """Return what is known of a variable, but for what hangs on the others."""
    column = population.variables[key]
    some = _used(population, column)
    if not len(some):
        return Variable(key, 0, None, [], None, None, None)
    codes, labels = _codes(column, some)
    bins, cost = _cost_bins(population, some, sweep)
    left = st.residuals(population.errors[some], bins, cost)
    within, weights, shuffled_in = some, population.weights[some] / population.weights[some].sum(), bins
    if at_cost is not None:
        place = np.isin(at_cost[0], some)
        if place.any():
            within = at_cost[0][place]
            weights, shuffled_in = st.bin_weights(at_cost[1][place]), at_cost[1][place]
    chance = st.chance_of_best(population.errors[within], weights, st.drawn(len(within), sweep.bootstrap.fraction))
    own = np.searchsorted(some, within)
    masses = st.mass(codes[own], chance, len(labels))
    failures = _failures(population, column, labels)
    choices = [
        {
            "choice": name,
            "archs": int((codes == code).sum()),
            "failed": failures.get(name, 0),
            "residual": float(left[codes == code].mean()),
            "mass": float(masses[code]),
        }
        for code, name in enumerate(labels)
    ]
    good, by_chance = None, None
    enough = len(some) >= LEAST_FOR_RANGES and len(labels) > 1
    if column.ordered and enough:
        values = column.values[within]
        good = [float(value) for value in st.good_range(values, chance, sweep.bootstrap.quantiles)]
        by_chance = _chance_range(values, chance, shuffled_in, good, sweep, generator(sweep, "chance", key))
    full = [float(column.values[some].min()), float(column.values[some].max())] if column.ordered else None
    return Variable(key, len(some), p, choices, good, by_chance, full)


def _failures(population: Population, column: Column, labels: Sequence[str]) -> dict[str, int]:
    failed = column.active & population.failed
    names = [label(value) for value in column.values[failed].tolist()]
    return {name: names.count(name) for name in labels}


def _chance_range(
    values: np.ndarray,
    chance: np.ndarray,
    bins: np.ndarray,
    good: Sequence[float],
    sweep: Sweep,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """Return the good range of a variable without effect: the median of its ends, and how often it is as narrow."""
    there, codes = np.unique(values, return_inverse=True)
    if len(there) > 64:  # of a continuous one 64 steps say enough
        codes = np.unique(st.quantile_bins(values, 64), return_inverse=True)[1]
        there = np.array([np.median(values[codes == code]) for code in range(codes.max() + 1)])
    masses = st.shuffled_mass(codes, chance, bins, len(there), SHUFFLES, rng)
    shares = np.cumsum(masses, 1) / masses.sum(1, keepdims=True)
    low_q, _, high_q = sweep.bootstrap.quantiles
    low, high = (np.argmax(shares >= q - 1e-12, 1) for q in (low_q, high_q))
    widths = there[high] - there[low]
    return {
        "range": [float(there[int(np.median(low))]), float(there[int(np.median(high))])],
        "as_narrow": float((widths <= good[2] - good[0] + 1e-12).mean()),
    }


def _judged(variable: Variable, holm: float | None, population: Population, sweep: Sweep) -> Variable:
    """Return a variable with what is to be said of it."""

    matters = False
    if variable.n == 0:
        text = "no arch uses it"
    elif len(variable.choices) < 2:
        text = "one choice only"
    elif holm is None:
        text = f"{variable.n} archs are too few to test"
    elif holm >= sweep.narrow.alpha:
        text = "no effect shown"
    elif not population.sampled:
        text = "an effect among these trials; a search chose them, so they say nothing of the space"
    elif variable.n < LEAST_FOR_NARROWING:
        text = f"an effect; below {LEAST_FOR_NARROWING} archs nothing is suggested"
    else:
        text, matters = "an effect", True
    return attrs.evolve(variable, holm=holm, verdict=text, matters=matters)


# -- words ------------------------------------------------------------------------------------------------------------


def noise_of(population: Population) -> float | None:
    """Return the standard deviation of one error of a typical arch of a population, in points; None if unknown."""
    if population.images is None or population.unit not in ("%", "share"):
        return population.repeats
    percent = float(np.clip(100 - np.median(population.errors), 0, 100))
    return st.noise_floor(percent, population.images)


def _notes(populations: Sequence[Population]) -> list[str]:
    notes = []
    for population in populations:
        name, noise = population.name, noise_of(population)
        if not population.sampled:
            text = "a search chose these archs, so their distribution is that of the search, not the space"
            notes.append(f"{name}: {text}")
        if population.measured in ("supernet proxy", "proxy"):
            notes.append(f"{name}: errors are of a {population.measured}, not of networks trained alone")
        if noise is not None and noise > 0:
            text = f"one error has a standard deviation of about {noise:.2f} points; below twice that, nothing follows"
            notes.append(f"{name}: {text}")
        if len(population) < LEAST_FOR_RANGES:
            notes.append(f"{name}: {len(population)} archs, too few for good ranges ({LEAST_FOR_RANGES} or more)")
        if population.accepted is not None:
            notes.append(f"{name}: {population.accepted:.2%} of what was drawn has the structure and fits the space")
        notes += [f"{name}: {count:,} archs {word}" for word, count in population.counts.items() if count]
        if population.failed.any():
            text = "failed archs count as errors of 100% in distributions; filter = { done = [1, 1] } leaves them out"
            notes.append(f"{name}: {text}")
    if len({population.measured for population in populations} - {"from a file"}) > 1:
        notes.append("errors were measured in different ways: do not compare these populations")
    return notes


# -- plain data -------------------------------------------------------------------------------------------------------


def figures(analysis: Analysis) -> dict[str, Any]:
    """Return everything as plain data: what `sweep.json` holds."""

    populations = []
    for i, population in enumerate(analysis.populations):
        views = {"plain": _view(population.errors, population.weights, analysis.sweep)}
        for cost, at in analysis.at_cost.items():
            view = _view(at.errors(analysis.populations, i), at.weights(i), analysis.sweep)
            views[cost] = {**view, "edges": at.edges.tolist(), "bins": np.bincount(at.bins[i]).tolist()}
        populations.append(
            {
                "name": population.name,
                "metric": population.metric,
                "measured": population.measured,
                "sampled": population.sampled,
                "counts": {"analysed": len(population), **population.counts},
                "noise_floor": noise_of(population),
                "views": views,
                "variables": [attrs.asdict(variable) for variable in analysis.variables[i]],
                "curves": curve_points(population),
            }
        )
    return {
        "seed": analysis.sweep.seed,
        "populations": populations,
        "pairs": [*analysis.pairs],
        "notes": [*analysis.notes],
    }


def curve_points(population: Population) -> list[dict[str, Any]]:
    """Return for each point of the training at which several archs were measured what it says of the end.

    gain: mean error there less that at the end, in points; tau: how far it ranks the archs as the end does
    """
    shares = sorted({share for curve in population.curves for share, _ in curve if share < 1})
    points = []
    for share in shares:
        pairs = [
            (dict(curve)[share], error)
            for curve, error, failed in zip(population.curves, population.errors, population.failed, strict=True)
            if share in dict(curve) and not failed
        ]
        if len(pairs) > 2:
            there, end = np.array(pairs).T
            tau, interval = st.rank_agreement(there, end)
            gain = float((there - end).mean())
            row = {"share": share, "archs": len(pairs), "gain": gain, "tau": tau, "interval": [*interval]}
            points.append(row)
    return points


def _view(errors: np.ndarray, weights: np.ndarray, sweep: Sweep) -> dict[str, Any]:
    at, shares = st.edf(errors, weights)
    n_eff = st.effective_size(weights)
    best_of = {
        m: [st.expected_best(errors, weights, m), st.spread_of_best(errors, weights, m)] for m in powers(len(errors))
    }
    return {
        "n": len(errors),
        "n_eff": n_eff,
        "min": float(errors.min()),
        "mean": float((weights * errors).sum()),
        "band": st.band(n_eff),
        "edf": {"error": at.tolist(), "share": shares.tolist()},
        "best_of": best_of,
    }


def powers(n: int) -> list[int]:
    """Return 1, 2, 4, … up to n."""
    return [2**i for i in range(int(math.log2(n)) + 1)]
