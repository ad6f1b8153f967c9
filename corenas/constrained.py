"""The archs of a space that obey constraints on their cost: which ranges can be reached, and how to draw inside."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from math import exp, inf
from typing import Any, Literal, TypeAlias

import numpy as np

from corenas.cost import Cost
from corenas.errors import Fault, UserError, raise_if_any
from corenas.objectives import Constraint, amount
from corenas.space import Arch, Codes, SearchSpace
from corenas.windows import JointWindow, UntabulatedError, Window

_BATCH = 256
_ROUNDS = 400
_LITTERS = 50
_FEW = 16
_LITTER_SIZES = (4, 16, 64, 256)
"""How many mutants or children are bred at once until one obeys: mostly one of the first few does."""
_MOST_ROWS = 1 << 16
_TRIED = 4096
_LOOSE = 1 / 16
"""Where a larger share obeys, drawing and throwing away is the fastest way."""
_RARE = 1 / 4
"""Where a smaller share of what one window's tables draw obeys the other constraints too, two have tables together."""

Method: TypeAlias = Literal["rejection", "tables", "walk"]
"""How archs inside constraints are found: drawn and thrown away, led there by the tables of costs, or by mutation."""


@lru_cache(maxsize=4)  # a check asks for them in several places
def extremes(cost: Cost, metric: str) -> tuple[Arch, Arch]:
    """Return the archs of the cost's space that need the least and the most of a metric.

    Found by changing one variable at a time for the better, from the smallest and from the largest arch; exact where
    the best choice of a variable does not hang on the others, as it is with widths, depths, kernels and resolutions.
    """
    space = cost.space
    starts = space.encode([space.smallest(), space.default(), space.largest()])
    codes, signs = np.concatenate([starts, starts[::-1]]), np.array([-1, -1, -1, 1, 1, 1])
    worth, before = signs * cost(codes)[metric], np.zeros(0)
    while not np.array_equal(worth, before):
        before = worth
        for column, variable in enumerate(space.variables):  # each arch under every choice, without steps under 17
            choices = np.linspace(0, 1, 17) if variable.continuous else np.arange(len(variable.choices))
            tried = np.repeat(codes, len(choices), axis=0)
            tried[:, column] = np.tile(choices, len(codes))
            tried = space.canonical(tried)
            each = signs.repeat(len(choices)) * cost(tried)[metric]
            rows = each.reshape(len(codes), -1).argmax(axis=1) + len(choices) * np.arange(len(codes))
            better = each[rows] > worth
            codes, worth = np.where(better[:, None], tried[rows], codes), np.maximum(worth, each[rows])
    least, most = space.decode(codes[[worth[:3].argmax(), 3 + worth[3:].argmax()]])
    return least, most


def reachable(cost: Cost, metric: str) -> tuple[int, int]:
    """Return the least and the most that archs of the cost's space need of a metric (`extremes`)."""
    least, most = cost.of(extremes(cost, metric))
    return least[metric], most[metric]


