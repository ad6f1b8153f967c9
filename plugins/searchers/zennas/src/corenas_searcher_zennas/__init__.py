"""The evolution of Zen-NAS (Lin et al. 2021, arXiv:2102.01063, algorithms 2 and 3)."""

from __future__ import annotations

import numpy as np
from attrs import field, frozen
from attrs.validators import ge, optional

from corenas.contracts import Problem
from corenas.hookspecs import hookimpl
from corenas_searcher_zennas.search import ZenNASSearch


@frozen
class ZenNAS:
    """Mutates super-blocks of a large population, from which the worst is dropped (Lin et al. 2021, arXiv:2102.01063).

    A super-block is a table of the space. Its `width` and `bottleneck` are multiplied, its `depth` moves by up to 2,
    all else is drawn again. The search begins with the space's default arch.

    population: how many archs there are at most; one more, and the worst goes
    first: as long as there are no more archs than this, mutants are those of the first arch, in one super-block
    replaced: how many super-blocks of a random member are mutated after that
    split: from so many sub-layers on, a super-block is split into two where the space has room for the second
    max_layers: the most sub-layers of all super-blocks together, their searched depths summed; left out, any
    """

    population: int = field(default=512, validator=ge(1))
    first: int = field(default=10, validator=ge(0))
    replaced: int = field(default=2, validator=ge(1))
    split: int = field(default=6, validator=ge(2))
    max_layers: int | None = field(default=None, validator=optional(ge(1)))

    def start(self, problem: Problem, rng: np.random.Generator) -> ZenNASSearch:
        """Return a search with an empty population."""
        return ZenNASSearch(self, problem, rng)


@hookimpl
def corenas_searchers() -> dict[str, type]:
    """Offer the searcher "zennas"."""
    return {"zennas": ZenNAS}
