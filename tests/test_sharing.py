"""Archs that begin alike: what leading segments gave serves for all of them, to the last bit, and no longer than it is
true."""

import numpy as np
import pytest
import torch
from test_calibrate import CPU, SPACE, TASK, same, state, supernet  # noqa: F401 - a fixture
from torch import nn
from toys import Block, Conv

from corenas.calibrate import Evaluation
from corenas.settings import Calibration

ARCHS = [SPACE.sample(np.random.default_rng(i)) for i in range(12)]


class Loss:
    """A meter that tells apart what differs in one bit."""

    def __init__(self):
        self.seen = []

    def update(self, outputs, batch):
        self.seen += outputs.flatten().tolist()

    def compute(self):
        return {f"{i}": x for i, x in enumerate(self.seen)}


class Exact:
    def __init__(self, splits=TASK.splits):
        self.splits, self.dataset = splits, TASK.dataset
        self.example = TASK.example

    def forward(self, model, batch):
        return model(batch[0])

    def meter(self):
        return Loss()


def evaluation(model, shared, **options):
    return Evaluation(
        model, Exact(), Calibration(**{"batches": 2, "batch_size": 20} | options), CPU, 1, 20, shared=shared
    )


@pytest.fixture
def runs(monkeypatch):
    """How often a block ran."""
    count = []
    forward = Block.forward
    monkeypatch.setattr(Block, "forward", lambda *args: count.append(1) or forward(*args))
    return count


@pytest.mark.parametrize("batches", [0, 2])
def test_figures_are_those_of_archs_by_themselves_however_little_is_kept(supernet, batches, runs):  # noqa: F811
    wanted = [*map(evaluation(supernet, 0, batches=batches), ARCHS)]
    assert len({*map(str, wanted)}) == len({*ARCHS}) > 6
    alone = len(runs)
    for shared in (1 << 30, 200_000, 40_000, 100):
        before, ran = state(supernet), len(runs)
        one = evaluation(supernet, shared, batches=batches)
        for archs in (ARCHS, ARCHS[::-1]):
            assert [one(arch) for arch in archs] == (wanted if archs is ARCHS else wanted[::-1])
        assert same(state(supernet), before)
        assert not any(m.__dict__.keys() & {"forward"} or m._forward_hooks for m in supernet.modules())
        leading = next(iter(one._leading.values()))
        assert leading._size == sum(kept.size for kept in leading._kept.values()) <= shared
        if shared == 1 << 30:
            assert len(runs) - ran < alone  # twice the archs in less than once the blocks
        if shared == 100:
            assert len(runs) - ran == 2 * alone


def test_shares_and_splits_are_kept_apart(supernet):  # noqa: F811
    one, alone = evaluation(supernet, 1 << 30), evaluation(supernet, 0)
    for how in (("valid", 1.0), ("valid", 0.5), ("test", 1.0), ("valid", 1.0)):
        assert [one(arch, *how) for arch in ARCHS[:3]] == [alone(arch, *how) for arch in ARCHS[:3]]


@pytest.mark.parametrize("name", ["weight", "running_mean", "data"])
def test_what_was_kept_is_forgotten_when_the_supernet_changes(supernet, name):  # noqa: F811
    one, alone = (evaluation(supernet, shared, batches=0) for shared in (1 << 30, 0))
    before = one(ARCHS[0])
    with torch.no_grad():
        norm = supernet.backbone.stage.blocks[0].norm
        tensor = supernet.backbone.stem.weight.data if name == "data" else getattr(norm, name)
        tensor.copy_(tensor.flip(0))  # neither sums nor, for .data, versions would tell
    assert one(ARCHS[0]) == alone(ARCHS[0]) != before


def test_an_output_that_a_later_layer_changes_in_place_is_not_used_again(supernet):  # noqa: F811
    class Rude(nn.Module):
        def forward(self, x):
            return x.mul_(2)

    supernet.backbone.stage.blocks[1] = nn.Sequential(Rude(), supernet.backbone.stage.blocks[1])
    one, alone = evaluation(supernet, 1 << 30), evaluation(supernet, 0)
    assert [*map(one, ARCHS)] == [*map(alone, ARCHS)]


def test_a_failure_leaves_nothing_behind(supernet, monkeypatch):  # noqa: F811
    one, alone = evaluation(supernet, 1 << 30), evaluation(supernet, 0)
    one(ARCHS[0])
    before, wanted = state(supernet), alone(ARCHS[1])
    with monkeypatch.context() as patch:
        patch.setattr(type(supernet.head), "forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            one(ARCHS[1])
    assert same(state(supernet), before)
    assert one(ARCHS[1]) == wanted


def test_a_network_without_segments_or_with_a_common_module_or_watched_shares_nothing(supernet):  # noqa: F811
    calls = []
    hook = supernet.backbone.stem.register_forward_hook(lambda *_: calls.append(1))
    one = evaluation(supernet, 1 << 30)
    one(ARCHS[0]), one(ARCHS[0])
    assert len(calls) == 2 * (2 + len(one.split("valid")))
    hook.remove()
    supernet.backbone.segments[0] = nn.Sequential(supernet.backbone.stage.blocks[0].conv)
    assert isinstance(supernet.backbone.segments[0][0], Conv)
    assert evaluation(supernet, 1 << 30)._leading_segments() is None
    del supernet.backbone.segments
    assert evaluation(supernet, 1 << 30)._leading_segments() is None
