"""What a run does, stage by stage: train, search, derive, retrain, export, test."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import attrs
from attrs import evolve, field, frozen
from torch import nn

from corenas import distributed
from corenas.calibrate import evaluate
from corenas.contracts import (
    Deriving,
    Emit,
    Exporter,
    Fingerprinted,
    LiveTask,
    Note,
    Progress,
    RunDone,
    RunStarted,
    StageDone,
    StageStarted,
)
from corenas.errors import UserError, blaming_plugin, regular
from corenas.measure import TrialRunner, broken, is_costly, is_exclusive
from corenas.objectives import Constraint, Trial
from corenas.plugins import Catalogue, file_digest
from corenas.ranking import FEWEST
from corenas.run import trust
from corenas.run.alone import stand_alone
from corenas.run.folder import OwnFiles, check_base, check_checkpoint, check_folder, opened
from corenas.run.prepare import (
    Prepared,
    files_of_other_runs,
    load_supernet,
    prepare,
    refuse_ahead,
    start_searcher,
    start_trainer,
    start_trial_runner,
    trials_folder,
)
from corenas.run.result import cost_card, exported, front_folders, read_exporters, write_folder
from corenas.run.spec import Spec, parse_duration
from corenas.run.workers import WorkerRunner
from corenas.search import run_search
from corenas.settings import Train
from corenas.space import Arch
from corenas.store import Store
from corenas.supernet import pick_device, supernet_cost
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
        exporters = read_exporters(spec.export.formats if prepared.has_network else (), catalogue)
        data = {"splits": dict(prepared.task.splits), "data": _fingerprint(prepared.task)}
        if isinstance(spec.backbone, Fingerprinted):
            data["backbone"] = spec.backbone.fingerprint
        if spec.supernet is not None:
            check_base(Path(spec.supernet.from_), data["data"])  # type: ignore[arg-type]
        data |= {name: _digest(file) for name, file in files_of_other_runs(spec).items()}
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
    return hashlib.sha256(regular(file).read_bytes()).hexdigest()


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
        goals = [goal.metric for goal in prepared.objectives.objectives]
        distributed.on_rank_zero(lambda: store.check_trials(self.spec.space, goals))
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
        if result is None:
            return None
        names = [name for row in result["table"] for name in (row["folder"], *row.get("front", ()))]
        return result if all((self.folder / name).is_dir() for name in names) else None

    def _run_stages(self) -> dict[str, Any]:
        prepared = self.prepared
        refuse_ahead(prepared, self.catalogue)
        supernet, derived = self._train_supernet()
        if "search" in prepared.stages:
            distributed.on_rank_zero(lambda: None if prepared.has_supernet else self.files.claim("trials/"))
            searches = [self._run_search(number, supernet) for number in range(len(prepared.targets))]
            shutil.rmtree(self.folder / "trials", ignore_errors=True)
            fronts = [self._front(number, searches) for number in range(len(searches))]
        else:
            arch = derived or self.spec.space.default()
            searches, fronts = [], [[Trial(arch, prepared.cost.of([arch])[0])]]
        checked = self._check_trust(searches) if self.spec.search.trust is not None and searches else None
        table = [self._finish(number, front[0], supernet) for number, front in enumerate(fronts)]
        front = [{"arch": dict(trial.arch), "metrics": dict(trial.metrics)} for trial in fronts[0]]
        if self.spec.export.front and searches:
            for number, trials in enumerate(fronts):
                table[number]["front"] = self._finish_front(number, trials, supernet)
            for row, folder in zip(front, table[0]["front"], strict=True):
                row["folder"] = folder
        return {
            "best": {key: table[0][key] for key in ("arch", "metrics", "test")},
            "front": sorted(front, key=lambda row: row["metrics"].get("flops", 0)),
            "trials": sum(map(len, searches)),
            "seconds": self.store.get("seconds"),
            "table": table,
            **({} if checked is None else {"trust": checked}),
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
            score=self._score,
        )
        return supernet, self._derived(trainer) if "derive" in prepared.stages else None

    def _score(self, model: nn.Module, archs: Sequence[Arch]) -> list[float]:
        """Return what `train.stop` ranks archs by, and `train.validate` tells, while a supernet is trained."""
        metric, sign = _alone_metric(self.prepared)
        evaluation = self.prepared.evaluation(model)

        def scores() -> list[float]:
            with distributed.single_process():
                return [sign * evaluation(arch)[metric] for arch in archs]

        return distributed.on_rank_zero(scores)

    def _check_trust(self, searches: Sequence[Sequence[Trial]]) -> dict[str, Any] | None:
        """Train some archs of a search alone, as far as that is not done. Returns how far the rankings agree."""
        settings, prepared = self.spec.search.trust, self.prepared
        assert settings is not None
        trials = trust.spread_trials(itertools.chain(*searches), prepared.objectives, settings.archs)
        if len(trials) < FEWEST:
            self.emit(Note(f"{len(trials)} trials are too few to say whether the search can be trusted"))
            return None
        start, (metric, sign) = time.perf_counter(), _alone_metric(prepared)
        self.emit(StageStarted("trust", len(trials), "networks"))
        found = []
        for number, trial in enumerate(trials):
            key = f"trust:{trial.arch.digest}"
            figures = distributed.on_rank_zero(lambda key=key: self.store.get(key))
            if figures is None:
                figures = self._alone(trial.arch, settings.train)
                self.store.set(key, figures)
            found.append(figures[metric])
            self.emit(Progress("trust", number + 1, {metric: figures[metric]}))
        result = trust.agreement(trials, [sign * number for number in found], prepared.objectives)
        self.emit(StageDone("trust", time.perf_counter() - start, {"tau": result["tau"]}))
        return {"metric": metric, **result}

    def _alone(self, arch: Arch, train: Train | None) -> dict[str, float]:
        """Return the metrics on validation data of an arch that is trained alone."""
        spec, prepared = self.spec, self.prepared
        spec = evolve(spec, train=train or spec.retrain.train or spec.train)
        network = stand_alone(spec, prepared.task, arch, device=prepared.device).eval()
        return evaluate(network, prepared.task, prepared.evaluation(network).split("valid"))

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
        before = distributed.on_rank_zero(lambda: [self.store.trials(earlier) for earlier in range(number)])
        told = [*{(t.arch, t.fidelity): t for t in itertools.chain(*before) if t.ok}.values()]
        with blaming_plugin(f"searcher {self.catalogue.name_of(spec.searcher)}"):
            searcher = start_searcher(prepared, number, told)
        screen = start_trial_runner(prepared, number, supernet, lambda evaluator: evaluator.cheap)
        alone = [e for e in spec.evaluators if not e.cheap and is_exclusive(e)]
        # What another search of this run has measured is judged by the constraints of this one.
        known = {
            (t.arch, t.fidelity): _judged(t, target.constraints)
            for t in (*self._trials_of_base(), *self.store.trials())
            if t.ok
        }
        return run_search(
            searcher,
            self._costly(number, supernet),
            spec.search.trials,
            screen=screen,
            alone=start_trial_runner(prepared, number, supernet, alone.__contains__, costs=False) if alone else None,
            batch=spec.search.batch,
            space=spec.space,
            seconds=parse_duration(spec.search.budget or "") or math.inf,
            store=self.store,
            number=number,
            known=distributed.on_rank_zero(lambda: known),
            objectives=prepared.objectives,
            racing=spec.search.race,
            executor=spec.executor,
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
        goals = {goal.metric for goal in self.prepared.objectives.objectives}
        return [trial for trial in trials if goals <= trial.metrics.keys()] if alike else ()

    def _costly(self, number: int, supernet: nn.Module | None) -> TrialRunner | WorkerRunner:
        """Return what measures an arch that has passed the cheap evaluators, here or in a worker."""
        if self.spec.executor is None:
            trials = trials_folder(self.prepared, self.folder)
            return start_trial_runner(self.prepared, number, supernet, is_costly, costs=False, trials=trials)
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
        return sorted(front, key=partial(objectives.rank, objectives.objectives[0]))

    def _finish(self, number: int, best: Trial, supernet: nn.Module | None) -> dict[str, Any]:
        """Retrain an arch, if the algorithm asks for it, export and test it. Returns a row of the run's result."""
        suffix = f"-{number + 1}" if number else ""
        folder = self.folder / f"best{suffix}"
        prepared, network = self._trained(best, f"retrain{suffix}", supernet)
        test = distributed.on_rank_zero(lambda: self._export(prepared, network, best, folder))
        again = {"seeds": self._over_seeds(best.arch, suffix, test, supernet)} if self._repeats > 1 else {}
        return {
            "constraints": str(self.prepared.targets[number]) if "search" in prepared.stages else "",
            "arch": dict(best.arch),
            "metrics": dict(best.metrics),
            "test": test,
            "folder": folder.name,
            **again,
        }

    @property
    def _repeats(self) -> int:
        return self.spec.retrain.seeds if "retrain" in self.prepared.stages else 1

    def _over_seeds(
        self, arch: Arch, suffix: str, first: Mapping[str, float], supernet: nn.Module | None
    ) -> dict[str, Any]:
        """Train an arch again with other seeds. Returns its metrics on test data: of each seed, mean and spread."""
        runs = [dict(first)]
        for again in range(1, self._repeats):
            key = f"again{suffix}:{again}"
            found = distributed.on_rank_zero(lambda key=key: self.store.get(key))
            if found is None:
                stage = f"retrain{suffix}-seed-{again}"
                every = (self.spec.retrain.train or self.spec.train).checkpoint_every
                checkpoint = self._checkpoint(f"{stage}.pt", stage, every)
                prepared, network = retrain(self.prepared, arch, checkpoint, stage, self.emit, again, supernet)
                plain = exported(prepared, arch, network, calibrated=False)
                found = evaluate(plain, prepared.task, prepared.evaluation(plain).split("test"))
                distributed.on_rank_zero(lambda key=key, found=found: self.store.set(key, dict(found)))
            runs.append(dict(found))
        columns = {name: [run[name] for run in runs] for name in first}
        return {
            "test": runs,
            "mean": {name: statistics.fmean(column) for name, column in columns.items()},
            "sd": {name: statistics.stdev(column) for name, column in columns.items()},
        }

    def _finish_front(self, number: int, front: Sequence[Trial], supernet: nn.Module | None) -> list[str]:
        """Retrain, if the algorithm asks for it, and export all networks of a front. Returns their folders.

        Test data is not touched again: the best one's figures are in `best`, and none of the others is chosen by them.
        """
        suffix = f"-{number + 1}" if number else ""
        named = front_folders(front, self.prepared.objectives)
        for place, (name, trial) in enumerate(named, 1):
            # The first is what is in `best`, so it has been trained.
            stage = f"retrain{suffix}" if place == 1 else f"retrain{suffix}-front-{place}"
            prepared, network = self._trained(trial, stage, supernet)
            folder = self.folder / f"front{suffix}" / name
            distributed.on_rank_zero(partial(self._export, prepared, network, trial, folder, test_too=False))
        return [f"front{suffix}/{name}" for name, _ in named]

    def _trained(self, trial: Trial, stage: str, supernet: nn.Module | None) -> tuple[Prepared, nn.Module | None]:
        """Return an arch's network, trained from scratch if the algorithm asks for it, and what is then prepared."""
        if "retrain" not in self.prepared.stages:
            return self.prepared, supernet
        every = (self.spec.retrain.train or self.spec.train).checkpoint_every
        checkpoint = self._checkpoint(f"{stage}.pt", stage, every)
        return retrain(self.prepared, trial.arch, checkpoint, stage, self.emit, supernet=supernet)

    def _export(
        self, prepared: Prepared, network: nn.Module | None, best: Trial, folder: Path, test_too: bool = True
    ) -> dict[str, float]:
        """Export a network, measure it on test data, and write it with its cost card."""
        start = time.perf_counter()
        self.emit(StageStarted("export", 1, "networks"))
        plain, test = None, {}
        if prepared.has_network:
            plain = exported(prepared, best.arch, network, calibrated="retrain" not in prepared.stages)
            if test_too and network is not None:
                test = dict(evaluate(plain, prepared.task, prepared.evaluation(plain).split("test")))
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
    again: int = 0,
    supernet: nn.Module | None = None,
    limit: int | None = None,
) -> tuple[Prepared, nn.Module]:
    """Train an arch again as `[retrain]` says, or as far as it got.

    supernet: where its first weights are, if it does not begin from scratch
    again: which of several trainings that differ in their seed alone
    limit: stop after so many steps, to see how long they take
    Returns what is then prepared (its backbone and its task may be others, so its cost is) and the network.
    """
    spec, task, device = prepared.spec, prepared.retrain_task, prepared.device
    begin = None
    if spec.retrain.begin == "supernet" and supernet is not None:
        begin = exported(prepared, arch, supernet, calibrated=True).state_dict()
    own = evolve(
        spec,
        train=spec.retrain.train or spec.train,
        backbone=spec.retrain.backbone or spec.backbone,
        task=spec.retrain.task or spec.task,
    )
    network = stand_alone(
        own,
        task,
        arch,
        device=device,
        checkpoint=checkpoint,
        emit=emit,
        stage=stage,
        split=spec.retrain.data,
        distiller=spec.retrain.distiller,
        teacher=spec.retrain.teacher,
        again=again,
        begin=begin,
        limit=limit,
    )
    return evolve(prepared, spec=own, task=task, cost=supernet_cost(network, spec.space.fix(arch), task)), network


def _alone_metric(prepared: Prepared) -> tuple[str, int]:
    """Return what networks are ranked by: the first objective that the task measures, else its first metric.

    With it 1 where more is better, -1 where less is.
    """
    metrics = prepared.task.metrics
    wanted = [goal.metric for goal in prepared.objectives.objectives if goal.metric in metrics]
    name = next(iter([*wanted, *metrics]))
    return name, 1 if metrics[name].direction == "max" else -1


def _refuse_without_derive(trainer: Any, stages: Sequence[str]) -> None:
    if "derive" in stages and not isinstance(trainer, Deriving):
        text = "it says that it derives an arch, and what it trains with has no `derive`"
        raise UserError(text, key=("algorithm",))


def _judged(trial: Trial, constraints: Sequence[Constraint]) -> Trial:
    """Return a trial that another search has measured under the constraints of this one."""
    reason = broken(constraints, trial.metrics)
    return trial if reason is None else evolve(trial, state="infeasible", error=reason)
