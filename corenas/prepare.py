"""What a spec names, brought to life and checked: its task, supernet, cost, objectives and constraints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import tomli
import torch
from attrs import frozen
from torch import nn

from corenas import goals, seeding
from corenas.alone import stand_alone, subnet
from corenas.calibrate import Evaluation
from corenas.constrained import FeasibleSpace, reachable
from corenas.contracts import AlgorithmContext, EvaluatorContext, LiveTask, Metric
from corenas.cost import METRICS, Cost
from corenas.errors import Fault, UserError, collecting, refuse
from corenas.measure import Stand, stand
from corenas.objectives import Constraint, Objectives
from corenas.settings import Retrain
from corenas.space import SearchSpace
from corenas.spec import Spec
from corenas.supernet import build_supernet, pick_device, supernet_cost
from corenas.train import load_weights


@frozen
class Wanted:
    """What one of a run's searches looks for.

    constraints: all of them
    drawing: the archs that obey those on cost
    """

    constraints: Sequence[Constraint]
    drawing: FeasibleSpace

    def __str__(self) -> str:
        return " and ".join(map(str, self.constraints))


@frozen
class Prepared:
    """A spec brought to life: everything that a run needs, checked.

    supernet: on the meta device where nothing trains it
    wanted: one for each of the run's searches
    """

    spec: Spec
    task: LiveTask
    supernet: nn.Module
    cost: Cost
    metrics: Mapping[str, Metric]
    objectives: Objectives
    wanted: Sequence[Wanted]
    device: torch.device

    @property
    def stages(self) -> list[str]:
        """What the algorithm asks for; a supernet that was trained before is not trained again."""
        return [stage for stage in self.spec.algorithm.stages if stage != "train" or self.spec.supernet is None]

    @property
    def has_supernet(self) -> bool:
        """Whether there is a trained supernet, of this run or of another."""
        return "train" in self.spec.algorithm.stages or self.spec.supernet is not None

    def evaluator_context(self, supernet: nn.Module | None) -> EvaluatorContext:
        """What evaluators measure with."""
        spec, task, device = self.spec, self.task, self.device
        return EvaluatorContext(
            spec.space, self.cost, task, device, supernet, self.evaluation(supernet) if supernet else None,
            subnet=lambda arch: subnet(spec.overridden(arch), task, arch).to(device),
            alone=lambda arch, fidelity: stand_alone(spec, task, arch, fidelity=fidelity, device=device),
            rng=lambda arch: seeding.generator(spec.seed, f"measure:{arch.digest}"),
        )  # fmt: skip

    def evaluation(self, supernet: nn.Module) -> Evaluation:
        """What measures subnets on data."""
        spec = self.spec
        return Evaluation(supernet, self.task, spec.calibration, self.device, spec.seed, workers=spec.train.workers)


def prepare(spec: Spec, data: bool = True, weights: bool = True, device: torch.device | None = None) -> Prepared:
    """Build what a spec names. Raises UserError with all mistakes, keys relative to the spec.

    data: False reads no data
    weights: False allocates none, which is enough for costs and checks
    """
    device = device or pick_device(spec.device.type)
    if spec.device.threads is not None:
        torch.set_num_threads(spec.device.threads)
    try:
        task = spec.task.start(seeding.generator(spec.seed, "task"), data)
    except UserError as error:
        raise error.under("task") from None
    whole = spec.space if spec.supernet is None else _trained_space(spec, Path(spec.supernet.from_))
    real = weights and ("train" in spec.algorithm.stages or spec.supernet is not None)
    try:
        with seeding.seeded(spec.seed, "init"), nullcontext() if real else torch.device("meta"):
            supernet = build_supernet(spec.backbone, whole, task)
    except (RuntimeError, MemoryError, OverflowError, ValueError, TypeError) as error:
        if isinstance(error, TypeError) and "Overflow" not in str(error):  # torch's answer to a width beyond 64 bits
            raise
        text = f"this space cannot be built: {str(error).splitlines()[0]}"
        raise UserError(text, key=("space",), hint="are its widths and depths meant so?") from error
    cost = supernet_cost(supernet, whole, task).on(spec.space)
    faults: list[Fault] = []
    metrics: dict[str, Metric] = {}
    objectives, wanted = Objectives(()), []
    with collecting(faults):
        metrics = goals.metrics_of(spec.evaluators, task)
        if "search" in spec.algorithm.stages:
            objectives = goals.read_objectives(spec.search, metrics)
    if "retrain" not in spec.algorithm.stages and spec.retrain != Retrain():
        faults.append(Fault("this algorithm has no retraining", ("retrain",), hint="leave this table out"))
    if "search" not in spec.algorithm.stages and any(spec.search.bounds):
        text = "this algorithm has no search, which would hold to these"
        faults.append(Fault(text, ("search", "constraints"), hint="leave them out"))
    several = isinstance(spec.search.constraints, tuple)
    for i, bounds in enumerate(spec.search.bounds if metrics else ()):
        place = ("search", "constraints", i) if several else ("search", "constraints")
        with collecting(faults, *place):
            constraints = goals.read_constraints(bounds, metrics, lambda metric: reachable(cost, metric)[1])
            cheap = [c for c in constraints if c.metric in METRICS]
            wanted.append(Wanted(constraints, FeasibleSpace(spec.space, cost, cheap)))
    refuse(faults)
    return Prepared(spec, task, supernet, cost, metrics, objectives, wanted, device)


def _trained_space(spec: Spec, folder: Path) -> SearchSpace:
    """The space of the run whose supernet is used, of which the spec's may be a part."""
    whole = SearchSpace.from_table(tomli.loads((folder / "spec.toml").read_text(encoding="utf-8"))["space"])
    try:
        for arch in (spec.space.smallest(), spec.space.largest()):
            whole.arch(arch)
    except UserError as error:
        text = f"the supernet of {folder} was trained in another space: {error.faults[0]}"
        raise UserError(text, key=("space",), hint="leave `space` out, or say only `fix` and `narrow`") from None
    return whole


def start_trainer(prepared: Prepared) -> Any:
    """The trainer of a spec's algorithm. Raises UserError for what the algorithm refuses."""
    spec = prepared.spec
    prepared.supernet.to(prepared.device)
    distiller = spec.distiller.start(prepared.task) if spec.distiller is not None else None
    context = AlgorithmContext(
        prepared.supernet, spec.space, prepared.cost, prepared.task, spec.train, prepared.device, distiller
    )
    with seeding.seeded(spec.seed, "algorithm", device=prepared.device):
        return spec.algorithm.start(context)


def start_stand(prepared: Prepared, number: int, supernet: nn.Module | None) -> Stand:
    """What measures the archs of one of a run's searches."""
    spec = prepared.spec
    evaluators = {f"{type(e).__name__} (evaluators[{i}])": e for i, e in enumerate(spec.evaluators)}
    constraints = prepared.wanted[number].constraints
    return stand(evaluators, prepared.evaluator_context(supernet), constraints, spec.seed)


def load_supernet(prepared: Prepared, folder: Path) -> nn.Module:
    """The trained supernet of a run, on its device. Raises UserError if it has not come so far."""
    source = Path(prepared.spec.supernet.from_) if prepared.spec.supernet is not None else folder
    load_weights(prepared.supernet, source / "supernet.pt")
    return prepared.supernet.to(prepared.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
