"""DARTS: architecture weights with an optimizer of their own, through a virtual update of the network's weights."""

import numpy as np
import pytest
import torch
import toys
from torch import nn
from torch.func import functional_call

from corenas.contracts import AlgorithmContext, Phase
from corenas.cost import Cost
from corenas.mutable import apply
from corenas.settings import Train
from corenas.supernet import build_supernet
from corenas.train import LoopStep, run_training


class SecondOrder:
    def __init__(self, context):
        self.model, self.task, self.space = context.supernet, context.task, context.space
        self.alpha = nn.Parameter(1e-3 * torch.randn(3, device=context.device))
        self.adam = torch.optim.Adam([self.alpha], lr=3e-2, betas=(0.5, 0.999), weight_decay=1e-3)
        self.phases = [Phase(context.space, context.train)]

    def loss(self, weights, batch):
        with apply(self.model, {**self.space.largest(), "op": self.alpha.softmax(0)}) as model:
            outputs = functional_call(model, weights, (batch[0],))
        return self.task.loss(outputs, batch)

    def valid_loss(self, batch, valid, step):  # eq. 6 of arXiv:1806.09055, the virtual step with momentum and decay
        weights = dict(self.model.named_parameters())
        gradients = torch.autograd.grad(self.loss(weights, batch), [*weights.values()], create_graph=True)
        group, state = step.optimizer.param_groups[0], step.optimizer.state
        moved = {
            name: w
            - step.lr * (g + group["weight_decay"] * w + group["momentum"] * state[w].get("momentum_buffer", 0.0))
            for (name, w), g in zip(weights.items(), gradients, strict=True)
        }
        return self.loss(moved, valid)

    def train_step(self, batch, step):
        (self.alpha.grad,) = step.mean(
            torch.autograd.grad(self.valid_loss(batch, step.more("valid"), step), [self.alpha])
        )
        self.adam.step()
        return {"loss": step.backward(self.loss(dict(self.model.named_parameters()), batch))}

    def derive(self):
        return self.space.arch({"op": ["conv", "pool", "skip"][int(self.alpha.argmax())]})

    def state_dict(self):
        return {"alpha": self.alpha.data, "adam": self.adam.state_dict()}

    def load_state_dict(self, state):
        self.alpha.data.copy_(state["alpha"])
        self.adam.load_state_dict(state["adam"])


def start(epochs=3):
    torch.manual_seed(0)
    space, task = toys.make_space(width=8, depth=1, block={"kernel": 3}), toys.Task(train=32, valid=32)
    model = build_supernet(toys.Backbone(norm=False), space, task)
    settings = Train(epochs=epochs, batch_size=16, optimizer={"type": "SGD", "lr": 0.05, "momentum": 0.9})
    cost = Cost(model, space, task.example)
    return SecondOrder(AlgorithmContext(model, space, cost, task, settings, torch.device("cpu")))


def test_the_gradient_is_that_of_finite_differences():
    trainer = start()
    trainer.model.double()
    trainer.alpha.data = trainer.alpha.data.double()
    batches = [(x[:16].double(), y[:16]) for x, y in (trainer.task.data["train"], trainer.task.data["valid"])]
    optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.5, momentum=0.9)
    step = LoopStep([], optimizer, 0, rng=np.random.default_rng(0))
    (gradient,) = torch.autograd.grad(trainer.valid_loss(*batches, step), [trainer.alpha])
    for i, nudge in enumerate(1e-6 * torch.eye(3, dtype=torch.float64)):
        trainer.alpha.data += nudge
        more = float(trainer.valid_loss(*batches, step).detach())
        trainer.alpha.data -= 2 * nudge
        assert float(gradient[i]) == pytest.approx(
            (more - float(trainer.valid_loss(*batches, step).detach())) / 2e-6, rel=1e-4
        )
        trainer.alpha.data += nudge


def test_it_trains_without_a_mutator_resumes_exactly_and_derives(tmp_path):
    whole, killed, resumed = start(), start(), start()
    run_training(whole, whole.model, whole.task, None, None)
    with pytest.raises(KeyboardInterrupt):
        run_training(
            killed, killed.model, killed.task, None, None, checkpoint=tmp_path / "c.pt", emit=toys.killer(points=2)
        )
    run_training(resumed, resumed.model, resumed.task, None, None, checkpoint=tmp_path / "c.pt")
    assert torch.equal(whole.alpha, resumed.alpha)
    assert whole.alpha.abs().max() > 0.01
    assert whole.derive() in whole.space
