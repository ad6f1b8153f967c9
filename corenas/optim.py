"""Which optimizers and schedules torch has by name, and how they are built from a spec.

What they take is read from torch's source text, so that a mistake in a spec is answered without importing torch.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corenas.errors import Fault, UserError, did_you_mean

if TYPE_CHECKING:
    import torch
    from torch import nn

    from corenas.settings import Schedule, Train

REQUIRED = inspect.Parameter.empty
OWN_SCHEDULES = ("constant", "cosine", "exponential")
_NEED_MORE = ("LBFGS", "SparseAdam", "Optimizer", "Muon")
"""Optimizers that a plain training loop cannot drive: a closure, sparse gradients, matrices only."""
_STEP_OTHERWISE = (
    "LRScheduler", "LambdaLR", "MultiplicativeLR", "SequentialLR", "ChainedScheduler", "ReduceLROnPlateau",
    "CyclicLR", "OneCycleLR",
)  # fmt: skip
"""Schedules that want functions, other schedules or a metric, or that turn the momentum as well at every step."""


@functools.cache
def _torch_optim() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "optim"


@functools.cache
def _classes(path: Path) -> dict[str, ast.ClassDef]:
    return {node.name: node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)}


class _Signatures(Mapping[str, dict[str, Any]]):
    """Classes by name -> their arguments with defaults: `REQUIRED`, or None for what is no literal.

    A file is read when one of its classes is looked up: reading all takes as long as all else that a spec needs.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __getitem__(self, name: str) -> dict[str, Any]:
        body = _classes(self._files[name])[name].body
        init = next(item for item in body if isinstance(item, ast.FunctionDef) and item.name == "__init__")
        names = [a.arg for a in init.args.args]
        defaults = [REQUIRED] * (len(names) - len(init.args.defaults)) + [*map(_literal, init.args.defaults)]
        keywords = {k.arg: REQUIRED if d is None else _literal(d)
                    for k, d in zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True)}  # fmt: skip
        # after self and the parameters or the optimizer
        return dict(zip(names[2:], defaults[2:], strict=True)) | keywords


@functools.cache
def optimizers() -> Mapping[str, dict[str, Any]]:
    """Optimizer classes of torch.optim -> their arguments with defaults."""
    files = {}
    for node in ast.parse((_torch_optim() / "__init__.py").read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("torch.optim."):
            path = _torch_optim() / f"{node.module.removeprefix('torch.optim.')}.py"
            names = [alias.name for alias in node.names if alias.name[0].isupper() and alias.name not in _NEED_MORE]
            files |= dict.fromkeys(names, path)
    return _Signatures(files)


@functools.cache
def schedules() -> Mapping[str, dict[str, Any]]:
    """Classes of torch.optim.lr_scheduler that step without being told anything -> their arguments with defaults."""
    path = _torch_optim() / "lr_scheduler.py"
    return _Signatures({name: path for name in _classes(path) if name not in _STEP_OTHERWISE and name[0] != "_"})


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None


def optimizer_faults(table: Mapping[str, Any]) -> list[Fault]:
    """What is wrong with `{type = "SGD", lr = 0.1, …}`, keys relative to it."""
    return _check(table, optimizers(), "optimizer", "torch.optim")


def schedule_faults(kind: str, options: Mapping[str, Any]) -> list[Fault]:
    """What is wrong with a schedule's type and options, keys relative to its table."""
    if kind in OWN_SCHEDULES:
        text = f"{kind} takes no options; they are for classes of torch.optim.lr_scheduler"
        return [Fault(text, ("options",))] if options else []
    found = _check({**options, "type": kind}, schedules(), "schedule", "torch.optim.lr_scheduler", OWN_SCHEDULES)
    return [fault if fault.key == ("type",) else fault.under("options") for fault in found]


def _check(
    table: Mapping[str, Any],
    classes: Mapping[str, Mapping[str, Any]],
    noun: str,
    module: str,
    own: tuple[str, ...] = (),
) -> list[Fault]:
    name = table.get("type")
    if not isinstance(name, str) or name not in classes:
        hint = did_you_mean(str(name), [*classes, *own], f"{noun}s")
        return [Fault(f"no {noun} {name!r} in {module}" if name else "required key is missing", ("type",), hint=hint)]
    known = classes[name]
    missing = [key for key, default in known.items() if default is REQUIRED and key not in table]
    faults = [Fault("required key is missing", (key,), hint=f"{name} in {module} needs it") for key in missing]
    for key, value in table.items():
        if key == "type":
            continue
        if key not in known:
            faults.append(Fault("unknown key", (key,), hint=did_you_mean(key, known, f"options of {name}")))
            continue
        default = known[key]
        number = value if _is_number(value) else None
        if isinstance(default, bool) and not isinstance(value, bool):
            faults.append(Fault(f"expected true or false, found {value!r}", (key,)))
        elif _is_number(default) and number is None:
            faults.append(Fault(f"expected a number, found {value!r}", (key,)))
        elif isinstance(default, tuple) and not (
            isinstance(value, list) and len(value) == len(default) and all(map(_is_number, value))
        ):
            faults.append(Fault(f"expected a list of {len(default)} numbers, found {value!r}", (key,)))
        elif number is not None and key in ("lr", "momentum", "weight_decay") and not 0 <= number < math.inf:
            faults.append(Fault(f"expected a number of at least 0, found {value!r}", (key,)))
    return faults


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


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
