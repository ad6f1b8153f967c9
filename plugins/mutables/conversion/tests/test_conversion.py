"""Models of other people's become supernets that compute what they computed."""

import copy
import functools
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_pruning as tp
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from corenas.calibrate import recalibrate
from corenas.errors import UserError
from corenas.export import difference, export_subnet
from corenas.mutable import apply, call_model, channels_last
from corenas.regularisation import unregularised
from corenas.space import SearchSpace
from corenas.testing.distributions import distribution_checks
from corenas_mutable_conversion import Rules, convert, sort_channels
from corenas_mutable_conversion.attention import opened
from corenas_mutable_conversion.axes import free_sizes
from corenas_mutable_conversion.elastic import parts_of, plain_copy, whole
from corenas_mutable_conversion.models import build_model

NETS = Path(__file__).with_name("nets.py")
IMAGE = (1, 3, 64, 64)
LIBRARY = {
    "torchvision:resnet18": {},
    "torchvision:mobilenet_v3_small": {},
    "torchvision:shufflenet_v2_x0_5": {},
    "torchvision:squeezenet1_1": {},
    "timm:deit_tiny_patch16_224": {"img_size": 64, "depth": 3},
    "timm:convnext_atto": {},
    "timm:mobilevit_xxs": {},
}
OWN = {
    "Functional": lambda: torch.randn(1, 3, 32, 32),
    "Shared": lambda: torch.randn(1, 3, 32, 32),
    "TwoInputs": lambda: {"image": torch.randn(1, 3, 32, 32), "table": torch.randn(1, 7)},
    "Encoder": lambda: torch.randint(0, 100, (1, 12)),
    "Literal": lambda: torch.randn(1, 3, 32, 32),
    "UNet": lambda: torch.randn(1, 3, 32, 32),
    "Decoder": lambda: torch.randint(0, 50, (1, 12)),
    "Lazy": lambda: torch.randn(1, 3, 32, 32),
    "Tuples": lambda: torch.randn(1, 3, 32, 32),
}
MODELS = [*LIBRARY, *OWN]
VARIABLES = {  # as the sketch that these were measured with found them
    "torchvision:resnet18": 17,
    "Functional": 4,
    "Shared": 3,
    "TwoInputs": 4,
    "Encoder": 8,
    "UNet": 12,
    "Decoder": 8,
    "Tuples": 8,  # by hand: a width, one within each of five blocks, two depths
}


