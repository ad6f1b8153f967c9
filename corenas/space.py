"""What an arch is, which archs there are, and how to draw one."""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from attrs import asdict, evolve, field, frozen
from attrs.converters import optional

from corenas.errors import Fault, KeyPath, UserError, collecting, did_you_mean, dotted_key, raise_if_any
from corenas.options import build
from corenas.value import Condition, Constant, Value, Variable

Choice: TypeAlias = int | float | str | bool
Codes: TypeAlias = np.ndarray
"""Archs as a matrix (archs, variables): the index of each choice; for a continuous variable its place in 0..1."""


OVERRIDE = "spec:"
"""What the key of a variable begins with that overrides a key of the spec."""
MOST_CHOICES = 1_000_000
"""The largest number of choices of one variable."""
MOST_BLOCKS = 200
"""The largest depth of a stage."""

Categorical = Variable
"""A variable of a list of choices."""


@frozen(slots=False, cache_hash=True)
class Int(Variable):
    """A whole number from `low` to `high`, both included, every `step`. Raises ValueError if the steps miss `high`."""

    low: int
    high: int
    step: int = 1
    choices: Sequence[int] = field(init=False)

    def _all(self) -> tuple[int, ...]:
        return (*_before(self.low, self.high, self.step), self.high)

    @property
    def offer(self) -> str:
        """What it can be, in words."""
        return f"{self.low} to {self.high} in steps of {self.step}"


@frozen(slots=False, cache_hash=True)
class Float(Variable):
    """A number from `low` to `high`, both included: every `step`, or any; `log` draws its logarithm uniformly.

    Without steps it is continuous: the code of a number is its place between the bounds, 0..1, on the scale, and as
    choices stand the bounds.
    Raises ValueError for bounds in the wrong order, a log scale that reaches 0, or log and step together.
    """

    low: float = field(converter=float)
    high: float = field(converter=float)
    log: bool = False
    step: float | None = field(default=None, converter=optional(float))
    choices: Sequence[float] = field(init=False)

    def _all(self) -> tuple[float, ...]:
        if not all(map(math.isfinite, (self.low, self.high, self.high - self.low, self.step or 0))):
            raise ValueError(f"expected finite numbers, found {self.offer}")
        if self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("a log scale needs low above 0 and has no step")
        if self.step is None:
            return (self.low, self.high) if self.low < self.high else (self.low,)
        # The last bound is exact and the others carry no noise such as 0.30000000000000004.
        choices = (*(float(f"{x:.15g}") for x in _before(self.low, self.high, self.step)), self.high)
        if len({*choices}) < len(choices):
            raise ValueError(f"step {self.step} is lost beside numbers of the size of {self.high}")
        return choices

    @property
    def continuous(self) -> bool:
        """Whether it has no steps."""
        return self.step is None

    def draw(self, rng: np.random.Generator, n: int) -> Codes:
        """Codes of n uniform choices."""
        return rng.random(n) if self.continuous else super().draw(rng, n)

    @cached_property
    def code(self) -> Callable[[Any], float]:
        """Gives the code of a number. Raises KeyError or ValueError for one that is not among the choices."""
        return self._place if self.continuous else super().code

    @cached_property
    def choice(self) -> Callable[[Any], float]:
        """Gives the number of a code."""
        return self._number if self.continuous else super().choice

    @property
    def offer(self) -> str:
        """What it can be, in words."""
        return f"{self.low} to {self.high}" + ("" if self.continuous else f" in steps of {self.step}")

    def _place(self, number: float) -> float:
        if not self.low <= number <= self.high:
            raise ValueError(number)
        scale = math.log if self.log else float
        low, high = scale(self.low), scale(self.high)
        return (scale(number) - low) / (high - low) if low < high else 0.0

    def _number(self, place: float) -> float:
        number = self.low * (self.high / self.low) ** place if self.log else self.low + place * (self.high - self.low)
        return min(self.high, max(self.low, number))


