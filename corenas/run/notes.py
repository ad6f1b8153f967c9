"""What a spec says that may be meant otherwise, or that does nothing where it stands: a check and the run tell it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping

import attrs
from attrs import evolve
from torch import nn

from corenas.contracts import LiveTask, Metric, PartlyIdle, Surroundings
from corenas.objectives import Constraint
from corenas.optim import Schedule
from corenas.run.spec import SearchSettings, Spec
from corenas.settings import Calibration, Train
from corenas.variables import OVERRIDE


def notes_of(
    spec: Spec,
    supernet: nn.Module,
    task: LiveTask,
    metrics: Mapping[str, Metric],
    constraints: Iterable[Constraint],
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
    for constraint in constraints:
        for bound in (constraint.low, constraint.high):
            if metrics[constraint.metric].unit == "%" and 0 < bound <= 1:
                notes.append(f"the constraint {constraint}: {constraint.metric} is in %, so this is {bound:g} of 100")
    unread = [key for key in spec.space.keys if key.startswith(OVERRIDE)]
    if unread and "search" in spec.stages and "train" in spec.stages:
        notes.append(f"{unread[0]} changes how an arch is trained alone, nothing of the supernet that is searched")
    return list(dict.fromkeys(notes))


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
