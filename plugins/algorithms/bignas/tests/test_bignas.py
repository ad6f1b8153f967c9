from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from corenas.contracts import Algorithm, AlgorithmContext, DistillerContext, Metric
from corenas.cost import Cost
from corenas.errors import UserError
from corenas.mutable import apply
from corenas.options import structure
from corenas.plugins import load_catalogue
from corenas.settings import Train
from corenas.space import SearchSpace
from corenas.testing.algorithms import algorithm_checks
from corenas.testing.components import spec_fragments
from corenas.testing.distributions import distribution_checks
from corenas.train import run_training
from corenas.variables import Int
from corenas_algorithm_bignas import BigNAS, corenas_algorithms
from corenas_mutable_slices import BatchNorm2dSlice, Conv2dSlice, ElasticDepth, LinearSlice

CATALOGUE = load_catalogue()
SPACE = SearchSpace([Int("width", 4, 8, 2), Int("depth", 1, 3), Int("kernel", 1, 3, 2)])


class Data(torch.utils.data.Dataset):
    """48 small images in three classes."""

    def __init__(self):
        self.x = torch.randn((48, 3, 5, 5), generator=torch.Generator().manual_seed(0))
        self.y = self.x.mean((2, 3)).argmax(1)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], self.y[i]


class Images:
    """A task with three classes."""

    example = torch.zeros(1, 3, 5, 5)
    metrics = {"top1": Metric("%")}  # noqa: RUF012
    splits = {"train": 48}  # noqa: RUF012

    def dataset(self, split, augmented):
        return Data()

    def forward(self, model, batch):
        return model(batch[0])

    def loss(self, outputs, batch):
        return F.cross_entropy(outputs, batch[1], label_smoothing=0.1)

    def logits(self, outputs):
        return outputs


class Block(nn.Module):
    """Convolution and batch norm, with or without a shortcut; as the blocks of a backbone, it can start as nothing."""

    def __init__(self, inputs, width, kernel, residual):
        super().__init__()
        self.conv, self.norm, self.residual = Conv2dSlice(inputs, width, kernel), BatchNorm2dSlice(width), residual

    def forward(self, x):
        y = self.norm(self.conv(x))
        return x + y if self.residual else y.relu()

    def zero_init_last(self):
        if self.residual:
            nn.init.zeros_(self.norm.weight)


class Recorder(nn.Module):
    """Hands its input on and notes, in training, which dropout beside it is active."""

    def __init__(self, dropout):
        super().__init__()
        self.dropout, self.seen = dropout, []

    def forward(self, x):
        self.seen.append((self.training, self.dropout.training))
        return x


class Network(nn.Module):
    def __init__(self, dropout=0.5):
        super().__init__()
        width, kernel = SPACE.value("width"), SPACE.value("kernel")
        self.stem = Block(3, width, kernel, residual=False)
        self.stage = ElasticDepth([Block(width, width, kernel, True) for _ in range(3)], SPACE.value("depth"))
        self.drop = nn.Dropout(dropout)
        self.recorder = Recorder(self.drop)
        self.head = LinearSlice(width, 3)

    def forward(self, x):
        return self.head(self.recorder(self.drop(self.stage(self.stem(x)).mean((2, 3)))))


def network(dropout=0.5):
    torch.manual_seed(0)
    return Network(dropout).double()


class Own:
    """A step of somebody's own loop."""

    def __init__(self, archs):
        self.archs = archs
        self.losses = []

    def backward(self, loss):
        self.losses.append(loss.detach())
        loss.backward()
        return loss.detach()


def distiller(model, name="soft_cross_entropy"):
    return CATALOGUE.options("distillers", name).start(DistillerContext(Images(), model, torch.device("cpu")))


def started(model, task=None, pretrained=False, **options):
    context = AlgorithmContext(
        model,
        SPACE,
        Cost(model, SPACE, Images.example.double()),
        task or Images(),
        Train(epochs=1, batch_size=16),
        torch.device("cpu"),
        distiller(model),
        pretrained=pretrained,
    )
    return BigNAS(**options).start(context)


