import copy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import tomli
import tomli_w
import torch
from torch import nn

from corenas.contracts import Backbone
from corenas.cost import Cost
from corenas.errors import UserError
from corenas.export import export_subnet
from corenas.mutable import apply, keys_used
from corenas.options import structure
from corenas.plugins import load_catalogue
from corenas.run.prepare import prepare
from corenas.run.spec import load_spec
from corenas.space import SearchSpace
from corenas.supernet import build_supernet
from corenas.testing.backbones import backbone_checks, counted, more_of_a_variable_never_costs_less
from corenas.testing.components import changed, spec_fragments
from corenas.testing.distributions import distribution_checks
from corenas_backbone_resnet import Layout, ResNet, corenas_backbones
from corenas_backbone_resnet.weights import TORCHVISION, torchvision_name
from corenas_mutable_slices import LinearSlice, Residual
from corenas_mutable_slices.exchange import load, published

models = pytest.importorskip("torchvision.models")

IMAGENET = (3, 224, 224)
SPEC = Path(__file__).parents[4] / "spec"
FAMILY, OFA, TINY = (
    tomli.loads((SPEC / "space" / f"{name}.toml").read_text()) for name in ("resnet", "ofa-resnet50d", "resnet-tiny")
)


class Network(nn.Module):
    """A backbone with a linear classifier, as a task builds it."""

    def __init__(self, backbone, classes):
        super().__init__()
        self.backbone = backbone
        self.head = LinearSlice(backbone.feat_dims[-1], classes)

    def forward(self, x):
        return self.head(self.backbone.features(x)[-1].flatten(1))


def network(space, classes=1000, device="meta", **options):
    """The supernet of a space."""
    torch.manual_seed(0)
    with torch.device(device):
        return Network(ResNet(**options).build(space), classes).eval()


def random_state(module, value=None):
    """A network built on the meta device, in double precision with random weights and statistics, or all `value`."""
    module = module.double().to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(1)
    for name, tensor in module.state_dict().items():
        if not tensor.is_floating_point():
            tensor.fill_(3)
        elif value is not None:
            tensor.fill_(value)
        elif tensor.dim() > 1:
            bound = (3 / tensor[0].numel()) ** 0.5
            tensor.uniform_(-bound, bound, generator=generator)
        else:
            low, high = (-0.1, 0.1) if name.endswith(("bias", "mean")) else (0.5, 1.5)
            tensor.uniform_(low, high, generator=generator)
    return module


def theirs_of(name, classes):
    with torch.device("meta"):
        return random_state(models.get_model(name, num_classes=classes))


def double_noise(side, n=2):
    return torch.randn((n, 3, side, side), generator=torch.Generator().manual_seed(2), dtype=torch.float64)


# -- torchvision's family ---------------------------------------------------------------------------------------------

PUBLISHED = {  # params, flops: measured, and equal to what torchvision publishes
    "resnet18": (11_689_512, 1_814_073_344),
    "resnet34": (21_797_672, 3_663_761_408),
    "resnet50": (25_557_032, 4_089_184_256),
    "resnet101": (44_549_160, 7_801_405_440),
    "resnet152": (60_192_808, 11_513_626_624),
    "wide_resnet50_2": (68_883_240, 11_398_021_120),
    "wide_resnet101_2": (126_886_696, 22_753_050_624),
}


@pytest.fixture(scope="module")
def family():
    """The family's space and its cost."""
    space = SearchSpace.from_table(FAMILY)
    return space, Cost(network(space), space, torch.empty(1, 3, 224, 224))


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvisions_networks_are_points_of_one_space_and_cost_what_torchvision_says(family, name):
    space, cost = family
    arch = space.arch(TORCHVISION[name])
    expected = dict(zip(("params", "flops"), PUBLISHED[name], strict=True))
    found = cost.of([arch])[0]
    assert {metric: found[metric] for metric in expected} == expected
    with torch.device("meta"):
        assert counted(models.get_model(name), IMAGENET) == expected


