"""Further networks that were published for the family: each is an arch of a space or a table, to the last digit."""

import copy
import itertools
import math
from pathlib import Path
from unittest.mock import patch

import pytest
import tomli
import torch
from torch import nn

from corenas.cost import Cost
from corenas.export import export_subnet
from corenas.space import SearchSpace
from corenas.testing.backbones import counted
from corenas_backbone_mobilenetv3 import MobileNetV3
from corenas_mutable_slices import LinearSlice

SPACES = Path(__file__).parents[4] / "spec" / "space"


class Network(nn.Module):
    """A backbone with a linear classifier of 1000 classes, as a task builds it."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.head = LinearSlice(backbone.feat_dims[-1], 1000)

    def forward(self, x):
        return self.head(self.backbone.features(x)[-1].flatten(1))


def table_of(name):
    return tomli.loads((SPACES / f"{name}.toml").read_text())


def network(table, **options):
    """The supernet of a table, without weights, and the space."""
    space = SearchSpace.from_table(table)
    with torch.device("meta"):
        return Network(MobileNetV3(**options).build(space)), space


def figures(model, space, archs, resolution=224):
    """params and flops of archs, by the core."""
    costs = Cost(model, space, torch.empty(1, 3, resolution, resolution)).of(archs)
    return [(cost["params"], cost["flops"]) for cost in costs]


def alone(table, resolution=224, **options):
    """params and flops of the network of a table of fixed numbers."""
    model, space = network(table, **options)
    assert space.size == 1
    return figures(model, space, [space.default()], resolution)[0]


def exported(model, arch):
    """The network of an arch of a supernet without weights, whose outputs could not be compared."""
    with patch("corenas.export.difference", return_value=0.0):
        return export_subnet(model, arch, torch.empty(1, 3, 224, 224, device="meta"))


# -- Once-for-All's specialised networks: files net.config and run.config of each in han-cai/files ---------------------

# Of each width: name, resolution, kernel and expansion of the blocks of each stage; params and flops of networks of the
# reference code; millions of both in its README.
SPECIALISED = {
    1.0: [
    ("LG-G8@11ms", 156, "33 33,53 34 74,54 33,54 34 53,56 76 54", 4_965_160, 103_373_272, 5.0, 103),
    ("LG-G8@16ms", 176, "33 33,74 53 33,56 54 53,34 74 53,56 76 36 34", 5_809_576, 151_108_528, 5.8, 151),
    ("LG-G8@24ms", 220, "33 33,74 53 33,56 54 53,34 74 53,56 76 36 34", 5_809_576, 229_846_296, 5.8, 230),
    ("LG-G8@8ms", 144, "33 33,54 53,53 33 33,36 74,36 74", 4_112_176, 73_471_032, 4.1, 74),
    ("note10@11ms", 176, "33 33,54 34,54 34,34 33 33,34 54 54", 4_278_224, 109_607_488, 4.3, 110),
    ("note10@16ms", 192, "33 33,53 54 34 33,54 54 33,54 54 33,36 74 54 33", 4_932_272, 162_464_384, 4.9, 163),
    ("note10@22ms", 224, "33 33,53 34 34,74 54 54,54 36 34,36 36 36 33", 5_863_056, 237_063_424, 5.9, 237),
    ("note10@8ms", 160, "33 33,33 34,34 33 33,33 34,34 54", 3_761_168, 75_802_880, 3.8, 79),
    ("note8@22ms", 140, "33 33,53 53,74 33,53 34,36 76", 4_304_592, 67_196_888, 4.3, 67),
    ("note8@31ms", 152, "53 33,54 53,34 34 54,34 53 74,36 33 53 53", 4_595_536, 100_520_248, 4.6, 101),
    ("note8@49ms", 176, "53 34,54 34 74,74 73 34,34 36 34,36 56 36 54", 6_024_176, 163_703_024, 6.0, 164),
    ("note8@65ms", 204, "73 33,34 54 33,76 36 34,56 36 34,56 54 54 33", 5_296_672, 219_899_816, 5.3, 220),
    ("pixel1@20ms", 152, "33 33,53 53,74 33,53 34,36 76", 4_304_592, 76_664_384, 4.3, 77),
    ("pixel1@28ms", 160, "33 34,73 36 34,73 36,36 54,36 34 33 36", 5_196_680, 108_572_320, 5.2, 109),
    ("pixel1@40ms", 172, "53 34,54 34 74,74 73 34,34 36 34,36 56 36 54", 6_024_176, 162_265_088, 6.0, 162),
    ("pixel1@58ms", 220, "33 33,74 53 33,56 54 53,34 74 53,56 76 36 34", 5_809_576, 229_846_296, 5.8, 230),
    ("pixel2@25ms", 144, "33 33,56 54,74 33,74 73 34,56 34", 4_137_152, 79_266_240, 4.1, 79),
    ("pixel2@35ms", 160, "33 33,33 34 36,74 74,54 33 33 73,74 76 73 53", 5_060_264, 113_041_536, 5.1, 113),
    ("pixel2@50ms", 208, "33 34,33 33,33 56,56 74,36 53 74 53", 4_687_720, 165_999_448, 4.7, 166),
    ("pixel2@62ms", 208, "33 33,74 53 33,56 54 53,34 74 53,56 76 36 34", 5_809_576, 207_945_168, 5.8, 208),
    ("s7edge@29ms", 144, "33 33,53 34,54 34,54 54,36 53", 3_830_224, 66_444_032, 3.8, 66),
    ("s7edge@41ms", 160, "33 33,53 34,74 54,34 34 33,36 54 33 33", 4_663_872, 95_935_136, 4.7, 96),
    ("s7edge@58ms", 192, "33 33,53 34,74 53 34 33,34 34 33,36 54 54", 4_623_312, 144_701_952, 4.6, 145),
    ("s7edge@88ms", 192, "53 34,56 36 34,74 56 53,56 56 34 54,36 76 36 34", 6_426_992, 219_276_928, 6.4, 219),
    ],
    1.2: [
    ("flops@389M", 224, "33 33,53 56 33,54 54 33,56 54 34 34,36 36 76 33", 8_386_544, 389_487_856, 8.4, 389),
    ("flops@482M", 224, "53 33 33,54 34 54 33,54 56 33 33,56 76 36 54,76 36 36 33", 9_066_368, 482_413_168, 9.1, 482),
    ("flops@595M", 236, "33 54 33,54 54 36 53,76 56 33 54,36 56 76 34,36 36 56 33", 9_135_928, 595_189_032, 9.1, 595),
    ("note10@30ms", 224, "33 33,54 33 34,54 54 33,36 34 34,36 36 34 33", 7_465_896, 339_352_816, 7.5, 339),
    ("note10@41ms", 220, "33 34,74 34 36,76 36 33 34,36 56 36 34,36 36 36 33", 9_030_192, 457_252_856, 9.0, 457),
    ("note10@50ms", 220, "53 36 36,54 36 36 53,76 76 34 54,76 56 36 36,36 36 36", 9_057_064, 554_390_264, 9.1, 554),
    ("note10@64ms", 260, "33 36 33,54 36 33 53,56 56 34 74,56 36 36 34,36 36 56 33", 9_109_040, 743_131_000, 9.1, 743),
    ("pixel1@132ms", 228, "53 36,54 56 36 53,76 56 36 54,56 56 56 54,36 36 56 33", 9_225_040, 592_737_144, 9.2, 593),
    ("pixel1@143ms", 240, "53 36 33,56 56 36 53,76 56 36 34,56 36 56 34,36 36 56 33", 9_221_888, 641_756_192, 9.2, 642),
    ("pixel1@79ms", 224, "33 33,53 34,74 54 33,56 34 34 33,36 36 36 33", 8_168_608, 355_469_648, 8.2, 356),
    ],
    1.3: [
    ("1080ti@12ms", 128, "33 33,36 54 54,56 53 73,34 73 36 34,76 54 73 53,36", 5_903_488, 164_964_352, 5.9, 165),
    ("1080ti@15ms", 144, "34 34,36 36 34,33 53,33 54 33 36,36 76 74 36,53", 6_042_264, 225_760_960, 6.0, 226),
    ("1080ti@22ms", 188, "33 33,53 36,34 54 36,34 36 74,36 54 54,34", 5_186_720, 312_808_424, 5.2, 313),
    ("1080ti@27ms", 188, "33 33,36 56 34 34,56 33 54,56 34 54,36 56 73 36,76", 6_493_328, 396_707_912, 6.5, 397),
    ("cpu@10ms", 144, "54 33,33 33,73 33 73,53 54,53 34,34", 4_158_272, 143_192_752, 4.2, 143),
    ("cpu@11ms", 144, "54 53,33 73,54 34 73,54 74,36 34,54", 4_394_600, 160_315_320, 4.4, 160),
    ("cpu@15ms", 188, "33 33,34 36,76 34,54 36 36,56 33,76", 4_875_704, 300_991_560, 4.9, 301),
    ("cpu@17ms", 208, "33 34,53 34,36 73 33,53 54 36,36 54 33,34", 4_933_568, 364_488_032, 4.9, 365),
    ("tx2@35ms", 128, "34 33,36 76,56 53,53 34,56 34,54", 4_315_144, 121_204_736, 4.3, 121),
    ("tx2@47ms", 144, "33 34,53 34,36 73 33,53 54 36,36 54 33,34", 4_933_568, 179_272_800, 4.9, 179),
    ("tx2@80ms", 188, "33 33,53 36,34 54 36,34 36 74,36 54 54,34", 5_186_720, 312_808_424, 5.2, 313),
    ("tx2@96ms", 172, "33 34 36,73 54,34 54 54 53,54 73 73 36,36 36 56 34,53", 6_163_200, 348_919_456, 6.2, 349),
    ("v100@11ms", 192, "33 33,56 53,73 33 74,74 54 33 74,36 56 54 36,34", 6_195_512, 351_764_864, 6.2, 352),
    ("v100@5ms", 128, "33 33,53 36,34 54 36,34 36 74,36 54 54,34", 5_186_720, 141_197_824, 5.2, 141),
    ("v100@6ms", 144, "33 34,53 34,36 73 33,53 54 36,36 54 33,34", 4_933_568, 179_272_800, 4.9, 179),
    ("v100@9ms", 188, "33 33,53 36,34 54 36,34 36 74,36 54 54,34", 5_186_720, 312_808_424, 5.2, 313),
    ],
}  # fmt: skip

WIDTHS = {1.0: "ofa-mobilenetv3", 1.2: "ofa-mobilenetv3", 1.3: "ofa-proxyless"}


def blocks(text):
    """Choices of the stages behind the first from kernel and expansion of each of their blocks."""
    stages = dict(enumerate((stage.split() for stage in text.split(",")), 1))
    found = {f"stages.{i}.depth": len(row) for i, row in stages.items() if i < 6}
    for i, row in stages.items():
        for j, pair in enumerate(row):
            where = f"stages.{i}." if i == 6 else f"stages.{i}.blocks.{j}."
            found |= {where + name: int(digit) for name, digit in zip(("kernel", "expand"), pair, strict=True)}
    return found


@pytest.mark.parametrize("width_mult", WIDTHS)
def test_specialised_networks_of_once_for_all_are_archs_of_its_spaces(width_mult):
    rows = SPECIALISED[width_mult]
    # Some are for more pixels than the supernet was trained with.
    table = table_of(WIDTHS[width_mult]) | {"resolution": sorted({row[1] for row in rows})}
    model, space = network(table, width_mult=width_mult)
    archs = [space.arch({"resolution": row[1], **blocks(row[2])}) for row in rows]
    expected = {row[0]: (row[3], row[4]) for row in rows}
    assert dict(zip(expected, figures(model, space, archs), strict=True)) == expected
    for arch, row in [*zip(archs, rows, strict=True)][::6]:
        plain = counted(exported(model, arch), (3, 224, 224))  # it resizes what it is given
        assert (plain["params"], plain["flops"]) == expected[row[0]]
    for arch in archs:
        if arch["resolution"] <= 224:
            SearchSpace.from_table(table_of(WIDTHS[width_mult])).arch(dict(arch))


def test_their_figures_are_those_of_the_readme_of_once_for_all():
    for name, *_, params, flops, million_params, million_flops in itertools.chain(*SPECIALISED.values()):
        assert round(params / 1e6, 1) == million_params, name
        # Its flops are rounded up here and there; what it says of one network is not what its files describe.
        assert -0.6 < million_flops - flops / 1e6 < 1 or name == "note10@8ms", name


# -- AttentiveNAS's networks in mmrazor: A3, A5 and A6 are others than in its own repository --------------------------

# Resolution; widths of stem, stages and last layer; kernel, expansion and depth of each stage, as in mmrazor's
# ATTENTIVE_SUBNET_A*.yaml; params and flops. Its README says 15.594M params of A6.
MMRAZOR = [
    (224, "16,16,24,32,64,112,208,224,1984", "3333533", "1444466", "2334351", 12_789_024, 357_321_216),
    (256, "16,16,24,32,64,112,192,224,1792", "3335333", "1454466", "1333461", 12_676_880, 485_108_736),
    (288, "16,24,32,40,72,128,216,224,1984", "3333353", "1465466", "1334461", 15_593_520, 897_385_312),
]


def test_mmrazors_attentive_networks_are_archs_of_attentivenas_space():
    model, space = network(table_of("attentivenas"))
    archs = []
    for resolution, widths, *stagewise, _, _ in MMRAZOR:
        stem, *widths, last = map(int, widths.split(","))
        stages = [dict(zip(("width", "kernel", "expand", "depth"), map(int, (width, *digits)), strict=True))
                  for width, *digits in zip(widths, *stagewise, strict=True)]  # fmt: skip
        for i in (0, 5, 6):  # their expansion is no choice
            del stages[i]["expand"]
        whole = {"resolution": resolution, "stem": {"width": stem}, "head": {"width": last}}
        archs.append(space.arch({**whole, "stages": stages}))
    assert figures(model, space, archs) == [(params, flops) for *_, params, flops in MMRAZOR]


# -- tables of fixed numbers -------------------------------------------------------------------------------------------


def parsed(text, strides, act="relu", first_act=None, se=True, **more):
    """Stages from "16:31 | 24:53 33s": width, kernel and expansion of each block, s for squeeze-and-excitation.

    first_act: activation of stages before the fourth, if it is another
    """
    stages = []
    for i, (row, stride) in enumerate(zip(text.split("|"), strides, strict=True)):
        width, _, kinds = row.partition(":")
        own = first_act if first_act and i < 3 else act
        for excited, group in itertools.groupby(kinds.split(), key=lambda kind: kind.endswith("s")):
            pairs = [kind.rstrip("s") for kind in group]
            inner = [{"kernel": int(pair[0]), "expand": float(pair[1:])} for pair in pairs]
            part = {"width": int(width), "stride": stride, "act": own, "se": se if excited else False, "blocks": inner}
            stages.append({**part, **(more if i == 0 else {})})
            stride = 1
    return stages


# Each: stem, stages, channels of the head, params and flops of the reference code's network at 224.
PROXYLESS = {  # mit-han-lab/proxylessnas, its configs in han-cai/files
    "cpu": (
        40,
        "24:31|32:36 33 33 33|48:36 33 33 53|88:36 33|104:56 33 33 33|216:56 53 53 33|360:56",
        1432,
        4_361_648,
        439_243_864,
    ),
    "gpu": (40, "24:31|32:53|56:73 33|112:76 53|128:56 33 53|256:76 76 76 56|432:76", 1728, 7_119_848, 465_260_160),
    "mobile": (
        32,
        "16:31|32:53 33|40:73 33 53 53|80:76 53 53 53|96:56 53 53 53|192:76 76 73 73|320:76",
        1280,
        4_080_512,
        320_427_584,
    ),
    "mobile_14": (
        48,
        "24:31|40:53 33|56:73 33 53 53|112:76 53 53 53|136:56 53 53 53|256:76 76 73 73|448:76",
        1792,
        6_857_568,
        580_883_408,
    ),
}


@pytest.mark.parametrize("name", PROXYLESS)
def test_networks_of_proxylessnas_are_tables(name):
    stem, text, head, params, flops = PROXYLESS[name]
    stages = parsed(text, (1, 2, 2, 2, 1, 2, 1), "relu6", shortcut="none")
    table = {"stem": {"width": stem, "act": "relu6"}, "stages": stages, "head": {"expand": head, "act": "relu6"}}
    assert alone(table, norm_eps=1e-3) == (params, flops)


# Yu and Huang 2019, arXiv:1903.11728, channels as in open-mmlab/mmrazor's tests/data/MBV2_*.yaml: of the stem; of each
# stage and inside each of its blocks. Published are 4.13M, 5.77M and 6.5M params (mmrazor) and 305M flops (the paper).
AUTOSLIM = [
    (
        8,
        "8:8|16:96 96|24:96 144 144|48:144 288 288 288|64:288 432 432|176:648 720 720|280:1440",
        4_125_104,
        206_767_048,
    ),
    (
        8,
        "8:8|16:96 96|24:96 144 144|56:144 288 288 288|96:288 432 432|240:864 1440 960|480:1440",
        5_767_288,
        305_072_416,
    ),
    (
        32,
        "16:32|24:144 176|48:192 240 144|88:264 288 336 432|144:576 576 648|240:864 1440 1440|480:1440",
        6_495_992,
        504_934_400,
    ),
]


def inverted(inputs, inner, width, stride):
    """Layers of a MobileNetV2 block, of torch."""
    layers = [] if inner == inputs else [nn.Conv2d(inputs, inner, 1, bias=False), nn.BatchNorm2d(inner)]
    layers += [nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False), nn.BatchNorm2d(inner)]
    return [*layers, nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width)]


@pytest.mark.parametrize(("stem", "text", "params", "flops"), AUTOSLIM)
def test_networks_of_autoslim_are_tables_with_an_expansion_for_each_block(stem, text, params, flops):
    head = 1920
    plain = [nn.Conv2d(3, stem, 3, 2, 1, bias=False), nn.BatchNorm2d(stem)]
    inputs, stages = stem, []
    for row, stride in zip(text.split("|"), (1, 2, 2, 2, 1, 2, 1), strict=True):
        width, *inner = map(int, row.replace(":", " ").split())
        own = {"width": width, "stride": stride, "act": "relu6", "kernel": 3, "blocks": []}
        for i, channels in enumerate(inner):
            own["blocks"].append({"expand": channels / inputs})
            plain += inverted(inputs, channels, width, stride if i == 0 else 1)
            inputs = width
        stages.append(own if stages else {**own, "shortcut": "none"})
    plain += [nn.Conv2d(inputs, head, 1, bias=False), nn.BatchNorm2d(head), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    table = {"stem": {"width": stem, "act": "relu6"}, "stages": stages, "head": {"expand": head, "act": "relu6"}}
    assert alone(table) == (params, flops)
    assert counted(nn.Sequential(*plain, nn.Linear(head, 1000)), (3, 224, 224)) == {"params": params, "flops": flops}


INPUTS_SE = {"of": "inputs", "divisor": 1, "gate": "sigmoid"}
A1 = parsed("16:31|24:36 36|40:53s 53s 53s|80:36 36 36 36|112:36s 36s|160:56s 56s 56s|320:36", (1, 2, 2, 2, 1, 2, 1),
            se=INPUTS_SE, shortcut="none")  # fmt: skip
SMALL = parsed("8:31|16:33|16:36 36|32:56s 56s 56s 56s|32:36s 36s 36s|88:56s 56s 56s|144:36", (1, 2, 2, 2, 1, 2, 1),
               se=INPUTS_SE)  # fmt: skip
SPNAS = parsed("16:31|24:33 33 33|40:56 33 33 33|80:56 33 33 33|96:56 53 53 53|192:56 56 56 56|320:36",
               (1, 2, 2, 2, 1, 2, 1))  # fmt: skip
HARDCORE = {  # Nayman et al. 2021, arXiv:2102.11646
    "a": "16:31|24:53 53s|40:53 56s|80:56s 56s|112:56s 56s|192:56s 56s",
    "b": "16:31|24:53 53s 33|40:53 53 53|80:53 53 33 33|112:53 33 33 33|192:56s 56s 33s",
    "c": "16:31|24:53 53s|40:53 53 53 53|80:54 56s 33 33|112:56s 33 33 33|192:56s 56s 33s",
    "d": "16:31|24:53s 53s|40:53s 54s 33s|80:54s 33s 33s 33s|112:34s 54s 33s 53s|192:56s 56s 56s 36s",
    "e": "16:31|24:53s 53s|40:56s 54s 54s 33s|80:54s 36s|112:56s 56s 56s 53s|192:56s 56s 56s 36s",
    "f": "16:31|24:53s 53s|40:56s 56s|80:56s 56s 33s 33s|112:36s 56s 56s 33s|192:56s 56s 36s 36s",
}


def mnas(stem, stages):
    return {"stem": {"width": stem, "act": "relu"}, "stages": stages,
            "head": {"expand": 1280, "act": "relu", "scale": "never"}}  # fmt: skip


def hardcore(text):
    stages = parsed(text, (1, 2, 2, 2, 1, 2), "h_swish", first_act="relu")
    return {"stem": {"width": 32}, "stages": stages, "head": {"expand": 960, "width": 1280, "bias": True}}


def minimal(name):
    """MobileNetV3 without squeeze-and-excitation, h-swish and 5x5 kernels, as TensorFlow's repository has it."""
    table = table_of(name)
    table["stages"] = [{**stage, "kernel": 3, "act": "relu", "se": False} for stage in table["stages"]]
    return {**table, "stem": {**table["stem"], "act": "relu"}, "head": {**table["head"], "act": "relu"}}


