"""How data reaches a model: batches in an order and with an augmentation that only seed, epoch and sample decide."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, Dataset, default_collate

from corenas import distributed, seeding
from corenas.contracts import LiveTask
from corenas.errors import UserError


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
        try:
            return self.dataset[place[1]]
        except UserError as error:  # raised in a worker it would arrive as a traceback, so it is handed over
            return error

    def batches(self, places: Sequence[Sequence[tuple[int, int]]], workers: int) -> Iterator[Any]:
        """The batches of some samples. Torch's global generator is as it was after each."""
        loader = DataLoader(
            self,
            batch_sampler=places,  # type: ignore[arg-type]
            num_workers=workers,
            collate_fn=_Collate(getattr(self.dataset, "collate", default_collate)),
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
            if isinstance(batch, UserError):
                raise batch
            yield batch


class _Collate:
    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: list[Any]) -> Any:
        return next((sample for sample in samples if isinstance(sample, UserError)), None) or self.collate(samples)


class Stream:
    """The shuffled training batches of a split, epoch by epoch, each cut into parts: of every process so many.

    steps: batches an epoch; the last, smaller one is left out unless it is the only one
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
    ) -> None:
        dataset = task.dataset(split, augmented)
        self.size = len(dataset)  # type: ignore[arg-type]
        self.batch_size = min(batch_size, self.size)
        self.steps = self.size // self.batch_size
        self.seed, self.name, self.workers, self.parts = seed, f"data:{split}", workers, parts
        self._dataset = _Seeded(dataset, seed, self.name)
        if self.batch_size < parts * distributed.world():
            text = f"{self.batch_size} images cannot be cut into {parts * distributed.world()} parts"
            raise UserError(text, key=("train", "batch_size"), hint="train.accumulate times processes are too many")

    def order(self, epoch: int) -> list[list[tuple[int, int]]]:
        """The samples of each batch of an epoch, over all processes."""
        rng = np.random.default_rng([seeding.number(self.seed, self.name, epoch)])
        order = rng.permutation(self.size)[: self.steps * self.batch_size].reshape(self.steps, self.batch_size)
        return [[(epoch, int(i)) for i in batch] for batch in order]

    def epoch(self, epoch: int, start: int = 0) -> Iterator[list[tuple[Any, float]]]:
        """The batches of an epoch, from one on: this process's parts, each with its share of the whole batch.

        Torch's global generator is as it was after each.
        """
        own = range(distributed.rank() * self.parts, (distributed.rank() + 1) * self.parts)
        bounds = np.linspace(0, self.batch_size, self.parts * distributed.world() + 1).astype(int)
        spans = [(bounds[i], bounds[i + 1]) for i in own]
        places = [batch[a:b] for batch in self.order(epoch)[start:] for a, b in spans]
        shares = [float(b - a) / self.batch_size for a, b in spans]
        batches = self._dataset.batches(places, self.workers)
        for batch in batches:
            yield [(batch, shares[0]), *zip(itertools.islice(batches, self.parts - 1), shares[1:], strict=True)]

    def forever(self, start: int = 0) -> Iterator[Any]:
        """Batches of one epoch after the other, from one on; for a stream of one part."""
        epoch, start = divmod(start, self.steps)
        for number in itertools.count(epoch):
            for ((batch, _),) in self.epoch(number, start if number == epoch else 0):
                yield batch


class Batches:
    """Batches of a split on a device, to be gone through again and again: all in order, or `limit` shuffled ones.

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
        dataset: Any = task.dataset(split, augmented)
        name, order = f"batches:{split}", np.arange(len(dataset))
        if limit:
            shuffled = np.random.default_rng([seeding.number(seed, name)]).permutation(len(dataset))
            order = shuffled[: limit * batch_size]
        self.device, self.workers = device, workers
        self._places = [[(0, int(i)) for i in order[at : at + batch_size]] for at in range(0, len(order), batch_size)]
        self._samples = _Seeded(dataset, seed, name)
        self._kept: Sequence[Any] | None = None
        tensors = dataset.tensors() if not augmented and hasattr(dataset, "tensors") else None
        if tensors is not None:
            parts = torch.from_numpy(order).split(batch_size)
            self._kept = [to_device(tuple(tensor[part] for tensor in tensors), device) for part in parts]
        elif len(order) * task.example.numel() * task.example.element_size() < 2 << 30:
            self._kept = [*self._decoded()]

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Any]:
        return self._decoded() if self._kept is None else iter(self._kept)

    def _decoded(self) -> Iterator[Any]:
        return (to_device(batch, self.device) for batch in self._samples.batches(self._places, self.workers))
