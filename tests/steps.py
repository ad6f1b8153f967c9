"""Trainings in double precision, in one process or under torchrun: FILE {"name": ["SPEC", "KEY=VALUE", …]}.

Each is twenty steps of a supernet, but "alone": one arch from scratch, as retraining and trials of their own do it.
"""

import json
import sys

import torch

from corenas import distributed, seeding
from corenas.plugins import load_catalogue
from corenas.run.alone import stand_alone
from corenas.run.prepare import prepare, start_trainer
from corenas.run.spec import load_spec
from corenas.train import run_training


def alone(settings, device):
    """The weights after an epoch of the smallest network, the same in all processes."""
    spec, _ = load_spec(settings[0], load_catalogue(), settings[1:])
    task = spec.task.start(seeding.generator(spec.seed, "task"))
    task.forward = lambda model, batch: model(batch[0].double())
    network = stand_alone(spec, task, spec.space.smallest(), device=device)
    return ended(network, [])


def twenty_steps(settings, device):
    """The archs of each step, and the weights in the end, the same in all processes."""
    spec, _ = load_spec(settings[0], load_catalogue(), settings[1:])
    prepared, archs = prepare(spec, device=device), []
    prepared.task.forward = lambda model, batch: model(batch[0].double())
    trainer = start_trainer(prepared)
    step = trainer.train_step
    trainer.train_step = lambda batch, lent: archs.append([dict(arch) for arch in lent.archs]) or step(batch, lent)
    run_training(trainer, prepared.supernet, prepared.task, spec.mutator, prepared.cost, device=device, limit=20)
    return ended(prepared.supernet, archs)


def ended(model, archs):
    """What a training ended with, if that is the same in all processes."""
    sums = [float(p.detach().sum()) for p in model.parameters()]
    both = distributed.all_gather((archs, sums))
    assert all(found == both[0] for found in both), "the processes have other archs or weights"
    return {"model": model.state_dict(), "archs": archs, "processes": len(both)}


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    with distributed.process_group(torch.device("cpu")) as device:
        trainings = json.loads(sys.argv[2]).items()
        ends = {name: (alone if name == "alone" else twenty_steps)(how, device) for name, how in trainings}
        if distributed.rank() == 0:
            torch.save(ends, sys.argv[1])
