"""What archs cost: exact flops, params and activations of many at once, without building any of them.

A layer states its cost as values over the arch, given at how many positions its output stands; these are read off a
few runs on the meta device (`positions`). A gate, which is 1 where a layer runs and 0 where it does not, multiplies it.
The cost of an arch is the sum of these terms over all layers, and each term depends on a few variables only. Terms over
the same variables are summed into one table beforehand, with a row for each combination of their choices; only terms
with too many combinations stay values. The costs of many archs are then a few rows of tables, looked up and added.

`flops` counts a multiply-add once: of convolutions, transposed ones too, of linear and bilinear layers, of recurrent
layers' gates and of attention products. Bias, norms, activations and pooling count nothing. `activations` are the
elements of the outputs of convolutions and linear layers.
"""

from __future__ import annotations

import copy
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from torch import nn

from corenas.errors import did_you_mean
from corenas.mutable import Costed, LayerCost, WhollyCosted, conv_cost, elastic_of, keys_used, linear_cost, offers
from corenas.positions import cost_of_call, costs_inputs, occurrences, positions, weightless_twin
from corenas.space import Codes, SearchSpace
from corenas.value import LARGEST_TABLE, Constant, Dimension, Expression, Value, at_least, grid

METRICS = ("flops", "params", "activations")

_Table: TypeAlias = tuple[tuple[str, ...], np.ndarray]
"""Some variables, of which the last changes fastest, and what each combination of their choices costs."""


def _cost(module: nn.Module, *figures: Value) -> LayerCost:
    """Return what a layer costs: at how many positions its output stands, or what a call was seen to cost."""
    if offers(module, Costed):
        return module.cost(*figures[: 2 if costs_inputs(module) else 1])
    bias = getattr(module, "bias", None) is not None
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        taps = math.prod(module.kernel_size)
        return conv_cost(module.in_channels, module.out_channels, taps, figures[0], module.groups, bias)
    if isinstance(module, nn.Linear):
        return linear_cost(module.in_features, module.out_features, figures[0], bias)
    params = Constant(sum(p.numel() for p in module.parameters(recurse=False)))
    flops, activations = figures if cost_of_call(module) is not None else (Constant(0), Constant(0))
    return LayerCost(flops, params, activations)


class Cost:
    """The cost of the archs of one space, as columns.

    model: a supernet over the space's keys, on any device
    example: one input, as `call_model` takes it: a tensor, a tuple, a dict, …, each tensor with a first axis of 1; only
        shapes count
    Products that a module computes itself (`@`, `scaled_dot_product_attention`) count as they are seen.
    Raises ValueError where a layer's number of positions depends on a variable that no `Resizing` mutable declares,
    where a module computes products itself whose sizes follow from the arch, for a mutable that owns parameters and
    states no cost, and for a model with variables that the space lacks.

    >>> import torch
    >>> from corenas import Cost, SearchSpace
    >>> from corenas.testing.small import Conv
    >>> space = SearchSpace.from_table({"width": [4, 8]})
    >>> cost = Cost(Conv(3, space.value("width")), space, torch.empty(1, 3, 6, 6))
    >>> cost.of([space.smallest()])
    [{'flops': 432, 'params': 16, 'activations': 144}]
    >>> cost(space.encode(space))["flops"]
    array([432, 864])
    """

    def __init__(self, model: nn.Module, space: SearchSpace, example: Any) -> None:
        for key in sorted(keys_used(model) - {*space.keys}):
            raise ValueError(f"the model depends on {key!r}, which the space lacks: {did_you_mean(key, space.keys)}")
        self._terms = _terms(model, space, example)
        self._tabulate(space)

    @classmethod
    def adding(cls, costs: Iterable[LayerCost], space: SearchSpace) -> Cost:
        """Return the cost of the archs of a space from what it is the sum of, by way of no model."""
        cost = cls.__new__(cls)
        cost._terms = [*_terms_of_costs(costs)]
        cost._tabulate(space)
        return cost

    def on(self, space: SearchSpace) -> Cost:
        """Return the same costs for the codes of a space that is narrower than, or the same as, the model's."""
        if space is self.space:
            return self
        other = copy.copy(self)
        other._tabulate(space)
        return other

    def __call__(self, codes: Codes) -> dict[str, np.ndarray]:
        """Return flops, params and activations of archs (a matrix of codes): columns of whole numbers."""
        return dict(zip(METRICS, self._totals(codes).T, strict=True))

    def of(self, archs: Iterable[Mapping[str, Any]]) -> list[dict[str, int]]:
        """Return flops, params and activations of archs, one mapping each."""
        totals = self._totals(self.space.encode(archs))
        return [dict(zip(METRICS, row, strict=True)) for row in totals.tolist()]

    def tables(self, metric: str) -> list[_Table] | None:
        """Return a metric as a sum of tables; None where a term has too many combinations, or no list of choices.

        Each is over some variables, of which the last changes fastest: a whole number for each combination.
        """
        column = METRICS.index(metric)
        if any(index == column for index, _ in self._rest):
            return None
        return [(keys, table[:, column]) for keys, table in self._tables if table[:, column].any()]

    def _totals(self, codes: Codes) -> np.ndarray:
        """Return a row for each arch, a column for each metric."""
        if len(codes) <= _FEW and not self._rest:
            return self._totals_of_few(codes)
        totals = np.zeros((len(codes), len(METRICS)), np.int64)
        for start in range(0, len(codes), _ROWS):
            columns = _Columns(self.space, codes[start : start + _ROWS], self._known)
            part = totals[start : start + _ROWS]
            for metric, value in self._rest:
                part[:, metric] += np.asarray(columns(value), np.int64)
            for keys, table in self._joined:
                part += table[columns.rows(keys)]
        return totals

    def _totals_of_few(self, codes: Codes) -> np.ndarray:
        """Return the same, of all tables at once: of few archs each call of numpy takes longer than what it does."""
        rows = codes.astype(np.float64) @ self._strides  # floats are faster here, and exact below 2^53
        return self._rows_of_all.take(rows.astype(np.int64) + self._starts, axis=0).sum(axis=1)

    def _tabulate(self, space: SearchSpace) -> None:
        """Sum terms over the same variables into one table; what is too large for a table stays as values.

        A table has a row for each combination of its variables' choices, a column for each metric.
        """
        self.space = space
        self._tables: list[_Table] = []
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
        self._joined = _joined(space, self._tables)
        # All of them one under the other: where each begins, and how far in it a variable's next choice is.
        self._rows_of_all = np.concatenate([np.zeros((0, len(METRICS)), np.int64), *(t for _, t in self._joined)])
        self._starts = np.cumsum([0, *(len(table) for _, table in self._joined)])[:-1]
        self._strides = np.zeros((len(space.keys), len(self._joined)))
        for column, (keys, _) in enumerate(self._joined):
            step = 1
            for key in reversed(keys):
                self._strides[space.keys.index(key), column] = step
                step *= len(space[key].choices)


