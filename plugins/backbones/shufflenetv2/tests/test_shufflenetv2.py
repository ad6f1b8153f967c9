import functools
import itertools
import math
from pathlib import Path

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
from corenas.testing.backbones import (
    backbone_checks,
    builds_on_the_meta_device_and_costs_the_same_there,
    builds_one_subnet_alone,
    counted,
    draws_its_weights_from_torchs_generator,
    goes_through_state_dict_deepcopy_and_pickle,
    keeps_its_space_through_toml,
)
from corenas.testing.components import changed, spec_fragments
from corenas.testing.distributions import distribution_checks
from corenas_backbone_shufflenetv2 import ShuffleNetV2, corenas_backbones
from corenas_mutable_slices import LinearSlice, MixedOp

IMAGENET = (3, 224, 224)
PLUGIN = Path(__file__).parents[1]
SPACES = PLUGIN.parents[2] / "spec" / "space"
SPOS, CHANNELS, TINY = (
    tomli.loads((SPACES / f"{name}.toml").read_text())
    for name in ("spos-shufflenetv2", "spos-shufflenetv2-channels", "shufflenetv2-tiny")
)
OPS = ("shuffle_3x3", "shuffle_5x5", "shuffle_7x7", "shuffle_xception")
RATIOS = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0)
DEPTHS = (4, 4, 8, 4)


class Network(nn.Module):
    """A backbone with a linear classifier; SPOS's has no bias."""

    def __init__(self, backbone, classes, bias=False):
        super().__init__()
        self.backbone = backbone
        self.head = LinearSlice(backbone.feat_dims[-1], classes, bias)

    def forward(self, x):
        return self.head(self.backbone.features(x)[-1].flatten(1))


def network(table, classes=10, bias=False, **options):
    """The supernet of a space's table, drawn from a seed, and the space."""
    torch.manual_seed(0)
    space = SearchSpace.from_table(table)
    return Network(ShuffleNetV2(**options).build(space), classes, bias), space


