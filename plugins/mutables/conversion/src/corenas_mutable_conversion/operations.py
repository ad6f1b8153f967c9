"""What the operations of ATen do to axes: rules that give the axes of outputs and unify those of inputs.

An operation without a rule fixes all its axes and says so: a new operation costs width, never correctness.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from attrs import define, field, frozen
from torch import Tensor
from torch.utils._pytree import tree_leaves

from corenas_mutable_conversion.axes import Axes, Axis, MisfitError, Size, count, join, product


@define
class Op:
    """One operation that ran.

    where: the line of code that called it; modules: those that it ran in, by name, the outermost first
    outputs: the axes of its outputs
    macs: axes whose product is its number of multiply-adds; none where it has none
    layer: whether it is a convolution or a linear layer
    cut: what a slice left out before it, and what it took; groups: of a convolution or a norm
    """

    name: str
    where: str
    modules: tuple[str, ...]
    outputs: list[tuple[Axis, ...]] = field(factory=list)
    macs: list[Axis] = field(factory=list)
    layer: bool = False
    cut: list[Axis] = field(factory=list)
    groups: Axis = 1


@frozen
class Ran:
    """An operation that has just run, as its rule sees it.

    of: the axes of a tensor; weights: the ids of parameters and of views of them
    """

    op: Op
    args: Sequence[Any]
    kwargs: dict[str, Any]
    outs: Sequence[Tensor]
    axes: Axes
    of: Callable[[Tensor], tuple[Axis, ...]]
    weights: set[int]

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """Return an argument that may be given by position or by name."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    def unknown(self, tensor: Tensor) -> None:
        """Hold all axes of a tensor."""
        for axis in self.of(tensor):
            self.axes.fix(axis, f"what {self.op.name} does to channels is not known")

    def broadcast(self, tensors: Sequence[Sequence[Axis]], shape: Sequence[int]) -> list[Axis]:
        """Unify the axes of tensors that are broadcast together; returns those of the result."""
        found: list[Axis] = []
        for place in range(1, len(shape) + 1):
            axes = [own[-place] for own in tensors if place <= len(own) and count(own[-place]) > 1]
            for axis in axes[1:]:
                self.axes.unify(axes[0], axis)
            found.insert(0, axes[0] if axes else shape[-place])
        return found


Found: TypeAlias = "Sequence[Sequence[Axis]]"
_RULES: dict[str, Callable[[Ran], Found]] = {}


def _names(text: str) -> tuple[str, ...]:
    return (*text.split(),)


POINTWISE = _names(
    "hardswish hardsigmoid hardtanh silu mish leaky_relu elu celu softplus softshrink hardshrink log_sigmoid "
    "threshold gelu rrelu logit erf normal sgn isfinite isnan isinf log_sigmoid_forward"
)
"""Operations of single elements that torch does not tag as such."""

VIEWS = _names("t transpose permute view _unsafe_view expand slice select alias detach unsqueeze squeeze")
"""Operations after which a weight still is one."""

RESIDUAL = _names(
    "add relu hardtanh clone alias detach view _unsafe_view permute transpose t _to_copy sub native_batch_norm "
    "native_layer_norm _fused_rms_norm silu gelu hardswish mul_scalar roll slice constant_pad_nd"
)
"""Operations after which a residual stream still is one."""

LAYOUT = _names(
    "clone detach _to_copy lift_fresh view _unsafe_view alias expand squeeze unsqueeze as_strided as_strided_ "
    "contiguous t transpose permute"
)
"""Operations that only say how elements lie: they may differ from subnet to subnet, what is computed may not."""


def rule(*names: str) -> Callable[[Callable[[Ran], Found]], Callable[[Ran], Found]]:
    """Register the rule of some operations."""

    def add(function: Callable[[Ran], Found]) -> Callable[[Ran], Found]:
        _RULES.update(dict.fromkeys(" ".join(names).split(), function))
        return function

    return add


