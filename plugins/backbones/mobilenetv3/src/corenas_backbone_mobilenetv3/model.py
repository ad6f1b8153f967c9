"""MobileNetV3 as a supernet: a stem, stages of inverted residual blocks, a head."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor, nn

from corenas.value import Constant, Dimension, Value, make_divisible, rounded
from corenas_mutable_slices import (
    Conv2dSlice,
    ConvNormAct,
    ElasticDepth,
    InputResize,
    SqueezeExcitation,
    activation,
)

if TYPE_CHECKING:
    from corenas_backbone_mobilenetv3 import Layout, MobileNetV3, Stage


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise convolution, squeeze-and-excitation, 1x1 projection (Sandler et al. 2018).

    forward: (n, active inputs, h, w) -> (n, active width, ceil(h / stride), ceil(w / stride))
    """

    def __init__(
        self,
        inputs: Value,
        width: Value,
        kernel: Value,
        expand: Value,
        stride: int = 1,
        act: str = "relu",
        se: bool = False,
    ) -> None:
        super().__init__()
        inner = inputs if expand == Constant(1) else make_divisible(rounded(inputs * expand), 8)
        if expand != Constant(1):
            self.expand = ConvNormAct(inputs, inner, 1, act=act)
        self.depthwise = ConvNormAct(inner, inner, kernel, stride, groups="depthwise", act=act)
        if se:
            self.se = SqueezeExcitation(inner)
        self.project = ConvNormAct(inner, width, 1, act="none")
        self.residual = stride == 1 and inputs == width

    def forward(self, x: Tensor) -> Tensor:
        """(n, active inputs, h, w) -> (n, active width, ceil(h / stride), ceil(w / stride))."""
        y = x
        for layer in self.children():
            y = layer(y)
        return x + y if self.residual else y

    def zero_init_last(self) -> None:
        """Start as the identity where there is a shortcut: the last batch norm's weight at zero."""
        if self.residual:
            nn.init.zeros_(self.project.norm.weight)


class MobileNetV3Supernet(nn.Module):
    """The supernet of one space.

    features: (n, in_channels, h, w) -> [(n, head width, 1, 1)]
    """

    def __init__(self, layout: Layout, options: MobileNetV3) -> None:
        super().__init__()

        def wide(width: Value) -> Value:
            return make_divisible(width * options.width_mult, 8)

        if layout.resolution is not None:
            self.resize = InputResize(layout.resolution, options.resize_mode)
        width = wide(layout.stem.width)
        self.stem = ConvNormAct(options.in_channels, width, 3, layout.stem.stride, act=layout.stem.act)
        stages = []
        for stage in layout.stages:
            stages.append(_stage(stage, width, wide(stage.width)))
            width = wide(stage.width)
        self.stages = nn.Sequential(*stages)
        head = layout.head
        self.final = ConvNormAct(width, wide(head.expand), 1, act=head.act)
        self.mix = Conv2dSlice(wide(head.expand), wide(head.width), 1, bias=False)
        self.mix_act = activation(head.act)
        self.feat_dims = [Dimension.of(wide(head.width))]
        self.segments = [self.stem, *self.stages, self.final]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # fan-out of the whole layer, depthwise or not, as in Once-for-All's code
                taps = math.prod(module.kernel_size)
                nn.init.normal_(module.weight, std=math.sqrt(2 / (taps * module.out_channels)))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def features(self, x: Tensor) -> list[Tensor]:
        """(n, in_channels, h, w) -> [(n, head width, 1, 1)]."""
        if hasattr(self, "resize"):
            x = self.resize(x)
        x = self.final(self.stages(self.stem(x)))
        return [self.mix_act(self.mix(x.mean((2, 3), keepdim=True)))]


def _stage(stage: Stage, inputs: Value, width: Value) -> ElasticDepth:
    blocks = []
    for i in range(stage.depth.largest):
        own = stage.blocks[i] if stage.blocks else stage
        kernel = stage.kernel if own.kernel is None else own.kernel
        expand = stage.expand if own.expand is None else own.expand
        assert kernel is not None  # `Stage` sees to it
        assert expand is not None
        stride = stage.stride if i == 0 else 1
        blocks.append(InvertedResidual(inputs, width, kernel, expand, stride, stage.act, stage.se))
        inputs = width
    return ElasticDepth(blocks, stage.depth)
