import copy
import shutil
from pathlib import Path

import attrs
import numpy as np
import pytest
import tomli
import torch
from torch import nn

from corenas.contracts import Backbone
from corenas.cost import Cost
from corenas.errors import UserError
from corenas.export import export_subnet
from corenas.mutable import apply, keys_used
from corenas.options import structure
from corenas.plugins import load_catalogue
from corenas.run.spec import load_spec
from corenas.space import SearchSpace
from corenas.testing.backbones import backbone_checks, counted, more_of_a_variable_never_costs_less
from corenas.testing.components import changed, imports_no_torch, spec_fragments
from corenas.testing.distributions import distribution_checks
from corenas.value import Constant
from corenas_backbone_zennet import Layout, SuperBlock, ZenNet, corenas_backbones
from corenas_backbone_zennet.model import nearest_multiple, super_block
from corenas_backbone_zennet.structure import arch, read, write
from corenas_mutable_slices import LinearSlice, Residual, Shortcut

SPACES = Path(__file__).parents[4] / "spec" / "space"
XXBL, IDW, CIFAR, TINY = (tomli.loads((SPACES / f"zennet-{name}.toml").read_text())
                          for name in ("xxbl", "idw", "cifar", "tiny"))  # fmt: skip

# Of the reference code (idstcv/ZenNAS): ZenNet/*.txt at d1d617e; those of its first release, at 53af65e; and what its
# scripts begin with.
STRUCTURES = {
    "cifar05M": "SuperConvK3BNRELU(3,64,1,1)SuperResK1K5K1(64,168,1,16,3)SuperResK1K3K1(168,80,2,32,4)"
    "SuperResK1K5K1(80,112,2,16,3)SuperResK1K5K1(112,144,1,24,3)SuperResK1K3K1(144,32,2,40,1)"
    "SuperConvK1BNRELU(32,512,1,1)",
    "cifar1M": "SuperConvK3BNRELU(3,88,1,1)SuperResK1K7K1(88,120,1,16,1)SuperResK1K7K1(120,192,2,16,3)"
    "SuperResK1K5K1(192,224,1,24,4)SuperResK1K5K1(224,96,2,24,2)SuperResK1K3K1(96,168,2,40,3)"
    "SuperResK1K3K1(168,112,1,48,3)SuperConvK1BNRELU(112,512,1,1)",
    "cifar2M": "SuperConvK3BNRELU(3,32,1,1)SuperResK1K5K1(32,120,1,40,1)SuperResK1K5K1(120,176,2,32,3)"
    "SuperResK1K7K1(176,272,1,24,3)SuperResK1K3K1(272,176,1,56,3)SuperResK1K3K1(176,176,1,64,4)"
    "SuperResK1K5K1(176,216,2,40,2)SuperResK1K3K1(216,72,2,56,2)SuperConvK1BNRELU(72,512,1,1)",
    "flops400M": "SuperConvK3BNRELU(3,16,2,1)SuperResIDWE1K7(16,40,2,40,1)SuperResIDWE1K7(40,64,2,64,1)"
    "SuperResIDWE4K7(64,96,2,96,5)SuperResIDWE2K7(96,224,2,224,5)SuperConvK1BNRELU(224,2048,1,1)",
    "flops600M": "SuperConvK3BNRELU(3,24,2,1)SuperResIDWE1K7(24,48,2,48,1)SuperResIDWE2K7(48,72,2,72,1)"
    "SuperResIDWE6K7(72,96,2,88,5)SuperResIDWE4K7(96,192,2,168,5)SuperConvK1BNRELU(192,2048,1,1)",
    "flops900M": "SuperConvK3BNRELU(3,16,2,1)SuperResIDWE1K7(16,48,2,72,1)SuperResIDWE2K7(48,72,2,64,3)"
    "SuperResIDWE2K7(72,152,2,144,3)SuperResIDWE2K7(152,360,2,352,4)SuperResIDWE4K7(360,288,1,264,3)"
    "SuperConvK1BNRELU(288,2048,1,1)",
    "latency01ms": "SuperConvK3BNRELU(3,24,2,1)SuperResK3K3(24,32,2,64,1)SuperResK5K5(32,64,2,32,1)"
    "SuperResK5K5(64,168,2,96,1)SuperResK1K5K1(168,320,1,120,1)SuperResK1K5K1(320,640,2,304,3)"
    "SuperResK1K5K1(640,512,1,384,1)SuperConvK1BNRELU(512,2384,1,1)",
    "latency02ms": "SuperConvK3BNRELU(3,24,2,1)SuperResK1K5K1(24,32,2,32,1)SuperResK1K7K1(32,104,2,64,1)"
    "SuperResK1K5K1(104,512,2,160,1)SuperResK1K5K1(512,344,1,192,1)SuperResK1K5K1(344,688,2,320,4)"
    "SuperResK1K5K1(688,680,1,304,3)SuperConvK1BNRELU(680,2552,1,1)",
    "latency03ms": "SuperConvK3BNRELU(3,24,2,1)SuperResK1K5K1(24,64,2,32,1)SuperResK1K3K1(64,128,2,128,1)"
    "SuperResK1K7K1(128,432,2,128,1)SuperResK1K5K1(432,272,1,160,1)SuperResK1K5K1(272,848,2,384,4)"
    "SuperResK1K5K1(848,848,1,320,3)SuperResK1K5K1(848,456,1,320,3)SuperConvK1BNRELU(456,6704,1,1)",
    "latency05ms": "SuperConvK3BNRELU(3,8,2,1)SuperResK1K7K1(8,64,2,32,1)SuperResK1K3K1(64,152,2,128,1)"
    "SuperResK1K5K1(152,640,2,192,4)SuperResK1K5K1(640,640,1,192,2)SuperResK1K5K1(640,1536,2,384,4)"
    "SuperResK1K5K1(1536,816,1,384,3)SuperResK1K5K1(816,816,1,384,3)SuperConvK1BNRELU(816,5304,1,1)",
    "latency08ms": "SuperConvK3BNRELU(3,16,2,1)SuperResK1K5K1(16,64,2,64,1)SuperResK1K3K1(64,240,2,128,2)"
    "SuperResK1K7K1(240,640,2,160,3)SuperResK1K7K1(640,768,1,192,4)SuperResK1K5K1(768,1536,2,384,5)"
    "SuperResK1K5K1(1536,1536,1,384,3)SuperResK1K5K1(1536,2304,1,384,5)SuperConvK1BNRELU(2304,4912,1,1)",
    "latency12ms": "SuperConvK3BNRELU(3,32,2,1)SuperResK1K5K1(32,80,2,32,1)SuperResK1K7K1(80,432,2,128,5)"
    "SuperResK1K7K1(432,640,2,192,3)SuperResK1K7K1(640,1008,1,160,5)SuperResK1K7K1(1008,976,1,160,4)"
    "SuperResK1K5K1(976,2304,2,384,5)SuperResK1K5K1(2304,2496,1,384,5)SuperConvK1BNRELU(2496,3072,1,1)",
    "first flops400M": "SuperConvK3BNRELU(3,32,2,1)SuperResIDWE1K7(32,48,2,40,1)SuperResIDWE1K7(48,88,2,96,1)"
    "SuperResIDWE2K7(88,144,2,176,3)SuperResIDWE4K7(144,248,2,224,5)SuperConvK1BNRELU(248,1024,1,1)",
    "first flops600M": "SuperConvK3BNRELU(3,16,2,1)SuperResIDWE1K7(16,32,2,32,1)SuperResIDWE1K7(32,72,2,96,1)"
    "SuperResIDWE2K7(72,120,2,128,4)SuperResIDWE4K7(120,200,2,176,3)SuperResIDWE4K7(200,168,1,192,5)"
    "SuperConvK1BNRELU(168,1536,1,1)",
    "first latency01ms": "SuperConvK3BNRELU(3,24,2,1)SuperResK3K3(24,16,2,24,1)SuperResK5K5(16,40,2,48,4)"
    "SuperResK5K5(40,240,2,64,4)SuperResK5K5(240,256,1,64,3)SuperResK5K5(256,336,2,248,3)"
    "SuperResK3K3(336,408,1,256,4)SuperConvK1BNRELU(408,6576,1,1)",
    "first latency02ms": "SuperConvK3BNRELU(3,8,2,1)SuperResK3K3(8,96,2,56,1)SuperResK5K5(96,192,2,80,2)"
    "SuperResK5K5(192,120,2,56,5)SuperResK1K5K1(120,416,1,128,4)SuperResK1K3K1(416,536,2,320,5)"
    "SuperResK1K5K1(536,648,1,320,3)SuperConvK1BNRELU(648,3768,1,1)",
    "first latency03ms": "SuperConvK3BNRELU(3,8,2,1)SuperResK3K3(8,32,2,72,1)SuperResK3K3(32,80,2,112,4)"
    "SuperResK1K5K1(80,344,2,32,3)SuperResK1K5K1(344,184,1,120,3)SuperResK1K5K1(184,576,2,320,3)"
    "SuperResK1K5K1(576,384,1,320,3)SuperResK1K5K1(384,824,1,304,3)SuperResK1K5K1(824,656,1,312,5)"
    "SuperConvK1BNRELU(656,1368,1,1)",
    "first latency05ms": "SuperConvK3BNRELU(3,24,2,1)SuperResK3K3(24,48,2,120,1)SuperResK3K3(48,48,2,208,1)"
    "SuperResK1K3K1(48,288,2,72,5)SuperResK1K5K1(288,512,1,128,3)SuperResK1K5K1(512,368,2,112,3)"
    "SuperResK1K5K1(368,392,1,320,3)SuperResK1K5K1(392,304,1,112,5)SuperResK1K5K1(304,832,1,384,4)"
    "SuperResK1K3K1(832,664,1,312,2)SuperResK1K5K1(664,568,1,256,4)SuperResK5K5(568,304,1,256,5)"
    "SuperResK5K5(304,304,1,320,4)SuperResK1K3K1(304,784,1,384,5)SuperConvK1BNRELU(784,2048,1,1)",
    "first latency08ms": "SuperConvK3BNRELU(3,32,2,1)SuperResK3K3(32,128,2,88,1)SuperResK1K3K1(128,128,2,112,3)"
    "SuperResK1K3K1(128,88,1,112,4)SuperResK1K3K1(88,416,2,128,5)SuperResK1K5K1(416,184,1,48,3)"
    "SuperResK1K5K1(184,184,1,48,3)SuperResK5K5(184,224,1,32,5)SuperResK1K5K1(224,176,1,72,4)"
    "SuperResK1K5K1(176,232,1,128,4)SuperResK1K5K1(232,344,1,128,3)SuperResK1K3K1(344,128,1,48,3)"
    "SuperResK1K3K1(128,128,1,64,5)SuperResK3K3(128,112,1,32,3)SuperResK3K3(112,56,1,64,5)"
    "SuperResK1K5K1(56,128,1,96,4)SuperResK1K5K1(128,1232,2,256,5)SuperResK1K5K1(1232,1280,1,320,3)"
    "SuperResK1K5K1(1280,824,1,304,4)SuperResK1K5K1(824,1232,1,240,3)SuperConvK1BNRELU(1232,2128,1,1)",
    "initial cifar": "SuperConvK3BNRELU(3,8,1,1)SuperResK3K3(8,16,1,8,1)SuperResK3K3(16,32,2,16,1)"
    "SuperResK3K3(32,64,2,32,1)SuperResK3K3(64,64,2,32,1)SuperConvK1BNRELU(64,128,1,1)",
    "initial flops": "SuperConvK3BNRELU(3,8,2,1)SuperResIDWE6K3(8,32,2,8,1)SuperResIDWE6K3(32,48,2,32,1)"
    "SuperResIDWE6K3(48,96,2,48,1)SuperResIDWE6K3(96,128,2,96,1)SuperConvK1BNRELU(128,2048,1,1)",
}
# In the reference code's script the last convolution takes 256 channels, but 512 come.
INITIAL_LATENCY = (
    "SuperConvK3BNRELU(3,32,2,1)SuperResK3K3(32,64,2,32,1)SuperResK3K3(64,128,2,64,1)SuperResK3K3(128,256,2,128,1)"
    "SuperResK3K3(256,512,2,256,1)SuperConvK1BNRELU(256,512,1,1)"
)
SE, PLAIN = {"se": True}, {"residual": False}
FIGURES = [  # name, options, resolution, params, flops: counted on the reference code's own networks
    ("cifar05M", {}, 32, 546_636, 136_142_848),
    ("cifar1M", {}, 32, 1_040_844, 159_259_648),
    ("cifar2M", {}, 32, 2_027_980, 481_478_656),
    ("flops400M", {}, 224, 5_698_208, 400_213_376),
    ("flops600M", {}, 224, 7_125_944, 597_503_840),
    ("flops900M", {}, 224, 13_300_208, 909_269_280),
    ("flops400M", SE, 224, 7_466_024, 401_959_872),
    ("flops600M", SE, 224, 11_311_664, 601_656_800),
    ("flops900M", SE, 224, 19_351_644, 915_283_136),
    ("latency01ms", {}, 224, 30_068_776, 1_756_624_768),
    ("latency02ms", {}, 224, 49_681_944, 3_416_128_768),
    ("latency03ms", {}, 224, 85_379_160, 4_871_869_312),
    ("latency05ms", {}, 224, 118_179_592, 8_331_553_344),
    ("latency08ms", {}, 224, 182_504_488, 13_922_530_176),
    ("latency12ms", {}, 224, 180_593_736, 21_974_189_056),
    ("first flops400M", {}, 192, 7_601_376, 438_455_680),
    ("first flops600M", {}, 256, 7_974_968, 664_879_104),
    ("first latency01ms", {}, 192, 34_492_272, 1_796_521_344),
    ("first latency02ms", {}, 192, 44_628_376, 2_987_028_672),
    ("first latency03ms", {}, 224, 86_540_680, 5_117_748_864),
    ("first latency05ms", {}, 224, 148_317_480, 8_180_485_120),
    ("first latency08ms", {}, 224, 105_107_824, 9_409_494_528),
    ("initial cifar", {}, 32, 102_572, 6_722_048),
    ("initial flops", {}, 224, 2_824_264, 159_334_080),
    ("cifar05M", SE, 32, 557_276, 136_151_808),
    ("latency01ms", SE, 224, 30_522_608, 1_757_071_040),
    ("cifar05M", PLAIN, 32, 491_140, 120_012_800),
    ("flops600M", PLAIN, 224, 6_724_016, 560_022_368),
    ("latency01ms", PLAIN, 224, 29_463_760, 1_713_874_816),
]


