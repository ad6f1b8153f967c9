"""Archs that evolve on a confidence bound."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from corenas.contracts import Json, Problem
from corenas.features import Features
from corenas.objectives import Trial
from corenas.space import Arch, Codes, SearchSpace, unseen
from corenas_searcher_bayesian.process import Process, chosen, volume_in_direction

if TYPE_CHECKING:
    from corenas_searcher_bayesian import Bayesian

_FEWEST = 3
"""Trials that count, without which nothing is fitted."""
_WIDTHS = (0.5, 2.0)
"""Of the bounds that archs evolve on, in deviations: one seeks what is good, the other what is not known."""
_DIRECTIONS = 4
"""In Pareto mode so many random weights of the objectives for each of them."""


class BayesianSearch:
    """Random archs first; then at each ask a process is fitted to what was told, and archs evolve on it.

    told: codes and gains of trials, None for one that does not count
    waiting: digest -> codes of what was asked and is yet to be told
    """

    def __init__(self, options: Bayesian, problem: Problem, rng: np.random.Generator) -> None:
        self.options, self.problem, self.rng = options, problem, rng
        self.space = SearchSpace(problem.space.variables)
        self.features = Features(self.space)
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
            "told": [[[*codes], gains and [*gains]] for codes, gains in self.told],
            "waiting": {digest: [*codes] for digest, codes in self.waiting.items()},
            "seen": sorted(self.seen),
            "rng": self.rng.bit_generator.state,
        }

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Go on from a state that `state_dict` gave."""
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
        """Return up to n new archs that improve most together."""
        codes, gains = self._data()
        spread = gains.std(axis=0)
        gains = (gains - gains.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
        rows = self.features(codes)
        processes = [Process(rows, column) for column in gains.T]
        pool = self._evolved(processes, codes, gains)
        if not len(pool):
            return []
        waiting = np.array([*self.waiting.values()]).reshape(len(self.waiting), len(self.space.variables))
        both = self.features(np.concatenate([pool, waiting]))
        samples = np.stack([process.samples(both, self.rng) for process in processes], axis=2)
        reached = np.stack(
            [process(rows)[0] for process in processes], axis=1
        )  # without the noise of what was measured
        if len(processes) == 1:
            picked = chosen(samples[:, :, 0], np.full(len(samples), reached.max()), n, len(waiting))
        else:
            worst, best = gains.min(axis=0), gains.max(axis=0)
            directions = np.abs(self.rng.standard_normal((len(samples), len(processes))))
            directions *= np.maximum(best - worst, 1e-9) / np.linalg.norm(directions, axis=1, keepdims=True)
            origin = worst - 0.1 * (best - worst)
            done = volume_in_direction(np.broadcast_to(reached - origin, (len(samples), *reached.shape)), directions)
            picked = chosen(volume_in_direction(samples - origin, directions), done.max(axis=1), n, len(waiting))
        return self.space.decode(pool[np.array(picked)])

    def _evolved(self, processes: Sequence[Process], codes: Codes, gains: np.ndarray) -> Codes:
        """Return the archs that are new and did best on any of several bounds."""
        weights = np.ones((1, 1))
        if len(processes) > 1:
            weights = self.rng.dirichlet(np.ones(len(processes)), size=_DIRECTIONS)
        found = []
        for width in _WIDTHS:
            for own in weights:
                start = codes[np.argsort(-(gains @ own), kind="stable")[: self.options.population]]
                best = self._evolved_on(processes, start, own, width)
                found.append(best[: max(1, self.options.population // len(weights))])
        pool = np.concatenate(found)
        pool = pool[_distinct(pool)]
        return pool[[arch.digest not in self.seen for arch in self.space.decode(pool)]]

    def _evolved_on(self, processes: Sequence[Process], start: Codes, weights: np.ndarray, width: float) -> Codes:
        """Return the last generation, best first; half of the first one is random, half what did best."""
        n, space = self.options.population, self.problem.space
        population = np.concatenate([space.admit(start), space.draw(self.rng, n)])
        population = population[_distinct(population)]
        bounds = self._bounds(processes, population, weights, width)
        for generation in range(self.options.generations + 1):
            best = np.argsort(-bounds, kind="stable")[:n]
            population, bounds = population[best], bounds[best]
            if generation < self.options.generations:
                children = self._children(population[: max(2, n // 2)])
                population = np.concatenate([population, children])
                bounds = np.concatenate([bounds, self._bounds(processes, children, weights, width)])
                own = _distinct(population)
                population, bounds = population[own], bounds[own]
        return population

    def _bounds(self, processes: Sequence[Process], codes: Codes, weights: np.ndarray, width: float) -> np.ndarray:
        """Return weighted upper confidence bounds: means and so many deviations."""
        rows, bounds = self.features(codes), np.zeros(len(codes))
        for process, weight in zip(processes, weights, strict=True):
            mean, deviation = process(rows)
            bounds += weight * (mean + width * deviation)
        return bounds

    def _children(self, parents: Codes) -> Codes:
        n, space = self.options.population, self.problem.space
        first, second = (parents[self.rng.integers(len(parents), size=n)] for _ in range(2))
        crossed = space.crossed(first, second, self.rng)
        return space.mutated(crossed, min(0.5, 2 / len(self.space.variables)), self.rng)


def _distinct(codes: Codes) -> np.ndarray:
    """Return the first index of each arch among some."""
    first: dict[bytes, int] = {}
    for at, row in enumerate(codes):
        first.setdefault(row.tobytes(), at)
    return np.array([*first.values()], int)
