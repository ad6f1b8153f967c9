"""What a subnet is worth: its batch-norm statistics recomputed on training images, then measured on others."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import numpy as np
import torch
from attrs import field, frozen
from torch import Tensor, nn

from corenas import loading
from corenas.contracts import Itemised, LiveTask, Meter, Rival, RunningStatistics, Stopped
from corenas.errors import UserError
from corenas.mutable import apply
from corenas.racing import evidence
from corenas.settings import Calibration
from corenas.sharing import LeadingSegments, digest
from corenas.space import Arch

_MOST_FINISHED = 64
"""Of how many archs the scores of all images are kept, the latest ones."""
_Norm = nn.modules.batchnorm._BatchNorm


def _norms(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, _Norm) and module.running_mean is not None]


def _statistics(norm: Any) -> tuple[Tensor, Tensor]:
    """Return the running mean and variance of a norm's features in force."""
    return norm.statistics() if isinstance(norm, RunningStatistics) else (norm.running_mean, norm.running_var)


def _set_statistics(norm: Any, mean: Tensor, var: Tensor) -> None:
    if isinstance(norm, RunningStatistics):
        norm.set_statistics(mean, var)
    else:
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)


def statistics_settled(model: nn.Module, batches: int) -> bool:
    """Return whether less than a hundredth of what batch norms began with is left after so many training batches."""
    momenta = [norm.momentum for norm in _norms(model)]
    return all(momentum is None or (1 - momentum) ** batches < 0.01 for momentum in momenta)


@contextmanager
def statistics_kept(model: nn.Module) -> Iterator[None]:
    """Put batch-norm statistics and training modes back in the end, whatever happens inside."""
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
def recalibrate(model: nn.Module, task: LiveTask | Callable[[nn.Module, Any], Any], batches: Iterable[Any]) -> None:
    """Recompute the batch-norm statistics of the arch in force (Yu et al. 2019, arXiv:1903.05134, section 3.1).

    Each layer's mean and variance become the averages of the batches' means and biased variances, weighted by their
    sizes, while later layers see images normalised by the batch, as in Once-for-All's code. Leaves the model in
    evaluation mode. Without batches the statistics stay.

    task: what gives a model a batch, by its `forward`; or such a function, called with model and batch

    >>> import torch
    >>> from corenas import recalibrate
    >>> norm, images = torch.nn.BatchNorm2d(1), torch.ones(4, 1, 8, 8)
    >>> recalibrate(norm, lambda model, batch: model(batch), [images, 3 * images])
    >>> norm.running_mean, norm.running_var
    (tensor([2.]), tensor([0.]))
    """
    given = cast(Any, task)
    forward = getattr(given, "forward", given)
    sums: dict[Any, tuple[int, Any, Any]] = {}
    norms = _norms(model)
    # Of what stores more than the features in force, those that a batch does not change are not in force.
    before = {norm: None if isinstance(norm, RunningStatistics) else norm.running_var.clone() for norm in norms}

    def add(norm: Any, args: tuple[Tensor], _: Tensor) -> None:
        samples, n = args[0].shape[0], args[0].numel() // args[0].shape[1]
        count, means, variances = sums.get(norm, (0, 0.0, 0.0))
        old = before[norm]
        mean, var = norm.statistics() if old is None else (norm.running_mean, norm.running_var)
        biased = var * ((n - 1) / n)
        if old is not None:
            biased = torch.where(var == old, var, biased)
        sums[norm] = count + samples, means + samples * mean, variances + samples * biased

    model.eval()
    with ExitStack() as after:
        for norm in norms:
            after.callback(norm.register_forward_hook(add).remove)
            after.callback(setattr, norm, "momentum", norm.momentum)
            after.callback(setattr, norm, "training", False)
            norm.training, norm.momentum = True, 1.0  # running statistics are then those of the last batch
        for batch in batches:
            forward(model, batch)
    for norm, (count, means, variances) in sums.items():
        _set_statistics(norm, means / count, variances / count)


@torch.no_grad()
def evaluate(
    model: nn.Module, task: LiveTask, batches: Iterable[Any], enough: Callable[[Meter], bool] = lambda meter: False
) -> dict[str, float]:
    """Return a model's metrics over batches, up to where it is enough. It is in evaluation mode already."""
    meter = task.meter()
    for batch in batches:
        meter.update(task.forward(model, batch), batch)
        if enough(meter):
            break
    return dict(meter.compute())


