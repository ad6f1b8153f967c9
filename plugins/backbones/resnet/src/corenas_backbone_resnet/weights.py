"""Where torchvision's networks stand in `spec/space/resnet.toml`, and how it names their weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from corenas.space import SearchSpace
from corenas_backbone_resnet import ResNet
from corenas_mutable_slices.exchange import Published, fits


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


def recognise(state: Mapping[str, Tensor]) -> Published:
    """Which of torchvision's networks a state dict without a classifier is of."""
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
