"""What a spec names, brought to life and checked: its task, supernet, cost, objectives and constraints."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import attrs
import tomli
import torch
from attrs import evolve, frozen
from torch import nn

from corenas import seeding
from corenas.calibrate import Evaluation
from corenas.checkpoint import load_weights
from corenas.constrained import FeasibleSpace, reachable
from corenas.contracts import (
    AlgorithmContext,
    Checking,
    Evaluator,
    EvaluatorContext,
    Fingerprinted,
    LiveDistiller,
    LiveTask,
    Metric,
    PartlyIdle,
    Pretrained,
    Surroundings,
    Task,
    Teacher,
)
from corenas.cost import METRICS, Cost
from corenas.errors import Fault, KeyPath, UserError, collecting, raise_if_any, staying_here
from corenas.measure import TrialRunner, trial_runner
from corenas.mutable import channels_last
from corenas.objectives import Constraint, Objectives
from corenas.optim import Schedule
from corenas.positions import weightless_twin
from corenas.run import goals
from corenas.run.alone import stand_alone, start_teaching, subnet
from corenas.run.spec import Retrain, SearchSettings, Spec
from corenas.settings import Calibration, Train
from corenas.space import Arch, SearchSpace
from corenas.supernet import build_supernet, pick_device, supernet_cost
from corenas.teaching import network_file, show_example
from corenas.variables import OVERRIDE


@frozen
class SearchTarget:
    """What one of a run's searches looks for.

    constraints: all of them
    region: the archs that obey those on cost
    """

    constraints: Sequence[Constraint]
    region: FeasibleSpace

    def __str__(self) -> str:
        return " and ".join(map(str, self.constraints))


@frozen
class Prepared:
    """A spec brought to life: everything that a run needs, checked.

    supernet: on the meta device where nothing trains it; a spec without a network has one of no layers
    targets: one for each of the run's searches
    retrain_task: `task`, or what `[retrain]` has of its own
    notes: what a person should know of the spec; no mistakes
    """

    spec: Spec
    task: LiveTask
    supernet: nn.Module
    cost: Cost
    metrics: Mapping[str, Metric]
    objectives: Objectives
    targets: Sequence[SearchTarget]
    device: torch.device
    retrain_task: LiveTask
    notes: Sequence[str] = ()

    @property
    def stages(self) -> list[str]:
        """What the spec asks for; a supernet that was trained before is not trained again."""
        return [stage for stage in self.spec.stages if stage != "train" or self.spec.supernet is None]

    @property
    def has_supernet(self) -> bool:
        """Whether there is a trained supernet, of this run or of another."""
        return "train" in self.spec.stages or self.spec.supernet is not None

    @property
    def has_network(self) -> bool:
        """Whether archs are those of a network, which has costs and can be exported."""
        return self.spec.backbone is not None

    def evaluator_context(self, supernet: nn.Module | None, trials: Path | None = None) -> EvaluatorContext:
        """Return what evaluators measure with.

        trials: a folder for the checkpoints of archs that are trained by themselves
        """
        spec, task, device = self.spec, self.task, self.device
        return EvaluatorContext(
            spec.space,
            self.cost,
            task,
            device,
            supernet,
            self.evaluation(supernet) if supernet else None,
            subnet=lambda arch: subnet(_with_network(spec).overridden(arch), task, arch).to(device),
            alone=lambda arch, fidelity, again=0: self._alone(arch, fidelity, again, trials),
            rng=lambda arch: seeding.generator(spec.seed, f"measure:{arch.digest}"),
        )

    def _alone(self, arch: Arch, fidelity: float, again: int, trials: Path | None) -> nn.Module:
        """Train an arch from scratch, or go on where a lower fidelity, or a killed run, has come to."""
        checkpoint = trials and trials / f"{arch.digest}-{again}.pt"
        network = stand_alone(
            _with_network(self.spec),
            self.task,
            arch,
            fidelity=fidelity,
            device=self.device,
            checkpoint=checkpoint,
            again=again,
        )
        if checkpoint is not None and fidelity == 1:
            checkpoint.unlink(missing_ok=True)
        return network

    def evaluation(self, supernet: nn.Module) -> Evaluation:
        """Return what measures subnets on data."""
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
    task: Any = NoTask() if spec.task is None else _start_task(spec.task, spec.seed, data, ("task",))
    retrain_task = task if spec.retrain.task is None else _start_retrain_task(spec, data, task)
    whole = spec.space if spec.supernet is None else _trained_space(spec, Path(spec.supernet.from_))
    trains = "train" in spec.stages or spec.supernet is not None
    networks = spec.backbone is not None
    supernet = _build(spec, whole, task, meta=not (weights and trains)) if networks else nn.Identity()
    cost = supernet_cost(supernet, whole, task).on(spec.space)
    faults = _faults_of_unused_tables(spec)
    metrics: dict[str, Metric] = {}
    objectives = Objectives(())
    with collecting(faults):
        metrics = goals.metrics_of(spec.evaluators, task, goals.COST_METRICS if networks else {})
        if "search" in spec.stages:
            objectives = goals.read_objectives(spec.search, metrics)
    targets = _read_targets(spec, cost, metrics, faults) if metrics else []
    prepared = Prepared(spec, task, supernet, cost, metrics, objectives, targets, device, retrain_task)
    if "train" in prepared.stages and isinstance(spec.algorithm, Checking):
        with collecting(faults):
            spec.algorithm.check(_algorithm_context(prepared))
    if networks:
        _try_distillers(prepared, faults)
    if networks and data and spec.supernet is None:
        with collecting(faults):
            _try_weights(spec, supernet, whole, task)
    raise_if_any(faults)
    return evolve(prepared, notes=_notes(spec, supernet, task, metrics, targets))


def files_of_other_runs(spec: Spec) -> dict[str, Path]:
    """Return the files that a spec needs of what was trained before, by what they are.

    Raises UserError, keys relative to the spec, with those that are not there.
    """
    found, faults = {}, []
    if spec.supernet is not None:
        found["supernet"] = file = Path(spec.supernet.from_) / "supernet.pt"
        if not file.exists():
            text = f"there is no {file}: this run has not trained its supernet"
            faults.append(Fault(text, ("supernet", "from"), hint="the command that began it goes on with it"))
    for name, key, teacher in (("teacher", (), spec.teacher), ("retrain teacher", ("retrain",), spec.retrain.teacher)):
        if teacher is not None:
            with collecting(faults, *key):
                found[name] = network_file(Path(teacher.from_))
    raise_if_any(faults)
    return found


def trained_since(spec: Spec) -> Spec:
    """Return the spec of a network that has been trained: the weights that it began with are not read again."""
    backbones: list[Any] = [spec.backbone, spec.retrain.backbone]
    own, other = (evolve(b, weights=None) if isinstance(b, Pretrained) else b for b in backbones)
    return evolve(spec, backbone=own, retrain=evolve(spec.retrain, backbone=other))


class NoTask:
    """The task of a spec that names none: it has no data and measures nothing."""

    example = torch.empty(1)
    metrics: Mapping[str, Metric] = {}
    splits: Mapping[str, int] = {}

    def __getattr__(self, name: str) -> Any:
        """Raise UserError for what only a task could give."""
        if name.startswith("__") or name in ("fingerprint", "preprocessing", "notes", "cut"):
            raise AttributeError(name)
        raise UserError("something here wants data", hint="say task, backbone and algorithm")


def _with_network(spec: Spec) -> Spec:
    """Return a spec. Raises UserError if it names no network."""
    if spec.backbone is None:
        raise UserError("an evaluator wants a network, and this spec has none", hint="say task, backbone and algorithm")
    return spec


def _start_task(options: Task, seed: int, data: bool, key: KeyPath) -> LiveTask:
    """Return a task, the same for the same seed. Raises UserError, keys relative to the spec."""
    try:
        with staying_here():
            return options.start(seeding.generator(seed, "task"), data)
    except UserError as error:
        raise error.under(*key) from None


def _start_retrain_task(spec: Spec, data: bool, task: LiveTask) -> LiveTask:
    """Return the task that a network is retrained on.

    Raises UserError if it cuts the data otherwise: an arch would have been chosen by what is then test data.
    """
    other = _start_task(spec.retrain.task, spec.seed, data, ("retrain", "task"))
    before, after = (t.fingerprint if isinstance(t, Fingerprinted) else None for t in (task, other))
    if before != after or dict(task.splits) != dict(other.splits):
        hint = "the same `data`, `valid` and `test` in both"
        raise UserError("this is other data than `task` has, or cut otherwise", key=("retrain", "task"), hint=hint)
    return other


def _build(spec: Spec, space: SearchSpace, task: LiveTask, meta: bool) -> nn.Module:
    """Return the supernet of a spec. Raises UserError for a space that torch cannot allocate."""
    backbone: Any = (spec if spec.supernet is None else trained_since(spec)).backbone
    if not meta and getattr(backbone, "weights", None) is None:
        _refuse_beyond_memory(_build(spec, space, task, meta=True))
    try:
        with staying_here(), seeding.seeded(spec.seed, "init"), torch.device("meta") if meta else nullcontext():
            return build_supernet(backbone, space, task)
    except (RuntimeError, MemoryError, OverflowError, ValueError, TypeError) as error:
        if isinstance(error, TypeError) and "Overflow" not in str(error):  # torch's answer to a width beyond 64 bits
            raise
        text = f"this space cannot be built: {str(error).splitlines()[0]}"
        raise UserError(text, key=("space",), hint="are its widths and depths meant so?") from error


def _refuse_beyond_memory(supernet: nn.Module) -> None:
    """Raise UserError for weights that would fill the memory, which the system grants before it kills for it."""
    needed = sum(parameter.numel() * parameter.element_size() for parameter in supernet.parameters())
    there = memory_of_machine()
    if needed > there:
        text = f"the weights of this supernet need {needed / 1e9:,.1f} GB, and this machine has {there / 1e9:,.1f} GB"
        raise UserError(text, key=("space",), hint="are its widths and depths meant so?")


def memory_of_machine() -> float:
    """Return how many bytes of memory there are; infinitely many where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return math.inf


