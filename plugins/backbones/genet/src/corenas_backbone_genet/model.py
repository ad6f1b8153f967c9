"""GENet as a supernet: a stem, stages of XX, BL and DW blocks, a head."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from corenas.value import Value, as_value, rounded
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
from corenas_mutable_slices.layouts import of_block

if TYPE_CHECKING:
    from corenas_backbone_genet import GENet, Layout, Op, Stage


def supernet(layout: Layout, options: GENet) -> Staged:
    """The supernet of one space: (n, in_channels, h, w) -> [(n, head width, 1, 1)].

    Weights are drawn as torch draws them, as in the reference code.
    """
    width = layout.stem.width
    stem = ConvNormAct(options.in_channels or 3, width, layout.stem.kernel, layout.stem.stride)
    stages = []
    for stage in layout.stages:
        stages.append((_stage(stage, width), stage.width))
        width = stage.width
    final = nn.Sequential(ConvNormAct(width, layout.head.width), nn.AdaptiveAvgPool2d(1))
    return Staged(stem, stages, (final, layout.head.width), options.levels, layout.resolution, options.resize_mode)


def _stage(stage: Stage, inputs: Value) -> ElasticDepth:
    blocks = []
    for i in range(stage.depth.largest):
        kernel, op = of_block(stage, i, "kernel"), as_value(of_block(stage, i, "op"))
        stride = stage.stride if i == 0 else 1
        of_type = {
            name: block(name, inputs, stage.width, kernel, stage.ratio_of(i, name), stride) for name in op.possible
        }
        blocks.append(MixedOp(of_type, op) if op.keys else of_type[op.largest])
        inputs = stage.width
    return ElasticDepth(blocks, stage.depth)


def block(op: Op, inputs: Value, width: Value, kernel: Value, ratio: Value, stride: int = 1) -> Residual:
    """A block of one type (Lin et al. 2020): two convolutions, or one between two of 1x1; a ReLU at the end.

    forward: (n, inputs, h, w) -> (n, width, ceil(h / stride), ceil(w / stride))
    """
    inner = rounded(width * ratio)
    if op == "XX":
        layers = basic_layers(inputs, inner, width, kernel, stride)
    else:
        layers = bottleneck_layers(inputs, inner, width, kernel, stride, "depthwise" if op == "DW" else 1)
    projection = ConvNormAct(inputs, width, 1, stride, act="none")
    return Residual(layers, Shortcut(inputs, width, projection, always=stride > 1), act="relu")
