"""Cream: a board of archs in the checkpoint, a meta network with a second-order gradient, a teacher for each batch."""

import pytest
import torch
import torch.nn.functional as F
import toys
from torch import nn
from torch.func import functional_call

from corenas.contracts import AlgorithmContext, Phase
from corenas.cost import Cost
from corenas.mutable import apply
from corenas.settings import Train
from corenas.supernet import build_supernet
from corenas.train import run_training


class Cream:  # arXiv:2010.15821
    def __init__(self, context):
        self.model, self.task, self.space, self.cost = context.supernet, context.task, context.space, context.cost
        self.phases, self.board, self.taught = [Phase(context.space, context.train)], [], 0
        self.meta = nn.Linear(3, 1).to(context.device)
        self.sgd = torch.optim.SGD(self.meta.parameters(), lr=0.1, momentum=0.9)

    def outputs(self, arch, images, weights=None):
        with apply(self.model, arch) as model:
            return model(images) if weights is None else functional_call(model, weights, (images,))

    def match(self, student, entry):  # how well a teacher suits a student, from their answers to the teacher's images
        return torch.sigmoid(self.meta(student[:4].softmax(1) - entry["answers"])).mean()

    def train_step(self, batch, step):
        (arch,), (images, labels) = step.archs, batch
        student = self.outputs(arch, images)
        teacher = max(self.board, key=lambda entry: self.match(student, entry).item(), default=None)
        loss = self.task.loss(student, batch)
        if teacher is not None:
            with torch.no_grad():
                soft = self.outputs(teacher["arch"], images).softmax(1)
                weight = self.match(student, teacher)
            loss = weight * F.cross_entropy(student, soft) + (1 - weight) * loss
            self.taught += 1
            if step.index % 3 == 0:
                self.teach_meta(arch, batch, step.more("train"), teacher, step)
        top1 = float((student.argmax(1) == labels).float().mean())
        entry = {"arch": arch, "top1": top1, "flops": self.cost.of([arch])[0]["flops"],
                 "answers": student[:4].detach().softmax(1)}  # fmt: skip
        self.board = sorted([*self.board, entry], key=lambda e: (-e["top1"], e["flops"]))[:4]
        return {"loss": step.backward(loss), "top1": torch.tensor(top1)}

    def teach_meta(self, arch, batch, then, teacher, step):
        weights = {name: p for name, p in self.model.named_parameters() if not name.startswith("meta")}
        student = self.outputs(arch, batch[0], weights)
        with torch.no_grad():
            soft = self.outputs(teacher["arch"], batch[0]).softmax(1)
        distilled = self.match(student, teacher) * F.cross_entropy(student, soft)
        found = torch.autograd.grad(distilled, [*weights.values()], create_graph=True, allow_unused=True)
        moved = {n: w if g is None else w - step.lr * g for (n, w), g in zip(weights.items(), found, strict=True)}
        loss = self.task.loss(self.outputs(arch, then[0], moved), then)
        gradients = step.mean(torch.autograd.grad(loss, [*self.meta.parameters()]))
        for parameter, gradient in zip(self.meta.parameters(), gradients, strict=True):
            parameter.grad = gradient
        self.sgd.step()

    def derive(self):
        return self.board[0]["arch"]

    def state_dict(self):
        board = [{**entry, "arch": dict(entry["arch"])} for entry in self.board]
        return {"board": board, "taught": self.taught, "meta": self.meta.state_dict(), "sgd": self.sgd.state_dict()}

    def load_state_dict(self, state):
        self.board = [{**entry, "arch": self.space.arch(entry["arch"])} for entry in state["board"]]
        self.taught = state["taught"]
        self.meta.load_state_dict(state["meta"])
        self.sgd.load_state_dict(state["sgd"])


def start():
    torch.manual_seed(0)
    space, task = toys.make_space(), toys.Task()
    model = build_supernet(toys.Backbone(), space, task)
    settings = Train(epochs=4, batch_size=16, optimizer={"type": "SGD", "lr": 0.05})
    return Cream(AlgorithmContext(model, space, Cost(model, space, task.example), task, settings, torch.device("cpu")))


def test_the_meta_network_learns_and_a_killed_training_ends_with_the_same_board(tmp_path):
    whole, killed, resumed = start(), start(), start()
    before = [p.detach().clone() for p in whole.meta.parameters()]
    run_training(whole, whole.model, whole.task, toys.Mutator(), whole.cost)
    assert any(not torch.equal(a, b) for a, b in zip(before, whole.meta.parameters(), strict=True))
    path = {"checkpoint": tmp_path / "c.pt"}
    with pytest.raises(KeyboardInterrupt):
        run_training(killed, killed.model, killed.task, toys.Mutator(), killed.cost, **path, emit=toys.killer(points=2))
    run_training(resumed, resumed.model, resumed.task, toys.Mutator(), resumed.cost, **path)
    assert toys.same(resumed.state_dict(), whole.state_dict())
    assert toys.same(resumed.model.state_dict(), whole.model.state_dict())
    assert resumed.taught > 15
    assert resumed.derive() in resumed.space
