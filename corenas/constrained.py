"""The archs of a space that obey constraints on their cost: which ranges can be reached, and how to draw inside."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from corenas.cost import Cost
from corenas.errors import Fault, UserError
from corenas.objectives import Constraint, amount
from corenas.space import Arch, Codes, SearchSpace

_BATCH = 256
_ROUNDS = 400
_FEW = 32


def reachable(cost: Cost, metric: str) -> tuple[int, int]:
    """The least and the most that archs of the cost's space need of a metric.

    Found by changing one variable at a time for the better, from the smallest and from the largest arch; exact where
    the best choice of a variable does not hang on the others, as it is with widths, depths, kernels and resolutions.
    """
    space = cost.space
    starts = [space.encode([arch]) for arch in (space.smallest(), space.default(), space.largest())]
    low, high = ([_climbed(cost, metric, sign, codes) for codes in starts] for sign in (-1, 1))
    return min(low), max(high)


def _climbed(cost: Cost, metric: str, sign: int, codes: Codes) -> int:
    """The metric where no other choice of one variable makes it larger, or smaller where the sign is negative."""
    value, before = sign * cost(codes)[metric][0], None
    while value != before:
        before = value
        for place in range(codes.shape[1]):
            row = _all_choices(cost.space, codes, place)
            values = sign * cost(row)[metric]
            pick = int(values.argmax())
            if values[pick] > value:
                codes, value = row[pick : pick + 1], values[pick]
    return int(sign * value)


def _all_choices(space: SearchSpace, codes: Codes, place: int) -> Codes:
    """Each arch under every choice of one variable, its archs one after the other; of one without steps, under 17."""
    variable = space.variables[place]
    choices = np.linspace(0, 1, 17) if variable.continuous else np.arange(len(variable.choices))
    rows = np.repeat(codes, len(choices), axis=0)
    rows[:, place] = np.tile(choices, len(codes))
    return space.canonical(rows)


class Constrained:
    """A space under constraints on flops, params or activations; draws, mutates and crosses inside them.

    Draws are those of the space with what breaks a constraint thrown away; where hardly anything is left, archs are
    moved into the range by mutations that do not make it worse.
    Raises UserError, keys relative to their table, if no arch meets them, with the range that can be reached.
    """

    def __init__(self, space: SearchSpace, cost: Cost, constraints: Sequence[Constraint]) -> None:
        self.space, self.cost, self.constraints = space, cost.on(space), tuple(constraints)
        self.variables = space.variables
        self._batch = _BATCH if self.constraints else 1
        self._refuse_unreachable()
        self._draw(np.random.default_rng(0))
        self.share = float((self._violation(space.draw(np.random.default_rng(1), 4096)) == 0).mean())

    def _refuse_unreachable(self) -> None:
        faults = []
        for constraint in self.constraints:
            low, high = reachable(self.cost, constraint.metric)
            if constraint.high < low or constraint.low > high:
                text = f"no arch has {constraint}: this space reaches {amount(low)} to {amount(high)}"
                hint = f"{constraint.metric} of the smallest subnet is {low:,}, of the largest {high:,}"
                faults.append(Fault(text, (constraint.metric,), hint=hint))
        if faults:
            raise UserError(faults=faults)

    def _violation(self, codes: Codes) -> np.ndarray:
        """How far outside each arch lies, summed over the constraints, each relative to its bound."""
        total = np.zeros(len(codes))
        costs = self.cost(codes) if self.constraints else {}
        for c in self.constraints:
            numbers = costs[c.metric]
            outside = np.maximum(np.maximum(c.low - numbers, numbers - c.high), 0)
            bound = np.abs(np.where(numbers < c.low, c.low, c.high))
            total += outside / np.where(bound == 0, 1, bound)
        return total

    def _draw(self, rng: np.random.Generator) -> Codes:
        """Some codes inside the constraints, one at least."""
        codes = self.space.draw(rng, self._batch)
        outside = self._violation(codes)
        for _ in range(_ROUNDS):
            if (outside == 0).any():
                return codes[outside == 0]
            codes, outside = self._nearer(codes, outside, rng)
        raise self._refusal(codes)

    def _nearer(self, codes: Codes, outside: np.ndarray, rng: np.random.Generator) -> tuple[Codes, np.ndarray]:
        """Archs after mutations of some variables and the best choice of one, where these do not make them worse."""
        mutants = self.space.mutated(codes, max(0.05, 1.5 / len(self.variables)), rng)
        few = min(_FEW, len(codes))
        moved = _all_choices(self.space, codes[:few], int(rng.integers(len(self.variables))))
        then = self._violation(moved).reshape(few, -1)
        best = (then + 1e-12 * rng.random(then.shape)).argmin(axis=1)  # any of those that are best
        took = np.flatnonzero(rng.random(few) < 0.7)
        mutants[took] = moved.reshape(few, -1, codes.shape[1])[took, best[took]]
        then = self._violation(mutants)
        better = then <= outside
        return np.where(better[:, None], mutants, codes), np.where(better, then, outside)

    def _refusal(self, codes: Codes) -> UserError:
        near = int(self._violation(codes).argmin())
        wanted = " and ".join(map(str, self.constraints))
        nearest = ", ".join(f"{metric} {amount(column[near])}" for metric, column in self.cost(codes).items())
        return UserError(f"no arch found with {wanted}", hint=f"the nearest has {nearest}")

    def sample(self, rng: np.random.Generator) -> Arch:
        """An arch inside the constraints."""
        return self.space.decode(self._draw(rng)[:1])[0]

    def mutate(self, arch: Arch, prob: float, rng: np.random.Generator) -> Arch:
        """A mutant inside the constraints; where none turns up, a new arch."""
        parent = self.space.encode([arch])
        return self._first(lambda n: self.space.mutated(np.repeat(parent, n, axis=0), prob, rng), rng)

    def cross(self, first: Arch, second: Arch, rng: np.random.Generator) -> Arch:
        """A child inside the constraints; where none turns up, a new arch."""
        one, two = self.space.encode([first]), self.space.encode([second])
        return self._first(lambda n: self.space.crossed(np.repeat(one, n, 0), np.repeat(two, n, 0), rng), rng)

    def _first(self, make: Callable[[int], Codes], rng: np.random.Generator) -> Arch:
        for _ in range(4):
            codes = make(max(self._batch // 4, 1))
            inside = self._violation(codes) == 0
            if inside.any():
                return self.space.decode(codes[inside][:1])[0]
        return self.sample(rng)
