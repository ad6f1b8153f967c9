"""Which channels of a supernet move together, and how they are brought into the order of their importance."""

from __future__ import annotations

import copy
import itertools
import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch_pruning as tp
from attrs import frozen
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from corenas.calibrate import statistics_kept
from corenas.errors import UserError, did_you_mean
from corenas.mutable import Gated, Resizing, apply, elastic_of, mutables
from corenas.space import SearchSpace
from corenas.value import Dimension, Value, grid, largest_of

Importance = Callable[[Any], "Tensor | None"]
"""From a group of torch-pruning to the importance of each of its channels; None where the measure has none."""

READS = (tp.prune_conv_in_channels, tp.prune_linear_in_channels)
"""How torch-pruning names what happens to the input channels of a layer."""

LARGEST_GRID = 64
"""Of the variables that a gate depends on no more combinations than these are looked at; beyond, one at a time."""

TOLERANCE = 1e-11
"""Largest difference in double precision that is put down to rounding, relative to the largest output."""


def input_norm(model: nn.Module, p: int = 1) -> Importance:
    """The p-norm of the weights by which the last layer of the model that reads a channel does.

    Of the inner channels of an inverted residual block that is the projection, of those of squeeze-and-excitation the
    expansion: with p = 1 the measure of Once-for-All's code (Cai et al. 2020, arXiv:1908.09791).
    """
    order = {module: i for i, module in enumerate(model.modules())}

    def importance(group: Any) -> Tensor | None:
        readers = [item for item in group if item.dep.handler in READS]
        if not readers:
            return None
        last = max(readers, key=lambda item: order[item.dep.target.module])
        weight = last.dep.target.module.weight.detach()
        norms = weight.abs().pow(p).sum([axis for axis in range(weight.dim()) if axis != 1])
        roots = torch.tensor(last.root_idxs, device=weight.device)
        return norms.new_zeros(max(last.root_idxs) + 1).index_add_(0, roots, norms[last.idxs])

    return importance


def taylor(model: nn.Module) -> Importance:
    """The change of the loss without a channel, from weights and gradients (Molchanov et al. 2019, arXiv:1906.10771).

    Raises UserError for weights without gradients.
    """
    measure = tp.importance.GroupTaylorImportance()

    def importance(group: Any) -> Tensor | None:
        weights = [getattr(item.dep.target.module, "weight", None) for item in group]
        if any(isinstance(weight, nn.Parameter) and weight.grad is None for weight in weights):
            text = "the measure taylor wants gradients, and some weights have none"
            raise UserError(text, hint="call backward on losses of archs that together use all candidates")
        return measure(group)

    return importance


IMPORTANCE: Mapping[str, Callable[[nn.Module], Importance]] = {
    "input_l1": input_norm,
    "l1": lambda model: tp.importance.GroupMagnitudeImportance(p=1),
    "l2": lambda model: tp.importance.GroupMagnitudeImportance(p=2),
    "norm_scale": lambda model: tp.importance.BNScaleImportance(),
    "taylor": taylor,
}
"""Measures by name: Once-for-All's, norms of all weights of a channel (L1, L2), batch norm's scale, Taylor."""


@frozen
class Sorted:
    """What was sorted.

    layers: names of convolutions and linear layers of which all searchable output channels are in order now
    left: those of which some were left as they were
    """

    layers: tuple[str, ...]
    left: tuple[str, ...]


