"""Genotypes, the form in which cells are published: read and written, as archs and as tables of spaces."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from attrs import fields, frozen

from corenas.errors import Fault, UserError, did_you_mean, raise_if_any
from corenas.options import structure
from corenas.space import Arch, SearchSpace
from corenas.value import Value
from corenas_backbone_darts import OPERATIONS, Cell, Layout, Node

Pair = tuple[str, int]
"""An operation and the state that it is on: 0 and 1 are the cells before, 2 is the first node."""


@frozen
class Genotype:
    """Two cells in which each node is the sum of two edges, as quark0/darts writes them.

    normal, reduce: the edges of all nodes, two for each in order
    normal_concat, reduce_concat: the states whose concatenation is the cell's output
    Raises UserError for an unknown operation, a state that is not there yet, an output without the last node.
    """

    normal: tuple[Pair, ...]
    normal_concat: tuple[int, ...]
    reduce: tuple[Pair, ...]
    reduce_concat: tuple[int, ...]

    def __attrs_post_init__(self) -> None:
        raise_if_any([*_faults("normal", *self.cell("normal")), *_faults("reduce", *self.cell("reduce"))])

    @classmethod
    def read(cls, text: str) -> Genotype:
        """The genotype of a text such as `Genotype(normal=[('sep_conv_3x3', 0), …], normal_concat=range(2, 6), …)`.

        It may be assigned to a name. Nothing is run as code. Raises UserError for a text that is none.
        """
        names = [field.name for field in fields(cls)]
        try:
            (statement,) = ast.parse(text.strip()).body
            call = statement.value if isinstance(statement, ast.Assign | ast.Expr) else None
            if not isinstance(call, ast.Call) or ast.unparse(call.func).split(".")[-1] != "Genotype":
                raise UserError("expected `Genotype(normal=[…], normal_concat=[…], reduce=[…], reduce_concat=[…])`")
            given = dict(zip(names, call.args, strict=False)) | {item.arg or "**": item.value for item in call.keywords}
            raise_if_any(
                Fault("unknown part", (name,), hint=did_you_mean(name, names)) for name in given if name not in names
            )
            raise_if_any(Fault("is missing", (name,)) for name in names if name not in given)
            parts = {name: _literal(node) for name, node in given.items()}
        except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
            raise UserError(f"this is no genotype: {str(error).splitlines()[0]}") from None
        return structure(parts, cls)

    def __str__(self) -> str:
        parts = {field.name: [*getattr(self, field.name)] for field in fields(type(self))}
        return f"Genotype({', '.join(f'{name}={part}' for name, part in parts.items())})"

    def cell(self, kind: str) -> tuple[Sequence[Pair], Sequence[int]]:
        """Edges and output states of a cell, "normal" or "reduce"."""
        return (self.normal, self.normal_concat) if kind == "normal" else (self.reduce, self.reduce_concat)

    def to_table(self) -> dict[str, Any]:
        """The table of a space of this one network, whatever its operations and its number of nodes."""
        return {kind: {"nodes": _nodes(*self.cell(kind))} for kind in ("normal", "reduce")}

    def to_arch(self, space: SearchSpace) -> Arch:
        """The arch of a space that is this network. Raises UserError, keys being the space's, if none is."""
        layout: Layout = structure(space.tree, Layout)
        choices: dict[str, Any] = {}
        faults: list[Fault] = []
        for kind in ("normal", "reduce"):
            edges, concat = self.cell(kind)
            nodes = getattr(layout, kind).nodes
            if len(edges) != 2 * len(nodes):
                text = f"this cell has {len(nodes)} nodes, that of the genotype {len(edges) // 2}"
                faults.append(Fault(text, (kind, "nodes")))
                continue
            for i, node in enumerate(nodes):
                pair, out = edges[2 * i : 2 * i + 2], int(i + 2 in concat)
                taken = _taken(node, pair)
                if taken is None:
                    text = f"no choice of this node is {pair[0]!r} and {pair[1]!r}"
                    faults.append(Fault(text, (kind, "nodes", i)))
                elif out not in node.out.possible:
                    text = f"this node is {'no' if out else 'always a'} part of the cell's output"
                    faults.append(Fault(text, (kind, "nodes", i, "out")))
                else:
                    choices |= taken | dict.fromkeys(node.out.keys, out)
        raise_if_any(faults)
        return space.arch(choices)

    @classmethod
    def of_arch(cls, arch: Mapping[str, Any], space: SearchSpace) -> Genotype:
        """The genotype of an arch; the edges of a node come in the order of the space.

        Raises UserError for a node that has not two edges.
        """
        layout: Layout = structure(space.tree, Layout)
        cells = {kind: _chosen(getattr(layout, kind), kind, arch) for kind in ("normal", "reduce")}
        return cls(*cells["normal"], *cells["reduce"])