def outputs_of(ran: Ran, pointwise: bool) -> Found:
    """Return the axes of an operation's outputs.

    pointwise: whether torch says that it works element by element
    """
    name = ran.op.name
    found = _RULES.get(name, _RULES.get(name.rstrip("_")))
    if found is None and (pointwise or name.rstrip("_") in POINTWISE):
        found = _broadcast
    if found is not None:
        return found(ran)
    for tensor in ran.tensors:
        ran.unknown(tensor)
    return [tuple(out.shape) for out in ran.outs]


# -- element by element -----------------------------------------------------------------------------------------------


@rule("where masked_fill clamp copy_ copy lerp addcmul addcdiv fill bernoulli zero")
def _broadcast(ran: Ran) -> Found:
    return [ran.broadcast([*map(ran.of, ran.tensors)], ran.outs[0].shape)] * len(ran.outs)


@rule(
    "clone alias detach _to_copy contiguous lift_fresh _softmax _safe_softmax _log_softmax softmax cumsum zeros_like",
    "ones_like empty_like rand_like randn_like full_like native_dropout as_strided tril triu _local_response_norm",
    "logcumsumexp resize set _conj uniform normal exponential dropout",
)
def _same(ran: Ran) -> Found:
    first = ran.args[0]
    found: list[Sequence[Axis]] = []
    for out in ran.outs:
        if out.shape != first.shape:
            ran.unknown(first)
        found.append(ran.of(first) if out.shape == first.shape else tuple(out.shape))
    return found


@rule(
    "zeros ones empty full rand randn new_zeros new_ones new_empty new_full arange scalar_tensor eye linspace",
    "new_empty_strided empty_strided",
)
def _fresh(ran: Ran) -> Found:
    return [[Size(n) if n > 1 else n for n in out.shape] for out in ran.outs]


# -- places -----------------------------------------------------------------------------------------------------------


@rule(
    "max_pool2d_with_indices avg_pool2d _adaptive_avg_pool2d adaptive_max_pool2d max_pool2d _adaptive_avg_pool3d",
    "avg_pool3d max_pool3d_with_indices adaptive_avg_pool2d adaptive_avg_pool1d reflection_pad1d reflection_pad2d",
    "replication_pad2d upsample_nearest1d upsample_nearest2d _upsample_nearest_exact2d upsample_bilinear2d",
    "upsample_bicubic2d upsample_linear1d upsample_trilinear3d upsample_nearest3d _upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa grid_sampler_2d max_pool1d avg_pool1d",
)
def _spatial(ran: Ran) -> Found:
    axes = ran.of(ran.args[0])
    for axis in axes[2:]:
        ran.axes.fix(axis, "pooled or resized as if it were a place")
    return [(*axes[:2], *out.shape[2:]) for out in ran.outs]


