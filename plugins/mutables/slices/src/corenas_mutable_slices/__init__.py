"""Layers that can take several shapes, and what backbones are built from."""

from __future__ import annotations

import importlib
import itertools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from corenas_mutable_slices.blocks import ACTIVATIONS as ACTIVATIONS
    from corenas_mutable_slices.blocks import ConvNormAct as ConvNormAct
    from corenas_mutable_slices.blocks import ElasticDepth as ElasticDepth
    from corenas_mutable_slices.blocks import MixedOp as MixedOp
    from corenas_mutable_slices.blocks import Residual as Residual
    from corenas_mutable_slices.blocks import Shortcut as Shortcut
    from corenas_mutable_slices.blocks import SqueezeExcitation as SqueezeExcitation
    from corenas_mutable_slices.blocks import Staged as Staged
    from corenas_mutable_slices.blocks import activation as activation
    from corenas_mutable_slices.blocks import basic_layers as basic_layers
    from corenas_mutable_slices.blocks import bottleneck_layers as bottleneck_layers
    from corenas_mutable_slices.layers import BatchNorm1dSlice as BatchNorm1dSlice
    from corenas_mutable_slices.layers import BatchNorm2dSlice as BatchNorm2dSlice
    from corenas_mutable_slices.layers import BatchNorm3dSlice as BatchNorm3dSlice
    from corenas_mutable_slices.layers import Conv1dSlice as Conv1dSlice
    from corenas_mutable_slices.layers import Conv2dSlice as Conv2dSlice
    from corenas_mutable_slices.layers import Conv3dSlice as Conv3dSlice
    from corenas_mutable_slices.layers import ConvTranspose1dSlice as ConvTranspose1dSlice
    from corenas_mutable_slices.layers import ConvTranspose2dSlice as ConvTranspose2dSlice
    from corenas_mutable_slices.layers import ConvTranspose3dSlice as ConvTranspose3dSlice
    from corenas_mutable_slices.layers import GroupNormSlice as GroupNormSlice
    from corenas_mutable_slices.layers import InputResize as InputResize
    from corenas_mutable_slices.layers import LinearSlice as LinearSlice
    from corenas_mutable_slices.layers import per_width_statistics as per_width_statistics

_MODULES = {
    "blocks": (
        "ACTIVATIONS",
        "ConvNormAct",
        "ElasticDepth",
        "MixedOp",
        "Residual",
        "Shortcut",
        "SqueezeExcitation",
        "Staged",
        "activation",
        "basic_layers",
        "bottleneck_layers",
    ),
    "layers": (
        "BatchNorm1dSlice",
        "BatchNorm3dSlice",
        "ConvTranspose1dSlice",
        "ConvTranspose3dSlice",
        "BatchNorm2dSlice",
        "Conv1dSlice",
        "Conv2dSlice",
        "Conv3dSlice",
        "ConvTranspose2dSlice",
        "GroupNormSlice",
        "InputResize",
        "LinearSlice",
        "per_width_statistics",
    ),
}


def __getattr__(name: str) -> Any:
    # The entry point names this module: it may be imported to list what is installed, without torch.
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"corenas_mutable_slices.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *itertools.chain(*_MODULES.values())})
