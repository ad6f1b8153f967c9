"""What archs cost: exact flops, params and activations of many at once, without building any of them.

`flops` counts a multiply-add of a convolution, a linear layer or an attention product once; bias, norms, activations
and pooling count nothing. `activations` are the elements of the outputs of convolutions and linear layers.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from attrs import frozen
from torch import nn

from corenas.errors import did_you_mean
from corenas.mutable import Gated, Resizing, apply, keys_used, mutables
from corenas.space import Codes, SearchSpace
from corenas.value import LARGEST_TABLE, Constant, Dimension, Expression, Value, as_value, at_least, grid, looked_up

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


def _cost(module: nn.Module, positions: Value) -> LayerCost:
    if isinstance(module, Costed):
        return module.cost(positions)
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
    plain = getattr(module, "out_channels", getattr(module, "out_features", None))
    outputs = module.__dict__.get("values", {}).get("outputs", plain)
    return None if outputs is None else Dimension.of(outputs).size


class Cost:
    """The cost of the archs of one space, as columns.

    model: a supernet over the space's keys, on any device
    example: one input, of shape (1, channels, height, width); only its shape counts
    Raises ValueError where a layer's number of positions depends on a variable that no `Resizing` mutable declares,
    for a plain layer whose flops are not known, and for a model with variables that the space lacks.
    """

    def __init__(self, model: nn.Module, space: SearchSpace, example: torch.Tensor) -> None:
        for key in sorted(keys_used(model) - {*space.keys}):
            raise ValueError(f"the model depends on {key!r}, which the space lacks: {did_you_mean(key, space.keys)}")
        self._terms = _terms(model, space, example)
        self._tabulate(space)

    def on(self, space: SearchSpace) -> Cost:
        """The same costs for the codes of a space that is narrower than, or the same as, the model's."""
        other = copy.copy(self)
        other._tabulate(space)
        return other

    def __call__(self, codes: Codes) -> dict[str, np.ndarray]:
        """flops, params and activations of archs (a matrix of choice indices): whole numbers, one a row."""
        return dict(zip(METRICS, self._totals(codes).T, strict=True))

    def of(self, archs: Iterable[Mapping[str, Any]]) -> list[dict[str, int]]:
        """flops, params and activations of archs, one mapping each."""
        totals = self._totals(self.space.encode(archs))
        return [dict(zip(METRICS, row, strict=True)) for row in totals.tolist()]

    def _totals(self, codes: Codes) -> np.ndarray:
        """A row for each arch, a column for each metric."""
        totals = np.zeros((len(codes), len(METRICS)), np.int64)
        for start in range(0, len(codes), _ROWS):
            columns = _Columns(self.space, codes[start : start + _ROWS], self._known)
            part = totals[start : start + _ROWS]
            for metric, value in self._rest:
                part[:, metric] += np.asarray(columns(value), np.int64)
            for keys, table in self._tables:
                part += table[columns.place(keys)]
        return totals

    def _tabulate(self, space: SearchSpace) -> None:
        """Sum terms over the same variables into one table; what is too large for a table stays as values.

        A table has a row for each combination of its variables' choices, a column for each metric.
        """
        self.space = space
        self._tables: list[tuple[tuple[str, ...], np.ndarray]] = []
        self._rest: list[tuple[int, Value]] = []
        self._known: dict[Value, np.ndarray] = {}
        together: dict[tuple[str, ...], list[tuple[int, Value]]] = defaultdict(list)
        for metric, value in self._terms:
            together[tuple(sorted(value.keys))].append((metric, value))
        for keys, terms in together.items():
            rows = _combinations(space, keys)
            if rows is None:
                self._rest += terms
                continue
            choices = grid({key: space[key].choices for key in keys}) if keys else {}
            table = np.zeros((rows, len(METRICS)), np.int64)
            for metric, value in terms:
                table[:, metric] += np.asarray(value(choices), np.int64)
            self._tables.append((keys, table))


