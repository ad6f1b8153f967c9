"""A grid over whole-network scales, then small changes around the best of it."""

from __future__ import annotations

import fnmatch
import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from attrs import field, frozen
from attrs.validators import ge, gt, le, min_len

from corenas.contracts import Json, Problem, Surroundings
from corenas.errors import Fault, did_you_mean, raise_if_any
from corenas.hookspecs import hookimpl
from corenas.objectives import Trial
from corenas.space import Arch, SearchSpace, unseen
from corenas.variables import Variable


@frozen
class Scale:
    """Numbers that the coarse phase changes together, from their least to their most.

    keys: patterns of variables, "stages.*.depth" for instance
    levels: how many steps there are; all of a variable's choices come up if there are as many
    by_stage: true moves variables from their least to their most one by one, the last ones first, instead of together
    """

    keys: tuple[str, ...] = field(validator=min_len(1))
    levels: int = field(default=2, validator=ge(1))
    by_stage: bool = False


BIGNAS = (
    Scale(("*resolution*",), 5),
    Scale(("*depth",), 4),
    Scale(("*width", "*expand"), 2),
    Scale(("*kernel",), 4, by_stage=True),
)
"""Five resolutions of the input, four depths and two widths of the network, four kernel sizes by stages."""


@frozen
class CoarseToFine:
    """Measures a coarse grid, then mutants of the best archs (BigNAS, Yu et al. 2020, arXiv:2003.11142, section 3.3).

    scales: what the grid is over; left out, resolution, depth, width and expansion, and kernel, as in the paper
    coarse: the most that the grid may take of all trials; a larger grid is thinned out evenly
    parents: how many of the best trials are mutated; in Pareto mode at least the whole front
    mutation_prob: chance of each variable of a mutant to be drawn again
    """

    scales: tuple[Scale, ...] = ()
    coarse: float = field(default=0.5, validator=[gt(0.0), le(1.0)])
    parents: int = field(default=5, validator=ge(1))
    mutation_prob: float = field(default=0.1, validator=[gt(0.0), le(1.0)])

    def idle(self, around: Surroundings) -> Mapping[str, str]:
        """Return options that do nothing beside the others, and why."""
        reason = "the grid may take all trials"
        return dict.fromkeys(("parents", "mutation_prob"), reason) if self.coarse == 1 else {}

    def start(self, problem: Problem, rng: np.random.Generator) -> CoarseToFineSearch:
        """Return a search that begins with its grid. Raises UserError for a scale that fits no variable."""
        return CoarseToFineSearch(self, problem, rng)


