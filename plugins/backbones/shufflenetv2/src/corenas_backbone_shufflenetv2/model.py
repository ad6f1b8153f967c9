"""ShuffleNetV2 as a supernet: a stem, stages of choice blocks that shuffle their channels, a head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from corenas.value import Value, rounded
from corenas_mutable_slices import ConvNormAct, ElasticDepth, MixedOp, Staged
from corenas_mutable_slices.layouts import of_block

if TYPE_CHECKING:
    from corenas_backbone_shufflenetv2 import Layout, Op, ShuffleNetV2, Stage

KERNELS = {"shuffle_3x3": 3, "shuffle_5x5": 5, "shuffle_7x7": 7, "shuffle_xception": 3}


def supernet(layout: Layout, options: ShuffleNetV2) -> Staged:
    """The supernet of one space: (n, in_channels, h, w) -> [(n, head width, 1, 1)]."""
    width = layout.stem.width
    first = ConvNormAct(options.in_channels or 3, width, 3, layout.stem.stride)
    stem = nn.Sequential(first, nn.MaxPool2d(3, 2, 1)) if layout.stem.pool else first
    stages = []
    for stage in layout.stages:
        stages.append((_stage(stage, width), stage.width))
        width = stage.width
    final = nn.Sequential(ConvNormAct(width, layout.head.width), nn.AdaptiveAvgPool2d(1))
    model = Staged(stem, stages, (final, layout.head.width), options.levels, layout.resolution, options.resize_mode)
    for module in model.modules():  # all as in SPOS's code
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=1 / module.weight.shape[1])
        elif isinstance(module, nn.BatchNorm2d) and options.norm_affine:
            nn.init.constant_(module.bias, 1e-4)
        elif isinstance(module, nn.BatchNorm2d):
            module.affine = False
            module.register_parameter("weight", None)
            module.register_parameter("bias", None)
    nn.init.normal_(first.conv.weight, std=0.01)
    return model


def _stage(stage: Stage, inputs: int) -> ElasticDepth:
    blocks = []
    for i in range(stage.depth.largest):
        op, ratio = (of_block(stage, i, name) for name in ("op", "ratio"))
        inner = rounded(ratio * (stage.width // 2) // 1)  # cut off, as by `int` in SPOS's code
        projected = stage.projected(inputs) if i == 0 else None
        blocks.append(_block(op, inputs, stage.width, inner, projected, stage.stride))
        inputs = stage.width
    return ElasticDepth(blocks, stage.depth)


def _block(op: Value | Op, inputs: int, width: int, inner: Value, projected: int | None, stride: int) -> ShuffleBlock:
    if projected is None:
        return ShuffleBlock(MixedOp.of(op, lambda name: layers(name, width // 2, inner, width // 2)))
    return ShuffleBlock(
        MixedOp.of(op, lambda name: layers(name, inputs, inner, width - projected, stride)),
        MixedOp.of(op, lambda name: projection(name, inputs, projected, stride)),
    )


class ShuffleBlock(nn.Module):
    """Splits its channels by a shuffle: the even ones pass, the odd ones go through layers; concatenates the two.

    Where there is a projection all channels go both through the layers and through a projection. (ShuffleNetV2's code
    shuffles after the concatenation instead: the same functions, with channels in another order.)

    forward: (n, width, h, w), or (n, inputs, h, w) if there is a projection -> (n, width, h', w')
    """

    def __init__(self, layers: nn.Module, projection: nn.Module | None = None) -> None:
        super().__init__()
        self.projected = projection is not None
        if self.projected:
            self.projection = projection
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, h, w) -> (n, width, h', w')."""
        if self.projected:
            return torch.cat((self.projection(x), self.layers(x)), 1)
        # Strided views, in whatever memory format: only what the convolution and the concatenation copy is copied.
        return torch.cat((x[:, ::2], self.layers(x[:, 1::2])), 1)


def layers(op: str, inputs: int, inner: Value, outputs: int, stride: int = 1) -> nn.Sequential:
    """What the other half of the channels goes through: 1x1, depthwise, 1x1; or three times depthwise, 1x1."""
    kernel = KERNELS[op]
    if op == "shuffle_xception":
        return nn.Sequential(
            *separable(inputs, inner, kernel, stride),
            *separable(inner, inner, kernel),
            *separable(inner, outputs, kernel),
        )
    return nn.Sequential(ConvNormAct(inputs, inner), *separable(inner, outputs, kernel, stride))


def projection(op: str, inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """The second branch of a block that changes the shape: depthwise, 1x1."""
    return nn.Sequential(*separable(inputs, outputs, KERNELS[op], stride))


def separable(
    inputs: Value | int, outputs: Value | int, kernel: int, stride: int = 1
) -> tuple[ConvNormAct, ConvNormAct]:
    """A depthwise convolution, which has no activation, and a 1x1 convolution."""
    return (
        ConvNormAct(inputs, inputs, kernel, stride, groups="depthwise", act="none"),
        ConvNormAct(inputs, outputs),
    )
