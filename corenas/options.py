"""How a table of TOML becomes a frozen attrs class of options, and what a user hears where it does not.

Nothing is coerced: "12" is no number, 3.7 no whole one, "false" no truth value. All mistakes of a table are found at
once, each with its key.
"""

from __future__ import annotations

import collections.abc
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import Annotated, Any, TypeVar

import attrs
import cattrs

from corenas.errors import Fault, UserError, collecting, did_you_mean, raise_if_any
from corenas.value import Constant, Value
from corenas.variables import Variable

T = TypeVar("T")
Lookup = Callable[[str, Any], Any]
"""Gives the options of a component, from its kind and its table or its name."""
Read = Callable[[Any, Any], Any]
"""Gives a value of TOML as a type wants it. Raises UserError with all mistakes in it, keys relative to the value."""

_SCALARS = {int: "whole numbers", float: "numbers", str: "strings", bool: "true and false"}
_WORDS = {
    int: "a whole number",
    float: "a number",
    str: "a string",
    bool: "true or false",
    Value: "a number or a variable",
    Any: "anything",
}
_NUMBER = Annotated[int | float, _WORDS[Value], lambda number: abs(number) < math.inf]
_FORMS: Mapping[Any, Any] = {
    types.UnionType: typing.Union,
    list: tuple,
    collections.abc.Sequence: tuple,
    collections.abc.Mapping: dict,
}
_ACCEPTED: Mapping[Any, tuple[type, ...]] = {
    **{scalar: (scalar,) for scalar in (int, str, bool, type(None))},
    float: (int, float),
    tuple: (list, tuple),
    dict: (dict,),
}
"""What a value has to be, exactly: Python takes True for a whole number."""


def structure(value: Any, t: type[T], lookup: Lookup | None = None, kind: str | None = None) -> T:
    """Return a table as an object of an attrs class; any value of TOML as a type wants it.

    Fields may be scalars, tuples, mappings, other attrs classes, `Value` (a number or a variable of a space), unions of
    these, and components: a field with `metadata={"kind": "searchers"}`, where `lookup` resolves each `Any` of its
    type. The field `from_` has the key `from`. A string stands for the table of a class with a field `type`, as it does
    for a component.
    kind: of the components that `Any` stands for
    Raises UserError with all mistakes, keys relative to the value.
    """
    if t is Any:
        return lookup(kind, value) if lookup and kind else value
    if isinstance(value, Constant):  # a number in a space's tree
        value = value.number
    form = _form(t)
    if type(value) not in _ACCEPTED.get(form, (type(value),)):
        if isinstance(value, str) and _is_typed(t):
            return build(t, {"type": value}, lookup)
        raise _unexpected(value, t)
    if attrs.has(t):
        return build(t, value, lookup)
    return _READERS[form](partial(structure, lookup=lookup, kind=kind), value, t)


def _form(t: Any) -> Any:
    """Return what a type is at its outside: a union, `tuple` for all lists, `dict` for all tables."""
    origin = typing.get_origin(t) or t
    return dict if attrs.has(t) else _FORMS.get(origin, origin)


def _is_typed(t: Any) -> bool:
    return attrs.has(t) and any(field.name == "type" and field.type in (str, "str") for field in attrs.fields(t))


def key_of(field: attrs.Attribute[Any]) -> str:
    """Return the key of a field in TOML: `from` of the field `from_`, which could not be called so in Python."""
    return field.name.removesuffix("_")


def _unexpected(value: Any, t: Any) -> UserError:
    try:
        found = str(value).lower() if isinstance(value, bool) else repr(value)
    except ValueError:  # Python writes out no whole number of more than 4,300 digits
        found = "a huge number"
    if isinstance(value, Value):
        found = "a variable: this cannot be searched"
    return UserError(f"expected {expectation(t)}, found {found if len(found) <= 100 else found[:97] + '...'}")


def _scalar(read: Read, value: Any, t: Any) -> Any:
    with suppress(OverflowError):  # of a whole number that is too large for a float
        result = float(value) if t is float else value
        if result == result:  # NaN is the one number that differs from itself
            return result
    raise _unexpected(value, t)


def _value(read: Read, value: Any, t: Any) -> Value:
    return value if isinstance(value, Value) else Constant(read(value, _NUMBER))


def _literal(read: Read, value: Any, t: Any) -> Any:
    if not any(type(choice) is type(value) and choice == value for choice in typing.get_args(t)):
        raise _unexpected(value, t)
    return value


def _annotated(read: Read, value: Any, t: Any) -> Any:
    """`Annotated[type, "what is expected", check]`, where check is false, or raises ValueError, for what is not."""
    inner, _, check = typing.get_args(t)
    with suppress(UserError, ValueError):
        result = read(value, inner)
        if check(result):
            return result
    raise _unexpected(value, t)


def _union(read: Read, value: Any, t: Any) -> Any:
    for arm in typing.get_args(t):
        try:
            return read(value, arm)
        except UserError:
            # A table can only be the class, a list only the tuple: their mistakes are then told, not the union's.
            if (form := _form(arm)) in (tuple, dict) and type(value) in _ACCEPTED[form]:
                raise
    raise _unexpected(value, t)


def _list(read: Read, value: Any, t: Any) -> Any:
    arms = typing.get_args(t) or (Any, ...)
    if typing.get_origin(t) is not tuple or Ellipsis in arms:
        arms = arms[:1] * len(value)
    if len(arms) != len(value):
        raise UserError(f"expected {len(arms)} items, found {len(value)}")
    items = _each(lambda i: read(value[i], arms[i]), range(len(value))).values()
    return list(items) if typing.get_origin(t) is list else tuple(items)


