import copy
import pickle
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
from corenas.mutable import apply, keys_used
from corenas.options import structure
from corenas.plugins import load_catalogue
from corenas.regularisation import DropPath
from corenas.run.spec import load_spec
from corenas.space import SearchSpace
from corenas.testing.backbones import backbone_checks, counted
from corenas.testing.components import changed, spec_fragments
from corenas.testing.distributions import distribution_checks
from corenas.value import Constant
from corenas_backbone_mobilenetv3 import Layout, MobileNetV3, corenas_backbones
from corenas_backbone_mobilenetv3.model import inverted_residual
from corenas_mutable_slices import LinearSlice, Residual

SPACES = Path(__file__).parents[4] / "spec" / "space"
OFA = tomli.loads((SPACES / "ofa-mobilenetv3.toml").read_text())
SMALL = tomli.loads((SPACES / "mobilenetv3-small-images.toml").read_text())
OFA_TINY = {**OFA, "resolution": {"type": "int", "low": 32, "high": 64, "step": 16}}  # the same on quick images
IMAGE = {"ofa": (1, 3, 64, 64), "small": (1, 1, 28, 28)}


class Network(nn.Module):
    """A backbone with a linear classifier, as a task builds it."""

    def __init__(self, backbone, classes):
        super().__init__()
        self.backbone = backbone
        self.head = LinearSlice(backbone.feat_dims[-1], classes)

    def forward(self, x):
        return self.head(self.backbone.features(x)[-1].flatten(1))


def network(table, classes=10, **options):
    """The supernet of a space's table, drawn from a seed, and the space."""
    torch.manual_seed(0)
    space = SearchSpace.from_table(table)
    return Network(MobileNetV3(**options).build(space), classes), space


def of_kind(kind, **options):
    return network(OFA_TINY, **options) if kind == "ofa" else network(SMALL, in_channels=1, **options)


def without_activations(cost):
    return {name: cost[name] for name in ("flops", "params")}


def archs(space, n, seed=0):
    return [space.largest(), space.smallest(), *space.decode(space.draw(np.random.default_rng(seed), n - 2))]


# -- figures of Once-for-All ------------------------------------------------------------------------------------------


def uniform(kernel, expand, depth):
    """An arch's choices (its resolution apart) where every block is alike: K7E6D4 is uniform(7, 6, 4)."""
    return stages([depth] * 5, [[kernel] * 4] * 5, [[expand] * 4] * 5)


def stages(depths, kernels, expands):
    """An arch's choices from the depth of each elastic stage and the kernels and expansions of its blocks."""
    blocks = [[{"kernel": k, "expand": e} for k, e in zip(*both, strict=True)]
              for both in zip(kernels, expands, strict=True)]  # fmt: skip
    return {"stages": [{}, *({"depth": d, "blocks": own} for d, own in zip(depths, blocks, strict=True))]}


NOTE8_22MS = stages([2] * 5, [[3, 3], [5, 5], [7, 3], [5, 3], [3, 7]], [[3, 3], [3, 3], [4, 3], [3, 4], [6, 6]])

FIGURES = [  # width, choices, resolution, params, flops
    (1.0, uniform(7, 6, 4), 128, 7_664_760, 188_248_320),
    (1.0, uniform(7, 6, 4), 160, 7_664_760, 291_318_048),
    (1.0, uniform(7, 6, 4), 192, 7_664_760, 417_292_160),
    (1.0, uniform(7, 6, 4), 224, 7_664_760, 566_170_656),
    (1.0, uniform(3, 3, 2), 128, 3_410_792, 41_476_224),
    (1.0, uniform(3, 3, 2), 160, 3_410_792, 63_240_528),
    (1.0, uniform(3, 3, 2), 192, 3_410_792, 89_841_344),
    (1.0, uniform(3, 3, 2), 224, 3_410_792, 121_278_672),
    (1.0, uniform(5, 4, 3), 224, 4_551_792, 250_746_944),
    (1.0, uniform(3, 6, 4), 224, 7_299_960, 433_141_536),
    (1.0, uniform(7, 3, 2), 224, 3_493_352, 151_290_192),
    (1.0, uniform(3, 4, 3), 224, 4_481_136, 225_006_656),
    (1.0, NOTE8_22MS, 140, 4_304_592, 67_196_888),
    (1.2, uniform(7, 6, 4), 224, 10_701_632, 843_101_040),
    (1.2, uniform(7, 6, 4), 160, 10_701_632, 433_563_888),
    (1.2, uniform(3, 3, 2), 224, 4_602_456, 193_078_200),
    (1.2, uniform(5, 4, 3), 224, 6_245_312, 385_659_168),
]  # fmt: skip


