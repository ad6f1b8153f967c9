"""Bayesian optimisation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from attrs import field, frozen
from attrs.validators import ge

from corenas.contracts import Problem, Surroundings
from corenas.hookspecs import hookimpl

if TYPE_CHECKING:
    from corenas_searcher_bayesian.search import BayesianSearch


@frozen
class Bayesian:
    """Asks where a Gaussian process expects the largest improvement, with BoTorch's model (arXiv:1910.06403).

    Archs evolve on an upper confidence bound, inside the constraints, and of what has evolved those are asked that
    promise most together: by expected improvement, in Pareto mode that of the hypervolume. Otherwise several objectives
    are weighed.

    initial: archs that are drawn at random first
    population: archs of a generation on the bound
    generations: how many there are for one `ask`
    most: to so many trials, the best and the last ones, a process is fitted; it takes their number cubed
    """

    initial: int = field(default=20, validator=ge(3))
    population: int = field(default=200, validator=ge(2))
    generations: int = field(default=20, validator=ge(0))
    most: int = field(default=400, validator=ge(10))

    def idle(self, around: Surroundings) -> Mapping[str, str]:
        """Return options that do nothing, and that nothing is learnt in a search that ends before it begins to."""
        return around.idle_searcher(self.initial)

    def start(self, problem: Problem, rng: np.random.Generator) -> BayesianSearch:
        """Return a search whose first archs are random."""
        from corenas_searcher_bayesian.search import BayesianSearch

        return BayesianSearch(self, problem, rng)


@hookimpl
def corenas_searchers() -> Mapping[str, type]:
    """Offer the searcher "bayesian"."""
    return {"bayesian": Bayesian}
