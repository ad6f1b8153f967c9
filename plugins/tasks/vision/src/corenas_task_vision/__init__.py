"""Tasks on images, classification first: their options, and where images come from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from attrs import field, frozen
from attrs.validators import ge, gt, le, lt, min_len, optional

from corenas.contracts import Headed, Surroundings
from corenas.errors import Fault, UserError, did_you_mean
from corenas.hookspecs import hookimpl
from corenas_task_vision.known import EMBEDDED, FOLDER, TORCHVISION, Known

if TYPE_CHECKING:
    import numpy as np

    from corenas_task_vision.others import LiveMultiLabel, LiveRegression
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
        splits root/train/class/*.jpg, root/valid/…, root/test/…), "csv" (a table of files and labels) or "torchvision"
        (one of its data sets)
    root: the folder; of torchvision's data sets the one that holds them; of a table's files, which are else beside it
    file: the CSV file; its first line names its columns
    image: its column of the images' files; left out, the first that names one
    label: its column of labels, or several of them; left out, all others
    split: its column that says "train", "valid" or "test"; without one images are cut off
    name: torchvision's class, "CIFAR10" for instance
    download: whether torchvision fetches what is not there
    valid: sub-folder of a folder with ready splits; left out, "valid" or "val" if it is there, else images are cut off
    test: the same for "test"; `test = "val"` for ImageNet, whose `val` is what papers report
    """

    type: Literal["mnist5k", "digits", "folder", "csv", "torchvision"]
    root: str | None = None
    file: str | None = None
    image: str | None = None
    label: str | tuple[str, ...] | None = None
    split: str | None = None
    name: str | None = None
    download: bool = False
    valid: str | None = None
    test: str | None = None

    def __attrs_post_init__(self) -> None:
        needed = {"folder": ("root",), "csv": ("file",), "torchvision": ("name", "root")}.get(self.type, ())
        taken = {
            "folder": ("root", "valid", "test"),
            "csv": ("root", "file", "image", "label", "split"),
            "torchvision": ("name", "root", "download"),
        }.get(self.type, ())
        faults = [Fault(f"required for {self.type!r}", (key,)) for key in needed if getattr(self, key) is None]
        for key in ("root", "file", "image", "label", "split", "name", "download", "valid", "test"):
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


Side = Annotated[int, "a whole number of at least 1", lambda side: side >= 1]
Bits = Annotated[int, "a whole number from 9 to 16", lambda bits: 9 <= bits <= 16]


@frozen
class Pictures:
    """What all tasks on images have in common."""

    data: Literal["mnist5k", "digits"] | Data
    valid: Amount = 0.1
    test: Amount = 0.2
    size: Side | tuple[Side, Side] | None = None
    crop: float | None = field(default=None, validator=optional([gt(0), le(1)]))
    channels: int | None = field(default=None, validator=optional(ge(1)))
    bits: Bits = 16
    max_pixels: int = field(default=178_956_970, validator=ge(1))
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    augment: tuple[str | Mapping[str, Any], ...] = field(default=(), hash=False)
    verify: Literal["all", "headers", "none"] | None = None
    skip_broken: bool = False
    upright: bool = False
    dropout: float = field(default=0.0, validator=[ge(0), lt(1)])

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
        if channels not in (1, 3) and self.source.type not in ("folder", "csv"):
            faults.append(Fault(f"{self.source.type!r} has 1 or 3 channels", ("channels",)))
        if faults:
            raise UserError(faults=faults)

    @property
    def source(self) -> Data:
        """`data` in its long form."""
        return Data(self.data) if isinstance(self.data, str) else self.data

    def idle(self, around: Surroundings) -> Mapping[str, str]:
        """Return options that do nothing with such data, and why."""
        idle = {}
        if self.source.type not in ("folder", "csv"):
            idle = dict.fromkeys(
                ("bits", "max_pixels", "verify", "skip_broken", "upright"), "this data is no image files"
            )
        elif self.verify == "none":
            idle["skip_broken"] = "no file is looked at"
        known = self.source.known.side
        if known is not None and _square(self.size or known) == _square(known) and not self.augment:
            idle["crop"] = "images have that size already"
        if isinstance(getattr(around.network, "backbone", None), Headed):
            idle |= dict.fromkeys(("dropout", "auxiliary"), "this network has a head of its own")
        return {name: reason for name, reason in idle.items() if hasattr(self, name)}

    def read_labels(self, rows: Sequence[Sequence[str]], columns: Sequence[str]) -> tuple[Any, Sequence[str]]:
        """What the columns of labels of a table mean, row by row, and the names of it. Raises UserError."""
        raise NotImplementedError