@rule("constant_pad_nd")
def _pad(ran: Ran) -> Found:
    axes, margins = [*ran.of(ran.args[0])], ran.args[1]
    for i in range(len(margins) // 2):
        before, after = margins[2 * i : 2 * i + 2]
        if before < 0 or after < 0:
            ran.axes.fix(axes[-1 - i], "cropped")
            axes[-1 - i] = ran.outs[0].shape[-1 - i]
        elif before or after:
            axes[-1 - i] = join([before, axes[-1 - i], after])
    return [axes]


@rule("roll flip")
def _roll(ran: Ran) -> Found:
    axes = ran.of(ran.args[0])
    dims = ran.argument(1, "dims") if ran.op.name == "flip" else ran.argument(2, "dims", ()) or range(len(axes))
    for dim in dims:
        ran.axes.fix(axes[dim], f"reordered by {ran.op.name}")
    return [axes]


@rule("pixel_shuffle")
def _pixel_shuffle(ran: Ran) -> Found:
    axes = ran.of(ran.args[0])
    channels = ran.axes.reshaped([axes[-3]], [ran.outs[0].shape[-3], ran.args[1] ** 2])
    ran.axes.fix(channels[1], "becomes places")
    return [[*axes[:-3], channels[0], *ran.outs[0].shape[-2:]]]


@rule("pixel_unshuffle")
def _pixel_unshuffle(ran: Ran) -> Found:
    axes = ran.of(ran.args[0])
    return [[*axes[:-3], product([axes[-3], ran.args[1] ** 2]), *ran.outs[0].shape[-2:]]]


@rule("im2col")
def _im2col(ran: Ran) -> Found:
    axes = ran.of(ran.args[0])
    return [[axes[0], product([axes[1], math.prod(ran.args[1])]), ran.outs[0].shape[-1]]]


# -- shapes -----------------------------------------------------------------------------------------------------------


@rule("view _unsafe_view reshape _reshape_alias _reshape_copy view_copy squeeze")
def _view(ran: Ran) -> Found:
    return [ran.axes.reshaped(ran.of(ran.args[0]), ran.outs[0].shape)]


@rule("permute")
def _permute(ran: Ran) -> Found:
    axes = ran.of(ran.args[0])
    return [[axes[i] for i in ran.args[1]]]


@rule("transpose t")
def _transpose(ran: Ran) -> Found:
    axes = [*ran.of(ran.args[0])]
    i, j = ran.args[1:] if len(ran.args) > 1 else (0, -1)
    if axes:
        axes[i], axes[j] = axes[j], axes[i]
    return [axes]


@rule("unsqueeze")
def _unsqueeze(ran: Ran) -> Found:
    axes = [*ran.of(ran.args[0])]
    axes.insert(ran.args[1] % (len(axes) + 1), 1)
    return [axes]


@rule("expand")
def _expand(ran: Ran) -> Found:
    axes, shape = ran.of(ran.args[0]), ran.outs[0].shape
    axes = (1,) * (len(shape) - len(axes)) + axes
    return [[(Size(n) if n > 1 else 1) if count(a) == 1 else a for a, n in zip(axes, shape, strict=True)]]


@rule("repeat")
def _repeat(ran: Ran) -> Found:
    times, tensor = ran.args[1], ran.args[0]
    axes = (1,) * (len(times) - tensor.dim()) + ran.of(tensor)
    return [[product([n, axis]) for n, axis in zip(times, axes, strict=True)]]


@rule("split split_with_sizes chunk unsafe_split unsafe_chunk")
def _split(ran: Ran) -> Found:
    axes = [*ran.of(ran.args[0])]
    dim = ran.argument(2, "dim", 0) % len(axes)
    pieces = ran.axes.pieces(axes[dim], [out.shape[dim] for out in ran.outs])
    return [[*axes[:dim], piece, *axes[dim + 1 :]] for piece in pieces]


@rule("slice")
def _slice(ran: Ran) -> Found:
    tensor, dim, start, stop, step = (*ran.args, *(None,) * (5 - len(ran.args)))
    axes, dim = [*ran.of(tensor)], dim or 0
    n = tensor.shape[dim]
    start, stop, _ = slice(start, stop).indices(n)
    if ran.outs[0].shape[dim] == n:
        return [axes]
    if step not in (None, 1):
        ran.axes.fix(axes[dim], "every other element is taken")
        axes[dim] = ran.outs[0].shape[dim]
        return [axes]
    before, axes[dim], _ = ran.axes.pieces(axes[dim], [start, stop - start, n - stop])
    ran.op.cut = [before, axes[dim]]
    return [axes]


@rule("select")
def _select(ran: Ran) -> Found:
    axes = [*ran.of(ran.args[0])]
    ran.axes.fix(axes.pop(ran.args[1]), "single elements are picked from it")
    return [axes]


@rule("unbind")
def _unbind(ran: Ran) -> Found:
    axes = [*ran.of(ran.args[0])]
    ran.axes.fix(axes.pop(ran.argument(1, "dim", 0)), "its elements are taken apart")
    return [axes] * len(ran.outs)


@rule("cat")
def _cat(ran: Ran) -> Found:
    dim = ran.argument(1, "dim", 0) % ran.outs[0].dim()
    every = [ran.of(tensor) for tensor in ran.args[0] if tensor.dim() == ran.outs[0].dim()]
    _unify_all(ran, every, but=dim)
    return [[join(axes[dim] for axes in every) if i == dim else axis for i, axis in enumerate(every[0])]]


@rule("stack")
def _stack(ran: Ran) -> Found:
    dim = ran.argument(1, "dim", 0) % ran.outs[0].dim()
    every = [*map(ran.of, ran.args[0])]
    _unify_all(ran, every)
    return [[*every[0][:dim], len(every), *every[0][dim:]]]


def _unify_all(ran: Ran, every: Sequence[Sequence[Axis]], but: int | None = None) -> None:
    for axes in every[1:]:
        for i, (first, second) in enumerate(zip(every[0], axes, strict=True)):
            if i != but:
                ran.axes.unify(first, second)


# -- picking ----------------------------------------------------------------------------------------------------------


@rule("index")
def _index(ran: Ran) -> Found:
    axes = ran.of(ran.args[0])
    indices = [*ran.args[1], *(None,) * (len(axes) - len(ran.args[1]))]
    used = [i for i, index in enumerate(indices) if index is not None]
    if any(indices[i].dtype in (torch.bool, torch.uint8) for i in used):
        ran.unknown(ran.args[0])
        return [tuple(ran.outs[0].shape)]
    for i in used:
        ran.axes.fix(axes[i], "single elements are picked from it")
    shape = torch.broadcast_shapes(*(indices[i].shape for i in used))
    picked = ran.broadcast([ran.of(indices[i]) for i in used], shape)
    kept = [axis for axis, index in zip(axes, indices, strict=True) if index is None]
    at = used[0] if used == [*range(used[0], used[-1] + 1)] else 0
    return [[*kept[:at], *picked, *kept[at:]]]


@rule("embedding")
def _embedding(ran: Ran) -> Found:
    axes = ran.of(ran.args[0])
    ran.axes.fix(axes[0], "entries of a table are looked up")
    return [[*ran.of(ran.args[1]), axes[1]]]


@rule("topk sort gather scatter index_select")
def _picked(ran: Ran) -> Found:
    numbers = (arg for arg in ran.args[1:] if isinstance(arg, int) and ran.op.name != "topk")
    dim = ran.kwargs.get("dim", next(numbers, -1))
    axes = [*ran.of(ran.args[0])]
    ran.axes.fix(axes[dim], f"elements are picked from it by {ran.op.name}")
    dim %= len(axes)
    return [
        [n if i == dim or count(axis) != n else axis for i, (axis, n) in enumerate(zip(axes, out.shape, strict=True))]
        for out in ran.outs
    ]


@rule(
    "mean sum amax amin var std linalg_vector_norm logsumexp prod norm var_mean max min argmax argmin any all std_mean",
    "median mode",
)
def _reduce(ran: Ran) -> Found:
    if len(ran.args) > 1 and isinstance(ran.args[1], Tensor):  # the larger of two tensors
        return _broadcast(ran)
    axes, out = ran.of(ran.args[0]), ran.outs[0]
    second = ran.op.name in ("linalg_vector_norm", "norm")
    dims = ran.argument(2 if second else 1, "dim")
    dims = [*range(len(axes))] if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    gone = {dim % max(len(axes), 1) for dim in dims}
    if out.dim() == len(axes):
        return [[1 if i in gone else axis for i, axis in enumerate(axes)]] * len(ran.outs)
    return [[axis for i, axis in enumerate(axes) if i not in gone]] * len(ran.outs)


# -- multiply-adds ----------------------------------------------------------------------------------------------------


@rule("mm addmm bmm baddbmm addbmm addmv mv")
def _matmul(ran: Ran) -> Found:
    added = ran.op.name.startswith(("add", "badd"))
    bias, (left, right) = (ran.args[0], ran.args[1:3]) if added else (None, ran.args[:2])
    a, b, unify = ran.of(left), ran.of(right), ran.axes.unify
    if len(b) < 2:
        for tensor in ran.tensors:
            ran.unknown(tensor)
        return [tuple(ran.outs[0].shape)]
    unify(a[-1], b[-2])
    for x, y in zip(a[:-2], b[:-2], strict=True):
        unify(x, y)
    out = [*a[:-1], b[-1]]
    if bias is not None:
        ran.broadcast([out, ran.of(bias)], ran.outs[0].shape)
    ran.op.macs, ran.op.layer = [*out, a[-1]], id(right) in ran.weights or id(left) in ran.weights
    return [out]


@rule(
    "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_attention_math",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention _scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_attention_math_for_mps _scaled_dot_product_cudnn_attention",
)
def _attention(ran: Ran) -> Found:
    (q, k, v), unify = map(ran.of, ran.args[:3]), ran.axes.unify
    for x, y in [*zip(q[:-2], k[:-2], strict=True), *zip(k[:-2], v[:-2], strict=True), (q[-1], k[-1]), (k[-2], v[-2])]:
        if count(x) == count(y):
            unify(x, y)
        else:  # several heads of queries for one of keys
            ran.axes.tie([x, y], "heads share keys and values")
    ran.op.macs = [*q[:-1], k[-2], join([q[-1], v[-1]])]
    found: list[Sequence[Axis]] = [[*q[:-1], v[-1]]]
    for out in ran.outs[1:]:
        found.append([q[i] if i < len(q) and count(q[i]) == n else n for i, n in enumerate(out.shape)])
    return found


@rule("convolution cudnn_convolution mkldnn_convolution _convolution")
def _convolution(ran: Ran) -> Found:
    x, weight, bias = (None if tensor is None else ran.of(tensor) for tensor in ran.args[:3])
    assert x is not None and weight is not None  # noqa: PT018
    transposed, groups = ran.args[6], ran.args[8]
    lead, places_of = x[: -len(weight) + 1], slice(-len(weight) + 2, None)
    first, second = weight[:2]
    if groups > 1:
        # The first axis of the weight has all groups one after the other, the second is what each of them has.
        try:
            own = (first, 1) if count(second) == 1 and count(first) == groups else ran.axes.outer(first, groups)
            ran.op.groups = own[0]
        except MisfitError:
            ran.axes.fix(first, "groups across joined channels")
            ran.op.groups = groups
        second = product([ran.op.groups, second])
    inputs, outputs = (first, second) if transposed else (second, first)
    ran.axes.unify(x[-len(weight) + 1], inputs)
    if bias is not None:
        ran.axes.unify(bias[0], outputs)
    for axis in x[places_of]:
        ran.axes.fix(axis, "convolved as if it were a place")
    out = [*lead, outputs, *ran.outs[0].shape[places_of]]
    ran.op.macs, ran.op.layer = [*lead, *(x if transposed else out)[places_of], *weight], True
    return [out]


# -- norms ------------------------------------------------------------------------------------------------------------


@rule(
    "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm batch_norm",
    "native_group_norm _batch_norm_with_update _batch_norm_no_update instance_norm",
)
def _norm(ran: Ran) -> Found:
    x = ran.of(ran.args[0])
    for tensor in ran.args[1:5]:
        if isinstance(tensor, Tensor):
            ran.axes.unify(x[1], ran.of(tensor)[0])
    rest = [[x[1] if n == count(x[1]) else n for n in out.shape] for out in ran.outs[1:]]
    if ran.op.name == "native_group_norm":
        groups = ran.args[6]
        try:
            ran.op.groups, _ = ran.axes.outer(x[1], groups)
        except MisfitError:
            ran.axes.fix(x[1], "normalised in groups across joined channels")
            ran.op.groups = groups
        rest = [[x[0], ran.op.groups]] * 2
    return [x, *rest]


@rule("native_layer_norm _fused_rms_norm")
def _layer_norm(ran: Ran) -> Found:
    x, normed = ran.of(ran.args[0]), len(ran.args[1])
    for tensor in ran.args[2:4]:
        if isinstance(tensor, Tensor):
            for own, axis in zip(reversed(ran.of(tensor)), reversed(x), strict=False):
                ran.axes.unify(own, axis)
    return [x, *([[*x[: len(x) - normed], *(1,) * normed]] * (len(ran.outs) - 1))]


# -- shapes in no time ------------------------------------------------------------------------------------------------

_UNARY = _names(
    "hardtanh hardswish hardsigmoid gelu silu relu sigmoid tanh leaky_relu elu _softmax _safe_softmax mish exp "
    "erf softplus clamp_min clamp sqrt rsqrt"
)
_BINARY = ("add", "mul", "add_", "mul_", "sub", "div")
_NORMS = ("native_batch_norm", "native_layer_norm", "_native_batch_norm_legit_no_training", "native_group_norm")


def shaped(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Return what an operation gives on the meta device, of the right shapes.

    For some operations torch has decompositions in Python there, 8 to 17 ms each; their shapes are made by hand.
    Raises RuntimeError, as torch does, for shapes that do not fit.
    """
    name = func.overloadpacket.__name__
    if name in _NORMS:
        return _shaped_norm(name, args)
    if name == "addmm" and not kwargs:
        bias, a, b = args
        if a.shape[1] != b.shape[0] or bias.shape[-1] not in (1, b.shape[1]):
            layer = f"{b.shape[0]} inputs and {bias.shape[-1]} outputs"
            raise RuntimeError(f"a linear layer of {layer} on {a.shape[1]} features")
        return torch.empty(a.shape[0], b.shape[1], device="meta", dtype=a.dtype)
    if name == "cat" and len({(x.dtype, x.dim()) for x in args[0]}) == 1:
        return _shaped_cat(args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0))
    single = bool(args) and isinstance(args[0], Tensor) and not any(isinstance(x, Tensor) for x in args[1:])
    if single and name.rstrip("_") in _UNARY:
        return args[0] if name.endswith("_") else torch.empty_like(args[0])
    binary = name in _BINARY and all(isinstance(x, Tensor) for x in args[:2])
    alike = binary and args[0].dtype == args[1].dtype
    if alike and torch.broadcast_shapes(args[0].shape, args[1].shape) == args[0].shape:
        return args[0] if name.endswith("_") else torch.empty_like(args[0])
    return func(*args, **kwargs)


def _shaped_norm(name: str, args: Sequence[Any]) -> Any:
    x, layer, group = args[0], name == "native_layer_norm", name == "native_group_norm"
    weight = args[2 if layer else 1]
    features = x.shape[-1 if layer else 1]
    if weight is not None and weight.shape[-1] != features:
        raise RuntimeError(f"{name} of {features} features with a weight of {weight.shape[-1]}")
    rest = [x.shape[0], args[6]] if group else [features]
    if layer:
        normed = len(args[1])
        if [*args[1]] != [*x.shape[-normed:]]:
            raise RuntimeError(f"normalized_shape {[*args[1]]} of {[*x.shape]}")
        rest = [*x.shape[: x.dim() - normed], *(1,) * normed]
    if group and features % args[6]:
        raise RuntimeError(f"{features} channels in {args[6]} groups")
    return torch.empty_like(x), *(torch.empty(rest, device="meta") for _ in range(2))


def _shaped_cat(tensors: Sequence[Tensor], dim: int) -> Tensor:
    dim %= tensors[0].dim()
    shapes = [[*x.shape[:dim], *x.shape[dim + 1 :]] for x in tensors]
    if any(shape != shapes[0] for shape in shapes):
        raise RuntimeError(f"concatenation of {[[*x.shape] for x in tensors]} along {dim}")
    shapes[0].insert(dim, sum(x.shape[dim] for x in tensors))
    return torch.empty(shapes[0], device="meta", dtype=tensors[0].dtype)
