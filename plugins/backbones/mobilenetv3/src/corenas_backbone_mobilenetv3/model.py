"""MobileNetV3 as a supernet: a stem, stages of inverted residual blocks, a head."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import nn

from corenas.value import Constant, Value, make_divisible, rounded
from corenas_mutable_slices import (
    Conv2dSlice,
    ConvNormAct,
    ElasticDepth,
    InputResize,
    Residual,
    SqueezeExcitation,
    Staged,
    activation,
)
from corenas_mutable_slices.layouts import of_block

if TYPE_CHECKING:
    from corenas_backbone_mobilenetv3 import Layout, MobileNetV3, Stage


def supernet(layout: Layout, options: MobileNetV3) -> Staged:
    """The supernet of one space: (n, in_channels, h, w) -> [(n, head width, 1, 1)]."""

    def wide(width: Value) -> Value:
        return make_divisible(width * options.width_mult, 8)

    resize = None if layout.resolution is None else InputResize(layout.resolution, options.resize_mode)
    width = wide(layout.stem.width)
    stem = ConvNormAct(options.in_channels, width, 3, layout.stem.stride, act=layout.stem.act)
    stages = []
    for stage in layout.stages:
        stages.append((_stage(stage, width, wide(stage.width)), wide(stage.width)))
        width = wide(stage.width)
    head = layout.head
    expanded, features = wide(head.expand), wide(head.width)
    final = nn.Sequential(
        ConvNormAct(width, expanded, 1, act=head.act),
        nn.AdaptiveAvgPool2d(1),
        Conv2dSlice(expanded, features, 1, bias=False),
        activation(head.act),
    )
    model = Staged(stem, stages, (final, features), options.levels, resize)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):  # fan-out of the whole layer, depthwise or not, as in Once-for-All's code
            taps = math.prod(module.kernel_size)
            nn.init.normal_(module.weight, std=math.sqrt(2 / (taps * module.out_channels)))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def _stage(stage: Stage, inputs: Value, width: Value) -> ElasticDepth:
    blocks = []
    for i in range(stage.depth.largest):
        kernel, expand = (of_block(stage, i, name) for name in ("kernel", "expand"))
        blocks.append(
            inverted_residual(inputs, width, kernel, expand, stage.stride if i == 0 else 1, stage.act, stage.se)
        )
        inputs = width
    return ElasticDepth(blocks, stage.depth)


def inverted_residual(
    inputs: Value,
    width: Value,
    kernel: Value,
    expand: Value,
    stride: int = 1,
    act: str = "relu",
    se: bool = False,
) -> Residual:
    """1x1 expansion, depthwise convolution, squeeze-and-excitation, 1x1 projection (Sandler et al. 2018)."""
    inner = inputs if expand == Constant(1) else make_divisible(rounded(inputs * expand), 8)
    layers: dict[str, nn.Module] = {}
    if expand != Constant(1):
        layers["expand"] = ConvNormAct(inputs, inner, 1, act=act)
    layers["depthwise"] = ConvNormAct(inner, inner, kernel, stride, groups="depthwise", act=act)
    if se:
        layers["se"] = SqueezeExcitation(inner)
    layers["project"] = ConvNormAct(inner, width, 1, act="none")
    return Residual(layers, nn.Identity() if stride == 1 and inputs == width else None)
