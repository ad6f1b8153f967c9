"""A population of which the worst is dropped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from corenas.contracts import Json, Problem
from corenas.objectives import Trial
from corenas.space import Arch
from corenas_searcher_zennas.structure import mutate, super_blocks

if TYPE_CHECKING:
    from corenas_searcher_zennas import ZenNAS

PATIENCE = 1000
"""After so many mutants in a row that were no new archs of the region, one is drawn at random."""


class ZenNASSearch:
    """Asks mutants and keeps the best of all that was measured: algorithm 2, with several mutants at a time.

    initial: the arch that the search begins with
    population: the archs that mutate, best first
    seen: digests of all archs that were asked or told; none of them is asked again
    """

    def __init__(self, options: ZenNAS, problem: Problem, rng: np.random.Generator) -> None:
        self.options, self.problem, self.rng = options, problem, rng
        self.blocks = super_blocks(problem.space.variables)
        default = Arch({variable.key: variable.default for variable in problem.space.variables})
        inside = self._admitted([default])
        self.initial = inside[0] if inside else problem.space.sample(rng)
        self.population: list[Trial] = []
        self.seen: set[str] = set()

    def ask(self, n: int) -> list[Arch]:
        """Return up to n mutants that are new; where there are none, archs at random; none where all were seen."""
        asked: list[Arch] = []
        fruitless = 0
        while len(asked) < n and fruitless < PATIENCE:
            mutants = [self._mutant() for _ in range(n - len(asked))]
            new = self._unseen(self._admitted([mutant for mutant in mutants if mutant is not None]))
            fruitless = 0 if new else fruitless + len(mutants)
            asked += new
        while len(asked) < n and fruitless < 2 * PATIENCE:
            new = self._unseen(self._admitted([self.problem.space.sample(self.rng)]))
            fruitless = PATIENCE if new else fruitless + 1
            asked += new
        return asked

    def tell(self, trials: Sequence[Trial]) -> None:
        """Let the trials that count into the population, and drop the worst (algorithm 2, lines 9 to 12)."""
        self.seen.update(trial.arch.digest for trial in trials)
        self.population = self.problem.objectives.best([*self.population, *trials], self.options.population)

    def state_dict(self) -> dict[str, Json]:
        """Return everything that later mutants depend on."""
        return {
            "initial": dict(self.initial),
            "population": [trial.to_json() for trial in self.population],
            "seen": sorted(self.seen),
            "rng": self.rng.bit_generator.state,
        }

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Go on from a state that `state_dict` gave."""
        self.initial = Arch(state["initial"])
        self.population = [Trial.from_json(trial) for trial in state["population"]]
        self.seen = set(state["seen"])
        self.rng.bit_generator.state = state["rng"]

    def _mutant(self) -> Mapping[str, Json] | None:
        """Return the choices of a mutant of the first arch or, as soon as there are enough, of any member."""
        options, parent, replaced = self.options, self.initial, 1
        if len(self.population) > options.first:
            parent = self.population[self.rng.integers(len(self.population))].arch
            replaced = options.replaced
        return mutate(self.blocks, parent, replaced, options.split, self.rng)

    def _admitted(self, rows: Sequence[Mapping[str, Json]]) -> list[Arch]:
        """Return the archs of some choices that the region has and that are not too deep."""
        space, limit = self.problem.space, self.options.max_layers
        archs = space.decode(space.admit(space.encode(rows))) if rows else []
        return [arch for arch in archs if limit is None or self._layers(arch) <= limit]

    def _layers(self, arch: Arch) -> int:
        return sum(block.layers(arch) for block in self.blocks if block.depth is not None)

    def _unseen(self, archs: Sequence[Arch]) -> list[Arch]:
        """Return what was never asked, each once, and remember it."""
        new = {arch.digest: arch for arch in archs if arch.digest not in self.seen}
        self.seen |= new.keys()
        return [*new.values()]
