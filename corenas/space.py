"""What an arch is, which archs there are, and how to draw one."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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


MOST_CHOICES = 1_000_000
"""The largest number of choices of one variable."""
MOST_BLOCKS = 10_000
"""The largest depth of a stage."""


def _tuple(choices: Iterable[Any]) -> Sequence[Any]:
    return choices if isinstance(choices, range) else tuple(choices)


def _conditions(when: Iterable[Condition]) -> tuple[Condition, ...]:
    return tuple(when)


def _float(number: Any) -> Any:
    return float(number) if number is not None and _finite(number) else number


def _finite(number: Any) -> bool:
    return isinstance(number, int | float) and abs(number) <= sys.float_info.max


class _Discrete:
    """What `Categorical`, `Int` and a stepped `Float` share: finitely many choices, coded by their index."""

    key: str
    choices: Sequence[Any]

    @cached_property
    def _codes(self) -> Mapping[Any, int]:
        return {choice: code for code, choice in enumerate(self.choices)}

    def draw(self, rng: np.random.Generator, n: int) -> Codes:
        return rng.integers(len(self.choices), size=n)

    def code(self, choice: Any) -> float:
        """Its index. Raises KeyError for one that is not among the choices."""
        return self._codes[choice]

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
        if len(kinds) > 1 or not all(isinstance(c, str) or _finite(c) for c in self.choices):
            raise UserError(f"choices are all numbers or all strings, not {list(self.choices)}", key=(self.key,))
        if len(set(self.choices)) < len(self.choices):
            raise UserError(f"a choice stands twice in {list(self.choices)}", key=(self.key,))
        if self.default is None:
            object.__setattr__(self, "default", self.largest)
        _check_default(self)

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
        if self.high - self.low >= MOST_CHOICES * self.step:
            raise UserError(f"more than {MOST_CHOICES:,} choices: take a larger step", key=(self.key,))
        if self.high < self.low or (self.high - self.low) % self.step:
            raise UserError(f"{self.low}..{self.high} in steps of {self.step} never ends on high", key=(self.key,))
        if self.default is None:
            object.__setattr__(self, "default", self.high)
        _check_default(self)

    @cached_property
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
    low: float = field(converter=_float)
    high: float = field(converter=_float)
    log: bool = False
    step: float | None = field(default=None, converter=_float)
    default: float | None = field(default=None, converter=_float)
    when: tuple[Condition, ...] = field(default=(), converter=_conditions)

    def __attrs_post_init__(self) -> None:
        if not all(map(_finite, (self.low, self.high, self.high - self.low, self.step or 0))):
            step = "" if self.step is None else f" in steps of {self.step}"
            raise UserError(f"expected finite numbers, found {self.low}..{self.high}{step}", key=(self.key,))
        if not self.low <= self.high:
            raise UserError(f"low {self.low} is above high {self.high}", key=(self.key,))
        if self.log and (self.low <= 0 or self.step is not None):
            raise UserError("a log scale needs low above 0 and has no step", key=(self.key,))
        if self.step is not None:
            steps = (self.high - self.low) / self.step if self.step > 0 else math.nan
            if steps >= MOST_CHOICES:
                raise UserError(f"more than {MOST_CHOICES:,} choices: take a larger step", key=(self.key,))
            if not _finite(steps) or not math.isclose(steps, round(steps), abs_tol=1e-9):
                raise UserError(f"{self.low}..{self.high} in steps of {self.step} never ends on high", key=(self.key,))
            if len(self._codes) < len(self.choices):
                raise UserError(f"step {self.step} is lost beside numbers of the size of {self.high}", key=(self.key,))
        if self.default is None:
            object.__setattr__(self, "default", self.high)
        _check_default(self)

    @cached_property
    def choices(self) -> Sequence[float]:  # type: ignore[override]
        """All its numbers. Raises TypeError where there is no step: they cannot be counted."""
        if self.step is None:
            raise TypeError(f"{self.key} is continuous: it has no list of choices")
        steps = round((self.high - self.low) / self.step)
        # The last bound is exact and the others carry no noise such as 0.30000000000000004.
        return (*(float(f"{self.low + i * self.step:.15g}") for i in range(steps)), float(self.high))

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

    def code(self, choice: Any) -> float:
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

    def sample(self, rng: np.random.Generator) -> Arch:
        """An arch at random."""
        ...

    def mutate(self, arch: Arch, prob: float, rng: np.random.Generator) -> Arch:
        """The arch with each variable drawn again with probability `prob`."""
        ...

    def cross(self, first: Arch, second: Arch, rng: np.random.Generator) -> Arch:
        """An arch with each variable from one of two parents."""
        ...


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
                if _continuous(self.variables[parent]):
                    raise UserError(
                        f"condition on {condition.key!r}, which has no list of choices", key=(variable.key,)
                    )
                choices = self.variables[parent].choices
                parents.append((parent, np.array([choice in condition.choices for choice in choices])))
            self._parents.append(parents)
        self._dtype = np.float64 if any(map(_continuous, self.variables)) else np.int64
        self._defaults = np.array([v.code(v.default) for v in self.variables], self._dtype)

    # -- from and to TOML ---------------------------------------------------------------------------------------------

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> SearchSpace:
        """A space from its TOML table. A number is fixed, a list is `Categorical`, a table with `type` is typed.

        Where a table has a `depth` and a `block`, the block's variables are made anew for each block that the depth
        can reach, under `blocks.0`, `blocks.1` and so on, and are active where the depth reaches it.
        Raises UserError with all mistakes, each with its key.
        """
        if not isinstance(table, Mapping):
            raise UserError(f"expected a table, found {table!r}")
        reader = _Reader()
        tree = reader.table(table, (), ())
        if reader.faults:
            raise UserError(faults=reader.faults)
        return cls(reader.variables, tree)

    def to_table(self) -> dict[str, Any]:
        """The TOML table of this space, blocks written out one by one."""
        tree = self.tree or {variable.key: _value(variable) for variable in self.variables}
        return _written(tree, {variable.key: variable for variable in self.variables}, "", ())

    def value(self, key: str) -> Variable:
        """A variable as a value, to make dimensions of."""
        return _value(self[key])

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
                else:  # 224.0 is the choice 224
                    allowed[key] = [c if _continuous(variable) else variable.choice(variable.code(c)) for c in wanted]
                    if len(set(wanted)) < len(wanted):
                        faults.append(Fault(f"a choice stands twice in {list(wanted)}", (pattern,)))
        if faults:
            raise UserError(faults=faults)
        variables: list[SpaceVariable] = []
        parents: dict[str, SpaceVariable] = {}
        for variable in self.variables:
            narrowed = variable.narrowed(allowed[variable.key]) if variable.key in allowed else variable
            # A condition speaks of choices that are still there.
            left = [Condition(c.key, c.choices & {*parents[c.key].choices}) for c in variable.when]
            when = [c for c in left if not _always(c, parents[c.key], left)]
            variables.append(narrowed if when == [*narrowed.when] else evolve(narrowed, when=when))
            parents[variable.key] = variables[-1]
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
        faults = []
        for key, choice in flat.items():
            if key not in self._place:
                if not isinstance(choice, Mapping | list | tuple):  # a table without variables is one of the space's
                    hint = did_you_mean(key, self.keys, "variables")
                    faults.append(Fault("no such variable", (key,), hint=hint))
            elif not _allowed(self[key], choice):
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
        rows = [arch._choices if isinstance(arch, Arch) else arch for arch in archs]
        coders: list[Callable[[Any], float]] = [
            v.code if _continuous(v) else v._codes.__getitem__ for v in self.variables
        ]
        columns = [[*map(code, [row[key] for row in rows])] for key, code in zip(self.keys, coders, strict=True)]
        return np.array(columns, self._dtype).reshape(len(self.keys), len(rows)).T

    def decode(self, codes: Codes) -> list[Arch]:
        """The archs of a matrix that `encode` or `draw` gave."""
        columns = [
            map(v.choice, column.tolist())
            if _continuous(v)
            else map(v.choices.__getitem__, column.astype(int).tolist())
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
        return math.prod(sum(n for _, n in self._counts(group, chosen)) for group in self._independent(places, chosen))

    def _counts(
        self, group: tuple[int, ...], chosen: dict[int, int | None]
    ) -> Iterator[tuple[Sequence[int | None], int]]:
        """The codes of a group's first variable, those together that open the same others, with their archs."""
        first, rest = group[0], group[1:]
        for alike in [(None,)] if self._closed(first, chosen) else self._alike[first]:
            yield alike, len(alike) * self._count(rest, {**chosen, first: alike[0]})

    def _closed(self, place: int, chosen: Mapping[int, int | None]) -> bool:
        """Whether one of the choices made so far leaves a variable inactive."""
        for parent, allowed in self._parents[place]:
            code = chosen.get(parent, -1)
            if code is None or (code >= 0 and not allowed[code]):
                return True
        return False

    @cached_property
    def _alike(self) -> list[list[Sequence[int]]]:
        """The codes of each variable, those together that open the same other variables."""
        opens: list[list[np.ndarray]] = [[] for _ in self.variables]
        for parents in self._parents:
            for parent, allowed in parents:
                opens[parent].append(allowed)
        found: list[list[Sequence[int]]] = []
        for variable, masks in zip(self.variables, opens, strict=True):
            classes: dict[tuple[bool, ...], list[int]] = {}
            for code, key in enumerate(zip(*masks, strict=True)):
                classes.setdefault(key, []).append(code)
            found.append([*classes.values()] if masks else [range(len(variable.choices))])
        return found

    def _independent(self, places: tuple[int, ...], chosen: Mapping[int, Any]) -> list[tuple[int, ...]]:
        """The variables in groups that no open condition links; each in order, so its first has no open parent."""
        group = {place: place for place in places}

        def root(place: int) -> int:
            while group[place] != place:
                place = group[place]
            return place

        for place in places:
            if not self._closed(place, chosen):
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
            codes = (None,) if self._closed(place, chosen) else range(len(self.variables[place].choices))
            for code in codes:
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
                counts = [*self._counts(group, chosen)]
                share = _below(rng, sum(n for _, n in counts))
                while share >= counts[0][1]:
                    share -= counts.pop(0)[1]
                alike = counts[0][0]
                code = alike[share % len(alike)]
                if code is not None:
                    codes[group[0]] = code
                fill(group[1:], {**chosen, group[0]: code})

        fill(tuple(range(len(self.variables))), {})
        return self.decode(codes[None])[0]


