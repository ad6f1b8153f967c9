"""Local search: from a good arch to a better one that differs in one variable, and anew from where none is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from attrs import field, frozen
from attrs.validators import ge

from corenas.contracts import Json, Problem
from corenas.hookspecs import hookimpl
from corenas.objectives import Trial
from corenas.space import Arch, SearchSpace, unseen

AT_ONCE = 8
"""How many neighbours are made at once, at least."""


@frozen
class Local:
    """Moves from an arch to a better neighbour, and starts anew where there is none (White et al., arXiv:2005.02960).

    Neighbours differ in the choice of one variable. The method knows one objective: several are added up by their
    weights, in Pareto mode as well.

    first: how many random archs each start has, or a batch if that is more; the search goes on from the best of them
    neighbours: "all" choices of each variable, or "step": of numbers only the next smaller and the next larger choice
    move: to the "first" neighbour that is better, or, when all have been measured, to the "best"
    """

    first: int = field(default=10, validator=ge(1))
    neighbours: Literal["all", "step"] = "all"
    move: Literal["first", "best"] = "first"

    def start(self, problem: Problem, rng: np.random.Generator) -> LocalSearch:
        """Return a search that begins with random archs."""
        return LocalSearch(self, problem, rng)


class LocalSearch:
    """Where it stands, and what it is yet to ask around there.

    here: the arch that it looks for better neighbours of; None while a start's random archs are measured
    better: the best of what was told since, if it is better
    moves: ways to change one variable there that are yet to be tried, in random order: column and code
    pending, waiting: archs that are yet to be asked, and (digests) that were asked and are yet to be told
    restarts: how many starts there were
    """

    def __init__(self, options: Local, problem: Problem, rng: np.random.Generator) -> None:
        self.options = options
        self.problem = problem
        self.rng = rng
        self.space = SearchSpace(problem.space.variables)
        self.here: Trial | None = None
        self.better: Trial | None = None
        self.moves: list[list[int]] = []
        self.pending: list[Arch] = []
        self.waiting: set[str] = set()
        self.seen: set[str] = set()
        self.restarts = 0

    def ask(self, n: int) -> list[Arch]:
        """Return up to n archs around where it stands, or of a new start; none while it waits for their results."""
        self._look(n)
        found = self.here and self.better and self.options.move == "first"
        if not self.waiting and (found or not self.pending):
            self._move_on(n)
        asked, self.pending = self.pending[:n], self.pending[n:]
        self.waiting.update(arch.digest for arch in asked)
        return asked

    def tell(self, trials: Sequence[Trial]) -> None:
        """Look for a trial that is better than where it stands."""
        digests = [trial.arch.digest for trial in trials]
        self.waiting.difference_update(digests)
        self.seen.update(digests)
        for trial in trials:
            before = self.better or self.here
            if math.isfinite(self._score(trial)) and (before is None or self._score(trial) > self._score(before)):
                self.better = trial

    def state_dict(self) -> dict[str, Json]:
        """Return where it stands, what it is yet to ask, and the generator."""
        return {
            "here": self.here and self.here.to_json(),
            "better": self.better and self.better.to_json(),
            "moves": self.moves,
            "pending": [dict(arch) for arch in self.pending],
            "waiting": sorted(self.waiting),
            "seen": sorted(self.seen),
            "restarts": self.restarts,
            "rng": self.rng.bit_generator.state,
        }

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Go on from a state that `state_dict` gave."""
        self.here, self.better = (
            None if state[name] is None else Trial.from_json(state[name]) for name in ("here", "better")
        )
        self.moves = state["moves"]
        self.pending = [Arch(arch) for arch in state["pending"]]
        self.waiting = set(state["waiting"])
        self.seen = set(state["seen"])
        self.restarts = state["restarts"]
        self.rng.bit_generator.state = state["rng"]

    def _score(self, trial: Trial) -> float:
        return self.problem.objectives.score(trial)

    def _move_on(self, n: int) -> None:
        """Go to what is better and look around there; where nothing is better or new, start anew."""
        self.here, self.better = self.better, None
        self.moves, self.pending = [], []
        if self.here:
            columns, codes = self.space.moves(self.here.arch, step=self.options.neighbours == "step")
            self.moves = self.rng.permutation(np.stack([columns, codes], axis=1)).tolist()
            self._look(n)
        if not self.pending:
            self.here = None
            wanted = max(n, self.options.first)
            self.pending = unseen(lambda: self.problem.space.sample(self.rng), wanted, self.seen)
            self.restarts += 1

    def _look(self, n: int) -> None:
        """Fill up what is to be asked with n new neighbours that obey the constraints, as far as there are."""
        while self.here and self.moves and len(self.pending) < n:
            tried, self.moves = self.moves[: max(n, AT_ONCE)], self.moves[max(n, AT_ONCE) :]
            codes = self.space.encode([self.here.arch]).repeat(len(tried), axis=0)
            moved = self.space.with_codes(codes, *np.array(tried).T, self.rng)
            near = self.problem.space.decode(self.problem.space.admit(moved))
            self.pending += [arch for arch in dict.fromkeys(near) if arch.digest not in self.seen]


@hookimpl
def corenas_searchers() -> dict[str, type]:
    """Offer the searcher "local"."""
    return {"local": Local}
