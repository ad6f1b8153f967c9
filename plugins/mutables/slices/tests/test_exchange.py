import numpy as np
import pytest
import torch
from torch import nn

from corenas.errors import UserError
from corenas.export import export_subnet
from corenas.mutable import Elastic, apply
from corenas.space import SearchSpace
from corenas.testing.small import same
from corenas.value import Dimension, as_value
from corenas_mutable_slices import (
    BatchNorm2dSlice,
    Conv2dSlice,
    ConvNormAct,
    ElasticDepth,
    LinearSlice,
    MixedOp,
    Residual,
    SqueezeExcitation,
)
from corenas_mutable_slices.exchange import load, published

SPACE = SearchSpace.from_table({
    "width": [4, 8],
    "other": [2, 6],
    "kernel": [1, 3, 5],
    "groups": [1, 2],
    "depth": [1, 2],
    "op": ["conv", "pool", "plain"],
})  # fmt: skip
WIDTH, OTHER, KERNEL, GROUPS, DEPTH, OP = map(SPACE.value, SPACE.keys)
EXAMPLE = torch.zeros(1, 3, 8, 8)


class Backbone(nn.Module):
    """Something of everything: a view, a copy of several parts, groups, gates, a plain layer, a bare parameter."""

    def __init__(self):
        super().__init__()
        self.stem = ConvNormAct(3, WIDTH, KERNEL)
        self.branch = ConvNormAct(3, OTHER, 3)
        both = Dimension.of([WIDTH, OTHER])
        self.joined = nn.Sequential(Conv2dSlice(both, both, KERNEL, groups="depthwise"), BatchNorm2dSlice(both))
        self.point = Conv2dSlice(both, WIDTH, 1)
        blocks = [Residual({"conv": ConvNormAct(WIDTH, WIDTH, 3, groups=GROUPS)}, nn.Identity()) for _ in range(2)]
        self.stage = ElasticDepth(blocks, DEPTH)
        plain = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Upsample(8))
        self.mixed = MixedOp({"conv": ConvNormAct(WIDTH, WIDTH), "pool": SqueezeExcitation(WIDTH), "plain": plain}, OP)
        self.last = Conv2dSlice(WIDTH, 6, 1)
        self.plain = nn.BatchNorm2d(6)
        self.scale = nn.Parameter(torch.randn(6, 1, 1))
        self.register_buffer("shift", torch.randn(6, 1, 1))

    def forward(self, x):
        x = self.joined(torch.cat([self.stem(x), self.branch(x)], 1))
        return self.plain(self.last(self.mixed(self.stage(self.point(x))))) * self.scale + self.shift


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = Backbone()
        self.head = LinearSlice(6, 5)

    def forward(self, x):
        return self.head(self.backbone(x).mean((2, 3)))


def network(seed):
    """A network whose weights and statistics are all random."""
    torch.manual_seed(seed)
    model = Network()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5) if name.endswith("var") else nn.init.normal_(tensor)
        else:
            tensor.fill_(seed)
    return model.eval()


def archs(n=8):
    return [SPACE.largest(), SPACE.smallest(), *SPACE.decode(SPACE.draw(np.random.default_rng(0), n))]


@pytest.mark.parametrize("arch", archs(), ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_weights_of_an_exported_network_load_where_they_came_from_and_nowhere_else(arch, memory_format):
    theirs, ours = network(1), network(2).to(memory_format=memory_format)
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    plain = export_subnet(theirs, arch, EXAMPLE)
    load(ours, arch, plain.state_dict())
    x = torch.randn(3, 3, 8, 8)
    with torch.no_grad(), apply(ours, arch):
        torch.testing.assert_close(ours(x), plain(x), rtol=1e-5, atol=1e-5)
    again = export_subnet(ours, arch, EXAMPLE).state_dict()
    assert again.keys() == plain.state_dict().keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in plain.state_dict().items())
    after = ours.state_dict()
    changed = sum(int((after[name] != tensor).sum()) for name, tensor in before.items())
    assert changed == sum(tensor.numel() for tensor in again.values())


