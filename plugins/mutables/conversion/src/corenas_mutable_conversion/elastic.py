"""A module of any class as a mutable: some of its tensors are cut, some of its numbers change, it may be passed by."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn

from corenas.mutable import Elastic, apply, elastic_of
from corenas.value import Dimension, Value
from corenas_mutable_slices.layers import Cut, centre, cut, per_choice

Place = tuple[str, int | None]
"""An attribute, or one place of a tuple that an attribute is."""

CONV = nn.modules.conv._ConvNd


@frozen
class Parts:
    """What of the modules of a class follows the arch.

    reference: their own class
    tensors: parameters and buffers that are cut; numbers: attributes that change
    caches: attributes that are kept from one call to the next, for each arch anew
    gives: what they give when they are passed by, as of `Call`; None where they are always run
    middle: the first axis of `weight` of which the middle is active, not the beginning (kernels); None for none
    """

    reference: type[nn.Module]
    tensors: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()
    caches: tuple[str, ...] = ()
    gives: int | None = None
    middle: int | None = None


def make_elastic(
    module: nn.Module,
    tensors: Mapping[str, Sequence[Dimension]],
    numbers: Mapping[Place, Value],
    runs: Value | None = None,
    middle: int | None = None,
    caches: Sequence[str] = (),
    gives: int | None = None,
) -> None:
    """Turn a module into a mutable that is still of its class, in place.

    tensors: parameters and buffers by name, each with the dimensions of its axes
    numbers: attributes that follow the arch
    runs: 1 where it runs and 0 where it gives its input back
    middle, caches, gives: as of `Parts`
    """
    values: dict[str, Value | Dimension] = {
        f"{name}.{axis}": dim for name, dims in tensors.items() for axis, dim in enumerate(dims)
    }
    values |= {name if i is None else f"{name}.{i}": value for (name, i), value in numbers.items()}
    if runs is not None:
        values["runs"] = runs
    weight = tensors.get("weight", ())
    if weight and not (isinstance(module, CONV) and module.groups > 1):
        values["outputs"] = weight[1 if isinstance(module, CONV) and module.transposed else 0]
    names = tuple(dict.fromkeys(name for name, _ in numbers))
    parts = Parts(type(module), (*tensors,), names, (*caches,), gives, middle)
    module.__class__ = _class_of(parts)
    module.elastic = Elastic(values)  # type: ignore[assignment]


def parts_of(module: nn.Module) -> Parts | None:
    """Return what of a module follows the arch; None for a module that conversion left alone."""
    return getattr(type(module), "parts_of_conversion", None)


@functools.cache
def _class_of(parts: Parts) -> type[nn.Module]:
    """Return the class of modules with such parts: that of the module's own, with properties in place of attributes."""
    own: dict[str, Any] = {
        "__doc__": f"A {parts.reference.__name__} that follows the arch.",
        "__module__": __name__,
        "__reduce_ex__": _reduced,
        "parts_of_conversion": parts,
        "_cuts_in_force": per_choice(_cuts),
    }
    for names, read in ((parts.tensors, _tensor), (parts.numbers, _number), (parts.caches, _cache)):
        own |= {name: property(functools.partial(read, name=name), _set(name)) for name in names}
    if parts.gives is not None:
        own["forward"] = _skippable(parts.reference, parts.gives)
    elif issubclass(parts.reference, nn.modules.batchnorm._NormBase) and "running_mean" in parts.tensors:
        own |= {"forward": _writing_back(parts.reference)}
        own |= {"statistics": _statistics, "set_statistics": _set_statistics}
    return type(f"Elastic{parts.reference.__name__}", (parts.reference,), own)


def _reduced(self: Any, protocol: int) -> Any:
    return _restored, (self.parts_of_conversion,), self.__dict__


def _restored(parts: Parts) -> nn.Module:
    made = _class_of(parts)
    return made.__new__(made)


# -- what its attributes are ------------------------------------------------------------------------------------------


