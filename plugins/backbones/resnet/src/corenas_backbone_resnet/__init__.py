"""ResNet as a supernet: its options and the tables of its spaces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from attrs import field, frozen
from attrs.validators import ge, optional

from corenas.contracts import Surroundings
from corenas.errors import UserError
from corenas.hookspecs import hookimpl
from corenas.space import SearchSpace
from corenas.value import Constant, Value, as_value, equals, make_divisible, rounded
from corenas_mutable_slices.layouts import (
    ResizeMode,
    Sides,
    check_blocks,
    depth_of_blocks,
    each,
    idle_resize,
    odd,
    of_block,
    positive,
    resolution_field,
    stride_field,
    whole,
)

if TYPE_CHECKING:
    from torch import nn

    from corenas_mutable_slices import Staged

Kind = Literal["basic", "bottleneck"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@frozen
class Stem:
    """What comes before the stages: one convolution, or several 3x3 ones as in ResNet-D, and max pooling.

    width: output channels
    kernel: of the first convolution, odd
    stride: of the first convolution, 1 for small images
    inner: channels of all convolutions but the last; without it there is one convolution alone
    depth: where there is `inner`, the number of convolutions between the first and the last
    shortcut: whether each of those has one past it, as in Once-for-All; ResNet-D's have none
    pool: whether max pooling, 3x3 with stride 2, follows
    """

    width: Value = field(validator=whole)
    kernel: Value = field(default=Constant(7), validator=odd)
    stride: int = stride_field(2)
    inner: Value | None = field(default=None, validator=optional(whole))
    depth: Value = field(default=Constant(0), validator=each(lambda n: isinstance(n, int) and n >= 0, "whole numbers"))
    shortcut: bool = True
    pool: bool = True

    def __attrs_post_init__(self) -> None:
        if self.inner is None and self.depth != Constant(0):
            raise UserError("a stem of one convolution has no `depth`", key=("depth",), hint="say `inner` beside it")


@frozen
class Block:
    """What differs from block to block; where it says nothing, the stage's counts.

    kernel: size of the kernels that are not 1x1, odd
    ratio: inner over output channels
    """

    kernel: Value | None = field(default=None, validator=optional(odd))
    ratio: Value | None = field(default=None, validator=optional(positive))


@frozen
class Blocks:
    """The blocks of a stage, all of one kind and width.

    width: output channels
    kernel, ratio: as in a block, for all that say nothing of their own; kernels are 3x3 where nobody says anything
    groups: of the convolution between a bottleneck's 1x1 ones (Xie et al. 2017, arXiv:1611.05431)
    blocks: one table a block, or `block`, one for all
    depth: number of blocks, at least 1; without it as many as `blocks` has, else one
    """

    width: Value = field(validator=whole)
    kernel: Value = field(default=Constant(3), validator=odd)
    ratio: Value | None = field(default=None, validator=optional(positive))
    groups: Value = field(default=Constant(1), validator=whole)
    blocks: tuple[Block, ...] = ()
    depth: Value = depth_of_blocks()

    def __attrs_post_init__(self) -> None:
        check_blocks(self, ("ratio",))
        for inner in map(self.inner, range(self.depth.largest)):
            if any((inner - inner // self.groups * self.groups).possible):
                text = f"inner channels can be {[*inner.possible]}, groups {[*self.groups.possible]}"
                raise UserError(text, key=("groups",), hint="groups are of equal size, whatever is chosen")

    def inner(self, i: int) -> Value:
        """The inner channels of the i-th block."""
        return make_divisible(rounded(self.width * of_block(self, i, "ratio")), 8)


@frozen
class Stage:
    """Residual blocks of one of two kinds; which of them, can be searched.

    op: "basic" or "bottleneck", needed where there are tables for both
    basic: blocks of two convolutions
    bottleneck: blocks of a convolution between two 1x1 ones
    stride: of the first block
    """

    op: Value | Kind | None = None
    basic: Blocks | None = None
    bottleneck: Blocks | None = None
    stride: int = stride_field(1)

    def __attrs_post_init__(self) -> None:
        if self.basic is not None and self.basic.groups != Constant(1):
            raise UserError("the convolutions of basic blocks have no groups", key=("basic", "groups"))
        tables = [kind for kind in KINDS if getattr(self, kind) is not None]
        if not {*self.choice.possible} <= {*tables} or (self.op is None and len(tables) > 1):
            text = f"the stage has {' and '.join(tables) or 'no'} blocks"
            names = f": {', '.join(map(str, self.choice.possible))}" if self.op is not None else ""
            raise UserError(text, key=("op",), hint=f"each choice of `op` needs a table of its name{names}")

    @property
    def choice(self) -> Value:
        """The kind that is chosen."""
        return as_value(self.op or ("basic" if self.bottleneck is None else "bottleneck"))

    @property
    def kinds(self) -> Mapping[str, Blocks]:
        """The blocks of each kind that can be chosen."""
        return {kind: getattr(self, kind) for kind in self.choice.possible}

    @property
    def width(self) -> Value:
        """Output channels of the kind that is chosen."""
        widths = [(equals(self.choice, kind), blocks.width) for kind, blocks in self.kinds.items()]
        return widths[0][1] if len(widths) == 1 else sum((on * width for on, width in widths), start=Constant(0))


@frozen
class Layout:
    """The tables of a space file for this backbone.

    stem: what comes before the stages
    stages: the stages in order
    shortcut: where it changes shape: "conv", a 1x1 convolution with the block's stride, or "pool", average pooling
        with that stride before the convolution, as in ResNet-D (He et al. 2019, arXiv:1812.01187)
    resolution: side of the square that images are resized to, or a table of `height`, `width` and `scale`; without it
        they stay as they are
    """

    stem: Stem
    stages: tuple[Stage, ...]
    shortcut: Literal["conv", "pool"] = "conv"
    resolution: Value | Sides | None = resolution_field()


@frozen
class ResNet:
    """Basic and bottleneck blocks with searchable kind, width, depth, bottleneck ratio, kernel and groups.

    Torchvision's residual networks (He et al. 2016, arXiv:1512.03385; wide ones: Zagoruyko and Komodakis 2016,
    arXiv:1605.07146) and the ResNet-50D of Once-for-All (Cai et al. 2020, arXiv:1908.09791). Smaller kernels are the
    centre of larger ones.

    weights: a file of the weights of a published network that the space has, as torchvision and timm names them, or of
        Once-for-All's ResNet-50D; the classifier's where the task has as many classes. The rest of a supernet begins at
        random
    in_channels: channels of the images; left out, those of the task's (3 without a task)
    levels: stages, counted from 1, whose outputs are the features, for detection; without, the pooled end is
    resize_mode: how images are resized to a searched resolution: "nearest", "bilinear" or "bicubic"
    """

    weights: str | None = None
    in_channels: int | None = field(default=None, validator=optional(ge(1)))
    levels: tuple[int, ...] = ()
    resize_mode: ResizeMode = "bilinear"

    layout = Layout
    example: ClassVar[Mapping[str, Any]] = {
        "backbone": {"in_channels": 1},
        "space": {
            "stem": {"width": [8, 16], "kernel": [3, 5], "pool": False},
            "stages": [
                {"basic": {"width": [8, 16], "depth": [1, 2], "kernel": [3, 5], "ratio": 1}},
                {
                    "op": ["basic", "bottleneck"],
                    "basic": {"width": 24, "ratio": 1},
                    "bottleneck": {"width": 32, "ratio": 0.5},
                    "stride": 2,
                },
                {"bottleneck": {"width": [32, 64], "depth": [1, 2], "block": {"ratio": [0.25, 0.5]}}, "stride": 2},
            ],
        },
    }

    def idle(self, around: Surroundings) -> Mapping[str, str]:
        """Return options that do nothing beside the others, or in a space, and why."""
        return idle_resize(around.space)

    def build(self, space: SearchSpace) -> Staged:
        """The supernet of a space; raises UserError if its tables are not those of `Layout`."""
        from corenas.options import structure
        from corenas_backbone_resnet.model import supernet

        return supernet(structure(space.tree, Layout), self)

    def load(self, model: nn.Module, space: SearchSpace) -> Sequence[str]:
        """Give a supernet the weights that the options name. Returns what of them is left out.

        Raises UserError for those of no network of the space.
        """
        from corenas_backbone_resnet.weights import recognise
        from corenas_mutable_slices.exchange import load_pretrained

        assert self.weights is not None
        return load_pretrained(model, space, self.weights, recognise, ["fc.", "classifier.linear."])[1]


@hookimpl
def corenas_backbones() -> dict[str, type]:
    """The backbone "resnet"."""
    return {"resnet": ResNet}
