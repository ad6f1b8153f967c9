import functools
from itertools import combinations
from math import comb
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
from corenas.mutable import apply
from corenas.options import structure
from corenas.plugins import load_catalogue
from corenas.regularisation import DropPath, tell_progress
from corenas.run.spec import load_spec
from corenas.space import SearchSpace
from corenas.testing.backbones import (
    backbone_checks,
    costs_what_its_exported_networks_cost,
    counted,
    exports_random_archs,
    more_of_a_variable_never_costs_less,
    network,
    noise,
    trains_exactly_what_an_arch_uses,
    uses_the_variables_of_its_space_and_no_others,
)
from corenas.testing.components import imports_no_torch, spec_fragments
from corenas.testing.distributions import distribution_checks
from corenas_backbone_darts import OPERATIONS, Darts, corenas_backbones
from corenas_backbone_darts.genotypes import Genotype
from corenas_backbone_darts.model import Auxiliary, FactorizedReduce
from corenas_mutable_slices import LinearSlice, MixedOp

SPACES = Path(__file__).parents[4] / "spec" / "space"
CIFAR = Darts(channels=36, layers=20, affine=True)
IMAGENET = Darts(channels=48, layers=14, affine=True, stem="imagenet")
TINY = Darts(**Darts.example["backbone"])


@functools.cache
def space_of(name):
    return SearchSpace.from_table(tomli.loads((SPACES / f"{name}.toml").read_text()))


class Network(nn.Module):
    """A backbone with a linear classifier, as a task builds it."""

    def __init__(self, backbone, classes):
        super().__init__()
        self.backbone = backbone
        self.head = LinearSlice(backbone.feat_dims[-1], classes)

    def forward(self, x):
        return self.head(self.backbone.features(x)[-1].mean((2, 3)))


def on_meta(options, space, classes):
    with torch.device("meta"):
        return Network(options.build(space), classes)


# -- genotypes as they are published, in quark0/darts and its successors -----------------------------------------------

DARTS_V1 = """DARTS_V1 = Genotype(
    normal=[('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('skip_connect', 0), ('sep_conv_3x3', 1), ('skip_connect', 0),
            ('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('skip_connect', 2)], normal_concat=[2, 3, 4, 5],
    reduce=[('max_pool_3x3', 0), ('max_pool_3x3', 1), ('skip_connect', 2), ('max_pool_3x3', 0), ('max_pool_3x3', 0),
            ('skip_connect', 2), ('skip_connect', 2), ('avg_pool_3x3', 0)], reduce_concat=[2, 3, 4, 5])"""
DARTS_V2 = """DARTS_V2 = Genotype(
    normal=[('sep_conv_3x3', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 1),
            ('skip_connect', 0), ('skip_connect', 0), ('dil_conv_3x3', 2)], normal_concat=[2, 3, 4, 5],
    reduce=[('max_pool_3x3', 0), ('max_pool_3x3', 1), ('skip_connect', 2), ('max_pool_3x3', 1), ('max_pool_3x3', 0),
            ('skip_connect', 2), ('skip_connect', 2), ('max_pool_3x3', 1)], reduce_concat=[2, 3, 4, 5])"""
NASNET = """NASNet = Genotype(
  normal = [
    ('sep_conv_5x5', 1), ('sep_conv_3x3', 0), ('sep_conv_5x5', 0), ('sep_conv_3x3', 0), ('avg_pool_3x3', 1),
    ('skip_connect', 0), ('avg_pool_3x3', 0), ('avg_pool_3x3', 0), ('sep_conv_3x3', 1), ('skip_connect', 1),
  ],
  normal_concat = [2, 3, 4, 5, 6],
  reduce = [
    ('sep_conv_5x5', 1), ('sep_conv_7x7', 0), ('max_pool_3x3', 1), ('sep_conv_7x7', 0), ('avg_pool_3x3', 1),
    ('sep_conv_5x5', 0), ('skip_connect', 3), ('avg_pool_3x3', 2), ('sep_conv_3x3', 2), ('max_pool_3x3', 1),
  ],
  reduce_concat = [4, 5, 6],
)"""
AMOEBANET = """AmoebaNet = Genotype(
  normal = [
    ('avg_pool_3x3', 0), ('max_pool_3x3', 1), ('sep_conv_3x3', 0), ('sep_conv_5x5', 2), ('sep_conv_3x3', 0),
    ('avg_pool_3x3', 3), ('sep_conv_3x3', 1), ('skip_connect', 1), ('skip_connect', 0), ('avg_pool_3x3', 1),
    ],
  normal_concat = [4, 5, 6],
  reduce = [
    ('avg_pool_3x3', 0), ('sep_conv_3x3', 1), ('max_pool_3x3', 0), ('sep_conv_7x7', 2), ('sep_conv_7x7', 0),
    ('avg_pool_3x3', 1), ('max_pool_3x3', 0), ('max_pool_3x3', 1), ('conv_7x1_1x7', 0), ('sep_conv_3x3', 5),
  ],
  reduce_concat = [3, 4, 6]
)"""
ENAS = """Genotype(
    normal=[('sep_conv_3x3', 1), ('skip_connect', 1), ('sep_conv_5x5', 1), ('skip_connect', 0), ('avg_pool_3x3', 0),
            ('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('avg_pool_3x3', 1), ('sep_conv_5x5', 1), ('avg_pool_3x3', 0)],
    normal_concat=[2, 3, 4, 5, 6],
    reduce=[('sep_conv_5x5', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 1), ('avg_pool_3x3', 1), ('sep_conv_3x3', 1),
            ('avg_pool_3x3', 1), ('avg_pool_3x3', 1), ('sep_conv_5x5', 4), ('sep_conv_3x3', 5), ('sep_conv_5x5', 0)],
    reduce_concat=[2, 3, 4, 5, 6])"""
