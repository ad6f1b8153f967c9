"""Whether subnets do what was foretold: each operation of a run without data gives the shapes that its axes say."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from attrs import define, field
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from corenas.errors import UserError
from corenas.mutable import call_model, elastic_of
from corenas.value import Dimension, Value
from corenas_mutable_conversion.axes import Axis, free_sizes
from corenas_mutable_conversion.elastic import CONV, make_elastic, plain_copy
from corenas_mutable_conversion.operations import LAYOUT, Op, shaped
from corenas_mutable_conversion.reading import Reading
from corenas_mutable_conversion.values import dimension_of, number_of, value_of

MOST_ROUNDS = 60
"""How often sizes that do not follow are fixed before a model is given up."""


def make_mutable(model: nn.Module, reading: Reading) -> None:
    """Turn the modules of a model into mutables, in place, as a reading says."""
    modules, known = dict(model.named_modules(remove_duplicate=False)), reading.known
    tensors: dict[str, dict[str, list[Dimension]]] = defaultdict(dict)
    numbers: dict[str, dict[tuple[str, int | None], Value]] = defaultdict(dict)
    caches: dict[str, list[str]] = defaultdict(list)
    for name, axes in known.tensors.items():
        module, _, key = name.rpartition(".")
        dims = [dimension_of(axis, reading.values) for axis in axes]
        if any(dim.keys for dim in dims):
            tensors[module][key] = dims
    for (name, key, i), size in known.attributes.items():
        value = value_of(size, reading.values)
        if value.keys:
            numbers[name][key, i] = value
    for name, key in sorted(known.caches):
        caches[name].append(key)
    for name in dict.fromkeys([*tensors, *numbers, *reading.runs, *caches]):
        module, middle = modules[name], None
        if elastic_of(module) is not None:  # it stands in two places
            continue
        if isinstance(module, CONV) and "weight" in tensors[name]:
            middle = 2
            for i, dim in enumerate(tensors[name]["weight"][2:]):
                if dim.keys and not isinstance(module.padding, str):
                    numbers[name]["padding", i] = dim.parts[0] // 2 * module.dilation[i]
        runs = reading.runs.get(name)
        gives = None if runs is None else known.calls[name][0].gives
        make_elastic(module, tensors[name], numbers[name], runs, middle, caches[name], gives)


def settle(reading: Reading, twin: nn.Module, example: Any) -> int:
    """Fix what does not run as foretold until the smallest arch and random ones do. Returns how often that was needed.

    twin: the model on the meta device
    Raises UserError where something does not follow that nothing searchable explains.
    """
    for blamed in range(MOST_ROUNDS):
        reading.read()
        model = copy.deepcopy(twin)
        make_mutable(model, reading)
        trial = _Trial(reading, model, example)
        if trial.passed():
            return blamed
    raise UserError("this model cannot be converted: its subnets do not do what its layers say", hint=_REPORT)


_REPORT = "please report this with the model; a rule `fix` can hold the part that does so"


@define
class _Trial:
    """Runs subnets without data, and fixes what does not follow."""

    reading: Reading
    model: nn.Module
    example: Any
    largest: dict[str, Any] = field(init=False)

    def passed(self) -> bool:
        """Whether all that were tried do as foretold; if not, something was fixed."""
        space = self.reading.searched()
        self.largest, smallest = dict(space.largest()), dict(space.smallest())
        deep = {run.depth.key: run.depth.largest for run in self.reading.blocks}
        if not self._runs(smallest | deep):
            return False
        if self._first_fault(smallest) is not None:
            return not self._keep_blocks(smallest | deep, smallest)
        rng = np.random.default_rng(0)
        return all(self._runs(dict(space.sample(rng))) for _ in range(3))

    def _keep_blocks(self, deep: Mapping[str, Any], smallest: Mapping[str, Any]) -> bool:
        """Let one block more run where a network cannot do without; returns whether there is such a run of blocks.

        Raises UserError where there is none.
        """
        reading, found = self.reading, False
        for run in reading.blocks:
            least = run.depth.smallest
            if self._first_fault({**deep, run.depth.key: least}) is not None:
                reading.least[run.paths[0]], found = least + 1, True
        if not found:  # what fails is several runs of blocks together
            for run in reading.blocks:
                reading.least[run.paths[0]], found = run.depth.smallest + 1, True
        return found

    def _runs(self, arch: Mapping[str, Any]) -> bool:
        fault = self._first_fault(arch)
        if fault is not None:
            self._blame(arch, *fault)
        return fault is None

    def _first_fault(self, arch: Mapping[str, Any]) -> tuple[Op, str] | None:
        """Return the first operation that does not do what was foretold, and what it does."""
        reading = self.reading
        skipped = {path for path, runs in reading.runs.items() if not runs(arch)}
        ops = [op for op in reading.known.ops if not skipped & {*op.modules} and op.name not in LAYOUT]
        check = _Check(ops, lambda axis: number_of(axis, reading.values, arch))
        network = plain_copy(self.model, arch, weights=False).eval()
        inputs = tree_map_only(Tensor, lambda tensor: torch.empty_like(tensor, device="meta"), self.example)
        try:
            with torch.no_grad(), check:
                call_model(network, inputs)
        except _UnexpectedError as error:
            return ops[check.at - 1], str(error)
        except Exception as error:  # whatever a forward may do with other shapes than it was written for
            return ops[min(check.at, len(ops) - 1)], str(error).split("\n")[0]
        return None

    def _blame(self, arch: Mapping[str, Any], op: Op, text: str) -> None:
        """Fix the sizes that changed in an operation that does not do as foretold. Raises UserError if none did."""
        values, known = self.reading.values, self.reading.known
        own = [*op.outputs, op.macs, op.cut, [op.groups]]
        beside = [axes for other in known.ops if other.modules == op.modules for axes in other.outputs]
        for several in (own, beside):
            sizes = {size for axes in several for axis in axes for size in free_sizes(axis) if size in values}
            changed = [size for size in sizes if values[size](arch) != size.n]
            if changed:
                known.axes.where = op.where
                for size in changed:
                    known.axes.fix(size, f"its {op.name} does not follow: {text.replace('(', '[').replace(')', ']')}")
                return
        raise UserError(f"this model cannot be converted: {op.where}: {op.name}: {text}", hint=_REPORT)


class _UnexpectedError(Exception):
    """An operation that was not foretold."""


class _Check(TorchDispatchMode):
    """Watches whether operations give the shapes that were foretold."""

    def __init__(self, ops: Sequence[Op], number: Callable[[Axis], int]) -> None:
        super().__init__()
        self.ops, self.number, self.at = ops, number, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = shaped(func, args, kwargs or {})
        name = func.overloadpacket.__name__
        if name in LAYOUT:
            return result
        if self.at >= len(self.ops):
            raise _UnexpectedError("more operations than in the largest network")
        op, self.at = self.ops[self.at], self.at + 1
        if name != op.name:
            raise _UnexpectedError(f"{name} runs instead")
        outs = (leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        for out, axes in zip(outs, op.outputs, strict=False):
            foretold = [*map(self.number, axes)]
            if [*out.shape] != foretold:
                raise _UnexpectedError(f"gives {[*out.shape]}, not {foretold}")
        return result
