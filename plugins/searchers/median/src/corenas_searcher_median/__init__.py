"""Random search that stops a trial early where it does worse than half of those before it: the median rule."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import numpy as np
from attrs import field, frozen
from attrs.validators import ge

from corenas.contracts import Json, Problem, Proposal
from corenas.errors import UserError
from corenas.hookspecs import hookimpl
from corenas.objectives import Trial
from corenas.space import Arch, unseen


@frozen
class Median:
    """Draws archs at random and goes on with one as long as it is no worse than the median of those before it.

    The rule is that of Vizier (Golovin et al. 2017, section 3.2), with what was measured at a fidelity instead of
    running averages. Archs are measured at each fidelity in turn; `stand_alone` goes on with what it trained.

    fidelities: the shares of the whole effort after which it is asked whether to go on; the whole comes last by itself
    warmup: archs that are measured at a fidelity before the rule stops any there
    """

    fidelities: tuple[float, ...] = (1 / 9, 1 / 3)
    warmup: int = field(default=5, validator=ge(1))

    def __attrs_post_init__(self) -> None:
        steps = [0.0, *self.fidelities, 1.0]
        if steps != sorted({*steps}):
            raise UserError("expected numbers between 0 and 1, growing", key=("fidelities",))

    def start(self, problem: Problem, rng: np.random.Generator) -> MedianSearch:
        """Return a search that begins with new archs."""
        return MedianSearch(self, problem, rng)


class MedianSearch:
    """Archs that go on come before new ones.

    scores: what was measured at each fidelity, worst of all where it failed
    going: archs that go on, each with the number of its next fidelity
    """

    def __init__(self, options: Median, problem: Problem, rng: np.random.Generator) -> None:
        self.options, self.problem, self.rng = options, problem, rng
        self.fidelities = (*options.fidelities, 1.0)
        self.scores: list[list[float]] = [[] for _ in self.fidelities]
        self.going: list[tuple[Arch, int]] = []
        self.seen: set[str] = set()

    def ask(self, n: int) -> list[Proposal]:
        """Return up to n archs: those that go on, then new ones."""
        asked, self.going = self.going[:n], self.going[n:]
        fresh = unseen(lambda: self.problem.space.sample(self.rng), n - len(asked), self.seen)
        return [Proposal(arch, self.fidelities[step]) for arch, step in (*asked, *((arch, 0) for arch in fresh))]

    def tell(self, trials: Sequence[Trial]) -> None:
        """Take in results; one that is no worse than the median of all at its fidelity goes on."""
        for trial in trials:
            self.seen.add(trial.arch.digest)
            if trial.fidelity not in self.fidelities:
                continue
            step = self.fidelities.index(trial.fidelity)
            score, scores = self.problem.objectives.score(trial), self.scores[step]
            stopped = len(scores) >= self.options.warmup and score < statistics.median(scores)
            if trial.ok:
                scores.append(score)
            if trial.ok and not stopped and trial.fidelity < 1:
                self.going.append((trial.arch, step + 1))

    def state_dict(self) -> dict[str, Json]:
        """Return what it knows, and the generator."""
        return {
            "scores": [[*scores] for scores in self.scores],
            "going": [[dict(arch), step] for arch, step in self.going],
            "seen": sorted(self.seen),
            "rng": self.rng.bit_generator.state,
        }

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Go on from a state that `state_dict` gave."""
        self.scores = [[*scores] for scores in state["scores"]]
        self.going = [(Arch(arch), step) for arch, step in state["going"]]
        self.seen = set(state["seen"])
        self.rng.bit_generator.state = state["rng"]


@hookimpl
def corenas_searchers() -> dict[str, type]:
    """Offer the searcher "median"."""
    return {"median": Median}
