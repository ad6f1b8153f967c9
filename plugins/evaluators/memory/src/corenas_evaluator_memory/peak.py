"""Which tensors of a network are alive together, read off its graph on the meta device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from corenas.contracts import EvaluatorContext
from corenas.export import plain_graph
from corenas.mutable import apply, as_arguments
from corenas.positions import weightless_twin
from corenas.space import Arch


class LiveMemory:
    """The evaluator at work. A supernet's twin has no weights, so an arch costs a trace of its graph, nothing else."""

    def __init__(self, element: int, context: EvaluatorContext) -> None:
        self._element, self._context = element, context
        self._twin = None if context.supernet is None else weightless_twin(context.supernet)
        self._known: dict[Arch, Mapping[str, float]] = {}

    def __call__(self, archs: Sequence[Arch], fidelity: float) -> list[Mapping[str, float]]:
        """Return the metrics of archs; a fidelity changes nothing."""
        for arch in archs:
            if arch not in self._known:
                self._known[arch] = self._measured(arch)
        return [self._known[arch] for arch in archs]

    def _measured(self, arch: Arch) -> Mapping[str, float]:
        example = self._context.task.example
        if self._twin is None:
            plain = plain_graph(weightless_twin(self._context.subnet(arch)))
        else:
            with apply(self._twin, arch):
                plain = plain_graph(self._twin)
        peak, weights = peak_memory(plain, example), weight_memory(plain)
        return {"peak_memory": peak * self._element // 4, "weight_memory": weights * self._element // 4}


def weight_memory(network: nn.Module) -> int:
    """Return the bytes of a network's parameters and buffers of floating-point numbers, each once."""
    tensors = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values() if tensor.is_floating_point())


def peak_memory(network: fx.GraphModule, example: Any) -> int:
    """Return the most bytes of activations that are alive at one operation of a graph.

    example: an input, as `call_model` takes it; its batch counts
    """
    if any(isinstance(part, nn.Sequential) for part in network.children()):
        network = fx.GraphModule(network, fx.Tracer().trace(network))  # its layers are operations too
    has_weights = any(not tensor.is_meta for tensor in (*network.parameters(), *network.buffers()))
    twin = weightless_twin(network) if has_weights else network
    given = tree_map_only(Tensor, lambda tensor: torch.empty_like(tensor, device="meta"), example)
    run = _Storages(twin)
    with torch.no_grad():
        run.run(*_placeholders(twin.graph, given))
    order = [*twin.graph.nodes]  # type: ignore[union-attr]
    step = {node: at for at, node in enumerate(order)}
    last = {node: max((step[user] for user in node.users), default=step[node]) for node in order}
    alive: set[fx.Node] = set()
    most = 0
    for at, node in enumerate(order):
        alive.add(node)
        storages = {id_: size for one in alive for id_, size in run.found[one].items()}
        most = max(most, sum(storages.values()))
        alive = {one for one in alive if last[one] > at}
    return most


def _placeholders(graph: Any, example: Any) -> list[Any]:
    """Return a graph's arguments in its order."""
    arguments, by_keyword = as_arguments(example)
    names = [str(node.target) for node in graph.nodes if node.op == "placeholder"]
    rest = iter(arguments)
    return [by_keyword[name] if name in by_keyword else next(rest) for name in names if name in by_keyword or arguments]


class _Storages(fx.Interpreter):
    """Runs a graph and notes the memory behind what each node gives.

    found: node -> {storage: bytes}, weights left out
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network, garbage_collect_values=False)
        self.found: dict[fx.Node, dict[int, int]] = {}
        self._weights = {*_storages((*network.parameters(), *network.buffers()))}

    def run_node(self, n: fx.Node) -> Any:
        """Run a node. All results are kept: what is gone could leave its number to another."""
        result = super().run_node(n)
        mine = _storages(tree_leaves(result)) if n.op != "get_attr" else {}
        self.found[n] = {id_: size for id_, size in mine.items() if id_ not in self._weights}
        return result

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Call a layer; for one that works element by element the answer is known, which is many times as fast."""
        layer = self.fetch_attr(target)
        if type(layer) in _ELEMENTWISE and len(args) == 1 and not kwargs:
            return args[0] if getattr(layer, "inplace", False) else torch.empty_like(args[0])
        return super().call_module(target, args, kwargs)


_ELEMENTWISE = {
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm),
    *(nn.ReLU, nn.ReLU6, nn.Hardswish, nn.Hardsigmoid, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Tanh, nn.LeakyReLU),
}
"""Layers whose output has the shape and type of their input."""


def _storages(tensors: Iterable[Any]) -> dict[int, int]:
    storages = [tensor.untyped_storage() for tensor in tensors if isinstance(tensor, Tensor)]
    return {storage._cdata: storage.nbytes() for storage in storages}
