"""How far two rankings agree: Kendall's tau with its interval, and whether one has come to rest."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from attrs import define

from corenas.space import Arch

FEWEST = 5
"""The least number of pairs that an interval can be given for."""


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Kendall's tau-b of two lists of the same things; nan where one of them is all ties.

    >>> from corenas.ranking import kendall_tau
    >>> kendall_tau([1, 2, 3, 4], [1, 2, 4, 3])
    0.6666666666666666
    """
    signs = [np.sign(np.subtract.outer(np.asarray(each, float), np.asarray(each, float))) for each in (first, second)]
    untied = math.prod(float(np.sum(sign != 0)) for sign in signs)
    return float(np.sum(signs[0] * signs[1]) / math.sqrt(untied)) if untied else math.nan


def tau_interval(tau: float, n: int) -> tuple[float, float]:
    """Return the interval that a tau of n things lies in with 95 % confidence (Fieller, Hartley, Pearson 1957).

    Fisher's transform of tau has a variance of about 0.437 / (n - 4), whatever tau is, up to 0.8 at least.
    """
    if n < FEWEST or not math.isfinite(tau):
        return -1.0, 1.0
    middle = math.atanh(min(max(tau, -0.999999), 0.999999))
    half = 1.959964 * math.sqrt(0.437 / (n - 4))
    return math.tanh(middle - half), math.tanh(middle + half)


@define(eq=False)
class Ranking:
    """A fixed sample of archs, ranked again and again while their supernet is trained.

    score: model, archs -> what they are ranked by
    scores: those of the last time
    """

    archs: Sequence[Arch]
    score: Callable[[Any, Sequence[Arch]], Sequence[float]]
    scores: Sequence[float] = ()

    def follow(self, model: Any) -> float | None:
        """Rank the archs. Returns the tau between this time and the last, None the first time."""
        before, self.scores = self.scores, [*self.score(model, self.archs)]
        return kendall_tau(before, self.scores) if before else None

    def state_dict(self) -> dict[str, Any]:
        """Return the last scores."""
        return {"scores": [*self.scores]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from them."""
        self.scores = state["scores"]
