"""How a table of TOML becomes a frozen attrs class of options, and what a user hears where it does not.

Nothing is coerced: "12" is no number, 3.7 no whole one, "false" no truth value. All mistakes of a table are found at
once, each with its key.
"""

from __future__ import annotations

import collections.abc
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
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


class _Rejected(Exception):
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
        faults = [*_faults(error, cls)]
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
    converter.register_structure_hook_factory(_is_literal, lambda t: _literal)
    converter.register_structure_hook_factory(_is_tuple, lambda t: _tuple(converter, t))
    converter.register_structure_hook_factory(attrs.has, lambda t: _class(converter, t, lookup))
    return converter


def _found(value: Any) -> str:
    return f"found {'true' if value is True else 'false' if value is False else repr(value)}"


def _scalar(value: Any, cls: type) -> Any:
    accepted, expected = _SCALARS[cls]
    if isinstance(value, Constant):  # a number in a space's tree
        value = value.number
    if isinstance(value, Variable):
        raise _Rejected(f"expected {expected}: this cannot be searched")
    if not isinstance(value, accepted) or (isinstance(value, bool) and cls is not bool):
        raise _Rejected(f"expected {expected}, {_found(value)}")
    return float(value) if cls is float else value


def _value(value: Any, _: Any) -> Value:
    if isinstance(value, Value):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return Constant(value)
    raise _Rejected(f"expected a number or a variable, {_found(value)}")


def _is_union(t: Any) -> bool:
    return typing.get_origin(t) in (typing.Union, types.UnionType)


def _is_literal(t: Any) -> bool:
    return typing.get_origin(t) is typing.Literal


def _is_tuple(t: Any) -> bool:
    return typing.get_origin(t) is tuple


def _union(converter: cattrs.Converter, union: Any) -> Callable[[Any, Any], Any]:
    arms = [arm for arm in typing.get_args(union) if arm is not type(None)]

    def hook(value: Any, _: Any) -> Any:
        if value is None:
            return None
        # A table can only be the class, a list only the tuple: their mistakes are then told, not the union's.
        shaped = [arm for arm in arms if _fits(value, arm)]
        if len(shaped) == 1:
            return converter.structure(value, shaped[0])
        for arm in arms:
            try:
                return converter.structure(value, arm)
            except Exception as error:
                if not [*_faults(error, arm)]:
                    raise
        raise _Rejected(f"expected {' or '.join(expectation(arm) for arm in arms)}, {_found(value)}")

    return hook


def _fits(value: Any, arm: Any) -> bool:
    if isinstance(value, Mapping):
        return attrs.has(arm) or typing.get_origin(arm) in (dict, collections.abc.Mapping)
    return isinstance(value, list) and _is_tuple(arm)


def expectation(t: Any) -> str:
    """A type in the words of somebody who writes TOML."""
    if t in _SCALARS:
        return _SCALARS[t][1]
    if t is Value:
        return "a number or a variable"
    if _is_literal(t):
        return " or ".join(repr(choice) for choice in typing.get_args(t))
    if _is_union(t):
        return " or ".join(expectation(arm) for arm in typing.get_args(t) if arm is not type(None))
    if typing.get_origin(t) in (tuple, list):
        inner = [arm for arm in typing.get_args(t) if arm is not Ellipsis]
        return f"a list of {expectation(inner[0]).removeprefix('a ')}s" if len(set(inner)) == 1 else "a list"
    return "anything" if t is Any else "a table"


def _literal(value: Any, t: Any) -> Any:
    choices = typing.get_args(t)
    if value not in choices:
        raise _Rejected(f"expected {expectation(t)}, {_found(value)}")
    return value


def _tuple(converter: cattrs.Converter, t: Any) -> Callable[[Any, Any], Any]:
    arms = typing.get_args(t)

    def hook(value: Any, _: Any) -> Any:
        if not isinstance(value, list | tuple):
            raise _Rejected(f"expected {expectation(t)}, {_found(value)}")
        inner = [arms[0]] * len(value) if len(arms) == 2 and arms[1] is Ellipsis else list(arms)
        if len(inner) != len(value):
            raise _Rejected(f"expected {len(inner)} items, found {len(value)}")
        items, errors = [], []
        for i, (item, arm) in enumerate(zip(value, inner, strict=True)):
            try:
                items.append(converter.structure(item, arm))
            except Exception as error:
                errors.append(_noted(error, i))
        if errors:
            raise cattrs.IterableValidationError("items", errors, t)
        return tuple(items)

    return hook


def _noted(error: Exception, index: int) -> Exception:
    error.__notes__ = [*getattr(error, "__notes__", []), cattrs.IterableValidationNote("item", index, None)]
    return error


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
            many = _is_tuple(attribute.type)
            if many and not isinstance(value, list):
                raise _Rejected(f"expected a list, {_found(value)}")
            return _each(lookup, kind, value) if many else lookup(kind, value)
        result = converter.structure(value, attribute.type)
        if attribute.validator is not None:
            try:
                attribute.validator(None, attribute, result)
            except (ValueError, TypeError) as error:
                # attrs says "'parents' must be >= 1: 0"; the key stands in the message already.
                raise _Rejected(str(error.args[0]).removeprefix(f"{attribute.name!r} ")) from None
        return result

    return hook


def _each(lookup: Lookup, kind: str, items: list[Any]) -> tuple[Any, ...]:
    found, errors = [], []
    for i, item in enumerate(items):
        try:
            found.append(lookup(kind, item))
        except UserError as error:
            errors.append(_noted(error, i))
    if errors:
        raise cattrs.IterableValidationError("items", errors, tuple)
    return tuple(found)


def _faults(error: BaseException, cls: Any, path: Path = ()) -> Iterator[Fault]:
    """Every mistake in a tree of errors, each with its key."""
    if isinstance(error, cattrs.ClassValidationError | cattrs.IterableValidationError):
        owner = getattr(error, "cl", cls)
        noted, plain = error.group_exceptions()
        for inner, note in noted:
            key = note.name if isinstance(note, cattrs.AttributeValidationNote) else note.index
            for fault in _faults(inner, owner, (*path, key)):
                yield _explained(fault, owner, path)
        for inner in plain:
            yield from _faults(inner, owner, path)
    elif isinstance(error, cattrs.ForbiddenExtraKeysError):
        for key in sorted(error.extra_fields):
            names = [field.name for field in attrs.fields(error.cl)]
            yield Fault("unknown key", (*path, key), hint=did_you_mean(key, names, "keys here"))
    elif isinstance(error, UserError):
        yield from error.under(*path).faults
    elif isinstance(error, KeyError):
        yield Fault("required key is missing", (*path, str(error.args[0])))
    elif isinstance(error, _Rejected):
        yield Fault(str(error), path, hint=error.hint)


def _explained(fault: Fault, cls: Any, path: Path) -> Fault:
    """A mistake in the value of a field, with what the field is about."""
    if fault.hint is None and len(fault.key) > len(path) and attrs.has(cls):
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
    """Options as a table of TOML again, what is None left out."""
    if attrs.has(type(options)):
        table = {f.name: to_table(getattr(options, f.name)) for f in attrs.fields(type(options)) if f.init}
        return {key: value for key, value in table.items() if value is not None}
    if isinstance(options, Mapping):
        return {key: to_table(value) for key, value in options.items()}
    if isinstance(options, list | tuple):
        return [to_table(item) for item in options]
    return options
