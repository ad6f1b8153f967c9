"""What makes one trial better than another, and which trials are allowed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from attrs import frozen

if TYPE_CHECKING:
    from corenas.contracts import Trial


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
        outside = max(self.low - number, number - self.high, 0.0)
        return outside and outside / (abs(self.low if number < self.low else self.high) or 1.0)

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

        In Pareto mode whole fronts come first, the less crowded of a front before the others (NSGA-II, Deb et al. 2002).
        """
        distinct = [*{trial.arch: trial for trial in reversed([*trials]) if trial.ok}.values()][::-1]
        if not self.pareto:
            return sorted(distinct, key=self.score, reverse=True)[:n]
        if self.bin_metric is not None:
            front = self.front(distinct)
            rest = [trial for trial in distinct if trial not in front]
            return [*sorted(front, key=self.score, reverse=True), *sorted(rest, key=self.score, reverse=True)][:n]
        ranked: list[Trial] = []
        while distinct and len(ranked) < n:
            front = self._nondominated(distinct)
            crowding = self._crowding(front)
            ranked += [front[i] for i in sorted(range(len(front)), key=lambda i: -crowding[i])]
            distinct = [trial for trial in distinct if trial not in front]
        return ranked[:n]

    def front(self, trials: Iterable[Trial]) -> list[Trial]:
        """The trials that no other makes pointless: one, the Pareto front, or the best of each bin, by bin."""
        distinct = [*{trial.arch: trial for trial in reversed([*trials]) if trial.ok}.values()][::-1]
        if not self.pareto:
            return self.best(distinct, 1)
        if self.bin_metric is None:
            return self._nondominated(distinct)
        bins: dict[int, Trial] = {}
        for trial in distinct:
            place = math.floor(trial.metrics[self.bin_metric] / self.bin_width)
            if place not in bins or self.score(trial) > self.score(bins[place]):
                bins[place] = trial
        return [bins[place] for place in sorted(bins)]

    def _gains(self, trial: Trial) -> tuple[float, ...]:
        return tuple(objective.gain(trial.metrics) for objective in self.objectives)

    def _nondominated(self, trials: Sequence[Trial]) -> list[Trial]:
        gains = [self._gains(trial) for trial in trials]

        def dominated(mine: tuple[float, ...]) -> bool:
            return any(other != mine and all(o >= m for o, m in zip(other, mine, strict=True)) for other in gains)

        return [trial for trial, mine in zip(trials, gains, strict=True) if not dominated(mine)]

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
    if isinstance(text, int | float):
        return float(text)
    text = text.strip()
    suffix = text[-1:] if text[-1:] in _SUFFIXES else ""
    number = float(text.removesuffix(suffix)) * _SUFFIXES[suffix]
    if not math.isfinite(number):
        raise ValueError(f"{text!r} is no finite number")
    return number


def amount(number: float) -> str:
    """A number as people write it: "200M"."""
    for suffix in ("T", "G", "M", "k"):
        if abs(number) >= _SUFFIXES[suffix]:
            return f"{number / _SUFFIXES[suffix]:.4g}{suffix}"
    return f"{number:.6g}"
