"""Networks of inverted residual blocks, MobileNetV3's family, as supernets: options and the tables of their spaces."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from attrs import field, frozen
from attrs.validators import ge, gt, lt, optional

from corenas.contracts import Surroundings
from corenas.errors import UserError
from corenas.hookspecs import hookimpl
from corenas.space import SearchSpace
from corenas.value import Value, as_value
from corenas_mutable_slices.layouts import (
    ResizeMode,
    Sides,
    check_blocks,
    depth_of_blocks,
    idle_resize,
    odd,
    positive,
    resolution_field,
    stride_field,
)

if TYPE_CHECKING:
    from torch import nn

    from corenas_mutable_slices import Staged

Act = Literal["none", "relu", "relu6", "h_swish", "swish", "gelu"]


def kernel_and_expand(op: str) -> tuple[int, int] | None:
    """What the name of an operation says: (3, 6) for "k3e6", nothing for "skip". Raises ValueError for no name."""
    if op == "skip":
        return None
    match = re.fullmatch(r"k(\d*[13579])e([1-9]\d*)", op)
    if match is None:
        raise ValueError(f'expected names such as "k3e6", an odd kernel and an expansion, or "skip", found {op!r}')
    return int(match[1]), int(match[2])


def _operations(instance: object, attribute: object, value: Value | str) -> None:
    for op in as_value(value).possible:
        kernel_and_expand(str(op))


@frozen
class Stem:
    """The first convolution, 3x3.

    width: output channels
    stride: 2, or 1 for small images
    act: activation
    """

    width: Value = field(validator=positive)
    stride: int = stride_field(2)
    act: Act = "h_swish"


@frozen
class Block:
    """What differs from block to block; where it says nothing, the stage's counts.

    kernel: size of the depthwise kernel, odd
    expand: inner channels over input channels
    op: both by name, "k3e6" for kernel 3 and expansion 6, each with weights of its own; "skip" leaves the block out
    """

    kernel: Value | None = field(default=None, validator=optional(odd))
    expand: Value | None = field(default=None, validator=optional(positive))
    op: Value | str | None = field(default=None, validator=optional(_operations))


@frozen
class Excitation:
    """Squeeze-and-excitation, where it is not MobileNetV3's: gates from a map's mean by way of fewer channels.

    of: which channels are reduced, "inner" (those it gates) or "inputs" (those of the block)
    ratio: fewer channels over those
    divisor: what their number is made divisible by
    act: activation of the fewer channels
    gate: "h_sigmoid" or "sigmoid"
    """

    of: Literal["inner", "inputs"] = "inner"
    ratio: float = field(default=0.25, validator=[gt(0), lt(math.inf)])
    divisor: int = field(default=8, validator=ge(1))
    act: Act = "relu"
    gate: Literal["h_sigmoid", "sigmoid"] = "h_sigmoid"


@frozen
class Stage:
    """Inverted residual blocks of one width.

    width: output channels
    kernel, expand, op: as in a block, for all that say nothing of their own
    blocks: one table a block, or `block`, one for all
    depth: number of blocks, at least 1; without it as many as `blocks` has, else one
    stride: of the first block
    act: activation
    se: whether blocks have squeeze-and-excitation; a table for one that is not MobileNetV3's
    shortcut: "identity" past blocks of stride 1 and one width; "pool" past all, with average pooling and a 1x1
        convolution where shapes differ; or "none"
    """

    width: Value = field(validator=positive)
    kernel: Value | None = field(default=None, validator=optional(odd))
    expand: Value | None = field(default=None, validator=optional(positive))
    op: Value | str | None = field(default=None, validator=optional(_operations))
    blocks: tuple[Block, ...] = ()
    depth: Value = depth_of_blocks()
    stride: int = stride_field(1)
    act: Act = "relu"
    se: bool | Excitation = False
    shortcut: Literal["identity", "pool", "none"] = "identity"

    def __attrs_post_init__(self) -> None:
        said = {name for part in (self, *self.blocks) for name in ("kernel", "expand", "op") if getattr(part, name)}
        if "op" in said and len(said) > 1:
            raise UserError("`op` says kernel and expansion in one, and in all blocks of a stage", key=("op",))
        check_blocks(self, ("op",) if "op" in said else ("kernel", "expand"))


@frozen
class Head:
    """What follows the last stage: a 1x1 convolution, pooling, and a linear layer without batch norm.

    expand: channels of the convolution before pooling; without it, and without `ratio`, there is none
    ratio: the same, as a multiple of the last stage's width
    width: features after pooling, which the task's head sees; without it those are what was pooled
    bias: whether the linear layer has one
    act: activation of both
    scale: whether `width_mult` counts for the last of these layers: "always", "up", where it is above 1 (MobileNetV2
        narrows all layers but the last), or "never"
    """

    expand: Value | None = field(default=None, validator=optional(positive))
    ratio: Value | None = field(default=None, validator=optional(positive))
    width: Value | None = field(default=None, validator=optional(positive))
    bias: bool = False
    act: Act = "h_swish"
    scale: Literal["always", "up", "never"] = "always"

    def __attrs_post_init__(self) -> None:
        if self.expand and self.ratio:
            raise UserError("`expand` says it already", key=("ratio",))


@frozen
class Layout:
    """The tables of a space file for this backbone.

    stem: the first convolution
    stages: the stages in order
    head: what follows them
    resolution: side of the square that images are resized to, or a table of `height`, `width` and `scale`; without it
        they stay as they are
    norm_eps: what batch norms add to the variance, unless the backbone's option says another
    resize_mode: how images are resized to `resolution`, likewise: "nearest", "bilinear" or "bicubic"
    """

    stem: Stem
    stages: tuple[Stage, ...]
    head: Head
    resolution: Value | Sides | None = resolution_field()
    norm_eps: float = field(default=1e-5, validator=[gt(0), lt(1)])
    resize_mode: ResizeMode = "bilinear"


@frozen
class MobileNetV3:
    """Inverted residual blocks with searchable kernel, expansion, depth, width, resolution, or operation.

    MobileNetV3 (Howard et al. 2019, arXiv:1905.02244) and its family; the supernets of Once-for-All (Cai et al. 2020,
    arXiv:1908.09791), BigNAS, AttentiveNAS, FairNAS and Cream.

    width_mult: factor of all widths, which are then made divisible by 8
    weights: a file of the weights of a published network that the space has, as torchvision or timm names them, or of
        a supernet of Once-for-All, AttentiveNAS or AlphaNet; the classifier's where the task has as many classes. The
        rest of a supernet begins at random
    in_channels: channels of the images; left out, those of the task's (3 without a task)
    levels: stages, counted from 1, whose outputs are the features, for detection; without, the network's end is
    transforms: whether smaller kernels come from larger ones by learnt matrices, as in Once-for-All, and are not mere
        centres of them; the matrices are no part of a subnet
    norm_eps: what batch norms add to the variance; left out, as the space says (1e-5 where it says nothing)
    resize_mode: how images are resized to a searched resolution: "nearest", "bilinear" or "bicubic"; left out, as the
        space says ("bilinear" where it says nothing)
    drop_path: probability, in training, of leaving out a block's branch beside its shortcut; it grows from 0 with the
        blocks, and would be this after the last one
    drop_path_stages: how many of the last stages have it; without, all do
    """

    width_mult: float = field(default=1.0, validator=[gt(0), lt(math.inf)])
    weights: str | None = None
    in_channels: int | None = field(default=None, validator=optional(ge(1)))
    levels: tuple[int, ...] = ()
    transforms: bool = False
    norm_eps: float | None = field(default=None, validator=optional([gt(0), lt(1)]))
    resize_mode: ResizeMode | None = None
    drop_path: float = field(default=0.0, validator=[ge(0), lt(1)])
    drop_path_stages: int | None = field(default=None, validator=optional(ge(1)))

    layout = Layout
    example: ClassVar[Mapping[str, Any]] = {
        "backbone": {"in_channels": 1},
        "space": {
            "stem": {"width": 8},
            "stages": [
                {"width": 8, "depth": [1, 2], "stride": 2, "block": {"kernel": [3, 5], "expand": [2, 3]}},
                {
                    "width": [16, 24],
                    "depth": [1, 2],
                    "stride": 2,
                    "act": "h_swish",
                    "se": True,
                    "block": {"kernel": [3, 5], "expand": [2, 3]},
                },
            ],
            "head": {"expand": 64, "width": 64},
        },
    }

    def idle(self, around: Surroundings) -> Mapping[str, str]:
        """Return options that do nothing beside the others, or in a space, and why."""
        idle = idle_resize(around.space)
        if not self.drop_path:
            idle["drop_path_stages"] = "there is no drop path"
        if not any(key.rpartition(".")[2] == "kernel" for key in around.space.keys):
            idle["transforms"] = "no kernel of this space has several sizes"
        return idle

    def build(self, space: SearchSpace) -> Staged:
        """The supernet of a space; raises UserError if its tables are not those of `Layout`."""
        from corenas.options import structure
        from corenas_backbone_mobilenetv3.model import supernet

        return supernet(structure(space.tree, Layout), self)

    def load(self, model: nn.Module, space: SearchSpace) -> Sequence[str]:
        """Give a supernet the weights that the options name. Returns what of them is left out.

        Raises UserError for those of no network of the space.
        """
        from corenas_backbone_mobilenetv3.weights import recognise
        from corenas_mutable_slices.exchange import load_pretrained

        assert self.weights is not None
        heads = ["classifier.3.", "classifier.1.", "classifier.weight", "classifier.bias", "classifier.linear."]
        return load_pretrained(model, space, self.weights, functools.partial(recognise, model), heads)[1]


@hookimpl
def corenas_backbones() -> dict[str, type]:
    """The backbone "mobilenetv3"."""
    return {"mobilenetv3": MobileNetV3}
