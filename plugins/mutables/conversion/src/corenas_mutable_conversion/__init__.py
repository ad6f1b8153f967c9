"""Conversion: any model of torch as a supernet, by its own code."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from corenas_mutable_conversion.conversion import Converted as Converted
    from corenas_mutable_conversion.conversion import Finding as Finding
    from corenas_mutable_conversion.conversion import convert as convert
    from corenas_mutable_conversion.rules import Rules as Rules

_MODULES = {"conversion": ("Converted", "Finding", "convert"), "rules": ("Rules",)}


def __getattr__(name: str) -> Any:
    # The entry point names this module: it may be imported to list what is installed, without torch.
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"corenas_mutable_conversion.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
