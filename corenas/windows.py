"""Archs whose cost lies in a window, drawn without throwing many away: dynamic programming over binned costs.

A cost is a sum of tables, each over a few variables (`Cost.tables`). The variables are gone through in an order in
which few of them are in play at a time, as in a chain of blocks: what those before have to do with those after is then
the choices of the few, the state, and what they cost so far, in bins. For each state and bin it is worked out how
probable it is that what comes after ends in the window; draws follow these probabilities, variable by variable.
Rounding to bins errs by a bound that is known, and the window of bins is wider by it: no arch of the window is left
out, and the few that come from beside it are the caller's to throw away.

Two costs together (`JointWindow`) have bins in two dimensions, which are fewer in each; there whole stages are a step.
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
from corenas.variables import Variable

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
_MOST_JOINED = 8000
"""Combinations of choices of a step where two costs are binned."""
_MOST_OPENED = 400_000
"""Options of all states together where two steps are joined; without those that are impossible, half of it."""
_MOST_CELLS = 40_000
"""Bins of two costs together."""
_MOST_ADDED_JOINTLY = 1_500_000_000
"""Bins of all moves together, most of which are not reached: half a second."""
_AT_ONCE = 1 << 17
"""Chances of moves that are added up at a time: they stay in the processor's cache."""
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
    chances: the probability of each where variables are drawn as the space draws them, (states, options)
    cost: what each option adds to each metric, (metrics, states, options)
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

    def without_impossible(self) -> _Step:
        """Return the step without the options that are possible in no state, and without `active`."""
        some = self.possible.any(axis=0)
        return _Step(
            self.columns,
            self.codes[some],
            [],
            self.possible[:, some],
            self.chances[:, some],
            self.cost[:, :, some],
            self.after[:, some],
            self.states,
        )

    def then(self, other: _Step) -> _Step:
        """Return both as one step."""
        before, options, others = len(self.possible), len(self.codes), len(other.codes)

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
            np.stack([of_first(own) + of_second(its) for own, its in zip(self.cost, other.cost, strict=True)]),
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

    @classmethod
    def best(cls, unit: float, costs: Sequence[np.ndarray]) -> _Rounded:
        """Round to a unit, or one a little larger by which the sum errs less."""
        units = {float(max(1, math.ceil(unit * stretch))) for stretch in np.linspace(1, 1.1, 17)}
        rounded = [cls.to(unit, costs) for unit in sorted(units)]
        return min(rounded, key=lambda rounded: (rounded.above - rounded.below) * rounded.unit)

    def window(self, low: float, high: float) -> tuple[int, int]:
        """Return the first and the last bin that archs of some cost may be in."""
        return (
            math.ceil(low / self.unit + self.below - 1e-6),
            math.floor(high / self.unit + self.above + 1e-6),
        )


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


@frozen
class _Moves:
    """What can be done in a step, from each state: where it leads, (states, moves), and how probable it is.

    after: the state; bins: how many bins it adds
    """

    after: np.ndarray
    bins: np.ndarray
    chances: np.ndarray