def _faults(kind: str, edges: Sequence[Pair], concat: Sequence[int]) -> list[Fault]:
    """What is wrong with a cell."""
    faults = []
    if not edges or len(edges) % 2:
        faults.append(Fault(f"expected two edges for each node, found {len(edges)}", (kind,)))
    for i, (op, state) in enumerate(edges):
        if op not in OPERATIONS:
            faults.append(Fault(f"no operation {op!r}", (kind, i), hint=did_you_mean(op, OPERATIONS, "operations")))
        if not 0 <= state < i // 2 + 2:
            text = f"node {i // 2 + 2} cannot see state {state}: there are 0 to {i // 2 + 1}"
            faults.append(Fault(text, (kind, i)))
    last = len(edges) // 2 + 1
    if [*concat] != sorted({*concat} & {*range(2, last + 1)}) or last not in concat:
        text = f"expected nodes in order, of 2 to {last} and the last among them, found {[*concat]}"
        faults.append(Fault(text, (f"{kind}_concat",)))
    return faults


def _literal(node: ast.expr) -> Any:
    """A list of pairs or of numbers; of calls, `range` with numbers is one. Raises ValueError or TypeError."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "range" and not node.keywords:
        numbers = range(*map(ast.literal_eval, node.args))
        if len(numbers) > 100:
            raise ValueError(f"a cell of {len(numbers):,} nodes")
        return [*numbers]
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "list"
        and len(node.args) == 1
    ):
        return _literal(node.args[0])
    return ast.literal_eval(node)


def _nodes(edges: Sequence[Pair], concat: Sequence[int]) -> list[dict[str, Any]]:
    nodes = []
    for i in range(0, len(edges), 2):
        pair = [{"op": op, "input": state} for op, state in edges[i : i + 2]]
        nodes.append({"edges": pair, "out": int(i // 2 + 2 in concat)})
    return nodes


def _taken(node: Node, pair: Sequence[Pair]) -> dict[str, Any] | None:
    """The choices with which a node takes exactly two edges that are the pair; None if there are none."""
    take: Any = node.take
    for choice in take.possible:
        indices = [*map(int, choice.split())]
        for order in itertools.permutations(indices) if len(indices) == len(pair) else ():
            wanted: list[tuple[Value, Any]] = [(take, choice)]
            for index, (op, state) in zip(order, pair, strict=True):
                edge = node.edges[index]
                wanted += [(edge.op, op), (edge.source(index), state)]
            if all(number in value.possible for value, number in wanted):
                return {key: number for value, number in wanted for key in value.keys}
    return None


def _chosen(cell: Cell, kind: str, arch: Mapping[str, Any]) -> tuple[tuple[Pair, ...], tuple[int, ...]]:
    edges: list[Pair] = []
    for i, node in enumerate(cell.nodes):
        take: Any = node.take
        indices = [*map(int, take(arch).split())]
        if len(indices) != 2:
            raise UserError(f"{len(indices)} edges: in a genotype a node has two", key=(kind, "nodes", i))
        edges += [(node.edges[p].op(arch), node.edges[p].source(p)(arch)) for p in indices]  # type: ignore[operator]
    return tuple(edges), tuple(i for i, node in enumerate(cell.nodes, 2) if node.out(arch))
