import copy
import shutil
from pathlib import Path

import numpy as np
import pytest
import tomli
import tomli_w
import torch
from torch import nn

from corenas.contracts import Backbone
from corenas.cost import Cost
from corenas.errors import UserError
from corenas.export import export_subnet
from corenas.mutable import apply
from corenas.plugins import load_catalogue
from corenas.run.spec import load_spec
from corenas.space import SearchSpace
from corenas.testing.backbones import backbone_checks, counted, network
from corenas.testing.components import spec_fragments
from corenas.testing.distributions import distribution_checks
from corenas_backbone_genet import GENet, corenas_backbones
from corenas_mutable_slices import LinearSlice, MixedOp
from corenas_mutable_slices.exchange import load, published

SPACES = Path(__file__).parents[4] / "spec" / "space"
PAPER = tomli.loads((SPACES / "genet.toml").read_text())
EXAMPLE = GENet.example["space"]

# The networks of the reference code (GENet_small.txt, GENet_normal.txt, GENet_large.txt): channels of the stem; type,
# width, stride of the first layer, inner over output channels and number of layers of each super-block; channels of the
# head. All kernels are 3.
EARLY = [("XX", 128, 2, 1, 1), ("XX", 192, 2, 1, 2), ("BL", 640, 2, 0.25, 6)]
NETWORKS = {
    "small": (
        13,
        [("XX", 48, 2, 1, 1), ("XX", 48, 2, 1, 3), ("BL", 384, 2, 0.25, 7), ("DW", 560, 2, 3, 2), ("DW", 256, 1, 3, 1)],
        1920,
    ),
    "normal": (32, [*EARLY, ("DW", 640, 2, 3, 4), ("DW", 640, 1, 3, 1)], 2560),
    "large": (32, [*EARLY, ("DW", 640, 2, 3, 5), ("DW", 640, 1, 3, 4)], 2560),
}
FIGURES = [  # name, resolution, params, flops: what the reference code's own networks have, and timm's gernet_s, _m, _l
    ("small", 192, 8_173_761, 547_222_656),
    ("small", 224, 8_173_761, 744_137_504),
    ("normal", 192, 21_142_920, 2_208_073_216),
    ("normal", 224, 21_142_920, 3_004_508_544),
    ("large", 224, 31_078_280, 3_489_585_024),
    ("large", 256, 31_078_280, 4_557_041_664),
]


class PlainBlock(nn.Module):
    """A layer of a super-block, written with torch alone."""

    def __init__(self, op, inputs, width, stride, ratio, kernel):
        super().__init__()
        inner = round(width * ratio)

        def conv(inputs, outputs, kernel, stride=1, groups=1):
            return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)

        if op == "XX":
            convs = [conv(inputs, inner, kernel, stride), conv(inner, width, kernel)]
        else:
            middle = conv(inner, inner, kernel, stride, groups=inner if op == "DW" else 1)
            convs = [conv(inputs, inner, 1), middle, conv(inner, width, 1)]
        layers = [layer for c in convs for layer in (c, nn.BatchNorm2d(c.out_channels), nn.ReLU())]
        self.body = nn.Sequential(*layers[:-1])
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != width:
            self.shortcut = nn.Sequential(conv(inputs, width, 1, stride), nn.BatchNorm2d(width))

    def forward(self, x):
        return torch.relu(self.body(x) + self.shortcut(x))


def plain_network(stem, stages, head, kernels=(3,) * 5):
    """A network of NETWORKS, written with torch alone."""
    layers = [nn.Conv2d(3, stem, 3, 2, 1, bias=False), nn.BatchNorm2d(stem), nn.ReLU()]
    inputs = stem
    for (op, width, stride, ratio, depth), kernel in zip(stages, kernels, strict=True):
        for i in range(depth):
            layers.append(PlainBlock(op, inputs, width, stride if i == 0 else 1, ratio, kernel))
            inputs = width
    layers += [nn.Conv2d(inputs, head, 1, bias=False), nn.BatchNorm2d(head), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(head, 1000))


class Network(nn.Module):
    """A backbone with a linear classifier, as a task builds it."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.head = LinearSlice(backbone.feat_dims[-1], 1000)

    def forward(self, x):
        return self.head(self.backbone.features(x)[-1].flatten(1))


def supernet(table, **options):
    """The supernet of a space's table, drawn from a seed, and the space."""
    torch.manual_seed(0)
    space = SearchSpace.from_table(table)
    return Network(GENet(**options).build(space)), space


@pytest.fixture(scope="module")
def paper():
    """Supernet, space and cost of the space file."""
    model, space = supernet(PAPER)
    return model.eval(), space, Cost(model, space, torch.empty(1, 3, 224, 224))