class Network(nn.Module):
    """A backbone with a linear classifier, as a task builds it."""

    def __init__(self, backbone, classes):
        super().__init__()
        self.backbone = backbone
        self.head = LinearSlice(backbone.feat_dims[-1], classes)

    def forward(self, x):
        return self.head(self.backbone.features(x)[-1].flatten(1))


def supernet(table, classes=1000, device="meta", **options):
    """The supernet of a space's table, on the meta device unless another is asked for, and the space."""
    space = SearchSpace.from_table(table)
    torch.manual_seed(0)
    with torch.device(device):
        return Network(ZenNet(**options).build(space), classes), space


def costs(table, resolution, classes=1000, **options):
    """Supernet, space and cost; nothing is allocated."""
    model, space = supernet(table, classes, **options)
    return model, space, Cost(model, space, torch.empty(1, 3, resolution, resolution))


def without_activations(cost):
    return {name: cost[name] for name in ("flops", "params")}


# -- figures of the reference code ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options", "resolution", "params", "flops"), FIGURES)
def test_published_networks_come_out_to_the_last_digit(name, options, resolution, params, flops):
    classes = 100 if "cifar" in name else 1000
    model, space, cost = costs({"structure": STRUCTURES[name]}, resolution, classes, **options)
    expected, image = {"flops": flops, "params": params}, (3, resolution, resolution)
    assert without_activations(cost.of([space.default()])[0]) == expected
    assert counted(model, image) == expected  # of a space of one network: the model is that network
    if params < 8e6:  # larger ones take long to allocate
        model, _ = supernet({"structure": STRUCTURES[name]}, classes, "cpu", **options)
        assert counted(export_subnet(model, space.default(), torch.zeros(1, 3, 32, 32)), image) == expected