def _before(low: float, high: float, step: float) -> list[Any]:
    """The numbers from low to high, without high. Raises ValueError if there are too many or the steps miss it."""
    if high - low >= MOST_CHOICES * step > 0:
        raise ValueError(f"more than {MOST_CHOICES:,} choices: take a larger step")
    steps = (high - low) / step if step > 0 else -1.0
    if steps < 0 or not math.isclose(steps, round(steps), abs_tol=1e-9):
        raise ValueError(f"{low} to {high} in steps of {step} never ends on high")
    return [low + i * step for i in range(round(steps))]


_TYPES: Mapping[str, type[Variable]] = {"categorical": Categorical, "int": Int, "float": Float}
"""The types of variables as TOML names them."""


class Arch(Mapping[str, Any]):
    """One point of a space: an immutable mapping `key -> choice`, hashable, equal by value. `dict(arch)` is JSON.

    Made by a `SearchSpace`, which makes it canonical: an inactive variable holds its default.
    """

    __slots__ = ("_choices", "_hash")

    def __init__(self, choices: Mapping[str, Choice]) -> None:
        self._choices = dict(choices)
        self._hash = hash(frozenset(self._choices.items()))

    def __getitem__(self, key: str) -> Any:
        return self._choices[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._choices)

    def __len__(self) -> int:
        return len(self._choices)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self._choices == other._choices if isinstance(other, Arch) else NotImplemented

    def __repr__(self) -> str:
        return f"Arch({self._choices})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Arch, (self._choices,)

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that are the same for equal archs, in any process."""
        return hashlib.sha256(json.dumps(self._choices, sort_keys=True).encode()).hexdigest()[:16]


class SearchSpace:
    """An ordered set of variables and the conditions under which they are active.

    tree: what the variables belong to, nested as in TOML, with a `Value` at each leaf that is a number or a variable;
        what a backbone is built from. A space of loose variables has none (an empty table).
    Raises UserError if a key stands twice or a condition names a variable that does not come earlier.
    """

    def __init__(self, variables: Iterable[Variable], tree: Mapping[str, Any] | None = None) -> None:
        self.variables = tuple(variables)
        self.tree: Mapping[str, Any] = tree or {}
        self.keys = tuple(variable.key for variable in self.variables)
        self._variables: dict[str, Variable] = {}
        # For each variable its conditions: the parent's place, and whether each of its codes is allowed.
        self._parents: list[list[tuple[int, np.ndarray]]] = []
        places = {key: place for place, key in enumerate(self.keys)}
        faults: list[Fault] = []
        for variable in self.variables:
            with collecting(faults, variable.key):
                if variable.key in self._variables:
                    raise UserError(_TWICE)
                parents = [_parent(condition.key, self._variables) for condition in variable.when]
                pairs = zip(parents, variable.when, strict=True)
                self._parents.append([(places[parent.key], _mask(parent, c)) for parent, c in pairs])
                self._variables[variable.key] = variable
        raise_if_any(faults)
        self._dtype = np.int64 if self.finite else np.float64
        self._defaults = np.array([v.code(v.default) for v in self.variables], self._dtype)

    # -- from and to TOML ---------------------------------------------------------------------------------------------

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> SearchSpace:
        """A space from its TOML table. A number is fixed, a list is `Categorical`, a table with `type` is typed.

        A key `"spec:train.optimizer.lr"` is a variable that overrides the spec, and no part of the model.
        Where a table has a `depth` and a `block`, the block's variables are made anew for each block that the depth
        can reach, under `blocks.0`, `blocks.1` and so on, and are active where the depth reaches it.
        Raises UserError with all mistakes, each with its key.
        """
        if not isinstance(table, Mapping):
            raise UserError(f"expected a table, found {table!r}")
        reader = _Reader()
        tree = reader.table(table, (), ())
        for key in tree.keys() - reader.variables.keys():
            if key.startswith(OVERRIDE):
                reader.fault("expected a variable: what is fixed belongs into the spec itself", (key,))
        raise_if_any(reader.faults)
        return cls(reader.variables.values(), {key: item for key, item in tree.items() if not key.startswith(OVERRIDE)})

    def to_table(self) -> dict[str, Any]:
        """The TOML table of this space, blocks written out one by one."""
        loose = {v.key: v for v in self.variables if v.key.startswith(OVERRIDE) or not self.tree}
        places: dict[str, int] = {}
        for place, key in enumerate(self.keys):
            places.setdefault(key if key in loose else key.partition(".")[0], place)
        inorder = sorted({**loose, **self.tree}.items(), key=lambda item: places.get(item[0], -1))
        return _written(dict(inorder), ())

    @property
    def finite(self) -> bool:
        """Whether its archs can be counted: no variable is continuous."""
        return not any(variable.continuous for variable in self.variables)

    def __getitem__(self, key: str) -> Variable:
        if key not in self._variables:
            raise UserError(f"no variable {key!r}", hint=did_you_mean(key, self.keys, "variables"))
        return self._variables[key]

    value = __getitem__
    """A variable, to make dimensions of."""

    def __contains__(self, arch: object) -> bool:
        try:
            return isinstance(arch, Mapping) and self.arch(arch) == arch
        except UserError:
            return False

    # -- narrower spaces ----------------------------------------------------------------------------------------------

    def narrow(self, choices: Mapping[str, Sequence[Choice]]) -> SearchSpace:
        """The space with fewer choices for some variables; `stages.*.depth` names all that match.

        Raises UserError for a key that is no variable and for a choice that it does not have.
        """
        allowed: dict[str, Variable] = {}
        faults: list[Fault] = []
        for pattern, wanted in choices.items():
            for key in fnmatch.filter(self.keys, pattern) or [pattern]:
                with collecting(faults, pattern, also=ValueError):
                    left, default = [*map(self[key].own, wanted)], self[key].default
                    allowed[key] = Categorical(key, left, default=default if default in left else None)
        raise_if_any(faults)
        narrower: dict[str, Variable] = {}
        for key, variable in self._variables.items():
            # A condition speaks of choices that are still there.
            conditions = [Condition(c.key, c.choices & {*narrower[c.key].choices}) for c in variable.when]
            when = [c for c in conditions if not _always(c, narrower[c.key], conditions)]
            narrower[key] = evolve(allowed.get(key, variable), when=when)
        return SearchSpace(narrower.values(), _replaced(self.tree, narrower))

    def fix(self, choices: Mapping[str, Choice]) -> SearchSpace:
        """The space with some variables held at one choice, as `narrow` names them."""
        return self.narrow({key: [choice] for key, choice in choices.items()})

    # -- archs --------------------------------------------------------------------------------------------------------

    def arch(self, choices: Mapping[str, Any] | None = None) -> Arch:
        """The canonical arch of some choices, nested as in TOML or by key; what is left out holds its default.

        Raises UserError with every unknown key and every choice that its variable does not have.
        """
        chosen = {v.key: v.default for v in self.variables}
        faults: list[Fault] = []
        for key, choice in flatten(choices or {}).items():
            if key in chosen or not isinstance(choice, Mapping | list | tuple):  # an empty table says nothing
                with collecting(faults, key, also=ValueError):
                    chosen[key] = self[key].own(choice)
        raise_if_any(faults)
        active = self.active(self.encode([chosen]))[0]
        return Arch({v.key: chosen[v.key] if on else v.default for v, on in zip(self.variables, active, strict=True)})

    def default(self) -> Arch:
        """Every variable at its default."""
        return self.arch()

    def smallest(self) -> Arch:
        """Every number at its smallest, every other variable at its first choice."""
        return self.arch({v.key: v.smallest for v in self.variables})

    def largest(self) -> Arch:
        """Every number at its largest, every other variable at its first choice."""
        return self.arch({v.key: v.largest for v in self.variables})

    def encode(self, archs: Iterable[Mapping[str, Any]]) -> Codes:
        """Archs as a matrix (archs, variables) of choice indices."""
        rows = [arch._choices if isinstance(arch, Arch) else arch for arch in archs]
        columns = [[*map(v.code, [row[key] for row in rows])] for key, v in self._variables.items()]
        return np.array(columns, self._dtype).reshape(len(self.keys), len(rows)).T

    def decode(self, codes: Codes) -> list[Arch]:
        """The archs of a matrix that `encode` or `draw` gave."""
        columns = [
            map(v.choice, (column if v.continuous else column.astype(np.int64)).tolist())
            for v, column in zip(self.variables, codes.T, strict=True)
        ]
        rows = zip(*columns, strict=True) if columns else [()] * len(codes)
        return [Arch(dict(zip(self.keys, row, strict=True))) for row in rows]

    # -- drawing, many archs at once ----------------------------------------------------------------------------------

    def active(self, codes: Codes) -> np.ndarray:
        """Which variables of which archs are active: a boolean matrix of the same shape."""
        active = np.ones(codes.shape, bool)
        for place, parents in enumerate(self._parents):
            for parent, allowed in parents:
                active[:, place] &= active[:, parent] & allowed[codes[:, parent].astype(np.int64)]
        return active

    def canonical(self, codes: Codes) -> Codes:
        """The same archs with inactive variables at their defaults."""
        return np.where(self.active(codes), codes, self._defaults)

    def _raw(self, rng: np.random.Generator, n: int) -> Codes:
        columns = [variable.draw(rng, n) for variable in self.variables]
        return np.array(columns, self._dtype).reshape(len(columns), n).T

    def draw(self, rng: np.random.Generator, n: int) -> Codes:
        """n archs, each variable uniform, made canonical (`uniform`: SPOS, Once-for-All)."""
        return self.canonical(self._raw(rng, n))

    def mutated(self, codes: Codes, prob: float, rng: np.random.Generator) -> Codes:
        """Archs with each variable drawn again with probability `prob`, and afresh where it was not active before."""
        again = (rng.random(codes.shape) < prob) | ~self.active(codes)
        return self.canonical(np.where(again, self._raw(rng, len(codes)), codes))

    def crossed(self, first: Codes, second: Codes, rng: np.random.Generator) -> Codes:
        """Archs with each variable from one of two parents, of those in which it is active; from none: drawn afresh."""
        in_first, in_second = self.active(first), self.active(second)
        take_first = np.where(in_first & in_second, rng.random(first.shape) < 0.5, in_first)
        child = np.where(take_first, first, np.where(in_second, second, self._raw(rng, len(first))))
        return self.canonical(child)

    # -- drawing, one arch --------------------------------------------------------------------------------------------

    def sample(self, rng: np.random.Generator) -> Arch:
        """An arch, each variable uniform (`draw` for many)."""
        return self.decode(self.draw(rng, 1))[0]

    def mutate(self, arch: Arch, prob: float, rng: np.random.Generator) -> Arch:
        """The arch with each variable drawn again with probability `prob` (`mutated` for many)."""
        return self.decode(self.mutated(self.encode([arch]), prob, rng))[0]

    def cross(self, first: Arch, second: Arch, rng: np.random.Generator) -> Arch:
        """An arch with each variable from one of two parents (`crossed` for many)."""
        return self.decode(self.crossed(self.encode([first]), self.encode([second]), rng))[0]

    # -- counting -----------------------------------------------------------------------------------------------------

    @cached_property
    def size(self) -> int:
        """How many distinct archs there are, exactly. Raises TypeError if a variable is continuous."""
        return self._count(range(len(self.variables)), {})

    def _count(self, places: Sequence[int], chosen: Mapping[int, int]) -> int:
        """Distinct archs of some variables, given the codes of those chosen before (-1: inactive)."""
        groups = self._independent(places, chosen)
        return math.prod(sum(n for _, n in self._branches(group, chosen)) for group in groups)

    def _branches(self, group: Sequence[int], chosen: Mapping[int, int]) -> Iterator[tuple[Sequence[int], int]]:
        """The codes of a group's first variable, those together that open the same others, with their archs."""
        first, *rest = group
        for alike in [(-1,)] if self._closed(first, chosen) else self._alike[first]:
            yield alike, len(alike) * self._count(rest, {**chosen, first: alike[0]})

    def _closed(self, place: int, chosen: Mapping[int, int]) -> bool:
        """Whether one of the choices made so far leaves a variable inactive."""
        return not all(allowed[chosen[parent]] for parent, allowed in self._parents[place] if parent in chosen)

    @cached_property
    def _alike(self) -> list[list[list[int]]]:
        """The codes of each variable, those together that open the same other variables."""
        if endless := [variable.key for variable in self.variables if variable.continuous]:
            raise TypeError(f"{endless[0]} is continuous: archs cannot be counted")
        masks: dict[int, list[np.ndarray]] = defaultdict(list)
        for parent, allowed in itertools.chain(*self._parents):
            masks[parent].append(allowed)
        found = []
        for place, variable in enumerate(self.variables):
            alike: dict[Any, list[int]] = defaultdict(list)
            for code in range(len(variable.choices)):
                alike[tuple(mask[code] for mask in masks[place])].append(code)
            found.append([*alike.values()])
        return found

    def _independent(self, places: Sequence[int], chosen: Mapping[int, int]) -> list[list[int]]:
        """The variables in groups that no open condition links; each in order, so its first has no open parent."""
        groups: dict[int, list[int]] = {}
        for place in places:
            groups[place] = [place]
            parents = [] if self._closed(place, chosen) else self._parents[place]
            for parent, _ in parents:
                if parent not in chosen and groups[parent] is not groups[place]:
                    groups[parent] += groups[place]
                    groups |= dict.fromkeys(groups[place], groups[parent])
        return [sorted(group) for group in {id(group): group for group in groups.values()}.values()]

    def _chosen(self, chosen: Mapping[int, int]) -> Arch:
        """The arch of a code for each place (-1: inactive)."""
        codes = np.array([chosen[place] for place in range(len(self.variables))], self._dtype)
        return self.decode(np.where(codes < 0, self._defaults, codes)[None])[0]

    def __iter__(self) -> Iterator[Arch]:
        """All archs, each once, the last variable changing fastest. Raises TypeError if a variable is continuous."""

        def each(chosen: dict[int, int]) -> Iterator[Arch]:
            place = len(chosen)
            if place == len(self.variables):
                yield self._chosen(chosen)
                return
            for code in [-1] if self._closed(place, chosen) else sorted(itertools.chain(*self._alike[place])):
                yield from each({**chosen, place: code})

        return each({})

    def sample_uniform_archs(self, rng: np.random.Generator) -> Arch:
        """An arch drawn uniformly over distinct archs (`uniform_archs`), so that deep stages come up as often as
        there are such archs. Raises TypeError if a variable is continuous.
        """  # fmt: skip
        drawn: dict[int, int] = {}

        def draw(places: Sequence[int], chosen: Mapping[int, int]) -> None:
            for group in self._independent(places, chosen):
                branches = [*self._branches(group, chosen)]
                share = _below(rng, sum(n for _, n in branches))
                while share >= branches[0][1]:
                    share -= branches.pop(0)[1]
                alike = branches[0][0]
                drawn[group[0]] = alike[share % len(alike)]
                draw(group[1:], {**chosen, group[0]: drawn[group[0]]})

        draw(range(len(self.variables)), {})
        return self._chosen(drawn)


