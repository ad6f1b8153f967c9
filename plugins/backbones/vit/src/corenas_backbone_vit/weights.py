"""Where published networks stand in `spec/space/vit.toml`, and how torchvision, timm and AutoFormer name weights."""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corenas.errors import UserError
from corenas.mutable import apply
from corenas.space import SearchSpace
from corenas_backbone_vit import Layout, VisionTransformer
from corenas_mutable_slices.exchange import Published, PublishedSupernet, Rename


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
    "stem_class_token": ("class_token", "cls_token"),
    "stem_position": ("encoder.pos_embedding", "pos_embed"),
    "stem_patches": ("conv_proj", "patch_embed.proj"),
    "final_norm": ("encoder.ln", "norm"),
    "head": ("heads.head", "head"),
    "head_classifier": ("heads.head", "head"),
}
"""Of what stands outside of blocks, the names in torchvision and in timm."""

_IN_BLOCK = {
    "attention_body_norm.": ("ln_1.", "norm1."),
    "attention_body_qkv.": ("self_attention.in_proj_", "attn.qkv."),
    "attention_body_project.": ("self_attention.out_proj.", "attn.proj."),
    "mlp_body_norm.": ("ln_2.", "norm2."),
    "mlp_body_expand.": ("mlp.0.", "mlp.fc1."),
    "mlp_body_project.": ("mlp.3.", "mlp.fc2."),
}
_BLOCK = "encoder.layers.encoder_layer_{}.", "blocks.{}."

HEAD_DIMS = {1280: 80, 1408: 88, 1664: 104}
"""Features of a head of published networks by their width; of all others 64."""


def torchvision_name(name: str, library: int = 0, before: Sequence[int] = (0,)) -> str:
    """The name that torchvision's VisionTransformer has for a tensor of an exported network.

    For `corenas_mutable_slices.exchange`; a name that has no counterpart stays as it is.
    library: 1 for the name in timm
    before: for each stage the number of blocks in those before it
    """
    if match := re.fullmatch(r"stages_(\d+)_blocks_(\d+)_(\w+\.)(\w+)", name):
        stage, number, layer, tensor = match.groups()
        own = _IN_BLOCK[layer][library] if layer in _IN_BLOCK else layer
        return f"{_BLOCK[library].format(before[int(stage)] + int(number))}{own}{tensor}"
    layer, dot, tensor = name.partition(".")
    return f"{_NAMES[layer][library] if layer in _NAMES else layer}{dot}{tensor}"


def timm_name(name: str) -> str:
    """The same in timm's VisionTransformer, DeiT's names too."""
    return torchvision_name(name, library=1)


