"""MobileNetV3 as a supernet: its options and the tables of its spaces."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from attrs import Factory, field, frozen
from attrs.validators import ge, gt, lt, optional

from corenas.errors import Fault, UserError
from corenas.hookspecs import hookimpl
from corenas.space import SearchSpace
from corenas.value import Constant, Value

if TYPE_CHECKING:
    from corenas_backbone_mobilenetv3.model import MobileNetV3Supernet

Act = Literal["none", "relu", "relu6", "h_swish", "swish", "gelu"]


def _each(test: Callable[[Any], bool], expected: str) -> Callable[[Any, Any, Value], None]:
    """A validator: every number that a value can be passes a test."""

    def validator(instance: object, attribute: object, value: Value) -> None:
        wrong = [n for n in value.possible if isinstance(n, str | bool) or not test(n)]
        if wrong:
            raise ValueError(f"expected {expected}, found {wrong[0]!r}")

    return validator


_positive = _each(lambda n: n > 0, "numbers above 0")
_whole = _each(lambda n: isinstance(n, int) and n >= 1, "whole numbers of at least 1")
_odd = _each(lambda n: isinstance(n, int) and n >= 1 and n % 2 == 1, "odd whole numbers of at least 1")


@frozen
class Stem:
    """The first convolution, 3x3.

    width: output channels
    stride: 2, or 1 for small images
    act: activation
    """

    width: Value = field(validator=_positive)
    stride: int = field(default=2, validator=ge(1))
    act: Act = "h_swish"


@frozen
class Block:
    """What differs from block to block; where it says nothing, the stage's counts.

    kernel: size of the depthwise kernel, odd
    expand: inner channels over input channels
    """

    kernel: Value | None = field(default=None, validator=optional(_odd))
    expand: Value | None = field(default=None, validator=optional(_positive))


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

    width: Value = field(validator=_positive)
    kernel: Value | None = field(default=None, validator=optional(_odd))
    expand: Value | None = field(default=None, validator=optional(_positive))
    blocks: tuple[Block, ...] = ()
    depth: Value = field(default=Factory(lambda self: Constant(len(self.blocks) or 1), takes_self=True),
                         validator=_whole)  # fmt: skip
    stride: int = field(default=1, validator=ge(1))
    act: Act = "relu"
    se: bool = False

    def __attrs_post_init__(self) -> None:
        reach = self.depth.largest
        if self.blocks and len(self.blocks) < reach:
            raise UserError(f"{len(self.blocks)} blocks, but depth reaches {reach}", key=("blocks",))
        blocks = self.blocks[:reach] or (Block(),)
        own = [name for name in ("kernel", "expand") if getattr(self, name) is None]
        missing = [name for name in own if any(getattr(block, name) is None for block in blocks)]
        if missing:
            hint = "say it once for the stage, or in `block` or `blocks`"
            raise UserError(faults=[Fault(f"neither the stage nor each of its blocks has {name!r}", hint=hint)
                                    for name in missing])  # fmt: skip


@frozen
class Head:
    """What follows the last stage: a 1x1 convolution, pooling, and a 1x1 convolution without batch norm.

    expand: channels before pooling
    width: channels after it, the features that the task's head sees
    act: activation of both
    """

    expand: Value = field(validator=_positive)
    width: Value = field(validator=_positive)
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
    resolution: Value | None = field(default=None, validator=optional(_whole))


@frozen
class MobileNetV3:
    """Inverted residual blocks with searchable kernel, expansion, depth, width and resolution.

    The supernet of Once-for-All (Cai et al. 2020, arXiv:1908.09791) on MobileNetV3 (Howard et al. 2019,
    arXiv:1905.02244); smaller kernels are the centre of larger ones.

    width_mult: factor of all widths, which are then made divisible by 8
    in_channels: channels of the images
    resize_mode: how images are resized to a searched resolution: "nearest", "bilinear" or "bicubic"
    """

    width_mult: float = field(default=1.0, validator=[gt(0), lt(math.inf)])
    in_channels: int = field(default=3, validator=ge(1))
    resize_mode: Literal["nearest", "bilinear", "bicubic"] = "bilinear"

    layout = Layout

    def build(self, space: SearchSpace) -> MobileNetV3Supernet:
        """The supernet of a space; raises UserError if its tables are not those of `Layout`."""
        from corenas.options import structure
        from corenas_backbone_mobilenetv3.model import MobileNetV3Supernet

        return MobileNetV3Supernet(structure(space.tree, Layout), self)


@hookimpl
def corenas_backbones() -> dict[str, type]:
    """The backbone "mobilenetv3"."""
    return {"mobilenetv3": MobileNetV3}
