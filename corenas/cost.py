"""What archs cost: exact flops, params and activations of many at once, without building any of them.

`flops` counts a multiply-add of a convolution, a linear layer or an attention product once; bias, norms, activations
and pooling count nothing. `activations` are the elements of the outputs of convolutions and linear layers.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from attrs import frozen
from torch import nn

from corenas.mutable import Gated, Resizing, apply, mutables
from corenas.space import Codes, SearchSpace
from corenas.value import LARGEST_TABLE, Constant, Dimension, Value, as_value, at_least, grid, looked_up

METRICS = ("flops", "params", "activations")


@frozen
class LayerCost:
    """What one layer costs for one input, as values over the arch."""

    flops: Value = Constant(0)
    params: Value = Constant(0)
    activations: Value = Constant(0)


@runtime_checkable
class Costed(Protocol):
    """A mutable that owns weights: it states its cost. Its `values` name its output axis `outputs`."""

    def cost(self, positions: Value) -> LayerCost:
        """Its cost for one input, given at how many positions (pixels, tokens) its output stands."""
        ...


def conv_cost(
    inputs: Value | int, outputs: Value | int, taps: Value | int, positions: Value, groups: Value | int, bias: bool
) -> LayerCost:
    """A convolution with `taps` weights from each input channel of its group to each output channel."""
    outputs = as_value(outputs)
    weights = outputs * (as_value(inputs) // groups) * taps
    return LayerCost(weights * positions, weights + outputs if bias else weights, outputs * positions)


def linear_cost(inputs: Value | int, outputs: Value | int, positions: Value, bias: bool) -> LayerCost:
    """A linear layer, at each position."""
    return conv_cost(inputs, outputs, 1, positions, 1, bias)


def norm_cost(features: Value | int, affine: bool) -> LayerCost:
    """A normalisation: two parameters a feature, nothing else."""
    return LayerCost(params=as_value(features) * (2 if affine else 0))


_UNKNOWN = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.MultiheadAttention, nn.RNNBase, nn.Bilinear)


def _plain_cost(module: nn.Module, positions: Value) -> LayerCost:
    """The cost of a module that no arch changes."""
    bias = getattr(module, "bias", None) is not None
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        taps = math.prod(module.kernel_size)
        return conv_cost(module.in_channels, module.out_channels, taps, positions, module.groups, bias)
    if isinstance(module, nn.Linear):
        return linear_cost(module.in_features, module.out_features, positions, bias)
    if isinstance(module, _UNKNOWN):
        raise ValueError(f"the flops of a {type(module).__name__} are not known; a mutable with `cost` could say them")
    return LayerCost(params=Constant(sum(p.numel() for p in module.parameters(recurse=False))))


def _outputs(module: nn.Module) -> Value | None:
    """How many channels a layer's output has, where that is known."""
    values = module.__dict__.get("values", {})
    if "outputs" in values:
        outputs = values["outputs"]
        return outputs.size if isinstance(outputs, Dimension) else outputs
    return next((Constant(getattr(module, a)) for a in ("out_channels", "out_features") if hasattr(module, a)), None)


