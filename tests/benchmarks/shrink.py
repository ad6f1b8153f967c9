"""What making a trained network smaller is worth: spec/shrink.toml beside its alternatives; run by hand.

For each seed the original is trained as spec/shrink-original.toml says, spec/shrink.toml makes networks of 50% and
of 30% of its flops of it, and spec/shrink-tune.toml tunes them. Beside them, on the same data: the network of the
same arch trained alone from scratch, for as many epochs as the supernet was trained and it was tuned, and for those
of the original as well; and torch-pruning's, pruned to the same flops by the same measure and tuned on the
original's answers, for as many forward passes.

    OMP_NUM_THREADS=1 uv run python tests/benchmarks/shrink.py [--data digits] [--seeds 3] [--epochs 8 4 4] [--trials N]
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import nn
from torch.utils.data import DataLoader

from corenas.calibrate import evaluate
from corenas.cli import main as corenas
from corenas.loading import Batches
from corenas.run.prepare import prepare
from corenas.run.spec import open_spec
from corenas_mutable_conversion.models import build_model, load_weights

ROOT = Path(__file__).parents[2]
IMAGES = {"mnist5k": (28, 500, 1000), "digits": (8, 300, 400)}


def run(spec: Path, folder: Path, **settings: Any) -> dict[str, Any]:
    """The result of a run."""
    printed = io.StringIO()
    sets = [f"--set={key}={value}" for key, value in settings.items()]
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        assert corenas(["run", str(spec), "--out", str(folder), "--json", *sets]) == 0
    return json.loads(printed.getvalue())


def pruned(model: nn.Module, example: torch.Tensor, share: float) -> nn.Module:
    """The model pruned by torch-pruning to a share of its flops."""
    low, high, found = 0.0, 0.95, model
    most, _ = tp.utils.count_ops_and_params(model, example)
    for _ in range(10):
        middle = (low + high) / 2
        twin = copy.deepcopy(model)
        measure = tp.importance.GroupMagnitudeImportance(p=1)
        tp.pruner.BasePruner(twin, example, measure, pruning_ratio=middle, ignored_layers=[twin.fc]).step()
        flops, _ = tp.utils.count_ops_and_params(twin, example)
        if flops > share * most:
            low = middle
        else:
            high, found = middle, twin
    return found


def tuned(model: nn.Module, teacher: nn.Module, task: Any, epochs: int, seed: int) -> nn.Module:
    """The model trained on the teacher's answers."""
    order = torch.Generator().manual_seed(seed)
    batches = DataLoader(task.dataset("train", True), 64, shuffle=True, drop_last=True, generator=order)
    steps = epochs * len(batches)
    optimizer = torch.optim.SGD(model.parameters(), 0.02, 0.9, weight_decay=1e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        model.train()
        for images, _ in batches:
            with torch.no_grad():
                soft = teacher(images).softmax(1)
            optimizer.zero_grad()
            F.cross_entropy(model(images), soft).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def measured(folder: Path, data: str, seed: int, epochs: Sequence[int], trials: int, sizes: int) -> None:
    """Print the rows of a seed."""
    side, valid, test = IMAGES[data]
    own: dict[str, Any] = {"seed": seed, "task.data": data, "task.valid": valid, "task.test": test}
    own |= {"backbone.image": [3, side, side], "export.formats": '["safetensors"]'}
    before = run(ROOT / "spec/shrink-original.toml", folder / "original", **own, **{"train.epochs": epochs[0]})
    row(seed, "original", 1.0, before["table"][0]["test"]["top1"])
    most = before["table"][0]["metrics"]["flops"]
    shrink = {"train.epochs": epochs[1], "search.trials": trials, "backbone.weights": folder / "original"}
    after = run(ROOT / "spec/shrink.toml", folder / "smaller", **own, **shrink)
    spec, *_ = open_spec(folder / "original/spec.toml")
    task = prepare(spec).task
    teacher = build_model("torchvision:resnet18", {"num_classes": 10}).eval()
    load_weights(teacher, folder / "original")
    for share, found in [*zip((0.5, 0.3), after["table"], strict=True)][:sizes]:
        row(seed, f"shrunk to {share:.0%}", found["metrics"]["flops"] / most, found["test"]["top1"])
        best = folder / "smaller" / found["folder"]
        tune = {"backbone.weights": folder / "smaller"}
        fixed = {**own, "space.fix": best / "arch.toml"}
        result = run(
            ROOT / "spec/shrink-tune.toml", folder / f"{share}", **fixed, **tune, **{"train.epochs": epochs[2]}
        )
        row(seed, "  and tuned", result["table"][0]["metrics"]["flops"] / most, _top1(result))
        for n in (epochs[1] + epochs[2], sum(epochs)):
            result = run(ROOT / "spec/shrink-original.toml", folder / f"{share}-{n}", **fixed, **{"train.epochs": n})
            row(seed, f"  alone, {n} epochs", result["table"][0]["metrics"]["flops"] / most, _top1(result))
        example = torch.randn(1, 3, side, side)
        network = pruned(teacher, example, share)
        flops = tp.utils.count_ops_and_params(network, example)[0] / tp.utils.count_ops_and_params(teacher, example)[0]
        network = tuned(network, teacher, task, 4 * epochs[1] + epochs[2], seed)  # the sandwich has four paths
        top1 = evaluate(network, _Plain(task), Batches(task, "test", 250, torch.device("cpu"), False, seed))["top1"]
        row(seed, "  torch-pruning, tuned", flops, top1)


class _Plain:
    """A task of networks without a backbone."""

    def __init__(self, task: Any) -> None:
        self.forward, self.meter = task.forward, task.meter


def _top1(result: dict[str, Any]) -> float:
    return result["table"][0]["test"]["top1"]


def row(seed: int, what: str, share: float, top1: float) -> None:
    """Print a row."""
    print(f"| {seed} | {what} | {share:.1%} | {top1:.1f} |", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=IMAGES, default="digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, nargs=3, default=(8, 4, 4), help="of original, supernet and tuning")
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--sizes", type=int, default=2, help="how many of the two sizes are looked at")
    options = parser.parse_args()
    print("| seed | network | flops | top-1 on test, % |\n| --- | --- | --- | --- |")
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            measured(Path(folder), options.data, seed, options.epochs, options.trials, options.sizes)


if __name__ == "__main__":
    main()
