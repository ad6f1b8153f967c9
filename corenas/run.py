"""What a run does, stage by stage: train, search, derive, retrain, export, test."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import attrs
import tomli
import torch
from attrs import evolve, frozen
from torch import nn

from corenas import distributed, goals, seeding
from corenas.alone import stand_alone, subnet
from corenas.calibrate import Evaluation
from corenas.constrained import Constrained
from corenas.contracts import (
    AlgorithmContext,
    Emit,
    EvaluatorContext,
    LiveTask,
    Metric,
    Problem,
    Progress,
    RunDone,
    RunStarted,
    StageDone,
    StageStarted,
    Trial,
)
from corenas.cost import METRICS, Cost
from corenas.errors import Fault, UserError
from corenas.measure import Stand, blamed, broken, stand
from corenas.objectives import Constraint, Objectives
from corenas.plugins import Catalogue
from corenas.result import Exporters, closing_lines, plain_network, read_exporters, write
from corenas.rundir import check_checkpoint, check_folder, opened, spent
from corenas.search import search
from corenas.settings import parse_duration
from corenas.space import Arch, SearchSpace
from corenas.spec import Spec
from corenas.store import Store
from corenas.supernet import build_supernet, pick_device, supernet_cost
from corenas.train import load_weights, train


@frozen
class Wanted:
    """What one of a run's searches looks for.

    constraints: all of them
    drawing: the archs that obey those on cost
    """

    constraints: Sequence[Constraint]
    drawing: Constrained

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

        def alone(arch: Arch, fidelity: float) -> nn.Module:
            return stand_alone(spec, task, arch, fidelity=fidelity, device=device)

        return EvaluatorContext(
            spec.space, self.cost, task, device, supernet, self.evaluation(supernet) if supernet else None,
            lambda arch: subnet(spec, task, arch).to(device), alone,
            lambda arch: seeding.generator(spec.seed, f"measure:{arch.digest}"),
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
    try:
        metrics = goals.metrics_of(spec.evaluators, task)
        if "search" in spec.algorithm.stages:
            objectives = goals.read_objectives(spec.search, metrics)
    except UserError as error:
        faults += error.faults
    largest = cost.of([spec.space.largest()])[0]
    several = isinstance(spec.search.constraints, tuple)
    for i, bounds in enumerate(spec.search.bounds if metrics else ()):
        place = ("search", "constraints", i) if several else ("search", "constraints")
        try:
            constraints = goals.read_constraints(bounds, metrics, largest)
            cheap = [c for c in constraints if c.metric in METRICS]
            wanted.append(Wanted(constraints, Constrained(spec.space, cost, cheap)))
        except UserError as error:
            faults += error.under(*place).faults
    if faults:
        raise UserError(faults=faults)
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


def run(spec: Spec, catalogue: Catalogue, folder: Path, emit: Emit, fresh: bool = False) -> dict[str, Any]:
    """Do everything that a spec asks for, or what is left of it. Returns what `corenas run --json` prints.

    folder: the run directory; one begun with this spec is continued, one begun with another is refused
    fresh: empty it first
    Under torchrun all processes call this; the first one alone writes and tells.
    """
    check_folder(folder, fresh)
    with distributed.joined(pick_device(spec.device.type)) as device:
        if distributed.rank() > 0:
            emit = _silent
        prepared = prepare(spec, device=device)
        exporters = read_exporters(spec.export.formats, catalogue)
        data = {"splits": dict(prepared.task.splits), "data": getattr(prepared.task, "fingerprint", None)}
        if spec.supernet is not None:
            data["supernet"] = hashlib.sha256((Path(spec.supernet.from_) / "supernet.pt").read_bytes()).hexdigest()
        with opened(folder, spec.to_table(catalogue), data, fresh, emit) as store:
            return _Run(prepared, catalogue, folder, store, exporters, emit).result()


def _silent(event: Any) -> None:
    """Tell nothing: the first process does."""


class _Run:
    """A run under way."""

    def __init__(
        self,
        prepared: Prepared,
        catalogue: Catalogue,
        folder: Path,
        store: Store,
        exporters: Exporters,
        emit: Emit,
    ) -> None:
        self.prepared, self.spec, self.catalogue = prepared, prepared.spec, catalogue
        self.folder, self.store, self.exporters, self._emit = folder, store, exporters, emit

    def emit(self, event: Any) -> None:
        """Tell the listeners, and store what belongs into curves."""
        if isinstance(event, Progress) and event.point:
            self.store.point(event.stage, event.done, event.figures)
        self._emit(event)

    def result(self) -> dict[str, Any]:
        """Do what is left to do."""
        store, prepared = self.store, self.prepared
        store.note("objectives", attrs.asdict(prepared.objectives))
        metrics = {**prepared.task.metrics, **prepared.metrics}
        store.note("metrics", {name: attrs.asdict(metric) for name, metric in metrics.items()})
        store.note("searches", [str(wanted) for wanted in prepared.wanted])
        store.note("device", str(prepared.device))
        self._emit(RunStarted(self.spec.name or self.folder.name, self.folder, bool(store.noted("seconds"))))
        result = distributed.first(lambda: store.noted("result") if (self.folder / "best").is_dir() else None)
        if result is None:  # a finished run does not touch its test data again
            result = self._stages()
            store.note("result", result)
        result["run"] = str(self.folder)
        self._emit(RunDone(self.folder, closing_lines(prepared, self.folder, result, self.exporters)))
        return result

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        spent(self.store, stage, time.perf_counter() - start)

    def _stages(self) -> dict[str, Any]:
        prepared = self.prepared
        supernet, derived = self._trained()
        if "search" in prepared.stages:
            searched = [self._searched(number, supernet) for number in range(len(prepared.wanted))]
            fronts = [self._front(number, trials) for number, trials in enumerate(searched)]
        else:
            arch = derived or self.spec.space.default()
            searched, fronts = [], [[Trial(arch, prepared.cost.of([arch])[0])]]
        table = [self._finished(number, front[0], supernet) for number, front in enumerate(fronts)]
        front = sorted(fronts[0], key=lambda trial: trial.metrics["flops"])
        return {
            "run": str(self.folder),
            "best": {key: table[0][key] for key in ("arch", "metrics", "test")},
            "front": [{"arch": dict(trial.arch), "metrics": dict(trial.metrics)} for trial in front],
            "trials": sum(map(len, searched)),
            "seconds": self.store.noted("seconds"),
            "table": table,
        }

    def _trained(self) -> tuple[nn.Module | None, Arch | None]:
        """The trained supernet, None where there is none; and the arch that a training derives itself."""
        spec, prepared = self.spec, self.prepared
        if spec.supernet is not None:
            return load_supernet(prepared, self.folder), None
        if "train" not in prepared.stages:
            return None, None
        checkpoint = self.folder / "supernet.pt"
        check_checkpoint(self.store, checkpoint, "train", spec.train.checkpoint_every)
        with self._timed("train"):
            trainer = start_trainer(prepared)
            supernet = train(
                trainer, prepared.supernet, prepared.task, spec.mutator, prepared.cost,
                seed=spec.seed, device=prepared.device, checkpoint=checkpoint, emit=self.emit,
            )  # fmt: skip
        if "derive" not in prepared.stages:
            return supernet, None
        with blamed(f"algorithm {self.catalogue.name_of(spec.algorithm)}"):
            return supernet, spec.space.arch(trainer.derive())  # type: ignore[attr-defined]

    def _searched(self, number: int, supernet: nn.Module | None) -> list[Trial]:
        """The trials of one search."""
        spec, prepared, wanted = self.spec, self.prepared, self.prepared.wanted[number]
        problem = Problem(wanted.drawing, prepared.objectives, spec.search.trials)
        with blamed(f"searcher {self.catalogue.name_of(spec.searcher)}"):
            searcher = spec.searcher.start(problem, seeding.generator(spec.seed, "searcher"))
        measure: Callable[..., Trial]
        if spec.executor is None:
            measure = start_stand(prepared, number, supernet)
        else:
            measure = _Elsewhere(spec, number, self.folder)
        # What another search of this run has measured is judged by the constraints of this one.
        others = [t for i in range(len(prepared.wanted)) if i != number for t in self.store.trials(i) if t.ok]
        known = {(t.arch, t.fidelity): _judged(t, wanted.constraints) for t in others}
        with self._timed("search"), spec.executor.start() if spec.executor else nullcontext() as executor:
            return search(
                searcher, measure, spec.search.trials, batch=spec.search.batch, space=spec.space,
                seconds=parse_duration(spec.search.budget or "") or float("inf"), store=self.store, number=number,
                known=distributed.first(lambda: known), objectives=prepared.objectives, executor=executor,
                emit=self.emit,
            )  # fmt: skip

    def _front(self, number: int, trials: Sequence[Trial]) -> list[Trial]:
        """What a search has found: one trial, or a front, the best by the first objective first."""
        objectives = self.prepared.objectives
        front = objectives.front([trial for trial in trials if trial.fidelity == 1])
        if not front:
            wanted = str(self.prepared.wanted[number]) or "a result"
            raise UserError(f"none of {len(trials)} trials is done and has {wanted}", key=("search", "constraints"),
                            hint=f"corenas trials {self.folder} lists them")  # fmt: skip
        return sorted(front, key=lambda trial: objectives.objectives[0].gain(trial.metrics), reverse=True)

    def _finished(self, number: int, best: Trial, supernet: nn.Module | None) -> dict[str, Any]:
        """An arch retrained, if the algorithm asks for it, exported and tested: a row of the run's result."""
        name = f"-{number + 1}" if number else ""
        network, prepared, folder = supernet, self.prepared, self.folder / f"best{name}"
        if "retrain" in prepared.stages:
            stage = f"retrain{name}"
            every = (self.spec.retrain.train or self.spec.train).checkpoint_every
            check_checkpoint(self.store, self.folder / f"{stage}.pt", stage, every)
            with self._timed("retrain"):
                prepared, network = retrain(prepared, best.arch, self.folder / f"{stage}.pt", stage, self.emit)
        with self._timed("export"):
            test = distributed.first(lambda: self._exported(prepared, network, best, folder))
        return {
            "constraints": str(prepared.wanted[number]) if "search" in prepared.stages else "",
            "arch": dict(best.arch), "metrics": dict(best.metrics), "test": test, "folder": folder.name,
        }  # fmt: skip

    def _exported(self, prepared: Prepared, network: nn.Module | None, best: Trial, folder: Path) -> dict[str, float]:
        start = time.perf_counter()
        self.emit(StageStarted("export", 1, "networks"))
        plain = plain_network(prepared, best.arch, network, calibrated="retrain" not in prepared.stages)
        test = write(prepared, plain, best.arch, folder, self.exporters, best.metrics, tested=network is not None)
        self.emit(StageDone("export", time.perf_counter() - start, test))
        return test