class Cost:
    """The cost of the archs of one space, as columns.

    model: a supernet over the space's keys, on any device
    example: one input, of shape (1, channels, height, width); only its shape counts
    Raises ValueError where a layer's number of positions depends on a variable that no `Resizing` mutable declares,
    and for a plain layer whose flops are not known.
    """

    def __init__(self, model: nn.Module, space: SearchSpace, example: torch.Tensor) -> None:
        self.layers = _layer_costs(model, space, example)
        self.use(space)

    def use(self, space: SearchSpace) -> None:
        """Prepare for the codes of a space that is narrower than, or the same as, the model's."""
        self.space = space
        self._domains = {v.key: v.choices for v in space.variables if not v.continuous}
        self._fixed, self._tables, self._rest = self._tabulate()

    def on(self, space: SearchSpace) -> Cost:
        """The same costs for a narrower space."""
        other = copy.copy(self)
        other.use(space)
        return other

    def __call__(self, codes: Codes) -> dict[str, np.ndarray]:
        """flops, params and activations of archs (a matrix of choice indices): whole numbers, one a row."""
        total = np.tile(self._fixed, (len(codes), 1))
        columns = [np.ascontiguousarray(column) for column in codes.T.astype(np.int64)]
        for places, strides, table in self._tables:
            row = sum((columns[p] * s for p, s in zip(places, strides, strict=True)), start=np.int64(0))
            total += table[row]
        if self._rest:
            choices = {key: self._column(key, codes) for key in {key for _, value in self._rest for key in value.keys}}
            for metric, value in self._rest:
                total[:, metric] += value(choices).astype(np.int64)
        return dict(zip(METRICS, total.T, strict=True))

    def _column(self, key: str, codes: Codes) -> np.ndarray:
        """The choices of one variable in many archs."""
        column = codes[:, self.space.keys.index(key)]
        if key in self._domains:
            return np.asarray(self._domains[key])[column.astype(np.int64)]
        return np.array([*map(self.space[key].choice, column)])

    def of(self, archs: Iterable[Mapping[str, Any]]) -> list[dict[str, int]]:
        """flops, params and activations of archs, one mapping each."""
        columns = self(self.space.encode(archs))
        return [dict(zip(METRICS, map(int, row), strict=True)) for row in zip(*columns.values(), strict=True)]

    def _tabulate(self) -> tuple[np.ndarray, list[tuple[list[int], list[int], np.ndarray]], list[tuple[int, Value]]]:
        """Sums of layers over the same variables as one table each, what is too large for a table as values.

        A table has a row for each combination of its variables' choices and a column for each metric.
        """
        fixed = np.zeros(len(METRICS), np.int64)
        terms: dict[frozenset[str], list[tuple[int, Value]]] = {}
        rest: list[tuple[int, Value]] = []
        for layer in self.layers:
            for metric, value in enumerate((layer.flops, layer.params, layer.activations)):
                if not value.keys:
                    fixed[metric] += value({})
                elif not self._rows(value.keys) <= LARGEST_TABLE:
                    rest.append((metric, value))
                else:
                    terms.setdefault(frozenset(value.keys), []).append((metric, value))
        groups: dict[frozenset[str], list[tuple[int, Value]]] = {}
        for keys in sorted(terms, key=lambda k: (-len(k), sorted(k))):  # the small ones join a larger one
            host = next((group for group in groups if keys <= group), keys)
            groups.setdefault(host, []).extend(terms[keys])
        tables = []
        for group, members in groups.items():
            keys = [key for key in self.space.keys if key in group]
            columns = grid({key: self._domains[key] for key in keys})
            table = np.zeros((int(self._rows(keys)), len(METRICS)), np.int64)
            for metric, value in members:
                table[:, metric] += value(columns).astype(np.int64)
            sizes = [len(self._domains[key]) for key in keys]
            strides = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
            tables.append(([self.space.keys.index(key) for key in keys], strides, table))
        return fixed, tables, rest

    def _rows(self, keys: Iterable[str]) -> float:
        """How many combinations of choices there are: infinitely many of a continuous variable."""
        return math.prod(len(self._domains[key]) if key in self._domains else math.inf for key in keys)


def _layer_costs(model: nn.Module, space: SearchSpace, example: torch.Tensor) -> list[LayerCost]:
    gates: dict[nn.Module, list[Value]] = {}
    _collect_gates(model, Constant(1), gates)
    gates = {module: own if len({*own}) > 1 else own[:1] for module, own in gates.items()}
    owners = [module for module in gates if hasattr(module, "cost") or [*module.parameters(recurse=False)]]
    calls = _calls(model, space, example, gates, owners)
    costs = []
    for module in owners:
        # What stands in several places is called in each, but has its weights once.
        runs = functools.reduce(operator.add, gates[module])
        owned = at_least(runs, 1) if len(gates[module]) > 1 else runs
        cost = module.cost if isinstance(module, Costed) else functools.partial(_plain_cost, module)
        costs.append(LayerCost(params=owned * cost(Constant(0)).params))
        for positions in calls.get(module, ()):
            once = cost(positions)
            costs.append(LayerCost(flops=runs * once.flops, activations=runs * once.activations))
    return costs


def _collect_gates(
    module: nn.Module, gate: Value, gates: dict[nn.Module, list[Value]], gated: frozenset[nn.Module] = frozenset()
) -> None:
    """Under which archs each module runs: for each of its places the product of the gates above it."""
    gates.setdefault(module, []).append(gate)
    own = [*module.gates()] if isinstance(module, Gated) else []
    for child, value in own:
        _collect_gates(child, _both(gate, value), gates)
    if own or not isinstance(module, nn.ModuleList | nn.ModuleDict):  # a container leaves its items to its owner
        gated = frozenset(child for child, _ in own)
    for child in module.children():
        if child not in gated:
            _collect_gates(child, gate, gates, gated)


def _both(gate: Value, other: Value) -> Value:
    if Constant(1) in (gate, other):
        return other if gate == Constant(1) else gate
    return gate * other


