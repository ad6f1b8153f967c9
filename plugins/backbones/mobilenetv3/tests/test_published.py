"""Spaces and networks of the papers: their figures to the last digit, and what they compute."""

import copy
import functools
import itertools
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import tomli
import torch
import torch.nn.functional as F
from torch import nn

from corenas.cost import Cost
from corenas.errors import UserError
from corenas.export import export_subnet
from corenas.mutable import apply
from corenas.space import SearchSpace
from corenas.supernet import build_supernet
from corenas.testing.backbones import (
    backbone_checks,
    costs_what_its_exported_networks_cost,
    counted,
    has_no_weight_that_no_arch_uses,
    more_of_a_variable_never_costs_less,
    trains_exactly_what_an_arch_uses,
    uses_the_variables_of_its_space_and_no_others,
)
from corenas_backbone_mobilenetv3 import MobileNetV3
from corenas_backbone_mobilenetv3.model import Pooled
from corenas_backbone_mobilenetv3.weights import recognise, torchvision_names
from corenas_mutable_slices import LinearSlice, MixedOp, Residual
from corenas_mutable_slices.exchange import load, load_pretrained, published

SPACES = Path(__file__).parents[4] / "spec" / "space"


class Network(nn.Module):
    """A backbone with a linear classifier, as a task builds it."""

    def __init__(self, backbone, classes):
        super().__init__()
        self.backbone = backbone
        self.head = LinearSlice(backbone.feat_dims[-1], classes)

    def forward(self, x):
        return self.head(self.backbone.features(x)[-1].flatten(1))


def table_of(name, **changes):
    return {**tomli.loads((SPACES / f"{name}.toml").read_text()), **changes}


@functools.cache
def supernet(name, classes=1000, **options):
    """The supernet of a space file and the space."""
    return network(table_of(name), classes, **options)


def network(table, classes=1000, **options):
    torch.manual_seed(0)
    space = SearchSpace.from_table(table)
    return Network(MobileNetV3(**options).build(space), classes).eval(), space


@functools.lru_cache(1)  # the cases of a test follow each other
def costs(model, space, resolution):
    return Cost(model, space, torch.zeros(1, 3, resolution, resolution))


def cost(model, space, arch, resolution=224):
    found = costs(model, space, resolution).of([arch])[0]
    return {name: found[name] for name in ("flops", "params")}


def figures(model, space, arch, resolution=224):
    """flops and params, by the core, and counted on the exported network."""
    found = cost(model, space, arch, resolution)
    plain = export_subnet(model, arch, torch.zeros(1, 3, 32, 32))
    assert counted(plain, (3, resolution, resolution)) == found
    return found["params"], found["flops"]


# -- networks without a choice ----------------------------------------------------------------------------------------

FIXED = [  # params and flops of torchvision's networks, at 224
    ("mobilenetv3-large", 5_483_032, 216_589_760),
    ("mobilenetv3-small", 2_542_856, 56_510_400),
    ("mobilenetv2", 3_504_872, 300_774_272),
    ("mnasnet", 4_383_312, 314_415_872),
    ("efficientnet-b0", 5_288_548, 385_814_752),
]


@pytest.mark.parametrize(("name", "params", "flops"), FIXED)
def test_networks_of_the_family_are_spaces_of_fixed_numbers(name, params, flops):
    model, space = supernet(name)
    assert (space.size, space.keys) == (1, ())
    assert figures(model, space, space.default()) == (params, flops)


def test_once_for_alls_mobilenetv3_large_has_no_bias_after_pooling():
    table = table_of("mobilenetv3-large")
    del table["head"]["bias"]
    model, space = network(table)
    assert figures(model, space, space.default()) == (5_481_752, 216_589_760)


def unlike(net):
    """In evaluation, with batch norms and biases none of which is like another."""
    torch.manual_seed(1)
    for name, tensor in net.state_dict().items():
        if tensor.dim() == 1:
            tensor.uniform_(0.5, 1.5) if name.endswith(("var", "weight")) else tensor.uniform_(-0.2, 0.2)
    return net.double().eval()


