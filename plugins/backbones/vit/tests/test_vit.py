"""Vision transformers: figures of DeiT, torchvision and AutoFormer, weights of torchvision, options and tables."""

import copy
import itertools
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import tomli
import tomli_w
import torch
from torch import nn

from corenas.cli import main
from corenas.contracts import Backbone, ExportContext
from corenas.cost import Cost
from corenas.errors import UserError
from corenas.export import export_subnet
from corenas.mutable import apply
from corenas.options import structure
from corenas.plugins import load_catalogue
from corenas.regularisation import DropPath
from corenas.run.spec import load_spec
from corenas.space import SearchSpace
from corenas.supernet import build_supernet
from corenas.testing import backbones
from corenas.testing.backbones import backbone_checks
from corenas.testing.components import spec_fragments
from corenas.testing.distributions import distribution_checks
from corenas_backbone_vit import VisionTransformer, corenas_backbones
from corenas_backbone_vit.weights import NETWORKS, torchvision_name
from corenas_mutable_slices import LinearSlice
from corenas_mutable_slices.exchange import load, published

models = pytest.importorskip("torchvision.models")

SPACES = Path(__file__).parents[4] / "spec" / "space"
TINY = VisionTransformer.example["space"]


def table_of(name):
    return tomli.loads((SPACES / f"{name}.toml").read_text())


class Network(nn.Module):
    """A backbone with a linear classifier, as a task builds it."""

    def __init__(self, backbone, classes):
        super().__init__()
        self.backbone = backbone
        self.head = LinearSlice(backbone.feat_dims[-1], classes)

    def forward(self, x):
        return self.head(self.backbone.features(x)[-1])


def network(space, classes=1000, device="cpu", **options):
    torch.manual_seed(0)
    with torch.device(device):
        return Network(VisionTransformer(**options).build(space), classes)


def counted(plain, resolution=224, channels=3):
    """params and flops of a plain network."""
    found = backbones.counted(plain, (channels, resolution, resolution))
    return found["params"], found["flops"]


def costed(model, space, arch):
    cost = Cost(model, space, torch.empty(1, 3, 224, 224)).of([arch])[0]
    return cost["params"], cost["flops"]


def export_unchecked(model, arch, resolution=224):
    """Exported from the meta device, where there are no outputs to compare."""
    with patch("corenas.export.difference", return_value=0.0):
        return export_subnet(model, arch, torch.empty(1, 3, resolution, resolution, device="meta"))