def _faults_of_unused_tables(spec: Spec) -> list[Fault]:
    """Return which tables of a spec its algorithm would not look at."""
    faults: list[Fault] = []
    if "retrain" not in spec.stages and spec.retrain != Retrain():
        faults.append(Fault("this algorithm has no retraining", ("retrain",), hint="leave this table out"))
    again = spec.retrain.backbone or spec.backbone
    scratch = spec.retrain.begin == "scratch"
    if scratch and {"search", "retrain"} <= {*spec.stages} and getattr(again, "weights", None) is not None:
        text = "the arch that is found is retrained, and is likely none that these weights are of"
        hint = "a [retrain.backbone] without `weights`, or an algorithm that does not retrain"
        key = ("retrain", "backbone", "weights") if spec.retrain.backbone else ("backbone", "weights")
        faults.append(Fault(text, key, hint=hint))
    if "search" not in spec.stages and any(spec.search.bounds):
        text = "this algorithm has no search, which would hold to these"
        faults.append(Fault(text, ("search", "constraints"), hint="leave them out"))
    return faults


def _try_weights(spec: Spec, supernet: Any, space: SearchSpace, task: LiveTask) -> None:
    """Raise UserError for files of weights that do not fit the networks that are built only later."""
    for backbone, key in ((spec.backbone, ()), (spec.retrain.backbone, ("retrain",))):
        if not isinstance(backbone, Pretrained) or backbone.weights is None:
            continue
        if key:
            supernet = _build(evolve(spec, backbone=backbone), space, task, meta=True)
        if all(parameter.is_meta for parameter in supernet.parameters()):
            try:
                with staying_here():
                    supernet.notes = backbone.load(supernet, space)
            except UserError as error:
                raise error.under(*key) from None


