"""Which optimizers and schedules torch has by name, and how they are built from a spec.

What they take is read from torch's source text, so that a mistake in a spec is answered without importing torch.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import attrs

from corenas.errors import Fault, UserError, did_you_mean
from corenas.options import structure

if TYPE_CHECKING:
    import torch
    from torch import nn

    from corenas.settings import Schedule, Train

REQUIRED = attrs.NOTHING
OWN_SCHEDULES = ("constant", "cosine", "exponential")
_NEED_MORE = ("LBFGS", "SparseAdam", "Optimizer", "Muon")
"""Optimizers that a plain training loop cannot drive: a closure, sparse gradients, matrices only."""
_STEP_OTHERWISE = (
    "LRScheduler", "LambdaLR", "MultiplicativeLR", "SequentialLR", "ChainedScheduler", "ReduceLROnPlateau",
    "CyclicLR", "OneCycleLR",
)  # fmt: skip
"""Schedules that want functions, other schedules or a metric, or that turn the momentum as well at every step."""


_NOT_NEGATIVE = Annotated[float, "a number of at least 0", lambda number: 0 <= number < math.inf]
_SHARE = Annotated[float, "a number from 0 to 1", lambda number: 0 <= number <= 1]
_COUNT = Annotated[int, "a whole number of at least 1", lambda number: number >= 1]
_TYPES: Mapping[str, Any] = {
    "lr": _NOT_NEGATIVE, "momentum": _NOT_NEGATIVE, "weight_decay": _NOT_NEGATIVE, "rho": _SHARE, "alpha": _SHARE,
    "step_size": _COUNT, "T_max": _COUNT, "T_0": _COUNT, "T_mult": _COUNT, "total_iters": _COUNT,
}  # fmt: skip
"""Arguments of which more is known than their default tells."""


@functools.cache
def _source(file: str) -> list[ast.stmt]:
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return ast.parse((Path(spec.submodule_search_locations[0]) / "optim" / file).read_text()).body


@functools.cache
def optimizers() -> dict[str, str]:
    """Optimizer classes of torch.optim -> the files that they stand in."""
    files = {}
    for node in _source("__init__.py"):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("torch.optim."):
            names = [alias.name for alias in node.names if alias.name[0].isupper() and alias.name not in _NEED_MORE]
            files |= dict.fromkeys(names, f"{node.module.removeprefix('torch.optim.')}.py")
    return files


@functools.cache
def schedules() -> dict[str, str]:
    """Classes of torch.optim.lr_scheduler that step without being told anything -> the file that they stand in."""
    names = [node.name for node in _source("lr_scheduler.py") if isinstance(node, ast.ClassDef)]
    return {name: "lr_scheduler.py" for name in names if name not in _STEP_OTHERWISE and name[0] != "_"}


def arguments(name: str, file: str) -> dict[str, Any]:
    """The arguments of such a class with their defaults: `REQUIRED`, or None for what is no literal."""
    cls = next(node for node in _source(file) if isinstance(node, ast.ClassDef) and node.name == name)
    args = next(node.args for node in cls.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    names = [a.arg for a in (*args.args, *args.kwonlyargs)]
    defaults = [*[None] * (len(args.args) - len(args.defaults)), *args.defaults, *args.kw_defaults]
    pairs = zip(names[2:], defaults[2:], strict=True)  # after self and the parameters or the optimizer
    return {name: REQUIRED if default is None else _literal(default) for name, default in pairs}


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None


def optimizer_faults(table: Mapping[str, Any]) -> list[Fault]:
    """What is wrong with `{type = "SGD", lr = 0.1, …}`, keys relative to it."""
    return _faults(table, optimizers(), "optimizer", "torch.optim")


def schedule_faults(kind: str, options: Mapping[str, Any]) -> list[Fault]:
    """What is wrong with a schedule's type and options, keys relative to its table."""
    if kind in OWN_SCHEDULES:
        text = f"{kind} takes no options; they are for classes of torch.optim.lr_scheduler"
        return [Fault(text, ("options",))] if options else []
    found = _faults({**options, "type": kind}, schedules(), "schedule", "torch.optim.lr_scheduler", OWN_SCHEDULES)
    return [fault if fault.key == ("type",) else fault.under("options") for fault in found]


