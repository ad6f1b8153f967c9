"""Layers of torch of which the first channels are active."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corenas import distributed
from corenas.mutable import Elastic, LayerCost, conv_cost, linear_cost, norm_cost
from corenas.value import Constant, Dimension, Value, as_value

Plain = TypeVar("Plain", bound=nn.Module)
Size = Dimension | Value | int


def per_choice(compute: Callable[[Any], Any]) -> property:
    """Make a property of a mutable that is computed once for each choice that `apply` gives."""
    name = f"_{compute.__name__}"

    def get(mutable: Any) -> Any:
        choice = mutable.elastic.choice
        latest = mutable.__dict__.get(name)
        if latest is None or latest[0] is not choice:
            latest = mutable.__dict__[name] = choice, compute(mutable)
        return latest[1]

    return property(get, doc=compute.__doc__)


class Cut(NamedTuple):
    """Which elements of a tensor are active: called with it, a view where each axis has one part, else a copy.

    shape: of the view from the first element on, None for the whole tensor; then
    middle: what of its axes is active where that is not their beginning, None if there is no such axis; then
    joined: axes of several parts, with the elements of each
    """

    shape: tuple[int, ...] | None
    middle: tuple[slice, ...] | None
    joined: Sequence[tuple[int, Sequence[slice]]]

    def __call__(self, tensor: Tensor) -> Tensor:
        """The active elements."""
        shape, middle, joined = self
        if shape is not None:  # one step for all axes: its gradient is filled in once, not once for each axis
            tensor = tensor.as_strided(shape, tensor.stride())
        if middle is not None:
            tensor = tensor[middle]
        for axis, spans in joined:
            tensor = torch.cat([tensor.narrow(axis, span.start, span.stop - span.start) for span in spans], axis)
        return tensor

    def write(self, tensor: Tensor, elements: Tensor) -> None:
        """Put other elements in the place of the active ones of a vector."""
        if not self.joined:
            self(tensor).copy_(elements)
            return
        ((axis, spans),) = self.joined
        for span, new in zip(spans, elements.split([s.stop - s.start for s in spans], axis), strict=True):
            tensor[span] = new


@functools.cache
def cut(*axes: tuple[tuple[int, ...], tuple[int, ...]]) -> Cut:
    """For each axis of a tensor the sizes of its parts, and how many elements at the start of each are active."""
    whole = [sum(sizes) for sizes, _ in axes]
    shape, middle, joined = [*whole], [slice(None)] * len(axes), []
    for axis, (sizes, active) in enumerate(axes):
        starts = itertools.accumulate(sizes[:-1], initial=0)
        spans = [slice(at, at + n) for at, n in zip(starts, active, strict=True) if n] or [slice(0, 0)]
        if sum(active) == whole[axis]:
            continue
        if len(spans) > 1:
            joined.append((axis, spans))
        elif spans[0].start:
            middle[axis] = spans[0]
        else:
            shape[axis] = spans[0].stop
    moved = any(span != slice(None) for span in middle)
    return Cut(None if shape == whole else tuple(shape), tuple(middle) if moved else None, joined)


def axis(layer: Any, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return one of a layer's dimensions as an axis of its weight."""
    return layer.elastic.values[name].sizes, layer.elastic.choice[name]


