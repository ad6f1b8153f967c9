"""What makes one trial better than another, and which trials are allowed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Literal, TypeAlias

import numpy as np
from attrs import field, frozen

from corenas.space import Arch

State: TypeAlias = Literal["done", "infeasible", "failed", "stopped"]


@frozen
class Trial:
    """One arch with what was measured of it.

    state: done; infeasible (a constraint is not met); failed (an evaluator says `error`); stopped
    seconds: how long the measuring took
    fidelity: share of the whole effort that was spent on measuring; only 1 can win
    extra: facts that are no metrics, plain data: a prediction, the device
    """

    arch: Arch
    metrics: Mapping[str, float] = field(factory=dict)
    state: State = "done"
    seconds: float = 0.0
    error: str | None = None
    fidelity: float = 1.0
    extra: Mapping[str, Any] = field(factory=dict)

    @property
    def ok(self) -> bool:
        """Whether it counts: everything was measured and every constraint is met."""
        return self.state == "done"

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "arch": dict(self.arch),
            "metrics": dict(self.metrics),
            "state": self.state,
            "seconds": self.seconds,
            "error": self.error,
            "fidelity": self.fidelity,
            "extra": dict(self.extra),
        }

    @property
    def row(self) -> dict[str, Any]:
        """One row of a table: its choices, its metrics, then the rest. `pandas.DataFrame(t.row for t in trials)`."""
        rest = {"state": self.state, "seconds": self.seconds, "fidelity": self.fidelity}
        return {**self.arch, **self.metrics, **self.extra, **rest}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Trial:
        """Return the trial that `to_json` gave."""
        return cls(**{**data, "arch": Arch(data["arch"])})


@frozen
class Constraint:
    """A range that a metric must lie in, bounds included."""

    metric: str
    low: float = -math.inf
    high: float = math.inf

    def met(self, metrics: Mapping[str, float]) -> bool:
        """Return whether it holds; a metric that was not measured counts as met."""
        return self.metric not in metrics or self.low <= metrics[self.metric] <= self.high

    def violation(self, numbers: np.ndarray) -> np.ndarray:
        """Return how far outside finite numbers lie, each relative to the nearer bound; 0 inside."""
        nearest = np.clip(numbers, self.low, self.high)
        return np.abs(numbers - nearest) / np.where(nearest == 0, 1, np.abs(nearest))

    def __str__(self) -> str:
        if self.low == -math.inf:
            return f"{self.metric} at most {amount(self.high)}"
        if self.high == math.inf:
            return f"{self.metric} at least {amount(self.low)}"
        return f"{self.metric} from {amount(self.low)} to {amount(self.high)}"


@frozen
class Objective:
    """A metric to make large or small; `weight` trades it off against others, per unit of the metric."""

    metric: str
    direction: Literal["max", "min"] = "max"
    weight: float = 1.0

    def gain(self, metrics: Mapping[str, float]) -> float:
        """Return how good its metric is; more is better, whatever the direction."""
        value = metrics[self.metric] if self.direction == "max" else -metrics[self.metric]
        return -math.inf if math.isnan(value) else value


@frozen
class Objectives:
    """What a search is after: the weighted sum of its objectives, or in Pareto mode all good trade-offs.

    pareto: whether no objective is traded off against another
    bin_metric, bin_width: in Pareto mode, keep the best trial of each bin of this metric instead
    """

    objectives: tuple[Objective, ...]
    pareto: bool = False
    bin_metric: str | None = None
    bin_width: float = 0.0

    def score(self, trial: Trial) -> float:
        """Return the weighted sum of gains; minus infinity for a trial that does not count.

        It is not finite either where a metric is not, as of a network that has diverged.
        """
        if not trial.ok:
            return -math.inf
        return sum(objective.weight * objective.gain(trial.metrics) for objective in self.objectives)

    def best(self, trials: Iterable[Trial], n: int) -> list[Trial]:
        """Return the n best trials that count, each arch once, best first; of equal ones the cheaper, then the earlier.

        In Pareto mode front after front, of each the less crowded first (NSGA-II, Deb et al. 2002); of bins the better.

        >>> from corenas import Arch, Objective, Objectives, Trial
        >>> trials = [Trial(Arch({"width": n}), {"top1": 100 - n}) for n in (4, 8, 2)]
        >>> [trial.arch["width"] for trial in Objectives((Objective("top1"),)).best(trials, 2)]
        [2, 4]
        """
        left = self._counting(trials)
        ranked: list[Trial] = []
        while left and len(ranked) < n:
            front = self._front(left)
            spread = self.pareto and self.bin_metric is None
            if spread:
                ranked += [front[i] for i in np.argsort(-self._crowding(front), kind="stable")]
            else:
                ranked += sorted(front, key=self._order)
            taken = {trial.arch for trial in front}
            left = [trial for trial in left if trial.arch not in taken]
        return ranked[:n]

    def front(self, trials: Iterable[Trial]) -> list[Trial]:
        """Return the trials that no other makes pointless: one, the Pareto front, or the best of each bin, by bin."""
        return self._front(self._counting(trials)) if self.pareto else self.best(trials, 1)

    def leaders(self, trials: Iterable[Trial]) -> list[Trial]:
        """Return the best trial; in Pareto mode the best by each objective, that by the first is what a run exports."""
        if not self.pareto:
            return self.best(trials, 1)
        counting = self._counting(trials)
        return [min(counting, key=partial(self.rank, goal)) for goal in self.objectives if counting]

    def rank(self, goal: Objective, trial: Trial) -> tuple[float, ...]:
        """Return what trials are sorted by, best first: one objective, then the others in order, then what they cost.

        The first by it is on the Pareto front.
        """
        gains = (other.gain(trial.metrics) for other in (goal, *self.objectives))
        return (*(-gain for gain in gains), *_costs(trial))

    def _order(self, trial: Trial) -> tuple[float, ...]:
        return -self.score(trial), *_costs(trial)

    def _counting(self, trials: Iterable[Trial]) -> list[Trial]:
        """Return the trials that count: each arch once, as measured first; none with a figure that is no number."""
        metrics = [objective.metric for objective in self.objectives]
        metrics += [] if self.bin_metric is None else [self.bin_metric]
        distinct: dict[Arch, Trial] = {}
        for trial in trials:
            if trial.ok and all(math.isfinite(trial.metrics[metric]) for metric in metrics):
                distinct.setdefault(trial.arch, trial)
        return [*distinct.values()]

    def _front(self, trials: Sequence[Trial]) -> list[Trial]:
        """Return those on the Pareto front, or the best of each bin; all, where scores rank them."""
        if not self.pareto:
            return [*trials]
        if self.bin_metric is None:
            gains = self._gains(trials)
            beaten = [((gains >= mine).all(1) & (gains > mine).any(1)).any() for mine in gains]
            return [*itertools.compress(trials, np.logical_not(beaten))]
        bins: dict[int, Trial] = {}
        for trial in sorted(trials, key=self._order):
            bins.setdefault(math.floor(trial.metrics[self.bin_metric] / self.bin_width), trial)
        return [bins[place] for place in sorted(bins)]

    def _gains(self, trials: Sequence[Trial]) -> np.ndarray:
        """Return a row for each trial, a column for each objective."""
        rows = [[objective.gain(trial.metrics) for objective in self.objectives] for trial in trials]
        return np.array(rows).reshape(len(trials), len(self.objectives))

    def _crowding(self, front: Sequence[Trial]) -> np.ndarray:
        """Return how far apart each trial's neighbours are, summed over objectives (Deb et al. 2002, section III B)."""
        distance = np.zeros(len(front))
        for gains in self._gains(front).T:
            order = np.argsort(gains, kind="stable")
            beside = np.array([-np.inf, *gains[order], np.inf])  # the ends are infinitely far from what is not there
            distance[order] += (beside[2:] - beside[:-2]) / (np.ptp(gains) or 1.0)
        return distance


