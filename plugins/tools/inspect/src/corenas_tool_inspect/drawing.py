"""A search space drawn as a table: its stages, what each can be, how many archs there are and what they cost."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from corenas.contracts import Backbone
from corenas.cost import Cost
from corenas.space import Float, Int, SearchSpace
from corenas.supernet import Supernet
from corenas.value import Constant, Variable
from corenas_tool_inspect.table import columns


def drawn(backbone: Backbone, space: SearchSpace, image: Sequence[int]) -> dict[str, Any]:
    """A backbone's space as plain data: a row for each of its tables, its size, the costs of its extremes.

    image: (channels, height, width)
    Raises UserError if the space is none for this backbone.
    """
    with torch.device("meta"):
        body = backbone.build(space)
        cost = Cost(Supernet(body, torch.nn.Identity()), space, torch.empty(1, *image))
    extremes = cost.of([space.smallest(), space.largest()])
    return {
        "tables": [{"table": path, **cells} for path, cells in _merged([*_rows(space.tree, "space")])],
        "image": [*image],
        "variables": len(space.variables),
        "size": space.size if space.finite else None,
        "cost": dict(zip(("min", "max"), extremes, strict=True)),
    }


def lines(drawing: Mapping[str, Any]) -> Iterator[str]:
    """A drawing as text."""
    yield from columns(drawing["tables"])
    size = drawing["size"]
    archs = "archs without number" if size is None else f"{size:,} archs" if size < 10**9 else f"{size:.3g} archs"
    yield ""
    yield f"{drawing['variables']} variables, {archs}; without a head, on {'x'.join(map(str, drawing['image']))}:"
    for name, costs in drawing["cost"].items():
        yield f"  {name}: {', '.join(f'{metric} {number:,}' for metric, number in costs.items())}"


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
        return item.offer
    if isinstance(item, Variable):
        return " | ".join(map(_cell, item.choices))
    return f"{item:g}" if isinstance(item, float) else str(item).lower() if isinstance(item, bool) else str(item)
