import copy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from corenas.contracts import Algorithm, AlgorithmContext, Metric
from corenas.cost import Cost
from corenas.mutable import apply, mutables
from corenas.optim import build_optimizer, build_schedule
from corenas.options import structure
from corenas.plugins import load_catalogue
from corenas.settings import Train
from corenas.space import SearchSpace
from corenas.testing.algorithms import algorithm_checks
from corenas.testing.components import spec_fragments
from corenas.testing.distributions import distribution_checks
from corenas.testing.small import Paths
from corenas.train import run_training
from corenas.variables import Categorical, Int
from corenas_algorithm_spos import SPOS, corenas_algorithms
from corenas_mutable_slices import ElasticDepth, LinearSlice, MixedOp

OPS = ("wide", "narrow", "skip")
SPACE = SearchSpace([Categorical("first", OPS), Categorical("second", OPS), Int("depth", 1, 2), Int("width", 4, 8, 4)])


class Data(torch.utils.data.Dataset):
    """48 points in three classes."""

    def __init__(self):
        self.x = torch.randn((48, 6), generator=torch.Generator().manual_seed(0))
        self.y = self.x[:, :3].argmax(1)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], self.y[i]


class Points:
    """A task with three classes."""

    example = torch.zeros(1, 6)
    metrics = {"top1": Metric("%")}  # noqa: RUF012
    splits = {"train": 48}  # noqa: RUF012

    def dataset(self, split, augmented):
        return Data()

    def forward(self, model, batch):
        return model(batch[0])

    def loss(self, outputs, batch):
        return F.cross_entropy(outputs, batch[1])

    def logits(self, outputs):
        return outputs


def choice(key):
    """Two operations with weights and one without; one with a batch norm."""
    wide = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6))
    narrow = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
    return MixedOp({"wide": wide, "narrow": narrow, "skip": nn.Identity()}, SPACE.value(key))


def network():
    torch.manual_seed(0)
    width = SPACE.value("width")
    return nn.Sequential(
        choice("first"), choice("second"), ElasticDepth([nn.Linear(6, 6), nn.Linear(6, 6)], SPACE.value("depth")),
        LinearSlice(6, width), LinearSlice(width, 3),
    )  # fmt: skip


class Own:
    """A step of somebody's own loop; it keeps the losses that it was given."""

    def __init__(self, *archs):
        self.archs = archs
        self.losses = []

    def backward(self, loss):
        self.losses.append(loss)
        loss.backward()
        return loss.detach()


def trainer(model):
    context = AlgorithmContext(model, SPACE, Cost(model, SPACE, Points.example), Points(), Train(), torch.device("cpu"))
    return SPOS().start(context)


def batch():
    return Data().x[:16], Data().y[:16]


def on_path(model, arch):
    """The names of the parameters that an arch uses, by hand."""
    idle = set()
    for place, key in enumerate(("first", "second")):
        idle |= {f"{place}.candidates.{op}." for op in OPS if op != arch[key]}
    if arch["depth"] == 1:
        idle.add("2.blocks.1.")
    return {name for name, _ in model.named_parameters() if not name.startswith(tuple(idle))}


def test_operations_that_are_not_on_the_path_have_no_gradient_at_all():
    for arch in SPACE:
        model = network()
        trainer(model).train_step(batch(), Own(arch))
        assert {name for name, p in model.named_parameters() if p.grad is not None} == on_path(model, arch)


def test_one_path_is_plain_training_of_that_subnet():
    model, twin = network(), network()
    arch = SPACE.arch({"first": "narrow", "second": "wide", "depth": 1, "width": 4})
    step = Own(arch)
    figures = trainer(model).train_step(batch(), step)
    with apply(twin, arch):
        loss = F.cross_entropy(twin(batch()[0]), batch()[1])
    loss.backward()
    assert len(step.losses) == 1
    assert torch.equal(figures["loss"], loss.detach())
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad)


def test_several_paths_give_the_average_of_their_losses_and_of_their_gradients():
    model = network().double()
    paths = [SPACE.arch({"first": op, "width": width}) for op, width in (("wide", 4), ("narrow", 8), ("wide", 8))]
    x, y = batch()
    step = Own(*paths)
    figures = trainer(model).train_step((x.double(), y), step)
    twin, losses = network().double(), []
    for arch in paths:
        with apply(twin, arch):
            losses.append(F.cross_entropy(twin(x.double()), y))
    torch.testing.assert_close(figures["loss"], torch.stack(losses).mean().detach())
    wanted = torch.autograd.grad(torch.stack(losses).mean(), [*twin.parameters()], allow_unused=True)
    for ours, theirs in zip(model.parameters(), wanted, strict=True):
        assert (ours.grad is None) == (theirs is None)
        if theirs is not None:
            torch.testing.assert_close(ours.grad, theirs)


