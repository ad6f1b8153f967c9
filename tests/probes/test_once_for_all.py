"""Once-for-All: phases with spaces and rates of their own, a teacher from the first, channels sorted between."""

import copy

import pytest
import torch
import torch.nn.functional as F
import toys
from torch import nn

from corenas.contracts import AlgorithmContext, Phase
from corenas.cost import Cost
from corenas.mutable import Elastic, apply
from corenas.settings import Train
from corenas.space import SearchSpace
from corenas.supernet import Supernet, observe
from corenas.train import run_training

TABLE = {"resolution": [4, 6, 8], "width": [4, 6, 8], "depth": [1, 2], "block": {"kernel": [1, 3]}, "op": "skip"}


class Resize(nn.Module):
    resizes = ("resolution",)

    def __init__(self, resolution):
        super().__init__()
        self.elastic = Elastic({"resolution": resolution})

    def forward(self, x):
        return F.interpolate(x, (self.elastic.choice["resolution"],) * 2)


class Body(nn.Module):
    def __init__(self, tree):
        super().__init__()
        self.resize, self.wide = Resize(tree["resolution"]), toys.Conv(1, tree["width"], 3)
        blocks = [toys.Block(tree["width"], block["kernel"], True) for block in tree["blocks"]]
        self.stage = toys.Depth(blocks, tree["depth"])
        self.segments, self.feat_dims = [self.wide, self.stage], [self.wide.elastic.values["outputs"]]

    def features(self, x):
        return [self.stage(self.wide(self.resize(x)))]


@torch.no_grad()
def sort(model, order):
    """Put the channels into another order everywhere; the largest subnet computes the same as before."""
    for tensor in [*model.parameters(), *model.buffers()]:
        for axis in range(min(tensor.dim(), 2)):
            if tensor.shape[axis] == len(order):
                tensor.copy_(tensor.index_select(axis, order))


class OneSize:  # several subnets a step, one resolution for all of them
    def start(self, context):
        self.context = context
        return self

    def sample(self, score):
        codes = self.context.space.draw(self.context.rng, 2)
        codes[:, self.context.space.keys.index("resolution")] = codes[0, self.context.space.keys.index("resolution")]
        return self.context.space.decode(codes)


class Features:
    taps = (-1,)

    def loss(self, student, teacher):
        (mine,), (theirs,) = student.features, teacher.features
        return F.mse_loss(mine.mean((1, 2, 3)), theirs.mean((1, 2, 3))) + F.cross_entropy(
            student.logits, teacher.logits.softmax(1)
        )


class OnceForAll:  # arXiv:1908.09791
    def __init__(self, context):
        self.model, self.task, self.distiller, whole = context.supernet, context.task, context.distiller, context.space
        full = whole.narrow({"width": [8], "depth": [2], "blocks.*.kernel": [3]})
        rate = {"type": "SGD", "momentum": 0.9}
        self.phases = [
            Phase(full, Train(epochs=2, batch_size=16, ema=0.9, optimizer={**rate, "lr": 0.1})),
            Phase(
                whole.narrow({"width": [8]}), Train(epochs=1, batch_size=16, optimizer={**rate, "lr": 0.02}), self.begin
            ),
            Phase(whole, Train(epochs=2, batch_size=32, ema=0.9, optimizer={**rate, "lr": 0.01}), self.begin),
        ]
        self.teacher, self.seen = None, []

    def begin(self):
        if self.teacher is None:
            self.teacher = copy.deepcopy(self.model).requires_grad_(False)
        sort(self.model, self.model.backbone.wide.weight.flatten(1).norm(dim=1).argsort(descending=True))

    def train_step(self, batch, step):
        self.seen.append((step.lr, tuple(step.archs)))
        losses, taps = [], self.distiller.taps
        for arch in step.archs:
            with apply(self.model, arch):
                student = observe(self.model, self.task, batch, taps)
                loss = self.task.loss(student.outputs, batch)
                if self.teacher is not None:
                    full = {**self.phases[0].space.largest(), "resolution": arch["resolution"]}
                    with torch.no_grad(), apply(self.teacher, full):
                        teacher = observe(self.teacher, self.task, batch, taps)
                    loss = loss + self.distiller.loss(student, teacher)
                losses.append(step.backward(loss))
        return {"loss": torch.stack(losses).mean()}

    def state_dict(self):
        return {"teacher": self.teacher and self.teacher.state_dict()}

    def load_state_dict(self, state):
        if state["teacher"] is not None:
            self.teacher = copy.deepcopy(self.model).requires_grad_(False)
            self.teacher.load_state_dict(state["teacher"])


def start():
    torch.manual_seed(0)
    space, task = SearchSpace.from_table(TABLE), toys.Task(train=64)
    body = Body(space.tree)
    model = Supernet(body, task.head(body.feat_dims))
    cost = Cost(model, space, task.example)
    return OnceForAll(AlgorithmContext(model, space, cost, task, Train(), torch.device("cpu"), Features())), cost


def test_sorting_channels_leaves_the_largest_subnet_as_it_is():
    trainer, _ = start()
    images = trainer.task.data["valid"][0]
    before = trainer.model.eval()(images)
    trainer.begin()
    torch.testing.assert_close(trainer.model(images), before)


@pytest.mark.parametrize("epochs", [1, 3, 4])
def test_a_training_killed_in_any_phase_ends_with_the_same_weights(tmp_path, epochs):
    (whole, cost), (killed, _), (resumed, _) = start(), start(), start()
    average = run_training(whole, whole.model, whole.task, OneSize(), cost)
    path = {"checkpoint": tmp_path / "c.pt"}
    with pytest.raises(KeyboardInterrupt):
        run_training(killed, killed.model, killed.task, OneSize(), cost, **path, emit=toys.killer(points=epochs))
    again = run_training(resumed, resumed.model, resumed.task, OneSize(), cost, **path)
    assert toys.same(again.state_dict(), average.state_dict())
    assert toys.same(resumed.model.state_dict(), whole.model.state_dict())
    assert toys.same(resumed.state_dict(), whole.state_dict())


def test_each_phase_has_its_space_its_rate_and_one_resolution_a_batch():
    trainer, cost = start()
    run_training(trainer, trainer.model, trainer.task, OneSize(), cost)
    parts = [trainer.seen[:8], trainer.seen[8:12], trainer.seen[12:]]
    assert [part[0][0] for part in parts] == [0.1, 0.02, 0.01]
    for phase, part in zip(trainer.phases, parts, strict=True):
        assert len(part) == phase.train.epochs * 64 // phase.train.batch_size
        assert all(arch in phase.space for _, archs in part for arch in archs)
        assert all(len({arch["resolution"] for arch in archs}) == 1 for _, archs in part)
    assert len({arch for _, archs in parts[2] for arch in archs}) > 5
