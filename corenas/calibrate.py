"""What a subnet is worth: its batch-norm statistics recomputed on training images, then measured on others."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from corenas import loading
from corenas.contracts import LiveTask
from corenas.mutable import apply
from corenas.settings import Calibration
from corenas.space import Arch

_Norm = nn.modules.batchnorm._BatchNorm


def _norms(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, _Norm) and module.running_mean is not None]


@contextmanager
def statistics_kept(model: nn.Module) -> Iterator[None]:
    """Whatever happens inside, batch-norm statistics and training modes are as before in the end."""
    buffers = [buffer for norm in _norms(model) for buffer in norm.buffers(recurse=False)]
    kept = [buffer.clone() for buffer in buffers]
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for buffer, old in zip(buffers, kept, strict=True):
            buffer.copy_(old)
        for module, mode in modes:
            module.training = mode


@torch.no_grad()
def recalibrate(model: nn.Module, task: LiveTask, batches: Iterable[Any]) -> None:
    """Recompute the batch-norm statistics of the arch in force (Yu et al. 2019, arXiv:1903.05134, section 3.1).

    Each layer's mean and variance become the averages of the batches' means and biased variances, weighted by their
    sizes, while later layers see images normalised by the batch, as in Once-for-All's code. Leaves the model in
    evaluation mode. Without batches the statistics stay.
    """
    model.eval()
    norms = _norms(model)
    sums: dict[nn.Module, tuple[int, Tensor, Tensor]] = {}
    counts: dict[nn.Module, tuple[int, int]] = {}

    def count(module: nn.Module, args: tuple[Tensor]) -> None:
        counts[module] = (args[0].shape[0], args[0].numel() // args[0].shape[1])

    momenta = [(norm, norm.momentum) for norm in norms]
    hooks = [norm.register_forward_pre_hook(count) for norm in norms]
    try:
        for norm in norms:
            norm.training, norm.momentum = True, 1.0  # running statistics are then those of the last batch
        for batch in batches:
            counts.clear()
            task.forward(model, batch)
            for norm in counts:
                samples, n = counts[norm]
                mean, var = norm.running_mean, norm.running_var * ((n - 1) / n)  # type: ignore[operator]
                total, means, variances = sums.get(norm, (0, torch.zeros_like(mean), torch.zeros_like(var)))  # type: ignore[arg-type]
                sums[norm] = total + samples, means + samples * mean, variances + samples * var  # type: ignore[operator]
        for norm, (total, means, variances) in sums.items():
            norm.running_mean.copy_(means / total)  # type: ignore[operator, union-attr]
            norm.running_var.copy_(variances / total)  # type: ignore[operator, union-attr]
    finally:
        for hook in hooks:
            hook.remove()
        for norm, momentum in momenta:
            norm.training, norm.momentum = False, momentum


@torch.no_grad()
def measure(model: nn.Module, task: LiveTask, batches: Iterable[Any]) -> dict[str, float]:
    """A model's metrics over batches, in evaluation mode."""
    meter = task.meter()
    for batch in batches:
        meter.update(task.forward(model, batch), batch)
    return dict(meter.compute())


class Evaluation:
    """Measures subnets of a supernet; every arch sees the same calibration and validation images.

    Nothing of it stays in the supernet: its statistics and modes are put back.
    """

    def __init__(
        self,
        supernet: nn.Module,
        task: LiveTask,
        calibration: Calibration,
        device: torch.device,
        seed: int = 0,
        batch_size: int = 256,
        workers: int = 0,
    ) -> None:
        self.supernet, self.task, self.calibration, self.device = supernet, task, calibration, device
        self.seed, self.batch_size, self.workers = seed, batch_size, workers
        self._splits: dict[tuple[str, int], loading.Batches] = {}
        self._images: loading.Batches | None = None

    @property
    def images(self) -> Iterable[Any]:
        """The batches that statistics are computed on."""
        c = self.calibration
        if self._images is None and c.batches:
            augmented = c.pipeline == "train"
            self._images = loading.Batches(
                self.task, c.data, c.batch_size, self.device, augmented, self.seed, c.batches, self.workers
            )
        return self._images or []

    def split(self, name: str, share: float = 1.0) -> loading.Batches:
        """The batches of a split: all in order, or of a share of it, always the same, some at random."""
        limit = 0 if share == 1 else math.ceil(share * self.task.splits[name] / self.batch_size)
        if (name, limit) not in self._splits:
            self._splits[name, limit] = loading.Batches(
                self.task, name, self.batch_size, self.device, seed=self.seed, limit=limit, workers=self.workers
            )
        return self._splits[name, limit]

    @contextmanager
    def calibrated(self, arch: Arch) -> Iterator[nn.Module]:
        """The supernet under an arch with its statistics recomputed, in evaluation mode, for a while."""
        with apply(self.supernet, arch), statistics_kept(self.supernet):
            recalibrate(self.supernet, self.task, self.images)
            yield self.supernet

    def __call__(self, arch: Arch, split: str = "valid", share: float = 1.0) -> Mapping[str, float]:
        """An arch's metrics on a split, or on a share of it."""
        with self.calibrated(arch) as model:
            return measure(model, self.task, self.split(split, share))