def arch_of(space, name, resolution=224):
    """A network of NETWORKS as an arch of the space file."""
    stem, stages, head = NETWORKS[name]
    searched = [{"width": width, "depth": depth, "kernel": 3, **({} if op == "XX" else {"ratio": ratio})}
                for op, width, _, ratio, depth in stages]  # fmt: skip
    return space.arch({"resolution": resolution, "stem.width": stem, "stages": searched, "head.width": head})


def of_space(cost, arch):
    found = cost.of([arch])[0]
    return {"flops": found["flops"], "params": found["params"]}


# -- the published networks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "resolution", "params", "flops"), FIGURES)
def test_the_published_networks_come_out_to_the_last_digit(paper, name, resolution, params, flops):
    model, space, cost = paper
    arch = arch_of(space, name, resolution)
    expected = {"flops": flops, "params": params}
    assert of_space(cost, arch) == expected
    # The images that the network is checked on are small: it resizes them.
    assert counted(export_subnet(model, arch, torch.zeros(1, 3, 32, 32)), (3, resolution, resolution)) == expected
    with torch.device("meta"):
        assert counted(plain_network(*NETWORKS[name]), (3, resolution, resolution)) == expected


@pytest.mark.parametrize("name", NETWORKS)
def test_a_published_network_computes_the_same_with_its_weights_in_the_supernet(paper, name):
    model, space, _ = paper
    arch = arch_of(space, name, 192)
    theirs = plain_network(*NETWORKS[name])
    x = torch.randn(2, 3, 192, 192, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs(x)  # its statistics are no longer all alike
        expected = theirs.eval()(x)
        exported = export_subnet(model, arch, torch.zeros(1, 3, 32, 32)).state_dict()
        names = dict(zip(exported, theirs.state_dict(), strict=True))
        load(model, arch, theirs.state_dict(), names.__getitem__)
        with apply(model, arch):
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    back = published(export_subnet(model, arch, torch.zeros(1, 3, 32, 32)), names.__getitem__)
    theirs.load_state_dict(back)
    assert all(torch.equal(back[name], tensor) for name, tensor in theirs.state_dict().items())


def test_the_space_has_the_size_that_its_lists_give_and_holds_the_published_networks(paper):
    _, space, _ = paper
    stages = (4 * 2 * 2) * (4 * 3 * 2) * (3 * 5 * 2 * 2) * (3 * 6 * 2 * 2) * (3 * 5 * 2 * 2)
    assert space.size == 3 * 3 * stages * 2
    assert len({arch_of(space, name) for name in NETWORKS}) == 3


def test_any_arch_costs_what_a_network_written_with_torch_alone_costs(paper):
    _, space, cost = paper
    archs = [space.largest(), space.smallest(), *space.decode(space.draw(np.random.default_rng(0), 10))]
    for arch in archs:
        stages = []
        for i, (op, _, stride, _, _) in enumerate(NETWORKS["small"][1]):
            width, depth = arch[f"stages.{i}.width"], arch[f"stages.{i}.depth"]
            stages.append((op, width, stride, arch.get(f"stages.{i}.ratio", 1), depth))
        kernels = [arch[f"stages.{i}.kernel"] for i in range(5)]
        with torch.device("meta"):
            theirs = plain_network(arch["stem.width"], stages, arch["head.width"], kernels)
        assert of_space(cost, arch) == counted(theirs, (3, arch["resolution"], arch["resolution"]))


def test_more_of_one_variable_never_costs_less(paper):
    """Not even where two widths become the same and the projection between them is no longer needed."""
    _, space, cost = paper
    codes = space.draw(np.random.default_rng(1), 2000)
    for place, variable in enumerate(space.variables):
        assert list(variable.choices) == sorted(variable.choices)
        fewer = codes[codes[:, place] < len(variable.choices) - 1]
        more = fewer.copy()
        more[:, place] += 1
        before, after = cost(fewer), cost(more)
        for metric in ("flops", "params", "activations"):
            assert (after[metric] >= before[metric]).all(), (variable.key, metric)


# -- any space --------------------------------------------------------------------------------------------------------


def narrow(table):
    """The space file with an eighth of all channels but those of the stem, fewer blocks, and small images."""
    table = copy.deepcopy(table)
    table["resolution"] = [32, 48]
    for part in (*table["stages"], table["head"]):
        part["width"] = [width // 8 for width in part["width"]]
    for stage in table["stages"]:
        stage["depth"] = stage["depth"][:2] if stage["depth"][0] == 1 else [1, 3]
    return table


EVERY_TYPE = {  # in every block, beside a searched ratio
    "stem": {"width": 6, "kernel": [1, 5], "stride": 1},
    "stages": [
        {"width": [6, 8], "depth": [1, 2], "block": {"op": ["XX", "BL", "DW"], "ratio": [0.5, 2]}},
        {"width": 8, "stride": 2, "blocks": [{"op": "DW"}, {"op": ["BL", "XX"], "kernel": [1, 3]}]},
        {"width": 12, "op": "BL", "kernel": 1},
    ],
    "head": {"width": [16, 24]},
}


@pytest.mark.parametrize("check", backbone_checks)
@pytest.mark.parametrize(("options", "table", "image"), [
    (GENet(), narrow(PAPER), (3, 48, 48)),
    (GENet(**GENet.example["backbone"]), EXAMPLE, (1, 28, 28)),
    (GENet(in_channels=1), EVERY_TYPE, (1, 12, 12)),
    (GENet(levels=(1, 3)), {**EVERY_TYPE, "head": {"width": 16}}, (3, 16, 16)),
], ids=["paper", "example", "every type", "levels"])  # fmt: skip
def test_conforms(options, table, image, check):
    check(options, SearchSpace.from_table(table), image=image)


def test_the_tiny_space_is_the_example():
    tiny = SearchSpace.from_table(tomli.loads((SPACES / "genet-tiny.toml").read_text()))
    assert tiny.variables == SearchSpace.from_table(EXAMPLE).variables
    assert tiny.tree == SearchSpace.from_table(EXAMPLE).tree


def test_a_stage_of_several_types_runs_the_chosen_one():
    model, space = supernet(EXAMPLE, in_channels=1)
    first = model.backbone.stages[1].blocks[0]
    assert isinstance(first, MixedOp)
    for op, kernels in {"XX": [3, 3], "BL": [1, 3, 1]}.items():
        with apply(model, {**space.largest(), "stages.1.op": op}):
            chosen = first.candidates[first.elastic.choice["op"]]
        assert [layer.conv.kernel_size[0] for layer in chosen.body] == kernels


@pytest.mark.parametrize(("op", "inner"), [("XX", 40), ("BL", 10), ("DW", 120)])
def test_a_type_has_the_ratio_of_the_paper_unless_another_is_given(op, inner):
    table = {"stem": {"width": 8}, "stages": [{"op": op, "width": 40}], "head": {"width": 8}}
    model, _ = supernet(table)
    assert model.backbone.stages[0].blocks[0].body[0].conv.out_channels == inner
    table["stages"][0]["ratio"] = 0.3
    model, _ = supernet(table)
    assert model.backbone.stages[0].blocks[0].body[0].conv.out_channels == 12


@pytest.mark.parametrize(("stage", "message"), [
    ({"width": 8}, "neither the stage nor each of its blocks has 'op'"),
    ({"width": 8, "op": "MB"}, "'XX' or 'BL' or 'DW'"),
    ({"width": 8, "op": ["XX", "MB"]}, "found 'MB'"),
    ({"width": 8, "op": "XX", "kernel": [2, 3]}, "odd"),
    ({"width": 8.5, "op": "XX"}, "whole numbers"),
    ({"width": [1, 8], "op": "BL"}, "inner channels"),
    ({"width": 8, "op": "XX", "expand": 3}, "unknown key"),
])  # fmt: skip
def test_a_mistake_in_a_stage_is_answered(stage, message):
    table = {"stem": {"width": 8}, "stages": [stage], "head": {"width": 8}}
    with pytest.raises(UserError, match=message):
        GENet().build(SearchSpace.from_table(table))


def test_widths_that_are_too_many_to_compare_are_answered():
    many = {"type": "int", "low": 8, "high": 1024}
    table = {"stem": {"width": many}, "stages": [{"op": "XX", "width": many}], "head": {"width": 8}}
    with torch.device("meta"), pytest.raises(UserError, match="too many to tabulate"):
        network(GENet(), SearchSpace.from_table(table))


# -- the distribution -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", distribution_checks)
def test_the_distribution_conforms(check):
    check("corenas_backbone_genet")


def test_options_are_a_backbone_under_its_name():
    assert corenas_backbones() == {"genet": GENet}
    assert isinstance(GENet(), Backbone)


def test_the_spec_of_the_readme_is_right(tmp_path):
    (table,) = spec_fragments(Path(__file__).parents[1] / "README.md")
    (tmp_path / "spec.toml").write_text(tomli_w.dumps(table))
    shutil.copytree(SPACES, tmp_path / "space")
    spec, _ = load_spec(tmp_path / "spec.toml", load_catalogue())
    assert spec.backbone == GENet(in_channels=1)
    assert spec.space.variables == SearchSpace.from_table(EXAMPLE).variables
