"""Whole numbers that remember what they count, so that the numbers in a model's code say which axes they stand for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from corenas_mutable_conversion.axes import Axis, join, product

Factors: TypeAlias = "tuple[Sequence[Axis] | None, Sequence[Axis]]"


class Number(int):
    """A whole number that remembers what it counts, through the arithmetic of shapes.

    over: the axes that it is the product of; None if it was computed in a way that is not followed
    under: the axes that this product was divided by
    """

    over: tuple[Axis, ...] | None
    under: tuple[Axis, ...]

    def __new__(cls, n: int, over: Sequence[Axis] | None, under: Sequence[Axis] = ()) -> Number:
        """Make one."""
        self = super().__new__(cls, n)
        self.over, self.under = None if over is None else (*over,), (*under,)
        return self

    def __reduce__(self) -> Any:
        return int, (int(self),)

    def __deepcopy__(self, memo: object) -> int:
        return int(self)


def _factors(n: int) -> Factors:
    return (n.over, n.under) if isinstance(n, Number) else ((int(n),), ())


def _times(first: int, second: int, result: int) -> Factors:
    (over, under), (other_over, other_under) = _factors(first), _factors(second)
    if over is None or other_over is None:
        return None, ()
    return (*over, *other_over), (*under, *other_under)


def _divided(first: int, second: int, result: int) -> Factors:
    (over, under), (other_over, other_under) = _factors(first), _factors(second)
    if over is None or other_over is None or result * second != first:
        return None, ()
    return (*over, *other_under), (*under, *other_over)


def _plus(first: int, second: int, result: int) -> Factors:
    (over, under), (other_over, other_under) = _factors(first), _factors(second)
    if over is None or other_over is None or under or other_under:
        return None, ()
    return [join([product(over), product(other_over)])], ()


def _forgotten(first: int, second: int, result: int) -> Factors:
    return None, ()


def _follow_arithmetic(name: str, combine: Callable[[int, int, int], Factors]) -> None:
    """Let an operation on whole numbers remember what its result counts; with anything else it is as ever."""
    plain = getattr(int, name)

    def method(self: Number, *other: Any) -> Any:
        result = plain(self, *other)
        if result is NotImplemented or not isinstance(result, int) or not all(isinstance(x, int) for x in other):
            return result
        return Number(result, *combine(self, other[0] if other else 0, result))

    setattr(Number, name, method)


for _name in ("__mul__", "__rmul__"):
    _follow_arithmetic(_name, _times)
for _name in ("__add__", "__radd__"):
    _follow_arithmetic(_name, _plus)
for _name in ("__sub__", "__rsub__", "__mod__", "__neg__"):
    _follow_arithmetic(_name, _forgotten)
_follow_arithmetic("__floordiv__", _divided)
