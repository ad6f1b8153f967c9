"""Batch-norm recalibration: against plain networks and statistics computed by hand, and without a trace."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from toys import Backbone, Task, make_space

from corenas.calibrate import Evaluation, evaluate, recalibrate, statistics_kept
from corenas.export import export_subnet
from corenas.mutable import apply, mutables
from corenas.settings import Calibration
from corenas.supernet import build_supernet

pytestmark = pytest.mark.filterwarnings("error")
SPACE = make_space()
TASK = Task()
CPU = torch.device("cpu")


@pytest.fixture
def supernet():
    torch.manual_seed(0)
    model = build_supernet(Backbone(), SPACE, TASK)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model


def norms(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def state(model):
    buffers = [buffer.clone() for buffer in model.buffers()]
    modes = [module.training for module in model.modules()]
    return buffers, modes, [norm.momentum for norm in norms(model)], [dict(m.elastic.choice) for m in mutables(model)]


def same(first, second):
    return all(map(torch.equal, first[0], second[0])) and first[1:] == second[1:]


def by_hand(plain, batches):
    """Per layer the sample-weighted mean of the batches' means and biased variances, all layers in training mode."""
    plain.train()
    sums = {}
    for images, labels in batches:
        n = len(labels)

        def note(module, args, n=n):
            x = args[0].double()
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
            old = sums.get(module, (0, 0.0, 0.0))
            sums[module] = old[0] + n, old[1] + n * mean, old[2] + n * var

        hooks = [norm.register_forward_pre_hook(note) for norm in norms(plain)]
        with torch.no_grad():
            plain(images)
        for hook in hooks:
            hook.remove()
    return [(mean / n, var / n) for n, mean, var in (sums[norm] for norm in norms(plain))]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("sizes", [(32, 32), (40, 7, 13)])
def test_statistics_are_those_of_the_plain_network(supernet, seed, sizes):
    arch = SPACE.sample(np.random.default_rng(seed))
    batches = [*zip(*(tensor[: sum(sizes)].split(sizes) for tensor in TASK.data["train"]), strict=True)]
    supernet.eval()
    plain = export_subnet(supernet, arch, TASK.example)
    wanted = by_hand(plain, batches)
    momenta = [norm.momentum for norm in norms(supernet)]
    with apply(supernet, arch):
        recalibrate(supernet, TASK, batches)
        found = export_subnet(supernet, arch, TASK.example)
    for norm, (mean, var) in zip(norms(found), wanted, strict=True):
        torch.testing.assert_close(norm.running_mean.double(), mean, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(norm.running_var.double(), var, atol=1e-5, rtol=1e-5)
    assert not any(module.training for module in supernet.modules())
    assert [norm.momentum for norm in norms(supernet)] == momenta
    assert not any(norm._forward_pre_hooks for norm in norms(supernet))


def test_without_batches_the_statistics_stay(supernet):
    before = state(supernet)
    recalibrate(supernet, TASK, [])
    assert all(map(torch.equal, state(supernet)[0], before[0]))


def test_momentum_none_is_kept(supernet):
    for norm in norms(supernet):
        norm.momentum = None
    recalibrate(supernet, TASK, [TASK.data["train"]])
    assert {norm.momentum for norm in norms(supernet)} == {None}


@pytest.mark.parametrize("training", [True, False])
def test_nothing_of_an_evaluation_stays_in_the_supernet(supernet, training):
    supernet.train(training)
    supernet.head.eval()
    before = state(supernet)
    evaluation = Evaluation(supernet, TASK, Calibration(batches=2, batch_size=20), CPU)
    evaluation(SPACE.smallest())
    assert same(state(supernet), before)
    with pytest.raises(RuntimeError), evaluation.calibrated(SPACE.default()) as model:  # noqa: PT012
        assert not model.training
        assert not same(state(supernet), before)
        raise RuntimeError
    assert same(state(supernet), before)

    class Broken(Task):
        def forward(self, model, batch):
            model(batch[0])
            raise RuntimeError

    evaluation = Evaluation(supernet, Broken(), Calibration(batches=2, batch_size=20), CPU)
    with pytest.raises(RuntimeError):
        evaluation(SPACE.smallest())
    assert same(state(supernet), before)
    assert all(p.grad is None for p in supernet.parameters())


def test_statistics_are_kept_whatever_happens(supernet):
    before = state(supernet)
    with pytest.raises(RuntimeError), statistics_kept(supernet):  # noqa: PT012
        supernet(TASK.data["train"][0])
        supernet.eval()
        raise RuntimeError
    assert same(state(supernet), before)


def test_an_archs_metrics_are_those_of_its_plain_network(supernet):
    arch = SPACE.sample(np.random.default_rng(3))
    evaluation = Evaluation(supernet, TASK, Calibration(batches=2, batch_size=30), CPU, seed=4)
    plain = export_subnet(supernet.eval(), arch, TASK.example)
    for norm, (mean, var) in zip(norms(plain), by_hand(copy.deepcopy(plain), evaluation.images), strict=True):
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)
    plain.eval()
    for split in ("valid", "test"):
        images, labels = TASK.data[split]
        wanted = 100 * float((plain(images).argmax(1) == labels).float().mean())
        assert evaluation(arch, split)["top1"] == pytest.approx(wanted)
        assert evaluate(plain, TASK, evaluation.split(split))["top1"] == pytest.approx(wanted)


def test_every_arch_sees_the_same_images_in_any_order(supernet):
    archs = [SPACE.sample(np.random.default_rng(i)) for i in range(5)]
    for pipeline, data in (("eval", "train"), ("train", "train"), ("eval", "valid")):
        calibration = Calibration(2, 20, data, pipeline)
        one = Evaluation(supernet, TASK, calibration, CPU, seed=1)
        two = Evaluation(supernet, TASK, calibration, CPU, seed=1, batch_size=7)
        forth = [one(arch) for arch in archs]
        assert [two(arch) for arch in archs[::-1]][::-1] == forth
        assert [len(batch[1]) for batch in one.images] == [20, 20]
    assert Evaluation(supernet, TASK, Calibration(batches=0), CPU).images == []


def test_a_share_is_one_of_images_and_no_calibration_ends_on_a_single_one(supernet):
    n = TASK.splits["valid"]
    whole = Evaluation(supernet, TASK, Calibration(), CPU, batch_size=20)
    assert [len(batch[1]) for batch in whole.split("valid", 0.25)] == [n // 4]
    assert sum(len(batch[1]) for batch in whole.split("valid")) == n
    for size in (n - 1, 1, n):
        lengths = [len(batch[1]) for batch in Evaluation(supernet, TASK, Calibration(n, size, "valid"), CPU).images]
        assert lengths == {n - 1: [n - 1], 1: [1] * n, n: [n]}[size]