def batch():
    return Data().x[:16].double(), Data().y[:16]


def sandwich(seed=0):
    return [SPACE.largest(), *SPACE.decode(SPACE.draw(np.random.default_rng(seed), 2)), SPACE.smallest()]


def test_the_gradient_of_a_step_is_that_of_the_losses_written_out_by_hand():
    model, twin = network(dropout=0.3), network(dropout=0.3)
    trainer = started(model, zero_init=False)
    (x, y), archs = batch(), sandwich()
    step = Own(archs)
    torch.manual_seed(7)
    figures = trainer.train_step((x, y), step)

    torch.manual_seed(7)  # the same channels are dropped
    with apply(twin, archs[0]):
        logits = twin(x)
    smooth = 0.9 * F.one_hot(y, 3).double() + 0.1 / 3
    losses = [-(smooth * logits.log_softmax(1)).sum(1).mean()]
    probabilities = (logits.exp() / logits.exp().sum(1, keepdim=True)).detach()
    twin.drop.p = 0.0
    for arch in archs[1:]:
        with apply(twin, arch):
            losses.append(-(probabilities * twin(x).log_softmax(1)).sum(1).mean())
    torch.testing.assert_close(torch.stack(step.losses), torch.stack(losses).detach(), rtol=1e-12, atol=1e-12)
    wanted = torch.autograd.grad(sum(losses), [*twin.parameters()])
    for (name, ours), theirs in zip(model.named_parameters(), wanted, strict=True):
        torch.testing.assert_close(ours.grad, theirs, rtol=1e-9, atol=1e-11, msg=name)
    assert torch.equal(figures["loss"], step.losses[0])
    assert torch.equal(figures["smallest"], step.losses[-1])


