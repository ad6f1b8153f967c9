"""How long a run will take and how much memory: a few real steps and trials, before anything is begun."""

from __future__ import annotations

import signal
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from attrs import evolve, frozen
from torch import Tensor

from corenas import seeding
from corenas.contracts import Step, Trainer
from corenas.errors import UserError
from corenas.objectives import Trial
from corenas.run.prepare import Prepared, load_supernet, memory_of_machine, prepare, start_trainer, start_trial_runner
from corenas.run.stages import retrain
from corenas.settings import Train
from corenas.space import Arch
from corenas.supernet import build_supernet
from corenas.train import run_training

_ENOUGH = 1.0
"""Seconds of trying, two sizes of batches at least, after which no larger batch is tried."""
_FIRST = 2
"""Images of the first batch that is tried."""


@frozen
class Estimate:
    """What a run will need, as far as it could be tried.

    seconds: of each stage
    memory: bytes at the peak of training, on the device; None if whole batches could not be tried
    tried: what this rests on
    """

    seconds: Mapping[str, float]
    memory: int | None
    tried: str


class _TooLong(BaseException):
    pass


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    """End after so many seconds, where the system has alarms."""

    def stop(*_: object) -> None:
        raise _TooLong

    if not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        with suppress(_TooLong):
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class _Watched:
    """A trainer that notes what each step of its first phase takes, from the end of the one before."""

    def __init__(self, trainer: Trainer, device: torch.device) -> None:
        self.trainer = trainer
        self.phases = [evolve(phase, begin=None) for phase in trainer.phases[:1]]
        self.seconds: dict[int, float] = {}
        self._clock = _Clock(device)

    def train_step(self, batch: Any, step: Step) -> Mapping[str, Tensor]:
        figures = self.trainer.train_step(batch, step)
        float(next(iter(figures.values())))  # waits for the device
        self.seconds[step.index] = self.seconds.get(step.index, 0.0) + self._clock.lap()
        return figures


class _Clock:
    """Tells how long something takes where no other program keeps the processor busy."""

    def __init__(self, device: torch.device) -> None:
        self._on_cpu, self._last = device.type == "cpu", (time.perf_counter(), time.process_time())

    def lap(self) -> float:
        """Return the seconds since the last time: of the processor, unless threads share them, or a GPU has them."""
        before, self._last = self._last, (time.perf_counter(), time.process_time())
        wall, processor = (now - then for now, then in zip(self._last, before, strict=True))
        return min(wall, processor) if self._on_cpu else wall


def estimate(prepared: Prepared, limit: float = 10.0) -> Estimate:
    """Try a spec's training, its search, then its retraining, each for at most so many seconds.

    prepared: may be without weights
    Raises UserError for what shows only when a step is made: an algorithm that another mutator suits, for instance.
    """
    spec, task = prepared.spec, prepared.task
    weights = sum(p.numel() for p in prepared.supernet.parameters())
    if prepared.has_supernet and weights * 16 > memory_of_machine() / 2:
        return Estimate({}, None, "nothing: weights, gradients and momentum of the supernet fill the memory")
    seconds: dict[str, float] = {}
    tried: list[str] = []
    again, splits = spec.retrain.train or spec.train, prepared.retrain_task.splits
    of_supernet = _Steps(spec.train, task.splits.get("train", 0))
    alone = _Steps(again, sum(splits.get(name, 0) for name in spec.retrain.data.split("+")))
    supernet, number = None, 0.0
    with _within(limit):
        if spec.supernet is not None:
            prepared = prepare(spec, device=prepared.device)
            supernet = load_supernet(prepared, Path(spec.supernet.from_))
        if "train" in prepared.stages:
            with seeding.seeded(spec.seed, "init"):
                supernet = build_supernet(spec.backbone, spec.space, task)
            prepared = evolve(prepared, supernet=supernet)
            for settings in of_supernet.growing(prepared.device):
                whole = settings.batch_size == of_supernet.full
                with nullcontext() if whole else suppress(UserError):  # a step of the spec's own size may be none
                    trainer = start_trainer(evolve(prepared, spec=evolve(spec, train=settings)))
                    number = sum(phase.train.epochs for phase in trainer.phases) * of_supernet.an_epoch
                    _try_steps(trainer, prepared, settings.batch_size, of_supernet)
    if of_supernet.seconds:
        seconds["train"] = of_supernet.of_whole_batches() * number
        tried.append(of_supernet.told)
    with _within(limit):
        there = supernet is not None or not prepared.has_supernet
        if "search" in prepared.stages and there:
            runner = start_trial_runner(prepared, 0, supernet)
            region, rng = prepared.targets[0].region, seeding.generator(spec.seed, "estimate")
            clock = _Clock(prepared.device)
            runner.measure(region.sample(rng))  # decodes the data as well
            first = clock.lap()
            # Other archs, as many at once as a search asks for: an arch that was measured shares all with itself.
            together = max(1, min(spec.search.batch, int(limit / 2 / max(first, 1e-3))))
            runner([Trial(region.sample(rng)) for _ in range(together)])
            seconds["search"] = first + clock.lap() / together * spec.search.trials * len(prepared.targets)
            tried.append(f"{1 + together} trials")
    with _within(limit):
        if "retrain" in prepared.stages:
            arch = prepared.targets[0].region.sample(seeding.generator(spec.seed, "estimate"))
            for settings in alone.growing(prepared.device):
                own = evolve(prepared, spec=evolve(spec, retrain=evolve(spec.retrain, train=settings)))
                _try_alone(own, arch, settings.batch_size, alone)
    if alone.seconds:
        number = again.epochs * alone.an_epoch * spec.retrain.seeds * len(prepared.targets)
        seconds["retrain"] = alone.of_whole_batches() * number
        tried.append(f"{alone.told} alone")
    memory = next((steps.memory() for steps in (of_supernet, alone) if steps.peaks), None)
    return Estimate(seconds, memory, " and ".join(tried) or "nothing")


