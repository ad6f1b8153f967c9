import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
import tomli_w

from corenas.objectives import Trial
from corenas.space import SearchSpace
from corenas.store import Store

ROOT = Path(__file__).parents[4]
SPACE = tomllib.loads((ROOT / "spec/space/mobilenetv3-small-images.toml").read_text())
UNITS = {
    "flops": {"unit": "", "direction": "min"},
    "params": {"unit": "", "direction": "min"},
    "activations": {"unit": "", "direction": "min"},
    "top1": {"unit": "%", "direction": "max", "share": True},
    "top5": {"unit": "%", "direction": "max", "share": True},
}


def spec_of(name, seed=0, **more):
    return {
        "name": name,
        "seed": seed,
        "task": {"type": "classification", "data": "mnist5k", "valid": 500, "test": 1000, "label_smoothing": 0.1},
        "backbone": {"type": "mobilenetv3", "width_mult": 1.0, "in_channels": 1},
        "algorithm": {"type": "bignas", "zero_init": True},
        "mutator": {"type": "sandwich", "paths": 4},
        "searcher": {"type": "evolution", "population": 20, "parents": 8, "mutation": 10},
        "evaluators": [{"type": "accuracy", "split": "valid"}],
        "device": {"type": "auto"},
        "train": {"epochs": 15, "batch_size": 64, "optimizer": {"type": "SGD", "lr": 0.1},
                  "schedule": {"type": "cosine", "warmup": 1}},
        "search": {"trials": 120, "batch": 10, "objectives": ["top1"], "constraints": {"flops": "2M"}},
        "export": {"formats": ["safetensors", "python", "pt2"]},
        "space": SearchSpace.from_table(SPACE).to_table(),
        **more,
    }  # fmt: skip


def measure(space, arch, rng):
    """Costs and accuracies as a small network might have them."""
    code = space.active(space.encode([arch]))[0] * space.encode([arch])[0]
    size = float(code.sum() / len(code))
    flops = int(1.0e6 + 1.6e6 * size + 2e4 * rng.random())
    top1 = min(99.8, 95.5 + 3.2 * (1 - np.exp(-2 * size)) + rng.normal(0, 0.3))
    return {"flops": flops, "params": int(flops / 18), "activations": int(flops / 30), "top1": round(top1 * 5) / 5,
            "top5": 100.0 - round(5 * rng.random()) / 5}  # fmt: skip


def fill(store, search, n, rng, limit):
    """Add trials, a failed and some infeasible ones among them. Returns the best."""
    space, best = SearchSpace.from_table(SPACE), None
    archs = dict.fromkeys(space.sample(rng) for _ in range(n))
    for i, arch in enumerate(archs):
        metrics = measure(space, arch, rng)
        if i == 7:
            trial = Trial(arch, {k: metrics[k] for k in ("flops", "params")}, "failed", 0.2, "out of <memory>")
        elif metrics["flops"] > limit:
            trial = Trial(arch, metrics if i % 2 else {"flops": metrics["flops"]}, "infeasible", 0.0)
        else:
            trial = Trial(arch, metrics, "done", 0.1 + 0.05 * rng.random())
            if best is None or metrics["top1"] > best.metrics["top1"]:
                best = trial
        store.add(trial, search)
    return best


def write_best(folder, trial, test, formats=("network.py", "network.safetensors", "network.pt2")):
    folder.mkdir(parents=True)
    card = {
        "flops": trial.metrics["flops"],
        "params": trial.metrics["params"],
        "activations": trial.metrics["activations"],
        "convention": "one input; a multiply-add counts once; bias, norms, activations and pooling count nothing",
        "input": [1, 28, 28],
        "preprocessing": {"pixels": "0 to 1, then (pixel - mean) / std by channel", "mean": [0.1307], "std": [0.3081]},
        "metrics": trial.metrics,
        "test": test,
        "splits": {"train": 3500, "valid": 500, "test": 1000},
        "seed": 0,
    }
    (folder / "cost.json").write_text(json.dumps(card))
    (folder / "arch.toml").write_text(tomli_w.dumps(dict(trial.arch)))
    for name in formats:
        (folder / name).write_text("x" * 1000)


def write_run(
    folder, name=None, seed=0, n=120, limits=(2e6,), finished=True, epochs=15, noted=True, retrain=False, **spec
):
    """Write a run directory as `corenas run` does. noted: False leaves out what older versions did not note."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    store = Store(folder / "run.sqlite")
    store.set("spec", spec_of(name or folder.name, seed, **spec))
    texts = [f"flops at most {limit / 1e6:g}M" for limit in limits]
    if noted:
        store.set("splits", {"train": 3500, "valid": 500, "test": 1000})
        store.set("versions", {"corenas": "0.1.0", "torch": "2.15.0", "python": "3.12.1", "threads": 1,
                                "processes": 1})  # fmt: skip
        store.set("seconds", {"train": 391.5, "search": 18.0, "export": 1.25} if finished else {})
        store.set("device", "cpu")
        store.set("metrics", UNITS)
        store.set("searches", texts)
        goal = {"metric": "top1", "direction": "max", "weight": 1.0}
        store.set("objectives", {"objectives": [goal], "pareto": False, "bin_metric": None, "bin_width": 0.0})
    for stage in ["train", *(["retrain"] if retrain else [])]:
        for epoch in range(1, epochs + 1):
            lr = 0.05 * (1 + np.cos(np.pi * epoch / 15))
            loss = 0.6 + 1.7 * np.exp(-epoch / 3) + 0.02 * rng.random()
            store.point(stage, 55 * epoch, {"epoch": epoch, "loss": loss, "lr": lr})
    rows = []
    for i, limit in enumerate(limits):
        best = fill(store, i, n, rng, limit)
        if best is not None and finished:
            test = {"top1": best.metrics["top1"] - 0.6, "top5": 99.9}
            folder_name = "best" if i == 0 else f"best-{i + 1}"
            write_best(folder / folder_name, best, test)
            rows.append({"constraints": texts[i], "arch": dict(best.arch), "metrics": best.metrics, "test": test,
                         "folder": folder_name})  # fmt: skip
    if finished:
        best = {key: rows[0][key] for key in ("arch", "metrics", "test")}
        store.set("result", {"run": str(folder), "best": best, "front": [], "trials": n * len(limits), "seconds": {},
                              "table": rows})  # fmt: skip
    store.close()
    return folder


@pytest.fixture
def run_writer(tmp_path):
    return lambda folder, **more: write_run(tmp_path / folder, **more)
