"""ResNet as a supernet: a stem, stages of basic or bottleneck blocks, pooling."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from torch import nn

from corenas.value import Value
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
    from corenas_backbone_resnet import Blocks, Layout, ResNet, Stem


def supernet(layout: Layout, options: ResNet) -> Staged:
    """The supernet of one space: (n, in_channels, h, w) -> [(n, width of the last stage, 1, 1)]."""
    pool = layout.shortcut == "pool"
    inputs, stages = layout.stem.width, []
    for stage in layout.stages:
        kinds = {kind: _blocks(kind, own, inputs, stage.stride, pool) for kind, own in stage.kinds.items()}
        stages.append((MixedOp(kinds, stage.choice), stage.width))
        inputs = stage.width
    stem, final = _stem(layout.stem, options.in_channels or 3), (nn.AdaptiveAvgPool2d(1), inputs)
    model = Staged(stem, stages, final, options.levels, layout.resolution, options.resize_mode)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def _stem(stem: Stem, channels: int) -> nn.Sequential:
    layers: dict[str, nn.Module] = {"first": ConvNormAct(channels, stem.inner or stem.width, stem.kernel, stem.stride)}
    if stem.inner is not None:
        past = nn.Identity() if stem.shortcut else None
        middle = [Residual({"conv": ConvNormAct(stem.inner, stem.inner, 3)}, past) for _ in range(stem.depth.largest)]
        layers |= {"middle": ElasticDepth(middle, stem.depth), "last": ConvNormAct(stem.inner, stem.width, 3)}
    if stem.pool:
        layers["pool"] = nn.MaxPool2d(3, stride=2, padding=1)
    return nn.Sequential(OrderedDict(layers))


def _blocks(kind: str, stage: Blocks, inputs: Value, stride: int, pool: bool) -> ElasticDepth:
    blocks = []
    for i in range(stage.depth.largest):
        kernel, inner = of_block(stage, i, "kernel"), stage.inner(i)
        if kind == "basic":
            layers = basic_layers(inputs, inner, stage.width, kernel, stride)
        else:
            groups = stage.groups if stage.groups.keys else stage.groups.largest
            layers = bottleneck_layers(inputs, inner, stage.width, kernel, stride, groups)
        blocks.append(Residual(layers, shortcut(inputs, stage.width, stride, pool), act="relu"))
        inputs, stride = stage.width, 1
    return ElasticDepth(blocks, stage.depth)


def shortcut(inputs: Value, width: Value, stride: int, pool: bool) -> Shortcut:
    """The input, where width or size change through a 1x1 convolution; with `pool` average pooling strides."""
    if not pool or stride == 1:
        projection = ConvNormAct(inputs, width, 1, stride, act="none")
    else:
        pooling = nn.AvgPool2d(stride, ceil_mode=True)
        projection = nn.Sequential(OrderedDict(pool=pooling, conv=ConvNormAct(inputs, width, act="none")))
    return Shortcut(inputs, width, projection, always=stride > 1)
