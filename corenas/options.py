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
from typing import Any, TypeVar

import attrs
import cattrs

from corenas.errors import UserError, did_you_mean
from corenas.value import Constant, Value, Variable

T = TypeVar("T")
Lookup = Callable[[str, Any], Any]
"""Gives the options of a component, from its kind and its table or its name."""
Read = Callable[[Any, Any], Any]
"""Gives a value of TOML as a type wants it. Raises UserError with all mistakes in it, keys relative to the value."""

_WORDS = {
    int: "a whole number", float: "a number", str: "a string", bool: "true or false", Value: "a number or a variable",
    Any: "anything",
}  # fmt: skip
_SCALARS = {int: "whole numbers", float: "numbers", str: "strings", bool: "true and false"}
_LITERAL, _ANNOTATED = (typing.Literal,), (typing.Annotated,)
_UNIONS = (typing.Union, types.UnionType)
_LISTS = (tuple, list, collections.abc.Sequence)
_TABLES = (dict, collections.abc.Mapping)


def structure(table: Any, cls: type[T], lookup: Lookup | None = None) -> T:
    """A table as an object of an attrs class.

    Fields may be scalars, tuples, mappings, other attrs classes, `Value` (a number or a variable of a space), unions of
    these, and components: a field with `metadata={"kind": "searchers"}`, which `lookup` resolves. The field `from_` has
    the key `from`.
    Raises UserError with all mistakes, keys relative to the table.
    """
    try:
        return _converter(lookup).structure(table, cls)
    except UserError:
        raise
    except Exception as error:
        error.add_note(f"While structuring {cls.__name__}")
        raise


def key_of(field: attrs.Attribute[Any]) -> str:
    """The key of a field in TOML: `from` of the field `from_`, which could not be called so in Python."""
    return field.name.removesuffix("_")


def _converter(lookup: Lookup | None) -> cattrs.BaseConverter:
    """cattrs finds the hook for a type; the hooks are ours, as its own coerce."""
    converter = cattrs.BaseConverter()
    for scalar in (*_SCALARS, type(None)):
        converter.register_structure_hook(scalar, _scalar)
    converter.register_structure_hook(Value, _value)
    hooks = {_LITERAL: _literal, _ANNOTATED: _annotated, _UNIONS: _union, _LISTS: _list, _TABLES: _mapping}
    for origins, hook in hooks.items():
        converter.register_structure_hook_func(partial(_is_one_of, origins), partial(hook, converter.structure))
    converter.register_structure_hook_func(attrs.has, partial(_class, converter.structure, lookup))
    return converter


def _is_one_of(origins: tuple[Any, ...], t: Any) -> bool:
    return (typing.get_origin(t) or t) in origins


def _unexpected(value: Any, t: Any) -> UserError:
    value = _plain(value)
    try:
        text = str(value).lower() if isinstance(value, bool) else repr(value)
    except ValueError:  # Python writes out no whole number of more than 4,300 digits
        text = "a huge number"
    if isinstance(value, Value):
        text = "a variable: this cannot be searched"
    return UserError(f"expected {expectation(t)}, found {text if len(text) <= 100 else text[:97] + '...'}")


def _plain(value: Any) -> Any:
    return value.number if isinstance(value, Constant) else value  # a number in a space's tree


def _scalar(value: Any, t: type) -> Any:
    value = _plain(value)
    accepted = (int, float) if t is float else (t,)
    if type(value) not in accepted or value != value:  # NaN is the one number that differs from itself
        raise _unexpected(value, t)
    try:
        return float(value) if t is float else value
    except OverflowError:
        raise UserError(f"expected {expectation(t)}, found one that is too large") from None


def _value(value: Any, t: type) -> Value:
    if isinstance(value, Value):
        return value
    if type(value) in (int, float) and abs(value) < math.inf:
        return Constant(value)
    raise _unexpected(value, t)


def _literal(read: Read, value: Any, t: Any) -> Any:
    value = _plain(value)
    if not any(type(choice) is type(value) and choice == value for choice in typing.get_args(t)):
        raise _unexpected(value, t)
    return value


def _annotated(read: Read, value: Any, t: Any) -> Any:
    """`Annotated[type, "what is expected", check]`, where check is false for what is not."""
    inner, _, check = typing.get_args(t)
    with suppress(UserError):
        result = read(value, inner)
        if check(result):
            return result
    raise _unexpected(value, t)


def _union(read: Read, value: Any, t: Any) -> Any:
    arms = typing.get_args(t)
    # A table can only be the class, a list only the tuple: their mistakes are then told, not the union's.
    shaped = [arm for arm in arms if _has_shape(value, arm)]
    if len(shaped) == 1:
        return read(value, shaped[0])
    for arm in arms:
        with suppress(UserError):
            return read(value, arm)
    raise _unexpected(value, t)


def _has_shape(value: Any, t: Any) -> bool:
    if isinstance(value, Mapping):
        return attrs.has(t) or _is_one_of(_TABLES, t)
    return isinstance(value, list | tuple) and _is_one_of(_LISTS, t)


