"""How a table of TOML becomes a frozen attrs class of options, and what a user hears where it does not.

Nothing is coerced: "12" is no number, 3.7 no whole one, "false" no truth value. All mistakes of a table are found at
once, each with its key.
"""

from __future__ import annotations

import collections.abc
import inspect
import itertools
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import attrs
import cattrs
from cattrs.gen import make_dict_structure_fn, override

from corenas.errors import Fault, Path, UserError, did_you_mean
from corenas.value import Constant, Value, Variable

T = TypeVar("T")
Lookup = Callable[[str, Any], Any]
"""Gives the options of a component, from its kind and its table or its name."""

_SCALARS: dict[type, tuple[type | tuple[type, ...], str]] = {
    int: (int, "a whole number"),
    float: ((int, float), "a number"),
    str: (str, "a string"),
    bool: (bool, "true or false"),
}


class _Rejected(Exception):  # noqa: N818 - not all who reject err
    """A mistake of the user's on its way to a Fault."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


def structure(table: Any, cls: type[T], lookup: Lookup | None = None) -> T:
    """A table as an object of an attrs class.

    Fields may be scalars, tuples, mappings, other attrs classes, `Value` (a number or a variable of a space), unions of
    these, and components: a field with `metadata={"kind": "searchers"}`, which `lookup` resolves.
    Raises UserError with all mistakes, keys relative to the table.
    """
    try:
        return _converter(lookup).structure(table, cls)
    except Exception as error:
        faults = [*_faults(error)]
        if not faults:
            raise
        raise UserError(faults=faults) from None


def _converter(lookup: Lookup | None) -> cattrs.Converter:
    converter = cattrs.Converter(detailed_validation=True, forbid_extra_keys=True)
    for scalar in _SCALARS:
        converter.register_structure_hook(scalar, _scalar)
    converter.register_structure_hook_func(lambda t: t is Value, _value)
    converter.register_structure_hook_func(lambda t: t is Any, lambda value, _: value)
    converter.register_structure_hook_factory(_is_union, lambda t: _union(converter, t))
    converter.register_structure_hook_factory(_is_annotated, lambda t: _annotated(converter, t))
    converter.register_structure_hook_factory(_is_literal, lambda t: _literal)
    converter.register_structure_hook_factory(_is_list, lambda t: _list(converter, t))
    converter.register_structure_hook_factory(_is_mapping, lambda t: _mapping(converter, t))
    converter.register_structure_hook_factory(attrs.has, lambda t: _class(converter, t, lookup))
    return converter


def _found(value: Any) -> str:
    if isinstance(value, Constant):  # a number in a space's tree
        value = value.number
    if isinstance(value, Value):
        return "found a variable: this cannot be searched"
    try:
        text = {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)
    except ValueError:  # Python writes out no whole number of more than 4,300 digits
        text = "a huge number"
    return f"found {text if len(text) <= 100 else text[:97] + '...'}"


def _scalar(value: Any, cls: type) -> Any:
    accepted, expected = _SCALARS[cls]
    if isinstance(value, Constant):
        value = value.number
    if not isinstance(value, accepted) or (isinstance(value, bool) and cls is not bool) or _is_nan(value):
        raise _Rejected(f"expected {expected}, {_found(value)}")
    try:
        return float(value) if cls is float else value
    except OverflowError:
        raise _Rejected(f"expected {expected}, found one that is too large") from None


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _value(value: Any, _: Any) -> Value:
    if isinstance(value, Value):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf:
        return Constant(value)
    raise _Rejected(f"expected a number or a variable, {_found(value)}")


def _is_union(t: Any) -> bool:
    return typing.get_origin(t) in (typing.Union, types.UnionType)


def _is_annotated(t: Any) -> bool:
    return typing.get_origin(t) is typing.Annotated


def _annotated(converter: cattrs.Converter, t: Any) -> Callable[[Any, Any], Any]:
    """`Annotated[type, "what is expected", check]`, where check is false for what is not."""
    inner, _, check = typing.get_args(t)

    def hook(value: Any, _: Any) -> Any:
        try:
            result = converter.structure(value, inner)
        except _Rejected:
            result = None
        if result is None or not check(result):
            raise _Rejected(f"expected {expectation(t)}, {_found(value)}")
        return result

    return hook


def _is_literal(t: Any) -> bool:
    return typing.get_origin(t) is typing.Literal


def _is_list(t: Any) -> bool:
    return (typing.get_origin(t) or t) in (tuple, list, collections.abc.Sequence)


def _is_mapping(t: Any) -> bool:
    return (typing.get_origin(t) or t) in (dict, collections.abc.Mapping)


def _union(converter: cattrs.Converter, union: Any) -> Callable[[Any, Any], Any]:
    arms = [arm for arm in typing.get_args(union) if arm is not type(None)]
    optional = len(arms) < len(typing.get_args(union))

    def hook(value: Any, _: Any) -> Any:
        if value is None and optional:
            return None
        # A table can only be the class, a list only the tuple: their mistakes are then told, not the union's.
        shaped = [arm for arm in arms if _fits(value, arm)]
        if len(shaped) == 1:
            return converter.structure(value, shaped[0])
        for arm in arms:
            try:
                return converter.structure(value, arm)
            except Exception as error:
                if not [*_faults(error)]:
                    raise
        raise _Rejected(f"expected {expectation(union)}, {_found(value)}")

    return hook


def _fits(value: Any, arm: Any) -> bool:
    if isinstance(value, Mapping):
        return attrs.has(arm) or _is_mapping(arm)
    return isinstance(value, list | tuple) and _is_list(arm)


def expectation(t: Any) -> str:
    """A type in the words of somebody who writes TOML."""
    if t in _SCALARS:
        return _SCALARS[t][1]
    if t is Value:
        return "a number or a variable"
    if _is_annotated(t):
        return typing.get_args(t)[1]
    if _is_literal(t):
        return " or ".join(repr(choice) for choice in typing.get_args(t))
    if _is_union(t):
        return " or ".join(dict.fromkeys(expectation(arm) for arm in typing.get_args(t) if arm is not type(None)))
    if _is_list(t):
        inner = {arm for arm in typing.get_args(t) if arm is not Ellipsis}
        plural = f"{expectation(inner.pop()).removeprefix('a ')}s" if len(inner) == 1 and inner <= {*_SCALARS} else ""
        return f"a list of {plural.replace('true or falses', 'true and false')}" if plural else "a list"
    return "anything" if t is Any else "a table"


def _literal(value: Any, t: Any) -> Any:
    if isinstance(value, Constant):
        value = value.number
    if not any(type(choice) is type(value) and choice == value for choice in typing.get_args(t)):
        raise _Rejected(f"expected {expectation(t)}, {_found(value)}")
    return value


def _list(converter: cattrs.Converter, t: Any) -> Callable[[Any, Any], Any]:
    arms = typing.get_args(t) or (Any,)
    fixed = typing.get_origin(t) is tuple and Ellipsis not in arms

    def hook(value: Any, _: Any) -> Any:
        if not isinstance(value, list | tuple):
            raise _Rejected(f"expected {expectation(t)}, {_found(value)}")
        if fixed and len(arms) != len(value):
            raise _Rejected(f"expected {len(arms)} items, found {len(value)}")
        inner = arms if fixed else itertools.repeat(arms[0])
        items = _each((i, converter.structure, item, arm) for i, (item, arm) in enumerate(zip(value, inner)))  # noqa: B905
        return list(items.values()) if list in (t, typing.get_origin(t)) else tuple(items.values())

    return hook


def _mapping(converter: cattrs.Converter, t: Any) -> Callable[[Any, Any], Any]:
    arms = typing.get_args(t) or (str, Any)

    def hook(value: Any, _: Any) -> Any:
        if not isinstance(value, Mapping):
            raise _Rejected(f"expected a table, {_found(value)}")
        return _each((key, converter.structure, item, arms[1]) for key, item in value.items())

    return hook


def _each(calls: Iterable[tuple[Any, Callable[[Any, Any], Any], Any, Any]]) -> dict[Any, Any]:
    """The results of calls (key, function, its two arguments) by key; what they raise together, noted with keys."""
    found, errors = {}, []
    for key, function, first, second in calls:
        try:
            found[key] = function(first, second)
        except Exception as error:
            error.__notes__ = [*getattr(error, "__notes__", []), cattrs.IterableValidationNote("item", key, None)]
            errors.append(error)
    if errors:
        raise cattrs.IterableValidationError("items", errors, tuple)  # type: ignore[call-arg]
    return found


def _class(converter: cattrs.Converter, cls: type, lookup: Lookup | None) -> Callable[[Any, Any], Any]:
    attrs.resolve_types(cls)
    overrides = {}
    for attribute in attrs.fields(cls):
        overrides[attribute.name] = override(struct_hook=_checked(converter, attribute, lookup))
    fill = make_dict_structure_fn(cls, converter, _cattrs_forbid_extra_keys=True, **overrides)  # type: ignore[arg-type]

    def hook(value: Any, t: Any) -> Any:
        if not isinstance(value, Mapping):
            raise _Rejected(f"expected a table, {_found(value)}")
        return fill(value, t)

    return hook


def _checked(converter: cattrs.Converter, attribute: attrs.Attribute[Any], lookup: Lookup | None) -> Any:
    """Structures one field and runs its validator while the key is known."""
    kind = attribute.metadata.get("kind")

    def hook(value: Any, _: Any) -> Any:
        if kind is not None and lookup is not None:
            if not _is_list(attribute.type):
                return lookup(kind, value)
            if not isinstance(value, list | tuple):
                raise _Rejected(f"expected a list, {_found(value)}")
            return tuple(_each((i, lookup, kind, item) for i, item in enumerate(value)).values())
        result = converter.structure(value, attribute.type)  # type: ignore[arg-type]
        if attribute.validator is not None:
            try:
                attribute.validator(None, attribute, result)
            except (ValueError, TypeError) as error:
                # attrs says "'parents' must be >= 1: 0"; the key stands in the message already.
                raise _Rejected(str(error.args[0]).removeprefix(f"{attribute.name!r} ")) from None
            except AttributeError:  # a validator that looks at the other fields too: it runs when all are there
                pass
        return result

    return hook


def _faults(error: BaseException, path: Path = ()) -> Iterator[Fault]:
    """Every mistake in a tree of errors, each with its key."""
    if isinstance(error, cattrs.ClassValidationError | cattrs.IterableValidationError):
        owner = error.cl if isinstance(error, cattrs.ClassValidationError) else None
        noted, plain = error.group_exceptions()
        for inner, note in noted:
            key = note.name if isinstance(note, cattrs.AttributeValidationNote) else note.index
            if isinstance(inner, KeyError) and inner.args == (key,):
                inner = _Rejected("required key is missing")
            for fault in _faults(inner, (*path, key)):
                yield _explained(fault, owner, path)
        for inner in plain:
            if isinstance(inner, ValueError):  # of a validator that looks at several fields, of __attrs_post_init__
                inner = _Rejected(str(inner))
            yield from _faults(inner, path)
    elif isinstance(error, cattrs.ForbiddenExtraKeysError):
        names = [field.name for field in attrs.fields(error.cl) if field.init]
        for key in sorted(map(str, error.extra_fields)):
            yield Fault("unknown key", (*path, key), hint=did_you_mean(key, names, "keys here"))
    elif isinstance(error, UserError):
        yield from error.under(*path).faults
    elif isinstance(error, _Rejected):
        yield Fault(str(error), path, hint=error.hint)


def _explained(fault: Fault, cls: Any, path: Path) -> Fault:
    """A mistake in the value of a field, with what the field is about."""
    if fault.hint is None and cls is not None:
        name = str(fault.key[len(path)])
        text = explanations(cls).get(name)
        if text:
            return attrs.evolve(fault, hint=f"{name}: {text}")
    return fault


def explanations(cls: type) -> dict[str, str]:
    """What the docstring of an options class says of each field: the lines `name: what it means`."""
    names = {field.name for field in attrs.fields(cls)}
    found: dict[str, str] = {}
    current: list[str] = []
    for line in inspect.cleandoc(cls.__doc__ or "").splitlines():
        match = re.match(r"((?:\w+, )*\w+): (.+)", line)
        if match and set(match[1].split(", ")) <= names:
            current = match[1].split(", ")
            found |= dict.fromkeys(current, match[2])
        elif current and line.startswith(" "):
            found |= {name: f"{found[name]} {line.strip()}" for name in current}
        else:
            current = []
    return found


def to_table(options: Any) -> Any:
    """Options as a table of TOML again, what is None left out; a value as its number or its choices."""
    if isinstance(options, Constant):
        return options.number
    if isinstance(options, Variable):
        return list(options.choices)
    if attrs.has(type(options)):
        table = {f.name: to_table(getattr(options, f.name)) for f in attrs.fields(type(options)) if f.init}
        return {key: value for key, value in table.items() if value is not None}
    if isinstance(options, Mapping):
        return {key: to_table(value) for key, value in options.items()}
    if isinstance(options, list | tuple):
        return [to_table(item) for item in options]
    return options
