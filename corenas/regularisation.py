"""What makes a training noisy: drop path, and how algorithms and trainings steer it together with dropout.

Layers that regularise are torch's kinds of dropout, hold one (`DropPath`), or are torch's own with a number `dropout`:
attention and recurrent layers. An algorithm that regularises one path alone turns them off for the others
(`unregularised`); what grows with a training has `set_progress`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from corenas.contracts import ProgressTracking


@contextmanager
def unregularised(model: nn.Module) -> Iterator[nn.Module]:
    """Turn dropout and drop path off for a while; batch norm stays in training.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    >>> with unregularised(model):
    ...     model[1].training, model.training
    (False, True)
    """
    active = [m for m in model.modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.training]
    by_number = [(m, m.dropout) for m in model.modules() if isinstance(m, nn.MultiheadAttention | nn.RNNBase)]
    for module in active:
        module.training = False
    for layer, _ in by_number:
        layer.dropout = 0.0
    try:
        yield model
    finally:
        for module in active:
            module.training = True
        for layer, dropout in by_number:
            layer.dropout = dropout


def tell_progress(model: nn.Module, share: float) -> None:
    """Tell modules that change with a training (`contracts.ProgressTracking`) which share of it is done, 0 to 1.

    A training calls this as each epoch begins; so does a loop of your own.
    """
    for module in model.modules():
        if isinstance(module, ProgressTracking):
            module.set_progress(share)


class DropPath(nn.Module):
    """Leaves out whole samples of a branch in training, and makes up for them in the others.

    Drop path (Larsson et al. 2017, arXiv:1605.07648), also called stochastic depth and drop connect.
    p: of a sample to be left out, in `drop.p`; axes: of a sample, 3 of a map, 2 of tokens
    scheduled: whether p grows from 0 with the training (Zoph et al. 2018, arXiv:1707.07012), as `set_progress` is told
    forward: (n, …) -> the same shape
    """

    def __init__(self, p: float, axes: int = 3, scheduled: bool = False) -> None:
        super().__init__()
        self.drop = nn.Dropout(p)
        self.axes, self.p, self.scheduled = axes, p, scheduled

    def set_progress(self, share: float) -> None:
        """Set the probability for the share of a training that is done."""
        if self.scheduled:
            self.drop.p = self.p * share

    def forward(self, x: Tensor) -> Tensor:
        """(n, …) -> the same shape."""
        return x * self.drop(torch.ones_like(x[(slice(None), *[slice(1)] * self.axes)]))
