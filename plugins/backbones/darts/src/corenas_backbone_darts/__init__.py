"""The cell space of DARTS: its options and the tables of its spaces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from attrs import Factory, field, frozen
from attrs.validators import ge, le, optional

from corenas.contracts import Surroundings
from corenas.errors import Fault, UserError, did_you_mean, raise_if_any
from corenas.hookspecs import hookimpl
from corenas.space import SearchSpace
from corenas.value import Constant, Value, as_value
from corenas_mutable_slices.layouts import ResizeMode, Sides, each, idle_resize, resolution_field

if TYPE_CHECKING:
    from corenas_backbone_darts.model import CellNetwork

OPERATIONS = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
    "sep_conv_7x7",
    "conv_7x1_1x7",
)
"""What an edge can do; the first eight in the order in which DARTS keeps their weights."""


def _operations(instance: object, attribute: object, value: Any) -> None:
    for name in as_value(value).possible:
        if name not in OPERATIONS:
            raise ValueError(f"no operation {name!r}; {did_you_mean(str(name), OPERATIONS, 'operations')}")


@frozen
class Edge:
    """An operation on one of the states before it.

    op: the operation, "sep_conv_3x3" for instance
    input: which state: 0 and 1 are the outputs of the two cells before this one, 2 is the first node; without it the
        edge's own index among its node's, so that a node's edges come from all states in order
    """

    op: Value | str = field(converter=as_value, validator=_operations)
    input: Value | None = field(
        default=None, validator=optional(each(lambda n: isinstance(n, int) and n >= 0, "whole numbers from 0"))
    )

    def source(self, index: int) -> Value:
        """Its input, given its index among its node's edges."""
        return Constant(index) if self.input is None else self.input


@frozen
class Node:
    """The sum of edges.

    edges: those that it can have, one table each
    take: which of them it has, by their indices: "0 2"; without it all
    out: 1 if the node is part of the cell's output, 0 if not
    """

    edges: tuple[Edge, ...]
    take: Value | str = field(
        default=Factory(lambda self: " ".join(map(str, range(len(self.edges)))), takes_self=True), converter=as_value
    )
    out: Value = field(default=Constant(1), validator=each(lambda n: n in (0, 1), "0 or 1"))

    def __attrs_post_init__(self) -> None:
        if not self.edges:
            raise UserError("a node needs an edge", key=("edges",))
        indices = [*map(str, range(len(self.edges)))]
        for choice in self.take.possible:  # type: ignore[union-attr]
            taken = choice.split() if isinstance(choice, str) else []
            if not taken or taken != [index for index in indices if index in taken]:
                text = f"expected indices of edges in order, of {' '.join(indices)}, found {choice!r}"
                raise UserError(text, key=("take",))


@frozen
class Cell:
    """A directed graph of nodes, whose output is the concatenation of nodes.

    nodes: in order; each sums up edges that come from the two cells before and from the nodes before it
    """

    nodes: tuple[Node, ...]

    def __attrs_post_init__(self) -> None:
        if not self.nodes or self.nodes[-1].out != Constant(1):
            raise UserError("the last node of a cell is part of its output: `out` is 1 there", key=("nodes",))
        raise_if_any(
            Fault(f"there are states 0 to {n + 1} before this node", ("nodes", n, "edges", index, "input"))
            for n, node in enumerate(self.nodes)
            for index, edge in enumerate(node.edges)
            if edge.source(index).largest > n + 1
        )


@frozen
class Layout:
    """The tables of a space file for this backbone.

    normal: the cell that keeps the map's size; all cells of a kind have the same architecture
    reduce: the cell that halves it, at a third and at two thirds of the network
    resolution: side of the square that images are resized to, or a table of `height`, `width` and `scale`; without it
        they stay as they are
    """

    normal: Cell
    reduce: Cell
    resolution: Value | Sides | None = resolution_field()


_OPS = ["sep_conv_3x3", "skip_connect", "max_pool_3x3"]


def _example_cell(kind: str) -> dict[str, Any]:
    pairs = ["0 1", "0 2", "1 2"]
    taken = [[pair for pair in pairs if str(index) in pair] for index in range(3)]
    when = [{f"{kind}.nodes.1.take": choices} for choices in taken]
    edges = [{"op": {"type": "categorical", "choices": [*_OPS], "when": w}} for w in when]
    return {"nodes": [{"edges": [{"op": [*_OPS]}, {"op": [*_OPS]}]}, {"take": pairs, "edges": edges}]}


@frozen
class Darts:
    """Cells of searchable operations and connections (DARTS, Liu et al. 2019, arXiv:1806.09055).

    The defaults are those of the search network; networks that are trained from scratch have `channels = 36`,
    `layers = 20` and `affine = true` (CIFAR), or 48, 14, true and `stem = "imagenet"`.

    channels: of each node in the first cells; they double in each reduction cell
    layers: number of cells, of which those at a third and two thirds reduce; at least 3
    affine: whether batch norms in cells have weights; without, as in DARTS's search, one more follows each pooling
    stem: "cifar", one convolution that keeps the map's size, or "imagenet", three that halve it
    auxiliary: whether, in training, features for an auxiliary classifier come before the last ones; they follow the
        second reduction cell and are 768 wide. The task says what the classifier's loss is worth
    drop_path: probability of dropping an operation's output for an image at the end of a training; it grows from 0
    in_channels: channels of the images; left out, those of the task's (3 without a task)
    levels: which of the three stages, counted from 1, whose outputs are the features, for detection; reduction cells
        begin the second and the third. Without, the last cell's output is the only one
    resize_mode: how images are resized to a searched resolution: "nearest", "bilinear" or "bicubic"
    """

    channels: int = field(default=16, validator=ge(1))
    layers: int = field(default=8, validator=ge(3))
    affine: bool = False
    stem: Literal["cifar", "imagenet"] = "cifar"
    auxiliary: bool = False
    drop_path: float = field(default=0.0, validator=[ge(0), le(1)])
    in_channels: int | None = field(default=None, validator=optional(ge(1)))
    levels: tuple[int, ...] = ()
    resize_mode: ResizeMode = "bilinear"

    layout = Layout
    example: ClassVar[Mapping[str, Any]] = {
        "backbone": {"channels": 4, "layers": 3, "in_channels": 1},
        "space": {"normal": _example_cell("normal"), "reduce": _example_cell("reduce")},
    }

    def __attrs_post_init__(self) -> None:
        if any(not 1 <= level <= 3 for level in self.levels) or [*self.levels] != sorted({*self.levels}):
            raise UserError(f"expected numbers of stages in order, 1 to 3, found {[*self.levels]}", key=("levels",))
        if self.auxiliary and self.levels and self.levels[-1] < 3:
            raise UserError("auxiliary features come from the third stage: `levels` has to hold it", key=("auxiliary",))
        if self.stem == "imagenet" and self.channels < 2:
            raise UserError("the first cell halves with two convolutions: expected at least 2", key=("channels",))

    def idle(self, around: Surroundings) -> Mapping[str, str]:
        """Return options that do nothing beside the others, or in a space, and why."""
        return idle_resize(around.space)

    def build(self, space: SearchSpace) -> CellNetwork:
        """The network of a space; raises UserError if its tables are not those of `Layout`."""
        from corenas.options import structure
        from corenas_backbone_darts.model import CellNetwork

        return CellNetwork(structure(space.tree, Layout), self)


@hookimpl
def corenas_backbones() -> dict[str, type]:
    """The backbone "darts"."""
    return {"darts": Darts}
