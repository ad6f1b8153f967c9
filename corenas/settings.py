"""How weights are trained and how batch-norm statistics are recomputed, in plain options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from attrs import field, frozen
from attrs.validators import ge, gt, le, lt, optional

from corenas.errors import UserError, raise_if_any
from corenas.optim import Schedule, optimizer_faults

_OPTIMIZER = {"type": "SGD", "lr": 0.1, "momentum": 0.9}


def _over_default(table: Mapping[str, Any]) -> Mapping[str, Any]:
    return table if "type" in table else {**_OPTIMIZER, **table}


def _optimizer(instance: object, attribute: object, table: Mapping[str, Any]) -> None:
    raise_if_any(optimizer_faults(table))


@frozen
class Stop:
    """When a supernet's training ends before its last epoch: once the ranking of its archs no longer changes.

    archs: of a fixed sample, each measured after every epoch on validation data, its batch norm recalibrated
    tau: Kendall's, between the rankings of one epoch and the next, that ends the training
    """

    archs: int = field(default=32, validator=ge(5))
    tau: float = field(default=0.95, validator=[gt(0.0), le(1.0)])


@frozen
class Train:
    """How weights are trained.

    epochs: how often the training data is seen
    batch_size: images a step, over all accumulated parts and all processes
    optimizer: type, the name of a class in torch.optim, and its arguments; without `type` they change the default
    schedule: how the learning rate goes on
    no_decay: which parameters have no weight decay: "norm", "bias"
    clip_norm: largest norm of all gradients together
    clip_value: largest size of one gradient
    ema: share of the old weights in the exponential moving average that is searched and exported; less while the
        average is young, 1 - n^(-2/3) at its n-th step, as timm's warm-up has it
    precision: "float32", or automatic mixed precision in "bfloat16" or "float16"
    accumulate: parts a batch is cut into, for less memory
    sync_norm: whether batch norm sees the images of all processes under torchrun
    workers: processes that read data
    checkpoint_every: epochs between checkpoints
    stop: ends a phase of a supernet's training early; networks that are trained alone have no ranking
    validate: epochs between two looks at the smallest and the largest subnet of a supernet on validation data, told
        beside the loss by what archs are ranked by; they change nothing
    """

    epochs: int = field(default=10, validator=ge(0))
    batch_size: int = field(default=64, validator=ge(1))
    optimizer: Mapping[str, Any] = field(factory=_OPTIMIZER.copy, converter=_over_default, validator=_optimizer)
    schedule: Schedule = Schedule()
    no_decay: tuple[Literal["norm", "bias"], ...] = ("norm", "bias")
    clip_norm: float | None = field(default=None, validator=optional(gt(0)))
    clip_value: float | None = field(default=None, validator=optional(gt(0)))
    ema: float | None = field(default=None, validator=optional([ge(0), le(1)]))
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    accumulate: int = field(default=1, validator=ge(1))
    sync_norm: bool = False
    workers: int = field(default=0, validator=ge(0))
    checkpoint_every: int = field(default=1, validator=ge(1))
    stop: Stop | None = None
    validate: int | None = field(default=None, validator=optional(ge(1)))

    def __attrs_post_init__(self) -> None:
        if self.accumulate > self.batch_size:
            text = f"a batch of {self.batch_size} cannot be cut into {self.accumulate} parts"
            raise UserError(text, key=("accumulate",))


@frozen
class Racing:
    """How a search spares itself images of archs that have lost (`corenas.racing`).

    An arch is stopped once it is worse than the last of the best trials. Only metrics that are means over images race.

    confidence: with which the best trials are those that would have been found without
    best: how many trials are to be the same; at least what a searcher breeds from
    """

    confidence: float = field(default=0.95, validator=[ge(0.5), lt(1.0)])
    best: int = field(default=10, validator=ge(1))


@frozen
class Calibration:
    """How batch-norm statistics are recomputed for a subnet before it is measured.

    So are those of a network that is trained alone for so few batches that they are not yet its own.

    batches: how many; 0 keeps the supernet's statistics
    batch_size: images in each
    data: the split that is used
    pipeline: whether images are augmented as in training ("train") or not ("eval")
    """

    batches: int = field(default=8, validator=ge(0))
    batch_size: int = field(default=128, validator=ge(1))
    data: Literal["train", "valid"] = "train"
    pipeline: Literal["train", "eval"] = "eval"
