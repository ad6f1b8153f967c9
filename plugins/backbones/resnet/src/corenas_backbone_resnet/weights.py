"""Where torchvision's networks stand in `spec/space/resnet.toml`; how it and Once-for-All name their weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from corenas.errors import UserError
from corenas.space import SearchSpace
from corenas_backbone_resnet import ResNet
from corenas_mutable_slices.exchange import (
    Published,
    PublishedSupernet,
    fits,
    once_for_all_blocks,
    once_for_all_name,
)


def _network(op: str, depths: Sequence[int], widths: Sequence[int], **blocks: float) -> Mapping[str, Any]:
    rows = zip(depths, widths, strict=True)
    stages = [{"op": op, op: {"width": width, "depth": depth, "kernel": 3, **blocks}} for depth, width in rows]
    return {"stem": {"width": 64, "kernel": 7}, "stages": stages}


_NARROW, _WIDE = (64, 128, 256, 512), (256, 512, 1024, 2048)

TORCHVISION: Mapping[str, Mapping[str, Any]] = {
    "resnet18": _network("basic", (2, 2, 2, 2), _NARROW),
    "resnet34": _network("basic", (3, 4, 6, 3), _NARROW),
    "resnet50": _network("bottleneck", (3, 4, 6, 3), _WIDE, ratio=0.25),
    "resnet101": _network("bottleneck", (3, 4, 23, 3), _WIDE, ratio=0.25),
    "resnet152": _network("bottleneck", (3, 8, 36, 3), _WIDE, ratio=0.25),
    "wide_resnet50_2": _network("bottleneck", (3, 4, 6, 3), _WIDE, ratio=0.5),
    "wide_resnet101_2": _network("bottleneck", (3, 4, 23, 3), _WIDE, ratio=0.5),
}
"""The choices of torchvision's networks, for `space.arch`."""

_NAMES = (
    (r"^stem_first_conv", r"conv1"),
    (r"^stem_first_norm", r"bn1"),
    (r"^stages_(\d+)_candidates_[a-z]+_blocks_(\d+)_", lambda match: f"layer{int(match[1]) + 1}.{match[2]}."),
    (r"body_conv(\d)_conv", r"conv\1"),
    (r"body_conv(\d)_norm", r"bn\1"),
    (r"shortcut_projection_conv", r"downsample.0"),
    (r"shortcut_projection_norm", r"downsample.1"),
    (r"^head(_\w+)?", r"fc"),
)


def torchvision_name(name: str) -> str:
    """The name that torchvision's ResNet gives to a weight of an exported network.

    "stages_0_candidates_basic_blocks_1_body_conv2_norm.bias" is "layer1.1.bn2.bias".
    """
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def recognise(state: dict[str, Tensor]) -> Published | PublishedSupernet:
    """Which of torchvision's networks, or Once-for-All's supernets, a state dict without a classifier is of."""
    if any(name.startswith("input_stem.") for name in state):
        return PublishedSupernet("a supernet of Once-for-All's ResNets, or one of its subnets", _supernet_names)
    for name, choices in TORCHVISION.items():
        stages = [
            {stage["op"]: {"ratio": 1, **stage[stage["op"]]}, "stride": 2 if i else 1}
            for i, stage in enumerate(choices["stages"])
        ]
        with torch.device("meta"):
            network = ResNet().build(SearchSpace.from_table({**choices, "stages": stages}))
        if fits(network, state, torchvision_name):
            return Published(name, network, lambda body, arch: torchvision_name)
    return Published("a ResNet that is not known", None, lambda body, arch: torchvision_name)


_SUPERNET_NAMES = (
    (r"^stem\.first\.", r"input_stem.0."),
    (r"^stem\.middle\.blocks\.0\.body\.conv\.", r"input_stem.1."),
    (r"^stem\.last\.", r"input_stem.2."),
    (r"\.body\.", r"."),
    (r"\.shortcut\.projection\.(?:conv\.(?=conv\.|norm\.))?", r".downsample."),
    (r"\bnorm\.", r"bn."),
)


def _supernet_names(model: nn.Module, state: dict[str, Tensor]) -> Callable[[str], str]:
    """Gives the names of Once-for-All's ResNets, of whose state dict it keeps the blocks that a model has room for.

    Raises UserError for one of other stages, and for a model without bottleneck blocks.
    """
    backbone: Any = model
    for name in [*state]:
        tensor = state.pop(name)
        state[once_for_all_name(name)] = tensor
    if any("bottleneck" not in stage.candidates for stage in backbone.stages):
        raise UserError("it is of bottleneck blocks, which some stages of this one have not")
    stages = [stage.candidates["bottleneck"] for stage in backbone.stages]
    numbers = once_for_all_blocks(state, "conv3.bn", stages)

    def rename(name: str) -> str:
        match = re.match(r"stages\.(\d+)\.candidates\.bottleneck\.blocks\.(\d+)\.", name)
        if match is not None:
            name = f"blocks.{numbers[int(match[1]), int(match[2])]}.{name.removeprefix(match[0])}"
        for pattern, replacement in _SUPERNET_NAMES:
            name = re.sub(pattern, replacement, name)
        return name

    return rename
