"""How training images are altered: transforms by name, torchvision's and cutout, mistakes told before training."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2

from corenas.errors import Fault, UserError, did_you_mean

_UNFIT = {
    # of whole batches, of boxes and points, of functions; those that give several images or no tensor; the base class
    "CutMix",
    "MixUp",
    "ConvertBoundingBoxFormat",
    "ClampBoundingBoxes",
    "ClampKeyPoints",
    "SanitizeBoundingBoxes",
    "SanitizeKeyPoints",
    "SetClampingMode",
    "RandomIoUCrop",
    "Lambda",
    "LinearTransformation",
    "FiveCrop",
    "TenCrop",
    "UniformTemporalSubsample",
    "ToPILImage",
    "PILToTensor",
    "ToImage",
    "ToTensor",
    "ToPureTensor",
    "Transform",
    # the task does these itself
    "Compose",
    "ConvertImageDtype",
    "Normalize",
    "ToDtype",
}


class Cutout(v2.Transform):
    """Fills a square whose middle is anywhere in the image, part of it outside (arXiv:1708.04552).

    size: side of the square in pixels
    value: what it is filled with, from 0 to 1, one number or one for each channel
    """

    def __init__(self, size: int, value: float | Sequence[float] = 0.0) -> None:
        super().__init__()
        self.size, self.value = size, torch.as_tensor(value, dtype=torch.float32).view(-1, 1, 1)
        if size < 1 or self.value.min() < 0 or self.value.max() > 1:
            raise ValueError(f"expected a size of at least 1 and values from 0 to 1, found {size} and {value}")

    def forward(self, image: Tensor) -> Tensor:  # type: ignore[override]
        """(c, h, w) -> the same shape."""
        spans = []
        for side in image.shape[-2:]:
            start = int(torch.randint(side, ())) - self.size // 2
            spans.append(slice(max(0, start), max(0, start + self.size)))
        image = image.clone()
        image[:, spans[0], spans[1]] = self.value if image.is_floating_point() else (255 * self.value).round().byte()
        return image


TRANSFORMS: dict[str, type[v2.Transform]] = {
    name: cls
    for name, cls in {**vars(v2), "Cutout": Cutout}.items()
    if isinstance(cls, type) and issubclass(cls, v2.Transform) and name not in _UNFIT and not name.startswith("_")
}
"""What a spec can name."""
_OF_TRANSFORMS = ("RandomApply", "RandomChoice", "RandomOrder")
_ON_FLOATS = ("GaussianNoise", "RandomErasing")
_GRAIN = 32768  # pixels below which torch's own loops do not go parallel


class Augment:
    """Transforms one after the other: (c, h, w) bytes -> (c, h', w') bytes, or floats from 0 to 1 where one needs them.

    Raises UserError with all mistakes in the tables, keys under "augment".
    """

    def __init__(self, tables: Sequence[str | Mapping[str, Any]]) -> None:
        faults: list[Fault] = []
        self.steps: list[Callable[[Tensor], Tensor]] = []
        for i, table in enumerate(tables):
            try:
                self.steps.append(_transform(table))
            except UserError as error:
                faults += error.under("augment", i).faults
        if faults:
            raise UserError(faults=faults)

    def __call__(self, image: Tensor) -> Tensor:
        """An image altered, by draws from torch's global generator."""
        threads = torch.get_num_threads()
        if threads == 1 or image.numel() >= _GRAIN:
            return self._all(image)
        # Two threads take 4 to 10 times as long as one for the affine grid of a 28x28 image: they wait for each other.
        torch.set_num_threads(1)
        try:
            return self._all(image)
        finally:
            torch.set_num_threads(threads)

    def _all(self, image: Tensor) -> Tensor:
        for i, step in enumerate(self.steps):
            try:
                image = step(image)
            except Exception as error:  # of an image that is smaller than the one that was tried, or of a rare draw
                text = f"this does not take an image of shape {tuple(image.shape)}: {error}"
                raise UserError(text, key=("task", "augment", i)) from error
        return image

    def check(self, image: Tensor) -> None:
        """Raises UserError, keys under "augment", if the transforms do not take an image or do not give one.

        Torch's global generator is as it was.
        """
        channels = len(image)
        with torch.random.fork_rng(devices=[]):
            for i, step in enumerate(self.steps):
                try:
                    image = step(image)
                except Exception as error:
                    text = f"this does not take an image of shape {tuple(image.shape)}: {error}"
                    raise UserError(text, key=("augment", i)) from error
                if isinstance(image, Tensor) and not image.isfinite().all():
                    raise UserError("this gives pixels that are not finite", key=("augment", i))
                if not isinstance(image, Tensor) or image.dim() != 3 or len(image) != channels:
                    text = f"this gives {tuple(image.shape)} instead of an image with {channels} channels"
                    raise UserError(text, key=("augment", i))


class _OnFloats:
    """A transform that takes floats from 0 to 1."""

    def __init__(self, transform: v2.Transform) -> None:
        self.transform = transform

    def __call__(self, image: Tensor) -> Tensor:
        return self.transform(image if image.is_floating_point() else image / 255)


def _transform(table: str | Mapping[str, Any]) -> Any:
    table = {"type": table} if isinstance(table, str) else table
    name = table.get("type")
    if not isinstance(name, str) or name not in TRANSFORMS:
        text = "required key is missing" if name is None else f"no transform {name!r} for images"
        raise UserError(text, key=("type",), hint=did_you_mean(str(name), TRANSFORMS, "transforms"))
    parameters = inspect.signature(TRANSFORMS[name]).parameters
    arguments: dict[str, Any] = {}
    faults: list[Fault] = []
    for key, value in table.items():
        if key == "type":
            continue
        if key not in parameters:
            faults.append(Fault("unknown key", (key,), hint=did_you_mean(key, parameters, f"arguments of {name}")))
            continue
        try:
            arguments[key] = _argument(name, key, value, parameters[key].default)
        except UserError as error:
            faults += error.under(key).faults
    missing = [p.name for p in parameters.values() if p.default is p.empty and p.name not in table]
    faults += [Fault(f"required for {name}", (key,)) for key in missing]
    if faults:
        raise UserError(faults=faults)
    try:
        made = TRANSFORMS[name](**arguments)
    except Exception as error:  # torchvision checks as it likes
        raise UserError(f"{name} does not take these arguments: {error}") from error
    return _OnFloats(made) if name in _ON_FLOATS else made


def _argument(name: str, key: str, value: Any, default: Any) -> Any:
    if name in _OF_TRANSFORMS and key == "transforms":
        if not isinstance(value, list | tuple) or not value:
            raise UserError("expected a list of transforms")
        return [_transform_at(i, table) for i, table in enumerate(value)]
    kind = v2.InterpolationMode if key == "interpolation" else type(default)
    if issubclass(kind, Enum):
        try:
            return kind(value)
        except ValueError:
            known = [str(member.value) for member in kind]
            raise UserError(f"no {key} {value!r}", hint=did_you_mean(str(value), known, "there are")) from None
    return value


def _transform_at(place: int, table: Any) -> Any:
    if not isinstance(table, str | Mapping):
        raise UserError("expected a name or a table", key=(place,))
    try:
        return _transform(table)
    except UserError as error:
        raise error.under(place) from None
