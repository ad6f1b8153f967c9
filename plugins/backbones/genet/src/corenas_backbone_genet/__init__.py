"""GENet as a supernet: its options and the tables of its spaces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from attrs import field, frozen
from attrs.validators import ge, optional

from corenas.contracts import Surroundings
from corenas.errors import UserError
from corenas.hookspecs import hookimpl
from corenas.space import SearchSpace
from corenas.value import Constant, Value, as_value
from corenas_mutable_slices.layouts import (
    PooledHead,
    ResizeMode,
    Sides,
    check_blocks,
    depth_of_blocks,
    idle_resize,
    odd,
    of_block,
    one_of,
    positive,
    resolution_field,
    stride_field,
    whole,
)

if TYPE_CHECKING:
    from corenas_mutable_slices import Staged

RATIOS: Mapping[Any, float] = {"XX": 1, "BL": 0.25, "DW": 3}
"""The types of blocks, each with its inner over its output channels in the paper."""

Op = Literal["XX", "BL", "DW"]


@frozen
class Stem:
    """The first convolution.

    width: output channels
    kernel: its size, odd
    stride: 2, or 1 for small images
    """

    width: Value = field(validator=whole)
    kernel: Value = field(default=Constant(3), validator=odd)
    stride: int = stride_field(2)


@frozen
class Block:
    """What differs from block to block; where it says nothing, the stage's counts.

    op: its type: "XX", two full convolutions; "BL", a bottleneck around one; "DW", the same around a depthwise one
    kernel: size of the convolutions that are not 1x1, odd
    ratio: inner over output channels; without it 1 of "XX", 0.25 of "BL", 3 of "DW"
    """

    op: Value | Op | None = field(default=None, validator=optional(one_of(RATIOS)))
    kernel: Value | None = field(default=None, validator=optional(odd))
    ratio: Value | None = field(default=None, validator=optional(positive))


@frozen
class Stage:
    """Blocks of one width: a super-block of the paper.

    width: output channels
    op, kernel, ratio: as in a block, for all that say nothing of their own
    blocks: one table a block, or `block`, one for all
    depth: number of blocks, at least 1; without it as many as `blocks` has, else one
    stride: of the first block
    """

    width: Value = field(validator=whole)
    op: Value | Op | None = field(default=None, validator=optional(one_of(RATIOS)))
    kernel: Value = field(default=Constant(3), validator=odd)
    ratio: Value | None = field(default=None, validator=optional(positive))
    blocks: tuple[Block, ...] = ()
    depth: Value = depth_of_blocks()
    stride: int = stride_field(1)

    def __attrs_post_init__(self) -> None:
        check_blocks(self, ("op",))
        for i in range(self.depth.largest):
            for op in as_value(of_block(self, i, "op")).possible:
                narrowest = self.width.possible[0] * self.ratio_of(i, op).possible[0]
                if round(narrowest) < 1:
                    raise UserError(f"a block of type {op} would have {narrowest:g} inner channels", key=("ratio",))

    def ratio_of(self, i: int, op: Op) -> Value:
        """Inner over output channels of the i-th block, if it is of a type."""
        own = of_block(self, i, "ratio")
        return Constant(RATIOS[op]) if own is None else own


@frozen
class Layout:
    """The tables of a space file for this backbone.

    stem: the first convolution
    stages: the stages in order
    head: what follows them
    resolution: side of the square that images are resized to, or a table of `height`, `width` and `scale`; without it
        they stay as they are
    """

    stem: Stem
    stages: tuple[Stage, ...]
    head: PooledHead
    resolution: Value | Sides | None = resolution_field()


@frozen
class GENet:
    """Full convolutions, bottlenecks and depthwise blocks with searchable type, width, depth, kernel and ratio.

    The GPU-efficient networks of Lin et al. 2020 (arXiv:2006.14090): full convolutions in the early stages, depthwise
    ones in the late. Smaller kernels are the centre of larger ones.

    in_channels: channels of the images; left out, those of the task's (3 without a task)
    levels: stages, counted from 1, whose outputs are the features, for detection; without, the network's end is
    resize_mode: how images are resized to a searched resolution: "nearest", "bilinear" or "bicubic"
    """

    in_channels: int | None = field(default=None, validator=optional(ge(1)))
    levels: tuple[int, ...] = ()
    resize_mode: ResizeMode = "bilinear"

    layout = Layout
    example: ClassVar[Mapping[str, Any]] = {
        "backbone": {"in_channels": 1},
        "space": {
            "stem": {"width": [8, 13]},
            "stages": [
                {"op": "XX", "width": [16, 24], "depth": [1, 2], "block": {"kernel": [3, 5]}},
                {"op": ["XX", "BL"], "width": [24, 32], "depth": [1, 2, 3], "stride": 2},
                {"op": "DW", "width": [32, 48], "depth": [1, 2], "stride": 2, "kernel": [3, 5], "ratio": [2, 3]},
            ],
            "head": {"width": 96},
        },
    }

    def idle(self, around: Surroundings) -> Mapping[str, str]:
        """Return options that do nothing beside the others, or in a space, and why."""
        return idle_resize(around.space)

    def build(self, space: SearchSpace) -> Staged:
        """The supernet of a space; raises UserError if its tables are not those of `Layout`."""
        from corenas.options import structure
        from corenas_backbone_genet.model import supernet

        return supernet(structure(space.tree, Layout), self)


@hookimpl
def corenas_backbones() -> dict[str, type]:
    """The backbone "genet"."""
    return {"genet": GENet}
