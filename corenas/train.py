"""One visible training loop: it draws archs, lends a step to the algorithm, and steps the optimizer."""

from __future__ import annotations

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

from corenas import distributed, loading, seeding
from corenas.calibrate import statistics_kept
from corenas.contracts import (
    Emit,
    LiveTask,
    Mutator,
    MutatorContext,
    Progress,
    Sampler,
    StageDone,
    StageStarted,
    Trainer,
)
from corenas.cost import Cost
from corenas.errors import UserError
from corenas.mutable import apply
from corenas.optim import build_optimizer, build_schedule
from corenas.settings import Train
from corenas.space import Arch

_EVERY = 0.25
"""Seconds between two signs of life."""
_OFTEN = 600.0
"""Seconds between two checkpoints within an epoch."""


class LoopStep:
    """One step as `train` lends it to `train_step` (`contracts.Step`)."""

    def __init__(
        self,
        archs: Sequence[Arch],
        optimizer: torch.optim.Optimizer,
        index: int,
        part: int = 0,
        *,
        rng: np.random.Generator,
        scaler: torch.amp.GradScaler | None = None,
        share: float = 1.0,
        weight: float = 1.0,
        more: Callable[[str], Any] | None = None,
    ) -> None:
        self.archs, self.optimizer, self.index, self.part, self.rng = archs, optimizer, index, part, rng
        self.lr: float = optimizer.param_groups[0]["lr"]
        self._scaler, self._share, self._weight, self._more = scaler, share, weight, more

    def backward(self, loss: Tensor) -> Tensor:
        """Add a loss's gradients to those of the step and free its graph. Returns the loss, detached."""
        share = loss * self._share if self._share != 1.0 else loss
        (share if self._scaler is None else self._scaler.scale(share)).backward()
        return loss.detach()

    def more(self, split: str) -> Any:
        """The next batch of another stream, "valid" for instance."""
        assert self._more is not None
        return self._more(split)

    def mean(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """The tensors averaged over processes, each weighted by its share of the images."""
        if distributed.world() == 1:
            return tensors
        weighted = [tensor * self._weight for tensor in tensors]
        distributed.total(weighted)
        return weighted


def train(
    trainer: Trainer,
    model: nn.Module,
    task: LiveTask,
    mutator: Mutator | None,
    cost: Cost | None,
    *,
    seed: int = 0,
    device: torch.device | None = None,
    checkpoint: Path | None = None,
    emit: Emit = lambda event: None,
    stage: str = "train",
    limit: int | None = None,
) -> nn.Module:
    """Train a supernet through all phases of an algorithm. Returns it, or its moving average if the settings have one.

    mutator, cost: None where the algorithm draws no archs
    checkpoint: a file written after epochs and read at the start, so that a killed training goes on
    limit: stop after so many steps, to see how long they take
    Raises UserError if the loss is no finite number or the checkpoint cannot be used.
    """
    device = device or torch.device("cpu")
    model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    saved = _read(checkpoint)
    if saved and saved["phase"] >= len(trainer.phases):
        raise _foreign(checkpoint, f"it has a phase {saved['phase'] + 1}")
    total = sum(p.train.epochs * max(1, task.splits["train"] // p.train.batch_size) for p in trainer.phases)
    emit(StageStarted(stage, total, "steps", saved["index"] if saved else 0))
    start = time.perf_counter()
    sign, often = _Clock(_EVERY), _Clock(_OFTEN)
    index, average, figures = 0, None, {}
    shown: dict[str, Tensor] = {}
    for number, phase in enumerate(trainer.phases):
        settings = phase.train
        stream = loading.Stream(task, "train", settings.batch_size, seed, settings.workers, parts=settings.accumulate)
        resumed = saved if saved and number == saved["phase"] else None
        past = saved is not None and number < saved["phase"]
        if phase.begin is not None and not past and resumed is None:
            with seeding.seeded(seed, "begin", number, device=device):
                phase.begin()
            average = None  # the weights may have changed places
        average = _average(model, settings.ema, average)
        if past:
            index += settings.epochs * stream.steps
            continue
        if settings.sync_norm and distributed.world() > 1:
            _synchronise(model)
        others = _Streams(task, settings.batch_size, seed, device)
        optimizer = build_optimizer(model, settings)
        schedule = build_schedule(optimizer, settings.schedule, settings.epochs, stream.steps)
        scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "float16")
        rng = seeding.generator(seed, f"sampler:{number}")
        sampler = None
        if mutator is not None:
            assert cost is not None
            sampler = mutator.start(MutatorContext(phase.space, cost.on(phase.space), rng))
        parts = {
            "model": model, "optimizer": optimizer, "schedule": schedule, "scaler": scaler, "average": average,
            "rng": seeding.Kept(rng), "streams": others, "trainer": trainer, "sampler": sampler,
        }  # fmt: skip
        place = {"phase": number, "epoch": 0, "step": 0, "index": index}
        if resumed is not None:
            place, index = {key: resumed[key] for key in place}, resumed["index"]
            _load(resumed, parts, checkpoint)
        for epoch in range(place["epoch"], settings.epochs):
            first = place["step"] if epoch == place["epoch"] else 0
            for step, cut in enumerate(stream.epoch(epoch, first), first):
                if index == limit:
                    break
                with seeding.seeded(seed, "step", index, *_other_rank(), device=device):
                    model.train()
                    optimizer.zero_grad(set_to_none=True)
                    batches = [(loading.to_device(batch, device), share) for batch, share in cut]
                    archs = _archs(sampler, model, task, batches[0], settings, device)
                    shown = {}
                    for part, (batch, share) in enumerate(batches):
                        lent = LoopStep(
                            archs, optimizer, index, part, rng=seeding.generator(seed, f"step:{index}:{part}"),
                            scaler=scaler, share=share, weight=share * settings.accumulate, more=others.more,
                        )  # fmt: skip
                        with _autocast(settings, device):
                            told = trainer.train_step(batch, lent)
                        shown = {name: shown.get(name, 0.0) + share * value for name, value in told.items()}
                    _update(model, optimizer, scaler, settings)
                if average is not None:
                    average.update_parameters(model)
                schedule.step()
                index += 1
                if sign.due():
                    own = sum(share for _, share in batches)
                    emit(Progress(stage, index, _figures(shown, own, optimizer, epoch, index)))
                if step + 1 < stream.steps and distributed.world() == 1 and often.due():
                    _write(checkpoint, place | {"epoch": epoch, "step": step + 1, "index": index}, parts)
            if index == limit:
                break
            distributed.total(shown.values())
            figures = _figures(shown, 1.0, optimizer, epoch, index)
            _agree(model, average)
            if (epoch + 1) % settings.checkpoint_every == 0:
                _write(checkpoint, place | {"epoch": epoch + 1, "step": 0, "index": index}, parts)
            emit(Progress(stage, index, figures, point=True))
        left_over = settings.epochs % settings.checkpoint_every or not settings.epochs
        if left_over and index != limit and (resumed is None or place["epoch"] < settings.epochs):
            _write(checkpoint, place | {"epoch": settings.epochs, "step": 0, "index": index}, parts)
    emit(StageDone(stage, time.perf_counter() - start, figures))
    return model if average is None else average.module


class _Clock:
    def __init__(self, every: float) -> None:
        self.every, self.last = every, time.perf_counter()

    def due(self) -> bool:
        now = time.perf_counter()
        if now - self.last < self.every:
            return False
        self.last = now
        return True


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

    def state_dict(self) -> dict[str, int]:
        return dict(self.taken)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.taken = dict(state)


def _other_rank() -> tuple[int, ...]:
    """Other processes drop out other units; a single one draws as the first of many."""
    return (distributed.rank(),) if distributed.rank() else ()


def _archs(
    sampler: Sampler | None,
    model: nn.Module,
    task: LiveTask,
    part: tuple[Any, float],
    settings: Train,
    device: torch.device,
) -> list[Arch]:
    """The archs of a step. Their losses, if the sampler asks, leave no trace in the statistics."""
    batch, share = part

    def score(archs: Sequence[Arch]) -> list[float]:
        losses = []
        with torch.no_grad(), statistics_kept(model), _autocast(settings, device):
            for arch in archs:
                with apply(model, arch):
                    losses.append(task.loss(task.forward(model, batch), batch).float())
        mean = torch.stack(losses) * share * settings.accumulate if distributed.world() > 1 else torch.stack(losses)
        distributed.total([mean])
        return mean.tolist()

    return sampler.sample(score) if sampler is not None else []


def _autocast(settings: Train, device: torch.device) -> Any:
    if settings.precision == "float32":
        return nullcontext()
    # No cache: weights cast under no_grad would be found again, without their gradient, by the next forward.
    return torch.autocast(device.type, getattr(torch, settings.precision), cache_enabled=False)


def _update(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, settings: Train) -> None:
    # Archs are the same in all processes, so gradients are there for the same parameters.
    distributed.total(p.grad for p in model.parameters() if p.grad is not None)
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


def _synchronise(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if hasattr(module, "sync"):
            module.sync = True  # type: ignore[assignment]
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            text = f"{name} is a {type(module).__name__} that cannot be synchronised"
            raise UserError(text, key=("train", "sync_norm"), hint="a layer with an attribute `sync` could")


@torch.no_grad()
def _agree(model: nn.Module, average: Any) -> None:
    """Batch-norm statistics become the mean over processes: each has seen its own images."""
    if distributed.world() > 1:
        buffers = [b for part in (model, average) if part is not None for b in part.buffers() if b.is_floating_point()]
        distributed.total(buffers)
        for buffer in buffers:
            buffer /= distributed.world()


def _figures(
    shown: Mapping[str, Tensor], share: float, optimizer: torch.optim.Optimizer, epoch: int, index: int
) -> dict[str, float]:
    figures = {name: float(value) / share for name, value in shown.items()}
    if not math.isfinite(figures.get("loss", 0.0)):
        hint = "lower train.optimizer.lr, or set train.clip_norm, or a warm-up: train.schedule.warmup"
        raise UserError(f"the training diverged: loss {figures['loss']} at step {index} (epoch {epoch})", hint=hint)
    return {"epoch": epoch + 1, **figures, "lr": optimizer.param_groups[0]["lr"]}


def _write(path: Path | None, place: Mapping[str, int], parts: Mapping[str, Any]) -> None:
    """Write a checkpoint; the first process alone does."""
    if path is not None and distributed.rank() == 0:
        states = {name: part.state_dict() for name, part in parts.items() if hasattr(part, "state_dict")}
        save({**place, **states}, path)


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
        hint = "put back a copy of it, or begin anew: --fresh"
        raise UserError(f"this checkpoint cannot be read: {type(error).__name__}", file=str(path), hint=hint) from error
    numbers = [saved.get(key) for key in ("phase", "epoch", "step", "index")] if isinstance(saved, dict) else [None]
    if not all(isinstance(number, int) for number in numbers) or not saved.keys() >= {"model", "streams", "rng"}:
        raise _foreign(path, "it is none of this program")
    return saved


def _foreign(path: Path | None, reason: object) -> UserError:
    text = f"this checkpoint belongs to another model: {str(reason).splitlines()[0]}"
    return UserError(text, file=str(path), hint="put back a copy of its own, or begin anew: --fresh")


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


def _load(saved: Mapping[str, Any], parts: Mapping[str, Any], path: Path | None) -> None:
    try:
        for name, part in parts.items():
            if hasattr(part, "state_dict"):
                part.load_state_dict(saved[name])
    except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise _foreign(path, error) from error
