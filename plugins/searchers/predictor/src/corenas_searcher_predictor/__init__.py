"""An accuracy predictor: evolution on it as a searcher, and by itself as an evaluator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from attrs import field, frozen
from attrs.validators import ge, gt, le, min_len, optional

from corenas.contracts import EvaluatorContext, LiveEvaluator, LiveTask, Metric, Problem, Surroundings
from corenas.hookspecs import hookimpl

if TYPE_CHECKING:
    from corenas_searcher_predictor.search import PredictorSearch


@frozen
class Predictor:
    """Measures archs at random, fits a predictor to them, and measures what evolves on it, round after round.

    Once-for-All (Cai et al. 2020, arXiv:1908.09791) has one round, LINAS (Cummings et al. 2022, arXiv:2205.10358) many.
    A trial's `extra` has what was expected of it, and how well the predictor did on trials that it had not seen: root
    mean square error, Kendall's and Spearman's rank correlation, on a fifth held out and on the last round's archs.

    initial: archs that are drawn at random first; left out, half of the trials
    per_round: archs that are measured before the predictor is fitted again
    model: "boosting" or "forest", trees; "ridge", a linear model; "mlp", Once-for-All's network of 3 layers of 400
    population: archs of a generation on the predictor
    parents: share of a generation that breeds the next
    mutation: share of the children that are mutated copies of one parent; the others are mixed from two
    mutation_prob: chance of each variable of a mutated copy to be drawn again
    generations: how many there are on one predictor
    """

    initial: int | None = field(default=None, validator=optional(ge(2)))
    per_round: int = field(default=20, validator=ge(1))
    model: Literal["boosting", "ridge", "forest", "mlp"] = "boosting"
    population: int = field(default=100, validator=ge(2))
    parents: float = field(default=0.25, validator=[gt(0.0), le(1.0)])
    mutation: float = field(default=0.5, validator=[ge(0.0), le(1.0)])
    mutation_prob: float = field(default=0.1, validator=[gt(0.0), le(1.0)])
    generations: int = field(default=50, validator=ge(0))

    def idle(self, around: Surroundings) -> Mapping[str, str]:
        """Return options that do nothing, and that nothing is learnt in a search that ends before it begins to."""
        idle = {} if self.mutation else {"mutation_prob": "no children are mutated"}
        return idle | around.idle_searcher(self.initial)

    def start(self, problem: Problem, rng: np.random.Generator) -> PredictorSearch:
        """Return a search whose first archs are random, unless earlier searches of the run have measured enough."""
        from corenas_searcher_predictor.search import PredictorSearch

        return PredictorSearch(self, problem, rng)


@frozen
class Target:
    """A metric that is predicted.

    metric: its name among what was measured
    unit: as it is printed, "%" for instance
    direction: whether more is better, "max", or less, "min"
    """

    metric: str
    unit: str = ""
    direction: Literal["max", "min"] = "max"


@frozen
class Predicted:
    """Predicts metrics from what was measured before, `predicted_top1` for `top1`: thousands of archs a second.

    from: what was measured: a run directory, or a CSV file with a column for each variable's key and for each metric
    metrics: which are predicted: a name, or a table with `metric`, `unit` and `direction`
    model: as the searcher "predictor" has them: "boosting", "ridge", "forest" or "mlp"
    """

    from_: str
    metrics: tuple[str | Target, ...] = field(validator=min_len(1))
    model: Literal["boosting", "ridge", "forest", "mlp"] = "boosting"

    cheap: ClassVar[bool] = True

    @property
    def targets(self) -> list[Target]:
        """The metrics in their long form."""
        return [Target(target) if isinstance(target, str) else target for target in self.metrics]

    def provides(self, task: LiveTask) -> Mapping[str, Metric]:
        """Return the predictions of what is named."""
        return {f"predicted_{target.metric}": Metric(target.unit, target.direction) for target in self.targets}

    def start(self, context: EvaluatorContext) -> LiveEvaluator:
        """Fit to what was measured. Raises UserError if that cannot be read or is too little."""
        from corenas_searcher_predictor.measured import LivePredicted

        return LivePredicted(self, context.space)


@hookimpl
def corenas_evaluators() -> Mapping[str, type]:
    """Offer the evaluator "predictor"."""
    return {"predictor": Predicted}


@hookimpl
def corenas_searchers() -> Mapping[str, type]:
    """Offer the searcher "predictor"."""
    return {"predictor": Predictor}