# -- figures ----------------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """A vision transformer in plain torch, with attention written out."""

    def __init__(self, width, blocks, mlp_ratio=4, patch=16, tokens=197):
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token, self.position = nn.Parameter(torch.zeros(1, 1, width)), nn.Parameter(torch.zeros(1, tokens, width))
        self.blocks = nn.ModuleList(
            nn.ModuleDict({
                "norm1": nn.LayerNorm(width), "qkv": nn.Linear(width, 3 * 64 * heads),
                "project": nn.Linear(64 * heads, width),
                "norm2": nn.LayerNorm(width), "fc1": nn.Linear(width, int(width * ratio)),
                "fc2": nn.Linear(int(width * ratio), width),
            }) for heads, ratio in blocks
        )  # fmt: skip
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, x):
        x = self.patches(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        for block in self.blocks:
            q, k, v = (
                part.unflatten(2, (-1, 64)).transpose(1, 2) for part in block["qkv"](block["norm1"](x)).chunk(3, 2)
            )
            mean = (q @ k.mT / 8).softmax(-1) @ v
            x = x + block["project"](mean.transpose(1, 2).flatten(2))
            x = x + block["fc2"](nn.functional.gelu(block["fc1"](block["norm2"](x))))
        return self.head(self.norm(x)[:, 0])


@pytest.fixture(scope="module")
def family():
    """The space around ViT and DeiT, its supernet without weights, and its cost."""
    space = SearchSpace.from_table(table_of("vit"))
    model = network(space, device="meta")
    return space, model, Cost(model, space, torch.empty(1, 3, 224, 224))


def alone(table, **options):
    """A space of one network, this on the meta device."""
    space = SearchSpace.from_table(table)
    assert space.size == 1
    return space, network(space, device="meta", **options)


@pytest.mark.parametrize(("name", "params"), [
    ("deit_tiny", 5_717_416), ("deit_small", 22_050_664), ("deit_base", 86_567_656),
    ("vit_b_16", 86_567_656), ("vit_l_16", 304_326_632),
])  # fmt: skip
def test_deit_and_vit_are_archs_of_the_space_around_them(family, name, params):
    space, _, cost = family
    choices = NETWORKS[name]
    arch = space.arch(choices)
    found = cost.of([arch])[0]
    with torch.device("meta"):
        blocks = [(block["heads"], block["mlp_ratio"]) for block in choices["stages"][0]["blocks"]]
        expected = counted(Plain(choices["width"], blocks))
    assert expected[0] == params
    assert (found["params"], found["flops"]) == expected
    model = network(space.fix(arch), device="meta")
    assert counted(export_unchecked(model, arch)) == expected


WEIGHTS = [weights for name in ("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14")
           for weights in models.get_model_weights(name)]  # fmt: skip


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_torchvisions_published_figures_come_out_to_the_last_digit(weights):
    name, resolution = weights.__class__.__name__.removesuffix("_Weights").lower(), weights.meta["min_size"][0]
    size, patch_size = name.removeprefix("vit_").split("_")
    width, depth, heads = {"b": (768, 12, 12), "l": (1024, 24, 16), "h": (1280, 32, 16)}[size]
    stage = {"depth": depth, "heads": heads, "head_dim": width // heads, "mlp_ratio": 4}
    space, model = alone({"width": width, "resolution": resolution, "patch": int(patch_size), "stages": [stage]})
    params, flops = costed(model, space, space.default())
    assert params == weights.meta["num_params"]
    assert round(flops / 1e9, 3) == weights.meta["_ops"]
    with torch.device("meta"):
        theirs = getattr(models, name)(image_size=resolution)
    assert counted(theirs, resolution)[0] == params
    assert counted(export_unchecked(model, space.default(), resolution), resolution) == (params, flops)


SIZES = {  # width, depth, heads, MLP ratio
    "tiny": (192, 12, 3, 4), "small": (384, 12, 6, 4), "base": (768, 12, 12, 4), "large": (1024, 24, 16, 4),
    "huge": (1280, 32, 16, 4), "giant": (1408, 40, 16, 48 / 11), "gigantic": (1664, 48, 16, 64 / 13),
}  # fmt: skip
TIMM = [  # params and flops with 1000 classes, measured on the networks of timm 1.0.31 with attention written out
    ("deit_base_patch16_384", 86_859_496, 55_484_350_464),
    ("vit_tiny_patch16_224", 5_717_416, 1_253_683_200),
    ("vit_tiny_patch16_384", 5_790_376, 4_682_219_520),
    ("vit_small_patch16_224", 22_050_664, 4_598_882_304),
    ("vit_small_patch16_384", 22_196_584, 15_490_351_104),
    ("vit_small_patch32_224", 22_878_952, 1_142_909_952),
    ("vit_small_patch32_384", 22_915_432, 3_442_900_992),
    ("vit_small_patch8_224", 22_055_272, 22_405_742_592),
    ("vit_base_patch16_224", 86_567_656, 17_563_828_224),
    ("vit_base_patch16_384", 86_859_496, 55_484_350_464),
    ("vit_base_patch32_224", 88_224_232, 4_409_186_304),
    ("vit_base_patch32_384", 88_297_192, 13_043_564_544),
    ("vit_base_patch8_224", 86_576_872, 78_148_337_664),
    ("vit_large_patch16_224", 304_326_632, 61_554_712_576),
    ("vit_large_patch16_384", 304_715_752, 191_066_300_416),
    ("vit_large_patch32_224", 306_535_400, 15_377_539_072),
    ("vit_large_patch32_384", 306_632_680, 45_275_963_392),
    ("vit_large_patch14_224", 304_203_752, 81_013_006_336),
    ("vit_huge_patch14_224", 632_045_800, 167_295_109_120),
    ("vit_giant_patch14_224", 1_012_611_432, 267_031_491_584),
    ("vit_gigantic_patch14_224", 1_844_440_680, 483_747_550_208),
]


@pytest.mark.parametrize(("name", "params", "flops"), TIMM)
def test_timms_transformers_of_all_sizes_and_patches_are_tables(name, params, flops):
    _, size, patch_size, resolution = name.split("_")
    width, depth, heads, ratio = SIZES[size]
    stage = {"depth": depth, "heads": heads, "head_dim": width // heads, "mlp_ratio": ratio}
    patch_size = int(patch_size.removeprefix("patch"))
    table = {"width": width, "resolution": int(resolution), "patch": patch_size, "stages": [stage]}
    space, model = alone(table)
    assert costed(model, space, space.default()) == (params, flops)


def test_mmrazors_autoformer_is_an_arch_of_autoformers_space():
    heads, ratios = (10, 10, 10, 8, 10, 9, 8, 8, 9, 8, 10, 10, 9, 10), [3.5] * 3 + [4, 3, 3, 3.5, 3.5] + [4] * 6
    blocks = [{"heads": h, "mlp_ratio": ratio} for h, ratio in zip(heads, ratios, strict=True)]
    space = SearchSpace.from_table(table_of("autoformer-base"))
    model = network(space, device="meta")
    params, _ = costed(model, space, space.arch({"width": 576, "stages": [{"depth": 14, "blocks": blocks}]}))
    bare = 197 * 576 + 14 * 4 * 30 * 64  # its counter leaves out position embedding and relative position tables
    assert round((params - bare) / 1e6, 3) == 54.319  # README of its configs/nas/mmcls/autoformer


# microsoft/Cream, AutoFormer/experiments/subnet: width, heads and MLP ratio of each block; params by its own code.
RELEASED = {
    "tiny": (192, "3333333333433", (3.5, 3.5, 3, 3.5, 3, 3, 4, 4, 3.5, 4, 3.5, 4, 3.5), 5_867_944),
    "small": (384, "6657555667767", (3, 3.5, 3, 3.5, 4, 4, 4, 4, 4, 4, 4, 3.5, 4), 22_891_432),
    "base": (576, (9, 9, 9, 9, 9, 10, 9, 9, 10, 9, 10, 9, 9, 10),
             (3.5, 3.5, 4, 3.5, 4, 3.5, 3.5, 3, 4, 4, 3, 4, 3, 3.5), 53_691_688),
}  # fmt: skip
FLOPS = {"tiny": 1.3, "small": 5.1, "base": 11}  # 1e9, table 2 of the paper


def released(size):
    width, heads, ratios, _ = RELEASED[size]
    blocks = [{"heads": int(h), "mlp_ratio": ratio} for h, ratio in zip(heads, ratios, strict=True)]
    return width, blocks


@pytest.mark.parametrize("size", RELEASED)
def test_the_released_autoformers_have_the_parameters_of_the_reference_code(size):
    width, blocks = released(size)
    space, model = alone({**table_of(f"autoformer-{size}"), "width": width, "stages": [{"blocks": blocks}]})
    params, flops = costed(model, space, space.default())
    assert params == RELEASED[size][3]
    assert flops / 1e9 == pytest.approx(FLOPS[size], rel=0.06)
    assert counted(export_unchecked(model, space.default())) == (params, flops)
    # Without relative positions it is a plain transformer; their tables are 4 of 30 vectors of 64 in each block.
    space, model = alone({"width": width, "stages": [{"blocks": blocks}]})
    with torch.device("meta"):
        plain = counted(Plain(width, [(block["heads"], block["mlp_ratio"]) for block in blocks]))
    assert costed(model, space, space.default()) == plain
    assert plain[0] + 4 * 30 * 64 * len(blocks) == params


@pytest.mark.parametrize("size", ["small", "base"])  # T has a ratio of 3, which its space does not
def test_the_released_autoformers_are_archs_of_their_spaces(size):
    width, blocks = released(size)
    space = SearchSpace.from_table(table_of(f"autoformer-{size}"))
    arch = space.arch({"width": width, "stages": [{"depth": len(blocks), "blocks": blocks}]})
    model = network(space, device="meta")
    assert costed(model, space, arch)[0] == RELEASED[size][3]


# Table 1 of the paper: lowest, highest, step.
TABLE_1 = {
    "tiny": {"width": (192, 240, 24), "mlp_ratio": (3.5, 4, 0.5), "heads": (3, 4, 1), "depth": (12, 14, 1)},
    "small": {"width": (320, 448, 64), "mlp_ratio": (3, 4, 0.5), "heads": (5, 7, 1), "depth": (12, 14, 1)},
    "base": {"width": (528, 624, 48), "mlp_ratio": (3, 4, 0.5), "heads": (8, 10, 1), "depth": (14, 16, 1)},
}


@pytest.mark.parametrize("size", TABLE_1)
def test_autoformers_spaces_are_those_of_the_paper(size):
    space = SearchSpace.from_table(table_of(f"autoformer-{size}"))
    expected = {
        name: [*np.arange(low, high + step, step).tolist()] for name, (low, high, step) in TABLE_1[size].items()
    }
    for variable in space.variables:
        assert sorted(variable.choices) == expected[variable.key.split(".")[-1]], variable.key
    per_block = len(expected["mlp_ratio"]) * len(expected["heads"])
    assert space.size == len(expected["width"]) * sum(per_block**depth for depth in map(int, expected["depth"]))
    everything = math.prod(len(variable.choices) for variable in space.variables)
    assert everything == 9 * per_block ** int(expected["depth"][-1])
    if size == "base":
        assert everything == pytest.approx(1.7e16, rel=0.02)  # "more than 1.7 x 10^16": all variables in any depth
    tokens = {"tiny": (4e6, 11e6), "small": (13e6, 35e6), "base": (39e6, 77e6)}[size]
    model = network(space, device="meta")
    for arch in (space.smallest(), space.largest()):
        assert tokens[0] < costed(model, space, arch)[0] < tokens[1]


# -- the largest weights and their slices -----------------------------------------------------------------------------


def test_the_supernet_has_no_weight_beyond_its_largest_subnet(family):
    space, model, cost = family
    assert sum(p.numel() for p in model.parameters()) == cost.of([space.largest()])[0]["params"]


def test_the_mlps_inner_features_are_rounded_down():
    _, model = alone({**TINY, "width": 50, "stages": [{"depth": 1, "heads": 1, "mlp_ratio": 3.31}]})
    assert model.backbone.stages[0].blocks[0].mlp.body.expand.out_features == 165  # of 165.5


def test_linear_layers_begin_as_xavier_has_them_and_tokens_and_tables_small():
    model = network(SearchSpace.from_table({**TINY, "width": 256, "relative_position": 3}), in_channels=1)
    block = model.backbone.stages[0].blocks[0]
    for linear in (block.attention.body.qkv, block.attention.body.project, block.mlp.body.expand):
        wanted = (2 / sum(linear.weight.shape)) ** 0.5
        assert float(linear.weight.detach().std()) == pytest.approx(wanted, rel=0.1)
        assert not linear.bias.any()
    for parameter in (model.backbone.stem.position.weight, block.attention.body.attention.keys.rows.weight):
        assert float(parameter.detach().std()) == pytest.approx(0.02, rel=0.15)


# -- torchvision ------------------------------------------------------------------------------------------------------


def random_weights(make, *args, **options):
    """A network of torchvision."""
    with torch.device("meta"):
        model = make(*args, **options).double().eval()
    generator = torch.Generator().manual_seed(1)
    state = {name: torch.randn(t.shape, generator=generator).double() / 10 for name, t in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    return model


def weights_move_both_ways(theirs, space, arch, x):
    ours = network(space, theirs.num_classes, "meta").double().eval().to_empty(device="cpu")
    for parameter in ours.parameters():
        nn.init.constant_(parameter, torch.nan)  # what is not loaded must not be used
    load(ours, arch, theirs.state_dict(), torchvision_name)
    with torch.no_grad(), apply(ours, arch):
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-9, atol=1e-9)
    assert any(tensor.isnan().any() for tensor in ours.parameters())
    state, expected = published(export_subnet(ours, arch, x[:1]), torchvision_name), theirs.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    theirs.load_state_dict(state, strict=True)


def test_a_small_vit_of_torchvision_loads_computes_the_same_and_goes_back():
    theirs = random_weights(models.VisionTransformer, 32, 8, 3, 2, 24, 60, num_classes=7)
    table = {"width": [24, 32], "resolution": 32, "patch": 8, "stages": [
        {"depth": [2, 3, 4], "head_dim": 12, "block": {"heads": [1, 2, 3], "mlp_ratio": [2, 2.5, 3]}}]}  # fmt: skip
    space = SearchSpace.from_table(table)
    blocks = [{"heads": 2, "mlp_ratio": 2.5}] * 3
    arch = space.arch({"width": 24, "stages": [{"depth": 3, "blocks": blocks}]})
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights_move_both_ways(theirs, space, arch, x)


def test_vit_b_16_loads_computes_the_same_and_goes_back():
    # A little more than it is: the whole space is ten times as large. On images of 17 tokens.
    narrow = {"width": [384, 768], "stages.*.depth": [12], "*.heads": [12], "*.0.heads": [12, 16], "*.mlp_ratio": [4]}
    space = SearchSpace.from_table({**table_of("vit"), "resolution": 64}).narrow(narrow)
    theirs = random_weights(models.vit_b_16, image_size=64)
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights_move_both_ways(theirs, space, space.arch(NETWORKS["vit_b_16"]), x)


def test_weights_that_are_another_networks_are_refused():
    theirs = models.VisionTransformer(32, 8, 1, 2, 24, 48, num_classes=7)
    table = {"width": 24, "resolution": 32, "patch": 8, "stages": [{"heads": 3, "head_dim": 12, "mlp_ratio": 2}]}
    space = SearchSpace.from_table(table)
    with pytest.raises(UserError, match=r"self_attention\.in_proj_weight"):
        load(network(space, 7), space.default(), theirs.state_dict(), torchvision_name)


PART = {"width": [128, 192], "resolution": 32, "patch": 8, "stages": [
    {"depth": [2, 3, 4], "block": {"heads": [1, 2, 3], "mlp_ratio": [2, 2.5, 3]}}]}  # fmt: skip
ARCH = {"width": 128, "stages": [{"depth": 3, "blocks": [{"heads": 2, "mlp_ratio": 2.5}] * 3}]}


def begun(table, state, tmp_path, size=(32, 32)):
    """A supernet that a spec lets begin with weights."""
    torch.save({"model": state}, tmp_path / "w.pth")
    task = SimpleNamespace(head=lambda dims: nn.Identity(), example=torch.zeros(1, 3, *size))
    return build_supernet(
        VisionTransformer(weights=str(tmp_path / "w.pth")), SearchSpace.from_table(table), task
    ).eval()


def of_timm(**options):
    theirs = pytest.importorskip("timm.models.vision_transformer").VisionTransformer
    return random_weights(
        theirs, 32, 8, embed_dim=128, depth=3, num_heads=2, mlp_ratio=2.5, num_classes=7, **options
    ).float()


def test_a_spec_may_begin_with_the_weights_of_timm_or_torchvision(tmp_path):
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    timms, torchs = of_timm(), random_weights(models.VisionTransformer, 32, 8, 3, 2, 128, 320, num_classes=7).float()
    halves = [{**PART["stages"][0], "depth": depth} for depth in ([1, 2], [1, 3])]
    with torch.no_grad():
        for theirs, expected in ((timms, timms.forward_head(timms.forward_features(x), True)), (torchs, None)):
            torchs.heads = nn.Identity()
            expected = torchs(x) if expected is None else expected
            ours = begun(PART, theirs.state_dict(), tmp_path)
            with apply(ours, SearchSpace.from_table(PART).arch(ARCH)):
                torch.testing.assert_close(ours.backbone(x)[0], expected, rtol=1e-5, atol=1e-5)
            # In two stages blocks are counted on.
            two = SearchSpace.from_table({**PART, "stages": halves})
            block = ARCH["stages"][0]["blocks"][0]
            stages = [{"depth": n, "blocks": [block] * n} for n in (2, 1)]
            with apply(
                ours := begun({**PART, "stages": halves}, theirs.state_dict(), tmp_path),
                two.arch({"width": 128, "stages": stages}),
            ):
                torch.testing.assert_close(ours.backbone(x)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(32, 48), (16, 24), (64, 64)])
def test_a_position_embedding_is_resized_to_the_map_of_the_space_as_timm_does_it(tmp_path, size):
    theirs, x = of_timm(), torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    ours = begun({**PART, "resolution": {"height": size[0], "width": size[1]}}, theirs.state_dict(), tmp_path, size)
    theirs.set_input_size(size)
    with torch.no_grad(), apply(ours, SearchSpace.from_table(PART).arch(ARCH)):
        expected = theirs.forward_head(theirs.forward_features(x), True)
        torch.testing.assert_close(ours.backbone(x)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("distance", [0, 2])
def test_a_map_that_is_not_square_costs_what_torch_counts(distance):
    sides = {"height": 24, "width": 56}
    space = SearchSpace.from_table({**PART, "resolution": sides, "relative_position": distance})
    model, image = network(space), (3, 24, 56)
    arch = space.arch(ARCH)
    (found,) = backbones.cost_of(model, space, image, [arch])
    assert backbones.counted(export_subnet(model, arch, torch.zeros(1, *image)), image) == found
    maps = VisionTransformer(levels=(1,)).build(space).features(torch.zeros(2, *image))
    assert [tuple(level.shape) for level in maps] == [(2, 192, 3, 7)]


@pytest.mark.parametrize(("changes", "more", "says"), [
    ({"norm_eps": 1e-5}, {}, "eps = 1e-05, in that network 1e-06"),
    ({"pool": "mean"}, {}, "pool = mean, in that network token"),
    ({"relative_position": 2}, {}, "has keys, not in that network"),
    ({"patch": 16}, {}, "stride"),
    ({"width": [192, 256]}, {}, "never 128"),
    ({"stages": [{"depth": 2, "heads": 2, "mlp_ratio": 2.5}]}, {}, "never so many blocks"),
    ({"stages": [{"depth": 3, "heads": [1, 3], "mlp_ratio": 2.5}]}, {}, "qkv is never 128"),
    ({"stages": [{"depth": 3, "heads": [2, 4], "head_dim": 32, "mlp_ratio": 2.5}]}, {}, "no arch"),
    ({}, {"dist_token": torch.zeros(1, 1, 128)}, "distillation token"),
    ({}, {"blocks.0.ls1.gamma": torch.zeros(128)}, "no layer for blocks.0.ls1.gamma"),
])  # fmt: skip
def test_weights_that_would_compute_something_else_are_refused_with_the_reason(tmp_path, changes, more, says):
    with pytest.raises(UserError, match="has the weights of") as caught:
        begun({**PART, **changes}, {**of_timm().state_dict(), **more}, tmp_path)
    (fault,) = caught.value.faults
    assert fault.dotted == "backbone.weights"
    assert says in fault.hint, fault.hint


def test_a_run_that_began_with_published_weights_is_evaluated_and_exported_without_their_file(tmp_path, capsys):
    file, spec = tmp_path / "w.pth", tmp_path / "spec.toml"
    torch.save(of_timm().state_dict(), file)
    spec.write_text(tomli_w.dumps({
        "backbone": {"type": "vit", "weights": str(file)}, "space": {**PART, "width": 128, "stages": [
            {"depth": 3, "heads": [1, 2], "mlp_ratio": 2.5}]},
        "task": {"type": "classification", "data": "digits", "channels": 3},
        "algorithm": "bignas", "mutator": "sandwich",
        "train": {"epochs": 1, "batch_size": 256, "optimizer": {"type": "SGD", "lr": 1e-9, "momentum": 0.0}},
        "searcher": "random", "evaluators": ["accuracy"], "search": {"trials": 1},
    }))  # fmt: skip
    assert main(["run", str(spec), "--out", str(tmp_path / "run"), "--json"]) == 0
    trained = torch.load(tmp_path / "run/supernet.pt", weights_only=True)["model"]
    began = torch.load(file, weights_only=True)["blocks.1.mlp.fc1.weight"]
    torch.testing.assert_close(trained["backbone.stages.0.blocks.1.mlp.body.expand.weight"], began, rtol=0, atol=1e-6)
    file.unlink()
    assert main(["evaluate", str(tmp_path / "run"), "--arch", "max"]) == 0
    assert main(["export", str(tmp_path / "run"), "--arch", "max", "--to", str(tmp_path / "max")]) == 0
    assert "network.pt2" in capsys.readouterr().out
    assert main(["run", str(spec), "--out", str(tmp_path / "other")]) == 2
    assert "cannot read" in capsys.readouterr().err


def test_levels_of_features_begin_with_published_weights_too(tmp_path):
    theirs, x = of_timm(), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    halves = [{**PART["stages"][0], "depth": depth} for depth in (2, 1)]
    space = SearchSpace.from_table({**PART, "stages": halves})
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    options = VisionTransformer(weights=str(tmp_path / "w.pth"), levels=(1,))
    ours = options.build(space).eval()
    options.load(ours, space)
    block = {"heads": 2, "mlp_ratio": 2.5}
    with torch.no_grad(), apply(ours, space.arch({"width": 128, "stages": [{"blocks": [block] * 2}]})):
        (expected,) = theirs.forward_intermediates(x, indices=[1], intermediates_only=True)
        torch.testing.assert_close(ours.features(x)[0], expected, rtol=1e-5, atol=1e-5)


# -- as a backbone ----------------------------------------------------------------------------------------------------

SMALL_IMAGES = {"resolution": 32}


@pytest.mark.parametrize("check", backbone_checks)
@pytest.mark.parametrize(("options", "table", "image"), [
    (VisionTransformer(in_channels=1), TINY, (1, 28, 28)),
    (VisionTransformer(levels=(1, 3), drop_path=0.1, dropout=0.1),
     {"width": [16, 24], "resolution": 24, "patch": 8, "relative_position": 2, "pool": "mean", "stages": [
         {"depth": [1, 2], "block": {"heads": [1, 2], "head_dim": [4, 8], "mlp_ratio": [1, 2.5]}},
         {"blocks": [{"heads": 2}, {"heads": [1, 3]}], "head_dim": 8, "mlp_ratio": 2},
         {"heads": 1, "mlp_ratio": 1}]}, (3, 24, 24)),
], ids=["tiny", "levels"])  # fmt: skip
def test_conforms(options, table, image, check):
    check(options, SearchSpace.from_table(table), image=image)


def narrow_autoformer(size):
    """A space of the paper with two of its depths, on small images."""
    space = SearchSpace.from_table({**table_of(f"autoformer-{size}"), **SMALL_IMAGES})
    depths = sorted(space["stages.0.depth"].choices)[:2]
    return space.narrow({"stages.*.depth": depths})


@pytest.mark.parametrize("size", TABLE_1)
def test_random_autoformers_compute_the_same_exported_and_cost_what_is_counted(size):
    space = narrow_autoformer(size)
    model = network(space, 10).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    archs = space.decode(space.draw(np.random.default_rng(0), 2))
    costs = Cost(model, space, torch.empty(1, 3, 32, 32)).of(archs)
    for arch, cost in zip(archs, costs, strict=True):
        plain = export_subnet(model, arch, torch.zeros(1, 3, 32, 32))
        assert counted(plain, 32) == (cost["params"], cost["flops"])


def test_the_tiny_space_is_that_of_its_file():
    assert SearchSpace.from_table(TINY).variables == SearchSpace.from_table(table_of("vit-tiny")).variables
    assert table_of("vit-tiny") == copy.deepcopy(dict(TINY))


def test_the_tiny_space_trains():
    space = SearchSpace.from_table(TINY)
    model = network(space, 10, **VisionTransformer.example["backbone"]).train()
    x, y = torch.randn(32, 1, 28, 28, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 10
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(12):
        for arch in (space.largest(), space.smallest()):
            with apply(model, arch):
                loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3


def test_the_features_are_the_class_token_or_the_mean_of_the_others():
    x = torch.randn(2, 1, 28, 28)
    for pool in ("token", "mean"):
        space = SearchSpace.from_table({**TINY, "pool": pool})
        model = network(space, in_channels=1).eval()
        seen = []
        model.backbone.final.norm.register_forward_hook(lambda module, args, output: seen.append(output))  # noqa: B023
        with torch.no_grad():
            (features,) = model.backbone.features(x)
        tokens = seen[0]
        assert tokens.shape == (2, 17, 48)
        assert torch.equal(features, tokens[:, 0] if pool == "token" else tokens[:, 1:].mean(1))


def test_levels_are_the_stages_tokens_at_their_patches_places():
    table = {**TINY, "width": 32, "stages": [{"depth": 1, "heads": 1, "mlp_ratio": 1}] * 3}
    space = SearchSpace.from_table(table)
    model = network(space, in_channels=1, levels=(1, 2)).eval()
    assert [sum(dim({})) for dim in model.backbone.feat_dims] == [32, 32]
    assert len(model.backbone.segments) == 3  # nothing follows the last level
    seen = []
    for stage in model.backbone.tokens.stages:
        stage.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        maps = model.backbone.features(torch.randn(2, 1, 28, 28))
    for tokens, level in zip(seen, maps, strict=True):
        assert level.shape == (2, 32, 4, 4)
        for row, column in itertools.product(range(4), repeat=2):
            assert torch.equal(level[:, :, row, column], tokens[:, 1 + 4 * row + column])


def test_images_of_another_size_are_resized():
    space = SearchSpace.from_table(TINY)
    model = network(space, 10, in_channels=1, resize_mode="bicubic").eval()
    x = torch.randn(2, 1, 20, 20)
    with torch.no_grad():
        assert torch.equal(model(x), model(nn.functional.interpolate(x, (28, 28), mode="bicubic")))


def test_drop_path_grows_from_nothing_to_the_option_and_dropout_stands_everywhere():
    space = SearchSpace.from_table({**TINY, "stages": [*TINY["stages"], {"depth": 2, "heads": 1, "mlp_ratio": 1}]})
    model = network(space, in_channels=1, drop_path=0.2, dropout=0.3)
    paths = [m.drop.p for m in model.modules() if isinstance(m, DropPath)]
    assert paths == pytest.approx([rate for rate in (0.05, 0.1, 0.15, 0.2) for _ in range(2)])  # of blocks 2 to 5
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)].count(0.3) == 1 + 3 * 5
    model.eval()
    x = torch.randn(2, 1, 28, 28)
    assert torch.equal(model(x), model(x))
    plain = export_subnet(model.train(), space.default(), torch.zeros(1, 1, 28, 28))
    assert sum(isinstance(m, nn.Dropout) for m in plain.modules()) == 1 + 3 * 5 + 8
    assert not torch.equal(plain.train()(x), plain(x))
    assert not [m for m in network(space, in_channels=1).modules() if isinstance(m, nn.Dropout | nn.Dropout1d)]


@pytest.mark.parametrize("relative_position", [0, 3])
def test_an_exported_transformer_is_written_in_every_format_and_loads_with_torch_alone(tmp_path, relative_position):
    space = SearchSpace.from_table({**TINY, "relative_position": relative_position})
    model, example = network(space, 10, in_channels=1).eval(), torch.zeros(1, 1, 28, 28)
    plain = export_subnet(model, space.smallest(), example)
    assert {"stem_class_token", "stem_position"} <= {name for name, _ in plain.named_parameters(recurse=False)}
    x = torch.randn(3, 1, 28, 28)
    with torch.no_grad():
        expected = plain(x)
    for name in ("safetensors", "python", "pt2"):  # the first two compare what they wrote
        file = (
            load_catalogue().options("exporters", name).write(plain, tmp_path, ExportContext(example, "a transformer"))
        )
        assert file.exists()
    program = torch.export.load(tmp_path / "network.pt2").module()
    torch.testing.assert_close(program(x), expected, rtol=1e-4, atol=1e-5)
    namespace = {}
    exec(compile((tmp_path / "network.py").read_text(), "network.py", "exec"), namespace)
    written = namespace["Network"]().eval()
    written.load_state_dict(plain.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(written(x), expected)


# -- what a user can say ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", distribution_checks)
def test_the_distribution_conforms(check):
    check("corenas_backbone_vit")


def test_options_are_a_backbone_under_its_name():
    assert corenas_backbones() == {"vit": VisionTransformer}
    assert isinstance(VisionTransformer(), Backbone)


def test_the_spec_of_the_readme_is_right(tmp_path):
    (table,) = spec_fragments(Path(__file__).parents[1] / "README.md")
    (tmp_path / "spec.toml").write_text(tomli_w.dumps(table))
    shutil.copytree(SPACES, tmp_path / "space")
    spec, _ = load_spec(tmp_path / "spec.toml", load_catalogue())
    assert spec.backbone == structure(VisionTransformer.example["backbone"], VisionTransformer)
    assert spec.space.variables == SearchSpace.from_table(TINY).variables


@pytest.mark.parametrize(("changes", "named", "says"), [
    ({"width": 0}, "width", "whole numbers of at least 1, found 0"),
    ({"width": [32, 32.5]}, "width", "found 32.5"),
    ({"width": None}, "width", "required key is missing"),
    ({"resolution": 30}, "resolution", "images of 30 pixels have no whole number of patches of 7"),
    ({"resolution": [28, 32]}, "resolution", "cannot be searched"),
    ({"resolution": {"height": 28, "width": [28, 35]}}, "resolution", "cannot be searched"),
    ({"resolution": {"height": 28, "width": 30}}, "resolution", "images of 30 pixels"),
    ({"patch": 0}, "patch", ">= 1"),
    ({"pool": "max"}, "pool", "'token' or 'mean'"),
    ({"relative_position": -1}, "relative_position", ">= 0"),
    ({"norm_eps": 0.0}, "norm_eps", "> 0"),
    ({"head": 1}, "head", "unknown key"),
    ({"stages": [{"depth": 0, "heads": 1, "mlp_ratio": 1}]}, "stages[0].depth", "found 0"),
    ({"stages": [{"depth": 2, "block": {"heads": 0.5, "mlp_ratio": 1}}]}, "stages[0].blocks[0].heads", "found 0.5"),
    ({"stages": [{"heads": 1, "head_dim": "wide", "mlp_ratio": 1}]}, "stages[0].head_dim", "a number or a variable"),
    ({"stages": [{"heads": 1, "mlp_ratio": [0, 1]}]}, "stages[0].mlp_ratio", "numbers above 0, found 0"),
    ({"stages": [{"heads": 1, "mlp_ratio": [0.01, 1]}]}, "stages[0].mlp_ratio", "an MLP would have 0."),
    ({"stages": [{"mlp_ratio": 1}]}, "stages[0]", "neither the stage nor each of its blocks has 'heads'"),
    ({"stages": [{"heads": 1}]}, "stages[0]", "neither the stage nor each of its blocks has 'mlp_ratio'"),
])  # fmt: skip
def test_a_space_that_is_none_for_it_is_answered_with_the_key(changes, named, says):
    table = {key: value for key, value in {**copy.deepcopy(dict(TINY)), **changes}.items() if value is not None}
    with pytest.raises(UserError) as caught:
        VisionTransformer().build(SearchSpace.from_table(table))
    faults = [fault for fault in caught.value.faults if fault.dotted == named]
    assert faults, caught.value
    assert says in faults[0].message + (faults[0].hint or "")


@pytest.mark.parametrize("table", [
    {"in_channels": 0}, {"dropout": 1.0}, {"drop_path": -0.1}, {"resize_mode": "area"}, {"pool": "mean"},
], ids=str)  # fmt: skip
def test_wrong_options_are_named(table):
    with pytest.raises(UserError) as caught:
        structure(table, VisionTransformer)
    assert [fault.dotted for fault in caught.value.faults] == [*table]


def test_levels_that_there_are_not_are_refused():
    with pytest.raises(UserError, match=r"levels \[2\]"):
        VisionTransformer(levels=(2,)).build(SearchSpace.from_table(TINY))
