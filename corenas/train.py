"""One visible training loop over a live phase, whose `step(batch)` anybody's own loop calls as well."""

from __future__ import annotations

import copy
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from attrs import Factory, define, field, frozen
from torch import Tensor, nn
from torch.optim import swa_utils

from corenas import distributed, loading, seeding
from corenas.calibrate import statistics_kept
from corenas.checkpoint import Checkpoint, load_states, states_of
from corenas.contracts import (
    Emit,
    LiveTask,
    Mutator,
    MutatorContext,
    Phase,
    Progress,
    Sampler,
    StageDone,
    StageStarted,
    Trainer,
)
from corenas.cost import Cost
from corenas.errors import UserError, blaming_plugin, staying_here
from corenas.mutable import apply, channels_last
from corenas.optim import build_optimizer, build_schedule
from corenas.ranking import Ranking
from corenas.regularisation import tell_progress, unregularised
from corenas.space import Arch, SearchSpace
from corenas.timer import PROGRESS_EVERY_S, Timer

Score: TypeAlias = Callable[[nn.Module, Sequence[Arch]], Sequence[float]]
"""Model, archs -> what the archs are ranked by."""

CHECKPOINT_EVERY_S = 600.0
"""Seconds between two checkpoints within an epoch."""


def run_training(
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
    score: Score | None = None,
    until: float = math.inf,
) -> nn.Module:
    """Train a supernet through all phases of an algorithm. Returns it, or its moving average if the settings have one.

    mutator, cost: None where the algorithm draws no archs
    checkpoint: a file written after epochs and read at the start, so that a killed training goes on
    split: the data that is trained on; "train+valid" is both
    limit: stop after so many steps, to see how long they take
    score: model, archs -> what they are ranked by where `train.stop` ends a phase, or `train.validate` looks at
        some; without it neither does
    until: end after so many epochs of a phase, with a checkpoint that a longer training goes on from to the same bits
    Raises UserError if the loss is no finite number or the checkpoint cannot be used.

    >>> import torch
    >>> from corenas import Cost, run_training
    >>> from corenas.settings import Train
    >>> from corenas.testing.small import Paths, Task, Trainer, make_space, supernet
    >>> space, task = make_space(), Task()
    >>> model = supernet(space, task)
    >>> trainer = Trainer(model, task, [(space, Train(epochs=1, batch_size=32))])
    >>> steps = []
    >>> model = run_training(trainer, model, task, Paths(2), Cost(model, space, task.example), emit=steps.append)
    >>> steps[-1].stage, sorted(steps[-1].figures)
    ('train', ['epoch', 'loss', 'lr'])
    """
    saved = Checkpoint(checkpoint)
    first, *_, index = saved.place
    _refuse_missing_phases(trainer, first, saved)
    emit(StageStarted(stage, _total_steps(trainer, task, split), "steps", index))
    start, show, write = time.perf_counter(), Timer(PROGRESS_EVERY_S), Timer(CHECKPOINT_EVERY_S)
    device = device or torch.device("cpu")
    begin = partial(LivePhase, trainer, model, task, mutator=mutator, cost=cost, seed=seed, device=device, score=score)
    average, shown, figures, resumed = None, {}, {}, bool(saved.found)
    for number, phase in enumerate(trainer.phases[first:], first):
        settings, is_last = phase.train, number + 1 == len(trainer.phases)
        stream = loading.Stream(task, split, settings.batch_size, seed, settings.workers, parts=settings.accumulate)
        live = begin(phase, stream.steps, number=number, index=index, average=average, resumed=resumed)
        average, begun = live.average, resumed
        if resumed:
            figures, resumed = saved.restore(live), False
            if figures:  # a run that was killed after the checkpoint has not told of this point
                emit(Progress(stage, live.index, figures, point=True))
        last = min(settings.epochs, until)
        while (epoch := live.epoch) < last:
            for parts in stream.epoch(epoch, live.done % stream.steps):
                if live.index == limit:
                    return model
                shown = live.step_parts(parts, stream.share)
                if show.is_due():
                    emit(Progress(stage, live.index, _figures(shown, live, epoch)))
                if live.epoch == epoch and distributed.world() == 1 and write.is_due():
                    saved.write(live, {})
            means = distributed.all_reduce_mean([*shown.values()], stream.share)
            figures = _figures(dict(zip(shown, means, strict=True)), live, epoch) | live.rank() | live.validated()
            ends = live.epoch == settings.epochs
            if (epoch + 1) % settings.checkpoint_every == 0 or ends or epoch + 1 == last:
                saved.write(live, figures, is_last and ends)
            emit(Progress(stage, live.index, figures, point=True))
            if ends:
                break
        if settings.epochs == 0 and not begun:
            saved.write(live, {}, is_last)
        if last < settings.epochs:
            break
        index = live.index
    emit(StageDone(stage, time.perf_counter() - start, figures))
    return model if average is None else average


