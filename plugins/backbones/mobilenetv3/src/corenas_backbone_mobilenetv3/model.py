"""MobileNetV3 and its family as a supernet: a stem, stages of inverted residual blocks, a head."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from attrs import evolve
from torch import Tensor, nn

from corenas.errors import UserError
from corenas.regularisation import DropPath
from corenas.value import Constant, Value, make_divisible, rounded
from corenas_backbone_mobilenetv3 import Excitation, kernel_and_expand
from corenas_mutable_slices import (
    Conv2dSlice,
    ConvNormAct,
    ElasticDepth,
    LinearSlice,
    MixedOp,
    Residual,
    Shortcut,
    SqueezeExcitation,
    Staged,
    activation,
)
from corenas_mutable_slices.layouts import of_block

if TYPE_CHECKING:
    from corenas_backbone_mobilenetv3 import Head, Layout, MobileNetV3, Stage


def supernet(layout: Layout, options: MobileNetV3) -> Staged:
    """The supernet of one space: (n, in_channels, h, w) -> [(n, features)], or the maps of the levels."""

    def wide(width: Value, mult: float = options.width_mult) -> Value:
        return make_divisible(width * mult, 8)

    options = evolve(
        options,
        in_channels=options.in_channels or 3,
        norm_eps=options.norm_eps or layout.norm_eps,
        resize_mode=options.resize_mode or layout.resize_mode,
    )
    width = wide(layout.stem.width)
    stem = ConvNormAct(
        options.in_channels or 3, width, 3, layout.stem.stride, act=layout.stem.act, eps=options.norm_eps
    )
    stages = []
    paths = iter(_drop_paths(layout, options))
    for number, stage in enumerate(layout.stages):
        try:
            stages.append((_stage(stage, width, wide(stage.width), options, paths), wide(stage.width)))
        except UserError as error:
            raise error.under("stages", number) from None
        width = wide(stage.width)
    head, mult = layout.head, options.width_mult
    last = {"always": mult, "up": max(mult, 1), "never": 1}[head.scale]
    before = head.expand and wide(head.expand, mult if head.width else last)
    expanded = make_divisible(rounded(width * head.ratio), 8) if head.ratio else before
    features = head.width and wide(head.width, last)
    final = _final(head, width, expanded, features, options.norm_eps), features or expanded or width
    model = Staged(stem, stages, final, options.levels, layout.resolution, options.resize_mode)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):  # fan-out of the whole layer, depthwise or not, as in OFA's code
            outputs, _, *kernel = module.weight.shape
            nn.init.normal_(module.weight, std=math.sqrt(2 / (outputs * math.prod(kernel))))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def _final(head: Head, width: Value, expanded: Value | None, features: Value | None, eps: float) -> nn.Module:
    before = [ConvNormAct(width, expanded, 1, act=head.act, eps=eps)] if expanded else []
    after = [LinearSlice(expanded or width, features, head.bias), activation(head.act)] if features else []
    return nn.Sequential(*before, nn.AdaptiveAvgPool2d(1), nn.Flatten(), *after)


def _drop_paths(layout: Layout, options: MobileNetV3) -> list[float]:
    """Return the probability of drop path of each block, in order: it grows with the blocks, as in EfficientNet."""
    depths = [stage.depth.largest for stage in layout.stages]
    stages = len(depths) if options.drop_path_stages is None else options.drop_path_stages
    first = sum(depths[: max(0, len(depths) - stages)])
    return [options.drop_path * i / sum(depths) if i >= first else 0.0 for i in range(sum(depths))]


def _stage(stage: Stage, inputs: Value, width: Value, options: MobileNetV3, paths: Iterator[float]) -> ElasticDepth:
    blocks = []
    for i in range(stage.depth.largest):
        kernel, expand, op = (of_block(stage, i, name) for name in ("kernel", "expand", "op"))
        block = functools.partial(
            inverted_residual,
            inputs,
            width,
            stride=stage.stride if i == 0 else 1,
            act=stage.act,
            se=stage.se,
            shortcut=stage.shortcut,
            eps=options.norm_eps,
            transforms=options.transforms,
            path=next(paths),
        )
        try:
            blocks.append(block(kernel=kernel, expand=expand) if op is None else _one_of(op, block))
        except UserError as error:
            raise error.under("blocks", i) from None
        inputs = width
    return ElasticDepth(blocks, stage.depth)


def _one_of(op: Value | str, block: Any) -> MixedOp:
    """One of several blocks by their names, each with weights of its own."""

    def candidate(name: str) -> nn.Module:
        said = kernel_and_expand(name)
        if said is not None:
            return block(kernel=Constant(said[0]), expand=Constant(said[1]))
        if block.keywords["stride"] > 1 or block.args[0] != block.args[1]:
            raise UserError('"skip" in a block that changes the shape of its input', key=("op",))
        return nn.Identity()

    return MixedOp.of(op, candidate)


def inverted_residual(
    inputs: Value,
    width: Value,
    kernel: Value,
    expand: Value,
    stride: int = 1,
    act: str = "relu",
    se: bool | Excitation = False,
    shortcut: str = "identity",
    eps: float = 1e-5,
    transforms: bool = False,
    path: float = 0.0,
) -> Residual:
    """1x1 expansion, depthwise convolution, squeeze-and-excitation, 1x1 projection (Sandler et al. 2018)."""
    conv = functools.partial(ConvNormAct, eps=eps)
    inner = inputs if expand == Constant(1) else make_divisible(rounded(inputs * expand), 8)
    layers: dict[str, nn.Module] = {}
    if expand != Constant(1):
        layers["expand"] = conv(inputs, inner, 1, act=act)
    layers["depthwise"] = conv(inner, inner, kernel, stride, groups="depthwise", act=act, transforms=transforms)
    if se:
        own = se if isinstance(se, Excitation) else Excitation()
        reduced = make_divisible((inner if own.of == "inner" else inputs) * own.ratio, own.divisor)
        layers["se"] = SqueezeExcitation(inner, inner=reduced, act=own.act, gate=own.gate)
    layers["project"] = conv(inner, width, 1, act="none")
    added = _shortcut(inputs, width, stride, shortcut)
    if path and added is not None:
        layers["path"] = DropPath(path)
    return Residual(layers, added)


def _shortcut(inputs: Value, width: Value, stride: int, kind: str) -> nn.Module | None:
    if kind != "none" and stride == 1 and inputs == width:
        return nn.Identity()
    if kind != "pool":
        return None
    projected = Shortcut(inputs, width, Conv2dSlice(inputs, width, 1, bias=False))
    return projected if stride == 1 else nn.Sequential(Pooled(stride), projected)


class Pooled(nn.Module):
    """The means of squares of a map; a row and a column of zeros come first where its side is odd, as in AttentiveNAS.

    stride: side of the squares
    forward: (n, c, h, w) -> (n, c, ceil(h / stride), ceil(w / stride))
    """

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) -> (n, c, ceil(h / stride), ceil(w / stride))."""
        left, top = -x.shape[-1] % self.stride, -x.shape[-2] % self.stride
        return F.avg_pool2d(F.pad(x, (left, 0, top, 0)), self.stride)
