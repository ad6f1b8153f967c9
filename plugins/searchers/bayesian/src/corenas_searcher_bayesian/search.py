"""Archs that evolve on a confidence bound."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from corenas.contracts import Json, Problem
from corenas.objectives import Trial
from corenas.space import Arch, Codes, SearchSpace, unseen
from corenas.variables import Variable
from corenas_searcher_bayesian.process import Process, seeded

if TYPE_CHECKING:
    from corenas_searcher_bayesian import Bayesian

_FEWEST = 3
"""Trials that count, without which nothing is fitted."""
_WIDTHS = (0.5, 2.0)
"""Of the bounds that archs evolve on, in deviations: one seeks what is good, the other what is not known."""
_DIRECTIONS = 4
"""In Pareto mode so many random weights of the objectives for each of them."""
_SPARE = 4
"""So many times more children are made than wanted: some are known, some break a constraint."""
_ONE_HOT = 8
"""Numbers with more choices than this are their place between the least and the most."""


class BayesianSearch:
    """Random archs first; then at each ask a process is fitted to what was told, and archs evolve on it.

    told: codes and gains of trials, None for one that does not count
    waiting: digest -> codes of what was asked and is yet to be told
    """

    def __init__(self, options: Bayesian, problem: Problem, rng: np.random.Generator) -> None:
        self.options, self.problem, self.rng = options, problem, rng
        self.space = SearchSpace(problem.space.variables)
        self.seed = int(rng.integers(1 << 31))
        self.told: list[tuple[list[float], list[float] | None]] = []
        self.waiting: dict[str, list[float]] = {}
        self.seen: set[str] = set()

    def ask(self, n: int) -> list[Arch]:
        """Return up to n archs that are new; none where nothing new is left."""
        if n < 1:
            return []
        counting = sum(gains is not None for _, gains in self.told)
        archs: list[Arch] = []
        if len(self.told) >= self.options.initial and counting >= _FEWEST:
            archs = self._promising(n)
            self.seen.update(arch.digest for arch in archs)
        archs += unseen(lambda: self.problem.space.sample(self.rng), n - len(archs), self.seen)
        codes = self.space.encode(archs).tolist()
        self.waiting.update((arch.digest, row) for arch, row in zip(archs, codes, strict=True))
        return archs

    def tell(self, trials: Sequence[Trial]) -> None:
        """Keep what came of them."""
        for trial, codes in zip(trials, self.space.encode(trial.arch for trial in trials).tolist(), strict=True):
            self.waiting.pop(trial.arch.digest, None)
            self.seen.add(trial.arch.digest)
            self.told.append((codes, self._gains(trial)))

    def state_dict(self) -> dict[str, Json]:
        """Return everything that later archs depend on; processes are fitted again, to the same trials."""
        return {
            "seed": self.seed,
            "told": [[[*codes], gains and [*gains]] for codes, gains in self.told],
            "waiting": {digest: [*codes] for digest, codes in self.waiting.items()},
            "seen": sorted(self.seen),
            "rng": self.rng.bit_generator.state,
        }

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Go on from a state that `state_dict` gave."""
        self.seed = state["seed"]
        self.told = [(codes, gains) for codes, gains in state["told"]]
        self.waiting, self.seen = dict(state["waiting"]), set(state["seen"])
        self.rng.bit_generator.state = state["rng"]

    def _gains(self, trial: Trial) -> list[float] | None:
        objectives = self.problem.objectives
        if not trial.ok:
            return None
        if objectives.pareto and len(objectives.objectives) > 1:
            gains = [goal.gain(trial.metrics) for goal in objectives.objectives]
        else:
            gains = [objectives.score(trial)]
        return gains if all(map(math.isfinite, gains)) else None

    def _data(self) -> tuple[Codes, np.ndarray]:
        """Return codes and gains to fit to; what does not count is as bad as the worst."""
        codes = np.array([row for row, _ in self.told])
        counting = np.array([gains for _, gains in self.told if gains is not None])
        worst = counting.min(axis=0)
        gains = np.array([worst if own is None else own for _, own in self.told])
        half = self.options.most // 2
        if len(codes) > 2 * half:
            rank = ((gains - worst) / (np.ptp(counting, axis=0) + 1e-12)).sum(axis=1)
            best = np.argsort(-rank[:-half], kind="stable")[:half]
            kept = np.concatenate([np.sort(best), np.arange(len(codes) - half, len(codes))])
            codes, gains = codes[kept], gains[kept]
        return codes, gains

    def _promising(self, n: int) -> list[Arch]:
        codes, gains = self._data()
        with seeded(self.seed + len(self.told)):
            process = Process(features(self.space, codes), gains)
            order = np.argsort(-gains.sum(axis=1), kind="stable") if gains.shape[1] == 1 else np.arange(len(codes))
            pool = self._evolved(process, codes[order][: self.options.population], gains.shape[1])
            if not len(pool):
                return []
            waiting = np.array([*self.waiting.values()]).reshape(len(self.waiting), len(self.space.variables))
            rows = features(self.space, pool)
            chosen = process.choose(rows, min(n, len(pool)), features(self.space, waiting), self.seed)
        return [*dict.fromkeys(self.space.decode(pool[np.array(chosen)]))]

    def _evolved(self, process: Process, start: Codes, objectives: int) -> Codes:
        """Return the archs that are new and did best on any of several bounds."""
        directions = [np.ones(1)]
        if objectives > 1:
            directions = [*self.rng.dirichlet(np.ones(objectives), size=_DIRECTIONS)]
        found = []
        for width in _WIDTHS:
            for weights in directions:
                best = self._evolved_on(process, start, weights, width)
                found.append(best[: max(1, self.options.population // len(directions))])
        codes = np.unique(np.concatenate(found), axis=0)
        new = [arch.digest not in self.seen for arch in self.space.decode(codes)]
        return codes[new]

    def _evolved_on(self, process: Process, start: Codes, weights: np.ndarray, width: float) -> Codes:
        """Return the last generation, best first; half of the first one is random."""
        n, space = self.options.population, self.problem.space
        population = np.unique(np.concatenate([space.admit(start), space.draw(self.rng, n)]), axis=0)
        for generation in range(self.options.generations + 1):
            bound = process.bound(features(self.space, population), weights, width)
            population = population[np.argsort(-bound, kind="stable")[:n]]
            if generation < self.options.generations:
                population = np.unique(
                    np.concatenate([population, self._children(population[: max(2, n // 2)])]), axis=0
                )
        return population

    def _children(self, parents: Codes) -> Codes:
        def chosen() -> Codes:
            return parents[self.rng.integers(len(parents), size=_SPARE * self.options.population)]

        crossed = self.space.crossed(chosen(), chosen(), self.rng)
        mutants = self.space.mutated(crossed, min(0.5, 2 / len(self.space.variables)), self.rng)
        return self.problem.space.admit(mutants)[: self.options.population]


def features(space: SearchSpace, codes: Codes) -> np.ndarray:
    """Return a row for each arch: a one-hot code for each variable, zeros where it is inactive."""
    active = space.active(codes)
    blocks = [_block(variable, codes[:, at]) * active[:, at, None] for at, variable in enumerate(space.variables)]
    return np.concatenate([np.zeros((len(codes), 0)), *blocks], axis=1)


def _block(variable: Variable, codes: np.ndarray) -> np.ndarray:
    if variable.continuous:
        return np.stack([np.ones(len(codes)), codes], axis=1)
    if len(variable.choices) > _ONE_HOT and not isinstance(variable.choices[0], str):
        choices = np.array(variable.choices, float)
        place = (choices[codes.astype(int)] - choices.min()) / np.ptp(choices)
        return np.stack([np.ones(len(place)), place], axis=1)
    return np.eye(len(variable.choices))[codes.astype(int)]
