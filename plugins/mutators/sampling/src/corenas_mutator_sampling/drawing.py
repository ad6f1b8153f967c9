"""What several mutators draw by: choices that a whole step shares, and bins of a cost."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

import numpy as np
from attrs import AttrsInstance, evolve

from corenas.contracts import MutatorContext
from corenas.errors import UserError, did_you_mean
from corenas.objectives import amount, parse_amount
from corenas.space import Arch, Codes, SearchSpace

Score: TypeAlias = Callable[[Sequence[Arch]], Sequence[float]]
"""Gives the losses of archs on a step's batch."""
Options = TypeVar("Options", bound=AttrsInstance)
_ARCHS_A_DRAW = 100
"""How many archs are drawn, and their costs computed, at once."""


def with_paths(options: Options, context: MutatorContext) -> Options:
    """Return a mutator's options with as many paths as the phase wants. Raises UserError where it cannot have them."""
    if context.paths is None:
        return options
    try:
        return evolve(options, paths=context.paths)
    except ValueError as error:
        text = f"the algorithm wants {context.paths} archs a step: {error.args[0]!s}"
        raise UserError(text, key=("mutator",), hint='mutator = "uniform" draws any number') from None


def columns_named(space: SearchSpace, patterns: Sequence[str], option: str) -> list[int]:
    """Return the columns of the variables that patterns name. Raises UserError for a pattern that names none."""
    columns: list[int] = []
    for number, pattern in enumerate(patterns):
        keys = fnmatch.filter(space.keys, pattern)
        if not keys:
            hint = did_you_mean(pattern, space.keys, "variables")
            raise UserError(f"no variable {pattern!r}", key=("mutator", option, number), hint=hint)
        columns += map(space.keys.index, keys)
    return columns


def drawn(space: SearchSpace, rng: np.random.Generator, n: int) -> Codes:
    """Return codes of n archs with each variable uniform, active or not; `space.canonical` makes archs of them."""
    columns = [variable.draw(rng, n) for variable in space.variables]
    return np.array(columns).reshape(len(columns), n).T


class SharedChoices:
    """Variables whose choice all archs of a step have in common: they see images of one resolution, for instance."""

    def __init__(self, context: MutatorContext, patterns: Sequence[str]) -> None:
        self.space, self.rng = context.space, context.rng
        self.columns = columns_named(context.space, patterns, "shared")

    def draw(self) -> Codes | None:
        """Return the choices of one step, in the row of an arch; None where nothing is shared."""
        return self.space.draw(self.rng, 1)[0] if self.columns else None

    def applied(self, codes: Codes) -> list[Arch]:
        """Return archs of codes (those of inactive variables count where a shared choice makes them active)."""
        row = self.draw()
        if row is not None:
            codes = codes.copy()
            codes[:, self.columns] = row[self.columns]
        return self.space.decode(self.space.canonical(codes))


def check_amount(instance: object, attribute: object, value: float | str | None) -> None:
    """Raise ValueError unless an option is left out or an amount of at least 0."""
    if value is not None and parse_amount(value) < 0:
        raise ValueError(f'expected an amount such as 25e6 or "25M", found {value!r}')


def check_width(instance: object, attribute: object, value: float | str | None) -> None:
    """Raise ValueError unless an option is left out or an amount above 0."""
    if value is not None and parse_amount(value) <= 0:
        raise ValueError(f'expected an amount above 0 such as 25e6 or "25M", found {value!r}')


class CostBins:
    """Bins of a cost, the share of a space's archs in each, and draws of archs in one of them.

    What there is in each bin is known from many archs drawn beforehand, always the same ones for a space, so that a
    resumed training has the same bins. Bins that none of them falls into are left out.

    options: of a mutator, with `metric`, `bins`, `width`, `low`, `high`, `draws` and `tries`
    numbers: the bins that archs fall into
    prior: the share of archs in each of these, of those between the bounds
    Raises UserError if no arch costs what the bounds say.
    """

    def __init__(self, options: Any, context: MutatorContext) -> None:
        self.space, self.rng, self.cost = context.space, context.rng, context.cost
        self.metric, self.tries = options.metric, options.tries
        self.known = self.space.draw(np.random.default_rng(0), options.draws)
        costs = self.cost(self.known)[self.metric]
        self.edges = _edges(options, costs)
        self.known_bins = self.bins_of(costs)
        inside = self.known_bins[self.known_bins >= 0]
        if not len(inside):
            bounds = f"{amount(float(self.edges[0]))} to {amount(float(self.edges[-1]))}"
            has = f"{amount(float(costs.min()))} to {amount(float(costs.max()))}"
            text = f"no arch of {len(costs):,} has {bounds} {self.metric}: they have {has}"
            raise UserError(text, key=("mutator", "low"))
        self.numbers, counts = np.unique(inside, return_counts=True)
        self.prior = counts / counts.sum()

    def bins_of(self, costs: np.ndarray) -> np.ndarray:
        """Return the number of the bin that each cost falls into, -1 for one outside of all."""
        numbers = np.searchsorted(self.edges, costs, side="right") - 1
        numbers[costs == self.edges[-1]] = len(self.edges) - 2
        numbers[(costs < self.edges[0]) | (costs > self.edges[-1])] = -1
        return numbers

    def choose(self, uniform: bool) -> int:
        """Return a bin: each as likely as the others, or as many archs as it has."""
        return int(self.rng.choice(self.numbers, p=None if uniform else self.prior))

    def draw(self, number: int, n: int) -> Codes:
        """Return the codes of n archs in a bin: of archs at random those that fall into it.

        Where too few of `tries` do, the others are some that were drawn beforehand.
        """
        rows = self.known[:0]
        for _ in range(math.ceil(self.tries / _ARCHS_A_DRAW)):
            codes = self.space.draw(self.rng, _ARCHS_A_DRAW)
            inside = self.bins_of(self.cost(codes)[self.metric]) == number
            rows = np.concatenate([rows, codes[inside]])[:n]
            if len(rows) == n:
                return rows
        known = self.known[self.known_bins == number]
        return np.concatenate([rows, known[self.rng.integers(len(known), size=n - len(rows))]])


def _edges(options: Any, costs: np.ndarray) -> np.ndarray:
    """Return where bins begin, and where the last one ends."""
    low = float(costs.min()) if options.low is None else parse_amount(options.low)
    high = float(costs.max()) if options.high is None else parse_amount(options.high)
    if low > high:
        raise UserError(f"{amount(low)} is above {amount(high)}, where the last bin ends", key=("mutator", "low"))
    if options.width is None:
        return np.linspace(low, high, options.bins + 1)
    width = parse_amount(options.width)
    if options.low is None:
        low = math.floor(low / width) * width
    number = max(1, math.ceil((high - low) / width - 1e-9))
    return low + width * np.arange(number + 1)
