from pathlib import Path

import numpy as np
import pytest
import torch
from attrs import evolve, frozen
from torch import nn

from corenas.contracts import Algorithm, AlgorithmContext, DistillerContext, MutatorContext
from corenas.cost import Cost
from corenas.errors import UserError
from corenas.mutable import apply
from corenas.plugins import load_catalogue
from corenas.settings import Train
from corenas.testing.algorithms import algorithm_checks
from corenas.testing.components import spec_fragments
from corenas.testing.distributions import distribution_checks
from corenas.testing.small import Task, make_space, supernet
from corenas_algorithm_attentivenas import AttentiveNAS, corenas_algorithms

CATALOGUE = load_catalogue()
SPACE, CPU = make_space(), torch.device("cpu")


@frozen
class Sampled:
    """The attentive mutator over few bins, as a small space has them.

    rule: which candidates are trained
    """

    rule: str = "best-up"

    def start(self, context):
        options = {"type": "attentive", "bins": 4, "draws": 200, "rule": self.rule}
        return CATALOGUE.options("mutators", options).start(context)


def context(model, task, distiller="soft_cross_entropy"):
    live = CATALOGUE.options("distillers", distiller).start(DistillerContext(task, model, CPU))
    return AlgorithmContext(model, SPACE, Cost(model, SPACE, task.example), task, Train(), CPU, live)


class Own:
    """A step of somebody's own loop."""

    def __init__(self, archs):
        self.archs, self.losses = archs, []

    def backward(self, loss):
        loss.backward()
        self.losses.append(loss.detach())
        return loss.detach()


def setup(distiller="soft_cross_entropy", dropout=0.0):
    task = Task(dropout)
    model = supernet(SPACE, task).train()
    given = context(model, task, distiller)
    images, labels = task.data["train"]
    return model, task, AttentiveNAS().start(given), given, (images[:16], labels[:16])


def score_of(model, task, batch):
    @torch.no_grad()
    def score(archs):
        losses = []
        for arch in archs:
            with apply(model, arch):
                losses.append(float(task.loss(task.forward(model, batch), batch)))
        return losses

    return score


@pytest.mark.parametrize("rule", ["best-up", "worst-up"])
def test_the_subnet_that_is_trained_is_the_one_of_its_cost_that_the_rule_attends_to(rule):
    model, task, trainer, given, batch = setup()
    sampler = Sampled(rule).start(MutatorContext(SPACE, given.cost, np.random.default_rng(0)))
    score, asked = score_of(model, task, batch), []

    def noted(archs):
        asked.append((archs, score(archs)))
        return asked[-1][1]

    archs = sampler.sample(noted)
    assert (archs[0], archs[-1], len(archs)) == (SPACE.largest(), SPACE.smallest(), 4)
    for arch, (candidates, losses) in zip(archs[1:-1], asked, strict=True):
        assert arch == candidates[int(np.argmin(losses) if rule == "best-up" else np.argmax(losses))]
    step = Own(archs)
    figures = trainer.train_step(batch, step)
    assert (len(step.losses), figures.keys()) == (4, {"loss", "smallest"})


@pytest.mark.parametrize("distiller", ["soft_cross_entropy", "adaptive_alpha"])
def test_the_gradient_of_a_step_is_that_of_labels_and_of_the_distillers_losses(distiller):
    model, task, trainer, _, batch = setup(distiller)
    twin = supernet(SPACE, task).train()
    twin.load_state_dict(model.state_dict())  # its blocks may start as the identity
    archs = [SPACE.largest(), SPACE.sample(np.random.default_rng(3)), SPACE.smallest()]
    trainer.train_step(batch, Own(archs))
    with apply(twin, archs[0]):
        largest = twin(batch[0])
    loss = task.loss(largest, batch)
    for arch in archs[1:]:
        with apply(twin, arch):
            student = twin(batch[0])
        if distiller == "soft_cross_entropy":
            loss = loss - (largest.detach().softmax(1) * student.log_softmax(1)).sum(1).mean()
        else:
            q, p = student.softmax(1), largest.detach().softmax(1)
            kl, chi = (p * (p / q).log()).sum(1), ((q**2 / p).sum(1) - 1) / 2
            assert (q / p).max() < 5  # nothing is cut off
            loss = loss + torch.maximum(kl, chi).mean()
    loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_dropout_is_active_for_the_largest_alone():
    model, _, trainer, _, batch = setup(dropout=0.5)
    dropout, seen = next(m for m in model.modules() if isinstance(m, nn.Dropout)), []
    dropout.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    trainer.train_step(batch, Own([SPACE.largest(), SPACE.smallest(), SPACE.smallest()]))
    assert seen == [True, False, False]
    assert dropout.training


@pytest.mark.parametrize("zero_init", [True, False])
def test_blocks_are_asked_to_start_as_the_identity_where_the_options_say_so(zero_init):
    class Block(nn.Module):
        zeroed = False

        def zero_init_last(self):
            self.zeroed = True

        def forward(self, x):
            return x

    task = Task()
    model = nn.Sequential(supernet(SPACE, task), Block())
    AttentiveNAS(zero_init).start(context(model, task))
    assert model[1].zeroed == zero_init


def test_a_mutator_that_does_not_put_the_largest_first_is_refused():
    _, _, trainer, _, batch = setup()
    with pytest.raises(UserError, match="largest subnet first"):
        trainer.train_step(batch, Own([SPACE.smallest()]))


def test_there_is_no_training_without_a_distiller():
    task = Task()
    model = supernet(SPACE, task)
    with pytest.raises(UserError, match="needs a distiller"):
        AttentiveNAS().start(AlgorithmContext(model, SPACE, Cost(model, SPACE, task.example), task, Train(), CPU))


def test_pretrained_weights_are_not_set_to_zero():
    model, told = supernet(SPACE, Task()), []
    model.zero_init_last = lambda: told.append(1)
    for pretrained in (True, False):
        AttentiveNAS().start(evolve(context(model, Task()), pretrained=pretrained))
        assert len(told) == (not pretrained)


@pytest.mark.parametrize("check", algorithm_checks)
def test_conforms(check):
    check(AttentiveNAS(), mutator=Sampled())


@pytest.mark.parametrize("check", distribution_checks)
def test_the_distribution_conforms(check):
    check("corenas_algorithm_attentivenas")


def test_options_are_an_algorithm_under_its_name():
    assert corenas_algorithms() == {"attentivenas": AttentiveNAS}
    assert isinstance(AttentiveNAS(), Algorithm)
    assert AttentiveNAS.stages == ("train", "search")
    assert AttentiveNAS.defaults == {"distiller": "soft_cross_entropy"}


def test_the_readme_shows_a_spec_that_is_right():
    (spec,) = spec_fragments(Path(__file__).parents[1] / "README.md")
    kinds = ("algorithms", "mutators", "distillers")
    options = [CATALOGUE.options(kind, spec[kind.removesuffix("s")]) for kind in kinds]
    assert options[0] == AttentiveNAS()
    assert (options[1].width, options[1].candidates) == ("25M", 3)