@pytest.mark.parametrize(("space", "names", "resolution", "classes"), [
    (XXBL, ["latency01ms", "latency02ms", "first latency02ms"], 224, 1000),
    (IDW, ["flops400M", "flops600M", "initial flops"], 224, 1000),
    (CIFAR, ["cifar1M"], 32, 100),
], ids=["xxbl", "idw", "cifar"])  # fmt: skip
def test_published_networks_are_archs_of_the_spaces(space, names, resolution, classes):
    figures = {name: {"flops": flops, "params": params} for name, own, size, params, flops in FIGURES
               if not own and size == resolution}  # fmt: skip
    figures["first latency02ms"] = {"flops": 4_064_317_248, "params": 44_628_376}  # at 224: 2,987,028,672 at 192
    model, space, cost = costs(space, resolution, classes)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert keys_used(model) == {*space.keys}
    for name in names:
        found = arch(STRUCTURES[name], space)
        assert without_activations(cost.of([found])[0]) == figures[name]
        assert write(structure(space.tree, Layout), found) == STRUCTURES[name]


SEARCHES = {
    name: tomli.loads((SPACES / f"zennas-{name}.toml").read_text()) for name in ("cifar", "idw", "xxbl", "tiny")
}


@pytest.mark.parametrize(("search", "names", "resolution", "classes"), [
    ("cifar", ["cifar05M", "cifar1M", "cifar2M"], 32, 100),
    ("idw", ["flops400M", "flops600M", "flops900M"], 224, 1000),
    ("xxbl", [name for name in STRUCTURES if name.startswith("latency")], 224, 1000),
])  # fmt: skip
def test_published_networks_are_archs_of_the_spaces_with_room_for_splits(search, names, resolution, classes):
    figures = {name: {"flops": flops, "params": params} for name, own, size, params, flops in FIGURES
               if not own and size == resolution}  # fmt: skip
    _, space, cost = costs(SEARCHES[search], resolution, classes)
    for name in names:
        point = arch(STRUCTURES[name], space)
        assert without_activations(cost.of([point])[0]) == figures[name]
        assert write(structure(space.tree, Layout), point) == STRUCTURES[name]


