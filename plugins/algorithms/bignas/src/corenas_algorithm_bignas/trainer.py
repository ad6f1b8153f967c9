"""A step of BigNAS."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from corenas.contracts import AlgorithmContext, Phase, Step, ZeroInitializing
from corenas.errors import UserError
from corenas.mutable import apply

if TYPE_CHECKING:
    from corenas_algorithm_bignas import BigNAS


def soft_cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross entropy of logits (n, classes) with the classes' probabilities that a teacher's logits give."""
    return F.cross_entropy(student, teacher.softmax(1))


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Dropout off for a while."""
    kind = nn.modules.dropout._DropoutNd
    active = [module for module in model.modules() if isinstance(module, kind) and module.training]
    for module in active:
        module.training = False
    try:
        yield
    finally:
        for module in active:
            module.training = True


class BigNASTrainer:
    """Trains the largest subnet on the labels, the others on its answers (section 3.1); one update for all."""

    def __init__(self, options: BigNAS, context: AlgorithmContext) -> None:
        self.supernet, self.task = context.supernet, context.task
        self.phases = [Phase(context.space, context.train)]
        self.largest = context.space.largest()
        if options.zero_init:  # section 3.2: initialisation
            for module in self.supernet.modules():
                if isinstance(module, ZeroInitializing):
                    module.zero_init_last()

    def train_step(self, batch: Any, step: Step) -> Mapping[str, Tensor]:
        """The largest first, since it teaches.

        Raises UserError if the mutator does not put it there, or if the task has no logits to distil.
        """
        if [*step.archs[:1]] != [self.largest]:
            raise UserError(
                "bignas needs the largest subnet first in each step",
                key=("mutator", "type"),
                hint='use mutator = "sandwich"',
            )
        figures = {}
        with apply(self.supernet, step.archs[0]):
            outputs = self.task.forward(self.supernet, batch)
            teacher = self.task.logits(outputs)
            if teacher is None:
                raise UserError("bignas needs a task whose outputs can be distilled", key=("task",))
            teacher = teacher.detach()
            figures["loss"] = step.backward(self.task.loss(outputs, batch))
        for arch in step.archs[1:]:
            with apply(self.supernet, arch), without_dropout(self.supernet):
                student = self.task.logits(self.task.forward(self.supernet, batch))
                assert student is not None
                figures["smallest"] = step.backward(soft_cross_entropy(student, teacher))
        return figures
