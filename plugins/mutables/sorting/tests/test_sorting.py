"""Channels are sorted, and what a supernet computes stays."""

import copy
import itertools
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tomli
import torch
import torch_pruning as tp
from torch import nn
from torch.testing import assert_close

from corenas.errors import UserError
from corenas.mutable import apply, mutables
from corenas.options import structure
from corenas.plugins import load_catalogue
from corenas.settings import Train
from corenas.space import SearchSpace
from corenas.supernet import Supernet
from corenas.testing.components import global_generators_untouched
from corenas.testing.distributions import distribution_checks
from corenas.value import Dimension, make_divisible
from corenas.variables import Categorical, Variable
from corenas_mutable_slices import (
    BatchNorm2dSlice,
    Conv2dSlice,
    ConvNormAct,
    ElasticDepth,
    LinearSlice,
    MixedOp,
    Residual,
    Shortcut,
    SqueezeExcitation,
    per_width_statistics,
)
from corenas_mutable_sorting import IMPORTANCE, Sorted, input_norm, sort_channels

SPACES = Path(__file__).parents[4] / "spec" / "space"


@pytest.fixture(autouse=True)
def double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("check", distribution_checks)
def test_the_distribution_conforms(check):
    check("corenas_mutable_sorting")


# -- what networks compute --------------------------------------------------------------------------------------------


def lively(model):
    """The model as after a training: no batch norm is an identity."""
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for name in ("running_mean", "running_var"):
                norm._buffers[name].uniform_(0.5, 1.5)
            for parameter in norm.parameters():
                nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()


def largest(model):
    """Every variable at its largest, or first, choice."""
    return {key: own[0] if isinstance(own[0], str) else max(own) for key, own in variables(model).items()}


def variables(model):
    return {key: own for m in mutables(model) for value in m.elastic.values.values()
            for part in getattr(value, "parts", (value,)) for key, own in part.domains.items()}  # fmt: skip


@torch.no_grad()
def outputs(model, archs, example):
    noise = torch.randn((3, *example.shape[1:]), generator=torch.Generator().manual_seed(1))
    found = []
    for arch in archs:
        with apply(model, arch):
            found.append(model(noise.clone()))
    return found


def sort(model, example, archs, **options):
    """Sort and see that the archs compute the same to 1e-12 of the largest output."""
    before = outputs(model, archs, example)
    result = sort_channels(model, example, **options)
    for old, new in zip(before, outputs(model, archs, example), strict=True):
        assert float((old - new).abs().max()) <= 1e-12 * float(old.abs().max())
    return result


class Head(nn.Module):
    def __init__(self, dim, classes=4):
        super().__init__()
        self.linear = LinearSlice(dim, classes)

    def forward(self, features):
        x = features[-1]
        return self.linear(x.mean((2, 3)) if x.dim() == 4 else x)


def mobilenet(table):
    space = SearchSpace.from_table(table)
    backbone = load_catalogue().components["backbones", "mobilenetv3"].cls().build(space)
    return space, lively(Supernet(backbone, Head(backbone.feat_dims[-1])))


TABLE = {
    "stem": {"width": [8, 12]},
    "stages": [
        {"width": [8, 16], "depth": [1, 2, 3], "se": True, "block": {"kernel": [3, 5], "expand": [2, 3, 4]}},
        {"width": [16, 20], "depth": [1, 2], "stride": 2, "act": "h_swish",
         "block": {"kernel": [3, 5], "expand": [1, 3]}},
    ],
    "head": {"expand": [16, 24], "width": [16, 32]},
}  # fmt: skip
EXAMPLE = torch.zeros(1, 3, 16, 16, dtype=torch.float64)


def with_widest(space, archs):
    """The archs with every width at its largest; depth, kernel and operation are theirs."""
    widths = {key: v.largest for key in space.keys if re.search(r"width|expand", key) for v in [space[key]]}
    return [{**arch, **widths} for arch in archs]


