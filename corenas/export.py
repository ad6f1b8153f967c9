"""How a subnet becomes a network of its own, of torch alone, checked against the supernet."""

from __future__ import annotations

import copy
import functools
import keyword
import math
import operator
import re
import traceback
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from corenas.calibrate import statistics_kept
from corenas.errors import UserError
from corenas.mutable import Exportable, Reducible, apply, call_model, elastic_of

MODULE_STACK = "corenas_module_stack"
"""Under which name of a node's `meta` an exported network keeps in which modules of the supernet it was, as fx does."""

TOLERANCE = 1e-5
"""Largest difference to the supernet that is put down to rounding, relative to the largest output."""


class _Tracer(fx.Tracer):
    where = ""  # the innermost module in which tracing failed

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.where = self.where or f"{self.path_of_module(m)}, a {type(m).__name__}"
            raise

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Exportable) or super().is_leaf_module(m, module_qualified_name)


def export_subnet(model: nn.Module, choices: Mapping[str, Any], example: Any) -> fx.GraphModule:
    """Return the subnet of an arch as a plain module: layers of torch.nn, functional calls, a copy of its weights.

    example: an input, as `call_model` takes it; the outputs of both are compared on noise of its shapes, in double
        precision where rounding makes more of a difference than is allowed
    Raises UserError if they differ by more than 1e-5 of the largest, if the model's forward cannot be traced, or if a
    part is no layer of torch.

    >>> import torch
    >>> from corenas import SearchSpace, export_subnet
    >>> from corenas.testing.small import Conv
    >>> space = SearchSpace.from_table({"width": [4, 8]})
    >>> supernet = torch.nn.Sequential(Conv(3, space.value("width")), torch.nn.ReLU()).eval()
    >>> network = export_subnet(supernet, space.smallest(), torch.zeros(1, 3, 6, 6))
    >>> [*network.children()]
    [Conv2d(3, 4, kernel_size=(1, 1), stride=(1, 1)), ReLU()]
    """
    with apply(model, choices):
        return export_active(model, example)


def export_active(model: nn.Module, example: Any) -> fx.GraphModule:
    """Return the subnet of the arch in force as a plain module, as `export_subnet` does."""
    plain = plain_graph(model)
    alien = [type(part).__name__ for part in plain.modules() if not type(part).__module__.startswith("torch.")]
    if alien:
        raise UserError(f"{alien[0]} is no layer of torch: its `export` must give one")
    parameter = next(model.parameters(), None)
    if parameter is not None:
        example = tree_map_only(Tensor, lambda tensor: tensor.to(parameter.device), example)
    error = difference(model, plain, example)
    if not error <= TOLERANCE:  # in single precision a network may be its own worst enemy
        error = difference(copy.deepcopy(model).double(), copy.deepcopy(plain).double(), _in_double(example))
    if not error <= TOLERANCE:
        text = f"the exported network differs from the supernet by {error:.1e} of its largest output"
        raise UserError(text, hint="please report this with the spec")
    return plain


def plain_graph(model: nn.Module) -> fx.GraphModule:
    """Return the subnet of the arch in force as a plain module, unchecked; the model may be on the meta device.

    Raises UserError if the model's forward cannot be traced.
    """
    smaller = _reduced(model)
    plain = _exported(smaller, _traced(smaller))
    return plain.train(model.training)  # type: ignore[return-value]


def _reduced(module: nn.Module) -> nn.Module:
    """Return a model with the subnets of what is `Reducible` in its place; all else in it is the model's own."""
    if isinstance(module, Reducible):
        return module.reduced().train(module.training)
    children = {name: _reduced(child) for name, child in module.named_children()}
    if all(child is module._modules[name] for name, child in children.items()):
        return module
    shallow = copy.copy(module)
    shallow._modules = {**module._modules, **children}
    return shallow


def _in_double(example: Any) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, example)


def _traced(model: nn.Module) -> fx.Graph:
    """Return what a model does under the arch in force, and leave it in evaluation mode."""
    tracer = _Tracer()
    try:
        # Without gradient layers may take short cuts that are not to be exported; in training a model may have outputs
        # that the network has not.
        with torch.enable_grad(), statistics_kept(model):
            return tracer.trace(model.eval())
    except Exception as error:  # whatever a forward may do with a value that it takes for a tensor
        hint = "forward must not branch on the values of tensors; put such a part into a mutable with `export`"
        reason = str(error).strip().split("\n")[0]
        place = f"{tracer.where or f'the model, a {type(model).__name__}'}{_line(error)}"
        raise UserError(f"this model cannot be traced for export: {place}: {reason}", hint=hint) from error


