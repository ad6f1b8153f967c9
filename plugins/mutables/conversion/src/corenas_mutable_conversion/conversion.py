"""Any model of torch as a supernet, with the search space that it spans, checked against the model as it was."""

from __future__ import annotations

import copy
import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cached_property
from typing import Any

import numpy as np
import torch
from attrs import define, frozen
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from corenas.cost import Cost
from corenas.errors import UserError
from corenas.export import TOLERANCE, difference
from corenas.mutable import LayerCost, apply, call_model
from corenas.space import SearchSpace
from corenas.value import Value
from corenas_mutable_conversion.attention import opened
from corenas_mutable_conversion.axes import Axis, Product, Size, count, free_sizes, reason, resolved
from corenas_mutable_conversion.elastic import CONV, plain_copy
from corenas_mutable_conversion.follow import Followed, UnfollowableError, follow
from corenas_mutable_conversion.reading import Reading, inside
from corenas_mutable_conversion.rules import Rules
from corenas_mutable_conversion.trials import make_mutable, settle
from corenas_mutable_conversion.values import dimension_of, terms_of, times


@frozen
class Finding:
    """What became of one axis of a layer.

    axis: "outputs", "inputs" or "kernel"
    keys: the variables that it depends on; none where it is fixed
    reason: why it is fixed, place: the line of code that says so; empty where that is not the reason
    """

    layer: str
    axis: str
    size: int
    keys: tuple[str, ...] = ()
    reason: str = ""
    place: str = ""

    def __str__(self) -> str:
        what = ", ".join(self.keys) or f"fixed at {self.size}: {self.reason}"
        return f"{self.layer} {self.axis}: {what}" + (f" ({self.place})" if self.place else "")


@define(eq=False)
class Converted:
    """A model that became a supernet.

    supernet: the same object, of the same classes, with the same state dict
    space: what it can be
    example: the input that it was converted with
    report: of each layer and axis the variable, or the reason why there is none
    """

    supernet: nn.Module
    space: SearchSpace
    example: Any
    report: tuple[Finding, ...]
    reading: Reading

    @cached_property
    def costs(self) -> list[LayerCost]:
        """What the costs of all archs are the sum of, for one example."""
        return [*_costs(self.supernet, self.reading)]

    @cached_property
    def cost(self) -> Cost:
        """Exact flops, params and activations of many archs at once."""
        return Cost.adding(self.costs, self.space)

    def plain(self, arch: Mapping[str, Any]) -> nn.Module:
        """Return the subnet of an arch: the model's own classes with smaller layers, names as before."""
        return plain_copy(self.supernet, arch)

    @property
    def left(self) -> list[Finding]:
        """What is not searchable."""
        return [finding for finding in self.report if not finding.keys]


def convert(
    model: nn.Module, example: Any, rules: Rules | None = None, *, space: SearchSpace | None = None
) -> Converted:
    """Turn a model into a supernet, in place: what its largest arch computes is what the model computed.

    example: an input, as `corenas.mutable.call_model` takes it
    rules: what becomes searchable; all that can be, unless they say otherwise
    space: instead of rules, the variables that there are to be, by the keys that a conversion gives them; all else
        stays as it is
    Raises UserError, with a line of the model's code, for a model whose computation depends on the values of tensors,
    and for one that does not compute the same as before, or as its exported subnets. A refused model is as it was, but
    for what it keeps from its first run on.
    """
    _refuse_own_elastic(model)
    with torch.random.fork_rng(devices=[]):
        try:
            return _converted(model, example, rules or Rules(), space)
        except UserError:
            if not _keeps_from_a_run(model, example):
                raise
            return _converted(model, example, rules or Rules(), space)


def _keeps_from_a_run(model: nn.Module, example: Any) -> bool:
    """Run a model; return whether it has other buffers then: a second run may take another way through its code."""
    before = {name: id(buffer) for name, buffer in model.named_buffers()}
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            call_model(model.eval(), example)
    except Exception:  # the message of what cannot be converted says it better
        return False
    finally:
        for module, training in modes.items():
            module.training = training
    return before != {name: id(buffer) for name, buffer in model.named_buffers()}


def _converted(model: nn.Module, example: Any, rules: Rules, space: SearchSpace | None) -> Converted:
    training = model.training
    twin = opened(without_weights(model))  # a model that is refused stays as it is
    twin_example = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), example)
    reading = Reading(twin, _followed(twin, twin_example), rules, space)
    settle(reading, twin, twin_example)
    if not is_on_meta(model):
        _verify(model, _made(copy.deepcopy(model), reading, example))
    made = _made(model, reading, example)
    model.train(training)
    return made


def without_weights(model: nn.Module) -> nn.Module:
    """Return a copy of a model on the meta device; its weights are not copied first."""
    memo: dict[int, Any] = {}
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
    return copy.deepcopy(model, memo)