_ROWS = 8192
"""How many archs are computed at a time: their columns stay in the processor's cache."""
_FEW = 256
"""How many archs are computed from all tables at once."""


def _combinations(space: SearchSpace, keys: Iterable[str]) -> int | None:
    """Return how many combinations of choices some variables have; None for more than a table may have."""
    variables = [space[key] for key in keys]
    number = math.prod(len(variable.choices) for variable in variables)
    return None if number > LARGEST_TABLE or any(variable.continuous for variable in variables) else number


def _joined(space: SearchSpace, tables: Iterable[_Table]) -> list[_Table]:
    """Return tables of the same sum, those over some of the variables of another added to it: fewer are looked up."""
    joined: list[_Table] = []
    for keys, table in sorted(tables, key=lambda table: -len(table[0])):
        larger = next((other for other in joined if {*keys} <= {*other[0]}), None)
        if larger is None:
            joined.append((keys, table.copy()))
            continue
        sizes = [len(space[key].choices) for key in larger[0]]
        own = [size if key in keys else 1 for key, size in zip(larger[0], sizes, strict=True)]
        larger[1].reshape(*sizes, -1)[...] += table.reshape(*own, -1)
    return joined


class _Columns:
    """Values of many archs as columns, each computed once; those of few variables are looked up in tables.

    known: the tables so far
    """

    def __init__(self, space: SearchSpace, codes: Codes, known: dict[Value, np.ndarray]) -> None:
        self._space, self._known = space, known
        self._codes = {
            variable.key: column if variable.continuous else column.astype(np.int64)
            for variable, column in zip(space.variables, codes.T, strict=True)
        }
        self._columns: dict[Value, np.ndarray] = {}
        self._rows: dict[tuple[str, ...], Any] = {(): 0}

    def __call__(self, value: Value) -> Any:
        """Return the column of a value."""
        if isinstance(value, Constant):
            return value.number
        if value not in self._columns:
            self._columns[value] = self._computed(value)
        return self._columns[value]

    def rows(self, keys: tuple[str, ...]) -> Any:
        """Return the row of each arch in a table over variables, of which the last changes fastest."""
        if keys not in self._rows:
            *before, last = keys
            rows_before = self.rows(tuple(before))
            self._rows[keys] = rows_before * len(self._space[last].choices) + self._codes[last]
        return self._rows[keys]

    def _computed(self, value: Value) -> np.ndarray:
        if value not in self._known and _combinations(self._space, value.keys) is not None:
            choices = grid({key: self._space[key].choices for key in value.keys})
            self._known[value] = np.asarray(value(choices))
        if value in self._known:
            return self._known[value].take(self.rows(value.keys))
        if isinstance(value, Expression):
            return value.function(*map(self, value.arguments))
        (key,) = value.keys
        return np.array([*map(self._space[key].choice_of, self._codes[key])])