def _mapping(read: Read, value: Any, t: Any) -> Any:
    _, inner = typing.get_args(t) or (str, Any)
    return _each(lambda key: read(value[key], inner), value)


_READERS: Mapping[Any, Callable[[Read, Any, Any], Any]] = {
    **dict.fromkeys([*_SCALARS, type(None)], _scalar),
    Value: _value,
    typing.Literal: _literal,
    Annotated: _annotated,
    typing.Union: _union,
    tuple: _list,
    dict: _mapping,
}


def build(cls: type[T], table: Mapping[str, Any], lookup: Lookup | None = None, **given: Any) -> T:
    """Return a table as an object of an attrs class, as `structure` does; fields that are given are no keys of it."""
    own = [field for field in attrs.fields(attrs.resolve_types(cls)) if field.init and field.name not in given]
    fields = {key_of(field): field for field in own}

    def read_key(key: str) -> Any:
        if key not in fields:
            raise UserError("unknown key", hint=did_you_mean(str(key), fields, "keys here"))
        try:
            if key not in table:
                raise UserError("required key is missing")
            return _field(lookup, table[key], fields[key])
        except UserError as error:
            meaning = explanations(cls).get(fields[key].name)
            hint = f"{key}: {meaning}" if meaning else None
            raise UserError(faults=[f if f.hint else attrs.evolve(f, hint=hint) for f in error.faults]) from None

    required = [key for key, field in fields.items() if field.default is attrs.NOTHING]
    found = _each(read_key, dict.fromkeys([*required, *table]))
    try:
        return cls(**{fields[key].alias: item for key, item in found.items()}, **given)
    except ValueError as error:  # of a validator that looks at several fields, of __attrs_post_init__
        raise UserError(str(error)) from None


def _field(lookup: Lookup | None, value: Any, field: attrs.Attribute[Any]) -> Any:
    """Read one field and run its validator while the key is known."""
    result: Any = structure(value, field.type or Any, lookup, field.metadata.get("kind"))
    try:
        if callable(field.converter):  # before the validator, as attrs does
            result = field.converter(result)
        if field.validator is not None:
            field.validator(None, field, result)
    except (ValueError, TypeError) as error:
        # attrs says "'parents' must be >= 1: 0"; the key stands in the message already.
        raise UserError(str(error.args[0]).removeprefix(f"{field.name!r} ")) from None
    except AttributeError:  # a validator that looks at the other fields too: it runs when all are there
        pass
    return result


def _each(function: Callable[[Any], Any], keys: Iterable[Any]) -> dict[Any, Any]:
    """Return what a function gives for each key. Raises UserError with the mistakes of all keys, each under its own."""
    found: dict[Any, Any] = {}
    faults: list[Fault] = []
    for key in keys:
        with collecting(faults, key):
            found[key] = function(key)
    raise_if_any(faults)
    return found


def expectation(t: Any) -> str:
    """Return a type in the words of somebody who writes TOML."""
    arms = [arm for arm in typing.get_args(t) if arm not in (type(None), ...)]
    form = _form(t)
    if form is Annotated:
        return arms[1]
    if form is typing.Literal:
        return " or ".join(map(repr, arms))
    if form is typing.Union:
        return " or ".join(dict.fromkeys(map(expectation, arms)))
    if form is tuple:
        return f"a list of {_SCALARS[arms[0]]}" if len({*arms}) == 1 and arms[0] in _SCALARS else "a list"
    return "a table or its type" if _is_typed(t) else _WORDS.get(t, "a table")


def explanations(cls: type) -> dict[str, str]:
    """Return what the docstring of an options class says of each field: the lines `key: what it means`."""
    names = {key_of(field): field.name for field in attrs.fields(cls)}
    found: dict[str, str] = {}
    for match in re.finditer(r"^((?:\w+, )*\w+): (.+(?:\n +.+)*)", inspect.cleandoc(cls.__doc__ or ""), re.MULTILINE):
        keys = match[1].split(", ")
        if names.keys() >= {*keys}:
            found |= {names[key]: re.sub(r"\n +", " ", match[2]) for key in keys}
    return found


def to_table(options: Any, name_of: Callable[[Any], str] | None = None) -> Any:
    """Return options as a table of TOML again, what is None left out; a value as its number or its choices.

    name_of: gives the `type` that stands in the table of a component
    """
    converter = cattrs.BaseConverter()

    def table(options: Any) -> dict[str, Any]:
        items = [(field, getattr(options, field.name)) for field in attrs.fields(type(options)) if field.init]
        return {key_of(field): part(field, item) for field, item in items if item is not None}

    def part(field: attrs.Attribute[Any], item: Any) -> Any:
        if name_of is None or "kind" not in field.metadata:
            return converter.unstructure(item)
        if isinstance(item, list | tuple):
            return [part(field, each) for each in item]
        return {"type": name_of(item), **converter.unstructure(item)}

    converter.register_unstructure_hook_func(attrs.has, table)
    converter.register_unstructure_hook(tuple, lambda items: [*map(converter.unstructure, items)])
    converter.register_unstructure_hook(Constant, lambda constant: constant.number)
    converter.register_unstructure_hook(Variable, lambda variable: [*variable.choices])
    return converter.unstructure(options)
