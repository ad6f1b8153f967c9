"""What every evaluator promises: `@pytest.mark.parametrize("check", evaluator_checks)` in a plugin's tests.

Each check takes the options of an evaluator.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from corenas import seeding
from corenas.calibrate import Evaluation
from corenas.contracts import Evaluator, EvaluatorContext, Failure, LiveEvaluator, LiveTask, Measured, Metric, Stopped
from corenas.cost import METRICS, Cost
from corenas.errors import UserError
from corenas.settings import Calibration, Train
from corenas.space import Arch
from corenas.supernet import build_supernet
from corenas.testing.components import component_checks, global_generators_untouched
from corenas.testing.small import (
    Backbone,
    Paths,
    Task,
    Trainer,
    condition,
    differing,
    make_space,
    some_archs,
    supernet,
)
from corenas.train import run_training


def context(task: LiveTask | None = None, trained: bool = True, seed: int = 0) -> EvaluatorContext:
    """What an evaluator measures with: the small network, unless there is to be no supernet."""
    task = task or Task()
    space, cpu = make_space(), torch.device("cpu")
    model = supernet(space, task, seed=seed)
    cost = Cost(model, space, task.example)

    def subnet(arch: Arch) -> nn.Module:
        return build_supernet(Backbone(channels=task.example.shape[1]), space.fix(arch), task)

    def alone(arch: Arch, fidelity: float) -> nn.Module:
        network, only = subnet(arch), space.fix(arch)
        settings = Train(epochs=max(1, round(2 * fidelity)), batch_size=16)
        own = Cost(network, only, task.example)
        return run_training(Trainer(network, task, [(only, settings)]), network, task, Paths(1), own)

    evaluation = Evaluation(model, task, Calibration(batches=2, batch_size=16), cpu, seed, 16) if trained else None
    return EvaluatorContext(
        space,
        cost,
        task,
        cpu,
        model if trained else None,
        evaluation,
        subnet,
        alone,
        lambda arch: np.random.default_rng([seed, int(arch.digest, 16)]),
    )


def measured(
    evaluator: Evaluator, archs: Sequence[Arch], where: EvaluatorContext | None = None, fidelity: float = 1.0
) -> list[Mapping[str, float] | Measured | Failure | Stopped]:
    """Measure archs one by one as a search does, torch's global generator seeded for each."""
    return _one_by_one(evaluator.start(where or context()), archs, fidelity)


def _one_by_one(measure: LiveEvaluator, archs: Sequence[Arch], fidelity: float) -> list[Any]:
    found: list[Any] = []
    for arch in archs:
        with seeding.seeded(0, "measure", int(arch.digest, 16) >> 1):
            found += measure([arch], fidelity)
    return found


def _metrics(result: Mapping[str, float] | Measured | Stopped) -> Mapping[str, float]:
    assert not isinstance(result, Stopped), "is stopped, though it does not race"
    return result.metrics if isinstance(result, Measured) else result


ARCHS = some_archs(make_space(), 5)


def promises_its_metrics_before_any_data_is_read(evaluator: Evaluator) -> None:
    """Names, units and directions are known at once, and the costs, which are always there, are not among them."""
    promised = evaluator.provides(Task())
    assert promised, "promises no metric"
    assert all(isinstance(name, str) and isinstance(metric, Metric) for name, metric in promised.items())
    assert all(metric.direction in ("max", "min") for metric in promised.values())
    assert not {*promised} & {*METRICS}, "flops, params and activations are measured anyway"
    assert evaluator.provides(Task(train=0, valid=0, test=0)).keys() == promised.keys()


def says_whether_it_is_cheap(evaluator: Evaluator) -> None:
    """`cheap` is yes or no, and what is cheap measures a hundred archs a second at the very least."""
    assert isinstance(evaluator.cheap, bool)
    if evaluator.cheap:
        where = context()
        measure, archs = evaluator.start(where), some_archs(where.space, 300)
        start = time.perf_counter()
        measure(archs, 1.0)
        assert time.perf_counter() - start < 3, "is not as cheap as it says"


