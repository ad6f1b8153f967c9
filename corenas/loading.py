"""How data reaches a model: batches in an order and with an augmentation that only seed, epoch and sample decide."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from operator import itemgetter
from typing import Any, TypeAlias

import numpy as np
import torch
from attrs import frozen
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from torch.utils.data import ConcatDataset, DataLoader, Dataset, default_collate

from corenas import distributed, seeding
from corenas.contracts import Collating, InMemory, LiveTask
from corenas.errors import UserError

SampleKeys: TypeAlias = list[tuple[int, int]]
"""Epoch and number of each sample of a batch."""


def to_device(batch: Any, device: torch.device) -> Any:
    """Return a batch on a device; images go channels-last, which is faster on CPUs too."""

    def move(tensor: Tensor) -> Tensor:
        layout = torch.channels_last if tensor.dim() == 4 else torch.preserve_format
        return tensor.to(device, memory_format=layout, non_blocking=True)

    return tree_map_only(Tensor, move, batch)


def cut_batch(batch: Any, parts: int) -> list[tuple[Any, float]]:
    """Cut a batch that this process has into parts along the first axis of its tensors.

    Returns each with its share of the batches of all processes, which are of one size. Raises UserError for a batch
    with fewer samples than parts, or one that is not made of tensors alone.
    """
    if parts == 1:
        return [(batch, 1 / distributed.world())]
    sizes = {len(leaf) if isinstance(leaf, Tensor) and leaf.dim() else None for leaf in tree_leaves(batch)}
    size = sizes.pop() if len(sizes) == 1 else None
    if size is None:
        text = "train.accumulate cannot cut this batch: expected tensors of one length"
        raise UserError(text, key=("train", "accumulate"), hint="cut it yourself and give `step_parts` the parts")
    whole = size * distributed.world()
    return [(tree_map(itemgetter(slice(a, b)), batch), (b - a) / whole) for a, b in _spans(size, parts)]


def _spans(size: int, parts: int) -> list[tuple[int, int]]:
    """Where the parts of a batch begin and end."""
    if size < parts:
        text = f"{size} images cannot be cut into {parts} parts"
        raise UserError(text, key=("train", "batch_size"), hint="train.accumulate times processes are too many")
    return [*itertools.pairwise(np.linspace(0, size, parts + 1).astype(int).tolist())]


@frozen
class _Batched(Dataset[Any]):
    """A data set of batches, indexed by their samples; torch's global generator is seeded for each sample."""

    samples: Any
    seed: int
    name: str

    def __getitem__(self, keys: SampleKeys) -> Any:
        collate = self.samples.collate if isinstance(self.samples, Collating) else default_collate
        try:
            return collate([self._sample(*key) for key in keys])
        except UserError as error:  # raised in a worker it would arrive as a traceback, so it is handed over
            return error

    def _sample(self, epoch: int, i: int) -> Any:
        # torch.manual_seed would seed all devices, which takes as long as reading an image
        torch.default_generator.manual_seed(seeding.number(self.seed, self.name, epoch, i))
        return self.samples[i]

    def shuffled(self, *epoch: int) -> np.ndarray:
        """Return the numbers of all samples at random."""
        return np.random.default_rng([seeding.number(self.seed, self.name, *epoch)]).permutation(len(self.samples))

    def read(self, batches: Sequence[SampleKeys], workers: int) -> Iterator[Any]:
        """Yield some batches. Torch's global generator is as it was after each."""
        generator = torch.Generator().manual_seed(0)
        loader = DataLoader(self, None, sampler=batches, num_workers=workers, collate_fn=_as_it_is, generator=generator)
        ready = iter(loader)
        for _ in batches:
            with torch.random.fork_rng(devices=[]):
                batch = next(ready)
            if isinstance(batch, UserError):
                raise batch
            yield batch


def _as_it_is(batch: Any) -> Any:
    return batch


def _cut(order: np.ndarray, batch_size: int, epoch: int = 0) -> list[SampleKeys]:
    return [[(epoch, int(i)) for i in order[at : at + batch_size]] for at in range(0, len(order), batch_size)]


def _samples(task: LiveTask, split: str, augmented: bool) -> Any:
    parts: list[Any] = [task.dataset(name, augmented) for name in split.split("+")]
    if len(parts) == 1:
        return parts[0]
    joined: Any = ConcatDataset(parts)
    if isinstance(parts[0], Collating):
        joined.collate = parts[0].collate
    return joined


