"""How a subnet becomes a network of its own that torch alone can load, checked against the supernet."""

from __future__ import annotations

import copy
import inspect
import keyword
import math
import operator
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from corenas.calibrate import statistics_kept
from corenas.errors import UserError
from corenas.mutable import apply

TOLERANCE = 1e-5
"""Largest difference to the supernet that is put down to rounding, relative to the largest output."""


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return hasattr(m, "export") or super().is_leaf_module(m, module_qualified_name)


def export(model: nn.Module, choices: Mapping[str, Any], example: Tensor) -> fx.GraphModule:
    """The subnet of an arch as a plain module: layers of torch.nn and functional calls, its own copy of the weights.

    example: an input; the outputs of both are compared on noise of its shape
    Raises UserError if they differ by more than 1e-5 of the largest, if the model's forward cannot be traced, or if a
    part is no layer of torch.
    """
    with apply(model, choices):
        try:
            with torch.enable_grad():  # without gradient layers may take short cuts that are not to be exported
                graph = _Tracer().trace(model)
        except Exception as error:  # whatever a forward may do with a value that it takes for a tensor
            hint = "forward must not branch on the values of tensors; put such a part into a mutable with `export`"
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"this model cannot be traced for export: {reason}", hint=hint) from error
        reserved = {*dir(fx.GraphModule({}, fx.Graph())), *keyword.kwlist}
        parts: dict[str, Any] = {}
        names: dict[str, str] = {}
        for node in graph.nodes:
            if node.op in ("call_module", "get_attr"):
                name = str(node.target)
                if name not in names:
                    names[name] = _flat(name, names.values(), reserved)
                    parts[names[name]] = _plain(model, name, node.op)
                node.target = names[name]
        plain = fx.GraphModule(parts, graph, "Network")
        plain.train(model.training)
        alien = [type(part).__name__ for part in plain.modules() if not type(part).__module__.startswith("torch.")]
        if alien:
            raise UserError(f"{alien[0]} is no layer of torch: its `export` must give one")
        _compare(model, plain, example)
    return plain


def _flat(name: str, taken: Collection[str], reserved: Collection[str]) -> str:
    flat = re.sub(r"\W", "_", name.removeprefix("backbone."))
    flat = flat if flat.isidentifier() and flat not in reserved else f"layer_{flat}"
    while flat in taken:
        flat += "_"
    return flat


def _plain(model: nn.Module, name: str, op: str) -> Any:
    if op == "get_attr":
        return copy.deepcopy(operator.attrgetter(name)(model))
    module = model.get_submodule(name)
    return module.export() if hasattr(module, "export") else copy.deepcopy(module)  # type: ignore[operator]


def _compare(model: nn.Module, plain: nn.Module, example: Tensor) -> None:
    difference = _difference(model, plain, example.to(next(model.parameters(), example).device))
    if not difference <= TOLERANCE:
        raise UserError(f"the exported network differs from the supernet by {difference:.1e} of its largest output",
                        hint="nothing was written; please report this with the spec")  # fmt: skip


@torch.no_grad()
def _difference(first: nn.Module, second: nn.Module, example: Tensor) -> float:
    """The largest difference between two modules' outputs for noise, in evaluation mode, relative to the largest."""
    noise = torch.randn((2, *example.shape[1:]), generator=torch.Generator().manual_seed(0)).to(example)
    noise = noise.to(memory_format=torch.channels_last) if noise.dim() == 4 else noise
    with statistics_kept(first), statistics_kept(second):
        outputs = [tree_leaves(module.eval()(noise.clone())) for module in (first, second)]
    if [out.shape for out in outputs[0]] != [out.shape for out in outputs[1]]:
        return math.inf
    return max(float((a - b).abs().max() / a.abs().max().clamp_min(1e-12)) for a, b in zip(*outputs, strict=True))


