"""Archs whose variables hang together: equal or never falling along a network, or the stages of a RegNet."""

from __future__ import annotations

import fnmatch
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from attrs import field, frozen

from corenas.errors import UserError
from corenas.space import Codes, SearchSpace
from corenas.variables import Float, Int, Variable

QUANTUM = 8
"""What the widths of a RegNet are multiples of."""
Range = tuple[float, float]


def _ordered(instance: object, attribute: Any, pair: Range) -> None:
    if not 0 < pair[0] <= pair[1]:
        raise ValueError(f"expected two numbers above 0, the lower first, found {list(pair)}")


def _range(low: float, high: float) -> Any:
    return field(default=(low, high), validator=_ordered)


@frozen
class RegNet:
    """Stages by a few numbers (RegNet, Radosavovic et al. 2020, arXiv:2003.13678), drawn as pycls does.

    Block j is w_0 + w_a * j wide, quantised to powers of w_m times w_0 and to multiples of 8; blocks of one width are a
    stage. What has not as many stages as the space, or a width or depth that the space lacks, is thrown away. The
    numbers themselves become variables of the population, beside those of the space.

    depth: blocks, uniform
    w_0: width of the first block, a multiple of 8, its logarithm uniform
    w_a: slope, in steps of 0.1, its logarithm uniform
    w_m: ratio of the widths of two stages, in steps of 0.001, its logarithm uniform
    group_width: channels of a group, by which widths are fitted: a power of 2, above 8 a multiple of 8
    bottleneck: inner over output channels: powers of 2
    widths, depths: the space's variables of the stages, in their order
    groups: those of how many groups there are, if the space has any
    """

    depth: Range = _range(12, 28)
    w_0: Range = _range(8, 256)
    w_a: Range = _range(8, 256)
    w_m: Range = _range(2, 3)
    group_width: Range = _range(8, 128)
    bottleneck: Range = _range(1, 1)
    widths: str = "stages.*.width"
    depths: str = "stages.*.depth"
    groups: str | None = None

    @property
    def variables(self) -> Sequence[Variable]:
        """What is drawn. Raises UserError for ranges that cannot be."""
        whole = {name: tuple(map(round, getattr(self, name))) for name in ("depth", "w_0", "group_width")}
        powers = tuple(round(math.log2(end)) for end in self.bottleneck)
        try:
            return (
                Int("depth", *whole["depth"]),
                Int("w_0", *whole["w_0"], QUANTUM, distribution="log"),
                Float("w_a", *self.w_a, log=True, step=0.1),
                Float("w_m", *self.w_m, log=True, step=0.001),
                Int("group_width", *whole["group_width"], QUANTUM, distribution="power2_or_log"),
                Variable("bottleneck", [2.0**power for power in range(powers[0], powers[1] + 1)]),
            )
        except ValueError as error:
            raise UserError(str(error), key=("regnet",)) from None


@frozen
class Stages:
    """The stages of a network: of each its width, its number of blocks and the channels of a group."""

    widths: Sequence[int]
    depths: Sequence[int]
    group_widths: Sequence[int]


def regnet_stages(
    depth: int, w_0: float, w_a: float, w_m: float, group_width: int = 1, bottleneck: float = 1.0
) -> Stages | None:
    """Return the stages of a RegNet; None where the quantisation skips one."""
    wanted = w_0 + w_a * np.arange(depth)
    powers = np.rint(np.log(wanted / w_0) / math.log(w_m))
    widths, depths = np.unique(QUANTUM * np.rint(w_0 * w_m**powers / QUANTUM).astype(int), return_counts=True)
    if len(widths) != powers.max() + 1:
        return None
    fitted = [_fitted(int(width), group_width, bottleneck) for width in widths]
    return Stages([width for width, _ in fitted], depths.tolist(), [group for _, group in fitted])


def _fitted(width: int, group: int, bottleneck: float) -> tuple[int, int]:
    """Return a width whose inner channels are a multiple of a group, and that group."""
    inner = int(max(1, width * bottleneck))
    group = min(group, inner)
    multiple = math.lcm(group, int(bottleneck)) if bottleneck > 1 else group
    inner = max(multiple, multiple * round(inner / multiple))  # halves to even, as numpy has it
    return int(inner / bottleneck), group


# -- draws ------------------------------------------------------------------------------------------------------------


@frozen
class Structure:
    """What the variables of an arch have in common.

    equal: patterns, `stages.*.kernel`: all variables that one names have the same choice
    non_decreasing: patterns: the variables that one names never fall, in the order of the space
    regnet: the stages are those of a RegNet

    Draws are those of the space given that this holds, as throwing away all others would leave them, but found at
    once. So never falling ones are uniform over all tuples that never fall, which a sorted draw is not. A variable that
    an arch does not use counts here as if it did.
    """

    equal: tuple[str, ...] = ()
    non_decreasing: tuple[str, ...] = ()
    regnet: RegNet | None = None

    def __bool__(self) -> bool:
        return bool(self.equal or self.non_decreasing or self.regnet)

    def draw(self, space: Any, rng: np.random.Generator, n: int) -> tuple[Codes, Sequence[Mapping[str, float]]]:
        """Return archs that have it and obey the constraints of the space, at most n; of each the RegNet's numbers.

        Raises UserError for patterns that name no variable, one that has no order, or one that another pattern names.
        """
        if not self:
            return space.draw(rng, n), [{}] * n
        whole: SearchSpace = getattr(space, "space", space)  # without its constraints, which `admit` asks for
        codes = whole.draw(rng, n)
        taken: set[int] = set()
        numbers: list[Mapping[str, float]] = [{}] * n
        if self.regnet is not None:
            codes, numbers = _with_stages(self.regnet, whole, codes, taken, rng)
        for name, rising in (("equal", False), ("non_decreasing", True)):
            for pattern in getattr(self, name):
                columns = _columns(whole, pattern, (name,), taken)
                chain = [whole.variables[column] for column in columns]
                codes[:, columns] = chained(chain, rising, rng, len(codes), (name,))
        codes = whole.canonical(codes)
        inside = _inside(space, codes)
        return codes[inside], [row for row, there in zip(numbers, inside, strict=True) if there]


