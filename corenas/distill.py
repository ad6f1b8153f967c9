"""What a student and a teacher show of themselves, for a distiller to compare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attrs import frozen
from torch import Tensor, nn

from corenas.contracts import LiveTask


@frozen
class Signals:
    """One forward of a model.

    outputs: as the task's `loss` takes them
    logits: (n, classes), or None where the task has none
    features: the outputs of the tapped segments
    """

    outputs: Any
    logits: Tensor | None
    features: Sequence[Tensor] = ()


def observe(model: nn.Module, task: LiveTask, batch: Any, taps: Sequence[int] = ()) -> Signals:
    """Run a supernet on a batch and keep what its tapped segments give (`LiveDistiller.taps`).

    Raises IndexError for a tap beyond the segments that its backbone has.
    """
    segments = getattr(getattr(model, "backbone", model), "segments", ())
    features: dict[int, Tensor] = {}
    hooks = [
        segments[tap].register_forward_hook(lambda module, args, output, tap=tap: features.__setitem__(tap, output))
        for tap in taps
    ]
    try:
        outputs = task.forward(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return Signals(outputs, task.logits(outputs), [features[tap] for tap in taps])
