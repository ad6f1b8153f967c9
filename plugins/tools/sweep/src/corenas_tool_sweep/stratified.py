"""A searcher that draws as many archs from each bin of a cost, each with the chance that it had to be drawn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
from attrs import field, frozen
from attrs.validators import ge

from corenas.contracts import Json, Problem, Proposal
from corenas.errors import UserError
from corenas.objectives import Trial
from corenas.space import Arch
from corenas_tool_sweep.structured import RegNet, Structure


@frozen
class Stratified:
    """Draws archs at random, as many from each bin of equal width of a cost: better than weighing them afterwards.

    Each trial keeps its chance of being drawn, relative to that under plain random draws, as `extra.inclusion`; a sweep
    weighs by its inverse where it says what the whole space is like. With `equal`, `non_decreasing` or `regnet` plain
    draws are those of the space given that these hold.

    metric: the cost
    bins: how many
    pool: archs that are drawn at random for each one that is asked for; bins reach from the cheapest to the dearest
    equal: patterns such as `stages.*.kernel`: all variables that one names have the same choice
    non_decreasing: patterns: the variables that one names never fall along the network
    regnet: stages are those of a RegNet, whose numbers become variables of the population
    """

    metric: Literal["flops", "params", "activations"] = "flops"
    bins: int = field(default=10, validator=ge(1))
    pool: int = field(default=50, validator=ge(1))
    equal: tuple[str, ...] = ()
    non_decreasing: tuple[str, ...] = ()
    regnet: RegNet | None = None

    @property
    def structure(self) -> Structure:
        """What its archs have in common."""
        return Structure(self.equal, self.non_decreasing, self.regnet)

    def start(self, problem: Problem, rng: np.random.Generator) -> StratifiedSearch:
        """Return a search that ends when a pool has nothing new."""
        return StratifiedSearch(self, problem, rng)


class StratifiedSearch:
    """Gives what it has drawn, bin after bin, so that one which ends early is balanced too.

    drawn: archs that are yet to be asked, each with the facts that its trial keeps
    """

    def __init__(self, options: Stratified, problem: Problem, rng: np.random.Generator) -> None:
        self.options, self.problem, self.rng = options, problem, rng
        self.drawn: list[tuple[Arch, Mapping[str, Json]]] = []
        self.seen: set[str] = set()

    def ask(self, n: int) -> list[Proposal]:
        """Return up to n new archs; fewer where the space has no more."""
        while len(self.drawn) < n and (more := self._draw()):
            self.drawn += more
        asked, self.drawn = self.drawn[:n], self.drawn[n:]
        return [Proposal(arch, extra=facts) for arch, facts in asked]

    def tell(self, trials: Sequence[Trial]) -> None:
        """Results change nothing; archs that were measured elsewhere need no asking."""
        self.seen.update(trial.arch.digest for trial in trials)

    def _draw(self) -> list[tuple[Arch, Mapping[str, Json]]]:
        """Return as many new archs as the search has trials, as many of each bin as there are."""
        size = min(100_000, self.options.pool * self.problem.budget)
        codes, numbers = self.options.structure.draw(self.problem.space, self.rng, size)
        if not len(codes):
            text = f"of {size:,} archs that were drawn none has the structure and obeys the constraints"
            raise UserError(text, key=("searcher",), hint="wider ranges, or a space with more widths and depths")
        # What part of the draws could be used says how much of its family a space holds.
        common: dict[str, Json] = {"accepted": len(codes) / size} if self.options.structure else {}
        bins = np.zeros(len(codes), np.int64)
        if self.problem.cost is not None and self.options.bins > 1:
            from corenas_tool_sweep.statistics import bins_of  # scipy takes half a second, which no command waits for

            costs = self.problem.cost(codes)[self.options.metric].astype(float)
            bins = bins_of(costs, costs.min(), costs.max(), self.options.bins)
        share = -(-self.problem.budget // self.options.bins)
        queues = []
        for number in np.unique(bins):
            place = np.flatnonzero(bins == number)
            taken = [*self._unseen(self.problem.space.decode(codes[place]), share)]
            inclusion = len(taken) / len(place)
            queues.append(
                [(arch, {"inclusion": inclusion, **common, **_as_variables(numbers[place[i]])}) for i, arch in taken]
            )
        return [queue[i] for i in range(max(map(len, queues))) for queue in queues if i < len(queue)]

    def _unseen(self, archs: Sequence[Arch], most: int) -> Iterator[tuple[int, Arch]]:
        for i, arch in enumerate(archs):
            if most == 0:
                return
            if arch.digest not in self.seen:
                self.seen.add(arch.digest)
                most -= 1
                yield i, arch

    def state_dict(self) -> dict[str, Json]:
        """Return what was drawn, and the generator."""
        return {
            "drawn": [[dict(arch), dict(facts)] for arch, facts in self.drawn],
            "seen": sorted(self.seen),
            "rng": self.rng.bit_generator.state,
        }

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Go on from a state that `state_dict` gave."""
        self.drawn = [(Arch(arch), facts) for arch, facts in state["drawn"]]
        self.seen = set(state["seen"])
        self.rng.bit_generator.state = state["rng"]


def _as_variables(numbers: Mapping[str, float]) -> dict[str, Json]:
    return {"variables": dict(numbers)} if numbers else {}
