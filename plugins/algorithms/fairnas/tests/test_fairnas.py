from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attrs import frozen
from torch import nn

from corenas.contracts import Algorithm, AlgorithmContext, MutatorContext
from corenas.cost import Cost
from corenas.errors import UserError
from corenas.mutable import apply
from corenas.plugins import load_catalogue
from corenas.settings import Train
from corenas.space import SearchSpace
from corenas.testing.algorithms import algorithm_checks
from corenas.testing.components import spec_fragments
from corenas.testing.distributions import distribution_checks
from corenas.testing.small import make_space
from corenas.train import run_training
from corenas.variables import Categorical
from corenas_algorithm_fairnas import FairNAS, corenas_algorithms
from corenas_mutable_slices import MixedOp

OPS = ("a", "b", "c")
SPACE = SearchSpace([Categorical(f"layer.{i}", OPS) for i in range(4)])
CATALOGUE = load_catalogue()


class Points:
    """A task with three classes."""

    example = torch.zeros(1, 6)
    metrics: dict = {}  # noqa: RUF012
    splits = {"train": 48}  # noqa: RUF012

    def __init__(self):
        self.x = torch.randn((48, 6), generator=torch.Generator().manual_seed(0))
        self.y = self.x[:, :3].argmax(1)

    def dataset(self, split, augmented):
        return torch.utils.data.TensorDataset(self.x, self.y)

    def forward(self, model, batch):
        return model(batch[0])

    def loss(self, outputs, batch):
        return F.cross_entropy(outputs, batch[1])

    def logits(self, outputs):
        return outputs


def network():
    torch.manual_seed(0)
    layers = [
        MixedOp({op: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh()) for op in OPS}, SPACE.value(key))
        for key in SPACE.keys
    ]
    return nn.Sequential(*layers, nn.Linear(6, 3))


class Own:
    """A step of somebody's own loop."""

    def __init__(self, archs):
        self.archs = archs
        self.calls = 0

    def backward(self, loss):
        self.calls += 1
        loss.backward()
        return loss.detach()


def started(model, settings=None):
    context = AlgorithmContext(
        model, SPACE, Cost(model, SPACE, Points.example), Points(), settings or Train(), torch.device("cpu")
    )
    return FairNAS().start(context)


def fair(seed=0, space=SPACE, **options):
    mutator = CATALOGUE.options("mutators", {"type": "fair", **options})
    return mutator.start(MutatorContext(space, None, np.random.default_rng(seed)))


def batch():
    task = Points()
    return task.x[:16], task.y[:16]


def test_activation_counts_of_all_choices_are_equal_after_every_step():
    model, counts = network(), Counter()
    trainer, sampler = started(model), fair()
    for layer, key in zip(model, SPACE.keys, strict=False):
        for op, candidate in layer.candidates.items():
            candidate.register_forward_hook(lambda *_, name=(key, op): counts.update([name]))
    for steps in range(1, 21):
        trainer.train_step(batch(), Own(sampler.sample(None)))
        assert {*counts.values()} == {steps}
        assert len(counts) == 4 * 3


def test_the_gradient_of_a_step_is_the_sum_of_those_of_its_paths_on_one_batch():
    model, twin = network().double(), network().double()
    x, y = batch()
    archs = fair().sample(None)
    step = Own(archs)
    figures = started(model).train_step((x.double(), y), step)
    losses = []
    for arch in archs:
        with apply(twin, arch):
            losses.append(F.cross_entropy(twin(x.double()), y))
    assert step.calls == 3
    torch.testing.assert_close(figures["loss"], torch.stack(losses).mean().detach())
    wanted = torch.autograd.grad(sum(losses), [*twin.parameters()])
    for ours, theirs in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(ours.grad, theirs)


def test_one_update_moves_every_choice_once():
    model, moved = network(), Counter()
    trainer = started(model, Train(epochs=2, batch_size=16, optimizer={"type": "SGD", "lr": 0.1}))
    inner, before = trainer.train_step, {}

    def train_step(batch, step):
        for name, weight in model.named_parameters():
            moved[name] += name in before and not torch.equal(before[name], weight)
            before[name] = weight.detach().clone()
        return inner(batch, step)

    trainer.train_step = train_step
    run_training(trainer, model, Points(), CATALOGUE.options("mutators", "fair"), Cost(model, SPACE, Points.example))
    # A bias in front of a batch norm moves by rounding alone.
    assert {moved[name] for name in moved if name.endswith("0.weight")} == {5}


@pytest.mark.parametrize("archs", [
    SPACE.decode(np.array([[0, 0, 0, 0]])),
    SPACE.decode(np.array([[0, 0, 0, 0], [1, 1, 1, 1]])),
    SPACE.decode(np.array([[0, 0, 0, 0], [1, 1, 1, 1], [2, 2, 2, 1]])),
], ids=["one", "two", "uneven"])  # fmt: skip
def test_paths_that_favour_a_choice_are_refused(archs):
    model = network()
    with pytest.raises(UserError, match="use all choices equally often: those of layer") as caught:
        started(model).train_step(batch(), Own(archs))
    assert caught.value.faults[0].dotted == "mutator.type"
    assert all(p.grad is None for p in model.parameters())


def test_a_choice_that_the_step_shares_is_allowed():
    archs = fair(shared=["layer.2"]).sample(None)
    assert len({arch["layer.2"] for arch in archs}) == 1
    assert "loss" in started(network()).train_step(batch(), Own(archs))


@frozen
class Dealt:
    """Strictly fair paths."""

    def start(self, context):
        return CATALOGUE.options("mutators", "fair").start(context)


@pytest.mark.parametrize("check", algorithm_checks)
def test_conforms(check):
    check(FairNAS(), mutator=Dealt())


@pytest.mark.parametrize("check", distribution_checks)
def test_the_distribution_conforms(check):
    check("corenas_algorithm_fairnas")


def test_fewer_choices_than_paths_are_fair_enough():
    space = make_space()
    for step in range(20):
        codes = space.encode(fair(step, space).sample(None))
        assert all(len({*column}) == len(v.choices) for v, column in zip(space.variables, codes.T, strict=True)
                   if not v.when)  # fmt: skip


def test_options_are_an_algorithm_under_its_name():
    assert corenas_algorithms() == {"fairnas": FairNAS}
    assert isinstance(FairNAS(), Algorithm)
    assert FairNAS.stages == ("train", "search", "retrain")


def test_the_readme_shows_a_spec_that_is_right():
    (spec,) = spec_fragments(Path(__file__).parents[1] / "README.md")
    assert CATALOGUE.options("algorithms", spec["algorithm"]) == FairNAS()
