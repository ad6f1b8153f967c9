"""Batch norm: statistics kept apart for each width, and training that sees the images of all processes."""

import copy
import itertools
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from corenas.calibrate import recalibrate, statistics_kept
from corenas.cost import Cost
from corenas.export import export_subnet
from corenas.mutable import apply
from corenas.space import SearchSpace
from corenas.testing.small import same
from corenas.variables import Categorical, Variable
from corenas_mutable_slices import BatchNorm2dSlice, Conv2dSlice, ConvNormAct, LinearSlice, per_width_statistics
from corenas_mutable_slices.exchange import load

IN, OUT = Variable("i", (2, 4, 6)), Variable("o", (4, 6, 8))
ARCHS = [{"i": i, "o": o} for i, o in itertools.product((2, 4, 6), (4, 6, 8))]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def places(dimension, arch):
    """Where the active features stand, written down without the code under test."""
    starts = itertools.accumulate((part.largest for part in dimension.parts), initial=0)
    return [start + i for start, n in zip(starts, dimension(arch), strict=False) for i in range(n)]


@pytest.mark.parametrize("features", [OUT, [OUT, 3, IN]], ids=["one part", "several parts"])
@pytest.mark.parametrize("switch", [OUT, IN, OUT + IN], ids=["o", "i", "o + i"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_each_number_of_the_switch_has_the_statistics_of_a_norm_of_its_own(features, switch, momentum):
    layer = BatchNorm2dSlice(features, momentum=momentum, switch=switch)
    alone = {n: BatchNorm2dSlice(features, momentum=momentum) for n in switch.possible}
    for arch in (ARCHS[i] for i in (8, 0, 3, 7, 0, 5, 8, 2)):
        x = torch.randn(3, sum(layer.elastic.values["outputs"](arch)), 4, 4) * arch["o"] + arch["i"]
        with apply(layer, arch), apply(alone[switch(arch)], arch):
            assert_close(layer(x), alone[switch(arch)](x))
    for arch in ARCHS:
        norm, at = alone[switch(arch)], places(layer.elastic.values["outputs"], arch)
        with apply(layer, arch):
            assert_close(layer.running_mean, norm.running_mean)
            assert_close(layer.running_var, norm.running_var)
            exported = layer.export()
        assert_close(exported.running_mean, norm.running_mean[at])
        assert_close(exported.running_var, norm.running_var[at])
        assert exported.num_batches_tracked == norm.num_batches_tracked


def model(width=OUT):
    return nn.Sequential(
        ConvNormAct(3, width, 3, act="relu6"),
        ConvNormAct(width, 5, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        LinearSlice(5, 4),
    )


SPACE = SearchSpace([Categorical("o", (4, 6, 8))])


class Task:
    forward = staticmethod(lambda model, batch: model(batch))


def batches(seed):
    return torch.randn(4, 6, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_each_width_of_a_model_keeps_the_statistics_it_was_recalibrated_with():
    switched = model()
    per_width_statistics(switched, OUT)
    shared = copy.deepcopy(switched.state_dict())
    plain = {}
    for arch in SPACE:
        with apply(switched, arch):
            recalibrate(switched, Task, batches(arch["o"]))
        plain[arch] = model()
        plain[arch].load_state_dict(
            {n: shared[n][0] if "running" in n or "tracked" in n else shared[n] for n in shared}
        )
        with apply(plain[arch], arch):
            recalibrate(plain[arch], Task, batches(arch["o"]))
    x = batches(0)[0]
    with statistics_kept(switched):
        recalibrate(switched, Task, batches(1))
    for arch in SPACE:
        with apply(switched, arch), apply(plain[arch], arch):
            assert_close(switched(x), plain[arch](x))
        assert_close(export_subnet(switched, arch, x)(x), export_subnet(plain[arch], arch, x)(x))


def test_statistics_that_an_arch_does_not_have_stay():
    norm = BatchNorm2dSlice([OUT, 3, OUT])
    before = copy.deepcopy(norm.state_dict())
    with apply(norm, {"o": 4}):
        recalibrate(norm, Task, torch.randn(2, 6, 11, 2, 2))
    idle = [4, 5, 6, 7, 15, 16, 17, 18]
    for name in ("running_mean", "running_var"):
        changed = [i for i in range(19) if norm.state_dict()[name][i] != before[name][i]]
        assert changed == [i for i in range(19) if i not in idle]


class Dense(nn.Module):
    """Each norm sees what all layers before it gave: features of up to four parts."""

    def __init__(self):
        super().__init__()
        parts = [OUT]
        self.stem, self.norms, self.convs = Conv2dSlice(3, OUT, 3), nn.ModuleList(), nn.ModuleList()
        for _ in range(3):
            self.norms.append(BatchNorm2dSlice([*parts]))
            self.convs.append(Conv2dSlice([*parts], IN, 3))
            parts.append(IN)

    def forward(self, x):
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, conv(norm(x).relu())], 1)
        return x


def test_a_densely_connected_network_recalibrates_as_its_export_does():
    net = Dense().eval()
    for arch in ARCHS:
        plain = export_subnet(net, arch, batches(0)[0])
        recalibrate(plain, Task, batches(1))
        with apply(net, arch), statistics_kept(net), torch.no_grad():
            recalibrate(net, Task, batches(1))
            assert_close(net(batches(0)[0]), plain(batches(0)[0]), atol=1e-6, rtol=1e-6)


def test_a_model_keeps_statistics_apart_where_widths_are_searched_or_everywhere():
    own, everywhere = model(), model()
    per_width_statistics(own)
    per_width_statistics(everywhere, OUT)
    shapes = [[norm._buffers["running_mean"].shape for norm in (net[0].norm, net[1].norm)] for net in (own, everywhere)]
    assert shapes == [[(3, 8), (5,)], [(3, 8), (3, 5)]]
    fixed = model(8)
    per_width_statistics(fixed)
    assert {*map(str, fixed.state_dict())} == {*map(str, model().state_dict())}
    assert fixed[0].norm.running_mean.shape == (8,)


def test_statistics_kept_apart_cost_nothing():
    costs = []
    for net in (model(), model()):
        per_width_statistics(net) if costs else None
        costs.append(Cost(net, SPACE, torch.zeros(1, 3, 8, 8)).of([*SPACE]))
    assert costs[0] == costs[1]


def test_statistics_are_kept_apart_from_those_learnt_so_far():
    norm = BatchNorm2dSlice(OUT)
    norm(torch.randn(4, 8, 3, 3) * 3 + 1)
    learnt = copy.deepcopy(norm.state_dict())
    norm.keep_apart(OUT)
    for arch in ARCHS:
        with apply(norm, arch):
            assert_close(norm.running_var, learnt["running_var"])
            assert norm.num_batches_tracked == 1


def test_a_published_network_loads_into_the_statistics_of_its_arch_alone():
    net, other = model().eval(), model().eval()
    per_width_statistics(net, OUT)
    with apply(other, {"o": 6}):
        recalibrate(other, Task, batches(2))
    plain = export_subnet(other, {"o": 6}, batches(0)[0])
    before = copy.deepcopy(net.state_dict())
    load(net, {"o": 6}, plain.state_dict())
    with apply(net, {"o": 6}):
        assert_close(net(batches(0)[0]), plain(batches(0)[0]))
    for name, tensor in net.state_dict().items():
        if "running" in name or "tracked" in name:
            assert same(tensor[[0, 2]], before[name][[0, 2]])


TWO = """
import sys, torch
from corenas import distributed
from corenas.mutable import apply
from corenas.variables import Variable
from corenas_mutable_slices import BatchNorm2dSlice

OUT, IN = Variable("o", (4, 6, 8)), Variable("i", (2, 4, 6))
cases = torch.load(sys.argv[1])
with distributed.process_group(torch.device("cpu")):
    found, rank = [], distributed.rank()
    for features, switch, state, x, weights in cases:
        slices = BatchNorm2dSlice([OUT, 3, IN] if features else OUT, switch=OUT if switch else None)
        layer = (torch.nn.BatchNorm1d(6) if features is None else slices).double()
        layer.load_state_dict(state)
        x, weights = ((t[:3], t[3:])[rank] for t in (x, weights))
        x = x.clone().requires_grad_()
        with apply(layer, {"o": 6, "i": 4}), distributed.synchronised_norms():
            y = layer(x)
        (y * weights).sum().backward()
        found.append((y.detach(), x.grad, layer.weight.grad, layer.bias.grad, layer.state_dict()))
    torch.save(found, f"{sys.argv[1]}.{rank}")
"""


def test_a_synchronised_norm_is_that_of_all_images_whatever_its_parts_and_statistics(tmp_path):
    layers = {(several, switch): BatchNorm2dSlice([OUT, 3, IN] if several else OUT, switch=OUT if switch else None)
              for several, switch in itertools.product((False, True), repeat=2)}  # fmt: skip
    layers[None, False] = nn.BatchNorm1d(6)  # torch's own, of other axes
    cases = []
    for (several, switch), layer in layers.items():
        layer.double()
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
        axes = () if several is None else (3, 3)
        images = torch.randn(2, 8, 13 if several else 6, *axes, dtype=torch.float64)
        cases.append((several, switch, layer.state_dict(), *images))
    torch.save(cases, tmp_path / "cases")
    (tmp_path / "two.py").write_text(TWO)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, tmp_path / "two.py", tmp_path / "cases"], check=True, timeout=120, env=environment)
    ranks = [torch.load(tmp_path / f"cases.{rank}") for rank in (0, 1)]
    for layer, (*_, x, weights), first, second in zip(layers.values(), cases, *ranks, strict=True):
        x.requires_grad_()
        with apply(layer, {"o": 6, "i": 4}):
            y = layer(x)
        (y * weights).sum().backward()
        assert_close(torch.cat([first[0], second[0]]), y.detach())
        assert_close(torch.cat([first[1], second[1]]), x.grad)
        assert_close(first[2] + second[2], layer.weight.grad)
        assert_close(first[3] + second[3], layer.bias.grad)
        for name, tensor in layer.state_dict().items():
            assert_close(first[4][name], tensor)
            assert_close(second[4][name], tensor)