@frozen
class _Grouped:
    """The options of a step as moves, from each state: those that lead to the same state and add the same bins are one.

    order: the options of each state, move by move, (states * options,)
    until: the cumulative probability of each in that order, plus the number of the state, (states * options,)
    ends: the first and, exclusively, the last place of each move in them, (2, states, moves)
    """

    moves: _Moves
    order: np.ndarray
    until: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, step: _Step, binned: np.ndarray) -> _Grouped:
        """Put the options of a step together that cost so many bins."""
        states, options = step.possible.shape
        chances = step.chances.astype(float)
        keys = np.where(step.possible, step.after + step.states * binned.astype(np.int64), np.iinfo(np.int64).max)
        order = np.argsort(keys, axis=1, kind="stable")
        keys, chances = (np.take_along_axis(matrix, order, axis=1) for matrix in (keys, chances))
        first = np.concatenate([np.ones((states, 1), bool), keys[:, 1:] != keys[:, :-1]], axis=1) & (chances > 0)
        number = first.cumsum(axis=1) - 1  # of the move that an option belongs to
        moves = int(number.max()) + 1
        own, column = np.nonzero(first)
        of = own, number[first]
        starts = np.zeros((states, moves), np.int64)
        starts[of] = own * options + column
        sizes = np.zeros((states, moves), np.int64)
        np.add.at(sizes, (np.arange(states)[:, None].repeat(options, axis=1)[chances > 0], number[chances > 0]), 1)
        after, bins = np.zeros((states, moves), np.int32), np.zeros((states, moves), np.int32)
        after[of], bins[of] = keys[first] % step.states, keys[first] // step.states
        total = np.zeros((states, moves))
        np.add.at(total, (np.arange(states)[:, None].repeat(options, axis=1), number), chances)
        until = chances.cumsum(axis=1)
        until = np.minimum(until / until[:, -1:], 1 - 1e-12) + np.arange(states)[:, None]
        ends = np.stack([starts, starts + sizes])
        return cls(_Moves(after, bins, total.astype(np.float32)), order.ravel(), until.ravel(), ends)

    def options(self, states: np.ndarray, moves: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return an option of each move, as probable as the options are."""
        first, last = self.ends[:, states, moves]
        low = np.where(self.order.shape[0] // len(self.moves.after) * states == first, states, self.until[first - 1])
        drawn = low + rng.random(len(first)) * (self.until[last - 1] - low)
        return self.order[np.clip(np.searchsorted(self.until, drawn, side="right"), first, last - 1)]


def _looked_back(
    moves: Sequence[_Moves],
    states: int,
    low: int,
    window: np.ndarray,
    live: Callable[[np.ndarray], np.ndarray] | None = None,
) -> tuple[float, list[_Layer]]:
    """Return the logarithm of the probability to end in a window, and the layers, worked out from last to first.

    states: after the last step; low, window: its first bin, and which of those from there on belong to it
    live: of some bins, which lead into the window; the others count as lost, wherever they lead
    """
    ends = [(m.bins[m.chances > 0].min(), m.bins[m.chances > 0].max()) for m in moves]
    least, most = ([int(n) for n in itertools.accumulate(numbers)] for numbers in zip(*ends, strict=True))
    high = low + len(window) - 1
    spans = [
        (max(first, low - (most[-1] - last)), min(last, high - (least[-1] - first)))
        for first, last in zip([0, *least], [0, *most], strict=True)
    ]
    if any(first > last for first, last in spans):
        return -math.inf, []
    first, last = spans[-1]
    table = np.zeros((states, last - first + 3))
    table[:, 1:-1] = window[first - low : last - low + 1]
    log_share, layers = 0.0, [_Layer(first, table)]
    for own, (first, last) in zip(reversed(moves), reversed(spans[:-1]), strict=True):
        after, table = layers[-1], np.zeros((len(own.after), last - first + 3))
        for state, move in zip(*np.nonzero(own.chances), strict=True):
            # the bins of this layer whose bin after the move is one of the next layer
            shift = int(own.bins[state, move]) + first - after.first
            start, stop = max(0, -shift), min(last - first + 1, after.table.shape[1] - 2 - shift)
            if start < stop:
                source = after.table[own.after[state, move], 1 + start + shift : 1 + stop + shift]
                table[state, 1 + start : 1 + stop] += own.chances[state, move] * source
        if live is not None:
            table[:, 1:-1] *= live(np.arange(first, last + 1))
        largest = table.max()
        if largest == 0:
            return -math.inf, []
        log_share += math.log(largest)
        layers.append(_Layer(first, (table / largest).astype(np.float32)))
    layers.reverse()
    start = layers[0](np.zeros(1, np.int32), np.zeros(1, np.int32))[0]
    return log_share + (math.log(start) if start > 0 else -math.inf), layers


def _above_least(steps: Sequence[_Step], metric: int, constraint: Constraint) -> tuple[list[np.ndarray], float, float]:
    """Return what the options of each step cost above the least, and the window for their sum."""
    lowest = [step.cost[metric][step.possible].min() for step in steps]
    most = sum(step.cost[metric][step.possible].max() for step in steps) - sum(lowest)
    low, high = (float(bound - sum(lowest)) for bound in (constraint.low, constraint.high))
    costs = [np.where(s.possible, s.cost[metric] - least, 0) for s, least in zip(steps, lowest, strict=True)]
    return costs, max(low, 0.0), min(high, float(most))


class Window:
    """Draws archs of which one cost lies in a window, or beside it by the rounding of bins.

    log_share: the logarithm of the share of `space.draw` that lies in the window of bins; minus infinity if none does
    Raises UntabulatedError if the cost's tables do not make it possible.
    """

    def __init__(self, space: SearchSpace, cost: Cost, constraint: Constraint) -> None:
        self.space, self.constraint = space, constraint
        self._steps = _steps(space, cost, [constraint.metric])
        self._chances = [*map(_chances, space.variables)]
        self._bins(constraint)
        moves = [_Moves(s.after, own, s.chances) for s, own in zip(self._steps, self._binned, strict=True)]
        low, high = self._window
        self.log_share, self._layers = _looked_back(moves, self._steps[-1].states, low, np.ones(high - low + 1))

    def draw(self, rng: np.random.Generator, n: int) -> Codes:
        """Return n archs: those of `space.draw`, without what lies outside."""
        codes = self._drawn(rng, n, None)
        return codes if self.space.finite else _with_continuous(self.space, codes, self.space.draw(rng, n))

    def mutated(self, codes: Codes, prob: float, rng: np.random.Generator) -> Codes:
        """Return mutants.

        Variable by variable, in the order of the tables: its chances are those of `space.mutated` times how probable
        each choice makes it that a draw from there on ends in the window.
        """
        columns, active = codes.T.astype(np.int32), self.space.active(codes).T
        kept = np.where(active, 1 - prob, 0).astype(np.float32)
        drawn = 1 - kept

        def kernel(column: int, options: np.ndarray, rows: slice) -> np.ndarray:
            chances = (columns[column, rows, None] == options) * kept[column, rows, None]
            chances += drawn[column, rows, None] * self._chances[column][options]
            return chances

        found = self._drawn(rng, len(codes), kernel)
        return found if self.space.finite else _with_continuous(self.space, found, self.space.mutated(codes, prob, rng))

    def crossed(self, first: Codes, second: Codes, rng: np.random.Generator) -> Codes:
        """Return children, drawn as mutants are, with the chances of `space.crossed`.

        Where neither parent's choice leads into the window, it is any that does.
        """
        parents = [codes.T.astype(np.int32) for codes in (first, second)]
        active = [self.space.active(codes).T.astype(np.float32) for codes in (first, second)]
        total = np.maximum(active[0] + active[1], 1)
        shares = [own / total for own in active]
        drawn = 1 - shares[0] - shares[1]

        def kernel(column: int, options: np.ndarray, rows: slice) -> np.ndarray:
            chances = (parents[0][column, rows, None] == options) * shares[0][column, rows, None]
            chances += (parents[1][column, rows, None] == options) * shares[1][column, rows, None]
            chances += drawn[column, rows, None] * self._chances[column][options]
            return chances

        found = self._drawn(rng, len(first), kernel)
        if self.space.finite:
            return found
        return _with_continuous(self.space, found, self.space.crossed(first, second, rng))

    # -- bins ---------------------------------------------------------------------------------------------------------

    def _bins(self, constraint: Constraint) -> None:
        """Round what each step's options cost to bins, and find the window of bins."""
        costs, low, high = _above_least(self._steps, 0, constraint)
        states = sum(step.states for step in self._steps)
        moves = sum(int(step.possible.sum()) for step in self._steps)
        bins = min(_MOST_BINS, _MOST_ENTRIES // states, _MOST_ADDED // moves)
        if bins < _FEWEST_BINS or moves > _MOST_MOVES:
            raise UntabulatedError(f"{states:,} states, {moves:,} moves")
        rounded = _Rounded.best(high / bins, costs)
        self._binned, self._window = rounded.binned, rounded.window(low, high)

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


@frozen
class _Ahead:
    """A layer as the moves of a step look it up.

    table: wide enough for every move from every bin of the layer before
    places: of each move from bin 0, (states, moves)
    """

    table: np.ndarray
    places: np.ndarray

    @classmethod
    def of(cls, moves: _Moves, layer: _Layer, after: _Layer) -> _Ahead:
        """Look up one layer from another."""
        last, last_after = (one.first + one.table.shape[1] - 3 for one in (layer, after))
        low = min(after.first, layer.first + int(moves.bins.min()))
        high = max(last_after, last + int(moves.bins.max()))
        table = np.zeros((len(after.table), high - low + 1), np.float32)
        table[:, after.first - low : last_after - low + 1] = after.table[:, 1:-1]
        return cls(table.ravel(), (moves.after * table.shape[1] + moves.bins - low).astype(np.int32))


def _picked(moves: _Moves, ahead: _Ahead, states: np.ndarray, bins: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Return a move for each arch, by uniform random numbers; those of equal state and bin have one distribution."""
    keys = bins.astype(np.int64) * len(moves.after) + states
    order = np.argsort(keys)
    keys = keys[order]
    starts = np.append(np.flatnonzero(np.append(True, keys[1:] != keys[:-1])), len(keys))
    firsts, number = order[starts[:-1]], moves.after.shape[1]
    picks = np.zeros(len(keys), np.int64)
    some = max(1, _AT_ONCE // number)
    for begin in range(0, len(firsts), some):
        own = firsts[begin : begin + some]
        places = ahead.places[states[own]]
        places += bins[own, None]
        chances = ahead.table.take(places)
        chances *= moves.chances[states[own]]
        chances /= chances.sum(axis=1, keepdims=True)  # what is rare is not lost beside what is not
        sums = np.append(0.0, chances.ravel().cumsum(dtype=np.float64))
        ends = sums[::number]
        rows = order[starts[begin] : starts[begin + len(own)]]
        of = np.repeat(np.arange(len(own)), np.diff(starts[begin : begin + len(own) + 1]))
        drawn = ends[of] + uniform[rows] * (ends[of + 1] - ends[of])
        drawn = np.minimum(drawn, np.nextafter(ends[of + 1], 0))  # else what has no chance might be next
        picks[rows] = np.searchsorted(sums, drawn, side="right") - 1 - number * of
    return picks


class JointWindow:
    """Draws archs of which two costs lie in a window each, or beside it by the rounding of bins.

    As `Window`, over bins of both costs. These are few, so that rounding must err little: many variables are one step,
    rounded once. What leads to the same state and bins is one move; which of its options it is, is drawn after it.

    log_share: as that of `Window`
    Raises UntabulatedError if the tables of the costs do not make it possible.
    """

    def __init__(self, space: SearchSpace, cost: Cost, constraints: tuple[Constraint, Constraint]) -> None:
        self.space = space
        self._steps = _steps(space, cost, [c.metric for c in constraints])
        costs, lows, highs = zip(*(_above_least(self._steps, *each) for each in enumerate(constraints)), strict=True)
        widths = [max((high - low) / max(high, 1.0), 1e-6) for low, high in zip(lows, highs, strict=True)]
        cells = _MOST_CELLS
        while True:
            bins = math.sqrt(cells * widths[1] / widths[0])  # both windows have as many
            rounded = [
                _Rounded.best(high / max(1.0, number), own)
                for own, high, number in zip(costs, highs, (bins, cells / bins), strict=True)
            ]
            (low, high), (low_2, high_2) = (own.window(*ends) for own, *ends in zip(rounded, lows, highs, strict=True))
            # Bins of both in one number: those of the second, and what one step adds to them, never reach the first;
            # what is beyond a window is one bin.
            width = 2 * high_2 + 2
            self._grouped = [
                _Grouped.of(step, width * np.minimum(binned, high + 1) + np.minimum(binned_2, high_2 + 1))
                for step, binned, binned_2 in zip(self._steps, *(own.binned for own in rounded), strict=True)
            ]
            work = sum(np.count_nonzero(grouped.moves.chances) for grouped in self._grouped) * (high + 1) * width
            if work <= _MOST_ADDED_JOINTLY:
                break
            cells //= 2
            if cells < _FEWEST_BINS:
                raise UntabulatedError("too many moves")
        window = np.zeros((high - low + 1, width))
        window[:, low_2 : high_2 + 1] = 1
        self.log_share, self._layers = _looked_back(
            [grouped.moves for grouped in self._grouped],
            self._steps[-1].states,
            low * width,
            window.ravel(),
            lambda at: at % width <= high_2,
        )
        pairs = zip(self._grouped, itertools.pairwise(self._layers), strict=bool(self._layers))
        self._ahead = [_Ahead.of(grouped.moves, *layers) for grouped, layers in pairs]

    def draw(self, rng: np.random.Generator, n: int) -> Codes:
        """Return n archs: those of `space.draw`, without what lies outside."""
        columns = np.zeros((len(self.space.variables), n), np.int64)
        states = bins = np.zeros(n, np.int32)
        for step, grouped, ahead in zip(self._steps, self._grouped, self._ahead, strict=True):
            picks = _picked(grouped.moves, ahead, states, bins, rng.random(n))
            columns[list(step.columns)] = step.codes.T[:, grouped.options(states, picks, rng)]
            states, bins = grouped.moves.after[states, picks], bins + grouped.moves.bins[states, picks]
        codes = columns.T
        return codes if self.space.finite else _with_continuous(self.space, codes, self.space.draw(rng, n))


def _with_continuous(space: SearchSpace, codes: Codes, free: Codes) -> Codes:
    """Return archs with what has no steps, and costs nothing, from others that know of no window."""
    return space.canonical(np.where([variable.continuous for variable in space.variables], free, codes))


class UntabulatedError(Exception):
    """The costs are no sum of tables, or hang together too much, for a `Window`."""


def _sizes(space: SearchSpace) -> list[int]:
    """Return how many choices each variable has; one without steps costs nothing, and counts as one."""
    return [1 if variable.continuous else len(variable.choices) for variable in space.variables]


# -- the steps --------------------------------------------------------------------------------------------------------


def _steps(space: SearchSpace, cost: Cost, metrics: Sequence[str]) -> list[_Step]:
    """Return the steps, joined where that leaves fewer states; of several metrics as many as can be."""
    defaults = [0 if v.continuous else int(v.code_of(v.default)) for v in space.variables]
    columns = {key: column for column, key in enumerate(space.keys)}
    by_columns = []
    for index, metric in enumerate(metrics):
        tables = cost.tables(metric)
        if tables is None:
            raise UntabulatedError(f"{metric} of some layers is too much for a table")
        by_columns += [(tuple(columns[key] for key in keys), index, table) for keys, table in tables]
    scopes = _scopes(space, columns, [own for own, _, _ in by_columns])
    found: list[list[_Step]] = []
    for order in ([*range(len(columns))], _greedy(space, scopes)):
        with suppress(UntabulatedError):
            found.append(_in_order(space, by_columns, len(metrics), scopes, defaults, order))
    if not found:
        raise UntabulatedError("too many variables are in play at a time")
    steps = min(found, key=_size)
    return _joined_few(steps) if len(metrics) == 1 else _joined_many(steps)


def _joined_few(steps: Sequence[_Step]) -> list[_Step]:
    joined = [steps[0]]
    for step in steps[1:]:
        last = joined[-1]
        few = len(last.codes) * len(step.codes) <= _MOST_OPTIONS
        # what is in play between two variables of a block is more than before and after it
        if few and len(step.possible) > max(len(last.possible), step.states):
            joined[-1] = last.then(step)
        else:
            joined.append(step)
    return joined


def _joined_many(steps: Sequence[_Step]) -> list[_Step]:
    """Return few steps of many options, with few states between them."""
    joined = [step.without_impossible() for step in steps]
    starts = [*range(len(steps))]
    for place in sorted(starts[1:], key=lambda place: -len(steps[place].possible)):
        at = starts.index(place)
        first, second = joined[at - 1 : at + 1]
        if first.possible.size * len(second.codes) <= _MOST_OPENED:
            both = first.then(second).without_impossible()
            if len(both.codes) <= _MOST_JOINED and both.possible.size <= _MOST_OPENED // 2:
                joined[at - 1 : at + 1] = [both]
                del starts[at]
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
    tables: Sequence[tuple[tuple[int, ...], int, np.ndarray]],
    metrics: int,
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
        due = [entry for entry in pending if all(place[c] <= position for c in entry[0])]
        pending = [entry for entry in pending if not all(place[c] <= position for c in entry[0])]
        cost = np.zeros((metrics, len(grid)), np.int64)
        for own, metric, table in due:
            row: np.ndarray | int = 0
            for c in own:
                row = row * sizes[c] + at[c]
            cost[metric] += table[row]
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
                np.where(active, _chances(variable)[at[column]], possible).astype(np.float32).reshape(shape),
                cost.reshape(metrics, *shape),
                after.reshape(shape),
                len(following),
            )
        )
        states = following
    return steps


def _chances(variable: Variable) -> np.ndarray:
    """Return how likely the space draws each choice of a variable; a continuous one costs nothing by itself."""
    return (np.ones(1) if variable.continuous else variable.chances).astype(np.float32)


def _active(space: SearchSpace, keys: Mapping[str, int], column: int, codes: Mapping[int, np.ndarray]) -> np.ndarray:
    """Return where a variable is active, given the codes of those that its conditions hang on."""
    active = np.ones(len(codes[column]), bool)
    for condition in space.variables[column].when:
        parent = space[condition.key]
        allowed = np.array([choice in condition.choices for choice in parent.choices])
        active &= allowed[codes[keys[condition.key]]] & _active(space, keys, keys[condition.key], codes)
    return active
