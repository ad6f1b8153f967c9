"""The cell space of DARTS as a network: operations, edges, nodes, cells, and the stack of cells."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corenas.errors import UserError
from corenas.mutable import Elastic
from corenas.regularisation import DropPath
from corenas.value import Constant, Dimension, Value, as_value, equals
from corenas_backbone_darts import OPERATIONS
from corenas_mutable_slices import BatchNorm2dSlice, Conv2dSlice, InputResize, MixedOp

if TYPE_CHECKING:
    from corenas_backbone_darts import Cell, Darts, Edge, Layout, Node

# -- operations -------------------------------------------------------------------------------------------------------


def operation(name: str, width: int, stride: int, affine: bool) -> nn.Module:
    """What an edge does: (n, width, h, w) -> (n, width, ceil(h / stride), ceil(w / stride))."""

    def norm() -> nn.Module:
        return BatchNorm2dSlice(width, affine=affine)

    match name:
        case "none":
            return Zero(stride)
        case "skip_connect":
            return nn.Identity() if stride == 1 else FactorizedReduce(width, width, affine)
        case "max_pool_3x3":
            pool = nn.MaxPool2d(3, stride, 1)
            return pool if affine else nn.Sequential(pool, norm())
        case "avg_pool_3x3":
            pool = nn.AvgPool2d(3, stride, 1, count_include_pad=False)
            return pool if affine else nn.Sequential(pool, norm())
        case "conv_7x1_1x7":
            across = nn.Conv2d(width, width, (1, 7), (1, stride), (0, 3), bias=False)
            down = nn.Conv2d(width, width, (7, 1), (stride, 1), (3, 0), bias=False)
            return nn.Sequential(nn.ReLU(), across, down, norm())
    kernel = int(name[-1])
    if name.startswith("dil_conv"):
        return nn.Sequential(nn.ReLU(), *_separable(width, kernel, stride, 2), norm())
    first = nn.ReLU(), *_separable(width, kernel, stride), norm()
    return nn.Sequential(*first, nn.ReLU(), *_separable(width, kernel), norm())


def _separable(width: int, kernel: int, stride: int = 1, dilation: int = 1) -> tuple[nn.Module, nn.Module]:
    """A depthwise convolution and a pointwise one."""
    padding = dilation * (kernel // 2)
    depthwise = nn.Conv2d(width, width, kernel, stride, padding, dilation, groups=width, bias=False)
    return depthwise, nn.Conv2d(width, width, 1, bias=False)


class Zero(nn.Module):
    """Nothing, of the shape that other operations give."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """(n, width, h, w) -> zeros (n, width, ceil(h / stride), ceil(w / stride))."""
        return x[:, :, :: self.stride, :: self.stride] * 0


class FactorizedReduce(nn.Module):
    """Halves a map with two pointwise convolutions, of which one sees the pixels of even, the other of odd rows and
    columns: (n, active inputs, h, w) -> (n, outputs, ceil(h / 2), ceil(w / 2)).
    """

    def __init__(self, inputs: Dimension | int, outputs: int, affine: bool) -> None:
        super().__init__()
        self.act = nn.ReLU()
        self.even = Conv2dSlice(inputs, outputs // 2, 1, 2, bias=False)
        self.odd = Conv2dSlice(inputs, outputs - outputs // 2, 1, 2, bias=False)
        self.norm = BatchNorm2dSlice(outputs, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        """(n, active inputs, h, w) -> (n, outputs, ceil(h / 2), ceil(w / 2))."""
        x = self.act(x)
        # One row and column less in front; those behind are seen only where the map's side is odd.
        shifted = F.pad(x, (-1, 1, -1, 1))
        return self.norm(torch.cat([self.even(x), self.odd(shifted)], 1))


# -- the cell ---------------------------------------------------------------------------------------------------------


def _one_of(value: Any, choices: Sequence[Any]) -> Value:
    """1 where a value is one of some choices, else 0."""
    if {*choices} >= {*value.possible}:
        return Constant(1)
    return sum((equals(value, choice) for choice in choices), start=Constant(0))


class CellEdge(nn.Module):
    """One of several operations on one of several states; in a reduction cell the cells before have operations of
    their own, since these stride.

    Its `MixedOp`s have "none" as their first candidate, then those of the space in the order of `OPERATIONS`.
    forward: the states before the node -> (n, width, h, w)
    """

    def __init__(self, edge: Edge, index: int, width: int, reduction: bool, options: Darts) -> None:
        super().__init__()
        source = edge.source(index)
        self.strides = {state: 2 if reduction and state < 2 else 1 for state in source.possible}
        self.operations = nn.ModuleDict()
        for stride in sorted({*self.strides.values()}):
            candidates: dict[str, nn.Module] = {"none": Zero(stride)}
            for name in OPERATIONS:
                if name in edge.op.possible:  # type: ignore[union-attr]
                    candidates[name] = operation(name, width, stride, options.affine)
                    if options.drop_path and not isinstance(candidates[name], nn.Identity | Zero):
                        candidates[name] = nn.Sequential(candidates[name], DropPath(options.drop_path, scheduled=True))
            self.operations[str(stride)] = MixedOp(candidates, edge.op)
        self.source = source
        self.elastic = Elastic({"input": source})

    @property
    def weighted(self) -> bool:
        """Whether what is in force is no operation but a tensor of weights, one for each."""
        return any(isinstance(op.elastic.choice["op"], Tensor) for op in self.operations.values())  # type: ignore[union-attr]

    def gates(self) -> Iterable[tuple[nn.Module, Value]]:
        """Operations run where the input is one of their states."""
        for stride, op in self.operations.items():
            yield op, _one_of(self.source, [s for s, own in self.strides.items() if str(own) == stride])

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        """The states before the node -> (n, width, h, w)."""
        state = self.elastic.choice["input"]
        return self.operations[str(self.strides[state])](states[state])


class CellNode(nn.Module):
    """The sum of the edges that it takes, and of all that are in force with weights.

    forward: the states before it -> (n, width, h, w)
    """

    def __init__(self, node: Node, width: int, reduction: bool, options: Darts) -> None:
        super().__init__()
        self.take = as_value(node.take)  # type: ignore[arg-type]
        self.elastic = Elastic({"take": self.take})
        indices = {int(index) for choice in self.take.possible for index in choice.split()}
        edges = {index: CellEdge(node.edges[index], index, width, reduction, options) for index in sorted(indices)}
        self.edges = nn.ModuleDict({str(index): edge for index, edge in edges.items()})

    def gates(self) -> Iterable[tuple[nn.Module, Value]]:
        """An edge runs where it is taken."""
        for index, edge in self.edges.items():
            yield edge, _one_of(self.take, [choice for choice in self.take.possible if index in choice.split()])

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        """The states before it -> (n, width, h, w)."""
        taken = self.elastic.choice["take"].split()
        edges = [edge for index, edge in self.edges.items() if index in taken or edge.weighted]
        return functools.reduce(torch.add, [edge(states) for edge in edges])


class NetworkCell(nn.Module):
    """A cell: both inputs made as wide as its nodes, the nodes, and the concatenation of those that are its output.

    before, inputs: the dimensions of the outputs of the last cell but one and of the last
    halved: whether the last cell halved the map, so that the one before it has twice the size
    forward: (n, before, h', w'), (n, inputs, h, w) -> (n, width times nodes in the output, h, w), or half that size
    """

    def __init__(
        self,
        cell: Cell,
        before: Dimension,
        inputs: Dimension,
        width: int,
        reduction: bool,
        halved: bool,
        options: Darts,
    ) -> None:
        super().__init__()
        affine = options.affine
        self.prepare0 = FactorizedReduce(before, width, affine) if halved else _fitted(before, width, affine)
        self.prepare1 = _fitted(inputs, width, affine)
        self.nodes = nn.ModuleList(CellNode(node, width, reduction, options) for node in cell.nodes)
        self.elastic = Elastic({str(i): node.out for i, node in enumerate(cell.nodes)})
        self.outputs = Dimension.of([node.out * width for node in cell.nodes])

    def forward(self, before: Tensor, last: Tensor) -> Tensor:
        """(n, before, h', w'), (n, inputs, h, w) -> (n, width times nodes in the output, h, w), or half that size."""
        states = [self.prepare0(before), self.prepare1(last)]
        for node in self.nodes:
            states.append(node(states))
        return torch.cat([state for i, state in enumerate(states[2:]) if self.elastic.choice[str(i)]], 1)


def _fitted(inputs: Dimension, width: int, affine: bool) -> nn.Sequential:
    """A pointwise convolution to a cell's width, as everything in cells in the order ReLU, convolution, batch norm."""
    conv = Conv2dSlice(inputs, width, 1, bias=False)
    return nn.Sequential(nn.ReLU(), conv, BatchNorm2dSlice(width, affine=affine))


