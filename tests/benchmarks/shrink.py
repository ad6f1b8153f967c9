"""What making a trained network smaller is worth: spec/shrink.toml beside its alternatives; run by hand.

For each seed the original is trained as spec/shrink-original.toml says, and spec/shrink.toml makes networks of 50% and
of 30% of its flops of it. Beside them, on the same data: the network of the same arch trained alone from scratch, for
as many steps as the supernet and its tuning have, and for as many forward passes (a step of the sandwich has several);
and torch-pruning's, pruned to the same flops by the same measure and tuned on the original's answers, for as many too.

    OMP_NUM_THREADS=1 uv run python tests/benchmarks/shrink.py [--data mnist5k] [--seeds 0 1 2] [--epochs 12 2 2]
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import statistics
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
ORIGINAL = ROOT / "spec/shrink-original.toml"
Rows = dict[str, tuple[float, float]]
IMAGES = {"mnist5k": (28, 500, 2500), "digits": (8, 300, 400)}
"""Of each data set the side of its images, and how many are for validation and for test."""


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


def measured(folder: Path, data: str, seed: int, epochs: Sequence[int], trials: int, sizes: int) -> Rows:
    """The rows of a seed: network -> share of the flops and top-1, printed as they come."""
    side, valid, test = IMAGES[data]
    own: dict[str, Any] = {"seed": seed, "task.data": data, "task.valid": valid, "task.test": test}
    own["backbone.image"] = [3, side, side]
    rows: Rows = {}

    def row(what: str, flops: float, top1: float) -> None:
        rows[what] = flops, top1
        print(f"| {seed} | {what} | {flops:.1%} | {top1:.1f} |", flush=True)

    before = run(ORIGINAL, folder / "original", **own, **{"train.epochs": epochs[0], "export.formats": '["pt2"]'})
    most = before["table"][0]["metrics"]["flops"]
    row("original", 1.0, _top1(before["table"][0]))
    own["export.formats"] = '["safetensors"]'
    shrink = {"train.epochs": epochs[1], "retrain.train.epochs": epochs[2], "search.trials": trials}
    shrink |= {"backbone.weights": folder / "original", "retrain.teacher.from": folder / "original"}
    after = run(ROOT / "spec/shrink.toml", folder / "smaller", **own, **shrink)
    spec, *_ = open_spec(folder / "smaller/spec.toml")
    paths = spec.mutator.paths  # type: ignore[union-attr]
    lengths = {"steps": epochs[1] + epochs[2], "passes": paths * epochs[1] + epochs[2]}
    task = prepare(spec, weights=False).task
    teacher = build_model("torchvision:resnet18", {"num_classes": 10}).eval()
    load_weights(teacher, folder / "original")
    example = torch.randn(1, 3, side, side)
    for share, found in [*zip(("50%", "30%"), after["table"], strict=True)][:sizes]:
        flops = found["metrics"]["flops"] / most
        row(f"{share}: shrunk", flops, _top1(found))
        fixed = {**own, "space.fix": folder / "smaller" / found["folder"] / "arch.toml"}
        network = pruned(teacher, example, float(share[:-1]) / 100)
        own_flops, most_flops = (tp.utils.count_ops_and_params(model, example)[0] for model in (network, teacher))
        for what, n in lengths.items():
            result = run(ORIGINAL, folder / f"{share}-{n}", **fixed, **{"train.epochs": n})
            row(f"{share}: trained alone, as many {what} ({n} epochs)", flops, _top1(result["table"][0]))
            twin = tuned(copy.deepcopy(network), teacher, task, n, seed)
            batches = Batches(task, "test", 250, torch.device("cpu"), False, seed)
            top1 = evaluate(twin, _Plain(task), batches)["top1"]
            row(f"{share}: torch-pruning, as many {what} ({n} epochs)", own_flops / most_flops, top1)
    return rows


class _Plain:
    """A task of networks without a backbone."""

    def __init__(self, task: Any) -> None:
        self.forward, self.meter = task.forward, task.meter


def _top1(row: dict[str, Any]) -> float:
    return row["test"]["top1"]


def main() -> None:
    """Print the table of each seed, and that of their means with their standard errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=IMAGES, default="digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, nargs=3, default=(12, 2, 2), help="of original, supernet and tuning")
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--sizes", type=int, default=2, help="how many of the two sizes are looked at")
    options = parser.parse_args()
    print("| seed | network | flops | top-1 on test, % |\n| --- | --- | --- | --- |")
    seeds = []
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            found = measured(Path(folder), options.data, seed, options.epochs, options.trials, options.sizes)
            seeds.append(found)
    print(f"\n| network, {options.data}, {len(seeds)} seeds | flops | top-1 on test, % |\n| --- | --- | --- |")
    for what in seeds[0]:
        flops, top1 = zip(*(rows[what] for rows in seeds), strict=True)
        error = statistics.stdev(top1) / len(top1) ** 0.5 if len(top1) > 1 else 0.0
        print(f"| {what} | {statistics.fmean(flops):.0%} | {statistics.fmean(top1):.1f} ± {error:.1f} |")


if __name__ == "__main__":
    main()