def _faults(
    table: Mapping[str, Any], files: Mapping[str, str], noun: str, module: str, own: tuple[str, ...] = ()
) -> list[Fault]:
    name = table.get("type")
    if not isinstance(name, str) or name not in files:
        hint = did_you_mean(str(name), [*files, *own], f"{noun}s")
        return [Fault(f"no {noun} {name!r} in {module}" if name else "required key is missing", ("type",), hint=hint)]
    try:
        structure({key: value for key, value in table.items() if key != "type"}, _options(name, files[name]))
    except UserError as error:
        return [attrs.evolve(f, hint=f.hint or f"an argument of {name} in {module}") for f in error.faults]
    return []


@functools.cache
def _options(name: str, file: str) -> type:
    """The arguments of such a class as a class of options."""
    known = arguments(name, file)
    fields = {key: attrs.field(default=default, type=_type(key, default)) for key, default in known.items()}
    return attrs.make_class(name, fields, kw_only=True)


def _type(key: str, default: Any) -> Any:
    """What an argument may be, from its name and its default."""
    if key == "betas":
        text = "a list of 2 numbers of at least 0 and less than 1"
        return Annotated[tuple[float, float], text, lambda betas: all(0 <= beta < 1 for beta in betas)]
    if isinstance(default, tuple):
        return Annotated[tuple[(float,) * len(default)], f"a list of {len(default)} numbers", lambda numbers: True]
    if isinstance(default, bool):
        return bool
    return _TYPES.get(key, float if isinstance(default, int | float) else Any)


def build_optimizer(model: nn.Module, train: Train) -> torch.optim.Optimizer:
    """The optimizer of a training over all parameters of a model, without weight decay where the settings say so.

    Raises UserError, keys under "train", for a combination of options that torch refuses.
    """
    import torch

    options = {k: tuple(v) if isinstance(v, list) else v for k, v in train.optimizer.items() if k != "type"}
    norms = (torch.nn.modules.batchnorm._NormBase, torch.nn.LayerNorm, torch.nn.GroupNorm, torch.nn.RMSNorm)
    spared = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            norm = "norm" in train.no_decay and isinstance(module, norms)
            bias = "bias" in train.no_decay and name.endswith("bias")
            spared.setdefault(parameter, norm or bias)  # a parameter may be in several places
    decayed = [parameter for parameter in spared if not spared[parameter]]
    groups = [{"params": decayed}, {"params": [p for p in spared if spared[p]], "weight_decay": 0.0}]
    try:
        return getattr(torch.optim, train.optimizer["type"])([group for group in groups if group["params"]], **options)
    except Exception as error:
        raise UserError(f"torch refuses this: {error}", key=("train", "optimizer")) from error


def build_schedule(
    optimizer: torch.optim.Optimizer, schedule: Schedule, epochs: int, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The schedule of a training, to be stepped after every step of the optimizer; an epoch has `steps` of them.

    Raises UserError, keys under "train", for options that torch refuses.
    """
    import torch

    warmup, total = round(schedule.warmup * steps), epochs * steps

    def warm(step: int) -> float:
        return min(1.0, (step + 1) / (warmup + 1))

    if schedule.type in OWN_SCHEDULES:
        rate = _rate(schedule, steps, total - warmup)
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm(step) * rate(max(0, step - warmup)))
    # A class of torch's steps once an epoch: its rates are worked out on an optimizer of its own and looked up.
    lr = float(optimizer.param_groups[0]["lr"]) or 1.0
    probe = torch.optim.SGD([torch.zeros(1)], lr=lr)
    factors = []
    try:
        theirs = getattr(torch.optim.lr_scheduler, schedule.type)(probe, **schedule.options)
        for _ in range(max(1, epochs)):
            factors.append(probe.param_groups[0]["lr"] / lr)
            probe.step()
            theirs.step()
    except Exception as error:
        raise UserError(f"torch refuses this: {error}", key=("train", "schedule", "options")) from error
    last = len(factors) - 1
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm(step) * factors[min(step // steps, last)])


def _rate(schedule: Schedule, steps: int, total: int) -> Callable[[int], float]:
    if schedule.type == "cosine":
        return lambda step: (
            schedule.floor + (1 - schedule.floor) * (1 + math.cos(math.pi * min(1, step / max(1, total)))) / 2
        )
    if schedule.type == "exponential":
        # Once every so many epochs, with a constant ending (BigNAS, Yu et al. 2020, section 3.3).
        return lambda step: max(schedule.floor, schedule.decay ** math.floor(step / (steps * schedule.every) + 1e-9))
    return lambda step: 1.0
