"""What makes one trial better than another, and which trials are allowed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from attrs import frozen

if TYPE_CHECKING:
    from corenas.contracts import Trial
    from corenas.space import Arch


@frozen
class Constraint:
    """A range that a metric must lie in, bounds included."""

    metric: str
    low: float = -math.inf
    high: float = math.inf

    def met(self, metrics: Mapping[str, float]) -> bool:
        """Whether it holds; a metric that was not measured counts as met."""
        return self.metric not in metrics or self.low <= metrics[self.metric] <= self.high

    def violation(self, number: float) -> float:
        """How far outside a number lies, relative to the nearer bound; 0 inside."""
        if self.low <= number <= self.high:
            return 0.0
        bound = self.low if number < self.low else self.high
        return math.inf if math.isnan(number) else abs(number - bound) / (abs(bound) or 1.0)

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
        """More is better, whatever the direction."""
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
        """The weighted sum of gains; minus infinity for a trial that does not count."""
        if not trial.ok:
            return -math.inf
        return sum(objective.weight * objective.gain(trial.metrics) for objective in self.objectives)

    def best(self, trials: Iterable[Trial], n: int) -> list[Trial]:
        """The n best trials that count, each arch once, best first; earlier ones win ties.

        In Pareto mode front after front, of each the less crowded first (NSGA-II, Deb et al. 2002); of bins the better.
        """
        left = self._counting(trials)
        ranked: list[Trial] = []
        while left and len(ranked) < n:
            front = self._front(left) if self.pareto else left
            if self.pareto and self.bin_metric is None:
                crowding = self._crowding(front)
                ranked += [front[i] for i in sorted(range(len(front)), key=lambda i: -crowding[i])]
            else:
                ranked += sorted(front, key=self.score, reverse=True)
            taken = {trial.arch for trial in front}
            left = [trial for trial in left if trial.arch not in taken]
        return ranked[:n]

    def front(self, trials: Iterable[Trial]) -> list[Trial]:
        """The trials that no other makes pointless: one, the Pareto front, or the best of each bin, by bin."""
        return self._front(self._counting(trials)) if self.pareto else self.best(trials, 1)

    def _counting(self, trials: Iterable[Trial]) -> list[Trial]:
        """The trials that count: every arch once, as it was measured first; none with a figure that is no number."""
        distinct: dict[Arch, Trial] = {}
        for trial in trials:
            if trial.ok and all(map(math.isfinite, self._gains(trial))) and self._binnable(trial):
                distinct.setdefault(trial.arch, trial)
        return [*distinct.values()]

    def _binnable(self, trial: Trial) -> bool:
        return self.bin_metric is None or math.isfinite(trial.metrics[self.bin_metric])

    def _front(self, trials: Sequence[Trial]) -> list[Trial]:
        if self.bin_metric is None:
            return self._nondominated(trials)
        bins: dict[int, Trial] = {}
        for trial in trials:
            place = math.floor(trial.metrics[self.bin_metric] / self.bin_width)
            if place not in bins or self.score(trial) > self.score(bins[place]):
                bins[place] = trial
        return [bins[place] for place in sorted(bins)]

    def _gains(self, trial: Trial) -> tuple[float, ...]:
        return tuple(objective.gain(trial.metrics) for objective in self.objectives)

    def _nondominated(self, trials: Sequence[Trial]) -> list[Trial]:
        gains = np.array([self._gains(trial) for trial in trials]).reshape(len(trials), len(self.objectives))
        dominated = [((gains >= mine).all(1) & (gains > mine).any(1)).any() for mine in gains]
        return [trial for trial, beaten in zip(trials, dominated, strict=True) if not beaten]

    def _crowding(self, front: Sequence[Trial]) -> list[float]:
        """How far apart each trial's neighbours are, summed over objectives (Deb et al. 2002, section III B)."""
        distance = [0.0] * len(front)
        for objective in self.objectives:
            gains = [objective.gain(trial.metrics) for trial in front]
            order = sorted(range(len(front)), key=gains.__getitem__)
            span = gains[order[-1]] - gains[order[0]] or 1.0
            distance[order[0]] = distance[order[-1]] = math.inf
            for before, i, after in zip(order, order[1:], order[2:], strict=False):
                distance[i] += (gains[after] - gains[before]) / span
        return distance


_SUFFIXES = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}


def parse_amount(text: str | float) -> float:
    """A number in plain units: 2e8, "200M", "1.5G". Raises ValueError for anything else."""
    try:
        digits = str(text).strip()
        suffix = digits[-1:] if digits[-1:] in _SUFFIXES else ""
        number = float(digits.removesuffix(suffix)) * _SUFFIXES[suffix]
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f'expected an amount such as 2e8 or "200M", found {text!r}')
    return number


def amount(number: float) -> str:
    """A number as people write it: "200M"."""
    for suffix in ("T", "G", "M", "k"):
        if abs(number) >= _SUFFIXES[suffix]:
            return f"{number / _SUFFIXES[suffix]:.4g}{suffix}"
    return f"{number:.6g}"