def recognise(state: dict[str, Tensor], layout: Layout, front_bias: bool) -> Published | PublishedSupernet:
    """Which network a state dict without a classifier is of, as far as its shapes say it; heads have their usual size.

    layout: of the space; the position embedding is resized to its map
    front_bias: the backbone's option, which a supernet of AutoFormer's code asks for
    """
    if "patch_embed_super.proj.weight" in state:
        return PublishedSupernet("a supernet of AutoFormer", functools.partial(_supernet_names, layout, front_bias))
    library = int("cls_token" in state)
    token, position, patches = (
        state.get(torchvision_name(name, library))
        for name in ("stem_class_token", "stem_position", "stem_patches.weight")
    )
    blocks = {match[1] for name in state if (match := re.match(_BLOCK[library].format(r"(\d+)"), name))}
    inner = state.get(torchvision_name("stages_0_blocks_0_mlp_body_expand.bias", library))
    if token is None or position is None or patches is None or inner is None:
        return Published("a network that is no vision transformer", None, lambda body, arch: str)
    width, tokens = token.shape[-1], position.shape[1]
    extra = {"dist_token": "a distillation token", "reg_token": "registers", "fc_norm.weight": "a norm after pooling"}
    name = f"a vision transformer of {len(blocks)} blocks of width {width}"
    if have := [what for key, what in extra.items() if key in state]:
        raise UserError(f"{name} has {have[0]}")
    side = math.isqrt(tokens - 1)
    if side * side != tokens - 1:
        raise UserError(f"{name} has {tokens - 1} positions, no square of them")
    state[torchvision_name("stem_position", library)] = resized(position, (side, side), layout.grid)
    head_dim = HEAD_DIMS.get(width, 64)
    all_depths = itertools.product(*(stage.depth.possible[::-1] for stage in layout.stages))
    depths = next((depths for depths in all_depths if sum(depths) == len(blocks)), None)
    if depths is None:
        raise UserError(f"{name}: the space has never so many blocks")
    block = {"heads": width // head_dim, "head_dim": head_dim, "mlp_ratio": (len(inner) + 0.5) / width}
    patch = patches.shape[-1]
    rows, columns = layout.grid
    resolution = {"height": rows * patch, "width": columns * patch}
    table = {
        "width": width,
        "patch": patch,
        "resolution": resolution,
        "stages": [{"depth": depth, **block} for depth in depths],
    }
    with torch.device("meta"):
        network = VisionTransformer().build(SearchSpace.from_table(table))
    return Published(name, network, functools.partial(_names, library))


_SUPERNET_NAMES = (
    (r"^stem\.patches\.", "patch_embed_super.proj."),
    (r"^stem\.class_token\.weight", "cls_token"),
    (r"^stem\.position\.weight", "pos_embed"),
    (r"^final\.norm\.", "norm."),
    (r"\battention\.body\.norm\.", "attn_layer_norm."),
    (r"\bmlp\.body\.norm\.", "ffn_layer_norm."),
    (r"\bmlp\.body\.expand\.", "fc1."),
    (r"\bmlp\.body\.project\.", "fc2."),
    (r"\battention\.body\.(qkv|proj)(?:ect)?\.", r"attn.\1."),
    (r"\battention\.body\.attention\.keys\.", "attn.rel_pos_embed_k."),
    (r"\battention\.body\.attention\.vectors\.", "attn.rel_pos_embed_v."),
    (r"\brows\.weight", "embeddings_table_v"),
    (r"\bcolumns\.weight", "embeddings_table_h"),
)


def _supernet_names(layout: Layout, front_bias: bool, model: nn.Module, state: dict[str, Tensor]) -> Rename:
    """Gives AutoFormer's names, of whose state dict it keeps the blocks that a model has room for.

    Queries, keys and values, whose features take turns there, are put one after the other, as here. Raises UserError
    for a model whose subnets have other biases of them, or another map of patches.
    """
    body: Any = model
    if not front_bias:
        raise UserError("its subnets have the first biases of the whole: set `front_bias = true`")
    before = [*itertools.accumulate((len(stage.blocks) for stage in body.stages), initial=0)]
    for name in [*state]:
        match = re.match(r"blocks\.(\d+)\.", name)
        if match is not None and int(match[1]) >= before[-1]:
            del state[name]
        elif name.endswith("attn.qkv.weight"):
            state[name] = torch.cat([state[name][i::3] for i in range(3)])
    if (position := state.get("pos_embed")) is not None:
        side = math.isqrt(position.shape[1] - 1)
        state["pos_embed"] = resized(position, (side, side), layout.grid)

    def rename(name: str) -> str:
        if match := re.match(r"stages\.(\d+)\.blocks\.(\d+)\.", name):
            name = f"blocks.{before[int(match[1])] + int(match[2])}.{name.removeprefix(match[0])}"
        for pattern, replacement in _SUPERNET_NAMES:
            name = re.sub(pattern, replacement, name)
        return name

    return rename


def _names(library: int, body: Any, arch: Mapping[str, Any]) -> Rename:
    """The names of an arch's weights: blocks are counted through all stages."""
    with apply(body, arch):
        depths = [stage.elastic.choice["depth"] for stage in body.stages]
    return functools.partial(torchvision_name, library=library, before=[*itertools.accumulate(depths, initial=0)])


def resized(position: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """A position embedding (1, 1 + rows * columns, width), its class token first, for another map of patches.

    As in DeiT's and timm's code: bicubic, antialiased.
    """
    if old == new:
        return position
    patches = position[:, 1:].float().unflatten(1, old).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, new, mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    return torch.cat([position[:, :1], patches.to(position)], 1)
