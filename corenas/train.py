"""One visible training loop: it draws archs, lends a step to the algorithm, and steps the optimizer."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import swa_utils
from torch.utils._pytree import tree_flatten, tree_unflatten

from corenas import loading, seeding
from corenas.calibrate import statistics_kept
from corenas.contracts import Emit, LiveTask, Mutator, MutatorContext, Progress, StageDone, StageStarted, Trainer
from corenas.cost import Cost
from corenas.errors import UserError
from corenas.mutable import apply
from corenas.optim import build_optimizer, build_schedule
from corenas.settings import Train
from corenas.space import Arch

_EVERY = 0.25  # seconds between two signs of life


class LoopStep:
    """One step as `train` lends it to `train_step` (`contracts.Step`)."""

    def __init__(
        self,
        archs: Sequence[Arch],
        optimizer: torch.optim.Optimizer,
        index: int,
        scaler: torch.amp.GradScaler,
        share: float,
        more: Callable[[str], Any],
    ) -> None:
        self.archs, self.optimizer, self.index = archs, optimizer, index
        self.lr: float = optimizer.param_groups[0]["lr"]
        self._scaler, self._share, self._more = scaler, share, more

    def more(self, split: str) -> Any:
        """The next batch of another stream, "valid" for instance."""
        return self._more(split)

    def backward(self, loss: Tensor) -> Tensor:
        """Add a loss's gradients to those of the step and free its graph. Returns the loss, detached."""
        self._scaler.scale(loss * self._share if self._share != 1.0 else loss).backward()
        return loss.detach()

    def mean(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """The tensors averaged over processes: there is one."""
        return tensors


def train(
    trainer: Trainer,
    model: nn.Module,
    task: LiveTask,
    mutator: Mutator,
    cost: Cost,
    *,
    seed: int = 0,
    device: torch.device | None = None,
    checkpoint: Path | None = None,
    emit: Emit = lambda event: None,
    stage: str = "train",
) -> nn.Module:
    """Train a supernet through all phases of an algorithm. Returns it, or its moving average if the settings have one.

    checkpoint: a file written after epochs and read at the start, so that a killed training goes on
    Raises UserError if the loss is no finite number or the checkpoint cannot be used.
    """
    device = device or torch.device("cpu")
    model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    saved = _read(checkpoint)
    if saved and saved["phase"] >= len(trainer.phases):
        raise _foreign(checkpoint, f"it has a phase {saved['phase'] + 1}")
    total = sum(p.train.epochs * max(1, task.splits["train"] // p.train.batch_size) for p in trainer.phases)
    emit(StageStarted(stage, total, "steps", saved["index"] if saved else 0))
    clock, index, average = _Clock(), 0, None
    shown: Mapping[str, Tensor] = {}
    figures: Mapping[str, float] = {}
    for number, phase in enumerate(trainer.phases):
        settings = phase.train
        stream = loading.Stream(task, "train", settings.batch_size, seed, settings.workers)
        average = _average(model, settings.ema, average)
        if saved and number < saved["phase"]:
            index += settings.epochs * stream.steps
            continue
        resumed = saved if saved and number == saved["phase"] else None
        if phase.begin is not None and resumed is None:
            with seeding.seeded(seed, "begin", number, device=device):
                phase.begin()
        others = _Streams(task, settings.batch_size, seed, device)
        optimizer = build_optimizer(model, settings)
        schedule = build_schedule(optimizer, settings.schedule, settings.epochs, stream.steps)
        scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "float16")
        rng = seeding.generator(seed, f"sampler:{number}")
        sampler = mutator.start(MutatorContext(phase.space, cost.on(phase.space), rng))
        parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "scaler": scaler, "average": average}
        first = 0
        if resumed is not None:
            first, index, others.taken = resumed["epoch"], resumed["index"], resumed["taken"]
            _load(resumed, parts, trainer, sampler, rng, checkpoint)
        for epoch in range(first, settings.epochs):
            for batch in stream.epoch(epoch):
                batch = loading.to_device(batch, device)
                with seeding.seeded(seed, "step", index, device=device):
                    model.train()
                    optimizer.zero_grad(set_to_none=True)
                    archs = sampler.sample(_score(model, task, batch, settings, device))
                    for part, share in _cut(batch, settings.accumulate):
                        step = LoopStep(archs, optimizer, index, scaler, share, others.more)
                        with _autocast(settings, device):
                            shown = trainer.train_step(part, step)
                    _update(model, optimizer, scaler, settings)
                if average is not None:
                    average.update_parameters(model)
                schedule.step()
                index += 1
                if clock.due():
                    figures = _figures(shown, optimizer, epoch, index)
                    emit(Progress(stage, index, figures))
            figures = _figures(shown, optimizer, epoch, index)
            emit(Progress(stage, index, figures))
            if checkpoint is not None and (epoch + 1) % settings.checkpoint_every == 0 and epoch + 1 < settings.epochs:
                place = {"phase": number, "epoch": epoch + 1, "index": index, "taken": others.taken}
                _write(checkpoint, place, parts, trainer, sampler, rng)
        if checkpoint is not None and (first < settings.epochs or resumed is None):
            place = {"phase": number, "epoch": settings.epochs, "index": index, "taken": others.taken}
            _write(checkpoint, place, parts, trainer, sampler, rng)
    emit(StageDone(stage, clock.seconds, figures))
    return model if average is None else average.module


class _Clock:
    def __init__(self) -> None:
        self.start = self.last = time.perf_counter()

    def due(self) -> bool:
        now = time.perf_counter()
        if now - self.last < _EVERY:
            return False
        self.last = now
        return True

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start


class _Streams:
    """Batches of other splits for algorithms that want them (DARTS)."""

    def __init__(self, task: LiveTask, batch_size: int, seed: int, device: torch.device) -> None:
        self.task, self.batch_size, self.seed, self.device = task, batch_size, seed, device
        self.taken: dict[str, int] = {}
        self._open: dict[str, Iterator[Any]] = {}

    def more(self, split: str) -> Any:
        """The next batch of a split."""
        taken = self.taken.setdefault(split, 0)
        if split not in self._open:
            stream = loading.Stream(self.task, split, self.batch_size, self.seed, augmented=False)
            self._open[split] = stream.forever(taken)
        self.taken[split] += 1
        return loading.to_device(next(self._open[split]), self.device)


def _autocast(settings: Train, device: torch.device) -> Any:
    if settings.precision == "float32":
        return nullcontext()
    # No cache: weights cast under no_grad would be found again, without their gradient, by the next forward.
    return torch.autocast(device.type, getattr(torch, settings.precision), cache_enabled=False)


def _score(
    model: nn.Module, task: LiveTask, batch: Any, settings: Train, device: torch.device
) -> Callable[[Sequence[Arch]], list[float]]:
    """The losses of archs on this batch, without gradient and without a trace in the statistics."""

    def score(archs: Sequence[Arch]) -> list[float]:
        losses = []
        with torch.no_grad(), statistics_kept(model), _autocast(settings, device):
            for arch in archs:
                with apply(model, arch):
                    losses.append(task.loss(task.forward(model, batch), batch))
        return torch.stack(losses).tolist()

    return score


def _cut(batch: Any, parts: int) -> list[tuple[Any, float]]:
    """A batch in parts, each with its share of the samples."""
    if parts == 1:
        return [(batch, 1.0)]
    flat, spec = tree_flatten(batch)
    size = next(item.shape[0] for item in flat if isinstance(item, Tensor))
    bounds = np.linspace(0, size, min(parts, size) + 1).astype(int)
    return [(tree_unflatten([x[a:b] if isinstance(x, Tensor) else x for x in flat], spec), float(b - a) / size)
            for a, b in itertools.pairwise(bounds)]  # fmt: skip


def _update(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, settings: Train) -> None:
    scaler.unscale_(optimizer)
    if settings.clip_value is not None:
        nn.utils.clip_grad_value_(model.parameters(), settings.clip_value)
    if settings.clip_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
    scaler.step(optimizer)
    scaler.update()


def _average(model: nn.Module, decay: float | None, before: Any) -> Any:
    if decay is None:
        return None
    if before is not None:  # an average goes on through phases
        before.multi_avg_fn = swa_utils.get_ema_multi_avg_fn(decay)
        return before
    return swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(decay))


