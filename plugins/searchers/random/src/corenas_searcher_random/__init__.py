"""Random search: the searcher to compare others with, and the one to read when writing one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from attrs import field, frozen
from attrs.validators import ge

from corenas.contracts import Json, Problem
from corenas.errors import UserError, did_you_mean
from corenas.hookspecs import hookimpl
from corenas.objectives import Trial
from corenas.space import Arch, unseen
from corenas_searcher_random.strata import Strata


@frozen
class Random:
    """Asks distinct archs, drawn from those that obey the constraints (Li and Talwalkar 2019, arXiv:1902.07638).

    stratify: a cost, "flops" for instance, of which each range is to come up as often as any other; left out, archs
        come as they are drawn, and most of them are of middling cost
    bins: into how many equal ranges that cost is cut, between the least and the most of 4096 draws
    """

    stratify: str | None = None
    bins: int = field(default=10, validator=ge(2))

    def start(self, problem: Problem, rng: np.random.Generator) -> RandomSearch:
        """Return a search that ends when a thousand draws in a row bring nothing new.

        Raises UserError for a cost that archs do not have.
        """
        if self.stratify is None:
            return RandomSearch(problem, rng)
        costs = {} if problem.cost is None else problem.cost(problem.space.draw(np.random.default_rng(0), 1))
        if self.stratify not in costs:
            hint = did_you_mean(self.stratify, costs, "costs") if costs else "archs of this search have no costs"
            raise UserError(f"no cost {self.stratify!r}", key=("stratify",), hint=hint)
        return RandomSearch(problem, rng, Strata(problem, self.stratify, self.bins))


class RandomSearch:
    """Remembers what it asked, so as to ask it once.

    strata: None where archs come as they are drawn
    """

    def __init__(self, problem: Problem, rng: np.random.Generator, strata: Strata | None = None) -> None:
        self.problem = problem
        self.rng = rng
        self.strata = strata
        self.seen: set[str] = set()

    def ask(self, n: int) -> list[Arch]:
        """Return up to n new archs; fewer where the space has no more."""
        asked: list[Arch] = []
        if self.strata is not None:
            draws = self.strata.draws(self.rng)
            for _ in range(n):
                found = unseen(lambda: next(draws), 1, self.seen, tries=self.strata.bins)
                self.strata.turn = (self.strata.turn + 1) % self.strata.bins
                asked += found
        # Ranges in which everything was asked are made up for.
        return asked + unseen(lambda: self.problem.space.sample(self.rng), n - len(asked), self.seen)

    def tell(self, trials: Sequence[Trial]) -> None:
        """Results change nothing; archs that were measured elsewhere need no asking."""
        self.seen.update(trial.arch.digest for trial in trials)

    def state_dict(self) -> dict[str, Json]:
        """Return what was asked, whose turn it is, and the generator."""
        turn = None if self.strata is None else self.strata.turn
        return {"seen": sorted(self.seen), "turn": turn, "rng": self.rng.bit_generator.state}

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Go on from a state that `state_dict` gave."""
        self.seen = set(state["seen"])
        if self.strata is not None:
            self.strata.turn = state["turn"]
        self.rng.bit_generator.state = state["rng"]


@hookimpl
def corenas_searchers() -> dict[str, type]:
    """Offer the searcher "random"."""
    return {"random": Random}
