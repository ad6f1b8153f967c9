"""What a run does, stage by stage: train, search, derive, retrain, export, test."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import attrs
from attrs import evolve, field, frozen
from torch import nn

from corenas import distributed, seeding
from corenas.calibrate import evaluate
from corenas.contracts import (
    Deriving,
    Emit,
    Exporter,
    Fingerprinted,
    LiveTask,
    Note,
    Problem,
    Progress,
    RunDone,
    RunStarted,
    StageDone,
    StageStarted,
)
from corenas.errors import UserError, blaming_plugin
from corenas.measure import TrialRunner, broken, is_costly, is_exclusive
from corenas.objectives import Constraint, Trial
from corenas.plugins import Catalogue, file_digest
from corenas.run.alone import stand_alone
from corenas.run.folder import OwnFiles, check_base, check_checkpoint, check_folder, opened
from corenas.run.prepare import Prepared, load_supernet, prepare, start_trainer, start_trial_runner
from corenas.run.result import cost_card, exported, read_exporters, write_folder
from corenas.run.spec import Spec, parse_duration
from corenas.run.workers import WorkerRunner
from corenas.search import run_search
from corenas.space import Arch
from corenas.store import Store
from corenas.supernet import pick_device, supernet_cost
from corenas.teaching import network_file
from corenas.train import run_training


def run_spec(spec: Spec, catalogue: Catalogue, folder: Path, emit: Emit, fresh: bool = False) -> dict[str, Any]:
    """Do everything that a spec asks for, or what is left of it. Returns what `corenas run --json` prints.

    folder: the run directory; one begun with this spec is continued, one begun with another is refused
    fresh: delete what the run has written there first
    Under torchrun all processes call this; the first one alone writes and tells.
    """
    check_folder(folder, fresh)
    with distributed.process_group(pick_device(spec.device.type)) as device:
        if distributed.rank() > 0:
            emit = _silent
        prepared = prepare(spec, device=device)
        exporters = read_exporters(spec.export.formats, catalogue)
        data = {"splits": dict(prepared.task.splits), "data": _fingerprint(prepared.task)}
        if spec.supernet is not None:
            check_base(Path(spec.supernet.from_), data["data"])  # type: ignore[arg-type]
            data["supernet"] = _digest(Path(spec.supernet.from_) / "supernet.pt")
        for name, teacher in (("teacher", spec.teacher), ("retrain teacher", spec.retrain.teacher)):
            if teacher is not None:
                data[name] = _digest(network_file(Path(teacher.from_)))
        with opened(folder, spec.to_table(catalogue), data, fresh, emit) as store:
            _tell_changed_plugins(store, spec, emit)
            return _Run(prepared, catalogue, folder, store, exporters, emit).execute()


def _silent(event: Any) -> None:
    """Tell nothing: the first process does."""


def _fingerprint(task: LiveTask) -> str | None:
    return task.fingerprint if isinstance(task, Fingerprinted) else None


def _tell_changed_plugins(store: Store, spec: Spec, emit: Emit) -> None:
    """Keep the digests of the files that a spec takes components from; tell which are others than before."""
    now = {file: file_digest(Path(file)) for file in spec.plugins}
    before = store.get("plugins", now)
    for file in (file for file in now if before.get(file) not in (None, now[file])):
        emit(Note(f"{file} has changed since this run was begun; what is trained and measured already stays as it is"))
    store.set("plugins", now)


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@frozen
class _Run:
    """A run under way."""

    prepared: Prepared
    catalogue: Catalogue
    folder: Path
    store: Store
    exporters: Sequence[Exporter]
    tell: Emit
    files: OwnFiles = field(init=False)

    @files.default  # type: ignore[reportAttributeAccessIssue]
    def _own_files(self) -> OwnFiles:
        return OwnFiles(self.folder)

    @property
    def spec(self) -> Spec:
        return self.prepared.spec

    def emit(self, event: Any) -> None:
        """Tell the listeners, and store what belongs into curves and the time that stages took over all sessions."""
        if isinstance(event, Progress) and event.point:
            self.store.point(event.stage, event.done, event.figures)
        if isinstance(event, StageDone):
            stage = event.stage.partition("-")[0]  # "retrain-2" is "retrain"
            seconds = self.store.get("seconds", {})
            self.store.set("seconds", {**seconds, stage: seconds.get(stage, 0.0) + event.seconds})
        self.tell(event)

    def execute(self) -> dict[str, Any]:
        """Do what is left to do. Returns the run's result."""
        store, prepared = self.store, self.prepared
        metrics = {**prepared.task.metrics, **prepared.metrics}
        store.set("objectives", attrs.asdict(prepared.objectives))
        store.set("metrics", {name: attrs.asdict(metric) for name, metric in metrics.items()})
        store.set("searches", [str(target) for target in prepared.targets])
        store.set("device", str(prepared.device))
        store.set("cut", getattr(prepared.task, "cut", ""))
        resumed = bool(store.get("seconds") or store.curve("train"))
        self.tell(RunStarted(self.spec.name or self.folder.name, self.folder, resumed))
        for note in prepared.notes:
            self.tell(Note(note))
        result = distributed.on_rank_zero(self._finished_result)
        if result is None:  # a finished run does not touch its test data again
            result = self._run_stages()
            store.set("result", result)
        result = {"run": str(self.folder), **result}
        self.tell(RunDone(self.folder, result, prepared.task.splits, metrics))
        return result

    def _finished_result(self) -> dict[str, Any] | None:
        """Return the result, if there is one and all that it tells of is there."""
        result = self.store.get("result")
        return result if result and all((self.folder / row["folder"]).is_dir() for row in result["table"]) else None

    def _run_stages(self) -> dict[str, Any]:
        prepared = self.prepared
        supernet, derived = self._train_supernet()
        if "search" in prepared.stages:
            searches = [self._run_search(number, supernet) for number in range(len(prepared.targets))]
            fronts = [self._front(number, searches) for number in range(len(searches))]
        else:
            arch = derived or self.spec.space.default()
            searches, fronts = [], [[Trial(arch, prepared.cost.of([arch])[0])]]
        table = [self._finish(number, front[0], supernet) for number, front in enumerate(fronts)]
        front = sorted(fronts[0], key=lambda trial: trial.metrics["flops"])
        return {
            "best": {key: table[0][key] for key in ("arch", "metrics", "test")},
            "front": [{"arch": dict(trial.arch), "metrics": dict(trial.metrics)} for trial in front],
            "trials": sum(map(len, searches)),
            "seconds": self.store.get("seconds"),
            "table": table,
        }

    def _train_supernet(self) -> tuple[nn.Module | None, Arch | None]:
        """Return the trained supernet, None where there is none; and the arch that a training derives itself."""
        spec, prepared = self.spec, self.prepared
        if spec.supernet is not None:
            return load_supernet(prepared, self.folder), None
        if "train" not in prepared.stages:
            return None, None
        trainer = start_trainer(prepared)
        _refuse_without_derive(trainer, prepared.stages)
        every = math.lcm(*(phase.train.checkpoint_every for phase in trainer.phases))
        supernet = run_training(
            trainer,
            prepared.supernet,
            prepared.task,
            spec.mutator,
            prepared.cost,
            seed=spec.seed,
            device=prepared.device,
            checkpoint=self._checkpoint("supernet.pt", "train", every),
            emit=self.emit,
        )
        return supernet, self._derived(trainer) if "derive" in prepared.stages else None

    def _checkpoint(self, name: str, stage: str, every: int) -> Path:
        """Return the file of a training's checkpoint, claimed. Raises UserError if it was there and is no more."""
        distributed.on_rank_zero(lambda: self.files.claim(name, f"{name}.part"))
        check_checkpoint(self.store, self.folder / name, stage, every)
        return self.folder / name

    def _derived(self, trainer: Any) -> Arch:
        """Return the arch that a training has found itself."""
        with blaming_plugin(f"algorithm {self.catalogue.name_of(self.spec.algorithm)}"):
            derived = trainer.derive()
            if not isinstance(derived, Mapping):
                raise TypeError(f"it derived {derived!r}, no arch")
            return self.spec.space.arch(derived)

    def _run_search(self, number: int, supernet: nn.Module | None) -> list[Trial]:
        """Return the trials of one search."""
        spec, prepared, target = self.spec, self.prepared, self.prepared.targets[number]
        problem = Problem(target.region, prepared.objectives, spec.search.trials, prepared.cost)
        with blaming_plugin(f"searcher {self.catalogue.name_of(spec.searcher)}"):
            searcher = spec.searcher.start(problem, seeding.generator(spec.seed, "searcher"))
        screen = start_trial_runner(prepared, number, supernet, lambda evaluator: evaluator.cheap)
        alone = [e for e in spec.evaluators if not e.cheap and is_exclusive(e)]
        # What another search of this run has measured is judged by the constraints of this one.
        known = {
            (t.arch, t.fidelity): _judged(t, target.constraints)
            for t in (*self._trials_of_base(), *self.store.trials())
            if t.ok
        }
        with spec.executor.start() if spec.executor else nullcontext() as executor:
            return run_search(
                searcher,
                self._costly(number, supernet),
                spec.search.trials,
                screen=screen,
                alone=start_trial_runner(prepared, number, supernet, alone.__contains__, costs=False)
                if alone
                else None,
                batch=spec.search.batch,
                space=spec.space,
                seconds=parse_duration(spec.search.budget or "") or math.inf,
                store=self.store,
                number=number,
                known=distributed.on_rank_zero(lambda: known),
                objectives=prepared.objectives,
                executor=executor,
                emit=self.emit,
            )

    def _trials_of_base(self) -> Sequence[Trial]:
        """Return what the run whose supernet is used has measured, if it measured in the same way."""
        base = None if self.spec.supernet is None else Path(self.spec.supernet.from_)
        if base is None or self.spec.supernet.weights == "raw" or not (base / "run.sqlite").exists():  # type: ignore[union-attr]
            return ()
        store = Store(base / "run.sqlite", readonly=True)
        then, trials = store.get("spec", {}), store.trials()
        store.close()
        now = json.loads(json.dumps(self.spec.to_table(self.catalogue)))
        alike = all(then.get(key) == now.get(key) for key in ("evaluators", "calibration", "backbone", "seed"))
        return trials if alike else ()

    def _costly(self, number: int, supernet: nn.Module | None) -> TrialRunner | WorkerRunner:
        """Return what measures an arch that has passed the cheap evaluators, here or in a worker."""
        if self.spec.executor is None:
            return start_trial_runner(self.prepared, number, supernet, is_costly, costs=False)
        weights = None
        if self.prepared.has_supernet:
            source = Path(self.spec.supernet.from_) if self.spec.supernet is not None else self.folder
            weights = _digest(source / "supernet.pt")
        return WorkerRunner.of(self.spec, number, self.folder, weights)

    def _front(self, number: int, searches: Sequence[Sequence[Trial]]) -> list[Trial]:
        """Return what a search has found: one trial, or a front, the best by the first objective first.

        What the other searches have measured counts as well.
        """
        objectives, target = self.prepared.objectives, self.prepared.targets[number]
        trials = [*searches[number], *itertools.chain(*searches[:number], *searches[number + 1 :])]
        front = objectives.front([_judged(t, target.constraints) for t in trials if t.ok and t.fidelity == 1])
        if not front:
            text = f"none of {len(searches[number])} trials is done and has {str(target) or 'a result'}"
            raise UserError(text, key=("search", "constraints"), hint=f"corenas trials {self.folder} lists them")
        return sorted(front, key=lambda trial: objectives.objectives[0].gain(trial.metrics), reverse=True)

    def _finish(self, number: int, best: Trial, supernet: nn.Module | None) -> dict[str, Any]:
        """Retrain an arch, if the algorithm asks for it, export and test it. Returns a row of the run's result."""
        suffix = f"-{number + 1}" if number else ""
        network, prepared, folder = supernet, self.prepared, self.folder / f"best{suffix}"
        if "retrain" in prepared.stages:
            stage = f"retrain{suffix}"
            every = (self.spec.retrain.train or self.spec.train).checkpoint_every
            checkpoint = self._checkpoint(f"{stage}.pt", stage, every)
            prepared, network = retrain(prepared, best.arch, checkpoint, stage, self.emit, supernet)
        test = distributed.on_rank_zero(lambda: self._export(prepared, network, best, folder))
        return {
            "constraints": str(prepared.targets[number]) if "search" in prepared.stages else "",
            "arch": dict(best.arch),
            "metrics": dict(best.metrics),
            "test": test,
            "folder": folder.name,
        }

    def _export(self, prepared: Prepared, network: nn.Module | None, best: Trial, folder: Path) -> dict[str, float]:
        """Export a network, measure it on test data, and write it with its cost card."""
        start = time.perf_counter()
        self.emit(StageStarted("export", 1, "networks"))
        plain = exported(prepared, best.arch, network, calibrated="retrain" not in prepared.stages)
        test = {} if network is None else evaluate(plain, prepared.task, prepared.evaluation(plain).split("test"))
        card = cost_card(prepared, best, test)
        write_folder(plain, best.arch, card, prepared, folder, self.exporters, self.files)
        self.emit(StageDone("export", time.perf_counter() - start, test))
        return test