@frozen(eq=False)
class Evaluation:
    """Measures subnets of a supernet; every arch sees the same calibration and validation images.

    Nothing of it stays in the supernet: its statistics and modes are put back.

    shared: bytes in which outputs of leading segments (`contracts.Segmented`) are kept for archs that agree on them;
        0 computes all of them for each arch. Figures are the same to the last bit
    """

    supernet: nn.Module
    task: LiveTask
    calibration: Calibration
    device: torch.device
    seed: int = 0
    batch_size: int = 256
    workers: int = 0
    shared: int = 1 << 30
    _leading: dict[int, LeadingSegments] = field(factory=dict, init=False)
    _finished: dict[Hashable, np.ndarray] = field(factory=dict, init=False)
    _made: dict[tuple[str, int, int, bool], loading.Batches] = field(factory=dict, init=False)

    @property
    def images(self) -> Iterable[Any]:
        """Return the batches that statistics are computed on."""
        c = self.calibration
        if not c.batches:
            return []
        limit = min(c.batches * c.batch_size, self.task.splits[c.data])
        last_has_one_image = limit > 1 and limit % c.batch_size == 1
        if last_has_one_image:  # it may have one value of a channel, and no variance
            limit -= 1
        return self._batches(c.data, c.batch_size, limit, c.pipeline == "train")

    def split(self, name: str, share: float = 1.0) -> loading.Batches:
        """Return the batches of a split: all in order, or of a share of it, always the same, some at random."""
        limit = 0 if share == 1 else math.ceil(share * self.task.splits[name])
        return self._batches(name, self.batch_size, limit, False)

    def _batches(self, split: str, batch_size: int, limit: int, augmented: bool) -> loading.Batches:
        key = split, batch_size, limit, augmented
        if key not in self._made:
            self._made[key] = loading.Batches(
                self.task, split, batch_size, self.device, augmented, self.seed, limit, self.workers
            )
        return self._made[key]

    @contextmanager
    def calibrated(self, arch: Arch) -> Iterator[nn.Module]:
        """Give the supernet under an arch with its statistics recomputed, in evaluation mode, for a while."""
        with apply(self.supernet, arch), statistics_kept(self.supernet):
            recalibrate(self.supernet, self.task, self.images)
            yield self.supernet

    def __call__(self, arch: Arch, split: str = "valid", share: float = 1.0) -> Mapping[str, float]:
        """Return an arch's metrics on a split, or on a share of it."""
        return self._measured(arch, (split, share), self.split(split, share))

    def raced(
        self, arch: Arch, rival: Rival, split: str = "valid", share: float = 1.0
    ) -> Mapping[str, float] | Stopped:
        """Return the same, images in an order at random, or that it was stopped since it will have lost in the end.

        Raises UserError where the task's meter does not tell the scores of images apart.
        """
        now = digest(self.supernet.modules())
        theirs = None
        if rival.arch is not None:
            theirs = self._finished.get((now, rival.arch, rival.metric, split, share))
            if theirs is None:  # another process has measured it, or a run that was killed
                theirs, _ = self._race(rival.arch, rival.metric, split, share)
        own, metrics = self._race(arch, rival.metric, split, share, theirs, rival.error)
        size = len(own) if theirs is None else len(theirs)
        if len(own) < size:
            return Stopped(f"it has lost after {len(own)} of {size} images", {"images": len(own)})
        self._finished[now, arch, rival.metric, split, share] = own
        while len(self._finished) > _MOST_FINISHED:
            del self._finished[next(iter(self._finished))]
        return metrics

    def _race(
        self, arch: Arch, metric: str, split: str, share: float, theirs: np.ndarray | None = None, error: float = 0.0
    ) -> tuple[np.ndarray, Mapping[str, float]]:
        """Return an arch's scores and metrics over the images up to where it has lost against others' scores."""
        own = np.empty(0)

        def lost(meter: Meter) -> bool:
            nonlocal own
            scores = meter.scores(metric) if isinstance(meter, Itemised) else None
            if scores is None:
                text = f"{metric} cannot be raced by: this task does not tell what each image adds to it"
                raise UserError(text, key=("search", "racing"), hint="leave it out")
            own = scores.double().cpu().numpy()
            if theirs is None:
                return False
            return evidence(own - theirs[: len(own)], len(theirs))[-1] >= -math.log(error)

        size = math.ceil(share * self.task.splits[split])
        batches = self._batches(split, self.batch_size, size, False)
        metrics = self._measured(arch, (split, share, "raced"), batches, lost)
        return own, metrics

    def _measured(
        self,
        arch: Arch,
        what: Hashable,
        batches: loading.Batches,
        enough: Callable[[Meter], bool] = lambda meter: False,
    ) -> dict[str, float]:
        leading = self._leading_segments()
        if leading is not None:
            return self._after_what_is_known(leading, arch, what, batches, enough)
        with self.calibrated(arch) as model:
            return evaluate(model, self.task, batches, enough)

    def _leading_segments(self) -> LeadingSegments | None:
        """Return what is known of the supernet as it is now; None where nothing can be shared."""
        modules = [*self.supernet.modules()]
        hooked = any(module._forward_hooks or module._forward_pre_hooks for module in modules)
        if not self.shared or hooked or torch.is_inference_mode_enabled():  # who would see calls that are left out
            return None
        now = digest(modules)
        if now not in self._leading:
            self._leading.clear()
            self._leading[now] = LeadingSegments(self.supernet, self.shared)
        return self._leading[now] if self._leading[now].possible else None

    def _after_what_is_known(
        self,
        leading: LeadingSegments,
        arch: Arch,
        what: Hashable,
        batches: loading.Batches,
        enough: Callable[[Meter], bool],
    ) -> dict[str, float]:
        """Return the same without running the leading segments whose outputs are known."""
        model, images = self.supernet, [*self.images]

        known = leading.known(arch, "calibration") or ()
        statistics: dict[nn.Module, list[tuple[Any, Tensor, Tensor]]] = {}  # of the norms of each segment that ran

        def after_calibration(segments: Sequence[nn.Module]) -> list[list[tuple[Any, Tensor, Tensor]]]:
            for segment in segments[len(known) :]:
                if segment not in statistics:
                    found = [(norm, *_statistics(norm)) for norm in _norms(segment)]
                    statistics[segment] = [(norm, mean.clone(), var.clone()) for norm, mean, var in found]
            return [*known, *(statistics[segment] for segment in segments[len(known) :])]

        with apply(model, arch), statistics_kept(model), torch.no_grad():
            for norm, mean, var in itertools.chain(*known):
                _set_statistics(norm, mean, var)
            with leading.reused(arch, "calibration", len(images), after_calibration):
                recalibrate(model, self.task, images)
            with leading.reused(arch, what, len(batches), lambda segments: None):
                return evaluate(model, self.task, batches, enough)