def _try_distillers(prepared: Prepared, faults: list[Fault]) -> None:
    """Let a run's distillers compare what its networks show with itself; mistakes are added to the faults."""
    spec, retrain = prepared.spec, prepared.spec.retrain
    wanted: list[tuple[Any, Any, LiveTask, KeyPath]] = []
    if "train" in prepared.stages:
        wanted.append((spec.distiller, spec.teacher, prepared.task, ()))
    if retrain.backbone is None:
        wanted.append((retrain.distiller, retrain.teacher, prepared.retrain_task, ("retrain",)))
    for distiller, teacher, task, prefix in wanted:
        if distiller is None:
            continue
        twin = weightless_twin(prepared.supernet)
        with collecting(faults, *prefix), suppress(NotImplementedError, RuntimeError):  # what meta tensors cannot do
            live, fixed = start_teaching(distiller, teacher, task, twin, torch.device("meta"))
            assert live is not None
            shown = show_example(twin, task, tuple(live.taps))
            live.loss(shown, shown if fixed is None else show_example(fixed.network, task, fixed.taps))


def _read_targets(spec: Spec, cost: Cost, metrics: Mapping[str, Metric], faults: list[Fault]) -> list[SearchTarget]:
    """Return what each of a run's searches looks for; mistakes are added to the faults."""
    targets = []
    several = isinstance(spec.search.constraints, tuple)
    for i, bounds in enumerate(spec.search.bounds):
        key = ("search", "constraints", i) if several else ("search", "constraints")
        with collecting(faults, *key):
            largest = None if spec.backbone is None else lambda metric: reachable(cost, metric)[1]
            constraints = goals.read_constraints(bounds, metrics, largest)
            cheap = [constraint for constraint in constraints if largest and constraint.metric in METRICS]
            targets.append(SearchTarget(constraints, FeasibleSpace(spec.space, cost, cheap)))
    return targets


