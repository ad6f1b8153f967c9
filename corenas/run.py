"""What a run does, stage by stage: train, search, export, test; and the directory that it leaves."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import attrs
import tomli_w
import torch
from attrs import frozen
from torch import nn

import corenas
from corenas import calibrate, export, seeding
from corenas.constrained import Constrained
from corenas.contracts import (
    AlgorithmContext,
    Emit,
    EvaluatorContext,
    Exporter,
    LiveTask,
    Metric,
    Problem,
    RunDone,
    RunStarted,
    StageDone,
    StageStarted,
    Trial,
)
from corenas.cost import Cost
from corenas.errors import Fault, UserError
from corenas.objectives import Constraint, Objectives, amount
from corenas.plugins import Catalogue
from corenas.search import metrics_of, read_constraints, read_objectives, search, stand
from corenas.settings import FORMATS
from corenas.space import Arch, SearchSpace, flatten
from corenas.spec import Spec
from corenas.store import Store
from corenas.supernet import build_supernet, pick_device, supernet_cost
from corenas.train import load_weights, train


@frozen
class Prepared:
    """A spec brought to life: everything that a run needs, checked.

    drawing: the archs that obey the constraints on cost
    """

    spec: Spec
    task: LiveTask
    supernet: nn.Module
    cost: Cost
    metrics: Mapping[str, Metric]
    objectives: Objectives
    constraints: Sequence[Constraint]
    drawing: Constrained
    device: torch.device


def prepare(spec: Spec, data: bool = True, weights: bool = True) -> Prepared:
    """Build what a spec names. Raises UserError with all mistakes, keys relative to the spec.

    data: False reads no data
    weights: False allocates none, which is enough for costs and checks
    """
    device = pick_device(spec.device.type)
    if spec.device.threads is not None:
        torch.set_num_threads(spec.device.threads)
    try:
        task = spec.task.start(seeding.generator(spec.seed, "task"), data)
    except UserError as error:
        raise error.under("task") from None
    try:
        with seeding.seeded(spec.seed, "init"), nullcontext() if weights else torch.device("meta"):
            supernet = build_supernet(spec.backbone, spec.space, task)
    except (RuntimeError, MemoryError, OverflowError, ValueError, TypeError) as error:
        if isinstance(error, TypeError) and "Overflow" not in str(error):  # torch's answer to a width beyond 64 bits
            raise
        text = f"this space cannot be built: {str(error).splitlines()[0]}"
        raise UserError(text, key=("space",), hint="are its widths and depths meant so?") from error
    cost = supernet_cost(supernet, spec.space, task)
    faults: list[Fault] = []
    metrics, objectives, constraints, drawing = {}, None, [], None
    searched = "search" in spec.algorithm.stages
    try:
        metrics = metrics_of(spec.evaluators, task)
        objectives = read_objectives(spec.search, metrics) if searched else Objectives(())
    except UserError as error:
        faults += error.faults
    try:
        largest = cost.of([spec.space.largest()])[0]
        constraints = read_constraints(spec.search, metrics, largest) if metrics else []
        drawing = Constrained(spec.space, cost, [c for c in constraints if c.metric in largest])
    except UserError as error:
        faults += error.faults
    if faults:
        raise UserError(faults=faults)
    assert objectives is not None
    assert drawing is not None
    return Prepared(spec, task, supernet, cost, metrics, objectives, constraints, drawing, device)


def run(spec: Spec, catalogue: Catalogue, folder: Path, emit: Emit, fresh: bool = False) -> dict[str, Any]:
    """Do everything that a spec asks for, or what is left of it. Returns what `corenas run --json` prints.

    folder: the run directory; one begun with this spec is continued, one begun with another is refused
    fresh: empty it first
    """
    _check_folder(folder)
    prepared = prepare(spec)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error
    with _alone(folder):
        if fresh:
            _empty(folder)
        return _run(prepared, catalogue, folder, emit)


def _run(prepared: Prepared, catalogue: Catalogue, folder: Path, emit: Emit) -> dict[str, Any]:
    spec = prepared.spec
    store = _open(folder, spec.to_table(catalogue), dict(prepared.task.splits))
    store.note("objectives", attrs.asdict(prepared.objectives))
    resumed = bool(store.noted("seconds"))
    emit(RunStarted(spec.name or folder.name, folder, resumed))
    result = store.noted("result")
    if result is None or not (folder / "best").is_dir():  # a finished run does not touch its test data again
        result = _stages(prepared, catalogue, folder, store, emit)
        store.note("result", result)
    store.close()
    result["run"] = str(folder)
    emit(RunDone(folder, closing_lines(prepared, folder, result)))
    return result


def _stages(prepared: Prepared, catalogue: Catalogue, folder: Path, store: Store, emit: Emit) -> dict[str, Any]:
    """Train, search, export and test. Returns the run's result."""
    spec = prepared.spec
    trained = _train(prepared, folder, store, emit)
    evaluation = _evaluation(prepared, trained)
    trials = _search(prepared, catalogue, evaluation, store, emit)
    front = prepared.objectives.front(trials)
    if not front:
        wanted = " and ".join(map(str, prepared.constraints))
        raise UserError(f"none of {len(trials)} trials is done and has {wanted or 'a result'}",
                        key=("search", "constraints"), hint=f"corenas trials {folder} lists them")  # fmt: skip
    # Of a front one is exported: the best by the first objective.
    best = max(front, key=lambda trial: prepared.objectives.objectives[0].gain(trial.metrics))
    start = time.perf_counter()
    emit(StageStarted("export", 1, "networks"))
    formats = read_formats(spec.export.formats, catalogue)
    test = write_best(prepared, evaluation, best.arch, folder / "best", formats, best.metrics, True)
    seconds = time.perf_counter() - start
    emit(StageDone("export", seconds, test))
    _spent(store, "export", seconds)
    return {
        "run": str(folder),
        "best": {"arch": dict(best.arch), "metrics": dict(best.metrics), "test": test},
        "front": [{"arch": dict(trial.arch), "metrics": dict(trial.metrics)} for trial in front],
        "trials": len(trials),
        "seconds": store.noted("seconds"),
    }


