import itertools
import math
from pathlib import Path

import attrs
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from corenas.contracts import Evaluator, Measured
from corenas.errors import UserError
from corenas.options import structure
from corenas.plugins import load_catalogue
from corenas.space import SearchSpace
from corenas.supernet import Supernet
from corenas.testing.components import spec_fragments
from corenas.testing.distributions import distribution_checks
from corenas.testing.evaluators import context, evaluator_checks, measured
from corenas.testing.small import Task, make_space, some_archs
from corenas_backbone_zennet import ZenNet
from corenas_evaluator_zerocost import GradNorm, JacobCov, Naswot, Synflow, ZenScore, corenas_evaluators
from corenas_evaluator_zerocost.scores import grad_norm, jacob_cov, naswot, synflow
from corenas_evaluator_zerocost.zen import before_pooling, draw_weights, drop_shortcuts, zen_score
from corenas_mutable_slices import Residual

INIT = (
    "SuperConvK3BNRELU(3,8,1,1)SuperResK3K3(8,16,1,8,1)SuperResK3K3(16,32,2,16,1)SuperResK3K3(32,64,2,32,1)"
    "SuperResK3K3(64,64,2,32,1)SuperConvK1BNRELU(64,128,1,1)"
)
CIFAR_05M = (
    "SuperConvK3BNRELU(3,64,1,1)SuperResK1K5K1(64,168,1,16,3)SuperResK1K3K1(168,80,2,32,4)"
    "SuperResK1K5K1(80,112,2,16,3)SuperResK1K5K1(112,144,1,24,3)SuperResK1K3K1(144,32,2,40,1)"
    "SuperConvK1BNRELU(32,512,1,1)"
)
FLOPS_400M = (
    "SuperConvK3BNRELU(3,16,2,1)SuperResIDWE1K7(16,40,2,40,1)SuperResIDWE1K7(40,64,2,64,1)"
    "SuperResIDWE4K7(64,96,2,96,5)SuperResIDWE2K7(96,224,2,224,5)SuperConvK1BNRELU(224,2048,1,1)"
)
LATENCY_01MS = (
    "SuperConvK3BNRELU(3,24,2,1)SuperResK3K3(24,32,2,64,1)SuperResK5K5(32,64,2,32,1)SuperResK5K5(64,168,2,96,1)"
    "SuperResK1K5K1(168,320,1,120,1)SuperResK1K5K1(320,640,2,304,3)SuperResK1K5K1(640,512,1,384,1)"
    "SuperConvK1BNRELU(512,2384,1,1)"
)


