"""What is built from layers: a choice among operations, elastic depth, blocks, a network of stages."""

from __future__ import annotations

import functools
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from corenas.errors import UserError
from corenas.mutable import Elastic
from corenas.value import Constant, Dimension, Value, as_value, at_least, equals, make_divisible
from corenas_mutable_slices.layers import BatchNorm2dSlice, Conv2dSlice, InputResize, Kernel, Size
from corenas_mutable_slices.layouts import Sides


class MixedOp(nn.Module):
    """One of several operations, or a sum of all of them with weights (Liu et al. 2019, arXiv:1806.09055).

    candidates: choice -> module; op: a value over these choices
    forward: what the chosen candidate gives; if the choice in force is a tensor of weights, the weighted sum
    """

    def __init__(self, candidates: Mapping[Any, nn.Module], op: Value | str | int) -> None:
        super().__init__()
        self.candidates = nn.ModuleDict({str(name): module for name, module in candidates.items()})
        self.names = tuple(candidates)
        self.op = as_value(op)
        if missing := [name for name in self.op.possible if name not in candidates]:
            raise ValueError(f"no candidate for {missing}; there are {list(candidates)}")
        self.elastic = Elastic({"op": self.op})

    @classmethod
    def of(cls, op: Value | str, candidate: Callable[[Any], nn.Module]) -> MixedOp:
        """One of the operations that a function gives for the choices of `op`."""
        return cls({name: candidate(name) for name in as_value(op).possible}, op)

    def gates(self) -> Iterable[tuple[nn.Module, Value]]:
        """Each candidate runs where it is the choice."""
        return [(self.candidates[str(name)], equals(self.op, name)) for name in self.names]

    @property
    def segments(self) -> Sequence[nn.Module]:
        """The candidates: the one that is chosen is all that runs."""
        return [*self.candidates.values()]

    def forward(self, x: Tensor) -> Tensor:
        """What the chosen candidate gives, or the weighted sum."""
        choice = self.elastic.choice["op"]
        if isinstance(choice, Tensor):
            outputs = (weight * self.candidates[str(n)](x) for n, weight in zip(self.names, choice, strict=True))
            return functools.reduce(torch.add, outputs)
        return self.candidates[str(choice)](x)