def test_spaces_have_the_sizes_that_the_readme_says(family):
    space, _ = family
    stages = [2 * 2 * 3 * deep + 2 * 3 * shallow for deep, shallow in zip((3, 8, 36, 3), (3, 4, 6, 3), strict=True)]
    assert space.size == 3 * 3 * np.prod(stages) == 1_473_863_040
    assert SearchSpace.from_table(TINY).size == 768


def around(space, name):
    """A part of the space that holds a network of torchvision and, in every way, larger and smaller ones."""
    choices = dict(space.arch(TORCHVISION[name]))
    deep = name == "resnet101"
    allowed = {"stem.width": [32, 64], "stem.kernel": [3, 5, 7]}
    for i, (basic, bottleneck) in enumerate(zip((3, 4, 6, 3), (3, 8, 36, 3), strict=True)):
        key = f"stages.{i}."
        allowed[f"{key}op"] = [choices[f"{key}op"]] if deep else ["bottleneck", "basic"]
        for kind, most in (("basic", basic), ("bottleneck", bottleneck)):
            depth = choices[f"{key}{kind}.depth"] if choices[f"{key}op"] == kind else 1
            allowed[f"{key}{kind}.depth"] = [*range(1, min(most, depth + 1) + 1)]
            allowed[f"{key}{kind}.kernel"] = [3] if i else [3, 5]
        ratio = choices[f"{key}bottleneck.ratio"]
        allowed[f"{key}bottleneck.ratio"] = [ratio] if i > 1 else [0.25, 0.5]
    return space.narrow(allowed)


# The two largest have nothing that the others have not, and take as long as all of those.
@pytest.mark.parametrize("name", sorted({*TORCHVISION} - {"resnet152", "wide_resnet101_2"}))
def test_torchvisions_weights_load_and_compute_the_same_and_go_back(family, name):
    space = around(family[0], name)
    theirs, arch = theirs_of(name, 1000), space.arch(TORCHVISION[name])
    ours = random_state(network(space), value=torch.nan)  # what is not loaded must not be used
    load(ours, arch, theirs.state_dict(), torchvision_name)
    x = double_noise(48)
    with torch.no_grad(), apply(ours, arch):
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-9, atol=1e-9)
    assert any(tensor.isnan().any() for tensor in ours.parameters())
    plain = export_subnet(ours, arch, x[:1])
    del ours
    state = published(plain, torchvision_name)
    expected = theirs.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in expected.items())
    theirs.load_state_dict(state, strict=True)
    assert counted(plain, IMAGENET) == dict(zip(("params", "flops"), PUBLISHED[name], strict=True))


@pytest.mark.parametrize("kind", ["safetensors", "pth", "old", "cut", "other"])
def test_a_file_of_weights_is_looked_at_before_there_is_a_network_and_without_its_numbers(tmp_path, kind):
    state = models.resnet18(num_classes=7).state_dict() if kind != "other" else models.resnet34().state_dict()
    file = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth")
    if kind == "safetensors":
        safetensors.torch.save_file(state, file)
    else:
        torch.save(state, file, _use_new_zipfile_serialization=kind != "old")
    if kind == "cut":
        file.write_bytes(file.read_bytes()[:-500])
    stages = [
        {"basic": {"width": width, "depth": 2, "kernel": 3, "ratio": 1}, "stride": 2 if i else 1}
        for i, width in enumerate((64, 128, 256, 512))
    ]
    table = {
        "algorithm": "plain", "task": {"type": "classification", "data": "digits", "channels": 3},
        "backbone": {"type": "resnet", "weights": str(file)},
        "space": {"stem": {"width": 64, "kernel": 7}, "stages": stages},
    }  # fmt: skip
    (tmp_path / "spec.toml").write_text(tomli_w.dumps(table))
    spec, _ = load_spec(tmp_path / "spec.toml", load_catalogue())
    if kind in ("cut", "other"):
        with pytest.raises(UserError, match="cannot read" if kind == "cut" else "which this space has not") as caught:
            prepare(spec, weights=False)
        assert [fault.dotted for fault in caught.value.faults] == ["backbone.weights"]
    else:
        prepare(spec, weights=False)
    prepare(spec, data=False, weights=False)  # `--no-data` looks at no file


