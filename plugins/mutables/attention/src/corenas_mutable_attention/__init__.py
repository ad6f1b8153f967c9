"""Layers of transformers that can take several shapes."""

from __future__ import annotations

import importlib
import itertools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from corenas_mutable_attention.attention import MultiHeadAttention as MultiHeadAttention
    from corenas_mutable_attention.attention import RelativePosition as RelativePosition
    from corenas_mutable_attention.attention import qkv as qkv
    from corenas_mutable_attention.layers import LayerNormSlice as LayerNormSlice
    from corenas_mutable_attention.layers import ParameterSlice as ParameterSlice
    from corenas_mutable_attention.layers import PatchEmbedding as PatchEmbedding

_MODULES = {
    "attention": ("MultiHeadAttention", "RelativePosition", "qkv"),
    "layers": ("LayerNormSlice", "ParameterSlice", "PatchEmbedding"),
}


def __getattr__(name: str) -> Any:
    # The entry point names this module: it may be imported to list what is installed, without torch.
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"corenas_mutable_attention.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *itertools.chain(*_MODULES.values())})
