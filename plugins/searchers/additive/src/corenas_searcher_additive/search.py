"""Rounds of solutions of a programme whose gains are fitted to all trials so far."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from sklearn.linear_model import RidgeCV

from corenas.contracts import Json, Problem, Proposal
from corenas.objectives import Constraint, Trial
from corenas.space import Arch, Codes, SearchSpace, unseen
from corenas_searcher_additive.programme import Programme

if TYPE_CHECKING:
    from corenas_searcher_additive import Additive

_FEWEST = 5
"""Trials without which nothing is fitted."""
_STEPS = 8
"""How often a cost is linearised anew, each time where the last solution lies."""
_TRIES = 2
"""So many times more solutions are looked for than wanted, since some are known."""
_CUT = 30
"""Of the archs that are known so many, those of the largest gains, are no solutions any more."""
_SLACK = 0.01
"""Share of its spread by which a metric that is not known exactly may miss its bound."""
_NEAR = 0.2
"""Chance of each variable to be drawn again in the archs to which it is fitted there."""


class AdditiveSearch:
    """Random archs first, then one round of solutions at a time: all of it is told before gains are fitted again.

    told: codes -> metrics of the trials that it learns from, in order
    pending, waiting: what of the round is yet to be asked, and (digests) what was asked and is yet to be told
    """

    def __init__(self, options: Additive, problem: Problem, rng: np.random.Generator) -> None:
        self.options, self.problem, self.rng = options, problem, rng
        self.space = SearchSpace(problem.space.variables)
        self.programme = Programme(self.space)
        self.round = 0
        self.told: dict[tuple[float, ...], Mapping[str, float]] = {}
        self.pending: list[Proposal] = []
        self.waiting: set[str] = set()
        self.seen: set[str] = set()
        self._learn(problem.known)

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

    def state_dict(self) -> dict[str, Json]:
        """Return everything that later rounds depend on; gains are fitted again, to the same trials."""
        return {
            "round": self.round,
            "told": [[[*codes], dict(metrics)] for codes, metrics in self.told.items()],
            "pending": [[dict(proposal.arch), dict(proposal.extra)] for proposal in self.pending],
            "waiting": sorted(self.waiting),
            "seen": sorted(self.seen),
            "rng": self.rng.bit_generator.state,
        }

    def load_state_dict(self, state: Mapping[str, Json]) -> None:
        """Go on from a state that `state_dict` gave."""
        self.round = state["round"]
        self.told = {tuple(codes): metrics for codes, metrics in state["told"]}
        self.pending = [Proposal(Arch(arch), extra=extra) for arch, extra in state["pending"]]
        self.waiting, self.seen = set(state["waiting"]), set(state["seen"])
        self.rng.bit_generator.state = state["rng"]

    def _learn(self, trials: Sequence[Trial]) -> None:
        whole = [trial for trial in trials if trial.fidelity == 1 and trial.state != "failed"]
        for codes, trial in zip(self.space.encode(t.arch for t in whole).tolist(), whole, strict=True):
            self.told[tuple(codes)] = {m: number for m, number in trial.metrics.items() if math.isfinite(number)}

    def _next_round(self) -> list[Proposal]:
        initial = self.options.initial or max(2, self.problem.budget // 2)
        self.round += 1
        if self.round == 1 and len(self.told) < initial:
            return [*map(Proposal, self._random(initial - len(self.told)))]
        models = [self._linear(goal.metric) for goal in self.problem.objectives.objectives]
        proposals = []
        if all(model is not None for model in models):
            limits = [self._measured_limit(c) for c in self.problem.constraints if c.metric not in self._costs]
            proposals = self._solutions([*filter(None, models)], [*filter(None, limits)])
        return [*proposals, *map(Proposal, self._random(self.options.per_round - len(proposals)))]

    def _random(self, n: int) -> list[Arch]:
        return unseen(lambda: self.problem.space.sample(self.rng), n, self.seen)

    @property
    def _costs(self) -> set[str]:
        """The metrics that are known exactly."""
        default = self.space.encode([self.space.default()])
        return set() if self.problem.cost is None else {*self.problem.cost(default)}

    def _matrix(self, codes: Sequence[Sequence[float]]) -> np.ndarray:
        return self.programme.features(np.array(codes).reshape(len(codes), len(self.space.variables)))

    def _linear(self, metric: str) -> tuple[np.ndarray, float] | None:
        """Return what each choice adds to a metric, and what all archs have; None where too little is known."""
        known = [(codes, metrics[metric]) for codes, metrics in self.told.items() if metric in metrics]
        if len(known) < _FEWEST:
            return None
        targets = np.array([target for _, target in known])
        scale = targets.std() or 1.0
        model = RidgeCV(np.logspace(-6, 4, 41)).fit(self._matrix([codes for codes, _ in known]), targets / scale)
        return model.coef_ * scale, float(model.intercept_) * scale

    def _measured_limit(self, constraint: Constraint) -> tuple[np.ndarray, float, float] | None:
        """Return a constraint on a metric that is measured as a row; None where too little is known."""
        model = self._linear(constraint.metric)
        if model is None:
            return None
        gains, base = model
        measured = [metrics[constraint.metric] for metrics in self.told.values() if constraint.metric in metrics]
        slack = _SLACK * np.std(measured)
        return gains, float(constraint.low - base - slack), float(constraint.high - base + slack)

    def _solutions(
        self, models: Sequence[tuple[np.ndarray, float]], rows: Sequence[tuple[np.ndarray, float, float]]
    ) -> list[Proposal]:
        """Return the best archs that are new, one after the other."""
        archs = self.space.decode(np.array([*self.told]).reshape(len(self.told), len(self.space.variables)))
        told = self._matrix([codes for codes, arch in zip(self.told, archs, strict=True) if arch.digest in self.seen])
        without: list[np.ndarray] = []
        proposals: list[Proposal] = []
        for _ in range(_TRIES * self.options.per_round):
            if len(proposals) == self.options.per_round:
                break
            gains, base = self._weighted(models)
            likely = told[np.argsort(-(told @ gains), kind="stable")[:_CUT]]  # what might come up again
            codes = self._solved(gains, rows, [*without, *likely])
            if codes is None:
                break
            (features,) = self.programme.features(codes)
            without.append(features)
            for arch in unseen(lambda codes=codes: self.space.decode(codes)[0], 1, self.seen, tries=1):
                expected = base + float(gains @ features)
                proposals.append(Proposal(arch, extra={"round": self.round, "score_expected": expected}))
        return proposals

    def _weighted(self, models: Sequence[tuple[np.ndarray, float]]) -> tuple[np.ndarray, float]:
        """Return the weighted sum of objectives; in Pareto mode at random, each relative to how much it varies."""
        objectives = self.problem.objectives
        weights = np.array([goal.weight for goal in objectives.objectives])
        if objectives.pareto and len(models) > 1:
            spread = np.array([np.linalg.norm(gains) or 1.0 for gains, _ in models])
            weights = self.rng.dirichlet(np.ones(len(models))) / spread
        signs = np.array([1.0 if goal.direction == "max" else -1.0 for goal in objectives.objectives])
        gains = sum(w * gains for w, (gains, _) in zip(weights * signs, models, strict=True))
        return np.asarray(gains), float(sum(w * base for w, (_, base) in zip(weights * signs, models, strict=True)))

    def _solved(
        self, gains: np.ndarray, rows: Sequence[tuple[np.ndarray, float, float]], without: Sequence[np.ndarray]
    ) -> Codes | None:
        """Return the arch of the largest gain that obeys the constraints, as far as linearising finds it."""
        cuts, visited = [*without], set()
        best: Codes | None = None
        most = -math.inf
        centre = self.problem.space.draw(self.rng, 1)
        for _ in range(_STEPS):
            codes = self.programme.solve(gains, [*rows, *self._limits(centre)], cuts)
            if codes is None:
                break
            (features,) = self.programme.features(codes)
            if not len(self.problem.space.admit(codes)):
                cuts.append(features)  # it looked cheaper than it is
            elif features @ gains > most:
                best, most = codes, features @ gains
            if codes.tobytes() in visited:
                break
            visited.add(codes.tobytes())
            if not any(c.metric in self._costs for c in self.problem.constraints):
                break
            centre = codes
        return best

    def _limits(self, centre: Codes) -> list[tuple[np.ndarray, float, float]]:
        """Return constraints on costs as rows: linear, exact for one arch and fitted to archs near it."""
        limits = [c for c in self.problem.constraints if c.metric in self._costs]
        if not limits or self.problem.cost is None:
            return []
        near = np.repeat(centre, min(2000, 4 * self.programme.size), axis=0)
        near = np.concatenate([centre, self.space.mutated(near, _NEAR, self.rng)])
        costs, features = self.problem.cost(near), self.programme.features(near)
        moves = features - features[0]
        rows = []
        for limit in limits:
            cost = costs[limit.metric].astype(float)
            scale = cost[0] or 1.0
            added = np.linalg.lstsq(moves, (cost - cost[0]) / scale, rcond=1e-8)[0]
            base = cost[0] / scale - added @ features[0]
            rows.append((added, limit.low / scale - base, limit.high / scale - base))
        return rows
