"""How a latency table is made: a space's networks are cut into blocks, and each distinct block is timed once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from attrs import define, field, frozen
from torch import Tensor, fx, nn
from torch.fx.passes.split_module import split_module
from torch.utils._pytree import tree_map_only

from corenas.contracts import EvaluatorContext
from corenas.errors import UserError
from corenas.export import MODULE_STACK
from corenas.mutable import Gated, Resizing, as_arguments, keys_used, mutables
from corenas.space import Arch, SearchSpace
from corenas.value import Constant, Value
from corenas_evaluator_latency.backends import Runtime
from corenas_evaluator_latency.lookup import Block, Error, Table, fitted
from corenas_evaluator_latency.measured import deployed
from corenas_evaluator_latency.timing import Timing, timed

Combination = tuple[Any, ...]
"""A choice for each key of a block."""


@define(eq=False)
class Part:
    """A block of a supernet while it is measured.

    gate: 1 where it runs
    ms: what it takes under each combination that was seen, over all its calls
    """

    name: str
    gate: Value
    keys: tuple[str, ...]
    ms: dict[Combination, list[float]] = field(factory=dict)

    def combination(self, arch: Mapping[str, Any]) -> Combination:
        """Return what an arch chooses of its keys."""
        return tuple(arch[key] for key in self.keys)


def parts_of(model: nn.Module, space: SearchSpace) -> list[Part]:
    """Return the blocks of a supernet: what a gate opens or shuts as a whole, and what lies between these.

    A block depends on the variables of its layers, on those of its gate, and on those that change sizes.
    """
    names = {module: name for name, module in model.named_modules()}
    resizing = {
        key for m in mutables(model) if isinstance(m, Resizing) for n in m.resizes for key in m.elastic.values[n].keys
    }

    def found(module: nn.Module, gate: Value, shut: frozenset[nn.Module]) -> Iterator[tuple[nn.Module, Value]]:
        own = dict(module.gates()) if isinstance(module, Gated) else {}
        for child, value in own.items():
            yield child, gate * value
        for child in module.children():
            if child in own or child in shut:
                continue
            if any(isinstance(inner, Gated) for inner in child.modules()):
                yield from found(child, gate, shut | own.keys())
            else:
                yield child, gate

    parts = []
    for module, gate in found(model, Constant(1), frozenset()):
        used = keys_used(module) | {*gate.keys} | resizing
        parts.append(Part(names[module], gate, tuple(key for key in space.keys if key in used)))
    return parts


def cut(network: fx.GraphModule, names: Sequence[str]) -> tuple[fx.GraphModule, list[str]]:
    """Cut a network into the blocks of these names, in the order in which they run; what is in none goes with the last.

    Returns a network of parts `submod_0`, …, and the block of each.
    """
    inside = {*names}
    blocks: list[str] = []
    number: dict[fx.Node, int] = {}
    for node in network.graph.nodes:
        stack = node.meta.get(MODULE_STACK, {})
        # A module that is called again has a number behind its path.
        own = next((path for each in stack if (path := each.partition("@")[0]) in inside), None)
        if own is not None and (not blocks or blocks[-1] != own):
            blocks.append(own)
        number[node] = max(len(blocks) - 1, 0)
    whole = split_module(network, network, lambda node: number[node], keep_original_order=True)
    return whole, blocks


class _Calls(fx.Interpreter):
    """Runs a network of parts and notes what each is given."""

    def __init__(self, network: fx.GraphModule) -> None:
        super().__init__(network)
        self.given: dict[str, tuple[Any, ...]] = {}

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Note and run a part."""
        self.given[target] = args
        return super().call_module(target, args, kwargs)


def signature(part: nn.Module, given: Any) -> str:
    """Return what a part's latency hangs on: its layers, what it does with them, the shapes of what it is given."""
    shapes = tree_map_only(Tensor, lambda tensor: (*tensor.shape, str(tensor.dtype)), given)
    graph = part.graph if isinstance(part, fx.GraphModule) else part
    layers = [repr(layer) for layer in part.children()]
    steps = [(n.op, n.op == "call_module" or str(n.target), str(n.kwargs)) for n in getattr(graph, "nodes", ())]
    return repr((layers, steps, shapes))