@pytest.mark.parametrize(("file", "name", "family"), [
    ("mobilenetv3-large", "mobilenet_v3_large", "mobilenet_v3"),
    ("mobilenetv3-small", "mobilenet_v3_small", "mobilenet_v3"),
    ("mobilenetv2", "mobilenet_v2", "mobilenet_v2"),
    ("efficientnet-b0", "efficientnet_b0", "efficientnet"),
])  # fmt: skip
def test_weights_move_from_and_to_torchvision(file, name, family):
    make = getattr(pytest.importorskip("torchvision.models"), name)
    theirs, again = unlike(make()), make().double().eval()
    model, space = network(table_of(file))
    model, arch, x = model.double(), space.default(), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    rename = torchvision_names(model, arch, family)
    load(model, arch, theirs.state_dict(), rename)
    plain = export_subnet(model, arch, x[:1])
    again.load_state_dict(published(plain, rename))
    with torch.no_grad():
        expected = theirs(x)
        for net in (model, plain, again):
            torch.testing.assert_close(net(x), expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


def test_a_spec_may_begin_with_torchvisions_weights(tmp_path):
    theirs = pytest.importorskip("torchvision.models").mobilenet_v3_small().eval()
    torch.save({"model": theirs.state_dict()}, tmp_path / "small.pt")
    theirs.classifier = theirs.classifier[:2]
    options = MobileNetV3(weights=str(tmp_path / "small.pt"))
    space, x = SearchSpace.from_table(table_of("mobilenetv3-small")), torch.randn(2, 3, 64, 64)
    ours = build_supernet(options, space, SimpleNamespace(head=lambda dims: nn.Flatten(), example=x[:1])).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours.backbone(x)[0], theirs(x), rtol=1e-4, atol=1e-4)


def test_a_wider_space_is_told_by_torchvisions_weights_where_it_begins(tmp_path):
    theirs = unlike(pytest.importorskip("torchvision.models").mobilenet_v3_small())
    torch.save(theirs.state_dict(), tmp_path / "small.pt")
    theirs.classifier = theirs.classifier[:2]
    begins_with(tmp_path / "small.pt", wider("mobilenetv3-small"), theirs)


def wider(name):
    """A space that has a published network and, of all its kernels, depths and expansions, others too."""
    table = table_of(name)
    for stage in table["stages"][1:]:
        blocks = stage.get("blocks", [stage])
        reach = stage.get("depth", len(blocks))
        expand = sorted({*(block["expand"] for block in blocks), 2})
        kernel = sorted({stage.pop("kernel"), 3})
        for key in ("blocks", "expand"):
            stage.pop(key, None)
        stage |= {"depth": [*range(1, reach + 2)], "block": {"kernel": kernel, "expand": expand}}
    return table


