"""Gains of single choices, put together by a mixed-integer programme."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from attrs import field, frozen
from attrs.validators import ge, optional

from corenas.contracts import Problem, Surroundings
from corenas.hookspecs import hookimpl

if TYPE_CHECKING:
    from corenas_searcher_additive.search import AdditiveSearch


@frozen
class Additive:
    """Fits what each choice gains, and solves for the best arch under the constraints by mixed-integer programming.

    A linear model of the score is fitted to all trials; scipy's `milp` makes it largest. Conditions and constraints are
    linear rows; costs, which are not linear, are linearised where the solution lies, and checked exactly. With several
    objectives it is their weighted sum; in Pareto mode each solution has random weights.

    initial: archs that are drawn at random first; left out, half of the trials
    per_round: solutions that are measured before the gains are fitted again
    """

    initial: int | None = field(default=None, validator=optional(ge(2)))
    per_round: int = field(default=10, validator=ge(1))

    def idle(self, around: Surroundings) -> Mapping[str, str]:
        """Return options that do nothing, and that nothing is learnt in a search that ends before it begins to."""
        return around.idle_searcher(self.initial)

    def start(self, problem: Problem, rng: np.random.Generator) -> AdditiveSearch:
        """Return a search whose first archs are random, unless earlier searches of the run have measured enough."""
        from corenas_searcher_additive.search import AdditiveSearch

        return AdditiveSearch(self, problem, rng)


@hookimpl
def corenas_searchers() -> Mapping[str, type]:
    """Offer the searcher "additive"."""
    return {"additive": Additive}