@pytest.fixture(scope="module")
def once_for_all():
    """Supernet, space and cost of Once-for-All for each of its widths."""
    found = {}
    for width_mult in (1.0, 1.2):
        model, space = network(OFA, 1000, width_mult=width_mult)
        if width_mult == 1.2:
            space = space.narrow({"resolution": [160, 224]})  # quicker
        found[width_mult] = model, space, Cost(model, space, torch.zeros(1, 3, 224, 224))
    return found


@pytest.mark.parametrize(("width_mult", "choices", "resolution", "params", "flops"), FIGURES)
def test_figures_of_once_for_all_come_out_to_the_last_digit(
    once_for_all, width_mult, choices, resolution, params, flops
):
    model, space, cost = once_for_all[width_mult]
    arch = space.arch({"resolution": resolution, **choices})
    expected = {"flops": flops, "params": params}
    assert without_activations(cost.of([arch])[0]) == expected
    # The images that the network is checked on are small: it resizes them.
    assert counted(export_subnet(model, arch, torch.zeros(1, 3, 32, 32)), (3, 224, 224)) == expected


@pytest.mark.parametrize(("width_mult", "params"), [(1.0, 7_664_760), (1.2, 10_701_632)])
def test_the_supernet_of_once_for_all_has_no_weight_beyond_its_largest_subnet(once_for_all, width_mult, params):
    model, _, _ = once_for_all[width_mult]
    assert sum(p.numel() for p in model.parameters()) == params


def test_the_space_of_once_for_all_has_the_size_that_its_file_says(once_for_all):
    _, space, _ = once_for_all[1.0]
    assert space.size == (9**2 + 9**3 + 9**4) ** 5 * 25
    assert space.size / 25 == pytest.approx(2e19, rel=0.1)
    assert 140 in space["resolution"].choices


# -- any width, any arch ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width_mult", [0.1, 0.35, 0.75, 1.3])
@pytest.mark.parametrize("kind", ["ofa", "small"])
def test_any_width_costs_what_the_exported_network_costs(kind, width_mult):
    model, space = of_kind(kind, width_mult=width_mult)
    cost = Cost(model, space, torch.zeros(IMAGE[kind]))
    for arch in archs(space, 3):
        plain = export_subnet(model, arch, torch.zeros(IMAGE[kind]))
        assert without_activations(cost.of([arch])[0]) == counted(plain, IMAGE[kind][1:])