SNAS = """Genotype(
    normal=[('sep_conv_3x3', 0), ('sep_conv_3x3', 1), ('skip_connect', 0), ('dil_conv_3x3', 1), ('skip_connect', 1),
            ('skip_connect', 0), ('skip_connect', 0), ('sep_conv_3x3', 1)], normal_concat=range(2, 6),
    reduce=[('max_pool_3x3', 0), ('max_pool_3x3', 1), ('max_pool_3x3', 1), ('skip_connect', 2), ('skip_connect', 2),
            ('max_pool_3x3', 1), ('max_pool_3x3', 0), ('dil_conv_5x5', 2)], reduce_concat=range(2, 6))"""
GDAS = """Genotype(
    normal=[('skip_connect', 0), ('skip_connect', 1), ('skip_connect', 0), ('sep_conv_5x5', 2), ('sep_conv_3x3', 3),
            ('skip_connect', 0), ('sep_conv_5x5', 4), ('sep_conv_3x3', 3)], normal_concat=range(2, 6),
    reduce=[('sep_conv_5x5', 0), ('sep_conv_3x3', 1), ('sep_conv_5x5', 2), ('sep_conv_5x5', 1), ('dil_conv_5x5', 2),
            ('sep_conv_3x3', 1), ('sep_conv_5x5', 0), ('sep_conv_5x5', 2)], reduce_concat=range(2, 6))"""
PDARTS = """Genotype(
    normal=[('skip_connect', 0), ('dil_conv_3x3', 1), ('skip_connect', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 1),
            ('sep_conv_3x3', 3), ('sep_conv_3x3',0), ('dil_conv_5x5', 4)], normal_concat=range(2, 6),
    reduce=[('avg_pool_3x3', 0), ('sep_conv_5x5', 1), ('sep_conv_3x3', 0), ('dil_conv_5x5', 2), ('max_pool_3x3', 0),
            ('dil_conv_3x3', 1), ('dil_conv_3x3', 1), ('dil_conv_5x5', 3)], reduce_concat=range(2, 6))"""
PC_DARTS = """Genotype(
    normal=[('sep_conv_3x3', 1), ('skip_connect', 0), ('sep_conv_3x3', 0), ('dil_conv_3x3', 1), ('sep_conv_5x5', 0),
            ('sep_conv_3x3', 1), ('avg_pool_3x3', 0), ('dil_conv_3x3', 1)], normal_concat=range(2, 6),
    reduce=[('sep_conv_5x5', 1), ('max_pool_3x3', 0), ('sep_conv_5x5', 1), ('sep_conv_5x5', 2), ('sep_conv_3x3', 0),
            ('sep_conv_3x3', 3), ('sep_conv_3x3', 1), ('sep_conv_3x3', 2)], reduce_concat=range(2, 6))"""
PC_DARTS_IMAGENET = """Genotype(
    normal=[('skip_connect', 1), ('sep_conv_3x3', 0), ('sep_conv_3x3', 0), ('skip_connect', 1), ('sep_conv_3x3', 1),
            ('sep_conv_3x3', 3), ('sep_conv_3x3', 1), ('dil_conv_5x5', 4)], normal_concat=range(2, 6),
    reduce=[('sep_conv_3x3', 0), ('skip_connect', 1), ('dil_conv_5x5', 2), ('max_pool_3x3', 1), ('sep_conv_3x3', 2),
            ('sep_conv_3x3', 1), ('sep_conv_5x5', 0), ('sep_conv_3x3', 3)], reduce_concat=range(2, 6))"""
DARTS_ABS = """Genotype(
    normal=[('sep_conv_3x3', 1), ('dil_conv_3x3', 0), ('sep_conv_5x5', 1), ('sep_conv_3x3', 2), ('dil_conv_3x3', 2),
            ('sep_conv_5x5', 1), ('dil_conv_3x3', 4), ('dil_conv_5x5', 2)], normal_concat=range(2, 6),
    reduce=[('dil_conv_3x3', 0), ('sep_conv_3x3', 1), ('sep_conv_5x5', 0), ('sep_conv_3x3', 2), ('dil_conv_3x3', 0),
            ('dil_conv_5x5', 3), ('dil_conv_3x3', 0), ('dil_conv_3x3', 2)], reduce_concat=range(2, 6))"""
MMRAZOR = """Genotype(
    normal=[('sep_conv_3x3', 0), ('sep_conv_3x3', 1), ('skip_connect', 0), ('sep_conv_5x5', 1), ('sep_conv_3x3', 0),
            ('skip_connect', 1), ('skip_connect', 0), ('skip_connect', 1)], normal_concat=range(2, 6),
    reduce=[('max_pool_3x3', 0), ('sep_conv_3x3', 1), ('max_pool_3x3', 0), ('dil_conv_5x5', 2), ('max_pool_3x3', 0),
            ('skip_connect', 2), ('max_pool_3x3', 0), ('skip_connect', 2)], reduce_concat=range(2, 6))"""
PUBLISHED = [
    DARTS_V1,
    DARTS_V2,
    NASNET,
    AMOEBANET,
    ENAS,
    SNAS,
    GDAS,
    PDARTS,
    PC_DARTS,
    PC_DARTS_IMAGENET,
    DARTS_ABS,
    MMRAZOR,
]

FIGURES = [  # genotype, whether for ImageNet, params and flops of networks of quark0/darts's own code as far as known
    (DARTS_V2, False, 3_349_342, 528_359_040),
    (DARTS_V2, True, 4_718_752, 529_911_552),
    (NASNET, False, 3_830_950, None),
    (NASNET, True, 5_564_320, None),
    (AMOEBANET, False, 3_145_078, None),
    (AMOEBANET, True, 4_627_360, None),
]

