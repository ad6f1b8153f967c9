"""Which optimizers and schedules torch has by name, and how they are built from a spec.

What they take is read from torch's source text, so that a mistake in a spec is answered without importing torch.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import math
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import attrs
from attrs import field, frozen
from attrs.validators import ge, gt, le, lt

from corenas.errors import Fault, UserError, did_you_mean, raise_if_any
from corenas.options import structure

if TYPE_CHECKING:
    import torch
    from torch import nn

_NEED_MORE = ("LBFGS", "SparseAdam", "Optimizer", "Muon")
"""Optimizers that a plain training loop cannot drive: a closure, sparse gradients, matrices only."""
_STEP_OTHERWISE = (
    "LRScheduler",
    "LambdaLR",
    "MultiplicativeLR",
    "SequentialLR",
    "ChainedScheduler",
    "ReduceLROnPlateau",
    "CyclicLR",
    "OneCycleLR",
)
"""Schedules that want functions, other schedules or a metric, or that turn the momentum as well at every step."""

_NOT_NEGATIVE = Annotated[float, "a number of at least 0", lambda number: 0 <= number < 1e38]
_SHARE = Annotated[float, "a number from 0 to 1", lambda number: 0 <= number <= 1]
_COUNT = Annotated[int, "a whole number of at least 1", lambda number: number >= 1]
_BELOW_1 = Annotated[float, "a number of at least 0 and less than 1", lambda number: 0 <= number < 1]
_TYPES: Mapping[str, Any] = {
    "lr": _NOT_NEGATIVE,
    "momentum": _NOT_NEGATIVE,
    "weight_decay": _NOT_NEGATIVE,
    "rho": _SHARE,
    "alpha": _SHARE,
    "step_size": _COUNT,
    "T_max": _COUNT,
    "T_0": _COUNT,
    "T_mult": _COUNT,
    "total_iters": _COUNT,
    "betas": tuple[_BELOW_1, _BELOW_1],
}
"""Arguments of which more is known than their default tells."""


@frozen
class Schedule:
    """How the learning rate goes on.

    type: "constant", "linear", "cosine", "exponential", or the name of a class in torch.optim.lr_scheduler
    warmup: epochs in which it grows linearly from nearly nothing
    floor: share of the first learning rate that linear, cosine and exponential end on
    decay: factor of exponential
    every: epochs after which exponential applies its factor again
    options: arguments of a class in torch.optim.lr_scheduler, which steps once an epoch
    """

    type: str = "cosine"
    warmup: float = field(default=0.0, validator=[ge(0), lt(1e9)])
    floor: float = field(default=0.0, validator=[ge(0), le(1)])
    decay: float = field(default=0.97, validator=[gt(0), le(1)])
    every: float = field(default=1.0, validator=gt(0))
    options: Mapping[str, Any] = field(factory=dict)

    def __attrs_post_init__(self) -> None:
        raise_if_any(schedule_faults(self.type, self.options))


@functools.cache
def _source(file: str) -> list[ast.stmt]:
    torch = Path(importlib.util.find_spec("torch").origin).parent  # type: ignore[union-attr, arg-type]
    return ast.parse((torch / "optim" / file).read_text()).body


def optimizers() -> dict[str, str]:
    """Return the optimizer classes of torch.optim with the files that they stand in."""
    imports = [node for node in _source("__init__.py") if isinstance(node, ast.ImportFrom)]
    files = {alias.name: f"{str(node.module).split('.')[-1]}.py" for node in imports for alias in node.names}
    return {name: file for name, file in files.items() if name[0].isupper() and name not in _NEED_MORE}


def schedules() -> dict[str, str]:
    """Return the classes of torch.optim.lr_scheduler that step without being told anything, with their file."""
    names = [node.name for node in _source("lr_scheduler.py") if isinstance(node, ast.ClassDef)]
    return {name: "lr_scheduler.py" for name in names if name not in _STEP_OTHERWISE and name[0] != "_"}


@functools.cache
def options(name: str, file: str) -> type:
    """Return the arguments of such a class as a class of options; a default that is no literal is None."""
    cls = next(node for node in _source(file) if isinstance(node, ast.ClassDef) and node.name == name)
    args = next(node.args for node in cls.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    names = [a.arg for a in (*args.args, *args.kwonlyargs)]
    defaults = [*[None] * (len(args.args) - len(args.defaults)), *args.defaults, *args.kw_defaults]
    fields = {}
    for key, node in zip(names[2:], defaults[2:], strict=True):  # after self and the parameters or the optimizer
        default = attrs.NOTHING if node is None else _literal(node)
        fields[key] = attrs.field(default=default, type=_type(key, default))
    return attrs.make_class(name, fields, kw_only=True)


def _literal(node: ast.expr) -> Any:
    with suppress(ValueError):
        return ast.literal_eval(node)
    return None


def optimizer_faults(table: Mapping[str, Any]) -> list[Fault]:
    """Return what is wrong with `{type = "SGD", lr = 0.1, …}`, keys relative to it."""
    given = {key: value for key, value in table.items() if key != "type"}
    return _faults(table.get("type"), given, optimizers(), "optimizer", "torch.optim")


def schedule_faults(kind: str, given: Mapping[str, Any]) -> list[Fault]:
    """Return what is wrong with a schedule's type and options, keys relative to its table."""
    if kind in _OWN_SCHEDULES:
        text = f"{kind} takes no options; they are for classes of torch.optim.lr_scheduler"
        return [Fault(text, ("options",))] if given else []
    found = _faults(kind, given, schedules(), "schedule", "torch.optim.lr_scheduler")
    return [fault if fault.key == ("type",) else fault.under("options") for fault in found]


