"""Vision transformers as a supernet: its options and the tables of its spaces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from attrs import field, frozen
from attrs.validators import ge, gt, lt, optional

from corenas.contracts import Surroundings
from corenas.errors import UserError
from corenas.hookspecs import hookimpl
from corenas.space import SearchSpace
from corenas.value import Constant, Value
from corenas_mutable_slices.layouts import (
    ResizeMode,
    Sides,
    check_blocks,
    depth_of_blocks,
    idle_resize,
    of_block,
    positive,
    whole,
)

if TYPE_CHECKING:
    from torch import nn


@frozen
class Block:
    """What differs from block to block; where it says nothing, the stage's counts.

    heads: number of attention heads
    head_dim: features of a head's queries, keys and values
    mlp_ratio: inner features of the MLP over the width, rounded down
    """

    heads: Value | None = field(default=None, validator=optional(whole))
    head_dim: Value | None = field(default=None, validator=optional(whole))
    mlp_ratio: Value | None = field(default=None, validator=optional(positive))


@frozen
class Stage:
    """Transformer blocks one after the other.

    heads, head_dim, mlp_ratio: as in a block, for all that say nothing of their own; head_dim is 64 where neither does
    blocks: one table a block, or `block`, one for all
    depth: number of blocks, at least 1; without it as many as `blocks` has, else one
    """

    heads: Value | None = field(default=None, validator=optional(whole))
    head_dim: Value = field(default=Constant(64), validator=whole)
    mlp_ratio: Value | None = field(default=None, validator=optional(positive))
    blocks: tuple[Block, ...] = ()
    depth: Value = depth_of_blocks()

    def __attrs_post_init__(self) -> None:
        check_blocks(self, ("heads", "mlp_ratio"))


def _fixed(instance: object, attribute: object, value: int | Sides) -> None:
    if isinstance(value, Sides) and any(side.keys for side in value.pair):
        raise ValueError("cannot be searched: the position embedding is for one resolution")
    if isinstance(value, int) and value < 1:
        raise ValueError(f"expected a whole number of at least 1, found {value}")


@frozen
class Layout:
    """The tables of a space file for this backbone.

    width: features of every token
    stages: blocks in order; one stage, unless features of several levels are wanted
    resolution: side of the square that images are resized to, or a table of `height` and `width`
    patch: side of a patch
    pool: what the features are after the last norm: the class token ("token"), or the mean of all others ("mean")
    relative_position: largest distance of the blocks' relative position tables (14 in AutoFormer); 0 for none
    norm_eps: of all layer norms
    """

    width: Value = field(validator=whole)
    stages: tuple[Stage, ...]
    resolution: int | Sides = field(default=224, validator=_fixed)
    patch: int = field(default=16, validator=ge(1))
    pool: Literal["token", "mean"] = "token"
    relative_position: int = field(default=0, validator=ge(0))
    norm_eps: float = field(default=1e-6, validator=gt(0))

    def __attrs_post_init__(self) -> None:
        for side in self.sides:
            if side % self.patch:
                text = f"images of {side} pixels have no whole number of patches of {self.patch}"
                raise UserError(text, key=("resolution",))
        for i, stage in enumerate(self.stages):
            ratios = [of_block(stage, j, "mlp_ratio") for j in range(stage.depth.largest)]
            narrowest = self.width.possible[0] * min(ratio.possible[0] for ratio in ratios)
            if narrowest < 1:
                raise UserError(f"an MLP would have {narrowest:g} inner features", key=("stages", i, "mlp_ratio"))

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width of images."""
        if not isinstance(self.resolution, Sides):
            return self.resolution, self.resolution
        height, width = self.resolution.pair
        return height.largest, width.largest

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.sides[0] // self.patch, self.sides[1] // self.patch


@frozen
class VisionTransformer:
    """Transformers with searchable width, depth, heads and MLP ratio.

    The supernet of AutoFormer (Chen et al. 2021, arXiv:2107.00651) on ViT (Dosovitskiy et al. 2021, arXiv:2010.11929)
    and DeiT (Touvron et al. 2021, arXiv:2012.12877).

    weights: a file of the weights of a published network that the space has, as torchvision or timm names them, or of
        AutoFormer's supernet; the classifier's where the task has as many classes, the position embedding resized to
        the space's. The rest of a supernet begins at random
    in_channels: channels of the images; left out, those of the task's (3 without a task)
    levels: stages, counted from 1, whose outputs are the features, as maps without the class token; without, the
        network's end is
    dropout: probability, in training, of features after the position embedding, attention and the MLP's two layers
    drop_path: probability, in training, of the last block's residual branches; it grows from 0 with the blocks
    front_bias: whether n features each of queries, keys and values have the first 3n biases of the whole, as in
        AutoFormer's code, and not the first n of each: for supernets that it has trained
    resize_mode: how images of another size are resized: "nearest", "bilinear" or "bicubic"
    """

    weights: str | None = None
    in_channels: int | None = field(default=None, validator=optional(ge(1)))
    levels: tuple[int, ...] = ()
    dropout: float = field(default=0.0, validator=[ge(0), lt(1)])
    drop_path: float = field(default=0.0, validator=[ge(0), lt(1)])
    front_bias: bool = False
    resize_mode: ResizeMode = "bilinear"

    layout = Layout
    example: ClassVar[Mapping[str, Any]] = {
        "backbone": {"in_channels": 1},
        "space": {
            "width": [32, 48],
            "resolution": 28,
            "patch": 7,
            "stages": [{"depth": [1, 2, 3], "head_dim": 16, "block": {"heads": [1, 2, 3], "mlp_ratio": [1, 2]}}],
        },
    }

    def idle(self, around: Surroundings) -> Mapping[str, str]:
        """Return options that do nothing beside the others, or in a space, and why."""
        return idle_resize(around.space)

    def build(self, space: SearchSpace) -> nn.Module:
        """The supernet of a space; raises UserError if its tables are not those of `Layout`."""
        from corenas.options import structure
        from corenas_backbone_vit.model import supernet

        return supernet(structure(space.tree, Layout), self)

    def load(self, model: nn.Module, space: SearchSpace) -> Sequence[str]:
        """Give a supernet the weights that the options name. Returns what of them is left out.

        Raises UserError for those of no network of the space.
        """
        from corenas.options import structure
        from corenas_backbone_vit.weights import recognise
        from corenas_mutable_slices.exchange import load_pretrained

        assert self.weights is not None
        layout, body = structure(space.tree, Layout), getattr(model, "backbone", model)
        holder = body.tokens if hasattr(body, "tokens") else model  # what gives levels of features has no classifier
        own = lambda state: recognise(state, layout, self.front_bias)  # noqa: E731
        return load_pretrained(holder, space, self.weights, own, ["heads.", "head."])[1]


@hookimpl
def corenas_backbones() -> dict[str, type]:
    """The backbone "vit"."""
    return {"vit": VisionTransformer}
