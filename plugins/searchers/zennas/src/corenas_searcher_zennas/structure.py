"""Super-blocks of an arch: how they are mutated, and how deep ones are split."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from attrs import frozen

from corenas.variables import Variable

SCALED = ("width", "bottleneck")
"""What is multiplied by a factor."""
FACTORS = (2.5, 2, 1.5, 1.25, 1, 1 / 1.25, 1 / 1.5, 1 / 2, 1 / 2.5)
DEPTH = "depth"
MOVES = (-2, -1, 0, 1, 2)
"""By which the number of sub-layers changes."""


@frozen
class SuperBlock:
    """A table of a space: its searched variables by their names in it."""

    variables: Mapping[str, Variable]

    @property
    def depth(self) -> Variable | None:
        """The variable of its number of sub-layers."""
        variable = self.variables.get(DEPTH)
        return variable if variable is not None and _is_number(variable) else None

    @property
    def spare(self) -> bool:
        """Whether it need not be there."""
        return self.depth is not None and 0 in self.depth.choices

    def layers(self, choices: Mapping[str, Any]) -> int:
        """Return how many sub-layers it has under some choices; 1 where they are not searched."""
        return 1 if self.depth is None else choices[self.depth.key]

    def mutated(self, choices: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """Return new choices for its variables, each uniform over what it may become; a depth may be any number."""
        return {
            variable.key: _mutated(name, variable, choices[variable.key], rng)
            for name, variable in self.variables.items()
        }


def super_blocks(variables: Sequence[Variable]) -> list[SuperBlock]:
    """Return the tables of a space that have variables, in order: `stages.0.width` is of `stages.0`."""
    tables: dict[str, dict[str, Variable]] = {}
    for variable in variables:
        table, _, name = variable.key.rpartition(".")
        tables.setdefault(table, {})[name] = variable
    return [*map(SuperBlock, tables.values())]


def mutate(
    blocks: Sequence[SuperBlock],
    choices: Mapping[str, Any],
    replaced: int,
    split: int,
    rng: np.random.Generator,
) -> dict[str, Any] | None:
    """Return the choices of a mutant (algorithm 3), None for one that the space has no room for.

    replaced: how many super-blocks are drawn; one that is drawn twice is mutated once
    split: from so many sub-layers on a super-block becomes two
    """
    mutant = dict(choices)
    present = [i for i, block in enumerate(blocks) if block.layers(choices) > 0]
    drawn = rng.integers(len(present), size=replaced) if present else ()  # a space may have nothing to choose
    for i in {present[at]: None for at in drawn}:
        mutant |= blocks[i].mutated(mutant, rng)
    for i in reversed(present):  # from the end: what is moved for one that comes later has been split already
        if blocks[i].depth is not None and blocks[i].layers(mutant) >= split:
            _split(blocks, i, mutant, split // 2)
    depths = [block.depth for block in blocks if block.depth is not None]
    return mutant if all(mutant[depth.key] in depth.choices for depth in depths) else None


def _split(blocks: Sequence[SuperBlock], at: int, choices: dict[str, Any], kept: int) -> None:
    """Cut a super-block in two: the second half, and what comes after it, move into the next place that is free.

    Without a free place it stays as it is.
    """
    behind = [*itertools.takewhile(lambda i: blocks[i].spare, range(at + 1, len(blocks)))]
    free = next((i for i in behind if blocks[i].layers(choices) == 0), None)
    if free is None:
        return
    moved: dict[str, Any] = {}
    for i in range(at, free):
        made = _moved(blocks[i], blocks[i + 1], choices)
        if made is None:
            return
        moved |= made
    first, second = blocks[at].depth, blocks[at + 1].depth
    assert first is not None
    assert second is not None
    choices |= {**moved, first.key: kept, second.key: choices[first.key] - kept}


def _moved(source: SuperBlock, target: SuperBlock, choices: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the choices that make a super-block what another is; None if it cannot be that."""
    if source.variables.keys() != target.variables.keys():
        return None
    pairs = [(variable, choices[source.variables[name].key]) for name, variable in target.variables.items()]
    fits = all(choice in variable.choices for variable, choice in pairs if variable is not target.depth)
    return {variable.key: choice for variable, choice in pairs} if fits else None


def _mutated(name: str, variable: Variable, choice: Any, rng: np.random.Generator) -> Any:
    if _is_number(variable) and name == DEPTH:
        candidates = [choice + move for move in MOVES if choice + move > 0]
    elif _is_number(variable) and name in SCALED and not variable.continuous:
        candidates = scaled(variable.choices, choice)
    else:
        return variable.choice_of(variable.draw(rng, 1)[0])
    return candidates[rng.integers(len(candidates))]


def scaled(choices: Sequence[float], number: float) -> list[float]:
    """Return which choices are nearest to the multiples of a number, each once; of two that are as near the smaller."""
    return sorted({min(choices, key=lambda choice: (abs(choice - number * factor), choice)) for factor in FACTORS})


def _is_number(variable: Variable) -> bool:
    return not isinstance(variable.choices[0], str | bool)
