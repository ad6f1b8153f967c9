"""What a run does, stage by stage: train, search, derive, retrain, export, test."""

from __future__ import annotations

import hashlib
import itertools
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import attrs
from attrs import evolve, frozen
from torch import nn

from corenas import distributed, seeding
from corenas.alone import stand_alone
from corenas.contracts import Emit, Exporter, Problem, Progress, RunDone, RunStarted, StageDone, StageStarted, Trial
from corenas.errors import UserError, blaming_plugin
from corenas.measure import Stand, broken
from corenas.objectives import Constraint
from corenas.plugins import Catalogue
from corenas.prepare import Prepared, load_supernet, prepare, start_stand, start_trainer
from corenas.result import plain_network, read_exporters, write
from corenas.rundir import check_checkpoint, check_folder, opened
from corenas.search import search
from corenas.settings import parse_duration
from corenas.space import Arch
from corenas.spec import Spec
from corenas.store import Store
from corenas.supernet import pick_device, supernet_cost
from corenas.train import run_training


def run(spec: Spec, catalogue: Catalogue, folder: Path, emit: Emit, fresh: bool = False) -> dict[str, Any]:
    """Do everything that a spec asks for, or what is left of it. Returns what `corenas run --json` prints.

    folder: the run directory; one begun with this spec is continued, one begun with another is refused
    fresh: empty it first
    Under torchrun all processes call this; the first one alone writes and tells.
    """
    check_folder(folder, fresh)
    with distributed.process_group(pick_device(spec.device.type)) as device:
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


