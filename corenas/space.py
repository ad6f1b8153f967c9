"""What an arch is, which archs there are, and how to draw one."""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from operator import itemgetter
from typing import Any, TypeAlias

import numpy as np
from attrs import evolve

from corenas.counting import Counter
from corenas.errors import Fault, UserError, collecting, did_you_mean, raise_if_any
from corenas.space_toml import read_space, write_space
from corenas.variables import TWICE, Categorical, Condition, Float, Int, Variable, always_holds, parent_of

Choice: TypeAlias = int | float | str | bool
Codes: TypeAlias = np.ndarray
"""Archs as a matrix (archs, variables): the index of each choice; of a continuous variable 0..1 between its bounds."""


class Arch(Mapping[str, Any]):
    """One point of a space: an immutable mapping `key -> choice`, hashable, equal by value. `dict(arch)` is JSON.

    Made by a `SearchSpace`, which makes it canonical: an inactive variable holds its default.
    """

    __slots__ = ("_choices", "_digest", "_hash")

    def __init__(self, choices: Mapping[str, Choice]) -> None:
        self._choices = dict(choices)
        self._hash = hash(frozenset(self._choices.items()))
        self._digest: str | None = None

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
        if self._digest is None:
            self._digest = hashlib.sha256(json.dumps(self._choices, sort_keys=True).encode()).hexdigest()[:16]
        return self._digest


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
        # For each variable its conditions: the parent's column, and whether each of its codes is allowed.
        self._masks: list[list[tuple[int, np.ndarray]]] = []
        columns = {key: column for column, key in enumerate(self.keys)}
        faults: list[Fault] = []
        for variable in self.variables:
            with collecting(faults, variable.key):
                if variable.key in self._variables:
                    raise UserError(TWICE)
                parents = [parent_of(condition.key, self._variables) for condition in variable.when]
                pairs = zip(parents, variable.when, strict=True)
                self._masks.append([(columns[parent.key], _mask(parent, condition)) for parent, condition in pairs])
                self._variables[variable.key] = variable
        raise_if_any(faults)
        self._dtype = np.int64 if self.finite else np.float64
        self._defaults = np.array([v.code_of(v.default) for v in self.variables], self._dtype)
        self._counter = Counter(self.variables, self._masks)

    # -- from and to TOML ---------------------------------------------------------------------------------------------

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> SearchSpace:
        """Return a space from its TOML table. A number is fixed, a list is `Categorical`, a table with `type` is typed.

        A key `"spec:train.optimizer.lr"` is a variable that overrides the spec, and no part of the model.
        Where a table has a `depth` and a `block`, the block's variables are made anew for each block that the depth
        can reach, under `blocks.0`, `blocks.1` and so on, and are active where the depth reaches it.
        Raises UserError with all mistakes, each with its key.

        >>> from corenas import SearchSpace
        >>> space = SearchSpace.from_table({"width": [4, 8], "depth": [1, 2], "block": {"kernel": [3, 5]}})
        >>> space.size
        12
        >>> dict(space.arch({"depth": 1, "blocks": [{"kernel": 3}]}))
        {'width': 8, 'depth': 1, 'blocks.0.kernel': 3, 'blocks.1.kernel': 5}
        """
        return cls(*read_space(table))

    def to_table(self) -> dict[str, Any]:
        """Return the TOML table of this space, blocks written out one by one."""
        return write_space(self.variables, self.tree)

    @property
    def finite(self) -> bool:
        """Whether its archs can be counted: no variable is continuous."""
        return not any(variable.continuous for variable in self.variables)

    def __getitem__(self, key: str) -> Variable:
        """Return a variable by its key. Raises UserError for one that there is not, with those that are close."""
        if key not in self._variables:
            raise UserError(f"no variable {key!r}", hint=did_you_mean(key, self.keys, "variables"))
        return self._variables[key]

    value = __getitem__
    """A variable, to make dimensions of."""

    def __contains__(self, arch: object) -> bool:
        if isinstance(arch, Arch) and self._sampler.could_have_drawn(arch._choices):
            return True
        try:
            return isinstance(arch, Mapping) and self.arch(arch) == arch
        except UserError:
            return False

    # -- narrower spaces ----------------------------------------------------------------------------------------------

    def narrow(self, choices: Mapping[str, Sequence[Choice]]) -> SearchSpace:
        """Return the space with fewer choices for some variables; `stages.*.depth` names all that match.

        Raises UserError for a key that is no variable and for a choice that it does not have.
        """
        allowed: dict[str, Variable] = {}
        faults: list[Fault] = []
        for pattern, wanted in choices.items():
            for key in fnmatch.filter(self.keys, pattern) or [pattern]:
                with collecting(faults, pattern, also=ValueError):
                    left, default = [*map(self[key].canonical, wanted)], self[key].default
                    allowed[key] = Categorical(key, left, default=default if default in left else None)
        raise_if_any(faults)
        return self.replace(allowed)

    def replace(self, variables: Mapping[str, Variable]) -> SearchSpace:
        """Return the space with other variables in the place of those of the same keys, each with fewer choices.

        Under which conditions they are active stays as it is.
        """
        narrower: dict[str, Variable] = {}
        for key, variable in self._variables.items():
            # A condition speaks of choices that are still there.
            conditions = [Condition(c.key, c.choices & {*narrower[c.key].choices}) for c in variable.when]
            when = [c for c in conditions if not always_holds(c, narrower[c.key], conditions)]
            narrower[key] = evolve(variables.get(key, variable), when=when)
        return SearchSpace(narrower.values(), _replaced(self.tree, narrower))

    def fix(self, choices: Mapping[str, Choice]) -> SearchSpace:
        """Return the space with some variables held at one choice, as `narrow` names them."""
        return self.narrow({key: [choice] for key, choice in choices.items()})

    # -- archs --------------------------------------------------------------------------------------------------------

    def arch(self, choices: Mapping[str, Any] | None = None) -> Arch:
        """Return the canonical arch of some choices, nested as in TOML or by key; what is left out holds its default.

        Raises UserError with every unknown key and every choice that its variable does not have.
        """
        chosen = {v.key: v.default for v in self.variables}
        faults: list[Fault] = []
        for key, choice in flatten(choices or {}).items():
            if key in chosen or not isinstance(choice, Mapping | list | tuple):  # an empty table says nothing
                with collecting(faults, key, also=ValueError):
                    chosen[key] = self[key].canonical(choice)
        raise_if_any(faults)
        active = self.active(self.encode([chosen]))[0]
        return Arch({v.key: chosen[v.key] if on else v.default for v, on in zip(self.variables, active, strict=True)})

    def default(self) -> Arch:
        """Return the arch of all defaults."""
        return self.arch()

    def smallest(self) -> Arch:
        """Return the arch of every number at its smallest, every other variable at its first choice."""
        return self.arch({v.key: v.smallest for v in self.variables})

    def largest(self) -> Arch:
        """Return the arch of every number at its largest, every other variable at its first choice."""
        return self.arch({v.key: v.largest for v in self.variables})

    def encode(self, archs: Iterable[Mapping[str, Any]]) -> Codes:
        """Return archs as a matrix (archs, variables) of choice indices."""
        rows = [arch._choices if isinstance(arch, Arch) else arch for arch in archs]
        codes = np.empty((len(self.keys), len(rows)), self._dtype)
        choices = zip(*map(self._choices_of, rows), strict=True)
        for column, v, own in zip(codes, self.variables, choices, strict=False):  # without rows there are none
            column[:] = [*map(v.code_of, own)]
        return codes.T

    @cached_property
    def _choices_of(self) -> Callable[[Mapping[str, Any]], Sequence[Any]]:
        """Gives the choices of an arch in the order of the variables."""
        return itemgetter(*self.keys) if len(self.keys) > 1 else lambda arch: [arch[key] for key in self.keys]

    def decode(self, codes: Codes) -> list[Arch]:
        """Return the archs of a matrix that `encode` or `draw` gave."""
        columns = [
            map(v.choice_of, (column if v.continuous else column.astype(np.int64)).tolist())
            for v, column in zip(self.variables, codes.T, strict=True)
        ]
        rows = zip(*columns, strict=True) if columns else [()] * len(codes)
        return [Arch(dict(zip(self.keys, row, strict=True))) for row in rows]

    # -- drawing, many archs at once ----------------------------------------------------------------------------------

    def active(self, codes: Codes) -> np.ndarray:
        """Return which variables of which archs are active: a boolean matrix of the same shape."""
        active = np.ones(codes.shape, bool)
        for columns, starts, parents, allowed in self._levels:
            met = allowed[np.arange(len(parents)), codes[:, parents].astype(np.int64)] & active[:, parents]
            active[:, columns] = np.logical_and.reduceat(met, starts, axis=1)
        return active

    @cached_property
    def _levels(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        """The conditions in portions, each on parents of earlier portions.

        Of a portion the columns that have conditions and where those of each begin; of each condition its parent's
        column and which of the parent's codes it allows.
        """
        depths: list[int] = []
        for parents in self._masks:
            depths.append(max((1 + depths[parent] for parent, _ in parents), default=0))
        levels = []
        for depth in range(1, max(depths, default=0) + 1):
            columns = [column for column, own in enumerate(depths) if own == depth]
            each = [self._masks[column] for column in columns]
            flat = [*itertools.chain(*each)]
            allowed = np.zeros((len(flat), max(len(mask) for _, mask in flat)), bool)
            for row, (_, mask) in enumerate(flat):
                allowed[row, : len(mask)] = mask
            starts = np.cumsum([0, *map(len, each)])[:-1]
            levels.append((np.array(columns), starts, np.array([parent for parent, _ in flat]), allowed))
        return levels

    def canonical(self, codes: Codes) -> Codes:
        """Return the same archs with inactive variables at their defaults."""
        return np.where(self.active(codes), codes, self._defaults)

    def admit(self, codes: Codes) -> Codes:
        """Return the same archs, canonical: all belong to it."""
        return self.canonical(codes)

    def _raw(self, rng: np.random.Generator, n: int) -> Codes:
        columns = [
            rng.integers(bounds.repeat(n)).reshape(len(bounds), n) if variable is None else variable.draw(rng, n)[None]
            for variable, bounds in self._runs
        ]
        return np.concatenate([np.zeros((0, n), self._dtype), *columns]).T

    @cached_property
    def _runs(self) -> list[tuple[Variable | None, np.ndarray]]:
        """What is drawn together: the bounds of variables with lists of choices, or one variable of another kind.

        numpy consumes its generator for an array of bounds as for one bound after the other.
        """
        runs: list[tuple[Variable | None, np.ndarray]] = []
        for listed, run in itertools.groupby(self.variables, _is_drawn_by_index):
            if listed:
                runs.append((None, np.array([len(variable.choices) for variable in run])))
            else:
                runs.extend((variable, np.zeros(0)) for variable in run)
        return runs

    def draw(self, rng: np.random.Generator, n: int) -> Codes:
        """Return n archs, each variable uniform, made canonical (`uniform`: SPOS, Once-for-All)."""
        return self.canonical(self._raw(rng, n))

    def mutated(self, codes: Codes, prob: float, rng: np.random.Generator) -> Codes:
        """Return archs with each variable drawn again with probability `prob`, and where it was not active before."""
        again = (rng.random(codes.shape) < prob) | ~self.active(codes)
        return self.canonical(np.where(again, self._raw(rng, len(codes)), codes))

    def moves(self, arch: Mapping[str, Any], step: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Return all ways to change one active variable of an arch: columns, and codes for `with_codes`.

        Of a continuous variable there is one, -1: any other number.
        step: of numbers only those to the next smaller and the next larger choice
        """
        codes = self.encode([arch])[0]
        columns = np.flatnonzero(self.active(codes[None])[0] & (self._counts > 1))
        pairs = []
        for column in columns.tolist():
            variable, own = self.variables[column], codes[column]
            if variable.continuous:
                pairs.append((column, -1))
            elif step and not isinstance(variable.choices[0], str | bool):
                ordered = [variable.code_of(choice) for choice in variable.possible]
                at = ordered.index(own)
                pairs += [(column, code) for code in (*ordered[max(at - 1, 0) : at], *ordered[at + 1 : at + 2])]
            else:
                pairs += [(column, code) for code in range(len(variable.choices)) if code != own]
        found = np.array(pairs, np.int64).reshape(-1, 2)
        return found[:, 0], found[:, 1]

    def with_codes(self, codes: Codes, columns: np.ndarray, new: np.ndarray, rng: np.random.Generator) -> Codes:
        """Return archs with another code in one column of each, -1 for any other; what that opens is drawn afresh."""
        rows, before, fresh, moved = np.arange(len(codes)), self.active(codes), self._raw(rng, len(codes)), codes.copy()
        own, counts = codes[rows, columns], self._counts[columns]
        others = (own + 1 + (rng.random(len(codes)) * (counts - 1)).astype(np.int64)) % counts
        endless = np.array([variable.continuous for variable in self.variables], bool)[columns]
        moved[rows, columns] = np.where(new >= 0, new, np.where(endless, fresh[rows, columns], others))
        return self.canonical(np.where(before, moved, fresh))

    def moved(self, codes: Codes, rng: np.random.Generator) -> Codes:
        """Return archs with the choice of one active variable of each changed (`with_codes`), all of them as likely.

        One that has no variable with another choice is left out.
        """
        free = self.active(codes) & (self._counts > 1)
        codes, free = codes[free.any(axis=1)], free[free.any(axis=1)]
        if not len(codes):
            return codes
        columns = np.where(free, rng.random(free.shape), -1.0).argmax(axis=1)
        return self.with_codes(codes, columns, np.full(len(codes), -1), rng)

    @cached_property
    def _counts(self) -> np.ndarray:
        return np.array([len(variable.choices) for variable in self.variables], np.int64)

    def crossed(self, first: Codes, second: Codes, rng: np.random.Generator) -> Codes:
        """Return archs with each variable from one of two parents, of those in which it is active.

        What is active in neither is drawn afresh.
        """
        in_first, in_second = self.active(first), self.active(second)
        take_first = np.where(in_first & in_second, rng.random(first.shape) < 0.5, in_first)
        child = np.where(take_first, first, np.where(in_second, second, self._raw(rng, len(first))))
        return self.canonical(child)

    # -- drawing, one arch --------------------------------------------------------------------------------------------

    def sample(self, rng: np.random.Generator) -> Arch:
        """Return an arch, each variable uniform: what `decode(draw(rng, 1))` draws, faster."""
        return self._sampler(rng)

    @cached_property
    def _sampler(self) -> _Sampler:
        return _Sampler(self.variables, self._masks, self._runs)

    def mutate(self, arch: Arch, prob: float, rng: np.random.Generator) -> Arch:
        """Return the arch with each variable drawn again with probability `prob` (`mutated` for many)."""
        return self.decode(self.mutated(self.encode([arch]), prob, rng))[0]

    def cross(self, first: Arch, second: Arch, rng: np.random.Generator) -> Arch:
        """Return an arch with each variable from one of two parents (`crossed` for many)."""
        return self.decode(self.crossed(self.encode([first]), self.encode([second]), rng))[0]

    # -- counting -----------------------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """How many distinct archs there are, exactly. Raises TypeError if a variable is continuous."""
        return self._counter.size

    def __iter__(self) -> Iterator[Arch]:
        """Yield all archs, each once, the last variable changing fastest. Raises TypeError if one is continuous."""
        return map(self._of_counted, self._counter)

    def sample_uniform_archs(self, rng: np.random.Generator) -> Arch:
        """Return an arch drawn uniformly over distinct archs, so that deep stages come up as often as they have archs.

        Raises TypeError if a variable is continuous.
        """
        return self._of_counted(self._counter.uniform(rng))

    def _of_counted(self, codes: Sequence[int]) -> Arch:
        """Return the arch of a code for each variable (-1: inactive)."""
        row = np.array(codes, self._dtype)
        return self.decode(np.where(row < 0, self._defaults, row)[None])[0]


_INACTIVE = -1
"""The code of an inactive variable while an arch is drawn."""


class _Sampler:
    """Draws archs one by one, without matrices: bit for bit those of `decode(draw(rng, 1))`, some times as fast.

    runs: which variables are drawn together
    """

    def __init__(
        self,
        variables: Sequence[Variable],
        masks: Sequence[Sequence[tuple[int, np.ndarray]]],
        runs: Sequence[tuple[Variable | None, np.ndarray]],
    ) -> None:
        self._keys = [variable.key for variable in variables]
        self._runs = runs
        # The last one, of code -1, is what an inactive variable holds.
        self._choices = [_ContinuousChoices(v) if v.continuous else (*v.choices, v.default) for v in variables]
        self._codes = None
        if not any(variable.continuous for variable in variables):
            self._codes = [{(type(c), c): code for code, c in enumerate(v.choices)} for v in variables]
            self._defaults = [variable.code_of(variable.default) for variable in variables]
        self._conditions = [
            (index, [(parent, allowed.tolist()) for parent, allowed in parents])
            for index, parents in enumerate(masks)
            if parents
        ]

    def __call__(self, rng: np.random.Generator) -> Arch:
        codes: list[Any] = []
        for variable, bounds in self._runs:
            codes += (rng.integers(bounds) if variable is None else variable.draw(rng, 1)).tolist()
        for index, parents in self._conditions:
            for parent, allowed in parents:
                if not allowed[codes[parent]]:  # an inactive parent allows nothing: the last entry
                    codes[index] = _INACTIVE
                    break
        choices = [own[code] for own, code in zip(self._choices, codes, strict=True)]
        return Arch(dict(zip(self._keys, choices, strict=True)))

    def could_have_drawn(self, choices: Mapping[str, Any]) -> bool:
        """Return whether it draws this very arch, numbers of the same types too; False if a variable is continuous."""
        if self._codes is None or len(choices) != len(self._keys):
            return False
        try:
            codes = [own[type(choices[key]), choices[key]] for key, own in zip(self._keys, self._codes, strict=True)]
        except (KeyError, TypeError):
            return False
        for index, parents in self._conditions:
            if not all(allowed[codes[parent]] for parent, allowed in parents):
                if codes[index] != self._defaults[index]:
                    return False
                codes[index] = _INACTIVE
        return True


class _ContinuousChoices:
    """The numbers of a continuous variable by their codes, and what it holds where it is inactive."""

    def __init__(self, variable: Variable) -> None:
        self._variable = variable
        self._default = variable.choice_of(variable.code_of(variable.default))

    def __getitem__(self, code: float) -> float:
        return self._default if code == _INACTIVE else self._variable.choice_of(code)


def _is_drawn_by_index(variable: Variable) -> bool:
    """Return whether a variable is drawn as a whole number under the number of its choices, as `Variable` does it."""
    if isinstance(variable, Int):
        return type(variable).draw is Int.draw and variable.distribution is None
    if isinstance(variable, Float) and variable.log:
        return False
    return not variable.continuous and type(variable).draw in (Variable.draw, Float.draw)


def unseen(
    draw: Callable[[], Arch], n: int, seen: set[str], tries: float = math.inf, patience: int = 1000
) -> list[Arch]:
    """Draw up to n archs that were not seen before, and add them to what was seen.

    seen: digests of archs, which a searcher keeps in its state
    tries: how often to draw at most
    patience: after so many draws in a row that were all seen, nothing new is left to find
    """
    archs: list[Arch] = []
    fruitless = 0
    while len(archs) < n and tries > 0 and fruitless < patience:
        tries -= 1
        arch = draw()
        if arch.digest in seen:
            fruitless += 1
            continue
        fruitless = 0
        seen.add(arch.digest)
        archs.append(arch)
    return archs


def flatten(table: Mapping[str, Any] | Sequence[Any], prefix: str = "", lists: bool = True) -> dict[str, Any]:
    """Return nested tables and arrays as one mapping from dotted keys: `{"a": [{"b": 1}]}` is `{"a.0.b": 1}`.

    lists: False leaves arrays whole
    """
    flat: dict[str, Any] = {}
    for key, item in table.items() if isinstance(table, Mapping) else enumerate(table):
        if item and (isinstance(item, Mapping) or (lists and isinstance(item, list | tuple))):
            flat |= flatten(item, f"{prefix}{key}.", lists)
        else:
            flat[f"{prefix}{key}"] = item
    return flat


def _mask(parent: Variable, condition: Condition) -> np.ndarray:
    """Return which codes of a parent a condition allows; -1, for an inactive one, it does not."""
    return np.array([*(choice in condition.choices for choice in parent.choices), False])


def _replaced(tree: Any, variables: Mapping[str, Variable]) -> Any:
    """Return a tree with other variables of the same keys."""
    if isinstance(tree, Variable):
        return variables[tree.key]
    if isinstance(tree, Mapping):
        return {key: _replaced(item, variables) for key, item in tree.items()}
    return [_replaced(item, variables) for item in tree] if isinstance(tree, list) else tree
