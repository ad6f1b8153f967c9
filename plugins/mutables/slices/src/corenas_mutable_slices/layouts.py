"""What the tables of backbones have in common: limits of values, and blocks that say what their stage leaves open."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal

from attrs import Factory, field, frozen
from attrs.validators import ge, le, optional

from corenas.errors import Fault, UserError
from corenas.space import SearchSpace
from corenas.value import Constant, Value, as_value, rounded

ResizeMode = Literal["nearest", "bilinear", "bicubic"]
"""How images can be resized."""


def each(test: Callable[[Any], bool], expected: str) -> Callable[[Any, Any, Value], None]:
    """A validator for attrs: every number that a value can be passes a test.

    expected: in words, for the message
    """

    def validator(instance: object, attribute: object, value: Value) -> None:
        wrong = [n for n in value.possible if isinstance(n, str | bool) or not test(n)]
        if wrong:
            raise ValueError(f"expected {expected}, found {wrong[0]!r}")

    return validator


def one_of(names: Collection[str]) -> Callable[[Any, Any, Any], None]:
    """A validator for attrs: a string, or every string that a variable can be, is one of these names."""

    def validator(instance: object, attribute: object, value: Value | str) -> None:
        wrong = [name for name in as_value(value).possible if name not in names]
        if wrong:
            raise ValueError(f"expected {', '.join(names)}, found {wrong[0]!r}")

    return validator


positive = each(lambda n: n > 0, "numbers above 0")
whole = each(lambda n: isinstance(n, int) and n >= 1, "whole numbers of at least 1")
odd = each(lambda n: isinstance(n, int) and n >= 1 and n % 2 == 1, "odd whole numbers of at least 1")


def depth_of_blocks() -> Any:
    """A field of attrs for `depth`: at least 1; without it as many as `blocks` has, else one."""
    return field(default=Factory(lambda self: Constant(len(self.blocks) or 1), takes_self=True), validator=whole)


@frozen
class Sides:
    """The size that images which are not square are resized to.

    height, width: in pixels
    scale: what both are multiplied by, and then rounded: one variable for images of one shape
    """

    height: Value = field(validator=whole)
    width: Value = field(validator=whole)
    scale: Value = field(default=Constant(1), validator=positive)

    def __attrs_post_init__(self) -> None:
        for name, side in zip(("height", "width"), self.pair, strict=True):
            if side.possible[0] < 1:
                raise UserError(f"no pixel would be left of a {name}", key=("scale",))

    @property
    def pair(self) -> tuple[Value, Value]:
        """Height and width, scaled."""
        if self.scale == Constant(1):
            return self.height, self.width
        return rounded(self.height * self.scale), rounded(self.width * self.scale)


def _resolution(instance: object, attribute: object, value: Value | Sides) -> None:
    if not isinstance(value, Sides):
        whole(instance, attribute, value)


def idle_resize(space: SearchSpace) -> dict[str, str]:
    """Return that a backbone's `resize_mode` does nothing where a space resizes nothing (`contracts.PartlyIdle`)."""
    return {} if "resolution" in space.tree else {"resize_mode": "this space has no `resolution`"}


def resolution_field() -> Any:
    """A field of attrs for `resolution`: the side of a square or `Sides`; without it images stay as they are."""
    return field(default=None, validator=optional(_resolution))


def stride_field(default: int) -> Any:
    """A field of attrs for `stride`, 1 to 16: torch cannot compute convolutions that step over whole maps."""
    return field(default=default, validator=[ge(1), le(16)])


@frozen
class PooledHead:
    """What follows the last stage: a 1x1 convolution and pooling.

    width: its output channels, the features that the task's head sees
    """

    width: Value = field(validator=whole)


def check_blocks(stage: Any, names: Sequence[str]) -> None:
    """Raise UserError unless a stage has as many `blocks` as its `depth` reaches, and it or each of them every name.

    stage: an attrs object with `depth`, `blocks` and the names; the blocks may have them, too
    """
    reach = stage.depth.largest
    if stage.blocks and len(stage.blocks) < reach:
        raise UserError(f"{len(stage.blocks)} blocks, but depth reaches {reach}", key=("blocks",))
    missing = [name for name in names if any(of_block(stage, i, name) is None for i in range(reach))]
    if missing:
        hint = "say it once for the stage, or in `block` or `blocks`"
        raise UserError(
            faults=[Fault(f"neither the stage nor each of its blocks has {name!r}", hint=hint) for name in missing]
        )


def of_block(stage: Any, i: int, name: str) -> Any:
    """What the i-th block says of something, or else its stage."""
    own = getattr(stage.blocks[i], name, None) if stage.blocks else None
    return getattr(stage, name) if own is None else own