class Stack(nn.Module):
    """Plain layers as a backbone; a network is pooled at its end."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def features(self, x):
        return [self.layers(x)]


class Flat(nn.Module):
    """A classifier without a bias, after pooling."""

    def __init__(self, channels, classes=3):
        super().__init__()
        self.linear = nn.Linear(channels, classes, bias=False)

    def forward(self, features):
        return self.linear(features[-1].mean((2, 3)))


def conv(inputs, outputs):
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)


def plain_stack(layers):
    widths = [3, *[64] * layers]
    return Supernet(Stack(*itertools.chain(*itertools.starmap(conv, itertools.pairwise(widths)))), nn.Identity())


def zennet(structure, **options):
    return Supernet(ZenNet(**options).build(SearchSpace.from_table({"structure": structure})), nn.Identity())


def scores(make, side, batch_size, n, **more):
    """Scores of n fresh networks."""
    shape, found = (batch_size, 3, side, side), []
    for seed in range(n):
        network = make()
        drop_shortcuts(network)
        found.append(zen_score(network, shape, torch.Generator().manual_seed(seed), **more))
    return np.array(found)


# Measured with the reference code (idstcv/ZenNAS@d1d617e), fresh models: momentum, mean, standard deviation of one.
@pytest.mark.parametrize(("layers", "momentum", "expected"), [
    (1, 0.1, 6.437), (1, 1.0, 7.189), (2, 0.1, 8.430), (2, 1.0, 10.001), (4, 0.1, 12.424), (4, 1.0, 15.630),
])  # fmt: skip
def test_zen_scores_of_plain_stacks_are_those_of_the_reference_code(layers, momentum, expected):
    found = scores(lambda: plain_stack(layers), 32, 16, 8, momentum=momentum)
    assert found.mean() == pytest.approx(expected, abs=4 * 0.02 / math.sqrt(8) + 0.001)


def test_each_score_of_a_network_begins_with_new_statistics():
    network = plain_stack(1)
    first, second = (zen_score(network, (4, 3, 8, 8), torch.Generator().manual_seed(0)) for _ in range(2))
    assert first == second


def test_one_layer_has_a_closed_form():
    """Half of the units are on, and move by gamma * N(0, 1); 27 taps, some of them padding, have a variance of 25.6."""
    delta = math.log(64 * 32 * 32 * 0.5 * 0.01 * math.sqrt(2 / math.pi))
    inside = 30 * 30 * 27 + 4 * 30 * 18 + 4 * 12
    variance = inside / 32**2
    assert variance == pytest.approx(25.6, abs=0.3)
    closed = {0.1: delta + 0.5 * math.log(0.81 + 0.19 * 25.6), 1.0: delta + 0.5 * math.log(25.6)}
    assert closed == pytest.approx({0.1: 6.434, 1.0: 7.189}, abs=0.002)
    for momentum, expected in closed.items():
        found = scores(lambda: plain_stack(1), 32, 16, 12, momentum=momentum)
        assert found.mean() == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize(("structure", "momentum", "expected", "spread", "n"), [
    (INIT, 0.1, 15.41, 0.08, 6),
    (INIT, 1.0, 23.2, 0.1, 6),
    (CIFAR_05M, 0.1, 97.6, 0.9, 1),
    (CIFAR_05M, 1.0, 160.8, 1.3, 1),
], ids=["init", "init-paper", "05M", "05M-paper"])  # fmt: skip
def test_zen_scores_of_cifars_networks_are_those_of_the_reference_code(structure, momentum, expected, spread, n):
    found = scores(lambda: zennet(structure), 32, 16, n, momentum=momentum)
    assert found.mean() == pytest.approx(expected, abs=3 * spread / math.sqrt(n))


@pytest.mark.slow
@pytest.mark.parametrize(("structure", "expected", "spread"), [
    (FLOPS_400M, 89.69, 0.08),
    (LATENCY_01MS, 87.02, 0.03),
], ids=["flops400M", "latency01ms"])  # fmt: skip
def test_zen_scores_of_imagenets_networks_are_those_of_the_reference_code(structure, expected, spread):
    (found,) = scores(lambda: zennet(structure), 224, 8, 1)
    assert found == pytest.approx(expected, abs=4 * spread)


@pytest.mark.slow
@pytest.mark.parametrize(("momentum", "dropped", "expected"), [
    (0.1, True, 45.53), (1.0, True, 59.54), (0.1, False, 53.66), (1.0, False, 70.15),
])  # fmt: skip
def test_zen_scores_of_resnet18_are_those_of_the_reference_code_with_shortcuts_and_without(momentum, dropped, expected):
    basic = [{"width": 64 << i, "depth": 2, "kernel": 3, "ratio": 1} for i in range(4)]
    stages = [{"op": "basic", "basic": table, "stride": 2 if i else 1} for i, table in enumerate(basic)]
    space = SearchSpace.from_table({"stem": {"width": 64, "kernel": 7}, "stages": stages})
    backbone = load_catalogue().options("backbones", "resnet")
    network = Supernet(backbone.build(space), nn.Identity())
    if dropped:
        drop_shortcuts(network)
    found = zen_score(network, (8, 3, 224, 224), torch.Generator().manual_seed(0), momentum=momentum)
    assert found == pytest.approx(expected, abs=0.3)


def test_scores_grow_with_depth_and_width():
    def mean(structure):
        return scores(lambda: zennet(structure), 16, 16, 3).mean()

    text = "SuperConvK3BNRELU(3,8,1,1)SuperResK3K3(8,{0},1,8,{1})SuperConvK1BNRELU({0},32,1,1)"
    assert mean(text.format(16, 1)) < mean(text.format(32, 1)) < mean(text.format(32, 2)) < mean(text.format(32, 4))


def test_a_factor_on_the_weights_of_a_layer_adds_its_logarithm_in_the_papers_convention(monkeypatch):
    shape, found = (8, 3, 16, 16), []
    for factor in (1.0, 5.0):
        network = plain_stack(2)

        def scaled(network, generator, factor=factor):
            draw_weights(network, generator)
            network.backbone.layers[0].weight.mul_(factor)

        monkeypatch.setattr("corenas_evaluator_zerocost.zen.draw_weights", scaled)
        found.append(zen_score(network, shape, torch.Generator().manual_seed(0), momentum=1.0))
    assert found[1] - found[0] == pytest.approx(math.log(5), abs=1e-3)


def test_dropped_shortcuts_are_what_the_backbone_builds_without_residuals():
    shape = (4, 3, 16, 16)
    dropped, without, whole = zennet(INIT), zennet(INIT, residual=False), zennet(INIT)
    drop_shortcuts(dropped)
    projections = [m.shortcut for m in dropped.modules() if isinstance(m, Residual)]
    assert projections
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        draw_weights(without, generator)
    weights = without.state_dict()
    dropped.load_state_dict(weights, strict=False)
    x = torch.randn(shape)
    assert torch.equal(before_pooling(dropped.train(), x), before_pooling(without.train(), x))
    assert all(int(module.norm.num_batches_tracked) == 0 for module in projections)
    with_links = zen_score(whole, shape, torch.Generator().manual_seed(0))
    assert with_links > zen_score(dropped, shape, torch.Generator().manual_seed(0))


def test_features_are_those_before_global_pooling_squeeze_and_excitation_aside():
    x = torch.randn(2, 3, 16, 16)
    for se in (False, True):
        network = zennet(INIT, se=se).eval()
        assert before_pooling(network, x).shape == (2, 128, 2, 2)
        assert torch.equal(before_pooling(network, x).mean((2, 3)), network.backbone.features(x)[0].flatten(1))
    small = context()
    network = small.subnet(small.space.largest())
    assert before_pooling(network, torch.zeros(2, 1, 8, 8)).shape[2:] == (4, 4)  # its head pools


def test_the_conventions_are_the_two_momenta_and_repeats_are_averaged():
    arch = make_space().largest()
    reference, paper = (ZenScore(convention=c, batch_size=4) for c in ("reference", "paper"))
    (low,), (high,) = measured(reference, [arch]), measured(paper, [arch])
    assert low.metrics["zen_score"] != high.metrics["zen_score"]
    (many,) = measured(attrs.evolve(reference, repeats=5), [arch])
    assert isinstance(many, Measured)
    assert many.extra["zen_score_std"] > 0
    assert abs(many.metrics["zen_score"] - low.metrics["zen_score"]) < 5 * many.extra["zen_score_std"]


def test_a_resolution_of_its_own_is_that_of_the_random_images():
    arch = make_space().largest()
    (small,), (large,) = (measured(ZenScore(batch_size=4, resolution=side), [arch]) for side in (8, 32))
    grown = large.metrics["zen_score"] - small.metrics["zen_score"]
    assert grown == pytest.approx(math.log(16), abs=1.0)  # as the sum over 16 times as many pixels


def test_a_network_that_does_not_move_has_failed():
    network = Supernet(Stack(*conv(3, 4)), nn.Identity())
    network.backbone.layers[2] = nn.Threshold(1e9, 0.0)
    assert zen_score(network, (4, 3, 8, 8), torch.Generator()) == -math.inf


class Points(Task):
    """Three colours; the outputs of the network itself are the logits."""

    def __init__(self):
        super().__init__()
        self.example = torch.zeros(1, 3, 8, 8)


def batch(n=12):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, 8, 8, generator=generator), torch.randint(3, (n,), generator=generator)


def small_network(norms=True):
    torch.manual_seed(0)
    layers = [layer for layer in (*conv(3, 5), *conv(5, 7)) if norms or not isinstance(layer, nn.BatchNorm2d)]
    return Supernet(Stack(*layers), Flat(7))


def test_synflow_of_a_chain_is_the_flow_once_for_each_layer():
    """Each layer's part is the whole output, since that is linear in each (Tanaka et al., theorem 1): three times R."""
    network = small_network()
    weights = [
        p.detach().double().abs() for p in (network.backbone.layers[0].weight, network.backbone.layers[3].weight)
    ]
    x = torch.ones(1, 3, 8, 8, dtype=torch.float64)
    for weight in weights:
        x = F.conv2d(x, weight, padding=1)
    flow = float(F.linear(x.mean((2, 3)), network.head.linear.weight.detach().double().abs()).sum())
    assert synflow(network, Points(), None) == pytest.approx(math.log(3 * flow), rel=1e-12)


