"""What is searched: variables of lists of choices and of ranges of numbers, and when they are active."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
from attrs import field, frozen
from attrs.converters import optional

from corenas.errors import UserError, did_you_mean
from corenas.ranges import chances
from corenas.value import Choices, Expression, Value, largest_of

OVERRIDE = "spec:"
"""What the key of a variable begins with that overrides a key of the spec."""

TWICE = "this variable stands twice"
"""What is said of a key that two variables have."""

MOST_CHOICES = 1_000_000
"""The largest number of choices of one variable."""


@frozen
class Condition:
    """When a variable is active: its parent is active and holds one of these choices."""

    key: str
    choices: frozenset[Any]


@frozen(slots=False, cache_hash=True)
class Variable(Value):
    """What is searched: one of several choices, all numbers or all strings; as a value the one that an arch holds.

    Raises ValueError for no choices, for one that stands twice and for a default that is none of them.

    default: what an arch holds where nothing else is said: the largest of numbers, the first of strings
    when: under which conditions it is active, all of them together
    """

    key: str
    choices: Sequence[Any]
    default: Any = field(default=None, kw_only=True)
    when: tuple[Condition, ...] = field(default=(), converter=tuple, kw_only=True)

    def __attrs_post_init__(self) -> None:
        choices = self._all()
        if not choices:
            raise ValueError("a variable needs at least one choice")
        kinds = {*map(_kind, choices)}
        if len(kinds) > 1 or None in kinds:
            raise ValueError(f"choices are all numbers or all strings, not {list(choices)}")
        if len({*choices}) < len(choices):
            raise ValueError(f"a choice stands twice in {list(choices)}")
        object.__setattr__(self, "choices", choices)
        object.__setattr__(self, "default", self.canonical(self.largest if self.default is None else self.default))

    def _all(self) -> tuple[Any, ...]:
        return tuple(self.choices)

    @property
    def continuous(self) -> bool:
        """Whether it can be any number between its two choices."""
        return False

    @cached_property
    def domains(self) -> Mapping[str, Sequence[Any]]:  # type: ignore[override]
        """Its own key and choices."""
        return {self.key: self.choices}

    @cached_property
    def possible(self) -> tuple[Any, ...]:
        """Its choices in order."""
        return tuple(sorted(self.choices))

    @property
    def smallest(self) -> Any:
        """The smallest of numbers, the first of strings."""
        return self.choices[0] if isinstance(self.choices[0], str) else min(self.choices)

    @property
    def largest(self) -> Any:
        """The largest of numbers, the first of strings."""
        return largest_of(self.choices)

    def __call__(self, choices: Choices) -> Any:
        """Return the number, or the column, of some choices."""
        choice = choices[self.key]
        # numpy's sum of truth values is their "or", Python's counts them
        return choice.astype(np.int64) if isinstance(choice, np.ndarray) and choice.dtype == bool else choice

    @cached_property
    def code_of(self) -> Callable[[Any], float]:
        """Gives the code of a choice: its index. Raises KeyError for one that is not among the choices."""
        return {choice: code for code, choice in enumerate(self.choices)}.__getitem__

    @cached_property
    def choice_of(self) -> Callable[[Any], Any]:
        """Gives the choice of a code."""
        return self.choices.__getitem__

    @property
    def chances(self) -> np.ndarray:
        """How likely each of its choices is drawn; they sum to 1. A continuous one has none."""
        return np.full(len(self.choices), 1 / len(self.choices))

    @cached_property
    def _cumulative(self) -> np.ndarray:
        return np.cumsum(self.chances)

    def _drawn(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """Return the codes of n choices that are not equally likely."""
        # the last bound is 1 but for rounding
        return np.minimum(np.searchsorted(self._cumulative, rng.random(n), side="right"), len(self.choices) - 1)

    def draw(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """Return the codes of n uniform choices."""
        return rng.integers(len(self.choices), size=n)

    def canonical(self, choice: Any) -> Any:
        """Return this variable's own choice that equals `choice`: 224 for 224.0. Raises ValueError if there is none."""
        try:
            code = self.code_of(choice)
        except (KeyError, ValueError, TypeError):
            code = None
        if code is None or _kind(choice) != _kind(self.choices[0]):  # True is 1 to Python, not to a reader
            raise ValueError(f"{choice!r} is none of {self.description}")
        return float(choice) if self.continuous else self.choice_of(code)

    @property
    def description(self) -> str:
        """What it can be, in words."""
        return f"the choices {', '.join(c if isinstance(c, str) else json.dumps(c) for c in self.choices)}"


def _kind(choice: Any) -> type | None:
    """Return what does not mix among choices, strings, truth values or numbers; None for what can be no choice."""
    if isinstance(choice, str | bool):
        return type(choice)
    return float if isinstance(choice, int | float) and abs(choice) <= sys.float_info.max else None


Categorical = Variable
"""A variable of a list of choices."""


