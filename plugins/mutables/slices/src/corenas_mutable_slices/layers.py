"""Layers of torch of which the first channels are active."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corenas import distributed
from corenas.cost import LayerCost, conv_cost, linear_cost, norm_cost
from corenas.mutable import Values, chosen
from corenas.value import Constant, Dimension, Value, as_value

Plain = TypeVar("Plain", bound=nn.Module)
Size = Dimension | Value | int


def take(tensor: Tensor, axis: int, dimension: Dimension, active: Sequence[int]) -> Tensor:
    """The active elements along an axis: a view where the dimension has one part, else one copy."""
    if sum(active) == tensor.shape[axis]:
        return tensor
    if len(active) == 1:  # the common case, several times a layer
        return tensor.narrow(axis, 0, active[0])
    return torch.cat(parts(tensor, axis, dimension, active), axis)


def parts(tensor: Tensor, axis: int, dimension: Dimension, active: Sequence[int]) -> list[Tensor]:
    """The active elements of each part, as views."""
    starts = itertools.accumulate((part.largest for part in dimension.parts[:-1]), initial=0)
    return [tensor.narrow(axis, start, n) for start, n in zip(starts, active, strict=True)]


class KernelTransform(nn.Module):
    """Makes a smaller kernel of a larger one's centre by a matrix for all channels, at first the centre itself.

    It belongs to the supernet alone: an exported network has the smaller kernel (Cai et al. 2020, arXiv:1908.09791).
    forward: (outputs, inputs, larger, larger) -> (outputs, inputs, size, size)
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.matrix = nn.Parameter(torch.eye(size * size))

    def forward(self, kernels: Tensor) -> Tensor:
        """(outputs, inputs, larger, larger) -> (outputs, inputs, size, size)."""
        centre = centred(kernels, self.size).flatten(2)
        return F.linear(centre, self.matrix).unflatten(2, (self.size, self.size))

    def cost(self, positions: Value) -> LayerCost:
        """Nothing: no arch has it."""
        return LayerCost()


def centred(kernels: Tensor, size: int) -> Tensor:
    """The centre of kernels, as a view."""
    start = (kernels.shape[-1] - size) // 2
    return kernels[:, :, start : start + size, start : start + size]