@pytest.mark.parametrize("importance", IMPORTANCE)
def test_every_subnet_of_the_largest_widths_computes_the_same(importance):
    space, net = mobilenet(TABLE)
    rng = np.random.default_rng(0)
    archs = with_widest(space, [space.largest(), space.smallest(), *(space.sample(rng) for _ in range(6))])
    before = copy.deepcopy(net.state_dict())
    net(torch.randn(4, 3, 16, 16)).square().sum().backward()
    found = sort(net, EXAMPLE, archs, importance=importance)
    convs = {n for n, m in net.backbone.named_modules(prefix="backbone") if isinstance(m, Conv2dSlice | LinearSlice)}
    assert {*found.layers, *found.left} == convs, "every width of this space is searched"
    unseen = {n for n in convs if n.endswith(("se.reduce", "final.3"))} if importance == "norm_scale" else set()
    assert {*found.left} == unseen, "no batch norm follows them"
    changed = {name.rsplit(".", 1)[0] for name, t in net.state_dict().items() if not torch.equal(before[name], t)}
    assert changed >= convs


def test_the_space_for_small_images_is_sorted_whole():
    space, net = mobilenet(tomli.loads((SPACES / "mobilenetv3-small-images.toml").read_text()))
    found = sort(net, torch.zeros(1, 3, 28, 28), with_widest(space, [space.largest(), space.smallest()]))
    assert found.left == ()
    assert len(found.layers) > 30


def test_inner_channels_are_in_the_order_of_once_for_alls_measure():
    _, net = mobilenet(TABLE)
    sort_channels(net, EXAMPLE)
    blocks = [m for m in net.modules() if isinstance(m, Residual)]
    for block in blocks:
        inner = block.body.project.conv.weight.abs().sum((0, 2, 3))
        assert (inner.diff() <= 0).all()
        if hasattr(block.body, "se"):
            assert (block.body.se.expand.weight.abs().sum((0, 2, 3)).diff() <= 0).all()
    assert len(blocks) == 5


