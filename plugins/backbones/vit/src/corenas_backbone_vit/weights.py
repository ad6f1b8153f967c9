"""Where published networks stand in `spec/space/vit.toml`, and how torchvision names their weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def _network(width: int, depth: int, heads: int) -> Mapping[str, Any]:
    return {"width": width, "stages": [{"depth": depth, "blocks": [{"heads": heads, "mlp_ratio": 4}] * depth}]}


NETWORKS: Mapping[str, Mapping[str, Any]] = {
    "deit_tiny": _network(192, 12, 3),
    "deit_small": _network(384, 12, 6),
    "deit_base": _network(768, 12, 12),
    "vit_b_16": _network(768, 12, 12),
    "vit_l_16": _network(1024, 24, 16),
}
"""The choices of DeiT's and torchvision's networks, for `space.arch`."""

_NAMES = {
    "stem_class_token": "class_token",
    "stem_position": "encoder.pos_embedding",
    "stem_patches": "conv_proj",
    "final_norm": "encoder.ln",
    "head": "heads.head",
    "head_classifier": "heads.head",
}
_IN_BLOCK = {
    "attention_body_norm.": "ln_1.",
    "attention_body_qkv.": "self_attention.in_proj_",
    "attention_body_project.": "self_attention.out_proj.",
    "mlp_body_norm.": "ln_2.",
    "mlp_body_expand.": "mlp.0.",
    "mlp_body_project.": "mlp.3.",
}


def torchvision_name(name: str) -> str:
    """The name that torchvision's VisionTransformer has for a tensor of an exported network of one stage.

    For `corenas_mutable_slices.exchange`; a name that has no counterpart stays as it is.
    """
    if match := re.fullmatch(r"stages_0_blocks_(\d+)_(\w+\.)(\w+)", name):
        number, layer, tensor = match.groups()
        return f"encoder.layers.encoder_layer_{number}.{_IN_BLOCK.get(layer, layer)}{tensor}"
    layer, dot, tensor = name.partition(".")
    return f"{_NAMES.get(layer, layer)}{dot}{tensor}"
