"""A search space drawn as a table: its stages, what each can be, how many archs there are and what they cost."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from corenas.constrained import extremes
from corenas.contracts import Backbone
from corenas.errors import shown
from corenas.space import SearchSpace
from corenas.supernet import build_supernet, supernet_cost
from corenas.value import Constant
from corenas.variables import Float, Int, Variable
from corenas_tool_inspect.table import columns


class _Headless:
    """A task as far as a backbone's cost is concerned."""

    def __init__(self, example: torch.Tensor) -> None:
        self.example = example

    def head(self, feat_dims: object) -> torch.nn.Module:
        return torch.nn.Identity()


def drawn(backbone: Backbone, space: SearchSpace, image: Sequence[int]) -> dict[str, Any]:
    """A backbone's space as plain data: a row for each of its tables, its size, the costs of its extremes.

    image: (channels, height, width)
    Raises UserError if the space, or the image, is none for this backbone.
    """
    with torch.device("meta"):
        task: Any = _Headless(torch.empty(1, *image))
        cost = supernet_cost(build_supernet(backbone, space, task), space, task)
    return {
        "tables": [{"table": path, **cells} for path, cells in _merged([*_rows(space.tree, "space")])],
        "image": [*image],
        "variables": len(space.variables),
        "size": space.size if space.finite else None,
        "cost": dict(zip(("min", "max"), cost.of(extremes(cost, "flops")), strict=True)),
    }


def lines(drawing: Mapping[str, Any], width: int) -> Iterator[str]:
    """A drawing as text, for a terminal of so many columns: where a table is wider, each row names its keys."""
    table = [*columns(drawing["tables"])]
    yield from table if max(map(len, table)) <= width else _named(drawing["tables"], width)
    size = drawing["size"]
    archs = "archs without number" if size is None else f"{size:,} archs" if size < 10**9 else f"{size:.3g} archs"
    image = "x".join(map(str, drawing["image"]))
    yield ""
    yield f"{drawing['variables']} variables, {archs}; without the task's head, on {image}:"
    for name, costs in drawing["cost"].items():
        yield f"  {name}: {', '.join(f'{metric} {number:,}' for metric, number in costs.items())}"


def _named(rows: Sequence[Mapping[str, str]], width: int) -> Iterator[str]:
    """Rows with the key before each cell, folded."""
    left = max(len(row["table"]) for row in rows) + 2
    for row in rows:
        text = ", ".join(f"{key} {cell}" for key, cell in row.items() if key != "table")
        yield from textwrap.wrap(
            text, max(width, left + 20), initial_indent=row["table"].ljust(left), subsequent_indent=" " * left
        )


def _rows(tree: Any, path: str) -> Iterator[tuple[str, dict[str, str]]]:
    """The tables of a tree, each with what its keys can be."""
    cells = {key: _cell(item) for key, item in tree.items() if not isinstance(item, Mapping | list)}
    if cells:
        yield path, cells
    for key, item in tree.items():
        below = key if path == "space" else f"{path}.{key}"
        if isinstance(item, Mapping):
            yield from _rows(item, below)
        elif isinstance(item, list):
            for i, part in enumerate(item):
                yield from _rows(part if isinstance(part, Mapping) else {"": part}, f"{below}.{i}")


def _merged(rows: Sequence[tuple[str, dict[str, str]]]) -> Iterator[tuple[str, dict[str, str]]]:
    """Rows with neighbours that say the same as one: `stages.2.blocks.0-3`."""
    for _, alike in itertools.groupby(rows, key=lambda row: (row[0].rpartition(".")[0], row[1])):
        first, *rest = alike
        last = f"-{rest[-1][0].rpartition('.')[2]}" if rest else ""
        yield f"{first[0]}{last}", first[1]


def _cell(item: Any) -> str:
    if isinstance(item, Constant):
        return _cell(item.number)
    if isinstance(item, Int | Float):
        return item.description
    if isinstance(item, Variable):
        return " | ".join(map(_cell, item.choices))
    return f"{item:g}" if isinstance(item, float) else str(item).lower() if isinstance(item, bool) else shown(str(item))
