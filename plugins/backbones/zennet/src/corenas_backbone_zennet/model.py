"""The networks of Zen-NAS as a supernet: a stem, super-blocks, a head."""

from __future__ import annotations

from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from corenas.value import Expression, Value, as_value, equals, rounded
from corenas_mutable_slices import (
    ConvNormAct,
    ElasticDepth,
    MixedOp,
    Residual,
    Shortcut,
    Staged,
    basic_layers,
    bottleneck_layers,
)

if TYPE_CHECKING:
    from corenas_backbone_zennet import Layout, Op, SuperBlock, SuperConv, ZenNet

EPS = 1e-3
"""Of all batch norms, as in the reference code."""

conv = partial(ConvNormAct, eps=EPS)


def supernet(layout: Layout, options: ZenNet) -> Staged:
    """The supernet of one space: (n, in_channels, h, w) -> [(n, head width, 1, 1)].

    Weights are drawn as torch draws them.
    """
    width = layout.stem.width
    stem = convolutions(layout.stem, as_value(options.in_channels or 3))
    stages = []
    for stage in layout.stages:
        block, width = _stage(stage, width, options), _width_after(stage, width)
        stages.append((block, width))
    final = nn.Sequential(convolutions(layout.head, width), nn.AdaptiveAvgPool2d(1))
    return Staged(stem, stages, (final, layout.head.width), options.levels, layout.resolution, options.resize_mode)


def _stage(stage: SuperBlock, inputs: Value, options: ZenNet) -> nn.Module:
    op = as_value(stage.op)
    of_type = partial(super_block, stage=stage, inputs=inputs, se=options.se, residual=options.residual)
    return MixedOp.of(op, of_type) if op.keys else of_type(op.largest)


def _width_after(stage: SuperBlock, inputs: Value) -> Value:
    """Return the channels after a super-block: its width, or what came in where it is not there."""
    return PassedWidth(_passed_width, (stage.depth, stage.width, inputs)) if 0 in stage.depth.possible else stage.width


class PassedWidth(Expression):
    """The channels after a super-block that need not be there; what they can be is known without a table."""

    @cached_property
    def possible(self) -> tuple[int, ...]:
        """The numbers that either of the two can be, in order."""
        depth, width, inputs = self.arguments
        present = width.possible if depth.largest else ()
        return tuple(sorted({*present, *inputs.possible}))


def _passed_width(depth: Any, width: Any, inputs: Any) -> Any:
    there = depth > 0
    return inputs + (width - inputs) * there


def convolutions(table: SuperConv | SuperBlock, inputs: Value) -> ElasticDepth:
    """Convolutions with batch norm and ReLU, of which the first strides."""
    first = conv(inputs, table.width, table.kernel, table.stride)
    others = [conv(table.width, table.width, table.kernel) for _ in range(1, table.depth.largest)]
    return ElasticDepth([first, *others], table.depth)


def super_block(op: Op, stage: SuperBlock, inputs: Value, se: bool = False, residual: bool = True) -> ElasticDepth:
    """A super-block of one type (Lin et al. 2021): sub-layers of residual blocks, of which the very first strides.

    forward: (n, inputs, h, w) -> (n, width, ceil(h / stride), ceil(w / stride))
    """
    if op == "Conv":
        return convolutions(stage, inputs)
    sub_layers = []
    for i in range(stage.depth.largest):
        blocks: list[nn.Module] = []
        for start, inner, end in shapes(op, stage, stage.width if i else inputs):
            first = i == 0 and not blocks
            stride = stage.stride if first else 1
            if op == "XX":
                layers = basic_layers(start, inner, end, stage.kernel, stride, EPS)
            else:
                groups = "depthwise" if op == "IDW" else 1
                layers = bottleneck_layers(start, inner, end, stage.kernel, stride, groups, EPS)
            if se:
                name, last = layers.popitem()
                layers |= {"se": NormedExcitation(inner), name: last}
            blocks.append(Residual(layers, _shortcut(start, end, stride, first) if residual else None, act="relu"))
        sub_layers.append(nn.Sequential(*blocks))
    return ElasticDepth(sub_layers, stage.depth)


def shapes(op: Op, stage: SuperBlock, inputs: Value) -> list[tuple[Value, Value, Value]]:
    """Input, inner and output channels of the residual blocks of a sub-layer."""
    width, bottleneck, expand = stage.width, stage.bottleneck, stage.expand
    assert bottleneck is not None
    if op == "XX":
        return [(inputs, bottleneck, width)]
    if op == "BL":
        return [(inputs, bottleneck, width), (width, bottleneck, width)]
    assert expand is not None
    inner = [nearest_multiple(outputs * expand, 8) for outputs in (bottleneck, width)]
    return [(inputs, inner[0], bottleneck), (bottleneck, inner[1], width)]


def _shortcut(inputs: Value, outputs: Value, stride: int, first: bool) -> nn.Module:
    if inputs == outputs and not first:
        return nn.Identity()
    projection = conv(inputs, outputs, 1, stride, act="none", bias=True)
    return projection if first else Shortcut(inputs, outputs, projection)  # the first projects whatever its widths are


def nearest_multiple(number: Value, divisor: int) -> Value:
    """The nearest multiple of a divisor, halves to even ones, but not 0."""
    times = rounded(number * (1 / divisor))
    return (times + equals(times, 0)) * divisor


class NormedExcitation(nn.Module):
    """Squeeze-and-excitation as Zen-NAS has it: batch norms in place of biases, a quarter of the channels, a sigmoid.

    forward: (n, active channels, h, w) -> the same shape
    """

    def __init__(self, channels: Value) -> None:
        super().__init__()
        inner = nearest_multiple(channels * 0.25, 1)
        self.scale = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), conv(channels, inner), conv(inner, channels, act="none"), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        """(n, active channels, h, w) -> the same shape."""
        return x * self.scale(x)
