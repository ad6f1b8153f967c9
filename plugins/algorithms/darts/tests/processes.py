"""Twelve steps of DARTS in double precision, of order 1 and then 2, alone or under torchrun: processes.py FILE."""

import sys

import torch

from corenas import distributed, seeding
from corenas.contracts import AlgorithmContext
from corenas.cost import Cost
from corenas.settings import Train
from corenas.testing.small import Backbone, Task, make_space, same, supernet
from corenas.train import run_training
from corenas_algorithm_darts import DARTS


def train(order, device):
    """Train once; return its end, which has to be that of all processes."""
    # Without batch norm, whose statistics are those of each process.
    space, task = make_space(), Task(train=64, valid=64)
    model = supernet(space, task, Backbone(norm=False))
    cost = Cost(model, space, task.example)
    optimizer = {"type": "SGD", "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}
    settings = Train(epochs=3, batch_size=16, optimizer=optimizer)
    with seeding.seeded(0, "algorithm"):
        trainer = DARTS(order=order, lr=0.01).start(AlgorithmContext(model, space, cost, task, settings, device))
    run_training(trainer, model, task, None, None, device=device)
    state = {"trainer": trainer.state_dict(), "model": model.state_dict()}
    states = distributed.all_gather(state)
    assert all(same(other, states[0]) for other in states), "the processes have other architecture weights"
    return {**state, "processes": len(states)}


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    with distributed.process_group(torch.device("cpu")) as device:
        ends = {order: train(order, device) for order in (1, 2)}
        if distributed.rank() == 0:
            torch.save(ends, sys.argv[1])