def begins_with(file, table, theirs, **options):
    """Double precision, but for what has gone through a file of floats."""
    space, x = SearchSpace.from_table(table), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    ours = MobileNetV3(**options).build(space).double().eval()
    recognised = functools.partial(recognise, ours)
    arch, _ = load_pretrained(ours, space, str(file), recognised, ["classifier.3."])
    with torch.device("meta"):
        empty = MobileNetV3(**options).build(space)
    looked_at, _ = load_pretrained(empty, space, str(file), recognised, ["classifier.3."])  # as `corenas check` does
    assert looked_at == arch
    with torch.no_grad(), apply(ours, arch):
        expected = theirs(x)
        torch.testing.assert_close(ours(x)[0], expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
    return arch


@pytest.mark.parametrize(("file", "name", "options"), [
    ("mobilenetv3-small", "mobilenetv3_small_100", {"norm_eps": 1e-5}),
    ("mobilenetv2", "mobilenetv2_100", {}),
    ("efficientnet-b0", "efficientnet_b0", {}),
])  # fmt: skip
def test_timms_weights_are_a_point_of_a_wider_space(tmp_path, file, name, options):
    theirs = unlike(pytest.importorskip("timm").create_model(name, num_classes=0))
    torch.save(theirs.state_dict(), tmp_path / "w.pt")
    begins_with(tmp_path / "w.pt", wider(file), theirs, **options)


def test_operations_by_name_take_the_weights_of_the_one_that_a_network_has(tmp_path):
    theirs, table = (
        unlike(pytest.importorskip("timm").create_model("mobilenetv2_100", num_classes=0)),
        table_of("mobilenetv2"),
    )
    torch.save(theirs.state_dict(), tmp_path / "w.pt")
    for stage in table["stages"][1:]:
        depth, _, _ = stage.pop("depth", 1), stage.pop("kernel"), stage.pop("expand")
        stage |= {"depth": depth, "block": {"op": ["k5e6", "k3e3", "k3e6"]}}
    arch = begins_with(tmp_path / "w.pt", table, theirs)
    assert {*arch.values()} == {"k3e6"}


@pytest.mark.parametrize(("name", "change", "says"), [
    ("mobilenetv3_small_100", lambda table: None, r"norm has eps = 0.001, in that network 1e-05"),
    ("mobilenetv2_100", lambda table: table["stages"][2].update(act="h_swish"), r"act is Hardswish, in .* ReLU6"),
    ("mobilenetv2_100", lambda table: table["stages"][3].update(kernel=[5, 7]), r"kernel of .* is never 3"),
    ("mobilenetv2_100", lambda table: table["stages"][3].update(stride=1), r"stride = \(1, 1\), in that network"),
    ("mobilenetv2_075", lambda table: table["stem"].update(width=[32, 40]), r"a space of one network takes"),
])  # fmt: skip
def test_weights_that_would_compute_something_else_are_refused_with_the_reason(tmp_path, name, change, says):
    torch.save(pytest.importorskip("timm").create_model(name).state_dict(), tmp_path / "w.pt")
    table = table_of("mobilenetv3-small" if "v3" in name else "mobilenetv2")
    change(table)
    task = SimpleNamespace(head=lambda dims: nn.Flatten(), example=torch.zeros(1, 3, 32, 32))
    with pytest.raises(UserError, match="has the weights of") as caught:
        build_supernet(MobileNetV3(weights=str(tmp_path / "w.pt")), SearchSpace.from_table(table), task)
    (fault,) = caught.value.faults
    assert fault.dotted == "backbone.weights"
    assert re.search(says, fault.hint), fault.hint
    backbone = MobileNetV3(weights=str(tmp_path / "w.pt"))
    with torch.device("meta"):
        empty = build_supernet(backbone, SearchSpace.from_table(table), task)
    with pytest.raises(UserError) as on_meta:
        backbone.load(empty, SearchSpace.from_table(table))
    assert on_meta.value.faults == caught.value.faults


def test_torchvisions_large_network_is_a_point_of_a_wider_space():
    models = pytest.importorskip("torchvision.models")
    theirs, table = unlike(models.mobilenet_v3_large()), table_of("mobilenetv3-large", resolution=[32, 64])
    for stage in table["stages"][1:]:
        stage["depth"] = [1, stage.get("depth", len(stage.get("blocks", [])))]
        stage["kernel"] = [3, 5, 7]
    wider, space = network(table)
    choices = {f"stages.{i}.kernel": kernel for i, kernel in enumerate((3, 5, 3, 3, 5), 1)}
    arch, x = space.arch({"resolution": 64, **choices}), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    wider.double()
    load(wider, arch, theirs.state_dict(), torchvision_names(wider, arch))
    with torch.no_grad(), apply(wider, arch):
        torch.testing.assert_close(wider(x), theirs(x), rtol=1e-9, atol=1e-9)


def test_mnasnet_computes_what_torchvisions_computes():
    theirs = unlike(pytest.importorskip("torchvision.models").mnasnet1_0())
    model, space = network(table_of("mnasnet"))
    agree(model.double(), space.default(), theirs, torch.randn(2, 3, 64, 64, dtype=torch.float64))


def agree(model, arch, theirs, x):
    """With a plain network's weights, layer by layer, the subnet computes what it computes."""
    names = export_subnet(model, arch, x[:1]).state_dict()
    rename = dict(zip(names, theirs.state_dict(), strict=True)).__getitem__
    load(model, arch, theirs.state_dict(), rename)
    with torch.no_grad(), apply(model, arch):
        torch.testing.assert_close(model(x), theirs(x), rtol=1e-9, atol=1e-9)


# -- Once-for-All -----------------------------------------------------------------------------------------------------


def blocks(**stages):
    """Choices from "kernel and expansion of each block": s1="33 54" are two blocks, k3 e3 and k5 e4."""
    rows = {int(name[1:]): text.split() for name, text in stages.items()}
    return {f"stages.{i}.depth": len(row) for i, row in rows.items()} | {
        f"stages.{i}.blocks.{j}.{name}": int(digit)
        for i, row in rows.items() for j, pair in enumerate(row)
        for name, digit in zip(("kernel", "expand"), pair, strict=True)
    }  # fmt: skip


def test_note8_at_31_ms_is_a_network_of_the_space():
    model, space = supernet("ofa-mobilenetv3")
    choices = blocks(s1="53 33", s2="54 53", s3="34 34 54", s4="34 53 74", s5="36 33 53 53")
    params, flops = figures(model, space, space.arch({"resolution": 152, **choices}))
    assert (round(params / 1e6, 1), round(flops / 1e6)) == (4.6, 101)  # as published


def proxyless(space, resolution, last, **stages):
    return space.arch({"resolution": resolution, **blocks(**stages),
                       "stages.6.kernel": int(last[0]), "stages.6.expand": int(last[1])})  # fmt: skip


V100_11MS = {"s1": "33 33", "s2": "56 53", "s3": "73 33 74", "s4": "74 54 33 74", "s5": "36 56 54 36", "last": "34"}
V100_BLOCKS = ("(3,72,32,2)(3,96,32,1)(5,192,56,2)(5,168,56,1)(7,168,104,2)(3,312,104,1)(7,416,104,1)(7,416,128,1)"
               "(5,512,128,1)(3,384,128,1)(7,512,128,1)(3,768,248,2)(5,1488,248,1)(5,992,248,1)(3,1488,248,1)"
               "(3,992,416,1)")  # fmt: skip


def rows_of(text):
    """Rows of numbers in round brackets."""
    return [tuple(map(int, row.split(","))) for row in re.findall(r"\(([^)]*)\)", text)]


def test_a_specialised_network_of_once_for_alls_proxyless_space_comes_out_to_the_last_digit():
    model, space = supernet("ofa-proxyless", width_mult=1.3)
    assert figures(model, space, proxyless(space, 192, **V100_11MS)) == (6_195_512, 351_764_864)


def test_once_for_alls_proxyless_network_computes_what_a_plain_one_computes():
    model, space = network(table_of("ofa-proxyless", resolution=[40, 48]), 10, width_mult=1.3)
    rows = [Row(k, mid, out, stride) for k, mid, out, stride in [(3, 40, 24, 1), *rows_of(V100_BLOCKS)]]
    theirs = Plain(40, rows, [1664], act=nn.ReLU6, eps=1e-3)
    agree(model.double(), proxyless(space, 40, **V100_11MS), unlike(theirs), torch.randn(2, 3, 40, 40).double())


def test_the_first_block_of_the_proxyless_space_never_has_a_shortcut():
    model, _ = network(table_of("ofa-proxyless"), 10, width_mult=0.25)  # both widths are 8
    first, second = (stage.blocks[0] for stage in model.backbone.stages[:2])
    assert first.body.depthwise.conv.out_channels == 8
    assert not hasattr(first, "shortcut")
    assert hasattr(model.backbone.stages[1].blocks[1], "shortcut")
    assert not hasattr(second, "shortcut")


def test_spaces_of_once_for_all_have_the_sizes_that_their_files_say():
    assert supernet("ofa-proxyless", width_mult=1.3)[1].size == (9**2 + 9**3 + 9**4) ** 5 * 9 * 25


# -- learnt kernel transforms -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width_mult", "params"), [(1.0, 7_678_880), (1.2, 10_715_752)])
def test_transforms_are_part_of_the_supernet_and_of_no_subnet(width_mult, params):
    with torch.device("meta"):
        model, space = network(table_of("ofa-mobilenetv3", resolution=224), width_mult=width_mult, transforms=True)
        without, _ = network(table_of("ofa-mobilenetv3", resolution=224), width_mult=width_mult)
    assert sum(p.numel() for p in model.parameters()) == params
    for arch in (space.smallest(), space.largest()):
        assert cost(model, space, arch) == cost(without, space, arch)
    assert params - cost(model, space, space.largest())["params"] == 20 * (25**2 + 9**2)


def transformed(table):
    model, space = network(table, 10, in_channels=1, transforms=True)
    for name, parameter in model.named_parameters():
        if "transforms" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.double(), space


def test_subnets_of_learnt_transforms_export_and_train_the_matrices_that_they_use():
    table = table_of("mobilenetv3-tiny")
    for stage in table["stages"]:
        stage["block"]["kernel"] = [3, 5, 7]
    model, space = transformed(table)
    model.train()
    used = {7: set(), 5: {"0"}, 3: {"0", "1"}}
    for seed, kernels in enumerate(itertools.product((3, 5, 7), repeat=2)):
        deep = {"stages.0.depth": 1, "stages.1.depth": 1}
        arch = space.arch({**deep, **{f"stages.{i}.blocks.0.kernel": k for i, k in enumerate(kernels)}})
        x = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(seed)).double()
        plain = export_subnet(model, arch, x[:1])
        model.zero_grad()
        with apply(model, arch):
            ours = model(x)
        torch.testing.assert_close(ours, plain(x))
        ours.square().sum().backward()
        reached = {name for name, p in model.named_parameters() if "transforms" in name and p.grad is not None}
        assert reached == {f"backbone.stages.{i}.blocks.0.body.depthwise.conv.transforms.{step}.matrix"
                           for i, kernel in enumerate(kernels) for step in used[kernel]}  # fmt: skip
        assert all(p.grad.any() for name, p in model.named_parameters() if name in reached)


