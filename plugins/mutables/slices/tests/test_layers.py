"""Slices: what plain torch layers of the active size give, with the same gradients and statistics."""

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import corenas_mutable_slices
from corenas.cost import Cost
from corenas.errors import UserError
from corenas.mutable import apply
from corenas.space import SearchSpace
from corenas.value import Constant, Dimension, TooManyCombinationsError, as_value, make_divisible, rounded
from corenas.variables import Categorical, Condition, Int, Variable
from corenas_mutable_slices import (
    ACTIVATIONS,
    BatchNorm2dSlice,
    Conv1dSlice,
    Conv2dSlice,
    Conv3dSlice,
    ConvNormAct,
    ConvTranspose1dSlice,
    ConvTranspose2dSlice,
    ConvTranspose3dSlice,
    ElasticDepth,
    GroupNormSlice,
    InputResize,
    LinearSlice,
    MixedOp,
    SqueezeExcitation,
    activation,
)
from corenas_mutable_slices.layers import cut
from corenas_mutable_slices.layouts import Sides

IN, OUT, K, G = Variable("i", (2, 4, 6)), Variable("o", (4, 6, 8)), Variable("k", (1, 3, 5)), Variable("g", (1, 2))
ARCHS = [dict(zip("iokg", row, strict=True)) for row in itertools.product((2, 4, 6), (4, 6, 8), (1, 3, 5), (1, 2))][::5]
CHOICES = pytest.mark.parametrize("arch", ARCHS, ids=lambda arch: "-".join(map(str, arch.values())))


@pytest.fixture(autouse=True)
def double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def indices(dimension, arch):
    """Where the active elements stand, written down without the code under test."""
    found, start = [], 0
    for part in dimension.parts:
        found += range(start, start + part(arch))
        start += part.largest
    return found


def grid_of(rows, columns):
    return torch.tensor(rows)[:, None], torch.tensor(columns)[None]


def same_as(plain, layer, arch, x, at):
    """Outputs and gradients of a slice are those of a plain layer; outside `at` (parameter -> place) they are zero."""
    x, y = x.clone().requires_grad_(), x.clone().requires_grad_()
    with apply(layer, arch):
        ours = layer(x)
    theirs = plain(y)
    assert_close(ours, theirs)
    weights = torch.randn_like(theirs)
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    assert_close(x.grad, y.grad)
    for name, parameter in plain.named_parameters():
        whole = getattr(layer, name)
        expected = torch.zeros_like(whole)
        expected[at[name]] = parameter.grad
        assert_close(whole.grad, expected)
        whole.grad = parameter.grad = None


CONVS = {
    "plain": {},
    "strided": {"stride": 2},
    "dilated": {"dilation": 2},
    "no bias": {"bias": False},
    "grouped": {"groups": 2},
    "groups as a value": {"groups": G},
}