def test_no_gradient_flows_from_the_others_into_the_teacher():
    model, alone = network(dropout=0.0), network(dropout=0.0)
    small = SPACE.smallest()
    started(model, zero_init=False).train_step(batch(), Own([SPACE.largest(), small, small]))
    with apply(alone, SPACE.largest()):
        Images().loss(alone(batch()[0]), batch()).backward()
    # The other blocks are the largest subnet's alone: they learn what they would learn without the others.
    for ours, theirs in zip(model.stage.blocks[1:].parameters(), alone.stage.blocks[1:].parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    assert alone.stage.blocks[1].norm.weight.grad.any()


def test_each_path_is_backpropagated_before_the_next_begins():
    model, order = network(), []
    trainer = started(model)
    model.register_forward_pre_hook(lambda *_: order.append("forward"))
    step = Own(sandwich())
    backward = step.backward
    step.backward = lambda loss: (order.append("backward"), backward(loss))[1]
    figures = trainer.train_step(batch(), step)
    assert order == ["forward", "backward"] * 4
    assert not any(figure.requires_grad for figure in figures.values())


def test_dropout_is_active_for_the_largest_alone():
    model = network()
    trainer = started(model)
    model.recorder.seen.clear()
    trainer.train_step(batch(), Own(sandwich()))
    assert model.recorder.seen == [(True, True), (True, False), (True, False), (True, False)]
    assert model.drop.training


def test_residual_blocks_start_as_the_identity_and_others_do_not():
    model = network()
    started(model)
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    for block in model.stage.blocks:
        assert torch.equal(block(x), x)
        assert not block.norm.weight.any()
    assert torch.equal(model.stem.norm.weight, torch.ones(8, dtype=torch.float64))


def test_blocks_start_as_they_were_built_where_the_options_say_so():
    model, twin = network(), network()
    started(model, zero_init=False)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    started(model, pretrained=True)  # weights of a file
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


@pytest.mark.parametrize("archs", [[SPACE.smallest()], [SPACE.smallest(), SPACE.largest()], []])
def test_a_mutator_that_does_not_put_the_largest_first_is_refused(archs):
    model = network()
    with pytest.raises(UserError, match="largest subnet first") as caught:
        started(model).train_step(batch(), Own(archs))
    assert caught.value.faults[0].dotted == "mutator.type"
    assert "sandwich" in caught.value.faults[0].hint
    assert all(p.grad is None for p in model.parameters())


def test_a_task_without_logits_is_refused():
    task = Images()
    task.logits = lambda outputs: None
    model = network()
    with pytest.raises(UserError, match="distilled") as caught:
        started(model, task).train_step(batch(), Own(sandwich()))
    assert caught.value.faults[0].dotted == "distiller.type"


def test_the_largest_alone_is_trained_on_the_labels():
    model = network()
    step = Own([SPACE.largest()])
    assert started(model).train_step(batch(), step).keys() == {"loss"}
    assert len(step.losses) == 1


def test_training_improves_the_smallest_which_never_sees_a_label():
    model = network(dropout=0.1).float()
    settings = Train(epochs=40, batch_size=16, optimizer={"type": "SGD", "lr": 0.05, "momentum": 0.9})
    context = AlgorithmContext(
        model, SPACE, Cost(model, SPACE, Images.example), Images(), settings, torch.device("cpu"), distiller(model)
    )
    seeds = iter(range(1000))
    mutator = SimpleNamespace(start=lambda _: SimpleNamespace(sample=lambda score: sandwich(next(seeds))))
    run_training(BigNAS().start(context), model, Images(), mutator, context.cost)
    with apply(model, SPACE.smallest()), torch.no_grad():  # statistics of the batch: these are not recalibrated
        accuracy = float((model.train()(Data().x).argmax(1) == Data().y).float().mean())
    assert accuracy > 0.7


def test_a_choice_that_the_whole_step_shares_is_none_that_the_largest_lacks():
    fixed = SPACE.fix({"width": 6})
    step = Own([SPACE.arch(fixed.largest()), SPACE.arch(fixed.sample(np.random.default_rng(0))), fixed.smallest()])
    assert started(network()).train_step(batch(), step).keys() == {"loss", "smallest"}
    step = Own([SPACE.arch(fixed.largest()), SPACE.smallest()])
    with pytest.raises(UserError, match="largest subnet first"):
        started(network()).train_step(batch(), step)


def test_the_loss_of_the_others_is_the_distillers():
    losses = {}
    for name in ("soft_cross_entropy", "kl", "adaptive_alpha"):
        model = network(dropout=0.0)
        trainer = started(model)
        trainer.distiller = distiller(model, name)
        step = Own(sandwich())
        trainer.train_step(batch(), step)
        losses[name] = step.losses
    assert len({float(step[0]) for step in losses.values()}) == 1
    assert len({float(step[1]) for step in losses.values()}) == 3


def test_there_is_no_training_without_a_distiller():
    model = network()
    context = AlgorithmContext(
        model, SPACE, Cost(model, SPACE, Images.example.double()), Images(), Train(), torch.device("cpu")
    )
    with pytest.raises(UserError, match="needs a distiller"):
        BigNAS().start(context)
    assert BigNAS.defaults == {"distiller": "soft_cross_entropy"}


def test_there_is_one_phase_over_the_whole_space():
    (phase,) = started(network()).phases
    assert (phase.space, phase.begin) == (SPACE, None)


@pytest.mark.parametrize("check", algorithm_checks)
def test_conforms(check):
    check(BigNAS())


@pytest.mark.parametrize("check", distribution_checks)
def test_the_distribution_conforms(check):
    check("corenas_algorithm_bignas")


def test_options_are_an_algorithm_under_its_name():
    assert corenas_algorithms() == {"bignas": BigNAS}
    assert isinstance(BigNAS(), Algorithm)
    assert BigNAS.stages == ("train", "search")


def test_wrong_options_are_named():
    with pytest.raises(UserError) as caught:
        structure({"zero_init": 1, "teacher": "max"}, BigNAS)
    assert {fault.dotted for fault in caught.value.faults} == {"zero_init", "teacher"}


def test_the_readme_shows_a_spec_that_is_right():
    (spec,) = spec_fragments(Path(__file__).parents[1] / "README.md")
    assert CATALOGUE.options("algorithms", spec["algorithm"]) == BigNAS()
    assert structure(spec["train"], Train).schedule.floor == 0.05
