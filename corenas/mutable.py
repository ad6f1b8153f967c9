"""What a layer is that can take several shapes, what it costs, and how a model is given one arch."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from attrs import Factory, define, frozen
from torch import nn

from corenas.value import Constant, Dimension, Value, as_value, largest_of
from corenas.variables import variables_of

if TYPE_CHECKING:
    from typing_extensions import TypeIs

T = TypeVar("T")
Values = Mapping[str, Value | Dimension]


# -- contracts --------------------------------------------------------------------------------------------------------


class Elastic:
    """What a layer's shape follows from, and its numbers now: the one attribute, `elastic`, that makes it a mutable.

    values: by name, never changed; a layer with an output axis names it `outputs`
    choice: the number of each value under the arch in force, of a dimension the numbers of its parts. A new one is
        that of the largest arch. `apply` alone writes it, always as a whole: layers share choices.
    """

    __slots__ = ("choice", "values")

    def __init__(self, values: Values) -> None:
        self.values: Values = dict(values)
        self.choice: Mapping[str, Any] = largest_choice(self.values)

    def extended(self, values: Values) -> Elastic:
        """Return the same with some more values, these at their largest."""
        more = Elastic({**self.values, **values})
        more.choice = {**self.choice, **largest_choice(values)}
        return more

    def __repr__(self) -> str:
        return f"Elastic({self.values}, choice={self.choice})"


@runtime_checkable
class Mutable(Protocol):
    """A module that can take several shapes."""

    elastic: Elastic


@runtime_checkable
class Exportable(Protocol):
    """A mutable that is replaced as a whole on export. One without `export` is traced through instead.

    What is traced keeps its own parameters whole: those that it cuts are layers in it (`ParameterSlice` of
    corenas-mutable-attention), which then state their cost as well.
    """

    def export(self) -> nn.Module | nn.Parameter:
        """Return the chosen part as a module of torch.nn, with a copy of its weights, or as a mere parameter."""
        ...


@runtime_checkable
class Gated(Protocol):
    """A mutable some of whose children run only under some archs: elastic depth, a mixed operation."""

    def gates(self) -> Iterable[tuple[nn.Module, Value]]:
        """Return its children, each with a value that is 1 where it runs and 0 where it does not."""
        ...


@runtime_checkable
class Resizing(Protocol):
    """A mutable whose values change how many positions (pixels, tokens) the layers after it see."""

    resizes: tuple[str, ...]


@runtime_checkable
class Mixing(Protocol):
    """A mutable of one value whose choice may be a tensor of weights: it then gives the weighted sum of its candidates.

    names: what the weights are of, in order: the choices of the value, and others that only weights can give ("none")
    """

    names: Sequence[Any]


@frozen
class LayerCost:
    """What one layer costs for one input, as values over the arch."""

    flops: Value = Constant(0)
    params: Value = Constant(0)
    activations: Value = Constant(0)


@runtime_checkable
class Costed(Protocol):
    """A mutable that owns weights: it states its cost. Its values name its output axis `outputs`.

    Optional: `costs_inputs`, whether `cost` wants to know as well at how many positions its input (n, channels, …)
    stands, as transposed convolutions do.
    """

    def cost(self, positions: Value) -> LayerCost:
        """Return its cost for one input, given at how many positions (pixels, tokens) its output stands."""
        ...


@runtime_checkable
class WhollyCosted(Protocol):
    """A module that states the cost of itself and of all that is in it, so that nobody looks at its layers."""

    def whole_cost(self, example: Any) -> Iterable[LayerCost]:
        """Return what its cost is the sum of, gates included, for one input of the model that it is in.

        Raises ValueError for an input that it cannot tell the cost of.
        """
        ...


@runtime_checkable
class Reducible(Protocol):
    """A module that gives its subnet in force itself; on export that is traced in its place."""

    def reduced(self) -> nn.Module:
        """Return a module that is called in the same way and has no mutable in it, with a copy of the weights."""
        ...


# -- what layers cost -------------------------------------------------------------------------------------------------


def conv_cost(
    inputs: Value | int, outputs: Value | int, taps: Value | int, positions: Value, groups: Value | int, bias: bool
) -> LayerCost:
    """Return the cost of a convolution with `taps` weights from each input of its group to each output channel."""
    outputs = as_value(outputs)
    weights = outputs * (as_value(inputs) // groups) * taps
    return LayerCost(weights * positions, weights + outputs if bias else weights, outputs * positions)


def linear_cost(inputs: Value | int, outputs: Value | int, positions: Value, bias: bool) -> LayerCost:
    """Return the cost of a linear layer, at each position."""
    return conv_cost(inputs, outputs, 1, positions, 1, bias)


def norm_cost(features: Value | int, affine: bool) -> LayerCost:
    """Return the cost of a normalisation: two parameters a feature, nothing else."""
    return LayerCost(params=as_value(features) * (2 if affine else 0))


# -- calling and keeping a model -------------------------------------------------------------------------------------


def as_arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional arguments and those by keyword of a model's input, which may be any tree of tensors.

    example: a tuple or a list holds the positional arguments, a dict those by keyword; anything else is the one
        argument. For a model that takes a list as its one argument it is `(list,)`.
    """
    if isinstance(example, dict):
        return (), example
    return (tuple(example) if isinstance(example, tuple | list) else (example,)), {}