ROUNDED = [  # genotype, whether for ImageNet, millions of params and flops as published
    (ENAS, False, 4.02, None),  # this and the next three: lists of genotypes in the code of FairDARTS
    (SNAS, False, 2.66, 422),
    (GDAS, False, 3.37, 519),
    (PDARTS, False, 3.43, 532),
    (PDARTS, True, 4.9, None),  # Chen et al. 2019, arXiv:1904.12760, table 2
    (PC_DARTS, False, 3.63, None),
    (PC_DARTS_IMAGENET, True, 5.3, None),  # Xu et al. 2020, arXiv:1907.05737, table 2
    (DARTS_ABS, True, None, 619),  # megvii-model/AngleNAS (Hu et al. 2020, arXiv:2004.13431)
    (MMRAZOR, False, 2.95, None),  # DARTS_SUBNET_CIFAR_MMRAZOR_97.32.yaml: 3.42M, of which 0.476M auxiliary
]


def space_and_arch(text):
    """A published genotype as an arch of the space that holds it."""
    genotype = Genotype.read(text)
    space = space_of("darts" if len(genotype.normal) == 8 else "nasnet-cells")
    return space, genotype.to_arch(space)


def figures_of(text, imagenet):
    """flops and params of a genotype's arch, by the core; and those of the oracle, by torch."""
    options, classes, side = (IMAGENET, 1000, 224) if imagenet else (CIFAR, 10, 32)
    space, arch = space_and_arch(text)
    alone = space.fix(arch)
    model = on_meta(options, alone, classes)
    (cost,) = Cost(model, alone, torch.empty(1, 3, side, side)).of([arch])
    assert sum(p.numel() for p in model.parameters()) == cost["params"]
    cells = of_genotype(Genotype.read(text))
    with torch.device("meta"):
        oracle = PlainNetwork(cells, options.channels, options.layers, classes, True, imagenet)
    return {name: cost[name] for name in ("flops", "params")}, counted(oracle.eval(), (3, side, side))


@pytest.mark.parametrize(("text", "imagenet", "params", "flops"), FIGURES)
def test_published_networks_come_out_to_the_last_digit(text, imagenet, params, flops):
    ours, oracle = figures_of(text, imagenet)
    assert ours == oracle
    assert ours["params"] == params
    assert flops in (None, ours["flops"])


@pytest.mark.parametrize(("text", "imagenet", "params", "flops"), ROUNDED)
def test_genotypes_of_other_papers_have_their_published_size(text, imagenet, params, flops):
    ours, oracle = figures_of(text, imagenet)
    assert ours == oracle
    if params is not None:
        assert round(ours["params"] / 1e6, len(str(params).split(".")[1])) == params
    assert flops in (None, round(ours["flops"] / 1e6))


def test_in_a_supernet_archs_cost_the_same_as_alone():
    space, options, example = space_of("darts"), Darts(channels=4, layers=3, affine=True), torch.empty(1, 3, 32, 32)
    archs = [Genotype.read(text).to_arch(space) for text in (DARTS_V1, DARTS_V2, SNAS, GDAS, PDARTS, PC_DARTS)]
    together = Cost(on_meta(options, space, 10), space, example).of(archs)
    for arch, cost in zip(archs, together, strict=True):
        alone = space.fix(arch)
        assert Cost(on_meta(options, alone, 10), alone, example).of([arch]) == [cost]


def test_an_exported_network_has_the_published_figures():
    space, arch = space_and_arch(DARTS_V2)
    plain = export_subnet(Network(CIFAR.build(space.fix(arch)), 10).eval(), arch, torch.zeros(1, 3, 8, 8))
    assert counted(plain, (3, 32, 32)) == {"flops": 528_359_040, "params": 3_349_342}


def test_the_search_network_has_the_size_that_its_log_says():
    model = on_meta(Darts(), space_of("darts"), 10)
    assert sum(p.numel() for p in model.parameters()) == 1_930_618
    mixed = [module for module in model.modules() if isinstance(module, MixedOp)]
    assert len(mixed) == 8 * 14
    assert {module.names for module in mixed} == {OPERATIONS[:8]}
    assert len({module.elastic.values["op"].key for module in mixed}) == 2 * 14


def test_the_space_has_the_size_of_the_paper():
    ways = [comb(states, 2) * 7**2 for states in (2, 3, 4, 5)]  # section 3.1: about 10^9 cells, two of them
    assert space_of("darts").size == np.prod(ways, dtype=object) ** 2
    assert space_of("darts").size == pytest.approx(1e18, rel=0.1)


def test_the_space_of_nasnet_cells_is_counted():
    edges = [(states * 9) ** 2 for states in (2, 3, 4, 5, 6)]
    assert space_of("nasnet-cells").size == (int(np.prod(edges, dtype=object)) * 2**4) ** 2


def test_the_example_is_the_tiny_space():
    assert space_of("darts-tiny").variables == SearchSpace.from_table(Darts.example["space"]).variables
    assert space_of("darts-tiny").size == (3**2 * 3 * 3**2) ** 2


# -- oracle: the networks of the paper in plain torch ------------------------------------------------------------------


