"""Images, live, and their classification: data sets, head, loss and accuracies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from corenas.contracts import Metric
from corenas.errors import UserError
from corenas.value import Constant, Dimension, Value
from corenas_mutable_slices import LinearSlice
from corenas_task_vision.augment import Augment
from corenas_task_vision.data import Split, Stack, class_names, fingerprint, look, read, ready_splits

if TYPE_CHECKING:
    from corenas_task_vision import Classification, Pictures

PHOTO = 224
"""Side that photos are resized to, unless a spec says another."""


class Finish:
    """Resizes and normalises: (…, c, h, w) bytes, or floats from 0 to 1 -> (…, c, height, width) floats.

    Images of the right size stay; others are resized until they just cover the size over `crop`, of a square the
    shorter side is then that, and the middle is kept.
    """

    def __init__(self, size: tuple[int, int], crop: float, mean: Sequence[float], std: Sequence[float]) -> None:
        self.size = size
        self.resized = tuple(max(side, round(side / crop)) for side in size)
        self.scale, self.shift = (
            torch.tensor(numbers, dtype=torch.float64).float()[:, None, None]
            for numbers in ([1 / (255 * s) for s in std], [-m / s for m, s in zip(mean, std, strict=True)])
        )

    def __call__(self, images: Tensor) -> Tensor:
        """Images as the model takes them."""
        if images.shape[-2:] != self.size:
            images = functional.resize(images, self.covering(*images.shape[-2:]), antialias=True)
            images = functional.center_crop(images, [*self.size])
        floats = images * 255 if images.is_floating_point() else images.float()
        return floats.mul_(self.scale).add_(self.shift)

    def covering(self, height: int, width: int) -> list[int]:
        """Height and width that an image is resized to: one of them as wanted, the other at least so."""
        if self.resized[0] * width <= self.resized[1] * height:  # relatively higher than wanted
            return [int(self.resized[1] * height / width), self.resized[1]]
        return [self.resized[0], int(self.resized[0] * width / height)]


class Images(Dataset[tuple[Tensor, Any]]):
    """A split; item -> (image (c, h, w) as the model takes it, label: a class, or (k,) numbers)."""

    def __init__(self, split: Split, finish: Finish, augment: Augment | None) -> None:
        self.split, self.finish, self.augment = split, finish, augment

    def __len__(self) -> int:
        return len(self.split.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, Any]:
        image = self.split.pool[int(self.split.places[i])]
        if self.augment is not None:
            image = self.augment(image)
        label = self.split.labels[i]
        return self.finish(image), torch.from_numpy(label) if label.ndim else int(label)

    def tensors(self) -> tuple[Tensor, Tensor] | None:
        """All images (n, c, h, w) and labels (n,) where they are in memory and not augmented, else None."""
        if self.augment is not None or not isinstance(self.split.pool, Stack):
            return None
        images = self.split.pool.images[torch.from_numpy(self.split.places)]
        return self.finish(images), torch.from_numpy(self.split.labels)


class Mixed(Images):
    """A split whose batches are mixed: images with each other, and their labels alike, (n, classes).

    mix: of torchvision's transforms of batches
    """

    def __init__(self, split: Split, finish: Finish, augment: Augment | None, mix: Any) -> None:
        super().__init__(split, finish, augment)
        self.mix = mix

    def collate(self, samples: list[Any]) -> Any:
        """A batch, mixed by draws from torch's global generator."""
        return self.mix(*default_collate(samples))

    def tensors(self) -> None:
        """None: what a batch is hangs on what else is in it."""


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
    """Counts images and those whose label is the best answer or among the best five, in whole numbers.

    names: of the classes, of which each is then counted by itself
    """

    def __init__(self, tops: Sequence[int], names: Sequence[str] = ()) -> None:
        self.tops, self.names = tops, names
        self.counts = torch.zeros(1 + len(tops), dtype=torch.int64)  # all, then right ones
        self.by_class = torch.zeros(2, len(names), dtype=torch.int64)  # all, then right ones
        self.each: list[Tensor] = []  # of a batch, whether an image's label is the best answer, the second, …

    def update(self, outputs: Tensor | tuple[Tensor, ...], batch: Any) -> None:
        """Count a batch: logits (n, classes) and (images, labels). Nothing waits for the device."""
        labels = batch[1].argmax(1) if batch[1].dim() > 1 else batch[1]  # of mixed images the larger part's
        logits = _parts(outputs)[0]
        best = logits.topk(self.tops[-1], dim=1).indices == labels[:, None]
        best &= logits.isfinite().all(1, keepdim=True)  # of a net that has diverged nothing is right
        self.each.append(best)
        found = [best[:, :top].sum() for top in self.tops]
        counts = torch.stack([torch.full_like(found[0], len(labels)), *found])
        self.counts = self.counts.to(counts.device) + counts
        if self.names:
            seen = F.one_hot(labels, len(self.names))
            self.by_class = self.by_class.to(seen.device) + torch.stack([seen.sum(0), (seen * best[:, :1]).sum(0)])

    def scores(self, metric: str) -> Tensor | None:
        """1 for each image that a metric "top…" counts, else 0."""
        tops = {f"top{top}": top for top in self.tops}
        return torch.cat(self.each)[:, : tops[metric]].any(1) if metric in tops and self.each else None

    def compute(self) -> dict[str, float]:
        """Accuracies in percent; of no images at all they are not a number."""
        images, *right = self.counts.tolist()
        shares = [100 * n / images if images else float("nan") for n in right]
        found = {f"top{top}": share for top, share in zip(self.tops, shares, strict=True)}
        if not self.names:
            return found
        each = {
            f"top1 of {name}": 100 * right / n if n else float("nan")
            for name, n, right in zip(self.names, *self.by_class.tolist(), strict=True)
        }
        there = [share for share in each.values() if share == share]
        balanced = sum(there) / len(there) if there else float("nan")
        return {**found, "balanced": balanced, **{name: each[name] for name in _of_classes(self.names)}}