_ROWS = 8192
"""How many archs are computed at a time: their columns stay in the processor's cache."""


def _combinations(space: SearchSpace, keys: Iterable[str]) -> int | None:
    """How many combinations of choices some variables have; None for more than a table may have."""
    variables = [space[key] for key in keys]
    number = math.prod(len(variable.choices) for variable in variables)
    return None if number > LARGEST_TABLE or any(variable.continuous for variable in variables) else number


class _Columns:
    """Values of many archs as columns, each computed once; those of few variables are looked up in tables.

    known: the tables so far
    """

    def __init__(self, space: SearchSpace, codes: Codes, known: dict[Value, np.ndarray]) -> None:
        self._space, self._known = space, known
        self._codes = {v.key: column if v.continuous else column.astype(np.int64)
                       for v, column in zip(space.variables, codes.T, strict=True)}  # fmt: skip
        self._found: dict[Value, np.ndarray] = {}
        self._places: dict[tuple[str, ...], Any] = {(): 0}

    def __call__(self, value: Value) -> Any:
        """The column of a value."""
        if isinstance(value, Constant):
            return value.number
        if value not in self._found:
            self._found[value] = self._computed(value)
        return self._found[value]

    def place(self, keys: tuple[str, ...]) -> Any:
        """The row of each arch in a table over variables, of which the last changes fastest."""
        if keys not in self._places:
            *before, last = keys
            before = self.place(tuple(before))
            self._places[keys] = before * len(self._space[last].choices) + self._codes[last]
        return self._places[keys]

    def _computed(self, value: Value) -> np.ndarray:
        if _combinations(self._space, value.keys) is not None:
            if value not in self._known:
                choices = grid({key: self._space[key].choices for key in value.keys})
                self._known[value] = np.asarray(value(choices))
            return self._known[value][self.place(value.keys)]
        if isinstance(value, Expression):
            return value.function(*map(self, value.arguments))
        (key,) = value.keys
        return np.array([*map(self._space[key].choice, self._codes[key])])


def _terms(model: nn.Module, space: SearchSpace, example: torch.Tensor) -> list[tuple[int, Value]]:
    """What the costs of all archs are the sums of: numbers of metrics, each with a value."""
    # A twin without weights: it runs on no data, on the meta device, and leaves the model alone.
    weights = itertools.chain(model.parameters(), model.buffers())
    twin = copy.deepcopy(model, {id(tensor): torch.empty_like(tensor, device="meta") for tensor in weights}).eval()
    gates: dict[nn.Module, list[Value]] = defaultdict(list)
    for module, gate in _places(twin, Constant(1)):
        if isinstance(module, Costed) or [*module.parameters(recurse=False)]:
            gates[module].append(gate)
    gates = {module: own if len({*own}) > 1 else own[:1] for module, own in gates.items()}
    calls = _calls(twin, space, example, gates)
    # Layers that cost the same under the same variables, as the blocks of a stage do, are counted, not listed.
    alike: dict[tuple[int, Value, frozenset[str]], list[Value]] = defaultdict(list)
    for module, own in gates.items():
        runs = _added(own)
        shared = frozenset(runs.keys)
        # What stands in several places is called in each, but has its weights once.
        alike[METRICS.index("params"), _cost(module, Constant(0)).params, shared].append(at_least(runs, 1))
        for positions in calls[module]:
            once = _cost(module, positions)
            alike[METRICS.index("flops"), once.flops, shared].append(runs)
            alike[METRICS.index("activations"), once.activations, shared].append(runs)
    return [(metric, _added(times) * once) for (metric, once, _), times in alike.items() if once != Constant(0)]


def _added(values: Sequence[Value]) -> Value:
    """The sum of values, pair by pair: a chain of hundreds would nest too deeply."""
    if len(values) == 1:
        return values[0]
    middle = len(values) // 2
    return _added(values[:middle]) + _added(values[middle:])