class Halved(nn.Module):
    def __init__(self, inputs, width, affine):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(inputs, width // 2, 1, 2, bias=False) for _ in range(2))
        self.norm = nn.BatchNorm2d(width, affine=affine)

    def forward(self, x):
        x = x.relu()
        return self.norm(torch.cat([self.convs[0](x), self.convs[1](x[:, :, 1:, 1:])], 1))


class Nothing(nn.Module):
    def __init__(self, stride):
        super().__init__()
        self.stride = stride

    def forward(self, x):
        return torch.zeros_like(x[:, :, :: self.stride, :: self.stride])


def plain_operation(name, width, stride, affine):
    def norm():
        return nn.BatchNorm2d(width, affine=affine)

    def separable(kernel, stride, dilation=1):
        pad = dilation * (kernel - 1) // 2
        deep = nn.Conv2d(width, width, kernel, stride, pad, dilation, width, bias=False)
        return [nn.ReLU(), deep, nn.Conv2d(width, width, 1, bias=False), norm()]

    if name == "none":
        return Nothing(stride)
    if name == "skip_connect":
        return nn.Sequential() if stride == 1 else Halved(width, width, affine)
    if name.endswith("pool_3x3"):
        pools = {"max": nn.MaxPool2d(3, stride, 1), "avg": nn.AvgPool2d(3, stride, 1, count_include_pad=False)}
        return nn.Sequential(pools[name[:3]], *([] if affine else [norm()]))
    if name == "conv_7x1_1x7":
        wide = nn.Conv2d(width, width, (1, 7), (1, stride), (0, 3), bias=False)
        high = nn.Conv2d(width, width, (7, 1), (stride, 1), (3, 0), bias=False)
        return nn.Sequential(nn.ReLU(), wide, high, norm())
    kernel = int(name[-1])
    if name.startswith("dil"):
        return nn.Sequential(*separable(kernel, stride, 2))
    return nn.Sequential(*separable(kernel, stride), *separable(kernel, 1))


def fitting(inputs, width, affine):
    return nn.Sequential(nn.ReLU(), nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width, affine=affine))


class PlainCell(nn.Module):
    """edges: for each node its (operation, state); without, all states with all operations, as in the search."""

    def __init__(self, edges, concat, before, inputs, width, reduction, halved, affine):
        super().__init__()
        self.prepare = nn.ModuleList(
            [
                Halved(before, width, affine) if halved else fitting(before, width, affine),
                fitting(inputs, width, affine),
            ]
        )
        self.edges, self.concat = edges, concat
        stride = {0: 2, 1: 2} if reduction else {}
        self.ops = nn.ModuleList()
        for node in edges:
            for name, state in node:
                self.ops.append(plain_operation(name, width, stride.get(state, 1), affine))

    def forward(self, before, last, weights):
        states = [prepare(x) for prepare, x in zip(self.prepare, (before, last), strict=True)]
        ops = iter(zip(self.ops, weights, strict=True))
        for node in self.edges:
            terms = [(next(ops), states[state]) for _, state in node]
            states.append(sum(weight * op(x) for (op, weight), x in terms))
        return torch.cat([states[i] for i in self.concat], 1)


