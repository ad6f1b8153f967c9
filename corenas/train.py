"""One visible training loop: it draws archs, lends a step to the algorithm, and steps the optimizer."""

from __future__ import annotations

import copy
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import Factory, define, field
from torch import Tensor, nn
from torch.optim import swa_utils

from corenas import distributed, loading, seeding
from corenas.calibrate import statistics_kept
from corenas.contracts import Emit, LiveTask, Mutator, MutatorContext, Progress, StageDone, StageStarted, Trainer
from corenas.cost import Cost
from corenas.errors import UserError, blaming_plugin
from corenas.mutable import apply
from corenas.optim import build_optimizer, build_schedule
from corenas.regularisation import tell_progress
from corenas.settings import Train
from corenas.space import Arch, SearchSpace

_EVERY = 0.25
"""Seconds between two signs of life."""
_OFTEN = 600.0
"""Seconds between two checkpoints within an epoch."""


@define(eq=False)
class LoopStep:
    """One step as `train` lends it to `train_step` (`contracts.Step`).

    share: of the whole batch that this part of it is
    scale: makes a loss large enough for half precision
    more: gives the next batch of another stream, "valid" for instance
    """

    archs: Sequence[Arch]
    optimizer: torch.optim.Optimizer
    index: int
    part: int = 0
    rng: np.random.Generator = field(kw_only=True)
    share: float = 1.0
    scale: Callable[[Tensor], Tensor] = lambda loss: loss
    more: Any = None
    lr: float = field(init=False, default=Factory(lambda self: self.optimizer.param_groups[0]["lr"], takes_self=True))

    def backward(self, loss: Tensor) -> Tensor:
        """Add a loss's gradients to those of the step and free its graph. Returns the loss, detached."""
        self.scale(loss * self.share).backward()
        return loss.detach()

    def mean(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """The tensors averaged over processes, each weighted by its share of the images."""
        return distributed.mean(tensors, self.share)


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
    split: str = "train",
    limit: int | None = None,
) -> nn.Module:
    """Train a supernet through all phases of an algorithm. Returns it, or its moving average if the settings have one.

    mutator, cost: None where the algorithm draws no archs
    checkpoint: a file written after epochs and read at the start, so that a killed training goes on
    split: the data that is trained on; "train+valid" is both
    limit: stop after so many steps, to see how long they take
    Raises UserError if the loss is no finite number or the checkpoint cannot be used.
    """
    device = device or torch.device("cpu")
    learnt = _learnt_beside(trainer, device)
    trained = model if learnt is None else nn.ModuleList([model, learnt])
    model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    kept = _Checkpoint(checkpoint)
    at_phase, at_epoch, at_step, index = kept.found.get("place", (0, 0, 0, 0))
    if not trainer.phases:
        raise UserError("this algorithm has no phases to train in", key=("algorithm",))
    if at_phase >= len(trainer.phases):
        raise kept.unusable(f"belongs to another model: it has a phase {at_phase + 1}")
    samples = sum(task.splits[name] for name in split.split("+"))
    total = sum(p.train.epochs * max(1, samples // p.train.batch_size) for p in trainer.phases)
    emit(StageStarted(stage, total, "steps", index))
    start = shown_at = written_at = time.perf_counter()
    average, shown, figures = None, {}, {}
    for number, phase in enumerate(trainer.phases[at_phase:], at_phase):
        settings, last = phase.train, number + 1 == len(trainer.phases)
        resumed = kept.found and number == at_phase
        if phase.begin is not None and not resumed:
            with (
                seeding.seeded(seed, "begin", number, device=device),
                blaming_plugin("the algorithm, as a phase began,"),
            ):
                phase.begin()
            average = None  # the weights may have changed places
        average = None if settings.ema is None else average or copy.deepcopy(model)
        if settings.sync_norm and distributed.world() > 1:
            _synchronise(model)
        stream = loading.Stream(task, split, settings.batch_size, seed, settings.workers, parts=settings.accumulate)
        others = _Streams(task, settings.batch_size, seed, device, settings.workers)
        optimizer = build_optimizer(trained, settings)
        schedule = build_schedule(optimizer, settings.schedule, settings.epochs, stream.steps)
        scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "float16")
        # No cache: weights cast under no_grad would be found again, without their gradient, by the next forward.
        dtype, mixed = getattr(torch, settings.precision), settings.precision != "float32"
        precision = torch.autocast(device.type, dtype, enabled=mixed, cache_enabled=False)
        rng = seeding.generator(seed, f"sampler:{number}")
        sampler = None
        if mutator is not None:
            assert cost is not None
            sampler = mutator.start(MutatorContext(phase.space, cost.on(phase.space), rng))
        parts = {
            "model": model, "optimizer": optimizer, "schedule": schedule, "scaler": scaler, "average": average,
            "streams": others, "trainer": trainer, "sampler": sampler, "distiller": learnt,
        }  # fmt: skip
        for name, part in (("algorithm", trainer), ("mutator", sampler)):
            if hasattr(part, "state_dict") != hasattr(part, "load_state_dict"):
                text = "what it trains with has one of `state_dict` and `load_state_dict`: expected both or none"
                raise UserError(text, key=(name,))
        if resumed:
            kept.load(parts, rng)
            figures = kept.found["figures"]
            if figures:  # a run that was killed after the checkpoint has not told of this point
                emit(Progress(stage, index, figures, point=True))
            kept.found = {}  # it takes as much memory as the model and its optimizer
        for epoch in range(at_epoch, settings.epochs):
            tell_progress(model, epoch / settings.epochs)
            for step, cut in enumerate(stream.epoch(epoch, at_step), at_step):
                if index == limit:
                    return model
                # Other processes drop out other units.
                with seeding.seeded(seed + distributed.rank(), "step", index, device=device):
                    model.train()
                    optimizer.zero_grad()
                    cut, shown = loading.to_device(cut, device), {}
                    score = partial(_losses, model, task, precision, *cut[0])
                    archs = [] if sampler is None else _drawn(sampler, score, phase.space)
                    for part, (batch, share) in enumerate(cut):
                        lent = LoopStep(
                            archs, optimizer, index, part, rng=seeding.generator(seed, f"step:{index}:{part}"),
                            share=share, scale=scaler.scale, more=others.more,
                        )  # fmt: skip
                        with precision, _explained():
                            told = trainer.train_step(batch, lent)
                        if not isinstance(told, Mapping):
                            text = f"the algorithm's train_step gave {told!r}: expected a mapping of figures"
                            raise UserError(text, key=("algorithm",))
                        for name, figure in told.items():
                            figure = torch.as_tensor(figure, device=device)
                            shown[name] = shown.get(name, 0.0) + share / stream.share * figure
                    _update(trained, optimizer, scaler, settings)
                if average is not None:
                    _follow(average, model, settings.ema or 0.0)
                schedule.step()
                index += 1
                now = time.perf_counter()
                if now - shown_at > _EVERY:
                    shown_at = now
                    emit(Progress(stage, index, _figures(shown, optimizer, epoch, index)))
                if now - written_at > _OFTEN and step + 1 < stream.steps and distributed.world() == 1:
                    written_at = now
                    kept.write(parts, rng, (number, epoch, step + 1, index), {})
            at_step = 0
            shown = dict(zip(shown, distributed.mean([*shown.values()], stream.share), strict=True))
            figures = _figures(shown, optimizer, epoch, index)
            if distributed.world() > 1:
                _agree(model, average)
            if (epoch + 1) % settings.checkpoint_every == 0 or epoch + 1 == settings.epochs:
                kept.write(parts, rng, (number, epoch + 1, 0, index), figures, last and epoch + 1 == settings.epochs)
            emit(Progress(stage, index, figures, point=True))
        at_epoch = 0
        if settings.epochs == 0:
            kept.write(parts, rng, (number, 0, 0, index), {}, last)
    emit(StageDone(stage, time.perf_counter() - start, figures))
    return average or model


@define(eq=False)
class _Streams:
    """Batches of other splits for algorithms that want them (DARTS)."""

    task: LiveTask
    batch_size: int
    seed: int
    device: torch.device
    workers: int = 0
    taken: Counter[str] = field(factory=Counter)
    live: dict[str, Iterator[Any]] = field(factory=dict)

    def more(self, split: str, augmented: bool = False) -> Any:
        """The next batch of a split."""
        if split == "test":
            raise UserError("test data is not there to be trained on", key=("algorithm",))
        name = f"{split}, augmented" if augmented else split
        if name not in self.live:
            stream = loading.Stream(self.task, split, self.batch_size, self.seed, self.workers, augmented, name="more")
            self.live[name] = stream.forever(self.taken[name])
        self.taken[name] += 1
        return loading.to_device(next(self.live[name]), self.device)

    def state_dict(self) -> dict[str, int]:
        return dict(self.taken)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.taken = Counter(state)


_EXPLAINED = (
    ("more than 1 value per channel", "a batch norm sees one value of each channel and cannot tell their "
     "variance", "more images in each part of a batch, larger images, or fewer strides"),
    ("could not create a primitive", "torch cannot compute a layer of this network here",
     "is a width, a kernel or a stride far from the others?"),
    ("out of memory", "this training does not fit into memory", "a larger train.accumulate"),
    ("can't allocate memory", "this training does not fit into memory", "a larger train.accumulate"),
)  # fmt: skip
"""What torch says of a step that a spec asks too much of, what it means, and what to do about it."""


@contextmanager
def _explained() -> Iterator[None]:
    """Raise UserError for what is a mistake in the spec rather than in the program."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        for words, text, hint in _EXPLAINED:
            if words in str(error):
                raise UserError(text, key=("train", "batch_size"), hint=hint) from error
        raise


def _learnt_beside(trainer: Any, device: torch.device) -> nn.Module | None:
    """Return the trainer's distiller, if that learns something itself: projections of features."""
    distiller = getattr(trainer, "distiller", None)
    return distiller.to(device) if isinstance(distiller, nn.Module) else None


def _drawn(sampler: Any, score: Callable[[Sequence[Arch]], Sequence[float]], space: SearchSpace) -> Sequence[Arch]:
    """The archs of a step. Raises UserError, naming the mutator, for what is none."""
    with blaming_plugin(f"mutator {type(sampler).__module__}.{type(sampler).__name__}"):
        archs = sampler.sample(score)
        if not isinstance(archs, Sequence) or not archs or not all(isinstance(arch, Arch) for arch in archs):
            raise TypeError(f"it drew {archs!r}, no list of archs")
        codes = space.encode(archs)
        if not np.array_equal(codes, space.canonical(codes)):
            raise ValueError("it drew an arch with choices for what is inactive: `space.arch` makes it canonical")
    return archs


@torch.no_grad()
def _follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    """The exponential moving average of weights; buffers are the model's."""
    swa_utils.get_ema_multi_avg_fn(decay)([*average.parameters()], [*model.parameters()], 0)
    for old, new in zip(average.buffers(), model.buffers(), strict=True):
        old.copy_(new)


def _losses(
    model: nn.Module, task: LiveTask, precision: torch.autocast, batch: Any, share: float, archs: Sequence[Arch]
) -> list[float]:
    """The losses of archs on a batch, as a sampler asks for them. They leave no trace in the statistics."""
    losses = []
    with torch.no_grad(), statistics_kept(model), precision:
        for arch in archs:
            with apply(model, arch):
                losses.append(task.loss(task.forward(model, batch), batch).float())
    (mean,) = distributed.mean([torch.stack(losses)], share)
    return mean.tolist()


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


def _synchronise(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if hasattr(module, "sync"):
            module.sync = True  # type: ignore[assignment]
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            text = f"{name} is a {type(module).__name__} that cannot be synchronised"
            raise UserError(text, key=("train", "sync_norm"), hint="a layer with an attribute `sync` could")


@torch.no_grad()
def _agree(model: nn.Module, average: nn.Module | None) -> None:
    """Batch-norm statistics become the mean over processes: each has seen its own images."""
    buffers = [b for part in (model, average) if part is not None for b in part.buffers() if b.is_floating_point()]
    for buffer, mean in zip(buffers, distributed.mean(buffers, 1.0), strict=True):
        buffer.copy_(mean)


def _figures(shown: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, epoch: int, index: int) -> dict[str, float]:
    figures = {name: float(value) for name, value in shown.items()}
    if not math.isfinite(figures.get("loss", 0.0)):
        hint = "lower train.optimizer.lr, or set train.clip_norm, or a warm-up: train.schedule.warmup"
        raise UserError(f"the training diverged: loss {figures['loss']} at step {index} (epoch {epoch})", hint=hint)
    return {"epoch": epoch + 1, **figures, "lr": optimizer.param_groups[0]["lr"]}


class _Checkpoint:
    """The file that a training goes on from: the states of its parts; the place where it goes on: with which step of
    which epoch of which phase, and how many steps there were before; the figures of an epoch that ends there; whether
    all is done. Without a path there is none.
    """  # fmt: skip

    def __init__(self, path: Path | None) -> None:
        self.path, self.found = path, {}
        if path is None or not path.exists():
            return
        try:
            self.found = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise self.unusable(f"cannot be read: {type(error).__name__}") from error
        if not isinstance(self.found, dict) or not self.found.keys() >= {"model", "place", "figures", "done"}:
            raise self.unusable("belongs to another model: it is none of this program")

    def unusable(self, text: str) -> UserError:
        hint = "put back a copy of its own, or begin anew: --fresh"
        return UserError(f"this checkpoint {text}", file=str(self.path), hint=hint)

    def load(self, parts: Mapping[str, Any], rng: np.random.Generator | None = None) -> None:
        """Give parts the states that they had; those without a state are left as they are."""
        name = ""
        try:
            for name, part in parts.items():
                if hasattr(part, "load_state_dict"):
                    part.load_state_dict(self.found[name])
            if rng is not None:
                rng.bit_generator.state = self.found["rng"]
        except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            text = f"belongs to another model: {name}: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
            raise self.unusable(text) from error

    def write(
        self,
        parts: Mapping[str, Any],
        rng: np.random.Generator,
        place: tuple[int, int, int, int],
        figures: Mapping[str, float],
        done: bool = False,
    ) -> None:
        """Replace the file, so that it is whole or not there; the first process alone does."""
        if self.path is None or distributed.rank() > 0:
            return
        states = {name: part.state_dict() for name, part in parts.items() if hasattr(part, "state_dict")}
        temporary = self.path.with_name(f"{self.path.name}.part")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            note = {"place": place, "rng": rng.bit_generator.state, "figures": dict(figures), "done": done}
            torch.save({**note, **states}, temporary)
            if alien := torch.serialization.get_unsafe_globals_in_checkpoint(temporary):
                temporary.unlink()
                text = f"the state of what is trained holds {', '.join(alien)}, which could not be read again"
                raise UserError(text, hint="a `state_dict` of an algorithm or a sampler is tensors and plain data")
            os.replace(temporary, self.path)
        except (OSError, RuntimeError) as error:  # torch's own writer raises RuntimeError for a full disk
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            text = f"cannot write: {getattr(error, 'strerror', None) or str(error).splitlines()[0]}"
            raise UserError(text, file=str(self.path), hint="free some space, then run again") from error


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Give a supernet the weights of a checkpoint: of the moving average where there is one.

    Raises UserError if there is no checkpoint, none of this model, or one of a training that has not come to its end.
    """
    kept = _Checkpoint(checkpoint)
    if not kept.found:
        raise UserError("no such checkpoint", file=str(checkpoint), hint="has this run trained its supernet?")
    if not kept.found["done"]:
        text = "this training has not come to its end"
        raise UserError(text, file=str(checkpoint), hint="the command that began its run goes on with it")
    kept.load({"average" if "average" in kept.found else "model": model})