@pytest.mark.parametrize(("search", "first"), [
    ("cifar", "SuperConvK3BNRELU(3,8,1,1)SuperResK3K3(8,16,1,8,1)SuperResK3K3(16,32,2,16,1)SuperResK3K3(32,64,2,32,1)"
              "SuperResK3K3(64,64,2,32,1)SuperConvK1BNRELU(64,128,1,1)"),
    ("idw", "SuperConvK3BNRELU(3,8,2,1)SuperResIDWE6K3(8,32,2,8,1)SuperResIDWE6K3(32,48,2,32,1)"
            "SuperResIDWE6K3(48,96,2,48,1)SuperResIDWE6K3(96,128,2,96,1)SuperConvK1BNRELU(128,2048,1,1)"),
])  # fmt: skip
def test_the_defaults_of_these_spaces_are_what_the_scripts_of_the_reference_code_begin_with(search, first):
    space = SearchSpace.from_table(SEARCHES[search])
    assert write(structure(space.tree, Layout), space.default()) == first


def test_a_super_block_of_depth_0_is_not_there():
    table = copy.deepcopy(SEARCHES["tiny"])
    space = SearchSpace.from_table(table)
    without = space.arch({"stages.0.width": 24, "stages.0.depth": 2})
    same = {**table, "stages": [stage for i, stage in enumerate(table["stages"]) if i % 2 == 0]}
    plain = SearchSpace.from_table(same)
    twin = plain.arch({"stages.0.width": 24, "stages.0.depth": 2})
    networks = [ZenNet(in_channels=1).build(s.fix(a)) for s, a in ((space, without), (plain, twin))]
    shapes = [[p.shape for p in network.parameters()] for network in networks]
    assert shapes[0] == shapes[1]
    there = space.arch({"stages.0.width": 24, "stages.1": {"depth": 1, "width": 40}})
    network = ZenNet(in_channels=1).build(space.fix(there))
    assert network.stages[2].candidates["XX"].blocks[0][0].body.conv1.conv.in_channels == 40
    assert network.features(torch.zeros(2, 1, 28, 28))[0].shape == (2, 64, 1, 1)


