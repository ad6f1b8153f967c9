"""Grid search: every arch of a space, or as many as there are trials, evenly spread over it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from attrs import field, frozen
from attrs.validators import ge, optional

from corenas.contracts import Json, Problem, Proposal
from corenas.hookspecs import hookimpl
from corenas.objectives import Trial
from corenas.space import Arch, Codes, SearchSpace, unseen

LISTED = 1 << 20
"""The largest product of choices of which all archs are listed."""
TRIES = 256
"""How many archs are drawn in one part of a grid that is larger, to find one that obeys the constraints."""


@frozen
class Grid:
    """Asks every arch once, in random order; where there are more than trials, so many, evenly spread.

    The archs, in the order of their variables' choices, are cut into as many equal parts as there are trials, and one
    is drawn of each. Each trial keeps as `share` how much of the grid is asked.

    levels: the most choices of one variable, evenly spaced, both ends included; left out, all, and 5 of a continuous
        one
    """

    levels: int | None = field(default=None, validator=optional(ge(2)))

    def start(self, problem: Problem, rng: np.random.Generator) -> GridSearch:
        """Return a search that ends when the grid, or its part for this budget, has been asked."""
        return GridSearch(self, problem, rng)


class GridSearch:
    """Goes through the parts of a grid in random order.

    at: how many parts it is through with
    first: the generator's state before the order of the parts was drawn, from which it is drawn again
    """

    def __init__(self, options: Grid, problem: Problem, rng: np.random.Generator) -> None:
        self.problem = problem
        self.rng = rng
        self.space = SearchSpace(problem.space.variables)
        # Columns of the codes that make up the grid.
        self.levels = [_levels(v.continuous, len(v.choices), options.levels) for v in problem.space.variables]
        self.radices = [len(codes) for codes in self.levels]
        self.at = 0
        self.seen: set[str] = set()
        self.first = rng.bit_generator.state
        self.plan: Codes | None = None
        self.order: list[int] | None = None
        self.share = 0.0

    def ask(self, n: int) -> list[Proposal]:
        """Return up to n archs of the grid that are new."""
        if self.order is None:
            self._prepare()
        assert self.order is not None
        asked: list[Arch] = []
        while len(asked) < n and self.at < len(self.order):
            part = self.order[self.at]
            self.at += 1
            codes = self._drawn(part, len(self.order)) if self.plan is None else self.plan[part : part + 1]
            arch = next((arch for arch in self._decoded(codes) if arch.digest not in self.seen), None)
            if arch is not None:
                asked.append(arch)
                self.seen.add(arch.digest)
        if self.plan is None and self.at == len(self.order):  # parts without an arch inside the constraints
            asked += unseen(lambda: self.problem.space.sample(self.rng), n - len(asked), self.seen)
        return [Proposal(arch, extra={"share": self.share}) for arch in asked]

    def tell(self, trials: Sequence[Trial]) -> None:
        """Results change nothing; archs that were measured elsewhere need no asking."""
        self.seen.update(trial.arch.digest for trial in trials)

    def state_dict(self) -> dict[str, Json]:
        """Return how far it is, and the generator as it was at first and as it is."""
        return {
            "at": self.at,
            "seen": sorted(self.seen),
            "first": self.first,
            "rng": self.rng.bit_generator.state,
            "begun": self.order is not None,
        }

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Go on from a state that `state_dict` gave."""
        self.first = self.rng.bit_generator.state = state["first"]
        self.plan = self.order = None
        if state["begun"]:
            self._prepare()
        self.at, self.seen = state["at"], set(state["seen"])
        self.rng.bit_generator.state = state["rng"]

    def _prepare(self) -> None:
        """Cut the grid into parts, and draw an arch of each where they can be listed."""
        rows, trials = math.prod(self.radices), self.problem.budget
        if rows <= LISTED:
            codes = self._listed(rows)
            parts = min(trials, len(codes))
            edges = np.arange(parts + 1) * len(codes) // max(parts, 1)
            self.plan = codes[edges[:-1] + self.rng.integers(np.diff(edges))]
            self.share = parts / max(len(codes), 1)
        else:
            parts = trials
            self.share = min(1.0, trials / self._size())
        self.order = self.rng.permutation(parts).tolist()

    def _size(self) -> int:
        """Return how many archs the grid has, whatever the constraints."""
        chosen = {
            v.key: [v.choice_of(code if v.continuous else int(code)) for code in codes]
            for v, codes in zip(self.space.variables, self.levels, strict=True)
            if v.continuous or len(codes) < len(v.choices)
        }
        return (self.space.narrow(chosen) if chosen else self.space).size

    def _listed(self, rows: int) -> Codes:
        """Return all archs of the grid inside the constraints, each once."""
        found = [self._admitted(some) for some in _counted(self.radices, rows)]
        return np.concatenate([self.space.draw(self.rng, 0), *found])

    def _admitted(self, digits: np.ndarray) -> Codes:
        codes = self._codes(digits)
        # An arch has as many rows as its inactive variables have levels: it is the one in which these are the first.
        idle = ~self.space.active(codes)
        return self.problem.space.admit(codes[~(idle & (digits > 0)).any(axis=1)])

    def _codes(self, digits: np.ndarray) -> Codes:
        """Return the codes of rows of level numbers."""
        columns = [codes[digits[:, column]] for column, codes in enumerate(self.levels)]
        kind = np.int64 if self.space.finite else np.float64
        return np.array(columns, kind).reshape(len(self.levels), len(digits)).T

    def _drawn(self, part: int, parts: int) -> Codes:
        """Return archs of one of the equal parts of the grid that are inside the constraints."""
        place = (part + self.rng.random(TRIES)) / parts
        digits = np.zeros((TRIES, len(self.radices)), np.int64)
        known = 1
        for column, radix in enumerate(self.radices):
            if known > parts << 10:  # the part says nothing of the variables that are left
                place = self.rng.random(TRIES)
                known = 1
            known *= radix
            digits[:, column] = place * radix
            place = place * radix - digits[:, column]
        return self.problem.space.admit(self._codes(digits))

    def _decoded(self, codes: Codes) -> Iterator[Arch]:
        return (self.problem.space.decode(row[None])[0] for row in codes)


def _levels(continuous: bool, choices: int, most: int | None) -> np.ndarray:
    """Return the codes of a variable that a grid has."""
    if continuous:
        return np.linspace(0, 1, most or 5) if choices > 1 else np.zeros(1)
    kept = choices if most is None else min(choices, most)
    return np.linspace(0, choices - 1, kept).round().astype(np.int64)


def _counted(radices: Sequence[int], rows: int, portion: int = 1 << 16) -> Iterator[np.ndarray]:
    """Give all rows of numbers under the radices, in portions, the last column changing fastest."""
    for start in range(0, rows, portion):
        left = np.arange(start, min(start + portion, rows))
        digits = np.zeros((len(left), len(radices)), np.int64)
        for column in range(len(radices) - 1, -1, -1):
            left, digits[:, column] = np.divmod(left, radices[column])
        yield digits


@hookimpl
def corenas_searchers() -> dict[str, type]:
    """Offer the searcher "grid"."""
    return {"grid": Grid}