@pytest.mark.parametrize("name", ["graph", "class", "training_", "0"])
def test_names_that_are_taken_load_as_they_are_exported(name):
    model = nn.Sequential()
    model.add_module(name, LinearSlice(4, 4))
    state = {
        key: torch.randn_like(tensor)
        for key, tensor in export_subnet(model, {}, torch.zeros(1, 4)).state_dict().items()
    }
    load(model, {}, state)
    assert all(
        same(tensor, state[key]) for key, tensor in export_subnet(model, {}, torch.zeros(1, 4)).state_dict().items()
    )


def test_names_and_types_may_be_others():
    theirs, ours, arch = network(1), network(2).double(), SPACE.smallest()
    state = published(export_subnet(theirs, arch, EXAMPLE), "published.{}".format)
    assert all(name.startswith("published.") for name in state)
    load(ours, arch, state, "published.{}".format)
    assert torch.equal(ours.head.weight, theirs.head.weight.double())
    assert ours.head.weight.dtype == torch.float64


def test_a_linear_layer_stands_for_a_convolution_of_one_pixel():
    theirs, ours, arch = network(1), network(2), SPACE.largest()
    plain = export_subnet(theirs, arch, EXAMPLE)
    linear = {"last.weight": torch.randn(6, 8), "head.weight": torch.randn(5, 6)}
    load(ours, arch, {**plain.state_dict(), **linear})
    assert torch.equal(ours.backbone.last.weight[:, :, 0, 0], linear["last.weight"])
    state = published(export_subnet(ours, arch, EXAMPLE), str, like=linear)
    assert torch.equal(state["last.weight"], linear["last.weight"])


def test_old_files_without_counts_of_batches_load():
    ours, arch = network(2), SPACE.largest()
    state = export_subnet(network(1), arch, EXAMPLE).state_dict()
    load(ours, arch, {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")})
    assert int(ours.backbone.stem.norm.num_batches_tracked) == 2


@pytest.mark.parametrize(("changes", "says"), [
    ({"head.weight": None}, r"nothing under head.weight for head.weight, \[5, 6\]"),
    ({"head.weight": torch.zeros(6, 5)}, r"\[6, 5\] under head.weight"),
    ({"stem_conv.weight": torch.zeros(8, 3, 3, 3)}, r"\[8, 3, 3, 3\] under stem_conv.weight"),
    ({"tail.weight": torch.zeros(1)}, "no layer for tail.weight"),
    ({f"tail{i}": torch.zeros(1) for i in range(7)}, "and 2 more"),
])  # fmt: skip
def test_weights_of_another_network_are_refused_and_nothing_is_loaded(changes, says):
    ours, arch = network(2), SPACE.largest()
    state = {**export_subnet(network(1), arch, EXAMPLE).state_dict(), **changes}
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    with pytest.raises(UserError, match=says):
        load(ours, arch, {name: tensor for name, tensor in state.items() if tensor is not None})
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())


class Doubled(nn.Linear):
    """A layer whose export is no part of its weights."""

    def __init__(self, width):
        super().__init__(4, 4)
        self.elastic = Elastic({"width": as_value(width)})

    def export(self):
        plain = nn.Linear(4, 4)
        plain.load_state_dict({"weight": self.weight * 2, "bias": self.bias})
        return plain


def test_a_weight_that_is_computed_has_no_place_to_load_into():
    model = nn.Sequential(Doubled(WIDTH))
    with pytest.raises(UserError, match=r"0\.weight is computed"):
        load(model, SPACE.largest(), {"0.weight": torch.zeros(4, 4), "0.bias": torch.zeros(4)})


class Placed(nn.Module):
    """A layer with a buffer that its state dict leaves out, as it is the same whatever the weights are."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))
        self.register_buffer("places", torch.tensor([2, 0, 1]), persistent=False)

    def forward(self, x):
        return x + self.weight[self.places]


def test_buffers_that_are_no_part_of_a_state_dict_are_passed_over():
    ours, theirs = nn.Sequential(Placed()).eval(), nn.Sequential(Placed()).eval()
    load(ours, {}, export_subnet(theirs, {}, torch.zeros(1, 3)).state_dict())
    assert torch.equal(ours[0].weight, theirs[0].weight)
