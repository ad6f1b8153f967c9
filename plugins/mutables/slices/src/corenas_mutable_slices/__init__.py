"""Layers that can take several shapes: sliced layers, mixed operation, elastic depth, resize."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from corenas_mutable_slices.layers import ACTIVATIONS as ACTIVATIONS
    from corenas_mutable_slices.layers import BatchNorm2dSlice as BatchNorm2dSlice
    from corenas_mutable_slices.layers import Conv2dSlice as Conv2dSlice
    from corenas_mutable_slices.layers import ConvNormAct as ConvNormAct
    from corenas_mutable_slices.layers import ElasticDepth as ElasticDepth
    from corenas_mutable_slices.layers import InputResize as InputResize
    from corenas_mutable_slices.layers import LinearSlice as LinearSlice
    from corenas_mutable_slices.layers import MixedOp as MixedOp
    from corenas_mutable_slices.layers import SqueezeExcitation as SqueezeExcitation
    from corenas_mutable_slices.layers import activation as activation


_LAYERS = (
    "ACTIVATIONS",
    "BatchNorm2dSlice",
    "Conv2dSlice",
    "ConvNormAct",
    "ElasticDepth",
    "InputResize",
    "LinearSlice",
    "MixedOp",
    "SqueezeExcitation",
    "activation",
)


def __getattr__(name: str) -> Any:
    # The entry point names this module: it may be imported to list what is installed, without torch.
    if name not in _LAYERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("corenas_mutable_slices.layers"), name)
