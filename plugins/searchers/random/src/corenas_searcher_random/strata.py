"""Archs of each range of a cost in turn."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from corenas.contracts import Problem
from corenas.space import Arch

PORTION, PORTIONS = 256, 40
"""How many archs are drawn at once, and how often, until one is in the range whose turn it is."""


class Strata:
    """Equal ranges of a cost, between the least and the most of 4096 draws.

    turn: the range whose turn it is
    """

    def __init__(self, problem: Problem, metric: str, bins: int) -> None:
        self.problem, self.metric, self.bins = problem, metric, bins
        # The same for every seed: what the ranges are is a question to the space, not to the search.
        costs = self._costs(problem.space.draw(np.random.default_rng(0), 4096))
        self.edges = np.linspace(costs.min(), costs.max(), bins + 1)
        self.turn = 0

    def draws(self, rng: np.random.Generator) -> Iterator[Arch]:
        """Give archs, each of the range whose turn it is, or where hardly any is in it of the next."""
        while True:
            for _ in range(PORTIONS):
                codes = self.problem.space.draw(rng, PORTION)
                inside = codes[self._range(codes) == self.turn]
                if len(inside):
                    yield self.problem.space.decode(inside[:1])[0]
                    break
            else:
                self.turn = (self.turn + 1) % self.bins

    def _range(self, codes: np.ndarray) -> np.ndarray:
        return np.clip(np.searchsorted(self.edges, self._costs(codes), side="right") - 1, 0, self.bins - 1)

    def _costs(self, codes: np.ndarray) -> np.ndarray:
        assert self.problem.cost is not None
        return self.problem.cost(codes)[self.metric]