def _inside(space: Any, codes: Codes) -> np.ndarray:
    """Return which of some canonical archs obey: `admit` gives those that do, in their order."""
    admitted = {row.tobytes() for row in np.ascontiguousarray(space.admit(codes))}
    return np.array([row.tobytes() in admitted for row in np.ascontiguousarray(codes)], bool)


def _columns(space: SearchSpace, pattern: str, key: tuple[str, ...], taken: set[int]) -> list[int]:
    columns = [i for i, name in enumerate(space.keys) if fnmatch.fnmatchcase(name, pattern)]
    if not columns:
        raise UserError(f"no variable is called {pattern!r}", key=key, hint=f"there are {', '.join(space.keys[:12])}")
    if twice := taken & {*columns}:
        raise UserError(f"{space.keys[min(twice)]!r} is tied by another pattern too", key=key)
    taken |= {*columns}
    return columns


def chained(
    chain: Sequence[Variable], rising: bool, rng: np.random.Generator, n: int, key: tuple[str, ...] = ()
) -> np.ndarray:
    """Return codes (n, variables) of variables that are all equal, or never fall, each drawn as its variable says.

    Their distribution is that of independent draws given that this holds. Raises UserError where none of it can be.
    """
    if any(v.continuous or (rising and isinstance(v.choices[0], str)) for v in chain):
        raise UserError("expected variables of lists of numbers", key=key)
    values = [np.array(variable.choices) for variable in chain]
    follows = [(b >= a[:, None]) if rising else (b == a[:, None]) for a, b in itertools.pairwise(values)]
    # How likely the rest of the chain can go on from each choice, from its end.
    onward = [np.ones(len(values[-1]))]
    for link, variable in zip(reversed(follows), reversed(chain), strict=False):
        onward.insert(0, link @ (variable.chances * onward[0]))
    codes = np.empty((n, len(chain)), np.int64)
    likely = np.broadcast_to(chain[0].chances * onward[0], (n, len(values[0])))
    for place, variable in enumerate(chain):
        if place:
            likely = follows[place - 1][codes[:, place - 1]] * (variable.chances * onward[place])
        edges = np.cumsum(likely, 1)
        if not (edges[:, -1] > 0).all():
            raise UserError(f"{chain[0].key} and {chain[-1].key} can have no choices that hold together", key=key)
        drawn = rng.random((n, 1)) * edges[:, -1:]
        codes[:, place] = np.minimum((edges <= drawn).sum(1), likely.shape[1] - 1)
    return codes


def _with_stages(
    asked: RegNet, space: SearchSpace, codes: Codes, taken: set[int], rng: np.random.Generator
) -> tuple[Codes, list[Mapping[str, float]]]:
    """Return archs whose stages are RegNets', fewer than were given, and the numbers of each."""
    patterns = {"widths": asked.widths, "depths": asked.depths, **({"groups": asked.groups} if asked.groups else {})}
    places = {name: _columns(space, pattern, ("regnet", name), taken) for name, pattern in patterns.items()}
    if len({len(columns) for columns in places.values()}) > 1:
        counts = ", ".join(f"{len(columns)} {name}" for name, columns in places.items())
        raise UserError(f"expected one variable of each for every stage, found {counts}", key=("regnet",))
    variables = asked.variables
    drawn = np.stack([np.array(v.choices)[v.draw(rng, len(codes))] for v in variables], 1)
    depth, w_0, w_a, w_m = drawn[:, :4].T
    # The power of the last block says how many stages there are, unless some are skipped: most draws are out by it.
    last = np.rint(np.log1p(w_a * (depth - 1) / w_0) / np.log(w_m))
    rows: list[int] = []
    numbers: list[Mapping[str, float]] = []
    for row in np.flatnonzero(last == len(places["widths"]) - 1).tolist():
        own = drawn[row].tolist()
        stages = regnet_stages(int(own[0]), *own[1:4], int(own[4]), own[5])
        if stages is None or len(stages.widths) != len(places["widths"]):
            continue
        inner = (int(width * own[-1]) for width in stages.widths)
        groups = [width // group for width, group in zip(inner, stages.group_widths, strict=True)]
        chosen = {"widths": stages.widths, "depths": stages.depths, "groups": groups}
        try:
            for name, columns in places.items():
                pairs = zip(columns, chosen[name], strict=True)
                codes[row, columns] = [space.variables[column].code_of(choice) for column, choice in pairs]
        except (KeyError, ValueError):  # the space has no such stage
            continue
        rows.append(row)
        numbers.append({v.key: number for v, number in zip(variables, own, strict=True)})
    return codes[rows], numbers
