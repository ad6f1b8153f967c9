"""One arch trained from scratch: retraining, trials of hyper-parameters and baselines share this."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from attrs import evolve
from torch import Tensor, nn

from corenas import seeding
from corenas.contracts import Emit, LiveTask, Phase, Step
from corenas.run.spec import Spec
from corenas.settings import Train
from corenas.space import Arch, SearchSpace
from corenas.supernet import build_supernet
from corenas.train import run_training


class _OnLabels:
    """Trains a network that has one shape only."""

    def __init__(self, network: nn.Module, task: LiveTask, space: SearchSpace, settings: Train) -> None:
        self.network, self.task = network, task
        self.phases = [Phase(space, settings)]

    def train_step(self, batch: Any, step: Step) -> Mapping[str, Tensor]:
        return {"loss": step.backward(self.task.loss(self.task.forward(self.network, batch), batch))}


def subnet(spec: Spec, task: LiveTask, arch: Arch) -> nn.Module:
    """Return the network of one arch with its head, freshly initialised from the spec's seed, without a supernet."""
    with seeding.seeded(spec.seed, "alone"):
        return build_supernet(spec.backbone, spec.space.fix(arch), task)


def stand_alone(
    spec: Spec,
    task: LiveTask,
    arch: Arch,
    *,
    fidelity: float = 1.0,
    device: torch.device | None = None,
    checkpoint: Path | None = None,
    emit: Emit = lambda event: None,
    stage: str = "retrain",
    split: str = "train",
) -> nn.Module:
    """Train one arch from scratch as a spec says: its backbone, train settings and seed. Test data is never read.

    arch: its choices of variables named `spec:…` override the spec
    fidelity: share of the epochs, one at least
    checkpoint: a file by which a killed training goes on
    split: the data that it is trained on
    """
    given, spec = spec, spec.overridden(arch)
    if spec.task != given.task:
        task = spec.task.start(seeding.generator(spec.seed, "task"))
    settings = evolve(spec.train, epochs=max(1, round(fidelity * spec.train.epochs)))
    network = subnet(spec, task, arch)
    trainer = _OnLabels(network, task, spec.space, settings)
    return run_training(
        trainer,
        network,
        task,
        None,
        None,
        seed=spec.seed,
        device=device,
        checkpoint=checkpoint,
        emit=emit,
        stage=stage,
        split=split,
    )
