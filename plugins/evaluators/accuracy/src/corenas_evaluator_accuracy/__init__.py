"""Accuracy of a subnet with recalibrated batch norm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from attrs import evolve, frozen

from corenas.contracts import Evaluation, EvaluatorContext, LiveEvaluator, LiveTask, Metric, Rival, Stopped
from corenas.errors import UserError
from corenas.hookspecs import hookimpl
from corenas.space import Arch


@frozen
class Accuracy:
    """The task's metrics (top-1 and top-5 accuracy for classification) of a subnet with the supernet's weights.

    Batch-norm statistics are recomputed for each arch first, as `[calibration]` says. A lower fidelity is a share of
    the images.

    split: the data that is measured on; test data is for the end of a run alone
    """

    split: Literal["valid", "train"] = "valid"

    cheap: ClassVar[bool] = False
    races: ClassVar[bool] = True

    def provides(self, task: LiveTask) -> Mapping[str, Metric]:
        """What the task's meter computes."""
        return task.metrics

    def start(self, context: EvaluatorContext) -> LiveEvaluator:
        """Raises UserError if there is no trained supernet."""
        evaluation = context.evaluation
        if evaluation is None:
            raise UserError("accuracy needs a trained supernet", key=("evaluators",), hint="this algorithm trains none")

        return _Measure(evaluation, self.split)


@frozen
class _Measure:
    evaluation: Evaluation
    split: str
    rival: Rival | None = None

    def __call__(self, archs: Sequence[Arch], fidelity: float) -> list[Mapping[str, float] | Stopped]:
        if self.rival is None:
            return [self.evaluation(arch, self.split, fidelity) for arch in archs]
        return [self.evaluation.raced(arch, self.rival, self.split, fidelity) for arch in archs]

    def against(self, rival: Rival) -> _Measure:
        """What measures archs that race."""
        return evolve(self, rival=rival)


@hookimpl
def corenas_evaluators() -> dict[str, type]:
    """The evaluator "accuracy"."""
    return {"accuracy": Accuracy}
