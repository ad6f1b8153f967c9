"""Any of nevergrad's optimizers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from attrs import field, frozen
from attrs.validators import ge

from corenas.contracts import Problem
from corenas.hookspecs import hookimpl

if TYPE_CHECKING:
    from corenas_searcher_nevergrad.search import NevergradSearch


@frozen
class Nevergrad:
    """Asks what an optimizer of nevergrad asks (Bennet et al. 2021, doi:10.1145/3460310.3460312).

    To it an arch is one array of whole numbers, the places of its choices. In Pareto mode it hears all objectives,
    otherwise their weighted sum.

    optimizer: the name of any of them, as nevergrad lists them: "NGOpt", "DiscreteOnePlusOne", "TwoPointsDE", …; left
        out, "DiscreteLenglerOnePlusOne", in Pareto mode "TwoPointsDE"
    workers: how many archs it is to reckon with at once; those of `search.batch`
    """

    optimizer: str | None = None
    workers: int = field(default=10, validator=ge(1))

    def start(self, problem: Problem, rng: np.random.Generator) -> NevergradSearch:
        """Return a search. Raises UserError for a name that nevergrad does not know."""
        from corenas_searcher_nevergrad.search import NevergradSearch

        return NevergradSearch(self, problem, rng)


@hookimpl
def corenas_searchers() -> Mapping[str, type]:
    """Offer the searcher "nevergrad"."""
    return {"nevergrad": Nevergrad}
