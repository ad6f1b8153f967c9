"""How one file becomes pixels, what its header says of it, and what is wrong with many of them."""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from attrs import Factory, define, frozen
from PIL import Image, UnidentifiedImageError, features
from torch import Tensor

from corenas import distributed

SUFFIXES = (
    ".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".npy",
    *((".avif",) if features.check("avif") else ()),
)  # fmt: skip
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)  # what broken files raise
MOST_PIXELS = 178_956_970
"""Pillow's limit: three bytes of each are half a GiB."""
_PATIENCE = 5.0
"""After how many seconds it is said how many images were looked at."""
_MANY = 64
"""How many headers are read to see what the images of a folder are like."""
_SMALL = 224
"""Largest side of images that stay as they are, if all have one size."""


@frozen
class Decoding:
    """How files become pixels.

    channels: 1, 3 or those of arrays and multi-band TIFF
    size: JPEGs far larger than twice this are decoded smaller, which takes a fraction of the time
    bits: how many of 16 are in use: pixels are divided by 2^bits - 1
    most: how many pixels a picture may have that is decoded
    upright: whether pictures are turned as their EXIF says
    """

    channels: int
    size: int
    bits: int = 16
    most: int = MOST_PIXELS
    upright: bool = False


_opening = Lock()


@contextmanager
def _opened(source: Any) -> Iterator[Image.Image]:
    """A picture by its header alone, of whatever size: Pillow's own limit would count what a draft does not decode."""
    with _opening, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            picture = Image.open(source)
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    with picture:
        yield picture


def _drafted(picture: Image.Image, how: Decoding) -> None:
    """Let a JPEG far larger than twice a size be decoded smaller. Raises ValueError for too many pixels."""
    width, height = picture.size
    picture.draft(mode_of(how.channels), (2 * how.size, 2 * how.size))
    if math.prod(picture.size) > how.most:
        raise ValueError(f"it has {width:,} x {height:,} pixels, more than `max_pixels` in [task], {how.most:,}")


def pixels(source: Any, path: str, how: Decoding) -> Tensor:
    """The pixels of a file, (c, h, w): bytes, or floats from 0 to 1 where a channel has more than 8 bits.

    source: the file, or its content
    Raises one of `UNREADABLE` for a file that is no image.
    """
    return _finished(_raw(source, path, how)[0], how)


def _raw(source: Any, path: str, how: Decoding, look: bool = False) -> tuple[np.ndarray, Sequence[str]]:
    """The pixels of a file as they are there, (c, h, w).

    look: whether to say as well what else the file says: "pages", "turned"
    """
    suffix, channels = os.path.splitext(path)[1].lower(), how.channels
    if suffix == ".npy":
        return _by_channel(_array(source, channels * how.most), channels), ()
    if channels not in (1, 3) and suffix in (".tif", ".tiff"):
        return _by_channel(_bands(source, channels * how.most), channels), ()
    with _opened(source) as picture:
        _drafted(picture, how)
        array = _decoded(picture, source, channels, how.most)
        found = _said_beside(picture) if look else ()
        return _turned(array, _orientation(picture)) if how.upright else array, found


def _decoded(picture: Image.Image, source: Any, channels: int, most: int) -> np.ndarray:
    """The pixels of a picture that was opened, (c, h, w)."""
    deep = _deep_colours(picture, source, 4 * most)
    if channels not in (1, 3):
        return _by_channel(np.asarray(picture) if deep is None else deep, channels)
    if deep is not None:
        return deep[: 1 if len(deep) < 3 else 3]  # the last of 2 or 4 is transparency
    if _is_deep(picture):
        return np.asarray(picture).astype(np.uint16)[None]
    shown = np.asarray(converted(picture, mode_of(channels)))
    return shown[None] if shown.ndim == 2 else shown.transpose(2, 0, 1)


def _said_beside(picture: Image.Image) -> list[str]:
    """What a picture that was decoded says beside its pixels."""
    found = []
    with suppress(*UNREADABLE):  # its first frame is whole, whatever comes after it
        if _orientation(picture) != 1:
            found.append("turned")
        if picture.format in ("GIF", "PNG", "TIFF", "WEBP") and getattr(picture, "n_frames", 1) > 1:
            found.append("pages")
    return found


def _orientation(picture: Image.Image) -> int:
    """How a picture lies by EXIF, 1 to 8, where 1 is upright; 1 where it does not say so."""
    with suppress(*UNREADABLE):
        said = picture.getexif().get(0x112)
        if said in range(1, 9):
            return said
    return 1


