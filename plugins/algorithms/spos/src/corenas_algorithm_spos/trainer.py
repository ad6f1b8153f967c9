"""A step of Single Path One-Shot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from corenas.contracts import AlgorithmContext, Phase, Step
from corenas.mutable import apply


class SPOSTrainer:
    """Trains the paths of each step on the labels, their gradients averaged."""

    def __init__(self, context: AlgorithmContext) -> None:
        self.supernet, self.task = context.supernet, context.task
        self.phases = [Phase(context.space, context.train)]

    def train_step(self, batch: Any, step: Step) -> Mapping[str, Tensor]:
        """One path at a time; the loop cleared the gradients to None, so that idle operations have none."""
        losses = []
        for arch in step.archs:
            with apply(self.supernet, arch):
                loss = self.task.loss(self.task.forward(self.supernet, batch), batch)
                losses.append(step.backward(loss / len(step.archs)))
        return {"loss": torch.stack(losses).sum()}