def test_a_new_transform_is_the_centre_of_the_kernel():
    table = table_of("mobilenetv3-tiny")
    ours, space = network(table, 10, in_channels=1, transforms=True)
    theirs, _ = network(table, 10, in_channels=1)
    ours.load_state_dict(theirs.state_dict(), strict=False)
    x = torch.randn(2, 1, 28, 28)
    for arch in (space.smallest(), space.largest()):
        with torch.no_grad(), apply(ours, arch), apply(theirs, arch):
            torch.testing.assert_close(ours(x), theirs(x))


# The matrices have gradients and are no part of the exported network: the check is the test above.
WITHOUT_EXPORTS_GRADIENTS = [check for check in backbone_checks if check is not trains_exactly_what_an_arch_uses]


@pytest.mark.parametrize("check", WITHOUT_EXPORTS_GRADIENTS)
def test_a_supernet_with_transforms_conforms(check):
    example = SearchSpace.from_table(MobileNetV3.example["space"])
    check(MobileNetV3(in_channels=1, transforms=True), example, image=(1, 28, 28))


# -- AttentiveNAS, AlphaNet, BigNAS -----------------------------------------------------------------------------------

ATTENTIVENAS = [
    # resolution, widths, kernels, expansions, depths; params without the convolutions that never run; flops
    ("a0", 192, "16,16,24,32,64,112,192,216,1792", "3333333", "1444466", "1333331", 8_954_184, 203_389_568),
    ("a1", 224, "16,16,24,32,64,112,192,216,1984", "3335353", "1444466", "1333331", 9_452_872, 279_238_816),
    ("a2", 224, "16,16,24,32,64,112,200,224,1984", "3333353", "1454466", "1333341", 11_149_824, 316_730_080),
    ("a3", 224, "16,16,24,32,64,112,208,224,1984", "3335333", "1444466", "2334351", 12_784_928, 356_518_400),
    ("a4", 256, "16,16,24,32,64,112,192,216,1984", "3335353", "1445466", "1334351", 11_809_640, 443_530_752),
    ("a5", 256, "16,16,24,32,72,112,192,216,1792", "3335333", "1454466", "1333461", 12_597_464, 490_520_064),
    ("a6", 288, "16,16,24,32,64,112,216,224,1984", "3333353", "1465466", "1334461", 15_154_792, 709_007_232),
    ("a5_small", 256, "16,16,24,32,64,112,208,216,1984", "3333353", "1445466", "1334451", 12_970_512, 491_481_088),
    ("a5_base", 288, "16,16,24,32,64,112,200,216,1984", "3355333", "1444566", "2343351", 12_404_424, 594_786_000),
    ("max", 288, "24,24,32,40,72,128,216,224,1984", "5555555", "1666666", "2566882", 23_404_080, 1_939_335_808),
]  # fmt: skip


