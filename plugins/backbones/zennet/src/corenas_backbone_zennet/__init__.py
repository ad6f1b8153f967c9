"""The networks of Zen-NAS as a supernet: its options and the tables of its spaces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from attrs import Factory, field, frozen
from attrs.validators import ge, optional

from corenas.contracts import Surroundings
from corenas.errors import Fault, UserError, raise_if_any
from corenas.hookspecs import hookimpl
from corenas.options import structure as structured
from corenas.space import SearchSpace
from corenas.value import Constant, Value, as_value
from corenas_mutable_slices.layouts import (
    ResizeMode,
    Sides,
    each,
    idle_resize,
    odd,
    one_of,
    resolution_field,
    stride_field,
    whole,
)

if TYPE_CHECKING:
    from corenas_mutable_slices import Staged

Op = Literal["Conv", "XX", "BL", "IDW"]
NEEDS: Mapping[Any, tuple[str, ...]] = {
    "Conv": (),
    "XX": ("bottleneck",),
    "BL": ("bottleneck",),
    "IDW": ("bottleneck", "expand"),
}
"""The types of super-blocks, each with the keys that it cannot do without."""
none_or_more = each(lambda n: isinstance(n, int) and n >= 0, "whole numbers of at least 0")


@frozen
class SuperConv:
    """Convolutions of one width with batch norm and ReLU: the first super-block of a network, and its last.

    width: output channels
    kernel: their size, odd
    stride: of the first
    depth: how many there are
    """

    width: Value = field(validator=whole)
    kernel: Value = field(validator=odd)
    stride: int = stride_field(1)
    depth: Value = field(default=Constant(1), validator=whole)


@frozen
class SuperBlock:
    """Sub-layers of one type and width.

    op: their type: "XX", a residual block of two full convolutions; "BL", two residual blocks, each a bottleneck around
        a full convolution; "IDW", two residual blocks, each an inverted bottleneck around a depthwise convolution, of
        which the first narrows to the bottleneck; "Conv", a convolution without a shortcut
    width: output channels
    kernel: size of the convolutions that are not 1x1, odd
    bottleneck: inner channels; of "IDW" those between its two blocks
    expand: of "IDW", depthwise channels over output channels of each block
    depth: number of sub-layers; where it is 0 the super-block is not there
    stride: of the first; 1 where the super-block need not be there
    """

    op: Value | Op = field(validator=one_of(NEEDS))
    width: Value = field(validator=whole)
    kernel: Value = field(validator=odd)
    bottleneck: Value | None = field(default=None, validator=optional(whole))
    expand: Value | None = field(default=None, validator=optional(whole))
    depth: Value = field(default=Constant(1), validator=none_or_more)
    stride: int = stride_field(1)

    def __attrs_post_init__(self) -> None:
        if 0 in self.depth.possible and self.stride > 1:
            raise UserError("a super-block that strides has to be there: expected at least 1, found 0", key=("depth",))
        for op in as_value(self.op).possible:
            raise_if_any(
                Fault(f"required key is missing: {op} needs it", (name,))
                for name in NEEDS[op]
                if getattr(self, name) is None
            )


_PARTS: Mapping[str, Any] = {"stem": SuperConv, "stages": tuple[SuperBlock, ...], "head": SuperConv}


def _read_part(layout: Layout, part: str) -> Any:
    """What a structure says of a part of the network. Raises UserError if there is no structure, or a wrong one."""
    from corenas_backbone_zennet.structure import read

    if layout.structure is None:
        raise UserError("required key is missing", key=(part,), hint="or give `structure`, the whole as a string")
    try:
        return structured(read(layout.structure)[part], _PARTS[part])
    except UserError as error:
        raise error.under("structure") from None


@frozen
class Layout:
    """The tables of a space file for this backbone.

    structure: a network as Zen-NAS writes it, instead of the three that follow. Its first number, the channels of the
        images, gives way to the backbone's option
    stem: the convolution that comes first
    stages: the super-blocks in order
    head: the convolution that comes last; pooling follows
    resolution: side of the square that images are resized to, or a table of `height`, `width` and `scale`; without it
        they stay as they are
    """

    structure: str | None = None
    stem: SuperConv = field(default=Factory(lambda self: _read_part(self, "stem"), takes_self=True))
    stages: tuple[SuperBlock, ...] = field(default=Factory(lambda self: _read_part(self, "stages"), takes_self=True))
    head: SuperConv = field(default=Factory(lambda self: _read_part(self, "head"), takes_self=True))
    resolution: Value | Sides | None = resolution_field()

    def __attrs_post_init__(self) -> None:
        if self.structure is not None and any(getattr(self, part) != _read_part(self, part) for part in _PARTS):
            raise UserError("stem, stages or head stand beside it and say something else", key=("structure",))


@frozen
class ZenNet:
    """Super-blocks with searchable type, kernel, width, bottleneck and number of sub-layers.

    The spaces and the networks of Zen-NAS (Lin et al. 2021, arXiv:2102.01063). Smaller kernels are the centre of larger
    ones. Of a space with widths of thousands costs are known, and single networks can be built; its supernet is huge.

    se: whether blocks have squeeze-and-excitation, as the published networks named "SE" have
    residual: whether blocks have shortcuts; without them, as the Zen-Score looks at networks, projections are gone, too
    in_channels: channels of the images; left out, those of the task's (3 without a task)
    levels: stages, counted from 1, whose outputs are the features, for detection; without, the network's end is
    resize_mode: how images are resized to a searched resolution: "nearest", "bilinear" or "bicubic"
    """

    se: bool = False
    residual: bool = True
    in_channels: int | None = field(default=None, validator=optional(ge(1)))
    levels: tuple[int, ...] = ()
    resize_mode: ResizeMode = "bilinear"

    layout = Layout
    example: ClassVar[Mapping[str, Any]] = {
        "backbone": {"in_channels": 1},
        "space": {
            "stem": {"width": [8, 16], "kernel": 3},
            "stages": [
                {
                    "op": ["BL", "XX"],
                    "width": [16, 24],
                    "kernel": [3, 5],
                    "bottleneck": [8, 16],
                    "depth": [1, 2],
                    "stride": 2,
                },
                {
                    "op": ["BL", "IDW"],
                    "width": [32, 40],
                    "kernel": [3, 5],
                    "bottleneck": [16, 24],
                    "expand": {"type": "categorical", "choices": [1, 2], "when": {"op": "IDW"}},
                    "depth": [1, 2],
                    "stride": 2,
                },
            ],
            "head": {"width": [64, 96], "kernel": 1},
        },
    }

    def idle(self, around: Surroundings) -> Mapping[str, str]:
        """Return options that do nothing beside the others, or in a space, and why."""
        return idle_resize(around.space)

    def build(self, space: SearchSpace) -> Staged:
        """The supernet of a space; raises UserError if its tables are not those of `Layout`."""
        from corenas_backbone_zennet.model import supernet

        return supernet(structured(space.tree, Layout), self)


@hookimpl
def corenas_backbones() -> dict[str, type]:
    """The backbone "zennet"."""
    return {"zennet": ZenNet}