def deeper(name, depth_mult, inner_only=False):
    """A table with more blocks in each stage, or in each but the first and the last."""
    table = copy.deepcopy(table_of(name))
    for stage in table["stages"][1:-1] if inner_only else table["stages"]:
        stage["depth"] = math.ceil(stage.get("depth", 1) * depth_mult)
    return table


TIMM = {  # name in timm 1.0.31: table, width_mult, params, flops as they are there
    "mobilenetv3_large_075": (table_of("mobilenetv3-large"), 0.75, 3_993_528, 154_560_624),
    "mobilenetv3_large_100": (table_of("mobilenetv3-large"), 1.0, 5_483_032, 216_589_760),
    "mobilenetv3_small_050": ({**table_of("mobilenetv3-small"), "stem": {"width": 32}}, 0.5, 1_593_224, 24_188_688),
    "mobilenetv3_small_075": (table_of("mobilenetv3-small"), 0.75, 2_041_872, 43_399_344),
    "tf_mobilenetv3_large_minimal_100": (minimal("mobilenetv3-large"), 1.0, 3_924_288, 209_136_704),
    "tf_mobilenetv3_small_minimal_100": (minimal("mobilenetv3-small"), 1.0, 2_044_736, 52_288_448),
    "mobilenetv2_035": (table_of("mobilenetv2"), 0.35, 1_677_128, 59_285_808),
    "mobilenetv2_050": (table_of("mobilenetv2"), 0.5, 1_968_680, 97_131_840),
    "mobilenetv2_075": (table_of("mobilenetv2"), 0.75, 2_636_424, 209_069_792),
    "mobilenetv2_140": (table_of("mobilenetv2"), 1.4, 6_108_776, 582_195_824),
    "mnasnet_050": (table_of("mnasnet"), 0.5, 2_218_512, 104_455_968),
    "mnasnet_075": (table_of("mnasnet"), 0.75, 3_170_208, 215_493_104),
    "mnasnet_140": (table_of("mnasnet"), 1.4, 7_115_728, 588_799_408),
    "mnasnet_small": (mnas(8, SMALL), 1.0, 2_030_264, 68_339_184),
    "semnasnet_050": (mnas(32, A1), 0.5, 2_082_006, 103_162_992),
    "semnasnet_075": (mnas(32, A1), 0.75, 2_912_278, 223_448_480),
    "semnasnet_100": (mnas(32, A1), 1.0, 3_887_038, 311_579_072),
    "semnasnet_140": (mnas(32, A1), 1.4, 6_105_992, 586_317_952),
    "spnasnet_100": (mnas(32, SPNAS), 1.0, 4_421_616, 333_467_072),
    "hardcorenas_a": (hardcore(HARDCORE["a"]), 1.0, 5_260_232, 224_227_936),
    "hardcorenas_b": (hardcore(HARDCORE["b"]), 1.0, 5_176_544, 251_832_064),
    "hardcorenas_c": (hardcore(HARDCORE["c"]), 1.0, 5_521_224, 270_058_400),
    "hardcorenas_d": (hardcore(HARDCORE["d"]), 1.0, 7_500_208, 287_787_616),
    "hardcorenas_e": (hardcore(HARDCORE["e"]), 1.0, 8_070_992, 338_689_760),
    "hardcorenas_f": (hardcore(HARDCORE["f"]), 1.0, 8_199_688, 341_905_696),
}