def staged(space, resolution, widths, kernels, expands, depths):
    """An arch of a space with stage-wide choices; what is fixed there is checked to be what it is."""
    stem, *widths, head = map(int, widths.split(","))
    stages = [{"width": w, "kernel": int(k), "expand": int(e), "depth": int(d)}
              for w, k, e, d in zip(widths, kernels, expands, depths, strict=True)]  # fmt: skip
    for own, stage in zip(space.tree["stages"], stages, strict=True):
        if "expand" not in [key.rpartition(".")[2] for key in own["expand"].keys]:
            assert own["expand"].number == stage.pop("expand")
    return space.arch({"resolution": resolution, "stem": {"width": stem}, "stages": stages, "head": {"width": head}})


def plain_attentivenas(widths, kernels, expands, depths, classes):
    """The same network, written down without the space."""
    stem, *widths, last = map(int, widths.split(","))
    rows, inputs = [], stem
    for i, (k, e, d, width) in enumerate(zip(kernels, expands, depths, widths, strict=True)):
        for j in range(int(d)):
            stride, se = 2 if j == 0 and i in (1, 2, 3, 5) else 1, 4 if i in (2, 4, 5, 6) else 0
            rows.append(Row(int(k), inputs * int(e), width, stride, se=se, pool=True))
            inputs = width
    return Plain(stem, rows, [6 * inputs, last], act=nn.SiLU, classes=classes)


@pytest.mark.parametrize("row", ATTENTIVENAS, ids=lambda row: row[0])
def test_figures_of_attentivenas_come_out_to_the_last_digit(row):
    _, resolution, *choices, params, flops = row
    model, space = supernet("attentivenas")
    assert figures(model, space, staged(space, resolution, *choices)) == (params, flops)
    plain = plain_attentivenas(*choices, classes=1000)
    assert counted(plain, (3, resolution, resolution)) == {"params": params, "flops": flops}


def test_the_extremes_of_attentivenas_are_archs_of_its_table():
    model, space = supernet("attentivenas")
    assert space.smallest() == staged(space, *ATTENTIVENAS[0][1:-2])
    assert space.largest() == staged(space, *ATTENTIVENAS[-1][1:-2])
    assert space.size == 4 * 2 * 8 * 36 * 48 * 48 * 108 * 48 * 8 * 2
    # The projection from 24 to 16 channels is no part of the largest arch, whose widths are both 24.
    assert sum(p.numel() for p in model.parameters()) == 23_404_080 + 24 * 24


@pytest.mark.parametrize("resolution", [40, 48, 56])  # odd maps before a stride, even ones, both
@pytest.mark.parametrize("row", [ATTENTIVENAS[3], ATTENTIVENAS[8]], ids=lambda row: row[0])
def test_a_network_of_attentivenas_computes_what_a_plain_one_computes(row, resolution):
    model, space = network(table_of("attentivenas", resolution=[resolution, 64]), 10)
    _, _, *choices, _, _ = row
    theirs = unlike(plain_attentivenas(*choices, classes=10))
    x = torch.randn(2, 3, resolution, resolution).double()
    agree(model.double(), staged(space, resolution, *choices), theirs, x)


