"""What a dimension of a layer is: a number, a variable's key, or an expression over them."""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from attrs import frozen

Choices = Mapping[str, Any]
"""What a value is computed from: key -> choice, or key -> column of choices of many archs."""

LARGEST_TABLE = 1 << 16
"""The largest number of combinations of choices that is tabulated for one value."""


class TooManyCombinationsError(ValueError):
    """The variables of a value have more combinations of choices than are tabulated."""


class Value:
    """A number that may depend on the arch; called with choices it gives that number, with columns a column.

    Its keys and all its possible numbers are known without running anything. Values are immutable, hashable and
    equal by structure; `+`, `-`, `*` and `//` build expressions.
    """

    domains: Mapping[str, Sequence[Any]]
    """The keys it depends on, each with the choices of that variable."""

    def __call__(self, choices: Choices) -> Any:
        """Return the number, or the column, of some choices."""
        raise NotImplementedError

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of the variables it depends on."""
        return tuple(self.domains)

    @cached_property
    def possible(self) -> tuple[Any, ...]:
        """All numbers it can be, in order.

        Raises TooManyCombinationsError if its variables have more than 65,536.
        """
        return tuple(np.unique(np.asarray(self(grid(self.domains)))).tolist())

    @property
    def largest(self) -> Any:
        """The largest number it can be, what a supernet allocates; of strings the first."""
        return self.possible[-1]

    def __deepcopy__(self, memo: object) -> Value:
        return self

    def __add__(self, other: Value | float) -> Value:
        return combine(operator.add, self, other)

    __radd__ = __add__

    def __sub__(self, other: Value | float) -> Value:
        return combine(operator.sub, self, other)

    def __mul__(self, other: Value | float) -> Value:
        return combine(operator.mul, self, other)

    __rmul__ = __mul__

    def __floordiv__(self, other: Value | float) -> Value:
        return combine(operator.floordiv, self, other)


@frozen(slots=False)
class Constant(Value):
    """A number that no arch changes."""

    number: Any
    domains: ClassVar[Mapping[str, Sequence[Any]]] = {}  # type: ignore[misc]

    @cached_property
    def possible(self) -> tuple[Any, ...]:
        """The one number."""
        return (self.number,)

    def __call__(self, choices: Choices) -> Any:
        """Return the number, or the column, of some choices."""
        return self.number


@frozen(slots=False, cache_hash=True)
class Expression(Value):
    """A function of other values. The function takes numbers as well as numpy columns and is importable by name."""

    function: Callable[..., Any]
    arguments: tuple[Value, ...]

    @cached_property
    def domains(self) -> Mapping[str, Sequence[Any]]:  # type: ignore[override]
        """Those of its arguments. Raises ValueError if a key has different choices in two of them."""
        result: dict[str, Sequence[Any]] = {}
        for key, choices in itertools.chain(*(argument.domains.items() for argument in self.arguments)):
            if result.setdefault(key, choices) != choices:
                raise ValueError(f"variable {key!r} has the choices {result[key]} here and {choices} there")
        return result

    @cached_property
    def largest(self) -> Any:  # type: ignore[override]
        """The largest number it can be, also of too many combinations if it grows with each of its variables."""
        try:
            return self.possible[-1]
        except TooManyCombinationsError:
            if not _grows(self):
                raise
            return self({key: largest_of(choices) for key, choices in self.domains.items()})

    def __call__(self, choices: Choices) -> Any:
        """Return the number, or the column, of some choices."""
        return self.function(*(argument(choices) for argument in self.arguments))


def _grows(value: Value) -> bool:
    """Return whether a value, of numbers from 0 on, never falls where one of its variables rises."""
    if not isinstance(value, Expression):
        numbers = [number for choices in value.domains.values() for number in choices] or value.possible
        return not any(isinstance(number, str) or number < 0 for number in numbers)
    if value.function not in (operator.add, operator.mul, operator.floordiv, _rounded, _make_divisible):
        return False
    fixed = value.function in (operator.floordiv, _make_divisible)  # in all but the first argument
    constant = all(isinstance(argument, Constant) for argument in value.arguments[1:])
    return (constant or not fixed) and all(map(_grows, value.arguments))


def as_value(value: Value | float | str) -> Value:
    """Return a number, or a string, as a value; a value as it is."""
    return value if isinstance(value, Value) else Constant(value)


def combine(function: Callable[..., Any], *arguments: Any) -> Value:
    """Return the value of a function of values and numbers; computed at once where all of them are numbers."""
    values = tuple(as_value(argument) for argument in arguments)
    if all(isinstance(value, Constant) for value in values):
        return Constant(function(*(value({}) for value in values)))
    return Expression(function, values)


def largest_of(choices: Sequence[Any]) -> Any:
    """Return the largest of a variable's choices if they are numbers, of strings the first."""
    return choices[0] if isinstance(choices[0], str) else max(choices)


