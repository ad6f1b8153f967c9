"""How torchvision and timm call the weights of their networks of inverted residual blocks."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from corenas.errors import UserError
from corenas.mutable import apply
from corenas.run.spec import SPECS
from corenas.run.toml import read_toml
from corenas.space import SearchSpace
from corenas_backbone_mobilenetv3 import MobileNetV3
from corenas_mutable_slices.exchange import Published, fits

_PARTS = {"conv": "0", "norm": "1", "reduce": "fc1", "expand": "fc2"}
_BLOCKS = {"mobilenet_v3": "{number}.block", "mobilenet_v2": "{number}.conv", "efficientnet": "{stage}.{block}.block"}
_CANDIDATE = re.compile(r"candidates_[a-z0-9]+_(?=body)")
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
                for k, (layer, _) in enumerate(_chosen(block).body.named_children()):
                    layers[f"stages_{i}_blocks_{j}_body_{layer}"] = f"features.{path}.{k}"
    last = number if family != "efficientnet" else len(backbone.stages)
    layers["final_0"] = f"features.{last + 1}"

    def rename(name: str) -> str:
        path, _, tensor = re.sub(_CANDIDATE, "", name).rpartition(".")
        if path.startswith(("head", "final_3")):
            return f"{'classifier.0' if path == 'final_3' else _HEADS[family]}.{tensor}"
        layer, _, part = path.rpartition("_")
        if family == "mobilenet_v2" and layer.endswith("project"):  # there these two stand beside the other layers
            before, _, number = layers[layer].rpartition(".")
            return f"{before}.{int(number) + (part == 'norm')}.{tensor}"
        return f"{layers[layer]}.{_PARTS[part]}.{tensor}"

    return rename


def timm_names(model: nn.Module, arch: Mapping[str, Any]) -> Callable[[str], str]:
    """Gives timm's name of a weight of an exported subnet, which is one of its networks.

    "stages_1_blocks_0_body_expand_conv.weight" is "blocks.1.0.conv_pw.weight": for `corenas_mutable_slices.exchange`.

    model: a supernet, or a backbone alone
    """
    backbone: Any = getattr(model, "backbone", model)
    features, bare = f"blocks.{len(backbone.stages)}.0.", {}  # MobileNetV3's last convolution is a stage
    with apply(model, arch):
        for i, stage in enumerate(backbone.stages):
            for j, block in enumerate(stage.blocks[: stage.elastic.choice["depth"]]):
                bare[i, j] = "expand" not in dict(_chosen(block).body.named_children())
    v3 = any(isinstance(module, nn.Linear) for module in getattr(backbone, "final", nn.Identity()).modules())
    outside = {
        "stem_conv": "conv_stem",
        "stem_norm": "bn1",
        "final_0_conv": f"{features}conv" if v3 else "conv_head",
        "final_0_norm": f"{features}bn1" if v3 else "bn2",
        "final_3": "conv_head",
    }

    def rename(name: str) -> str:
        path, _, tensor = name.rpartition(".")
        match = re.fullmatch(r"stages_(\d+)_blocks_(\d+)_body_(\w+)", re.sub(_CANDIDATE, "", path))
        if match is None:
            return f"{'classifier' if path.startswith('head') else outside.get(path, path)}.{tensor}"
        i, j, layer = int(match[1]), int(match[2]), match[3]
        return f"blocks.{i}.{j}.{(_TIMM_BARE if bare[i, j] else _TIMM)[layer]}.{tensor}"

    return rename


_GATES = {"se_reduce": "se.conv_reduce", "se_expand": "se.conv_expand"}
_TIMM = {
    **{"expand_conv": "conv_pw", "expand_norm": "bn1", "depthwise_conv": "conv_dw", "depthwise_norm": "bn2"},
    **{"project_conv": "conv_pwl", "project_norm": "bn3", **_GATES},
}
_TIMM_BARE = {
    **{"depthwise_conv": "conv_dw", "depthwise_norm": "bn1", "project_conv": "conv_pw", "project_norm": "bn2", **_GATES}
}
"""Of blocks without expansion."""


def _chosen(block: nn.Module) -> Any:
    """A block, or of several the one in force."""
    candidates: Any = getattr(block, "candidates", None)
    return block if candidates is None else candidates[str(block.elastic.choice["op"])]


PUBLISHED = ("mobilenetv3-large", "mobilenetv3-small", "mobilenetv2", "mnasnet", "efficientnet-b0")
"""Spaces of one network, of which torchvision and timm have weights."""


def recognise(model: nn.Module, state: Mapping[str, Tensor]) -> Published:
    """Which network a state dict without a classifier is of, by names and shapes.

    Raises UserError for a network that is not known if its family's batch norms add something else to the variance.
    """
    family = "timm" if "conv_stem.weight" in state else next((f for f, key in _SIGNS.items() if key in state), "other")
    eps = 1e-3 if family == "mobilenet_v3" else 1e-5
    rename = timm_names if family == "timm" else functools.partial(torchvision_names, family=family)
    for name in PUBLISHED if family != "other" else ():
        _, table = read_toml(SPECS / "space" / f"{name}.toml", "space")
        with torch.device("meta"):
            network = MobileNetV3(norm_eps=eps).build(SearchSpace.from_table(table))
        with suppress(KeyError):  # of more layers in a block than this family has
            if fits(network, state, rename(network, {})):
                return Published(f"{name}, by {'timm' if family == 'timm' else 'torchvision'}", network, rename)
    wrong = next((norm.eps for norm in model.modules() if isinstance(norm, nn.BatchNorm2d) and norm.eps != eps), None)
    if wrong is not None:
        raise UserError(f"its batch norms have eps = {eps}, those of the backbone {wrong}: set `norm_eps`")
    return Published("a network that is not known", None, rename)


_SIGNS = {
    "efficientnet": "features.1.0.block.0.0.weight",
    "mobilenet_v3": "features.1.block.0.0.weight",
    "mobilenet_v2": "features.1.conv.0.0.weight",
}
"""What only the networks of a family have."""