def gives_exactly_what_it_promises(evaluator: Evaluator) -> None:
    """One result per arch, in order: finite numbers under the promised names, or a `Failure` with its reason."""
    where = context()
    found = evaluator.start(where)(ARCHS, 1.0)
    assert len(found) == len(ARCHS)
    for result in found:
        if isinstance(result, Failure):
            assert result.reason
            continue
        if isinstance(result, Measured):
            json.dumps(dict(result.extra))
        metrics = _metrics(result)
        assert metrics.keys() == evaluator.provides(where.task).keys()
        assert all(math.isfinite(float(number)) for number in metrics.values()), metrics
    assert not all(isinstance(result, Failure) for result in found), found
    assert [*evaluator.start(where)([], 1.0)] == []


def measures_the_same_in_any_order_and_grouping(evaluator: Evaluator) -> None:
    """What is measured of an arch hangs on the arch alone: not on its company, nor on what was measured before."""
    alone, backwards = measured(evaluator, ARCHS), measured(evaluator, ARCHS[::-1])[::-1]
    assert alone == backwards
    measure = evaluator.start(context())
    _one_by_one(measure, ARCHS[:2], 0.25)
    assert _one_by_one(measure, ARCHS[:2], 1.0) == alone[:2], "the whole effort gives what a share of it gave"
    with seeding.seeded(0, "measure"):
        before = torch.get_rng_state()
        together = measure(ARCHS, 1.0)
        drawn = not torch.equal(before, torch.get_rng_state())
    assert drawn or [*together] == alone, "other results for the same archs at once"


def accepts_a_lower_fidelity(evaluator: Evaluator) -> None:
    """A share of the whole effort gives the same metrics, with more noise perhaps."""
    for whole, part in zip(measured(evaluator, ARCHS[:2]), measured(evaluator, ARCHS[:2], fidelity=0.25), strict=True):
        if not isinstance(whole, Failure) and not isinstance(part, Failure):
            assert _metrics(part).keys() == _metrics(whole).keys()
            assert all(math.isfinite(float(number)) for number in _metrics(part).values())


def leaves_the_supernet_as_it_was(evaluator: Evaluator) -> None:
    """Weights, statistics, gradients, modes, hooks and the arch in force are as before, in either mode."""
    for training in (True, False):
        where = context()
        assert where.supernet is not None
        where.supernet.train(training)
        before = condition(where.supernet)
        measured(evaluator, ARCHS[:3], where)
        changed = differing(before, condition(where.supernet))
        assert not changed, f"changes the supernet's {', '.join(changed)}"


def works_without_a_supernet_or_says_so(evaluator: Evaluator) -> None:
    """Where no supernet was trained, it measures all the same or raises UserError when it is started."""
    where = context(trained=False)
    try:
        measure = evaluator.start(where)
    except UserError:
        return
    assert len(measure(ARCHS[:1], 1.0)) == 1


def never_reads_test_data(evaluator: Evaluator) -> None:
    """Test data is for the end of a run."""
    task = Task()
    measured(evaluator, ARCHS[:2], context(task))
    assert "test" not in task.asked


def touches_no_global_generator(evaluator: Evaluator) -> None:
    """Randomness comes from the context's generators, or from torch's global one, which is seeded for each arch."""
    with global_generators_untouched():
        measured(evaluator, ARCHS[:2])


timing_evaluator_checks = [
    *component_checks,
    promises_its_metrics_before_any_data_is_read,
    says_whether_it_is_cheap,
    gives_exactly_what_it_promises,
    accepts_a_lower_fidelity,
    leaves_the_supernet_as_it_was,
    works_without_a_supernet_or_says_so,
    never_reads_test_data,
    touches_no_global_generator,
]
"""What evaluators keep to that read a clock, which is never the same twice."""

evaluator_checks = [*timing_evaluator_checks, measures_the_same_in_any_order_and_grouping]
"""What every other evaluator keeps to."""