def sort_channels(
    model: nn.Module,
    example: Tensor,
    importance: str | Importance = "input_l1",
    keep: SearchSpace | None = None,
) -> Sorted:
    """Sort the channels of a supernet so that those that narrow subnets have are the most important ones.

    example: an input; its size and type alone count
    importance: a name of `IMPORTANCE`, a measure of torch-pruning (`tp.importance.GroupTaylorImportance()`, which wants
        gradients), or a function of a group that gives a number for each channel, larger for what comes first
    keep: the space that was trained so far. All its subnets compute after the sorting what they computed before it,
        since channels are sorted only between the widths that it has. Without one, these are the subnets of which every
        width is at its largest.

    What moves together is found by torch-pruning's graph of the largest subnet and of those that run the other choices
    of a mixed operation or another depth. Every permutation is then tried on a copy with random weights: one that
    changes the function of some subnet to be kept is left out. Neither gradients nor an optimizer's state are permuted.
    Raises UserError for a name that is no measure.
    """
    if isinstance(importance, str):
        if importance not in IMPORTANCE:
            hint = did_you_mean(importance, IMPORTANCE, "measures")
            raise UserError(f"no measure of importance is called {importance!r}", hint=hint)
        importance = IMPORTANCE[importance](model)
    values = [value for mutable in mutables(model) for value in mutable.elastic.values.values()]
    domains = {key: own for value in values for part in _parts(value) for key, own in part.domains.items()}
    widths = {key for value in values if isinstance(value, Dimension) for key in value.keys}
    if not widths:
        return Sorted((), ())
    kept = {key: [largest_of(own)] if key in widths else own for key, own in domains.items()}
    if keep is not None:
        kept = {key: keep[key].choices for key in domains}
    small = {
        key: min(kept[key])
        for m in mutables(model)
        if isinstance(m, Resizing)
        for name in m.resizes
        for key in m.elastic.values[name].keys
    }
    first = {key: largest_of(domains[key] if key in widths else own) for key, own in kept.items()} | small
    archs = [*{tuple(arch.items()): arch for arch in (first, *_variants(model, first, kept))}.values()]
    ties = _Ties(model, kept)
    with statistics_kept(model), torch.enable_grad():
        for number, arch in enumerate(archs):
            with apply(model, arch):
                for group in _groups(model, example, needed=number == 0):
                    ties.add(group, importance)
    rng = np.random.default_rng(0)
    some = [{key: own[int(rng.integers(len(own)))] for key, own in kept.items()} | small for _ in range(8)]
    moves = _sound(model, [*archs, *some], example.shape, ties.moves())
    _permute(model, moves)
    return ties.sorted(moves)


def _variants(
    module: nn.Module,
    arch: dict[str, Any],
    kept: Mapping[str, Sequence[Any]],
    runs: Mapping[nn.Module, dict[str, Any] | None] = MappingProxyType({}),
) -> Iterator[dict[str, Any]]:
    """Archs that together run every part of a module in every way, each as the given one but for what that needs.

    Ties between parts behind different gates follow: both are tied to what the given arch runs in their place.

    arch: one that runs the module
    runs: an arch that runs each gated module so far; None where there is none
    """
    if elastic_of(module) is not None and isinstance(module, Gated):
        gates = [*module.gates()]
        keys = sorted({key for _, gate in gates for key in gate.keys})
        every = itertools.product(*(kept[key] for key in keys))
        if math.prod(len(kept[key]) for key in keys) > LARGEST_GRID:
            every = (tuple(c if key == other else arch[other] for other in keys) for key in keys for c in kept[key])
        own = [{**arch, **dict(zip(keys, choices, strict=True))} for choices in every]
        yield from own
        runs = {**runs, **{child: next((a for a in (arch, *own) if gate(a)), None) for child, gate in gates}}
    for child in module.children():
        base = runs.get(child, arch)
        if base is not None:
            yield from _variants(child, base, kept, runs)


def _groups(model: nn.Module, example: Tensor, needed: bool) -> Iterator[Any]:
    """The groups of torch-pruning for the arch in force."""
    device = next(model.parameters()).device
    noise = torch.rand(example[:1].shape, generator=_generator(), dtype=example.dtype).to(device).requires_grad_()
    try:
        graph = tp.DependencyGraph().build_dependency(model, (noise,), verbose=False)
    except Exception:
        if needed:
            raise
        return  # narrow weights of several parts are beyond it; what is then not tied, `_sound` finds
    yield from graph.get_all_groups()


def _parts(value: Value | Dimension) -> Sequence[Value]:
    return value.parts if isinstance(value, Dimension) else (value,)


class _Axis(NamedTuple):
    """The inputs or the outputs of a layer."""

    layer: str
    inputs: bool


@frozen
class _Span:
    """The elements along an axis: where each part starts, which widths of it are kept, what its numbers are."""

    size: int
    starts: Sequence[int] = (0,)
    kept: Sequence[Sequence[int]] = ((),)
    searchable: Sequence[bool] = (False,)

    def label(self, element: int) -> tuple[int, int]:
        """What elements that can be exchanged have in common: their part, and the kept widths that reach them."""
        part = bisect_right(self.starts, element) - 1
        return part, bisect_right(self.kept[part], element - self.starts[part])


@frozen
class _Move:
    """Channels that can be exchanged: along each axis, the elements and where what comes to them was before."""

    elements: Mapping[_Axis, tuple[Sequence[int], Sequence[int]]]