@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_a_spec_may_begin_with_published_weights(family, tmp_path, kind):
    theirs, file = models.resnet18(), tmp_path / f"resnet18.{kind}"
    safetensors.torch.save_model(theirs, file) if kind == "safetensors" else torch.save(theirs.state_dict(), file)
    theirs.eval().fc = nn.Identity()
    x = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    space = around(family[0], "resnet18").narrow({"stem.width": [64]})
    task = SimpleNamespace(head=Classes, example=x[:1])
    arch = space.arch(TORCHVISION["resnet18"])
    for part in (space, space.fix(arch)):
        ours = build_supernet(ResNet(weights=str(file)), part, task).eval()
        with torch.no_grad(), apply(ours, arch):
            torch.testing.assert_close(ours.backbone(x)[-1].flatten(1), theirs(x), rtol=1e-4, atol=1e-4)
            assert ours(x).shape == (2, 7)
    with torch.device("meta"):
        build_supernet(ResNet(weights="not read"), space, task)
    levels = build_supernet(ResNet(weights=str(file), levels=(2, 4)), space, task).eval()
    with torch.no_grad(), apply(levels, arch):
        stem = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
        second = theirs.layer2(theirs.layer1(stem))
        for ours, expected in zip(levels.backbone(x), (second, theirs.layer4(theirs.layer3(second))), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match=r"images of 3 channels, not 1: `channels = 3` in \[task\]"):
        build_supernet(ResNet(weights=str(file), in_channels=1), space, task)
    other = space.narrow({"stem.kernel": [3]})
    for weights, part, says in (
        (str(file), other, "has the weights of resnet18, which this space has not"),
        ("none", space, "cannot read none"),
    ):
        with pytest.raises(UserError, match=says) as caught:
            build_supernet(ResNet(weights=weights), part, task)
        assert caught.value.faults[0].dotted == "backbone.weights"


class Classes(nn.Module):
    """Seven classes of the last features."""

    def __init__(self, dims):
        super().__init__()
        self.classifier = LinearSlice(dims[-1], 7)

    def forward(self, features):
        return self.classifier(features[-1].flatten(1))


def groups_table():
    """ResNet-50 and torchvision's ResNeXts as one space; nothing in it but numbers."""
    rows = zip((256, 512, 1024, 2048), (3, 4, [6, 23], 3), (1, 2, 2, 2), strict=True)
    return {
        "stem": {"width": 64},
        "stages": [
            {
                "bottleneck": {"width": w, "depth": d, "ratio": [0.25, 0.5, 1.0], "groups": [1, 32, 64]},
                "stride": stride,
            }
            for w, d, stride in rows
        ],
    }


@pytest.mark.parametrize(("name", "ratio", "groups", "depth", "params"), [
    ("resnet50", 0.25, 1, 6, 25_557_032),
    ("resnext50_32x4d", 0.5, 32, 6, 25_028_904),
    ("resnext101_64x4d", 1.0, 64, 23, 83_455_272),
])  # fmt: skip
def test_resnexts_are_points_of_a_space_with_groups(name, ratio, groups, depth, params):
    space = SearchSpace.from_table(groups_table())
    blocks = {"ratio": ratio, "groups": groups}
    arch = space.arch({"stages": [{"bottleneck": blocks | ({"depth": depth} if i == 2 else {})} for i in range(4)]})
    found = Cost(network(space), space, torch.empty(1, 3, 224, 224)).of([arch])[0]
    with torch.device("meta"):
        expected = counted(models.get_model(name), IMAGENET)
    assert expected["params"] == params
    assert {metric: found[metric] for metric in expected} == expected
    more = {"ratio": 0.5 if ratio == 0.25 else ratio / 2, "groups": 32 if groups == 64 else 64}
    space = space.narrow({f"stages.*.{key}": [blocks[key], more[key]] for key in blocks}).fix(
        {"stages.2.*.depth": depth}
    )
    theirs, ours = theirs_of(name, 10), random_state(network(space, 10), value=torch.nan)
    load(ours, arch, theirs.state_dict(), torchvision_name)
    x = double_noise(48)
    with torch.no_grad(), apply(ours, arch):
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-9, atol=1e-9)
    state, expected = published(export_subnet(ours, arch, x[:1]), torchvision_name), theirs.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in expected.items())
    theirs.load_state_dict(state, strict=True)