def source(plain: fx.GraphModule, title: str, example: Tensor) -> str:
    """A Python file with a class `Network` that builds this network with torch alone; its state dict is the same.

    Raises UserError if the text does not give a network back that computes the same for noise of the example's shape.
    """
    layers = [f"self.{name} = {_constructor(module)}" for name, module in plain.named_children()]
    layers += [f"self.{n} = nn.Parameter({_zeros(tensor)})" for n, tensor in plain.named_parameters(recurse=False)]
    layers += [f'self.register_buffer("{n}", {_zeros(tensor)})' for n, tensor in plain.named_buffers(recurse=False)]
    body = _renamed(plain.graph).python_code("self").src
    body = re.sub(r"(?m);  \w+( = \w+)* = None|\s*#.*$", "", body[body.index("def forward") :])
    # torch numbers the names that stand for several values
    body = re.sub(r"(?<![.\w])([a-z]|t\d+)_\d+\b", r"\1", body)
    body = re.sub(r", (\w+) = ", r", \1=", body)
    body = re.sub(r"def forward\(.*?\).*?:", "def forward(self, x: torch.Tensor) -> torch.Tensor:", body)
    imports = ["import torch", "from torch import nn"]
    if constants := sorted({*re.findall(r"(?<![.\w])(?:inf|nan)\b", "\n".join([*layers, body]))}):
        imports.insert(0, f"from math import {', '.join(constants)}\n")
    lines = ["class Network(nn.Module):", "    def __init__(self) -> None:", "        super().__init__()"]
    lines += [f"        {line}" for line in layers] + [""] + [f"    {line}" for line in body.strip().splitlines()]
    title = title.replace("\\", "/").replace('"', "'")
    text = "\n".join([f'"""{title}"""', "", *imports, "", "", *lines, ""])
    namespace: dict[str, Any] = {}
    try:
        exec(compile(text, "network.py", "exec"), namespace)
        built = namespace["Network"]().to(example.device)
        built.load_state_dict(plain.state_dict())
        difference = _difference(plain, built, example)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"the network cannot be written as Python: {type(error).__name__}: {reason}",
                        hint='leave "python" out of export.formats') from error  # fmt: skip
    if not difference <= TOLERANCE:
        raise UserError("the network cannot be written as Python: its layers come out different",
                        hint='leave "python" out of export.formats')  # fmt: skip
    return text


def _zeros(tensor: Tensor) -> str:
    dtype = "" if tensor.dtype == torch.float32 else f", dtype={tensor.dtype}"
    return f"torch.zeros({tuple(tensor.shape)}{dtype})"


def _renamed(graph: fx.Graph) -> fx.Graph:
    """The graph with names as a person gives them: a value that is not needed any more lends its name to the next."""
    graph = copy.deepcopy(graph)
    last_use = {value: node for node in graph.nodes for value in node.all_input_nodes}
    free = [*"xyzuvwabcdefgh", *(f"t{i}" for i in range(len(graph.nodes)))][::-1]
    for node in graph.nodes:
        if node.op == "output":
            break
        free += [value.name for value in node.all_input_nodes if last_use[value] is node]
        free.sort(key=lambda name: (len(name), "xyzuvwabcdefgh".find(name), name), reverse=True)
        node.name = free.pop()
        if node.op == "placeholder":
            node.target = node.name
    return graph


_SIZES = ("kernel_size", "stride", "padding", "dilation", "output_padding", "output_size", "size", "scale_factor")
"""Arguments of which one number stands for a tuple of equal ones."""


def _constructor(module: nn.Module) -> str:
    """The call that makes a layer of torch.nn anew, without what is the default."""
    if getattr(nn, type(module).__name__, None) is not type(module):
        raise UserError(f"the network cannot be written as Python: nn.{type(module).__name__} is no layer of torch.nn")
    if isinstance(module, nn.Sequential):
        return f"nn.Sequential({', '.join(map(_constructor, module))})"
    arguments = []
    for name, parameter in inspect.signature(type(module).__init__).parameters.items():
        if name in ("self", "device", "dtype") or not hasattr(module, name):
            continue
        value = getattr(module, name)
        if isinstance(value, torch.Tensor) or (value is None and name == "bias"):
            value = value is not None
        if name in _SIZES and isinstance(value, tuple) and len(set(value)) == 1:
            value = value[0]
        if value != parameter.default:
            arguments.append(repr(value) if parameter.default is parameter.empty else f"{name}={value!r}")
    return f"nn.{type(module).__name__}({', '.join(arguments)})"


def write(plain: fx.GraphModule, example: Tensor, folder: Path, formats: Any, title: str) -> dict[str, Path]:
    """Write a network's files into a folder: weights, Python source, a torch.export program. Returns format -> file.

    Raises UserError for a network that a format cannot hold.
    """
    from safetensors.torch import save_file

    plain = copy.deepcopy(plain).cpu().eval()
    written: dict[str, Path] = {}
    if "safetensors" in formats:
        written["safetensors"] = folder / "network.safetensors"
        save_file({k: v.contiguous() for k, v in plain.state_dict().items()}, written["safetensors"])
    if "python" in formats:
        written["python"] = folder / "network.py"
        written["python"].write_text(source(plain, title, example.cpu()), encoding="utf-8")
    if "pt2" in formats:
        written["pt2"] = folder / "network.pt2"
        batch = torch.export.Dim("batch", min=1)
        inputs = torch.zeros((2, *example.shape[1:]), dtype=example.dtype)
        try:
            program = torch.export.export(plain, (inputs,), dynamic_shapes=({0: batch},))
            torch.export.save(program, written["pt2"])
        except OSError:
            raise
        except Exception as error:
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"this network cannot become a torch.export program (pt2): {reason}",
                            hint='leave "pt2" out of export.formats') from error  # fmt: skip
    return written
