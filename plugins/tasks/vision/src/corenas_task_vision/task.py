"""Image classification, live: data sets, head, loss and accuracies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional

from corenas.contracts import Metric
from corenas.errors import UserError
from corenas.value import Constant, Dimension, Value
from corenas_mutable_slices import LinearSlice
from corenas_task_vision.augment import Augment
from corenas_task_vision.data import Split, Stack, class_names, fingerprint, read, ready_splits

if TYPE_CHECKING:
    from corenas_task_vision import Classification

PHOTO = 224
"""Side that photos are resized to, unless a spec says another."""


class Finish:
    """Resizes and normalises: (…, c, h, w) bytes, or floats from 0 to 1 -> (…, c, size, size) floats.

    Images of the right size stay; of others the shorter side becomes size / crop, and the middle is kept.
    """

    def __init__(self, size: int, crop: float, mean: Sequence[float], std: Sequence[float]) -> None:
        self.size, self.resized = size, max(size, round(size / crop))
        self.scale, self.shift = (
            torch.tensor(numbers, dtype=torch.float64).float()[:, None, None]
            for numbers in ([1 / (255 * s) for s in std], [-m / s for m, s in zip(mean, std, strict=True)])
        )

    def __call__(self, images: Tensor) -> Tensor:
        """Images as the model takes them."""
        if images.shape[-2:] != (self.size, self.size):
            images = functional.resize(images, [self.resized], antialias=True)
            images = functional.center_crop(images, [self.size, self.size])
        floats = images * 255 if images.is_floating_point() else images.float()
        return floats.mul_(self.scale).add_(self.shift)


class Images(Dataset[tuple[Tensor, int]]):
    """A split; item -> (image (c, h, w) as the model takes it, label)."""

    def __init__(self, split: Split, finish: Finish, augment: Augment | None) -> None:
        self.split, self.finish, self.augment = split, finish, augment

    def __len__(self) -> int:
        return len(self.split.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        image = self.split.pool[int(self.split.places[i])]
        if self.augment is not None:
            image = self.augment(image)
        return self.finish(image), int(self.split.labels[i])

    def tensors(self) -> tuple[Tensor, Tensor] | None:
        """All images (n, c, h, w) and labels (n,) where they are in memory and not augmented, else None."""
        if self.augment is not None or not isinstance(self.split.pool, Stack):
            return None
        images = self.split.pool.images[torch.from_numpy(self.split.places)]
        return self.finish(images), torch.from_numpy(self.split.labels)


class Head(nn.Module):
    """Pooling, dropout and a linear classifier; in training auxiliary ones too.

    auxiliary: the features before the last, if they are to be classified
    forward: features, the last of them (n, c, h, w) or (n, c) -> logits (n, classes); in training, where there are
        auxiliary classifiers, a tuple of these logits and theirs
    """

    def __init__(self, features: Dimension, classes: int, dropout: float, auxiliary: Sequence[Dimension] = ()) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.classifier = LinearSlice(features, classes)
        if auxiliary:
            self.auxiliary = nn.ModuleList(LinearSlice(dim, classes) for dim in auxiliary)

    def gates(self) -> Iterable[tuple[nn.Module, Value]]:
        """Auxiliary classifiers run under no arch, as far as costs are concerned."""
        return [(self.auxiliary, Constant(0))] if hasattr(self, "auxiliary") else []

    def forward(self, features: Sequence[Tensor]) -> Tensor | tuple[Tensor, ...]:
        """Features, the last of them (n, c, h, w) or (n, c) -> logits (n, classes), in training with auxiliary ones."""
        logits = self.classifier(self.dropout(_pooled(features[-1])))
        if not self.training or not hasattr(self, "auxiliary"):
            return logits
        others = zip(self.auxiliary, features[:-1], strict=True)
        return logits, *(classifier(_pooled(feature)) for classifier, feature in others)


def _pooled(feature: Tensor) -> Tensor:
    """A map's mean, and of a vector the vector itself: to ask which of the two it is could not be traced."""
    return feature.unsqueeze(-1).flatten(2).mean(2)


