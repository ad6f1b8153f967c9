"""What the axes of tensors are made of: sizes that layers share, products and joins of them, and how two become one.

An axis is a number, a `Size`, a `Product` (outermost factor first: heads x features) or a `Join` (parts side by side).
Sizes are unknowns of a union-find: whatever two tensors have to agree on becomes one size, what code names by a number
becomes fixed, with the reason.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeAlias

from attrs import frozen

Axis: TypeAlias = "int | Size | Product | Join"


class MisfitError(Exception):
    """Two axes have the same number of elements and no common structure."""


class Size:
    """A number of elements that is not known to be fixed.

    n: the number in the model as it is
    bound: the axis that it turned out to be; None while it is free
    """

    __slots__ = ("bound", "n")

    def __init__(self, n: int) -> None:
        self.n = n
        self.bound: Axis | None = None

    def __deepcopy__(self, memo: object) -> Size:
        return self  # what is known of a model is compared by identity

    def __repr__(self) -> str:
        return f"Size({self.n})"


class Fixed(int):
    """A number of elements that was found to be fixed, and why."""

    why: str

    def __new__(cls, n: int, why: str) -> Fixed:
        """Make one."""
        self = super().__new__(cls, n)
        self.why = why
        return self

    def __reduce__(self) -> tuple[object, ...]:
        return Fixed, (int(self), self.why)


@frozen
class Product:
    """Every combination of elements, the last factor changing fastest."""

    factors: tuple[Axis, ...]


@frozen
class Join:
    """The elements of one part after those of another."""

    parts: tuple[Axis, ...]


def inner(axis: Product | Join) -> tuple[Axis, ...]:
    """Return what a product or a join is made of."""
    return axis.factors if isinstance(axis, Product) else axis.parts


def count(axis: Axis) -> int:
    """Return the number of elements in the model as it is."""
    if isinstance(axis, int):
        return axis
    if isinstance(axis, Size):
        return axis.n
    return math.prod(map(count, axis.factors)) if isinstance(axis, Product) else sum(map(count, axis.parts))


def resolved(axis: Axis) -> Axis:
    """Return an axis with its bound sizes replaced, flat: no product in a product, no 1 in it, numbers merged."""
    if isinstance(axis, Size):
        return axis if axis.bound is None else resolved(axis.bound)
    if isinstance(axis, int):
        return axis
    kind, neutral = type(axis), 1 if isinstance(axis, Product) else 0
    flat: list[Axis] = []
    for item in map(resolved, inner(axis)):
        for part in inner(item) if type(item) is kind else (item,):  # type: ignore[arg-type]
            if isinstance(part, int) and flat and isinstance(flat[-1], int):
                merged = flat[-1] * part if kind is Product else flat[-1] + part
                flat[-1] = _with_reason(merged, flat[-1], part)
            elif not isinstance(part, int) or part != neutral:
                flat.append(part)
    if len(flat) < 2:
        return flat[0] if flat else neutral
    return Product(tuple(flat)) if kind is Product else Join(tuple(flat))


def _with_reason(n: int, *of: int) -> int:
    why = next((number.why for number in of if isinstance(number, Fixed)), "")
    return Fixed(n, why) if why else n


def reason(axis: Axis) -> str:
    """Return why an axis, or a part of it, is fixed; empty where that is not known."""
    axis = resolved(axis)
    if isinstance(axis, int):
        return axis.why if isinstance(axis, Fixed) else ""
    parts = () if isinstance(axis, Size) else inner(axis)
    return next((found for found in map(reason, parts) if found), "")


def free_sizes(axis: Axis) -> Iterator[Size]:
    """Yield the free sizes of an axis."""
    axis = resolved(axis)
    if isinstance(axis, Size):
        yield axis
    elif not isinstance(axis, int):
        yield from itertools.chain(*map(free_sizes, inner(axis)))


def product(factors: Iterable[Axis]) -> Axis:
    """Return several axes as one, as reshaping merges them."""
    return resolved(Product(tuple(factors)))


def join(parts: Iterable[Axis]) -> Axis:
    """Return several axes as one, as concatenation joins them."""
    return resolved(Join(tuple(parts)))


REORDERED = "channels are reordered here, so widths change in proportion"
"""Why axes whose elements are shuffled among each other share one variable."""


class Axes:
    """The axes of one model while they are found.

    tied: axes that can only change together, in proportion, since their structures do not fit: (axes, why)
    where: the line of code that is being followed, for the reasons
    """

    def __init__(self) -> None:
        self.tied: list[tuple[list[Axis], str]] = []
        self.where = ""

    def fix(self, axis: Axis, why: str) -> None:
        """Hold all sizes of an axis at their numbers."""
        for size in list(free_sizes(axis)):
            size.bound = Fixed(size.n, f"{why} ({self.where})" if self.where and "(" not in why else why)

    def tie(self, axes: Sequence[Axis], why: str) -> None:
        """Let axes change together, in proportion."""
        self.tied.append(([*axes], f"{why} ({self.where})"))

    def unify(self, first: Axis, second: Axis, why: str = "it meets a fixed number of elements") -> None:
        """Make two axes one. Where their structures do not fit they are tied in proportion."""
        try:
            self._unify(first, second, why)
        except MisfitError:
            self.tie([first, second], REORDERED)

    def _unify(self, first: Axis, second: Axis, why: str) -> None:
        first, second = resolved(first), resolved(second)
        if first == second:
            return
        if count(first) != count(second):
            raise MisfitError
        for one, other in ((first, second), (second, first)):
            if isinstance(one, int):
                self.fix(other, one.why if isinstance(one, Fixed) else why)
                return
        for one, other in ((first, second), (second, first)):
            if isinstance(one, Size) and one not in free_sizes(other):
                one.bound = other
                return
        if isinstance(first, Product) and isinstance(second, Product):
            self._match([*first.factors], [*second.factors], self.outer, why)
        elif isinstance(first, Join) or isinstance(second, Join):
            self._match(_parts(first), _parts(second), self.first, why)
        else:
            raise MisfitError

    def _match(
        self, first: list[Axis], second: list[Axis], cut: Callable[[Axis, int], tuple[Axis, Axis]], why: str
    ) -> None:
        """Make two rows of factors, or of parts, one: the larger head is cut to the size of the smaller one."""
        while first and second:
            if count(first[0]) > count(second[0]):
                first, second = second, first
            if count(first[0]) < count(second[0]):
                second[:1] = cut(second[0], count(first[0]))
            self._unify(first.pop(0), second.pop(0), why)

    def outer(self, axis: Axis, n: int) -> tuple[Axis, Axis]:
        """Return an axis as the outer n of a product and the rest. Raises MisfitError if it is no such product."""
        axis = resolved(axis)
        if n == 0 or count(axis) % n:
            raise MisfitError
        if n in (1, count(axis)):
            return (1, axis) if n == 1 else (axis, 1)
        if isinstance(axis, int):
            return n, _with_reason(axis // n, axis)
        if isinstance(axis, Size):
            two = Size(n), Size(axis.n // n)
            axis.bound = Product(two)
            return two
        if isinstance(axis, Join):
            return n, self._alike_parts(axis, n)
        head, *rest = axis.factors
        if n % count(head) == 0:
            out, left = self.outer(product(rest), n // count(head))
            return product([head, out]), left
        out, left = self.outer(head, n)
        return out, product([left, *rest])

    def _alike_parts(self, axis: Join, n: int) -> Axis:
        """Cut a join into n parts of one structure; returns that of each."""
        pieces: list[Axis] = []
        rest: Axis = axis
        for _ in range(n - 1):
            piece, rest = self.first(rest, count(axis) // n)
            pieces.append(piece)
        for piece in pieces:
            self._unify(piece, rest, "it is one of several equal parts")
        return resolved(rest)

    def first(self, axis: Axis, n: int) -> tuple[Axis, Axis]:
        """Return an axis as a join of its first n elements and the rest. Raises MisfitError if it is no such join."""
        axis = resolved(axis)
        if n in (0, count(axis)):
            return (0, axis) if n == 0 else (axis, 0)
        if isinstance(axis, int):
            return _with_reason(n, axis), _with_reason(axis - n, axis)
        if isinstance(axis, Size):
            two = Size(n), Size(axis.n - n)
            axis.bound = Join(two)
            return two
        if isinstance(axis, Join):
            head, *rest = axis.parts
            if n >= count(head):
                before, after = self.first(join(rest), n - count(head))
                return join([head, before]), after
            before, after = self.first(head, n)
            return before, join([after, *rest])
        return self._first_of_product(axis, n)

    def _first_of_product(self, axis: Product, n: int) -> tuple[Axis, Axis]:
        head, *rest = axis.factors
        each = product(rest)
        if n % count(each) == 0:
            before, after = self.first(head, n // count(each))
            return product([before, each]), product([after, each])
        if not isinstance(head, int):
            raise MisfitError
        whole = n // count(each)
        before, after = self.first(each, n - whole * count(each))
        return join([product([whole, each]), before]), join([after, product([head - whole - 1, each])])

    def reshaped(self, axes: Sequence[Axis], shape: Sequence[int]) -> list[Axis]:
        """Return the axes of a tensor after it was reshaped. What does not fit is fixed."""
        left, found = [axis for axis in axes if count(axis) != 1], []
        try:
            for n in shape:
                own: list[Axis] = []
                while n > 1:
                    head = left.pop(0)
                    if n % count(head):
                        head, rest = self.outer(head, n)
                        left.insert(0, rest)
                    n //= count(head)
                    own.append(head)
                found.append(product(own))
        except MisfitError:
            for axis in axes:
                self.fix(axis, "reshaped across channels")
            return [*shape]
        return found

    def pieces(self, axis: Axis, lengths: Sequence[int]) -> list[Axis]:
        """Return an axis cut into pieces of these lengths."""
        found: list[Axis] = []
        try:
            for n in lengths[:-1]:
                piece, axis = self.first(axis, n)
                found.append(piece)
            return [*found, axis]
        except MisfitError:
            fresh: list[Axis] = [Size(n) if n > 1 else n for n in lengths]
            why = "channels are reordered and cut here, so widths change in proportion"
            self.tie([*found, axis, *fresh[len(found) :]], why)
            return [*found, *fresh[len(found) :]]


def _parts(axis: Axis) -> list[Axis]:
    if isinstance(axis, Join):
        return [*axis.parts]
    if isinstance(axis, Product) and isinstance(axis.factors[0], int):
        return [product(axis.factors[1:])] * axis.factors[0]
    return [axis]