def _unread_tables(spec: Spec) -> list[str]:
    """Return which of a spec's mutator and searcher nothing in its run looks at."""
    if spec.algorithm is None or spec.supernet is not None:  # what a supernet's run says is not this one's
        return []
    read = {*spec.algorithm.needs, *getattr(spec.algorithm, "uses", ()), *getattr(spec.algorithm, "defaults", ())}
    read |= {"searcher"} if "search" in spec.stages else set()
    return [key for key in ("mutator", "searcher") if getattr(spec, key) is not None and key not in read]


def _idle_options(spec: Spec, task: LiveTask, supernet: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield which options of a spec's components do nothing, and why."""
    around = Surroundings(spec.space, task, supernet, spec.search.trials if "search" in spec.stages else 0)
    kinds = ("task", "backbone", "algorithm", "mutator", "distiller", "searcher", "executor")
    there = {key: getattr(spec, key) for key in kinds}
    there |= {f"evaluators[{i}]": evaluator for i, evaluator in enumerate(spec.evaluators)}
    there |= {f"retrain.{key}": getattr(spec.retrain, key) for key in ("backbone", "distiller", "task")}
    for key, options in there.items():
        if not isinstance(options, PartlyIdle):
            continue
        defaults = {item.name: item.default for item in attrs.fields(type(options))}
        for name, reason in options.idle(around).items():
            if name == "type":
                yield key, reason
            elif (value := getattr(options, name)) != defaults[name]:
                yield f"{key}.{name.removesuffix('_')} = {value!r}", reason


def _idle_settings(spec: Spec, supernet: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield which settings of a spec do nothing, and why; what a supernet's run says is not its own."""
    train, search, retrain, calibration = spec.train, spec.search, spec.retrain, spec.calibration
    own, searched = spec.supernet is None, "search" in spec.stages
    if spec.algorithm is not None and own and not searched:
        whole = evolve(search, constraints={})  # which are refused
        given = {"evaluators": spec.evaluators, "executor": spec.executor, "search": whole != SearchSettings()}
        yield from ((key, "this algorithm has no search") for key, there in given.items() if there)
    if spec.export.front and not (searched and search.pareto):
        yield "export.front", "without `search.pareto` there is no front"
    if searched:
        several = len(search.goals) > 1
        if search.pareto is True and not several:
            yield "search.pareto", "of one objective nothing but the best is kept"
        if any(goal.weight is not None for goal in search.goals) and not several:
            yield "search.objectives: weight", "there is one objective"
    alone = "a network that is trained alone has no other archs to be looked at"
    trust = search.trust.train if search.trust is not None else None
    of_one = {"retrain.train": retrain.train, "search.trust.train": trust}
    if own and "train" not in spec.stages:
        of_one["train"] = train
    for key, settings in of_one.items():
        for name in ("stop", "validate"):
            if settings is not None and getattr(settings, name) is not None:
                yield f"{key}.{name}", alone
    for key, settings in {"train": train if own else None, "retrain.train": retrain.train}.items():
        if settings is not None:
            yield from ((f"{key}.{name}", reason) for name, reason in _idle_in_training(settings, key not in of_one))
    if spec.supernet is not None and spec.supernet.weights == "raw" and train.ema is None:
        yield 'supernet.weights = "raw"', "it was trained without a moving average"
    given = evolve(calibration, batches=Calibration().batches)
    if calibration.batches == 0 and given != Calibration():
        yield "calibration", "with no batches statistics stay as they are"
    norms = (nn.modules.batchnorm._BatchNorm,)
    if own and calibration != Calibration() and not any(isinstance(module, norms) for module in supernet.modules()):
        yield "calibration", "this network has no batch norm"


def _idle_in_training(train: Train, of_supernet: bool) -> Iterator[tuple[str, str]]:
    """Yield which settings of a training do nothing, and why."""
    schedule = train.schedule
    looked_at = {"constant": (), "linear": ("floor",), "cosine": ("floor",), "exponential": ("floor", "decay", "every")}
    for name in ("floor", "decay", "every"):
        if getattr(schedule, name) != getattr(Schedule(), name) and name not in looked_at.get(schedule.type, ()):
            yield f"schedule.{name}", f"{schedule.type} has none"
    if train.ema == 0:
        yield "ema = 0", "it averages the last step alone"
    if not of_supernet or not train.epochs:
        return
    if train.validate is not None and train.validate > train.epochs:
        yield f"validate = {train.validate}", f"there are {train.epochs:,} epochs"
    if train.stop is not None and train.epochs < 2:
        yield "stop", "one epoch has none before it to be compared with"


def _notes(
    spec: Spec,
    supernet: nn.Module,
    task: LiveTask,
    metrics: Mapping[str, Metric],
    targets: Sequence[SearchTarget],
) -> list[str]:
    """Return what a spec says that may be meant otherwise, and what is done about it."""
    notes = [*getattr(task, "notes", ()), *getattr(supernet, "notes", ())]
    notes += [f"this algorithm looks at no {key}: that of the spec is for nothing" for key in _unread_tables(spec)]
    idle = itertools.chain(_idle_settings(spec, supernet), _idle_options(spec, task, supernet))
    notes += [f"{key} does nothing: {reason}" for key, reason in idle]
    trainings = {"train": spec.train} if "train" in spec.stages and spec.supernet is None else {}
    if "retrain" in spec.stages:
        trainings |= {"retrain.train" if spec.retrain.train else "train": spec.retrain.train or spec.train}
    for key, settings in trainings.items():
        split = spec.retrain.data if key.startswith("retrain") else "train"
        images = sum(task.splits.get(name, 0) for name in split.split("+"))
        if 0 < images < settings.batch_size:
            text = f"{key}.batch_size = {settings.batch_size:,}, but there are {images:,} images: each step sees all"
            notes.append(f"{text} of them")
        if 0 < settings.epochs <= settings.schedule.warmup:
            text = f"{key}.schedule.warmup = {settings.schedule.warmup:g} epochs are the whole training"
            notes.append(f"{text}, of {settings.epochs:,}: the learning rate never comes to its own")
        steps = settings.epochs * max(1, images // settings.batch_size)
        if settings.ema is not None and images and (settings.ema == 1 or 1 / (1 - settings.ema) > steps):
            memory = "all" if settings.ema == 1 else f"{1 / (1 - settings.ema):,.0f}"
            notes.append(
                f"{key}.ema = {settings.ema:g} remembers {memory} steps, more than the {steps:,} of this training: its "
                "first steps count for less, as long as the average is young"
            )
    for constraint in (constraint for target in targets for constraint in target.constraints):
        for bound in (constraint.low, constraint.high):
            if metrics[constraint.metric].unit == "%" and 0 < bound <= 1:
                notes.append(f"the constraint {constraint}: {constraint.metric} is in %, so this is {bound:g} of 100")
    unread = [key for key in spec.space.keys if key.startswith(OVERRIDE)]
    if unread and "search" in spec.stages and "train" in spec.stages:
        notes.append(f"{unread[0]} changes how an arch is trained alone, nothing of the supernet that is searched")
    return list(dict.fromkeys(notes))


def _trained_space(spec: Spec, folder: Path) -> SearchSpace:
    """Return the space of the run whose supernet is used, of which the spec's may be a part."""
    whole = SearchSpace.from_table(tomli.loads((folder / "spec.toml").read_text(encoding="utf-8"))["space"])
    try:
        for arch in (spec.space.smallest(), spec.space.largest()):
            whole.arch(arch)
    except UserError as error:
        text = f"the supernet of {folder} was trained in another space: {error.faults[0]}"
        raise UserError(text, key=("space",), hint="leave `space` out, or say only `fix` and `narrow`") from None
    return whole


def start_trainer(prepared: Prepared) -> Any:
    """Return the trainer of a spec's algorithm. Raises UserError for what the algorithm refuses."""
    spec = prepared.spec
    prepared.supernet.to(prepared.device)
    distiller, teacher = start_teaching(spec.distiller, spec.teacher, prepared.task, prepared.supernet, prepared.device)
    with seeding.seeded(spec.seed, "algorithm", device=prepared.device):
        return spec.algorithm.start(_algorithm_context(prepared, distiller, teacher))


def _algorithm_context(
    prepared: Prepared, distiller: LiveDistiller | None = None, teacher: Teacher | None = None
) -> AlgorithmContext:
    spec = prepared.spec
    pretrained = isinstance(spec.backbone, Pretrained) and spec.backbone.weights is not None
    return AlgorithmContext(
        prepared.supernet,
        spec.space,
        prepared.cost,
        prepared.task,
        spec.train,
        prepared.device,
        distiller,
        teacher,
        pretrained,
    )


def start_trial_runner(
    prepared: Prepared,
    number: int,
    supernet: nn.Module | None,
    where: Callable[[Evaluator], bool] = lambda evaluator: True,
    costs: bool = True,
    trials: Path | None = None,
) -> TrialRunner:
    """Return what measures the archs of one of a run's searches.

    where: which evaluators it asks
    costs: whether it begins with flops, params and activations
    trials: a folder for the checkpoints of archs that are trained by themselves
    """
    spec = prepared.spec
    evaluators = {f"{type(e).__name__} (evaluators[{i}])": e for i, e in enumerate(spec.evaluators)}
    constraints = prepared.targets[number].constraints
    context = prepared.evaluator_context(supernet, trials)
    costs = costs and prepared.has_network
    return trial_runner(evaluators, context, constraints, spec.seed, where, costs)


def load_supernet(prepared: Prepared, folder: Path) -> nn.Module:
    """Return the trained supernet of a run, on its device. Raises UserError if it has not come so far."""
    source = prepared.spec.supernet
    path = (Path(source.from_) if source is not None else folder) / "supernet.pt"
    load_weights(prepared.supernet, path, raw=source is not None and source.weights == "raw")
    return channels_last(prepared.supernet.to(prepared.device))


def trials_folder(prepared: Prepared, folder: Path) -> Path | None:
    """Return where in a run directory archs that are trained by themselves have checkpoints; none beside a supernet."""
    return None if prepared.has_supernet else folder / "trials"
