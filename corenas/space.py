"""What an arch is, which archs there are, and how to draw one."""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol, TypeAlias

import numpy as np
from attrs import evolve, field, frozen

from corenas.errors import Fault, Path, UserError, did_you_mean
from corenas.value import Constant, Value, Variable

Choice: TypeAlias = int | float | str | bool
Codes: TypeAlias = np.ndarray
"""Archs as a matrix (archs, variables): the index of each choice; for a continuous variable its place in 0..1."""


@frozen
class Condition:
    """When a variable is active: its parent is active and holds one of these choices."""

    key: str
    choices: frozenset[Choice]


def _tuple(choices: Iterable[Any]) -> Sequence[Any]:
    return choices if isinstance(choices, range) else tuple(choices)


def _conditions(when: Iterable[Condition]) -> tuple[Condition, ...]:
    return tuple(when)


class _Discrete:
    """What `Categorical`, `Int` and a stepped `Float` share: finitely many choices, coded by their index."""

    key: str
    choices: Sequence[Any]

    def draw(self, rng: np.random.Generator, n: int) -> Codes:
        return rng.integers(len(self.choices), size=n)

    def code(self, choice: Any) -> float:
        return self.choices.index(choice)

    def choice(self, code: float) -> Any:
        return self.choices[int(code)]


@frozen(slots=False)
class Categorical(_Discrete):
    """One of several choices, all numbers or all strings. Raises UserError for none, or for one that stands twice.

    default: what an arch holds where nothing else is said: the largest of numbers, the first of strings
    """

    key: str
    choices: Sequence[Any] = field(converter=_tuple)
    default: Any = None
    when: tuple[Condition, ...] = field(default=(), converter=_conditions)

    def __attrs_post_init__(self) -> None:
        if not self.choices:
            raise UserError("a variable needs at least one choice", key=(self.key,))
        kinds = {str if isinstance(c, str) else bool if isinstance(c, bool) else float for c in self.choices}
        if len(kinds) > 1 or any(not isinstance(c, str | bool | int | float) for c in self.choices):
            raise UserError(f"choices are all numbers or all strings, not {list(self.choices)}", key=(self.key,))
        if len(set(self.choices)) < len(self.choices):
            raise UserError(f"a choice stands twice in {list(self.choices)}", key=(self.key,))
        if self.default is None:
            object.__setattr__(self, "default", self.largest)
        if self.default not in self.choices:
            raise UserError(f"default {self.default!r} is not among {list(self.choices)}", key=(self.key,))

    @property
    def ordered(self) -> bool:
        """Whether its choices are numbers."""
        return not isinstance(self.choices[0], str)

    @property
    def smallest(self) -> Any:
        """The smallest of numbers; of strings the first."""
        return min(self.choices) if self.ordered else self.choices[0]

    @property
    def largest(self) -> Any:
        """The largest of numbers; of strings the first."""
        return max(self.choices) if self.ordered else self.choices[0]

    def narrowed(self, choices: Sequence[Any]) -> Categorical:
        """The same variable with some of its choices."""
        return evolve(self, choices=choices, default=self.default if self.default in choices else None)

    def to_table(self) -> Any:
        """As a space file says it."""
        table = {"type": "categorical", "choices": list(self.choices), "default": self.default}
        return list(self.choices) if self.default == self.largest else table


@frozen(slots=False)
class Int(_Discrete):
    """A whole number from `low` to `high`, both included, every `step`. Raises UserError if the steps miss `high`."""

    key: str
    low: int
    high: int
    step: int = 1
    default: int | None = None
    when: tuple[Condition, ...] = field(default=(), converter=_conditions)

    def __attrs_post_init__(self) -> None:
        if self.step < 1:
            raise UserError(f"step {self.step}: expected at least 1", key=(self.key,))
        if self.high < self.low or (self.high - self.low) % self.step:
            raise UserError(f"{self.low}..{self.high} in steps of {self.step} never ends on high", key=(self.key,))
        if self.default is None:
            object.__setattr__(self, "default", self.high)
        if self.default not in self.choices:
            raise UserError(f"default {self.default} is not among {self.low}..{self.high}", key=(self.key,))

    @property
    def choices(self) -> range:  # type: ignore[override]
        """All its numbers."""
        return range(self.low, self.high + 1, self.step)

    @property
    def smallest(self) -> int:
        """Its lower bound."""
        return self.low

    @property
    def largest(self) -> int:
        """Its upper bound."""
        return self.high

    def narrowed(self, choices: Sequence[Any]) -> Categorical:
        """The same variable with some of its choices."""
        return Categorical(self.key, choices, self.default if self.default in choices else None, self.when)

    def to_table(self) -> Any:
        """As a space file says it."""
        return {"type": "int", "low": self.low, "high": self.high, "step": self.step, "default": self.default}


