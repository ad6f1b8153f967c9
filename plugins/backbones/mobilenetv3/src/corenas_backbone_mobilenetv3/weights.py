"""How torchvision, timm and Once-for-All call the weights of their networks of inverted residual blocks."""

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
from corenas.run.toml import SPECS, read_toml
from corenas.space import SearchSpace
from corenas_backbone_mobilenetv3 import MobileNetV3
from corenas_mutable_slices.exchange import (
    Published,
    PublishedSupernet,
    drop,
    fits,
    once_for_all_blocks,
    once_for_all_name,
)

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


def recognise(model: nn.Module, state: dict[str, Tensor]) -> Published | PublishedSupernet:
    """Which network or supernet a state dict without a classifier is of, by names and shapes.

    Raises UserError for a network that is not known if its family's batch norms add something else to the variance.
    """
    if any(name.startswith("first_conv.") for name in state):
        return PublishedSupernet("a supernet of Once-for-All's family, or one of its subnets", _supernet_names)
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


_LAYERS = {
    "expand": "inverted_bottleneck",
    "depthwise": "depth_conv",
    "project": "point_linear",
    "se": "depth_conv.se.fc",
    "shortcut": "shortcut.conv",
}
"""What a block's layers are in Once-for-All's code, and in AttentiveNAS's and AlphaNet's after it."""


def _supernet_names(model: nn.Module, state: dict[str, Tensor]) -> Callable[[str], str]:
    """Gives the name in a supernet of Once-for-All's family, of which the state keeps what a model has room for.

    Raises UserError for one of other stages, for matrices between kernels where the model's are mere centres, and for a
    model of operations by name.
    """
    backbone: Any = model
    for name in [*state]:
        tensor = state.pop(name)
        if "bn_tracking" not in name:  # statistics of AttentiveNAS's smallest and largest subnet
            own = once_for_all_name(name).removeprefix("last_conv.")
            state[re.sub(r"^(?=(conv|bn)\.)", "feature_mix_layer.", own)] = tensor
    if any(not hasattr(block, "body") for stage in backbone.stages for block in stage.blocks):
        raise UserError("its kernels and expansions share weights, and this space has operations by name")
    numbers = once_for_all_blocks(state, "point_linear.bn", backbone.stages)
    for (i, j), number in numbers.items():
        block, path = backbone.stages[i].blocks[j], f"blocks.{number}."
        _narrow_kernel(state, f"{path}depth_conv.conv.", block.body.depthwise.conv)
        if not getattr(block, "shortcut", nn.Identity()).state_dict():
            drop(state, f"{path}shortcut.")  # AttentiveNAS's code has it where it is never used, too
    head = "final_expand_layer" if "final_expand_layer.conv.weight" in state else "feature_mix_layer"
    outside = {"stem": "first_conv", "final.0": head, "final.3": "feature_mix_layer.conv"}
    if getattr(backbone, "levels", ()):  # what comes after the last of them is nowhere
        drop(state, "final_expand_layer.", "feature_mix_layer.")

    def rename(name: str) -> str:
        match = re.fullmatch(r"stages\.(\d+)\.blocks\.(\d+)\.(?:body\.)?(\w+)\.(.+)", name)
        if match is None:
            path = next((path for path in outside if name.startswith(f"{path}.")), "")
            return outside.get(path, path) + name.removeprefix(path).replace("norm.", "bn.")
        rest = re.sub(r"^(1\.)?projection\.", "", match[4]).replace("norm.", "bn.")
        if (transform := re.fullmatch(r"conv\.transforms\.(\d+)\.matrix", rest)) is not None:
            sizes = backbone.get_submodule(name.partition(".transforms")[0]).kernel.possible[::-1]
            rest = "conv.{}to{}_matrix".format(*sizes[int(transform[1]) :])
        return f"blocks.{numbers[int(match[1]), int(match[2])]}.{_LAYERS[match[3]]}.{rest}"

    return rename


def _narrow_kernel(state: dict[str, Tensor], path: str, conv: Any) -> None:
    """Make a depthwise kernel as small as the largest of a layer, by the matrices between sizes where there are any.

    Those that the layer has no use for go. Raises UserError where its smaller kernels would be mere centres instead.
    """
    weight = state[f"{path}weight"]
    matrices = [name for name in state if name.startswith(path) and name.endswith("_matrix")]
    if matrices and len(conv.kernel.possible) > 1 and conv.transforms is None:
        raise UserError("smaller kernels come from larger ones by matrices there: set `transforms = true`")
    while (size := weight.shape[-1]) > conv.kernel_size[0]:
        weight = weight[..., 1:-1, 1:-1]
        matrix = state.pop(f"{path}{size}to{size - 2}_matrix", None)
        if matrix is not None:
            weight = (weight.flatten(1) @ matrix.T).view(weight.shape)
    state[f"{path}weight"] = weight
    if conv.transforms is None:
        for name in {*matrices} & {*state}:
            del state[name]


_SIGNS = {
    "efficientnet": "features.1.0.block.0.0.weight",
    "mobilenet_v3": "features.1.block.0.0.weight",
    "mobilenet_v2": "features.1.conv.0.0.weight",
}
"""What only the networks of a family have."""
