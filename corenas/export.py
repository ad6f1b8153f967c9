"""How a subnet becomes a network of its own that torch alone can load, checked against the supernet."""

from __future__ import annotations

import copy
import inspect
import operator
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError

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
    Raises UserError if they differ by more than 1e-5 of the largest, or if the model's forward cannot be traced.
    """
    with apply(model, choices):
        try:
            graph = _Tracer().trace(model)
        except (TraceError, TypeError) as error:
            hint = "forward must not branch on the values of tensors; put such a part into a mutable with `export`"
            raise UserError(f"this model cannot be traced for export: {error}", hint=hint) from error
        parts: dict[str, Any] = {}
        names: dict[str, str] = {}
        for node in graph.nodes:
            if node.op in ("call_module", "get_attr"):
                name = str(node.target)
                if name not in names:
                    names[name] = _flat(name, names.values())
                    parts[names[name]] = _plain(model, name, node.op)
                node.target = names[name]
        plain = fx.GraphModule(parts, graph, "Network")
        plain.train(model.training)
        _compare(model, plain, example)
    return plain


def _flat(name: str, taken: Any) -> str:
    flat = re.sub(r"^(backbone|head)\.", "", name) if not name.startswith("head.") else name
    flat = flat.replace(".", "_")
    return flat if flat not in taken else f"{name.replace('.', '_')}_"


def _plain(model: nn.Module, name: str, op: str) -> Any:
    if op == "get_attr":
        return copy.deepcopy(operator.attrgetter(name)(model))
    module = model.get_submodule(name)
    return module.export() if hasattr(module, "export") else copy.deepcopy(module)  # type: ignore[operator]


@torch.no_grad()
def _compare(model: nn.Module, plain: nn.Module, example: Tensor) -> None:
    device = next(iter(model.parameters())).device
    noise = torch.randn((2, *example.shape[1:]), generator=torch.Generator().manual_seed(0))
    noise = noise.to(device, dtype=example.dtype, memory_format=torch.channels_last if noise.dim() == 4 else None)
    with statistics_kept(model), statistics_kept(plain):
        for module in (model, plain):
            module.eval()
        ours, theirs = model(noise), plain(noise)
    difference = float((ours - theirs).abs().max() / ours.abs().max().clamp_min(1e-12))
    if not difference <= TOLERANCE:
        raise UserError(f"the exported network differs from the supernet by {difference:.1e} of its largest output",
                        hint="nothing was written; please report this with the spec")  # fmt: skip


def source(plain: fx.GraphModule, title: str) -> str:
    """A Python file with a class `Network` that builds this network with torch alone; its state dict is the same.

    Raises UserError if the text does not give the same layers back.
    """
    lines = []
    for name, module in plain.named_children():
        lines.append(f"        self.{name} = {_constructor(module)}")
    for name, tensor in plain.named_parameters(recurse=False):
        lines.append(f"        self.{name} = nn.Parameter(torch.zeros({tuple(tensor.shape)}))")
    for name, tensor in plain.named_buffers(recurse=False):
        lines.append(f'        self.register_buffer("{name}", torch.zeros({tuple(tensor.shape)}))')
    body = _renamed(plain.graph).python_code("self").src
    body = re.sub(r"(?m);  \w+( = \w+)* = None|\s*#.*$", "", body[body.index("def forward") :])
    body = re.sub(r"(?<![.\w])([a-z])_\d+\b", r"\1", body)  # torch numbers the names that stand for several values
    body = re.sub(r", (\w+) = ", r", \1=", body)
    body = re.sub(r"def forward\(.*?\).*?:", "def forward(self, x: torch.Tensor) -> torch.Tensor:", body)
    body = "\n".join(f"    {line}" for line in body.strip().splitlines())
    text = f'''"""{title}"""

import torch
from torch import nn


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
{chr(10).join(lines)}

{body}
'''
    namespace: dict[str, Any] = {}
    exec(compile(text, "network.py", "exec"), namespace)
    built = namespace["Network"]()
    shapes = [{name: tensor.shape for name, tensor in m.state_dict().items()} for m in (built, plain)]
    if shapes[0] != shapes[1]:
        raise UserError("the network cannot be written as Python: its layers come out different")
    return text


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
    return graph


def _constructor(module: nn.Module) -> str:
    """The call that makes a layer of torch.nn anew, without what is the default."""
    arguments = []
    for name, parameter in inspect.signature(type(module).__init__).parameters.items():
        if name in ("self", "device", "dtype") or not hasattr(module, name):
            continue
        value = getattr(module, name)
        if isinstance(value, torch.Tensor) or (value is None and name == "bias"):
            value = value is not None
        if isinstance(value, tuple) and len(set(value)) == 1:
            value = value[0]
        if value != parameter.default:
            arguments.append(repr(value) if parameter.default is parameter.empty else f"{name}={value!r}")
    return f"nn.{type(module).__name__}({', '.join(arguments)})"


def write(plain: fx.GraphModule, example: Tensor, folder: Path, formats: Any, title: str) -> dict[str, Path]:
    """Write a network's files into a folder: weights, Python source, a torch.export program. Returns format -> file."""
    from safetensors.torch import save_file

    plain = copy.deepcopy(plain).cpu().eval()
    written: dict[str, Path] = {}
    if "safetensors" in formats:
        written["safetensors"] = folder / "network.safetensors"
        save_file({k: v.contiguous() for k, v in plain.state_dict().items()}, written["safetensors"])
    if "python" in formats:
        written["python"] = folder / "network.py"
        written["python"].write_text(source(plain, title), encoding="utf-8")
    if "pt2" in formats:
        written["pt2"] = folder / "network.pt2"
        batch = torch.export.Dim("batch", min=1)
        inputs = torch.zeros((2, *example.shape[1:]), dtype=example.dtype)
        program = torch.export.export(plain, (inputs,), dynamic_shapes=({0: batch},))
        torch.export.save(program, written["pt2"])
    return written