@frozen(slots=False)
class Float(_Discrete):
    """A number from `low` to `high`, both included: every `step`, or any; `log` draws its logarithm uniformly.

    Raises UserError for bounds in the wrong order, a log scale that reaches 0, or log and step together.
    """

    key: str
    low: float
    high: float
    log: bool = False
    step: float | None = None
    default: float | None = None
    when: tuple[Condition, ...] = field(default=(), converter=_conditions)

    def __attrs_post_init__(self) -> None:
        if not self.low <= self.high:
            raise UserError(f"low {self.low} is above high {self.high}", key=(self.key,))
        if self.log and (self.low <= 0 or self.step is not None):
            raise UserError("a log scale needs low above 0 and has no step", key=(self.key,))
        if self.step is not None:
            steps = (self.high - self.low) / self.step if self.step > 0 else math.nan
            if not math.isclose(steps, round(steps) if steps == steps else 0, abs_tol=1e-9):
                raise UserError(f"{self.low}..{self.high} in steps of {self.step} never ends on high", key=(self.key,))
        if self.default is None:
            object.__setattr__(self, "default", self.high)
        if not self.low <= self.default <= self.high or (self.step and self.default not in self.choices):  # type: ignore[operator]
            raise UserError(f"default {self.default} is not among {self.low}..{self.high}", key=(self.key,))

    @cached_property
    def choices(self) -> Sequence[float]:  # type: ignore[override]
        """All its numbers. Raises TypeError where there is no step: they cannot be counted."""
        if self.step is None:
            raise TypeError(f"{self.key} is continuous: it has no list of choices")
        steps = round((self.high - self.low) / self.step)
        # The last bound is exact and the others carry no noise such as 0.30000000000000004.
        return (*(float(f"{self.low + i * self.step:.12g}") for i in range(steps)), float(self.high))

    @property
    def smallest(self) -> float:
        """Its lower bound."""
        return self.low

    @property
    def largest(self) -> float:
        """Its upper bound."""
        return self.high

    def draw(self, rng: np.random.Generator, n: int) -> Codes:
        """Codes of n uniform choices."""
        return rng.random(n) if self.step is None else super().draw(rng, n)

    def code(self, choice: float) -> float:
        """Its index; without a step its place between the bounds, 0..1, on the variable's scale."""
        if self.step is not None:
            return super().code(choice)
        if not self.low <= choice <= self.high:
            raise ValueError(choice)
        if self.low == self.high:
            return 0.0
        scale = math.log if self.log else float
        return (scale(choice) - scale(self.low)) / (scale(self.high) - scale(self.low))

    def choice(self, code: float) -> float:
        """The number of a code, as `code` gives it."""
        if self.step is not None:
            return super().choice(code)
        if self.log:
            return min(self.high, max(self.low, self.low * (self.high / self.low) ** code))
        return min(self.high, max(self.low, self.low + code * (self.high - self.low)))

    def narrowed(self, choices: Sequence[Any]) -> Categorical:
        """The same variable with some of its numbers."""
        return Categorical(self.key, choices, self.default if self.default in choices else None, self.when)

    def to_table(self) -> Any:
        """As a space file says it."""
        table = {"type": "float", "low": self.low, "high": self.high, "log": self.log, "default": self.default}
        return table if self.step is None else table | {"step": self.step}


SpaceVariable: TypeAlias = Categorical | Int | Float


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


class Drawing(Protocol):
    """What draws archs: a space, or the part of one that obeys constraints."""

    variables: tuple[SpaceVariable, ...]

    def sample(self, rng: np.random.Generator) -> Arch: ...
    def mutate(self, arch: Arch, prob: float, rng: np.random.Generator) -> Arch: ...
    def cross(self, first: Arch, second: Arch, rng: np.random.Generator) -> Arch: ...