def _list(read: Read, value: Any, t: Any) -> Any:
    if not isinstance(value, list | tuple):
        raise _unexpected(value, t)
    origin, arms = typing.get_origin(t) or t, typing.get_args(t) or (Any, ...)
    if origin is not tuple or Ellipsis in arms:
        arms = arms[:1] * len(value)
    if len(arms) != len(value):
        raise UserError(f"expected {len(arms)} items, found {len(value)}")
    items = _each(lambda i: read(value[i], arms[i]), range(len(value))).values()
    return list(items) if origin is list else tuple(items)


def _mapping(read: Read, value: Any, t: Any) -> Any:
    if not isinstance(value, Mapping):
        raise _unexpected(value, t)
    _, inner = typing.get_args(t) or (str, Any)
    return _each(lambda key: read(value[key], inner), value)


def _class(read: Read, lookup: Lookup | None, value: Any, cls: Any) -> Any:
    if not isinstance(value, Mapping):
        raise _unexpected(value, cls)
    fields = {key_of(field): field for field in attrs.fields(attrs.resolve_types(cls)) if field.init}

    def read_key(key: str) -> Any:
        if key not in fields:
            raise UserError("unknown key", hint=did_you_mean(str(key), fields, "keys here"))
        try:
            if key not in value:
                raise UserError("required key is missing")
            return _field(read, lookup, value[key], fields[key])
        except UserError as error:
            meaning = explanations(cls).get(fields[key].name)
            hint = f"{key}: {meaning}" if meaning else None
            raise UserError(faults=[f if f.hint else attrs.evolve(f, hint=hint) for f in error.faults]) from None

    required = [key for key, field in fields.items() if field.default is attrs.NOTHING]
    found = _each(read_key, dict.fromkeys([*required, *value]))
    try:
        return cls(**{fields[key].alias: item for key, item in found.items()})
    except ValueError as error:  # of a validator that looks at several fields, of __attrs_post_init__
        raise UserError(str(error)) from None


def _field(read: Read, lookup: Lookup | None, value: Any, field: attrs.Attribute[Any]) -> Any:
    """Reads one field and runs its validator while the key is known."""
    kind = field.metadata.get("kind")
    if kind is None or lookup is None:
        result = read(value, field.type)
    elif _is_one_of(_LISTS, field.type):
        result = _list(lambda item, _: lookup(kind, item), value, field.type)
    else:
        result = lookup(kind, value)
    if field.validator is not None:
        try:
            field.validator(None, field, result)
        except (ValueError, TypeError) as error:
            # attrs says "'parents' must be >= 1: 0"; the key stands in the message already.
            raise UserError(str(error.args[0]).removeprefix(f"{field.name!r} ")) from None
        except AttributeError:  # a validator that looks at the other fields too: it runs when all are there
            pass
    return result


def _each(function: Callable[[Any], Any], keys: Iterable[Any]) -> dict[Any, Any]:
    """What a function gives for each key. Raises UserError with the mistakes of all keys, each under its own."""
    found, faults = {}, []
    for key in keys:
        try:
            found[key] = function(key)
        except UserError as error:
            faults += [fault.under(key if isinstance(key, int) else str(key)) for fault in error.faults]
    if faults:
        raise UserError(faults=faults)
    return found


def expectation(t: Any) -> str:
    """A type in the words of somebody who writes TOML."""
    arms = [arm for arm in typing.get_args(t) if arm not in (type(None), ...)]
    if t in _WORDS:
        return _WORDS[t]
    if _is_one_of(_ANNOTATED, t):
        return arms[1]
    if _is_one_of(_LITERAL, t):
        return " or ".join(map(repr, arms))
    if _is_one_of(_UNIONS, t):
        return " or ".join(dict.fromkeys(map(expectation, arms)))
    if _is_one_of(_LISTS, t):
        return f"a list of {_SCALARS[arms[0]]}" if len({*arms}) == 1 and arms[0] in _SCALARS else "a list"
    return "a table"


def explanations(cls: type) -> dict[str, str]:
    """What the docstring of an options class says of each field: the lines `key: what it means`."""
    names = {key_of(field): field.name for field in attrs.fields(cls)}
    found: dict[str, str] = {}
    for match in re.finditer(r"^((?:\w+, )*\w+): (.+(?:\n +.+)*)", inspect.cleandoc(cls.__doc__ or ""), re.MULTILINE):
        keys = match[1].split(", ")
        if names.keys() >= {*keys}:
            found |= {names[key]: re.sub(r"\n +", " ", match[2]) for key in keys}
    return found


def to_table(options: Any, name_of: Callable[[Any], str] | None = None, component: bool = False) -> Any:
    """Options as a table of TOML again, what is None left out; a value as its number or its choices.

    name_of: gives the `type` that stands in the table of a component
    """
    if isinstance(options, Constant):
        return options.number
    if isinstance(options, Variable):
        return list(options.choices)
    if attrs.has(type(options)):
        table = {"type": name_of(options)} if component and name_of else {}
        for field in attrs.fields(type(options)):
            item = getattr(options, field.name)
            if field.init and item is not None:
                table[key_of(field)] = to_table(item, name_of, "kind" in field.metadata)
        return table
    if isinstance(options, Mapping):
        return {key: to_table(item, name_of) for key, item in options.items()}
    if isinstance(options, list | tuple):
        return [to_table(item, name_of, component) for item in options]
    return options