@pytest.mark.parametrize("norm", [nn.GroupNorm(1, 5), nn.LayerNorm([5, 8, 8]), nn.RMSNorm([5, 8, 8])], ids=repr)
def test_synflow_passes_norms_of_all_kinds(norm):
    """A norm takes what flows back to what it is: a layer before it would have no part in the flow."""
    network, without = (small_network(norms=False) for _ in range(2))
    network.backbone.layers.insert(1, norm)
    assert synflow(network, Points(), None) == pytest.approx(synflow(without, Points(), None), rel=1e-12)


def test_grad_norm_is_the_sum_of_the_layers_gradients():
    network, (x, y) = small_network().train(), batch()
    weights = [p for p in small_network().parameters() if p.dim() > 1]
    assert [p.shape for p in weights] == [(5, 3, 3, 3), (7, 5, 3, 3), (3, 7)]
    h = x
    for weight in weights[:2]:
        h = F.conv2d(h, weight, padding=1)
        h = F.batch_norm(h, None, None, training=True).relu()
    wanted = torch.autograd.grad(F.cross_entropy(F.linear(h.mean((2, 3)), weights[2]), y), weights)
    expected = sum(float(torch.linalg.vector_norm(gradient)) for gradient in wanted)
    assert grad_norm(network, Points(), (x, y)) == pytest.approx(expected, rel=1e-5)