def retrain(
    prepared: Prepared,
    arch: Arch,
    checkpoint: Path | None,
    stage: str = "retrain",
    emit: Emit = _silent,
    supernet: nn.Module | None = None,
) -> tuple[Prepared, nn.Module]:
    """Train an arch again as `[retrain]` says, or as far as it got.

    supernet: where its first weights are, if it does not begin from scratch

    Returns what is then prepared (its backbone and its task may be others, so its cost is) and the network.
    """
    spec, task, device = prepared.spec, prepared.retrain_task, prepared.device
    begin = None
    if spec.retrain.begin == "supernet" and supernet is not None:
        begin = exported(prepared, arch, supernet, calibrated=True).state_dict()
    again = evolve(
        spec,
        train=spec.retrain.train or spec.train,
        backbone=spec.retrain.backbone or spec.backbone,
        task=spec.retrain.task or spec.task,
    )
    network = stand_alone(
        again,
        task,
        arch,
        device=device,
        checkpoint=checkpoint,
        emit=emit,
        stage=stage,
        split=spec.retrain.data,
        distiller=spec.retrain.distiller,
        teacher=spec.retrain.teacher,
        begin=begin,
    )
    return evolve(prepared, spec=again, task=task, cost=supernet_cost(network, spec.space.fix(arch), task)), network


def _refuse_without_derive(trainer: Any, stages: Sequence[str]) -> None:
    if "derive" in stages and not isinstance(trainer, Deriving):
        text = "it says that it derives an arch, and what it trains with has no `derive`"
        raise UserError(text, key=("algorithm",))


def _judged(trial: Trial, constraints: Sequence[Constraint]) -> Trial:
    """Return a trial that another search has measured under the constraints of this one."""
    reason = broken(constraints, trial.metrics)
    return trial if reason is None else evolve(trial, state="infeasible", error=reason)