class _Steps:
    """What steps of a training take, tried with few images first.

    settings: of the training; images: that an epoch has
    full: images of a whole batch
    seconds, peaks: of each size that was tried, the images of a step and its seconds, or the bytes at the peak
    """

    def __init__(self, settings: Train, images: int) -> None:
        self._settings, self.full = settings, max(1, min(settings.batch_size, images))
        self.an_epoch = images / self.full
        self.seconds: list[tuple[int, float]] = []
        self.peaks: list[tuple[int, int]] = []

    def growing(self, device: torch.device) -> Iterator[Train]:
        """Yield the settings with more images a step, until steps are whole or enough is known."""
        clock, spent, size = _Clock(device), 0.0, min(self.full, _FIRST * self._settings.accumulate)
        while True:
            yield evolve(self._settings, batch_size=size, workers=0)
            spent += clock.lap()
            self.peaks.append((size, _peak(device)))
            if size == self.full or (len(self.seconds) > 1 and spent >= _ENOUGH):
                return
            size = min(self.full, 4 * size)

    @property
    def told(self) -> str:
        """How many images the steps have had that are judged by."""
        told = [images for images, _ in self.seconds[-1 if self.seconds[-1][0] == self.full else -2 :]]
        return f"steps of {' and '.join(map(str, told))} images"

    def of_whole_batches(self) -> float:
        """Seconds of a step of a whole batch."""
        return _of_whole_batches(self.seconds, self.full)

    def memory(self) -> int | None:
        """Bytes at the peak of steps of whole batches, as what more images took in the last two tries tells."""
        (size, peak), (before, less) = self.peaks[-1], self.peaks[-2] if len(self.peaks) > 1 else self.peaks[-1]
        return peak + max(0, self.full - size) * (peak - less) // max(1, size - before) if peak else None


def _of_whole_batches(steps: Sequence[tuple[int, float]], full: int) -> float:
    """Seconds of a step of a whole batch, as the last two sizes tell: a part hangs on its images, a part does not."""
    size, seconds = steps[-1]
    before, less = steps[-2] if len(steps) > 1 else (0, 0.0)
    per_image = max(0.0, seconds - less) / (size - before)
    return seconds + min(per_image, seconds / size) * (full - size)


def _try_steps(trainer: Trainer, prepared: Prepared, size: int, steps: _Steps) -> None:
    """Note what a step of a supernet's training takes, as a few tell, or those of them that there was time for."""
    watched, mutator, cost = _Watched(trainer, prepared.device), prepared.spec.mutator, prepared.cost
    try:
        run_training(watched, prepared.supernet, prepared.task, mutator, cost, device=prepared.device, limit=3)
    finally:
        own = [*watched.seconds.values()]
        if own or not any(phase.train.epochs for phase in trainer.phases):  # no epochs, no steps
            steps.seconds.append((size, statistics.fmean(own[1:] or own or [0.0])))  # the first also allocates


def _try_alone(prepared: Prepared, arch: Arch, size: int, steps: _Steps) -> None:
    """Note what a step of the training of one arch takes: what two more of them add."""
    clock, laps = _Clock(prepared.device), []
    for limit in (1, 3):
        retrain(prepared, arch, None, limit=limit)
        laps.append(clock.lap())
    steps.seconds.append((size, max(0.0, laps[1] - laps[0]) / 2))


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(ImportError):  # Windows
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return 0
