"""A narrower space: which choices of a space are left, why, and its TOML."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import tomli_w
from attrs import frozen

from corenas.space import SearchSpace
from corenas.variables import Categorical, Float, Int, Variable
from corenas_tool_sweep import analysis
from corenas_tool_sweep.analysis import Analysis

LEAST_MASS = 0.025
"""A choice without order goes if the best arch has it less often."""


@frozen(eq=False)
class Narrowed:
    """A space with fewer choices.

    space: None where nothing can be narrowed at all
    changed: the keys whose choices are fewer
    reasons: for each variable why it is as it is, the most certain first
    """

    space: SearchSpace | None
    changed: Sequence[str]
    reasons: Sequence[str]


def narrow(found: Analysis) -> Narrowed:
    """Return the space of the first population without what is beyond doubt not among its best archs.

    A variable is narrowed where its effect at equal cost is beyond doubt and 100 archs or more use it. Ordered ones
    keep the good range, others lose the choices that the best arch seldom has.
    """
    population = found.populations[0]
    if population.space is None:
        return Narrowed(None, (), ["no space is known: `space` names its file"])
    if found.sweep.split:
        return Narrowed(None, (), ["a part of a population says nothing of the whole space: leave `split` out"])
    replaced: dict[str, Variable] = {}
    reasons = []
    for known in found.variables[0]:
        if known.key not in population.space.keys:
            reasons.append(f"{known.key}: {_why(known)}; made of others, so that only a rule of yours can narrow it")
            continue
        before = population.space[known.key]
        after = _narrower(before, known) if known.matters else before
        if after is before:
            rest = "; all of it is good" if known.matters else ""
            reasons.append(f"{known.key}: kept, {_why(known)}{rest}")
            continue
        replaced[known.key] = after
        default = "" if after.default == before.default else f"; its default is now {after.default}"
        reasons.append(f"{known.key}: {_said(after)} of {_said(before)}, {_why(known)}{_beside(known)}{default}")
    return Narrowed(population.space.replace(replaced), [*replaced], reasons)


def _narrower(variable: Variable, known: analysis.Variable) -> Variable:
    """Return a variable without what is not good; itself if that is nothing, or would leave nothing."""
    if known.good is not None:
        low, middle, high = known.good
        if isinstance(variable, Float) and variable.continuous:
            if (low, high) == variable.choices or low >= high:
                return variable
            default = variable.default if low <= variable.default <= high else middle
            return attrs.evolve(variable, low=low, high=high, default=default)
        left = [choice for choice in variable.choices if low <= choice <= high]
        instead = min(left, key=lambda choice: abs(choice - middle), default=None)
    else:
        masses = {row["choice"]: row["mass"] for row in known.choices}
        left = [choice for choice in variable.choices if masses.get(analysis.label(str(choice)), 0) >= LEAST_MASS]
        instead = max(left, key=lambda choice: masses[str(choice)], default=None)
    if not left or len(left) == len(variable.choices):
        return variable
    default = variable.default if variable.default in left else instead
    if isinstance(variable, Int) and left == [*range(left[0], left[-1] + 1, variable.step)] and len(left) > 1:
        return attrs.evolve(variable, low=left[0], high=left[-1], default=default)
    return Categorical(variable.key, left, default=default)


def _why(known: analysis.Variable) -> str:
    p = "" if known.holm is None else f" (Holm p {known.holm:.2g}, {known.n} archs)"
    return f"{known.verdict}{p}"


def _beside(known: analysis.Variable) -> str:
    if known.good is None or known.chance is None:
        return ""
    low, high = (analysis.label(end) for end in known.chance["range"])
    return f"; without effect the range were {low} to {high}, as narrow in {known.chance['as_narrow']:.0%} of shuffles"


def _said(variable: Variable) -> str:
    if variable.continuous:
        return " to ".join(f"{end:.4g}" for end in variable.choices)
    return ", ".join(map(str, variable.choices))


def status(confirmed: Mapping[str, Any] | None) -> str:
    """Return in words whether a narrowed space has held on new archs."""
    if confirmed is None:
        return "unconfirmed: never tested on archs other than those that suggested it"
    how = "at equal cost" if confirmed["view"] == "equal_cost" else "whatever they cost"
    text = f"tested on {confirmed['archs']} new archs, {how}: {confirmed['verdict']}"
    if "interval" not in confirmed:
        return text
    low, high = confirmed["interval"]
    return (
        f"{text} than the whole space (difference of errors {confirmed['difference']:+.2f} [{low:+.2f}, {high:+.2f}])"
    )


def to_toml(narrowed: Narrowed, name: str, confirmed: Mapping[str, Any] | None = None) -> str:
    """Return a narrowed space as TOML, the reasons as comments above it."""
    assert narrowed.space is not None
    head = status(confirmed)
    lines = [
        f"# {head}",
        f"# The space of {name}, narrowed by `corenas sweep`. Fewer choices: {', '.join(narrowed.changed) or 'none'}.",
        "# To confirm it, measure new archs of it at random and sweep both: corenas sweep OLD NEW",
        *(f"# {re.sub(r'[^ -~]', '?', reason)}" for reason in narrowed.reasons),
    ]
    return "\n".join([*lines, "", tomli_w.dumps(narrowed.space.to_table())])
