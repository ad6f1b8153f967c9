"""Image classification, live: data sets, head, loss and accuracies."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from corenas.contracts import Metric
from corenas.errors import UserError, did_you_mean
from corenas.value import Dimension
from corenas_mutable_slices import LinearSlice
from corenas_task_vision import Data
from corenas_task_vision.data import Images, Source, cut, outline, read

if TYPE_CHECKING:
    from corenas_task_vision import Classification


class Split(Dataset[tuple[Tensor, int]]):
    """Some images of a source; item -> (normalised image (c, h, w), label)."""

    def __init__(
        self, images: Images, places: np.ndarray, mean: Tensor, std: Tensor, size: int | None, augment: Any
    ) -> None:
        self.images, self.places, self.size, self.augment = images, places, size, augment
        self.mean, self.std = mean, std

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        place = int(self.places[i])
        image = self.images.load(place)
        if self.augment is not None:
            image = self.augment(image)
        return self._finished(image), int(self.images.labels[place])

    def _finished(self, image: Tensor) -> Tensor:
        if self.size is not None and image.shape[-2:] != (self.size, self.size):
            image = fitted(image, self.size)
        return (image.to(torch.float32) / 255 - self.mean) / self.std

    def tensors(self) -> tuple[Tensor, Tensor] | None:
        """All images (n, c, h, w) and labels (n,) where they are in memory and not augmented, else None."""
        if self.images.stacked is None or self.augment is not None:
            return None
        places = torch.from_numpy(self.places)
        return self._finished(self.images.stacked[places]), torch.from_numpy(self.images.labels)[places]


def fitted(image: Tensor, size: int) -> Tensor:
    """Large images: the shorter side resized to size / 0.875, then the middle; those hardly larger: resized alone."""
    from torchvision.transforms.v2 import functional

    if min(image.shape[-2:]) < 64:
        return functional.resize(image, [size, size], antialias=True)
    return functional.center_crop(functional.resize(image, [round(size / 0.875)], antialias=True), [size, size])


class Head(nn.Module):
    """Pooling, dropout and a linear classifier.

    forward: features, the last of them (n, c, h, w) -> logits (n, classes)
    """

    def __init__(self, features: Dimension, classes: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.classifier = LinearSlice(features, classes)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Features, the last of them (n, c, h, w) -> logits (n, classes)."""
        return self.classifier(self.dropout(features[-1].mean((2, 3))))


class Accuracies:
    """Counts images and those whose label is among the best one and five answers."""

    def __init__(self, top5: bool) -> None:
        self.tops = (1, 5) if top5 else (1,)
        self.images = 0
        self.right = dict.fromkeys(self.tops, 0)

    def update(self, outputs: Tensor, batch: Any) -> None:
        """Count a batch."""
        labels = batch[1]
        best = outputs.topk(self.tops[-1], dim=1).indices == labels[:, None]
        self.images += len(labels)
        for top in self.tops:
            self.right[top] += int(best[:, :top].any(1).sum())

    def merge(self, other: Accuracies) -> None:
        """Add the counts of another."""
        self.images += other.images
        for top in self.tops:
            self.right[top] += other.right[top]

    def compute(self) -> dict[str, float]:
        """Accuracies in percent."""
        return {f"top{top}": 100 * self.right[top] / self.images for top in self.tops}


