"""A table of what blocks take, as a file and as the latencies of many archs at once. Needs no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from attrs import asdict, field, frozen

from corenas.errors import UserError, regular
from corenas.options import structure
from corenas.space import Arch, SearchSpace

FORMAT = "corenas latency table 1"


@frozen
class Block:
    """What a part of a network takes under each combination of the choices that it depends on.

    name: of its module
    choices: key -> choices
    ms: one number for each combination, that of the last key changing fastest; 0 where the part does not run
    """

    name: str
    choices: Mapping[str, tuple[int | float | str | bool, ...]]
    ms: tuple[float, ...]


@frozen
class Error:
    """How far a table is off whole networks that it was not made from.

    networks: how many
    median: of the differences, as shares of what was measured
    worst: the largest of them
    """

    networks: int
    median: float
    worst: float


@frozen
class Table:
    """Latencies of a space: `base` milliseconds and `scale` times the sum of the blocks.

    format: what file this is
    facts: device, back end, threads, images and versions
    """

    blocks: tuple[Block, ...]
    scale: float
    base: float
    error: Error | None = None
    facts: Mapping[str, Any] = field(factory=dict)
    format: str = FORMAT

    @classmethod
    def read(cls, path: Path) -> Table:
        """Return the table in a file. Raises UserError if it is none."""
        hint = "corenas latency-table writes one"
        try:
            content = json.loads(regular(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is no JSON"
            raise UserError(f"cannot read this latency table: {reason}", file=str(path), hint=hint) from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise UserError(f"this is no {FORMAT!r}", file=str(path), hint=hint)
        table: Table = structure(content, cls)
        for block in table.blocks:
            if len(block.ms) != math.prod(map(len, block.choices.values())):
                raise UserError(f"block {block.name} lacks combinations", file=str(path), hint=hint)
        return table

    def write(self, path: Path) -> None:
        """Write it."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    def on(self, space: SearchSpace) -> Callable[[Iterable[Arch]], list[float]]:
        """Return what gives the milliseconds of archs of a space, the table's or a part of it.

        Raises UserError for a space that has not all of the table's variables, or has other choices.
        """
        columns = {key: column for column, key in enumerate(space.keys)}
        rows: dict[tuple[str, tuple[Any, ...]], np.ndarray] = {}
        for block in self.blocks:
            for key, choices in block.choices.items():
                if key not in columns or space[key].continuous:
                    raise UserError(f"the latency table is of a space with {key}, which this one lacks", key=("space",))
                place = {choice: at for at, choice in enumerate(choices)}
                foreign = [choice for choice in space[key].choices if choice not in place]
                if foreign:
                    text = f"the latency table knows no {key} = {foreign[0]!r}"
                    raise UserError(text, key=("space",), hint="measure one for this space: corenas latency-table")
                rows[key, choices] = np.array([place[choice] for choice in space[key].choices])

        def lookup(archs: Iterable[Arch]) -> list[float]:
            codes = space.encode(archs).astype(np.int64)
            total = np.zeros(len(codes))
            for block in self.blocks:
                row = np.zeros(len(codes), np.int64)
                for key, choices in block.choices.items():
                    row = row * len(choices) + rows[key, choices][codes[:, columns[key]]]
                total += np.asarray(block.ms)[row]
            return (self.base + self.scale * total).tolist()

        return lookup


def fitted(sums: Sequence[float], measured: Sequence[float]) -> tuple[float, float]:
    """Return scale and base of the line from sums of blocks to latencies, by least squares of relative differences."""
    weights = 1 / np.asarray(measured)
    matrix = np.stack([np.asarray(sums) * weights, weights], 1)
    scale, base = np.linalg.lstsq(matrix, np.ones(len(weights)), rcond=None)[0]
    if base < 0 or scale <= 0:  # a network cannot take less than its blocks do
        return float(np.median(np.asarray(measured) / np.asarray(sums))), 0.0
    return float(scale), float(base)
