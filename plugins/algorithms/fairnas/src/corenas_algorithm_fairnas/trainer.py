"""A step of FairNAS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from corenas.contracts import AlgorithmContext, Phase, Step
from corenas.errors import UserError
from corenas.mutable import apply
from corenas.space import Arch, SearchSpace
from corenas.teaching import lesson


class FairNASTrainer:
    """Trains the m paths of a step on one batch, with one update for all of them (algorithm 1)."""

    def __init__(self, context: AlgorithmContext) -> None:
        self.supernet, self.task, self.space = context.supernet, context.task, context.space
        self.distiller, self.teacher = context.distiller, context.teacher
        self.phases = [Phase(context.space, context.train)]

    def train_step(self, batch: Any, step: Step) -> Mapping[str, Tensor]:
        """Add up the gradients of m models, each choice in one of them; the loop then updates all choices at once.

        Raises UserError for paths on which some choice is more often than another.
        """
        refuse_unfair(step.archs, self.space)
        loss_of, losses = lesson(self.task, batch, self.distiller, self.teacher), []
        for arch in step.archs:  # lines 6 to 9: the models that the permutations of all layers make
            with apply(self.supernet, arch):
                losses.append(step.backward(loss_of(self.supernet)))  # line 8: accumulate gradients
        return {"loss": torch.stack(losses).mean()}


def refuse_unfair(archs: Sequence[Arch], space: SearchSpace) -> None:
    """Raise UserError unless the archs use every choice equally often (definition 1), or once more than another.

    A variable whose choice all archs share, as a resolution may be, and one under a condition are not looked at.
    """
    codes = space.encode(archs).astype(np.int64)
    for column, variable in enumerate(space.variables):
        if variable.when or variable.continuous:
            continue
        counts = np.bincount(codes[:, column], minlength=len(variable.choices))
        is_shared = len(archs) > 1 and np.count_nonzero(counts) == 1
        if not is_shared and (counts.min() == 0 or counts.max() - counts.min() > 1):
            text = f"this algorithm needs paths that use all choices equally often: those of {variable.key} are "
            text += f"on {', '.join(map(str, counts))} of {len(archs)}"
            raise UserError(text, key=("mutator", "type"), hint='use mutator = "fair"')