class _Ties:
    """Elements of axes that hold the same channel, as union-find over all elements of all axes."""

    def __init__(self, model: nn.Module, kept: Mapping[str, Sequence[Any]]) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self.kept = kept
        self.spans: dict[_Axis, _Span] = {}
        self.start: dict[_Axis, int] = {}
        self.parent: list[int] = []
        self.fixed: list[int] = []
        self.scores: list[tuple[int, float]] = []
        self.unscored: list[int] = []

    def add(self, group: Any, importance: Importance) -> None:
        """Note which elements a group of torch-pruning ties, and how important they are."""
        elements: dict[int, list[int]] = defaultdict(list)
        free, new = True, False
        for item in group:
            node, module = item.dep.target, item.dep.target.module
            reads = item.dep.handler in READS
            free &= reads or bool(node.outputs)  # what nothing follows is an output of the network
            if module not in self.names:  # an operation without weights; or a bare parameter
                free &= not isinstance(module, nn.Parameter)
                continue
            axis = _Axis(self.names[module], reads)
            if axis not in self.start:
                new = True
                self.spans[axis] = _span(module, reads, self.kept)
                self.start[axis] = len(self.parent)
                self.parent.extend(range(len(self.parent), len(self.parent) + self.spans[axis].size))
            span, active = self.spans[axis], _active(module, reads, self.spans[axis])
            if max(item.idxs) >= span.size or None in item.root_idxs:  # grouped, or an operation that is not understood
                free = False
                continue
            for element, root in zip(item.idxs, item.root_idxs, strict=True):
                if active(element):
                    elements[root].append(self.start[axis] + element)
        for tied in elements.values():
            for element in tied[1:]:
                self.parent[self._find(element)] = self._find(tied[0])
        if not free:
            self.fixed.extend(tied[0] for tied in elements.values())
        elif new:
            measured = importance(group)
            scores = {} if measured is None else dict(enumerate(measured.tolist()))
            self.scores.extend((tied[0], scores[root]) for root, tied in elements.items() if root in scores)
            self.unscored.extend(tied[0] for root, tied in elements.items() if root not in scores)

    def _find(self, element: int) -> int:
        while self.parent[element] != element:
            self.parent[element] = element = self.parent[self.parent[element]]
        return element

    def moves(self) -> list[_Move]:
        """The sorted order of each set of channels that can be exchanged."""
        channels: dict[int, dict[_Axis, list[int]]] = defaultdict(lambda: defaultdict(list))
        for axis, span in self.spans.items():
            for element in range(span.size):
                channels[self._find(self.start[axis] + element)][axis].append(element)
        scores: dict[int, list[float]] = defaultdict(list)
        for element, score in self.scores:
            scores[self._find(element)].append(score)
        fixed = {*map(self._find, self.fixed), *({*map(self._find, self.unscored)} - scores.keys())}
        alike: dict[Any, list[int]] = defaultdict(list)
        for channel, elements in channels.items():
            labels = {axis: tuple(map(self.spans[axis].label, own)) for axis, own in elements.items()}
            searched = any(self.spans[axis].searchable[part] for axis, own in labels.items() for part, _ in own)
            if searched and channel not in fixed:
                alike[tuple(labels.items())].append(channel)

        def along(axis: _Axis, some: Sequence[int]) -> list[int]:
            return [element for channel in some for element in channels[channel][axis]]

        moves = []
        for group in alike.values():
            order = sorted(group, key=lambda channel: -sum(scores[channel]) / max(len(scores[channel]), 1))
            moves.append(_Move({axis: (along(axis, group), along(axis, order)) for axis in channels[group[0]]}))
        return moves

    def sorted(self, moves: Iterable[_Move]) -> Sorted:
        """Which layers the moves sort."""
        done: dict[_Axis, set[int]] = defaultdict(set)
        for move in moves:
            for axis, (elements, _) in move.elements.items():
                done[axis].update(elements)
        layers, left = [], []
        for module, name in self.names.items():
            dimension, _ = _dimension(module, reads=False)
            if dimension is not None and isinstance(module, nn.Conv2d | nn.Linear):
                span = _span_of(dimension, self.kept)
                wanted = {element for element in range(span.size) if span.searchable[span.label(element)[0]]}
                if wanted:
                    (layers if wanted <= done[_Axis(name, False)] else left).append(name)
        return Sorted(tuple(layers), tuple(left))


def _dimension(module: nn.Module, reads: bool) -> tuple[Dimension | None, str]:
    name = "inputs" if reads else "outputs"
    elastic = elastic_of(module)
    value = None if elastic is None else elastic.values.get(name)
    return (None if value is None else Dimension.of(value)), name