class LiveImages:
    """The data of a spec, cut into splits (`corenas.contracts.LiveTask`), whatever is learnt from it.

    names: of classes or of what is predicted; without data there may be none
    fingerprint: text that is another one where images are other ones, or are cut otherwise
    preprocessing: what has to be done to an image before the network sees it, and what its outputs mean
    """

    def __init__(self, options: Pictures, rng: np.random.Generator, data: bool) -> None:
        known = options.source.known
        photos = known.side is None
        seen = look(options.source, options.upright) if photos and None in (options.channels, options.size) else None
        channels = options.channels or (seen.channels if seen else known.channels)
        self.notes: list[str] = []
        small = seen is not None and seen.side is not None and options.size is None
        size = _sides(options.size or (seen.side if seen and small else None) or known.side or PHOTO)
        crop = options.crop or (0.875 if photos and not small else 1.0)
        mean = _by_channel(options.mean or known.mean, channels)
        std = _by_channel(options.std or known.std, channels)
        self.finish = Finish(size, crop, mean, std)
        self.augment = Augment(options.augment) if options.augment else None
        self.mix: Any = None
        self.cut = ""
        self._splits: dict[str, Split] = {}
        self.names: Sequence[str] = ()
        if data:
            ready = read(options, channels, max(self.finish.resized), rng)
            self._splits, self.names, self.notes, self.cut = ready.splits, ready.names, ready.notes, ready.cut
            if options.crop is not None and small and self.augment is None:
                self.notes.append(f"task.crop = {options.crop} does nothing: images have that size already")
        if self.augment is not None:
            # Photos differ in size; a blank one stands for them where it costs a file to look.
            height, width = [2 * side for side in size] if photos else _sides(known.side or size)
            self.augment.check(torch.zeros(channels, height, width, dtype=torch.uint8))
        self.example = torch.zeros(1, channels, *size)
        self.splits: Mapping[str, int] = {name: len(split.labels) for name, split in self._splits.items()}
        self.fingerprint = fingerprint(self._splits)
        square = size[0] == size[1]
        resized = (
            "the shorter side to `resize`"
            if square
            else "resized with its own proportions until it just covers `resize` (height, width)"
        )
        cropped = "`crop` x `crop`" if square else "`crop` (height, width)"
        self.preprocessing: Mapping[str, Any] = {
            "how": f"an image that is not {size[0]}x{size[1]}: {resized}, bilinear, antialiased, then the "
            f"middle {cropped}; of all: pixels from 0 to 1, then (pixel - mean) / std by channel",
            "colours": {1: "grey", 3: "RGB"}.get(channels, f"{channels} channels"),
            "resize": self.finish.resized[0] if square else [*self.finish.resized],
            "crop": size[0] if square else [*size],
            "mean": list(mean),
            "std": list(std),
            **({"bits": options.bits} if options.bits != 16 else {}),
            **({"upright": True} if options.upright else {}),
        }

    def dataset(self, split: str, augmented: bool) -> Images:
        """A split. Augmentation draws from torch's global generator, which the caller seeds; test never has any."""
        if split not in self._splits:
            hint = f"there are {', '.join(self._splits)}" if self._splits else "the data was not read"
            raise UserError(f"no split {split!r}", hint=hint)
        altered = augmented and split != "test"
        part, augment = self._splits[split], self.augment if altered else None
        mixes = altered and self.mix is not None
        return Mixed(part, self.finish, augment, self.mix) if mixes else Images(part, self.finish, augment)

    def _tell(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """What the head gives: logits, or numbers."""
        return model(batch[0])


class LiveClassification(LiveImages):
    """Images of classes."""

    def __init__(self, options: Classification, rng: np.random.Generator, data: bool) -> None:
        super().__init__(options, rng, data)
        self.options = options
        known = options.source.known
        found = max(len(self.names), known.classes or 0) if data else known.classes or options.classes
        self.classes = found or _classes_at(options)
        if options.classes not in (None, self.classes):
            raise UserError(f"there are {self.classes} classes", key=("classes",), hint="leave `classes` out")
        self.tops = (1, 5) if self.classes > 5 else (1,)
        named = self.names or [*map(str, range(self.classes))]
        self.measured = [*named][: self.classes] if options.per_class else ()
        metrics = {f"top{top}": Metric("%", "max", share=True) for top in self.tops}
        if self.measured:  # each class has fewer images than the split
            metrics |= dict.fromkeys(["balanced", *_of_classes(self.measured)], Metric("%", "max"))
        self.metrics: Mapping[str, Metric] = metrics
        self.preprocessing = {**self.preprocessing, "classes": [*self.names] or self.classes}
        self.mix = _mixture(options, self.classes)
        self.weights = _class_weights(options, self.classes, self._splits)
        if self._splits:
            self.notes += _unequal(self._splits["valid"], named, options.per_class)

    def head(self, feat_dims: Sequence[Dimension]) -> Head:
        """A linear classifier of the last features, and auxiliary ones of the others if the options want them."""
        auxiliary = feat_dims[:-1] if self.options.auxiliary else ()
        others, wanted = len(feat_dims) - 1, self.options.auxiliary
        if wanted and not others:
            self._tell(f"task.auxiliary = {wanted} does nothing: the backbone gives no features before the last")
        if others and not wanted:
            self._tell(f"features before the last ({others}) are for nothing: without task.auxiliary no loss has them")
        return Head(feat_dims[-1], self.classes, self.options.dropout, auxiliary)

    def loss(self, outputs: Tensor | tuple[Tensor, ...], batch: Any) -> Tensor:
        """Cross entropy, smoothed, weighted or focal; that of auxiliary classifiers counts as the options say."""
        loss, *others = (self._loss_of(part, batch[1]) for part in _parts(outputs))
        return loss + self.options.auxiliary * sum(others) if others else loss

    def _loss_of(self, logits: Tensor, labels: Tensor) -> Tensor:
        weights = None if self.weights is None else self.weights.to(logits)
        smoothing, focal = self.options.label_smoothing, self.options.focal
        mixed = labels.dim() > 1
        if not focal and not (mixed and weights is not None):  # of mixed images torch would not weigh the mean
            return F.cross_entropy(logits, labels, weights, label_smoothing=smoothing)
        loss = F.cross_entropy(logits, labels, weights, label_smoothing=smoothing, reduction="none")
        if focal:
            sure = logits.softmax(1)  # of the right class; of mixed images the mean over both
            sure = (sure * labels).sum(1) if mixed else sure.gather(1, labels[:, None])[:, 0]
            loss = (1 - sure) ** focal * loss
        if weights is None:
            return loss.mean()
        own = labels.to(weights) @ weights if mixed else weights[labels]
        return loss.sum() / own.sum()

    def logits(self, outputs: Tensor | tuple[Tensor, ...]) -> Tensor:
        """The outputs themselves, without those of auxiliary classifiers."""
        return _parts(outputs)[0]

    def meter(self) -> Accuracies:
        """A new count."""
        return Accuracies(self.tops, self.measured)


def _of_classes(names: Sequence[str]) -> list[str]:
    """The metrics of single classes, of which there are none where there are too many classes."""
    return [f"top1 of {name}" for name in names] if len(names) <= MOST_CLASSES else []


MOST_CLASSES = 100
"""From more than so many classes on, the accuracy of each is not told."""


def _sides(size: int | Sequence[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def _mixture(options: Classification, classes: int) -> Any:
    """Return what mixes the images and labels of a batch, None where nothing does."""
    ways = [
        way(alpha=alpha, num_classes=classes)
        for way, alpha in ((v2.MixUp, options.mixup), (v2.CutMix, options.cutmix))
        if alpha
    ]
    return v2.RandomChoice(ways) if len(ways) > 1 else ways[0] if ways else None


def _class_weights(options: Classification, classes: int, splits: Mapping[str, Split]) -> Tensor | None:
    """Return what an image of each class is worth: 1 on average over training images, if they are balanced."""
    weights = options.class_weights
    if weights == "balanced":
        if not splits:
            return None
        counts = np.bincount(splits["train"].labels, minlength=classes)
        return torch.from_numpy(counts.sum() / (classes * np.maximum(counts, 1)))
    if weights is not None and len(weights) != classes:
        raise UserError(f"expected {classes} weights, one a class, found {len(weights)}", key=("class_weights",))
    return None if weights is None else torch.tensor(weights, dtype=torch.float64)


def _unequal(valid: Split, names: Sequence[str], told: bool) -> list[str]:
    """Return what to know of a split in which nearly all images are of one class."""
    counts = np.bincount(valid.labels)
    share, most = counts.max() / counts.sum(), names[int(counts.argmax())]
    if counts.sum() < 20 or share < 0.75 or share * len(names) < 1.5:
        return []
    text = (
        f"{share:.0%} of the validation images are {most!r}: who always answers that has a top1 of {100 * share:.1f}%"
    )
    return [text if told else f"{text}; `per_class = true` in [task] measures balanced accuracy"]


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