@pytest.mark.parametrize("name", TIMM)
def test_networks_of_timm_are_tables(name):
    table, width_mult, params, flops = TIMM[name]
    assert alone(table, width_mult=width_mult) == (params, flops)


@pytest.mark.parametrize(("name", "file", "width_mult", "depth_mult", "resolution"), [
    ("mnasnet0_5", "mnasnet", 0.5, 1, 224), ("mnasnet0_75", "mnasnet", 0.75, 1, 224),
    ("mnasnet1_3", "mnasnet", 1.3, 1, 224),
    ("efficientnet_b1", "efficientnet-b0", 1.0, 1.1, 240), ("efficientnet_b2", "efficientnet-b0", 1.1, 1.2, 288),
])  # fmt: skip
def test_torchvisions_scaled_networks_are_the_same_tables_wider_and_deeper(
    name, file, width_mult, depth_mult, resolution
):
    models = pytest.importorskip("torchvision.models")
    params, flops = alone(deeper(file, depth_mult), resolution, width_mult=width_mult)
    with torch.device("meta"):
        assert counted(models.get_model(name), (3, resolution, resolution)) == {"params": params, "flops": flops}
    assert params == next(iter(models.get_model_weights(name))).meta["num_params"]


@pytest.mark.parametrize("size", ["large", "small"])
@pytest.mark.parametrize(("width_mult", "reduced_tail"), [(0.75, False), (1.25, False), (1.0, True)])
def test_torchvisions_mobilenetv3_of_any_width_is_a_table(size, width_mult, reduced_tail):
    models = pytest.importorskip("torchvision.models")
    how = {"width_mult": width_mult, "reduced_tail": reduced_tail}
    settings, last = models.mobilenetv3._mobilenet_v3_conf(f"mobilenet_v3_{size}", **how)
    stages = [
        {"width": row.out_channels, "kernel": row.kernel, "expand": row.expanded_channels / row.input_channels,
         "stride": row.stride, "act": "h_swish" if row.use_hs else "relu", "se": row.use_se}
        for row in settings
    ]  # fmt: skip
    head = {"expand": 6 * settings[-1].out_channels, "width": last, "bias": True}
    params, flops = alone({"stem": {"width": settings[0].input_channels}, "stages": stages, "head": head})
    with torch.device("meta"):
        theirs = getattr(models, f"mobilenet_v3_{size}")(**how)
    assert counted(theirs, (3, 224, 224)) == {"params": params, "flops": flops}


