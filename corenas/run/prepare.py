"""What a spec names, brought to life and checked: its task, supernet, cost, objectives and constraints."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

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
    Phase,
    Pretrained,
    Problem,
    Search,
    Selective,
    Task,
    Teacher,
)
from corenas.cost import METRICS, Cost
from corenas.errors import Fault, KeyPath, UserError, blaming_plugin, collecting, raise_if_any, staying_here
from corenas.measure import TrialRunner, trial_runner
from corenas.mutable import channels_last
from corenas.objectives import Constraint, Objectives, Trial
from corenas.plugins import Catalogue
from corenas.positions import weightless_twin
from corenas.run import goals
from corenas.run.alone import stand_alone, start_teaching, subnet
from corenas.run.notes import notes_of
from corenas.run.spec import Retrain, Spec
from corenas.space import Arch, SearchSpace
from corenas.supernet import build_supernet, pick_device, supernet_cost
from corenas.teaching import network_file, show_example
from corenas.train import draw_archs, start_sampler

_STEPS = 8
"""Of how many steps an algorithm looks at the archs before a run: of few archs one step may suit it by chance."""


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
    phases: of the supernet's training, as its algorithm foretells them
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
    phases: Sequence[Phase] = ()

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
    phases = None
    if "train" in prepared.stages and isinstance(spec.algorithm, Checking):
        with collecting(faults):
            phases = spec.algorithm.check(_algorithm_context(prepared))
    if networks:
        _try_distillers(prepared, faults)
    if networks and data and spec.supernet is None:
        with collecting(faults):
            _try_weights(spec, supernet, whole, task)
    raise_if_any(faults)
    constraints = itertools.chain.from_iterable(target.constraints for target in targets)
    notes = notes_of(spec, supernet, task, metrics, constraints)
    return evolve(prepared, notes=notes, phases=phases or (Phase(spec.space, spec.train),))


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


class _Undecoded:
    """A task whose data is not read, which may take minutes."""

    def __init__(self, task: LiveTask) -> None:
        self._task = task

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def dataset(self, split: str, augmented: bool) -> Any:
        raise LookupError("nothing is read before a run")


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


def refuse_ahead(prepared: Prepared, catalogue: Catalogue) -> None:
    """Raise UserError for what a run would be refused for only as it trains, or as its search begins, hours later.

    That is a mutator whose archs the algorithm does not train, in any of its phases, a searcher or an evaluator that
    does not start. No data is read.
    """
    faults: list[Fault] = []
    if "train" in prepared.stages and prepared.spec.mutator is not None:
        with collecting(faults):
            _try_mutator(prepared)
    if "search" in prepared.stages:
        with collecting(faults), blaming_plugin(f"searcher {catalogue.name_of(prepared.spec.searcher)}"):
            start_searcher(prepared)
        _try_evaluators(prepared, faults)
    raise_if_any(faults)


def _try_mutator(prepared: Prepared) -> None:
    """Draw archs of some steps of each phase. Raises UserError for what is none, or none for the algorithm."""
    spec, algorithm = prepared.spec, prepared.spec.algorithm
    rng = seeding.generator(spec.seed, "ahead")
    for phase in prepared.phases:
        sampler = start_sampler(spec.mutator, phase, prepared.cost, rng)
        for _ in range(_STEPS if isinstance(algorithm, Selective) else 1):
            archs = draw_archs(sampler, phase, lambda archs: rng.random(len(archs)).tolist())
            if isinstance(algorithm, Selective):
                algorithm.check_archs(archs, spec.space)


def _try_evaluators(prepared: Prepared, faults: list[Fault]) -> None:
    """Start a run's evaluators; mistakes are added to the faults."""
    supernet = prepared.supernet if prepared.has_supernet else None
    context = evolve(prepared, task=_Undecoded(prepared.task)).evaluator_context(supernet)
    for evaluator in prepared.spec.evaluators:
        with collecting(faults):
            try:
                with staying_here():
                    evaluator.start(context)
            except UserError:
                raise
            except Exception:  # of what wants data, or weights
                pass


def start_searcher(prepared: Prepared, number: int = 0, known: Sequence[Trial] = ()) -> Search:
    """Return the searcher of one of a run's searches as it begins. Raises UserError for what it refuses.

    known: what earlier searches have measured
    """
    spec, target = prepared.spec, prepared.targets[number]
    cost = prepared.cost if prepared.has_network else None
    problem = Problem(target.region, prepared.objectives, spec.search.trials, cost, target.constraints, known)
    return spec.searcher.start(problem, seeding.generator(spec.seed, "searcher"))


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
