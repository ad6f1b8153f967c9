"""What several processes under torchrun share; in one process alone every function here does nothing.

Nothing wraps the model: gradients are summed after a step, archs of a search are dealt out, files are written by the
first process alone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

T = TypeVar("T")
_alone = ContextVar("alone", default=False)


def rank() -> int:
    """Return the number of this process, from 0."""
    return distributed.get_rank() if world() > 1 else 0


def world() -> int:
    """Return how many processes there are."""
    there = distributed.is_available() and distributed.is_initialized() and not _alone.get()
    return distributed.get_world_size() if there else 1


@contextmanager
def single_process() -> Iterator[None]:
    """Run what is inside in this process alone: a training of one arch, while others train other ones."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


@contextmanager
def process_group(device: torch.device) -> Iterator[torch.device]:
    """Join the processes that torchrun started, if it did, for a while. Gives the device of this one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or distributed.is_initialized():
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        distributed.destroy_process_group()
        # Its threads still let go of Python objects; one that does so while Python ends aborts the process (2 of 15).
        time.sleep(0.2)


def on_rank_zero(make: Callable[[], T]) -> T:
    """Call a function in the first process alone. Returns what it gives, pickled, to all; what it raises, all raise."""
    if world() == 1:
        return make()
    found: Any = (None, None)
    if rank() == 0:
        try:
            with single_process():
                found = (make(), None)
        except Exception as error:
            found = (None, error)
    made, error = all_gather(found)[0]
    if error is not None:
        raise error
    return made


def all_gather(own: T) -> list[T]:
    """Return what every process gives, in their order; objects travel pickled."""
    found: list[Any] = [own] * world()
    if len(found) > 1:
        distributed.all_gather_object(found, own)
    return found


@torch.no_grad()
def all_reduce_(tensors: Iterable[Tensor]) -> None:
    """Sum tensors over processes, in place, those of one type flattened to one: gradients are many and small."""
    if world() == 1:
        return
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_type.setdefault(tensor.dtype, []).append(tensor)
    for same in by_type.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in same])
        distributed.all_reduce(flat)
        for tensor, part in zip(same, flat.split([t.numel() for t in same]), strict=True):
            tensor.copy_(part.view_as(tensor))


def all_reduce_mean(tensors: Sequence[Tensor], weight: float) -> Sequence[Tensor]:
    """Return the mean of tensors over processes, those of each counted by its weight."""
    if world() == 1 or not tensors:
        return tensors
    sums = [tensor * weight for tensor in tensors]
    weights = torch.tensor(weight, device=sums[0].device)
    all_reduce_([*sums, weights])
    return [tensor / weights for tensor in sums]