class PlainNetwork(nn.Module):
    """cells: "normal" and "reduce" -> (edges by node, states of the output)."""

    def __init__(self, cells, channels, layers, classes, affine, imagenet=False):
        super().__init__()

        def conv(inputs, outputs, stride):
            return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)

        if imagenet:
            half = channels // 2
            self.stem = nn.Sequential(*conv(3, half, 2), nn.ReLU(), *conv(half, channels, 2))
            self.more = nn.Sequential(nn.ReLU(), *conv(channels, channels, 2))
            before = last = channels
        else:
            self.stem, self.more = nn.Sequential(*conv(3, 3 * channels, 1)), None
            before = last = 3 * channels
        self.cells, self.kinds, halved = nn.ModuleList(), [], imagenet
        for i in range(layers):
            reduction = i in (layers // 3, 2 * layers // 3)
            channels *= 1 + reduction
            self.kinds.append("reduce" if reduction else "normal")
            edges, concat = cells[self.kinds[-1]]
            self.cells.append(PlainCell(edges, concat, before, last, channels, reduction, halved, affine))
            before, last, halved = last, channels * len(concat), reduction
        self.classifier = nn.Linear(last, classes)

    def forward(self, x, weights=None):
        before = last = self.stem(x)
        if self.more is not None:
            last = self.more(before)
        for kind, cell in zip(self.kinds, self.cells, strict=True):
            own = weights[kind] if weights else [1.0] * len(cell.ops)
            before, last = last, cell(before, last, own)
        return self.classifier(last.mean((2, 3)))


def of_genotype(genotype):
    """Cells of the oracle."""
    cells = {}
    for kind in ("normal", "reduce"):
        edges, concat = genotype.cell(kind)
        cells[kind] = [edges[i : i + 2] for i in range(0, len(edges), 2)], concat
    return cells


def given(oracle, state):
    """The oracle with the weights of ours, which come in the same order; batch norms as if they had seen something."""
    oracle.double().load_state_dict(dict(zip(oracle.state_dict(), state.values(), strict=True)))
    return oracle


def stirred(model):
    """A model in double precision whose batch norms are not all alike."""
    generator = torch.Generator().manual_seed(1)
    for module in model.double().modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in ((module.running_mean, -0.2, 0.2), (module.running_var, 0.5, 1.5),
                                      (module.weight, 0.5, 1.5), (module.bias, -0.2, 0.2)):  # fmt: skip
                if tensor is not None:
                    tensor.data.uniform_(low, high, generator=generator)
    return model


@pytest.mark.parametrize("options", [
    Darts(channels=4, layers=6, affine=True), Darts(channels=4, layers=3),
    Darts(channels=6, layers=4, affine=True, stem="imagenet"),
], ids=["cifar", "search", "imagenet"])  # fmt: skip
@pytest.mark.parametrize("text", [DARTS_V1, DARTS_V2, NASNET, AMOEBANET, ENAS, PC_DARTS_IMAGENET])
def test_a_genotype_computes_what_the_network_of_the_paper_computes(text, options):
    torch.manual_seed(0)
    space, arch = space_and_arch(text)
    model = stirred(Network(options.build(space.fix(arch)), 7))
    side = 64 if options.stem == "imagenet" else 16
    x = torch.randn(4, 3, side, side, dtype=torch.float64)
    cells = of_genotype(Genotype.of_arch(arch, space))  # the edges of a node in our order
    plain = export_subnet(model.eval(), arch, x[:1])
    oracle = PlainNetwork(cells, options.channels, options.layers, 7, options.affine, options.stem == "imagenet")
    oracle = given(oracle, plain.state_dict())
    assert [p.shape for p in oracle.parameters()] == [p.shape for p in plain.parameters()]
    for training in (False, True):
        with apply(model.train(training), arch), torch.no_grad():
            torch.testing.assert_close(model(x), oracle.train(training)(x), rtol=1e-9, atol=1e-9)


def test_the_search_network_computes_the_weighted_sums_of_the_paper_and_so_do_its_gradients():
    torch.manual_seed(0)
    space, options = space_of("darts"), Darts(channels=4, layers=3)
    model = stirred(Network(options.build(space), 7)).train()
    edges = [[(name, state) for state in range(node + 2) for name in OPERATIONS[:8]] for node in range(4)]
    oracle = PlainNetwork(dict.fromkeys(("normal", "reduce"), (edges, range(2, 6))), 4, 3, 7, False)
    oracle = given(oracle, model.state_dict()).train()
    alphas = {k: torch.randn(14, 8, dtype=torch.float64).requires_grad_() for k in ("normal", "reduce")}
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    keys = {k: [key for key in space.keys if key.startswith(k) and key.endswith(".op")] for k in alphas}
    weights = {key: row for k, own in keys.items() for key, row in zip(own, alphas[k].softmax(1), strict=True)}
    results = []
    for forward in (lambda: _under(model, {**space.default(), **weights}, x),
                    lambda: oracle(x, {k: a.softmax(1).flatten() for k, a in alphas.items()})):  # fmt: skip
        out = forward()
        own = [*(model if not results else oracle).parameters(), *alphas.values()]
        results.append((out, torch.autograd.grad(out.square().sum(), own, retain_graph=True)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-8, atol=1e-10)
    assert all(gradient.abs().max() > 0 for gradient in results[0][1][-2:])


def _under(model, choices, x):
    with apply(model, choices):
        return model(x)


def test_weights_are_in_force_for_a_while_only():
    space = space_of("darts-tiny")
    model = network(TINY, space)
    x = noise((1, 16, 16), 4)
    mixed = next(module for module in model.modules() if isinstance(module, MixedOp))
    weights = {key: torch.full((4,), 0.25) for key in space.keys if key.endswith("op")}
    assert len(mixed.names) == 4
    arch = space.default()
    before = _under(model.eval(), arch, x)[0]
    assert not torch.allclose(_under(model, {**arch, **weights}, x)[0], before)
    assert torch.equal(_under(model, arch, x)[0], before)


# -- genotypes ---------------------------------------------------------------------------------------------------------


def unordered(genotype):
    """A genotype with the edges of each node in alphabetical order: a sum has none."""
    cells = of_genotype(genotype)
    return {kind: ([sorted(node) for node in edges], tuple(concat)) for kind, (edges, concat) in cells.items()}


@pytest.mark.parametrize("text", PUBLISHED)
def test_published_genotypes_are_archs_and_come_back(text):
    genotype = Genotype.read(text)
    space, arch = space_and_arch(text)
    assert unordered(Genotype.of_arch(arch, space)) == unordered(genotype)
    assert Genotype.of_arch(arch, space).to_arch(space) == arch
    assert Genotype.read(str(genotype)) == genotype


@pytest.mark.parametrize("text", PUBLISHED)
def test_every_genotype_has_a_space_of_its_own(text):
    genotype = Genotype.read(text)
    space = SearchSpace.from_table(genotype.to_table())
    assert space.size == 1
    assert Genotype.of_arch(space.default(), space) == genotype
    assert genotype.to_arch(space) == space.default()
    held, arch = space_and_arch(text)
    sizes = [sum(p.numel() for p in on_meta(TINY, s, 10).parameters()) for s in (space, held.fix(arch))]
    assert sizes[0] == sizes[1]


def test_random_archs_are_genotypes_and_come_back():
    for name in ("darts", "darts-tiny", "nasnet-cells"):
        space = space_of(name)
        for arch in space.decode(space.draw(np.random.default_rng(0), 50)):
            genotype = Genotype.of_arch(arch, space)
            assert Genotype.of_arch(genotype.to_arch(space), space) == genotype
            if name != "nasnet-cells":  # there two equal edges have no order
                assert genotype.to_arch(space) == arch


def test_python_itself_reads_what_is_written():
    genotype = Genotype.read(PC_DARTS)
    assert eval(str(genotype), {"Genotype": lambda **parts: parts})["normal"] == [*genotype.normal]


def test_an_arch_is_the_same_for_search_and_retraining():
    space, arch = space_and_arch(DARTS_V2)
    for options in (Darts(), CIFAR, IMAGENET):
        assert {type(on_meta(options, space.fix(arch), 10)(torch.empty(2, 3, 64, 64, device="meta")))} == {torch.Tensor}


SHORT = "normal=[('skip_connect', 0), ('skip_connect', 1)], normal_concat=[2], "
REDUCE = "reduce=[('skip_connect', 0), ('skip_connect', 1)], reduce_concat=[2]"


@pytest.mark.parametrize(("text", "says"), [
    ("", "no genotype"),
    ("Genotype(", "no genotype"),
    ("(" * 500, "no genotype"),
    ("Genotype", "expected `Genotype("),
    ("print('x')", "expected `Genotype("),
    ("import os", "expected `Genotype("),
    (f"Genotype({SHORT}{REDUCE}); print()", "no genotype"),
    (f"Genotype({SHORT}reduce=__import__('os').system('true'), reduce_concat=[2])", "no genotype"),
    (f"Genotype({SHORT}reduce=[print('x')], reduce_concat=[2])", "no genotype"),
    (f"Genotype({SHORT}reduce=[], reduce_concat=range(10**9))", "no genotype"),
    (f"Genotype({SHORT}reduce=[], reduce_concat=range(1000000000))", "1,000,000,000 nodes"),
    (f"Genotype({SHORT}{REDUCE}, **{{}})", "unknown part"),
    (f"Genotype({SHORT}{REDUCE}, size=3)", "size: unknown part"),
    (f"Genotype({SHORT})", "reduce: is missing"),
    (f"Genotype({SHORT}{REDUCE.replace('[2]', '2')})", "reduce_concat: expected a list"),
    (f"Genotype({SHORT}{REDUCE.replace('[2]', '[1, 2]')})", "reduce_concat: expected nodes in order, of 2 to 2"),
    (f"Genotype({SHORT}{REDUCE.replace('[2]', '[]')})", "and the last among them"),
    (f"Genotype({SHORT}{REDUCE.replace('1)', '2)')})", "reduce[1]: node 2 cannot see state 2: there are 0 to 1"),
    (f"Genotype({SHORT}{REDUCE.replace('1)', '-1)')})", "reduce[1]: node 2 cannot see state -1"),
    (f"Genotype({SHORT}{REDUCE.replace('1)', 'True)')})", "reduce[1][1]: expected a whole number"),
    (f"Genotype({SHORT}{REDUCE.replace('skip_connect', 'sep_conv3x3')})", "no operation 'sep_conv3x3'"),
    (f"Genotype({SHORT}reduce=[('skip_connect', 0)], reduce_concat=[2])", "expected two edges for each node, found 1"),
    (f"Genotype({SHORT}reduce=[('skip_connect', 0, 1), ('none', 1)], reduce_concat=[2])", "expected 2 items, found 3"),
])  # fmt: skip
def test_what_is_no_genotype_is_refused_and_nothing_of_it_runs(text, says, capsys):
    with pytest.raises(UserError) as caught:
        Genotype.read(text)
    assert says in str(caught.value)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("text", "name", "named", "says"), [
    (NASNET, "darts", ["normal.nodes", "reduce.nodes"], "this cell has 4 nodes, that of the genotype 5"),
    (DARTS_V2, "nasnet-cells", ["normal.nodes", "reduce.nodes"], "this cell has 5 nodes, that of the genotype 4"),
    (DARTS_V2.replace("'dil_conv_3x3'", "'sep_conv_7x7'"), "darts", ["normal.nodes[3]"], "('sep_conv_7x7', 2)"),
    (DARTS_V2.replace("('sep_conv_3x3', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0)",
                      "('sep_conv_3x3', 0), ('sep_conv_3x3', 0), ('sep_conv_3x3', 0)"),
     "darts", ["normal.nodes[0]"], "no choice of this node is ('sep_conv_3x3', 0) and ('sep_conv_3x3', 0)"),
    (DARTS_V2.replace("reduce_concat=[2,", "reduce_concat=["), "darts", ["reduce.nodes[0].out"],
     "this node is always a part"),
])  # fmt: skip
def test_a_genotype_that_is_no_arch_of_a_space_is_told_why(text, name, named, says):
    with pytest.raises(UserError) as caught:
        Genotype.read(text).to_arch(space_of(name))
    assert [fault.dotted for fault in caught.value.faults] == named
    assert says in str(caught.value)


def test_genotypes_need_no_torch():
    imports_no_torch("corenas_backbone_darts.genotypes")


# -- training: auxiliary features, drop path ---------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "classes", "side", "params"), [
    (Darts(channels=36, layers=20, affine=True, auxiliary=True), 10, 32, 3_825_768),
    (Darts(channels=48, layers=14, affine=True, auxiliary=True, stem="imagenet"), 1000, 224, 5_979_528),
], ids=["cifar", "imagenet"])  # fmt: skip
def test_auxiliary_features_have_the_published_size_and_cost_nothing(options, classes, side, params):
    space, arch = space_and_arch(DARTS_V2)
    space = space.fix(arch)
    model = on_meta(options, space, classes)
    classifier = 768 * classes + classes
    assert sum(p.numel() for p in model.parameters()) + classifier == params
    without = on_meta(CIFAR if classes == 10 else IMAGENET, space, classes)
    example = torch.empty(1, 3, side, side)
    assert Cost(model, space, example).of([arch]) == Cost(without, space, example).of([arch])
    images = torch.empty(2, 3, side, side, device="meta")
    features = model.backbone.train().features(images)
    last = side // 4 if side == 32 else side // 32
    assert [f.shape[1:] for f in features] == [(768, 1, 1), (model.head.in_features, last, last)]
    assert [dim.allocated for dim in model.backbone.feat_dims] == [f.shape[1] for f in features]
    assert len(model.backbone.eval().features(images)) == 1