class FeasibleSpace:
    """A space under constraints on flops, params or activations; draws, mutates and crosses inside them.

    Draws are those of `SearchSpace.draw` with what breaks a constraint thrown away: each variable as it is, given that
    the arch obeys. Where that leaves little, the tables of the costs lead there (`corenas.windows`) to the same
    distribution, those of two costs together where one leaves much to throw away; its docstrings say how mutants and
    children are drawn, by the tables of one cost. Where the costs have no such tables, archs are
    found by a walk from the nearest ones, and nobody knows how they are distributed.
    Raises UserError, keys relative to their table, if no arch meets the constraints, with the range that can be
    reached.

    share: which part of `SearchSpace.draw` obeys, as estimated from some thousand draws
    method: how archs are found
    """

    def __init__(self, space: SearchSpace, cost: Cost, constraints: Sequence[Constraint]) -> None:
        self.space, self.cost, self.constraints = space, cost.on(space), tuple(constraints)
        self.variables = space.variables
        self.method: Method = "rejection"
        self.share = 1.0
        self._window: Window | None = None
        self._drawing: Window | JointWindow | None = None
        self._accepted = 1.0
        if self.constraints:
            self._refuse_unreachable()
            self._choose_method()

    def _refuse_unreachable(self) -> None:
        faults = []
        for constraint in self.constraints:
            low, high = reachable(self.cost, constraint.metric)
            if constraint.high < low or constraint.low > high:
                text = f"no arch has {constraint}: this space reaches {amount(low)} to {amount(high)}"
                hint = f"{constraint.metric} of the smallest subnet is {low:,}, of the largest {high:,}"
                faults.append(Fault(text, (constraint.metric,), hint=hint))
        raise_if_any(faults)

    def _choose_method(self) -> None:
        self.share = self._accepted = self._obeying(self.space.draw(np.random.default_rng(1), _TRIED))
        if self.share >= _LOOSE:
            return
        windows: list[tuple[float, Window, Codes]] = []
        for constraint in self.constraints:
            with suppress(UntabulatedError):
                window = Window(self.space, self.cost, constraint)
                if window.log_share > -inf:
                    drawn = window.draw(np.random.default_rng(1), _TRIED)
                    windows.append((self._obeying(drawn), window, drawn))
        accepted = 0.0
        if windows:
            self.method = "tables"
            accepted, self._window, drawn = max(windows, key=lambda each: each[0])
            self._drawing, log_share = self._window, self._window.log_share
            if accepted < _RARE and len(self.constraints) > 1:
                with suppress(UntabulatedError):
                    joint = JointWindow(self.space, self.cost, self._most_broken(self._window.constraint, drawn))
                    both = self._obeying(joint.draw(np.random.default_rng(1), _TRIED)) if joint.log_share > -inf else 0
                    if both > accepted:
                        accepted, self._drawing, log_share = both, joint, joint.log_share
            self.share, self._accepted = exp(log_share) * accepted, accepted
        if accepted == 0:
            self.method, self._window, self._drawing = "walk", None, None
            self._walk(np.random.default_rng(0))

    def _most_broken(self, met: Constraint, codes: Codes) -> tuple[Constraint, Constraint]:
        """Return a constraint, and that other one which most of some archs break."""
        costs = self.cost(codes)
        others = [constraint for constraint in self.constraints if constraint is not met] or [met]
        broken = [int((other.violation(costs[other.metric]) > 0).sum()) for other in others]
        return met, others[int(np.argmax(broken))]

    def _obeying(self, codes: Codes) -> float:
        """Return the share of some archs that obey."""
        return float((self._violation(codes) == 0).mean())

    def _violation(self, codes: Codes) -> np.ndarray:
        """Return how far outside each arch lies, summed over the constraints, each relative to its bound."""
        costs = self.cost(codes) if self.constraints else {}
        return sum((c.violation(costs[c.metric]) for c in self.constraints), start=np.zeros(len(codes)))

    def _walk(self, rng: np.random.Generator) -> Codes:
        """Return codes inside the constraints: all of a batch that are, or one that took mutations to find."""
        codes = self.space.draw(rng, _BATCH)
        outside = self._violation(codes)
        for number in range(_ROUNDS):
            if (outside == 0).any():
                inside = codes[outside == 0]
                return inside if number == 0 else inside[:1]  # mutants are alike
            mutants = self.space.mutated(codes, max(0.05, 1.5 / len(self.variables)), rng)
            codes = np.concatenate([codes, mutants])
            outside = np.concatenate([outside, self._violation(mutants)])
            nearest = np.argsort(outside, kind="stable")[:_BATCH]
            codes, outside = codes[nearest], outside[nearest]
        wanted = " and ".join(map(str, self.constraints))
        costs = self.cost.of(self.space.decode(codes[:1]))[0]
        nearest_costs = ", ".join(f"{metric} {amount(number)}" for metric, number in costs.items())
        raise UserError(f"no arch found with {wanted}", hint=f"the nearest has {nearest_costs}")

    def _some_inside(self, rng: np.random.Generator, n: int) -> Codes:
        """Return some archs inside the constraints where n are wanted, at least one."""
        if self.method != "walk":
            rows = min(_MOST_ROWS, max(_FEW, int(1.1 * n / self._accepted)))
            for _ in range(_ROUNDS):
                codes = (self._drawing or self.space).draw(rng, rows)
                inside = codes[self._violation(codes) == 0]
                if len(inside):
                    return inside
        return self._walk(rng)

    def encode(self, archs: Iterable[Mapping[str, Any]]) -> Codes:
        """Return archs as a matrix (archs, variables) of codes."""
        return self.space.encode(archs)

    def decode(self, codes: Codes) -> list[Arch]:
        """Return the archs of a matrix of codes."""
        return self.space.decode(codes)

    def draw(self, rng: np.random.Generator, n: int) -> Codes:
        """Return n archs inside the constraints, drawn as `sample` draws one, many at once."""
        if not self.constraints:
            return self.space.draw(rng, n)
        drawn = [self.space.draw(rng, 0)]
        missing = n
        while missing > 0:
            drawn.append(self._some_inside(rng, missing)[:missing])
            missing -= len(drawn[-1])
        return np.concatenate(drawn)

    def admit(self, codes: Codes) -> Codes:
        """Return those of some archs that are inside the constraints, canonical."""
        codes = self.space.canonical(codes)
        return codes[self._violation(codes) == 0]

    def mutated(self, codes: Codes, prob: float, rng: np.random.Generator) -> Codes:
        """Return a mutant inside the constraints of each arch; where none turns up, a new arch."""
        moves = self._window or self.space
        return self._bred(len(codes), lambda rows: moves.mutated(codes[rows], prob, rng), rng)

    def crossed(self, first: Codes, second: Codes, rng: np.random.Generator) -> Codes:
        """Return a child inside the constraints of each pair of archs; where none turns up, a new arch."""
        moves = self._window or self.space
        return self._bred(len(first), lambda rows: moves.crossed(first[rows], second[rows], rng), rng)

    def _bred(self, n: int, breed: Callable[[np.ndarray], Codes], rng: np.random.Generator) -> Codes:
        """Return n archs that obey.

        breed: gives one, which may not obey, for each of some rows
        """
        rows = np.arange(n)
        bred = breed(rows)
        for _ in range(_LITTERS):
            rows = rows[self._violation(bred[rows]) > 0]
            if len(rows) == 0:
                return bred
            bred[rows] = breed(rows)
        rows = rows[self._violation(bred[rows]) > 0]
        bred[rows] = self.draw(rng, len(rows))
        return bred

    def sample(self, rng: np.random.Generator) -> Arch:
        """Return an arch inside the constraints."""
        return self.decode(self.draw(rng, 1))[0] if self.constraints else self.space.sample(rng)

    def mutate(self, arch: Arch, prob: float, rng: np.random.Generator) -> Arch:
        """Return a mutant inside the constraints; where none turns up, a new arch."""
        moves, codes = self._window or self.space, self.space.encode([arch])
        return self._first(lambda n: moves.mutated(codes.repeat(n, 0), prob, rng), rng)

    def cross(self, first: Arch, second: Arch, rng: np.random.Generator) -> Arch:
        """Return a child inside the constraints; where none turns up, a new arch."""
        moves, codes = self._window or self.space, self.space.encode([first, second])
        return self._first(lambda n: moves.crossed(codes[:1].repeat(n, 0), codes[1:].repeat(n, 0), rng), rng)

    def _first(self, breed: Callable[[int], Codes], rng: np.random.Generator) -> Arch:
        """Return the first arch that is bred inside the constraints; where none is, a new one.

        breed: gives so many, which may not obey
        """
        for n in _LITTER_SIZES if self.constraints else (1,):
            codes = breed(n)
            inside = codes[self._violation(codes) == 0]
            if len(inside):
                return self.space.decode(inside[:1])[0]
        return self.sample(rng)