def test_a_super_block_that_strides_has_to_be_there():
    table = copy.deepcopy(TINY)
    table["stages"][0]["depth"] = [0, 1]
    with pytest.raises(UserError, match="has to be there") as caught:
        ZenNet(in_channels=1).build(SearchSpace.from_table(table))
    assert [fault.dotted for fault in caught.value.faults] == ["stages[0].depth"]


def test_the_spaces_have_the_sizes_that_their_files_say():
    xxbl, idw, cifar = (SearchSpace.from_table(table).size for table in (XXBL, IDW, CIFAR))
    assert xxbl == 256 * (2 * 3 * 256 * 256 * 5) ** 6 * 512
    assert idw == 256 * (4 * 3 * 256 * 256 * 5) ** 4
    assert cifar == 256 * (2 * 3 * 256 * 256 * 5) ** 6 * 256


# -- structures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_structure_that_was_read_is_written_as_it_was(name):
    table = read(STRUCTURES[name])
    assert write(structure(SearchSpace.from_table(table).tree, Layout)) == STRUCTURES[name]
    layout = structure({"structure": STRUCTURES[name]}, Layout)
    assert structure(table, Layout) == attrs.evolve(layout, structure=None)


def test_a_structure_is_read_into_the_tables_of_a_space():
    text = "SuperConvK3BNRELU(3,8,2,1)SuperResIDWE6K5(8,32,2,16,2) SuperConvK5BNRELU(name|32,48,1,2)\nSuperResK7K7(48,"
    text += "64, 1,24,3)SuperConvK1BNRELU(64,128,1,1)\n"
    assert read(text) == {
        "stem": {"kernel": 3, "width": 8, "stride": 2, "depth": 1},
        "stages": [
            {"op": "IDW", "kernel": 5, "expand": 6, "width": 32, "stride": 2, "bottleneck": 16, "depth": 2},
            {"op": "Conv", "kernel": 5, "width": 48, "stride": 1, "depth": 2},
            {"op": "XX", "kernel": 7, "width": 64, "stride": 1, "bottleneck": 24, "depth": 3},
        ],
        "head": {"kernel": 1, "width": 128, "stride": 1, "depth": 1},
    }


@pytest.mark.parametrize("table", [XXBL, IDW, TINY], ids=["xxbl", "idw", "tiny"])
def test_an_arch_written_as_a_structure_and_read_again_costs_the_same(table):
    _, space, cost = costs(table, 64, 10)
    layout, rng = structure(space.tree, Layout), np.random.default_rng(0)
    found = space.default()
    for _ in range(4):
        found = space.mutate(found, 0.3, rng)
        text = write(layout, found)
        _, single, own = costs({"structure": text}, 64, 10)
        assert own.of([single.default()]) == cost.of([found])
        assert arch(text, space) == found


def test_a_space_may_give_a_network_as_its_structure_with_a_resolution_beside_it():
    text = STRUCTURES["initial cifar"]
    model, space = supernet({"structure": text, "resolution": [16, 24]}, 10, in_channels=1)
    assert space.keys == ("resolution",)
    assert model.backbone.stem.blocks[0].conv.in_channels == 1  # the option counts, not the string
    layout = structure(space.tree, Layout)
    assert write(layout, space.default()) == text
    assert write(layout, space.default(), in_channels=1) == text.replace("(3,8,1,1)", "(1,8,1,1)")
    same = {"structure": text, **{part: read(text)[part] for part in ("stem", "head")}}
    assert structure(same, Layout) == Layout(text)


@pytest.mark.parametrize(("text", "says"), [
    ("SuperResK2K2(8,8,1,8,1)", ["SuperResK2K2(8,8,1,8,1), at 26, is no super-block of Zen-NAS"]),
    ("SuperResK3K5(8,8,1,8,1)", ["is no super-block"]),
    ("SuperResIDWE0K3(8,8,1,8,1)", ["is no super-block"]),
    ("ResBlock(8,8,1,8,1)", ["is no super-block"]),
    ("SuperResK3K3(16,8,1,8,1)", ["has 16 input channels, but 8 come out of the block before it"]),
    ("SuperResK3K3(8,16,1,8,1)", ["has 8 input channels, but 16 come out of the block before it"]),
    ("SuperResK3K3(8,8,1,8)", ["expected 5 whole numbers of at least 1: inputs, width, stride, bottleneck, depth"]),
    ("SuperResK3K3(8,8,1,8,1,1)", ["expected 5 whole numbers"]),
    ("SuperConvK3BNRELU(8,8,1,8,1)", ["expected 4 whole numbers of at least 1: inputs, width, stride, depth"]),
    ("SuperResK3K3(8,8,1,8,0)", ["expected 5 whole numbers"]),
    ("SuperResK3K3(8,8,1,-8,1)", ["expected 5 whole numbers"]),
    ("SuperResK3K3(8,8,1,8.5,1)", ["expected 5 whole numbers"]),
    ("SuperResK3K3(8,8,1,8,1", ["expected Name(numbers) with commas between them, found 'SuperResK3K3(8,8,1,8,1"]),
    ("SuperResK3K3(8,8,1,8,1),", ["expected Name(numbers)"]),
    ("SuperResK3K4(8,8,1,8,1)SuperResK3K3(9,8,1)SuperResK3K3(8,8,1,8,1)SuperResK3K3(9,8,1,8,1)",
     ["is no super-block", "expected 5 whole numbers", "has 9 input channels, but 8 come"]),
])  # fmt: skip
def test_mistakes_of_a_structure_are_told_all_at_once(text, says):
    whole = f"SuperConvK3BNRELU(3,8,1,1){text}SuperConvK1BNRELU(8,8,1,1)"
    with pytest.raises(UserError) as caught:
        read(whole)
    assert len(caught.value.faults) == len(says)
    assert all(part in fault.message for part, fault in zip(says, caught.value.faults, strict=True))
    with pytest.raises(UserError) as caught:
        ZenNet().build(SearchSpace.from_table({"structure": whole}))
    assert {fault.dotted for fault in caught.value.faults} == {"structure"}