_OWN = ("spec.toml", "run.sqlite", "run.sqlite-wal", "run.sqlite-shm", "supernet.pt", "best")
"""What a run writes into its directory; some of it under a name ending in `.part` first."""


def _check_folder(folder: Path) -> None:
    """Raise UserError for a folder that holds something else than a run."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "run.sqlite").exists():
        raise UserError("this folder is not empty and holds no run", file=str(folder), hint="another one: --out DIR")


def _empty(folder: Path) -> None:
    """Delete what a run has written, and nothing else."""
    for path in (folder / f"{name}{suffix}" for name in _OWN for suffix in ("", ".part")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Only one process at a time works in a run directory. Raises UserError for the second."""
    try:
        import fcntl
    except ImportError:  # no such locks on Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError("another corenas is at work in this run directory", file=str(folder)) from None
    finally:
        os.close(handle)


def _unwritable(folder: Path, error: OSError) -> UserError:
    text = f"cannot write into this run directory: {error.strerror}"
    return UserError(text, file=str(folder), hint="another one: --out DIR")


def _open(folder: Path, table: Mapping[str, Any], splits: Mapping[str, int]) -> Store:
    """The store of a run directory that is new or was begun with this spec and this data."""
    store = Store(folder / "run.sqlite")  # before all else: it is what marks the folder as a run
    begun = store.noted("spec")
    plain = json.loads(json.dumps(table))
    if begun is not None and begun != plain:
        ours, theirs = flatten(plain), flatten(begun)
        keys = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
        changes = ", ".join(f"{key} ({theirs.get(key)} then, {ours.get(key)} now)" for key in keys[:8])
        raise UserError(f"this run was begun with another spec: {changes}", file=str(folder),
                        hint="--out DIR for another directory, --fresh to begin anew")  # fmt: skip
    before = store.noted("splits", splits)
    if before != splits:
        raise UserError(f"the data has changed since this run was begun: {before} images then, {dict(splits)} now",
                        file=str(folder), hint="put it back, or --fresh to begin anew")  # fmt: skip
    try:
        (folder / "spec.toml.part").write_text(tomli_w.dumps(table), encoding="utf-8")
        os.replace(folder / "spec.toml.part", folder / "spec.toml")
    except OSError as error:
        raise _unwritable(folder, error) from error
    store.note("spec", plain)
    store.note("splits", splits)
    versions = {"corenas": corenas.__version__, "torch": torch.__version__, "threads": torch.get_num_threads()}
    store.note("versions", versions)
    return store


