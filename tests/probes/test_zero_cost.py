"""Zen-NAS: widths up to 2048, scores of networks with fresh weights, and no supernet ever allocated."""

import math
from typing import ClassVar

import torch
import toys
from attrs import frozen

from corenas.contracts import Metric
from corenas.mutable import apply
from corenas.run.prepare import prepare
from corenas.run.stages import run_spec
from corenas.store import Store

SPACE = {"width": {"type": "int", "low": 8, "high": 2048, "step": 8}, "op": ["conv", "skip"], "depth": [1, 2, 3],
         "block": {"kernel": [1, 3]}}  # fmt: skip


@frozen
class ZeroShot:
    """Searches by scores alone, then trains what was found."""

    stages: ClassVar = ("search", "retrain")
    needs: ClassVar = ("searcher",)

    def start(self, context):
        raise AssertionError("there is no supernet to train")


@frozen
class Score:
    """How much the output of a fresh network moves with its input (after arXiv:2102.01063)."""

    cheap: ClassVar = False

    def provides(self, task):
        return {"score": Metric("", "max")}

    def start(self, context):
        assert context.supernet is None
        assert context.evaluation is None

        @torch.no_grad()
        def measure(archs, fidelity):
            found = []
            for arch in archs:
                network = context.subnet(arch)
                assert sum(p.numel() for p in network.parameters()) >= context.cost.of([arch])[0]["params"]
                x = torch.randn(4, *context.task.example.shape[1:])
                with apply(network, arch):
                    change = network(x) - network(x + 0.01 * torch.randn(x.shape))
                found.append({"score": math.log(float(change.norm()) + 1e-9)})
            return found

        return measure


def test_a_search_and_a_training_allocate_one_subnet_at_a_time(tmp_path, monkeypatch):
    catalogue = toys.make_catalogue(algorithms=ZeroShot, evaluators=Score)
    search = {"trials": 10, "objectives": ["score"], "constraints": {"params": "30k"}}
    spec = toys.make_spec(tmp_path, catalogue, space=SPACE, mutator=None, search=search)
    prepared = prepare(spec)
    assert all(p.is_meta for p in prepared.supernet.parameters())
    assert sum(p.numel() for p in prepared.supernet.parameters()) > 100e6
    largest, make = [], torch.nn.init.kaiming_uniform_

    def watched(tensor, *args, **kwargs):
        if not tensor.is_meta:
            largest.append(tensor.numel())
        return make(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", watched)
    result = run_spec(spec, catalogue, tmp_path / "run", lambda event: None)
    assert max(largest) < 300_000  # the toy network makes all candidates, also those that do not run
    trials = Store(tmp_path / "run/run.sqlite", readonly=True).trials()
    assert len(trials) == 10
    assert all(trial.ok and trial.metrics["params"] <= 30_000 for trial in trials)
    assert result["best"]["metrics"]["score"] == max(trial.metrics["score"] for trial in trials)
    assert result["best"]["test"].keys() == {"top1"}
    assert not (tmp_path / "run/supernet.pt").exists()