def _line(error: Exception) -> str:
    """Return in which line of a model's own code an error was raised, "" if in none."""
    tools = str(Path(torch.__file__).parent), str(Path(__file__).parent)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((*tools, "<"))]
    return f", {frames[-1].filename}:{frames[-1].lineno} ({frames[-1].line})" if frames else ""


def _exported(model: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """Return a module of the parts that a graph calls, each as what it exports or as a copy; ties stay."""
    parts: dict[str, Any] = {}
    names: dict[str, str] = {}
    copied: dict[int, Any] = {}
    tied: dict[Any, nn.Parameter] = {}
    for node in graph.nodes:
        # Under its own name torch.export would take it for the network's.
        node.meta[MODULE_STACK] = node.meta.pop("nn_module_stack", {})
        if node.op not in ("call_module", "get_attr"):
            continue
        target = str(node.target)
        if target not in names:
            names[target] = _unique(target, parts)
            part: Any = operator.attrgetter(target)(model)
            exports = isinstance(part, Exportable)
            parts[names[target]] = part.export() if exports else copy.deepcopy(part, copied)
            if exports and isinstance(parts[names[target]], nn.Module):
                _tie(part, parts[names[target]], tied)
        node.target = names[target]
        if isinstance(parts[node.target], nn.Parameter):  # what was called is there without a call
            node.op, node.args, node.kwargs = "get_attr", (), {}
    return fx.GraphModule(parts, graph, "Network")


def _tie(source: Any, plain: nn.Module, tied: dict[Any, nn.Parameter]) -> None:
    """Let what a layer exports share the parameters that it shares with another one of the same values."""
    elastic = elastic_of(source)
    values = None if elastic is None else tuple(elastic.values.items())
    for name, parameter in source.named_parameters(recurse=False):
        own = plain._parameters.get(name)
        if own is not None:
            first = tied.setdefault((id(parameter), values), own)
            if first is not own and first.shape == own.shape and torch.equal(first, own):
                plain.register_parameter(name, first)


def flat_name(name: str) -> str:
    """Return how an exported network calls a part of its model, `backbone.stem.conv` for instance, if that is free."""
    flat = re.sub(r"\W", "_", name.removeprefix("backbone."))
    flat = flat if flat.isidentifier() else f"layer_{flat}"
    return f"{flat}_" if keyword.iskeyword(flat) or flat in _reserved() else flat


@functools.cache
def _reserved() -> frozenset[str]:
    return frozenset(dir(fx.GraphModule({}, fx.Graph())))


def _unique(name: str, taken: Collection[str]) -> str:
    flat = flat_name(name)
    while flat in taken:
        flat += "_"
    return flat


@torch.no_grad()
def difference(first: nn.Module, second: nn.Module, example: Any) -> float:
    """Return the largest difference between two modules' outputs in evaluation mode, relative to the largest output.

    example: an input, as `call_model` takes it; its tensors give the shapes, types and devices of the noise that both
        compute with, in a batch of 2. Tensors of whole numbers, which may be indices, are repeated as they are.
    Infinite if the outputs have different shapes, nan if one of them has a nan: ask for `difference(…) <= TOLERANCE`.
    Leaves modes and batch-norm statistics as they are.
    """
    generator = torch.Generator().manual_seed(0)
    noise = tree_map_only(Tensor, lambda tensor: _noise(tensor, generator), example)
    outputs = []
    with statistics_kept(first), statistics_kept(second):
        for module in (first, second):
            own = tree_map_only(Tensor, torch.clone, noise)
            outputs.append(tree_leaves(call_model(module.eval(), own)))
    if [out.shape for out in outputs[0]] != [out.shape for out in outputs[1]]:
        return math.inf
    parts = [float((a - b).abs().max() / a.abs().max().clamp_min(1e-12)) for a, b in zip(*outputs, strict=True)]
    return math.nan if any(map(math.isnan, parts)) else max(parts)


def _noise(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Return two of something like a tensor whose first axis is that of samples."""
    if tensor.dim() == 0:
        return tensor
    if not tensor.is_floating_point():
        return torch.cat([tensor[:1], tensor[:1]])
    noise = torch.randn((2, *tensor.shape[1:]), generator=generator).to(tensor)
    return noise.to(memory_format=torch.channels_last) if noise.dim() == 4 else noise
