"""A model of torchvision, timm or one's own as a backbone: converted, with its own layers, head and weights."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from attrs import field, frozen

from corenas.hookspecs import hookimpl
from corenas.space import SearchSpace
from corenas_mutable_conversion.rules import Rules

if TYPE_CHECKING:
    from torch import nn


Image = Annotated[
    tuple[int, int, int],
    "channels, height and width, each at least 1, of at most 2**28 numbers",
    lambda image: min(image) >= 1 and math.prod(image) <= 1 << 28,
]


@frozen
class ConvertedModel:
    """A model of torch's world as a backbone: its own layers, its own head, and the space that it gives.

    A spec needs no `space` then; `[space]` may hold `fix` and `narrow`, over the keys that `corenas convert` lists.

    model: `torchvision:NAME`, `timm:NAME`, or `FILE.py:FUNCTION`, a function of no arguments that gives a model
    options: what the function that builds it is called with, `num_classes` for instance
    weights: a file of its weights, safetensors or a state dict, or the directory of a run whose backbone it was; left
        out, fresh ones
    image: what the task gives: channels, height, width
    rules: what becomes searchable
    sort: bring channels into the order of this importance first, so that narrow subnets keep the most important ones:
        a measure of `corenas_mutable_sorting` ("l1", "l2", "norm_scale"); "" leaves them as they are
    """

    model: str
    options: Mapping[str, Any] = field(factory=dict, hash=False)
    weights: str | None = None
    image: Image = field(default=(3, 224, 224), converter=tuple)
    rules: Rules = Rules()
    sort: str = ""

    def space(self) -> SearchSpace:
        """Return all that the model can be. Raises UserError for a model that cannot be converted."""
        from corenas_backbone_converted import network

        return network.space_of(self)

    def build(self, space: SearchSpace) -> nn.Module:
        """Return the model as a supernet of a space; raises UserError for keys that it has not."""
        from corenas_backbone_converted import network

        return network.build(self, space)

    @property
    def fingerprint(self) -> str:
        """What its file of weights is known by."""
        if self.weights is None:
            return ""
        from corenas_mutable_conversion.models import weights_file

        return hashlib.sha256(weights_file(Path(self.weights)).read_bytes()).hexdigest()


@hookimpl
def corenas_backbones() -> dict[str, type]:
    """The backbone "converted"."""
    return {"converted": ConvertedModel}