def _figures(shown: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, epoch: int, index: int) -> dict[str, float]:
    figures = {name: float(value) for name, value in shown.items()}
    if not math.isfinite(figures.get("loss", 0.0)):
        hint = "lower train.optimizer.lr, or set train.clip_norm, or a warm-up: train.schedule.warmup"
        raise UserError(f"the training diverged: loss {figures['loss']} at step {index} (epoch {epoch})", hint=hint)
    return {"epoch": epoch + 1, **figures, "lr": optimizer.param_groups[0]["lr"]}


def _write(
    path: Path,
    place: Mapping[str, Any],
    parts: Mapping[str, Any],
    trainer: Any,
    sampler: Any,
    rng: np.random.Generator,
) -> None:
    """Write a checkpoint under a temporary name, then rename it: there is always a whole one."""
    content = {name: part.state_dict() for name, part in parts.items() if part is not None}
    content |= {**place, "rng": seeding.state(rng)}
    for name, part in (("trainer", trainer), ("sampler", sampler)):
        if hasattr(part, "state_dict"):
            content[name] = part.state_dict()
    save(content, path)


def save(content: Any, path: Path) -> None:
    """Write tensors and plain data so that the file is whole or not there. Raises UserError if the disk refuses."""
    temporary = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch's own writer raises RuntimeError for a full disk
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"cannot write: {reason}", file=str(path), hint="free some space, then run again") from error