class LivePhase:
    """One phase of a training, live: for each batch a loop, `run_training` or anybody's own, calls `step(batch)`.

    It owns optimizer, schedule, moving average and the sampler of archs. The model is put on the device; several
    processes average its gradients, so nothing has to wrap it.

    mutator, cost: what draws the archs of a step; None where the algorithm draws none
    steps_per_epoch: batches an epoch, by which the schedule counts
    number: which of the trainer's phases this is; index: steps that those before it took
    device: where it trains; left out, where the model is
    average: the moving average of the phase before, which goes on
    resumed: whether a state is loaded next, so that what begins the phase does not run again
    backward: adds a loss's gradients: `accelerator.backward`, Lightning's `manual_backward`
    step_optimizer: steps the optimizer, once gradients are averaged and clipped
    precision: gives the context of a forward: `accelerator.autocast`; left out, it is as the settings say
    score: model, archs -> what they are ranked by where the settings say `stop` or `validate`
    """

    def __init__(
        self,
        trainer: Trainer,
        model: nn.Module,
        task: LiveTask,
        phase: Phase,
        steps_per_epoch: int,
        *,
        mutator: Mutator | None = None,
        cost: Cost | None = None,
        seed: int = 0,
        number: int = 0,
        index: int = 0,
        device: torch.device | None = None,
        average: nn.Module | None = None,
        resumed: bool = False,
        backward: Callable[[Tensor], object] | None = None,
        step_optimizer: Callable[[], object] | None = None,
        precision: Callable[[], AbstractContextManager[Any]] | None = None,
        score: Score | None = None,
    ) -> None:
        self.trainer, self.model, self.task, self.phase = trainer, model, task, phase
        self.seed, self.number, self.index, self.done = seed, number, index, 0
        self.steps_per_epoch = steps_per_epoch
        self.device = device or next((p.device for p in model.parameters()), torch.device("cpu"))
        channels_last(model.to(self.device))
        settings = phase.train
        if phase.begin is not None and not resumed:
            author = "the algorithm, as a phase began,"
            with seeding.seeded(seed, "begin", number, device=self.device), blaming_plugin(author):
                phase.begin()
            average = None  # the weights may have changed places
        self.average = None
        if settings.ema is not None:
            self.average = copy.deepcopy(model) if average is None else average
        self.streams = _Streams(task, settings.batch_size, seed, self.device, settings.workers)
        self.learnt = _learnt_beside(trainer, self.device)
        # The supernet, and what a distiller learns itself.
        self.trained = model if self.learnt is None else nn.ModuleList([model, self.learnt])
        self.optimizer = build_optimizer(self.trained, settings.optimizer, settings.no_decay)
        self.schedule = build_schedule(self.optimizer, settings.schedule, settings.epochs, steps_per_epoch)
        scaled = settings.precision == "float16" and backward is None and step_optimizer is None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)
        self._backward = backward or (lambda loss: self.scaler.scale(loss).backward())
        self._step_optimizer = step_optimizer or (lambda: self.scaler.step(self.optimizer))
        self._precision = precision or partial(_autocast, self.device.type, settings.precision)
        self._rng = seeding.generator(seed, f"sampler:{number}")
        self.sampler = None if mutator is None else start_sampler(mutator, phase, cost, self._rng)
        _refuse_half_states({"algorithm": trainer, "mutator": self.sampler})
        self._told_epoch: int | None = None
        self._score = score
        self._ranking = None
        if settings.stop is not None and score is not None:
            codes = phase.space.draw(seeding.generator(seed, f"stop:{number}"), settings.stop.archs)
            self._ranking = Ranking(phase.space.decode(codes), score)

    @property
    def epoch(self) -> int:
        """Return how many epochs are done."""
        return self.done // self.steps_per_epoch

    def step(self, batch: Any) -> dict[str, Tensor]:
        """Train on a batch: draw archs, add up their gradients, step the optimizer, follow with average and schedule.

        batch: as a loader of the task's data collates it, cut here into as many parts as the settings say; with several
            processes those of one size that each has of its own
        Returns what the algorithm shows, "loss" among it, still on the device. Raises UserError for a mistake in the
        settings that shows only now, or a batch that cannot be cut.
        """
        return self.step_parts(loading.cut_batch(batch, self.phase.train.accumulate), 1 / distributed.world())

    def step_parts(self, parts: Sequence[tuple[Any, float]], share: float = 1.0) -> dict[str, Tensor]:
        """Train on a batch that is cut already (`corenas.loading.Stream`), as `step` does.

        parts: each with its share of the batch, over all processes
        share: what those of this process are together
        """
        self._tell_progress()
        sync = self.phase.train.sync_norm and distributed.world() > 1
        norms = distributed.synchronised_norms() if sync else nullcontext()
        # Other processes drop out other units.
        with norms, seeding.seeded(self.seed + distributed.rank(), "step", self.index, device=self.device):
            self.model.train()
            self.optimizer.zero_grad()
            parts, figures = loading.to_device(parts, self.device), {}
            archs = self._draw(*parts[0])
            for number, (batch, part_share) in enumerate(parts):
                for name, figure in self._train_part(batch, archs, number, part_share).items():
                    figure = torch.as_tensor(figure, device=self.device)
                    figures[name] = figures.get(name, 0.0) + part_share / share * figure
            self._update()
        if self.average is not None:
            _follow(self.average, self.model, _decay(self.phase.train.ema or 0.0, self._steps_averaged))
        self.schedule.step()
        self.index += 1
        self.done += 1
        if self.done % self.steps_per_epoch == 0 and distributed.world() > 1:
            _agree(self.model, self.average)
        return figures

    def rank(self) -> dict[str, float]:
        """Rank the sample of `train.stop`, and end the phase if the ranking is that of the last time.

        Returns the figure `tau`, nothing where there is no such sample or no last time.
        """
        ranking, stop = self._ranking, self.phase.train.stop
        if ranking is None or stop is None:
            return {}
        tau = ranking.follow(self.model if self.average is None else self.average)
        if tau is None:
            return {}
        if tau >= stop.tau:
            self.done = self.phase.train.epochs * self.steps_per_epoch
        return {"tau": tau}

    def validated(self) -> dict[str, float]:
        """Look at the smallest and the largest subnet, where the settings want it after this epoch.

        Returns the figures `valid_smallest` and `valid_largest`, else nothing.
        """
        every, space = self.phase.train.validate, self.phase.space
        if every is None or self._score is None or self.epoch % every:
            return {}
        found = self._score(self.model if self.average is None else self.average, [space.smallest(), space.largest()])
        return dict(zip(("valid_smallest", "valid_largest"), found, strict=True))

    @property
    def _steps_averaged(self) -> int:
        """How many steps the moving average has seen: those of this phase, if it began with it."""
        goes_on = self.number > 0 and self.phase.begin is None
        before = self.trainer.phases[self.number - 1].train.ema if goes_on else None
        return self.done if before is None else self.index

    def _tell_progress(self) -> None:
        """Tell modules that want to know it, as an epoch begins, which share of the phase is done."""
        if self._told_epoch == self.epoch:
            return
        self._told_epoch = self.epoch
        tell_progress(self.model, min(1.0, self.epoch / max(1, self.phase.train.epochs)))

    def _draw(self, batch: Any, share: float) -> Sequence[Arch]:
        if self.sampler is None:
            return []
        return draw_archs(self.sampler, self.phase, lambda archs: self._losses(batch, share, archs))

    @torch.no_grad()
    def _losses(self, batch: Any, share: float, archs: Sequence[Arch]) -> list[float]:
        """Return the losses of archs on a batch, as a sampler asks for them. They leave no trace in the statistics."""
        losses = []
        with statistics_kept(self.model), unregularised(self.model), self._precision():
            for arch in archs:
                with apply(self.model, arch):
                    losses.append(self.task.loss(self.task.forward(self.model, batch), batch).float())
        (mean,) = distributed.all_reduce_mean([torch.stack(losses)], share)
        return mean.tolist()

    def _train_part(self, batch: Any, archs: Sequence[Arch], number: int, share: float) -> Mapping[str, Any]:
        """Lend the algorithm a step for one part of a batch. Returns its figures."""
        rng = seeding.generator(self.seed, f"step:{self.index}:{number}")
        lent = LoopStep(
            archs,
            self.optimizer,
            self.index,
            number,
            rng=rng,
            share=share,
            backpropagate=self._backward,
            more=self.streams.more,
        )
        with self._precision(), _explained(), staying_here():
            figures = self.trainer.train_step(batch, lent)
        if not isinstance(figures, Mapping):
            text = f"the algorithm's train_step gave {figures!r}: expected a mapping of figures"
            raise UserError(text, key=("algorithm",))
        return figures

    def _update(self) -> None:
        """Step the optimizer by the gradients of all processes."""
        # Archs are the same in all processes, so gradients are there for the same parameters.
        distributed.all_reduce_(p.grad for p in self.trained.parameters() if p.grad is not None)
        self.scaler.unscale_(self.optimizer)
        settings = self.phase.train
        if settings.clip_value is not None:
            nn.utils.clip_grad_value_(self.trained.parameters(), settings.clip_value)
        if settings.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.trained.parameters(), settings.clip_norm)
        self._step_optimizer()
        self.scaler.update()

    @property
    def _parts(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "scaler": self.scaler,
            "average": self.average,
            "streams": self.streams,
            "trainer": self.trainer,
            "sampler": self.sampler,
            "rng": _GeneratorState(self._rng),
            "distiller": self.learnt,
            "ranking": self._ranking,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return all that the phase goes on from, the model's weights too: tensors and plain data."""
        epoch, step = divmod(self.done, self.steps_per_epoch)
        return {**states_of(self._parts), "place": (self.number, epoch, step, self.index)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state. Raises ValueError, naming the part, for one of another phase, model or settings."""
        number, epoch, step, self.index = state["place"]
        if number != self.number:
            raise ValueError(f"it is of phase {number + 1}, not {self.number + 1}")
        self.done, self._told_epoch = epoch * self.steps_per_epoch + step, None
        load_states(self._parts, state)


@define(eq=False)
class LoopStep:
    """One step as a live phase lends it to `train_step` (`contracts.Step`).

    share: of the whole batch that this part of it is
    backpropagate: adds the gradients of a loss
    more: gives the next batch of another stream, "valid" for instance
    """

    archs: Sequence[Arch]
    optimizer: torch.optim.Optimizer
    index: int
    part: int = 0
    rng: np.random.Generator = field(kw_only=True)
    share: float = 1.0
    backpropagate: Callable[[Tensor], object] = Tensor.backward
    more: Any = None
    lr: float = field(init=False, default=Factory(lambda self: self.optimizer.param_groups[0]["lr"], takes_self=True))

    def backward(self, loss: Tensor) -> Tensor:
        """Add a loss's gradients to those of the step and free its graph. Returns the loss, detached."""
        self.backpropagate(loss * self.share)
        return loss.detach()

    def mean(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the tensors averaged over processes, each weighted by its share of the images."""
        return distributed.all_reduce_mean(tensors, self.share)


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
        """Return the next batch of a split."""
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
        self.live.clear()


@frozen
class _GeneratorState:
    """The state of a generator of numpy as that of any part of a training."""

    rng: np.random.Generator

    def state_dict(self) -> Mapping[str, Any]:
        return self.rng.bit_generator.state

    def load_state_dict(self, state: Any) -> None:
        self.rng.bit_generator.state = state


_EXPLAINED = (
    (
        "more than 1 value per channel",
        "a batch norm sees one value of each channel and cannot tell their variance",
        "more images in each part of a batch, larger images, or fewer strides",
    ),
    (
        "could not create a primitive",
        "torch cannot compute a layer of this network here",
        "is a width, a kernel or a stride far from the others?",
    ),
    ("out of memory", "this training does not fit into memory", "a larger train.accumulate"),
    ("can't allocate memory", "this training does not fit into memory", "a larger train.accumulate"),
)
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


def _refuse_missing_phases(trainer: Trainer, first: int, saved: Checkpoint) -> None:
    """Raise UserError if there is nothing to train, or not the phase that a checkpoint stands in."""
    if not trainer.phases:
        raise UserError("this algorithm has no phases to train in", key=("algorithm",))
    if first >= len(trainer.phases):
        raise saved.unusable(f"belongs to another model: it has a phase {first + 1}")


def _total_steps(trainer: Trainer, task: LiveTask, split: str) -> int:
    """Count the steps of all phases."""
    samples = sum(task.splits[name] for name in split.split("+"))
    return sum(p.train.epochs * max(1, samples // p.train.batch_size) for p in trainer.phases)


def _figures(shown: Mapping[str, Tensor], live: LivePhase, epoch: int) -> dict[str, float]:
    """Return what a step showed as numbers, which waits for the device, beside epoch and learning rate."""
    figures = {name: float(value) for name, value in shown.items()}
    _refuse_divergence(figures, live.index, epoch)
    return {"epoch": epoch + 1, **figures, "lr": live.optimizer.param_groups[0]["lr"]}


def _refuse_divergence(figures: Mapping[str, float], index: int, epoch: int) -> None:
    """Raise UserError for a loss that is no finite number."""
    if not math.isfinite(figures.get("loss", 0.0)):
        hint = "lower train.optimizer.lr, or set train.clip_norm, or a warm-up: train.schedule.warmup"
        raise UserError(f"the training diverged: loss {figures['loss']} at step {index} (epoch {epoch})", hint=hint)


def _learnt_beside(trainer: Trainer, device: torch.device) -> nn.Module | None:
    """Return the trainer's distiller, if that learns something itself: projections of features."""
    distiller = getattr(trainer, "distiller", None)
    return distiller.to(device) if isinstance(distiller, nn.Module) else None


def _refuse_half_states(parts: Mapping[str, Any]) -> None:
    """Raise UserError for a part that gives a state and takes none, or the other way round."""
    for name, part in parts.items():
        if hasattr(part, "state_dict") != hasattr(part, "load_state_dict"):
            text = "what it trains with has one of `state_dict` and `load_state_dict`: expected both or none"
            raise UserError(text, key=(name,))


def _refuse_what_are_no_archs(archs: Any, space: SearchSpace) -> None:
    """Raise TypeError or ValueError for what a sampler should not have drawn."""
    if not isinstance(archs, Sequence) or not archs or not all(isinstance(arch, Arch) for arch in archs):
        raise TypeError(f"it drew {archs!r}, no list of archs")
    codes = space.encode(archs)
    if not np.array_equal(codes, space.canonical(codes)):
        raise ValueError("it drew an arch with choices for what is inactive: `space.arch` makes it canonical")


def start_sampler(mutator: Mutator, phase: Phase, cost: Cost | None, rng: np.random.Generator) -> Sampler:
    """Return the sampler of a phase. Raises UserError if it cannot draw what the phase wants."""
    if cost is None:
        raise TypeError("a mutator draws with the supernet's cost: give `cost` as well")
    return mutator.start(MutatorContext(phase.space, cost.on(phase.space), rng, phase.paths))


def draw_archs(sampler: Sampler, phase: Phase, score: Callable[[Sequence[Arch]], Sequence[float]]) -> Sequence[Arch]:
    """Return the archs of a step. Raises UserError, naming the mutator, for what is none, and for another number."""
    with blaming_plugin(f"mutator {type(sampler).__module__}.{type(sampler).__name__}"):
        archs = sampler.sample(score)
        _refuse_what_are_no_archs(archs, phase.space)
    if phase.paths not in (None, len(archs)):
        text = f"it draws {len(archs)} archs a step where the algorithm wants {phase.paths}"
        raise UserError(text, key=("mutator",), hint='mutator = "uniform" draws as many as it is asked for')
    return archs


def _autocast(device: str, precision: str) -> torch.autocast:
    # No cache: weights cast under no_grad would be found again, without their gradient, by the next forward.
    return torch.autocast(device, getattr(torch, precision), enabled=precision != "float32", cache_enabled=False)


def _decay(ema: float, steps: int) -> float:
    """Return how much of an average's old weights stays after so many steps: its first weights are not yet trained."""
    return min(ema, 1 - (1 + steps) ** (-2 / 3))  # timm's ModelEmaV3 with use_warmup


@torch.no_grad()
def _follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the exponential moving average of weights on; its buffers are the model's."""
    swa_utils.get_ema_multi_avg_fn(decay)([*average.parameters()], [*model.parameters()], 0)
    for old, new in zip(average.buffers(), model.buffers(), strict=True):
        old.copy_(new)


@torch.no_grad()
def _agree(model: nn.Module, average: nn.Module | None) -> None:
    """Make batch-norm statistics the mean over processes: each has seen its own images."""
    buffers = [b for part in (model, average) if part is not None for b in part.buffers() if b.is_floating_point()]
    for buffer, mean in zip(buffers, distributed.all_reduce_mean(buffers, 1.0), strict=True):
        buffer.copy_(mean)