def _turned(array: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels (c, h, w) that lie as EXIF says, upright."""
    if orientation >= 5:
        array = array.swapaxes(1, 2)
    if orientation in (3, 4, 7, 8):
        array = array[:, ::-1]
    return array[:, :, ::-1] if orientation in (2, 3, 6, 7) else array


def _array(source: Any, most: int) -> np.ndarray:
    """The array in a .npy file. Raises ValueError for one of more numbers than `most`, before it is read."""
    with nullcontext(source) if isinstance(source, io.BytesIO) else open(source, "rb") as file:
        _refuse_too_many(_shape_of_array(file), most)
        file.seek(0)
        return np.load(file, allow_pickle=False)


def _shape_of_array(file: Any) -> tuple[int, ...]:
    """The shape that the header of a .npy file says. Raises ValueError for what is none."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"a .npy file of version {version}: expected 1.0 or 2.0")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)[0]


def _bands(source: Any, most: int) -> np.ndarray:
    """What a TIFF has beyond what Pillow reads. Raises ValueError for more numbers than `most`, before it is read."""
    import tifffile

    try:
        with tifffile.TiffFile(source) as file:
            _refuse_too_many(file.series[0].shape, most)
            return file.series[0].asarray()
    except (tifffile.TiffFileError, IndexError, KeyError, TypeError) as error:
        raise ValueError(str(error)) from None


def _refuse_too_many(shape: Sequence[int], most: int) -> None:
    if math.prod(shape) > most:
        raise ValueError(f"it has {' x '.join(map(str, shape))} pixels, more than `max_pixels` in [task] allows")


def _finished(array: np.ndarray, how: Decoding) -> Tensor:
    """Pixels as they are, (c, h, w), in so many channels and in bytes or floats. Raises ValueError for what is none."""
    if not array.size:
        raise ValueError(f"it has the shape {array.shape}: there are no pixels")
    image = _scaled(array, how.bits)
    if len(image) == how.channels:
        return image
    if how.channels == 1:
        return (image * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0, keepdim=True)  # as Pillow's "L"
    return image.expand(how.channels, -1, -1)


def mode_of(channels: int) -> str:
    """PIL's mode of pictures of 1 or 3 channels."""
    return "L" if channels == 1 else "RGB"


def converted(picture: Image.Image, mode: str) -> Image.Image:
    """A picture in another mode. Raises ValueError for one of 32 bits a pixel."""
    if _is_deep(picture):  # PIL would cut off all that is brighter than 255 of 65,535
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    elif picture.mode in ("I", "F"):
        raise ValueError("its pixels are signed, of 32 bits or floats, of a scale that nobody knows; expected 8 or 16")
    elif picture.mode == "P" and "transparency" in picture.info:  # PIL would warn
        picture = picture.convert("RGBA")
    elif picture.mode == "LAB":  # from which PIL knows no other way
        picture = picture.convert("RGB")
    return picture.convert(mode)


def _is_deep(picture: Image.Image) -> bool:
    """Whether a grey picture has 16 bits."""
    return picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PPM")


_BITS_PER_SAMPLE = 0x102
_PLANES = 0x11C
"""TIFF tags of how many bits each channel has, and of channels one after the other, which is 2."""
_OTHER_BYTES = {
    "LA;16B": "RGBA",  # both bytes of both channels
    "RGB;16B": "RGB;16L",
    "RGB;16L": "RGB;16B",
    "RGB;16N": "RGB;16B" if sys.byteorder == "little" else "RGB;16L",
    "RGBA;16B": "RGBA;16L",
    "RGBA;16L": "RGBA;16B",
    "RGBA;16N": "RGBA;16B" if sys.byteorder == "little" else "RGBA;16L",
}
"""How Pillow unpacks channels of 16 bits, of which it keeps the upper bytes, and how it keeps the lower ones."""


def _deep_colours(picture: Image.Image, source: Any, most: int) -> np.ndarray | None:
    """The pixels (c, h, w) of a PNG, TIFF or PPM that has several channels of 16 bits; None for any other.

    most: how many numbers there may be
    """
    tiles: Any = getattr(picture, "tile", None)
    codec, _, offset, arguments = tiles[0] if tiles else ("", None, 0, "")
    raw, *more = (arguments,) if isinstance(arguments, str) else arguments or ("",)
    if codec == "ppm" and raw == "RGB" and more[0] > 255:
        width, height = picture.size
        array = np.frombuffer(_content(source), ">u2", height * width * 3, offset).reshape(height, width, 3)
        return (array if more[0] == 65535 else array / np.float32(more[0])).transpose(2, 0, 1)
    tags = getattr(picture, "tag_v2", {})
    depths = tags.get(_BITS_PER_SAMPLE, (8,))
    if len(depths) > 1 and max(depths) > 8 and (raw not in _OTHER_BYTES or tags.get(_PLANES) == 2):
        return _by_channel(_bands(source, most), len(depths))  # PIL takes planes, one after the other, for bytes
    if raw not in _OTHER_BYTES:
        return None
    with _opened(io.BytesIO(_content(source))) as again:
        again.tile = [_unpacked(tile, _OTHER_BYTES[raw]) for tile in again.tile]  # type: ignore[attr-defined]
        low, high = np.asarray(again).astype(np.uint16), np.asarray(picture)
    if raw.startswith("LA"):
        return (low[..., ::2] << 8 | low[..., 1::2]).transpose(2, 0, 1)
    return (high.astype(np.uint16) << 8 | low).transpose(2, 0, 1)


def _unpacked(tile: Any, mode: str) -> Any:
    """What Pillow decodes a part of a picture by, in another raw mode."""
    arguments = mode if isinstance(tile[3], str) else (mode, *tile[3][1:])
    return tile._replace(args=arguments) if hasattr(tile, "_replace") else (*tile[:3], arguments)  # Pillow 10: no names


def _content(source: Any) -> bytes:
    return source.getvalue() if isinstance(source, io.BytesIO) else Path(source).read_bytes()


def _by_channel(array: np.ndarray, channels: int) -> np.ndarray:
    """An array of pixels as (c, h, w). Raises ValueError if it has no axis of so many channels."""
    if array.ndim == 2 and channels == 1:
        return array[None]
    if array.ndim == 3 and array.shape[0] == channels:
        return array
    if array.ndim == 3 and array.shape[2] == channels:
        return array.transpose(2, 0, 1)
    raise ValueError(f"it has the shape {array.shape}: expected {channels} channels first or last")


def _scaled(array: np.ndarray, bits: int) -> Tensor:
    """Pixels as bytes, or as floats from 0 to 1. Raises ValueError for other types, and pixels beyond all bits."""
    if array.dtype == np.uint8:
        return torch.from_numpy(np.array(array, order="C"))  # a copy: Pillow's own cannot be written into
    if array.dtype == bool:
        return torch.from_numpy(array.astype(np.uint8) * 255)
    if array.dtype.kind in "iu":
        most, low, high = 2**bits - 1, int(array.min()), int(array.max())
        if low < 0 or high > most:
            beyond = "" if bits == 16 else ", with `bits` in [task]"
            raise ValueError(f"its pixels go from {low:,} to {high:,}: expected 0 to {most:,}{beyond}")
        return torch.from_numpy(array.astype(np.float32) / most)
    if array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise ValueError("some of its pixels are no finite numbers")
        return torch.from_numpy(array.astype(np.float32))
    raise ValueError(f"its pixels are of {array.dtype}: expected whole numbers, or floats from 0 to 1")


@frozen
class Look:
    """What headers of some images say of all.

    channels: 1 where all are grey, the channels of arrays, else 3
    side: height and width, if all have one size and it is small; None otherwise
    """

    channels: int
    side: tuple[int, int] | None


def look_at_headers(paths: Sequence[str], upright: bool) -> Look | None:
    """What some of the images are like, evenly spread; None if none of them can be read."""
    every = np.linspace(0, len(paths) - 1, min(len(paths), _MANY)).astype(int)
    channels, sizes = set(), set()
    for path in [paths[i] for i in dict.fromkeys(every.tolist())]:
        try:
            if path.lower().endswith(".npy"):
                with open(path, "rb") as file:
                    shape = _shape_of_array(file)
                least = int(np.argmin(shape)) if len(shape) == 3 else 0
                channels.add(shape[least] if len(shape) == 3 else 1)
                sizes.add(tuple(n for i, n in enumerate(shape) if len(shape) == 2 or i != least))
            else:
                with _opened(path) as picture:
                    channels.add(1 if picture.mode in ("1", "L", "I", "F") or picture.mode.startswith("I;") else 3)
                    lies = upright and _orientation(picture) >= 5
                    sizes.add(picture.size if lies else picture.size[::-1])
        except UnidentifiedImageError:
            if path.lower().endswith((".tif", ".tiff")) and (shape := _shape_of_bands(path)):
                channels.add(shape[0])
                sizes.add(shape[1:])
        except UNREADABLE:
            continue
    if not channels:
        return None
    side = next(iter(sizes)) if len(sizes) == 1 and max(next(iter(sizes))) <= _SMALL else None
    return Look(max(channels), side)


def _shape_of_bands(path: str) -> tuple[int, ...] | None:
    """Channels, height and width of a TIFF of more bands than Pillow knows; None if it is none."""
    import tifffile

    try:
        with tifffile.TiffFile(path) as file:
            axes, shape = file.series[0].axes, file.series[0].shape
    except (*UNREADABLE, tifffile.TiffFileError, IndexError):
        return None
    return tuple(shape[axes.index(axis)] for axis in "SYX") if sorted(axes) == ["S", "X", "Y"] else None


@define
class Checked:
    """What was found in files.

    broken: path -> what is wrong with it
    digests: path -> that of its content, where contents were read
    brightest: the largest pixel of files of whole numbers of more than 8 bits; None if there are none
    floats: the smallest and the largest pixel of files of floats; None if there are none
    beside: how many files have several "pages", how many are to be "turned"
    """

    broken: dict[str, str]
    digests: dict[str, bytes]
    brightest: int | None = None
    floats: tuple[float, float] | None = None
    beside: Counter[str] = Factory(Counter)


def check(paths: Sequence[str], verify: str, how: Decoding, workers: int | None = None) -> Checked:
    """Read files, several at a time.

    verify: "all" decodes each, "headers" opens each, "none" nothing
    """
    found = Checked({}, {})
    if verify == "none":
        return found

    def one(path: str) -> tuple[str | None, bytes | None, np.ndarray | None, Sequence[str]]:
        try:
            if verify == "headers":
                if path.lower().endswith(".npy"):
                    with open(path, "rb") as file:
                        _refuse_too_many(_shape_of_array(file), how.channels * how.most)
                else:
                    with _opened(path) as picture:
                        _drafted(picture, how)
                return None, None, None, ()
            content = Path(path).read_bytes()
            array, beside = _raw(io.BytesIO(content), path, how, look=True)
            _finished(array, how)
            ends = np.array([array.min(), array.max()]) if array.dtype.itemsize > 1 else None
            return None, hashlib.blake2b(content, digest_size=16).digest(), ends, beside
        except (*UNREADABLE, MemoryError) as error:
            return re.sub(r" ?<_io.BytesIO[^>]*>", "", str(error)) or type(error).__name__, None, None, ()

    told = time.monotonic()
    with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
        for n, (path, (reason, digest, ends, beside)) in enumerate(zip(paths, pool.map(one, paths), strict=True)):
            if time.monotonic() - told > _PATIENCE and distributed.rank() == 0:
                told = time.monotonic()
                print(f"images looked at: {n:,} of {len(paths):,}", file=sys.stderr, flush=True)
            if reason is not None:
                found.broken[path] = reason
            if digest is not None:
                found.digests[path] = digest
            if ends is not None and ends.dtype.kind == "f":
                low, high = found.floats or ends
                found.floats = min(float(ends[0]), float(low)), max(float(ends[1]), float(high))
            elif ends is not None:
                found.brightest = max(int(ends[1]), found.brightest or 0)
            found.beside.update(beside)
    return found


def files_in(folder: Path) -> tuple[list[str], Counter[str]]:
    """The images in a folder and below, in order; and what else lies there, counted by suffix."""
    images: list[str] = []
    skipped: Counter[str] = Counter()
    seen: set[str] = set()
    for where, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if os.path.realpath(where) in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(os.path.realpath(where))
        for file in files:
            path = os.path.join(where, file)
            if file.startswith("."):
                skipped["hidden"] += 1
            elif not file.lower().endswith(SUFFIXES):
                skipped[os.path.splitext(file)[1].lower() or "without suffix"] += 1
            elif not os.path.isfile(path):  # a pipe would be waited for, a device read without end
                skipped["no regular file"] += 1
            else:
                images.append(path)
    return sorted(images), skipped


def said(counts: Mapping[str, int]) -> str:
    """Counts in words, the most first: "3 .txt, 1 hidden"."""
    return ", ".join(f"{n:,} {name}" for name, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def twins(digests: Mapping[str, bytes], splits: Mapping[str, Iterable[str]]) -> list[tuple[str, str]]:
    """Files of the same content that are in two splits."""
    first: dict[bytes, tuple[str, str]] = {}
    found = []
    for split, paths in splits.items():
        for path in paths:
            digest = digests.get(path)
            if digest is None:
                continue
            before = first.setdefault(digest, (split, path))
            if before[0] != split:
                found.append((before[1], path))
    return found