class Stream:
    """The shuffled training batches of a split, or of several ("train+valid"), epoch by epoch.

    Each is cut into parts: of every process so many.

    steps: batches an epoch; the last, smaller one is left out unless it is the only one
    share: of each batch that this process sees
    name: streams of another name have another order
    Raises UserError for batches with fewer samples than they have parts.
    """

    def __init__(
        self,
        task: LiveTask,
        split: str,
        batch_size: int,
        seed: int,
        workers: int = 0,
        augmented: bool = True,
        parts: int = 1,
        name: str = "data",
    ) -> None:
        self._data = _Batched(_samples(task, split, augmented), seed, f"{name}:{split}")
        self.batch_size = min(batch_size, len(self._data.samples))
        self.steps = len(self._data.samples) // self.batch_size
        self.workers = workers
        self._spans = _spans(self.batch_size, parts * distributed.world())[distributed.rank() * parts :][:parts]
        self.share = (self._spans[-1][1] - self._spans[0][0]) / self.batch_size

    def order(self, epoch: int) -> list[SampleKeys]:
        """Return the samples of each batch of an epoch, over all processes."""
        return _cut(self._data.shuffled(epoch)[: self.steps * self.batch_size], self.batch_size, epoch)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[list[tuple[Any, float]]]:
        """Yield the batches of an epoch, from one on: this process's parts, each with its share of the whole batch.

        Torch's global generator is as it was after each.
        """
        parts = [batch[a:b] for batch in self.order(epoch)[start:] for a, b in self._spans]
        read = self._data.read(parts, self.workers)
        for _ in range(start, self.steps):
            yield [(next(read), (b - a) / self.batch_size) for a, b in self._spans]

    def forever(self, start: int = 0) -> Iterator[Any]:
        """Yield batches of one epoch after the other, from one on; for a stream of one part."""
        for epoch in itertools.count(start // self.steps):
            for ((batch, _),) in self.epoch(epoch, start % self.steps):
                yield batch
            start = 0


def _bytes_of(example: Any) -> int:
    leaves = [leaf for leaf in tree_leaves(example) if isinstance(leaf, Tensor)]
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves)


class Batches:
    """Batches of a split on a device, to be gone through again and again: all in order, or of `limit` images at random.

    They are decoded once and kept, unless that takes more than 2 GiB.
    """

    def __init__(
        self,
        task: LiveTask,
        split: str,
        batch_size: int,
        device: torch.device,
        augmented: bool = False,
        seed: int = 0,
        limit: int = 0,
        workers: int = 0,
    ) -> None:
        samples: Any = task.dataset(split, augmented)
        self._data, self.device, self.workers = _Batched(samples, seed, f"batches:{split}"), device, workers
        order = self._data.shuffled()[:limit] if limit else np.arange(len(samples))
        self._keys = _cut(order, batch_size)
        self._kept: Sequence[Any] | None = None
        tensors = samples.tensors() if not augmented and isinstance(samples, InMemory) else None
        if tensors is not None:
            parts = torch.from_numpy(order).split(batch_size)
            self._kept = [to_device(tuple(tensor[part] for tensor in tensors), device) for part in parts]
        elif len(order) * _bytes_of(task.example) < 2 << 30:
            self._kept = [*self._decoded()]

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._kept or self._decoded())

    def _decoded(self) -> Iterator[Any]:
        return (to_device(batch, self.device) for batch in self._data.read(self._keys, self.workers))


def training_inputs(model: nn.Module, task: LiveTask, seed: int, n: int) -> Iterator[Any]:
    """Yield batches of what a model gets of n training samples, as `call_model` takes them.

    The samples are always the same for a seed, at random, not augmented, on the CPU, as is the model; all where there
    are fewer, none where no data was read.
    """
    given: list[Any] = []

    def note(_: nn.Module, arguments: tuple[Any, ...], by_keyword: dict[str, Any]) -> None:
        given.append(by_keyword or (arguments[0] if len(arguments) == 1 else arguments))

    limit = min(n, task.splits.get("train", 0))
    if limit == 0:
        return
    for batch in Batches(task, "train", 64, torch.device("cpu"), seed=seed, limit=limit):
        hook = model.register_forward_pre_hook(note, with_kwargs=True)
        try:
            with torch.no_grad():
                task.forward(model, batch)
        finally:
            hook.remove()
        yield given.pop()