def call_model(model: Callable[..., Any], example: Any) -> Any:
    """Return what a model gives for an input (`as_arguments`)."""
    arguments, by_keyword = as_arguments(example)
    return model(*arguments, **by_keyword)


def channels_last(model: nn.Module) -> nn.Module:
    """Keep a model's weights of four axes channels-last, which is faster on CPUs too, all others as they are."""
    # `nn.Module.to(memory_format=…)` does the same, but does not take models with weights of five axes.
    return model._apply(lambda t: t.to(memory_format=torch.channels_last) if t.dim() == 4 else t)


# -- what a model depends on ------------------------------------------------------------------------------------------


def largest_choice(values: Values) -> dict[str, Any]:
    """Return the choice of a new mutable, that of the largest arch: numbers at their largest, else the first choice."""
    parts = [part for value in values.values() for part in Dimension.of(value).parts]
    largest = {key: largest_of(choices) for part in parts for key, choices in part.domains.items()}
    return {name: value(largest) for name, value in values.items()}


def elastic_of(module: nn.Module) -> Elastic | None:
    """Return what makes a module a mutable; None if it is none."""
    # A look at the dictionary: an isinstance check of a Protocol for each of a thousand modules takes milliseconds.
    elastic = module.__dict__.get("elastic")
    return elastic if isinstance(elastic, Elastic) else None


def offers(module: object, protocol: type[T]) -> TypeIs[T]:
    """Return whether a module's class has a protocol's methods."""
    # Of its class, an answer is found again; a module that lacks them is looked at anew by each `isinstance`.
    return issubclass(type(module), protocol)


def mutables(model: nn.Module) -> Iterator[Mutable]:
    """Yield all mutables of a model, itself included."""
    return (module for module in model.modules() if elastic_of(module) is not None)  # type: ignore[misc]


def keys_used(model: nn.Module) -> set[str]:
    """Return the keys of all variables that some layer of the model depends on."""
    return {key for mutable in mutables(model) for value in mutable.elastic.values.values() for key in value.keys}


# -- switching --------------------------------------------------------------------------------------------------------
#
# A model's plan groups what depends on the same values in the same way: a group's choice is computed once for each
# combination of its variables' choices, and found again from then on. The plan stands in the model and is made anew
# where a look at the children of all modules shows that it is no longer the model's.


def apply(model: nn.Module, choices: Mapping[str, Any]) -> Applied:
    """Give every mutable of a model its part of an arch; as `with apply(model, arch):` for a while only.

    choices: a choice for each key; for a mixed operation (`Mixing`) it may be a tensor of weights, one per candidate;
        one with a gradient only in a `with`, since a model that holds it cannot be copied
    Raises KeyError for a key that the choices lack, ValueError for a choice that its variable does not have (a depth of
        9 of 2); the model is then as it was.

    >>> import torch
    >>> from corenas import SearchSpace, apply
    >>> from corenas.testing.small import Conv
    >>> space = SearchSpace.from_table({"width": [4, 8]})
    >>> layer = Conv(3, space.value("width"))
    >>> with apply(layer, space.arch({"width": 4})):
    ...     layer(torch.zeros(1, 3, 6, 6)).shape
    torch.Size([1, 4, 6, 6])
    >>> layer(torch.zeros(1, 3, 6, 6)).shape
    torch.Size([1, 8, 6, 6])
    """
    plan = model.__dict__.get(_PLAN)
    if plan is None or not plan.fits(model):
        plan = model.__dict__[_PLAN] = _Plan(model)
    after = plan.choices(choices)
    before = [elastic.choice for elastic in plan.elastics]
    for group, choice in zip(plan.groups, after, strict=True):
        for elastic in group.elastics:
            if elastic.choice is not choice:
                elastic.choice = choice
    return Applied(model, plan.elastics, before)


class Applied:
    """An arch in force. Leaving the `with` puts the one before it back in force."""

    def __init__(self, model: nn.Module, elastics: Sequence[Elastic], before: Sequence[Mapping[str, Any]]) -> None:
        self._model, self._elastics, self._before = model, elastics, before

    def __enter__(self) -> nn.Module:
        return self._model

    def __exit__(self, *error: object) -> None:
        for elastic, choice in zip(self._elastics, self._before, strict=True):
            elastic.choice = choice


_PLAN = "_plan_of_switching"
"""Where a model keeps its plan: in its dictionary, so that it goes when the model goes."""

_MOST_CHOICES = 256
"""How many choices a group keeps, the latest ones."""