def _below(rng: np.random.Generator, n: int) -> int:
    """A whole number under n, uniform, however large n is."""
    bits = n.bit_length()
    while (drawn := int.from_bytes(rng.bytes((bits + 7) // 8)) >> -bits % 8) >= n:
        pass
    return drawn


def flatten(table: Mapping[str, Any] | Sequence[Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables and arrays as one mapping from dotted keys: `{"a": [{"b": 1}]}` is `{"a.0.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, item in table.items() if isinstance(table, Mapping) else enumerate(table):
        if isinstance(item, Mapping | list | tuple) and item:
            flat |= flatten(item, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = item
    return flat


def _allowed(variable: SpaceVariable, choice: Any) -> bool:
    if isinstance(choice, bool) != isinstance(variable.smallest, bool):  # True is 1 to Python, not to a reader
        return False
    try:
        variable.code(choice)
    except (KeyError, ValueError, TypeError):
        return False
    return True


def _check_default(variable: SpaceVariable) -> None:
    if not _allowed(variable, variable.default):
        raise UserError(f"default {variable.default!r} is none of {_choices_text(variable)}", key=(variable.key,))


def _continuous(variable: SpaceVariable) -> bool:
    return isinstance(variable, Float) and variable.step is None


def _always(condition: Condition, parent: SpaceVariable, beside: Iterable[Condition]) -> bool:
    """Whether a condition says nothing that the conditions beside it leave open."""
    return condition.choices >= {*parent.choices} and {*parent.when} <= {*beside}


def _value(variable: SpaceVariable) -> Variable:
    """A variable as a value; of one without steps the bounds stand for all its numbers."""
    bounds = (variable.smallest, variable.largest)
    return Variable(variable.key, bounds if _continuous(variable) else variable.choices)


def _choices_text(variable: SpaceVariable) -> str:
    if isinstance(variable, Categorical):
        return f"the choices {', '.join(c if isinstance(c, str) else json.dumps(c) for c in variable.choices)}"
    step = f" in steps of {variable.step}" if variable.step is not None else ""
    return f"{variable.low} to {variable.high}{step}"


def _revalued(tree: Any, variables: Mapping[str, SpaceVariable]) -> Any:
    if isinstance(tree, Variable):
        return Variable(tree.key, variables[tree.key].choices) if tree.key in variables else tree
    if isinstance(tree, Mapping):
        return {key: _revalued(item, variables) for key, item in tree.items()}
    return [_revalued(item, variables) for item in tree] if isinstance(tree, list) else tree


def _written(tree: Any, variables: Mapping[str, SpaceVariable], path: str, when: tuple[Condition, ...]) -> Any:
    """A part of a tree as TOML. `when`: the conditions that its place implies, which are not written."""
    if isinstance(tree, Variable):
        variable = variables[tree.key]
        own = {c.key: sorted(c.choices) for c in variable.when if c not in when}
        table = variable.to_table()
        return {**_long(table), "when": own} if own else table
    if isinstance(tree, Constant):
        return tree.number
    if isinstance(tree, Mapping):
        table: dict[str, Any] = {}
        for key, item in tree.items():
            if key != "blocks":
                written = _written(item, variables, f"{path}{key}.", when)
                # Writers of TOML put tables behind what is none: a list after them would lose its place.
                late = isinstance(item, Variable) and any(isinstance(x, dict) or _nested(x) for x in table.values())
                table[key] = _long(written) if late else written
        if isinstance(tree.get("blocks"), list):
            depth = variables.get(f"{path}depth")
            table["blocks"] = [
                _written(block, variables, f"{path}blocks.{i}.", when if depth is None else _reached(depth, i, when))
                for i, block in enumerate(tree["blocks"])
            ]
        return table
    if isinstance(tree, list):
        return [_written(item, variables, f"{path}{i}.", when) for i, item in enumerate(tree)]
    return tree


def _long(table: Any) -> dict[str, Any]:
    """A variable's long form, from its long form or its list of choices."""
    return table if isinstance(table, dict) else {"type": "categorical", "choices": table}


def _nested(item: Any) -> bool:
    return isinstance(item, list) and any(isinstance(x, Mapping | list) for x in item)


def _reached(depth: SpaceVariable, place: int, when: tuple[Condition, ...]) -> tuple[Condition, ...]:
    """The conditions of what stands in a block: the depth beside it reaches its place."""
    reached = Condition(depth.key, frozenset(d for d in depth.choices if d > place))
    return when if _always(reached, depth, when) else (*when, reached)


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
        key = ".".join(map(str, (*path, "depth")))
        variable = next((v for v in self.variables if v.key == key), None)
        depths: Sequence[Any] = variable.choices if isinstance(variable, Categorical | Int) else ()
        if isinstance(depth, Constant):
            depths = [depth.number]
        elif depth is None and written is not None:
            depths = [len(written)]
        reach = max(depths) if depths and all(type(d) is int and d >= 0 for d in depths) else -1
        if any(fault.key[: len(path) + 1] == (*path, "depth") for fault in self.faults):
            reach = -1
        elif reach < 0:
            self.faults.append(Fault("blocks need a `depth` beside them: whole numbers, 0 or more", path))
        elif reach > MOST_BLOCKS:
            self.faults.append(Fault(f"depth reaches {reach}: at most {MOST_BLOCKS:,} blocks", path))
        elif written is not None and (len(written) < reach or (variable is None and len(written) > reach)):
            self.faults.append(Fault(f"{len(written)} blocks, but depth reaches {reach}", (*path, "blocks")))
        if not 0 <= reach <= MOST_BLOCKS:  # its mistakes are told, those of the blocks are still to be found
            variable, reach = None, 1
        blocks: list[Any] = []
        for i in range(reach if written is None else len(written)):
            own = when if variable is None else _reached(variable, i, when)
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
            if _nested(item):
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
            if full in known and _continuous(known[full]):
                self.faults.append(Fault(f"{full} has no list of choices", (*path, "when", key)))
            elif full not in known:
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
        return _value(variable)


_EXPECTED = {int: "a whole number", float: "a number", bool: "true or false", list: "a list"}
