"""How archs are measured: costs first, then what is cheap, and what is costly only where the constraints are met."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import attrs
import torch
from attrs import frozen

from corenas import seeding
from corenas.contracts import (
    Batched,
    Evaluator,
    EvaluatorContext,
    Exclusive,
    Failure,
    LiveEvaluator,
    Measured,
    Racer,
    Rival,
    Stopped,
)
from corenas.cost import METRICS, Cost
from corenas.errors import UserError, blaming_plugin, staying_here, told
from corenas.objectives import Constraint, Trial
from corenas.space import Arch


@frozen
class NamedEvaluator:
    """A live evaluator with the name that messages call it by.

    metrics: those that it promises, exactly
    """

    name: str
    metrics: frozenset[str]
    measure: LiveEvaluator


@frozen
class TrialRunner:
    """Evaluators in the order in which they are asked; each adds its metrics to the trials that still count.

    batch: how many archs are best measured at once
    seed: of torch's global generator, which is seeded for an arch that is measured by itself
    rival: whom archs race against; None where they do not
    """

    evaluators: Sequence[NamedEvaluator]
    constraints: Sequence[Constraint] = ()
    seed: int = 0
    batch: int = 1
    rival: Rival | None = None

    def __call__(self, trials: Sequence[Trial]) -> list[Trial]:
        """Return the trials with what the evaluators measure; one that is infeasible or has failed is left as it is.

        All trials have one fidelity. What an evaluator raises makes a failed trial with the reason.
        """
        finished = [*trials]
        for evaluator in self.evaluators:
            rows = [row for row, trial in enumerate(finished) if trial.ok]
            if not rows:
                break
            archs = [finished[row].arch for row in rows]
            start = time.perf_counter()
            results = self._results(evaluator, archs, trials[0].fidelity)
            seconds = (time.perf_counter() - start) / len(rows)
            for row, result in zip(rows, results, strict=True):
                finished[row] = self._extended(finished[row], evaluator.name, result, seconds)
        return finished

    def measure(self, arch: Arch, fidelity: float = 1.0) -> Trial:
        """Return the trial of one arch."""
        return self([Trial(arch, fidelity=fidelity)])[0]

    def _results(
        self, evaluator: NamedEvaluator, archs: Sequence[Arch], fidelity: float
    ) -> list[Measured | Failure | Stopped]:
        """Return what an evaluator says of some archs.

        Each is measured by itself if that fails for several, or if it drew from torch's global generator, which can be
        seeded for one arch alone.
        """
        measure = evaluator.measure
        try:
            if self.rival is not None and isinstance(measure, Racer):
                measure = measure.against(self.rival)
            with staying_here(), seeding.seeded(self.seed, "measure", int(archs[0].digest, 16) >> 1):
                before = torch.get_rng_state()
                results = [*measure(archs, fidelity)]
                drew = not torch.equal(before, torch.get_rng_state())
            if len(results) != len(archs):
                raise ValueError(f"it was asked for {len(archs)} archs and measured {len(results)}")
            if not drew or len(archs) == 1:
                return [_checked(result, evaluator.metrics) for result in results]
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            if len(archs) == 1:
                return [Failure(told(error))]
        return [self._results(evaluator, [arch], fidelity)[0] for arch in archs]

    def _extended(self, trial: Trial, name: str, result: Measured | Failure | Stopped, seconds: float) -> Trial:
        """Return a trial with the result of one evaluator more."""
        trial = attrs.evolve(trial, seconds=trial.seconds + seconds)
        if isinstance(result, Failure):
            return attrs.evolve(trial, state="failed", error=f"{name}: {result.reason}")
        if isinstance(result, Stopped):
            extra = {**trial.extra, **result.extra}
            return attrs.evolve(trial, state="stopped", error=f"{name}: {result.reason}", extra=extra)
        metrics = {**trial.metrics, **result.metrics}
        trial = attrs.evolve(trial, metrics=metrics, extra={**trial.extra, **result.extra})
        reason = broken(self.constraints, metrics)
        return trial if reason is None else attrs.evolve(trial, state="infeasible", error=reason)


def _checked(result: Any, promised: frozenset[str]) -> Measured | Failure | Stopped:
    """Return an evaluator's result in plain numbers; a `Failure` where its metrics are not those that it promised."""
    if isinstance(result, Failure | Stopped):
        return result
    measured = result if isinstance(result, Measured) else Measured(result)
    names = measured.metrics.keys()
    if names != promised:
        given = ", ".join(map(str, names)) or "nothing"
        return Failure(f"promised {', '.join(sorted(promised))} and gave {given}")
    return Measured(plain(measured.metrics), dict(measured.extra))


def plain(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return metrics as plain numbers, which can be stored; one of numpy or torch becomes a float.

    Raises as `float` does.
    """
    if text := [name for name, n in metrics.items() if isinstance(n, str | bytes)]:
        raise TypeError(f"{text[0]} is text, no number")
    return {str(name): n if type(n) is int and abs(n) < 1 << 63 else float(n) for name, n in metrics.items()}


def broken(constraints: Sequence[Constraint], metrics: Mapping[str, float]) -> str | None:
    """Return which constraint metrics do not meet, as a reason; None if they meet all."""
    return next((f"not {constraint}" for constraint in constraints if not constraint.met(metrics)), None)


def is_exclusive(evaluator: Evaluator) -> bool:
    """Return whether an evaluator wants the machine for itself."""
    return isinstance(evaluator, Exclusive) and evaluator.exclusive


def is_costly(evaluator: Evaluator) -> bool:
    """Return whether an evaluator is measured last, and may be spread over workers."""
    return not evaluator.cheap and not is_exclusive(evaluator)


def largest_batch(evaluators: Iterable[Evaluator]) -> int:
    """Return how many archs the greediest of some evaluators wants at once."""
    return max((evaluator.batch for evaluator in evaluators if isinstance(evaluator, Batched)), default=1)


def trial_runner(
    evaluators: Mapping[str, Evaluator],
    context: EvaluatorContext,
    constraints: Sequence[Constraint] = (),
    seed: int = 0,
    where: Callable[[Evaluator], bool] = lambda evaluator: True,
    costs: bool = True,
) -> TrialRunner:
    """Return the runner of some evaluators (name -> options): costs first, then cheap ones, then the others.

    where: which of them
    costs: whether flops, params and activations are among what it measures
    Raises UserError, naming it, for an evaluator that cannot be started.
    """
    live = [NamedEvaluator("cost", frozenset(METRICS), _measure_cost(context.cost))] if costs else []
    started = {name: evaluator for name, evaluator in evaluators.items() if where(evaluator)}
    for name, evaluator in sorted(started.items(), key=lambda item: not item[1].cheap):
        with blaming_plugin(name):
            metrics = frozenset(evaluator.provides(context.task))
            live.append(NamedEvaluator(name, metrics, evaluator.start(context)))
    return TrialRunner(live, constraints, seed, largest_batch(started.values()))


def _measure_cost(cost: Cost) -> LiveEvaluator:
    return lambda archs, fidelity: cost.of(archs)