@frozen
class _Run:
    """A run under way."""

    prepared: Prepared
    catalogue: Catalogue
    folder: Path
    store: Store
    exporters: Sequence[Exporter]
    tell: Emit

    @property
    def spec(self) -> Spec:
        return self.prepared.spec

    def emit(self, event: Any) -> None:
        """Tell the listeners, and store what belongs into curves and the time that stages took over all sessions."""
        if isinstance(event, Progress) and event.point:
            self.store.point(event.stage, event.done, event.figures)
        if isinstance(event, StageDone):
            stage, seconds = event.stage.partition("-")[0], self.store.noted("seconds", {})  # "retrain-2" is "retrain"
            self.store.note("seconds", {**seconds, stage: seconds.get(stage, 0.0) + event.seconds})
        self.tell(event)

    def result(self) -> dict[str, Any]:
        """Do what is left to do."""
        store, prepared = self.store, self.prepared
        store.note("objectives", attrs.asdict(prepared.objectives))
        metrics = {**prepared.task.metrics, **prepared.metrics}
        store.note("metrics", {name: attrs.asdict(metric) for name, metric in metrics.items()})
        store.note("searches", [str(wanted) for wanted in prepared.wanted])
        store.note("device", str(prepared.device))
        resumed = bool(store.noted("seconds") or store.curve("train"))
        self.tell(RunStarted(self.spec.name or self.folder.name, self.folder, resumed))
        result = distributed.on_rank_zero(self._written)
        if result is None:  # a finished run does not touch its test data again
            result = self._stages()
            store.note("result", result)
        result = {"run": str(self.folder), **result}
        self.tell(RunDone(self.folder, result, prepared.task.splits, metrics))
        return result

    def _written(self) -> dict[str, Any] | None:
        """The result, if there is one and all that it tells of is there."""
        result = self.store.noted("result")
        return result if result and all((self.folder / row["folder"]).is_dir() for row in result["table"]) else None

    def _stages(self) -> dict[str, Any]:
        prepared = self.prepared
        supernet, derived = self._trained()
        if "search" in prepared.stages:
            searched = [self._searched(number, supernet) for number in range(len(prepared.wanted))]
            fronts = [self._front(number, searched) for number in range(len(searched))]
        else:
            arch = derived or self.spec.space.default()
            searched, fronts = [], [[Trial(arch, prepared.cost.of([arch])[0])]]
        table = [self._finished(number, front[0], supernet) for number, front in enumerate(fronts)]
        front = sorted(fronts[0], key=lambda trial: trial.metrics["flops"])
        return {
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
        trainer = start_trainer(prepared)
        if "derive" in prepared.stages and not hasattr(trainer, "derive"):
            text = "it says that it derives an arch, and what it trains with has no `derive`"
            raise UserError(text, key=("algorithm",))
        every = math.lcm(*(phase.train.checkpoint_every for phase in trainer.phases))
        check_checkpoint(self.store, checkpoint, "train", every)
        supernet = run_training(
            trainer, prepared.supernet, prepared.task, spec.mutator, prepared.cost,
            seed=spec.seed, device=prepared.device, checkpoint=checkpoint, emit=self.emit,
        )  # fmt: skip
        if "derive" not in prepared.stages:
            return supernet, None
        with blaming_plugin(f"algorithm {self.catalogue.name_of(spec.algorithm)}"):
            derived = trainer.derive()
            if not isinstance(derived, Mapping):
                raise TypeError(f"it derived {derived!r}, no arch")
            return supernet, spec.space.arch(derived)

    def _searched(self, number: int, supernet: nn.Module | None) -> list[Trial]:
        """The trials of one search."""
        spec, prepared, wanted = self.spec, self.prepared, self.prepared.wanted[number]
        problem = Problem(wanted.drawing, prepared.objectives, spec.search.trials)
        with blaming_plugin(f"searcher {self.catalogue.name_of(spec.searcher)}"):
            searcher = spec.searcher.start(problem, seeding.generator(spec.seed, "searcher"))
        measure = _Elsewhere(spec, number, self.folder) if spec.executor else start_stand(prepared, number, supernet)
        # What another search of this run has measured is judged by the constraints of this one.
        known = {(t.arch, t.fidelity): _judged(t, wanted.constraints) for t in self.store.trials() if t.ok}
        with spec.executor.start() if spec.executor else nullcontext() as executor:
            return search(
                searcher, measure, spec.search.trials, batch=spec.search.batch, space=spec.space,
                seconds=parse_duration(spec.search.budget or "") or float("inf"), store=self.store, number=number,
                known=distributed.on_rank_zero(lambda: known), objectives=prepared.objectives, executor=executor,
                emit=self.emit,
            )  # fmt: skip

    def _front(self, number: int, searched: Sequence[Sequence[Trial]]) -> list[Trial]:
        """What a search has found: one trial, or a front, the best by the first objective first. What the others have
        measured counts as well.
        """  # fmt: skip
        objectives, constraints = self.prepared.objectives, self.prepared.wanted[number].constraints
        trials = [*searched[number], *itertools.chain(*searched[:number], *searched[number + 1 :])]
        front = objectives.front([_judged(t, constraints) for t in trials if t.ok and t.fidelity == 1])
        if not front:
            wanted = str(self.prepared.wanted[number]) or "a result"
            text = f"none of {len(searched[number])} trials is done and has {wanted}"
            raise UserError(text, key=("search", "constraints"), hint=f"corenas trials {self.folder} lists them")
        return sorted(front, key=lambda trial: objectives.objectives[0].gain(trial.metrics), reverse=True)

    def _finished(self, number: int, best: Trial, supernet: nn.Module | None) -> dict[str, Any]:
        """An arch retrained, if the algorithm asks for it, exported and tested: a row of the run's result."""
        name = f"-{number + 1}" if number else ""
        network, prepared, folder = supernet, self.prepared, self.folder / f"best{name}"
        if "retrain" in prepared.stages:
            stage = f"retrain{name}"
            every = (self.spec.retrain.train or self.spec.train).checkpoint_every
            check_checkpoint(self.store, self.folder / f"{stage}.pt", stage, every)
            prepared, network = retrain(prepared, best.arch, self.folder / f"{stage}.pt", stage, self.emit)
        test = distributed.on_rank_zero(lambda: self._exported(prepared, network, best, folder))
        return {
            "constraints": str(prepared.wanted[number]) if "search" in prepared.stages else "",
            "arch": dict(best.arch), "metrics": dict(best.metrics), "test": test, "folder": folder.name,
        }  # fmt: skip

    def _exported(self, prepared: Prepared, network: nn.Module | None, best: Trial, folder: Path) -> dict[str, float]:
        start = time.perf_counter()
        self.emit(StageStarted("export", 1, "networks"))
        plain = plain_network(prepared, best.arch, network, calibrated="retrain" not in prepared.stages)
        test = write(prepared, plain, best, folder, self.exporters, tested=network is not None)
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
    network = stand_alone(
        again, task, arch, device=device, checkpoint=checkpoint, emit=emit, stage=stage, split=spec.retrain.data
    )
    return evolve(prepared, spec=again, cost=supernet_cost(network, spec.space.fix(arch), task)), network


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