@pytest.mark.parametrize("side", [6, 7])
def test_squares_of_an_odd_map_begin_outside_it(side):
    x = torch.randn(2, 3, side, side)
    torch.testing.assert_close(Pooled(2)(x), F.avg_pool2d(x, 2, padding=side % 2))
    assert Pooled(3)(x).shape == F.conv2d(x, torch.zeros(1, 3, 3, 3), stride=3, padding=1).expand(-1, 3, -1, -1).shape


def test_the_space_of_bignas_holds_networks_of_the_published_costs():
    model, space = supernet("bignas")
    assert (
        space.size
        == 4 * 2 * (2 * 2) * (2 * 2) * (2 * 2 * 2) * (2 * 3 * 2) * (3 * 5 * 2) * (4 * 5 * 2) * (5 * 2 * 2) * 2
    )
    low, high = Cost(model, space, torch.zeros(1, 3, 224, 224)).of([space.smallest(), space.largest()])
    for flops, params in ((242e6, 4.5e6), (418e6, 5.5e6), (586e6, 6.4e6), (1040e6, 9.5e6)):  # S, M, L and XL
        assert low["flops"] < flops < high["flops"]
        assert low["params"] < params < high["params"]


# -- FairNAS ----------------------------------------------------------------------------------------------------------

FAIRNAS = {  # expansion, width, kernel, stride; params and flops; params with SE of ratios 1 and 0.5 for 10 classes
    "A": ("(3,32,7,2)(3,32,3,1)(3,40,7,2)(6,40,3,1)(6,40,7,1)(3,40,3,1)(3,80,3,2)(6,80,7,1)(6,80,7,1)(3,80,5,1)"
          "(6,96,3,1)(3,96,5,1)(3,96,5,1)(6,96,3,1)(6,192,3,2)(6,192,7,1)(6,192,3,1)(6,192,7,1)(6,320,5,1)",
          4_651_352, 388_122_848, 5_835_322, 4_613_730),
    "B": ("(3,32,5,2)(3,32,3,1)(3,40,5,2)(3,40,3,1)(6,40,3,1)(3,40,5,1)(3,80,7,2)(3,80,3,1)(6,80,3,1)(3,80,5,1)"
          "(3,96,3,1)(6,96,3,1)(3,96,7,1)(3,96,3,1)(6,192,7,2)(6,192,5,1)(6,192,7,1)(6,192,3,1)(6,320,5,1)",
          4_506_272, 345_297_632, 5_603_242, 4_424_850),
    "C": ("(3,32,5,2)(3,32,3,1)(3,40,7,2)(3,40,3,1)(3,40,3,1)(3,40,3,1)(3,80,3,2)(3,80,3,1)(3,80,3,1)(6,80,3,1)"
          "(3,96,3,1)(3,96,3,1)(3,96,3,1)(3,96,3,1)(6,192,7,2)(6,192,7,1)(6,192,3,1)(6,192,3,1)(6,320,5,1)",
          4_397_864, 321_024_992, 5_429_530, 4_283_586),
}  # fmt: skip


def fair(space, text):
    return space.arch(dict(zip(space.keys, (f"k{k}e{e}" for e, _, k, _ in rows_of(text)), strict=True)))


@pytest.mark.parametrize("name", FAIRNAS)
def test_figures_of_fairnas_come_out_to_the_last_digit(name):
    text, params, flops, *_ = FAIRNAS[name]
    model, space = supernet("fairnas")
    assert figures(model, space, fair(space, text)) == (params, flops)


@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_params_of_fairnas_with_squeeze_and_excitation_are_those_that_its_repository_prints(ratio):
    table = table_of("fairnas-se")
    for stage in table["stages"][1:]:
        stage["se"]["ratio"] *= ratio
    with torch.device("meta"):
        model, space = network(table, 10)
    for text, _, _, whole, half in FAIRNAS.values():
        assert cost(model, space, fair(space, text), 32)["params"] == (whole if ratio == 1 else half)


def test_the_space_of_fairnas_has_19_layers_of_six_blocks_with_weights_of_their_own():
    for name in ("fairnas", "fairnas-se"):
        model, space = supernet(name)
        assert len(space.keys) == 19
        assert space.size == 6**19
        mixed = [module for module in model.modules() if isinstance(module, MixedOp)]
        assert [len(module.candidates) for module in mixed] == [6] * 19