@frozen(slots=False, cache_hash=True)
class Int(Variable):
    """A whole number from `low` to `high`, both included, every `step`. Raises ValueError if the steps miss `high`.

    distribution: how it is drawn, where not uniformly: "log", "power2", "power2_or_log", "normal" or "log_normal"
        (`corenas.ranges`); "power2" has powers of 2 alone, "power2_or_log" those below the step, then its multiples
    """

    low: int
    high: int
    step: int = 1
    distribution: Literal["log", "power2", "power2_or_log", "normal", "log_normal"] | None = None
    choices: Sequence[int] = field(init=False)

    def _all(self) -> tuple[int, ...]:
        evenly = (*_before(self.low, self.high, self.step), self.high)  # too many of them are told of
        return evenly if self.distribution is None else (*chances(self.distribution, self.low, self.high, self.step),)

    @cached_property
    def chances(self) -> np.ndarray:  # type: ignore[override]
        """How likely each of its choices is drawn."""
        if self.distribution is None:
            return super().chances
        return np.array([*chances(self.distribution, self.low, self.high, self.step).values()])

    def draw(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """Return the codes of n choices, as likely as its distribution says."""
        return super().draw(rng, n) if self.distribution is None else self._drawn(rng, n)

    @property
    def description(self) -> str:
        """What it can be, in words."""
        steps = f"{self.low} to {self.high} in steps of {self.step}"
        return steps if self.distribution in (None, "log", "normal", "log_normal") else super().description


@frozen(slots=False, cache_hash=True)
class Float(Variable):
    """A number from `low` to `high`, both included: every `step`, or any; `log` draws its logarithm uniformly.

    Without steps it is continuous: the code of a number says where it lies between the bounds, 0..1, on the scale;
    its choices are the bounds. With both, bounds are multiples of the step and draws round up to one, as those of an
    `Int` with the distribution "log".
    Raises ValueError for bounds in the wrong order, and a log scale that reaches 0.
    """

    low: float = field(converter=float)
    high: float = field(converter=float)
    log: bool = False
    step: float | None = field(default=None, converter=optional(float))
    choices: Sequence[float] = field(init=False)

    def _all(self) -> tuple[float, ...]:
        if not all(map(math.isfinite, (self.low, self.high, self.high - self.low, self.step or 0))):
            raise ValueError(f"expected finite numbers, found {self.description}")
        if self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"a log scale needs low above 0, found {self.low}")
        if self.step is None:
            return (self.low, self.high) if self.low < self.high else (self.low,)
        # The last bound is exact and the others carry no noise such as 0.30000000000000004.
        choices = (*(float(f"{x:.15g}") for x in _before(self.low, self.high, self.step)), self.high)
        if len({*choices}) < len(choices):
            raise ValueError(f"step {self.step} is lost beside numbers of the size of {self.high}")
        if self.log and not math.isclose(self.low / self.step, round(self.low / self.step), rel_tol=1e-9):
            raise ValueError(f"on a log scale {self.low} and {self.high} have to be multiples of the step {self.step}")
        return choices

    @property
    def continuous(self) -> bool:
        """Whether it has no steps."""
        return self.step is None

    @cached_property
    def chances(self) -> np.ndarray:  # type: ignore[override]
        """How likely each of its steps is drawn."""
        if self.step is None or not self.log:
            return super().chances
        return np.array([*chances("log", round(self.low / self.step), round(self.high / self.step), 1).values()])

    def draw(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """Return the codes of n numbers, uniform on the scale."""
        if self.continuous:
            return rng.random(n)
        return self._drawn(rng, n) if self.log else super().draw(rng, n)

    @cached_property
    def code_of(self) -> Callable[[Any], float]:
        """Gives the code of a number. Raises KeyError or ValueError for one that is not among the choices."""
        return self._fraction if self.continuous else super().code_of

    @cached_property
    def choice_of(self) -> Callable[[Any], float]:
        """Gives the number of a code."""
        return self._number if self.continuous else super().choice_of

    @property
    def description(self) -> str:
        """What it can be, in words."""
        return f"{self.low} to {self.high}" + ("" if self.continuous else f" in steps of {self.step}")

    def _fraction(self, number: float) -> float:
        if not self.low <= number <= self.high:
            raise ValueError(number)
        scale = math.log if self.log else float
        low, high = scale(self.low), scale(self.high)
        return (scale(number) - low) / (high - low) if low < high else 0.0

    def _number(self, fraction: float) -> float:
        if self.log:
            number = self.low * (self.high / self.low) ** fraction
        else:
            number = self.low + fraction * (self.high - self.low)
        return min(self.high, max(self.low, number))


def _before(low: float, high: float, step: float) -> list[Any]:
    """Return the numbers from low up to, without, high. Raises ValueError if they are too many or miss it."""
    if high - low >= MOST_CHOICES * step > 0:
        raise ValueError(f"more than {MOST_CHOICES:,} choices: take a larger step")
    steps = (high - low) / step if step > 0 else -1.0
    if steps < 0 or not math.isclose(steps, round(steps), abs_tol=1e-9):
        raise ValueError(f"{low} to {high} in steps of {step} never ends on high")
    return [low + i * step for i in range(round(steps))]


def variables_of(value: Value) -> Iterator[Any]:
    """Yield the variables that a value is computed from, each time that it reads them."""
    if isinstance(value, Variable):
        yield value
    for argument in value.arguments if isinstance(value, Expression) else ():
        yield from variables_of(argument)


TYPES: Mapping[str, type[Variable]] = {"categorical": Categorical, "int": Int, "float": Float}
"""The types of variables as TOML names them."""


def parent_of(condition_key: str, earlier: Mapping[str, Variable]) -> Variable:
    """Return the variable that a condition is on. Raises UserError if it does not come earlier or is continuous."""
    if condition_key not in earlier:
        hint = did_you_mean(condition_key, earlier, "variables before it")
        raise UserError(f"condition on {condition_key!r}, which is no earlier variable", hint=hint)
    if earlier[condition_key].continuous:
        raise UserError(f"condition on {condition_key!r}, which has no list of choices")
    return earlier[condition_key]


def always_holds(condition: Condition, parent: Variable, beside: Iterable[Condition]) -> bool:
    """Return whether a condition says nothing that the conditions beside it leave open."""
    return condition.choices >= {*parent.choices} and {*parent.when} <= {*beside}