def _terms(model: nn.Module, space: SearchSpace, example: Any) -> list[tuple[int, Value]]:
    """Return what the costs of all archs are the sums of: numbers of metrics, each with a value."""
    twin = weightless_twin(model)
    gates = _gates_of_layers(twin)
    whole = [(module, gate) for module, gate in occurrences(twin) if offers(module, WhollyCosted)]
    terms = [
        (metric, value if gate == Constant(1) else gate * value)
        for module, gate in whole
        for metric, value in _terms_of_costs(module.whole_cost(example))
    ]
    calls, products = positions(twin, space, example, gates)
    # Layers that cost the same under the same variables, as the blocks of a stage do, are counted, not listed.
    alike: dict[tuple[int, Value, frozenset[str]], list[Value]] = defaultdict(list)
    owners: dict[Any, list[Value]] = defaultdict(list)
    tied = _tied_parameters(gates)
    for layer, own in gates.items():
        runs = _added(own)
        shared = frozenset(runs.keys)
        # What stands in several places, or is tied to another layer's, is there once, wherever one of them runs.
        for owner, params in _params(layer, tied):
            owners[owner, params].append(runs)
        for figures in calls[layer]:
            once = _cost(layer, *figures)
            alike[METRICS.index("flops"), once.flops, shared].append(runs)
            alike[METRICS.index("activations"), once.activations, shared].append(runs)
    for module, flops in products.items():
        runs = _added([gate for other, gate in occurrences(twin) if other is module])
        alike[METRICS.index("flops"), flops, frozenset(runs.keys)].append(runs)
    for (_, params), every in owners.items():
        runs = at_least(_added(every), 1)
        alike[METRICS.index("params"), params, frozenset(runs.keys)].append(runs)
    terms += [(metric, _added(times) * once) for (metric, once, _), times in alike.items() if once != Constant(0)]
    return terms


def _terms_of_costs(costs: Iterable[LayerCost]) -> Iterator[tuple[int, Value]]:
    for cost in costs:
        for metric, value in enumerate((cost.flops, cost.params, cost.activations)):
            if value != Constant(0):
                yield metric, value


def _tied_parameters(layers: Iterable[nn.Module]) -> set[Any]:
    """Return those parameters that several layers have."""
    counts = Counter(id(parameter) for layer in layers for parameter in layer.parameters(recurse=False))
    return {owner for owner, count in counts.items() if count > 1}


def _params(layer: nn.Module, tied: set[Any]) -> list[tuple[Any, Value]]:
    """Return how many parameters a layer has, as values, each with what tells whose they are.

    Layers that share a parameter have it once if it has the same shape in both, as plain layers and those of the same
    values do. Raises ValueError for a mutable of which it is not known how many of its parameters are shared.
    """
    whole = _cost(layer, Constant(0), Constant(0)).params
    own = [*layer.parameters(recurse=False)]
    shared = [parameter for parameter in own if id(parameter) in tied]
    if not shared:
        return [(layer, whole)]
    elastic = elastic_of(layer)
    if elastic is None:
        rest = sum(parameter.numel() for parameter in own) - sum(parameter.numel() for parameter in shared)
        return [(layer, Constant(rest)), *((id(p), Constant(p.numel())) for p in shared)]
    if len(shared) == len(own):
        return [(tuple(map(id, own)), whole)]
    if len(shared) > 1 or any(p.dim() > 1 for p in own if p is not shared[0]) or "outputs" not in elastic.values:
        text = f"a {type(layer).__name__} shares some of its parameters with another layer"
        raise ValueError(f"{text}: what it has of its own is not known; share all of them, or the weight alone")
    rest = Dimension.of(elastic.values["outputs"]).size * (len(own) - 1)
    return [(layer, rest), (id(shared[0]), whole - rest)]


def _gates_of_layers(model: nn.Module) -> dict[nn.Module, list[Value]]:
    """Return the layers that cost something, each with its gates: one, unless the places where it stands differ.

    Raises ValueError for a mutable that owns parameters and states no cost.
    """
    names = {module: name for name, module in model.named_modules()}
    gates: dict[nn.Module, list[Value]] = defaultdict(list)
    for module, gate in occurrences(model):
        if offers(module, WhollyCosted):
            continue
        owns_parameters = next(module.parameters(recurse=False), None) is not None
        if owns_parameters and elastic_of(module) is not None and not offers(module, Costed):
            what = f"{names[module] or 'the model'}, a {type(module).__name__},"
            raise ValueError(
                f"{what} is a mutable with parameters of its own that does not say what they cost: "
                "give it a method `cost(positions)` that returns a `LayerCost` (corenas.mutable.Costed)"
            )
        if owns_parameters or offers(module, Costed):
            gates[module].append(gate)
    return {module: own if len({*own}) > 1 else own[:1] for module, own in gates.items()}


def _added(values: Sequence[Value]) -> Value:
    """Return the sum of values, pair by pair: a chain of hundreds would nest too deeply."""
    if len(values) == 1:
        return values[0]
    middle = len(values) // 2
    return _added(values[:middle]) + _added(values[middle:])
