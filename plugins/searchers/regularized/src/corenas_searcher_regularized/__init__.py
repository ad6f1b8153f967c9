"""Regularized evolution: the best of a sample is mutated, the oldest dies (Real et al. 2019)."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np
from attrs import field, frozen
from attrs.validators import ge, optional

from corenas.contracts import Json, Problem, Surroundings
from corenas.hookspecs import hookimpl
from corenas.objectives import Trial
from corenas.space import Arch, SearchSpace, unseen

TRIES = 16
"""How many one-variable changes of a parent are drawn at once, to find one that obeys the constraints."""


@frozen
class Regularized:
    """Mutates the best of a sample of a population whose oldest member dies (Real et al. 2019, arXiv:1802.01548).

    A mutant differs from its parent in one variable. The method knows one objective: several are added up by their
    weights, in Pareto mode as well.

    population: how many of the latest trials can be parents, and how many archs are random at first; left out, an
        eighth of the search's trials, but from 20 to the paper's 100
    sample: how many of them are drawn, with replacement, of which the best is the parent; left out, a quarter
    """

    population: int | None = field(default=None, validator=optional(ge(1)))
    sample: int | None = field(default=None, validator=optional(ge(1)))

    def idle(self, around: Surroundings) -> Mapping[str, str]:
        """Return options that do nothing, and that nothing is learnt in a search that ends before it begins to."""
        return around.idle_searcher(self.population)

    def start(self, problem: Problem, rng: np.random.Generator) -> RegularizedSearch:
        """Return a search whose first population is random."""
        return RegularizedSearch(self, problem, rng)


class RegularizedSearch:
    """A queue of trials; archs asked together are mutants of one and the same population.

    members: the trials that count, the oldest first
    begun: how many of the first, random archs were asked
    """

    def __init__(self, options: Regularized, problem: Problem, rng: np.random.Generator) -> None:
        self.population = options.population or min(max(problem.budget // 8, 20), 100)
        self.sample = options.sample or max(self.population // 4, 1)
        self.problem = problem
        self.rng = rng
        self.space = SearchSpace(problem.space.variables)
        self.members: deque[Trial] = deque(maxlen=self.population)
        self.begun = 0
        self.seen: set[str] = set()

    def ask(self, n: int) -> list[Arch]:
        """Return up to n new archs; fewer where the space has no more."""
        first = min(n, max(0, self.population - self.begun)) if self.members else n
        asked = self._random(first)
        self.begun += len(asked)
        if len(asked) == first < n:
            scores = np.array([self.problem.objectives.score(trial) for trial in self.members])
            asked += unseen(lambda: self._mutant(scores), n - first, self.seen, tries=10 * n)
            asked += self._random(n - len(asked))
        return asked

    def tell(self, trials: Sequence[Trial]) -> None:
        """Add the trials that count to the population, of which the oldest die."""
        self.seen.update(trial.arch.digest for trial in trials)
        score = self.problem.objectives.score
        self.members.extend(trial for trial in trials if math.isfinite(score(trial)))

    def state_dict(self) -> dict[str, Json]:
        """Return the population, what was asked, and the generator."""
        return {
            "members": [trial.to_json() for trial in self.members],
            "begun": self.begun,
            "seen": sorted(self.seen),
            "rng": self.rng.bit_generator.state,
        }

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Go on from a state that `state_dict` gave."""
        self.members = deque(map(Trial.from_json, state["members"]), maxlen=self.population)
        self.begun = state["begun"]
        self.seen = set(state["seen"])
        self.rng.bit_generator.state = state["rng"]

    def _random(self, n: int) -> list[Arch]:
        return unseen(lambda: self.problem.space.sample(self.rng), n, self.seen)

    def _mutant(self, scores: np.ndarray) -> Arch:
        drawn = self.rng.integers(len(scores), size=self.sample)
        parent = self.members[drawn[scores[drawn].argmax()]].arch
        moved = self.space.moved(self.space.encode([parent]).repeat(TRIES, axis=0), self.rng)
        inside = self.problem.space.admit(moved)
        if len(inside):
            return self.problem.space.decode(inside[:1])[0]
        # Every change of one variable leaves the constraints: more at once.
        return self.problem.space.mutate(parent, 2 / max(len(self.space.variables), 1), self.rng)


@hookimpl
def corenas_searchers() -> dict[str, type]:
    """Offer the searcher "regularized"."""
    return {"regularized": Regularized}