def lively(model):
    """A model whose norms and scales are not all alike: fresh ones can compute nearly nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(0, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
                module.weight.uniform_(0.5, 1.5, generator=generator)
            for name in ("p", "drop_prob"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)  # the same in both of two networks that are compared
        for weight in model.parameters():
            if weight.abs().max() <= 1e-3:
                weight.normal_(0, 0.1, generator=generator)
    return model.eval()


@functools.cache
def made(name):
    """The model as it was, and what it became."""
    torch.manual_seed(0)
    model = lively(build_model(name if ":" in name else f"{NETS}:{name}", LIBRARY.get(name)))
    original = copy.deepcopy(model)
    return original, convert(model, torch.randn(IMAGE) if name in LIBRARY else OWN[name]())


def archs(converted, n, seed=0):
    rng = np.random.default_rng(seed)
    return [converted.space.smallest(), *(converted.space.sample(rng) for _ in range(n))]


def outputs(model, example):
    with torch.no_grad():
        return tree_leaves(call_model(model, example))


def twice(example):
    """Two inputs that are not alike."""
    return tree_map_only(torch.Tensor, lambda x: torch.cat([x, x.flip(-1)]), example)


@pytest.mark.parametrize("check", distribution_checks)
def test_keeps_the_promises_of_distributions(check):
    check("corenas_mutable_conversion")


@pytest.mark.parametrize("name", MODELS)
def test_the_largest_arch_computes_what_the_model_computed(name):
    original, converted = made(name)
    assert len(converted.space.keys) == VARIABLES.get(name, len(converted.space.keys)) > 0
    with apply(converted.supernet, converted.space.largest()):
        pairs = zip(outputs(original, converted.example), outputs(converted.supernet, converted.example), strict=True)
        for one, two in pairs:
            if name == "Encoder":  # torch's attention is opened
                torch.testing.assert_close(one, two, rtol=0, atol=2e-6 * float(one.abs().max()))
            else:
                assert torch.equal(one, two)


@pytest.mark.parametrize("name", MODELS)
def test_a_random_archs_export_computes_the_same_and_costs_what_is_foretold(name):
    original, converted = made(name)
    for arch in archs(converted, 2):
        network = converted.plain(arch)
        assert {type(module) for module in network.modules()} <= {type(m) for m in converted_classes(original)}
        with apply(converted.supernet, arch):
            assert difference(converted.supernet, network, converted.example) <= 1e-5
        with FlopCounterMode(display=False) as counter:
            outputs(network, converted.example)
        cost = converted.cost.of([arch])[0]
        assert cost["flops"] == counter.get_total_flops() // 2
        assert cost["params"] == sum(weight.numel() for weight in network.parameters())


def converted_classes(original):
    """The modules that a subnet may have: those of the model, and what attention is opened to."""
    return [*original.modules(), *opened(copy.deepcopy(original)).modules()]


@pytest.mark.parametrize("name", MODELS)
def test_a_subnet_trains_as_its_export_does(name):
    _, converted = made(name)
    supernet, example = copy.deepcopy(converted.supernet), twice(converted.example)
    (arch,) = archs(converted, 1, seed=3)[1:]
    network = converted.plain(arch).train()
    supernet.train()
    with apply(supernet, arch):
        for model in (supernet, network):
            torch.manual_seed(0)
            sum(leaf.float().square().sum() for leaf in tree_leaves(call_model(model, example))).backward()
        after = plain_copy(supernet)
        for key, own in network.state_dict().items():  # running statistics
            torch.testing.assert_close(after.state_dict()[key], own, rtol=1e-5, atol=1e-6)
        reached = {key for key, weight in network.named_parameters() if weight.grad is not None}
        with torch.no_grad():
            for weight in supernet.parameters():
                weight.copy_(torch.zeros_like(weight) if weight.grad is None else weight.grad)
        for key, grad in plain_copy(supernet).named_parameters():
            if key in reached:
                own = dict(network.named_parameters())[key].grad
                torch.testing.assert_close(grad, own, rtol=1e-3, atol=1e-4 * float(own.abs().max()) + 1e-12)
    assert reached == {key for key, _ in network.named_parameters()}


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:mobilevit_xxs", "Encoder", "TwoInputs"])
def test_a_supernet_is_loaded_copied_and_pickled(name):
    original, converted = made(name)
    arch = archs(converted, 1, seed=5)[1]
    assert converted.supernet.state_dict().keys() == original.state_dict().keys()
    with torch.no_grad():
        zero = copy.deepcopy(original)
        for weight in zero.parameters():
            weight.zero_()
    zero.load_state_dict(converted.supernet.state_dict())
    assert difference(zero, original, converted.example) == 0
    for other in (copy.deepcopy(converted.supernet), pickle.loads(pickle.dumps(converted.supernet))):
        other.load_state_dict(original.state_dict())
        with apply(other, arch), apply(converted.supernet, arch):
            assert difference(other, converted.supernet, converted.example) == 0


@pytest.mark.parametrize("name", MODELS)
def test_every_axis_has_a_variable_or_a_reason_with_a_line_that_exists(name):
    _, converted = made(name)
    assert {finding.layer for finding in converted.report}
    for finding in converted.report:
        assert bool(finding.keys) != bool(finding.reason), finding
        if finding.place:
            file, _, line = finding.place.rpartition(":")
            places = [NETS] if file == NETS.name else [*(Path(nn.__file__).parents[2]).glob(file)]
            assert int(line) <= len(places[0].read_text().splitlines())


@pytest.mark.parametrize("name", ["torchvision:resnet18", "torchvision:squeezenet1_1", "Functional", "Shared"])
def test_a_narrow_subnet_computes_what_the_whole_does_with_the_other_weights_at_zero(name):
    _, converted = made(name)
    largest = converted.space.largest()
    for arch in archs(converted, 2, seed=6)[1:]:
        held = {key: largest[key] if key.endswith("depth") else choice for key, choice in arch.items()}
        masked = copy.deepcopy(converted.supernet)
        with apply(converted.supernet, held), torch.no_grad():
            for module, other in zip(converted.supernet.modules(), masked.modules(), strict=True):
                parts = parts_of(module)
                for key in parts.tensors if parts else ():
                    tensor = whole(other, key)
                    index = torch.arange(tensor.numel()).view(tensor.shape)
                    kept = torch.zeros(tensor.numel(), dtype=torch.bool)
                    kept[module._cuts_in_force[key](index).reshape(-1)] = True
                    tensor.mul_(kept.view(tensor.shape))
            apply(masked, largest)
            assert difference(masked, converted.supernet, converted.example) <= 1e-5


@pytest.mark.parametrize("name", ["torchvision:mobilenet_v3_small", "timm:deit_tiny_patch16_224", "Decoder", "UNet"])
def test_sorting_leaves_the_largest_arch_and_brings_what_matters_to_the_front(name):
    original, converted = made(name)
    twin = pickle.loads(pickle.dumps(converted))
    done = sort_channels(twin, "l1")
    assert len(done) > len(twin.space.keys) / 3
    with apply(twin.supernet, twin.space.largest()):
        assert difference(original, twin.supernet, twin.example) <= 1e-5


def test_sorted_channels_are_in_the_order_of_their_importance():
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    converted = convert(model, torch.randn(1, 4))
    assert sort_channels(converted, "l1") == ("0.width",)
    norms = model[2].weight.abs().sum(0) + model[0].weight.abs().sum(1)
    assert (norms.diff() <= 1e-6).all()


# -- what is refused, fixed and said ----------------------------------------------------------------------------------


def line_of(mark):
    lines = NETS.read_text().splitlines()
    return f"nets.py:{next(i for i, line in enumerate(lines, 1) if line.endswith(f'# {mark}'))}"


def test_control_flow_on_values_is_refused_with_its_line_and_the_model_stays_as_it_was():
    model = build_model(f"{NETS}:Branching")
    with pytest.raises(UserError, match=f"{line_of('HERE')}: what is computed depends on the values of tensors"):
        convert(model, torch.randn(1, 3, 8, 8))
    assert {type(module) for module in model.modules()} == {type(model), nn.Conv2d}
    assert model.training


def test_a_literal_fixes_the_axis_and_is_named_with_its_line():
    _, converted = made("Literal")
    (finding,) = (f for f in converted.left if f.layer == "b" and f.axis == "inputs")
    assert (finding.reason, finding.place) == ("the code says 16", line_of("LITERAL"))


def test_an_operation_that_no_rule_knows_only_fixes():
    converted = convert(build_model(f"{NETS}:Unknown").eval(), torch.randn(1, 8))
    assert converted.space.keys == ("b.width",)
    (finding,) = (f for f in converted.left if f.layer == "a" and f.axis == "outputs")
    assert (finding.reason, finding.place) == ("what renorm does to channels is not known", line_of("UNKNOWN"))


def test_a_model_that_draws_random_numbers_differs_from_itself_and_is_refused():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Sequential(nn.Linear(4, 16), nn.Linear(16, 2))

        def forward(self, x):
            return self.fc(x) + torch.randn(2)

    model = Noisy()
    with pytest.raises(UserError, match="differs from the model as it was"):
        convert(model, torch.randn(1, 4))
    assert type(model.fc[0]) is nn.Linear


def test_a_module_with_an_attribute_of_the_reserved_name_is_refused():
    model = nn.Sequential(nn.Linear(4, 16), nn.Linear(16, 2))
    model[0].elastic = True
    with pytest.raises(UserError, match="0, a Linear, has an attribute `elastic` of its own"):
        convert(model, torch.randn(1, 4))


def test_a_supernet_exports_by_fx_where_its_subnet_is_traced():
    _, converted = made("torchvision:resnet18")

    class Reduced(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = converted.supernet

        def forward(self, x):
            return self.model(x)

        def reduced(self):
            return nn.Sequential(plain_copy(self.model))

    network = export_subnet(Reduced().eval(), archs(converted, 1)[1], converted.example)
    assert {type(m).__module__.split(".")[0] for m in network.modules() if m is not network} == {"torch"}


def test_recalibration_reaches_norms_of_several_parts():
    """Of joined channels the running statistics are copies; what is recomputed is stored all the same."""

    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(3, 16, 1)
            self.norm, self.fc = nn.BatchNorm2d(32), nn.Conv2d(32, 4, 1)

        def forward(self, x):
            return self.fc(self.norm(torch.cat([self.a(x), self.b(x)], 1))).mean((2, 3))

    class Task:
        def forward(self, model, batch):
            return model(batch)

    converted = convert(Joined(), torch.randn(1, 3, 8, 8))
    images = torch.randn(8, 3, 8, 8)
    arch = converted.space.smallest()
    network = converted.plain(arch)
    with apply(converted.supernet, arch):
        recalibrate(converted.supernet, Task(), [images])
        recalibrate(network, Task(), [images])
        assert difference(converted.supernet, network, images[:1]) <= 1e-6
        assert not torch.equal(network.norm.running_mean, torch.zeros(16))


# -- rules ------------------------------------------------------------------------------------------------------------


def small(rules=None, **options):
    torch.manual_seed(0)
    return convert(build_model(f"{NETS}:small_resnet"), torch.randn(1, 1, 28, 28), rules, **options)


def test_rules_fix_choose_and_limit_by_patterns_of_module_names():
    space = small().space
    assert {"layer1.depth", "layer2.depth", "layer1.0.conv1.width", "conv1.width"} <= {*space.keys}
    assert space["layer2.0.conv1.width"].choices == (32, 48, 64, 80, 96, 112, 128)
    rules = Rules(fix=["layer1.*"], choices={"layer2.0.conv1": (0.5, 0.75), "layer2.depth": (1,)}, kernels=False)
    own = small(rules)
    assert not [key for key in own.space.keys if key.startswith("layer1.") or key.endswith("kernel")]
    assert own.space["layer2.0.conv1.width"].choices == (64, 96, 128)
    reasons = {finding.reason for finding in own.left if finding.layer == "layer1.0.conv1"}
    assert "fixed by the rule 'layer1.*'" in reasons


@pytest.mark.parametrize(("rules", "message"), [
    (Rules(fix=["layer9.*"]), "no variable is called 'layer9.*'"),
    (Rules(choices={"layer2.0.conv1": (300,)}), "found 300, expected a whole number from 1 to 128"),
])  # fmt: skip
def test_rules_about_nothing_are_refused(rules, message):
    with pytest.raises(UserError, match=message.replace("*", r"\*")):
        small(rules)


def test_a_space_that_is_given_says_what_is_searched():
    whole_space = small().space
    two = [variable for variable in whole_space.variables if variable.key in ("conv1.width", "layer1.depth")]
    given = SearchSpace(two).narrow({"conv1.width": [16, 24]})
    converted = small(space=given)
    assert converted.space.keys == given.keys
    arch = given.smallest()
    assert converted.plain(arch).conv1.out_channels == 16
    with pytest.raises(UserError, match="this model has no such variable"):
        small(space=SearchSpace.from_table({"conv9.width": [1, 2]}))


def test_a_space_goes_through_toml():
    space = small().space
    assert SearchSpace.from_table(space.to_table()).variables == space.variables


# -- beside others ----------------------------------------------------------------------------------------------------


def coupled(pairs, names):
    """Names in sets that pairs of them link."""
    group = {name: {name} for name in names}
    for one, two in pairs:
        if group[one] is not group[two]:
            group[one] |= group[two]
            group |= dict.fromkeys(group[two], group[one])
    return {frozenset(own) for own in group.values()}


@pytest.mark.parametrize(
    "name", ["torchvision:resnet18", "torchvision:squeezenet1_1", "torchvision:mobilenet_v3_small"]
)
def test_torch_prunings_graph_couples_the_same_layers(name):
    model = copy.deepcopy(made(name)[0])
    names = {module: key for key, module in model.named_modules()}
    reading = made(name)[1].reading
    layers = {
        key: [*free_sizes(reading.known.tensors[f"{key}.weight"][0])]
        for module, key in names.items()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }
    free = [key for key, own in layers.items() if own]
    ours = coupled([(a, b) for a in free for b in free if {*layers[a]} & {*layers[b]}], free)
    graph = tp.DependencyGraph().build_dependency(model.requires_grad_(True), torch.randn(IMAGE), verbose=False)
    pairs = []
    for group in graph.get_all_groups():
        written = [
            names[item.dep.target.module]
            for item in group
            if graph.is_out_channel_pruning_fn(item.dep.handler) and names.get(item.dep.target.module) in free
        ]
        pairs += [(written[0], other) for other in written]
    assert ours == coupled(pairs, free)


def test_the_body_of_a_detector_is_converted_in_its_place():
    torch.manual_seed(0)
    body = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5)
    detector = lively(RetinaNet(body, 3, min_size=64, max_size=64, detections_per_img=5))
    images = [torch.rand(3, 64, 64)]
    before = outputs(detector, ([*images],))
    converted = convert(detector.backbone, torch.randn(IMAGE))
    assert {"body.layer1.depth", "body.conv1.width"} <= {*converted.space.keys}
    assert all(map(torch.equal, outputs(detector, ([*images],)), before))
    detector.backbone = converted.plain(converted.space.smallest())
    assert len(outputs(detector, ([*images],))) == len(before)


def test_a_supernet_goes_through_torch_export_bfloat16_and_channels_last():
    converted = small()
    arch, x = archs(converted, 1, seed=4)[1], torch.randn(2, 1, 28, 28)
    network, supernet = converted.plain(arch).eval(), converted.supernet.eval()
    with apply(supernet, arch), torch.no_grad():
        expected = network(x)
        torch.testing.assert_close(torch.export.export(supernet, (x,)).module()(x), expected)
        last = channels_last(copy.deepcopy(supernet))
        torch.testing.assert_close(last(x), expected, rtol=1e-4, atol=1e-5)
        assert all(weight.is_contiguous() for weight in plain_copy(channels_last(network)).state_dict().values())
        half = copy.deepcopy(supernet).bfloat16()
        torch.testing.assert_close(half(x.bfloat16()), network.bfloat16()(x.bfloat16()))


def test_attention_that_was_opened_drops_by_a_layer_that_algorithms_turn_off():
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
    model, x = opened(nn.ModuleList([copy.deepcopy(layer)])).train(), torch.rand(3, 5, 8)
    wanted = layer.eval()(x, x, x)[0]
    with unregularised(model):
        torch.testing.assert_close(model[0](x, x, x)[0], wanted)
    assert not torch.allclose(model[0](x, x, x)[0], wanted)
    torch.testing.assert_close(model.eval()[0](x, x, x)[0], wanted)