def _cuts(self: Any) -> dict[str, Cut]:
    """What is active of each tensor."""
    parts, elastic, found = self.parts_of_conversion, self.elastic, {}
    for name in parts.tensors:
        axes = []
        for i in itertools.takewhile(lambda i: f"{name}.{i}" in elastic.values, itertools.count()):  # noqa: B023
            sizes, active = elastic.values[f"{name}.{i}"].sizes, elastic.choice[f"{name}.{i}"]
            in_middle = name == "weight" and parts.middle is not None and i >= parts.middle
            axes.append(centre(sizes[0], active[0]) if in_middle else (sizes, active))
        found[name] = cut(*axes)
    return found


def whole(module: nn.Module, name: str) -> Tensor | None:
    """Return the whole tensor behind one that may be cut."""
    found = module._parameters.get(name)
    return module._buffers.get(name) if found is None else found


def _tensor(self: Any, name: str) -> Tensor | None:
    lent = self.__dict__.get("_lent")
    if lent is not None and name in lent:
        return lent[name]
    tensor = whole(self, name)
    if tensor is None:
        return None
    cut = self._cuts_in_force[name]
    part = cut(tensor)
    if lent is not None and cut.joined and name in self._buffers:
        lent[name] = part
    if part is not tensor and part.dim() == 4 and isinstance(self, CONV) and not _dense(part):
        part = part.clone()  # else the convolution makes a copy, and its gradient another one
    return part


def _dense(weight: Tensor) -> bool:
    return weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)


def _number(self: Any, name: str) -> Any:
    plain, choice = self.__dict__[name], self.elastic.choice
    if isinstance(plain, tuple | list):
        return type(plain)(choice.get(f"{name}.{i}", number) for i, number in enumerate(plain))
    return choice[name]


def _cache(self: Any, name: str) -> Any:
    kept = self.__dict__.setdefault("_kept", {})
    if name not in kept or kept[name][0] is not self.elastic.choice:
        kept[name] = self.elastic.choice, type(self.__dict__[name])()
    return kept[name][1]


def _set(name: str) -> Any:
    return lambda self, item: self.__dict__.__setitem__(name, item)


# -- what it does -----------------------------------------------------------------------------------------------------


def _skippable(reference: type[nn.Module], gives: int) -> Any:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.elastic.choice["runs"]:
            return reference.forward(self, *args, **kwargs)
        given = (*args, *kwargs.values())
        return given[:gives] if gives else given[0]

    return forward