def _faults(name: Any, given: Mapping[str, Any], files: Mapping[str, str], noun: str, module: str) -> list[Fault]:
    if not isinstance(name, str) or name not in files:
        known = [*files, *(_OWN_SCHEDULES if noun == "schedule" else ())]
        text = f"no {noun} {name!r} in {module}" if name else "required key is missing"
        return [Fault(text, ("type",), hint=did_you_mean(str(name), known, f"{noun}s"))]
    try:
        structure(given, options(name, files[name]))
    except UserError as error:
        return [attrs.evolve(f, hint=f.hint or f"an argument of {name} in {module}") for f in error.faults]
    return []


def _type(key: str, default: Any) -> Any:
    """Return what an argument may be, from its name and its default."""
    if key in _TYPES or isinstance(default, bool):
        return _TYPES.get(key, bool)
    if isinstance(default, tuple):
        return tuple[(float,) * len(default)]
    return float if isinstance(default, int | float) else Any


def build_optimizer(
    model: nn.Module, table: Mapping[str, Any], no_decay: Collection[str] = ()
) -> torch.optim.Optimizer:
    """Build the optimizer of all parameters of a model.

    table: type, the name of a class in torch.optim, and its arguments
    no_decay: which parameters have no weight decay: "norm", "bias"
    Raises UserError, keys under "train", for a combination of options that torch refuses.
    """
    import torch

    given = {key: value for key, value in table.items() if key != "type"}
    norms = (torch.nn.modules.batchnorm._NormBase, torch.nn.LayerNorm, torch.nn.GroupNorm, torch.nn.RMSNorm)
    spared = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            norm = "norm" in no_decay and isinstance(module, norms)
            bias = "bias" in no_decay and name.endswith("bias")
            spared.setdefault(parameter, norm or bias)  # a parameter may be in several places
    decayed = [parameter for parameter in spared if not spared[parameter]]
    groups = [{"params": decayed}, {"params": [p for p in spared if spared[p]], "weight_decay": 0.0}]
    build = getattr(torch.optim, table["type"])
    try:
        device = next((p.device for p in spared if not p.is_meta), torch.device("cpu"))
        _try_step(build, given, device)
        return build([group for group in groups if group["params"]], **given)
    except Exception as error:
        raise UserError(f"torch refuses this: {error}", key=("train", "optimizer")) from error


def _try_step(build: Callable[..., Any], given: Mapping[str, Any], device: torch.device) -> None:
    """Make one step with one weight: options such as `capturable` are refused by a step alone."""
    import torch

    probe = torch.nn.Parameter(torch.zeros(1, device=device))
    probe.grad = torch.zeros_like(probe)
    build([probe], **given).step()


def build_schedule(
    optimizer: torch.optim.Optimizer, schedule: Schedule, epochs: int, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Return the schedule of a training, to be stepped after every step of the optimizer; an epoch has `steps` of them.

    Raises UserError, keys under "train", for options that torch refuses.
    """
    import torch

    warmup = round(schedule.warmup * steps)
    own = _OWN_SCHEDULES.get(schedule.type)
    theirs = [] if own else _factors(schedule, float(optimizer.param_groups[0]["lr"]), epochs)

    def factor(step: int) -> float:
        warm = min(1.0, (step + 1) / (warmup + 1))
        if own is None:
            return warm * theirs[min(step // steps, len(theirs) - 1)]
        step = max(0, step - warmup)
        return warm * own(schedule, step / steps, min(1, step / max(1, epochs * steps - warmup)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def hangs_on_length(schedule: Schedule) -> bool:
    """Return whether a longer training would have had other learning rates from the start; no class of torch's has."""
    own = _OWN_SCHEDULES.get(schedule.type)
    return own is not None and own(schedule, 1.0, 0.0) != own(schedule, 1.0, 0.5)


def _factors(schedule: Schedule, lr: float, epochs: int) -> list[float]:
    """Return what a class of torch's, which steps once an epoch, makes of a learning rate, tried on its own."""
    import torch

    probe = torch.optim.SGD([torch.zeros(1)], lr=lr or 1.0)
    rates = []
    try:
        theirs = getattr(torch.optim.lr_scheduler, schedule.type)(probe, **schedule.options)
        for _ in range(max(1, epochs)):
            rates.append(probe.param_groups[0]["lr"] / (lr or 1.0))
            probe.step()
            theirs.step()
    except Exception as error:
        raise UserError(f"torch refuses this: {error}", key=("train", "schedule", "options")) from error
    return rates


def _linear(schedule: Schedule, epochs: float, done: float) -> float:
    return schedule.floor + (1 - schedule.floor) * (1 - done)


def _cosine(schedule: Schedule, epochs: float, done: float) -> float:
    return schedule.floor + (1 - schedule.floor) * (1 + math.cos(math.pi * done)) / 2


def _exponential(schedule: Schedule, epochs: float, done: float) -> float:
    # Once every so many epochs, with a constant ending (BigNAS, Yu et al. 2020, section 3.3).
    return max(schedule.floor, schedule.decay ** math.floor(epochs / schedule.every + 1e-9))


_OWN_SCHEDULES: Mapping[str, Callable[[Schedule, float, float], float]] = {
    "constant": lambda schedule, epochs, done: 1.0,
    "linear": _linear,
    "cosine": _cosine,
    "exponential": _exponential,
}
"""The factor of the learning rate, from epochs and share of all steps after the warm-up."""