def _calls(
    model: nn.Module,
    space: SearchSpace,
    example: torch.Tensor,
    gates: Mapping[nn.Module, Sequence[Value]],
    owners: Sequence[nn.Module],
) -> dict[nn.Module, list[Value]]:
    """At how many positions a layer's output stands, for each time it is called in one of its places.

    Read off runs on no data, on the meta device: one for each combination of the choices that resize, and as many archs
    as it takes for every layer to run once.
    """
    resizing = {key: space.value(key) for m in mutables(model) if isinstance(m, Resizing)
                for name in m.resizes for key in m.values[name].keys}  # fmt: skip
    seen: dict[nn.Module, dict[tuple[Any, ...], tuple[int, ...]]] = {}
    # The very modules run, so that results belong to them: their weights are put on the meta device for a while.
    with _weightless(model) as run:
        covering = _covering_archs(space, [gate for module in owners for gate in gates[module]])
        all_sizes = [*itertools.product(*(value.possible for value in resizing.values()))]
        # The smallest arch opens nothing new: it shows what changes sizes without saying so.
        for base, sizes in [*itertools.product(covering, all_sizes), (space.smallest(), all_sizes[0])]:
            arch = {**base, **dict(zip(resizing, sizes, strict=True))}
            for module, found in run(owners, arch, example).items():
                places = sum(gate(arch) for gate in gates[module])
                one = found[: len(found) // max(places, 1)]
                if one * places != found or seen.setdefault(module, {}).setdefault(sizes, one) != one:
                    raise ValueError(
                        f"a {type(module).__name__} runs at {list(found)} positions in {places} places under one arch, "
                        f"at {[*seen.get(module, {}).get(sizes, ())]} in each under another: a mutable that resizes "
                        "must declare `resizes`, one that does not run all its children must have `gates`"
                    )
    calls = {}
    for module, table in seen.items():
        if len({len(found) for found in table.values()}) > 1:
            raise ValueError(f"how often a {type(module).__name__} is called depends on the size of its input")
        columns = ({sizes: found[i] for sizes, found in table.items()} for i in range(len(next(iter(table.values())))))
        calls[module] = [looked_up(column, *resizing.values()) for column in columns]
    return calls


def _covering_archs(space: SearchSpace, gates: Iterable[Value]) -> Iterable[dict[str, Any]]:
    """Archs under which every gate is open at least once, the largest first."""
    largest = dict(space.largest())
    yield largest
    closed = [gate for gate in dict.fromkeys(gates) if not gate(largest)]
    while closed:
        opened: dict[str, Any] = {}
        for gate in closed:
            columns = grid({key: opened_or_all(space, key, opened) for key in gate.keys})
            rows = np.flatnonzero(gate(columns))
            if len(rows):
                opened |= {key: column[rows[-1]].item() for key, column in columns.items()}
        arch = largest | opened
        yield arch
        still = [gate for gate in closed if not gate(arch)]
        if len(still) == len(closed):  # what no arch of this space opens never costs anything
            return
        closed = still


def opened_or_all(space: SearchSpace, key: str, opened: Mapping[str, Any]) -> Sequence[Any]:
    """The one choice that a variable was given already, or all it has."""
    return [opened[key]] if key in opened else space[key].choices


class _weightless:  # noqa: N801 - reads as a verb where it is used
    """A model whose weights are on the meta device for a while; entered it gives a function that runs one arch."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __enter__(self) -> Any:
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        self.weights = {name: torch.empty_like(tensor, device="meta") for name, tensor in named}
        self.modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        return self.run

    def run(
        self, owners: Iterable[nn.Module], arch: Mapping[str, Any], example: torch.Tensor
    ) -> dict[nn.Module, tuple[int, ...]]:
        found: dict[nn.Module, tuple[int, ...]] = {}

        def note(module: nn.Module, args: Any, output: Any) -> None:
            channels = _outputs(module)
            output = output[0] if isinstance(output, tuple) else output
            if channels is not None and isinstance(output, torch.Tensor):
                # Over the example's size, not the output's: some layers fold windows into the batch.
                positions = output.numel() // len(example) // max(channels(arch), 1)
                found[module] = (*found.get(module, ()), positions)

        hooks = [module.register_forward_hook(note) for module in owners]
        try:
            with torch.no_grad(), apply(self.model, arch):
                torch.func.functional_call(self.model, self.weights, (torch.empty_like(example, device="meta"),))
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def __exit__(self, *error: object) -> None:
        for module, mode in self.modes:
            module.training = mode
