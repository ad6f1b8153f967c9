"""What several processes under torchrun share; in one process alone every function here does nothing.

Nothing wraps the model: gradients are summed after a step, archs of a search are dealt out, files are written by the
first process alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

T = TypeVar("T")
_BUCKET = 1 << 22
"""Elements that are summed at once; gradients of a supernet are many and small."""


_apart = ContextVar("apart", default=False)


def rank() -> int:
    """The number of this process, from 0."""
    return distributed.get_rank() if world() > 1 else 0


def world() -> int:
    """How many processes there are."""
    there = distributed.is_available() and distributed.is_initialized() and not _apart.get()
    return distributed.get_world_size() if there else 1


@contextmanager
def apart() -> Iterator[None]:
    """What runs inside runs in this process alone: a training of one arch, while others train other ones."""
    token = _apart.set(True)
    try:
        yield
    finally:
        _apart.reset(token)


@contextmanager
def joined(device: torch.device) -> Iterator[torch.device]:
    """Join the processes that torchrun started, if it did; gives the device of this one. Leaves them in the end."""
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


def first(make: Callable[[], T]) -> T:
    """What the first process makes, apart from the others, given to all; objects travel pickled.

    What it raises is raised in all.
    """
    if world() == 1:
        return make()
    found: list[Any] = [None, None]
    if rank() == 0:
        try:
            with apart():
                found[0] = make()
        except Exception as error:
            found[1] = error
    distributed.broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    return found[0]


def together(own: T) -> list[T]:
    """What every process gives, in their order; objects travel pickled."""
    if world() == 1:
        return [own]
    found: list[Any] = [None] * world()
    distributed.all_gather_object(found, own)
    return found


@torch.no_grad()
def total(tensors: Iterable[Tensor]) -> None:
    """Sum tensors over processes, in place, several at a time in flat buckets."""
    if world() == 1:
        return
    for bucket in _buckets(tensors):
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        distributed.all_reduce(flat)
        for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
            tensor.copy_(part.view_as(tensor))


def _buckets(tensors: Iterable[Tensor]) -> Iterator[Sequence[Tensor]]:
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and (sum(t.numel() for t in bucket) + tensor.numel() > _BUCKET or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        summed = tensor.clone()
        distributed.all_reduce(summed)
        return summed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        gradient = gradient.clone()
        distributed.all_reduce(gradient)
        return gradient


def summed(tensor: Tensor) -> Tensor:
    """The sum of a tensor over processes, differentiable: its gradient is summed as well (synchronised batch norm)."""
    return tensor if world() == 1 else _Sum.apply(tensor)  # type: ignore[return-value]