@pytest.mark.parametrize("name", ["l1", "l2", "norm_scale", "taylor"])
def test_the_order_is_that_of_torch_prunings_measure(name):
    _, net = mobilenet(TABLE)
    net(torch.randn(4, 3, 16, 16)).square().sum().backward()
    conv = net.backbone.stages[0].blocks[1].body.expand.conv
    graph = tp.DependencyGraph().build_dependency(net, (EXAMPLE,))
    group = graph.get_pruning_group(conv, tp.prune_conv_out_channels, [*range(conv.out_channels)])
    measure = {
        "l1": tp.importance.GroupMagnitudeImportance(p=1),
        "l2": tp.importance.GroupMagnitudeImportance(p=2),
        "norm_scale": tp.importance.BNScaleImportance(),
        "taylor": tp.importance.GroupTaylorImportance(),
    }[name]
    scores = measure(group)
    before = conv.weight.detach().sum((1, 2, 3))
    by_name = copy.deepcopy(net)
    for mine, given in zip(net.parameters(), by_name.parameters(), strict=True):
        given.grad = mine.grad
    sort_channels(by_name, EXAMPLE, name)
    sort_channels(net, EXAMPLE, measure)
    for one, other in zip(net.state_dict().values(), by_name.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    # Its inputs are permuted as well, but the sum over them tells which channel is which.
    order = (conv.weight.detach().sum((1, 2, 3))[:, None] - before[None]).abs().argmin(1)
    assert sorted(order.tolist()) == [*range(conv.out_channels)] != order.tolist()
    assert (scores[order].diff() <= 1e-6 * scores.max()).all(), "torch-pruning computes in single precision"


def test_any_function_of_a_group_is_a_measure():
    net = lively(nn.Sequential(ConvNormAct(3, Variable("w", (4, 8)), 3), Conv2dSlice(Variable("w", (4, 8)), 5, 1)))
    weight = net[0].conv.weight.detach().clone()
    sort(net, EXAMPLE, [{"w": 8}], importance=lambda group: torch.arange(len(group[0].idxs)))
    assert torch.equal(net[0].conv.weight, weight.flip(0))
    nothing = copy.deepcopy(net.state_dict())
    sort(net, EXAMPLE, [{"w": 8}], importance=lambda group: None)
    assert_close(net.state_dict(), nothing, rtol=0, atol=0)


def test_the_norm_of_the_weights_that_read_a_channel_may_be_any():
    net = nn.Sequential(Conv2dSlice(3, Variable("w", (4, 8)), 3), Conv2dSlice(Variable("w", (4, 8)), 5, 3))
    expected = net[1].weight.square().sum((0, 2, 3)).argsort(descending=True)
    weight = net[0].weight.detach().clone()
    sort_channels(net, EXAMPLE, input_norm(net, p=2))
    assert torch.equal(net[0].weight, weight[expected])


def test_the_blocks_of_a_residual_stage_share_one_permutation():
    _, net = mobilenet(TABLE)
    projections = [block.body.project for block in net.backbone.stages[0].blocks]
    before = [p.norm.weight.detach().clone() for p in projections]
    sort_channels(net, EXAMPLE)
    orders = {tuple((old[None] == new.norm.weight[:, None]).nonzero()[:, 1].tolist())
              for old, new in zip(before, projections, strict=True)}  # fmt: skip
    assert len(orders) == 1
    assert sorted(orders.pop()) == [*range(16)] != orders


# -- widths that were trained -----------------------------------------------------------------------------------------


def test_widths_trained_so_far_stay_what_they_are():
    table = copy.deepcopy(TABLE)
    for stage in table["stages"]:
        stage["block"]["expand"] = [2, 3, 4]
    space, net = mobilenet(table)
    widest = {key: [space[key].largest] for key in space.keys if key.endswith("width") or key == "head.expand"}
    blocks = [m for m in net.modules() if isinstance(m, Residual)]
    rng = np.random.default_rng(0)
    for expands in ([4], [3, 4], [2, 3, 4]):  # Once-for-All's phases
        trained = space.narrow({"stages.*.expand": expands, **widest})
        for block in blocks:
            nn.init.normal_(block.body.project.conv.weight)  # something was learnt since
        before = [block.body.depthwise.norm.weight.detach().clone() for block in blocks]
        archs = [trained.smallest(), trained.largest(), *(trained.sample(rng) for _ in range(6))]
        assert sort(net, EXAMPLE, archs, keep=trained).left == ()
        for block, old in zip(blocks, before, strict=True):
            measure, new = block.body.project.conv.weight.abs().sum((0, 2, 3)), block.body.depthwise.norm.weight
            widths = [make_divisible(block.body.expand.conv.in_channels * expand, 8)({}) for expand in expands]
            for start, end in itertools.pairwise([0, *widths]):
                assert {*new[start:end].tolist()} == {*old[start:end].tolist()}
                assert (measure[start:end].diff() <= 0).all()


def test_without_trained_widths_narrower_subnets_change():
    space, net = mobilenet(TABLE)
    before = outputs(net, [space.smallest()], EXAMPLE)
    sort_channels(net, EXAMPLE)
    assert float((before[0] - outputs(net, [space.smallest()], EXAMPLE)[0]).abs().max()) > 1e-3


A, B = Variable("a", (4, 8, 12)), Variable("b", (4, 8, 12))


def test_a_shortcut_that_is_the_input_for_some_trained_widths_ties_both_sides():
    space = SearchSpace([Categorical("a", (4, 8, 12)), Categorical("b", (4, 8, 12))])
    body, projection = (ConvNormAct(A, B, kernel, act="none") for kernel in (3, 1))
    block = Residual({"body": body}, Shortcut(A, B, projection))
    net = lively(nn.Sequential(ConvNormAct(3, A, 3), block, ConvNormAct(B, 5, 1)))
    found = sort(net, EXAMPLE, [*space], keep=space)
    assert found.left == ()
    for keep in (space.fix({"a": 12}), space.fix({"b": 8}), space.fix({"a": 4, "b": 12})):
        assert sort(net, EXAMPLE, [*keep], keep=keep).left == ()


# -- what does not run in the largest subnet --------------------------------------------------------------------------


OPS = ("a", "b")


def mixed(key, inputs, outputs):
    return MixedOp({"a": ConvNormAct(inputs, outputs, 3), "b": ConvNormAct(inputs, outputs, 1)}, Variable(key, OPS))


def test_candidates_that_the_largest_subnet_does_not_run_move_as_well():
    # One path has a and c, another b and d: only together do these paths tie b to c.
    net = lively(nn.Sequential(mixed("p", 3, A), mixed("q", A, B), ConvNormAct(B, 5, 1)))
    weights = {name: p.detach().clone() for name, p in net.named_parameters()}
    archs = [{"a": 12, "b": 12, "p": p, "q": q} for p in OPS for q in OPS]
    found = sort(net, EXAMPLE, archs)
    assert found.left == ()
    for name in ("0.candidates.a", "0.candidates.b"):
        assert not torch.equal(net.get_parameter(f"{name}.conv.weight"), weights[f"{name}.conv.weight"])
    old = [weights[f"0.candidates.{op}.norm.bias"] for op in OPS]
    new = [net[0].candidates[op].norm.bias for op in OPS]
    orders = [(b[:, None] == a[None]).nonzero()[:, 1] for a, b in zip(old, new, strict=True)]
    assert torch.equal(*orders)


def test_the_depth_of_a_stage_without_shortcuts_ties_its_blocks():
    blocks = [ConvNormAct(A, A, 3) for _ in range(3)]
    net = lively(
        nn.Sequential(ConvNormAct(3, A, 3), ElasticDepth(blocks, Variable("d", (0, 1, 2, 3))), ConvNormAct(A, 5))
    )
    found = sort(net, EXAMPLE, [{"a": 12, "d": d} for d in range(4)])
    assert found.left == ()
    fixed = lively(nn.Sequential(ConvNormAct(3, A, 3), *blocks, ConvNormAct(A, 5)))
    sort(fixed, EXAMPLE, [{"a": 12}])
    orders = {tuple(b.norm.weight.argsort().tolist()) for b in blocks}
    assert len(orders) == 3, "without elastic depth each has an order of its own"


def test_what_only_another_candidate_at_another_depth_ties_moves_together():
    # The first block of "b" meets the last layer only where that candidate runs at depth 1.
    stages = {"a": ConvNormAct(A, B, 3),
              "b": ElasticDepth([ConvNormAct(A, B, 3), ConvNormAct(B, B, 3)], Variable("d", (1, 2)))}  # fmt: skip
    net = lively(nn.Sequential(ConvNormAct(3, A), MixedOp(stages, Variable("op", OPS)), ConvNormAct(B, 5)))
    assert sort(net, EXAMPLE, [{"a": 12, "b": 12, "op": op, "d": d} for op in OPS for d in (1, 2)]).left == ()


class Shuffle(nn.Module):
    """Channels in two halves that are interleaved: what torch-pruning takes for an operation on each channel."""

    def forward(self, x):
        return x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


def test_a_candidate_that_mixes_channels_up_makes_a_width_stay_as_it_is():
    def net(last):
        candidates = {"plain": nn.Identity(), "last": last}
        return lively(nn.Sequential(ConvNormAct(3, A, 3), MixedOp(candidates, Variable("op", ("plain", "last"))),
                                    ConvNormAct(A, B, 3), ConvNormAct(B, 5, 1)))  # fmt: skip

    archs = [{"a": 12, "b": 12, "op": op} for op in ("plain", "last")]
    assert sort(net(nn.ReLU()), EXAMPLE, archs) == Sorted(("0.conv", "2.conv"), ())
    shuffled = net(Shuffle())
    before = copy.deepcopy(shuffled[0].state_dict())
    assert sort(shuffled, EXAMPLE, archs) == Sorted(("2.conv",), ("0.conv",))
    assert_close(shuffled[0].state_dict(), before, rtol=0, atol=0)


def test_weights_that_start_at_zero_hide_nothing():
    net = lively(nn.Sequential(ConvNormAct(3, A, 3), Shuffle(), ConvNormAct(A, B, 3), ConvNormAct(B, 5, 1)))
    nn.init.zeros_(net[2].norm.weight)
    assert sort(net, EXAMPLE, [{"a": 12, "b": 12}]) == Sorted(("2.conv",), ("0.conv",))


# -- what is left as it is --------------------------------------------------------------------------------------------


class Join(nn.Module):
    """Two outputs side by side, through a depthwise convolution and one that reads both."""

    def __init__(self):
        super().__init__()
        self.left, self.right = ConvNormAct(3, A, 3), ConvNormAct(3, B, 1)
        self.both, self.out = ConvNormAct([A, B], [A, B], 3, groups="depthwise"), ConvNormAct([A, B], 5, 1)

    def forward(self, x):
        return self.out(self.both(torch.cat([self.left(x), self.right(x)], 1)))


@pytest.mark.parametrize("kept", [None, (4, 12), (4, 8)])
def test_parts_that_are_joined_are_sorted_each_by_itself(kept):
    net = lively(Join())
    space = SearchSpace([Categorical("a", (4, 8, 12)), Categorical("b", (4, 8, 12))])
    keep = kept and space.narrow({"a": kept, "b": kept})
    before = net.both.norm.weight.detach().clone()
    assert sort(net, EXAMPLE, [*keep] if keep else [{"a": 12, "b": 12}], keep=keep).left == ()
    for half in (slice(12), slice(12, 24)):
        assert {*net.both.norm.weight[half].tolist()} == {*before[half].tolist()}
        assert not torch.equal(net.both.norm.weight[half], before[half])


def test_channels_of_grouped_convolutions_are_left():
    plain = nn.Sequential(ConvNormAct(3, A), ConvNormAct(A, B, 3, groups=2), ConvNormAct(B, A, 1), ConvNormAct(A, 5))
    assert sort(lively(plain), EXAMPLE, [{"a": 12, "b": 12}]) == Sorted(("2.conv",), ("0.conv", "1.conv"))
    torchs = nn.Sequential(ConvNormAct(3, A), nn.Conv2d(12, 12, 3, groups=3), ConvNormAct(12, B), ConvNormAct(B, 5))
    assert sort(lively(torchs), EXAMPLE, [{"a": 12, "b": 12}]) == Sorted(("2.conv",), ("0.conv",))


class Levels(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.inner, self.second = ConvNormAct(3, A), ConvNormAct(A, B, 3), ConvNormAct(B, A, 3)

    def forward(self, x):
        x = self.first(x)
        return torch.cat([x.flatten(1), self.second(self.inner(x)).flatten(1)], 1)


class Pair(Levels):
    def forward(self, x):
        x = self.first(x)
        return x, self.second(self.inner(x))


def test_outputs_of_the_network_are_left():
    net = lively(Levels())
    assert sort(net, EXAMPLE, [{"a": 12, "b": 12}]) == Sorted(("inner.conv",), ("first.conv", "second.conv"))
    assert sort_channels(lively(Pair()), EXAMPLE) == Sorted(("inner.conv",), ("first.conv", "second.conv"))


class OfInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.add, self.last = ConvNormAct(3, 3, 3), ConvNormAct(3, 5)
        self.same = Conv2dSlice(Variable("w", (1, 3)), Variable("w", (1, 3)), 3)

    def forward(self, x):
        return self.last(x + self.same(self.add(x)))


def test_what_is_added_to_the_input_of_the_network_is_left():
    net = lively(OfInput())
    assert sort(net, EXAMPLE, [{"w": 3}]) == Sorted((), ("same",))


def test_weights_that_two_layers_share_are_left():
    net = lively(
        nn.Sequential(ConvNormAct(3, A), Conv2dSlice(A, A, 3), nn.ReLU(), Conv2dSlice(A, A, 3), ConvNormAct(A, 5))
    )
    net[3].weight = net[1].weight
    found = sort(net, EXAMPLE, [{"a": 12}])
    assert {*found.left} >= {"1", "3"}


class Attention(nn.Module):
    """Two heads of 6 channels, then two linear layers; forward: images -> (n, tokens, 5)."""

    def __init__(self):
        super().__init__()
        self.embed, self.qkv, self.out = nn.Conv2d(3, 12, 4, 4), LinearSlice(12, [A, A, A]), LinearSlice(A, 12)
        self.expand, self.project, self.last = LinearSlice(12, B), LinearSlice(B, 12), nn.Linear(12, 5)

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.last(x + self.project(nn.functional.gelu(self.expand(x))))


def test_heads_of_attention_are_left_and_mlps_are_sorted():
    assert sort(lively(Attention()), EXAMPLE, [{"a": 12, "b": 12}]) == Sorted(("expand",), ("qkv",))


@pytest.mark.parametrize("name", [n for kind, n in load_catalogue().components if kind == "backbones"])
def test_the_example_of_every_backbone_computes_the_same(name):
    cls = load_catalogue().components["backbones", name].cls
    if not hasattr(cls, "example"):
        pytest.skip("has none")
    space = SearchSpace.from_table(cls.example["space"])
    backbone = structure(cls.example["backbone"], cls).build(space)
    net = lively(Supernet(backbone, Head(backbone.feat_dims[-1])))
    widths = {key for m in mutables(net) for value in m.elastic.values.values() if isinstance(value, Dimension)
              for key in value.keys}  # fmt: skip
    rng = np.random.default_rng(0)
    archs = [space.largest(), *({**space.sample(rng), **{key: space[key].largest for key in widths}} for _ in range(8))]
    found = sort(net, torch.zeros(1, 1, 28, 28), archs)
    assert found.layers or not widths


# -- layers -----------------------------------------------------------------------------------------------------------


def test_channels_that_become_features_of_a_linear_layer_take_their_pixels_along():
    net = lively(
        nn.Sequential(ConvNormAct(3, A, 3, stride=8), nn.Flatten(), LinearSlice(A * 4, B), nn.ReLU(), LinearSlice(B, 5))
    )
    assert sort(net, EXAMPLE, [{"a": 12, "b": 12}]) == Sorted(("0.conv", "2"), ())


def test_gates_of_squeeze_and_excitation_and_layer_norm_move_with_their_channels():
    width = Variable("w", (16, 32, 64))
    net = lively(nn.Sequential(ConvNormAct(3, width), SqueezeExcitation(width), ConvNormAct(width, 5)))
    assert sort(net, EXAMPLE, [{"w": 64}]).left == ()
    mlp = nn.Sequential(
        nn.Flatten(2), nn.LayerNorm(256), LinearSlice(256, A), nn.LayerNorm(12), nn.GELU(), LinearSlice(A, 5)
    )
    nn.init.normal_(mlp[3].weight)
    assert sort(mlp, EXAMPLE, [{"a": 12}]) == Sorted(("2",), ())


@pytest.mark.parametrize("keep", [False, True])
def test_statistics_kept_apart_for_each_width_move_with_their_channels(keep):
    space = SearchSpace([Categorical("a", (4, 8, 12)), Categorical("b", (4, 8, 12))])
    net = nn.Sequential(ConvNormAct(3, A, 3), ConvNormAct(A, B, 3), ConvNormAct(B, 5, 1))
    per_width_statistics(net, A)
    lively(net)
    archs = [*space] if keep else [{"a": 12, "b": 12}]
    before = copy.deepcopy(net.state_dict())
    assert sort(net, EXAMPLE, archs, keep=space if keep else None).left == ()
    assert not torch.equal(net[0].norm._buffers["running_var"][0], before["0.norm.running_var"][0])


def test_the_readmes_phases_sort_before_they_begin():
    (code,) = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.DOTALL)
    names = {}
    exec(code, names)
    table = copy.deepcopy(TABLE)
    for stage in table["stages"]:
        stage["block"]["expand"] = [3, 4, 6]
    space, net = mobilenet(table)
    run = SimpleNamespace(space=space, supernet=net, task=SimpleNamespace(example=EXAMPLE), train=Train(epochs=1))
    found = names["phases"](run)
    widest = {key: space[key].largest for key in space.keys if key.endswith("width") or key == "head.expand"}
    for before, phase in zip([None, *found], found, strict=False):
        for parameter in net.parameters():  # something was learnt
            nn.init.normal_(parameter, std=parameter.detach().std())
        archs = [] if before is None else [{**before.space.smallest(), **widest}, {**before.space.largest(), **widest}]
        old, state = outputs(net, archs, EXAMPLE), copy.deepcopy(net.state_dict())
        phase.begin()
        assert_close(outputs(net, archs, EXAMPLE), old, rtol=1e-10, atol=1e-10)
        changed = [name for name, tensor in net.state_dict().items() if not torch.equal(tensor, state[name])]
        assert bool(changed) == (before is not None)


# -- what else stays --------------------------------------------------------------------------------------------------


def test_nothing_but_weights_changes():
    space, net = mobilenet(TABLE)
    net.train()
    net.head.eval()
    net.to(memory_format=torch.channels_last)
    arch = space.smallest()
    apply(net, arch)
    modes = [m.training for m in net.modules()]
    parameters, strides = [*net.parameters()], [p.stride() for p in net.parameters()]
    with global_generators_untouched():
        sort_channels(net, EXAMPLE)
    assert [m.training for m in net.modules()] == modes
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    assert [p.stride() for p in net.parameters()] == strides
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    for module in mutables(net):
        assert dict(module.elastic.choice) == {name: value(arch) for name, value in module.elastic.values.items()}


def test_a_sorted_network_stays_as_it_is():
    _, net = mobilenet(TABLE)
    first = sort_channels(net, EXAMPLE)
    before = copy.deepcopy(net.state_dict())
    assert sort_channels(net, EXAMPLE) == first
    assert_close(net.state_dict(), before, rtol=0, atol=0)


def test_frozen_weights_are_sorted_as_well():
    net = lively(nn.Sequential(ConvNormAct(3, A, 3), ConvNormAct(A, 5, 1))).requires_grad_(False)
    with torch.no_grad():
        assert sort(net, EXAMPLE, [{"a": 12}]) == Sorted(("0.conv",), ())


def test_what_a_measure_says_nothing_of_is_left():
    net = nn.Sequential(LinearSlice(6, A), nn.ReLU(), LinearSlice(A, 5))
    assert sort_channels(net, torch.zeros(1, 6), "norm_scale") == Sorted((), ("0",))
    assert sort_channels(net, torch.zeros(1, 6)) == Sorted(("0",), ())


def test_a_measure_without_the_gradients_that_it_wants_says_so():
    net = nn.Sequential(LinearSlice(6, A), nn.ReLU(), LinearSlice(A, 5))
    with pytest.raises(UserError, match="taylor wants gradients"):
        sort_channels(net, torch.zeros(1, 6), "taylor")
    net(torch.ones(2, 6)).square().sum().backward()
    assert sort_channels(net, torch.zeros(1, 6), "taylor") == Sorted(("0",), ())


def test_a_measure_that_there_is_not_is_told_with_those_that_there_are():
    with pytest.raises(UserError, match="no measure of importance is called 'l3'") as caught:
        sort_channels(nn.Sequential(ConvNormAct(3, A), ConvNormAct(A, 5)), EXAMPLE, "l3")
    assert "input_l1, l1, l2, norm_scale, taylor" in str(caught.value)


def test_a_norm_alone_is_a_searchable_layer_too():
    net = lively(nn.Sequential(Conv2dSlice(3, A, 1), BatchNorm2dSlice(A, affine=False), ConvNormAct(A, 5)))
    assert sort(net, EXAMPLE, [{"a": 12}]) == Sorted(("0",), ())