def _writing_back(reference: type[nn.Module]) -> Any:
    """Return a forward after which running statistics of several parts, which were copied, are stored."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            return reference.forward(self, *args, **kwargs)
        self.__dict__["_lent"] = {}
        try:
            return reference.forward(self, *args, **kwargs)
        finally:
            for name, part in self.__dict__.pop("_lent").items():
                with torch.no_grad():
                    self._cuts_in_force[name].write(self._buffers[name], part)

    return forward


def _statistics(self: Any) -> tuple[Tensor, Tensor]:
    """Running mean and variance of the features in force."""
    return self.running_mean, self.running_var


@torch.no_grad()
def _set_statistics(self: Any, mean: Tensor, var: Tensor) -> None:
    """Store the running mean and variance of the features in force."""
    for name, new in (("running_mean", mean), ("running_var", var)):
        self._cuts_in_force[name].write(self._buffers[name], new)


# -- subnets ----------------------------------------------------------------------------------------------------------


def plain_copy(model: nn.Module, arch: Mapping[str, Any] | None = None, weights: bool = True) -> nn.Module:
    """Return the subnet of an arch as modules of the model's own classes, with tensors and numbers of their own.

    Blocks that are passed by are taken out of the list that they stand in.
    arch: None for the arch in force
    weights: False gives shapes alone, on the meta device, in a tree that shares all else with the model
    """
    with nullcontext() if arch is None else apply(model, arch):
        return _plain_copy(model, weights)


def _plain_copy(model: nn.Module, weights: bool) -> nn.Module:
    memo: dict[int, Any] = {}
    for module in model.modules():
        if (parts := parts_of(module)) is not None:
            for name in parts.tensors:
                tensor = whole(module, name)
                if tensor is not None and id(tensor) not in memo:
                    memo[id(tensor)] = _part_of(module, name, tensor, weights)
    if weights:
        network = copy.deepcopy(model, memo)
        for tensor in itertools.chain(network.parameters(), network.buffers()):  # those that are not cut were trained
            tensor.data = tensor.data.contiguous()  # channels-last, of which torch.export.save would warn
    else:
        network = _same_tree(model, memo)
    skipped: list[str] = []
    for name, module in [*network.named_modules()]:
        elastic = elastic_of(module)
        if elastic is not None and parts_of(module) is not None:
            if not elastic.choice.get("runs", 1):
                skipped.append(name)
            _make_plain(module)
    for name in skipped:
        parent, _, key = name.rpartition(".")
        del network.get_submodule(parent)._modules[key]
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in skipped):
        container = network.get_submodule(parent)
        if isinstance(container, nn.ModuleList):  # its children are counted
            container._modules = {str(i): child for i, child in enumerate(container._modules.values())}
    return network


def _part_of(module: Any, name: str, tensor: Tensor, weights: bool) -> Tensor:
    if weights:
        part = module._cuts_in_force[name](tensor).detach().clone(memory_format=torch.contiguous_format)
    else:
        shape = [sum(module.elastic.choice[f"{name}.{axis}"]) for axis in range(tensor.dim())]
        part = torch.empty(shape, device="meta", dtype=tensor.dtype)
    return nn.Parameter(part, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else part


def _make_plain(module: Any) -> None:
    """Turn an elastic module whose tensors are those of its subnet into one of its own class."""
    parts: Parts = module.parts_of_conversion
    numbers = {name: _number(module, name) for name in parts.numbers}
    module.__class__ = parts.reference
    for key in ("elastic", "_kept", "__cuts", "_lent", "_plan_of_switching"):
        module.__dict__.pop(key, None)
    empty = {name: type(module.__dict__[name])() for name in parts.caches if name in module.__dict__}
    module.__dict__.update(numbers | empty)
    weight = module._parameters.get("weight")
    if weight is None:
        return
    if isinstance(module, CONV):
        first, second = weight.shape[0], weight.shape[1] * module.groups
        pair = (weight.shape[1] * module.groups, weight.shape[0]) if module.transposed else (first, second)
        module.out_channels, module.in_channels = pair
        module.kernel_size = tuple(weight.shape[2:])
        if module.padding_mode == "zeros" and not isinstance(module.padding, str):
            module._reversed_padding_repeated_twice = [p for p in reversed(module.padding) for _ in (0, 1)]
    elif isinstance(module, nn.Linear | nn.modules.batchnorm._NormBase | nn.GroupNorm | nn.Embedding):
        for axis, names in enumerate((_SIZES_OF_FIRST, _SIZES_OF_SECOND)):
            for name in names:
                if name in module.__dict__ and weight.dim() > axis:
                    module.__dict__[name] = weight.shape[axis]


_SIZES_OF_FIRST = ("out_features", "num_features", "num_channels", "num_embeddings")
_SIZES_OF_SECOND = ("in_features", "embedding_dim")
"""What layers of torch call the sizes of the axes of their weight."""


def _same_tree(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Return a tree of new modules that share all else but the tensors of `memo`: enough to run once."""
    if id(module) in memo:
        return memo[id(module)]
    twin = memo[id(module)] = module.__class__.__new__(module.__class__)
    twin.__dict__.update(module.__dict__)
    for kind in ("_parameters", "_buffers"):
        twin.__dict__[kind] = {key: memo.get(id(t), t) for key, t in module.__dict__[kind].items()}
    twin.__dict__["_modules"] = {k: m if m is None else _same_tree(m, memo) for k, m in module._modules.items()}
    return twin