def _below(rng: np.random.Generator, n: int) -> int:
    """A whole number under n, uniform, however large n is."""
    bits = n.bit_length()
    while (drawn := int.from_bytes(rng.bytes((bits + 7) // 8)) >> -bits % 8) >= n:
        pass
    return drawn


def flatten(table: Mapping[str, Any] | Sequence[Any], prefix: str = "", lists: bool = True) -> dict[str, Any]:
    """Nested tables and arrays as one mapping from dotted keys: `{"a": [{"b": 1}]}` is `{"a.0.b": 1}`.

    lists: False leaves arrays whole
    """
    flat: dict[str, Any] = {}
    for key, item in table.items() if isinstance(table, Mapping) else enumerate(table):
        if item and (isinstance(item, Mapping) or (lists and isinstance(item, list | tuple))):
            flat |= flatten(item, f"{prefix}{key}.", lists)
        else:
            flat[f"{prefix}{key}"] = item
    return flat


_TWICE = "this variable stands twice"


def _parent(key: str, earlier: Mapping[str, Variable]) -> Variable:
    """The variable that a condition is on. Raises UserError if it does not come earlier or is continuous."""
    if key not in earlier:
        hint = did_you_mean(key, earlier, "variables before it")
        raise UserError(f"condition on {key!r}, which is no earlier variable", hint=hint)
    if earlier[key].continuous:
        raise UserError(f"condition on {key!r}, which has no list of choices")
    return earlier[key]


def _mask(parent: Variable, condition: Condition) -> np.ndarray:
    """Which codes of a parent a condition allows; -1, for an inactive one, it does not."""
    return np.array([*(choice in condition.choices for choice in parent.choices), False])


def _always(condition: Condition, parent: Variable, beside: Iterable[Condition]) -> bool:
    """Whether a condition says nothing that the conditions beside it leave open."""
    return condition.choices >= {*parent.choices} and {*parent.when} <= {*beside}


def _replaced(tree: Any, variables: Mapping[str, Variable]) -> Any:
    """A tree with other variables of the same keys."""
    if isinstance(tree, Variable):
        return variables[tree.key]
    if isinstance(tree, Mapping):
        return {key: _replaced(item, variables) for key, item in tree.items()}
    return [_replaced(item, variables) for item in tree] if isinstance(tree, list) else tree


def _written(tree: Any, when: Sequence[Condition], brief: bool = True) -> Any:
    """A part of a tree as TOML.

    when: the conditions that its place implies, which are not written
    brief: whether a variable may be a mere list of its choices
    """
    if isinstance(tree, Constant):
        return tree.number
    if isinstance(tree, Variable):
        own = {c.key: sorted(c.choices) for c in tree.when if c not in when}
        if brief and not own and type(tree) is Categorical and tree.default == tree.largest:
            return [*tree.choices]
        name = next(name for name, cls in _TYPES.items() if cls is type(tree))
        options = asdict(tree, filter=lambda f, x: f.init and f.name not in ("key", "when") and x is not None)
        return {"type": name, **options, **({"when": own} if own else {})}
    if isinstance(tree, Mapping):
        table = {}
        for key, item in tree.items():
            if key == "blocks" and isinstance(item, list):
                table[key] = [_written(x, _reached(tree.get("depth"), i, when)) for i, x in enumerate(item)]
            else:
                # Writers of TOML put tables behind what is none: a list after them would lose its place.
                brief = not any(isinstance(x, dict) or _nested(x) for x in table.values())
                table[key] = _written(item, when, brief)
        return table
    return [_written(item, when) for item in tree] if isinstance(tree, list) else tree


def _nested(item: Any) -> bool:
    return isinstance(item, list) and any(isinstance(x, Mapping | list) for x in item)


def _reached(depth: Any, place: int, when: Sequence[Condition]) -> Sequence[Condition]:
    """The conditions of what stands in a block: the depth beside it, if that is a variable, reaches its place."""
    if not isinstance(depth, Variable):
        return when
    reached = Condition(depth.key, frozenset(d for d in depth.choices if d > place))
    return when if _always(reached, depth, when) else (*when, reached)


class _Reader:
    """Walks a space's TOML table, collecting its variables and its mistakes. None stands where a mistake was found."""

    def __init__(self) -> None:
        self.variables: dict[str, Variable] = {}
        self.faults: list[Fault] = []

    def fault(self, message: str, path: KeyPath, hint: str | None = None) -> None:
        self.faults.append(Fault(message, path, hint=hint))

    def table(self, table: Mapping[str, Any], path: KeyPath, when: Sequence[Condition]) -> dict[str, Any]:
        rest = {key: item for key, item in table.items() if key not in ("block", "blocks")}
        tree = {key: self.item(item, (*path, key), when) for key, item in rest.items()}
        if len(rest) < len(table):
            tree["blocks"] = self.blocks(table, tree, path, when)
        return tree

    def blocks(
        self, table: Mapping[str, Any], tree: Mapping[str, Any], path: KeyPath, when: Sequence[Condition]
    ) -> Any:
        """The blocks of a stage, each active where the stage's depth reaches it."""
        pattern, written = table.get("block"), table.get("blocks")
        given = [x for x in (pattern, written) if x is not None]
        if len(given) != 1 or not isinstance(given[0], list if pattern is None else Mapping):
            return self.fault("expected `block`, a table as pattern, or `blocks`, an array of tables", path)
        depth = tree.get("depth", Constant(-1 if written is None else len(written)))
        depths = depth.possible if isinstance(depth, Value) else ()
        if not depths or not all(type(d) is int and 0 <= d <= MOST_BLOCKS for d in depths):
            if depth is not None:  # else its own mistake is told already
                self.fault(f"blocks need a `depth` beside them: whole numbers from 0 to {MOST_BLOCKS:,}", path)
            depth, depths = None, (1,)  # one block shows the mistakes of all
        elif written is not None and (len(written) < depths[-1] or (len(written) > depths[-1] and not depth.keys)):
            self.fault(f"{len(written)} blocks, but depth reaches {depths[-1]}", (*path, "blocks"))
        blocks = []
        for i, item in enumerate([pattern] * depths[-1] if written is None else written):
            before = len(self.faults)
            blocks.append(self.item(item, (*path, "blocks", i), _reached(depth, i, when)))
            if written is None and len(self.faults) > before:  # they stand where the pattern stands, once
                found = [evolve(f, key=(*path, "block", *f.key[len(path) + 2 :])) for f in self.faults[before:]]
                self.faults[before:] = found
                break
        return blocks

    def item(self, item: Any, path: KeyPath, when: Sequence[Condition]) -> Any:
        if isinstance(item, Mapping):
            return self.typed(item, path, when) if "type" in item else self.table(item, path, when)
        if _nested(item):
            return [self.item(x, (*path, i), when) for i, x in enumerate(item)]
        if isinstance(item, list):
            return self.variable(path, Categorical, when, {"choices": item})
        if isinstance(item, bool | str):
            return item
        if isinstance(item, int | float):
            return Constant(item)
        return self.fault(f"expected a number, a string, a list or a table, found {item!r}", path)

    def typed(self, item: Mapping[str, Any], path: KeyPath, when: Sequence[Condition]) -> Any:
        cls = _TYPES.get(str(item["type"]).lower())
        if cls is None:
            hint = did_you_mean(str(item["type"]), _TYPES, "types of variables")
            return self.fault(f"no type of variable {item['type']!r}", (*path, "type"), hint)
        conditions = [*when, *self.conditions(item.get("when", {}), path)]
        return self.variable(path, cls, conditions, {k: x for k, x in item.items() if k not in ("type", "when")})

    def conditions(self, table: Any, path: KeyPath) -> list[Condition]:
        """`when = { op = "mbconv" }` speaks of a variable in the same table, `{ "stages.0.op" = … }` of any."""
        found: list[Condition] = []
        if not isinstance(table, Mapping):
            self.fault(f"expected a table of keys and choices, found {table!r}", (*path, "when"))
            table = {}
        for key, choices in table.items():
            near = dotted_key(*path[:-1], key)
            with collecting(self.faults, *path, "when", key, also=ValueError):
                parent = _parent(near if near in self.variables else key, self.variables)
                wanted = choices if isinstance(choices, list) else [choices]
                found.append(Condition(parent.key, frozenset(map(parent.own, wanted))))
        return found

    def variable(
        self, path: KeyPath, cls: type[Variable], when: Sequence[Condition], options: Mapping[str, Any]
    ) -> Variable | None:
        key = dotted_key(*path)
        if key in self.variables:
            return self.fault(_TWICE, path)
        with collecting(self.faults, *path):
            self.variables[key] = build(cls, options, key=key, when=when)
        return self.variables.get(key)
