"""A step of Single Path One-Shot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from corenas.contracts import AlgorithmContext, Phase, Step
from corenas.mutable import apply
from corenas.teaching import lesson


class SPOSTrainer:
    """Trains the paths of each step, their gradients averaged: eq. 7 of the paper, one path in expectation."""

    def __init__(self, context: AlgorithmContext) -> None:
        self.supernet, self.task = context.supernet, context.task
        self.distiller, self.teacher = context.distiller, context.teacher
        self.phases = [Phase(context.space, context.train)]

    def train_step(self, batch: Any, step: Step) -> Mapping[str, Tensor]:
        """Train one path at a time; the loop cleared the gradients to None, so that idle operations have none."""
        loss_of, losses = lesson(self.task, batch, self.distiller, self.teacher), []
        for arch in step.archs:
            with apply(self.supernet, arch):
                losses.append(step.backward(loss_of(self.supernet) / len(step.archs)))
        return {"loss": torch.stack(losses).sum()}
