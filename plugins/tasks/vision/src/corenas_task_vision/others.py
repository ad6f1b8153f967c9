"""What else is learnt from images, live: several labels each, or numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from attrs import evolve
from torch import Tensor

from corenas.contracts import Metric
from corenas.errors import UserError
from corenas.value import Dimension
from corenas_task_vision.task import Head, LiveImages

if TYPE_CHECKING:
    from corenas_task_vision import MultiLabel, Regression


class _Kept:
    """Keeps outputs and labels of all batches."""

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []
        self.labels: list[Tensor] = []

    def update(self, outputs: Tensor, batch: Any) -> None:
        """Take in a batch: (n, k) outputs and (images, labels (n, k))."""
        self.outputs.append(outputs.detach().cpu())
        self.labels.append(batch[1].cpu())

    def all(self) -> tuple[np.ndarray, np.ndarray]:
        """Outputs and labels, (n, k) each, in double precision."""
        if not self.outputs:
            return np.zeros((0, 1)), np.zeros((0, 1))
        return torch.cat(self.outputs).double().numpy(), torch.cat(self.labels).double().numpy()


class Precisions(_Kept):
    """Mean average precision over labels, and F1 over all labels of all images (micro) at a probability of a half."""

    def compute(self) -> dict[str, float]:
        """Both in percent; labels that no image has count for nothing."""
        from sklearn.metrics import average_precision_score

        scores, labels = self.all()
        if not np.isfinite(scores).all():
            return {"map": 0.0, "f1": 0.0}
        there = [k for k in range(labels.shape[1]) if labels[:, k].any()]
        precisions = [average_precision_score(labels[:, k], scores[:, k]) for k in there]
        right = ((scores > 0) & (labels > 0.5)).sum()
        told = (scores > 0).sum() + (labels > 0.5).sum()
        nothing = float("nan")
        return {
            "map": 100 * float(np.mean(precisions)) if precisions else nothing,
            "f1": 100 * float(2 * right / told) if told else nothing,
        }


class LiveMultiLabel(LiveImages):
    """Images with any number of labels each."""

    metrics: Mapping[str, Metric] = {"map": Metric("%", "max"), "f1": Metric("%", "max")}

    def __init__(self, options: MultiLabel, rng: np.random.Generator, data: bool) -> None:
        super().__init__(options, rng, data)
        self.options = options
        self.count = _count(options, "labels", self._splits)
        self.preprocessing = {**self.preprocessing, "labels": [*self.names] or self.count, "outputs": "logits"}

    def head(self, feat_dims: Sequence[Dimension]) -> Head:
        """A linear layer with an output for each label."""
        return Head(feat_dims[-1], self.count, self.options.dropout)

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """Binary cross entropy over all labels."""
        weight = torch.full((self.count,), self.options.positive_weight, device=outputs.device, dtype=outputs.dtype)
        return F.binary_cross_entropy_with_logits(outputs, batch[1].to(outputs), pos_weight=weight)

    def logits(self, outputs: Tensor) -> Tensor:
        """Of each label of each image (there, not there): (n * labels, 2), whose softmax is the label's sigmoid."""
        there = outputs.flatten()
        return torch.stack([there, torch.zeros_like(there)], 1)

    def meter(self) -> Precisions:
        """A new one."""
        return Precisions()


class Errors(_Kept):
    """Mean absolute error, root of the mean squared error, and the share of the variance that is explained."""

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.mean, self.std = mean.numpy(), std.numpy()

    def compute(self) -> dict[str, float]:
        """Of numbers as they are in the table; R2 is the mean over targets."""
        outputs, labels = self.all()
        if not len(labels):
            return dict.fromkeys(("mae", "rmse", "r2"), float("nan"))
        off, labels = (outputs - labels) * self.std, labels * self.std + self.mean
        spread = np.maximum(((labels - labels.mean(0)) ** 2).mean(0), 1e-12)
        return {
            "mae": float(np.abs(off).mean()),
            "rmse": float(np.sqrt((off**2).mean())),
            "r2": float((1 - (off**2).mean(0) / spread).mean()),
        }


_LOSSES = {"mse": F.mse_loss, "mae": F.l1_loss, "huber": F.huber_loss}


class LiveRegression(LiveImages):
    """Images with numbers."""

    metrics: Mapping[str, Metric] = {"mae": Metric("", "min"), "rmse": Metric("", "min"), "r2": Metric("", "max")}

    def __init__(self, options: Regression, rng: np.random.Generator, data: bool) -> None:
        super().__init__(options, rng, data)
        self.options = options
        self.count = _count(options, "targets", self._splits)
        numbers = self._splits["train"].labels if self._splits else np.zeros((1, self.count))
        mean, std = numbers.mean(0), numbers.std(0)
        same = [name for name, spread, size in zip(self.names, std, abs(mean), strict=False) if spread <= 1e-12 * size]
        if same and self._splits:
            self.notes.append(f"{', '.join(same)} is the same number for all images to train on")
        self.mean, self.std = torch.from_numpy(mean), torch.from_numpy(np.where(std > 1e-12 * abs(mean), std, 1.0))
        # Single precision has room for what numbers differ by, not for all digits of a date.
        self._splits = {
            name: evolve(split, labels=((split.labels - mean) / self.std.numpy()).astype(np.float32))
            for name, split in self._splits.items()
        }
        self.preprocessing = {
            **self.preprocessing,
            "targets": [*self.names] or self.count,
            "outputs": "(target - target_mean) / target_std",
            "target_mean": self.mean.tolist(),
            "target_std": self.std.tolist(),
        }

    def head(self, feat_dims: Sequence[Dimension]) -> Head:
        """A linear layer with an output for each number."""
        return Head(feat_dims[-1], self.count, self.options.dropout)

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """What the options say, of numbers with the mean 0 and the deviation 1, as batches have them."""
        return _LOSSES[self.options.loss](outputs, batch[1].to(outputs))

    def logits(self, outputs: Tensor) -> None:
        """None: numbers are of no distribution."""

    def meter(self) -> Errors:
        """A new one."""
        return Errors(self.mean, self.std)


def _count(options: Any, key: str, splits: Mapping[str, Any]) -> int:
    """Return how many outputs there are. Raises UserError where that is not known, or said otherwise."""
    said = getattr(options, key)
    if not splits:
        if said is None:
            hint = f"say how many there will be: {key} = 3"
            raise UserError(f"the number of {key} is not known without the data", key=(key,), hint=hint)
        return said
    labels = splits["train"].labels
    if labels.ndim != 2:
        hint = 'data = { type = "csv", file = "labels.csv" }'
        raise UserError("this data has classes; a table of labels is needed", key=("data",), hint=hint)
    if said not in (None, labels.shape[1]):
        raise UserError(f"there are {labels.shape[1]} {key}", key=(key,), hint=f"leave `{key}` out")
    return labels.shape[1]