def test_weights_are_drawn_as_torchvision_draws_them():
    ours = network(SearchSpace.from_table(TINY), 10, "cpu", in_channels=1)
    for module in ours.backbone.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 500:
            wanted = (2 / (module.kernel_size[0] ** 2 * module.out_channels)) ** 0.5  # fan-out, gain of relu
            assert float(module.weight.detach().std()) == pytest.approx(wanted, rel=0.15)
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()


# -- Once-for-All's ResNet-50D ----------------------------------------------------------------------------------------

BASE = (2, 2, 4, 2)


def of_reference(space, d, e, w, resolution=224):
    """The arch of a setting of Once-for-All's code: depths; a ratio a block; places of widths."""
    stages, ratios = [], iter(e)
    for i, base in enumerate(BASE):
        width = space[f"stages.{i}.bottleneck.width"].choices[w[i + 2]]
        blocks = [{"ratio": next(ratios)} for _ in range(base + 2)]
        stages.append({"bottleneck": {"width": width, "depth": base + d[i + 1], "blocks": blocks}})
    stem = {"inner": (24, 24, 32)[w[0]], "width": (40, 48, 64)[w[1]], "depth": int(d[0] == 2)}
    return space.arch({"resolution": resolution, "stem": stem, "stages": stages})


def alike(d, e, w):
    return [d] * 5, [e] * 18, [w] * 6