def _read(path: Path | None) -> dict[str, Any] | None:
    if path is None or not path.exists():
        return None
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        hint = "delete it to train anew from the start, or run with --fresh"
        raise UserError(f"this checkpoint cannot be read: {type(error).__name__}", file=str(path), hint=hint) from error
    numbers = [saved.get(key) for key in ("phase", "epoch", "index")] if isinstance(saved, dict) else [None]
    if not all(isinstance(number, int) for number in numbers) or not saved.keys() >= {"model", "taken", "rng"}:
        raise _foreign(path, "it is none of this program")
    return saved


def _foreign(path: Path | None, reason: object) -> UserError:
    text = f"this checkpoint belongs to another model: {str(reason).splitlines()[0]}"
    return UserError(text, file=str(path), hint="delete it, or run with --fresh")


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Give a supernet the weights of a checkpoint: of the moving average where there is one.

    Raises UserError if there is no checkpoint, or none of this model.
    """
    saved = _read(checkpoint)
    if saved is None:
        raise UserError("no such checkpoint", file=str(checkpoint), hint="has this run trained its supernet?")
    average = saved.get("average")
    weights = saved["model"] if average is None else {
        name.removeprefix("module."): tensor for name, tensor in average.items() if name != "n_averaged"}  # fmt: skip
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise _foreign(checkpoint, error) from error


def _load(
    saved: Mapping[str, Any],
    parts: Mapping[str, Any],
    trainer: Any,
    sampler: Any,
    rng: np.random.Generator,
    path: Path | None,
) -> None:
    try:
        for name, part in parts.items():
            if part is not None:
                part.load_state_dict(saved[name])
        for name, part in (("trainer", trainer), ("sampler", sampler)):
            if name in saved:
                part.load_state_dict(saved[name])
        seeding.restore(rng, saved["rng"])
    except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise _foreign(path, error) from error
