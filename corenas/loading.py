"""How data reaches a model: batches in an order and with an augmentation that only seed, epoch and sample decide."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, Dataset

from corenas import seeding
from corenas.contracts import LiveTask


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch on a device; images go channels-last, which is faster on CPUs too."""

    def move(tensor: Tensor) -> Tensor:
        layout = torch.channels_last if tensor.dim() == 4 else torch.preserve_format
        return tensor.to(device, memory_format=layout, non_blocking=True)

    return tree_map_only(Tensor, move, batch)


class _Seeded(Dataset[Any]):
    """A data set indexed by (epoch, sample), with torch's global generator seeded for each of them."""

    def __init__(self, dataset: Any, seed: int, name: str) -> None:
        self.dataset, self.seed, self.name = dataset, seed, name

    def __getitem__(self, place: tuple[int, int]) -> Any:
        # torch.manual_seed would seed all devices, which takes as long as reading an image
        torch.default_generator.manual_seed(seeding.number(self.seed, self.name, *place))
        return self.dataset[place[1]]


class Stream:
    """The shuffled training batches of a split, epoch by epoch.

    steps: batches an epoch; the last, smaller one is left out unless it is the only one
    """

    def __init__(
        self, task: LiveTask, split: str, batch_size: int, seed: int, workers: int = 0, augmented: bool = True
    ) -> None:
        dataset = task.dataset(split, augmented)
        self.size = len(dataset)  # type: ignore[arg-type]
        self.batch_size = min(batch_size, self.size)
        self.steps = self.size // self.batch_size
        self.seed, self.name, self.workers = seed, f"data:{split}", workers
        self._dataset = _Seeded(dataset, seed, self.name)

    def order(self, epoch: int) -> list[list[tuple[int, int]]]:
        """The samples of each batch of an epoch."""
        rng = np.random.default_rng([seeding.number(self.seed, self.name, epoch)])
        order = rng.permutation(self.size)[: self.steps * self.batch_size].reshape(self.steps, self.batch_size)
        return [[(epoch, int(i)) for i in batch] for batch in order]

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """The batches of an epoch, from one on. Torch's global generator is as it was after each."""
        loader = DataLoader(
            self._dataset,
            batch_sampler=self.order(epoch)[start:],  # type: ignore[arg-type]
            num_workers=self.workers,
            generator=torch.Generator().manual_seed(0),
        )
        batches = iter(loader)
        while True:
            before = torch.get_rng_state()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                torch.set_rng_state(before)
            yield batch

    def forever(self, start: int = 0) -> Iterator[Any]:
        """Batches of one epoch after the other, from one on."""
        epoch, start = divmod(start, self.steps)
        for number in itertools.count(epoch):
            yield from self.epoch(number, start if number == epoch else 0)


def batches(
    task: LiveTask,
    split: str,
    batch_size: int,
    device: torch.device,
    augmented: bool = False,
    seed: int = 0,
    limit: int = 0,
) -> Sequence[Any]:
    """Batches of a split on a device, decoded once: all in order, or `limit` shuffled ones."""
    dataset: Any = task.dataset(split, augmented)
    size = len(dataset)
    if limit:
        order = np.random.default_rng([seeding.number(seed, f"batches:{split}")]).permutation(size)[
            : limit * batch_size
        ]
    else:
        order = np.arange(size)
    tensors = dataset.tensors() if not augmented and hasattr(dataset, "tensors") else None
    if tensors is not None:
        index = torch.from_numpy(order)
        return [to_device(tuple(t[part] for t in tensors), device) for part in index.split(batch_size)]
    stream = _Seeded(dataset, seed, f"batches:{split}")
    places = [[(0, int(i)) for i in order[at : at + batch_size]] for at in range(0, len(order), batch_size)]
    with seeding.seeded(seed, "batches"):
        return [to_device(batch, device) for batch in DataLoader(stream, batch_sampler=places)]  # type: ignore[arg-type]