def _square(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


_COMMON = """data: "mnist5k", "digits", or a table for a folder, a table of labels or a data set of torchvision
    valid: images held out for validation, a number or a share of those to train on; not used where the data has its own
    test: images held out for the end; likewise
    size: side of the square that images are resized and cropped to, or [height, width]; left out, 224 for photos,
        small images of one size stay
    crop: share of the shorter side that is kept in resizing; left out, 0.875 for photos, all of small images
    channels: 1 for grey, 3 for colour, or those of multi-band TIFF and .npy files; left out, those of the data
    bits: how many bits are in use in files of 16 bits a pixel: 12 for many cameras and microscopes
    max_pixels: of an image that is decoded, so that no file takes all memory; JPEGs far larger than `size` are decoded
        at up to an eighth of their sides
    mean, std: of the pixels by channel, on a scale of 0 to 1; left out, those usual for the data
    augment: what is done to training images, before they are resized: names of torchvision.transforms.v2 or
        "Cutout", or tables with `type` and the arguments
    verify: how files are looked at before the first step: "all" decodes each, "headers" opens each, "none"; left out,
        "all" up to 20,000 images, "headers" up to 200,000
    skip_broken: whether images that cannot be read are left out; else they are told, all at once
    upright: whether photos are turned as their EXIF says; pretrained networks have mostly seen them as they lie
    dropout: share of the features that is dropped before the last layer"""
"""The options that all of them have, for the documentation of each."""


def _explained(cls: type) -> type:
    cls.__doc__ = (cls.__doc__ or "").replace("<common>", _COMMON)
    return cls


def _losses(instance: object, attribute: object, value: Any) -> None:
    if isinstance(value, tuple) and not all(0 <= weight < math.inf for weight in value):
        raise ValueError(f"expected finite weights of at least 0, found {[*value]}")


@_explained
@frozen
class Classification(Pictures):
    """Images of classes; measured by top-1 accuracy and, from six classes on, top-5.

    Validation and test images are cut off by class and seed where the data has no such split of its own.

    <common>
    classes: how many classes, for costs where the data is not here; else they are counted
    label_smoothing: share of the labels that is spread over all classes in the loss
    class_weights: what an image of each class is worth in the loss, in the order of the classes; "balanced" is the
        inverse of how many of it there are to train on
    focal: exponent gamma of the focal loss, which counts images less that are right already (Lin et al. 2017,
        arXiv:1708.02002); 0 is cross entropy
    mixup: alpha of the mixture of two images of a batch (Zhang et al. 2018, arXiv:1710.09412); 0 mixes none
    cutmix: alpha of the rectangle that one image of a batch has of another (Yun et al. 2019, arXiv:1905.04899); with
        `mixup` each batch has one of the two
    per_class: whether balanced accuracy and, of up to 100 classes, the accuracy of each are measured as well
    auxiliary: what the loss of a linear classifier on each of the features before the last is worth, in training alone
        (Szegedy et al. 2015, arXiv:1409.4842); 0 builds none
    """

    classes: int | None = field(default=None, validator=optional(ge(2)))
    label_smoothing: float = field(default=0.0, validator=[ge(0), le(1)])
    class_weights: Literal["balanced"] | tuple[float, ...] | None = field(default=None, validator=_losses)
    focal: float = field(default=0.0, validator=[ge(0), lt(math.inf)])
    mixup: float = field(default=0.0, validator=[ge(0), lt(math.inf)])
    cutmix: float = field(default=0.0, validator=[ge(0), lt(math.inf)])
    per_class: bool = False
    auxiliary: float = field(default=0.0, validator=[ge(0), lt(math.inf)])

    def start(self, rng: np.random.Generator, data: bool = True) -> LiveClassification:
        """Read the data and cut the splits. Raises UserError for data that is missing or broken."""
        from corenas_task_vision.task import LiveClassification

        return LiveClassification(self, rng, data)

    def read_labels(self, rows: Sequence[Sequence[str]], columns: Sequence[str]) -> tuple[Any, Sequence[str]]:
        """The number of each row's class, and the classes. Raises UserError for several columns."""
        if len(columns) > 1:
            hint = (
                f"name the one of the class: `label` is one of {', '.join(columns[:20])}; for several labels an image "
                'there is "multilabel"'
            )
            raise UserError(f"there are {len(columns)} columns of labels", key=("label",), hint=hint)
        names = sorted({row[0] for row in rows})
        if "" in names:
            number = [row[0] for row in rows].index("") + 1
            raise UserError(f"row {number} of the table has no label", key=("label",))
        if len(names) < 2:
            raise UserError(f"there is one class, {names[0]!r}; expected two or more", key=("label",))
        number = {name: i for i, name in enumerate(names)}
        return [number[row[0]] for row in rows], names


_YES_AND_NO = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}
"""What a label that is there or not is written as, in small letters."""