class SearchSpace:
    """An ordered set of variables and the conditions under which they are active.

    tree: what the variables belong to, nested as in TOML, with a `Value` at each leaf that is a number or a variable;
        what a backbone is built from. A space of loose variables has none (an empty table).
    Raises UserError if a key stands twice or a condition names a variable that does not come earlier.
    """

    def __init__(self, variables: Iterable[SpaceVariable], tree: Mapping[str, Any] | None = None) -> None:
        self.variables = tuple(variables)
        self.tree: Mapping[str, Any] = tree or {}
        self.keys = tuple(variable.key for variable in self.variables)
        self._place = {key: place for place, key in enumerate(self.keys)}
        if len(self._place) < len(self.keys):
            twice = sorted({key for key in self.keys if self.keys.count(key) > 1})
            raise UserError(f"variables stand twice: {', '.join(twice)}")
        self._parents: list[list[tuple[int, np.ndarray]]] = []
        for place, variable in enumerate(self.variables):
            parents = []
            for condition in variable.when:
                parent = self._place.get(condition.key, place)
                if parent >= place:
                    earlier = did_you_mean(condition.key, self.keys[:place], "variables before it")
                    raise UserError(f"condition on {condition.key!r}, which is no earlier variable",
                                    key=(variable.key,), hint=earlier)  # fmt: skip
                choices = self.variables[parent].choices
                parents.append((parent, np.array([choice in condition.choices for choice in choices])))
            self._parents.append(parents)
        continuous = any(isinstance(v, Float) and v.step is None for v in self.variables)
        self._dtype = np.float64 if continuous else np.int64
        self._defaults = np.array([v.code(v.default) for v in self.variables], self._dtype)

    # -- from and to TOML ---------------------------------------------------------------------------------------------

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> SearchSpace:
        """A space from its TOML table. A number is fixed, a list is `Categorical`, a table with `type` is typed.

        Where a table has a `depth` and a `block`, the block's variables are made anew for each block that the depth
        can reach, under `blocks.0`, `blocks.1` and so on, and are active where the depth reaches it.
        Raises UserError with all mistakes, each with its key.
        """
        reader = _Reader()
        tree = reader.table(table, (), ())
        if reader.faults:
            raise UserError(faults=reader.faults)
        return cls(reader.variables, tree)

    def to_table(self) -> dict[str, Any]:
        """The TOML table of this space, blocks written out one by one."""
        return _written(self.tree, {v.key: v for v in self.variables}) if self.tree else {
            v.key: v.to_table() for v in self.variables}  # fmt: skip

    def value(self, key: str) -> Variable:
        """A variable as a value, to make dimensions of."""
        return Variable(key, self[key].choices)

    def __getitem__(self, key: str) -> SpaceVariable:
        if key not in self._place:
            raise UserError(f"no variable {key!r}", hint=did_you_mean(key, self.keys, "variables"))
        return self.variables[self._place[key]]

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
        allowed: dict[str, list[Choice]] = {}
        faults = []
        for pattern, wanted in choices.items():
            keys = fnmatch.filter(self.keys, pattern)
            if not keys:
                faults.append(Fault("no such variable", (pattern,), hint=did_you_mean(pattern, self.keys, "variables")))
            for key in keys:
                variable = self[key]
                alien = [c for c in wanted if not _allowed(variable, c)]
                if alien or not wanted:
                    faults.append(Fault(f"{alien or 'no choice'}: {key} has {_choices_text(variable)}", (pattern,)))
                allowed[key] = list(wanted)
        if faults:
            raise UserError(faults=faults)
        variables = [v.narrowed(allowed[v.key]) if v.key in allowed else v for v in self.variables]
        parents = {v.key: v for v in variables}
        for i, variable in enumerate(variables):  # a condition speaks of choices that are still there
            when = [c for c in variable.when if not set(parents[c.key].choices) <= c.choices]
            variables[i] = evolve(variable, when=when)
        return SearchSpace(variables, _revalued(self.tree, {v.key: v for v in variables if v.key in allowed}))

    def fix(self, choices: Mapping[str, Choice]) -> SearchSpace:
        """The space with some variables held at one choice, as `narrow` names them."""
        return self.narrow({key: [choice] for key, choice in choices.items()})

    # -- archs --------------------------------------------------------------------------------------------------------

    def arch(self, choices: Mapping[str, Any] | None = None) -> Arch:
        """The canonical arch of some choices, nested as in TOML or by key; what is left out holds its default.

        Raises UserError with every unknown key and every choice that its variable does not have.
        """
        flat = flatten(choices or {})
        faults = [Fault("no such variable", (key,), hint=did_you_mean(key, self.keys, "variables"))
                  for key in flat if key not in self._place]  # fmt: skip
        for key, choice in flat.items():
            if key in self._place and not _allowed(self[key], choice):
                faults.append(Fault(f"{choice!r} is none of {_choices_text(self[key])}", (key,)))
        if faults:
            raise UserError(faults=faults)
        codes = [v.code(flat[v.key]) if v.key in flat else self._defaults[i] for i, v in enumerate(self.variables)]
        return self.decode(self.canonical(np.array([codes], self._dtype)))[0]

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
        rows = [[v.code(arch[v.key]) for v in self.variables] for arch in archs]
        return np.array(rows, self._dtype).reshape(len(rows), len(self.variables))

    def decode(self, codes: Codes) -> list[Arch]:
        """The archs of a matrix that `encode` or `draw` gave."""
        keys, variables = self.keys, self.variables
        return [Arch({k: v.choice(c) for k, v, c in zip(keys, variables, row, strict=True)}) for row in codes.tolist()]

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
        return np.stack(columns, axis=1).astype(self._dtype) if columns else np.zeros((n, 0), self._dtype)

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
        return self._count(tuple(range(len(self.variables))), {})

    def _count(self, places: tuple[int, ...], chosen: dict[int, int | None]) -> int:
        """Distinct archs of some variables, given the codes of those chosen before (None: inactive)."""
        total = 1
        for group in self._independent(places, chosen):
            total *= sum(self._count(group[1:], {**chosen, group[0]: code}) for code in self._codes(group[0], chosen))
        return total

    def _codes(self, place: int, chosen: Mapping[int, int | None]) -> Sequence[int | None]:
        for parent, allowed in self._parents[place]:
            code = chosen[parent]
            if code is None or not allowed[code]:
                return (None,)
        return range(len(self.variables[place].choices))

    def _independent(self, places: tuple[int, ...], chosen: Mapping[int, Any]) -> list[tuple[int, ...]]:
        """The variables in groups that no open condition links; each group in order, so its first has no open parent."""
        group = {place: place for place in places}

        def root(place: int) -> int:
            while group[place] != place:
                place = group[place]
            return place

        for place in places:
            for parent, _ in self._parents[place]:
                if parent not in chosen:
                    group[root(place)] = root(parent)
        found: dict[int, list[int]] = {}
        for place in places:
            found.setdefault(root(place), []).append(place)
        return [tuple(members) for members in found.values()]

    def __iter__(self) -> Iterator[Arch]:
        """All archs, each once, the last variable changing fastest. Raises TypeError if a variable is continuous."""

        def rows(place: int, chosen: dict[int, int | None]) -> Iterator[list[Any]]:
            if place == len(self.variables):
                yield [self._defaults[i] if code is None else code for i, code in chosen.items()]
                return
            for code in self._codes(place, chosen):
                yield from rows(place + 1, {**chosen, place: code})

        for row in rows(0, {}):
            yield self.decode(np.array([row], self._dtype))[0]

    def sample_uniform_archs(self, rng: np.random.Generator) -> Arch:
        """An arch drawn uniformly over distinct archs (`uniform_archs`), so that deep stages come up as often as
        there are such archs. Raises TypeError if a variable is continuous.
        """  # fmt: skip
        codes = self._defaults.copy()

        def fill(places: tuple[int, ...], chosen: dict[int, int | None]) -> None:
            for group in self._independent(places, chosen):
                first, rest = group[0], group[1:]
                options = self._codes(first, chosen)
                counts = (
                    [self._count(rest, {**chosen, first: code}) for code in options] if rest else [1] * len(options)
                )
                # Whole numbers of any size: cut a uniform share of their sum.
                cuts = list(itertools.accumulate(counts))
                share = rng.random() * cuts[-1]
                pick = next(i for i, cut in enumerate(cuts) if share < cut)
                if options[pick] is not None:
                    codes[first] = options[pick]
                fill(rest, {**chosen, first: options[pick]})

        fill(tuple(range(len(self.variables))), {})
        return self.decode(codes[None])[0]