@pytest.fixture(scope="module", params=["ofa", "small"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def net(kind):
    """A supernet with batch norms that have seen something, its space and its cost."""
    model, space = of_kind(kind)
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in ((module.weight.data, 0.5, 1.5), (module.bias.data, -0.2, 0.2),
                                      (module.running_mean, -0.2, 0.2), (module.running_var, 0.5, 1.5)):  # fmt: skip
                tensor.uniform_(low, high, generator=generator)
    return model.eval(), space, Cost(model, space, torch.zeros(IMAGE[kind]))


def noise(kind, n, dtype=torch.float32):
    return torch.randn((n, *IMAGE[kind][1:]), generator=torch.Generator().manual_seed(3)).to(dtype)


def relative_error(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max())


def test_random_archs_compute_the_same_in_the_supernet_and_exported(kind, net):
    model, space, cost = net
    x = noise(kind, 4)
    sampled = archs(space, 8)
    for arch, own in zip(sampled, cost.of(sampled), strict=True):
        plain = export_subnet(model, arch, torch.zeros(IMAGE[kind]))
        with apply(model, arch), torch.no_grad():
            assert relative_error(model(x), plain(x)) <= 1e-5
        assert without_activations(own) == counted(plain, IMAGE[kind][1:])


def test_random_archs_compute_the_same_in_double_precision_in_both_modes(kind):
    model, space = of_kind(kind, width_mult=0.5)
    model.double()
    x = noise(kind, 8, torch.float64)
    for i, arch in enumerate(archs(space, 8, seed=1)):
        model.train(i % 2 == 0)
        plain = export_subnet(model, arch, torch.zeros(IMAGE[kind], dtype=torch.float64))
        assert {m.training for m in plain.modules()} == {model.training}
        with apply(model, arch), torch.no_grad():
            assert relative_error(model(x), plain(x)) <= 1e-10
        # What training leaves behind in the statistics is the same, too.
        whole = {name.removeprefix("backbone.").replace(".", "_"): buffer for name, buffer in model.named_buffers()}
        for name, tensor in plain.named_buffers():
            if tensor.dim():
                own = inside(whole[name.replace(".", "_")], tensor.shape)
                torch.testing.assert_close(own, tensor, rtol=1e-9, atol=1e-9)


def inside(whole, shape):
    """The part of a supernet's weight that a subnet has: the first channels and the centre of the kernel."""
    part = whole[tuple(slice(n) for n in shape[:2])]
    if whole.dim() == 4:
        start = (whole.shape[2] - shape[2]) // 2
        part = part[:, :, start : start + shape[2], start : start + shape[3]]
    return part


def flat_names(model):
    """The supernet's parameters under the names that export gives them."""
    return {name.removeprefix("backbone.").replace(".", "_"): p for name, p in model.named_parameters()}


def test_a_subnet_has_the_first_channels_and_the_centre_of_each_kernel(kind, net):
    model, space, _ = net
    whole = flat_names(model)
    for arch in archs(space, 5, seed=2):
        for name, tensor in export_subnet(model, arch, torch.zeros(IMAGE[kind])).named_parameters():
            assert torch.equal(inside(whole[name.replace(".", "_")], tensor.shape), tensor), name
    smallest = export_subnet(model, space.smallest(), torch.zeros(IMAGE[kind]))
    assert {m.kernel_size[0] for m in smallest.modules() if isinstance(m, nn.Conv2d) and m.groups > 1} == {3}


def test_what_an_arch_uses_gets_the_gradient_of_the_exported_network_and_nothing_else_gets_any(kind):
    model, space = of_kind(kind, width_mult=0.5)  # as built: all gammas are 1
    model = model.double().train()
    x, y = noise(kind, 8, torch.float64), torch.arange(8)
    for arch in archs(space, 6, seed=3):
        plain = export_subnet(model, arch, torch.zeros(IMAGE[kind], dtype=torch.float64))
        nn.functional.cross_entropy(plain(x), y).backward()
        model.zero_grad(set_to_none=True)
        with apply(model, arch):
            nn.functional.cross_entropy(model(x), y).backward()
        expected = {name.replace(".", "_"): p.grad for name, p in plain.named_parameters()}
        for name, parameter in flat_names(model).items():
            if name not in expected:
                assert parameter.grad is None, name
                continue
            assert expected[name].abs().max() > 0, name
            torch.testing.assert_close(inside(parameter.grad, expected[name].shape), expected[name])
            inside(parameter.grad, expected[name].shape).zero_()
            assert not parameter.grad.any(), name


def test_more_of_one_variable_never_costs_less(kind, net):
    _, space, cost = net
    codes = space.draw(np.random.default_rng(4), 500)
    active = space.active(codes)
    for place, variable in enumerate(space.variables):
        assert list(variable.choices) == sorted(variable.choices)
        fewer = codes[(codes[:, place] < len(variable.choices) - 1) & active[:, place]]
        more = fewer.copy()
        more[:, place] += 1
        before, after = cost(fewer), cost(space.canonical(more))
        assert len(fewer) > 20
        assert (after["flops"] > before["flops"]).all(), variable.key
        assert (after["params"] >= before["params"]).all(), variable.key
        assert (after["activations"] >= before["activations"]).all(), variable.key


def test_the_largest_and_the_smallest_arch_bound_all_costs(net):
    _, space, cost = net
    columns = cost(space.draw(np.random.default_rng(5), 1000))
    low, high = cost.of([space.smallest(), space.largest()])
    for metric, column in columns.items():
        assert low[metric] <= column.min() <= column.max() <= high[metric]


def test_a_space_with_widths_and_ratios_without_steps_costs_what_its_networks_cost():
    table = copy.deepcopy(SMALL)
    table["resolution"], table["stem"]["width"] = [24, 32], [8, 16]
    table["stages"][1]["width"] = {"type": "float", "low": 20, "high": 40}
    table["stages"][1]["block"]["expand"] = {"type": "float", "low": 1, "high": 5}
    table["head"] = {"expand": [64, 100], "width": [64.5, 100]}
    model, space = network(table)
    cost = Cost(model, space, torch.zeros(1, 3, 28, 28))
    for arch in archs(space, 6):
        plain = export_subnet(model, arch, torch.zeros(1, 3, 28, 28))
        assert without_activations(cost.of([arch])[0]) == counted(plain, (3, 28, 28))


# -- the model as a module --------------------------------------------------------------------------------------------


def test_the_space_for_small_images_trains():
    model, space = of_kind("small")
    x, y = noise("small", 32), torch.arange(32) % 10
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(8):
        with apply(model.train(), space.smallest()):
            loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    assert export_subnet(model.eval(), space.smallest(), torch.zeros(IMAGE["small"]))(x).shape == (32, 10)


def test_weights_go_through_state_dict_deepcopy_and_pickle(kind, net):
    model, space, _ = net
    arch, x = archs(space, 3)[-1], noise(kind, 2)
    loaded, _ = of_kind(kind)
    loaded.load_state_dict(model.state_dict())
    with torch.no_grad():
        with apply(model, arch):
            expected = model(x)
        for other in (loaded.eval(), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            with apply(other, arch):
                assert torch.equal(other(x), expected)
            assert {id(m) for s in other.backbone.segments for m in s.modules()} <= {id(m) for m in other.modules()}
            assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}


def test_it_builds_on_the_meta_device_and_costs_the_same_there(kind, net):
    _, space, cost = net
    with torch.device("meta"):
        model, _ = of_kind(kind)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    sampled = archs(space, 5)
    assert Cost(model, space, torch.zeros(IMAGE[kind])).of(sampled) == cost.of(sampled)


def test_weights_are_drawn_by_the_fan_out_and_biases_are_zero(once_for_all):
    model, _, _ = once_for_all[1.0]
    for module in model.backbone.modules():
        if isinstance(module, nn.Conv2d):
            wanted = (2 / (module.kernel_size[0] ** 2 * module.out_channels)) ** 0.5
            assert float(module.weight.detach().std()) == pytest.approx(wanted, rel=0.15)
            assert module.bias is None or not module.bias.any()


def test_a_block_has_a_shortcut_where_stride_and_width_allow_it(net):
    model, space, _ = net
    for stage, options in zip(model.backbone.stages, structure(space.tree, Layout).stages, strict=True):
        first, *others = [hasattr(block, "shortcut") for block in stage.blocks]
        assert all(others)
        assert not first or options.stride == 1
    assert hasattr(inverted_residual(Constant(8), Constant(8), Constant(3), Constant(2)), "shortcut")
    assert not hasattr(inverted_residual(Constant(8), Constant(8), Constant(3), Constant(2), stride=2), "shortcut")
    assert not hasattr(inverted_residual(Constant(8), Constant(16), Constant(3), Constant(2)), "shortcut")


@pytest.mark.parametrize(("inputs", "expand", "inner"), [
    (16, 3, 48),
    (80, 2.3, 184),
    (16, 3.725, 64),  # 59.6: rounded to 60 first, which is nearer to 64
    (24, 2.5, 64),  # 60, half-way between 56 and 64
    (8, 1.125, 16),  # 9, of which 8 would be less than 90%
    (16, 0.1, 8),
])  # fmt: skip
def test_inner_channels_are_rounded_twice_as_in_the_reference(inputs, expand, inner):
    block = inverted_residual(Constant(inputs), Constant(16), Constant(3), Constant(expand))
    assert block.body.depthwise.conv.out_channels == inner


def test_zero_init_makes_the_identity_of_blocks_with_a_shortcut_alone(kind):
    model, _ = of_kind(kind)
    blocks = [m for m in model.modules() if isinstance(m, Residual)]
    for block in blocks:
        block.zero_init_last()
        gamma = block.body.project.norm.weight
        assert torch.equal(gamma, torch.zeros_like(gamma) if hasattr(block, "shortcut") else torch.ones_like(gamma))
        if hasattr(block, "shortcut"):
            x = torch.randn(2, gamma.numel(), 5, 5)
            assert torch.equal(block(x), x)
    assert len({hasattr(block, "shortcut") for block in blocks}) == 2


def test_drop_path_grows_with_the_blocks_that_have_a_shortcut():
    def rates(**options):
        model, _ = network(SMALL, in_channels=1, drop_path=0.2, **options)
        found = {}
        for name, module in model.named_modules():
            if isinstance(module, DropPath):
                stage, block = (int(part) for part in name.split(".") if part.isdigit())
                found[stage, block] = module.p
        return model, found

    model, everywhere = rates()
    blocks = [(s, b) for s, stage in enumerate(model.backbone.stages) for b in range(len(stage.blocks))]
    residual = [place for place in blocks if model.backbone.stages[place[0]].blocks[place[1]].added]
    expected = {place: 0.2 * blocks.index(place) / len(blocks) for place in residual}
    assert everywhere == pytest.approx({place: rate for place, rate in expected.items() if rate})
    last = max(stage for stage, _ in blocks)
    _, at_the_end = rates(drop_path_stages=1)
    assert at_the_end == {place: rate for place, rate in everywhere.items() if place[0] == last}
    assert len(model.state_dict()) == len(network(SMALL, in_channels=1)[0].state_dict())


def test_every_variable_of_both_spaces_is_used(net):
    model, space, _ = net
    assert keys_used(model) == {*space.keys}


def test_segments_are_the_parts_in_order(kind, net):
    model, space, _ = net
    x = noise(kind, 2)
    with apply(model, space.largest()), torch.no_grad():
        y = model.backbone.resize(x) if kind == "ofa" else x
        for segment in model.backbone.segments:
            y = segment(y)
        assert torch.equal(y, model.backbone.features(x)[0])


# -- what a user can say ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", backbone_checks)
def test_conforms(check):  # on Once-for-All's space: test_published.py
    options = MobileNetV3(in_channels=1, width_mult=0.6, resize_mode="nearest", drop_path=0.2)
    check(options, SearchSpace.from_table(SMALL), image=(1, 28, 28))


@pytest.mark.parametrize("check", distribution_checks)
def test_the_distribution_conforms(check):
    check("corenas_backbone_mobilenetv3")


def test_options_are_a_backbone_under_its_name():
    assert corenas_backbones() == {"mobilenetv3": MobileNetV3}
    assert isinstance(MobileNetV3(), Backbone)


def test_the_readme_shows_a_spec_that_is_right(tmp_path):
    (table,) = spec_fragments(Path(__file__).parents[1] / "README.md")
    table["space"] = str(SPACES.parent / table["space"])
    (tmp_path / "spec.toml").write_text(tomli_w.dumps(table))
    spec, _ = load_spec(tmp_path / "spec.toml", load_catalogue())
    assert isinstance(spec.backbone, MobileNetV3)
    assert keys_used(Network(spec.backbone.build(spec.space), 10)) == {*spec.space.keys}


def test_the_example_stands_as_a_file_too():
    table = MobileNetV3.example["space"]
    tiny = tomli.loads((SPACES / "mobilenetv3-tiny.toml").read_text())
    assert SearchSpace.from_table(table).to_table() == SearchSpace.from_table(tiny).to_table()
    assert structure(MobileNetV3.example["backbone"], MobileNetV3) == MobileNetV3(in_channels=1)


BLOCKS = [{"kernel": 3, "expand": 2}, {"kernel": 5, "expand": 2}]


@pytest.mark.parametrize(("key", "value", "named", "says"), [
    ("stages.1.block.kernel", 4, "stages[1].blocks[0].kernel", "odd whole numbers of at least 1, found 4"),
    ("stages.1.block.kernel", [3, 6], "stages[1].blocks[0].kernel", "found 6"),
    ("stages.1.block.kernel", [3.0, 5.0], "stages[1].blocks[0].kernel", "found 3.0"),
    ("stages.1.block.kernel", -1, "stages[1].blocks[0].kernel", "found -1"),
    ("stages.1.block.kernel", "3", "stages[1].blocks[0].kernel", "a number or a variable, found '3'"),
    ("stages.1.block.kernel", ["3", "5"], "stages[1].blocks[0].kernel", "found '3'"),
    ("stages.1.block.kernel", [True, False], "stages[1].blocks[0].kernel", "found False"),
    ("stages.1.block.kernel", {"type": "int", "low": 3, "high": 7}, "stages[1].blocks[0].kernel", "found 4"),
    ("stages.1.kernel", 2, "stages[1].kernel", "found 2"),
    ("stages.1.block.expand", 0, "stages[1].blocks[0].expand", "numbers above 0, found 0"),
    ("stages.1.block.expand", [-1, 2], "stages[1].blocks[0].expand", "found -1"),
    ("stages.1.block.kernel", None, "stages[1]", "neither the stage nor each of its blocks has 'kernel'"),
    ("stages.1.block.expand", None, "stages[1]", "neither the stage nor each of its blocks has 'expand'"),
    ("stages.1.block.groups", 2, "stages[1].blocks[0].groups", "unknown key"),
    ("stages.1.depth", 0, "stages[1].depth", "whole numbers of at least 1, found 0"),
    ("stages.1.depth", [0, 1], "stages[1].depth", "found 0"),
    ("stages.1.depth", [1.5, 2], "stages[1]", "whole numbers"),
    ("stages.1.depth", None, "stages[1]", "blocks need a `depth`"),
    ("stages.1", {"width": 8, "depth": 1.5, "kernel": 3, "expand": 2}, "stages[1].depth", "found 1.5"),
    ("stages.1", {"width": 8, "depth": "2", "kernel": 3, "expand": 2}, "stages[1].depth", "found '2'"),
    ("stages.1", {"width": 8, "depth": 3, "blocks": BLOCKS}, "stages[1].blocks", "2 blocks, but depth reaches 3"),
    ("stages.1.width", 0, "stages[1].width", "numbers above 0, found 0"),
    ("stages.1.width", [8, -8], "stages[1].width", "found -8"),
    ("stages.1.width", ["slim", "wide"], "stages[1].width", "found 'slim'"),
    ("stages.1.width", None, "stages[1].width", "required key is missing"),
    ("stages.1.stride", 0, "stages[1].stride", ">= 1"),
    ("stages.1.stride", [1, 2], "stages[1].stride", "cannot be searched"),
    ("stages.1.act", "sigmoid", "stages[1].act", "h_swish"),
    ("stages.1.se", 1, "stages[1].se", "true or false"),
    ("stages.1.se", {"ratio": 0}, "stages[1].se.ratio", "> 0"),
    ("stages.1.se", {"of": "outputs"}, "stages[1].se.of", "'inner' or 'inputs'"),
    ("stages.1.shortcut", "conv", "stages[1].shortcut", "'identity' or 'pool' or 'none'"),
    ("stages.1.op", "k3e2", "stages[1].op", "`op` says kernel and expansion in one"),
    ("stages.1", {"width": 8, "op": ["k3e2", "k4e2"]}, "stages[1].op", "found 'k4e2'"),
    ("stages.1", {"width": 8, "op": 3}, "stages[1].op", 'such as "k3e6"'),
    ("stages.1", {"width": 8, "blocks": [{"op": "k3e2"}, {}]}, "stages[1]", "has 'op'"),
    ("stages.1", {"width": 8, "op": ["k3e2", "skip"]}, "stages[1].blocks[0].op", "changes the shape"),
    ("head.ratio", 6, "head.ratio", "`expand` says it already"),
    ("stages.1.ratio", 4, "stages[1].ratio", "unknown key"),
    ("stages", None, "stages", "required key is missing"),
    ("stem.width", -16, "stem.width", "numbers above 0"),
    ("stem.stride", 0, "stem.stride", ">= 1"),
    ("stem.kernel", 3, "stem.kernel", "unknown key"),
    ("head.expand", 0, "head.expand", "numbers above 0"),
    ("head.width", ["a"], "head.width", "numbers above 0, found 'a'"),
    ("resolution", 0, "resolution", "whole numbers of at least 1"),
    ("resolution", [27.5, 28.5], "resolution", "found 27.5"),
    ("tail", 3, "tail", "unknown key"),
])  # fmt: skip
def test_a_space_that_is_none_for_it_is_answered_with_the_key(key, value, named, says):
    with pytest.raises(UserError) as caught:
        MobileNetV3().build(SearchSpace.from_table(changed(SMALL, key, value)))
    faults = [fault for fault in caught.value.faults if fault.dotted == named]
    assert faults, caught.value
    assert says in faults[0].message + (faults[0].hint or "")


def test_all_mistakes_of_a_space_are_told_at_once():
    table = changed(SMALL, "stages.0.block.kernel", 2)
    table["stages"][2]["width"], table["head"]["width"] = 0, 0
    with pytest.raises(UserError) as caught:
        structure(SearchSpace.from_table(table).tree, Layout)
    assert {"stages[0].blocks[0].kernel", "stages[2].width", "head.width"} <= {f.dotted for f in caught.value.faults}


def test_a_space_made_by_hand_with_too_few_blocks_is_answered_too():
    number = Constant(8)
    block = {"kernel": Constant(3), "expand": Constant(2)}
    stage = {"width": number, "depth": Constant(2), "blocks": [block]}
    tree = {"stem": {"width": number}, "stages": [stage], "head": {"expand": number, "width": number}}
    with pytest.raises(UserError, match="1 blocks, but depth reaches 2") as caught:
        MobileNetV3().build(SearchSpace([], tree))
    assert caught.value.faults[0].dotted == "stages[0].blocks"


def test_a_stage_without_depth_has_as_many_blocks_as_are_written():
    table = changed(SMALL, "stages.1", {"width": 24, "stride": 2, "blocks": BLOCKS})
    model, _ = network(table)
    assert [block.body.depthwise.conv.kernel_size[0] for block in model.backbone.stages[1].blocks] == [3, 5]


def test_what_a_block_leaves_out_its_stage_says():
    table = changed(
        SMALL, "stages.1", {"width": 24, "kernel": 7, "expand": 2, "blocks": [{"kernel": 3}, {"expand": 3}]}
    )
    model, _ = network(table)
    blocks = model.backbone.stages[1].blocks
    assert [block.body.depthwise.conv.kernel_size[0] for block in blocks] == [3, 7]
    assert [block.body.expand.conv.out_channels for block in blocks] == [48, 72]


def test_an_operation_is_a_kernel_and_an_expansion():
    named = {"width": 24, "stride": 2, "depth": 2, "op": "k5e3"}
    plain = {"width": 24, "stride": 2, "depth": 2, "kernel": 5, "expand": 3}
    found = [network(changed(SMALL, "stages.1", stage), in_channels=1) for stage in (named, plain)]
    costs = [Cost(model, space, torch.zeros(1, 1, 28, 28)).of([space.largest()]) for model, space in found]
    assert costs[0] == costs[1]


@pytest.mark.parametrize(("head", "features", "params"), [
    ({}, 56, 0),
    ({"width": 96}, 96, 56 * 96),
    ({"width": 96, "bias": True}, 96, 57 * 96),
    ({"expand": 200}, 200, 56 * 200 + 400),
    ({"ratio": 6, "width": 96}, 96, 56 * 336 + 672 + 336 * 96),
])  # fmt: skip
def test_a_head_may_leave_out_what_comes_before_or_after_pooling(head, features, params):
    model, space = network({**SMALL, "head": head}, in_channels=1)
    assert sum(p.numel() for p in model.backbone.final.parameters()) == params
    with torch.no_grad(), apply(model, space.largest()):
        assert model.backbone.features(noise("small", 2))[0].shape == (2, features)


@pytest.mark.parametrize(("table", "key"), [
    ({"width_mult": 0}, "width_mult"),
    ({"width_mult": float("inf")}, "width_mult"),
    ({"in_channels": 0}, "in_channels"),
    ({"norm_eps": 0}, "norm_eps"),
    ({"resize_mode": "area"}, "resize_mode"),
    ({"width": 1}, "width"),
])  # fmt: skip
def test_wrong_options_are_named(table, key):
    with pytest.raises(UserError) as caught:
        structure(table, MobileNetV3)
    assert [fault.dotted for fault in caught.value.faults] == [key]


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("of_space", [False, True])
def test_images_are_resized_as_the_space_or_else_the_options_say(mode, of_space):
    table = changed(SMALL, "resolution", [20, 28])
    table, options = ({**table, "resize_mode": mode}, {}) if of_space else (table, {"resize_mode": mode})
    model, space = network(table, in_channels=1, **options)
    model.eval()
    x = noise("small", 2)
    with torch.no_grad(), apply(model, {**space.default(), "resolution": 20}):
        small = nn.functional.interpolate(x, (20, 20), mode=mode)
        assert torch.equal(model(x), model(small))
