"""torch's attention layer as linear layers of its own, so that its heads can be searched."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class OpenAttention(nn.Module):
    """What `nn.MultiheadAttention` computes, by a linear layer for queries, keys and values, and one after them.

    Its parameters are called as those of torch's layer are, so that state dicts move both ways.
    forward: as torch's, without weights of attention
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads, self.batch_first = attention.num_heads, attention.batch_first
        self.dropout = nn.Dropout(attention.dropout)  # a layer, not a number, so that algorithms can turn it off
        self.in_proj_weight, self.in_proj_bias = attention.in_proj_weight, attention.in_proj_bias
        self.out_proj = attention.out_proj
        self._qkv_same_embed_dim = False  # what TransformerEncoderLayer asks before it takes its fused path
        self.train(attention.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """(n, tokens, features) -> (n, tokens, features), and no weights."""
        alike = key is query and value is query
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        weight, bias, heads = self.in_proj_weight, self.in_proj_bias, self.num_heads
        if alike:
            projected = nn.functional.linear(query, weight, bias)
            q, k, v = projected.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        else:
            biases = (None,) * 3 if bias is None else bias.chunk(3)
            rows = zip((query, key, value), weight.chunk(3), biases, strict=True)
            q, k, v = (nn.functional.linear(*row).unflatten(-1, (heads, -1)).transpose(1, 2) for row in rows)
        dropout = self.dropout.p if self.dropout.training else 0.0
        mask = _merged(key_padding_mask, attn_mask, q)
        x = nn.functional.scaled_dot_product_attention(q, k, v, mask, dropout)
        x = self.out_proj(x.transpose(1, 2).flatten(2))
        return (x if self.batch_first else x.transpose(0, 1)), None


def _merged(padding: Tensor | None, mask: Tensor | None, like: Tensor) -> Tensor | None:
    """Return one mask that is added, of those for keys (n, tokens) and for pairs of tokens."""
    found: Any = None
    for own in (None if padding is None else padding[:, None, None], mask):
        if own is not None:
            added = own
            if own.dtype == torch.bool:  # true is left out
                added = torch.zeros_like(own, dtype=like.dtype).masked_fill(own, -torch.inf)
            if added.dim() == 3:  # one for each head of each sample
                added = added.unflatten(0, (like.shape[0], -1))
            found = added if found is None else found + added
    return found


def opened(model: nn.Module) -> nn.Module:
    """Return a model with torch's attention layers opened, in place, where queries and keys have the same features."""
    for name, module in [*model.named_modules()]:
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # part of the fused path, which looks at no layer but the first
        if type(module) is nn.MultiheadAttention and module._qkv_same_embed_dim and module.bias_k is None:
            if module.add_zero_attn or not name:
                continue
            parent, _, key = name.rpartition(".")
            setattr(model.get_submodule(parent), key, OpenAttention(module))
    return model
