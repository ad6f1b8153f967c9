"""Channels, heads and groups of a converted model in the order of their importance, by torch-pruning's measures.

What hangs together is known from the conversion, so that nothing is searched for and nothing has to be tried.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning._helpers import GroupItem
from torch_pruning.dependency import Dependency, Group, Node

from corenas.errors import UserError, did_you_mean
from corenas.mutable import apply
from corenas_mutable_conversion.axes import REORDERED, Axis, Join, Product, Size, count, free_sizes, product, resolved
from corenas_mutable_conversion.conversion import Converted
from corenas_mutable_conversion.elastic import CONV, whole
from corenas_mutable_sorting import IMPORTANCE

Elements = tuple[str, int, np.ndarray]
"""An axis of a tensor, by name and number; of each place along it the element of a size that it holds, -1 for none."""


def sort_channels(made: Converted, importance: str | Any = "l1") -> tuple[str, ...]:
    """Bring channels, heads and groups into the order of their importance; the largest arch computes what it did.

    importance: a name of `corenas_mutable_sorting.IMPORTANCE`, or a measure of torch-pruning, a function of a group
    Neither gradients nor an optimizer's state are permuted. Returns the keys of the variables that are sorted now.
    Raises UserError for a name that is no measure.
    """
    model = made.supernet
    if isinstance(importance, str):
        if importance not in IMPORTANCE:
            hint = did_you_mean(importance, IMPORTANCE, "measures")
            raise UserError(f"no measure of importance is called {importance!r}", hint=hint)
        importance = IMPORTANCE[importance](model)
    done: dict[str, None] = {}
    with apply(model, made.reading.largest()), torch.no_grad():
        for size, places in _sortable(made).items():
            group = _group(model, places)
            score = importance(group) if len(group._group) else None
            if score is None:
                continue
            order = torch.argsort(score[: size.n], descending=True, stable=True).cpu().numpy()
            _permute(model, places, order)
            done.update(dict.fromkeys(made.reading.values[size].keys))
    return tuple(done)


def _elements(axis: Axis, size: Size) -> np.ndarray:
    """Return for each place along an axis which element of a size it belongs to, -1 for none."""
    axis = resolved(axis)
    if axis is size:
        return np.arange(size.n)
    if isinstance(axis, int | Size):
        return np.full(count(axis), -1)
    if isinstance(axis, Join):
        return np.concatenate([_elements(part, size) for part in axis.parts])
    assert isinstance(axis, Product)
    head, rest = axis.factors[0], product(axis.factors[1:])
    outer = np.repeat(_elements(head, size), count(rest))
    return np.where(outer >= 0, outer, np.tile(_elements(rest, size), count(head)))


def _sortable(made: Converted) -> Mapping[Size, Sequence[Elements]]:
    """Return the sizes whose elements can change places, each with all that holds them."""
    reading = made.reading
    reordered = {
        s
        for axes, why in reading.known.axes.tied
        if why.startswith(REORDERED[:22])
        for a in axes
        for s in free_sizes(a)
    }
    found: dict[Size, list[Elements]] = defaultdict(list)
    seen: set[int] = set()
    for name, axes in reading.known.tensors.items():
        if id(axes) in seen:  # one tensor under two names
            continue
        seen.add(id(axes))
        for i, axis in enumerate(axes):
            for size in dict.fromkeys(free_sizes(axis)):
                searched = size in reading.values and bool(reading.values[size].keys)
                if searched and size not in reordered and size not in reading.kernels:
                    found[size].append((name, i, _elements(axis, size)))
    return found


def _group(model: nn.Module, places: Sequence[Elements]) -> Group:
    """Return the elements of a size as a group of torch-pruning."""
    group = Group()
    for name, axis, elements in places:
        owner, _, key = name.rpartition(".")
        module = model.get_submodule(owner)
        handler = _handler(module, axis) if key == "weight" else None
        if handler is not None:
            (at,) = np.nonzero(elements >= 0)
            node = Node(module, None, name)  # type: ignore[arg-type]
            item = GroupItem(Dependency(handler, handler, node, node), at.tolist())
            item.root_idxs = elements[at].tolist()
            group._group.append(item)
    return group


def _handler(module: nn.Module, axis: int) -> Any:
    """Return how torch-pruning names the elements of an axis of a layer's weight."""
    if isinstance(module, CONV):
        out = axis == (1 if module.transposed else 0)
        return tp.prune_conv_out_channels if out else tp.prune_conv_in_channels
    if isinstance(module, nn.Linear):
        return tp.prune_linear_in_channels if axis else tp.prune_linear_out_channels
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return tp.prune_batchnorm_out_channels
    return tp.prune_layernorm_out_channels if isinstance(module, nn.LayerNorm) else None


def _permute(model: nn.Module, places: Sequence[Elements], order: np.ndarray) -> None:
    for name, axis, elements in places:
        owner, _, key = name.rpartition(".")
        tensor = whole(model.get_submodule(owner), key)
        assert isinstance(tensor, Tensor)
        index = np.arange(len(elements))
        own = [np.nonzero(elements == element)[0] for element in range(len(order))]
        for to, source in enumerate(order):
            index[own[to]] = own[source]
        tensor.copy_(tensor.index_select(axis, torch.from_numpy(index).to(tensor.device)))