def test_a_network_of_fairnas_computes_what_a_plain_one_computes():
    model, space = network(table_of("fairnas-se"), 10)
    rows, inputs = [Row(3, 32, 16, 1, act=nn.ReLU)], 16
    for e, width, k, stride in rows_of(FAIRNAS["B"][0]):
        rows.append(Row(k, inputs * e, width, stride, se=e, act=nn.SiLU, se_act=nn.SiLU, gate=nn.Sigmoid))
        inputs = width
    theirs = Plain(32, rows, [1280], act=nn.ReLU)
    agree(model.double(), fair(space, FAIRNAS["B"][0]), unlike(theirs), torch.randn(2, 3, 40, 40).double())


# -- Cream ------------------------------------------------------------------------------------------------------------

# Resolution; operations of the blocks of each stage; params and flops that the released code gives (on timm 0.1.20). It
# ignores its list of operations where a stage has one block: k3e4 stands there, k3e6 in the fourth stage.
CREAM = [
    (14, 64, ["0", "33", "33", "1", "3"], 2_673_096, 13_188_608),
    (43, 96, ["0", "31", "31", "333", "33"], 4_398_600, 40_655_232),
    (114, 160, ["0", "33", "33", "333", "33"], 4_410_120, 109_623_680),
    (287, 224, ["0", "33", "313", "3333", "333"], 6_044_368, 276_262_016),
    (481, 224, ["3431", "3230", "33311", "3333", "3333"], 7_713_360, 460_398_080),
    (604, 224, ["33233", "32323", "32323", "332233", "332333"], 9_695_624, 578_698_368),
]
CREAM_OPS = [(k, e) for k in (3, 5, 7) for e in (4, 6)]


def cream(space, stages):
    chosen = {f"stages.{i}.blocks.{j}.op": "k{}e{}".format(*CREAM_OPS[int(op)])
              for i, ops in enumerate(stages, 1) for j, op in enumerate(ops)}  # fmt: skip
    return space.arch(dict.fromkeys((key for key in space.keys if key not in chosen), "skip") | chosen)


@pytest.mark.parametrize(("name", "resolution", "stages", "params", "flops"), CREAM)
def test_figures_of_cream_come_out_to_the_last_digit(name, resolution, stages, params, flops):
    model, space = supernet("cream")
    assert figures(model, space, cream(space, stages), resolution) == (params, flops)
    assert 0 < name * 1e6 - flops < 0.06 * name * 1e6  # the names count norms, activations and pooling as well


def test_the_space_of_cream_is_the_papers_where_stages_have_four_blocks():
    _, space = supernet("cream")
    beyond = [key for key in space.keys if int(key.split(".")[3]) >= 4]
    four = space.fix(dict.fromkeys(beyond, "skip"))
    assert four.size == 6**5 * 7**15
    assert f"{four.size:.3g}" == "3.69e+16"


def test_a_network_of_cream_computes_what_a_plain_one_computes():
    model, space = network(table_of("cream"), 10)
    rows, inputs = [Row(3, 16, 16, 1, se=4)], 16
    _, _, stages, *_ = CREAM[1]
    for ops, width, first in zip(stages, (24, 40, 80, 96, 192), (2, 2, 2, 1, 2), strict=True):
        for j, op in enumerate(ops):
            k, e = CREAM_OPS[int(op)]
            rows.append(Row(k, inputs * e, width, first if j == 0 else 1, se=4))
            inputs = width
    theirs = Plain(16, rows, [320, 1280], act=nn.SiLU, bias=True)
    agree(model.double(), cream(space, stages), unlike(theirs), torch.randn(2, 3, 40, 40).double())


def test_a_block_that_changes_shape_cannot_be_left_out():
    table = table_of("cream")
    table["stages"][2]["blocks"][0]["op"].append("skip")
    with pytest.raises(UserError, match="changes the shape") as caught:
        MobileNetV3().build(SearchSpace.from_table(table))
    assert caught.value.faults[0].dotted == "stages[2].blocks[0].op"


# -- plain networks, written down by hand -----------------------------------------------------------------------------


