"""Rounds of evolution on a predictor that is fitted to all trials so far."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from corenas.contracts import Json, Problem, Proposal
from corenas.features import Features
from corenas.objectives import Trial
from corenas.space import Arch, Codes, SearchSpace, unseen
from corenas_searcher_predictor.regression import Regression, agreement, held_out

if TYPE_CHECKING:
    from corenas_searcher_predictor import Predictor

_FEWEST = 5
"""Trials without which nothing is fitted."""


class PredictorSearch:
    """Random archs first, then one round at a time: all of it is told before the predictor is fitted again.

    told: codes -> metrics of the trials that it learns from, in order
    pending, waiting: what of the round is yet to be asked, and (digests) what was asked and is yet to be told
    expected: digest -> what was predicted, of what was asked; newest: those of the last round that were told
    """

    def __init__(self, options: Predictor, problem: Problem, rng: np.random.Generator) -> None:
        self.options, self.problem, self.rng = options, problem, rng
        self.space = SearchSpace(problem.space.variables)
        self.features = Features(self.space, squares=True)
        self.seed = int(rng.integers(1 << 31))
        self.round = 0
        self.told: dict[tuple[float, ...], Mapping[str, float]] = {}
        self.pending: list[Proposal] = []
        self.waiting: set[str] = set()
        self.seen: set[str] = set()
        self.expected: dict[str, dict[str, float]] = {}
        self.newest: list[tuple[Mapping[str, float], Mapping[str, float]]] = []
        self._learn(problem.known)
        costs = {} if problem.cost is None else problem.cost(self.space.encode([self.space.default()]))
        objectives = problem.objectives
        metrics = [goal.metric for goal in objectives.objectives] + [limit.metric for limit in problem.constraints]
        metrics += [] if objectives.bin_metric is None else [objectives.bin_metric]
        self.cheap = {metric for metric in metrics if metric in costs}
        self.costly = [*dict.fromkeys(metric for metric in metrics if metric not in costs)]

    def ask(self, n: int) -> list[Arch | Proposal]:
        """Return up to n archs of the round; none while some of it is untold, or where nothing new is left."""
        if n > 0 and not self.pending and not self.waiting:
            self.pending = self._next_round()
        asked, self.pending = self.pending[:n], self.pending[n:]
        self.waiting.update(proposal.arch.digest for proposal in asked)
        return [*asked]

    def tell(self, trials: Sequence[Trial]) -> None:
        """Keep the figures to learn from, whether or not the trial counts."""
        self.waiting.difference_update(trial.arch.digest for trial in trials)
        self.seen.update(trial.arch.digest for trial in trials)
        self._learn(trials)
        for trial in trials:
            predicted = self.expected.pop(trial.arch.digest, None)
            if predicted:
                self.newest.append((predicted, _finite(trial.metrics)))

    def state_dict(self) -> dict[str, Json]:
        """Return everything that later rounds depend on; predictors are fitted again, to the same trials."""
        pending = [[dict(proposal.arch), dict(proposal.extra)] for proposal in self.pending]
        return {
            "seed": self.seed,
            "round": self.round,
            "told": [[[*codes], dict(metrics)] for codes, metrics in self.told.items()],
            "pending": pending,
            "waiting": sorted(self.waiting),
            "seen": sorted(self.seen),
            "expected": {digest: dict(predicted) for digest, predicted in self.expected.items()},
            "newest": [[dict(predicted), dict(measured)] for predicted, measured in self.newest],
            "rng": self.rng.bit_generator.state,
        }

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Go on from a state that `state_dict` gave."""
        self.seed, self.round = state["seed"], state["round"]
        self.told = {tuple(codes): metrics for codes, metrics in state["told"]}
        self.pending = [Proposal(Arch(arch), extra=extra) for arch, extra in state["pending"]]
        self.waiting, self.seen = set(state["waiting"]), set(state["seen"])
        self.expected = {digest: dict(predicted) for digest, predicted in state["expected"].items()}
        self.newest = [(predicted, measured) for predicted, measured in state["newest"]]
        self.rng.bit_generator.state = state["rng"]

    def _learn(self, trials: Sequence[Trial]) -> None:
        whole = [trial for trial in trials if trial.fidelity == 1 and trial.state != "failed"]
        codes = self.space.encode(trial.arch for trial in whole).tolist()
        self.told |= {tuple(row): _finite(trial.metrics) for row, trial in zip(codes, whole, strict=True)}

    def _next_round(self) -> list[Proposal]:
        options = self.options
        initial = options.initial or max(2, self.problem.budget // 2)
        fitted = [] if len(self.told) < initial and self.round == 0 else self._fit()
        self.round += 1
        if not fitted:
            missing = initial - len(self.told) if self.round == 1 else options.per_round
            return [*map(Proposal, self._random(missing))]
        predictors, facts = fitted
        chosen = self._evolved(predictors)
        for trial in chosen:
            predicted = {metric: trial.metrics[metric] for metric in self.costly}
            self.expected[trial.arch.digest] = predicted
            self.seen.add(trial.arch.digest)
        self.newest = []
        proposals = [
            Proposal(
                trial.arch,
                extra={
                    "round": self.round,
                    **{f"{metric}_predicted": trial.metrics[metric] for metric in self.costly},
                    **facts,
                },
            )
            for trial in chosen
        ]
        return [*proposals, *map(Proposal, self._random(options.per_round - len(chosen)))]

    def _random(self, n: int) -> list[Arch]:
        return unseen(lambda: self.problem.space.sample(self.rng), n, self.seen)

    def _fit(self) -> tuple[dict[str, Regression], dict[str, float]] | None:
        """Return a predictor of each costly metric and how well they do; None where too little is known."""
        predictors: dict[str, Regression] = {}
        facts: dict[str, float] = {}
        codes = np.array([*self.told]).reshape(len(self.told), len(self.space.variables))
        rows = self.features(codes)
        for metric in self.costly:
            known = [at for at, metrics in enumerate(self.told.values()) if metric in metrics]
            if len(known) < _FEWEST:
                return None
            targets = np.array([metrics[metric] for metrics in self.told.values() if metric in metrics])
            seed = self.seed ^ self.round
            predictors[metric] = Regression(self.options.model, rows[known], targets, seed)
            told = held_out(self.options.model, rows[known], targets, seed)
            facts |= {f"{metric}_{name}": number for name, number in told.items()}
            pairs = [(mine[metric], told[metric]) for mine, told in self.newest if metric in told]
            if len(pairs) > 1:
                newest = agreement(*zip(*pairs, strict=True))
                facts |= {f"{metric}_last_round_{name}": number for name, number in newest.items()}
        return predictors, facts

    def _evolved(self, predictors: Mapping[str, Regression]) -> list[Trial]:
        """Return the best archs that are new, as what is expected of them."""
        options, objectives = self.options, self.problem.objectives
        ranked = objectives.best([self._measured(*told) for told in self.told.items()], options.population)
        population = self._expected(self.problem.space.encode(trial.arch for trial in ranked), predictors)
        population += self._expected(self._drawn(options.population), predictors)
        best: list[Trial] = []
        children = population
        parents = max(1, round(options.parents * options.population))
        for generation in range(options.generations + 1):
            best = objectives.best([*best, *(t for t in children if t.arch.digest not in self.seen)], options.per_round)
            population = objectives.best([*population, *children], parents)
            if generation < options.generations:
                children = self._expected(self._children(population), predictors)
        return best

    def _measured(self, codes: Sequence[float], metrics: Mapping[str, float]) -> Trial:
        (arch,) = self.space.decode(np.array([codes]))
        return self._judged(arch, {metric: metrics.get(metric, math.nan) for metric in (*self.costly, *self.cheap)})

    def _judged(self, arch: Arch, metrics: Mapping[str, float]) -> Trial:
        met = all(limit.met(metrics) for limit in self.problem.constraints)
        return Trial(arch, metrics, "done" if met else "infeasible")

    def _expected(self, codes: Codes, predictors: Mapping[str, Regression]) -> list[Trial]:
        """Return archs as trials, their costly metrics predicted, the others exact."""
        if not len(codes):
            return []
        rows = self.features(codes)
        columns: dict[str, Any] = {metric: predict(rows).tolist() for metric, predict in predictors.items()}
        if self.cheap and self.problem.cost is not None:
            costs = self.problem.cost(codes)
            columns |= {metric: costs[metric].tolist() for metric in self.cheap}
        archs = self.space.decode(codes)
        return [self._judged(arch, {m: column[at] for m, column in columns.items()}) for at, arch in enumerate(archs)]

    def _drawn(self, n: int) -> Codes:
        return self.problem.space.draw(self.rng, n)

    def _children(self, parents: Sequence[Trial]) -> Codes:
        """Return children, which obey the cheap constraints; new archs where there are no parents."""
        options, n = self.options, self.options.population
        if not parents:
            return self._drawn(n)
        codes, space = self.space.encode(trial.arch for trial in parents), self.problem.space
        mutants = round(options.mutation * n)

        def chosen(number: int) -> Codes:
            return codes[self.rng.integers(len(codes), size=number)]

        mutated = space.mutated(chosen(mutants), options.mutation_prob, self.rng)
        return np.concatenate([mutated, space.crossed(chosen(n - mutants), chosen(n - mutants), self.rng)])


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    return {metric: number for metric, number in metrics.items() if math.isfinite(number)}
