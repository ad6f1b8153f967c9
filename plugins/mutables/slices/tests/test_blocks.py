"""Blocks and networks of stages: what the same layers written out in plain torch give."""

import itertools

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.testing import assert_close

from corenas.cost import Cost
from corenas.errors import UserError
from corenas.export import export_subnet
from corenas.mutable import apply
from corenas.space import SearchSpace
from corenas.value import Dimension
from corenas.variables import Categorical, Variable
from corenas_mutable_slices import (
    Conv2dSlice,
    ConvNormAct,
    ElasticDepth,
    LinearSlice,
    Residual,
    Shortcut,
    Staged,
)

IN, OUT = Variable("i", (2, 4, 6)), Variable("o", (4, 6, 8))
ARCHS = [{"i": i, "o": o} for i, o in itertools.product((2, 4, 6), (4, 6, 8))]
EACH = pytest.mark.parametrize("arch", ARCHS, ids=lambda arch: f"{arch['i']}-{arch['o']}")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def lively(module):
    """The module with batch-norm statistics and weights that are no identity."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
    return module.eval()


@EACH
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("eps", [1e-5, 1e-3, 0.5])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("side", [2, 5], ids=["more weights", "more pixels"])  # without gradient: in turn, folded
def test_convolution_norm_and_activation_have_the_eps_and_the_bias_that_were_asked_for(arch, bias, eps, grad, side):
    block = lively(ConvNormAct(IN, OUT, 3, act="relu6", bias=bias, eps=eps))
    assert (block.conv.bias is not None) == bias
    x, (i, o) = torch.randn(3, arch["i"], side, side), arch.values()
    conv, norm = block.conv, block.norm
    with torch.no_grad():
        y = F.conv2d(x, conv.weight[:o, :i], conv.bias[:o] if bias else None, padding=1)
        y = F.batch_norm(y, norm.running_mean[:o], norm.running_var[:o], norm.weight[:o], norm.bias[:o], eps=eps)
    with apply(block, arch), torch.set_grad_enabled(grad):
        assert_close(block(x), F.relu6(y))
        assert block.norm.export().eps == eps


def test_hooks_run_where_no_gradient_is_wanted_too():
    block, seen = lively(ConvNormAct(IN, OUT, 3)), []
    nn.utils.prune.random_unstructured(block.conv, "weight", 0.5)
    block.norm.register_forward_hook(lambda norm, args, output: seen.append(output))
    nn.init.normal_(block.conv.weight_orig)
    x = torch.randn(2, 6, 8, 8)
    with torch.no_grad():
        found = block(x)
    assert len(seen) == 1
    assert_close(found, block(x).detach())


def test_a_norm_may_have_another_precision_than_its_convolution():
    block = lively(ConvNormAct(IN, OUT, 3).bfloat16())
    block.norm.float()
    x = torch.randn(2, 6, 8, 8).bfloat16()
    with torch.no_grad():
        assert_close(block(x), block(x))
    assert block(x).dtype == torch.bfloat16


@pytest.mark.parametrize("mode", [lambda: torch.device("meta"), FakeTensorMode])
def test_a_forward_without_memory_leaves_nothing_behind(mode):
    block, x = lively(ConvNormAct(IN, OUT, 3)), torch.randn(2, 6, 8, 8)
    eps = 3e-4  # that no other test has
    with torch.no_grad():
        with mode():
            ConvNormAct(IN, OUT, 3, eps=eps).eval()(torch.empty(2, 6, 8, 8))
        block.norm.eps = eps
        assert type(block(x)) is torch.Tensor
        assert block(x).isfinite().all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("training", [True, False])
def test_a_network_of_slices_compiles_as_one_graph_for_each_arch(training):
    kernel = Variable("k", (3, 5))
    net = nn.Sequential(ConvNormAct(3, IN, 3), ConvNormAct(IN, IN, kernel, groups="depthwise"), ConvNormAct(IN, OUT))
    net, x = lively(net).train(training), torch.randn(2, 3, 6, 6)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    for arch in ({"i": 2, "o": 8, "k": 3}, {"i": 6, "o": 4, "k": 5}, {"i": 2, "o": 8, "k": 3}):
        with apply(net, arch), torch.set_grad_enabled(training):
            assert_close(compiled(x), net(x))


@EACH
@pytest.mark.parametrize("act", ["none", "relu"])
def test_a_residual_block_adds_its_input_or_the_projection_of_it(arch, act):
    body, projection = Conv2dSlice(IN, OUT, 3), Conv2dSlice(IN, OUT, 1)
    block, x = Residual({"conv": body}, Shortcut(IN, OUT, projection), act), torch.randn(2, arch["i"], 5, 5)
    with apply(block, arch):
        expected = body(x) + (x if arch["i"] == arch["o"] else projection(x))
        assert_close(block(x), F.relu(expected) if act == "relu" else expected)


def test_a_residual_block_without_shortcut_is_its_layers_in_order():
    layers = {"first": nn.Conv2d(3, 4, 3), "norm": nn.BatchNorm2d(4), "last": nn.Conv2d(4, 2, 1)}
    block, x = Residual(layers, None, "relu"), torch.randn(2, 3, 6, 6)
    assert_close(block(x), F.relu(nn.Sequential(*layers.values())(x)))
    assert [name for name, _ in block.body.named_children()] == [*layers]


def residual(shortcut, layers=None):
    layers = {"first": ConvNormAct(4, 4), "second": ConvNormAct(4, 4, act="none")} if layers is None else layers
    return lively(Residual(layers, shortcut, "none"))


def test_a_residual_block_can_begin_as_its_shortcut():
    x = torch.randn(2, 4, 5, 5)
    block = residual(nn.Identity())
    block.zero_init_last()
    block.body.second.norm.bias.data.zero_()  # as a new batch norm has it
    assert_close(block(x), x)
    assert block.body.first.norm.weight.abs().min() > 0
    projection = ConvNormAct(4, 4)
    block = residual(Shortcut(4, 4, projection, always=True))
    block.zero_init_last()
    assert not block.body.second.norm.weight.any()
    assert projection.norm.weight.abs().min() > 0, "the last norm of the body, not that of the shortcut"
    block = residual(None)
    block.zero_init_last()
    assert block.body.second.norm.weight.abs().min() > 0, "without a shortcut the block would be nothing"


@pytest.mark.parametrize("inputs", [2, 4, 6])
def test_a_shortcut_projects_where_widths_differ_or_always(inputs):
    projection, x = Conv2dSlice(IN, IN, 1), torch.randn(2, inputs, 5, 5)
    outs = Variable("i", (2, 4, 6))
    with apply(shortcut := Shortcut(IN, outs, projection, always=True), {"i": inputs}):
        assert_close(shortcut(x), projection(x))
    free = Shortcut(IN, Variable("o", (2, 4, 6)), Conv2dSlice(IN, Variable("o", (2, 4, 6)), 1))
    for outputs in (2, 4, 6):
        with apply(free, {"i": inputs, "o": outputs}):
            assert (free(x) is x) == (inputs == outputs)
            assert free(x).shape[1] == outputs


def test_a_shortcut_between_numbers_has_a_projection_only_if_they_differ():
    assert not [*Shortcut(4, 4, nn.Conv2d(4, 4, 1)).parameters()]
    assert [*Shortcut(4, 6, nn.Conv2d(4, 6, 1)).parameters()]
    assert [*Shortcut(4, 4, nn.Conv2d(4, 4, 1, 2), always=True).parameters()]


def test_a_shortcut_between_widths_with_the_same_largest_begins_as_its_input():
    x = torch.randn(1, 6, 3, 3)
    assert Shortcut(IN, Variable("o", (2, 6)), nn.Conv2d(6, 6, 1))(x) is x
    assert Shortcut(IN, OUT, Conv2dSlice(IN, OUT, 1))(x).shape[1] == 8


SPACE = SearchSpace([Categorical("i", (2, 4, 6)), Categorical("o", (4, 6, 8)), Categorical("d", (1, 2)),
                     Categorical("r", (8, 12))])  # fmt: skip


def network(levels=(), resize=False):
    stages = [
        (ElasticDepth([ConvNormAct(IN, OUT), ConvNormAct(OUT, OUT)], Variable("d", (1, 2))), OUT),
        (Residual({"conv": ConvNormAct(OUT, IN, stride=2)}, Shortcut(OUT, IN, Conv2dSlice(OUT, IN, 1, 2), True)), IN),
        (ConvNormAct(IN, 5), 5),
    ]
    final = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), LinearSlice(5, OUT))
    resolution = Variable("r", (8, 12)) if resize else None
    return lively(Staged(ConvNormAct(3, IN, 3, stride=2), stages, (final, OUT), levels, resolution))


def test_without_levels_a_network_gives_what_its_end_gives():
    net, x = network(), torch.randn(2, 3, 12, 12)
    assert net.feat_dims == [Dimension.of(OUT)]
    assert_close(net.features(x), [net.final(net.stages(net.stem(x)))])
    assert [*net.segments] == [net.stem, *net.stages, net.final]


@pytest.mark.parametrize("levels", [(1,), (2,), (3,), (1, 2), (1, 3), (1, 2, 3)])
@EACH
def test_the_outputs_of_stages_are_the_features_on_request(levels, arch):
    net, whole, x = network(levels), network(), torch.randn(2, 3, 12, 12)
    net.load_state_dict({name: t for name, t in whole.state_dict().items() if name in net.state_dict()})
    with apply(net, {**arch, "d": 1}), apply(whole, {**arch, "d": 1}), torch.no_grad():
        outs = [whole.stages[:level](whole.stem(x)) for level in levels]
        found = net.features(x)
        assert_close(found, outs)
        assert [out.shape[1] for out in found] == [sum(dim({**arch, "d": 1})) for dim in net.feat_dims]
    assert not hasattr(net, "final")
    assert len(net.stages) == levels[-1], "what no feature needs is not built"
    assert [*net.segments] == [net.stem, *net.stages]


@pytest.mark.parametrize("levels", [(0,), (4,), (2, 1), (1, 1), (-1,)])
def test_levels_that_there_are_not_are_refused(levels):
    with pytest.raises(UserError, match=r"expected numbers of stages in order, 1 to 3"):
        network(levels)


def test_images_are_resized_before_the_stem():
    net, x = network(resize=True), torch.randn(2, 3, 12, 12)
    for side in (8, 12):
        with apply(net, {"i": 6, "o": 8, "d": 2, "r": side}), torch.no_grad():
            small = x if side == 12 else F.interpolate(x, (8, 8), mode="bilinear")
            assert_close(net.features(x), [net.final(net.stages(net.stem(small)))])


class First(nn.Module):
    """A network with the last of its features as the only output."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, x):
        return self.backbone.features(x)[-1]


@pytest.mark.parametrize("levels", [(), (1, 2)])
def test_a_network_of_stages_exports_and_costs_what_its_exports_have(levels):
    net, x = First(network(levels, resize=True)), torch.randn(1, 3, 12, 12)
    cost = Cost(net, SPACE, x)
    for arch in [*SPACE][::5]:
        plain = export_subnet(net, arch, x)
        assert cost.of([arch])[0]["params"] == sum(p.numel() for p in plain.parameters())
