"""What a training takes, in multiply-adds, as a few of its real steps tell."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from corenas import loading, seeding
from corenas.run.prepare import Prepared, start_trainer
from corenas.train import LivePhase

STEPS = 20
"""Steps of each phase that are counted: archs differ from step to step."""
FORWARD_AND_BACKWARD = 3
"""A training step takes three times the forward: one more for the gradients of inputs, one for those of weights."""


def counter() -> FlopCounterMode:
    """Return what counts the flops of training steps, two for a multiply-add."""
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: _of_backward})


def _of_backward(grad: Sequence[int], x: Sequence[int], weight: Sequence[int], *args: Any, **_: Any) -> int:
    """Return the flops of a convolution's gradients: each of the two takes what the forward does.

    torch's own formula takes a gradient of the weight as one over all channels, for a depthwise convolution of 100
    channels 100 times too much.
    """
    transposed, wanted = args[4], args[7]
    return 2 * math.prod(x if transposed else grad) * math.prod(weight[1:]) * sum(map(bool, wanted[:2]))


def training_flops(prepared: Prepared) -> float:
    """Return the multiply-adds of a whole training of a supernet, by its own phases, archs and teachers.

    A few steps are made, so `prepared` is used up.
    """
    spec, task, trainer = prepared.spec, prepared.task, start_trainer(prepared)
    total = 0.0
    for number, phase in enumerate(trainer.phases):
        settings = phase.train
        stream = loading.Stream(task, "train", settings.batch_size, spec.seed, parts=settings.accumulate)
        live = LivePhase(
            trainer,
            prepared.supernet,
            task,
            phase,
            stream.steps,
            mutator=spec.mutator,
            cost=prepared.cost,
            seed=spec.seed,
            number=number,
            device=prepared.device,
        )
        steps = min(STEPS, stream.steps)
        with counter() as counted:
            for parts in itertools.islice(stream.epoch(0), steps):
                live.step_parts(parts, stream.share)
        # torch counts a multiplication and an addition as two
        total += counted.get_total_flops() / 2 / steps * stream.steps * settings.epochs
    return total


def alone_flops(prepared: Prepared, epochs: int) -> float:
    """Return the multiply-adds of training one arch of the space by itself: the mean of 200, by the space's cost."""
    region, rng = prepared.targets[0].region, seeding.generator(prepared.spec.seed, "alone_flops")
    flops = np.mean(prepared.cost(region.draw(rng, 200))["flops"])
    return FORWARD_AND_BACKWARD * float(flops) * prepared.task.splits["train"] * epochs