# Measured on networks of the reference code (f03b267): three that are alike throughout, and some that it drew.
REFERENCE = [
    (alike(2, 0.35, 2), 48_105_992, 7_491_643_904),
    (alike(0, 0.2, 0), 6_539_280, 962_192_128),
    (alike(0, 0.25, 2), 18_239_496, 2_903_023_616),
    (
        ([0, 2, 2, 2, 0],
         [0.25, 0.25, 0.2, 0.25, 0.35, 0.25, 0.25, 0.25, 0.25, 0.25, 0.35, 0.2, 0.35, 0.2, 0.25, 0.2, 0.2, 0.35],
         [1, 0, 2, 0, 2, 1]),
        16_759_104,
        3_460_732_672,
    ),
    (
        ([0, 2, 2, 2, 0],
         [0.25, 0.35, 0.2, 0.25, 0.25, 0.25, 0.35, 0.35, 0.2, 0.35, 0.25, 0.25, 0.35, 0.25, 0.2, 0.35, 0.2, 0.2],
         [2, 1, 1, 0, 2, 1]),
        19_209_592,
        3_572_935_616,
    ),
    (
        ([2, 2, 1, 2, 0],
         [0.35, 0.2, 0.2, 0.35, 0.2, 0.2, 0.2, 0.35, 0.25, 0.2, 0.2, 0.25, 0.35, 0.25, 0.2, 0.25, 0.35, 0.25],
         [2, 2, 2, 1, 1, 0]),
        10_992_424,
        2_965_773_120,
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def once_for_all():
    """Once-for-All's space, its supernet without weights and its cost."""
    space = SearchSpace.from_table(OFA)
    model = network(space)
    return space, model, Cost(model, space, torch.empty(1, 3, 224, 224))


class Skip(nn.Module):
    """What a branch gives, added to its input as it is or projected; then an activation or none."""

    def __init__(self, branch, projection=None, act=None):
        super().__init__()
        self.branch, self.projection, self.act = branch, projection or nn.Identity(), act or nn.Identity()

    def forward(self, x):
        return self.act(self.branch(x) + self.projection(x))


def conv_norm(inputs, outputs, kernel, stride=1, act=True):
    layers = [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs)]
    return nn.Sequential(*layers, *[nn.ReLU()] * act)


def nearest_eight(x):
    below = max(8, int(x + 4) // 8 * 8)
    return below + 8 if below < 0.9 * x else below


def plain_resnet50d(arch, classes, middle=Skip):
    """The network of an arch, written down with torch alone after the reference code.

    middle: what becomes of a convolution in the middle of the stem
    """
    inner, width = arch["stem.inner"], arch["stem.width"]
    layers = [conv_norm(3, inner, 3, 2)]
    layers += [middle(conv_norm(inner, inner, 3))] * arch["stem.depth"]
    layers += [conv_norm(inner, width, 3), nn.MaxPool2d(3, 2, 1)]
    for i in range(4):
        inputs, width = width, arch[f"stages.{i}.bottleneck.width"]
        for j in range(arch[f"stages.{i}.bottleneck.depth"]):
            mid = nearest_eight(round(width * arch[f"stages.{i}.bottleneck.blocks.{j}.ratio"]))
            stride = 2 if i and not j else 1
            branch = [conv_norm(inputs, mid, 1), conv_norm(mid, mid, 3, stride), conv_norm(mid, width, 1, act=False)]
            pooled = [nn.AvgPool2d(stride, stride, ceil_mode=True), conv_norm(inputs, width, 1, act=False)]
            layers.append(Skip(nn.Sequential(*branch), None if j else nn.Sequential(*pooled), nn.ReLU()))
            inputs = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


@pytest.mark.parametrize(("setting", "params", "flops"), REFERENCE)
def test_figures_of_once_for_all_come_out_to_the_last_digit(once_for_all, setting, params, flops):
    space, _, cost = once_for_all
    arch, expected = of_reference(space, *setting), {"flops": flops, "params": params}
    found = cost.of([arch])[0]
    assert {metric: found[metric] for metric in expected} == expected
    assert counted(plain_resnet50d(arch, 1000), IMAGENET) == expected
    # The images that the network is checked on are small: it resizes them.
    exported = export_subnet(network(space.fix(arch), device="cpu"), arch, torch.zeros(1, 3, 32, 32))
    assert counted(exported, IMAGENET) == expected


def test_resnet50d_but_for_its_stems_shortcut_is_an_arch_of_it(once_for_all):
    space, _, cost = once_for_all
    arch = of_reference(space, [2, 1, 2, 2, 1], [0.25] * 18, [2] * 6)
    assert [arch[f"stages.{i}.bottleneck.depth"] for i in range(4)] == [3, 4, 6, 3]
    assert cost.of([arch])[0]["params"] == 25_576_264  # He et al. 2019: ResNet-50-D has 25.6M


def test_the_space_of_once_for_all_has_the_size_that_its_file_says(once_for_all):
    space, model, _ = once_for_all
    stages = (3**2 + 3**3 + 3**4) ** 3 * (3**4 + 3**5 + 3**6)
    assert space.size == 25 * 2 * 2 * 3**5 * stages
    assert space.size / 25 == pytest.approx(1.6e12, rel=0.05)
    assert sum(p.numel() for p in model.parameters()) == 48_105_992  # and no weight beyond the largest subnet


@pytest.mark.parametrize("resolution", [64, 68])  # of 68 the maps have 34, 17, 9, 5 and 3 pixels a side
def test_subnets_of_once_for_all_compute_what_its_networks_compute(resolution):
    space = SearchSpace.from_table({**OFA, "resolution": resolution})
    ours = random_state(network(space, 10))
    x = double_noise(resolution)
    for arch in space.decode(space.draw(np.random.default_rng(resolution), 2)):
        plain = plain_resnet50d(arch, 10).double().eval()
        state, own = export_subnet(ours, arch, x[:1]).state_dict(), plain.state_dict()
        plain.load_state_dict(dict(zip(own, state.values(), strict=True)))  # both in the order of the computation
        with torch.no_grad(), apply(ours, arch):
            torch.testing.assert_close(ours(x), plain(x), rtol=1e-9, atol=1e-9)


# -- ResNet-D ---------------------------------------------------------------------------------------------------------

RESNET_D = {  # kind and depths of blocks, ratio, groups, whether shortcuts pool; resolution, params, flops: timm 1.0.31
    "resnet18d": ("basic", (2, 2, 2, 2), 1, 1, True, 224, 11_708_744, 2_053_713_920),
    "resnet34d": ("basic", (3, 4, 6, 3), 1, 1, True, 224, 21_816_904, 3_903_401_984),
    "resnet26d": ("bottleneck", (2, 2, 2, 2), 0.25, 1, True, 224, 16_014_408, 2_581_897_216),
    "resnet50c": ("bottleneck", (3, 4, 6, 3), 0.25, 1, False, 224, 25_576_264, 4_328_824_832),
    "resnet50d": ("bottleneck", (3, 4, 6, 3), 0.25, 1, True, 224, 25_576_264, 4_328_824_832),
    "resnet101d": ("bottleneck", (3, 4, 23, 3), 0.25, 1, True, 256, 44_568_392, 10_501_963_776),
    "resnet152d": ("bottleneck", (3, 8, 36, 3), 0.25, 1, True, 256, 60_212_040, 15_350_579_200),
    "resnet200d": ("bottleneck", (3, 24, 36, 3), 0.25, 1, True, 256, 64_693_064, 19_913_981_952),
    "resnext50d_32x4d": ("bottleneck", (3, 4, 6, 3), 0.5, 32, True, 224, 25_048_136, 4_470_120_448),
}
DEEP_STEM = {"width": 64, "kernel": 3, "inner": 32, "depth": 1, "shortcut": False}


@pytest.mark.parametrize("name", RESNET_D)
def test_networks_with_a_stem_of_three_convolutions_are_tables(name):
    kind, depths, ratio, groups, pool, side, params, flops = RESNET_D[name]
    widths = (64, 128, 256, 512) if kind == "basic" else (256, 512, 1024, 2048)
    stages = [{kind: {"width": width, "depth": depth, "ratio": ratio, "groups": groups}, "stride": min(i, 1) + 1}
              for i, (width, depth) in enumerate(zip(widths, depths, strict=True))]  # fmt: skip
    space = SearchSpace.from_table({"stem": DEEP_STEM, "stages": stages, "shortcut": "pool" if pool else "conv"})
    model = network(space)
    found = Cost(model, space, torch.empty(1, 3, side, side)).of([space.default()])[0]
    assert (found["params"], found["flops"]) == (params, flops)
    assert sum(p.numel() for p in model.parameters()) == params


def test_resnet_ds_stem_has_no_shortcuts():
    space = SearchSpace.from_table({**OFA, "resolution": 64, "stem": {**OFA["stem"], "shortcut": False}})
    ours, x = random_state(network(space, 10)), double_noise(64)
    arch = space.arch({"stem": {"depth": 1}})
    plain = plain_resnet50d(arch, 10, middle=nn.Sequential).double().eval()
    state, own = export_subnet(ours, arch, x[:1]).state_dict(), plain.state_dict()
    plain.load_state_dict(dict(zip(own, state.values(), strict=True)))
    with torch.no_grad(), apply(ours, arch):
        torch.testing.assert_close(ours(x), plain(x), rtol=1e-9, atol=1e-9)


# -- what every backbone keeps to -------------------------------------------------------------------------------------


def part(table, most=2):
    """A space of fewer, narrower blocks in the same tables: quick."""
    small = copy.deepcopy(table)
    for place, stage in enumerate(small["stages"]):
        for kind, base in (("basic", 8), ("bottleneck", 16)):
            if kind in stage:
                blocks, when = stage[kind], {"when": {f"stages.{place}.op": kind}} if "op" in stage else {}
                choices = {"width": [base * (place + 1), base * (place + 2)], "depth": [1, most]}
                blocks |= {k: {"type": "categorical", "choices": c, **when} for k, c in choices.items()}
    small["stem"] |= {"width": [16, 24], "inner": [8, 16]} if "inner" in small["stem"] else {"width": [16, 24]}
    return small | ({"resolution": [32, 48]} if "resolution" in small else {})


@pytest.mark.parametrize("check", backbone_checks)
@pytest.mark.parametrize(("options", "table", "image"), [
    (ResNet(in_channels=1), TINY, (1, 28, 28)),
    (ResNet(levels=(2, 3), in_channels=1), TINY, (1, 32, 32)),
    (ResNet(), part(FAMILY), (3, 40, 40)),
    (ResNet(resize_mode="bicubic"), part(OFA), (3, 36, 36)),
], ids=["tiny", "levels", "family", "ofa"])  # fmt: skip
def test_conforms(options, table, image, check):
    check(options, SearchSpace.from_table(table), image=image)


def test_groups_conform_too_though_more_of_them_is_cheaper():
    table = {"stem": {"width": 16, "kernel": 3}, "stages": [{"bottleneck": {"width": [16, 32], "ratio": [0.5, 1],
             "groups": [1, 2, 8], "depth": [1, 2]}, "stride": 2}]}  # fmt: skip
    for check in backbone_checks:
        if check is not more_of_a_variable_never_costs_less:
            check(ResNet(), SearchSpace.from_table(table), image=(3, 32, 32))


@pytest.mark.parametrize("check", distribution_checks)
def test_the_distribution_conforms(check):
    check("corenas_backbone_resnet")


def test_options_are_a_backbone_under_its_name():
    assert corenas_backbones() == {"resnet": ResNet}
    assert isinstance(ResNet(), Backbone)


def test_the_tiny_space_is_the_example():
    example = SearchSpace.from_table(ResNet.example["space"])
    assert SearchSpace.from_table(TINY).variables == example.variables
    assert SearchSpace.from_table(TINY).to_table() == example.to_table()
    assert structure(ResNet.example["backbone"], ResNet) == ResNet(in_channels=1)


def test_the_readme_shows_a_spec_that_is_right():
    (spec,) = spec_fragments(Path(__file__).parents[1] / "README.md")
    backbone = load_catalogue().options("backbones", spec["backbone"])
    space = SearchSpace.from_table(tomli.loads((SPEC / spec["space"]).read_text()))
    assert keys_used(Network(backbone.build(space), 10)) == {*space.keys}


@pytest.mark.parametrize("table", [FAMILY, OFA, TINY], ids=["family", "ofa", "tiny"])
def test_every_variable_of_the_spaces_is_used(table):
    space = SearchSpace.from_table(table)
    assert keys_used(network(space)) == {*space.keys}


# -- the parts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stem", "sides"), [
    ({"width": 8}, 8),  # ImageNet's: a quarter of the side
    ({"width": 8, "pool": False}, 16),
    ({"width": 8, "kernel": 3, "stride": 1, "pool": False}, 32),  # as is usual for CIFAR
    ({"width": 8, "kernel": 3, "inner": 8, "depth": 2}, 8),
])  # fmt: skip
def test_the_stem_suits_small_images_by_its_table(stem, sides):
    space = SearchSpace.from_table({"stem": stem, "stages": [{"basic": {"width": 16, "ratio": 1}, "stride": 2}]})
    model = network(space, 10, "cpu", levels=(1,))
    assert [f.shape for f in model.backbone.features(torch.zeros(1, 3, 32, 32))] == [(1, 16, sides // 2, sides // 2)]


def test_blocks_end_in_their_norm_and_can_start_as_the_shortcut():
    model = network(SearchSpace.from_table(TINY), 10, "cpu", in_channels=1)
    blocks = [m for m in model.modules() if isinstance(m, Residual)]
    assert len(blocks) == 6
    for block in blocks:
        block.zero_init_last()
        _, last = [m for m in block.body.modules() if isinstance(m, nn.BatchNorm2d)][-2:]
        assert (last.weight == 0).all()


def test_a_stage_whose_width_may_equal_its_input_projects_only_where_it_does_not():
    space = SearchSpace.from_table(TINY)
    model = network(space, 10, "cpu", in_channels=1)
    for width in (8, 16):
        arch = space.arch({"stem": {"width": 16}, "stages": [{"basic": {"width": width}}]})
        names = export_subnet(model, arch, torch.zeros(1, 1, 28, 28)).state_dict()
        assert any("stages_0" in name and "projection" in name for name in names) == (width == 8)


# -- what a user can say ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "value", "named", "says"), [
    ("stages.0.basic.kernel", 4, "stages[0].basic.kernel", "odd whole numbers of at least 1, found 4"),
    ("stages.0.basic.ratio", 0, "stages[0].basic.ratio", "numbers above 0, found 0"),
    ("stages.0.basic.ratio", None, "stages[0].basic", "neither the stage nor each of its blocks has 'ratio'"),
    ("stages.0.basic.width", [8, 0], "stages[0].basic.width", "whole numbers of at least 1, found 0"),
    ("stages.0.basic.width", None, "stages[0].basic.width", "required key is missing"),
    ("stages.0.basic.depth", [0, 1], "stages[0].basic.depth", "found 0"),
    ("stages.0.basic.groups", 2, "stages[0].basic.groups", "have no groups"),
    ("stages.0.basic.expand", 2, "stages[0].basic.expand", "unknown key"),
    ("stages.0.stride", 0, "stages[0].stride", ">= 1"),
    ("stages.0.basic", None, "stages[0].op", "the stage has no blocks"),
    ("stages.0.op", "bottleneck", "stages[0].op", "the stage has basic blocks"),
    ("stages.1.op", None, "stages[1].op", "the stage has basic and bottleneck blocks"),
    ("stages.1.op", ["basic", "ghost"], "stages[1].op", "the stage has basic and bottleneck blocks"),
    ("stages.1.op", ["basic", "ghost"], "stages[1].op", "needs a table of its name: basic, ghost"),
    ("stages.1.op", "ghost", "stages[1].op", "'basic' or 'bottleneck', found 'ghost'"),
    ("stages.1.op", [1, 2], "stages[1].op", "the stage has basic and bottleneck blocks"),
    ("stages.1.bottleneck.groups", [1, 3], "stages[1].bottleneck.groups", "inner channels can be [16], groups [1, 3]"),
    ("stages.2.bottleneck.block.ratio", "a", "stages[2].bottleneck.blocks[0].ratio", "a number or a variable"),
    ("stem.width", [16, 0.5], "stem.width", "found 0.5"),
    ("stem.kernel", 2, "stem.kernel", "found 2"),
    ("stem.depth", 1, "stem.depth", "a stem of one convolution has no `depth`"),
    ("stem.inner", 0, "stem.inner", "found 0"),
    ("stem.pool", 1, "stem.pool", "true or false"),
    ("stem.shortcut", "none", "stem.shortcut", "true or false"),
    ("shortcut", "avg", "shortcut", "'conv' or 'pool'"),
    ("stages", None, "stages", "required key is missing"),
    ("resolution", 0, "resolution", "whole numbers of at least 1"),
    ("head", 3, "head", "unknown key"),
])  # fmt: skip
def test_a_space_that_is_none_for_it_is_answered_with_the_key(key, value, named, says):
    with pytest.raises(UserError) as caught:
        ResNet().build(SearchSpace.from_table(changed(TINY, key, value)))
    faults = [fault for fault in caught.value.faults if fault.dotted == named]
    assert faults, caught.value
    assert says in faults[0].message + (faults[0].hint or "")


@pytest.mark.parametrize(("table", "key"), [
    ({"in_channels": 0}, "in_channels"),
    ({"resize_mode": "area"}, "resize_mode"),
    ({"width": 1}, "width"),
])  # fmt: skip
def test_wrong_options_are_named(table, key):
    with pytest.raises(UserError) as caught:
        structure(table, ResNet)
    assert [fault.dotted for fault in caught.value.faults] == [key]


def test_levels_that_there_are_not_are_named():
    with pytest.raises(UserError, match="1 to 3"):
        ResNet(levels=(4,)).build(SearchSpace.from_table(TINY))


def test_what_a_space_says_is_read_without_torch():
    assert structure(SearchSpace.from_table(FAMILY).tree, Layout).stages[3].bottleneck.width.largest == 2048