@pytest.mark.parametrize("text", [
    "", "SuperConvK3BNRELU(3,8,1,1)", "SuperConvK3BNRELU(3,8,1,1)SuperResK3K3(8,8,1,8,1)",
    "SuperResK3K3(3,8,1,8,1)SuperConvK3BNRELU(8,8,1,1)",
])  # fmt: skip
def test_a_network_begins_and_ends_with_convolutions(text):
    with pytest.raises(UserError, match="begins and ends with a SuperConv"):
        read(text)


def test_the_reference_codes_initial_structure_for_latencies_has_channels_that_do_not_follow():
    with pytest.raises(UserError, match="has 256 input channels, but 512 come"):
        read(INITIAL_LATENCY)


@pytest.mark.parametrize(("old", "new", "key", "says"), [
    ("", "SuperResIDWE1K3(8,8,1,8,1)", "stages", "has 5 super-blocks between its first and last, the space has 4"),
    ("(40,64,2", "(40,64,1", "stages[1].stride", "this network has 1, the space 2"),
    ("224,2048", "224,1024", "head.width", "this network has 1024, the space 2048"),
    ("IDWE4K7", "K1K7K1", "stages[2].op", "this network has 'BL', the space 'IDW'"),
    ("IDWE4K7", "IDWE3K7", "stages.2.expand", "3 is none of the choices"),
    ("64,1)", "65,1)", "stages.1.bottleneck", "65 is none of 8 to 2048 in steps of 8"),
])  # fmt: skip
def test_what_a_space_does_not_have_of_a_network_is_named(old, new, key, says):
    text = STRUCTURES["flops400M"].replace(old, new) if old else STRUCTURES["flops900M"]
    with pytest.raises(UserError) as caught:
        arch(text, SearchSpace.from_table(IDW))
    assert [fault.dotted for fault in caught.value.faults] == [key]
    assert says in caught.value.faults[0].message


# -- blocks -----------------------------------------------------------------------------------------------------------


class PlainSE(nn.Module):
    """Zen-NAS's squeeze-and-excitation, written with torch alone."""

    def __init__(self, channels):
        super().__init__()
        inner = max(1, round(channels * 0.25))
        convs = nn.Conv2d(channels, inner, 1, bias=False), nn.Conv2d(inner, channels, 1, bias=False)
        self.net = nn.Sequential(convs[0], nn.BatchNorm2d(inner), nn.ReLU(), convs[1], nn.BatchNorm2d(channels))

    def forward(self, x):
        return x * torch.sigmoid(self.net(nn.functional.adaptive_avg_pool2d(x, 1)))


class PlainBlock(nn.Module):
    """A residual block of Zen-NAS: convolutions as (inputs, outputs, kernel, stride, groups), written with torch alone.

    se: after which convolution squeeze-and-excitation stands, None for none
    shortcut: "projection", "identity" or None
    """

    def __init__(self, convs, se, shortcut):
        super().__init__()
        layers = []
        for i, (inputs, outputs, kernel, stride, groups) in enumerate(convs):
            layers.append(nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False))
            layers.append(nn.BatchNorm2d(outputs))
            if i < len(convs) - 1:
                layers.append(nn.ReLU())
            if i == se:
                layers.append(PlainSE(outputs))
        self.body = nn.Sequential(*layers)
        start, end = convs[0][0], convs[-1][1]
        stride = max(stride for *_, stride, _ in convs)
        self.shortcut = {
            "projection": nn.Sequential(nn.Conv2d(start, end, 1, stride), nn.BatchNorm2d(end)),
            "identity": nn.Identity(),
        }.get(shortcut)

    def forward(self, x):
        y = self.body(x)
        return torch.relu(y if self.shortcut is None else y + self.shortcut(x))