def is_on_meta(model: nn.Module) -> bool:
    """Return whether a model has no weights to compute with."""
    return any(tensor.device.type == "meta" for tensor in itertools.chain(model.parameters(), model.buffers()))


def _refuse_own_elastic(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if "elastic" in dir(module):
            what = f"{name or 'the model'}, a {type(module).__name__},"
            hint = "a model that has mutables already is a supernet; another use of the name wants another name"
            raise UserError(f"{what} has an attribute `elastic` of its own", hint=hint)


def _followed(twin: nn.Module, example: Any) -> Followed:
    try:
        known = follow(twin, example)
    except UnfollowableError as error:
        hint = "put such a part outside of what is converted"
        raise UserError(f"this model cannot be converted: {error}", hint=hint) from error
    with suppress(UnfollowableError):  # what only training runs: auxiliary heads
        follow(twin, tree_map_only(Tensor, _twice, example), known, training=True)
    return follow(twin, example, known)


def _twice(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor]) if tensor.dim() and len(tensor) == 1 else tensor


def _made(model: nn.Module, reading: Reading, example: Any) -> Converted:
    opened(model)
    make_mutable(model, reading)
    return Converted(model, reading.searched(), example, tuple(_findings(reading)), reading)


def _verify(model: nn.Module, made: Converted) -> None:
    """Compare a supernet with the model that it was made from, and two of its subnets with their exports.

    Raises UserError where they differ.
    """
    parameter = next(made.supernet.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    example = tree_map_only(Tensor, lambda tensor: tensor.to(device), made.example)
    rng = np.random.default_rng(0)
    archs = [made.reading.largest(), *(made.space.sample(rng) for _ in range(2))]
    for i, arch in enumerate(archs):
        other = made.plain(arch).eval() if i else model
        with apply(made.supernet, arch), torch.random.fork_rng(devices=[]):
            error = difference(other, made.supernet, example)
        if not error <= TOLERANCE:
            what = "its export" if i else "the model as it was"
            text = f"this model cannot be converted: under {'a random' if i else 'the largest'} arch it differs from"
            hint = "please report this with the model; does its forward draw random numbers, or give nan?"
            raise UserError(f"{text} {what} by {error:.1e} of its largest output", hint=hint)


# -- what it costs ----------------------------------------------------------------------------------------------------


def _costs(model: nn.Module, reading: Reading) -> Iterator[LayerCost]:
    """Yield what the costs of all archs are the sum of: products of few values each, those alike counted."""
    alike: dict[tuple[str, frozenset[Any]], int] = defaultdict(int)

    def add(metric: str, axis: Axis, gates: Iterable[Value]) -> None:
        for n, factors in terms_of(axis, reading.values):
            counted: dict[Value, int] = defaultdict(int)
            for factor in (*factors, *gates):
                counted[factor] += 1
            alike[metric, frozenset(counted.items())] += n

    for op in reading.known.ops:
        gates = [reading.runs[path] for path in dict.fromkeys(op.modules) if path in reading.runs]
        if op.macs:
            add("flops", Product(tuple(op.macs)), gates)
        if op.layer:
            add("activations", Product(op.outputs[0]), gates)
    for name, _ in model.named_parameters():  # each once, whatever shares it
        gates = [runs for path, runs in reading.runs.items() if inside(name, path)]
        add("params", Product(reading.known.tensors[name]), gates)
    for (metric, counted), n in alike.items():
        factors = (factor for factor, power in counted for _ in range(power))
        yield LayerCost(**{metric: times((n, (*factors,)))})


# -- what became of it ------------------------------------------------------------------------------------------------

_PLACE = re.compile(r"^(.*) \(([^()]+:\d+|\?)\)$", re.DOTALL)
_AXES = ("outputs", "inputs", "kernel")


def _findings(reading: Reading) -> Iterator[Finding]:
    """Yield for every layer what is searched, or why it is not."""
    parameters = dict(reading.model.named_parameters())
    for name, axes in reading.known.tensors.items():
        key = name.rpartition(".")[2]
        if name not in parameters or len(axes) < 2 or key.startswith("bias"):
            continue
        module = reading.module_of(name)
        names = ("inputs", "outputs", "kernel") if isinstance(module, CONV) and module.transposed else _AXES
        for what, axis in zip(names, axes, strict=False):
            if count(axis) < 2:
                continue
            layer, keys = name.removesuffix(".weight"), dimension_of(axis, reading.values).keys
            if keys:
                yield Finding(layer, what, count(axis), keys)
                continue
            found = _PLACE.match(text := _reason(axis, reading.why))
            yield Finding(layer, what, count(axis), (), *(found.groups() if found else (text, "")))


def _reason(axis: Axis, why: Mapping[Size, str]) -> str:
    sizes = [*free_sizes(resolved(axis))]
    known = reason(axis) or next((why[size] for size in sizes if size in why), "")
    return known or ("the number of its groups is searched instead" if sizes else "it is a place")
