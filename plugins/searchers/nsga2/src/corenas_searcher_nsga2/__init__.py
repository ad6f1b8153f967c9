"""NSGA-II: the genetic search for several objectives (Deb et al. 2002)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from attrs import field, frozen
from attrs.validators import ge, le, optional

from corenas.contracts import Json, Problem, Surroundings
from corenas.hookspecs import hookimpl
from corenas.objectives import Trial
from corenas.space import Arch, unseen


@frozen
class NSGA2:
    """Breeds the best fronts, the least crowded first (NSGA-II, Deb et al. 2002, doi:10.1109/4235.996017).

    Trials that break a constraint come after all that break none, those that break it least first. With one objective,
    or several added up, fronts are single trials and it is a genetic algorithm that keeps its best.

    population: archs of a generation, and how many survive of it and of those before; left out, a tenth of the
        search's trials, but from 20 to 100
    crossover_prob: chance of a child to be mixed from two parents; else it is a copy of one before it is mutated
    mutation_prob: chance of each variable of a child to be drawn again; left out, one variable's in the mean
    generations: after how many the search ends; left out, when the trials are spent
    """

    population: int | None = field(default=None, validator=optional(ge(2)))
    crossover_prob: float = field(default=0.9, validator=[ge(0), le(1)])
    mutation_prob: float | None = field(default=None, validator=optional([ge(0), le(1)]))
    generations: int | None = field(default=None, validator=optional(ge(1)))

    def idle(self, around: Surroundings) -> Mapping[str, str]:
        """Return options that do nothing, and that nothing is learnt in a search that ends before it begins to."""
        return around.idle_searcher(self.population)

    def start(self, problem: Problem, rng: np.random.Generator) -> NSGA2Search:
        """Return a search whose first generation is random."""
        return NSGA2Search(self, problem, rng)


class NSGA2Search:
    """One generation at a time: asked in portions, and all of it told before the next is bred.

    parents: the survivors, best first: front after front, of each the least crowded first, then what is infeasible
    children: what of the generation was told
    pending, waiting: what of the generation is yet to be asked, and (digests) what was asked and is yet to be told
    seen: digests of all archs that were in a generation or told; none of them is asked again
    """

    def __init__(self, options: NSGA2, problem: Problem, rng: np.random.Generator) -> None:
        self.options = options
        self.population = options.population or min(max(problem.budget // 10, 20), 100)
        self.problem = problem
        self.rng = rng
        self.generation = 0
        self.parents: list[Trial] = []
        self.children: list[Trial] = []
        self.pending: list[Arch] = []
        self.waiting: set[str] = set()
        self.seen: set[str] = set()

    def ask(self, n: int) -> list[Arch]:
        """Return up to n archs of the generation; none while some of it is untold, or after the last."""
        if not self.pending and not self.waiting and self.generation != self.options.generations:
            self.parents = self._survivors([*self.parents, *self.children])
            self.children = []
            self.pending = self._offspring()
            self.generation += 1
        asked, self.pending = self.pending[:n], self.pending[n:]
        self.waiting.update(arch.digest for arch in asked)
        return asked

    def tell(self, trials: Sequence[Trial]) -> None:
        """Take in what was measured of the generation."""
        digests = [trial.arch.digest for trial in trials]
        self.waiting.difference_update(digests)
        self.seen.update(digests)
        self.children += trials

    def state_dict(self) -> dict[str, Json]:
        """Return everything that later generations depend on."""
        return {
            "generation": self.generation,
            "parents": [trial.to_json() for trial in self.parents],
            "children": [trial.to_json() for trial in self.children],
            "pending": [dict(arch) for arch in self.pending],
            "waiting": sorted(self.waiting),
            "seen": sorted(self.seen),
            "rng": self.rng.bit_generator.state,
        }

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Go on from a state that `state_dict` gave."""
        self.generation = state["generation"]
        self.parents = [Trial.from_json(trial) for trial in state["parents"]]
        self.children = [Trial.from_json(trial) for trial in state["children"]]
        self.pending = [Arch(arch) for arch in state["pending"]]
        self.waiting = set(state["waiting"])
        self.seen = set(state["seen"])
        self.rng.bit_generator.state = state["rng"]

    def _survivors(self, trials: Sequence[Trial]) -> list[Trial]:
        """Return the best of some trials, best first: constrained domination, then crowding (section VI A, III C)."""
        best = self.problem.objectives.best(trials, self.population)
        outside = [(self._violation(trial), trial) for trial in trials if trial.state == "infeasible"]
        nearest = sorted((pair for pair in outside if math.isfinite(pair[0])), key=lambda pair: pair[0])
        return [*best, *(trial for _, trial in nearest)][: self.population]

    def _violation(self, trial: Trial) -> float:
        """Return how far outside its constraints a trial is, as far as it was measured."""
        known = [c for c in self.problem.constraints if c.metric in trial.metrics]
        return sum((float(c.violation(np.float64(trial.metrics[c.metric]))) for c in known), start=0.0)

    def _parent(self) -> Arch:
        """Return the better of two random survivors: binary tournament."""
        return self.parents[self.rng.integers(len(self.parents), size=2).min()].arch

    def _child(self) -> Arch:
        space, options = self.problem.space, self.options
        child = self._parent()
        if self.rng.random() < options.crossover_prob:
            child = space.cross(child, self._parent(), self.rng)
        prob = options.mutation_prob
        return space.mutate(child, 1 / max(len(space.variables), 1) if prob is None else prob, self.rng)

    def _offspring(self) -> list[Arch]:
        n = self.population
        children = unseen(self._child, n, self.seen, tries=10 * n, patience=10 * n) if self.parents else []
        return children + unseen(lambda: self.problem.space.sample(self.rng), n - len(children), self.seen)


@hookimpl
def corenas_searchers() -> dict[str, type]:
    """Offer the searcher "nsga2"."""
    return {"nsga2": NSGA2}
