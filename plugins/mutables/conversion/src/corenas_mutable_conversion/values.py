"""How many elements an axis has under an arch: numbers, values and dimensions of axes whose sizes have values."""

from __future__ import annotations

import functools
import math
import operator
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from corenas.value import Constant, Dimension, Value, at_least
from corenas_mutable_conversion.axes import Axis, Join, Product, Size, free_sizes, inner, product, resolved

Values: TypeAlias = Mapping[Size, Value]
Term: TypeAlias = "tuple[int, tuple[Any, ...]]"
"""A coefficient and the factors that it is multiplied by."""


def number_of(axis: Axis, values: Values, arch: Mapping[str, Any]) -> int:
    """Return how many elements an axis has under an arch."""
    if isinstance(axis, int):
        return int(axis)
    if isinstance(axis, Size):
        if axis.bound is not None:
            return number_of(axis.bound, values, arch)
        return int(values[axis](arch)) if axis in values else axis.n
    numbers = (number_of(part, values, arch) for part in inner(axis))
    return math.prod(numbers) if isinstance(axis, Product) else sum(numbers)


def terms_of(axis: Axis, values: Mapping[Size, Any]) -> list[Term]:
    """Return the number of elements as a sum of products."""
    axis = resolved(axis)
    if isinstance(axis, int):
        return [(int(axis), ())]
    if isinstance(axis, Size):
        value = values.get(axis, Constant(axis.n))
        return [(value.number, ())] if isinstance(value, Constant) else [(1, (value,))]
    if isinstance(axis, Join):
        return [term for part in axis.parts for term in terms_of(part, values)]
    found: list[Term] = [(1, ())]
    for factor in axis.factors:
        own = terms_of(factor, values)
        found = [(n * m, (*some, *others)) for n, some in found for m, others in own]
    return found


def times(term: Term) -> Value:
    """Return a term as a value."""
    n, factors = term
    return functools.reduce(operator.mul, factors) * n if factors else Constant(n)


def value_of(axis: Axis, values: Values) -> Value:
    """Return how many elements an axis has, as a value."""
    return functools.reduce(operator.add, map(times, terms_of(axis, values)))


def form_of(axis: Axis, held: set[Size]) -> frozenset[Any]:
    """Return what the number of elements is a polynomial of, in sizes that are not held."""
    letters: dict[Size, Any] = {size: Constant(size.n) if size in held else size for size in free_sizes(axis)}
    alike: dict[Any, int] = defaultdict(int)
    for n, factors in terms_of(axis, letters):
        alike[tuple(sorted(map(id, factors)))] += n
    return frozenset(alike.items())


def dimension_of(axis: Axis, values: Values) -> Dimension:
    """Return an axis as a dimension: active are the first elements of each of its parts."""
    return Dimension(tuple(_parts(axis, values)))


def _parts(axis: Axis, values: Values) -> Sequence[Value]:
    axis = resolved(axis)
    if isinstance(axis, int):
        return [Constant(int(axis))]
    if isinstance(axis, Size):
        return [values.get(axis, Constant(axis.n))]
    if isinstance(axis, Join):
        return _merged([part for own in axis.parts for part in _parts(own, values)])
    head, *rest = axis.factors
    each = _parts(product(rest), values)
    if len(each) == 1 and isinstance(each[0], Constant):  # heads of a fixed size, one after the other
        return [part * each[0].number for part in _parts(head, values)]
    if isinstance(head, int):
        return [*each] * int(head)
    if isinstance(head, Join):
        return [part for own in head.parts for part in _parts(product([own, *rest]), values)]
    assert isinstance(head, Size)
    number = values.get(head, Constant(head.n))
    if isinstance(number, Constant):
        return [*each] * number.number
    return [part * at_least(number, i + 1) for i in range(head.n) for part in each]


def _merged(parts: Sequence[Value]) -> list[Value]:
    """Return parts with those that are fixed and side by side as one."""
    found: list[Value] = []
    for part in parts:
        if isinstance(part, Constant) and found and isinstance(found[-1], Constant):
            found[-1] = Constant(found[-1].number + part.number)
        else:
            found.append(part)
    return found
