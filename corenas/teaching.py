"""Who teaches a path, and what the path then learns: the largest of its step, or a network that learns no more."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from corenas.calibrate import statistics_kept
from corenas.contracts import Distiller, DistillerContext, LiveDistiller, LiveTask, Signals, Step, Tap, Teacher
from corenas.errors import UserError
from corenas.mutable import apply, call_model
from corenas.regularisation import unregularised
from corenas.space import Arch
from corenas.supernet import observe


def distil_in_place(
    model: nn.Module, task: LiveTask, distiller: LiveDistiller, batch: Any, step: Step, largest: Arch
) -> Mapping[str, Tensor]:
    """Train the first arch of a step on the labels, the others on what it says of the same images.

    In-place distillation (Yu and Huang 2019, arXiv:1903.05134) with the sandwich rule, as in BigNAS (arXiv:2003.11142,
    section 3.1): one path's activations live at a time, no gradient reaches the teacher, and the first arch alone is
    regularised, by dropout and drop path.

    largest: what the first arch has to be, but for choices that all archs of the step share
    Returns figures: `loss`, the first on the labels; `smallest`, the last on what the first says.
    Raises UserError if the first is another one; so does the distiller's loss for a task with nothing to distil.
    """
    refuse_unless_largest_first(step.archs, largest)
    figures = {}
    with apply(model, step.archs[0]):
        seen = observe(model, task, batch, distiller.taps)
        teacher = detached(seen)
        figures["loss"] = step.backward(task.loss(seen.outputs, batch))
    del seen
    for arch in step.archs[1:]:
        with apply(model, arch), unregularised(model):
            student = observe(model, task, batch, distiller.taps)
            figures["smallest"] = step.backward(distiller.loss(student, teacher))
    return figures


def refuse_unless_largest_first(archs: Sequence[Arch], largest: Arch) -> None:
    """Raise UserError unless a step's first arch is the largest, but for choices that it shares with all others."""
    other = [key for key, choice in largest.items() if archs and archs[0][key] != choice]
    shared = len(archs) > 1 and all(arch[key] == archs[0][key] for arch in archs for key in other)
    if not archs or (other and not shared):
        text, hint = "this algorithm needs the largest subnet first in each step", 'use mutator = "sandwich"'
        raise UserError(text, key=("mutator", "type"), hint=hint)


def detached(signals: Signals) -> Signals:
    """Return what a teacher shows without its graph."""
    return Signals(*tree_map_only(Tensor, Tensor.detach, (signals.outputs, signals.logits, [*signals.features])))


def lesson(
    task: LiveTask, batch: Any, distiller: LiveDistiller | None = None, teacher: Teacher | None = None
) -> Callable[[nn.Module], Tensor]:
    """Return what gives the loss of a model on a batch: that on the labels, and what a fixed teacher adds to it.

    The teacher sees the batch once, however many paths learn of it. Without one the loss is the task's.
    """
    if distiller is None or teacher is None:
        return lambda model: task.loss(task.forward(model, batch), batch)
    taught = teacher(batch)

    def loss(model: nn.Module) -> Tensor:
        student = observe(model, task, batch, distiller.taps)
        return teacher.labels * task.loss(student.outputs, batch) + distiller.loss(student, taught)

    return loss


@frozen(eq=False)
class FixedTeacher:
    """A network that teaches and does not learn: in evaluation mode, without gradient.

    labels: weight of the loss on the labels beside the distiller's
    """

    network: nn.Module
    task: LiveTask
    taps: tuple[Tap, ...] = ()
    labels: float = 1.0

    @torch.no_grad()
    def __call__(self, batch: Any) -> Signals:
        """Return what it shows of a batch."""
        return detached(observe(self.network, self.task, batch, self.taps))


def start_distiller(
    distiller: Distiller,
    task: LiveTask,
    student: nn.Module,
    device: torch.device,
    network: nn.Module | None = None,
    labels: float = 1.0,
) -> tuple[LiveDistiller, FixedTeacher | None]:
    """Start a distiller for a student, with a fixed network as its teacher or without.

    labels: weight of the labels beside what such a teacher says
    Raises UserError if student and teacher have nothing to compare.
    """
    live = distiller.start(DistillerContext(task, student, device, network))
    if isinstance(live, nn.Module):
        live.to(device)
    if network is None:
        return live, None
    taps = tuple(getattr(live, "teacher_taps", live.taps))
    teacher = show_example(network, task, taps).answers
    pupil = show_example(student, task).answers
    if teacher is not None and pupil is not None and teacher.shape != pupil.shape:
        text = f"the teacher answers with {[*teacher.shape]} numbers, the task has {[*pupil.shape]}"
        raise UserError(text, key=("teacher", "from"), hint="was it trained for the same classes?")
    return live, FixedTeacher(network, task, taps, labels)


@torch.no_grad()
def show_example(model: nn.Module, task: LiveTask, taps: tuple[Tap, ...] = ()) -> Signals:
    """Return what a model shows of one input, in evaluation mode; it is left as it was."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    example = _Example(task)
    with statistics_kept(model):
        for module in model.modules():
            module.training = False
        inputs = tree_map_only(Tensor, lambda tensor: tensor.to(device), task.example)
        return observe(model, example, inputs, taps)  # type: ignore[arg-type]


class _Example:
    """A task whose batches are inputs of a model."""

    def __init__(self, task: LiveTask) -> None:
        self.logits = task.logits

    def forward(self, model: nn.Module, batch: Any) -> Any:
        return call_model(model, batch)


def network_file(source: Path) -> Path:
    """Return the file of a network that teaches: of a run directory its `best/network.pt2`.

    Raises UserError if it is not there.
    """
    file = source / "best" / "network.pt2" if source.is_dir() else source
    if not file.is_file():
        hint = 'a run directory with "pt2" among its export.formats, a .pt2 or a TorchScript file'
        raise UserError(f"{file} is no network", key=("teacher", "from"), hint=hint)
    return file


def load_network(source: Path, device: torch.device) -> nn.Module:
    """Return a network that was exported, to teach: no gradient reaches its weights.

    source: a run directory, a .pt2 file of torch.export, whose modules keep their names, or a TorchScript file, which
        shows its answers alone
    Raises UserError if there is none or it cannot be read.
    """
    file = network_file(source)
    try:
        network = _read_network(file)
    except Exception as error:  # whatever torch says of a file that is none
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise UserError(f"{file} cannot be read: {reason}", key=("teacher", "from")) from error
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    return network.to(device)


def _read_network(file: Path) -> nn.Module:
    if file.suffix == ".pt2":
        return torch.export.unflatten(torch.export.load(file))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would rather have torch.export
        return torch.jit.load(file, map_location="cpu").eval()
