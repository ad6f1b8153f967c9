"""Vision transformers as a supernet: patches become tokens, which pass blocks of attention and MLP, and a norm."""

from __future__ import annotations

import functools
import itertools
from collections import OrderedDict
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from corenas.regularisation import DropPath
from corenas.value import Value, rounded
from corenas_mutable_attention import LayerNormSlice, MultiHeadAttention, ParameterSlice, PatchEmbedding, qkv
from corenas_mutable_slices import ElasticDepth, LinearSlice, Residual, Staged, activation
from corenas_mutable_slices.layouts import of_block

if TYPE_CHECKING:
    from corenas_backbone_vit import Layout, Stage, VisionTransformer


def supernet(layout: Layout, options: VisionTransformer) -> Staged | Maps:
    """The supernet of one space: (n, in_channels, h, w) -> [(n, width)], or a map (n, width, h', w') for each level."""
    stem = Tokens(options.in_channels or 3, layout.width, layout.patch, layout.grid, options.dropout)
    whole = sum(stage.depth.largest for stage in layout.stages)
    drop_path = iter(options.drop_path * i / max(whole - 1, 1) for i in range(whole))
    stages = []
    for stage in layout.stages:
        blocks = [
            block(layout, stage, i, options.dropout, path, options.front_bias)
            for i, path in enumerate(itertools.islice(drop_path, stage.depth.largest))
        ]
        stages.append((ElasticDepth(blocks, stage.depth), layout.width))
    norm = LayerNormSlice(layout.width, layout.norm_eps)
    final = nn.Sequential(OrderedDict(norm=norm, pool=Pool(layout.pool)))
    model = Staged(stem, stages, (final, layout.width), options.levels, layout.resolution, options.resize_mode)
    for module in model.modules():
        if isinstance(module, nn.Linear):  # as in ViT's code; DeiT's 0.02 suits widths of 768
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, ParameterSlice):
            nn.init.trunc_normal_(module.weight, std=0.02)
    return Maps(model, layout.grid) if options.levels else model


def block(
    layout: Layout, stage: Stage, i: int, dropout: float = 0.0, drop_path: float = 0.0, front_bias: bool = False
) -> nn.Sequential:
    """The i-th block of a stage: attention and MLP, each with a norm before and a shortcut past it."""
    heads, head_dim, mlp_ratio = (of_block(stage, i, name) for name in ("heads", "head_dim", "mlp_ratio"))
    width = layout.width
    inner: Value = rounded(width * mlp_ratio // 1)

    def end() -> dict[str, nn.Module]:
        rates = ("drop", nn.Dropout, dropout), ("path", functools.partial(DropPath, axes=2), drop_path)
        return {name: layer(rate) for name, layer, rate in rates if rate}

    attention = {
        "norm": LayerNormSlice(width, layout.norm_eps),
        "qkv": qkv(width, heads, head_dim, front_bias),
        "attention": MultiHeadAttention(heads, head_dim, layout.grid, layout.relative_position),
        "project": LinearSlice(heads * head_dim, width),
        **end(),
    }
    mlp = {
        "norm": LayerNormSlice(width, layout.norm_eps),
        "expand": LinearSlice(width, inner),
        "act": activation("gelu"),
        **({"inner_drop": nn.Dropout(dropout)} if dropout else {}),
        "project": LinearSlice(inner, width),
        **end(),
    }
    return nn.Sequential(OrderedDict(attention=Residual(attention, nn.Identity()), mlp=Residual(mlp, nn.Identity())))


class Tokens(nn.Module):
    """Each patch as a token, a class token before them, and a position embedding added to all.

    forward: (n, inputs, h, w) -> (n, 1 + patches, active width)
    """

    def __init__(self, inputs: int, width: Value, patch: int, grid: tuple[int, int], dropout: float = 0.0) -> None:
        super().__init__()
        self.patches = PatchEmbedding(inputs, width, patch)
        self.class_token = ParameterSlice(1, 1, width)
        self.position = ParameterSlice(1, 1 + grid[0] * grid[1], width)
        if dropout:
            self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, h, w) -> (n, 1 + patches, active width)."""
        patches = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token().expand(x.shape[0], -1, -1), patches], 1) + self.position()
        return self.drop(tokens) if hasattr(self, "drop") else tokens


class Pool(nn.Module):
    """The class token, or the mean of all others.

    forward: (n, tokens, width) -> (n, width)
    """

    def __init__(self, pool: str) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        """(n, tokens, width) -> (n, width)."""
        return x[:, 0] if self.pool == "token" else x[:, 1:].mean(1)


class Maps(nn.Module):
    """The levels of a network as maps: the tokens without the class token, each at its patch's place."""

    def __init__(self, tokens: Staged, grid: tuple[int, int]) -> None:
        super().__init__()
        self.tokens, self.grid = tokens, grid
        self.feat_dims, self.segments = tokens.feat_dims, tokens.segments

    def forward(self, x: Tensor) -> list[Tensor]:
        """Its features."""
        return self.features(x)

    def features(self, x: Tensor) -> list[Tensor]:
        """(n, channels, h, w) -> (n, width, rows, columns) for each level."""
        levels = self.tokens.features(x)
        return [tokens[:, 1:].transpose(1, 2).unflatten(2, self.grid) for tokens in levels]