@frozen
class Maker:
    """Makes a table. `tell(done, total)` hears how far it is."""

    context: EvaluatorContext
    runtime: Runtime
    model: nn.Module
    most: int
    tell: Callable[[str, int, int], None] = lambda what, done, total: None

    def made(self, networks: int, seed: int = 0) -> Table:
        """Return the table of a space, fitted to some whole networks, its error that on as many others."""
        space = self.context.space
        parts = parts_of(self.model, space)
        wanted = self._wanted(parts)
        self._measure(parts, wanted)
        blocks = [self._block(part) for part in parts]
        table = Table(tuple(block for block in blocks if any(block.ms)), 1.0, 0.0)
        archs = space.decode(space.draw(np.random.default_rng(seed), 2 * networks))
        whole = [timing.ms for timing in self._timed_networks(archs)]
        sums = table.on(space)(archs)
        scale, base = fitted(sums[:networks], whole[:networks])
        off = [abs(base + scale * s - ms) / ms for s, ms in zip(sums[networks:], whole[networks:], strict=True)]
        error = Error(networks, float(np.median(off)), max(off))
        return Table(table.blocks, scale, base, error, self.runtime.facts)

    def _wanted(self, parts: Sequence[Part]) -> dict[Part, set[Combination]]:
        """Return the combinations under which each block runs. Raises UserError for too many."""
        space = self.context.space
        number = sum(math.prod(len(space[key].choices) for key in part.keys) for part in parts)
        if any(space[key].continuous for part in parts for key in part.keys) or number > self.most:
            text = f"this space has {number:,} kinds of blocks, more than the {self.most:,} that are timed"
            raise UserError(text, key=("space",), hint="`narrow` it in the spec, or more --blocks")
        wanted = {}
        for part in parts:
            mesh = np.array(np.meshgrid(*(np.arange(len(space[key].choices)) for key in part.keys), indexing="ij"))
            rows = mesh.reshape(len(part.keys), -1).T if part.keys else np.zeros((1, 0), int)
            choices = [{k: space[k].choices[c] for k, c in zip(part.keys, row, strict=True)} for row in rows.tolist()]
            wanted[part] = {part.combination(each) for each in choices if part.gate(each)}
        return wanted

    def _measure(self, parts: Sequence[Part], wanted: Mapping[Part, set[Combination]]) -> None:
        """Time every block under every combination, with networks that have as many new ones as can be."""
        known: dict[str, float] = {}
        total = sum(map(len, wanted.values()))
        while any(wanted.values()):
            arch = self._covering(wanted)
            self._see(arch, parts, known)
            for part, missing in wanted.items():
                missing.discard(part.combination(arch))
            self.tell("blocks", total - sum(map(len, wanted.values())), total)

    def _covering(self, wanted: Mapping[Part, set[Combination]]) -> Arch:
        """Return an arch with one missing combination of each block, as far as they go together."""
        space = self.context.space
        while True:
            first, *others = sorted(wanted, key=lambda part: -len(wanted[part]))
            combination = min(wanted[first], key=repr)
            held = dict(zip(first.keys, combination, strict=True))
            for part in others:
                for other in sorted(wanted[part], key=repr):
                    both = dict(zip(part.keys, other, strict=True))
                    if all(held.get(key, choice) == choice for key, choice in both.items()):
                        held |= both
                        break
            arch = space.arch({**space.largest(), **held})
            if first.combination(arch) == combination:
                return arch
            wanted[first].discard(combination)  # what no arch has: a variable that is idle there
            if not any(wanted.values()):
                return arch

    def _see(self, arch: Arch, parts: Sequence[Part], known: dict[str, float]) -> None:
        """Note what the blocks of an arch's network take; those that are new are timed."""
        whole, blocks = cut(deployed(self.context, arch), [part.name for part in parts])
        calls = _Calls(whole)
        arguments, by_keyword = as_arguments(self.runtime.given(self.context.task.example))
        calls.run(*arguments, *by_keyword.values())
        signatures: dict[str, str] = {}
        runners: dict[str, Callable[[], object]] = {}
        for name, given in calls.given.items():
            piece = whole.get_submodule(name)
            signatures[name] = mark = signature(piece, given)
            if mark not in known and mark not in runners:
                runners[mark] = self.runtime.runner(piece.eval(), given)
        timings = timed([*runners.values()], warmup=3, runs=7, rounds=7, spread=0.1, repeats=1)
        known |= {mark: timing.ms for mark, timing in zip(runners, timings, strict=True)}
        taken: dict[str, float] = {}
        for name, mark in signatures.items():
            block = blocks[int(name.rpartition("_")[2])] if blocks else ""
            taken[block] = taken.get(block, 0.0) + known[mark]
        for part in parts:
            if part.gate(arch):
                part.ms.setdefault(part.combination(arch), []).append(taken.get(part.name, 0.0))

    def _block(self, part: Part) -> Block:
        space = self.context.space
        choices = {key: tuple(space[key].choices) for key in part.keys}
        table = np.zeros([len(each) for each in choices.values()])
        place = {key: {choice: at for at, choice in enumerate(each)} for key, each in choices.items()}
        for combination, taken in part.ms.items():
            table[tuple(place[key][c] for key, c in zip(part.keys, combination, strict=True))] = np.mean(taken)
        return Block(part.name, choices, tuple(round(ms, 6) for ms in table.ravel().tolist()))

    def _timed_networks(self, archs: Sequence[Arch]) -> list[Timing]:
        runners, given = [], self.runtime.given(self.context.task.example)
        for number, arch in enumerate(archs):
            self.tell("networks", number, len(archs))
            runners.append(self.runtime.runner(deployed(self.context, arch), given))
        return timed(runners, warmup=5, runs=7, rounds=11, spread=0.1)