@_explained
@frozen
class MultiLabel(Pictures):
    """Images with any number of labels each, from a table; measured by mean average precision and F1.

    The table has a column for each label, of 0 and 1, or one column of names between separators.

    <common>
    separator: between the names of a column
    labels: how many labels, for costs where the data is not here
    positive_weight: what a label that is there is worth in the loss beside one that is not
    """

    separator: str = field(default="|", validator=min_len(1))
    labels: int | None = field(default=None, validator=optional(ge(1)))
    positive_weight: float = field(default=1.0, validator=[gt(0), lt(math.inf)])

    def start(self, rng: np.random.Generator, data: bool = True) -> LiveMultiLabel:
        """Read the data and cut the splits. Raises UserError for data that is missing or broken."""
        from corenas_task_vision.others import LiveMultiLabel

        return LiveMultiLabel(self, rng, data)

    def read_labels(self, rows: Sequence[Sequence[str]], columns: Sequence[str]) -> tuple[Any, Sequence[str]]:
        """The labels of each row as zeros and ones, and their names. Raises UserError for what are none."""
        import numpy as np

        if len(columns) == 1:
            sets = [{name.strip() for name in row[0].split(self.separator)} - {""} for row in rows]
            names = sorted(set().union(*sets))
            if not names:
                raise UserError("no image has a label", key=("label",))
            return np.array([[name in own for name in names] for own in sets], np.float32), names
        wrong = [cell for row in rows for cell in row if cell.lower() not in _YES_AND_NO]
        if wrong:
            raise UserError(f"expected 0 and 1 in columns of labels, found {wrong[0]!r}", key=("label",))
        return np.array([[_YES_AND_NO[cell.lower()] for cell in row] for row in rows], np.float32), columns


@_explained
@frozen
class Regression(Pictures):
    """Images with numbers, from a table; measured by the mean absolute error, its square's root, and R2.

    Numbers are learnt with the mean 0 and the deviation 1 that they have in training, and measured as they are.

    <common>
    targets: how many numbers an image has, for costs where the data is not here
    loss: "mse", the mean squared error, "mae", the absolute, or "huber"
    """

    targets: int | None = field(default=None, validator=optional(ge(1)))
    loss: Literal["mse", "mae", "huber"] = "mse"

    def start(self, rng: np.random.Generator, data: bool = True) -> LiveRegression:
        """Read the data and cut the splits. Raises UserError for data that is missing or broken."""
        from corenas_task_vision.others import LiveRegression

        return LiveRegression(self, rng, data)

    def read_labels(self, rows: Sequence[Sequence[str]], columns: Sequence[str]) -> tuple[Any, Sequence[str]]:
        """The numbers of each row, and their names. Raises UserError for what are none."""
        import numpy as np

        try:
            numbers = np.array([[float(cell) for cell in row] for row in rows])
        except ValueError as error:
            raise UserError(f"expected numbers in columns of labels: {error}", key=("label",)) from None
        if not np.isfinite(numbers).all() or np.abs(numbers).max() > 1e30:
            raise UserError("expected finite numbers, up to 1e30, in columns of labels", key=("label",))
        return numbers, columns


@hookimpl
def corenas_tasks() -> dict[str, type]:
    """The tasks "classification", "multilabel" and "regression"."""
    return {"classification": Classification, "multilabel": MultiLabel, "regression": Regression}
