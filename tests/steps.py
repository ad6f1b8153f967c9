"""Twenty steps of trainings in double precision, alone or under torchrun: FILE {"name": ["SPEC", "KEY=VALUE", …]}."""

import json
import sys

import torch

from corenas import distributed
from corenas.plugins import load_catalogue
from corenas.run.prepare import prepare, start_trainer
from corenas.run.spec import load_spec
from corenas.train import run_training


def twenty_steps(settings, device):
    """The archs of each step, and the weights in the end, the same in all processes."""
    spec, _ = load_spec(settings[0], load_catalogue(), settings[1:])
    prepared, archs = prepare(spec, device=device), []
    prepared.task.forward = lambda model, batch: model(batch[0].double())
    trainer = start_trainer(prepared)
    step = trainer.train_step
    trainer.train_step = lambda batch, lent: archs.append([dict(arch) for arch in lent.archs]) or step(batch, lent)
    run_training(trainer, prepared.supernet, prepared.task, spec.mutator, prepared.cost, device=device, limit=20)
    sums = [float(p.detach().sum()) for p in prepared.supernet.parameters()]
    both = distributed.all_gather((archs, sums))
    assert all(found == both[0] for found in both), "the processes have other archs or weights"
    return {"model": prepared.supernet.state_dict(), "archs": archs, "processes": len(both)}


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    with distributed.process_group(torch.device("cpu")) as device:
        ends = {name: twenty_steps(settings, device) for name, settings in json.loads(sys.argv[2]).items()}
        if distributed.rank() == 0:
            torch.save(ends, sys.argv[1])
