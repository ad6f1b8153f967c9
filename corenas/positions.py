"""At how many positions (pixels, tokens) the outputs of a model's layers stand, under every arch of a space.

A twin of the model without weights runs on the meta device: once for each combination of the choices that resize,
under as many archs as it takes for every layer to run once. Hooks note the sizes of the layers' outputs.
"""

from __future__ import annotations

import copy
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from corenas.mutable import (
    Costed,
    Gated,
    Resizing,
    WhollyCosted,
    apply,
    call_model,
    elastic_of,
    mutables,
    offers,
)
from corenas.space import SearchSpace
from corenas.value import LARGEST_TABLE, Constant, Dimension, Value, grid, looked_up

Gates = Mapping[nn.Module, Sequence[Value]]
"""For each layer and each time that it stands in a model, what is 1 where it runs and 0 where it does not."""


def weightless_twin(model: nn.Module) -> nn.Module:
    """Return a copy of a model on the meta device, in evaluation mode; its parameters are not copied first."""
    weights = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): torch.empty_like(tensor, device="meta") for tensor in weights}).eval()


def occurrences(
    module: nn.Module, gate: Value = Constant(1), gated: frozenset[nn.Module] = frozenset()
) -> Iterator[tuple[nn.Module, Value]]:
    """Yield every module each time that it stands in a model, with what says under which archs it runs there.

    What is in one that is `WhollyCosted` is left out.
    gate: the product of the gates above it; gated: what has a gate of its own further up
    """
    yield module, gate
    if offers(module, WhollyCosted):
        return
    own = [*module.gates()] if offers(module, Gated) else []
    for child, value in own:
        yield from occurrences(child, gate * value)
    gated |= {child for child, _ in own}
    for child in module.children():
        if child not in gated:
            yield from occurrences(child, gate, gated)


