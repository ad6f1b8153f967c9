"""NAS without weight sharing, and search of hyper-parameters: every trial trains its own network from scratch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from attrs import field, frozen
from attrs.validators import ge, le

from corenas.contracts import (
    AlgorithmContext,
    EvaluatorContext,
    Event,
    LiveEvaluator,
    LiveTask,
    Metric,
    RunDone,
    Trainer,
)
from corenas.errors import UserError
from corenas.hookspecs import hookimpl


@frozen
class Alone:
    """Searches without a supernet: the evaluator `stand_alone` trains each arch by itself, the best is trained again.

    Choices of variables named `spec:…` override the spec in each training, so it is search of hyper-parameters too.

    search: false trains the default arch alone, as the spec of a finished run, `best/spec.toml`, asks for
    """

    search: bool = True

    @property
    def stages(self) -> tuple[str, ...]:
        """What a run does."""
        return ("search", "retrain") if self.search else ("retrain",)

    @property
    def needs(self) -> tuple[str, ...]:
        """What a spec must have."""
        return ("searcher",) if self.search else ()

    def start(self, context: AlgorithmContext) -> Trainer:
        """Raise UserError: a run never asks for it, since "train" is none of the stages."""
        raise UserError("there is no supernet to train", key=("algorithm",))


@frozen
class StandAlone:
    """The task's metrics of an arch that is trained from scratch as `[train]` says, on validation data.

    A lower fidelity is the first share of the epochs; a trial with a higher one goes on from there. Nothing is
    recalibrated: the statistics are those of the training.

    seeds: how often each arch is trained, each time with another seed; metrics are means, and their spread is kept
    curve: how many times it is measured on the way too, each at half of the next one's epochs; what is found is kept,
        and `corenas sweep` shows whether archs are trained out
    """

    seeds: int = field(default=1, validator=ge(1))
    curve: int = field(default=0, validator=[ge(0), le(16)])

    cheap: ClassVar[bool] = False

    def provides(self, task: LiveTask) -> Mapping[str, Metric]:
        """What the task's meter computes."""
        return task.metrics

    def start(self, context: EvaluatorContext) -> LiveEvaluator:
        """Return what trains and measures archs."""
        from corenas_algorithm_alone.measuring import TrainedAlone

        return TrainedAlone(self.seeds, context, self.curve)


@hookimpl
def corenas_algorithms() -> dict[str, type]:
    """Offer the algorithm "alone"."""
    return {"alone": Alone}


@hookimpl
def corenas_evaluators() -> dict[str, type]:
    """Offer the evaluator "stand_alone"."""
    return {"stand_alone": StandAlone}


@hookimpl
def corenas_event(event: Event) -> None:
    """Write the spec of what a search of hyper-parameters has found, which can be run."""
    if isinstance(event, RunDone):
        from corenas_algorithm_alone.found import write_found_spec

        write_found_spec(event.folder, event.result)
