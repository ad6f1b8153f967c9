"""Eighteen steps of Cream in double precision, alone or under torchrun: processes.py DIR, for the end of each."""

import sys

import torch

from corenas import distributed, seeding
from corenas.contracts import AlgorithmContext
from corenas.cost import Cost
from corenas.settings import Train
from corenas.testing.small import Backbone, Paths, Task, make_space, supernet
from corenas.train import run_training
from corenas_algorithm_cream import Cream


def train(device):
    """Train once."""
    # Without batch norm, whose statistics are those of each process.
    space, task = make_space(), Task()
    model = supernet(space, task, Backbone(norm=False))
    cost = Cost(model, space, task.example)
    settings = Train(epochs=3, batch_size=16, optimizer={"type": "SGD", "lr": 0.1, "momentum": 0.9})
    context = AlgorithmContext(model, space, cost, task, settings, device)
    with seeding.seeded(0, "algorithm"):
        trainer = Cream(warmup=1, board=4, meta_every=2, meta_lr=0.1).start(context)
    run_training(trainer, model, task, Paths(1), cost, seed=1, device=device)
    return {"trainer": trainer.state_dict(), "model": model.state_dict()}


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    with distributed.process_group(torch.device("cpu")) as device:
        torch.save(train(device), f"{sys.argv[1]}/{distributed.world()}-{distributed.rank()}.pt")