def test_each_path_is_backpropagated_before_the_next_begins():
    model, order = network(), []
    spos = trainer(model)
    model.register_forward_pre_hook(lambda *_: order.append("forward"))
    step = Own(*SPACE.decode(SPACE.draw(np.random.default_rng(0), 3)))
    backward = step.backward
    step.backward = lambda loss: (order.append("backward"), backward(loss))[1]
    spos.train_step(batch(), step)
    assert order == ["forward", "backward"] * 3


def test_figures_are_detached_and_the_arch_before_is_in_force_again():
    model = network()
    before = [dict(m.elastic.choice) for m in mutables(model)]
    figures = trainer(model).train_step(batch(), Own(SPACE.smallest()))
    assert not figures["loss"].requires_grad
    assert [dict(m.elastic.choice) for m in mutables(model)] == before


class Listed:
    """A mutator that draws given archs, one a step."""

    def __init__(self, archs):
        self.archs = [*archs]

    def start(self, context):
        rest = iter(self.archs)
        return SimpleNamespace(sample=lambda score: [next(rest)])


@pytest.mark.parametrize("optimizer", [
    {"type": "SGD", "lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    {"type": "AdamW", "lr": 0.1, "weight_decay": 0.1},
], ids=lambda options: options["type"])  # fmt: skip
def test_neither_momentum_nor_weight_decay_moves_an_idle_operation(optimizer):
    archs = [SPACE.arch({"first": "wide"}), *[SPACE.arch({"first": "narrow", "second": "wide", "depth": 1})] * 5]
    settings = Train(epochs=2, batch_size=16, optimizer=optimizer)

    def trained(steps):
        """The supernet after some of the steps: what comes later is drawn as an arch that is not trained."""
        model = network()
        context = AlgorithmContext(
            model, SPACE, Cost(model, SPACE, Points.example), Points(), settings, torch.device("cpu")
        )
        spos, states = SPOS().start(context), []
        inner = spos.train_step

        def train_step(batch, step):
            states.append(copy.deepcopy(model.state_dict()))
            return inner(batch, step)

        spos.train_step = train_step
        run_training(spos, model, Points(), Listed(steps), context.cost, seed=0)
        return [*states, model.state_dict()]

    first, second, *later = trained(archs)
    for name in first:
        idle = name.startswith(("0.candidates.wide", "2.blocks.1"))
        moved = not torch.equal(first[name], second[name])
        if idle:
            assert moved, name  # it was on the first path, so that its momentum is not zero
            assert all(torch.equal(second[name], state[name]) for state in later), name
        if name.startswith("1.candidates.narrow"):  # never on a path: neither weights nor statistics
            assert all(torch.equal(first[name], state[name]) for state in later), name


def test_training_finds_the_classes():
    model = network()
    settings = Train(epochs=150, batch_size=16, optimizer={"type": "SGD", "lr": 0.1, "momentum": 0.9})
    context = AlgorithmContext(
        model, SPACE, Cost(model, SPACE, Points.example), Points(), settings, torch.device("cpu")
    )
    rng = np.random.default_rng(0)
    run_training(SPOS().start(context), model, Points(), Listed(SPACE.decode(SPACE.draw(rng, 450))), context.cost)
    x, y = Data().x, Data().y
    with apply(model.eval(), SPACE.largest()), torch.no_grad():
        assert float((model(x).argmax(1) == y).float().mean()) > 0.85


def test_there_is_one_phase_over_the_whole_space():
    (phase,) = trainer(network()).phases
    assert (phase.space, phase.train, phase.begin) == (SPACE, Train(), None)


@pytest.mark.parametrize("check", algorithm_checks)
@pytest.mark.parametrize("paths", [1, 3])
def test_conforms(paths, check):
    check(SPOS(), mutator=Paths(paths))


@pytest.mark.parametrize("check", distribution_checks)
def test_the_distribution_conforms(check):
    check("corenas_algorithm_spos")


def test_options_are_an_algorithm_under_its_name():
    assert corenas_algorithms() == {"spos": SPOS}
    assert isinstance(SPOS(), Algorithm)
    assert SPOS.stages == ("train", "search", "retrain")


def test_the_readme_shows_a_spec_that_is_right():
    (spec,) = spec_fragments(Path(__file__).parents[1] / "README.md")
    assert load_catalogue().options("algorithms", spec["algorithm"]) == SPOS()
    settings = structure(spec["train"], Train)
    optimizer = build_optimizer(nn.Linear(1, 1), settings.optimizer)
    schedule = build_schedule(optimizer, settings.schedule, settings.epochs, 2)
    rates = [schedule.lr_lambdas[0](step) for step in range(240)]
    assert rates == pytest.approx([1 - step / 240 for step in range(240)])  # decays linearly to 0, step by step