def positions(
    twin: nn.Module, space: SearchSpace, example: Any, gates: Gates
) -> tuple[dict[nn.Module, list[tuple[Value, ...]]], dict[nn.Module, Value]]:
    """Return at how many positions a layer's output stands, for each time it is called where it stands once.

    Of a plain layer whose cost follows from more than that, its flops and activations instead (`cost_of_call`).
    The second mapping has the flops of modules that compute products themselves, by `@` or
    `scaled_dot_product_attention` for instance, where they stand once.

    twin: without weights; it gets hooks, and its element-wise layers do nothing from now on
    Raises ValueError where the positions depend on a variable that no `Resizing` mutable declares, and where a layer
    does not run when its gates say so; where products that a module computes itself follow from the arch.
    """
    resizing = _resizing(twin, space)
    all_sizes = [*itertools.product(*(value.possible for value in resizing.values()))]
    covering = _covering_archs(space, itertools.chain(*gates.values()))
    recorder = _Recorder(twin, example, gates)
    seen: dict[tuple[nn.Module, tuple[Any, ...]], list[tuple[int, ...]]] = {}
    products: dict[nn.Module, dict[tuple[Any, ...], int]] = defaultdict(dict)
    # The smallest arch opens nothing new: it shows what changes sizes without saying so.
    for base, sizes in [*itertools.product(covering, all_sizes), (space.smallest(), all_sizes[0])]:
        arch = {**base, **dict(zip(resizing, sizes, strict=True))}
        for module, called in recorder.run(arch).items():
            times = sum(gate(arch) for gate in gates[module])
            once = called[: len(called) // max(times, 1)]
            if once * times != called or seen.setdefault((module, sizes), once) != once:
                raise ValueError(
                    f"a {type(module).__name__} runs at {_numbers(called)} positions in {times} places under one arch, "
                    f"at {_numbers(seen.get((module, sizes), []))} in each under another: a mutable that resizes "
                    "must declare `resizes`, one that does not run all its children must have `gates`"
                )
        for module, flops in recorder.products.items():
            times = sum(gate(arch) for other, gate in occurrences(twin) if other is module)
            if not times or flops % times or products[module].setdefault(sizes, flops // times) != flops // times:
                raise ValueError(
                    f"a {type(module).__name__} computes products itself, by `@` or `scaled_dot_product_attention` for "
                    "instance, whose sizes follow from the arch: let a mutable in it state them "
                    "(corenas.mutable.Costed), or the module all that it costs (WhollyCosted)"
                )
    result = {}
    for module in gates:  # a call that some sizes do without stands at no positions there
        nothing = (0, 0) if cost_of_call(module) or costs_inputs(module) else (0,)
        calls = itertools.zip_longest(*(seen.get((module, sizes), ()) for sizes in all_sizes), fillvalue=nothing)
        # Each call's figures, one value each.
        columns = ([dict(zip(all_sizes, figure, strict=True)) for figure in zip(*call, strict=True)] for call in calls)
        result[module] = [tuple(looked_up(table, *resizing.values()) for table in tables) for tables in columns]
    tables = {module: {sizes: found.get(sizes, 0) for sizes in all_sizes} for module, found in products.items()}
    return result, {module: looked_up(table, *resizing.values()) for module, table in tables.items()}


def cost_of_call(module: nn.Module) -> Callable[[Any, Sequence[Any], Any], tuple[int, int]] | None:
    """Return what gives flops and activations of a call of a plain layer, from it, its inputs and its output.

    None for a layer whose cost follows from the positions of its output, and one that computes nothing that counts.
    """
    if elastic_of(module) is not None:
        return None
    return next((function for kinds, function in _CALLS.items() if isinstance(module, kinds)), None)


def costs_inputs(module: nn.Module) -> bool:
    """Return whether a mutable's cost follows from the positions of its input as well (`corenas.mutable.Costed`)."""
    return bool(getattr(module, "costs_inputs", False))


def _transposed(module: Any, inputs: Sequence[Any], output: Any) -> tuple[int, int]:
    """Each weight counts at each position of the input."""
    positions = inputs[0].numel() // module.in_channels
    return positions * module.weight.numel(), output.numel()


def _attention(module: nn.MultiheadAttention, inputs: Sequence[Any], output: Any) -> tuple[int, int]:
    """Four projections, and two products of all heads together (what biases of keys and values add is one token)."""
    queries, keys, values = (tensor.numel() // tensor.shape[-1] for tensor in inputs[:3])
    tokens = keys // (1 if inputs[1].dim() == 2 else inputs[1].shape[0 if module.batch_first else 1])
    tokens += (module.bias_k is not None) + module.add_zero_attn
    width, kdim, vdim = module.embed_dim, module.kdim or 0, module.vdim or 0
    projections = (2 * queries * width + keys * kdim + values * vdim) * width
    return projections + 2 * queries * tokens * width, (2 * queries + keys + values) * width


def _recurrent(module: nn.Module, inputs: Sequence[Any], output: Any) -> tuple[int, int]:
    """Each weight matrix, of all layers, directions and gates, counts at each step."""
    first = inputs[0].data  # of a packed sequence as well
    steps = first.numel() // first.shape[-1]
    matrices = [p for p in module.parameters(recurse=False) if p.dim() == 2]
    # A step's gates get one output from the input and one from the state; a projection one.
    return steps * sum(p.numel() for p in matrices), steps * sum(len(p) for p in matrices)


def _bilinear(module: nn.Bilinear, inputs: Sequence[Any], output: Any) -> tuple[int, int]:
    """Each weight counts at each position, as those of a linear layer of all products would."""
    return output.numel() // module.out_features * module.weight.numel(), output.numel()


_CALLS: Mapping[Any, Callable[[Any, Sequence[Any], Any], tuple[int, int]]] = {
    (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d): _transposed,
    nn.MultiheadAttention: _attention,
    (nn.RNNBase, nn.RNNCellBase): _recurrent,
    nn.Bilinear: _bilinear,
}


def _numbers(called: Sequence[tuple[int, ...]]) -> list[int]:
    return [figures[0] for figures in called]


def _resizing(model: nn.Module, space: SearchSpace) -> dict[str, Value]:
    """Return the variables that change sizes."""
    values = [m.elastic.values[name] for m in mutables(model) if isinstance(m, Resizing) for name in m.resizes]
    return {key: space.value(key) for value in values for key in value.keys}


class _Recorder:
    """Runs a twin and notes at how many positions each call of its layers stands."""

    def __init__(self, twin: nn.Module, example: Any, gates: Gates) -> None:
        self._twin = twin
        floats = (p.dtype for p in (*twin.parameters(), *twin.buffers()) if p.is_floating_point())
        kind = next(floats, torch.float32)
        self._input = tree_map(lambda leaf: _on_meta(leaf, kind), example)
        self._batch = next((len(leaf) for leaf in tree_leaves(example) if isinstance(leaf, torch.Tensor)), 1)
        self._arch: Mapping[str, Any] = {}
        self._called: dict[nn.Module, list[tuple[int, ...]]] = {}
        self._products = _Products()
        for module in gates:
            module.register_forward_hook(self._note, with_kwargs=True)
        self._products.follow(twin)
        for module in twin.modules():
            if isinstance(module, _ELEMENTWISE):  # on the meta device they take longer than a convolution
                module.forward = _same  # type: ignore[method-assign, assignment]

    def run(self, arch: Mapping[str, Any]) -> dict[nn.Module, list[tuple[int, ...]]]:
        """Return the positions of each call of each layer under an arch, or what it costs."""
        self._arch, self._called = arch, {}
        apply(self._twin, arch)
        self._products.begin()
        # Without gradient layers may take short cuts; these weights want none.
        with torch.enable_grad(), self._products:
            call_model(self._twin, self._input)
        return self._called

    @property
    def products(self) -> dict[nn.Module, int]:
        """Return the flops of products that modules computed themselves in the last run, for one input."""
        return {module: flops // self._batch for module, flops in self._products.flops.items() if flops}

    def _note(self, module: nn.Module, args: Any, by_keyword: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        of_call = cost_of_call(module)
        if of_call is not None:
            figures = of_call(module, [*args, *by_keyword.values()], output)
            self._called.setdefault(module, []).append(tuple(figure // self._batch for figure in figures))
            return
        channels = output_channels(module)
        if channels is not None and isinstance(output, torch.Tensor):
            # Over the example's size, not the output's: some layers fold windows into the batch.
            count = output.numel() // self._batch // max(channels(self._arch), 1)
            figures = (count,)
            if costs_inputs(module):
                x = next(leaf for leaf in tree_leaves((args, by_keyword)) if isinstance(leaf, torch.Tensor))
                figures = count, x.numel() // self._batch // x.shape[1]
            self._called.setdefault(module, []).append(figures)


class _Products(TorchFunctionMode):
    """Counts the multiply-adds of products that modules compute themselves, not by layers that state their cost.

    flops: for each module that is followed
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops: Counter[nn.Module] = Counter()
        self._running: list[nn.Module | None] = []  # the innermost last; None within a layer of known cost
        self._followed: set[nn.Module] = set()

    def begin(self) -> None:
        """Forget what was counted."""
        self.flops.clear()
        self._running.clear()

    def follow(self, module: nn.Module, known: bool = False) -> None:
        """Notice when a module runs, and what is in it, as far down as costs are not known.

        known: whether it is in one that states all costs, which may be entered by another method than its forward
        """
        if isinstance(module, _ELEMENTWISE) or module in self._followed:
            return
        self._followed.add(module)
        wholly = known or offers(module, WhollyCosted)
        plain = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear)
        known = wholly or plain or offers(module, Costed) or cost_of_call(module) is not None
        for child in module.children() if wholly or not known else ():
            self.follow(child, wholly)
        if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict | nn.Identity):  # which compute nothing
            return
        owner = None if known else module
        module.register_forward_pre_hook(lambda *_: self._running.append(owner))
        module.register_forward_hook(lambda *_: self._leave())

    def _leave(self) -> None:
        self._running.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        owner = self._running[-1] if self._running and func in _PRODUCTS else None
        if owner is None:
            return func(*args, **(kwargs or {}))
        with FlopCounterMode(display=False) as counter:
            found = func(*args, **(kwargs or {}))
        self.flops[owner] += counter.get_total_flops() // 2
        return found


_PRODUCTS = {
    *(getattr(torch, name) for name in ("matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "tensordot", "bilinear")),
    *(getattr(torch.Tensor, name) for name in ("matmul", "mm", "bmm", "addmm", "baddbmm", "__matmul__", "__rmatmul__")),
    *(getattr(nn.functional, name) for name in ("linear", "bilinear", "scaled_dot_product_attention")),
    *(getattr(nn.functional, f"conv{kind}{n}d") for kind in ("", "_transpose") for n in (1, 2, 3)),
}
"""Functions that multiply and add."""


def _on_meta(leaf: Any, kind: torch.dtype) -> Any:
    """Return a tensor of an example without its numbers, those of floats of the model's kind: only shapes count."""
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return torch.empty_like(leaf, device="meta", dtype=kind if leaf.is_floating_point() else leaf.dtype)


def output_channels(module: nn.Module) -> Value | None:
    """Return how many channels a layer's output has, None where that is not known."""
    plain = getattr(module, "out_channels", getattr(module, "out_features", None))
    elastic = elastic_of(module)
    outputs = plain if elastic is None else elastic.values.get("outputs", plain)
    return None if outputs is None else Dimension.of(outputs).size


_ELEMENTWISE = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.ReLU,
    nn.Hardtanh,
    nn.Hardswish,
    nn.SiLU,
    nn.GELU,
    nn.Sigmoid,
    nn.Hardsigmoid,
    nn.modules.dropout._DropoutNd,
)
"""Layers whose output has the shape of their input."""


def _same(x: torch.Tensor) -> torch.Tensor:
    return x


def _covering_archs(space: SearchSpace, gates: Iterable[Value]) -> list[dict[str, Any]]:
    """Return archs under which every gate that some arch opens is open at least once, the largest arch first."""
    largest = dict(space.largest())
    archs = [largest]
    for gate in dict.fromkeys(gate for gate in gates if gate.keys):
        opened: dict[str, Any] = {}
        for held in (*archs, opened):  # the first arch that can open it without closing another
            free = {key: [held[key]] if key in held else space[key].choices for key in gate.keys}
            most = int(LARGEST_TABLE ** (1 / len(free)))
            columns = grid({key: _spread(choices, most) for key, choices in free.items()})
            if len(rows := np.flatnonzero(gate(columns))):
                held |= {key: column[rows[-1]].item() for key, column in columns.items()}
                break
        if opened:
            archs.append(opened)
    return [largest | held for held in archs]


def _spread(choices: Sequence[Any], most: int) -> Sequence[Any]:
    """Return all choices, or so many of them from the first to the last."""
    if len(choices) <= most:
        return choices
    return [choices[code] for code in np.linspace(0, len(choices) - 1, most).astype(int)]