def halves(table):
    """The same space with as many channels from the projection as from the layers, as in torchvision and mmrazor."""
    stages = [{**stage, "projection": stage["width"] // 2} for stage in table["stages"]]
    return {**table, "stages": stages}


def blocks(ops, ratios=None):
    """An arch's choices from the operations of its 20 blocks, by their numbers in SPOS's code, and their ratios."""
    own = [{"op": OPS[op]} for op in ops]
    if ratios:
        own = [{"op": block["op"], "ratio": RATIOS[i]} for block, i in zip(own, ratios, strict=True)]
    ends = [*itertools.accumulate(DEPTHS)]
    return {"stages": [{"blocks": own[end - n : end]} for n, end in zip(DEPTHS, ends, strict=True)]}


def without_activations(cost):
    return {name: cost[name] for name in ("flops", "params")}


# -- figures ----------------------------------------------------------------------------------------------------------

PUBLISHED = (2, 1, 0, 1, 2, 0, 2, 0, 2, 0, 2, 3, 0, 0, 0, 0, 3, 2, 3, 3)  # README of SPOS's code: 323M, 3.5M
WITH_CHANNELS = (0, 0, 3, 1, 1, 1, 0, 0, 2, 0, 2, 1, 1, 0, 2, 0, 2, 1, 3, 2)  # the paper's: 328M, 3.4M
ITS_RATIOS = (6, 5, 3, 5, 2, 6, 3, 4, 2, 5, 7, 5, 4, 6, 7, 4, 4, 5, 4, 3)
MMRAZOR = (2, 0, 2, 0, 3, 1, 1, 0, 0, 1, 0, 1, 0, 3, 1, 2, 2, 0, 1, 3)  # SPOS_SUBNET.yaml: 0.33G, 3.35M
DETNAS = (1, 0, 0, 0, 3, 0, 3, 2, 2, 2, 3, 3, 0, 2, 1, 3, 2, 2, 2, 1)  # mmrazor's DETNAS_SUBNET.yaml: 0.34G, 3.35M
DSNAS = (0, 2, 0, 1, 0, 0, 0, 2, 3, 0, 0, 1, 0, 1, 2, 2, 3, 0, 2, 0)  # DSNAS_SUBNET_…_ALIAS.yaml: 0.299G, 3.33M

TABLES = {"spos": SPOS, "channels": CHANNELS, "halves": halves(SPOS)}
FIGURES = {  # table, choices, bias of the classifier, flops, params
    "published": ("spos", blocks(PUBLISHED), False, 322_918_720, 3_558_464),
    "all 3x3": ("spos", blocks([0] * 20), False, 295_842_496, 3_154_880),
    "all 5x5": ("spos", blocks([1] * 20), False, 313_654_976, 3_211_968),
    "all xception": ("spos", blocks([3] * 20), False, 358_825_920, 3_870_816),
    "with channels": ("channels", blocks(WITH_CHANNELS, ITS_RATIOS), False, 327_857_920, 3_432_579),
    "mmrazor": ("halves", blocks(MMRAZOR), True, 316_019_520, 3_353_592),
    "mmrazor, DetNAS": ("halves", blocks(DETNAS), True, 324_919_488, 3_348_600),
    "mmrazor, DSNAS": ("halves", blocks(DSNAS), True, 287_883_328, 3_330_600),
}


@functools.cache
def space_and_cost(table, bias):
    """A space by its name, and the cost of its archs on ImageNet."""
    with torch.device("meta"):
        supernet, space = network(TABLES[table], 1000, bias)
    return space, Cost(supernet, space, torch.empty(1, 3, 224, 224))


@pytest.mark.parametrize(("table", "choices", "bias", "flops", "params"), FIGURES.values(), ids=FIGURES)
def test_figures_of_spos_come_out_to_the_last_digit(table, choices, bias, flops, params):
    full, cost = space_and_cost(table, bias)
    arch, expected = full.arch(choices), {"flops": flops, "params": params}
    assert without_activations(cost.of([arch])[0]) == expected
    space = full.fix(arch)  # the arch alone: its weights are quicker drawn than the supernet's
    model = Network(ShuffleNetV2().build(space), 1000, bias).eval()
    assert counted(export_subnet(model, arch, torch.zeros(1, 3, 32, 32)), IMAGENET) == expected


# Chen et al. 2019, arXiv:1903.10979, networks of DetNAS in megvii-model/ShuffleNet-Series: operations; widths of stem,
# stages, head; flops and params of the reference code, which has biases before the batch norms of stem and head.
SMALL = (16, 64, 160, 320, 640, 1024)
LARGE = "00312102031233202113202221310333 13333333"
DETNAS_ZOO = {
    "COCO_FPN_3.8G": (LARGE, (72, 172, 432, 864, 1728, 1728), 4_085_874_080, 31_444_596),
    "COCO_FPN_1.3G": (LARGE, (48, 96, 240, 480, 960, 1024), 1_318_374_496, 10_426_328),
    "COCO_FPN_300M": ("2120 2112 33130031 3132", SMALL, 321_219_008, 3_533_112),
    "COCO_RetinaNet_300M": ("2311 3213 31113320 3333", SMALL, 324_342_464, 3_725_320),
    "VOC_FPN_300M": ("2103 1303 20113333 3331", SMALL, 349_524_544, 3_651_128),
    "VOC_RetinaNet_300M": ("1300 2333 23333220 2311", SMALL, 360_625_984, 3_479_480),
}


@pytest.mark.parametrize("name", DETNAS_ZOO)
def test_networks_of_detnas_are_tables_of_wider_and_deeper_stages_too(name):
    text, (stem, *widths, head), flops, params = DETNAS_ZOO[name]
    ops = iter([OPS[int(op)] for op in text.replace(" ", "")])
    deeper = 2 if text == LARGE else 1
    stages = [{"width": width, "blocks": [{"op": op} for op in itertools.islice(ops, depth * deeper)]}
              for width, depth in zip(widths, DEPTHS, strict=True)]  # fmt: skip
    with torch.device("meta"):
        model, space = network({"stem": {"width": stem}, "stages": stages, "head": {"width": head}}, 1000, bias=True)
    (cost,) = Cost(model, space, torch.empty(1, 3, 224, 224)).of([space.default()])
    assert without_activations(cost) == {"flops": flops, "params": params - stem - head}


def test_mmrazors_flops_are_ours_and_those_of_batch_norms_activations_and_pooling():
    table, choices, bias, flops, _ = FIGURES["mmrazor"]
    full = SearchSpace.from_table(TABLES[table])
    arch = full.arch(choices)
    model = Network(ShuffleNetV2().build(full.fix(arch)), 1000, bias)
    more = 0

    def count(module, args, output):  # as mmcv's counter does
        nonlocal more
        elements = {nn.BatchNorm2d: 2 * output.numel(), nn.ReLU: output.numel(), nn.AdaptiveAvgPool2d: args[0].numel()}
        more += elements.get(type(module), 0)

    plain = export_subnet(model.eval(), arch, torch.zeros(1, 3, 32, 32)).to("meta")
    for module in plain.children():
        module.register_forward_hook(count)
    plain(torch.empty(1, 3, 224, 224, device="meta"))
    assert f"{(flops + more) / 1e9:.2f}" == "0.33"


def test_an_arch_of_the_space_is_the_network_of_spos_code():
    table = {**SPOS, "stages": [{**stage, "width": stage["width"] // 8} for stage in SPOS["stages"]]}
    table["stem"], table["head"] = {"width": 4}, {"width": 24}
    model, space = network(table, classes=7)
    model.double()
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    for ops, training in itertools.product((PUBLISHED, [3] * 20), (False, True)):
        arch = space.arch(blocks(ops))
        plain = export_subnet(model.train(training), arch, x[:1])
        theirs = Reference(4, [8, 20, 40, 80], 24, ops, [1.0] * 20, classes=7).double()
        loaded_in_order(theirs.train(training), plain)
        with apply(model, arch):
            torch.testing.assert_close(model(x), theirs(x), rtol=1e-10, atol=1e-10)


def test_an_arch_of_the_channel_search_is_the_network_of_spos_code_too():
    model, space = network(CHANNELS, 5)
    arch = space.arch(blocks(WITH_CHANNELS, ITS_RATIOS))
    x = torch.randn(2, 3, 64, 64)
    theirs = Reference(16, [64, 160, 320, 640], 1024, WITH_CHANNELS, [RATIOS[i] for i in ITS_RATIOS], classes=5)
    loaded_in_order(theirs.eval(), export_subnet(model.eval(), arch, x[:1]))
    with torch.no_grad(), apply(model, arch):
        torch.testing.assert_close(model(x), theirs(x), rtol=1e-4, atol=1e-5)


class Reference(nn.Module):
    """SPOS's network of one arch as its code describes it, written out: stem, blocks, 1x1 convolution, classifier."""

    def __init__(self, stem, widths, head, ops, scales, classes):
        super().__init__()
        self.stem = nn.Sequential(*conv(3, stem, 3, 2), nn.ReLU())
        self.blocks = nn.ModuleList()
        inputs, choices = stem, iter(zip(ops, scales, strict=True))
        for width, depth in zip(widths, DEPTHS, strict=True):
            for i in range(depth):
                op, scale = next(choices)
                n, stride = (inputs, 2) if i == 0 else (inputs // 2, 1)
                self.blocks.append(ReferenceBlock(op, n, width - n, int(width // 2 * scale), stride))
                inputs = width
        self.last = nn.Sequential(*conv(inputs, head, 1), nn.ReLU())
        self.classifier = nn.Linear(head, classes, bias=False)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.classifier(self.last(x).mean((2, 3)))


class ReferenceBlock(nn.Module):
    def __init__(self, op, inputs, outputs, mid, stride):
        super().__init__()
        k = (3, 5, 7, 3)[op]
        if stride == 2:
            self.proj = nn.Sequential(*conv(inputs, inputs, k, 2, inputs), *conv(inputs, inputs, 1), nn.ReLU())
        first = conv(inputs, mid, 1), nn.ReLU(), conv(mid, mid, k, stride, mid), conv(mid, outputs, 1), nn.ReLU()
        xception = (
            conv(inputs, inputs, 3, stride, inputs), conv(inputs, mid, 1), nn.ReLU(),
            conv(mid, mid, 3, 1, mid), conv(mid, mid, 1), nn.ReLU(),
            conv(mid, mid, 3, 1, mid), conv(mid, outputs, 1), nn.ReLU(),
        )  # fmt: skip
        self.main = nn.Sequential(*(nn.Sequential(*part) if isinstance(part, tuple) else part
                                    for part in (xception if op == 3 else first)))  # fmt: skip

    def forward(self, x):
        if hasattr(self, "proj"):
            return torch.cat((self.proj(x), self.main(x)), 1)
        n, c, h, w = x.shape
        passing, x = x.reshape(n, c // 2, 2, h, w).permute(2, 0, 1, 3, 4)  # shuffled: even channels, then odd ones
        return torch.cat((passing, self.main(x)), 1)


def conv(inputs, outputs, kernel, stride=1, groups=1):
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(outputs)


def loaded_in_order(theirs, ours):
    """Loads the state of an exported network into another whose layers come in the same order."""
    own, new = theirs.state_dict(), ours.state_dict()
    theirs.load_state_dict(dict(zip(own, new.values(), strict=True)))


@pytest.mark.parametrize(("table", "size"), [(SPOS, 4**20), (CHANNELS, 4**20 * 10**20)], ids=["spos", "channels"])
def test_spaces_have_as_many_networks_as_in_the_paper(table, size):
    assert SearchSpace.from_table(table).size == size


# -- ShuffleNetV2, by its authors and in torchvision ------------------------------------------------------------------


def shufflenet_v2(stem, widths, head, **stage):
    """One size of ShuffleNetV2 as a space of fixed numbers."""
    stages = [{"width": width, "op": "shuffle_3x3", "depth": depth, **stage}
              for width, depth in zip(widths, (4, 8, 4), strict=True)]  # fmt: skip
    return {"stem": {"width": stem, "pool": True}, "stages": stages, "head": {"width": head}}


WIDTHS = {
    "x0_5": ((48, 96, 192), 1024),
    "x1_0": ((116, 232, 464), 1024),
    "x1_5": ((176, 352, 704), 1024),
    "x2_0": ((244, 488, 976), 2048),
}


@pytest.mark.parametrize(("size", "flops", "params", "mflops", "mparams"), [
    ("x0_5", 40_476_448, 1_365_792, 41, 1.4),
    ("x1_0", 145_814_296, 2_278_760, 146, 2.3),
    ("x1_5", 298_970_656, 3_506_720, 299, 3.5),
    ("x2_0", 590_783_000, 7_402_600, 591, 7.4),
])  # fmt: skip
def test_shufflenetv2_as_its_authors_published_it_is_a_table(size, flops, params, mflops, mparams):
    assert (math.ceil(flops / 1e6), round(params / 1e6, 1)) == (mflops, mparams)  # README of its code; flops rounded up
    with torch.device("meta"):
        model, space = network(shufflenet_v2(24, *WIDTHS[size]), 1000)
    cost = Cost(model, space, torch.empty(1, 3, 224, 224)).of([space.default()])[0]
    assert without_activations(cost) == {"flops": flops, "params": params}


@pytest.mark.parametrize("size", WIDTHS)
def test_torchvisions_shufflenetv2_is_a_table(size):
    models = pytest.importorskip("torchvision.models")
    widths, head = WIDTHS[size]
    with torch.device("meta"):
        model, space = network(halves(shufflenet_v2(24, widths, head)), 1000, bias=True)
        expected = counted(getattr(models, f"shufflenet_v2_{size}")(), IMAGENET)
    assert without_activations(Cost(model, space, torch.empty(1, 3, 224, 224)).of([space.default()])[0]) == expected
    if size == "x1_0":
        assert expected == {"flops": 144_907_992, "params": 2_278_604}
        real, _ = network(halves(shufflenet_v2(24, widths, head)), 1000, bias=True)
        assert counted(export_subnet(real.eval(), space.default(), torch.zeros(1, 3, 64, 64)), IMAGENET) == expected


@pytest.mark.parametrize("size", ["x0_5", "x1_0"])
def test_it_computes_what_torchvision_computes_with_the_same_weights_in_another_order(size):
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(1)
    theirs = getattr(models, f"shufflenet_v2_{size}")(num_classes=9).double().eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in ((module.weight.data, 0.8, 1.2), (module.bias.data, -0.2, 0.2),
                                      (module.running_mean, -0.1, 0.1), (module.running_var, 0.5, 1.5)):  # fmt: skip
                tensor.uniform_(low, high)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = theirs(x)
        widths, head = WIDTHS[size]
        model, space = network(halves(shufflenet_v2(24, widths, head)), 9, bias=True)
        loaded_in_order(model.double().eval(), reordered(theirs))
        found = model(x)
        assert expected.std() > 1e-3
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
        assert export_subnet(model, space.default(), x)(x).shape == expected.shape


def reordered(theirs):
    """torchvision's network with its channels in the order in which ours splits them.

    There x = shuffled(cat(x[:half], f(x[half:]))), here x = cat(x[even], f(x[odd])). A channel that one block gives
    passes a number of blocks before one takes it in; both ways let equally many channels of a block pass equally
    often. So each block gives its channels in such an order that every one meets the block that it meets there.
    """
    order = torch.arange(theirs.conv1[0].out_channels)
    for stage in (theirs.stage2, theirs.stage3, theirs.stage4):
        half = stage[0].branch2[-2].num_features
        both = [taken_in(len(stage), half, theirs=way) for way in (True, False)]
        ages = [torch.cat([torch.full_like(names, i) for i, names in enumerate(way)])[torch.cat(way).argsort()]
                for way in both]  # fmt: skip
        there, here = (age.view(-1, half).sort(dim=1, stable=True) for age in ages)
        assert torch.equal(there.values, here.values)
        outputs = torch.empty_like(there.indices).scatter_(1, here.indices, there.indices)
        names_there = (outputs + torch.arange(len(outputs))[:, None] * half).flatten()
        inputs = [order, *(t.argsort()[names_there[h].argsort().argsort()] for t, h in zip(*both, strict=True))]
        takes_in(stage[0].branch1, order)
        for block, own in zip(stage, inputs, strict=False):
            takes_in(block.branch2, own)
        for branch, own in zip([stage[0].branch1, *(block.branch2 for block in stage)], outputs, strict=True):
            picks(own, branch[-3], branch[-2])
        order = inputs[-1]
    takes_in(theirs.conv5, order)
    return theirs


def taken_in(depth, half, theirs):
    """The channels that each block after a stage's first takes in, and last what the stage gives, in order.

    Channels are numbered as they are made: by the projection, by the first block's layers, by the second's, …
    """
    made = torch.arange((depth + 1) * half).view(-1, half)
    state, taken = None, []
    for i, new in enumerate(made[1:]):
        passing, other = (made[0], None) if i == 0 else state.chunk(2) if theirs else (state[::2], state[1::2])
        taken.append(other)
        state = torch.stack((passing, new), 1).flatten() if theirs else torch.cat((passing, new))
    return [*taken[1:], state]


def picks(order, *layers):
    """Permutes what a convolution and its batch norm give."""
    for layer in layers:
        for tensor in (layer.weight, getattr(layer, "running_mean", None), getattr(layer, "running_var", None)):
            if tensor is not None:
                tensor.data = tensor.data[order]
        if layer.bias is not None:
            layer.bias.data = layer.bias.data[order]


def takes_in(branch, order):
    """Permutes the inputs of a branch: of a 1x1 convolution, or of a depthwise one, its norm and the 1x1 after them."""
    first = branch[0]
    if first.groups > 1:
        picks(order, *branch[:2])
        first = branch[2]
    first.weight.data = first.weight.data[:, order]


# -- the channel search -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "half"), [*enumerate([32, 80, 160, 320])])
def test_inner_channels_are_cut_off_and_the_first_of_the_widest(stage, half):
    with torch.device("meta"):
        model, space = network(CHANNELS)
    block = model.backbone.stages[stage].blocks[1]
    for ratio in RATIOS:
        apply(block, {**space.default(), f"stages.{stage}.blocks.1.ratio": ratio})
        inner, outer = (int(half * ratio), 2 * half), (half, half)  # `int` as in SPOS's code
        widths = [inner, inner, outer], [outer, *[inner] * 4, outer]
        for op, candidate in block.layers.candidates.items():
            convs = [layer.conv for layer in candidate]
            for conv, (active, widest) in zip(convs, widths[op == "shuffle_xception"], strict=True):
                assert (conv.active()[0].shape[0], conv.weight.shape[0]) == (active, widest)


def test_the_first_channels_of_the_widest_weight_are_exported():
    model, space = network(TINY, in_channels=1)
    arch = space.smallest()
    plain = export_subnet(model.eval(), arch, torch.zeros(1, 1, 28, 28))
    name = "stages.1.blocks.1.layers.candidates.shuffle_3x3.0.conv"
    whole = model.backbone.get_submodule(name).weight
    part = plain.get_parameter(name.replace(".", "_") + ".weight")
    assert (whole.shape[:2], part.shape[:2]) == ((36, 24), (24, 24))
    assert torch.equal(part, whole[:24])


# -- blocks -----------------------------------------------------------------------------------------------------------


def test_a_weighted_sum_of_choices_leaves_the_channels_that_pass_as_they_are():
    model, space = network(SPOS, in_channels=1)
    block = model.backbone.stages[1].blocks[2].eval()
    x = torch.randn(2, 160, 5, 5)
    weights = torch.tensor([0.1, 0.2, 0.3, 0.7])
    with torch.no_grad():
        apply(block, {**space.default(), "stages.1.blocks.2.op": weights})
        summed = block(x)
        parts = []
        for op in OPS:
            apply(block, {**space.default(), "stages.1.blocks.2.op": op})
            parts.append(block(x)[:, 80:])
    assert torch.equal(summed[:, :80], x[:, ::2])
    expected = sum(w * part for w, part in zip(weights, parts, strict=True))
    torch.testing.assert_close(summed[:, 80:], expected)


def test_a_block_projects_where_the_shape_changes_and_splits_elsewhere():
    table = {
        "stem": {"width": 8, "stride": 1},
        "stages": [
            {"width": 8, "op": "shuffle_3x3", "stride": 1},
            {"width": 12, "op": "shuffle_5x5", "stride": 1},
            {"width": 24, "op": "shuffle_xception", "depth": 2, "projection": 4},
        ],
        "head": {"width": 16},
    }
    model, space = network(table, in_channels=1)
    found = [hasattr(block, "projection") for stage in model.backbone.stages for block in stage.blocks]
    assert found == [False, True, True, False]
    first, second = model.backbone.stages[1].blocks[0], model.backbone.stages[2].blocks[0]
    x = torch.randn(2, 8, 7, 7)
    assert (first.projection(x).shape[1], first.layers(x).shape[1]) == (8, 4)
    x = first(x)
    assert x.shape == (2, 12, 7, 7)
    assert (second.projection(x).shape[1], second.layers(x).shape[1]) == (4, 20)
    assert second(x).shape == (2, 24, 4, 4)
    assert export_subnet(model.eval(), space.default(), torch.zeros(1, 1, 9, 9))(torch.zeros(3, 1, 9, 9)).shape == (
        3,
        10,
    )


def test_a_block_keeps_channels_last():
    model, space = network(TINY, in_channels=1)
    x = torch.randn(3, 48, 6, 6).to(memory_format=torch.channels_last)
    with torch.no_grad(), apply(model.eval(), space.default()):
        assert model.backbone.stages[1].blocks[1](x).is_contiguous(memory_format=torch.channels_last)


def test_batch_norms_have_no_weights_where_the_options_say_so():
    plain, nets = {}, {}
    for affine in (True, False):
        model, space = network(TINY, in_channels=1, norm_affine=affine)
        nets[affine] = Cost(model, space, torch.zeros(1, 1, 28, 28)).of([space.default()])[0]
        plain[affine] = export_subnet(model.eval(), space.default(), torch.zeros(1, 1, 28, 28))
        assert counted(plain[affine], (1, 28, 28)) == without_activations(nets[affine])
    norms = [m for m in plain[False].modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(m.weight is None and m.bias is None and not m.affine for m in norms)
    assert nets[True]["flops"] == nets[False]["flops"]
    assert nets[True]["params"] - nets[False]["params"] == 2 * sum(m.num_features for m in norms)


def test_weights_are_drawn_as_in_spos_code():
    model, _ = network(SPOS)
    for name, module in model.backbone.named_modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 1000:
            wanted = 0.01 if name == "stem.conv" else 1 / module.weight.shape[1]
            assert float(module.weight.detach().std()) == pytest.approx(wanted, rel=0.15), name
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert torch.allclose(module.bias, torch.tensor(1e-4))


def test_each_choice_has_weights_of_its_own():
    model, _ = network(SPOS)
    mixed = [m for m in model.modules() if isinstance(m, MixedOp)]
    assert len(mixed) == 24  # of each stage's first block the projection too
    assert {tuple(m.candidates) for m in mixed} == {OPS}


# -- what a user can say ----------------------------------------------------------------------------------------------


def some(table, free):
    """A space of which only some variables are searched, for checks that would take long on 80 candidates."""
    space = SearchSpace.from_table(table)
    return space.fix({key: choice for key, choice in space.default().items() if not key.startswith(free)})


EXAMPLE = ShuffleNetV2.example
CASES = {
    "example": (structure(EXAMPLE["backbone"], ShuffleNetV2), SearchSpace.from_table(EXAMPLE["space"]), (1, 28, 28)),
    "spos": (ShuffleNetV2(norm_affine=False), some(CHANNELS, ("stages.0.blocks", "stages.1.blocks.1")), (3, 32, 32)),
    "levels and resolution": (
        ShuffleNetV2(in_channels=1, levels=(1, 2), resize_mode="nearest"),
        SearchSpace.from_table(changed({**TINY, "resolution": [24, 32]}, "head.width", 8)),
        (1, 28, 28),
    ),
}  # fmt: skip


OF_ANY_SPACE = (
    builds_one_subnet_alone,
    builds_on_the_meta_device_and_costs_the_same_there,
    goes_through_state_dict_deepcopy_and_pickle,
    draws_its_weights_from_torchs_generator,
    keeps_its_space_through_toml,
)
"""Checks that small spaces pass for large ones."""


@pytest.mark.parametrize("check", backbone_checks)
@pytest.mark.parametrize("case", ["example", "levels and resolution"])
def test_conforms(case, check):
    options, space, image = CASES[case]
    check(options, space, image=image)


@pytest.mark.parametrize("check", [check for check in backbone_checks if check not in OF_ANY_SPACE])
def test_conforms_on_the_space_of_spos(check):
    options, space, image = CASES["spos"]
    check(options, space, image=image)


@pytest.mark.parametrize("check", distribution_checks)
def test_the_distribution_conforms(check):
    check("corenas_backbone_shufflenetv2")


def test_options_are_a_backbone_under_its_name():
    assert corenas_backbones() == {"shufflenetv2": ShuffleNetV2}
    assert isinstance(ShuffleNetV2(), Backbone)


@pytest.mark.parametrize("table", [SPOS, CHANNELS, TINY], ids=["spos", "channels", "tiny"])
def test_every_variable_of_the_spaces_is_used(table):
    with torch.device("meta"):
        model, space = network(table)
    assert keys_used(model) == {*space.keys}


def test_the_example_is_the_space_for_small_images():
    assert SearchSpace.from_table(EXAMPLE["space"]).variables == SearchSpace.from_table(TINY).variables


def test_random_archs_of_spos_cost_what_their_networks_cost():
    model, space = network(CHANNELS)
    cost = Cost(model, space, torch.zeros(1, 3, 32, 32))
    archs = space.decode(space.draw(np.random.default_rng(0), 3))
    for arch, own in zip(archs, cost.of(archs), strict=True):
        plain = export_subnet(model.eval(), arch, torch.zeros(1, 3, 32, 32))
        assert counted(plain, (3, 32, 32)) == without_activations(own)


def test_the_small_space_trains():
    model, space = network(TINY, in_channels=1)
    x, y = torch.randn(32, 1, 28, 28, generator=torch.Generator().manual_seed(3)), torch.arange(32) % 10
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(10):
        with apply(model.train(), space.default()):
            loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3


def test_the_readme_shows_a_spec_that_is_right(tmp_path):
    (fragment,) = spec_fragments(PLUGIN / "README.md")
    assert fragment["backbone"]["type"] == "shufflenetv2"
    text = (PLUGIN / "README.md").read_text().split("```toml\n")[1].split("```")[0]
    (tmp_path / "spec.toml").write_text(text)
    (tmp_path / "space").symlink_to(SPACES)
    spec, _ = load_spec(tmp_path / "spec.toml", load_catalogue())
    assert keys_used(spec.backbone.build(spec.space)) == {*spec.space.keys}


@pytest.mark.parametrize(("key", "value", "named", "says"), [
    ("stages.0.block.op", "shuffle", "stages[0].blocks[0].op", "shuffle_3x3"),
    ("stages.0.block.op", ["shuffle_3x3", "skip"], "stages[0].blocks[0].op", "found 'skip'"),
    ("stages.0.block.op", 3, "stages[0].blocks[0].op", "found 3"),
    ("stages.0.block.op", None, "stages[0]", "neither the stage nor each of its blocks has 'op'"),
    ("stages.0.block.ratio", 0, "stages[0].blocks[0].ratio", "numbers above 0, found 0"),
    ("stages.0.block.ratio", [0.01, 1], "stages[0].ratio", "0.01 of 12 channels is less than one"),
    ("stages.0.block.ratio", "wide", "stages[0].blocks[0].ratio", "found 'wide'"),
    ("stages.0.block.kernel", 3, "stages[0].blocks[0].kernel", "unknown key"),
    ("stages.0.width", 25, "stages[0].width", "an even number"),
    ("stages.0.width", 0, "stages[0].width", "an even number"),
    ("stages.0.width", [16, 24], "stages[0].width", "cannot be searched"),
    ("stages.0.depth", [0, 1], "stages[0].depth", "found 0"),
    ("stages.0.stride", 0, "stages[0].stride", ">= 1"),
    ("stages.0.projection", 24, "stages[0]", "none of 24 is left"),
    ("stages.0.width", 8, "stages[0]", "8 channels are projected, none of 8 is left"),
    ("stages", None, "stages", "required key is missing"),
    ("stem.width", 0, "stem.width", ">= 1"),
    ("stem.pool", 1, "stem.pool", "true or false"),
    ("head.width", 0, "head.width", "whole numbers of at least 1"),
    ("tail", 3, "tail", "unknown key"),
])  # fmt: skip
def test_a_space_that_is_none_for_it_is_answered_with_the_key(key, value, named, says):
    with pytest.raises(UserError) as caught:
        ShuffleNetV2().build(SearchSpace.from_table(changed(TINY, key, value)))
    faults = [fault for fault in caught.value.faults if fault.dotted == named]
    assert faults, caught.value
    assert says in faults[0].message + (faults[0].hint or "")
