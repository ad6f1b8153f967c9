"""What the whole numbers in a call of Python say of the axes that it gives.

A number that remembers what it counts ties the axis to that; a literal fixes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attrs import frozen
from torch import Tensor

from corenas_mutable_conversion.axes import Axes, Axis, Size, count, free_sizes, join, product, resolved
from corenas_mutable_conversion.numbers import Number
from corenas_mutable_conversion.operations import Op


@frozen
class Said:
    """A call of a function of torch, with the operations that it came down to.

    of: the axes of a tensor; attributes: the sizes that attributes of modules have
    """

    ops: Sequence[Op]
    result: Any
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    axes: Axes
    of: Callable[[Tensor], tuple[Axis, ...]]
    attributes: set[Size]

    def argument(self, position: int, *names: str, default: Any = None) -> Any:
        """Return an argument that may be given by position or by name."""
        if len(self.args) > position:
            return self.args[position]
        return next((self.kwargs[name] for name in names if name in self.kwargs), default)

    def listed(self, position: int, *names: str) -> Sequence[Any]:
        """Return whole numbers that may be given as one list or one by one."""
        rest = self.args[position:]
        if not rest:
            found = self.argument(position, *names, default=())
            return found if isinstance(found, Sequence) else (found,)
        return rest[0] if len(rest) == 1 and isinstance(rest[0], tuple | list) else rest

    def says(self, axis: Axis, number: Any) -> None:
        """Take in that code gives this number for an axis: whatever it was computed from changes with the axis."""
        axis = resolved(axis)
        if count(axis) < 2 or not isinstance(number, int):
            return
        if not isinstance(number, Number):
            if number >= 0:
                self.axes.fix(axis, f"the code says {number}")
            return
        if number.over is None:
            return  # computed in a way that is not followed: whether it fits, a trial shows
        left, right = product([*number.under, axis]), product(number.over)
        if left == right or count(left) != count(right):
            return
        if not number.under and isinstance(right, Size) and right in self.attributes:
            self.axes.unify(right, left, f"an attribute has to be {int(number)}")
        elif isinstance(left, int):
            self.axes.fix(right, "code wants it to be a fixed number")
        elif isinstance(right, int):
            self.axes.fix(left, "code wants it to be a fixed number")
        else:
            self.axes.tie([left, right], "code wants the same number of elements")

    def says_last(self, shape: Sequence[Any]) -> None:
        """Take in the numbers of the last axes of the result."""
        for axis, number in zip(reversed(self.of(self.result)), reversed([*shape]), strict=False):
            self.says(axis, number)


def _shape(said: Said) -> None:
    said.says_last(said.listed(1, "shape", "size"))


def _factory(said: Said) -> None:
    for axis, number in zip(said.of(said.result), said.listed(0, "size"), strict=False):
        said.says(axis, number)


def _unflatten(said: Said) -> None:
    dim, shape = said.argument(1, "dim"), said.argument(2, "sizes")
    for axis, number in zip(said.of(said.result)[dim % said.args[0].dim() :], shape, strict=False):
        said.says(axis, number)


def _chunk(said: Said) -> None:
    dim = said.argument(2, "dim", default=0)
    pieces = [said.of(piece)[dim] for piece in said.result]
    if any(not isinstance(piece, int) for piece in pieces):
        said.axes.tie(pieces, "cut into equal parts")


def _split(said: Said) -> None:
    lengths = said.argument(1, "split_size_or_sections", "split_size", "split_sizes")
    dim = said.argument(2, "dim", default=0)
    lengths = lengths if isinstance(lengths, Sequence) else [lengths] * len(said.result)
    for piece, number in zip(said.result, lengths, strict=False):
        said.says(said.of(piece)[dim], number)


def _getitem(said: Said) -> None:
    index = said.args[1] if isinstance(said.args[1], tuple) else (said.args[1],)
    cuts = [op.cut for op in said.ops if op.name == "slice" and op.cut]
    if not any(True for cut in cuts for axis in cut for _ in free_sizes(axis)):
        return
    wanted = [i for i in index if isinstance(i, slice) and (i.start not in (None, 0) or i.stop is not None)]
    if len(cuts) != len(wanted):  # those that take all there is leave no operation
        wanted = [i for i in wanted if i.start not in (None, 0) or (i.stop is not None and i.stop <= 1 << 40)]
    for (before, middle), own in zip(cuts, wanted, strict=False):
        if own.start is not None and own.start >= 0:
            said.says(before, own.start)
        if own.stop is not None and own.stop >= 0:
            said.says(join([before, middle]), own.stop)
        elif own.stop is not None:
            said.axes.fix(join([before, middle]), f"cut at {int(own.stop)} from its end")


def _narrow(said: Said) -> None:
    start, length = said.argument(2, "start"), said.argument(3, "length")
    for op in said.ops:
        if op.name == "slice" and op.cut:
            said.says(op.cut[0], start)
            said.says(op.cut[1], length)


def _groups(position: int, name: str) -> Callable[[Said], None]:
    def groups(said: Said) -> None:
        for op in said.ops:
            if count(op.groups) > 1:
                said.says(op.groups, said.argument(position, name, default=1))

    return groups


def _normalised(said: Said) -> None:
    said.says_last(said.argument(1, "normalized_shape"))


SAYINGS: Mapping[str, Callable[[Said], None]] = {
    **dict.fromkeys(("view", "reshape", "expand", "broadcast_to", "new_zeros", "new_ones", "new_empty"), _shape),
    **dict.fromkeys(("zeros", "ones", "empty", "rand", "randn", "arange"), _factory),
    **dict.fromkeys(("split", "split_with_sizes"), _split),
    **dict.fromkeys(("layer_norm", "rms_norm"), _normalised),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _groups(6, "groups")),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _groups(6, "groups")),
    "unflatten": _unflatten,
    "chunk": _chunk,
    "__getitem__": _getitem,
    "narrow": _narrow,
    "group_norm": _groups(1, "num_groups"),
}
"""By the name of a function what the numbers in its call say."""