def _places(
    module: nn.Module, gate: Value, gated: frozenset[nn.Module] = frozenset()
) -> Iterator[tuple[nn.Module, Value]]:
    """Every place of every module, with what says under which archs it runs: the product of the gates above it.

    gated: what has a gate of its own further up
    """
    yield module, gate
    own = [*module.gates()] if isinstance(module, Gated) else []
    for child, value in own:
        yield from _places(child, gate * value)
    gated |= {child for child, _ in own}
    for child in module.children():
        if child not in gated:
            yield from _places(child, gate, gated)


def _calls(
    twin: nn.Module, space: SearchSpace, example: torch.Tensor, gates: Mapping[nn.Module, Sequence[Value]]
) -> dict[nn.Module, list[Value]]:
    """At how many positions a layer's output stands, for each time it is called in one of its places.

    Read off one run for each combination of the choices that resize, under as many archs as it takes for every layer
    to run once.
    """
    resizing = {key: space.value(key) for m in mutables(twin) if isinstance(m, Resizing)
                for name in m.resizes for key in m.values[name].keys}  # fmt: skip
    all_sizes = [*itertools.product(*(value.possible for value in resizing.values()))]
    found: dict[nn.Module, list[int]] = {}

    def note(module: nn.Module, args: Any, output: Any) -> None:
        channels = _outputs(module)
        output = output[0] if isinstance(output, tuple) else output
        if channels is not None and isinstance(output, torch.Tensor):
            # Over the example's size, not the output's: some layers fold windows into the batch.
            positions = output.numel() // len(example) // max(channels(arch), 1)
            found.setdefault(module, []).append(positions)

    for module in gates:
        module.register_forward_hook(note)
    for module in twin.modules():
        if isinstance(module, _ELEMENTWISE):  # on the meta device they take longer than a convolution
            module.forward = _same  # type: ignore[method-assign, assignment]
    seen: dict[tuple[nn.Module, tuple[Any, ...]], list[int]] = {}
    covering = _covering_archs(space, itertools.chain(*gates.values()))
    # The smallest arch opens nothing new: it shows what changes sizes without saying so.
    for base, sizes in [*itertools.product(covering, all_sizes), (space.smallest(), all_sizes[0])]:
        arch = {**base, **dict(zip(resizing, sizes, strict=True))}
        found.clear()
        apply(twin, arch)
        with torch.enable_grad():  # without gradient layers may take short cuts; these weights want none
            twin(torch.empty_like(example, device="meta"))
        for module, positions in found.items():
            places = sum(gate(arch) for gate in gates[module])
            one = positions[: len(positions) // max(places, 1)]
            if one * places != positions or seen.setdefault((module, sizes), one) != one:
                raise ValueError(
                    f"a {type(module).__name__} runs at {positions} positions in {places} places under one arch, "
                    f"at {seen.get((module, sizes), [])} in each under another: a mutable that resizes "
                    "must declare `resizes`, one that does not run all its children must have `gates`"
                )
    calls = {}
    for module in gates:  # a call that some sizes do without stands at no positions there
        columns = itertools.zip_longest(*(seen.get((module, sizes), ()) for sizes in all_sizes), fillvalue=0)
        calls[module] = [looked_up(dict(zip(all_sizes, c, strict=True)), *resizing.values()) for c in columns]
    return calls


_ELEMENTWISE = (
    nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.ReLU, nn.Hardtanh, nn.Hardswish, nn.SiLU, nn.GELU,
    nn.Sigmoid, nn.Hardsigmoid, nn.modules.dropout._DropoutNd,
)  # fmt: skip
"""Layers whose output has the shape of their input."""


def _same(x: torch.Tensor) -> torch.Tensor:
    return x


def _covering_archs(space: SearchSpace, gates: Iterable[Value]) -> list[dict[str, Any]]:
    """Archs under which every gate that some arch opens is open at least once, the largest arch first."""
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
    """All choices, or so many of them from the first to the last."""
    places = np.linspace(0, len(choices) - 1, most).astype(int) if len(choices) > most else range(len(choices))
    return [choices[place] for place in places]