def _costs(trial: Trial) -> tuple[float, ...]:
    return tuple(trial.metrics.get(metric, math.inf) for metric in ("flops", "params"))


def hypervolume(gains: np.ndarray, reference: Sequence[float] | np.ndarray) -> float:
    """Return how much of the space of gains is beaten by some points and better than a reference point.

    gains: (points, objectives), more is better (`Objective.gain`); a point that is not better in all counts nothing
    Exact, by cutting along one objective after the other: quick for two, or for hundreds of points.

    >>> hypervolume(np.array([[3.0, 1.0], [1.0, 2.0]]), (0, 0))
    4.0
    """
    floor = np.asarray(reference, float)
    points = gains[(gains > floor).all(axis=1)] - floor
    if not len(points) or points.shape[1] == 1:
        return float(points.max(initial=0.0))
    points = points[np.argsort(-points[:, -1], kind="stable")]
    heights = points[:, -1] - np.append(points[1:, -1], 0.0)
    if points.shape[1] == 2:
        return float(heights @ np.maximum.accumulate(points[:, 0]))
    zero = np.zeros(points.shape[1] - 1)
    slices = ((height, points[: i + 1, :-1]) for i, height in enumerate(heights) if height > 0)
    return math.fsum(height * hypervolume(part, zero) for height, part in slices)


_UNITS = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}


def parse_amount(text: str | float, whole: float | None = None) -> float:
    """Return a number in plain units: of 2e8, "200M", "1.5G", of a whole "60%" too. Raises ValueError for all else."""
    units = _UNITS if whole is None else {**_UNITS, "%": whole / 100}
    digits = str(text).strip()
    unit = digits[-1:] if digits[-1:] in units else ""
    with suppress(ValueError):
        number = float(digits.removesuffix(unit)) * units[unit]
        if math.isfinite(number):
            return number
    raise ValueError(f'expected an amount such as 2e8 or "200M", found {text!r}')


def amount(number: float) -> str:
    """Return a number as people write it: "200M"."""
    for unit in ("T", "G", "M", "k"):
        if abs(number) >= _UNITS[unit]:
            return f"{number / _UNITS[unit]:.4g}{unit}"
    return f"{number:.6g}"