class CoarseToFineSearch:
    """The grid in order, and when all of it is told mutants of the best trials so far.

    grid: the archs of the grid, which hang on the problem alone
    asked: how many of them were asked
    waiting: digests of what was asked and is yet to be told
    seen: digests of all archs that were asked or told
    """

    def __init__(self, options: CoarseToFine, problem: Problem, rng: np.random.Generator) -> None:
        self.options, self.problem, self.rng = options, problem, rng
        self.grid = self._grid()
        self.asked = 0
        self.best: list[Trial] = []
        self.waiting: set[str] = set()
        self.seen: set[str] = set()

    def ask(self, n: int) -> list[Arch]:
        """Return up to n archs; none while some of the grid is untold, or where nothing new is left."""
        archs: list[Arch] = []
        while self.asked < len(self.grid) and len(archs) < n:
            arch = self.grid[self.asked]
            self.asked += 1
            archs += unseen(lambda arch=arch: arch, 1, self.seen, tries=1)
        if not archs and not self.waiting:
            archs = self._fine(n)
        self.waiting.update(arch.digest for arch in archs)
        return archs

    def tell(self, trials: Sequence[Trial]) -> None:
        """Keep the best trials that count."""
        self.waiting.difference_update(trial.arch.digest for trial in trials)
        self.seen.update(trial.arch.digest for trial in trials)
        objectives, found = self.problem.objectives, [*self.best, *trials]
        kept = max(self.options.parents, len(objectives.front(found)))
        self.best = objectives.best(found, kept)

    def state_dict(self) -> dict[str, Json]:
        """Return everything that later archs depend on."""
        return {
            "asked": self.asked,
            "best": [trial.to_json() for trial in self.best],
            "waiting": sorted(self.waiting),
            "seen": sorted(self.seen),
            "rng": self.rng.bit_generator.state,
        }

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Go on from a state that `state_dict` gave."""
        self.asked = state["asked"]
        self.best = [Trial.from_json(trial) for trial in state["best"]]
        self.waiting, self.seen = set(state["waiting"]), set(state["seen"])
        self.rng.bit_generator.state = state["rng"]

    def _fine(self, n: int) -> list[Arch]:
        """Return mutants of the best trials; where none is new, or nothing counts yet, archs at random."""
        space, archs = self.problem.space, []
        if self.best:

            def mutant() -> Arch:
                parent = self.best[self.rng.integers(len(self.best))].arch
                return space.mutate(parent, self.options.mutation_prob, self.rng)

            archs = unseen(mutant, n, self.seen, patience=100)
        return archs + unseen(lambda: space.sample(self.rng), n - len(archs), self.seen)

    def _grid(self) -> list[Arch]:
        """Return the archs of the grid that obey the constraints, each once."""
        space = SearchSpace(self.problem.space.variables)
        levels = [_levels(space, columns, scale) for columns, scale in self._scaled(space)]
        number = math.prod(map(len, levels))
        most = max(1, math.floor(self.options.coarse * self.problem.budget))
        codes = np.repeat(space.encode([space.default()]), min(number, _MOST), axis=0)
        if number <= _MOST:
            points = itertools.product(*levels)
        else:
            at = np.unravel_index(np.linspace(0, number - 1, _MOST).astype(np.int64), [*map(len, levels)])
            points = (tuple(own[i] for own, i in zip(levels, row, strict=True)) for row in zip(*at, strict=True))
        for row, point in zip(codes, points, strict=True):
            for column, code in itertools.chain(*point):
                row[column] = code
        inside = [*dict.fromkeys(space.decode(self.problem.space.admit(codes)))]
        if len(inside) > most:
            inside = [inside[i] for i in np.linspace(0, len(inside) - 1, most).round().astype(int)]
        return inside

    def _scaled(self, space: SearchSpace) -> list[tuple[list[int], Scale]]:
        """Return the columns of each scale, each column in the first one that it fits."""
        scales, taken, faults, found = self.options.scales or BIGNAS, set(), [], []
        numbers = [key for key in space.keys if _is_scalable(space[key])]
        for i, scale in enumerate(scales):
            keys = [key for key in numbers if any(fnmatch.fnmatch(key, pattern) for pattern in scale.keys)]
            if not keys and self.options.scales:
                hint = did_you_mean(scale.keys[0], numbers, "numbers")
                faults.append(Fault("no number is called so", ("searcher", "scales", i, "keys"), hint=hint))
            columns = [space.keys.index(key) for key in keys if key not in taken]
            taken.update(keys)
            if columns:
                found.append((columns, scale))
        raise_if_any(faults)
        return found


_MOST = 20_000
"""So many archs of a grid are looked at, evenly over it."""


def _is_scalable(variable: Variable) -> bool:
    return not isinstance(variable.choices[0], str | bool)


def _levels(space: SearchSpace, columns: Sequence[int], scale: Scale) -> list[tuple[tuple[int, float], ...]]:
    """Return the steps of a scale, each once: of each column its code."""
    steps = np.linspace(0, 1, scale.levels) if scale.levels > 1 else np.ones(1)
    found = []
    for step in steps:
        place = np.full(len(columns), step)
        if scale.by_stage:  # the last ones first, as larger kernels come later in networks that were searched
            place = (np.arange(len(columns)) >= round((1 - step) * len(columns))).astype(float)
        pairs = zip(columns, place, strict=True)
        found.append(tuple((column, _code(space.variables[column], share)) for column, share in pairs))
    return [*dict.fromkeys(found)]


def _code(variable: Variable, share: float) -> float:
    """Return the code of the choice that lies at a share of the way from the least to the most."""
    if variable.continuous:
        return float(share)
    order = sorted(range(len(variable.choices)), key=variable.choices.__getitem__)
    return order[math.floor(share * (len(order) - 1) + 0.5)]


@hookimpl
def corenas_searchers() -> Mapping[str, type]:
    """Offer the searcher "coarse_to_fine"."""
    return {"coarse_to_fine": CoarseToFine}
