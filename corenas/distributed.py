"""What several processes under torchrun share; in one process alone every function here does nothing.

Nothing wraps the model: gradients are summed after a step, archs of a search are dealt out, files are written by the
first process alone.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, distributed
from torch.distributed.rendezvous import rendezvous
from torch.overrides import TorchFunctionMode

from corenas.errors import UserError, told

T = TypeVar("T")
_alone = ContextVar("alone", default=False)
_GONE = "another process of this run has ended, and this one cannot go on without it"


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
    """Join the processes that torchrun started, if it did, for a while. Gives the device of this one.

    What ends the block gets an attribute `speaks`: whether this process is to tell of it, since the first does not.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or distributed.is_initialized():
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    with _with_the_others():
        store, own, size = next(iter(rendezvous("env://", timeout=timedelta(minutes=5))))
        # The others wait while the first one tests on large data; one that has died is noticed at once all the same.
        backend = "nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, timeout=timedelta(days=1), store=store, rank=own, world_size=size)
    try:
        yield device
    except BaseException as error:
        error.speaks = not _first_tells(store, error)  # type: ignore[attr-defined]
        raise
    finally:
        distributed.destroy_process_group()
        # Its threads still let go of Python objects; one that does so while Python ends aborts the process (2 of 15).
        time.sleep(0.2)


def _first_tells(store: Any, error: BaseException) -> bool:
    """Return whether the first process tells of what ends this one: it ends by the same, or this one only follows."""
    with suppress(RuntimeError), _silent_torch():  # the first one has died, and the store with it
        if distributed.get_rank() == 0:
            store.set("ended", told(error))
            return False
        for _ in range(20):
            if store.check(["ended"]):
                follows = isinstance(error, KeyboardInterrupt) or _GONE in str(error)
                return follows or store.get("ended").decode() == told(error)
            time.sleep(0.05)
    return False


@contextmanager
def _silent_torch() -> Iterator[None]:
    """Keep torch, which writes past Python, from telling of a store that is gone with a stack of C++."""
    own = os.dup(2)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(own, 2)
        os.close(own)


@contextmanager
def _with_the_others() -> Iterator[None]:
    """Raise UserError where another process of the run, for which this one would wait, has ended."""
    try:
        yield
    except RuntimeError as error:
        if not re.search(r"peer|connect|timed out|socket|broken pipe", str(error), re.IGNORECASE):
            raise
        hint = "its own message, if it had the time for one, says why; the same command goes on from here"
        raise UserError(_GONE, hint=hint) from error


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
        with _with_the_others():
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
        with _with_the_others():
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


class synchronised_norms(TorchFunctionMode):  # noqa: N801
    """Batch norms in training, whoever's they are, see the images of all processes inside of this context.

    They are caught where all of them pass, at `torch.nn.functional.batch_norm`: torch's own, subclasses with forwards
    of their own, slices. Works with gloo, on CPUs too. All processes run the same norms in the same order.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch, batch norm of several processes in our own way."""
        if func is F.batch_norm and world() > 1:
            return _batch_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        summed = tensor.clone()
        with _with_the_others():
            distributed.all_reduce(summed)
        return summed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return _AllReduce.apply(gradient)  # type: ignore[return-value]


def _batch_norm(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`F.batch_norm`, in training with the statistics of all processes' images, through which gradients flow."""
    if not training:
        return F.batch_norm(x, mean, var, weight, bias, False, momentum, eps)
    given, x = x.dtype, x.double() if x.dtype == torch.float64 else x.float()
    dims, shape = (0, *range(2, x.dim())), (-1, *(1,) * (x.dim() - 2))
    count = x.numel() // x.shape[1]
    sums: Any = _AllReduce.apply(torch.cat([x.sum(dims), x.new_tensor([count])]))
    total, centre = sums[-1].detach(), sums[:-1] / sums[-1].detach()
    centred = x - centre.view(shape)
    # About the common mean: nothing cancels.
    spread: Any = _AllReduce.apply(centred.square().sum(dims)) / total  # type: ignore[operator]
    if mean is not None and var is not None:
        with torch.no_grad():
            mean.lerp_(centre.to(mean), momentum)
            var.lerp_((spread * (total / (total - 1))).to(var), momentum)
    scale = (spread + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    normed = centred * scale.view(shape)
    return (normed if bias is None else normed + bias.view(shape)).to(given)