def _span(module: nn.Module, reads: bool, kept: Mapping[str, Sequence[Any]]) -> _Span:
    size = next((tensor.shape[axis] for tensor, axis in _tensors(module, reads)), 0)
    dimension, _ = _dimension(module, reads)
    return _Span(size) if dimension is None or dimension.allocated != size else _span_of(dimension, kept)


def _span_of(dimension: Dimension, kept: Mapping[str, Sequence[Any]]) -> _Span:
    columns = [grid({key: kept[key] for key in part.keys}) if part.keys else {} for part in dimension.parts]
    widths = [np.unique(part(own)).tolist() for part, own in zip(dimension.parts, columns, strict=True)]
    starts = [*itertools.accumulate((part.largest for part in dimension.parts[:-1]), initial=0)]
    return _Span(dimension.allocated, starts, widths, [len(part.possible) > 1 for part in dimension.parts])


def _active(module: nn.Module, reads: bool, span: _Span) -> Callable[[int], bool]:
    """Whether an element is active under the arch in force."""
    dimension, name = _dimension(module, reads)
    if dimension is None or len(span.starts) != len(dimension.parts):
        return lambda element: True
    numbers = [int(n) for n in np.ravel(module.elastic.choice[name])]  # type: ignore[union-attr]

    def active(element: int) -> bool:
        part = bisect_right(span.starts, element) - 1
        return element - span.starts[part] < numbers[part]

    return active


def _tensors(module: nn.Module, reads: bool) -> Iterator[tuple[Tensor, int]]:
    """The tensors of a layer that have its inputs or outputs along an axis, with that axis; none if it is not known."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.LayerNorm):
        own = [*module._parameters.values(), *module._buffers.values()]
        tensors = [tensor for tensor in own if tensor is not None and tensor.is_floating_point()]
        yield from ((tensor, tensor.dim() - 1) for tensor in tensors)
    elif isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and not _grouped(module)):
        if reads:
            yield module.weight, 1
        else:
            yield from ((tensor, 0) for tensor in (module.weight, module.bias) if tensor is not None)


def _grouped(conv: nn.Conv2d) -> bool:
    """Whether it has groups and is not depthwise."""
    elastic = elastic_of(conv)
    if elastic is not None and "groups" in elastic.values:
        return True
    return conv.groups != 1 and conv.weight.shape[:2] != (conv.groups, 1)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@torch.no_grad()
def _permute(model: nn.Module, moves: Iterable[_Move], back: bool = False) -> None:
    index: dict[_Axis, dict[int, int]] = defaultdict(dict)
    for move in moves:
        for axis, (elements, sources) in move.elements.items():
            index[axis].update(zip(*((sources, elements) if back else (elements, sources)), strict=True))
    for axis, own in index.items():
        for tensor, dim in _tensors(model.get_submodule(axis.layer), axis.inputs):
            order = torch.tensor([own.get(i, i) for i in range(tensor.shape[dim])], device=tensor.device)
            tensor.copy_(tensor.index_select(dim, order))


@torch.no_grad()
def _sound(
    model: nn.Module, archs: Sequence[Mapping[str, Any]], shape: Sequence[int], moves: list[_Move]
) -> list[_Move]:
    """Those moves that change the function of none of the archs, whatever the weights are."""
    twin = copy.deepcopy(model).double().eval()
    uniform = partial(torch.rand, generator=_generator(), dtype=torch.float64)
    norms = [module for module in twin.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    # Activations keep their size from layer to layer, and nothing is zero: either could hide what moves.
    for tensor in twin.parameters():
        if tensor.dim() < 2:
            tensor.copy_(uniform(tensor.shape) + 0.5)
        else:
            tensor.copy_((uniform(tensor.shape) * 2 - 1) * (6 / tensor[0].numel()) ** 0.5)
    for buffer in (buffer for norm in norms for buffer in norm.buffers() if buffer.is_floating_point()):
        buffer.copy_(uniform(buffer.shape) + 0.5)
    noise = uniform((1, *shape[1:])).to(next(twin.parameters()).device)

    def outputs() -> list[Tensor]:
        results = []
        for arch in archs:
            with apply(twin, arch):
                results.extend(tree_leaves(twin(noise.clone())))
        return results

    before = outputs()

    def search(some: list[_Move]) -> list[_Move]:
        _permute(twin, some)
        same = all(
            float((a - b).abs().max()) <= TOLERANCE * float(a.abs().max())
            for a, b in zip(before, outputs(), strict=True)
        )
        _permute(twin, some, back=True)
        if same or len(some) < 2:
            return some if same else []
        return [*search(some[: len(some) // 2]), *search(some[len(some) // 2 :])]

    return search(moves)