def flatten(table: Mapping[str, Any] | Sequence[Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables and arrays as one mapping from dotted keys: `{"a": [{"b": 1}]}` is `{"a.0.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, item in table.items() if isinstance(table, Mapping) else enumerate(table):
        if isinstance(item, Mapping | list | tuple):
            flat |= flatten(item, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = item
    return flat


def _allowed(variable: SpaceVariable, choice: Any) -> bool:
    if isinstance(choice, bool) != isinstance(variable.default, bool):  # True is 1 to Python, not to a reader
        return False
    try:
        variable.code(choice)
    except (ValueError, TypeError):
        return False
    return True


def _choices_text(variable: SpaceVariable) -> str:
    if isinstance(variable, Categorical):
        return f"the choices {', '.join(map(str, variable.choices))}"
    step = f" in steps of {variable.step}" if variable.step is not None else ""
    return f"{variable.low} to {variable.high}{step}"


def _revalued(tree: Any, variables: Mapping[str, SpaceVariable]) -> Any:
    if isinstance(tree, Variable):
        return Variable(tree.key, variables[tree.key].choices) if tree.key in variables else tree
    if isinstance(tree, Mapping):
        return {key: _revalued(item, variables) for key, item in tree.items()}
    return [_revalued(item, variables) for item in tree] if isinstance(tree, list) else tree


def _written(tree: Any, variables: Mapping[str, SpaceVariable]) -> Any:
    if isinstance(tree, Variable):
        return variables[tree.key].to_table()
    if isinstance(tree, Constant):
        return tree.number
    if isinstance(tree, Mapping):
        return {key: _written(item, variables) for key, item in tree.items()}
    return [_written(item, variables) for item in tree] if isinstance(tree, list) else tree


_TYPES: dict[str, tuple[type[SpaceVariable], dict[str, type]]] = {
    "categorical": (Categorical, {"choices": list, "default": object}),
    "int": (Int, {"low": int, "high": int, "step": int, "default": int}),
    "float": (Float, {"low": float, "high": float, "step": float, "default": float, "log": bool}),
}


class _Reader:
    """Walks a space's TOML table, collecting its variables and its mistakes."""

    def __init__(self) -> None:
        self.variables: list[SpaceVariable] = []
        self.faults: list[Fault] = []

    def table(self, table: Mapping[str, Any], path: Path, when: tuple[Condition, ...]) -> dict[str, Any]:
        tree: dict[str, Any] = {}
        for key, item in table.items():
            if key not in ("block", "blocks"):
                tree[key] = self.item(item, (*path, key), when)
        if "block" in table and "blocks" in table:
            self.faults.append(Fault("both `block` and `blocks`: the one is a pattern, the other its copies", path))
        elif isinstance(table.get("block"), Mapping):
            tree["blocks"] = self.blocks(table["block"], None, path, tree.get("depth"), when)
        elif isinstance(table.get("blocks"), list):
            tree["blocks"] = self.blocks(None, table["blocks"], path, tree.get("depth"), when)
        elif "block" in table or "blocks" in table:
            self.faults.append(Fault("expected `block` as a table, or `blocks` as an array of tables", path))
        return tree

    def blocks(
        self,
        pattern: Mapping[str, Any] | None,
        written: list[Any] | None,
        path: Path,
        depth: Value | None,
        when: tuple[Condition, ...],
    ) -> list[Any]:
        """The blocks of a stage, each active where the stage's depth reaches it."""
        if isinstance(depth, Variable):
            depths: Sequence[int] = depth.choices
        elif isinstance(depth, Constant):
            depths = [depth.number]
        else:
            depths = [len(written)] if written is not None else []
        if not depths or not all(isinstance(d, int) and d >= 0 for d in depths):
            self.faults.append(Fault("blocks need a `depth` beside them: whole numbers, 0 or more", path))
            return []
        if written is not None and len(written) < max(depths):
            self.faults.append(Fault(f"{len(written)} blocks, but depth reaches {max(depths)}", (*path, "blocks")))
        blocks: list[Any] = []
        for i in range(max(depths) if written is None else len(written)):
            reached = frozenset(d for d in depths if d > i)
            own = (
                when
                if len(reached) == len(depths)
                else (*when, Condition(".".join(map(str, (*path, "depth"))), reached))
            )
            before = len(self.faults)
            item = pattern if written is None else written[i]
            blocks.append(self.item(item, (*path, "blocks", i), own))
            if written is None:  # mistakes of a pattern stand where the pattern stands, once
                self.faults[before:] = [
                    evolve(f, key=(*path, "block", *f.key[len(path) + 2 :])) for f in self.faults[before:] if i == 0
                ]
        return blocks

    def item(self, item: Any, path: Path, when: tuple[Condition, ...]) -> Any:
        if isinstance(item, Mapping):
            return self.typed(item, path, when) if "type" in item else self.table(item, path, when)
        if isinstance(item, list):
            if any(isinstance(x, Mapping | list) for x in item):
                return [self.item(x, (*path, i), when) for i, x in enumerate(item)]
            return self.variable(path, Categorical, {"choices": item}, when)
        if isinstance(item, bool | str):
            return item
        if isinstance(item, int | float):
            return Constant(item)
        self.faults.append(Fault(f"expected a number, a string, a list or a table, found {item!r}", path))
        return Constant(0)

    def typed(self, item: Mapping[str, Any], path: Path, when: tuple[Condition, ...]) -> Any:
        kind = _TYPES.get(str(item["type"]).lower())
        if kind is None:
            hint = did_you_mean(str(item["type"]), _TYPES, "types of variables")
            self.faults.append(Fault(f"no type of variable {item['type']!r}", (*path, "type"), hint=hint))
            return Constant(0)
        cls, options = kind
        before = len(self.faults)
        found: dict[str, Any] = {}
        for key, x in item.items():
            expected = options.get(key)
            if key in ("type", "when"):
                continue
            if expected is None:
                hint = did_you_mean(key, [*options, "when"], "options")
                self.faults.append(Fault("unknown key", (*path, key), hint=hint))
            elif expected is not object and (
                isinstance(x, bool) != (expected is bool)
                or not isinstance(x, (int, float) if expected is float else expected)
            ):
                self.faults.append(Fault(f"expected {_EXPECTED[expected]}, found {x!r}", (*path, key)))
            else:
                found[key] = x
        required = ["choices"] if cls is Categorical else ["low", "high"]
        self.faults += [Fault("required key is missing", (*path, key)) for key in required if key not in item]
        conditions = [*when, *self.conditions(item.get("when", {}), path)]
        return Constant(0) if len(self.faults) > before else self.variable(path, cls, found, conditions)

    def conditions(self, table: Any, path: Path) -> list[Condition]:
        """`when = { op = "mbconv" }` speaks of a variable in the same table, `{ "stages.0.op" = … }` of any."""
        if not isinstance(table, Mapping):
            self.faults.append(Fault(f"expected a table of keys and choices, found {table!r}", (*path, "when")))
            return []
        known = {v.key: v for v in self.variables}
        conditions = []
        for key, choices in table.items():
            near = ".".join(map(str, (*path[:-1], key)))
            full = near if near in known else key
            wanted = choices if isinstance(choices, list) else [choices]
            if full not in known:
                hint = did_you_mean(key, known, "variables before it")
                self.faults.append(Fault("no earlier variable of this name", (*path, "when", key), hint=hint))
            elif alien := [c for c in wanted if not _allowed(known[full], c)]:
                self.faults.append(Fault(f"{alien}: {full} has {_choices_text(known[full])}", (*path, "when", key)))
            else:
                conditions.append(Condition(full, frozenset(wanted)))
        return conditions

    def variable(self, path: Path, cls: type[Any], options: Mapping[str, Any], when: Iterable[Condition]) -> Any:
        key = ".".join(map(str, path))
        try:
            variable = cls(key, when=when, **options)
        except UserError as error:
            self.faults += [evolve(fault, key=path) for fault in error.faults]
            return Constant(0)
        self.variables.append(variable)
        if cls is Float and variable.step is None:
            return Variable(key, (variable.low, variable.high))
        return Variable(key, variable.choices)


_EXPECTED = {int: "a whole number", float: "a number", bool: "true or false", list: "a list"}