def grid(domains: Mapping[str, Sequence[Any]]) -> dict[str, np.ndarray]:
    """Return every combination of choices as columns, the last key changing fastest.

    Raises TooManyCombinationsError beyond 65,536 rows.
    """
    sizes = [len(choices) for choices in domains.values()]
    if (number := math.prod(sizes)) > LARGEST_TABLE:
        raise TooManyCombinationsError(f"{number:,} combinations of {', '.join(domains)} are too many to tabulate")
    indices = np.indices(sizes).reshape(len(sizes), -1)
    return {key: np.asarray(domains[key])[index] for key, index in zip(domains, indices, strict=True)}


def rounded(value: Value | float) -> Value:
    """Return the nearest whole number, halves to even as Python's `round`."""
    return combine(_rounded, value)


def make_divisible(value: Value | float, divisor: int = 8, smallest: int | None = None) -> Value:
    """Return the nearest multiple of `divisor` that is not under 90% of the number, at least `smallest` (or `divisor`).

    The rounding of channels in MobileNetV2's reference code (Sandler et al. 2018, arXiv:1801.04381).
    """
    return combine(_make_divisible, value, divisor, divisor if smallest is None else smallest)


def at_least(value: Value | float, number: float) -> Value:
    """Return 1 where the value reaches `number`, else 0: the gate of a block that only deeper stages have."""
    return combine(_compared, operator.ge, value, number)


def equals(value: Value | float, choice: Any) -> Value:
    """Return 1 where the value is `choice`, else 0: the gate of one candidate of a mixed operation."""
    return combine(_compared, operator.eq, value, choice)


def looked_up(table: Mapping[tuple[Any, ...], float], *values: Value) -> Value:
    """Return the number that a table gives for each combination of the values' numbers; the table has all of them."""
    if len(set(table.values())) == 1:
        return Constant(next(iter(table.values())))
    axes = tuple(value.possible for value in values)
    numbers = tuple(table[combination] for combination in itertools.product(*axes))
    return combine(_looked_up, Constant(axes), Constant(numbers), *values)


def _whole(x: Any) -> Any:
    if not isinstance(x, np.ndarray):
        return int(x)
    if x.dtype.kind == "f" and not (np.abs(x) < 2.0**63).all():  # numpy would warn, and give any number
        raise OverflowError("a number of channels, or another of a layer, is beyond 64 bits")
    return x.astype(np.int64)


def _rounded(x: Any) -> Any:
    return _whole(np.rint(x.astype(float))) if isinstance(x, np.ndarray) else round(x)


def _make_divisible(x: Any, divisor: int, smallest: int) -> Any:
    near = _whole((x + divisor / 2) // divisor * divisor)
    near = near + (smallest - near) * (near < smallest)
    return near + divisor * (near < 0.9 * x)


def _compared(compare: Callable[[Any, Any], Any], x: Any, y: Any) -> Any:
    return _whole(compare(x, y))


def _looked_up(axes: tuple[tuple[Any, ...], ...], numbers: tuple[float, ...], *columns: Any) -> Any:
    row: Any = 0
    for axis, column in zip(axes, columns, strict=True):
        row = row * len(axis) + np.searchsorted(axis, column)
    return np.asarray(numbers)[row] if isinstance(row, np.ndarray) else numbers[row]


@frozen(slots=False)
class Dimension:
    """One axis of a layer: the values of its parts, in order. Active are the first `value` elements of each part.

    One part is the common case (and a view of a weight); several stand where layers are concatenated, or where one
    layer holds several things side by side, as qkv does.
    """

    parts: tuple[Value, ...]

    @classmethod
    def of(cls, size: Dimension | Value | float | Iterable[Value | float]) -> Dimension:
        """Return a dimension from one value, from several parts, or from itself."""
        if isinstance(size, Dimension):
            return size
        parts = (size,) if isinstance(size, Value | int | float) else size
        return cls(tuple(map(as_value, parts)))

    @property
    def size(self) -> Value:
        """The number of active elements."""
        return functools.reduce(operator.add, self.parts)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """How many elements of each part a supernet's weight has."""
        return tuple(part.largest for part in self.parts)

    @property
    def allocated(self) -> int:
        """The number of elements that a supernet's weight has along this axis."""
        return sum(self.sizes)

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of the variables it depends on."""
        return tuple(dict.fromkeys(key for part in self.parts for key in part.keys))

    def __call__(self, choices: Choices) -> tuple[int, ...]:
        """Return how many elements of each part are active."""
        return tuple(part(choices) for part in self.parts)

    def __deepcopy__(self, memo: object) -> Dimension:
        return self

    def __add__(self, other: Dimension) -> Dimension:
        """Return the dimension of two layers' outputs, concatenated."""
        return Dimension((*self.parts, *other.parts))