@pytest.mark.parametrize(("scale", "widths"), [
    ("always", {0.5: 48, 1.0: 96, 2.0: 192}), ("up", {0.5: 96, 1.0: 96, 2.0: 192}),
    ("never", {0.5: 96, 1.0: 96, 2.0: 96}),
])  # fmt: skip
@pytest.mark.parametrize("head", [{"expand": 96}, {"expand": 64, "width": 96}])
def test_the_head_says_whether_its_last_layer_grows_and_shrinks_with_the_others(scale, widths, head):
    table = {
        "stem": {"width": 16},
        "stages": [{"width": 16, "kernel": 3, "expand": 1}],
        "head": {**head, "scale": scale},
    }
    for width_mult, expected in widths.items():
        model, _ = network(table, width_mult=width_mult)
        assert model.head.in_features == expected
        if "width" in head:
            convolution = [module for module in model.modules() if isinstance(module, nn.Conv2d)][-1]
            assert convolution.out_channels == 64 * width_mult


def test_the_readme_has_these_figures():
    readme = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
    rows = [*MMRAZOR, *PROXYLESS.values(), *AUTOSLIM, *(TIMM[f"hardcorenas_{letter}"] for letter in HARDCORE)]
    assert not [number for *_, params, flops in rows for number in (params, flops) if f"{number:,}" not in readme]
