"""Archs whose cost lies in a window, drawn without throwing many away: dynamic programming over binned costs.

A cost is a sum of tables, each over a few variables (`Cost.tables`). The variables are gone through in an order in
which few of them are in play at a time, as in a chain of blocks: what those before have to do with those after is then
the choices of the few, the state, and what they cost so far, in bins. For each state and bin it is worked out how
probable it is that what comes after ends in the window; draws follow these probabilities, variable by variable.
Rounding to bins errs by a bound that is known, and the window of bins is wider by it: no arch of the window is left
out, and the few that come from beside it are the caller's to throw away.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial

import numpy as np
from attrs import define, frozen

from corenas.cost import Cost
from corenas.objectives import Constraint
from corenas.space import Codes, SearchSpace

_MOST_BINS = 1 << 16
_FEWEST_BINS = 1 << 8
_MOST_ENTRIES = 24_000_000
"""Of all layers together: about 100 MB."""
_MOST_MOVES = 300_000
"""Of all steps together: rows of bins that are added up, some microseconds each."""
_MOST_ADDED = 300_000_000
"""Bins of all moves together: half a second."""
_MOST_OPTIONS = 16
"""Combinations of choices of a step that joins others."""
_ROWS = 4096
"""How many archs are drawn at a time: what they look up stays in the processor's cache."""

Kernel = Callable[[int, np.ndarray, slice], np.ndarray]
"""(column of a variable, codes of it, rows of archs) -> how probable each code is where it is active, (rows, codes)."""


@define
class _Step:
    """A few variables that are drawn together, given the state that those before them leave.

    columns: of the variables
    codes: (options, variables), their choices in each option
    active: of each variable, where it is active: (states, options)
    possible: which options there are: an inactive variable holds its default; (states, options)
    chances: the probability of each where variables are drawn uniformly, (states, options)
    cost: what each option adds, (states, options)
    after: the state that each leaves, (states, options)
    states: how many it leaves
    """

    columns: tuple[int, ...]
    codes: np.ndarray
    active: list[np.ndarray]
    possible: np.ndarray
    chances: np.ndarray
    cost: np.ndarray
    after: np.ndarray
    states: int

    def tilted(self, states: np.ndarray, kernel: Kernel, rows: slice) -> np.ndarray:
        """Return the probability of each option where a kernel says those of the choices, (rows, options)."""
        chances = self.possible[states].astype(np.float32)
        for column, codes, active in zip(self.columns, self.codes.T, self.active, strict=True):
            own = kernel(column, codes, rows)
            chances *= own if active.all() else np.where(active[states], own, 1)
        return chances

    def then(self, other: _Step) -> _Step:
        """Return both as one step."""
        before, options, others = len(self.cost), len(self.codes), len(other.codes)

        def of_first(matrix: np.ndarray) -> np.ndarray:
            return np.repeat(matrix, others, axis=1)

        def of_second(matrix: np.ndarray) -> np.ndarray:
            return matrix[self.after].reshape(before, options * others)

        return _Step(
            self.columns + other.columns,
            np.concatenate([self.codes.repeat(others, axis=0), np.tile(other.codes, (options, 1))], axis=1),
            [*map(of_first, self.active), *map(of_second, other.active)],
            of_first(self.possible) & of_second(other.possible),
            of_first(self.chances) * of_second(other.chances),
            of_first(self.cost) + of_second(other.cost),
            of_second(other.after),
            other.states,
        )


@frozen
class _Rounded:
    """What the options of each step cost, in bins; the sum of all errs by `below` to `above` bins."""

    unit: float
    binned: list[np.ndarray]
    below: float
    above: float

    @classmethod
    def to(cls, unit: float, costs: Sequence[np.ndarray]) -> _Rounded:
        """Round to a unit."""
        binned = [np.rint(cost / unit) for cost in costs]
        errors = [bins - cost / unit for bins, cost in zip(binned, costs, strict=True)]
        below, above = (sum(float(end(error)) for error in errors) for end in (np.min, np.max))
        return cls(unit, [bins.astype(np.int32) for bins in binned], below, above)


@frozen
class _Layer:
    """How probable it is, from each state and bin, to end in the window: (states, bins), zero at both ends."""

    first: int
    table: np.ndarray

    def __call__(self, states: np.ndarray, bins: np.ndarray) -> np.ndarray:
        """Return it at some states and bins."""
        width = self.table.shape[1]
        places = bins - np.int32(self.first - 1)
        np.clip(places, 0, width - 1, out=places)
        places += states * np.int32(width)
        return self.table.ravel().take(places)


