"""How long a run will take and how much memory: a few real steps and a real trial, before anything is begun."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from attrs import evolve, frozen
from torch import Tensor

from corenas import seeding
from corenas.contracts import Step, Trainer
from corenas.run.prepare import Prepared, load_supernet, prepare, start_trainer, start_trial_runner
from corenas.supernet import build_supernet
from corenas.train import run_training

_ENOUGH = 1.0
"""Seconds of trying after which no larger batch is tried."""
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
    """A trainer that notes when each step of its first phase ended."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.phases = [evolve(phase, begin=None) for phase in trainer.phases[:1]]
        self.ends: dict[int, float] = {}

    def train_step(self, batch: Any, step: Step) -> Mapping[str, Tensor]:
        figures = self.trainer.train_step(batch, step)
        float(next(iter(figures.values())))  # waits for the device
        self.ends[step.index] = time.perf_counter()
        return figures


def estimate(prepared: Prepared, limit: float = 10.0) -> Estimate:
    """Try a spec for at most so many seconds. `prepared` may be without weights.

    Raises UserError for what shows only when a step is made: an algorithm that another mutator suits, for instance.
    """
    spec, task = prepared.spec, prepared.task
    weights = sum(p.numel() for p in prepared.supernet.parameters())
    if prepared.has_supernet and weights * 16 > _free_memory():
        return Estimate({}, None, "nothing: weights, gradients and momentum of the supernet fill the memory")
    seconds: dict[str, float] = {}
    tried: list[str] = []
    peaks: list[tuple[int, int]] = []  # images of a step, bytes
    supernet = None
    with _within(limit):
        if spec.supernet is not None:
            prepared = prepare(spec, device=prepared.device)
            supernet = load_supernet(prepared, Path(spec.supernet.from_))
        if "train" in prepared.stages:
            with seeding.seeded(spec.seed, "init"):
                supernet = build_supernet(spec.backbone, spec.space, task)
            prepared = evolve(prepared, supernet=supernet)
            start, full = time.perf_counter(), min(spec.train.batch_size, task.splits["train"])
            size = 0
            while size == 0 or (size < full and time.perf_counter() - start < _ENOUGH):
                size = min(full, 4 * size or _FIRST * spec.train.accumulate)
                seconds["train"] = _training(prepared, size)
                peaks.append((size, _peak(prepared.device)))
                tried = [f"steps of {size} images"]
        if "search" in prepared.stages and spec.evaluators:
            runner = start_trial_runner(prepared, 0, supernet)
            arch = prepared.targets[0].region.sample(seeding.generator(spec.seed, "estimate"))
            first, second = runner.measure(arch), runner.measure(arch)  # the first decodes the data as well
            seconds["search"] = first.seconds + second.seconds * spec.search.trials * len(prepared.targets)
            tried.append("a trial")
    return Estimate(seconds, _memory(peaks, spec.train.batch_size), " and ".join(tried) or "nothing")


def _training(prepared: Prepared, size: int) -> float:
    """Seconds of all phases, as steps of some images tell."""
    settings = evolve(prepared.spec.train, batch_size=size, workers=0)
    prepared = evolve(prepared, spec=evolve(prepared.spec, train=settings))
    trainer, task = start_trainer(prepared), prepared.task
    watched = _Watched(trainer)
    run_training(
        watched, prepared.supernet, task, prepared.spec.mutator, prepared.cost, device=prepared.device, limit=3
    )
    ends = [*watched.ends.values()] or [0.0]  # no epochs, no steps
    images = sum(phase.train.epochs for phase in trainer.phases) * task.splits["train"]
    return (ends[-1] - ends[0]) / max(1, len(ends) - 1) / size * images


def _memory(peaks: Sequence[tuple[int, int]], full: int) -> int | None:
    """Bytes at the peak of steps of whole batches, as what more images took in the last two tries tells."""
    if not peaks or not peaks[-1][1]:
        return None
    (size, peak), (before, less) = peaks[-1], peaks[-2] if len(peaks) > 1 else peaks[-1]
    return peak + max(0, full - size) * (peak - less) // max(1, size - before)


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(ImportError):  # Windows
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return 0


def _free_memory() -> float:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 0.5
    except (ValueError, AttributeError):
        return float("inf")