def plain_network(se, residual):
    """What EVERY_TYPE describes, written block by block with torch alone."""
    blocks = []

    def add(convs, se_after, shortcut):
        blocks.append(PlainBlock(convs, se_after if se else None, shortcut if residual else None))

    for inputs, stride in ((3, 1), (8, 1)):
        add([(inputs, 8, 3, stride, 1)], None, None)
    # SuperResK3K3(8,12,2,20,2): one block a sub-layer
    add([(8, 20, 3, 2, 1), (20, 12, 3, 1, 1)], 0, "projection")
    add([(12, 20, 3, 1, 1), (20, 12, 3, 1, 1)], 0, "identity")
    # SuperResK1K5K1(12,12,1,6,2): two blocks a sub-layer; the first projects though nothing changes
    for shortcut in ("projection", "identity", "identity", "identity"):
        add([(12, 6, 1, 1, 1), (6, 6, 5, 1, 1), (6, 12, 1, 1, 1)], 1, shortcut)
    # SuperResIDWE2K3(12,20,2,12,2): 24 depthwise channels for 12, 40 for 20; the widths alternate
    add([(12, 24, 1, 1, 1), (24, 24, 3, 2, 24), (24, 12, 1, 1, 1)], 1, "projection")
    add([(12, 40, 1, 1, 1), (40, 40, 3, 1, 40), (40, 20, 1, 1, 1)], 1, "projection")
    add([(20, 24, 1, 1, 1), (24, 24, 3, 1, 24), (24, 12, 1, 1, 1)], 1, "projection")
    add([(12, 40, 1, 1, 1), (40, 40, 3, 1, 40), (40, 20, 1, 1, 1)], 1, "projection")
    # SuperResIDWE1K7(20,20,1,20,1): 16 depthwise channels: half-way between 16 and 24, the even multiple of 8 counts
    add([(20, 16, 1, 1, 1), (16, 16, 7, 1, 16), (16, 20, 1, 1, 1)], 1, "projection")
    add([(20, 16, 1, 1, 1), (16, 16, 7, 1, 16), (16, 20, 1, 1, 1)], 1, "identity")
    add([(20, 30, 1, 1, 1)], None, None)
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1))


EVERY_TYPE = (
    "SuperConvK3BNRELU(3,8,1,2)SuperResK3K3(8,12,2,20,2)SuperResK1K5K1(12,12,1,6,2)SuperResIDWE2K3(12,20,2,12,2)"
    "SuperResIDWE1K7(20,20,1,20,1)SuperConvK1BNRELU(20,30,1,1)"
)


@pytest.mark.parametrize("se", [False, True])
@pytest.mark.parametrize("residual", [True, False])
def test_a_network_computes_what_a_hand_written_one_does_with_the_same_weights(se, residual):
    torch.manual_seed(0)
    theirs = plain_network(se, residual).double()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3
            for tensor, low, high in ((module.weight, 0.5, 1.5), (module.bias, -0.2, 0.2),
                                      (module.running_mean, -0.2, 0.2), (module.running_var, 0.5, 1.5)):  # fmt: skip
                nn.init.uniform_(tensor, low, high)
    ours = ZenNet(se=se, residual=residual).build(SearchSpace.from_table({"structure": EVERY_TYPE})).double()
    state, own = theirs.state_dict(), ours.state_dict()
    assert {module.eps for module in ours.modules() if isinstance(module, nn.BatchNorm2d)} == {1e-3}
    assert [tensor.shape for tensor in own.values()] == [tensor.shape for tensor in state.values()]
    ours.load_state_dict(dict(zip(own, state.values(), strict=True)))
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        for training in (True, False):
            torch.testing.assert_close(ours.train(training).features(x)[0], theirs.train(training)(x))


@pytest.mark.parametrize(("channels", "expected"), [
    (4, 8), (3, 8), (12, 16), (20, 16), (28, 32), (36, 32), (88, 88), (89, 88), (93, 96),
])  # fmt: skip
def test_depthwise_channels_are_the_nearest_multiple_of_8_halves_to_even_ones(channels, expected):
    assert nearest_multiple(Constant(channels), 8) == Constant(expected)


def test_a_block_of_idw_projects_where_bottleneck_and_width_differ_and_not_where_they_agree():
    space = SearchSpace.from_table({"bottleneck": [8, 16], "width": [16, 24]})
    stage = SuperBlock("IDW", space["width"], Constant(3), space["bottleneck"], Constant(2), Constant(2))
    model = super_block("IDW", stage, Constant(16))
    shortcuts = [module for module in model.modules() if isinstance(module, Shortcut)]
    blocks = [module for module in model.modules() if isinstance(module, Residual)]
    assert (len(blocks), len(shortcuts)) == (4, 3)  # the first always projects
    for bottleneck, width in ((8, 16), (16, 16), (16, 24)):
        with apply(model, {"bottleneck": bottleneck, "width": width}):
            assert {shortcut.elastic.choice["differs"] for shortcut in shortcuts} == {int(bottleneck != width)}


# -- what every backbone promises -------------------------------------------------------------------------------------


FIXED = {"width": 32, "kernel": 1}


def small(table):
    """A real space with two choices a variable, small ones, so that its supernet is built and trained quickly."""
    few = {"*.kernel": [3, 5], "*.depth": [1, 2], "*.width": [8, 24], "*.bottleneck": [8, 16], "*.expand": [1, 2]}
    space = SearchSpace.from_table({**table, "head": FIXED})
    return space.narrow({key: choices for key, choices in few.items() if any(key[1:] in own for own in space.keys)})


