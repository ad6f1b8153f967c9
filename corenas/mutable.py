"""What a layer is that can take several shapes, and how a model is given one arch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

from torch import nn

from corenas.value import Constant, Dimension, Value, largest_of

Values = Mapping[str, Value | Dimension]


@runtime_checkable
class Mutable(Protocol):
    """A module that can take several shapes.

    values: what its shape follows from; a layer with an output axis names it `outputs`
    choice: the numbers of those values under the arch in force; `apply` alone writes it, `chosen` gives the first
    """

    values: Values
    choice: Mapping[str, Any]


@runtime_checkable
class Exportable(Protocol):
    """A mutable that is replaced as a whole on export. One without `export` is traced through instead."""

    def export(self) -> nn.Module | nn.Parameter:
        """The chosen part as a module of torch.nn, with a copy of its weights; a parameter, where that is all it is."""
        ...


@runtime_checkable
class Gated(Protocol):
    """A mutable some of whose children run only under some archs: elastic depth, a mixed operation."""

    def gates(self) -> Iterable[tuple[nn.Module, Value]]:
        """Its children, each with a value that is 1 where it runs and 0 where it does not."""
        ...


@runtime_checkable
class Resizing(Protocol):
    """A mutable whose values change how many positions (pixels, tokens) the layers after it see."""

    resizes: tuple[str, ...]


def chosen(values: Values) -> dict[str, Any]:
    """The choice of a new mutable, that of the largest arch: numbers at their largest, all else at its first choice."""
    parts = [part for value in values.values() for part in Dimension.of(value).parts]
    largest = {key: largest_of(choices) for part in parts for key, choices in part.domains.items()}
    return {name: value(largest) for name, value in values.items()}


def mutables(model: nn.Module) -> Iterator[Mutable]:
    """All mutables of a model, itself included."""
    # A look at the dictionary: an isinstance check of a Protocol for each of a thousand modules takes milliseconds.
    return (module for module in model.modules() if "values" in module.__dict__)  # type: ignore[misc]


def keys_used(model: nn.Module) -> set[str]:
    """The keys of all variables that some layer of the model depends on."""
    return {key for mutable in mutables(model) for value in mutable.values.values() for key in value.keys}


def apply(model: nn.Module, choices: Mapping[str, Any]) -> Applied:
    """Give every mutable of a model its part of an arch; as `with apply(model, arch):` for a while only.

    choices: a choice for each key; for a mixed operation it may be a tensor of weights, one per candidate; one with a
        gradient only in a `with`, since a model that holds it cannot be copied
    Raises KeyError for a key that the choices lack; the model is then as it was.
    """
    known: dict[Value | Dimension, Any] = {}

    def number(value: Value | Dimension) -> Any:
        if isinstance(value, Constant):  # 1 is 1.0 to a dictionary, not to a layer
            return value.number
        if value not in known:
            known[value] = value(choices)
        return known[value]

    after = [(m, {name: number(value) for name, value in m.values.items()}) for m in mutables(model)]
    before = [(mutable, mutable.choice) for mutable, _ in after]
    _choose(after)
    return Applied(model, before)


class Applied:
    """An arch in force. Leaving the `with` puts the one before it back in force."""

    def __init__(self, model: nn.Module, before: list[tuple[Mutable, Mapping[str, Any]]]) -> None:
        self._model, self._before = model, before

    def __enter__(self) -> nn.Module:
        return self._model

    def __exit__(self, *error: object) -> None:
        _choose(self._before)


def _choose(choices: Iterable[tuple[Mutable, Mapping[str, Any]]]) -> None:
    for mutable, choice in choices:
        mutable.choice = choice
