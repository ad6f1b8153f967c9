"""Channel sorting: the channels of a supernet in the order of their importance."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from corenas_mutable_sorting.sorting import IMPORTANCE as IMPORTANCE
    from corenas_mutable_sorting.sorting import Sorted as Sorted
    from corenas_mutable_sorting.sorting import input_norm as input_norm
    from corenas_mutable_sorting.sorting import sort_channels as sort_channels

_NAMES = ("IMPORTANCE", "Sorted", "input_norm", "sort_channels")


def __getattr__(name: str) -> Any:
    # The entry point names this module: it may be imported to list what is installed, without torch.
    if name in _NAMES:
        return getattr(importlib.import_module("corenas_mutable_sorting.sorting"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES})