@pytest.mark.parametrize("side", [28, 32, 64])
def test_auxiliary_features_are_those_of_the_reference_on_maps_of_8x8_and_there_are_some_on_others(side):
    torch.manual_seed(0)
    trunk = Auxiliary(TINY.build(space_of("darts-tiny")).feat_dims[-1], "cifar").double().eval()
    x = torch.randn(2, trunk.layers[2].in_channels, side // 4, side // 4, dtype=torch.float64)
    out = trunk(x)
    assert out.isfinite().all()
    if side == 32:
        pooled = nn.functional.avg_pool2d(x.relu(), 5, 3)
        layers = list(trunk.layers)[2:]
        assert torch.equal(out, nn.Sequential(*layers)(pooled))
        assert out.shape == (2, 768, 1, 1)


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_auxiliary_features_of_maps_that_are_too_small_are_refused_with_the_option(stem):
    trunk = Auxiliary(TINY.build(space_of("darts-tiny")).feat_dims[-1], stem).eval()
    channels = trunk.layers[2].in_channels
    assert trunk(torch.zeros(2, channels, 6, 6)).shape == (2, 768, 1, 1)
    with pytest.raises(UserError, match=r"backbone\.auxiliary: .* at least 6x6, found 2x5"):
        trunk(torch.zeros(2, channels, 2, 5))


def test_the_exported_network_has_no_auxiliary_layers():
    space = space_of("darts-tiny")
    options = Darts(channels=4, layers=3, in_channels=1, auxiliary=True)
    models = [Network(o.build(space), 10).eval() for o in (options, TINY)]
    arch, x = space.default(), torch.zeros(1, 1, 28, 28)
    sizes = [sum(p.numel() for p in export_subnet(model, arch, x).parameters()) for model in models]
    assert sizes[0] == sizes[1]


def test_drop_path_grows_with_the_progress_of_a_training():
    space = space_of("darts-tiny")
    model = Darts(channels=4, layers=3, drop_path=0.2).build(space)
    drops = [module for module in model.modules() if isinstance(module, DropPath)]
    assert {drop.drop.p for drop in drops} == {0.2}
    for epoch in (0, 300, 599):
        tell_progress(model, epoch / 600)
        assert {round(drop.drop.p, 9) for drop in drops} == {round(0.2 * epoch / 600, 9)}
    identities = sum(isinstance(module, nn.Identity) for module in model.modules())
    edges = sum(len(module.names) - 1 for module in model.modules() if isinstance(module, MixedOp))
    assert len(drops) == edges - identities  # skip connections are never dropped


def test_drop_path_leaves_weights_names_and_evaluation_alone():
    space = space_of("darts-tiny")
    x = noise((1, 28, 28))
    plain, dropping = (
        network(Darts(channels=4, layers=3, in_channels=1, drop_path=p), space).eval() for p in (0.0, 0.9)
    )
    arch = space.default()
    torch.testing.assert_close(_under(plain, arch, x), _under(dropping, arch, x))
    assert len(plain.state_dict()) == len(dropping.state_dict())
    torch.manual_seed(0)
    assert not torch.allclose(_under(dropping.train(), arch, x)[0], _under(plain.train(), arch, x)[0])


# -- what a user can say -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", backbone_checks)
@pytest.mark.parametrize(("options", "table", "image"), [
    (TINY, Darts.example["space"], (1, 28, 28)),
    (Darts(channels=4, layers=3, affine=True, stem="imagenet", levels=(1, 3)),
     {**Darts.example["space"], "resolution": [48, 64]}, (3, 64, 64)),
], ids=["tiny", "levels"])  # fmt: skip
def test_conforms(options, table, image, check):
    check(options, SearchSpace.from_table(table), image=image)


ON_TABLE = (
    uses_the_variables_of_its_space_and_no_others,
    exports_random_archs,
    costs_what_its_exported_networks_cost,
)
"""The checks that hang on the table of a space, and not on the layers alone that all of them share."""


# In nasnet-cells nodes that neither a node nor the output takes run all the same, as in the reference code, so that
# gradients are others than those that are exported; and its states have numbers and no order.
@pytest.mark.parametrize(("name", "check"), [
    *(("darts", check) for check in (*ON_TABLE, trains_exactly_what_an_arch_uses, more_of_a_variable_never_costs_less)),
    *(("nasnet-cells", check) for check in ON_TABLE),
])  # fmt: skip
def test_conforms_on_the_spaces_of_papers(name, check):
    check(Darts(channels=2, layers=3), space_of(name), image=(3, 16, 16))


@pytest.mark.parametrize("name", ["darts", "nasnet-cells"])
def test_every_weight_on_the_spaces_of_papers_is_used(name):
    # Sixty random archs, as the check draws, would leave some out.
    space, x = space_of(name), noise((3, 8, 8))
    model = network(Darts(channels=2, layers=3), space).train()
    rest = [key for key in space.keys if not key.endswith("op")]
    for op in range(max(len(v.choices) for v in space.variables if v.key.endswith("op"))):
        for shift in range(max(len(space[key].choices) for key in rest)):
            places = {v.key: shift if v.key in rest else op for v in space.variables}
            choices = {key: space[key].choices[place % len(space[key].choices)] for key, place in places.items()}
            outs = {key: 1 for key in space.keys if key.endswith("out")}
            _under(model, {**choices, **outs}, x)[0].sum().backward()
    assert not [key for key, p in model.named_parameters() if p.grad is None]


@pytest.mark.parametrize("check", distribution_checks)
def test_the_distribution_conforms(check):
    check("corenas_backbone_darts")


def test_options_are_a_backbone_under_its_name():
    assert corenas_backbones() == {"darts": Darts}
    assert isinstance(Darts(), Backbone)


def test_maps_of_odd_sides_are_halved_upwards_and_even_ones_as_in_the_reference():
    torch.manual_seed(0)
    layer = FactorizedReduce(TINY.build(space_of("darts-tiny")).feat_dims[-1], 6, True).eval()
    inputs = layer.even.in_channels
    oracle = Halved(inputs, 6, True).eval()
    oracle.load_state_dict(dict(zip(oracle.state_dict(), layer.state_dict().values(), strict=True)))
    x = torch.randn(2, inputs, 8, 8)
    torch.testing.assert_close(layer(x), oracle(x))
    assert layer(x[:, :, :7, :7]).shape == (2, 6, 4, 4)
    model = network(Darts(channels=4, layers=3), space_of("darts-tiny"))
    assert model(torch.randn(2, 3, 30, 30))[0].shape[2:] == (8, 8)


def test_levels_are_the_last_cells_before_each_reduction_and_the_end():
    space = space_of("darts-tiny")
    model = network(Darts(channels=4, layers=6, levels=(1, 2, 3)), space)
    assert [f.shape[1:] for f in model(noise((3, 32, 32)))] == [(8, 32, 32), (16, 16, 16), (32, 8, 8)]
    short = network(Darts(channels=4, layers=6, levels=(2,)), space)
    assert (len(short.backbone.cells), len(short.backbone.segments)) == (4, 5)


def test_the_tiny_space_trains():
    space, x, y = space_of("darts-tiny"), noise((1, 28, 28), 16), torch.arange(16) % 4
    torch.manual_seed(0)
    model = Network(TINY.build(space), 4).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(10):
        loss = nn.functional.cross_entropy(_under(model, space.default(), x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3


OPS = ["sep_conv_3x3", "skip_connect"]
PAIR = {"edges": [{"op": OPS}, {"op": OPS}]}


@pytest.mark.parametrize(("nodes", "named", "says"), [
    ([{"edges": [{"op": "conv"}]}], "normal.nodes[0].edges[0].op", "no operation 'conv'"),
    ([{"edges": [{"op": ["skip_connect", "sep_conv_4x4"]}]}], "normal.nodes[0].edges[0].op", "'sep_conv_4x4'"),
    ([{"edges": [{"op": [1, 2]}]}], "normal.nodes[0].edges[0].op", "no operation"),
    ([{"edges": [{"input": 0}]}], "normal.nodes[0].edges[0].op", "required key is missing"),
    ([{"edges": [{"op": OPS, "input": 2}]}], "normal.nodes[0].edges[0].input", "states 0 to 1"),
    ([{"edges": [{"op": OPS, "input": [0, 3]}]}], "normal.nodes[0].edges[0].input", "states 0 to 1"),
    ([{"edges": [{"op": OPS, "input": -1}]}], "normal.nodes[0].edges[0].input", "whole numbers from 0"),
    ([{"edges": [{"op": OPS, "input": "0"}]}], "normal.nodes[0].edges[0].input", "a number or a variable"),
    ([{"edges": [{"op": OPS}] * 3}], "normal.nodes[0].edges[2].input", "states 0 to 1"),
    ([{**PAIR, "take": "0 2"}], "normal.nodes[0].take", "indices of edges in order, of 0 1, found '0 2'"),
    ([{**PAIR, "take": ["0 1", "1 0"]}], "normal.nodes[0].take", "found '1 0'"),
    ([{**PAIR, "take": ["0 1", ""]}], "normal.nodes[0].take", "found ''"),
    ([{**PAIR, "take": 1}], "normal.nodes[0].take", "found 1"),
    ([{**PAIR, "out": [0, 1]}], "normal.nodes", "the last node"),
    ([{**PAIR, "out": 2}], "normal.nodes[0].out", "expected 0 or 1"),
    ([PAIR, {**PAIR, "width": 3}], "normal.nodes[1].width", "unknown key"),
])  # fmt: skip
def test_a_space_that_is_none_for_it_is_answered_with_the_key(nodes, named, says):
    table = {"normal": {"nodes": nodes}, "reduce": {"nodes": [PAIR]}}
    with pytest.raises(UserError) as caught:
        Darts().build(SearchSpace.from_table(table))
    faults = [fault for fault in caught.value.faults if fault.dotted == named]
    assert faults, caught.value
    assert says in faults[0].message


@pytest.mark.parametrize(("table", "key"), [
    ({"channels": 0}, "channels"),
    ({"layers": 2}, "layers"),
    ({"drop_path": 1.5}, "drop_path"),
    ({"stem": "mnist"}, "stem"),
    ({"levels": [3, 1]}, "levels"),
    ({"levels": [0]}, "levels"),
    ({"levels": [1], "auxiliary": True}, "auxiliary"),
    ({"channels": 1, "stem": "imagenet"}, "channels"),
    ({"resize_mode": "area"}, "resize_mode"),
])  # fmt: skip
def test_wrong_options_are_named(table, key):
    with pytest.raises(UserError) as caught:
        structure(table, Darts)
    assert [fault.dotted for fault in caught.value.faults] == [key]


def test_a_node_may_take_any_number_of_edges_and_none_is_an_operation():
    cell = {"nodes": [{"edges": [{"op": [*OPS, "none"]}, {"op": OPS, "input": [0, 1]}], "take": ["0", "1", "0 1"]}]}
    space = SearchSpace.from_table({"normal": cell, "reduce": cell})
    model = network(Darts(channels=4, layers=3), space).eval()
    for take, op in (("0", "none"), ("0 1", "none"), ("1", "skip_connect")):
        cells = {"nodes": [{"take": take, "edges": [{"op": op}, {"input": 1}]}]}
        export_subnet(model, space.arch({"normal": cells, "reduce": cells}), torch.zeros(1, 3, 16, 16))
    with pytest.raises(UserError, match="1 edges: in a genotype a node has two"):
        Genotype.of_arch(space.arch({"normal": {"nodes": [{"take": "0"}]}}), space)


def test_the_pairs_of_the_space_are_all_pairs():
    for kind in ("normal", "reduce"):
        for node in (1, 2, 3):
            pairs = [f"{i} {j}" for i, j in combinations(range(node + 2), 2)]
            assert [*space_of("darts")[f"{kind}.nodes.{node}.take"].choices] == pairs


def test_the_readme_shows_a_spec_that_is_right(tmp_path):
    (fragment,) = spec_fragments(Path(__file__).parents[1] / "README.md")
    assert fragment["backbone"]["type"] == "darts"
    (tmp_path / "space").mkdir()
    (tmp_path / "space" / "darts-tiny.toml").write_text((SPACES / "darts-tiny.toml").read_text())
    text = (Path(__file__).parents[1] / "README.md").read_text().split("```toml\n")[1].split("```")[0]
    (tmp_path / "spec.toml").write_text(text)
    spec, _ = load_spec(tmp_path / "spec.toml", load_catalogue())
    assert spec.space.variables == space_of("darts-tiny").variables
    assert isinstance(spec.backbone, Darts)