def _spent(store: Store, stage: str, seconds: float) -> None:
    """Add to the time that a stage took over all sessions."""
    spent = store.noted("seconds", {})
    store.note("seconds", spent | {stage: spent.get(stage, 0.0) + seconds})


def _train(prepared: Prepared, folder: Path, store: Store, emit: Emit) -> nn.Module:
    """The trained supernet. Where an algorithm trains none, the one that was built."""
    spec = prepared.spec
    if "train" not in spec.algorithm.stages:
        return prepared.supernet
    context = AlgorithmContext(prepared.supernet, spec.space, prepared.cost, prepared.task, spec.train)
    start = time.perf_counter()
    with seeding.seeded(spec.seed, "algorithm"):
        trainer = spec.algorithm.start(context)
    trained = train(
        trainer,
        prepared.supernet,
        prepared.task,
        spec.mutator,
        prepared.cost,
        seed=spec.seed,
        device=prepared.device,
        checkpoint=folder / "supernet.pt",
        emit=emit,
    )
    _spent(store, "train", time.perf_counter() - start)
    return trained


def _search(
    prepared: Prepared, catalogue: Catalogue, evaluation: calibrate.Evaluation, store: Store, emit: Emit
) -> list[Trial]:
    spec = prepared.spec
    context = EvaluatorContext(
        spec.space,
        prepared.cost,
        prepared.task,
        evaluation.supernet,
        evaluation,
        spec.calibration,
        seeding.generator(spec.seed, "evaluators"),
    )
    evaluators = {
        f"{catalogue.name_of(options)} (evaluators[{i}])": options for i, options in enumerate(spec.evaluators)
    }
    problem = Problem(prepared.drawing, prepared.objectives, spec.search.trials)
    searcher = spec.searcher.start(problem, seeding.generator(spec.seed, "searcher"))
    start = time.perf_counter()
    trials = search(
        searcher,
        stand(evaluators, context, prepared.constraints).trial,
        spec.search.trials,
        batch=spec.search.batch,
        store=store,
        objectives=prepared.objectives,
        emit=emit,
    )
    _spent(store, "search", time.perf_counter() - start)
    return trials


def _evaluation(prepared: Prepared, supernet: nn.Module) -> calibrate.Evaluation:
    spec = prepared.spec
    workers = spec.train.workers
    return calibrate.Evaluation(supernet, prepared.task, spec.calibration, prepared.device, spec.seed, workers=workers)


def read_formats(names: Sequence[str], catalogue: Catalogue) -> dict[str, Exporter | None]:
    """Formats by name: None for the core's own, else the exporter. Raises UserError for a name that is neither."""
    return {name: None if name in FORMATS else catalogue.find("exporters", name).cls() for name in names}


