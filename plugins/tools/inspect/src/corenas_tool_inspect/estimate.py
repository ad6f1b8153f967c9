"""How long a run will take and how much memory: a few real steps and a real trial, before anything is begun."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from attrs import evolve, frozen
from torch import Tensor

from corenas import seeding
from corenas.contracts import Step, Trainer
from corenas.prepare import Prepared, start_stand, start_trainer
from corenas.supernet import build_supernet
from corenas.train import train

_ENOUGH = 1.0
"""Seconds of trying after which no larger batch is tried."""
_FIRST = 8
"""Images of the first batch that is tried."""


@frozen
class Estimate:
    """What a run will need, as far as it could be tried.

    seconds: of each stage
    memory: bytes at the peak of training, on the device; None if not known
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
        yield
    except _TooLong:
        pass
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
    if sum(p.numel() for p in prepared.supernet.parameters()) * 16 > _free_memory():
        return Estimate({}, None, "nothing: weights, gradients and momentum of the supernet fill the memory")
    seconds: dict[str, float] = {}
    tries: list[tuple[int, float, int]] = []
    trial = False
    with _within(limit):
        if "train" in prepared.stages:
            with seeding.seeded(spec.seed, "init"):
                prepared = evolve(prepared, supernet=build_supernet(spec.backbone, spec.space, task))
            start, full = time.perf_counter(), min(spec.train.batch_size, task.splits["train"])
            size = min(full, _FIRST * spec.train.accumulate)
            while not tries or (tries[-1][0] < full and time.perf_counter() - start < _ENOUGH):
                per_step, images = _step(prepared, size)
                tries.append((size, per_step, _peak(prepared.device)))
                seconds["train"] = per_step / size * images
                size = min(full, 4 * size)
        if "search" in prepared.stages and spec.evaluators and (tries or spec.supernet is None):
            measure = start_stand(prepared, 0, prepared.supernet if tries else None)
            arch = prepared.wanted[0].drawing.sample(seeding.generator(spec.seed, "estimate"))
            first, then = measure(arch).seconds, measure(arch).seconds  # the first decodes the data as well
            seconds["search"] = first + then * spec.search.trials * len(prepared.wanted)
            trial = True
    parts = [f"steps of {tries[-1][0]} images"] if tries else []
    return Estimate(
        seconds, _memory(tries, spec.train.batch_size), " and ".join(parts + ["a trial"] * trial) or "nothing"
    )


def _step(prepared: Prepared, size: int) -> tuple[float, int]:
    """Seconds of a training step of some images, and how many images all phases see."""
    settings = evolve(prepared.spec.train, batch_size=size, workers=0)
    prepared = evolve(prepared, spec=evolve(prepared.spec, train=settings))
    trainer = start_trainer(prepared)
    watched = _Watched(trainer)
    train(
        watched, prepared.supernet, prepared.task, prepared.spec.mutator, prepared.cost, device=prepared.device, limit=3
    )
    ends = [*watched.ends.values()]
    epochs = sum(phase.train.epochs for phase in trainer.phases)
    return (ends[-1] - ends[0]) / max(1, len(ends) - 1), epochs * prepared.task.splits["train"]


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _memory(tries: list[tuple[int, float, int]], full: int) -> int | None:
    """Bytes at the peak of whole batches: what one more image took, as far as two tries tell, for all of them."""
    if not tries or not tries[-1][2]:
        return None
    (size, _, peak), (before, _, less) = tries[-1], tries[-2] if len(tries) > 1 else tries[-1]
    return peak + max(0, full - size) * (peak - less) // max(1, size - before)


def _free_memory() -> float:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 0.5
    except (ValueError, AttributeError):
        return float("inf")
