"""How a traced network is written as a Python file that a person would have written."""

from __future__ import annotations

import copy
import inspect
import re
from typing import Any

import torch
from torch import Tensor, fx, nn

from corenas.export import TOLERANCE, difference


def source(network: nn.Module, example: Any, title: str) -> str:
    """A Python file with a class `Network` that builds this network with torch alone; its state dict is the same.

    network: a graph of layers of torch.nn, as `corenas.export.export` gives it
    example: an input; both networks are compared on noise of its shape
    title: first line of the file's docstring
    Raises ValueError if the network is no such graph or if the file's would compute something else; and whatever Python
    or torch raise at running the file.
    """
    if not isinstance(network, fx.GraphModule):
        raise ValueError(f"{type(network).__name__} is no graph; corenas.export.export makes one of it")
    text = _file(network, title)
    namespace: dict[str, Any] = {}
    exec(compile(text, "network.py", "exec"), namespace)
    with torch.random.fork_rng(devices=[]):  # its first weights are of no account
        built = namespace["Network"]()
    built.load_state_dict(network.state_dict())
    if not difference(network, built, example) <= TOLERANCE:
        raise ValueError("its layers come out different")
    return text


def _file(network: fx.GraphModule, title: str) -> str:
    layers = [f"self.{name} = {_constructor(module)}" for name, module in network.named_children()]
    layers += [f"self.{name} = nn.Parameter({_zeros(p)})" for name, p in network.named_parameters(recurse=False)]
    layers += [f'self.register_buffer("{name}", {_zeros(b)})' for name, b in network.named_buffers(recurse=False)]
    forward = _forward(network.graph)
    imports = ["import torch", "from torch import nn"]
    if constants := sorted({*re.findall(r"(?<![.\w])(?:inf|nan)\b", "\n".join([*layers, *forward]))}):
        imports.insert(0, f"from math import {', '.join(constants)}\n")
    lines = ["class Network(nn.Module):", "    def __init__(self) -> None:", "        super().__init__()"]
    lines += [f"        {line}" for line in layers] + [""] + [f"    {line}" for line in forward]
    title = title.replace("\\", "/").replace('"', "'")
    return "\n".join([f'"""{title}"""', "", *imports, "", "", *lines, ""])


# -- __init__ ---------------------------------------------------------------------------------------------------------

_SIZES = ("kernel_size", "stride", "padding", "dilation", "output_padding", "output_size", "size", "scale_factor")
"""Arguments of which one number stands for a tuple of equal ones."""


def _constructor(module: nn.Module) -> str:
    """The call that makes a layer of torch.nn anew, without what is the default."""
    kind = type(module).__name__
    if getattr(nn, kind, None) is not type(module):
        raise ValueError(f"{kind} is no layer of torch.nn")
    if isinstance(module, nn.Sequential):
        return f"nn.Sequential({', '.join(map(_constructor, module))})"
    arguments = []
    for name, parameter in inspect.signature(type(module).__init__).parameters.items():
        if name in ("self", "device", "dtype") or not hasattr(module, name):
            continue
        value = getattr(module, name)
        if isinstance(value, Tensor) or (value is None and name == "bias"):
            value = value is not None
        if name in _SIZES and isinstance(value, tuple) and len(set(value)) == 1:
            value = value[0]
        if value != parameter.default:
            arguments.append(repr(value) if parameter.default is parameter.empty else f"{name}={value!r}")
    return f"nn.{kind}({', '.join(arguments)})"


def _zeros(tensor: Tensor) -> str:
    dtype = "" if tensor.dtype == torch.float32 else f", dtype={tensor.dtype}"
    return f"torch.zeros({tuple(tensor.shape)}{dtype})"


# -- forward ----------------------------------------------------------------------------------------------------------

_LETTERS = "xyzuvwabcdefgh"


def _forward(graph: fx.Graph) -> list[str]:
    """The lines of `forward`: torch's code for the graph, without what a person would not write."""
    code = _renamed(graph).python_code("self").src
    code = code[code.index("def forward") :]
    code = re.sub(r"def forward\(.*?\).*?:", "def forward(self, x: torch.Tensor) -> torch.Tensor:", code)
    code = re.sub(r"(?m);  \w+( = \w+)* = None|\s*#.*$", "", code)  # torch frees values, and notes what wraps them
    code = re.sub(r"(?<![.\w'\"])([a-z]|t\d+)_\d+\b", r"\1", code)  # torch numbers the names that stand for several
    code = re.sub(r", (\w+) = ", r", \1=", code)
    return code.strip().splitlines()


def _renamed(graph: fx.Graph) -> fx.Graph:
    """The graph with names as a person gives them: a value that is not needed any more lends its name to the next."""
    graph = copy.deepcopy(graph)
    last_use = {value: node for node in graph.nodes for value in node.all_input_nodes}
    free = [*_LETTERS, *(f"t{i}" for i in range(len(graph.nodes)))][::-1]
    for node in graph.nodes:
        if node.op == "output":
            break
        free += [value.name for value in node.all_input_nodes if last_use[value] is node]
        free.sort(key=lambda name: (len(name), _LETTERS.find(name), name), reverse=True)
        node.name = free.pop()
        if node.op == "placeholder":
            node.target = node.name
    return graph
