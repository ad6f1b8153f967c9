"""Image classification: its options, and where images come from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from attrs import field, frozen
from attrs.validators import ge, gt, le, lt, optional

from corenas.errors import Fault, UserError, did_you_mean
from corenas.hookspecs import hookimpl
from corenas_task_vision.known import EMBEDDED, FOLDER, TORCHVISION, Known

if TYPE_CHECKING:
    import numpy as np

    from corenas_task_vision.task import LiveClassification

Amount = Annotated[
    int | float,
    "a number of images, or a share between 0 and 1",
    lambda amount: amount >= 1 if isinstance(amount, int) else 0 < amount < 1,
]


@frozen
class Data:
    """Where images come from.

    type: "mnist5k" (5,000 images of MNIST), "digits" (1,797 of 8x8 pixels), "folder" (root/class/*.jpg, or with ready
        splits root/train/class/*.jpg, root/valid/…, root/test/…) or "torchvision" (one of its data sets)
    root: the folder; of torchvision's data sets the one that holds them
    name: torchvision's class, "CIFAR10" for instance
    download: whether torchvision fetches what is not there
    valid: sub-folder of a folder with ready splits; left out, "valid" or "val" if it is there, else images are cut off
    test: the same for "test"; `test = "val"` for ImageNet, whose `val` is what papers report
    """

    type: Literal["mnist5k", "digits", "folder", "torchvision"]
    root: str | None = None
    name: str | None = None
    download: bool = False
    valid: str | None = None
    test: str | None = None

    def __attrs_post_init__(self) -> None:
        needed = {"folder": ("root",), "torchvision": ("name", "root")}.get(self.type, ())
        taken = {"folder": ("root", "valid", "test"), "torchvision": ("name", "root", "download")}.get(self.type, ())
        faults = [Fault(f"required for {self.type!r}", (key,)) for key in needed if getattr(self, key) is None]
        for key in ("root", "name", "download", "valid", "test"):
            if getattr(self, key) not in (None, False) and key not in taken:
                faults.append(Fault(f"{self.type!r} has no such option", (key,), hint="leave it out"))
        if self.type == "torchvision" and self.name is not None and self.name not in TORCHVISION:
            hint = did_you_mean(self.name, TORCHVISION, "data sets of torchvision that can be read")
            faults.append(Fault(f"no data set {self.name!r} of torchvision", ("name",), hint=hint))
        if faults:
            raise UserError(faults=faults)

    @property
    def known(self) -> Known:
        """What is known without reading it."""
        return EMBEDDED.get(self.type) or TORCHVISION.get(self.name or "", FOLDER)


@frozen
class Classification:
    """Images of classes; measured by top-1 accuracy and, from six classes on, top-5.

    Validation and test images are cut off by class and seed where the data has no such split of its own.

    data: "mnist5k", "digits", or a table for a folder or a data set of torchvision
    valid: images held out for validation, a number or a share of those to train on; not used where the data has its own
    test: images held out for the end; likewise
    size: side of the square that images are resized and cropped to; left out, 224 for photos, small images stay
    crop: share of the shorter side that is kept in resizing; left out, 0.875 for photos, all of small images
    channels: 1 for grey, 3 for colour; left out, those of the data
    classes: how many classes, for costs where the data is not here; else they are counted
    mean, std: of the pixels by channel, on a scale of 0 to 1; left out, those usual for the data
    augment: what is done to training images, before they are resized: names of torchvision.transforms.v2 or
        "Cutout", or tables with `type` and the arguments
    label_smoothing: share of the labels that is spread over all classes in the loss
    dropout: share of the features that is dropped before the classifier
    auxiliary: what the loss of a linear classifier on each of the features before the last is worth, in training alone
        (Szegedy et al. 2015, arXiv:1409.4842); 0 builds none
    """

    data: Literal["mnist5k", "digits"] | Data
    valid: Amount = 0.1
    test: Amount = 0.2
    size: int | None = field(default=None, validator=optional(ge(1)))
    crop: float | None = field(default=None, validator=optional([gt(0), le(1)]))
    channels: Literal[1, 3] | None = None
    classes: int | None = field(default=None, validator=optional(ge(2)))
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    augment: tuple[str | Mapping[str, Any], ...] = field(default=(), hash=False)
    label_smoothing: float = field(default=0.0, validator=[ge(0), le(1)])
    dropout: float = field(default=0.0, validator=[ge(0), lt(1)])
    auxiliary: float = field(default=0.0, validator=[ge(0), lt(math.inf)])

    def __attrs_post_init__(self) -> None:
        channels = self.channels or self.source.known.channels
        faults = []
        for name in ("mean", "std"):
            numbers = getattr(self, name)
            if numbers is None:
                continue
            if len(numbers) not in (1, channels):
                expected = "one number" if channels == 1 else f"1 or {channels} numbers"
                faults.append(Fault(f"expected {expected}, found {len(numbers)}", (name,)))
            elif not all(math.isfinite(number) and (number > 0 or name == "mean") for number in numbers):
                expected = "finite numbers" if name == "mean" else "finite numbers above 0"
                faults.append(Fault(f"expected {expected}, found {[*numbers]}", (name,)))
        if faults:
            raise UserError(faults=faults)

    @property
    def source(self) -> Data:
        """`data` in its long form."""
        return Data(self.data) if isinstance(self.data, str) else self.data

    def start(self, rng: np.random.Generator, data: bool = True) -> LiveClassification:
        """Read the data and cut the splits. Raises UserError for data that is missing or broken."""
        from corenas_task_vision.task import LiveClassification

        return LiveClassification(self, rng, data)


@hookimpl
def corenas_tasks() -> dict[str, type]:
    """The task "classification"."""
    return {"classification": Classification}