def write_best(
    prepared: Prepared,
    evaluation: calibrate.Evaluation | None,
    arch: Arch,
    folder: Path,
    formats: Mapping[str, Exporter | None],
    metrics: Mapping[str, float],
    tested: bool,
) -> dict[str, float]:
    """Export an arch into a folder: network, arch.toml and cost card. Returns its metrics on test data, if asked for.

    The folder appears whole or not at all. The test metrics are those of the exported network itself.
    """
    task = prepared.task
    example = task.example.to(prepared.device)
    if evaluation is None:
        plain = export.export(prepared.supernet.to(prepared.device).eval(), arch, example)
    else:
        with evaluation.calibrated(arch) as model:
            plain = export.export(model, arch, example)
    test = calibrate.measure(plain, task, evaluation.split("test")) if tested and evaluation else {}
    cost = prepared.cost.of([arch])[0]
    card = {
        "flops": cost["flops"],
        "params": cost["params"],
        "activations": cost["activations"],
        "convention": "one input; a multiply-add counts once; bias, norms, activations and pooling count nothing",
        "input": list(task.example.shape[1:]),
        "preprocessing": dict(getattr(task, "preprocessing", {})),
        "metrics": dict(metrics),
        "test": test,
        "splits": dict(task.splits),
        "seed": prepared.spec.seed,
    }
    temporary = folder.with_name(f"{folder.name}.part")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        title = f"{prepared.spec.name}: the subnet {arch.digest}, exported by corenas {corenas.__version__}."
        export.write(plain, task.example, temporary, formats, title)
        for exporter in filter(None, formats.values()):
            exporter.write(plain.cpu().eval(), task.example, temporary)
        (temporary / "arch.toml").write_text(tomli_w.dumps(dict(arch)), encoding="utf-8")
        (temporary / "cost.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    except OSError as error:
        raise UserError(f"cannot write: {error.strerror or error}", file=str(folder)) from error
    return test


def closing_lines(prepared: Prepared, folder: Path, result: Mapping[str, Any]) -> list[str]:
    """What a run says in the end: what was found, where it is, how to load it."""

    def text(metrics: Mapping[str, float], n: int) -> str:
        parts = []
        for name, number in metrics.items():
            metric = prepared.metrics.get(name, Metric())
            noise = f" ± {math.sqrt(max(number * (100 - number), 0.0) / n):.1f}" if metric.unit == "%" and n else ""
            plain = amount(number) if metric.unit != "%" else f"{number:.1f}"
            parts.append(f"{name} {plain}{noise}{metric.unit and ' ' + metric.unit}")
        return ", ".join(parts)

    splits, best, front = prepared.task.splits, result["best"], len(result["front"])
    which = f"of {front} on the front, by {prepared.objectives.objectives[0].metric} the " if front > 1 else ""
    valid = splits["valid"]
    measured = {name: number for name, number in best["metrics"].items() if name in prepared.metrics}
    lines = [
        f"{which}best of {result['trials']} trials: {text(measured, valid)} on {valid} validation images",
        f"on {splits['test']} test images, touched once: {text(best['test'], splits['test'])}",
        f"network:   {folder}/best/ (network.py, network.safetensors, network.pt2, arch.toml, cost.json)",
        f"trials:    {folder}/run.sqlite, listed by: corenas trials {folder}",
        f"supernet:  {folder}/supernet.pt",
        "load it, with torch alone:",
        f'    import sys; sys.path.insert(0, "{folder}/best"); from network import Network',
        "    from safetensors.torch import load_file; network = Network().eval()",
        f'    network.load_state_dict(load_file("{folder}/best/network.safetensors"))',
        f'    or: torch.export.load("{folder}/best/network.pt2").module()',
    ]
    formats = prepared.spec.export.formats
    if not {"python", "safetensors"} <= set(formats):
        lines = [line for line in lines if "load_file" not in line and "sys.path" not in line]
    return [line for line in lines if "pt2" in formats or "torch.export.load" not in line]


def open_run(folder: Path, spec: Spec) -> tuple[Prepared, calibrate.Evaluation, Store]:
    """A run that was trained, to export other subnets of its supernet. Raises UserError if it has not come so far."""
    prepared = prepare(spec)
    load_weights(prepared.supernet, folder / "supernet.pt")
    prepared.supernet.to(prepared.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    evaluation = _evaluation(prepared, prepared.supernet)
    return prepared, evaluation, Store(folder / "run.sqlite", readonly=True)


def named_arch(space: SearchSpace, name: str, trials: Sequence[Trial] = ()) -> Arch:
    """The arch that the command line names: "min", "max", "default", "random:SEED", a TOML file.

    trials: those that may be named by the beginning of their digest
    """
    import tomli

    found = [trial.arch for trial in trials if len(name) >= 4 and trial.arch.digest.startswith(name)]
    if len(found) == 1:
        return found[0]
    if name in ("min", "max", "default"):
        return {"min": space.smallest, "max": space.largest, "default": space.default}[name]()
    kind, colon, seed = name.partition(":")
    if kind == "random" and colon:
        if not seed.isdigit():
            raise UserError(f"random:{seed}: expected a whole number as seed", key=("--arch",))
        return space.sample(seeding.generator(int(seed), "arch"))
    path = Path(name)
    if not path.is_file():
        hint = (
            'expected a TOML file, "min", "max", "default", "random:SEED"; of a run, a trial as `corenas trials` has it'
        )
        raise UserError("no such arch", file=name, hint=hint)
    try:
        return space.arch(tomli.loads(path.read_text(encoding="utf-8")))
    except (tomli.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"this is no TOML: {error}", file=name) from None
    except UserError as error:
        raise UserError(faults=[attrs.evolve(fault, file=name) for fault in error.faults]) from None