@CHOICES
@pytest.mark.parametrize("options", CONVS.values(), ids=CONVS)
def test_a_convolution_is_a_plain_one_of_the_active_size(arch, options):
    layer = Conv2dSlice(IN, OUT, K, **options)
    i, o, k = arch["i"], arch["o"], arch["k"]
    groups = arch["g"] if options.get("groups") is G else options.get("groups", 1)
    dilation = options.get("dilation", 1)
    plain = nn.Conv2d(i, o, k, options.get("stride", 1), k // 2 * dilation, dilation, groups, options.get("bias", True))
    crop = slice((5 - k) // 2, (5 - k) // 2 + k)
    at = {"weight": (slice(o), slice(i // groups), crop, crop), "bias": slice(o)}
    plain.load_state_dict({name: getattr(layer, name)[at[name]] for name in plain.state_dict()})
    x = torch.randn(2, i, 7, 7)
    same_as(plain, layer, arch, x, at)
    with apply(layer, arch):
        exported = layer.export()
        assert type(exported) is nn.Conv2d
        assert str(exported) == str(plain)
        assert_close(exported(x), layer(x))


@CHOICES
def test_a_depthwise_convolution_is_a_plain_one_of_the_active_size(arch):
    inner = make_divisible(IN * OUT, 4)
    layer, n, k = Conv2dSlice(inner, inner, K, stride=2, groups="depthwise"), arch["i"] * arch["o"], arch["k"]
    plain = nn.Conv2d(n, n, k, 2, k // 2, groups=n)
    crop = slice((5 - k) // 2, (5 - k) // 2 + k)
    at = {"weight": (slice(n), slice(None), crop, crop), "bias": slice(n)}
    plain.load_state_dict({name: getattr(layer, name)[at[name]] for name in at})
    x = torch.randn(2, n, 8, 8)
    same_as(plain, layer, arch, x, at)
    with apply(layer, arch):
        assert str(layer.export()) == str(plain)
        assert_close(layer.export()(x), layer(x))


@CHOICES
def test_a_convolution_of_several_parts_takes_the_first_of_each(arch):
    layer = Conv2dSlice([IN, 3, OUT], [OUT, IN], K)
    inputs, outputs = (indices(layer.elastic.values[name], arch) for name in ("inputs", "outputs"))
    k = arch["k"]
    plain = nn.Conv2d(len(inputs), len(outputs), k, padding=k // 2)
    crop = slice((5 - k) // 2, (5 - k) // 2 + k)
    at = {"weight": (*grid_of(outputs, inputs), crop, crop), "bias": outputs}
    plain.load_state_dict({name: getattr(layer, name)[at[name]] for name in at})
    x = torch.cat([torch.randn(2, n, 5, 5) for n in (arch["i"], 3, arch["o"])], 1)
    same_as(plain, layer, arch, x, at)
    with apply(layer, arch):
        assert_close(layer.export()(x), layer(x))


@CHOICES
def test_a_depthwise_convolution_of_several_parts_takes_the_first_of_each(arch):
    layer = Conv2dSlice([IN, OUT], [IN, OUT], K, groups="depthwise", bias=False)
    channels, k = indices(layer.elastic.values["inputs"], arch), arch["k"]
    plain = nn.Conv2d(len(channels), len(channels), k, padding=k // 2, groups=len(channels), bias=False)
    crop = slice((5 - k) // 2, (5 - k) // 2 + k)
    plain.weight.data.copy_(layer.weight[channels][:, :, crop, crop])
    at = {"weight": (torch.tensor(channels), slice(None), crop, crop)}
    same_as(plain, layer, arch, torch.randn(2, len(channels), 5, 5), at)


def transformed(weight, matrices, kernel):
    """A kernel made step by step, as Once-for-All writes it: each centre times the transposed matrix of its size."""
    for size, matrix in matrices.items():
        if size >= kernel:
            start = (weight.shape[-1] - size) // 2
            centre = weight[:, :, start : start + size, start : start + size]
            weight = (centre.reshape(*weight.shape[:2], -1) @ matrix.T).reshape(centre.shape)
    return weight


@CHOICES
@pytest.mark.parametrize("depthwise", [False, True])
def test_smaller_kernels_come_from_larger_ones_by_learnt_matrices(arch, depthwise):
    inputs, outputs = (OUT, OUT) if depthwise else (IN, OUT)
    layer = Conv2dSlice(inputs, outputs, K, 2, "depthwise" if depthwise else 1, transforms=True)
    steps = {int(len(step.matrix) ** 0.5): step.matrix for step in layer.transforms}
    assert [*steps] == [3, 1]
    assert all(torch.equal(matrix, torch.eye(len(matrix))) for matrix in steps.values())
    for matrix in steps.values():
        nn.init.normal_(matrix)
    i, o, k = inputs(arch), outputs(arch), arch["k"]
    x = torch.randn(2, i, 7, 7)
    with apply(layer, arch):
        ours, exported = layer(x), layer.export()
    kernels = transformed(layer.weight[:o] if depthwise else layer.weight[:o, :i], steps, k)
    theirs = F.conv2d(x, kernels, layer.bias[:o], 2, k // 2, groups=o if depthwise else 1)
    assert_close(ours, theirs)
    assert_close(exported(x), theirs)
    assert exported.state_dict().keys() == {"weight", "bias"}
    grads = [
        torch.autograd.grad(out.square().sum(), [*layer.parameters()], allow_unused=True) for out in (ours, theirs)
    ]
    for own, expected in zip(*grads, strict=True):
        assert (own is None) == (expected is None)
        if own is not None:
            assert_close(own, expected)
    assert [grad is not None for grad in grads[0][2:]] == [size >= k for size in steps]


def test_a_transform_costs_nothing_and_a_fixed_kernel_has_none():
    conv = Conv2dSlice(3, OUT, K, transforms=True)
    net, plain = (nn.Sequential(c, nn.Flatten(), nn.AdaptiveAvgPool1d(1)) for c in (conv, Conv2dSlice(3, OUT, K)))
    space, example = SearchSpace([OUT, K]), torch.zeros(1, 3, 8, 8)
    assert Cost(net, space, example).of(space) == Cost(plain, space, example).of(space)
    assert Conv2dSlice(3, OUT, 5, transforms=True).transforms is None


def test_mistakes_of_a_convolution_are_told_when_it_is_made():
    with pytest.raises(ValueError, match="kernel sizes are odd"):
        Conv2dSlice(IN, OUT, Variable("k", (3, 4)))
    with pytest.raises(ValueError, match="same dimension on both sides"):
        Conv2dSlice(IN, OUT, 3, groups="depthwise")
    width, by = Variable("w", (24, 36, 40)), Variable("g", (1, 4, 8))
    with pytest.raises(ValueError, match=r"36 channels cannot be cut into 8 groups \(w = 36, g = 8\)"):
        Conv2dSlice(width, 48, 3, groups=by)
    with pytest.raises(ValueError, match="30 channels cannot be cut into 4 groups"):
        Conv2dSlice(24, Variable("o", (24, 30)), 3, groups=4)
    with pytest.raises(ValueError, match="10 channels cannot be cut into 4 groups"):
        GroupNormSlice(4, Variable("o", (8, 10)))
    with pytest.raises(ValueError, match="padding of 0 for the kernel of 5 leaves less than none for that of 1"):
        Conv2dSlice(IN, OUT, K, padding=0)
    with pytest.raises(ValueError, match="all odd or all even"):
        Conv2dSlice(IN, OUT, Variable("k", (3, 4)), padding=2)
    with pytest.raises(ValueError, match="at least the stride 3"):
        ConvTranspose2dSlice(IN, OUT, 2, 3)
    with pytest.raises(ValueError, match="not below stride or dilation"):
        ConvTranspose2dSlice(IN, OUT, 3, 2, padding=1, output_padding=2)
    with pytest.raises(ValueError, match="say both or none"):
        ConvTranspose2dSlice(IN, OUT, 3, 2, output_padding=1)
    with pytest.raises(ValueError, match="leaves less than none"):
        ConvTranspose2dSlice(IN, OUT, K, 2, padding=0)
    with pytest.raises(ValueError, match="at stride 1 odd"):
        ConvTranspose1dSlice(IN, OUT, 2, 1)
    with pytest.raises(ValueError, match="cannot be cut into 4 groups"):
        ConvTranspose2dSlice(IN, OUT, 2, groups=4)


def test_groups_that_only_archs_without_them_would_not_divide_are_fine():
    kind = Variable("kind", ("grouped", "plain"))
    by = Variable("g", (1, 4), default=1, when=[Condition("kind", frozenset({"grouped"}))])
    width = Variable("w", (36, 30), default=36, when=[Condition("g", frozenset({1}))])
    Conv2dSlice(width, 36, 3, groups=by)  # with four groups the width is 36
    with pytest.raises(ValueError, match="30 channels"):
        Conv2dSlice(Variable("w", (36, 30)), 36, 3, groups=by)
    assert kind.choices


@pytest.mark.parametrize(("layer", "plain", "side"), [
    (lambda: Conv2dSlice(4, 6, Variable("k", (2, 4)), 2, padding=(1, 2)),
     {2: nn.Conv2d(4, 6, 2, 2, (0, 1)), 4: nn.Conv2d(4, 6, 4, 2, (1, 2))}, (9, 8)),
    (lambda: Conv2dSlice(4, 6, (Variable("k", (1, 3)), 5), (1, 3), dilation=(2, 1)),
     {1: nn.Conv2d(4, 6, (1, 5), (1, 3), (0, 2), (2, 1)), 3: nn.Conv2d(4, 6, (3, 5), (1, 3), (2, 2), (2, 1))}, (9, 8)),
    (lambda: Conv1dSlice(4, 6, Variable("k", (3, 7)), 2, groups=2, padding=5),
     {3: nn.Conv1d(4, 6, 3, 2, 3, groups=2), 7: nn.Conv1d(4, 6, 7, 2, 5, groups=2)}, (9,)),
    (lambda: Conv3dSlice(4, 6, (4, Variable("k", (1, 3)), 3), padding=(0, 1, 1)),
     {1: nn.Conv3d(4, 6, (4, 1, 3), padding=(0, 0, 1)), 3: nn.Conv3d(4, 6, (4, 3, 3), padding=(0, 1, 1))}, (4, 5, 6)),
    (lambda: ConvTranspose2dSlice(4, 6, Variable("k", (3, 5)), 2),
     {3: nn.ConvTranspose2d(4, 6, 3, 2, 1, 1), 5: nn.ConvTranspose2d(4, 6, 5, 2, 2, 1)}, (5, 6)),
    (lambda: ConvTranspose1dSlice(4, 6, Variable("k", (2, 6)), groups=2),
     {2: nn.ConvTranspose1d(4, 6, 2, 2, groups=2), 6: nn.ConvTranspose1d(4, 6, 6, 2, 2, groups=2)}, (7,)),
    (lambda: ConvTranspose2dSlice(4, 4, Variable("k", (3, 5)), 2, groups="depthwise", dilation=(2, 1)),
     {3: nn.ConvTranspose2d(4, 4, 3, 2, (2, 1), 1, 4, dilation=(2, 1)),
      5: nn.ConvTranspose2d(4, 4, 5, 2, (4, 2), 1, 4, dilation=(2, 1))}, (5, 6)),
    (lambda: ConvTranspose3dSlice(4, 6, (2, Variable("k", (4, 6)), 4)),
     {4: nn.ConvTranspose3d(4, 6, (2, 4, 4), 2, (0, 1, 1)), 6: nn.ConvTranspose3d(4, 6, (2, 6, 4), 2, (0, 2, 1))},
     (2, 3, 4)),
    (lambda: ConvTranspose2dSlice(4, 6, Variable("k", (2, 4)), 3, padding=(1, 2), output_padding=(2, 1)),
     {2: nn.ConvTranspose2d(4, 6, 2, 3, (0, 1), (2, 1)), 4: nn.ConvTranspose2d(4, 6, 4, 3, (1, 2), (2, 1))}, (5, 6)),
    (lambda: ConvTranspose2dSlice(4, 6, Variable("k", (3, 5)), (1, 2), False, 2, (1, 3), 4, (0, 2)),
     {3: nn.ConvTranspose2d(4, 6, 3, (1, 2), (3, 1), (0, 2), 2, False, (1, 3)),
      5: nn.ConvTranspose2d(4, 6, 5, (1, 2), 4, (0, 2), 2, False, (1, 3))}, (7, 6)),
    (lambda: ConvTranspose1dSlice(4, 4, Variable("k", (1, 3)), 5, groups="depthwise", padding=1, output_padding=4),
     {1: nn.ConvTranspose1d(4, 4, 1, 5, 0, 4, 4), 3: nn.ConvTranspose1d(4, 4, 3, 5, 1, 4, 4)}, (7,)),
    (lambda: ConvTranspose3dSlice(4, 6, (2, Variable("k", (4, 6)), 4), 1, padding=1),
     {4: nn.ConvTranspose3d(4, 6, (2, 4, 4), 1, (1, 0, 1)), 6: nn.ConvTranspose3d(4, 6, (2, 6, 4), 1, 1)}, (2, 3, 4)),
])  # fmt: skip
def test_convolutions_of_any_shape_are_plain_ones_of_that_shape(layer, plain, side):
    layer, x = layer(), torch.randn(2, 4, *side)
    whole = layer.weight.shape[2:]
    for kernel, wanted in plain.items():
        wanted = copy.deepcopy(wanted).double()
        size = wanted.weight.shape[2:]
        crop = tuple(slice((n - k) // 2, (n - k) // 2 + k) for n, k in zip(whole, size, strict=True))
        biases = {} if layer.bias is None else {"bias": layer.bias}
        wanted.load_state_dict({"weight": layer.weight[(..., *crop)], **biases})
        with apply(layer, {"k": kernel}):
            assert str(layer.export()) == str(wanted)
            assert_close(layer(x), wanted(x))
            space = SearchSpace([Variable("k", tuple(plain))])
            with FlopCounterMode(display=False) as counter:
                wanted(x[:1])
            assert Cost(layer, space, x[:1]).of([{"k": kernel}])[0]["flops"] == counter.get_total_flops() // 2
            if "Transpose" in type(layer).__name__ and layer.whole_padding is None:
                assert layer(x).shape[2:] == tuple(2 * n for n in side)


@pytest.mark.parametrize("groups", [1, 2, G])
def test_a_group_norm_is_a_plain_one_of_the_active_size(groups):
    layer = GroupNormSlice(groups, [OUT, IN])
    nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    for arch in ARCHS:
        at = torch.tensor(indices(layer.outputs, arch))
        count = arch["g"] if groups is G else groups
        plain = nn.GroupNorm(count, len(at))
        plain.load_state_dict({"weight": layer.weight[at], "bias": layer.bias[at]})
        same_as(plain, layer, arch, torch.randn(2, len(at), 3, 3), {"weight": at, "bias": at})


def test_half_of_many_widths_needs_no_table_of_all_of_them():
    parts = [Variable(f"p{i}", (4, 8, 12, 16)) for i in range(12)]
    joined = Dimension.of(parts)
    assert (joined.size // 2).largest == 96
    assert make_divisible(rounded(joined.size * 0.3), 8).largest == 56
    with pytest.raises(TooManyCombinationsError):
        print((as_value(200) - joined.size).largest)
    layer = Conv2dSlice(joined, joined.size // 2, 1)
    arch = {f"p{i}": 4 for i in range(12)}
    with apply(layer, arch):
        assert layer(torch.zeros(1, 48, 2, 2)).shape == (1, 24, 2, 2)


def test_the_cuts_that_are_kept_are_bounded():
    layer = LinearSlice(Int("a", 1, 200), Int("b", 1, 200), bias=False)
    for a, b in itertools.islice(itertools.product(range(1, 201), repeat=2), 9000):
        with apply(layer, {"a": a, "b": b}):
            layer.active()
    assert cut.cache_info().currsize <= 8192


@CHOICES
@pytest.mark.parametrize("sizes", [(IN, OUT), ([IN, 3], OUT), ([OUT, IN], [IN, OUT]), (5, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_is_a_plain_one_of_the_active_size(arch, sizes, bias):
    layer = LinearSlice(*sizes, bias)
    inputs, outputs = (indices(layer.elastic.values[name], arch) for name in ("inputs", "outputs"))
    plain = nn.Linear(len(inputs), len(outputs), bias)
    at = {"weight": grid_of(outputs, inputs), "bias": outputs}
    plain.load_state_dict({name: getattr(layer, name)[at[name]] for name in plain.state_dict()})
    x = torch.randn(2, 3, len(inputs))
    same_as(plain, layer, arch, x, at)
    with apply(layer, arch):
        assert str(layer.export()) == str(plain)
        assert_close(layer.export()(x), layer(x))


@CHOICES
@pytest.mark.parametrize("features", [OUT, [OUT, IN], [3, OUT]])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("affine", [True, False])
def test_a_batch_norm_is_a_plain_one_whose_statistics_stand_in_the_whole(arch, features, momentum, affine):
    layer = BatchNorm2dSlice(features, momentum=momentum, affine=affine)
    at = indices(layer.elastic.values["outputs"], arch)
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    if affine:
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    plain = nn.BatchNorm2d(len(at), momentum=momentum, affine=affine)
    state = {name: tensor[at] if tensor.ndim else tensor for name, tensor in layer.state_dict().items()}
    plain.load_state_dict(state)
    for training in (False, True, True, False):
        layer.train(training)
        plain.train(training)
        before = copy.deepcopy(layer.state_dict())
        same_as(plain, layer, arch, torch.randn(3, len(at), 4, 4), {"weight": at, "bias": at})
        for name, theirs in plain.state_dict().items():
            expected = before[name].clone()
            expected[at if expected.ndim else ()] = theirs
            assert_close(layer.state_dict()[name], expected)
        x = torch.randn(3, len(at), 4, 4)
        with apply(layer, arch):
            exported = layer.export()
            assert exported.training == training
            assert str(exported) == str(plain)
            assert_close(exported(x), copy.deepcopy(layer)(x))


def test_exports_share_nothing_draw_nothing_and_are_plain():
    layer = ConvNormAct(IN, OUT, K, act="h_swish").eval()
    seed = torch.get_rng_state()
    for child in (layer.conv, layer.norm, LinearSlice(IN, OUT)):
        seed = torch.get_rng_state()
        exported = child.export()
        assert torch.equal(torch.get_rng_state(), seed)
        ours = {tensor.data_ptr() for tensor in child.state_dict().values()}
        assert ours.isdisjoint(tensor.data_ptr() for tensor in exported.state_dict().values())
        assert all(p.requires_grad and p.dtype == torch.float64 for p in exported.parameters())
        assert exported.state_dict().keys() == child.state_dict().keys()
        assert exported.training == child.training
        assert not any("elastic" in vars(module) for module in exported.modules())


def model():
    body = nn.Sequential(
        ConvNormAct(3, OUT, K, stride=2, act="h_swish"),
        ConvNormAct(OUT, OUT, K, groups="depthwise", act="relu6"),
        SqueezeExcitation(OUT),
        ElasticDepth([ConvNormAct(OUT, OUT, 3), ConvNormAct(OUT, OUT, 1, act="swish")], Variable("d", (0, 1, 2))),
        MixedOp({"conv": Conv2dSlice(OUT, OUT, 3), "skip": nn.Identity()}, Variable("op", ("conv", "skip"))),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        LinearSlice(OUT, 5),
    )
    return nn.Sequential(InputResize(Variable("r", (8, 16))), body)


SPACE = SearchSpace([Categorical("o", (4, 6, 8)), Categorical("k", (1, 3, 5)), Int("d", 0, 2),
                     Categorical("op", ("conv", "skip")), Categorical("r", (8, 16))])  # fmt: skip
SOME = [*SPACE][::9]


@pytest.mark.parametrize("arch", SOME, ids=str)
def test_only_the_active_part_of_a_model_is_read_and_gets_gradients(arch):
    net, x = model(), torch.randn(2, 3, 12, 12)
    apply(net, arch)
    expected = net(x)
    expected.square().sum().backward()
    masks = {p: torch.zeros_like(p) for p in net.parameters()}
    for module in net.modules():
        if hasattr(module, "active") and module.weight.grad is not None:
            twin = copy.deepcopy(module)  # its active tensors are views of the whole: writing to them marks their place
            for p, whole in zip(module.parameters(), twin.parameters(), strict=True):
                whole.data.zero_()
                for view in twin.active():
                    if view is not None and view.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr():
                        view.data.fill_(1)
                masks[p] = whole.data
    cost = Cost(model(), SPACE, torch.zeros(1, 3, 12, 12)).of([arch])[0]["params"]
    assert sum(mask.sum() for mask in masks.values()) == cost
    for p, mask in masks.items():
        if p.grad is not None:
            assert torch.equal(p.grad, p.grad * mask)
        p.data.masked_fill_(mask == 0, torch.nan)
    assert_close(net(x), expected)


@pytest.mark.parametrize("training", [True, False])
def test_copies_pickles_and_states_give_the_same_outputs(training):
    net = model().train(training)
    apply(net, SOME[3])
    x = torch.randn(4, 3, 12, 12)
    fresh = model().train(training)
    fresh.load_state_dict(net.state_dict())
    apply(fresh, SOME[3])
    twins = [copy.deepcopy(net), pickle.loads(pickle.dumps(net)), fresh]
    expected = net(x)
    for twin in twins:
        assert_close(twin(x), expected)
        apply(twin, SOME[5])
        twin(x)


def test_the_state_of_a_slice_is_that_of_a_plain_layer():
    plain = nn.ModuleDict({"conv": nn.Conv2d(3, 8, 5, bias=False), "norm": nn.BatchNorm2d(8)})
    block = ConvNormAct(3, OUT, K)
    block.load_state_dict(plain.state_dict())
    assert_close(block.conv.weight, plain["conv"].weight)


def test_stride_and_dilation_may_change_later():
    layer, x = Conv2dSlice(IN, OUT, K, stride=2), torch.randn(2, 6, 9, 9)
    assert layer(x).shape[-1] == 5
    layer.stride, layer.dilation = (1, 1), (2, 2)
    assert_close(layer(x), F.conv2d(x, layer.weight, layer.bias, 1, 4, 2))
    assert_close(layer.export()(x), layer(x))


def test_layers_work_without_memory():
    with torch.device("meta"):
        net = model()
        several = nn.Sequential(Conv2dSlice(3, [OUT, IN], 3), BatchNorm2dSlice([OUT, IN]))
    for arch in SOME[::4]:
        with apply(net, arch):
            assert net(torch.empty(2, 3, 12, 12, device="meta")).shape == (2, 5)
    with apply(several, {"i": 2, "o": 4}):
        assert several(torch.empty(2, 3, 8, 8, device="meta")).shape == (2, 6, 8, 8)
        assert several[1].export().running_mean.is_meta


OP = Variable("op", ("a", "b"))
CHANNELS_LAST = {
    "convolution": (lambda: Conv2dSlice(6, OUT, K), {"o": 6, "k": 3}),
    "depthwise": (lambda: Conv2dSlice([6], [6], K, groups="depthwise"), {"k": 3}),
    "several parts": (lambda: Conv2dSlice([IN, 2], [OUT, OUT], K), {"i": 4, "o": 4, "k": 3}),
    "norm": (lambda: BatchNorm2dSlice(Variable("i", (6, 9))), {"i": 6}),
    "block": (lambda: ConvNormAct(6, OUT, K, act="h_swish"), {"o": 6, "k": 3}),
    "gates": (lambda: SqueezeExcitation(Variable("i", (6, 9))), {"i": 6}),
    "resize": (lambda: InputResize(Variable("r", (8, 16))), {"r": 8}),
    "depth": (lambda: ElasticDepth([Conv2dSlice(6, 6, 3)] * 2, Variable("d", (1, 2))), {"d": 1}),
    "one of several": (lambda: MixedOp({"a": nn.Identity(), "b": nn.MaxPool2d(3, 1, 1)}, OP), {"op": "b"}),
    "weighted": (lambda: MixedOp({"a": nn.Identity(), "b": nn.ReLU()}, OP), {"op": torch.tensor([0.3, 0.7])}),
}  # fmt: skip


@pytest.mark.parametrize(("make", "arch"), CHANNELS_LAST.values(), ids=CHANNELS_LAST)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("weights_too", [True, False])
def test_channels_last_is_kept(make, arch, training, weights_too):
    layer = make().train(training)
    x = torch.randn(2, 6, 12, 12).to(memory_format=torch.channels_last)
    layer = layer.to(memory_format=torch.channels_last) if weights_too else layer
    with apply(layer, arch):
        y = layer(x)
        assert y.is_contiguous(memory_format=torch.channels_last)
        y.sum().backward() if y.requires_grad else None


def test_slices_are_views_where_a_dimension_has_one_part():
    conv, norm, linear = Conv2dSlice(IN, OUT, K), BatchNorm2dSlice(OUT), LinearSlice(IN, OUT)
    for layer in (conv, norm, linear):
        apply(layer, {"i": 4, "o": 6, "k": 3})
        for tensor in layer.active():
            assert tensor.untyped_storage().data_ptr() in {
                whole.untyped_storage().data_ptr() for whole in layer.state_dict().values()
            }
    whole = LinearSlice([IN, OUT], [OUT, IN])
    assert whole.active()[0] is whole.weight, "nothing is copied where everything is active"


def test_a_whole_batch_norm_of_several_parts_learns_its_statistics():
    layer, plain = BatchNorm2dSlice([OUT, IN]), nn.BatchNorm2d(14)
    x = torch.randn(4, 14, 3, 3)
    assert_close(layer(x), plain(x))
    assert_close(layer.running_mean, plain.running_mean)
    assert_close(layer.running_var, plain.running_var)


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic"])
def test_images_are_resized_to_the_resolution_and_pass_where_they_have_it(mode):
    layer = InputResize(Variable("r", (8, 16)), mode)
    x = torch.randn(2, 3, 16, 16)
    assert layer(x) is x
    apply(layer, {"r": 8})
    assert_close(layer(x), F.interpolate(x, (8, 8), mode=mode))
    assert_close(layer.export()(x), layer(x))
    apply(layer, {"r": 16})
    assert_close(layer.export()(x), x)


def test_images_that_are_not_square_are_resized_by_a_scale_or_side_by_side():
    x = torch.randn(2, 3, 16, 24)
    scaled = InputResize(Sides(Constant(10), Constant(7), Variable("s", (0.5, 1.5))))
    free = InputResize(Sides(Variable("h", (8, 16)), Variable("w", (24, 30))))
    for layer, arch, size in (
        (scaled, {"s": 0.5}, (5, 4)),
        (scaled, {"s": 1.5}, (15, 10)),
        (free, {"h": 8, "w": 30}, (8, 30)),
    ):
        apply(layer, arch)
        assert_close(layer(x), F.interpolate(x, size, mode="bilinear"))
        assert_close(layer.export()(x), layer(x))
    apply(free, {"h": 16, "w": 24})
    assert free(x) is x
    with pytest.raises(UserError, match="no pixel would be left of a width"):
        Sides(Constant(10), Constant(1), Variable("s", (0.5, 1)))


def test_a_mixed_operation_is_its_choice_or_the_weighted_sum():
    candidates = {3: nn.Conv2d(2, 2, 3, padding=1), 5: nn.Conv2d(2, 2, 5, padding=2), 0: nn.Identity()}
    mixed, x = MixedOp(candidates, Variable("op", (0, 3, 5))), torch.randn(2, 2, 6, 6)
    for name, module in candidates.items():
        with apply(mixed, {"op": name}):
            assert_close(mixed(x), module(x))
    weights = torch.tensor([0.2, 0.5, 0.3], requires_grad=True)
    with apply(mixed, {"op": weights}):
        y = mixed(x)
    assert_close(y, sum(w * module(x) for w, module in zip(weights, candidates.values(), strict=True)))
    y.sum().backward()
    assert_close(weights.grad, torch.stack([module(x).sum() for module in candidates.values()]))
    assert mixed.elastic.choice["op"] == 5
    with pytest.raises(ValueError, match=r"no candidate for \['pool'\]; there are \['conv'\]"):
        MixedOp({"conv": nn.Identity()}, Variable("op", ("conv", "pool")))


def test_elastic_depth_runs_the_first_blocks():
    blocks = [nn.Linear(3, 3) for _ in range(3)]
    stage, x = ElasticDepth(blocks, Variable("d", (0, 1, 2, 3))), torch.randn(2, 3)
    for depth in range(4):
        with apply(stage, {"d": depth}):
            assert_close(stage(x), nn.Sequential(*blocks[:depth])(x))
    with pytest.raises(ValueError, match="depth reaches 4, there are 3 blocks"):
        ElasticDepth(blocks, Variable("d", (1, 4)))


def test_squeeze_and_excitation_is_mobilenetv3s():
    layer, x = SqueezeExcitation(Variable("i", (16, 64))), torch.randn(2, 16, 5, 5)
    apply(layer, {"i": 16})
    inner = F.relu(F.conv2d(x.mean((2, 3), keepdim=True), layer.reduce.weight[:8, :16], layer.reduce.bias[:8]))
    gates = F.hardsigmoid(F.conv2d(inner, layer.expand.weight[:16, :8], layer.expand.bias[:16]))
    assert_close(layer(x), x * gates)


def test_squeeze_and_excitation_can_be_efficientnets():
    models = pytest.importorskip("torchvision.ops")
    theirs, x = models.SqueezeExcitation(96, 4, activation=nn.SiLU), torch.randn(2, 96, 5, 5)
    ours = SqueezeExcitation(Variable("i", (32, 96, 144)), inner=4, act="swish", gate="sigmoid")
    with apply(ours, {"i": 96}):
        for own, plain in ((ours.reduce, theirs.fc1), (ours.expand, theirs.fc2)):
            for whole, part in zip(own.active(), plain.parameters(), strict=True):
                whole.data.copy_(part)
        assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_has_a_name(name):
    x = torch.linspace(-8, 8, 50)
    functions = {
        "none": lambda x: x,
        "relu": F.relu,
        "relu6": F.relu6,
        "h_swish": F.hardswish,
        "swish": F.silu,
        "gelu": F.gelu,
    }
    assert_close(activation(name)(x.clone()), functions[name](x))


def test_the_entry_module_imports_no_torch_until_a_layer_is_wanted():
    import subprocess
    import sys

    code = (
        "import sys, corenas_mutable_slices as m; assert 'torch' not in sys.modules; m.Conv2dSlice; "
        "assert 'torch' in sys.modules; assert all(getattr(m, n) for names in m._MODULES.values() for n in names)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    import corenas_mutable_slices

    with pytest.raises(AttributeError, match="no attribute 'Conv4dSlice'"):
        _ = corenas_mutable_slices.Conv4dSlice


def test_a_person_finds_its_layers_by_dir():
    assert {"Conv2dSlice", *corenas_mutable_slices._MODULES["layers"]} <= {*dir(corenas_mutable_slices)}
