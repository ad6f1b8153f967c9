"""MobileNetV3 as a supernet: its options and the tables of its spaces."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from attrs import Factory, field, frozen
from attrs.validators import ge, gt, lt, optional

from corenas.hookspecs import hookimpl
from corenas.space import SearchSpace
from corenas.value import Constant, Value
from corenas_mutable_slices.layouts import check_blocks, odd, positive, whole

if TYPE_CHECKING:
    from corenas_mutable_slices import Staged

Act = Literal["none", "relu", "relu6", "h_swish", "swish", "gelu"]


@frozen
class Stem:
    """The first convolution, 3x3.

    width: output channels
    stride: 2, or 1 for small images
    act: activation
    """

    width: Value = field(validator=positive)
    stride: int = field(default=2, validator=ge(1))
    act: Act = "h_swish"


@frozen
class Block:
    """What differs from block to block; where it says nothing, the stage's counts.

    kernel: size of the depthwise kernel, odd
    expand: inner channels over input channels
    """

    kernel: Value | None = field(default=None, validator=optional(odd))
    expand: Value | None = field(default=None, validator=optional(positive))


@frozen
class Stage:
    """Inverted residual blocks of one width.

    width: output channels
    kernel, expand: as in a block, for all that say nothing of their own
    blocks: one table a block, or `block`, one for all
    depth: number of blocks, at least 1; without it as many as `blocks` has, else one
    stride: of the first block
    act: activation
    se: whether blocks have squeeze-and-excitation
    """

    width: Value = field(validator=positive)
    kernel: Value | None = field(default=None, validator=optional(odd))
    expand: Value | None = field(default=None, validator=optional(positive))
    blocks: tuple[Block, ...] = ()
    depth: Value = field(default=Factory(lambda self: Constant(len(self.blocks) or 1), takes_self=True),
                         validator=whole)  # fmt: skip
    stride: int = field(default=1, validator=ge(1))
    act: Act = "relu"
    se: bool = False

    def __attrs_post_init__(self) -> None:
        check_blocks(self, ("kernel", "expand"))


@frozen
class Head:
    """What follows the last stage: a 1x1 convolution, pooling, and a 1x1 convolution without batch norm.

    expand: channels before pooling
    width: channels after it, the features that the task's head sees
    act: activation of both
    """

    expand: Value = field(validator=positive)
    width: Value = field(validator=positive)
    act: Act = "h_swish"


@frozen
class Layout:
    """The tables of a space file for this backbone.

    stem: the first convolution
    stages: the stages in order
    head: what follows them
    resolution: side of the square that images are resized to; without it they stay as they are
    """

    stem: Stem
    stages: tuple[Stage, ...]
    head: Head
    resolution: Value | None = field(default=None, validator=optional(whole))


@frozen
class MobileNetV3:
    """Inverted residual blocks with searchable kernel, expansion, depth, width and resolution.

    The supernet of Once-for-All (Cai et al. 2020, arXiv:1908.09791) on MobileNetV3 (Howard et al. 2019,
    arXiv:1905.02244); smaller kernels are the centre of larger ones.

    width_mult: factor of all widths, which are then made divisible by 8
    in_channels: channels of the images
    levels: stages, counted from 1, whose outputs are the features, for detection; without, the network's end is
    resize_mode: how images are resized to a searched resolution: "nearest", "bilinear" or "bicubic"
    """

    width_mult: float = field(default=1.0, validator=[gt(0), lt(math.inf)])
    in_channels: int = field(default=3, validator=ge(1))
    levels: tuple[int, ...] = ()
    resize_mode: Literal["nearest", "bilinear", "bicubic"] = "bilinear"

    layout = Layout

    def build(self, space: SearchSpace) -> Staged:
        """The supernet of a space; raises UserError if its tables are not those of `Layout`."""
        from corenas.options import structure
        from corenas_backbone_mobilenetv3.model import supernet

        return supernet(structure(space.tree, Layout), self)


@hookimpl
def corenas_backbones() -> dict[str, type]:
    """The backbone "mobilenetv3"."""
    return {"mobilenetv3": MobileNetV3}
