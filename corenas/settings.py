"""The tables of a spec that are the core's own: training, search, calibration, retraining, export."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from attrs import field, frozen
from attrs.validators import ge, gt, le, lt, optional

from corenas.errors import UserError, refuse
from corenas.objectives import parse_amount
from corenas.optim import Schedule, optimizer_faults

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_duration(text: str) -> float | None:
    """Seconds of "90s", "20m", "1.5h" or "2d"; None for anything else."""
    try:
        seconds = float(text[:-1]) * _UNITS[text[-1:]]
    except (ValueError, KeyError):
        return None
    return seconds if 0 < seconds < math.inf else None


Duration = Annotated[str, 'a time such as "90s", "20m", "1.5h" or "2d"', parse_duration]


def _is_amount(amount: float | str) -> bool:
    return math.isfinite(parse_amount(amount.removesuffix("%") if isinstance(amount, str) else amount))


Amount = Annotated[float | str, 'an amount such as 2e8, "200M" or "60%"', _is_amount]
"""A number, or text such as "200M" or, of the largest subnet's, "60%"."""
Width = Annotated[float | str, 'an amount above 0 such as 2e5 or "1M"', lambda amount: parse_amount(amount) > 1e-9]


_OPTIMIZER = {"type": "SGD", "lr": 0.1, "momentum": 0.9}


def _over_default(table: Mapping[str, Any]) -> Mapping[str, Any]:
    return table if "type" in table else {**_OPTIMIZER, **table}


def _optimizer(instance: object, attribute: object, table: Mapping[str, Any]) -> None:
    refuse(optimizer_faults(table))


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
    ema: share of the old weights in the exponential moving average that is searched and exported
    precision: "float32", or automatic mixed precision in "bfloat16" or "float16"
    accumulate: parts a batch is cut into, for less memory
    sync_norm: whether batch norm sees the images of all processes under torchrun
    workers: processes that read data
    checkpoint_every: epochs between checkpoints
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


@frozen
class Range:
    """Bounds of a metric, both included.

    min: the least that is allowed
    max: the most that is allowed
    """

    min: Amount | None = None
    max: Amount | None = None

    def __attrs_post_init__(self) -> None:
        if self.min is None and self.max is None:
            raise UserError("expected `min`, `max` or both")


Bounds = Mapping[str, Amount | tuple[Amount, Amount] | Range]


@frozen
class Goal:
    """A metric to search for.

    metric: its name; those of the evaluators, and flops, params, activations
    direction: "max" or "min"; left out, what its evaluator says
    weight: what one unit of it is worth beside the other objectives; without `pareto` one of several must say it
    """

    metric: str
    direction: Literal["max", "min"] | None = None
    weight: float | None = field(default=None, validator=optional([gt(0.0), lt(math.inf)]))


@frozen
class Bins:
    """Pareto mode that keeps the best trial of each bin of a metric.

    metric: whose bins
    width: how wide a bin is
    """

    metric: str
    width: Width


@frozen
class SearchSettings:
    """What is searched for, and how long.

    trials: archs to measure; those measured with a share of the whole effort count as this share
    batch: archs asked for at once
    budget: the search ends after this time, "20m" for instance, whatever is left of the trials
    objectives: metrics to make large or small; several are weighed against each other, unless `pareto`
    constraints: metric -> bounds: the most that is allowed (of what is to be large the least), [least, most], or min
        and max; "60%" is of the largest subnet. A list of such tables is searched under one after the other
    pareto: true keeps every trade-off that no other beats; a table keeps the best of each bin of a metric
    """

    trials: int = field(default=100, validator=ge(1))
    batch: int = field(default=10, validator=ge(1))
    budget: Duration | None = None
    objectives: tuple[str | Goal, ...] | str = ("top1",)
    constraints: Bounds | tuple[Bounds, ...] = field(factory=dict)
    pareto: bool | Bins = False

    @property
    def bounds(self) -> Sequence[Bounds]:
        """The constraints of each search."""
        return (self.constraints or ({},)) if isinstance(self.constraints, tuple) else (self.constraints,)

    @property
    def goals(self) -> list[Goal]:
        """The objectives in their long form."""
        objectives = (self.objectives,) if isinstance(self.objectives, str) else self.objectives
        return [Goal(goal) if isinstance(goal, str) else goal for goal in objectives]


@frozen
class Calibration:
    """How batch-norm statistics are recomputed for a subnet before it is measured.

    batches: how many; 0 keeps the supernet's statistics
    batch_size: images in each
    data: the split that is used
    pipeline: whether images are augmented as in training ("train") or not ("eval")
    """

    batches: int = field(default=8, validator=ge(0))
    batch_size: int = field(default=128, validator=ge(1))
    data: Literal["train", "valid"] = "train"
    pipeline: Literal["train", "eval"] = "eval"


@frozen
class Retrain:
    """How an arch that was found is trained again from scratch, where the algorithm asks for it.

    train: how its weights are trained; left out, as the supernet's were
    data: what it is trained on: "train", or "train+valid" where the search is over and nothing is chosen any more
    backbone: its backbone's options, wider or deeper ones for instance; left out, the supernet's
    """

    train: Train | None = None
    data: Literal["train", "train+valid"] = "train"
    backbone: Any = field(default=None, metadata={"kind": "backbones"})


@frozen
class Source:
    """A supernet that was trained before.

    from: the directory of its run; what a spec leaves out is as it was there
    """

    from_: str


@frozen
class Export:
    """What is written into `best/` beside arch.toml and the cost card.

    formats: names of exporters; `corenas show exporters` lists them
    """

    formats: tuple[str, ...] = ("safetensors", "python", "pt2")


@frozen
class Device:
    """Where a run computes.

    type: "auto" (a GPU if there is one), "cpu", "cuda", "mps"
    threads: of torch on the CPU; left out, torch's choice
    """

    type: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    threads: int | None = field(default=None, validator=optional([ge(1), le(1024)]))
