"""ShuffleNetV2 as a supernet: its options and the tables of its spaces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from attrs import field, frozen
from attrs.validators import ge, optional

from corenas.contracts import Surroundings
from corenas.errors import Fault, UserError, raise_if_any
from corenas.hookspecs import hookimpl
from corenas.space import SearchSpace
from corenas.value import Constant, Value
from corenas_mutable_slices.layouts import (
    PooledHead,
    ResizeMode,
    Sides,
    check_blocks,
    depth_of_blocks,
    idle_resize,
    of_block,
    one_of,
    positive,
    resolution_field,
    stride_field,
)

if TYPE_CHECKING:
    from corenas_mutable_slices import Staged

Op = Literal["shuffle_3x3", "shuffle_5x5", "shuffle_7x7", "shuffle_xception"]


def _even(instance: object, attribute: object, width: int) -> None:
    if width < 2 or width % 2:
        raise ValueError(f"expected an even number of at least 2, as blocks split their channels, found {width}")


@frozen
class Stem:
    """The first convolution, 3x3.

    width: output channels
    stride: 2, or 1 for small images
    pool: whether 3x3 max pooling of stride 2 follows, as in ShuffleNetV2; SPOS's networks have none
    """

    width: int = field(validator=ge(1))
    stride: int = stride_field(2)
    pool: bool = False


@frozen
class Block:
    """What differs from block to block; where it says nothing, the stage's counts.

    op: what the block computes: "shuffle_3x3", "shuffle_5x5", "shuffle_7x7" or "shuffle_xception"
    ratio: inner channels over half of the stage's width
    """

    op: Value | Op | None = field(default=None, validator=optional(one_of(get_args(Op))))
    ratio: Value | None = field(default=None, validator=optional(positive))


@frozen
class Stage:
    """Blocks of one width. The first projects its input, the others pass half of their channels on as they are.

    width: output channels, even
    op, ratio: as in a block, for all that say nothing of their own
    blocks: one table a block, or `block`, one for all
    depth: number of blocks, at least 1; without it as many as `blocks` has, else one
    stride: of the first block
    projection: how many of the first block's output channels come from its second branch, which projects the input;
        without it as many as the input has, and if the block changes nothing in shape it is one like the others
    """

    width: int = field(validator=_even)
    op: Value | Op | None = field(default=None, validator=optional(one_of(get_args(Op))))
    ratio: Value = field(default=Constant(1), validator=positive)
    blocks: tuple[Block, ...] = ()
    depth: Value = depth_of_blocks()
    stride: int = stride_field(2)
    projection: int | None = field(default=None, validator=optional(ge(1)))

    def __attrs_post_init__(self) -> None:
        check_blocks(self, ("op",))
        smallest = min(of_block(self, i, "ratio").possible[0] for i in range(self.depth.largest))
        if smallest * (self.width // 2) < 1:
            raise UserError(f"{smallest:g} of {self.width // 2} channels is less than one", key=("ratio",))

    def projected(self, inputs: int) -> int | None:
        """How many channels the first block projects, None if it splits them instead."""
        keeps_the_shape = (self.stride, self.width) == (1, inputs)
        return self.projection or (None if keeps_the_shape else inputs)


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

    def __attrs_post_init__(self) -> None:
        inputs, faults = self.stem.width, []
        for i, stage in enumerate(self.stages):
            projected = stage.projected(inputs)
            if projected and projected >= stage.width:
                text = f"{projected} channels are projected, none of {stage.width} is left for the first block's layers"
                faults.append(Fault(text, key=("stages", i)))
            inputs = stage.width
        raise_if_any(faults)


@frozen
class ShuffleNetV2:
    """Blocks that split and shuffle their channels, with searchable operation, inner width, depth and resolution.

    The space of Single Path One-Shot (Guo et al. 2020, arXiv:1904.00420) on ShuffleNetV2 (Ma et al. 2018,
    arXiv:1807.11164). Each choice has weights of its own; of fewer inner channels the first ones are active.

    in_channels: channels of the images; left out, those of the task's (3 without a task)
    norm_affine: whether batch norms have weights and biases; SPOS's supernet has none, its retrained networks have
    levels: stages, counted from 1, whose outputs are the features, for detection; without, the network's end is
    resize_mode: how images are resized to a searched resolution: "nearest", "bilinear" or "bicubic"
    """

    in_channels: int | None = field(default=None, validator=optional(ge(1)))
    norm_affine: bool = True
    levels: tuple[int, ...] = ()
    resize_mode: ResizeMode = "bilinear"

    layout = Layout
    example: ClassVar[Mapping[str, Any]] = {
        "backbone": {"in_channels": 1},
        "space": {
            "stem": {"width": 8},
            "stages": [
                {
                    "width": 24,
                    "depth": [1, 2],
                    "block": {"op": ["shuffle_3x3", "shuffle_5x5"], "ratio": [0.5, 1.0]},
                },
                {
                    "width": 48,
                    "depth": [2, 3],
                    "block": {"op": ["shuffle_3x3", "shuffle_xception"], "ratio": [1.0, 1.5]},
                },
            ],
            "head": {"width": [64, 96]},
        },
    }

    def idle(self, around: Surroundings) -> Mapping[str, str]:
        """Return options that do nothing beside the others, or in a space, and why."""
        return idle_resize(around.space)

    def build(self, space: SearchSpace) -> Staged:
        """The supernet of a space; raises UserError if its tables are not those of `Layout`."""
        from corenas.options import structure
        from corenas_backbone_shufflenetv2.model import supernet

        return supernet(structure(space.tree, Layout), self)


@hookimpl
def corenas_backbones() -> dict[str, type]:
    """The backbone "shufflenetv2"."""
    return {"shufflenetv2": ShuffleNetV2}
