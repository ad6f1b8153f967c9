"""How torchvision calls the weights of its networks of inverted residual blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from corenas.mutable import apply

_PARTS = {"conv": "0", "norm": "1", "reduce": "fc1", "expand": "fc2"}
_BLOCKS = {"mobilenet_v3": "{number}.block", "mobilenet_v2": "{number}.conv", "efficientnet": "{stage}.{block}.block"}
FAMILIES = tuple(_BLOCKS)
"""Of torchvision's networks, by how their weights are named."""
_HEADS = {"mobilenet_v3": "classifier.3", "mobilenet_v2": "classifier.1", "efficientnet": "classifier.1"}


def torchvision_names(model: nn.Module, arch: Mapping[str, Any], family: str = "mobilenet_v3") -> Callable[[str], str]:
    """Gives torchvision's name of a weight of an exported subnet, which is one of its networks.

    "stages_1_blocks_0_body_expand_conv.weight" is "features.2.block.0.0.weight": for `corenas_mutable_slices.exchange`.

    model: a supernet, or a backbone alone
    family: "mobilenet_v3", "mobilenet_v2" or "efficientnet"
    """
    backbone: Any = getattr(model, "backbone", model)
    layers, number = {"stem": "features.0"}, 0
    with apply(model, arch):
        for i, stage in enumerate(backbone.stages):
            for j, block in enumerate(stage.blocks[: stage.elastic.choice["depth"]]):
                number += 1
                path = _BLOCKS[family].format(stage=i + 1, block=j, number=number)
                for k, (layer, _) in enumerate(block.body.named_children()):
                    layers[f"stages_{i}_blocks_{j}_body_{layer}"] = f"features.{path}.{k}"
    last = number if family != "efficientnet" else len(backbone.stages)
    layers["final_0"] = f"features.{last + 1}"

    def rename(name: str) -> str:
        path, _, tensor = name.rpartition(".")
        if path.startswith(("head", "final_3")):
            return f"{'classifier.0' if path == 'final_3' else _HEADS[family]}.{tensor}"
        layer, _, part = path.rpartition("_")
        if family == "mobilenet_v2" and layer.endswith("project"):  # there these two stand beside the other layers
            before, _, number = layers[layer].rpartition(".")
            return f"{before}.{int(number) + (part == 'norm')}.{tensor}"
        return f"{layers[layer]}.{_PARTS[part]}.{tensor}"

    return rename
