"""What is known of data sets before they are read: shape, classes, pixels, and how their splits are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import field, frozen

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@frozen
class Known:
    """A data set.

    channels: 1 or 3
    side: of its square images; None where they are photos of all sizes
    classes: how many; None where only the data says
    mean, std: of training pixels by channel, on a scale of 0 to 1
    splits: split -> the arguments that torchvision's class takes for it; what is missing is cut out of "train"
    """

    channels: int
    side: int | None
    classes: int | None
    mean: tuple[float, ...] = IMAGENET[0]
    std: tuple[float, ...] = IMAGENET[1]
    splits: Mapping[str, Mapping[str, Any]] = field(factory=dict)


_FLAG = {"train": {"train": True}, "test": {"train": False}}
_TWO = {"train": {"split": "train"}, "test": {"split": "test"}}
_THREE = {**_TWO, "valid": {"split": "val"}}
# Papers report the labelled `val` of these: it is the test split here, and validation is cut out of train.
_VAL_IS_TEST = {"train": {"split": "train"}, "test": {"split": "val"}}

EMBEDDED = {
    "mnist5k": Known(1, 28, 10, (0.1307,), (0.3081,)),  # of MNIST's 60,000 training images
    "digits": Known(1, 8, 10, (0.3053,), (0.3759,)),
}
"""Data that comes with a Python package."""

FOLDER = Known(3, None, None)

TORCHVISION = {
    "CIFAR10": Known(3, 32, 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), _FLAG),
    "CIFAR100": Known(3, 32, 100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), _FLAG),
    "Country211": Known(3, None, 211, splits={**_TWO, "valid": {"split": "valid"}}),
    "DTD": Known(3, None, 47, splits=_THREE),
    "EuroSAT": Known(3, 64, 10, splits={"train": {}}),
    "FGVCAircraft": Known(3, None, 100, splits=_THREE),
    "FashionMNIST": Known(1, 28, 10, (0.2860,), (0.3530,), _FLAG),
    "Flowers102": Known(3, None, 102, splits=_THREE),
    "Food101": Known(3, None, 101, splits=_TWO),
    "GTSRB": Known(3, None, 43, splits=_TWO),
    "ImageNet": Known(3, None, 1000, splits=_VAL_IS_TEST),
    "Imagenette": Known(3, None, 10, splits=_VAL_IS_TEST),
    "KMNIST": Known(1, 28, 10, (0.1918,), (0.3483,), _FLAG),
    "MNIST": Known(1, 28, 10, (0.1307,), (0.3081,), _FLAG),
    "OxfordIIITPet": Known(3, None, 37, splits={**_TWO, "train": {"split": "trainval"}}),
    "RenderedSST2": Known(3, 448, 2, splits=_THREE),
    "STL10": Known(3, 96, 10, (0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713), _TWO),
    "SUN397": Known(3, None, 397, splits={"train": {}}),
    "SVHN": Known(3, 32, 10, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970), _TWO),
    "StanfordCars": Known(3, None, 196, splits=_TWO),
    "USPS": Known(1, 16, 10, (0.2469,), (0.2989,), _FLAG),
}
"""Classes of torchvision.datasets that this task reads."""