class ElasticDepth(nn.Module):
    """The first blocks of a stage, as many as its depth says (Cai et al. 2020, arXiv:1908.09791).

    forward: the blocks one after the other
    """

    def __init__(self, blocks: Iterable[nn.Module], depth: Value | int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.depth = as_value(depth)
        self.elastic = Elastic({"depth": self.depth})
        if self.elastic.choice["depth"] > len(self.blocks):
            raise ValueError(f"depth reaches {self.elastic.choice['depth']}, there are {len(self.blocks)} blocks")

    def gates(self) -> Iterable[tuple[nn.Module, Value]]:
        """A block runs where the depth reaches it."""
        return [(block, at_least(self.depth, i + 1)) for i, block in enumerate(self.blocks)]

    @property
    def segments(self) -> Sequence[nn.Module]:
        """The blocks, one after the other."""
        return [*self.blocks]

    def forward(self, x: Tensor) -> Tensor:
        """The active blocks one after the other."""
        for block in itertools.islice(self.blocks, self.elastic.choice["depth"]):  # a slice would be a new ModuleList
            x = block(x)
        return x


ACTIVATIONS: dict[str, type[nn.Module]] = {
    "none": nn.Identity,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "h_swish": nn.Hardswish,
    "swish": nn.SiLU,
    "gelu": nn.GELU,
}


def activation(name: str) -> nn.Module:
    """A new activation layer by its name in a space file."""
    cls = ACTIVATIONS[name]
    return cls() if name in ("none", "gelu") else cls(inplace=True)


class ConvNormAct(nn.Sequential):
    """Convolution, batch norm, activation: children `conv`, `norm` and, unless act is "none", `act`.

    kernel_size, stride, groups, dilation, padding: as in `Conv2dSlice`
    forward: (n, active inputs, h, w) -> (n, active outputs, h', w'); without `padding` h' is ceil(h / stride)
    """

    conv: Conv2dSlice
    norm: BatchNorm2dSlice

    def __init__(
        self,
        inputs: Size,
        outputs: Size,
        kernel_size: Kernel = 1,
        stride: int | Sequence[int] = 1,
        groups: Value | int | str = 1,
        act: str = "relu",
        dilation: int | Sequence[int] = 1,
        bias: bool = False,
        eps: float = 1e-5,
        transforms: bool = False,
        padding: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.conv = Conv2dSlice(inputs, outputs, kernel_size, stride, groups, dilation, bias, transforms, padding)
        self.norm = BatchNorm2dSlice(outputs, eps)
        self.activated = act != "none"  # to ask for a child that is not there takes torch some microseconds
        if self.activated:
            self.act = activation(act)

    def forward(self, input: Tensor) -> Tensor:
        """(n, active inputs, h, w) -> (n, active outputs, h', w')."""
        norm = self.norm
        exact = norm.training or torch.is_grad_enabled()
        x = norm(self.conv(input)) if exact else self.conv.normed(input, norm)
        return self.act(x) if self.activated else x


class SqueezeExcitation(nn.Module):
    """Channel gates from the map's mean (Hu et al. 2018, arXiv:1709.01507); without options those of MobileNetV3.

    channels: its width; reduction: the inner width is channels // reduction, made divisible by 8
    inner: the inner width, if it is another; act: activation there; gate: "h_sigmoid" or "sigmoid"
    forward: (n, active channels, h, w) -> the same shape
    """

    def __init__(
        self,
        channels: Value | int,
        reduction: int = 4,
        inner: Value | int | None = None,
        act: str = "relu",
        gate: str = "h_sigmoid",
    ) -> None:
        super().__init__()
        inner = make_divisible(as_value(channels) // reduction, 8) if inner is None else inner
        self.reduce = Conv2dSlice(channels, inner, 1)
        self.act = activation(act)
        self.expand = Conv2dSlice(inner, channels, 1)
        self.gate = nn.Sigmoid() if gate == "sigmoid" else nn.Hardsigmoid(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(n, active channels, h, w) -> the same shape."""
        gates = self.gate(self.expand(self.act(self.reduce(x.mean((2, 3), keepdim=True)))))
        return x * gates


class Shortcut(nn.Module):
    """What a block adds to its output: its input, projected where the output has another shape.

    projection: the layers that give the input the output's shape
    always: whether the block strides, so that shapes differ whatever the widths are
    forward: (n, active inputs, h, w) -> (n, active outputs, h', w')
    """

    def __init__(self, inputs: Value | int, outputs: Value | int, projection: nn.Module, always: bool = False) -> None:
        super().__init__()
        self.differs = Constant(1) if always else as_value(1) - equals(inputs, outputs)
        self.elastic = Elastic({"differs": self.differs})
        if self.differs.largest:
            self.projection = projection

    def gates(self) -> Iterable[tuple[nn.Module, Value]]:
        """The projection runs where the widths differ."""
        return [(child, self.differs) for child in self.children()]

    def forward(self, x: Tensor) -> Tensor:
        """(n, active inputs, h, w) -> (n, active outputs, h', w')."""
        return self.projection(x) if self.elastic.choice["differs"] else x


class Residual(nn.Module):
    """A block of layers, with a shortcut past them unless that is None, and an activation after the sum.

    layers: by their names, in order
    forward: (n, active inputs, h, w) -> (n, active outputs, h', w')
    """

    def __init__(self, layers: Mapping[str, nn.Module], shortcut: nn.Module | None, act: str = "none") -> None:
        super().__init__()
        self.body = nn.Sequential(OrderedDict(layers))
        self.added, self.activated = shortcut is not None, act != "none"
        if self.added:
            self.shortcut = shortcut
        if self.activated:
            self.act = activation(act)

    def forward(self, x: Tensor) -> Tensor:
        """(n, active inputs, h, w) -> (n, active outputs, h', w')."""
        y = self.body(x)
        if self.added:
            y = y + self.shortcut(x)
        return self.act(y) if self.activated else y

    def zero_init_last(self) -> None:
        """Start as the shortcut, where there is one: the last batch norm's weight at zero."""
        norms = [module for module in self.body.modules() if isinstance(module, nn.BatchNorm2d)]
        if norms and self.added:
            nn.init.zeros_(norms[-1].weight)


def basic_layers(
    inputs: Size, inner: Size, outputs: Size, kernel_size: Value | int, stride: int = 1, eps: float = 1e-5
) -> dict[str, nn.Module]:
    """The layers of a basic block: two convolutions, the stride in the first (He et al. 2016, arXiv:1512.03385)."""
    return {
        "conv1": ConvNormAct(inputs, inner, kernel_size, stride, eps=eps),
        "conv2": ConvNormAct(inner, outputs, kernel_size, act="none", eps=eps),
    }


def bottleneck_layers(
    inputs: Size,
    inner: Size,
    outputs: Size,
    kernel_size: Value | int,
    stride: int = 1,
    groups: Value | int | str = 1,
    eps: float = 1e-5,
) -> dict[str, nn.Module]:
    """The layers of a bottleneck block, inverted or not: a convolution, with the stride, between two of 1x1."""
    return {
        "conv1": ConvNormAct(inputs, inner, eps=eps),
        "conv2": ConvNormAct(inner, inner, kernel_size, stride, groups, eps=eps),
        "conv3": ConvNormAct(inner, outputs, act="none", eps=eps),
    }


class Staged(nn.Module):
    """A network of stages: images are resized or not, pass the stem, the stages and what follows them.

    stages: each with the dimension of its output
    final: what follows the last stage, with the dimension of its output
    levels: numbers of stages, from 1, whose outputs are the features, as detection wants them; nothing follows the last
        of them. Without levels the output of `final` is the only feature.
    resolution: side of the square that images are resized to, or both sides; without it they stay as they are
    Raises UserError for levels that there are not.
    """

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[tuple[nn.Module, Size]],
        final: tuple[nn.Module, Size],
        levels: Sequence[int] = (),
        resolution: Value | int | Sides | None = None,
        resize_mode: str = "bilinear",
    ) -> None:
        super().__init__()
        if any(not 1 <= level <= len(stages) for level in levels) or [*levels] != sorted({*levels}):
            text = f"levels {[*levels]}: expected numbers of stages in order, 1 to {len(stages)}"
            raise UserError(text, key=("backbone", "levels"))
        if resolution is not None:
            self.resize = InputResize(resolution, resize_mode)
        self.stem, self.levels = stem, tuple(levels)
        kept = stages[: levels[-1]] if levels else stages
        self.stages = nn.Sequential(*(stage for stage, _ in kept))
        dims = [stages[level - 1][1] for level in levels]
        if not levels:
            self.final, dims = final[0], [final[1]]
        self.feat_dims = [Dimension.of(dim) for dim in dims]
        self.segments = [stem, *self.stages, *([] if levels else [final[0]])]

    def forward(self, x: Tensor) -> list[Tensor]:
        """Its features."""
        return self.features(x)

    def features(self, x: Tensor) -> list[Tensor]:
        """(n, channels, h, w) -> the maps of the levels, or what comes out at the end."""
        if hasattr(self, "resize"):
            x = self.resize(x)
        x = self.stem(x)
        maps = []
        for number, stage in enumerate(self.stages, 1):
            x = stage(x)
            if number in self.levels:
                maps.append(x)
        return maps or [self.final(x)]