# -- the network ------------------------------------------------------------------------------------------------------


class Auxiliary(nn.Module):
    """What an auxiliary classifier sees, in training alone; no part of the network that is measured.

    forward: (n, active inputs, h, w) -> (n, 768, h', w'), 1x1 of a map of 7x7 or 8x8
    Raises UserError, as it runs, for maps of less than 6x6.
    """

    def __init__(self, inputs: Dimension, stem: str) -> None:
        super().__init__()
        # On maps of 7x7, from images of 28x28, the last window of stride 3 is cut: as it is, it would not fit.
        pool = nn.AvgPool2d(5, 3 if stem == "cifar" else 2, ceil_mode=True, count_include_pad=False)
        last = [BatchNorm2dSlice(768)] if stem == "cifar" else []  # left out for ImageNet in the reference code
        self.layers = nn.Sequential(
            nn.ReLU(),
            pool,
            Conv2dSlice(inputs, 128, 1, bias=False),
            BatchNorm2dSlice(128),
            nn.ReLU(inplace=True),
            nn.Conv2d(128, 768, 2, bias=False),
            *last,
            nn.ReLU(inplace=True),
        )

    def gates(self) -> Iterable[tuple[nn.Module, Value]]:
        """It runs under no arch, as far as costs are concerned."""
        return [(self.layers, Constant(0))]

    def forward(self, x: Tensor) -> Tensor:
        """(n, active inputs, h, w) -> (n, 768, h', w')."""
        if min(x.shape[-2:]) < 6:  # two windows of 5 are needed for the last convolution
            text = f"auxiliary features need maps of at least 6x6, found {x.shape[-2]}x{x.shape[-1]}"
            hint = 'images of at least 24 pixels with the stem "cifar", 161 with "imagenet"'
            raise UserError(text, key=("backbone", "auxiliary"), hint=hint)
        return self.layers(x)