_PLAIN = frozenset({int, float, str, bool})
"""What a choice of a variable is. A tensor of weights is none of them."""


@define(eq=False)
class _Group:
    """Elastics of the same values: they have the same choice under every arch."""

    values: Values
    keys: tuple[str, ...]
    row: Callable[[Mapping[str, Any]], Any]
    elastics: list[Elastic] = Factory(list)
    known: dict[Any, Mapping[str, Any]] = Factory(dict)

    @classmethod
    def of(cls, values: Values) -> _Group:
        keys = tuple(dict.fromkeys(key for value in values.values() for key in value.keys))
        return cls(values, keys, operator.itemgetter(*keys) if keys else lambda _: ())


class _Plan:
    """How a model is switched from arch to arch.

    groups: its elastics by their values; elastics: all of them, group by group
    """

    def __init__(self, model: nn.Module) -> None:
        # Dictionaries are faster to look at than modules. Not the model's own, which owns this plan.
        self._below = [module.__dict__ for module in model.modules()][1:]
        self._children, self._attributes = self._looked_at(model)
        groups: dict[Any, _Group] = {}
        self._domains: dict[str, Sequence[Any]] = {}
        for elastic in dict.fromkeys(e for e in self._attributes if isinstance(e, Elastic)):
            # 1 is 1.0 to a dictionary, not to a layer.
            exact = [type(value.number) if isinstance(value, Constant) else None for value in elastic.values.values()]
            signature = (*elastic.values.items(), *exact)
            if signature not in groups:
                groups[signature] = _Group.of(elastic.values)
            groups[signature].elastics.append(elastic)
            for part in (part for value in elastic.values.values() for part in Dimension.of(value).parts):
                for key, choices in part.domains.items():
                    self._domains.setdefault(key, choices)
        self.groups = [*groups.values()]
        self.elastics = [elastic for group in self.groups for elastic in group.elastics]

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the model makes a plan of its own.
        return type(None), ()

    def _looked_at(self, model: nn.Module) -> tuple[list[Any], list[Any]]:
        """Return the children of all modules, and what each module has as `elastic`."""
        modules = [model.__dict__, *self._below]
        tables = filter(None, [module["_modules"] for module in modules])
        children = [*itertools.chain.from_iterable(map(dict.values, tables))]
        return children, [module.get("elastic") for module in modules]

    def fits(self, model: nn.Module) -> bool:
        """Return whether the model's modules and their elastics are still those of this plan."""
        children, attributes = self._looked_at(model)
        return children == self._children and all(map(operator.is_, attributes, self._attributes))

    def choices(self, arch: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """Return each group's choice under an arch. Raises KeyError for a key that it lacks."""
        given = {key: arch[key] for key in self._domains}
        if not _PLAIN.issuperset(map(type, given.values())):
            return self._computed(given)
        choices = [group.known.get(group.row(given)) for group in self.groups]
        return self._computed(given) if None in choices else choices  # type: ignore[return-value]

    def _computed(self, given: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """Return the same, computing what is not known yet, and keep what only the variables' own choices give."""
        arch, foreign = dict(given), set()
        for key, choices in self._domains.items():
            own = given[key].item() if isinstance(given[key], np.generic) else given[key]
            if type(own) not in _PLAIN:  # a tensor of weights
                foreign.add(key)
            elif own in choices:
                arch[key] = choices[choices.index(own)]  # 8 for 8.0: what is kept serves both
            elif self._is_between(key, own):
                foreign.add(key)
            else:
                known = ", ".join(map(repr, choices[:20])) + (", …" if len(choices) > 20 else "")
                raise ValueError(f"{key} = {own!r} is none of its choices, {known}")
        numbers: dict[Value | Dimension, Any] = {}
        return [self._choice(group, arch, numbers, foreign.isdisjoint(group.keys)) for group in self.groups]

    def _is_between(self, key: str, number: Any) -> bool:
        """Return whether a key is of a continuous variable, and a number between its bounds."""
        values = (
            part for group in self.groups for value in group.values.values() for part in Dimension.of(value).parts
        )
        variable = next(v for value in values if key in value.domains for v in variables_of(value) if v.key == key)
        return variable.continuous and not isinstance(number, str) and variable.low <= number <= variable.high

    def _choice(
        self, group: _Group, arch: Mapping[str, Any], numbers: dict[Value | Dimension, Any], keep: bool
    ) -> Mapping[str, Any]:
        """Return a group's choice: what is known if it may be kept, else computed."""
        row = group.row(arch) if keep else None
        if keep and (known := group.known.get(row)) is not None:
            return known
        choice = {}
        for name, value in group.values.items():
            if isinstance(value, Constant):
                choice[name] = value.number
                continue
            if value not in numbers:
                numbers[value] = value(arch)
            choice[name] = numbers[value]
        if keep:
            if len(group.known) >= _MOST_CHOICES:
                del group.known[next(iter(group.known))]
            group.known[row] = choice
        return choice
