"""The model that a run is about: a backbone with a task's head, and what of it is inspected before it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from attrs import evolve
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from corenas.contracts import (
    AlgorithmContext,
    Backbone,
    Headed,
    LiveTask,
    Pretrained,
    Segmented,
    Signals,
    Tap,
    ZeroInitializing,
)
from corenas.cost import Cost
from corenas.errors import Fault, UserError, did_you_mean, raise_if_any
from corenas.mutable import keys_used
from corenas.space import SearchSpace
from corenas.value import TooManyCombinationsError
from corenas.variables import OVERRIDE


class Supernet(nn.Module):
    """A backbone followed by a head.

    notes: what of a file of weights is left out
    forward: inputs of the backbone -> outputs of the head
    """

    notes: Sequence[str] = ()

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, x: Tensor) -> Any:
        """Return the outputs of the head for inputs of the backbone."""
        return self.head(self.backbone.features(x))  # type: ignore[operator]


def start_as_identity(context: AlgorithmContext) -> None:
    """Set the scale of the last norm of each residual block to zero, but not of pretrained weights."""
    if context.pretrained:
        return
    for module in context.supernet.modules():
        if isinstance(module, ZeroInitializing):
            module.zero_init_last()


def build_supernet(backbone: Backbone, space: SearchSpace, task: LiveTask) -> Supernet:
    """Return the supernet of a space for a task, freshly initialised from torch's global generator.

    A `Pretrained` backbone gets its weights. An option `in_channels` of the backbone that is None becomes the number of
    channels of the task's images.
    Raises UserError, keys under "space" or "backbone", if they do not fit each other or a variable is used by no layer.
    """
    if getattr(backbone, "in_channels", 0) is None:
        images = [
            leaf for leaf in tree_leaves(getattr(task, "example", None)) if isinstance(leaf, Tensor) and leaf.dim() > 2
        ]
        backbone = evolve(backbone, in_channels=images[0].shape[1]) if images else backbone  # type: ignore[type-var]
    try:
        body = backbone.build(space)
    except UserError as error:  # about the space, unless it says that it is about the backbone's options
        raise UserError(faults=[f if f.key[:1] == ("backbone",) else f.under("space") for f in error.faults]) from None
    except TooManyCombinationsError as error:
        raise UserError(str(error), key=("space",), hint="larger steps, or fewer choices") from None
    head = body.own_head if isinstance(body, Headed) else task.head(body.feat_dims)  # type: ignore[arg-type]
    supernet = Supernet(body, head)
    pretrained = isinstance(backbone, Pretrained) and backbone.weights is not None
    if pretrained and not any(parameter.is_meta for parameter in supernet.parameters()):
        supernet.notes = backbone.load(supernet, space)  # type: ignore[attr-defined]
    used = keys_used(supernet)
    parents = {condition.key for variable in space.variables for condition in variable.when}
    # No layer need use what is held at one choice, nor, as narrowing a depth leaves them, variables of blocks that no
    # depth reaches.
    reached = {v.key for v in space.variables if len(v.choices) > 1 and all(c.choices for c in v.when)}
    unused = [key for key in space.keys if key in reached - parents - used and not key.startswith(OVERRIDE)]
    hint = did_you_mean(unused[0], used, "variables in use") if unused else None
    raise_if_any(Fault("no layer uses this variable", ("space", *_path(key)), hint=hint) for key in unused)
    return supernet


def _path(key: str) -> tuple[str | int, ...]:
    return tuple(int(part) if part.isdigit() else part for part in key.split("."))


def supernet_cost(supernet: nn.Module, space: SearchSpace, task: LiveTask) -> Cost:
    """Return the cost of all archs of a supernet, for an input of the task. Raises UserError if it takes none."""
    try:
        return Cost(supernet, space, task.example)
    except (RuntimeError, OverflowError, ValueError, TypeError) as error:
        if isinstance(error, ValueError | TypeError) and "Overflow" not in str(error):
            raise  # a layer whose cost is not known
        inputs = [leaf for leaf in tree_leaves(task.example) if isinstance(leaf, Tensor)]
        shapes = " and ".join("x".join(map(str, tensor.shape[1:])) for tensor in inputs)
        text = f"this network does not take the task's images of {shapes}: {str(error).splitlines()[0]}"
        raise UserError(
            text,
            key=("backbone",),
            hint="does its number of input channels fit the data? `in_channels` left out is that of the data",
        ) from error


def observe(model: nn.Module, task: LiveTask, batch: Any, taps: Sequence[Tap] = ()) -> Signals:
    """Run a model on a batch and keep what its tapped parts give (`LiveDistiller.taps`).

    Raises UserError for a tap that the model has not, or one that does not run.
    """
    features: dict[Tap, Any] = {}
    hooks = [
        _part(model, tap).register_forward_hook(lambda _, args, output, tap=tap: features.__setitem__(tap, output))
        for tap in taps
    ]
    try:
        outputs = task.forward(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    missing = [tap for tap in taps if not isinstance(features.get(tap), Tensor)]
    if missing:
        raise UserError(f"{missing[0]!r} gives no tensor", key=("distiller",), hint="a part that runs in every arch")
    return Signals(outputs, task.logits(outputs), [features[tap] for tap in taps])


def _part(model: nn.Module, tap: Tap) -> nn.Module:
    """Return a segment by its number, or a module by its name."""
    backbone: nn.Module = getattr(model, "backbone", model)
    segments: Sequence[nn.Module] = backbone.segments if isinstance(backbone, Segmented) else ()
    try:
        return segments[tap] if isinstance(tap, int) else backbone.get_submodule(tap)
    except (IndexError, AttributeError):
        names = [name for name, _ in backbone.named_modules() if name]
        known = f"segments 0 to {len(segments) - 1}" if segments else "no segments"
        hint = f"it has {known}; {did_you_mean(str(tap), names, 'modules')}"
        raise UserError(f"this network has no part {tap!r}", key=("distiller",), hint=hint) from None


def pick_device(name: str) -> torch.device:
    """Return the device that a spec names; "auto" is a GPU where there is one. Raises UserError if it is not there."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = "cuda" if available["cuda"] else "cpu"
    if not available[name]:
        have = ", ".join(key for key, there in available.items() if there)
        raise UserError(f"no {name} device here", key=("device", "type"), hint=f'there is: {have}; or say "auto"')
    return torch.device(name)
