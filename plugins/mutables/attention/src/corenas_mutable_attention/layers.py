"""What transformers need beside linear layers: layer norm, bare parameters, patch embedding."""

from __future__ import annotations

import functools
import operator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corenas.mutable import Elastic, LayerCost, conv_cost, norm_cost
from corenas.value import Dimension, Value
from corenas_mutable_slices.layers import Cut, Size, axis, cut, filled, per_choice


class LayerNormSlice(nn.LayerNorm):
    """A layer norm of which the first features are active: only they are in its mean and variance.

    forward: (…, active features) -> the same shape
    """

    def __init__(self, features: Size, eps: float = 1e-5) -> None:
        outputs = Dimension.of(features)
        super().__init__(outputs.allocated, eps)
        self.outputs = outputs
        self.elastic = Elastic({"outputs": outputs})

    @per_choice
    def cut(self) -> Cut:
        """What is active of weight and bias."""
        return cut(axis(self, "outputs"))

    def active(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the chosen part."""
        return self.cut(self.weight), self.cut(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """(…, active features) -> the same shape."""
        weight, bias = self.active()
        return F.layer_norm(input, weight.shape, weight, bias, self.eps)

    def cost(self, positions: Value) -> LayerCost:
        """Two parameters a feature."""
        return norm_cost(self.outputs.size, affine=True)

    def export(self) -> nn.LayerNorm:
        """The chosen part as a plain layer norm."""
        weight, bias = self.active()
        return filled(nn.LayerNorm(weight.shape, self.eps, device="meta"), self, weight=weight, bias=bias)


class ParameterSlice(nn.Module):
    """A bare parameter, a position embedding for instance, of which the first elements along each axis are active.

    sizes: of its axes, each a dimension; it begins as zeros
    forward: nothing -> the active part
    """

    def __init__(self, *sizes: Size) -> None:
        super().__init__()
        self.axes = tuple(map(Dimension.of, sizes))
        self.weight = nn.Parameter(torch.zeros([axis.allocated for axis in self.axes]))
        self.elastic = Elastic({f"axis{i}": axis for i, axis in enumerate(self.axes)})

    @per_choice
    def cut(self) -> Cut:
        """What is active of it."""
        return cut(*(axis(self, name) for name in self.elastic.values))

    def forward(self) -> Tensor:
        """The active part: a view where each dimension has one part."""
        return self.cut(self.weight)

    def cost(self, positions: Value) -> LayerCost:
        """Its active elements."""
        return LayerCost(params=functools.reduce(operator.mul, (axis.size for axis in self.axes)))

    def export(self) -> nn.Parameter:
        """The active part as a plain parameter."""
        return nn.Parameter(self().detach().clone(memory_format=torch.contiguous_format))


class PatchEmbedding(nn.Conv2d):
    """A convolution that sees each pixel once: its stride is its kernel's size (Dosovitskiy et al. 2021).

    forward: (n, active inputs, h, w) -> (n, active outputs, h // patch, w // patch)
    """

    def __init__(self, inputs: Size, outputs: Size, patch: int) -> None:
        inputs, outputs = Dimension.of(inputs), Dimension.of(outputs)
        super().__init__(inputs.allocated, outputs.allocated, patch, patch)
        self.inputs, self.outputs = inputs, outputs
        self.elastic = Elastic({"inputs": inputs, "outputs": outputs})

    @per_choice
    def cuts(self) -> tuple[Cut, Cut]:
        """What is active of weight and bias."""
        outputs, side = axis(self, "outputs"), (self.kernel_size[:1],) * 2
        return cut(outputs, axis(self, "inputs"), side, side), cut(outputs)

    def active(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the chosen part."""
        assert self.bias is not None
        of_weight, of_bias = self.cuts
        return of_weight(self.weight), of_bias(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """(n, active inputs, h, w) -> (n, active outputs, h // patch, w // patch)."""
        return F.conv2d(input, *self.active(), self.stride)

    def cost(self, positions: Value) -> LayerCost:
        """Its cost at `positions` patches."""
        return conv_cost(self.inputs.size, self.outputs.size, self.kernel_size[0] ** 2, positions, 1, bias=True)

    def export(self) -> nn.Conv2d:
        """The chosen part as a plain convolution."""
        weight, bias = self.active()
        outputs, inputs, *kernel = weight.shape
        plain = nn.Conv2d(inputs, outputs, kernel, self.stride, device="meta")  # type: ignore[arg-type]
        return filled(plain, self, weight=weight, bias=bias)
