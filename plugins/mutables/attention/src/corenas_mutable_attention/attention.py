"""Attention with searchable heads, and what is added to it for relative positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corenas.mutable import Elastic, LayerCost
from corenas.value import Dimension, Value, as_value
from corenas_mutable_attention.layers import ParameterSlice
from corenas_mutable_slices.layers import Cut, LinearSlice, Size, axis, cut, per_choice


def qkv(inputs: Size, heads: Value | int, head_dim: Value | int, front_bias: bool = False) -> LinearSlice:
    """The linear layer that gives queries, keys and values: an output of three parts, each of all heads.

    Active are the first heads of each part, as in AutoFormer (Chen et al. 2021, arXiv:2107.00651); a smaller `head_dim`
    takes the first `heads * head_dim` features of each part, whichever head they belong to in the largest network.
    front_bias: whether of the bias the first elements are active instead, over all parts, as AutoFormer's code has it
    """
    inner = as_value(heads) * head_dim
    return (FrontBias if front_bias else LinearSlice)(inputs, Dimension.of([inner] * 3))


class FrontBias(LinearSlice):
    """A linear layer of several parts of which the first elements of the bias are active, whatever part they are of."""

    @per_choice
    def cuts(self) -> tuple[Cut, Cut]:
        """What is active of weight and bias."""
        outputs = axis(self, "outputs")
        return cut(outputs, axis(self, "inputs")), cut(((sum(outputs[0]),), (sum(outputs[1]),)))


class RelativePosition(nn.Module):
    """What attention on a map of patches adds for how far apart two patches are, row by row, column by column.

    AutoFormer's tables, after Shaw et al. 2018 (arXiv:1803.02155): a vector for each distance of rows, one for each of
    columns, and in both a first one for pairs with the class token; a pair has the sum of the two. All patches of a row
    share a vector, so it is multiplied once for the row, and once for the column, not for each patch.
    head_dim: length of a vector; grid: side of a square map, or its rows and columns; distance: beyond it distances
        count as this one
    """

    def __init__(self, head_dim: Value | int, grid: int | tuple[int, int], distance: int) -> None:
        super().__init__()
        self.grid = rows, columns = (grid, grid) if isinstance(grid, int) else grid
        self.rows = ParameterSlice(2 * distance + 2, head_dim)
        self.columns = ParameterSlice(2 * distance + 2, head_dim)
        self.row_apart: Tensor
        self.column_apart: Tensor
        by_row = _apart(rows, distance).repeat_interleave(columns, 0)
        by_column = _apart(columns, distance).repeat(rows, 1)
        # A first row: from the class token to anything.
        self.register_buffer("row_apart", F.pad(by_row, (0, 0, 1, 0)), persistent=False)
        self.register_buffer("column_apart", F.pad(by_column, (0, 0, 1, 0)), persistent=False)

    def scores(self, queries: Tensor) -> Tensor:
        """The products of queries (n, heads, tokens, head_dim) with each pair's vector: (n, heads, tokens, tokens)."""
        row = torch.einsum("nhtd,tgd->nhtg", queries, self.rows()[self.row_apart])
        column = torch.einsum("nhtd,tgd->nhtg", queries, self.columns()[self.column_apart])
        patches = (row[..., 1:, None] + column[..., None, 1:]).flatten(-2)
        return torch.cat([row[..., :1] + column[..., :1], patches], -1)

    def mean(self, attention: Tensor) -> Tensor:
        """Each pair's vector weighted by attention (n, heads, tokens, tokens): (n, heads, tokens, head_dim)."""
        token, patches = attention[..., :1], attention[..., 1:].unflatten(-1, self.grid)
        by_row, by_column = (torch.cat([token, patches.sum(axis)], -1) for axis in (-1, -2))
        row = torch.einsum("nhtg,tgd->nhtd", by_row, self.rows()[self.row_apart])
        return row + torch.einsum("nhtg,tgd->nhtd", by_column, self.columns()[self.column_apart])


def _apart(lines: int, distance: int) -> Tensor:
    """Which vector is for how far apart two lines are: (lines, 1 + lines), the class token first."""
    line = torch.arange(lines)
    return F.pad((line - line[:, None]).clamp(-distance, distance) + distance + 1, (1, 0))


class MultiHeadAttention(nn.Module):
    """Each token's mean of all values, weighted by the softmax of scaled products of queries and keys, in each head.

    Vaswani et al. 2017 (arXiv:1706.03762), without the linear layers before and after it.
    heads, head_dim: the numbers of heads and of each head's features
    grid, distance: with a distance above 0, `RelativePosition` of keys and of values, with a class token first
    forward: (n, tokens, 3 * active heads * head_dim), q, k and v side by side -> (n, tokens, active heads * head_dim)
    """

    def __init__(
        self, heads: Value | int, head_dim: Value | int, grid: int | tuple[int, int] = 0, distance: int = 0
    ) -> None:
        super().__init__()
        self.outputs = Dimension.of(as_value(heads) * head_dim)
        self.elastic = Elastic({"heads": as_value(heads), "outputs": self.outputs})
        self.grid = ((grid, grid) if isinstance(grid, int) else grid) if distance else None
        if distance:
            self.keys = RelativePosition(head_dim, grid, distance)
            self.vectors = RelativePosition(head_dim, grid, distance)

    def forward(self, x: Tensor) -> Tensor:
        """(n, tokens, 3 * active heads * head_dim) -> (n, tokens, active heads * head_dim)."""
        heads = self.elastic.choice["heads"]
        q, k, v = x.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        if self.grid:
            q = q * (sum(self.elastic.choice["outputs"]) // heads) ** -0.5
            attention = (q @ k.transpose(-2, -1) + self.keys.scores(q)).softmax(-1)
            mean = attention @ v + self.vectors.mean(attention)
        else:
            mean = F.scaled_dot_product_attention(q, k, v)
        return mean.transpose(1, 2).flatten(2)

    def cost(self, positions: Value) -> LayerCost:
        """Both products, of queries with keys and of attention with values, for `positions` tokens.

        With relative positions four more, each with a row or column of patches and the class token.
        """
        vectors = 2 * positions + (2 * (sum(self.grid) + 2) if self.grid else 0)
        return LayerCost(flops=positions * vectors * self.outputs.size)
