"""How many distinct archs a space has, which they are, and how to draw one of them uniformly.

Archs are codes here, one for each variable in order: the index of its choice, -1 where it is inactive.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from corenas.variables import Variable

Masks = Sequence[Sequence[tuple[int, np.ndarray]]]
"""For each variable its conditions: the index of the parent, and which of its codes are allowed; -1 never is."""


class Counter:
    """Counts the distinct archs of a space without listing them: independent groups of variables are multiplied.

    Raises TypeError, as it counts, if a variable is continuous.
    """

    def __init__(self, variables: Sequence[Variable], masks: Masks) -> None:
        self._variables, self._masks = variables, masks

    @cached_property
    def size(self) -> int:
        """How many distinct archs there are, exactly."""
        return self._count(range(len(self._variables)), {})

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the codes of all archs, each once, the last variable changing fastest."""
        return self._each({})

    def uniform(self, rng: np.random.Generator) -> list[int]:
        """Return the codes of an arch drawn uniformly over distinct archs."""
        drawn: dict[int, int] = {}
        self._draw(range(len(self._variables)), {}, drawn, rng)
        return [drawn[index] for index in range(len(self._variables))]

    def _each(self, codes: dict[int, int]) -> Iterator[list[int]]:
        index = len(codes)
        if index == len(self._variables):
            yield [*codes.values()]
            return
        own = [-1] if self._is_closed(index, codes) else sorted(itertools.chain(*self._alike[index]))
        for code in own:
            yield from self._each({**codes, index: code})

    def _draw(
        self, indices: Sequence[int], before: Mapping[int, int], drawn: dict[int, int], rng: np.random.Generator
    ) -> None:
        for group in self._independent(indices, before):
            branches = [*self._branches(group, before)]
            share = _below(rng, sum(count for _, count in branches))
            while share >= branches[0][1]:
                share -= branches.pop(0)[1]
            alike = branches[0][0]
            drawn[group[0]] = alike[share % len(alike)]
            self._draw(group[1:], {**before, group[0]: drawn[group[0]]}, drawn, rng)

    def _count(self, indices: Sequence[int], before: Mapping[int, int]) -> int:
        """Return the number of distinct archs of some variables, given the codes of those before (-1: inactive)."""
        groups = self._independent(indices, before)
        return math.prod(sum(count for _, count in self._branches(group, before)) for group in groups)

    def _branches(self, group: Sequence[int], before: Mapping[int, int]) -> Iterator[tuple[Sequence[int], int]]:
        """Yield the codes of a group's first variable, those together that open the same others, with their archs."""
        first, *rest = group
        for alike in [(-1,)] if self._is_closed(first, before) else self._alike[first]:
            yield alike, len(alike) * self._count(rest, {**before, first: alike[0]})

    def _is_closed(self, index: int, before: Mapping[int, int]) -> bool:
        """Return whether one of the codes so far leaves a variable inactive."""
        return not all(allowed[before[parent]] for parent, allowed in self._masks[index] if parent in before)

    @cached_property
    def _alike(self) -> list[list[list[int]]]:
        """The codes of each variable, those together that open the same other variables."""
        endless = [variable.key for variable in self._variables if variable.continuous]
        if endless:
            raise TypeError(f"{endless[0]} is continuous: archs cannot be counted")
        opened_by: dict[int, list[np.ndarray]] = defaultdict(list)
        for parent, allowed in itertools.chain(*self._masks):
            opened_by[parent].append(allowed)
        result = []
        for index, variable in enumerate(self._variables):
            alike: dict[Any, list[int]] = defaultdict(list)
            for code in range(len(variable.choices)):
                alike[tuple(mask[code] for mask in opened_by[index])].append(code)
            result.append([*alike.values()])
        return result

    def _independent(self, indices: Sequence[int], before: Mapping[int, int]) -> list[list[int]]:
        """Return the variables in groups that no open condition links, each in order.

        The first variable of a group has no open parent.
        """
        groups: dict[int, list[int]] = {}
        for index in indices:
            groups[index] = [index]
            parents = [] if self._is_closed(index, before) else self._masks[index]
            for parent, _ in parents:
                if parent not in before and groups[parent] is not groups[index]:
                    groups[parent] += groups[index]
                    groups |= dict.fromkeys(groups[index], groups[parent])
        return [sorted(group) for group in {id(group): group for group in groups.values()}.values()]


def _below(rng: np.random.Generator, n: int) -> int:
    """Return a whole number under n, uniform, however large n is."""
    bits = n.bit_length()
    while True:
        drawn = int.from_bytes(rng.bytes((bits + 7) // 8)) >> -bits % 8
        if drawn < n:
            return drawn
