"""Conversion: any model of torch as a supernet, by its own code; the command `convert`."""

from __future__ import annotations

import importlib
import itertools
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corenas.hookspecs import hookimpl
from corenas_mutable_conversion.rules import Rules as Rules

if TYPE_CHECKING:
    from corenas_mutable_conversion.conversion import Converted as Converted
    from corenas_mutable_conversion.conversion import Finding as Finding
    from corenas_mutable_conversion.conversion import convert as convert
    from corenas_mutable_conversion.sorting import sort_channels as sort_channels

_MODULES = {"conversion": ("Converted", "Finding", "convert"), "sorting": ("sort_channels",)}


def __getattr__(name: str) -> Any:
    # The entry point names this module: it may be imported to list what is installed, without torch.
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"corenas_mutable_conversion.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *itertools.chain(*_MODULES.values())})


def add_convert(parser: ArgumentParser) -> Callable[[Namespace], int]:
    """Make a supernet of a model: write its search space, what it costs, and what is not searchable and why."""
    parser.add_argument("model", metavar="MODEL", help="torchvision:NAME, timm:NAME, or FILE.py:FUNCTION")
    parser.add_argument("--weights", metavar="FILE", type=Path, help="its weights: safetensors or a state dict")
    text = "an input, 1x3x224x224 for instance; whole numbers as 1x12:int64; several are several arguments"
    parser.add_argument("--example", metavar="SHAPE", action="append", default=[], help=text)
    text = "an argument of the function that builds the model, for instance num_classes=10"
    parser.add_argument("--option", metavar="KEY=VALUE", action="append", default=[], help=text)
    parser.add_argument("--rules", metavar="FILE", type=Path, help="a TOML file that says what becomes searchable")
    parser.add_argument("--to", metavar="DIR", type=Path, required=True, help="the folder to write")
    parser.add_argument("--explain", action="store_true", help="list what is not searchable, and why")

    def command(options: Namespace) -> int:
        importlib.import_module("corenas_mutable_conversion.command").command(options)
        return 0

    return command


@hookimpl
def corenas_commands() -> dict[str, Any]:
    """The command `convert`."""
    return {"convert": add_convert}
