"""Two processes under torchrun give what one gives: weights, trials, the network in the end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from corenas.store import Store

ROOT = Path(__file__).parent.parent
SHORT = [f"--set={item}" for item in (
    "train.epochs=1", "train.batch_size=64", "train.optimizer.lr=0.02", "train.sync_norm=true", "search.trials=9",
    "search.batch=4", "searcher.population=4", "searcher.mutation=2", "searcher.crossover=1", "searcher.parents=2",
    "calibration.batches=1", "mutator.random=1", "task.data=digits", "task.valid=200", "task.test=200",
    "task.augment=[]", "task.dropout=0.0", "space.narrow.stages.*.depth=[1, 2]", 'export.formats=["safetensors"]',
)]  # fmt: skip


def corenas(processes, *arguments):
    launch = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    )
    command = [sys.executable, *launch, "-m", "corenas", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def furthest(one, two):
    """The largest difference between two state dicts, each tensor relative to its largest number."""
    assert one.keys() == two.keys()
    pairs = [(one[name].double(), two[name].double()) for name in one if one[name].is_floating_point()]
    return max(float((a - b).abs().max() / a.abs().max().clamp_min(1e-3)) for a, b in pairs)


@pytest.mark.parametrize("how", [["algorithm=spos", "mutator=uniform"], []], ids=["single-path", "sandwich"])
def test_two_processes_give_the_weights_and_the_trials_of_one(tmp_path, how):
    results = []
    for processes in (1, 2):
        settings = [*SHORT, *(f"--set={item}" for item in how)] if not how else [
            *(item for item in SHORT if "mutator" not in item), *(f"--set={item}" for item in how)]  # fmt: skip
        done = corenas(
            processes, "run", "spec/quickstart.toml", *settings, "--out", tmp_path / str(processes), "--json"
        )
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout))
    saved = [torch.load(tmp_path / name / "supernet.pt", weights_only=True) for name in ("1", "2")]
    assert saved[0]["index"] == saved[1]["index"] == 21
    assert furthest(saved[0]["model"], saved[1]["model"]) < 1e-5
    trials = [Store(tmp_path / name / "run.sqlite", readonly=True).trials() for name in ("1", "2")]
    first = [t.arch for t in trials[0]][:4]  # later ones hang on accuracies, which differ where a logit nearly ties
    assert [t.arch for t in trials[1]][:4] == first
    assert len(trials[1]) == 9
    assert [t.metrics["top1"] for t in trials[1]] == pytest.approx([t.metrics["top1"] for t in trials[0]], abs=1)