class Conv2dSlice(nn.Conv2d):
    """A convolution of which the first channels are active (Yu et al. 2019, arXiv:1812.08928).

    inputs, outputs: its channels; kernel_size: odd, a smaller one is the centre of the largest; groups: a number, a
        value, or "depthwise" (as many as channels); the padding keeps the map's size at stride 1
    transforms: whether a smaller kernel comes from the next larger one by a learnt matrix, and is not its mere centre
    forward: (n, active inputs, h, w) -> (n, active outputs, ceil(h / stride), ceil(w / stride))
    """

    def __init__(
        self,
        inputs: Size,
        outputs: Size,
        kernel_size: Value | int,
        stride: int = 1,
        groups: Value | int | str = 1,
        dilation: int = 1,
        bias: bool = True,
        transforms: bool = False,
    ) -> None:
        dims = {"inputs": Dimension.of(inputs), "outputs": Dimension.of(outputs)}
        kernel = as_value(kernel_size)
        if any(k % 2 == 0 for k in kernel.possible):
            raise ValueError(f"kernel sizes are odd, not {kernel.possible}")
        groups = groups.number if isinstance(groups, Constant) else groups
        self.depthwise = groups == "depthwise"
        if self.depthwise and dims["inputs"] != dims["outputs"]:
            raise ValueError("a depthwise convolution has the same dimension on both sides")
        per_group = Constant(1) if self.depthwise else dims["inputs"].size // groups  # type: ignore[operator]
        width = dims["inputs"].allocated if groups == 1 else per_group.largest
        outs = dims["outputs"].allocated
        # torch allocates (outputs, inputs / groups): the quotient is what a group sees at most.
        super().__init__(width, outs, kernel.largest, stride, dilation=dilation, bias=bias)
        if self.depthwise:
            self.groups, self.in_channels = outs, outs
        self.values: Values = dims | {"kernel": kernel}
        if not self.depthwise and groups != 1:
            self.values = {**self.values, "groups": as_value(groups), "per_group": per_group}
        self.transforms: nn.ModuleList | None = None
        if transforms and len(kernel.possible) > 1:  # from the largest down: each begins with what the last one gave
            self.transforms = nn.ModuleList(KernelTransform(size) for size in kernel.possible[-2::-1])
        self.choice: Mapping[str, Any] = chosen(self.values)

    def active(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the chosen part: views where a dimension has one part, else one copy."""
        outputs = self.values["outputs"], self.choice["outputs"]
        weight = take(self.weight, 0, *outputs)  # type: ignore[arg-type]
        if "groups" in self.choice:
            weight = weight[:, : self.choice["per_group"]]
        elif not self.depthwise:
            weight = take(weight, 1, self.values["inputs"], self.choice["inputs"])  # type: ignore[arg-type]
        kernel = self.choice["kernel"]
        for transform in self.transforms or ():
            if transform.size >= kernel:
                weight = transform(weight)
        if kernel < weight.shape[-1]:
            weight = centred(weight, kernel)
        return weight, None if self.bias is None else take(self.bias, 0, *outputs)  # type: ignore[arg-type]

    def _shape(self) -> dict[str, Any]:
        """The chosen part's stride, padding, dilation and groups."""
        padding = self.choice["kernel"] // 2 * self.dilation[0]
        groups = sum(self.choice["outputs"]) if self.depthwise else self.choice.get("groups", 1)
        return {"stride": self.stride, "padding": (padding, padding), "dilation": self.dilation, "groups": groups}

    def forward(self, input: Tensor, norm: BatchNorm2dSlice | None = None) -> Tensor:
        """(n, active inputs, h, w) -> (n, active outputs, ceil(h / stride), ceil(w / stride)).

        norm: a batch norm in evaluation mode to be applied to the output, by way of the weights
        """
        weight, bias = self.active()
        if norm is not None:
            scale, shift = norm.affine_map()
            weight = weight * scale[:, None, None, None]
            bias = shift if bias is None else bias * scale + shift
        shape = self._shape()
        if self.choice["kernel"] == 1 and self.stride != (1, 1) and input.shape[1] < 16 and torch.is_grad_enabled():
            # The same by a stride of 1: on CPUs the gradient of such a layer writes beyond its memory (torch 2.15).
            input, shape["stride"] = input[:, :, :: self.stride[0], :: self.stride[1]], 1
        return F.conv2d(input, weight, bias, **shape)

    def cost(self, positions: Value) -> LayerCost:
        """Its cost at `positions` pixels."""
        inputs, outputs = (self.values[name].size for name in ("inputs", "outputs"))  # type: ignore[union-attr]
        groups = outputs if self.depthwise else self.values.get("groups", Constant(1))
        kernel = self.values["kernel"]
        return conv_cost(inputs, outputs, kernel * kernel, positions, groups, self.bias is not None)  # type: ignore[operator, arg-type]

    def export(self) -> nn.Conv2d:
        """The chosen part as a plain convolution."""
        inputs, outputs = (sum(self.choice[name]) for name in ("inputs", "outputs"))
        plain = nn.Conv2d(
            inputs, outputs, self.choice["kernel"], bias=self.bias is not None, device="meta", **self._shape()
        )
        weight, bias = self.active()
        return filled(plain, self, weight=weight, bias=bias)


class LinearSlice(nn.Linear):
    """A linear layer of which the first features are active.

    forward: (…, active inputs) -> (…, active outputs)
    """

    def __init__(self, inputs: Size, outputs: Size, bias: bool = True) -> None:
        self_values = {"inputs": Dimension.of(inputs), "outputs": Dimension.of(outputs)}
        super().__init__(self_values["inputs"].allocated, self_values["outputs"].allocated, bias)
        self.values: Values = self_values
        self.choice: Mapping[str, Any] = chosen(self.values)

    def active(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the chosen part."""
        outputs = self.values["outputs"], self.choice["outputs"]
        weight = take(take(self.weight, 0, *outputs), 1, self.values["inputs"], self.choice["inputs"])  # type: ignore[arg-type]
        return weight, None if self.bias is None else take(self.bias, 0, *outputs)  # type: ignore[arg-type]

    def forward(self, input: Tensor) -> Tensor:
        """(…, active inputs) -> (…, active outputs)."""
        return F.linear(input, *self.active())

    def cost(self, positions: Value) -> LayerCost:
        """Its cost at `positions` tokens (1 after pooling)."""
        inputs, outputs = (self.values[name].size for name in ("inputs", "outputs"))  # type: ignore[union-attr]
        return linear_cost(inputs, outputs, positions, self.bias is not None)

    def export(self) -> nn.Linear:
        """The chosen part as a plain linear layer."""
        inputs, outputs = (sum(self.choice[name]) for name in ("inputs", "outputs"))
        weight, bias = self.active()
        plain = nn.Linear(inputs, outputs, self.bias is not None, device="meta")
        return filled(plain, self, weight=weight, bias=bias)


def _in_force(name: str) -> Any:
    def get(norm: BatchNorm2dSlice) -> Tensor | None:
        whole: Any = nn.Module.__getattr__(norm, name)
        return whole[norm.rows[norm.choice["switch"]]] if norm.rows else whole

    return property(get)


class BatchNorm2dSlice(nn.BatchNorm2d):
    """A batch norm of which the first features are active; their statistics are views of the whole's.

    switch: a value for each number of which statistics are kept apart, as `keep_apart` does
    sync: whether training sees the images of all processes under torchrun
    forward: (n, active features, h, w) -> the same shape
    """

    sync = False
    rows: Mapping[Any, int] = MappingProxyType({})
    # Whoever reads or writes statistics (recalibration, an evaluator) finds those of the arch in force.
    running_mean, running_var, num_batches_tracked = map(
        _in_force, ("running_mean", "running_var", "num_batches_tracked")
    )

    def __init__(
        self,
        features: Size,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        switch: Value | None = None,
    ) -> None:
        outputs = Dimension.of(features)
        super().__init__(outputs.allocated, eps, momentum, affine)
        self.values: Values = {"outputs": outputs}
        self.choice: Mapping[str, Any] = chosen(self.values)
        if switch is not None:
            self.keep_apart(switch)

    def keep_apart(self, switch: Value) -> None:
        """Keep statistics of their own for each number of a value; all begin as copies of the present ones.

        The statistics of switchable batch norm (Yu et al. 2019, arXiv:1812.08928); weight and bias stay shared. In a
        state dict `running_mean` and `running_var` then have one row for each number, in order.
        """
        rows = {number: row for row, number in enumerate(switch.possible)}
        self._buffers.update({name: torch.stack([getattr(self, name)] * len(rows)) for name in self._buffers})
        self.values = {**self.values, "switch": switch}
        self.choice = {**self.choice, **chosen({"switch": switch})}
        self.rows = rows

    def active(self) -> list[Tensor | None]:
        """Weight, bias, running mean and running variance of the chosen part."""
        outputs = self.values["outputs"], self.choice["outputs"]
        whole = (self.weight, self.bias, self.running_mean, self.running_var)
        return [None if tensor is None else take(tensor, 0, *outputs) for tensor in whole]  # type: ignore[arg-type]

    def forward(self, input: Tensor) -> Tensor:
        """(n, active features, h, w) -> the same shape."""
        weight, bias, mean, var = self.active()
        if not self.training:
            return F.batch_norm(input, mean, var, weight, bias, False, 0.0, self.eps)
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        if self.sync and distributed.world() > 1:
            assert mean is not None
            assert var is not None
            normed = _synchronised_norm(input, mean, var, weight, bias, momentum, self.eps)
        else:
            normed = F.batch_norm(input, mean, var, weight, bias, True, momentum, self.eps)
        outputs = self.values["outputs"], self.choice["outputs"]
        if len(outputs[1]) > 1 and sum(outputs[1]) < self.num_features:  # several parts were copied: write them back
            for whole, active in ((self.running_mean, mean), (self.running_var, var)):
                assert whole is not None
                assert active is not None
                for part, new in zip(parts(whole, 0, *outputs), active.split(outputs[1]), strict=True):  # type: ignore[arg-type]
                    part.copy_(new)
        return normed

    def affine_map(self) -> tuple[Tensor, Tensor]:
        """Scale and shift of each active feature in evaluation mode."""
        weight, bias, mean, var = self.weight, self.bias, self.running_mean, self.running_var
        assert mean is not None
        assert var is not None
        scale = (var + self.eps).rsqrt_()  # of all features: cutting the results takes fewer steps
        scale = scale if weight is None else scale * weight
        shift = -mean * scale if bias is None else torch.addcmul(bias, mean, scale, value=-1)
        outputs = self.values["outputs"], self.choice["outputs"]
        return take(scale, 0, *outputs), take(shift, 0, *outputs)  # type: ignore[arg-type]

    def cost(self, positions: Value) -> LayerCost:
        """Two parameters a feature."""
        return norm_cost(self.values["outputs"].size, self.affine)  # type: ignore[union-attr]

    def export(self) -> nn.BatchNorm2d:
        """The chosen part as a plain batch norm."""
        weight, bias, mean, var = self.active()
        plain = nn.BatchNorm2d(sum(self.choice["outputs"]), self.eps, self.momentum, self.affine, device="meta")
        return filled(plain, self, weight=weight, bias=bias, running_mean=mean, running_var=var,
                      num_batches_tracked=self.num_batches_tracked)  # fmt: skip


def per_width_statistics(model: nn.Module, width: Value | None = None) -> None:
    """Let every batch norm of a model keep statistics apart for each of its widths (`BatchNorm2dSlice.keep_apart`).

    width: a value of the whole network instead, as slimmable networks have one: norms whose own width is fixed see
        inputs that differ, too
    """
    for norm in model.modules():
        if isinstance(norm, BatchNorm2dSlice):
            switch = norm.values["outputs"].size if width is None else width  # type: ignore[union-attr]
            if len(switch.possible) > 1:
                norm.keep_apart(switch)


def _synchronised_norm(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, momentum: float, eps: float
) -> Tensor:
    """`F.batch_norm` in training with the statistics of all processes' images; works with gloo, on CPUs too."""
    given, x = x.dtype, x.double() if x.dtype == torch.float64 else x.float()
    count = x.numel() // x.shape[1]
    sums = distributed.summed(torch.cat([x.sum((0, 2, 3)), x.new_tensor([count])]))
    total, centre = sums[-1].detach(), sums[:-1] / sums[-1].detach()
    centred = x - centre[:, None, None]
    spread = distributed.summed(centred.square().sum((0, 2, 3))) / total  # about the common mean: nothing cancels
    with torch.no_grad():
        mean.lerp_(centre.to(mean), momentum)
        var.lerp_((spread * (total / (total - 1))).to(var), momentum)
    scale = (spread + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    normed = centred * scale[:, None, None]
    return (normed if bias is None else normed + bias[:, None, None]).to(given)


def filled(plain: Plain, source: nn.Module, **tensors: Tensor | None) -> Plain:
    """A plain layer (on the meta device, so nothing was drawn for it) with copies of tensors, in the source's mode."""
    copies = {name: tensor.detach().clone(memory_format=torch.contiguous_format)
              for name, tensor in tensors.items() if tensor is not None}  # fmt: skip
    plain.load_state_dict(copies, assign=True)
    return plain.train(source.training)


class InputResize(nn.Module):
    """Resizes square images to a resolution that may be a variable; images of that size pass as they are.

    mode: "nearest", "bilinear" or "bicubic"
    forward: (n, c, h, w) -> (n, c, resolution, resolution)
    """

    resizes = ("resolution",)

    def __init__(self, resolution: Value | int, mode: str = "bilinear") -> None:
        super().__init__()
        self.mode = mode
        self.values: Values = {"resolution": as_value(resolution)}
        self.choice: Mapping[str, Any] = chosen(self.values)

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) -> (n, c, resolution, resolution)."""
        size = (self.choice["resolution"],) * 2
        return x if x.shape[-2:] == size else F.interpolate(x, size, mode=self.mode)

    def export(self) -> nn.Module:
        """A layer that resizes to the chosen resolution."""
        return nn.Upsample((self.choice["resolution"],) * 2, mode=self.mode)