class Window:
    """Draws archs of which one cost lies in a window, or beside it by the rounding of bins.

    log_share: the logarithm of the share of `space.draw` that lies in the window of bins; minus infinity if none does
    Raises UntabulatedError if the cost's tables do not make it possible.
    """

    def __init__(self, space: SearchSpace, cost: Cost, constraint: Constraint) -> None:
        self.space = space
        self._defaults = [0 if v.continuous else int(v.code_of(v.default)) for v in space.variables]
        self._steps = _steps(space, cost, constraint.metric, self._defaults)
        self._bins(constraint)
        self._look_back()

    def draw(self, rng: np.random.Generator, n: int) -> Codes:
        """Return n archs: those of `space.draw`, without what lies outside."""
        return self._with_continuous(self._drawn(rng, n, None), lambda: self.space.draw(rng, n))

    def mutated(self, codes: Codes, prob: float, rng: np.random.Generator) -> Codes:
        """Return mutants.

        Variable by variable, in the order of the tables: its chances are those of `space.mutated` times how probable
        each choice makes it that a draw from there on ends in the window.
        """
        columns, active = codes.T.astype(np.int32), self.space.active(codes).T
        kept = np.where(active, 1 - prob, 0).astype(np.float32)
        drawn = (1 - kept) / np.array(_sizes(self.space), np.float32)[:, None]

        def kernel(column: int, options: np.ndarray, rows: slice) -> np.ndarray:
            chances = (columns[column, rows, None] == options) * kept[column, rows, None]
            chances += drawn[column, rows, None]
            return chances

        return self._with_continuous(self._drawn(rng, len(codes), kernel), lambda: self.space.mutated(codes, prob, rng))

    def crossed(self, first: Codes, second: Codes, rng: np.random.Generator) -> Codes:
        """Return children, drawn as mutants are, with the chances of `space.crossed`.

        Where neither parent's choice leads into the window, it is any that does.
        """
        parents = [codes.T.astype(np.int32) for codes in (first, second)]
        active = [self.space.active(codes).T.astype(np.float32) for codes in (first, second)]
        total = np.maximum(active[0] + active[1], 1)
        shares = [own / total for own in active]
        drawn = (1 - shares[0] - shares[1]) / np.array(_sizes(self.space), np.float32)[:, None]

        def kernel(column: int, options: np.ndarray, rows: slice) -> np.ndarray:
            chances = (parents[0][column, rows, None] == options) * shares[0][column, rows, None]
            chances += (parents[1][column, rows, None] == options) * shares[1][column, rows, None]
            chances += drawn[column, rows, None]
            return chances

        return self._with_continuous(
            self._drawn(rng, len(first), kernel), lambda: self.space.crossed(first, second, rng)
        )

    # -- bins ---------------------------------------------------------------------------------------------------------

    def _bins(self, constraint: Constraint) -> None:
        """Round what each step's options cost to bins, and find the window of bins."""
        lowest = [step.cost[step.possible].min() for step in self._steps]
        most = sum(step.cost[step.possible].max() for step in self._steps) - sum(lowest)
        low, high = (float(bound - sum(lowest)) for bound in (constraint.low, constraint.high))
        low, high = max(low, 0.0), min(high, float(most))
        states = sum(step.states for step in self._steps)
        moves = sum(int(step.possible.sum()) for step in self._steps)
        bins = min(_MOST_BINS, _MOST_ENTRIES // states, _MOST_ADDED // moves)
        if bins < _FEWEST_BINS or moves > _MOST_MOVES:
            raise UntabulatedError(f"{states:,} states, {moves:,} moves")
        costs = [np.where(step.possible, step.cost - least, 0) for step, least in zip(self._steps, lowest, strict=True)]
        units = {float(max(1, math.ceil(high / bins * stretch))) for stretch in np.linspace(1, 1.1, 17)}
        rounded = [_Rounded.to(unit, costs) for unit in sorted(units)]
        best = min(rounded, key=lambda rounded: (rounded.above - rounded.below) * rounded.unit)
        self._binned = best.binned
        self._window = math.ceil(low / best.unit + best.below - 1e-6), math.floor(high / best.unit + best.above + 1e-6)

    def _look_back(self) -> None:
        """Work out the layers, from the last step to the first."""
        ends = [
            (bins[s.possible].min(), bins[s.possible].max()) for bins, s in zip(self._binned, self._steps, strict=True)
        ]
        least, most = ([int(n) for n in itertools.accumulate(numbers)] for numbers in zip(*ends, strict=True))
        low, high = self._window
        spans = [
            (max(first, low - (most[-1] - last)), min(last, high - (least[-1] - first)))
            for first, last in zip([0, *least], [0, *most], strict=True)
        ]
        self.log_share = 0.0
        self._layers: list[_Layer] = []
        if any(first > last for first, last in spans):
            self.log_share = -math.inf
            return
        table = np.zeros((self._steps[-1].states, spans[-1][1] - spans[-1][0] + 3))
        table[:, 1:-1] = 1
        self._layers.append(_Layer(spans[-1][0], table))
        for step, binned, (first, last) in zip(
            reversed(self._steps), reversed(self._binned), reversed(spans[:-1]), strict=True
        ):
            after, table = self._layers[-1], np.zeros((len(step.cost), last - first + 3))
            for state, option in zip(*np.nonzero(step.possible), strict=True):
                # the bins of this layer whose bin after the option is one of the next layer
                shift = int(binned[state, option]) + first - after.first
                start, stop = max(0, -shift), min(last - first + 1, after.table.shape[1] - 2 - shift)
                if start < stop:
                    source = after.table[step.after[state, option], 1 + start + shift : 1 + stop + shift]
                    table[state, 1 + start : 1 + stop] += step.chances[state, option] * source
            largest = table.max()
            if largest == 0:
                self.log_share = -math.inf
                return
            self.log_share += math.log(largest)
            self._layers.append(_Layer(first, (table / largest).astype(np.float32)))
        self._layers.reverse()
        start = self._layers[0](np.zeros(1, np.int32), np.zeros(1, np.int32))[0]
        self.log_share += math.log(start) if start > 0 else -math.inf

    # -- drawing ------------------------------------------------------------------------------------------------------

    def _drawn(self, rng: np.random.Generator, n: int, kernel: Kernel | None) -> Codes:
        columns = np.zeros((len(self.space.variables), n), np.int64)
        for begin in range(0, n, _ROWS):
            rows = slice(begin, min(n, begin + _ROWS))
            at = np.arange(rows.stop - begin)
            states = bins = np.zeros(len(at), np.int32)
            for step, binned, layer in zip(self._steps, self._binned, self._layers[1:], strict=True):
                after, so_far = step.after[states], binned[states]
                so_far += bins[:, None]
                ends = layer(after, so_far)
                sums = ends * (step.chances[states] if kernel is None else step.tilted(states, kernel, rows))
                np.cumsum(sums, axis=1, out=sums)
                lost = sums[:, -1] == 0
                if lost.any():  # what the parents have leads nowhere from here
                    sums[lost] = (ends[lost] * step.chances[states[lost]]).cumsum(axis=1)
                picks = (sums <= rng.random(len(at), np.float32)[:, None] * sums[:, -1:]).sum(axis=1)
                picks = np.minimum(picks, len(step.codes) - 1)
                columns[step.columns, rows] = step.codes[picks].T
                states, bins = after[at, picks], so_far[at, picks]
        return columns.T

    def _with_continuous(self, codes: Codes, free: Callable[[], Codes]) -> Codes:
        """Return archs with what has no steps, and costs nothing, from others that know of no window."""
        if self.space.finite:
            return codes
        continuous = [variable.continuous for variable in self.space.variables]
        return self.space.canonical(np.where(continuous, free(), codes))


class UntabulatedError(Exception):
    """The costs are no sum of tables, or hang together too much, for a `Window`."""


def _sizes(space: SearchSpace) -> list[int]:
    """Return how many choices each variable has; one without steps costs nothing, and counts as one."""
    return [1 if variable.continuous else len(variable.choices) for variable in space.variables]


# -- the steps --------------------------------------------------------------------------------------------------------


def _steps(space: SearchSpace, cost: Cost, metric: str, defaults: Sequence[int]) -> list[_Step]:
    tables = cost.tables(metric)
    if tables is None:
        raise UntabulatedError(f"{metric} of some layers is too much for a table")
    columns = {key: column for column, key in enumerate(space.keys)}
    by_columns = [(tuple(columns[key] for key in keys), table) for keys, table in tables]
    scopes = _scopes(space, columns, [own for own, _ in by_columns])
    found: list[list[_Step]] = []
    for order in ([*range(len(columns))], _greedy(space, scopes)):
        with suppress(UntabulatedError):
            found.append(_in_order(space, by_columns, scopes, defaults, order))
    if not found:
        raise UntabulatedError("too many variables are in play at a time")
    steps = min(found, key=_size)
    joined = steps[:1]
    for step in steps[1:]:
        last = joined[-1]
        few = len(last.codes) * len(step.codes) <= _MOST_OPTIONS
        # what is in play between two variables of a block is more than before and after it
        if few and len(step.cost) > max(len(last.cost), step.states):
            joined[-1] = last.then(step)
        else:
            joined.append(step)
    return joined


def _size(steps: Sequence[_Step]) -> int:
    return sum(step.possible.size for step in steps)


def _scopes(space: SearchSpace, columns: Mapping[str, int], tables: Sequence[tuple[int, ...]]) -> list[frozenset[int]]:
    """Return which variables hang together: each with those that its conditions hang on, and those of a table."""
    families: list[frozenset[int]] = []
    for column, variable in enumerate(space.variables):
        parents = (families[columns[condition.key]] for condition in variable.when)
        families.append(frozenset({column}).union(*parents))
    return [*dict.fromkeys([*families, *(frozenset().union(*map(families.__getitem__, own)) for own in tables if own)])]


def _greedy(space: SearchSpace, scopes: Sequence[frozenset[int]]) -> list[int]:
    """Return an order of the variables: of those that hang together, the ones next that leave the fewest states."""
    sizes = _sizes(space)
    order: list[int] = []
    # one variable alone would often leave the fewest, and many of them many
    left = [scope for scope in scopes if len(scope) > 1 or not any(scope < other for other in scopes)]
    while left:
        best = min(left, key=partial(_left_in_play, sizes, left, frozenset(order)))
        order += sorted(best.difference(order))
        left = [scope for scope in left if not scope.issubset(order)]
    return order


def _left_in_play(
    sizes: Sequence[int], scopes: Sequence[frozenset[int]], placed: frozenset[int], scope: frozenset[int]
) -> tuple[int, int]:
    """Return how many states are left once a scope is placed too; of equal ones the first is the best."""
    known = placed | scope
    still = known & frozenset().union(*(other for other in scopes if not other <= known))
    return math.prod(sizes[column] for column in still), min(scope)


def _in_order(
    space: SearchSpace,
    tables: Sequence[tuple[tuple[int, ...], np.ndarray]],
    scopes: Sequence[frozenset[int]],
    defaults: Sequence[int],
    order: Sequence[int],
) -> list[_Step]:
    """Return a step for each variable. Raises UntabulatedError if too many are in play at a time."""
    place = {column: position for position, column in enumerate(order)}
    keys = {key: column for column, key in enumerate(space.keys)}
    sizes = _sizes(space)
    last_use = [max(place[other] for scope in scopes if column in scope for other in scope) for column in keys.values()]
    steps: list[_Step] = []
    known: list[int] = []
    states = np.zeros((1, 0), np.int64)
    pending = [*tables]
    for position, column in enumerate(order):
        variable = space.variables[column]
        options = sizes[column]
        if len(states) * options > _MOST_MOVES:
            raise UntabulatedError(f"{len(states) * options:,} combinations are in play at {variable.key}")
        grid = np.concatenate(
            [states.repeat(options, axis=0), np.tile(np.arange(options), len(states))[:, None]], axis=1
        )
        at = {own: grid[:, index] for index, own in enumerate([*known, column])}
        active = _active(space, keys, column, at)
        possible = active | (at[column] == (0 if variable.continuous else defaults[column]))
        due = [(own, table) for own, table in pending if all(place[c] <= position for c in own)]
        pending = [(own, table) for own, table in pending if not all(place[c] <= position for c in own)]
        cost = np.zeros(len(grid), np.int64)
        for own, table in due:
            row: np.ndarray | int = 0
            for c in own:
                row = row * sizes[c] + at[c]
            cost += table[row]
        kept = [index for index, own in enumerate([*known, column]) if last_use[own] > position]
        known = [[*known, column][index] for index in kept]
        after = np.zeros(len(grid), np.int32)
        following, after[possible] = np.unique(grid[possible][:, kept], axis=0, return_inverse=True)
        shape = len(states), options
        steps.append(
            _Step(
                (column,),
                np.arange(options)[:, None],
                [active.reshape(shape)],
                possible.reshape(shape),
                np.where(active, 1 / options, possible).astype(np.float32).reshape(shape),
                cost.reshape(shape),
                after.reshape(shape),
                len(following),
            )
        )
        states = following
    return steps


def _active(space: SearchSpace, keys: Mapping[str, int], column: int, codes: Mapping[int, np.ndarray]) -> np.ndarray:
    """Return where a variable is active, given the codes of those that its conditions hang on."""
    active = np.ones(len(codes[column]), bool)
    for condition in space.variables[column].when:
        parent = space[condition.key]
        allowed = np.array([choice in condition.choices for choice in parent.choices])
        active &= allowed[codes[keys[condition.key]]] & _active(space, keys, keys[condition.key], codes)
    return active
