"""Conversion: any model of torch as a supernet, by its own code; the command `convert` and the backbone "converted"."""

from __future__ import annotations

import importlib
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from attrs import field, frozen

from corenas.hookspecs import hookimpl
from corenas.space import SearchSpace
from corenas_mutable_conversion.rules import Rules as Rules

if TYPE_CHECKING:
    from torch import nn

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


@frozen
class ConvertedModel:
    """A model of torch's world as a backbone: its own layers, its own head, and the space that it gives.

    A spec needs no `space` then; `[space]` may hold `fix` and `narrow`, over the keys that `corenas convert` lists.

    model: `torchvision:NAME`, `timm:NAME`, or `FILE.py:FUNCTION`, a function of no arguments that gives a model
    options: what the function that builds it is called with, `num_classes` for instance
    weights: a file of its weights, safetensors or a state dict; left out, fresh ones
    image: what the task gives: channels, height, width
    rules: what becomes searchable
    sort: bring channels into the order of this importance first, so that narrow subnets keep the most important ones:
        a measure of `corenas_mutable_sorting` ("l1", "l2", "norm_scale"); "" leaves them as they are
    """

    model: str
    options: Mapping[str, Any] = field(factory=dict, hash=False)
    weights: str | None = None
    image: tuple[int, int, int] = field(default=(3, 224, 224), converter=tuple)
    rules: Rules = Rules()
    sort: str = ""

    example: ClassVar[Mapping[str, Any]] = {
        "backbone": {"model": "torchvision:shufflenet_v2_x0_5", "image": [3, 28, 28]},
        "space": {},
    }

    def space(self) -> SearchSpace:
        """Return all that the model can be. Raises UserError for a model that cannot be converted."""
        from corenas_mutable_conversion import backbone

        return backbone.space_of(self)

    def build(self, space: SearchSpace) -> nn.Module:
        """Return the model as a supernet of a space; raises UserError for keys that it has not."""
        from corenas_mutable_conversion import backbone

        return backbone.build(self, space)

    @property
    def fingerprint(self) -> str:
        """What its file of weights is known by."""
        import hashlib

        return hashlib.sha256(Path(self.weights).read_bytes()).hexdigest() if self.weights else ""


@hookimpl
def corenas_backbones() -> dict[str, type]:
    """The backbone "converted"."""
    return {"converted": ConvertedModel}


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
