"""Successive halving and Hyperband: many archs with little effort, the better ones again with more."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from attrs import field, frozen, validators
from attrs.validators import ge

from corenas.contracts import Json, Problem, Proposal
from corenas.hookspecs import hookimpl
from corenas.objectives import Trial
from corenas.space import Arch, unseen


@frozen
class Halving:
    """Measures many archs with a share of the effort and the best of them with more: brackets of successive halving.

    Hyperband (Li et al. 2018, arXiv:1603.06560, algorithm 1) goes through brackets that begin with ever fewer archs and
    ever more effort, then through all of them again; successive halving (Jamieson and Talwalkar 2016, arXiv:1502.07943)
    repeats the first. What is best is what the objectives say: with several, front after front.

    eta: of how many archs one is promoted, which is also how many times the effort is spent on it then
    min_fidelity: the least share of the effort that tells anything; the rungs are 1, 1/eta, 1/eta², … down to it
    archs: how many archs a bracket begins with on the lowest rung; those on higher rungs have fewer, in proportion
    hyperband: whether there are brackets that begin on higher rungs; without it all begin on the lowest
    """

    eta: int = field(default=3, validator=ge(2))
    min_fidelity: float = field(default=1 / 9, validator=[validators.gt(0), validators.le(1)])
    archs: int = field(default=27, validator=ge(1))
    hyperband: bool = True

    def start(self, problem: Problem, rng: np.random.Generator) -> HalvingSearch:
        """Return a search that begins on the lowest rung."""
        return HalvingSearch(self, problem, rng)


class HalvingSearch:
    """One rung of one bracket at a time, all of it told before the best are promoted.

    top: the number of the lowest rung, its fidelity eta to the power of minus that; the whole effort is rung 0
    bracket: how many brackets were begun
    rung: the rung that is asked
    told: what of it was told
    pending, waiting: what of it is yet to be asked, and (digests) what was asked and is yet to be told
    seen: digests of all archs that were drawn
    """

    def __init__(self, options: Halving, problem: Problem, rng: np.random.Generator) -> None:
        self.options = options
        self.problem = problem
        self.rng = rng
        self.top = math.floor(-math.log(options.min_fidelity) / math.log(options.eta) + 1e-9)
        self.bracket = 0
        self.rung = 0
        self.told: list[Trial] = []
        self.pending: list[Arch] = []
        self.waiting: set[str] = set()
        self.seen: set[str] = set()

    def ask(self, n: int) -> list[Proposal]:
        """Return up to n archs of the rung; none while some of it is untold, or where the space has no more."""
        if not self.pending and not self.waiting:
            self.pending = self._promoted() or self._drawn()
            self.told = []
        asked, self.pending = self.pending[:n], self.pending[n:]
        self.waiting.update(arch.digest for arch in asked)
        return [Proposal(arch, float(self.options.eta) ** -self.rung) for arch in asked]

    def tell(self, trials: Sequence[Trial]) -> None:
        """Take in what was measured of the rung."""
        digests = [trial.arch.digest for trial in trials]
        self.waiting.difference_update(digests)
        self.seen.update(digests)
        self.told += trials

    def state_dict(self) -> dict[str, Json]:
        """Return where it is, and the generator."""
        return {
            "bracket": self.bracket,
            "rung": self.rung,
            "told": [trial.to_json() for trial in self.told],
            "pending": [dict(arch) for arch in self.pending],
            "waiting": sorted(self.waiting),
            "seen": sorted(self.seen),
            "rng": self.rng.bit_generator.state,
        }

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Go on from a state that `state_dict` gave."""
        self.bracket, self.rung = state["bracket"], state["rung"]
        self.told = [Trial.from_json(trial) for trial in state["told"]]
        self.pending = [Arch(arch) for arch in state["pending"]]
        self.waiting = set(state["waiting"])
        self.seen = set(state["seen"])
        self.rng.bit_generator.state = state["rng"]

    def _promoted(self) -> list[Arch]:
        """Go one rung up with the best, best first; none from the uppermost, or where none counts."""
        if self.rung == 0:
            return []
        best = self.problem.objectives.best(self.told, len(self.told) // self.options.eta)
        self.rung -= 1
        return [trial.arch for trial in best]

    def _drawn(self) -> list[Arch]:
        """Begin the next bracket with new archs."""
        lower = self.bracket % (self.top + 1) if self.options.hyperband else 0
        self.rung = self.top - lower
        self.bracket += 1
        # n = ceil(B/R eta^s / (s + 1)), for a budget B with which the first bracket has `archs`
        wanted = math.ceil(self.options.archs * (self.top + 1) / (self.rung + 1) / self.options.eta**lower - 1e-9)
        return unseen(lambda: self.problem.space.sample(self.rng), wanted, self.seen)


@hookimpl
def corenas_searchers() -> dict[str, type]:
    """Offer the searcher "halving"."""
    return {"halving": Halving}