class LiveClassification:
    """The data of a spec, cut into splits (`corenas.contracts.LiveTask`)."""

    def __init__(self, options: Classification, rng: np.random.Generator, data: bool) -> None:
        self.options = options
        where = Data(options.data) if isinstance(options.data, str) else options.data
        source = read(where) if data else outline(where, options.classes)
        if options.classes not in (None, source.classes):
            raise UserError(f"the data has {source.classes} classes", key=("classes",), hint="leave `classes` out")
        self.classes, self.size = source.classes, options.size or source.side or 224
        self.mean, self.std = _by_channel(options, source)
        self.example = torch.zeros(1, source.channels, self.size, self.size)
        self.metrics: Mapping[str, Metric] = {"top1": Metric("%", "max")}
        if self.classes > 5:
            self.metrics = {**self.metrics, "top5": Metric("%", "max")}
        self.preprocessing = {
            "pixels": "0 to 1, then (pixel - mean) / std by channel",
            "mean": self.mean.flatten().tolist(),
            "std": self.std.flatten().tolist(),
            "size": self.size,
            "classes": list(map(str, source.names)) or self.classes,
        }
        self.augment = _transforms(options.augment)
        self._parts = _splits(options, source, rng) if data else {}
        self.splits = {name: len(places) for name, (_, places) in self._parts.items()}

    def dataset(self, split: str, augmented: bool) -> Split:
        """A split; augmentation is for training images and draws from torch's global generator."""
        if split not in self._parts:
            raise UserError(f"no split {split!r} here", hint="the data was not read" if not self._parts else None)
        images, places = self._parts[split]
        return Split(images, places, self.mean, self.std, self.size, self.augment if augmented else None)

    def head(self, feat_dims: Sequence[Dimension]) -> Head:
        """A linear classifier of the last features."""
        return Head(feat_dims[-1], self.classes, self.options.dropout)

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        """Logits (n, classes)."""
        return model(batch[0])

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """Cross entropy with label smoothing."""
        return F.cross_entropy(outputs, batch[1], label_smoothing=self.options.label_smoothing)

    def logits(self, outputs: Tensor) -> Tensor:
        """The outputs themselves."""
        return outputs

    def meter(self) -> Accuracies:
        """A new count."""
        return Accuracies("top5" in self.metrics)


def _by_channel(options: Classification, source: Source) -> tuple[Tensor, Tensor]:
    found = []
    for name in ("mean", "std"):
        numbers = getattr(options, name) or getattr(source, name)
        if len(numbers) != source.channels or (name == "std" and min(numbers) <= 0):
            text = f"expected {source.channels} numbers{' above 0' if name == 'std' else ''}, found {list(numbers)}"
            raise UserError(text, key=(name,))
        found.append(torch.tensor(numbers, dtype=torch.float32)[:, None, None])
    return found[0], found[1]


def _splits(options: Classification, source: Source, rng: np.random.Generator) -> dict[str, tuple[Images, np.ndarray]]:
    """Split -> images and the numbers of its samples; held out first is test, so that another `valid` moves no test."""
    assert source.train is not None
    rest = np.arange(len(source.train))
    parts: dict[str, tuple[Images, np.ndarray]] = {}
    for name in ("test", "valid"):
        own = getattr(source, name)
        if own is not None:
            parts[name] = (own, np.arange(len(own)))
        else:
            left, held = cut(source.train.labels[rest], getattr(options, name), rng, name)
            parts[name] = (source.train, rest[held])
            rest = rest[left]
    return {"train": (source.train, rest), "valid": parts["valid"], "test": parts["test"]}


def _transforms(tables: Sequence[Mapping[str, Any]]) -> Any:
    """Transforms of torchvision by name, one after the other. Raises UserError with all mistakes."""
    if not tables:
        return None
    from torchvision.transforms import v2

    names = [name for name, cls in vars(v2).items() if isinstance(cls, type) and issubclass(cls, v2.Transform)]
    faults, made = [], []
    for i, table in enumerate(tables):
        try:
            made.append(_transform(v2, table, names))
        except UserError as error:
            faults += error.under("augment", i).faults
    if faults:
        raise UserError(faults=faults)
    return v2.Compose(made)


def _transform(v2: Any, table: Mapping[str, Any], names: Sequence[str]) -> Any:
    name = table.get("type")
    if name not in names or name in ("Transform", "Lambda"):
        raise UserError(f"torchvision.transforms.v2 has no {name!r}", key=("type",),
                        hint=did_you_mean(str(name), names, "there are"))  # fmt: skip
    cls = getattr(v2, str(name))
    known = [key for key in inspect.signature(cls).parameters if key not in ("args", "kwargs")]
    options = {key: value for key, value in table.items() if key != "type"}
    unknown = [UserError("unknown key", key=(key,), hint=did_you_mean(key, known, f"arguments of {name}"))
               for key in options if key not in known]  # fmt: skip
    if unknown:
        raise UserError(faults=[fault for error in unknown for fault in error.faults])
    try:
        return cls(**options)
    except Exception as error:
        raise UserError(f"{name} does not take this: {error}", key=()) from None