def retrain(
    prepared: Prepared, arch: Arch, checkpoint: Path | None, stage: str = "retrain", emit: Emit = _silent
) -> tuple[Prepared, nn.Module]:
    """An arch trained from scratch as `[retrain]` says, or as far as it got; with what is then prepared: its backbone
    may be another one, so its cost is.
    """  # fmt: skip
    spec, task, device = prepared.spec, prepared.task, prepared.device
    again = evolve(spec, train=spec.retrain.train or spec.train, backbone=spec.retrain.backbone or spec.backbone)
    network = stand_alone(again, task, arch, device=device, checkpoint=checkpoint, emit=emit, stage=stage)
    return evolve(prepared, spec=again, cost=supernet_cost(network, spec.space.fix(arch), task)), network


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


def _judged(trial: Trial, constraints: Sequence[Constraint]) -> Trial:
    """A trial that another search has measured, under the constraints of this one."""
    reason = broken(constraints, trial.metrics)
    return trial if reason is None else evolve(trial, state="infeasible", error=reason)


_stands: dict[tuple[Path, int], Stand] = {}
"""What this process, a worker of an executor, measures with."""


@frozen
class _Elsewhere:
    """Measures archs in a worker, which reads the spec's data and the run's supernet the first time."""

    spec: Spec
    number: int
    folder: Path

    def __call__(self, arch: Arch, fidelity: float = 1.0) -> Trial:
        key = (self.folder, self.number)
        if key not in _stands:
            prepared = prepare(self.spec)
            supernet = load_supernet(prepared, self.folder) if prepared.has_supernet else None
            _stands[key] = start_stand(prepared, self.number, supernet)
        return _stands[key](arch, fidelity)


def load_supernet(prepared: Prepared, folder: Path) -> nn.Module:
    """The trained supernet of a run, on its device. Raises UserError if it has not come so far."""
    source = Path(prepared.spec.supernet.from_) if prepared.spec.supernet is not None else folder
    load_weights(prepared.supernet, source / "supernet.pt")
    return prepared.supernet.to(prepared.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