class Row(nn.Module):
    """An inverted residual block of plain layers.

    se: inner channels over those of squeeze-and-excitation, made divisible by 8, or 0; pool: a shortcut in any case
    """

    def __init__(self, k, inner, out, stride, se=0, pool=False, act=None, se_act=nn.ReLU, gate=nn.Hardsigmoid):
        super().__init__()
        self.sizes, self.se_ratio, self.pool, self.act, self.se_act, self.gate = (
            (k, inner, out, stride),
            se,
            pool,
            act,
            se_act,
            gate,
        )

    def build(self, inputs, act, eps):
        k, inner, out, stride = self.sizes
        act = self.act or act
        expand = [] if inner == inputs else [nn.Conv2d(inputs, inner, 1, bias=False), nn.BatchNorm2d(inner, eps), act()]
        depthwise = nn.Conv2d(inner, inner, k, stride, k // 2, groups=inner, bias=False)
        self.body = nn.Sequential(*expand, depthwise, nn.BatchNorm2d(inner, eps), act())
        if self.se_ratio:
            reduced = divisible(inner // self.se_ratio) if self.gate is nn.Hardsigmoid else inner // self.se_ratio
            self.se = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(inner, reduced, 1), self.se_act(),
                                    nn.Conv2d(reduced, inner, 1), self.gate())  # fmt: skip
        self.project = nn.Sequential(nn.Conv2d(inner, out, 1, bias=False), nn.BatchNorm2d(out, eps))
        self.same = stride == 1 and inputs == out
        if self.pool and inputs != out:
            self.shortcut = nn.Conv2d(inputs, out, 1, bias=False)
        return self

    def forward(self, x):
        y = self.body(x)
        y = self.project(y * self.se(y) if self.se_ratio else y)
        if self.pool:
            x = F.avg_pool2d(x, 2, padding=x.shape[-1] % 2) if self.sizes[3] == 2 else x
            return y + (self.shortcut(x) if hasattr(self, "shortcut") else x)
        return x + y if self.same else y


class Plain(nn.Sequential):
    """A network of such blocks; heads: channels before pooling, and after it if there are two."""

    def __init__(self, stem, rows, heads, act, eps=1e-5, bias=False, classes=10):
        layers = [nn.Conv2d(3, stem, 3, 2, 1, bias=False), nn.BatchNorm2d(stem, eps), act()]
        inputs = stem
        for row in rows:
            layers.append(row.build(inputs, act, eps))
            inputs = row.sizes[2]
        layers += [nn.Conv2d(inputs, heads[0], 1, bias=False), nn.BatchNorm2d(heads[0], eps), act()]
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        layers += [nn.Linear(*heads, bias), act()] if len(heads) > 1 else []
        super().__init__(*layers, nn.Linear(heads[-1], classes))


def divisible(channels):
    near = max(8, (channels + 4) // 8 * 8)
    return near if near >= 0.9 * channels else near + 8


# -- all spaces, on small images --------------------------------------------------------------------------------------


def small(name):
    """A space with fewer blocks and operations, and small images."""
    table = copy.deepcopy(table_of(name))
    if "resolution" in table:
        table["resolution"] = [32, 40]
    for stage in table["stages"]:
        for block in [stage.get("block", {}), *stage.get("blocks", [])]:
            if "op" in block:
                block["op"] = [block["op"][0], *block["op"][-2:]]
        if isinstance(stage.get("depth"), list):
            stage["depth"] = stage["depth"][:2]
        elif "depth" in stage:
            stage["depth"] = min(stage["depth"], 2)
        stage["blocks"] = stage["blocks"][:3] if "blocks" in stage else []
    table["stages"] = [{key: item for key, item in stage.items() if item != []} for stage in table["stages"]]
    return table


ON_TABLE = [
    uses_the_variables_of_its_space_and_no_others,
    costs_what_its_exported_networks_cost,
    has_no_weight_that_no_arch_uses,
    more_of_a_variable_never_costs_less,
]
"""The checks that hang on the table of a space, and not on the layers alone that all of them share.

That of costs exports archs, too, and so compares what they compute.
"""


@pytest.mark.parametrize("check", backbone_checks)
@pytest.mark.parametrize("name", ["ofa-mobilenetv3", "attentivenas"])
def test_spaces_of_every_kind_of_layer_conform(name, check):
    check(MobileNetV3(width_mult=0.25), SearchSpace.from_table(small(name)), image=(3, 40, 40))


@pytest.mark.parametrize("check", ON_TABLE)
@pytest.mark.parametrize("name", ["ofa-proxyless", "bignas", "fairnas", "fairnas-se", "cream"])
def test_every_space_conforms(name, check):
    check(MobileNetV3(width_mult=0.25), SearchSpace.from_table(small(name)), image=(3, 40, 40))


@pytest.mark.parametrize("check", backbone_checks)
def test_the_example_conforms(check):
    check(MobileNetV3(in_channels=1), SearchSpace.from_table(MobileNetV3.example["space"]), image=(1, 28, 28))


def test_zero_init_is_of_blocks_with_a_shortcut_of_any_kind():
    model, _ = network(table_of("attentivenas"), 10, width_mult=0.25)
    for block in (module for module in model.modules() if isinstance(module, Residual)):
        block.zero_init_last()
        assert not block.body.project.norm.weight.any()


def test_the_readme_has_these_figures():
    readme = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
    numbers = [n for _, *row in (*FIXED, *ATTENTIVENAS, *CREAM) for n in row if isinstance(n, int)]
    numbers += [n for _, *row in FAIRNAS.values() for n in row]
    for name in ("attentivenas", "bignas", "mobilenetv3-small-images", "mobilenetv3-tiny"):
        numbers.append(SearchSpace.from_table(table_of(name)).size)
    assert not [number for number in numbers if f"{number:,}" not in readme]
