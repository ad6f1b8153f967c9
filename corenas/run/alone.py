"""One arch trained from scratch: retraining, trials of hyper-parameters and baselines share this."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from attrs import define, evolve
from torch import Tensor, nn

from corenas import seeding
from corenas.calibrate import Evaluation, recalibrate, statistics_settled
from corenas.checkpoint import Checkpoint
from corenas.contracts import Distiller, Emit, LiveDistiller, LiveTask, Note, Phase, Step
from corenas.export import flat_name
from corenas.run.spec import Spec, TeacherSettings
from corenas.space import Arch
from corenas.supernet import build_supernet
from corenas.teaching import FixedTeacher, lesson, load_network, start_distiller
from corenas.train import run_training


@define(eq=False)
class _Alone:
    """Trains a network that has one shape only, on the labels and on what a fixed teacher says."""

    network: nn.Module
    task: LiveTask
    phases: Sequence[Phase]
    distiller: LiveDistiller | None = None
    teacher: FixedTeacher | None = None

    def train_step(self, batch: Any, step: Step) -> Mapping[str, Tensor]:
        return {"loss": step.backward(lesson(self.task, batch, self.distiller, self.teacher)(self.network))}


def start_teaching(
    distiller: Distiller | None,
    settings: TeacherSettings | None,
    task: LiveTask,
    student: nn.Module,
    device: torch.device,
) -> tuple[LiveDistiller | None, FixedTeacher | None]:
    """Start a spec's distiller and read its fixed teacher, where there are any. Raises UserError for what is none.

    device: "meta" for a student without weights, to see whether they fit each other
    """
    if distiller is None:
        return None, None
    if settings is None:
        return start_distiller(distiller, task, student, device)
    network = load_network(Path(settings.from_), torch.device("cpu") if device.type == "meta" else device)
    return start_distiller(distiller, task, student, device, network, settings.labels)


def subnet(spec: Spec, task: LiveTask, arch: Arch) -> nn.Module:
    """Return the network of one arch with its head, freshly initialised from the spec's seed, without a supernet."""
    with seeding.seeded(spec.seed, "alone"):
        return build_supernet(spec.backbone, spec.space.fix(arch), task)


@torch.no_grad()
def inherit(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a network of one arch the state of its exported network. What is there in training alone stays as it is.

    Raises ValueError for a state of another network.
    """
    left = dict(state)
    for name, tensor in network.state_dict().items():
        path, _, last = name.rpartition(".")
        # A mutable that stands for a parameter is a module here, and the parameter itself there.
        names = (f"{flat_name(path)}.{last}" if path else last, flat_name(name), flat_name(path))
        known = next((each for each in names if each in left), None)
        if known is not None:
            tensor.copy_(left.pop(known).view(tensor.shape))
    if left:
        raise ValueError(f"no place for {', '.join([*left][:5])} of the exported network")


def stand_alone(
    spec: Spec,
    task: LiveTask,
    arch: Arch,
    *,
    fidelity: float = 1.0,
    device: torch.device | None = None,
    checkpoint: Path | None = None,
    emit: Emit = lambda event: None,
    stage: str = "retrain",
    split: str = "train",
    distiller: Distiller | None = None,
    teacher: TeacherSettings | None = None,
    again: int = 0,
    begin: Mapping[str, Tensor] | None = None,
    limit: int | None = None,
) -> nn.Module:
    """Train one arch as a spec says: its backbone, train settings and seed. Test data is never read.

    After so few batches that batch norms have not forgotten the statistics that they began with, these are recomputed,
    as those of a supernet's subnet are.

    arch: its choices of variables named `spec:…` override the spec
    fidelity: share of the epochs, one at least: the first of the whole training, whose schedule it has
    checkpoint: a file by which a killed training goes on, and one of a lower fidelity
    split: the data that it is trained on
    distiller, teacher: what it learns beside the labels, and from whom
    again: which of several trainings that differ in their seed alone; the data is cut by the spec's
    begin: the state of the arch's exported network, which it begins with; None for weights that are drawn
    limit: stop after so many steps, to see how long they take
    """
    given, spec = spec, spec.overridden(arch)
    if spec.task != given.task:
        task = spec.task.start(seeding.generator(spec.seed, "task"))
    if again:
        spec = evolve(spec, seed=seeding.number(spec.seed, "again", again))
    until = max(1, round(fidelity * spec.train.epochs))
    if checkpoint is not None and Checkpoint(checkpoint).place[1:3] > (until, 0):
        checkpoint = None  # of a longer training, that cannot go back
    network = subnet(spec, task, arch)
    if begin is not None:
        inherit(network, begin)
    device = device or torch.device("cpu")
    live, fixed = start_teaching(distiller, teacher, task, network.to(device), device)
    trainer = _Alone(network, task, [Phase(spec.space, spec.train)], live, fixed)
    trained = run_training(
        trainer,
        network,
        task,
        None,
        None,
        seed=spec.seed,
        device=device,
        checkpoint=checkpoint,
        emit=emit,
        stage=stage,
        split=split,
        limit=limit,
        until=until,
    )
    settings, images = spec.train, sum(task.splits[name] for name in split.split("+"))
    batches = until * max(1, images // settings.batch_size) * settings.accumulate
    if not statistics_settled(trained, batches) and spec.calibration.batches:
        text = f"its {batches:,} batches leave batch norms the statistics that they began with: they are recomputed"
        emit(Note(f"{stage}: {text} as [calibration] says"))
        # Outside of the checkpoint, from which a longer training goes on.
        recalibrate(trained, task, Evaluation(trained, task, spec.calibration, device, spec.seed).images)
        if until == settings.epochs:
            kept, buffers = trained.state_dict(), dict(trained.named_buffers())
            Checkpoint(checkpoint).amend(statistics={name: kept[name] for name in kept if name in buffers})
    return trained