SPARE = {
    "stem": {"width": 8, "kernel": 3, "stride": 2},
    "stages": [
        {"op": "XX", "width": [8, 24], "kernel": 3, "bottleneck": 8, "depth": [1, 2]},
        {"depth": [0, 1, 2], "op": ["BL", "XX"], "width": [16, 24], "kernel": 3, "bottleneck": 8},
        {"depth": [0, 1], "op": "BL", "width": 32, "kernel": 3, "bottleneck": [8, 16]},
    ],
    "head": {"width": 16, "kernel": 1},
}
CASES = {
    "xxbl": (ZenNet(), small(XXBL), (3, 64, 64)),
    "idw": (ZenNet(), small(IDW), (3, 32, 32)),
    "example": (ZenNet(**ZenNet.example["backbone"]), SearchSpace.from_table(TINY), (1, 28, 28)),
    "se": (ZenNet(in_channels=1, se=True, levels=(1, 2)), SearchSpace.from_table({**TINY, "head": FIXED}), (1, 28, 28)),
    "plain": (ZenNet(in_channels=1, residual=False), SearchSpace.from_table({**TINY, "resolution": [20, 28]}),
              (1, 28, 28)),
    "spare": (ZenNet(in_channels=1), SearchSpace.from_table(SPARE), (1, 20, 20)),
    "structure": (ZenNet(), SearchSpace.from_table({"structure": EVERY_TYPE}), (3, 16, 16)),
}  # fmt: skip


@pytest.mark.parametrize("check", backbone_checks)
@pytest.mark.parametrize("case", CASES)
def test_conforms(case, check):
    options, space, image = CASES[case]
    if case == "idw" and check is more_of_a_variable_never_costs_less:
        pytest.skip("where bottleneck and width agree there is no projection, so that a wider one may cost more")
    check(options, space, image=image)


@pytest.mark.parametrize("check", distribution_checks)
def test_the_distribution_conforms(check):
    check("corenas_backbone_zennet")


def test_structures_are_read_and_written_without_torch():
    imports_no_torch("corenas_backbone_zennet.structure")


def test_options_are_a_backbone_under_its_name():
    assert corenas_backbones() == {"zennet": ZenNet}
    assert isinstance(ZenNet(), Backbone)


def test_the_example_is_the_tiny_space():
    assert {*SearchSpace.from_table(ZenNet.example["space"]).variables} == {*SearchSpace.from_table(TINY).variables}


def test_the_readme_shows_a_spec_that_is_right(tmp_path):
    shutil.copytree(SPACES, tmp_path / "space")
    readme = Path(__file__).parents[1] / "README.md"
    (table,) = spec_fragments(readme)
    path = tmp_path / "readme.toml"
    path.write_text(readme.read_text().split("```toml\n")[1].split("```")[0])
    spec, _ = load_spec(path, load_catalogue())
    assert spec.backbone == ZenNet(**{key: value for key, value in table["backbone"].items() if key != "type"})
    assert {*spec.space.variables} == {*SearchSpace.from_table(TINY).variables}


# -- what a user can say ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "value", "named", "says"), [
    ("stages.0.op", "YY", "stages[0].op", "'BL' or 'IDW', found 'YY'"),
    ("stages.0.op", ["XX", "DW"], "stages[0].op", "expected Conv, XX, BL, IDW, found 'DW'"),
    ("stages.0.op", 3, "stages[0].op", "found 3"),
    ("stages.0.op", None, "stages[0].op", "required key is missing"),
    ("stages.0.op", ["XX", "IDW"], "stages[0].expand", "required key is missing: IDW needs it"),
    ("stages.0.bottleneck", None, "stages[0].bottleneck", "required key is missing"),
    ("stages.0.bottleneck", [0, 8], "stages[0].bottleneck", "whole numbers of at least 1, found 0"),
    ("stages.0.width", 7.5, "stages[0].width", "found 7.5"),
    ("stages.0.width", None, "stages[0].width", "required key is missing"),
    ("stages.0.kernel", [3, 4], "stages[0].kernel", "odd whole numbers of at least 1, found 4"),
    ("stages.0.depth", [0, 1], "stages[0].depth", "found 0"),
    ("stages.0.stride", [1, 2], "stages[0].stride", "cannot be searched"),
    ("stages.0.se", True, "stages[0].se", "unknown key"),
    ("stages.1.expand", [1.5, 2], "stages[1].expand", "found 1.5"),
    ("stem", None, "stem", "required key is missing"),
    ("stem.kernel", None, "stem.kernel", "required key is missing"),
    ("head.width", "a", "head.width", "a number or a variable, found 'a'"),
    ("resolution", 0, "resolution", "whole numbers of at least 1"),
    ("structure", STRUCTURES["cifar05M"], "structure", "say something else"),
    ("structure", 3, "structure", "a string"),
    ("tail", 3, "tail", "unknown key"),
])  # fmt: skip
def test_a_space_that_is_none_for_it_is_answered_with_the_key(key, value, named, says):
    with pytest.raises(UserError) as caught:
        ZenNet().build(SearchSpace.from_table(changed(TINY, key, value)))
    faults = [fault for fault in caught.value.faults if fault.dotted == named]
    assert faults, caught.value
    assert says in faults[0].message + (faults[0].hint or "")


@pytest.mark.parametrize(("table", "key"), [
    ({"se": 1}, "se"),
    ({"residual": "no"}, "residual"),
    ({"in_channels": 0}, "in_channels"),
    ({"resize_mode": "area"}, "resize_mode"),
    ({"width_mult": 1}, "width_mult"),
])  # fmt: skip
def test_wrong_options_are_named(table, key):
    with pytest.raises(UserError) as caught:
        structure(table, ZenNet)
    assert [fault.dotted for fault in caught.value.faults] == [key]
