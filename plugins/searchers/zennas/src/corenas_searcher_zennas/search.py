"""A population of which the worst is dropped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from corenas.contracts import Json, Problem
from corenas.errors import UserError
from corenas.objectives import Trial
from corenas.space import Arch, unseen
from corenas_searcher_zennas.structure import mutate, super_blocks

if TYPE_CHECKING:
    from corenas_searcher_zennas import ZenNAS

PATIENCE = 1000
"""After so many mutants in a row that the region does not admit, an arch is drawn at random."""
_DRAWS = 20
"""How often that is tried, for one that is not too deep."""


class ZenNASSearch:
    """Asks mutants and keeps the best of all that was measured: algorithm 2, with several mutants at a time.

    initial: the arch that the search begins with
    population: the archs that mutate, best first
    seen: digests of all archs that were asked or told; none of them is asked again
    """

    def __init__(self, options: ZenNAS, problem: Problem, rng: np.random.Generator) -> None:
        self.options, self.problem, self.rng = options, problem, rng
        self.blocks = super_blocks(problem.space.variables)
        self._refuse_too_few_layers()
        self.population: list[Trial] = []
        self.seen: set[str] = set()
        default = Arch({variable.key: variable.default for variable in problem.space.variables})
        inside = self._admitted([default])
        self.initial = inside[0] if inside else problem.space.sample(rng)

    def ask(self, n: int) -> list[Arch]:
        """Return up to n mutants that are new; where there are none, archs at random; none where all were seen."""
        mutants = self._mutants(n)
        asked = unseen(lambda: next(mutants), n, self.seen)
        return asked + unseen(self._random, n - len(asked), self.seen)

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

    def _mutants(self, n: int) -> Iterator[Arch]:
        """Give admitted mutants without end, made n at a time; where hardly any is admitted, archs at random."""
        refused = 0
        while True:
            rows = [row for row in (self._mutant() for _ in range(n)) if row is not None]
            archs = self._admitted(rows)
            refused = 0 if archs else refused + n
            yield from archs
            if refused >= PATIENCE:
                yield self._random()

    def _mutant(self) -> Mapping[str, Json] | None:
        """Return the choices of a mutant of the first arch or, as soon as there are enough, of any member."""
        options, parent, replaced = self.options, self.initial, 1
        if len(self.population) > options.first:
            parent = self.population[self.rng.integers(len(self.population))].arch
            replaced = options.replaced
        return mutate(self.blocks, parent, replaced, options.split, self.rng)

    def _random(self) -> Arch:
        """Return an arch at random; the first one where none of some draws is shallow enough."""
        for _ in range(_DRAWS):
            arch = self.problem.space.sample(self.rng)
            if self._is_shallow(arch):
                return arch
        return self.initial

    def _admitted(self, rows: Sequence[Mapping[str, Json]]) -> list[Arch]:
        """Return the archs of some choices that the region has and that are not too deep."""
        space = self.problem.space
        archs = space.decode(space.admit(space.encode(rows))) if rows else []
        return [*filter(self._is_shallow, archs)]

    def _is_shallow(self, arch: Arch) -> bool:
        limit = self.options.max_layers
        return limit is None or sum(block.layers(arch) for block in self.blocks if block.depth is not None) <= limit

    def _refuse_too_few_layers(self) -> None:
        limit = self.options.max_layers
        least = sum(block.depth.smallest for block in self.blocks if block.depth is not None)
        if limit is not None and limit < least:
            text = f"the shallowest arch of this space has {least} sub-layers, more than {limit}"
            raise UserError(text, key=("searcher", "max_layers"))
