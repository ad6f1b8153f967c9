"""The evolutionary search of Single Path One-Shot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from attrs import field, frozen
from attrs.validators import ge, le, optional

from corenas.contracts import Json, Problem, Surroundings
from corenas.errors import UserError
from corenas.hookspecs import hookimpl
from corenas.objectives import Trial
from corenas.space import Arch, unseen


@frozen
class Evolution:
    """Mutates and crosses the best archs of all generations so far (SPOS, Guo et al. 2020, arXiv:1904.00420, alg. 1).

    population: archs of a generation; what mutation and crossover leave is filled with random ones
    parents: how many of the best trials of all generations breed
    mutation: how many of a generation are mutated copies of one parent
    crossover: how many of a generation are mixed from two parents
    mutation_prob: chance of each variable of a mutated copy to be drawn again
    generations: after how many the search ends; without it when the trials are spent
    """

    population: int = field(default=50, validator=ge(1))
    parents: int = field(default=10, validator=ge(1))
    mutation: int = field(default=25, validator=ge(0))
    crossover: int = field(default=25, validator=ge(0))
    mutation_prob: float = field(default=0.1, validator=[ge(0), le(1)])
    generations: int | None = field(default=None, validator=optional(ge(1)))

    def __attrs_post_init__(self) -> None:
        if self.mutation + self.crossover > self.population:
            raise UserError(
                f"mutation {self.mutation} and crossover {self.crossover} are more than population {self.population}",
                key=("population",),
                hint="raise population, or lower mutation or crossover",
            )

    def idle(self, around: Surroundings) -> Mapping[str, str]:
        """Return options that do nothing, and that nothing is learnt in a search that ends before it begins to."""
        idle = {} if self.mutation else {"mutation_prob": "no archs of a generation are mutated"}
        return idle | around.idle_searcher(self.population)

    def start(self, problem: Problem, rng: np.random.Generator) -> EvolutionSearch:
        """A search whose first generation is random."""
        return EvolutionSearch(self, problem, rng)


class EvolutionSearch:
    """One generation at a time: asked in portions, and all of it told before the next is made.

    best: the parents, best first
    pending, waiting: what of the generation is yet to be asked, and (digests) what was asked and is yet to be told
    missing: how many archs at random are yet to be drawn for the generation
    seen: digests of all archs that were in a generation or told; none of them is asked again
    """

    def __init__(self, options: Evolution, problem: Problem, rng: np.random.Generator) -> None:
        self.options = options
        self.problem = problem
        self.rng = rng
        self.generation = 0
        self.best: list[Trial] = []
        self.pending: list[Arch] = []
        self.missing = 0
        self.waiting: set[str] = set()
        self.seen: set[str] = set()

    def ask(self, n: int) -> list[Arch]:
        """Up to n archs of the generation; none while some of it is untold, after the last, or where all were seen."""
        asked = self._some(n)
        if not asked and not self.waiting and self.generation != self.options.generations:
            self.pending = self._children()
            self.missing = self.options.population - len(self.pending)
            self.generation += 1
            asked = self._some(n)
        self.waiting.update(arch.digest for arch in asked)
        return asked

    def tell(self, trials: Sequence[Trial]) -> None:
        """Keep the best trials that count; the others never breed."""
        self.waiting.difference_update(trial.arch.digest for trial in trials)
        self.seen.update(trial.arch.digest for trial in trials)
        self.best = self.problem.objectives.best([*self.best, *trials], self.options.parents)

    def state_dict(self) -> dict[str, Json]:
        """Everything that later generations depend on."""
        return {
            "generation": self.generation,
            "best": [trial.to_json() for trial in self.best],
            "pending": [dict(arch) for arch in self.pending],
            "missing": self.missing,
            "waiting": sorted(self.waiting),
            "seen": sorted(self.seen),
            "rng": self.rng.bit_generator.state,
        }

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Go on from a state that `state_dict` gave."""
        self.generation = state["generation"]
        self.best = [Trial.from_json(trial) for trial in state["best"]]
        self.pending = [Arch(arch) for arch in state["pending"]]
        self.missing = state.get("missing", 0)  # older states have all of a generation in `pending`
        self.waiting = set(state["waiting"])
        self.seen = set(state["seen"])
        self.rng.bit_generator.state = state["rng"]

    def _some(self, n: int) -> list[Arch]:
        """Return up to n archs of the generation. Those at random are drawn only now: a short search wants few."""
        asked, self.pending = self.pending[:n], self.pending[n:]
        wanted = min(n - len(asked), self.missing)
        drawn = unseen(lambda: self.problem.space.sample(self.rng), wanted, self.seen)
        self.missing = self.missing - wanted if len(drawn) == wanted else 0
        return asked + drawn

    def _children(self) -> list[Arch]:
        options, space = self.options, self.problem.space

        def parent() -> Arch:
            return self.best[self.rng.integers(len(self.best))].arch

        def mutated() -> Arch:
            return space.mutate(parent(), options.mutation_prob, self.rng)

        def crossed() -> Arch:
            return space.cross(parent(), parent(), self.rng)  # the two may be the same, as in the reference code

        def bred(draw: Callable[[], Arch], n: int) -> list[Arch]:
            return unseen(draw, n, self.seen, tries=10 * n, patience=10 * n)

        return bred(mutated, options.mutation) + bred(crossed, options.crossover) if self.best else []


@hookimpl
def corenas_searchers() -> dict[str, type]:
    """The searcher "evolution"."""
    return {"evolution": Evolution}
