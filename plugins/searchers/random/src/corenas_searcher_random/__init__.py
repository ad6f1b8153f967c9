"""Random search: the searcher to compare others with, and the one to read when writing one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from attrs import frozen

from corenas.contracts import Json, Problem
from corenas.hookspecs import hookimpl
from corenas.objectives import Trial
from corenas.space import Arch, unseen


@frozen
class Random:
    """Asks distinct archs, drawn from those that obey the constraints (Li and Talwalkar 2019, arXiv:1902.07638)."""

    def start(self, problem: Problem, rng: np.random.Generator) -> RandomSearch:
        """Return a search that ends when a thousand draws in a row bring nothing new."""
        return RandomSearch(problem, rng)


class RandomSearch:
    """Remembers what it asked, so as to ask it once."""

    def __init__(self, problem: Problem, rng: np.random.Generator) -> None:
        self.problem = problem
        self.rng = rng
        self.seen: set[str] = set()

    def ask(self, n: int) -> list[Arch]:
        """Return up to n new archs; fewer where the space has no more."""
        return unseen(lambda: self.problem.space.sample(self.rng), n, self.seen)

    def tell(self, trials: Sequence[Trial]) -> None:
        """Results change nothing; archs that were measured elsewhere need no asking."""
        self.seen.update(trial.arch.digest for trial in trials)

    def state_dict(self) -> dict[str, Json]:
        """What was asked, and the generator."""
        return {"seen": sorted(self.seen), "rng": self.rng.bit_generator.state}

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Go on from a state that `state_dict` gave."""
        self.seen = set(state["seen"])
        self.rng.bit_generator.state = state["rng"]


@hookimpl
def corenas_searchers() -> dict[str, type]:
    """The searcher "random"."""
    return {"random": Random}
