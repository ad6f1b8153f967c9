"""A mutator that attends to the best, or to the worst, of archs that cost the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from attrs import field, fields, frozen
from attrs.validators import ge, optional

from corenas.contracts import MutatorContext, Surroundings
from corenas.features import Features
from corenas.space import Arch
from corenas_mutator_sampling.drawing import CostBins, Score, check_amount, check_width, with_paths
from corenas_mutator_sampling.predicted import LossPredictor


@frozen
class Attentive:
    """The largest arch, attentively sampled ones, the smallest (AttentiveNAS, Wang et al. 2021, arXiv:2011.09011).

    For each arch in between, a bin of flops is drawn from a prior and some candidates in it. Of these the one with the
    lowest loss on the step's batch is trained (best-up), or the one with the highest (worst-up).

    paths: archs of a step, the largest and the smallest among them
    candidates: archs that one is chosen from; 1 chooses none. The paper's 3 by their losses, 50 by a predictor
    predictor: archs, at random, to whose losses on one batch a predictor is fitted, by which candidates are told apart
        from then on, at no cost; the paper's is 1024. Left out, they are by their losses on the step's batch
    after: steps of the phase before the predictor is fitted, in which candidates are not told apart
    rule: which one is trained: "best-up" or "worst-up"
    prior: how likely a bin is: "archs", as the share of all archs that it has; "uniform", as likely as the others
    metric: what is binned: "flops", "params" or "activations"
    bins: how many bins there are between `low` and `high`, unless `width` says how wide they are
    width: how wide a bin is; the paper's is "25M"
    low: where the first bin begins; left out, at the cheapest of the archs drawn beforehand
    high: where the last bin ends; left out, at the most costly of these
    draws: archs drawn beforehand, from whose exact costs the prior is estimated
    tries: archs drawn at a step to find candidates in a bin, before some that were drawn beforehand are taken
    """

    paths: int = field(default=4, validator=ge(2))
    candidates: int = field(default=3, validator=ge(1))
    predictor: int | None = field(default=None, validator=optional(ge(2)))
    after: int = field(default=0, validator=ge(0))
    rule: Literal["best-up", "worst-up"] = "best-up"
    prior: Literal["archs", "uniform"] = "archs"
    metric: Literal["flops", "params", "activations"] = "flops"
    bins: int = field(default=20, validator=ge(1))
    width: float | str | None = field(default=None, validator=check_width)
    low: float | str | None = field(default=None, validator=check_amount)
    high: float | str | None = field(default=None, validator=check_amount)
    draws: int = field(default=10_000, validator=ge(1))
    tries: int = field(default=500, validator=ge(0))

    def idle(self, around: Surroundings) -> Mapping[str, str]:
        """Return options that do nothing beside the others, and why."""
        idle = {} if self.width is None else {"bins": "`width` says how wide they are"}
        if self.predictor is None:
            idle["after"] = "no predictor is fitted"
        if self.candidates == 1:
            idle |= dict.fromkeys(("predictor", "after", "rule"), "of one candidate there is nothing to choose")
        if self.paths == 2:
            names = {item.name for item in fields(type(self))} - {"paths"}
            idle |= dict.fromkeys(names, "two paths are the largest and the smallest arch")
        return idle

    def start(self, context: MutatorContext) -> AttentiveSampler:
        """Return a sampler. Raises UserError if no arch costs what the bounds say."""
        return AttentiveSampler(with_paths(self, context), context)


class AttentiveSampler:
    """Both ends of the space, and the best or worst of some candidates in each of some bins between them.

    steps: how many there were
    predicted: what candidates are told apart by, if that is a predictor and it is fitted
    """

    def __init__(self, options: Attentive, context: MutatorContext) -> None:
        self.options, self.space, self.rng = options, context.space, context.rng
        self.bins = CostBins(options, context)
        self.largest, self.smallest = self.space.largest(), self.space.smallest()
        self.steps = 0
        self.predicted: LossPredictor | None = None

    def sample(self, score: Score) -> list[Arch]:
        """Return the largest, those that were attended to, the smallest, in this order (algorithm 1)."""
        size = self.options.predictor
        if size is not None and self.predicted is None and self.steps >= self.options.after:
            codes = self.space.draw(self.rng, size)
            self.predicted = LossPredictor.fitted(self.space, codes, score(self.space.decode(codes)))
        self.steps += 1
        return [self.largest, *(self._attended(score) for _ in range(self.options.paths - 2)), self.smallest]

    def state_dict(self) -> dict[str, Any]:
        """Return the steps, and what the predictor has learnt."""
        found = self.predicted
        return {
            "steps": self.steps,
            "predictor": None if found is None else [found.mean, *found.coefficients.tolist()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.steps, self.predicted = state["steps"], None
        if state["predictor"] is not None:
            mean, *coefficients = state["predictor"]
            self.predicted = LossPredictor(Features(self.space, squares=True), np.array(coefficients), mean)

    def _attended(self, score: Score) -> Arch:
        """Return the arch of one draw of the prior, pi(tau), that gamma picks from its candidates (eqs. 5 and 6)."""
        number = self.bins.choose(uniform=self.options.prior == "uniform")
        codes = self.bins.draw(number, self.options.candidates)
        candidates = self.space.decode(codes)
        if len(candidates) == 1 or (self.options.predictor is not None and self.predicted is None):
            return candidates[0]
        losses = np.asarray(score(candidates) if self.predicted is None else self.predicted(codes))
        best = losses.argmin() if self.options.rule == "best-up" else losses.argmax()
        return candidates[int(best)]
