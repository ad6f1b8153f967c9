"""Layers of torch of which the first channels are active."""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corenas.mutable import Elastic, LayerCost, conv_cost, linear_cost, norm_cost
from corenas.value import Constant, Dimension, TooManyCombinationsError, Value, as_value, grid
from corenas.variables import variables_of
from corenas_mutable_slices.layouts import Sides

Plain = TypeVar("Plain", bound=nn.Module)
Size = Dimension | Value | int
Kernel = Value | int | Sequence[Value | int]


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


_MOST_CUTS = 8192
"""How many cuts are kept, the latest ones: about 10 MB."""


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


@functools.lru_cache(_MOST_CUTS)
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

    inputs, outputs: its channels; kernel_size: a smaller one is the centre of the largest, so that all are odd or all
        even; groups: a number, a value, or "depthwise" (as many as channels)
    padding: pixels on each side for the largest kernel; a smaller one has fewer, so that its output has the same size.
        Left out, kernels are odd and keep the map's size at stride 1
    kernel_size, stride, padding, dilation: one for both axes, or one for each
    transforms: whether a smaller kernel comes from the next larger one by a learnt matrix, and is not its mere centre
    forward: (n, active inputs, h, w) -> (n, active outputs, h', w'); without `padding` h' is ceil(h / stride)
    Raises ValueError where groups do not divide the channels of every arch, or a kernel has no centre of that size.
    """

    plain, convolve, axes = nn.Conv2d, staticmethod(F.conv2d), 2

    def __init__(
        self,
        inputs: Size,
        outputs: Size,
        kernel_size: Kernel,
        stride: int | Sequence[int] = 1,
        groups: Value | int | str = 1,
        dilation: int | Sequence[int] = 1,
        bias: bool = True,
        transforms: bool = False,
        padding: int | Sequence[int] | None = None,
    ) -> None:
        _start(self, inputs, outputs, kernel_size, stride, groups, dilation, bias, padding)
        self.transforms: nn.ModuleList | None = None
        possible = self.kernels[0].possible
        if transforms and len(possible) > 1:  # from the largest down: each begins with what the last one gave
            if len(self.kernels) > 1 or not possible[0] % 2:
                raise ValueError("transforms are for square kernels of odd sizes")
            self.transforms = nn.ModuleList(KernelTransform(size) for size in possible[-2::-1])

    @property
    def kernel(self) -> Value:
        """The size of the kernel, of the first axis where each has its own."""
        return self.kernels[0]

    @per_choice
    def cuts(self) -> tuple[Cut, Cut]:
        """What is active of the weight, before transforms, and of the bias."""
        choice, (_, width, *kernel) = self.elastic.choice, self.weight.shape
        outputs = axis(self, "outputs")
        if self.depthwise or "groups" in choice:
            inputs = (width,), (choice.get("per_group", 1),)
        else:
            inputs = axis(self, "inputs")
        chosen = kernel if self.transforms else _chosen_kernel(self)
        return cut(outputs, inputs, *map(centre, kernel, chosen)), cut(outputs)

    @per_choice
    def margin(self) -> tuple[tuple[int, ...], int]:
        """Pixels of the chosen kernel on each side of its middle, for each axis; the number of groups."""
        groups = sum(self.elastic.choice["outputs"]) if self.depthwise else self.elastic.choice.get("groups", 1)
        return tuple(size // 2 for size in _chosen_kernel(self)), groups

    @property
    def shape(self) -> tuple[Any, ...]:
        """The chosen part's stride, padding, dilation and groups."""
        (margin, groups), dilation, whole = self.margin, self.dilation, self.whole_padding
        if whole is None:
            return self.stride, tuple(map(operator.mul, margin, dilation)), dilation, groups
        sizes = zip(whole, dilation, self.kernel_size, margin, strict=True)
        return self.stride, tuple(pad - step * (size // 2 - half) for pad, step, size, half in sizes), dilation, groups

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
        """(n, active inputs, h, w) -> (n, active outputs, h', w')."""
        weight, bias = self.active()
        if not _dense(weight):
            weight = weight.clone()  # else the convolution makes a copy, and its gradient another one
        stride, margin, *rest = self.shape
        if (
            max(stride) > 1
            and set(weight.shape[2:]) == {1}
            and not any(margin)
            and input.shape[1] < 16
            and torch.is_grad_enabled()
        ):
            # The same by a stride of 1: on CPUs the gradient of such a layer writes beyond its memory (torch 2.15).
            input, stride = input[(..., *(slice(None, None, step) for step in stride))], 1
        return self.convolve(input, weight, bias, stride, margin, *rest)

    def normed(self, input: Tensor, norm: BatchNorm2dSlice) -> Tensor:
        """The output after a batch norm in evaluation mode, without gradient: by way of the weights if that is less."""
        if _hooked(self) or _hooked(norm):
            return norm(self(input))
        weight, bias = self.active()
        positions = input.numel() // input.shape[1] // math.prod(self.stride)
        less = weight.numel() <= weight.shape[0] * positions or not _dense(weight)  # it has to be copied anyway
        if not less or weight.dtype != norm._buffers["running_var"].dtype:
            return norm(self(input))
        scale, shift = norm.affine_map()
        weight = weight * scale.view(-1, *[1] * (weight.dim() - 1))
        return self.convolve(input, weight, shift if bias is None else bias * scale + shift, *self.shape)

    def cost(self, positions: Value) -> LayerCost:
        """Its cost at `positions` pixels."""
        taps = functools.reduce(operator.mul, self.kernels * (self.axes // len(self.kernels)))
        return conv_cost(self.inputs.size, self.outputs.size, taps, positions, self.group_count, self.bias is not None)

    def export(self) -> nn.Module:
        """The chosen part as a plain convolution."""
        inputs, outputs = (sum(self.elastic.choice[name]) for name in ("inputs", "outputs"))
        kernel, biased = _chosen_kernel(self), self.bias is not None
        plain = self.plain(inputs, outputs, kernel, *self.shape, bias=biased, device="meta")  # type: ignore[arg-type]
        weight, bias = self.active()
        return filled(plain, self, weight=weight, bias=bias)


def _start(
    layer: Any,
    inputs: Size,
    outputs: Size,
    kernel_size: Kernel,
    stride: int | Sequence[int],
    groups: Value | int | str,
    dilation: int | Sequence[int],
    bias: bool,
    padding: int | Sequence[int] | None,
) -> None:
    """Initialise a convolution of torch that is to be a slice, and say what its shape follows from."""
    inputs, outputs = Dimension.of(inputs), Dimension.of(outputs)
    whole, per_group = _grouped(layer, inputs, outputs, kernel_size, groups, inputs)
    # torch allocates (outputs, inputs / groups): the quotient is what a group sees at most.
    width = inputs.allocated if per_group is None else per_group.largest
    layer.plain.__init__(layer, width, outputs.allocated, whole, stride, dilation=dilation, bias=bias)
    if layer.depthwise:
        layer.groups = layer.in_channels = outputs.allocated
    layer.whole_padding = _padding(layer, padding)


def _grouped(
    layer: Any,
    inputs: Dimension,
    outputs: Dimension,
    kernel_size: Kernel,
    groups: Value | int | str,
    divided: Dimension,
) -> tuple[tuple[int, ...], Value | None]:
    """Say what the shape of a convolution that is still to be initialised follows from.

    divided: the dimension of which the weight has one group's part
    Returns the largest kernel on each axis, and how much of that dimension a group has; None where there is one group.
    """
    kernels = _kernels(kernel_size)
    if len(kernels) not in (1, layer.axes):
        raise ValueError(f"expected one kernel size, or one for each of {layer.axes} axes, found {len(kernels)}")
    groups = groups.number if isinstance(groups, Constant) else groups
    depthwise = groups == "depthwise"
    if depthwise and inputs != outputs:
        raise ValueError("a depthwise convolution has the same dimension on both sides")
    group_count = outputs.size if depthwise else as_value(groups)
    grouped = not depthwise and group_count != Constant(1)
    if grouped:
        for dim in (inputs, outputs):
            _refuse_indivisible(dim.size, group_count)
    per_group = Constant(1) if depthwise else divided.size // group_count if grouped else None
    values: dict[str, Value | Dimension] = {"inputs": inputs, "outputs": outputs}
    values |= {f"kernel_{i}" if i else "kernel": kernel for i, kernel in enumerate(kernels)}
    if grouped:
        values |= {"groups": group_count, "per_group": per_group}
    whole = tuple(kernel.largest for kernel in kernels) * (layer.axes // len(kernels))
    layer.depthwise, layer.inputs, layer.outputs, layer.kernels = depthwise, inputs, outputs, kernels
    layer.group_count, layer.elastic = group_count, Elastic(values)
    return whole, per_group


def _kernels(size: Kernel) -> tuple[Value, ...]:
    return tuple(map(as_value, size)) if isinstance(size, tuple | list) else (as_value(size),)  # type: ignore[arg-type]


def _padding(layer: Any, padding: int | Sequence[int] | None) -> tuple[int, ...] | None:
    """Return the padding of the largest kernel on each side of an axis; None for what keeps the map's size."""
    if padding is None:
        if any(size % 2 == 0 for kernel in layer.kernels for size in kernel.possible):
            sizes = tuple(size for kernel in layer.kernels for size in kernel.possible)
            raise ValueError(f"kernel sizes are odd, not {sizes}; even ones keep no map's size: say their `padding`")
        return None
    found = tuple(padding) if isinstance(padding, tuple | list) else (padding,) * layer.axes
    if len(found) != layer.axes:
        raise ValueError(f"expected one padding, or one for each of {layer.axes} axes, found {len(found)}")
    each = layer.kernels * (layer.axes // len(layer.kernels))
    for kernel, pad, step in zip(each, found, layer.dilation, strict=True):
        smallest, largest = kernel.possible[0], kernel.possible[-1]
        if len({size % 2 for size in kernel.possible}) > 1:
            raise ValueError(f"kernel sizes are all odd or all even, not {kernel.possible}: else they have no centre")
        if pad < step * (largest - smallest) // 2:
            text = f"a padding of {pad} for the kernel of {largest}"
            raise ValueError(f"{text} leaves less than none for that of {smallest}, whose output has the same size")
    return found


def _refuse_indivisible(size: Value, groups: Value) -> None:
    """Raise ValueError if some arch has channels that its groups do not divide."""
    try:
        archs = grid({**size.domains, **groups.domains}) if size.keys or groups.keys else {"": np.zeros(1)}
    except TooManyCombinationsError:
        return  # it shows when such an arch runs
    reachable: Any = True
    for variable in {v.key: v for value in (size, groups) for v in variables_of(value)}.values():
        for condition in (c for c in variable.when if c.key in archs):
            held = np.isin(archs[condition.key], [*condition.choices])
            reachable &= held | (archs[variable.key] == variable.default)  # what is inactive holds its default
    wrong = np.flatnonzero(np.atleast_1d(((size - size // groups * groups)(archs) != 0) & reachable))
    if len(wrong):
        arch = {key: column[wrong[0]].item() for key, column in archs.items() if key}
        text = f"{size(arch)} channels cannot be cut into {groups(arch)} groups"
        where = ", ".join(f"{key} = {choice!r}" for key, choice in arch.items())
        raise ValueError(f"{text} ({where})" if where else text)


def _chosen_kernel(layer: Any) -> tuple[int, ...]:
    choice, count = layer.elastic.choice, len(layer.kernels)
    if count == 1:
        return (choice["kernel"],) * layer.axes
    return tuple(choice[f"kernel_{i}" if i else "kernel"] for i in range(count))


class Conv1dSlice(nn.Conv1d):
    """A convolution along one axis, with all that `Conv2dSlice` has but transforms.

    forward: (n, active inputs, l) -> (n, active outputs, l')
    """

    plain, convolve, axes, transforms = nn.Conv1d, staticmethod(F.conv1d), 1, None

    def __init__(
        self,
        inputs: Size,
        outputs: Size,
        kernel_size: Kernel,
        stride: int | Sequence[int] = 1,
        groups: Value | int | str = 1,
        dilation: int | Sequence[int] = 1,
        bias: bool = True,
        padding: int | Sequence[int] | None = None,
    ) -> None:
        _start(self, inputs, outputs, kernel_size, stride, groups, dilation, bias, padding)

    cuts, margin, shape = Conv2dSlice.cuts, Conv2dSlice.margin, Conv2dSlice.shape
    active, forward, cost, export = Conv2dSlice.active, Conv2dSlice.forward, Conv2dSlice.cost, Conv2dSlice.export


class Conv3dSlice(nn.Conv3d):
    """A convolution along three axes, with all that `Conv2dSlice` has but transforms.

    forward: (n, active inputs, t, h, w) -> (n, active outputs, t', h', w')
    """

    plain, convolve, axes, transforms = nn.Conv3d, staticmethod(F.conv3d), 3, None
    __init__ = Conv1dSlice.__init__
    cuts, margin, shape = Conv2dSlice.cuts, Conv2dSlice.margin, Conv2dSlice.shape
    active, forward, cost, export = Conv2dSlice.active, Conv2dSlice.forward, Conv2dSlice.cost, Conv2dSlice.export


class ConvTranspose2dSlice(nn.ConvTranspose2d):
    """A transposed convolution of which the first channels are active.

    inputs, outputs: its channels; kernel_size: all sizes even or all odd where it is a variable: a smaller one is the
        centre of the largest; groups: as in `Conv2dSlice`; stride, dilation: a number, or one for each axis
    padding, output_padding: as torch has them for the largest kernel; with a smaller one `padding` is less, so that its
        output has the same size. Left out, the map becomes `stride` times as large
    forward: (n, active inputs, h, w) -> (n, active outputs, h', w'); without `padding` h' is stride * h
    Raises ValueError for a kernel that has no centre of that size, and without `padding` for one that spans less than
    the stride or is even at stride 1.
    """

    plain, convolve, axes, costs_inputs = nn.ConvTranspose2d, staticmethod(F.conv_transpose2d), 2, True

    def __init__(
        self,
        inputs: Size,
        outputs: Size,
        kernel_size: Kernel,
        stride: int | Sequence[int] = 2,
        bias: bool = True,
        groups: Value | int | str = 1,
        dilation: int | Sequence[int] = 1,
        padding: int | Sequence[int] | None = None,
        output_padding: int | Sequence[int] = 0,
    ) -> None:
        _start_transposed(self, inputs, outputs, kernel_size, stride, bias, groups, dilation, padding, output_padding)

    @per_choice
    def cuts(self) -> tuple[Cut, Cut]:
        """What is active of weight and bias."""
        choice, (_, width, *kernel) = self.elastic.choice, self.weight.shape
        outputs = axis(self, "outputs")
        grouped = self.depthwise or "groups" in choice
        per_group = ((width,), (choice.get("per_group", 1),)) if grouped else outputs
        return cut(axis(self, "inputs"), per_group, *map(centre, kernel, _chosen_kernel(self))), cut(outputs)

    @property
    def shape(self) -> tuple[Any, ...]:
        """The chosen part's padding, output padding and groups: the map's size is the same, whatever the kernel is."""
        kernel, groups = _chosen_kernel(self), self.elastic.choice.get("groups", 1)
        groups = sum(self.elastic.choice["outputs"]) if self.depthwise else groups
        if self.whole_padding is not None:
            sizes = zip(self.whole_padding, self.dilation, self.kernel_size, kernel, strict=True)
            less = tuple(pad - step * (whole - size) // 2 for pad, step, whole, size in sizes)
            return less, self.output_padding, groups
        sizes = zip(kernel, self.dilation, self.stride, strict=True)
        over = [step * (size - 1) + 1 - stride for size, step, stride in sizes]
        return tuple((n + 1) // 2 for n in over), tuple(n % 2 for n in over), groups

    def active(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the chosen part."""
        of_weight, of_bias = self.cuts
        return of_weight(self.weight), None if self.bias is None else of_bias(self.bias)

    def forward(self, input: Tensor, output_size: None = None) -> Tensor:
        """(n, active inputs, h, w) -> (n, active outputs, h', w')."""
        weight, bias = self.active()
        return self.convolve(input, weight, bias, self.stride, *self.shape, self.dilation)

    def cost(self, positions: Value, inputs: Value) -> LayerCost:
        """Its cost at `positions` pixels of the output: each weight counts at each of `inputs` pixels of the input."""
        taps = functools.reduce(operator.mul, self.kernels * (self.axes // len(self.kernels)))
        weights, outputs = self.inputs.size * (self.outputs.size // self.group_count) * taps, self.outputs.size
        biases = outputs if self.bias is not None else Constant(0)
        return LayerCost(weights * inputs, weights + biases, outputs * positions)

    def export(self) -> nn.Module:
        """The chosen part as a plain transposed convolution."""
        inputs, outputs = (sum(self.elastic.choice[name]) for name in ("inputs", "outputs"))
        weight, bias = self.active()
        padding, more, groups = self.shape
        kernel, biased = _chosen_kernel(self), bias is not None
        plain = self.plain(  # type: ignore[call-overload]
            inputs, outputs, kernel, self.stride, padding, more, groups, biased, self.dilation, device="meta"
        )
        return filled(plain, self, weight=weight, bias=bias)


def _start_transposed(
    layer: Any,
    inputs: Size,
    outputs: Size,
    kernel_size: Kernel,
    stride: int | Sequence[int],
    bias: bool,
    groups: Value | int | str,
    dilation: int | Sequence[int],
    padding: int | Sequence[int] | None,
    output_padding: int | Sequence[int],
) -> None:
    """Initialise a transposed convolution of torch that is to be a slice, and say what its shape follows from."""
    inputs, outputs = Dimension.of(inputs), Dimension.of(outputs)
    whole, per_group = _grouped(layer, inputs, outputs, kernel_size, groups, outputs)
    width = outputs.allocated if per_group is None else per_group.largest
    # torch allocates (inputs, outputs / groups); its bias would be of this width as well.
    layer.plain.__init__(
        layer, inputs.allocated, width, whole, stride, 0, output_padding, bias=False, dilation=dilation
    )
    if bias:
        layer.bias = nn.Parameter(torch.empty(outputs.allocated))
        layer.reset_parameters()
    layer.out_channels = outputs.allocated
    layer.whole_padding = None if padding is None else _padding(layer, padding)
    more = zip(layer.output_padding, layer.stride, layer.dilation, strict=True)
    if any(pad >= max(step, apart) for pad, step, apart in more):
        raise ValueError(f"an output_padding of {output_padding} is not below stride or dilation")
    if padding is not None:
        return
    if any(layer.output_padding):
        raise ValueError("without `padding`, output_padding follows from the stride: say both or none")
    each = layer.kernels * (layer.axes // len(layer.kernels))
    for kernel, step, apart in zip(each, layer.stride, layer.dilation, strict=True):
        spans = apart * (kernel.possible[0] - 1) + 1
        if spans < step or len({size % 2 for size in kernel.possible}) > 1 or (step == apart == 1 and spans % 2 == 0):
            text = f"expected kernels of at least the stride {step}, all odd or all even, at stride 1 odd"
            raise ValueError(f"{text}, found {kernel.possible}")


class ConvTranspose1dSlice(nn.ConvTranspose1d):
    """A transposed convolution along one axis, with all that `ConvTranspose2dSlice` has.

    forward: (n, active inputs, l) -> (n, active outputs, l')
    """

    plain, convolve, axes, costs_inputs = nn.ConvTranspose1d, staticmethod(F.conv_transpose1d), 1, True
    __init__ = ConvTranspose2dSlice.__init__
    cuts, shape, active = ConvTranspose2dSlice.cuts, ConvTranspose2dSlice.shape, ConvTranspose2dSlice.active
    forward, cost, export = ConvTranspose2dSlice.forward, ConvTranspose2dSlice.cost, ConvTranspose2dSlice.export


class ConvTranspose3dSlice(nn.ConvTranspose3d):
    """A transposed convolution along three axes, with all that `ConvTranspose2dSlice` has.

    forward: (n, active inputs, t, h, w) -> (n, active outputs, t', h', w')
    """

    plain, convolve, axes, costs_inputs = nn.ConvTranspose3d, staticmethod(F.conv_transpose3d), 3, True
    __init__ = ConvTranspose2dSlice.__init__
    cuts, shape, active = ConvTranspose2dSlice.cuts, ConvTranspose2dSlice.shape, ConvTranspose2dSlice.active
    forward, cost, export = ConvTranspose2dSlice.forward, ConvTranspose2dSlice.cost, ConvTranspose2dSlice.export


class GroupNormSlice(nn.GroupNorm):
    """A group norm of which the first features are active.

    groups: how many, a number or a value; it divides the features of every arch
    forward: (n, active features, …) -> the same shape
    Raises ValueError where it does not.
    """

    def __init__(self, groups: Value | int, features: Size, eps: float = 1e-5, affine: bool = True) -> None:
        outputs, groups = Dimension.of(features), as_value(groups)
        _refuse_indivisible(outputs.size, groups)
        super().__init__(1, outputs.allocated, eps, affine)
        self.outputs = outputs
        self.elastic = Elastic({"outputs": outputs, "groups": groups})

    @per_choice
    def cut(self) -> Cut:
        """What is active of every vector."""
        return cut(axis(self, "outputs"))

    def active(self) -> list[Any]:
        """Weight and bias of the chosen part."""
        return [None if tensor is None else self.cut(tensor) for tensor in (self.weight, self.bias)]

    def forward(self, input: Tensor) -> Tensor:
        """(n, active features, …) -> the same shape."""
        return F.group_norm(input, self.elastic.choice["groups"], *self.active(), self.eps)

    def cost(self, positions: Value) -> LayerCost:
        """Two parameters a feature."""
        return norm_cost(self.outputs.size, self.affine)

    def export(self) -> nn.GroupNorm:
        """The chosen part as a plain group norm."""
        weight, bias = self.active()
        features = sum(self.elastic.choice["outputs"])
        plain = nn.GroupNorm(self.elastic.choice["groups"], features, self.eps, self.affine, device="meta")
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
    forward: (n, active features, h, w) -> the same shape
    """

    plain: Any = nn.BatchNorm2d
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

    def export(self) -> nn.Module:
        """The chosen part as a plain batch norm."""
        weight, bias, mean, var = self.active()
        plain = self.plain(sum(self.elastic.choice["outputs"]), self.eps, self.momentum, self.affine, device="meta")
        return filled(
            plain,
            self,
            weight=weight,
            bias=bias,
            running_mean=mean,
            running_var=var,
            num_batches_tracked=self.num_batches_tracked,
        )


class BatchNorm1dSlice(BatchNorm2dSlice):
    """The same for features (n, active features) or along one axis (n, active features, l)."""

    plain = nn.BatchNorm1d


class BatchNorm3dSlice(BatchNorm2dSlice):
    """The same along three axes, (n, active features, t, h, w)."""

    plain = nn.BatchNorm3d


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
    """Resizes images to a resolution that may be a variable; images of that size pass as they are.

    resolution: side of a square, or the sides of a rectangle
    mode: "nearest", "bilinear" or "bicubic"
    forward: (n, c, h, w) -> (n, c, height, width)
    """

    def __init__(self, resolution: Value | int | Sides, mode: str = "bilinear") -> None:
        super().__init__()
        self.mode = mode
        sides: dict[str, Value | Dimension] = {}
        if isinstance(resolution, Sides):
            sides["height"], sides["width"] = resolution.pair
        else:
            sides["resolution"] = as_value(resolution)
        self.elastic, self.resizes = Elastic(sides), tuple(sides)

    @property
    def size(self) -> tuple[int, int]:
        """The chosen height and width."""
        choice = [*self.elastic.choice.values()]
        return choice[0], choice[-1]

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) -> (n, c, height, width)."""
        return x if x.shape[-2:] == self.size else F.interpolate(x, self.size, mode=self.mode)

    def export(self) -> nn.Module:
        """A layer that resizes to the chosen resolution."""
        return nn.Upsample(self.size, mode=self.mode)