def _parts(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A head's logits, then those of its auxiliary classifiers."""
    return outputs if isinstance(outputs, tuple) else (outputs,)


class Accuracies:
    """Counts images and those whose label is the best answer or among the best five, in whole numbers."""

    def __init__(self, tops: Sequence[int]) -> None:
        self.tops = tops
        self.counts = torch.zeros(1 + len(tops), dtype=torch.int64)  # all, then right ones

    def update(self, outputs: Tensor | tuple[Tensor, ...], batch: Any) -> None:
        """Count a batch: logits (n, classes) and (images, labels). Nothing waits for the device."""
        logits, labels = _parts(outputs)[0], batch[1][:, None]
        best = logits.topk(self.tops[-1], dim=1).indices == labels
        best &= logits.isfinite().all(1, keepdim=True)  # of a net that has diverged nothing is right
        found = [best[:, :top].sum() for top in self.tops]
        counts = torch.stack([torch.full_like(found[0], len(labels)), *found])
        self.counts = self.counts.to(counts.device) + counts

    def compute(self) -> dict[str, float]:
        """Accuracies in percent; of no images at all they are not a number."""
        images, *right = self.counts.tolist()
        shares = [100 * n / images if images else float("nan") for n in right]
        return {f"top{top}": share for top, share in zip(self.tops, shares, strict=True)}


class LiveClassification:
    """The data of a spec, cut into splits (`corenas.contracts.LiveTask`).

    fingerprint: text that is another one where images are other ones, or are cut otherwise
    preprocessing: what has to be done to an image before the network sees it, and what its outputs mean
    """

    def __init__(self, options: Classification, rng: np.random.Generator, data: bool) -> None:
        self.options = options
        known = options.source.known
        photos = known.side is None
        channels = options.channels or known.channels
        size = options.size or known.side or PHOTO
        crop = options.crop or (0.875 if photos else 1.0)
        mean = _by_channel(options.mean or known.mean, channels)
        std = _by_channel(options.std or known.std, channels)
        self.finish = Finish(size, crop, mean, std)
        self.augment = Augment(options.augment) if options.augment else None
        self._splits: dict[str, Split] = {}
        names: Sequence[str] = ()
        if data:
            self._splits, names = read(options, channels, self.finish.resized, rng)
            found = max(len(names), known.classes or 0)
        else:
            found = known.classes or options.classes or _classes_at(options)
        if options.classes not in (None, found):
            raise UserError(f"there are {found} classes", key=("classes",), hint="leave `classes` out")
        if self.augment is not None:
            # Photos differ in size; a blank one stands for them where it costs a file to look.
            side = 2 * size if photos else known.side or size
            self.augment.check(torch.zeros(channels, side, side, dtype=torch.uint8))
        self.classes = found
        self.example = torch.zeros(1, channels, size, size)
        self.tops = (1, 5) if found > 5 else (1,)
        self.metrics: Mapping[str, Metric] = {f"top{top}": Metric("%", "max") for top in self.tops}
        self.splits: Mapping[str, int] = {name: len(split.labels) for name, split in self._splits.items()}
        self.fingerprint = fingerprint(self._splits)
        self.preprocessing: Mapping[str, Any] = {
            "how": f"an image that is not {size}x{size}: the shorter side to `resize`, bilinear, antialiased, then the "
            "middle `crop` x `crop`; of all: pixels from 0 to 1, then (pixel - mean) / std by channel",
            "colours": "RGB" if channels == 3 else "grey",
            "resize": self.finish.resized,
            "crop": size,
            "mean": list(mean),
            "std": list(std),
            "classes": [*names] or found,
        }

    def dataset(self, split: str, augmented: bool) -> Images:
        """A split. Augmentation draws from torch's global generator, which the caller seeds; test never has any."""
        if split not in self._splits:
            hint = f"there are {', '.join(self._splits)}" if self._splits else "the data was not read"
            raise UserError(f"no split {split!r}", hint=hint)
        return Images(self._splits[split], self.finish, self.augment if augmented and split != "test" else None)

    def head(self, feat_dims: Sequence[Dimension]) -> Head:
        """A linear classifier of the last features, and auxiliary ones of the others if the options want them."""
        auxiliary = feat_dims[:-1] if self.options.auxiliary else ()
        return Head(feat_dims[-1], self.classes, self.options.dropout, auxiliary)

    def forward(self, model: nn.Module, batch: Any) -> Tensor | tuple[Tensor, ...]:
        """Logits (n, classes); in training with those of auxiliary classifiers after them, if there are some."""
        return model(batch[0])

    def loss(self, outputs: Tensor | tuple[Tensor, ...], batch: Any) -> Tensor:
        """Cross entropy with label smoothing; that of auxiliary classifiers counts as much as the options say."""
        smoothing = self.options.label_smoothing
        loss, *others = (F.cross_entropy(part, batch[1], label_smoothing=smoothing) for part in _parts(outputs))
        return loss + self.options.auxiliary * sum(others) if others else loss

    def logits(self, outputs: Tensor | tuple[Tensor, ...]) -> Tensor:
        """The outputs themselves, without those of auxiliary classifiers."""
        return _parts(outputs)[0]

    def meter(self) -> Accuracies:
        """A new count."""
        return Accuracies(self.tops)


def _by_channel(numbers: Sequence[float], channels: int) -> Sequence[float]:
    if len(numbers) == channels:
        return numbers
    return (sum(numbers) / len(numbers),) * channels  # grey made colour, or colour made grey


def _classes_at(options: Classification) -> int:
    """How many classes a folder has, from the names in it alone."""
    try:
        return len(class_names(ready_splits(options.source)["train"]))
    except UserError:
        hint = "say how many there will be: classes = 1000"
        raise UserError("the number of classes is not known without the data", key=("classes",), hint=hint) from None