def centre(length: int, size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """An axis of a kernel of which the middle elements are active."""
    before = (length - size) // 2
    return (before, size, length - size - before), (0, size, 0)


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
        start = (kernels.shape[-1] - self.size) // 2
        centre = kernels[:, :, start : start + self.size, start : start + self.size].flatten(2)
        return F.linear(centre, self.matrix).unflatten(2, (self.size, self.size))

    def cost(self, positions: Value) -> LayerCost:
        """Nothing: no arch has it."""
        return LayerCost()


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
        inputs, outputs, kernel = Dimension.of(inputs), Dimension.of(outputs), as_value(kernel_size)
        if any(k % 2 == 0 for k in kernel.possible):
            raise ValueError(f"kernel sizes are odd, not {kernel.possible}")
        groups = groups.number if isinstance(groups, Constant) else groups
        self.depthwise = groups == "depthwise"
        if self.depthwise and inputs != outputs:
            raise ValueError("a depthwise convolution has the same dimension on both sides")
        group_count = outputs.size if self.depthwise else as_value(groups)
        per_group = Constant(1) if self.depthwise else inputs.size // group_count
        grouped = not self.depthwise and group_count != Constant(1)
        # torch allocates (outputs, inputs / groups): the quotient is what a group sees at most.
        width = per_group.largest if grouped or self.depthwise else inputs.allocated
        super().__init__(width, outputs.allocated, kernel.largest, stride, dilation=dilation, bias=bias)
        if self.depthwise:
            self.groups = self.in_channels = outputs.allocated
        self.inputs, self.outputs, self.kernel, self.group_count = inputs, outputs, kernel, group_count
        values: dict[str, Value | Dimension] = {"inputs": inputs, "outputs": outputs, "kernel": kernel}
        if grouped:
            values |= {"groups": group_count, "per_group": per_group}
        self.elastic = Elastic(values)
        self.transforms: nn.ModuleList | None = None
        if transforms and len(kernel.possible) > 1:  # from the largest down: each begins with what the last one gave
            self.transforms = nn.ModuleList(KernelTransform(size) for size in kernel.possible[-2::-1])

    @per_choice
    def cuts(self) -> tuple[Cut, Cut]:
        """What is active of the weight, before transforms, and of the bias."""
        choice, (_, width, kernel, _) = self.elastic.choice, self.weight.shape
        outputs = axis(self, "outputs")
        if self.depthwise or "groups" in choice:
            inputs = (width,), (choice.get("per_group", 1),)
        else:
            inputs = axis(self, "inputs")
        middle = centre(kernel, kernel if self.transforms else choice["kernel"])
        return cut(outputs, inputs, middle, middle), cut(outputs)

    @per_choice
    def margin(self) -> tuple[int, int]:
        """Pixels of the chosen kernel on each side of its middle; the number of groups."""
        groups = sum(self.elastic.choice["outputs"]) if self.depthwise else self.elastic.choice.get("groups", 1)
        return self.elastic.choice["kernel"] // 2, groups

    @property
    def shape(self) -> tuple[Any, ...]:
        """The chosen part's stride, padding, dilation and groups."""
        (margin, groups), dilation = self.margin, self.dilation
        return self.stride, (margin * dilation[0], margin * dilation[1]), dilation, groups

    def active(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the chosen part: views where a dimension has one part, else one copy."""
        of_weight, of_bias = self.cuts
        weight = of_weight(self.weight)
        if self.transforms is not None:
            for transform in self.transforms:
                if transform.size >= self.elastic.choice["kernel"]:
                    weight = transform(weight)
        return weight, None if self.bias is None else of_bias(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """(n, active inputs, h, w) -> (n, active outputs, ceil(h / stride), ceil(w / stride))."""
        weight, bias = self.active()
        if not _dense(weight):
            weight = weight.clone()  # else the convolution makes a copy, and its gradient another one
        stride, *rest = self.shape
        if stride != (1, 1) and self.elastic.choice["kernel"] == 1 and input.shape[1] < 16 and torch.is_grad_enabled():
            # The same by a stride of 1: on CPUs the gradient of such a layer writes beyond its memory (torch 2.15).
            input, stride = input[:, :, :: stride[0], :: stride[1]], 1
        return F.conv2d(input, weight, bias, stride, *rest)

    def normed(self, input: Tensor, norm: BatchNorm2dSlice) -> Tensor:
        """The output after a batch norm in evaluation mode, without gradient: by way of the weights if that is less."""
        if _hooked(self) or _hooked(norm):
            return norm(self(input))
        weight, bias = self.active()
        positions = input.numel() // input.shape[1] // (self.stride[0] * self.stride[1])
        less = weight.numel() <= weight.shape[0] * positions or not _dense(weight)  # it has to be copied anyway
        if not less or weight.dtype != norm._buffers["running_var"].dtype:
            return norm(self(input))
        scale, shift = norm.affine_map()
        weight = weight * scale.view(-1, 1, 1, 1)
        return F.conv2d(input, weight, shift if bias is None else bias * scale + shift, *self.shape)

    def cost(self, positions: Value) -> LayerCost:
        """Its cost at `positions` pixels."""
        taps, biased = self.kernel * self.kernel, self.bias is not None
        return conv_cost(self.inputs.size, self.outputs.size, taps, positions, self.group_count, biased)

    def export(self) -> nn.Conv2d:
        """The chosen part as a plain convolution."""
        inputs, outputs = (sum(self.elastic.choice[name]) for name in ("inputs", "outputs"))
        kernel, biased = self.elastic.choice["kernel"], self.bias is not None
        plain = nn.Conv2d(inputs, outputs, kernel, *self.shape, bias=biased, device="meta")
        weight, bias = self.active()
        return filled(plain, self, weight=weight, bias=bias)


def _hooked(module: nn.Module) -> bool:
    """Whether something else runs when it is called: a hook may make its weight, or want its output."""
    return bool(module._forward_pre_hooks or module._forward_hooks)


def _dense(weight: Tensor) -> bool:
    return weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)


class LinearSlice(nn.Linear):
    """A linear layer of which the first features are active.

    forward: (…, active inputs) -> (…, active outputs)
    """

    def __init__(self, inputs: Size, outputs: Size, bias: bool = True) -> None:
        inputs, outputs = Dimension.of(inputs), Dimension.of(outputs)
        super().__init__(inputs.allocated, outputs.allocated, bias)
        self.inputs, self.outputs = inputs, outputs
        self.elastic = Elastic({"inputs": inputs, "outputs": outputs})

    @per_choice
    def cuts(self) -> tuple[Cut, Cut]:
        """What is active of weight and bias."""
        outputs = axis(self, "outputs")
        return cut(outputs, axis(self, "inputs")), cut(outputs)

    def active(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the chosen part."""
        of_weight, of_bias = self.cuts
        return of_weight(self.weight), None if self.bias is None else of_bias(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """(…, active inputs) -> (…, active outputs)."""
        return F.linear(input, *self.active())

    def cost(self, positions: Value) -> LayerCost:
        """Its cost at `positions` tokens (1 after pooling)."""
        return linear_cost(self.inputs.size, self.outputs.size, positions, self.bias is not None)

    def export(self) -> nn.Linear:
        """The chosen part as a plain linear layer."""
        inputs, outputs = (sum(self.elastic.choice[name]) for name in ("inputs", "outputs"))
        weight, bias = self.active()
        plain = nn.Linear(inputs, outputs, self.bias is not None, device="meta")
        return filled(plain, self, weight=weight, bias=bias)


def _in_force(name: str) -> Any:
    def get(norm: BatchNorm2dSlice) -> Tensor | None:
        whole: Any = nn.Module.__getattr__(norm, name)
        return whole[norm.rows[norm.elastic.choice["switch"]]] if norm.rows else whole

    return property(get)


class BatchNorm2dSlice(nn.BatchNorm2d):
    """A batch norm of which the first features are active; their statistics are views of the whole's.

    switch: a value for each number of which statistics are kept apart, as `keep_apart` does
    sync: whether training sees the images of all processes under torchrun
    forward: (n, active features, h, w) -> the same shape
    """

    sync = False
    rows: Mapping[Any, int] | None = None
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
        self.outputs = outputs
        self.elastic = Elastic({"outputs": outputs})
        if switch is not None:
            self.keep_apart(switch)

    def keep_apart(self, switch: Value) -> None:
        """Keep statistics of their own for each number of a value; all begin as copies of the present ones.

        The statistics of switchable batch norm (Yu et al. 2019, arXiv:1812.08928); weight and bias stay shared. In a
        state dict `running_mean` and `running_var` then have one row for each number, in order.
        """
        rows = {number: row for row, number in enumerate(switch.possible)}
        self._buffers.update({name: torch.stack([getattr(self, name)] * len(rows)) for name in self._buffers})
        self.elastic = self.elastic.extended({"switch": switch})
        self.rows = rows

    @per_choice
    def cut(self) -> Cut:
        """What is active of every vector."""
        return cut(axis(self, "outputs"))

    def whole(self) -> tuple[Any, Any, Any, Any]:
        """Weight, bias, running mean and running variance of all features."""
        if self.rows:
            return self.weight, self.bias, self.running_mean, self.running_var
        return self.weight, self.bias, self._buffers["running_mean"], self._buffers["running_var"]  # the same, faster

    def active(self) -> list[Any]:
        """Weight, bias, running mean and running variance of the chosen part."""
        cut = self.cut
        return [None if tensor is None else cut(tensor) for tensor in self.whole()]

    def forward(self, input: Tensor) -> Tensor:
        """(n, active features, h, w) -> the same shape."""
        weight, bias, mean, var = self.active()
        if not self.training:
            return F.batch_norm(input, mean, var, weight, bias, False, 0.0, self.eps)
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        if self.sync and distributed.world() > 1:
            normed = _synchronised_norm(input, mean, var, weight, bias, momentum, self.eps)
        else:
            normed = F.batch_norm(input, mean, var, weight, bias, True, momentum, self.eps)
        if self.cut.joined:  # several parts were copied
            self.set_statistics(mean, var)
        return normed

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Running mean and variance of the chosen part."""
        *_, mean, var = self.active()
        return mean, var

    @torch.no_grad()
    def set_statistics(self, mean: Tensor, var: Tensor) -> None:
        """Store the running mean and variance of the chosen part."""
        for stored, new in zip(self.whole()[2:], (mean, var), strict=True):
            self.cut.write(stored, new)

    def affine_map(self) -> tuple[Tensor, Tensor]:
        """Scale and shift of each active feature in evaluation mode."""
        weight, bias, mean, var = self.whole()
        scale = (var + self.eps).rsqrt()  # of all features: cutting the results takes fewer steps
        scale = scale if weight is None else scale * weight
        shift = -mean * scale if bias is None else torch.addcmul(bias, mean, scale, value=-1)
        return self.cut(scale), self.cut(shift)

    def cost(self, positions: Value) -> LayerCost:
        """Two parameters a feature."""
        return norm_cost(self.outputs.size, self.affine)

    def export(self) -> nn.BatchNorm2d:
        """The chosen part as a plain batch norm."""
        weight, bias, mean, var = self.active()
        plain = nn.BatchNorm2d(sum(self.elastic.choice["outputs"]), self.eps, self.momentum, self.affine, device="meta")
        return filled(
            plain,
            self,
            weight=weight,
            bias=bias,
            running_mean=mean,
            running_var=var,
            num_batches_tracked=self.num_batches_tracked,
        )


def per_width_statistics(model: nn.Module, width: Value | None = None) -> None:
    """Let every batch norm of a model keep statistics apart for each of its widths (`BatchNorm2dSlice.keep_apart`).

    width: a value of the whole network instead, as slimmable networks have one: norms whose own width is fixed see
        inputs that differ, too
    """
    for norm in model.modules():
        if isinstance(norm, BatchNorm2dSlice):
            switch = norm.outputs.size if width is None else width
            if len(switch.possible) > 1:
                norm.keep_apart(switch)


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        summed = tensor.clone()
        torch.distributed.all_reduce(summed)
        return summed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return _AllReduce.apply(gradient)  # type: ignore[return-value]


def differentiable_all_reduce(tensor: Tensor) -> Tensor:
    """Sum a tensor over processes. Returns the sum, through which gradients flow: they are summed as well."""
    return tensor if distributed.world() == 1 else _AllReduce.apply(tensor)  # type: ignore[return-value]


def _synchronised_norm(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, momentum: float, eps: float
) -> Tensor:
    """`F.batch_norm` in training with the statistics of all processes' images; works with gloo, on CPUs too."""
    given, x = x.dtype, x.double() if x.dtype == torch.float64 else x.float()
    count = x.numel() // x.shape[1]
    sums = differentiable_all_reduce(torch.cat([x.sum((0, 2, 3)), x.new_tensor([count])]))
    total, centre = sums[-1].detach(), sums[:-1] / sums[-1].detach()
    centred = x - centre[:, None, None]
    # About the common mean: nothing cancels.
    spread = differentiable_all_reduce(centred.square().sum((0, 2, 3))) / total
    with torch.no_grad():
        mean.lerp_(centre.to(mean), momentum)
        var.lerp_((spread * (total / (total - 1))).to(var), momentum)
    scale = (spread + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    normed = centred * scale[:, None, None]
    return (normed if bias is None else normed + bias[:, None, None]).to(given)


def filled(plain: Plain, source: nn.Module, **tensors: Tensor | None) -> Plain:
    """A plain layer (on the meta device, so nothing was drawn for it) with copies of tensors, in the source's mode."""
    copies = {
        name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
        if tensor is not None
    }
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
        self.elastic = Elastic({"resolution": as_value(resolution)})

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) -> (n, c, resolution, resolution)."""
        size = (self.elastic.choice["resolution"],) * 2
        return x if x.shape[-2:] == size else F.interpolate(x, size, mode=self.mode)

    def export(self) -> nn.Module:
        """A layer that resizes to the chosen resolution."""
        return nn.Upsample((self.elastic.choice["resolution"],) * 2, mode=self.mode)