def test_jacob_cov_is_what_numpy_makes_of_the_images_gradients():
    network, (x, y) = small_network().double().train(), batch(6)
    x = x.double().requires_grad_()
    (gradients,) = torch.autograd.grad(network(x).sum(), x)
    values, _ = np.linalg.eig(np.corrcoef(gradients.flatten(1).numpy()))
    expected = -np.sum(np.log(values + 1e-5) + 1 / (values + 1e-5))
    assert jacob_cov(network, Points(), (x.detach(), y)) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("functional", [False, True])
def test_naswot_counts_the_units_on_which_images_agree(functional):
    network, (x, y) = small_network(norms=False).train(), batch(5)
    if functional:
        layers = [layer for layer in network.backbone.layers if not isinstance(layer, nn.ReLU)]
        network.backbone.features = lambda x: [F.relu(layers[1](F.relu(layers[0](x))))]
    first = F.conv2d(x, network.backbone.layers[0].weight, padding=1)
    second = F.conv2d(first.relu(), network.backbone.layers[2].weight, padding=1)
    codes = torch.cat([first.flatten(1) > 0, second.flatten(1) > 0], 1).numpy()
    kernel = [[np.sum(one == two) for two in codes] for one in codes]  # N_A less the Hamming distance
    expected = np.linalg.slogdet(np.array(kernel, float))[1]
    assert naswot(network, Points(), (x, y)) == pytest.approx(expected, rel=1e-9)


def test_naswot_of_a_network_without_activations_fails_with_a_reason():
    network = Supernet(Stack(nn.Conv2d(3, 4, 3)), Flat(4))
    with pytest.raises(ValueError, match="no activation"):
        naswot(network, Points(), batch())


def test_numbers_are_scored_as_logits_are_and_outputs_that_are_neither_are_refused():
    class Numbers(Points):
        def logits(self, outputs):
            return None

    class Boxes(Numbers):
        def forward(self, model, batch):
            return {"boxes": model(batch[0])}

    assert jacob_cov(small_network(), Numbers(), batch()) == jacob_cov(small_network(), Points(), batch())
    assert synflow(small_network(), Numbers(), batch()) == synflow(small_network(), Points(), batch())
    with pytest.raises(UserError, match="logits"):
        jacob_cov(small_network(), Boxes(), batch())


ALL = [
    ZenScore(batch_size=4),
    ZenScore("paper", 2, 4, no_reslink=False),
    Synflow(),
    Naswot(8),
    GradNorm(8),
    JacobCov(8),
]


@pytest.mark.parametrize("options", ALL, ids=lambda options: type(options).__name__)
def test_it_needs_no_supernet_and_reads_no_validation_data(options):
    where = context(trained=False)
    assert where.supernet is None
    results = measured(options, some_archs(where.space, 3), where)
    assert len({tuple(result.metrics.values()) for result in results}) == 3
    read = [] if isinstance(options, ZenScore | Synflow) else ["train"]
    assert [*dict.fromkeys(where.task.asked)] == read


@pytest.mark.parametrize("check", evaluator_checks)
@pytest.mark.parametrize("options", ALL, ids=lambda options: type(options).__name__)
def test_conforms(options, check):
    check(options)


@pytest.mark.parametrize("check", distribution_checks)
def test_the_distribution_conforms(check):
    check("corenas_evaluator_zerocost")


def test_options_are_evaluators_under_their_names():
    assert corenas_evaluators() == {
        "zen_score": ZenScore, "synflow": Synflow, "naswot": Naswot, "grad_norm": GradNorm, "jacob_cov": JacobCov,
    }  # fmt: skip
    assert all(isinstance(options, Evaluator) for options in ALL)
    for name, options in corenas_evaluators().items():
        assert [*options().provides(Task())] == [name]


@pytest.mark.parametrize(("table", "key"), [
    ({"convention": "exact"}, "convention"),
    ({"repeats": 0}, "repeats"),
    ({"gamma": 0.0}, "gamma"),
    ({"batch_size": 1}, "batch_size"),
    ({"resolution": 0}, "resolution"),
])  # fmt: skip
def test_wrong_options_are_named(table, key):
    with pytest.raises(UserError) as caught:
        structure(table, ZenScore)
    assert [fault.dotted for fault in caught.value.faults] == [key]


def test_the_readme_shows_a_spec_that_is_right():
    (spec,) = spec_fragments(Path(__file__).parents[1] / "README.md")
    found = [load_catalogue().options("evaluators", item) for item in spec["evaluators"]]
    assert found == [ZenScore(convention="paper", repeats=4, batch_size=16), Synflow()]
    assert spec["search"]["objectives"] == ["zen_score"]