def _stem(inputs: int, widths: Sequence[int], stride: int) -> nn.Sequential:
    """Convolutions of 3x3 with batch norm, and ReLU between them."""
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Conv2d(inputs, width, 3, stride, 1, bias=False), BatchNorm2dSlice(width), nn.ReLU(inplace=True)]
        inputs = width
    return nn.Sequential(*layers[:-1])


class CellNetwork(nn.Module):
    """Stem and cells; each cell sees the outputs of the two before it (Zoph et al. 2018, arXiv:1707.07012)."""

    def __init__(self, layout: Layout, options: Darts) -> None:
        super().__init__()
        width = options.channels
        if layout.resolution is not None:
            self.resize = InputResize(layout.resolution, options.resize_mode)
        if options.stem == "cifar":
            self.stem = _stem(options.in_channels or 3, [3 * width], 1)
            before = last = Dimension.of(3 * width)
        else:
            self.stem = _stem(options.in_channels or 3, [max(1, width // 2), width], 2)
            self.second_stem = nn.Sequential(nn.ReLU(), *_stem(width, [width], 2))
            before = last = Dimension.of(width)
        self.segments = [*self.children()][layout.resolution is not None :]
        starts = (options.layers // 3, 2 * options.layers // 3)  # of the second and the third stage
        ends = [*(start - 1 for start in starts), options.layers - 1]
        self.taps = [ends[level - 1] for level in options.levels] or ends[-1:]
        self.auxiliary_tap = starts[1] if options.auxiliary else None
        self.feat_dims: list[Dimension] = []
        self.cells = nn.ModuleList()
        halved = options.stem == "imagenet"
        for i in range(self.taps[-1] + 1):
            reduction = i in starts
            width *= 2 if reduction else 1
            table = layout.reduce if reduction else layout.normal
            cell = NetworkCell(table, before, last, width, reduction, halved, options)
            self.cells.append(cell)
            before, last, halved = last, cell.outputs, reduction
            if i in self.taps:
                self.feat_dims.append(last)
            if i == self.auxiliary_tap:
                self.auxiliary = Auxiliary(last, options.stem)
        if options.auxiliary:
            self.feat_dims.insert(0, Dimension.of(768))
        self.segments += [*self.cells]

    def forward(self, x: Tensor) -> list[Tensor]:
        """Its features."""
        return self.features(x)

    def features(self, x: Tensor) -> list[Tensor]:
        """(n, channels, h, w) -> the maps of the levels, or of the last cell; in training the auxiliary ones first."""
        x = self.resize(x) if hasattr(self, "resize") else x
        before = last = self.stem(x)
        if hasattr(self, "second_stem"):
            last = self.second_stem(before)
        features: list[Tensor] = []
        for i, cell in enumerate(self.cells):
            before, last = last, cell(before, last)
            if i == self.auxiliary_tap and self.training:
                features.insert(0, self.auxiliary(last))
            if i in self.taps:
                features.append(last)
        return features
