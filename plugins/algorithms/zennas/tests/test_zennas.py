from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from corenas.contracts import Algorithm, Progress, StageStarted, TrialDone
from corenas.errors import UserError
from corenas.plugins import load_catalogue
from corenas.run.prepare import prepare
from corenas.run.spec import open_spec
from corenas.run.stages import run_spec
from corenas.store import Store
from corenas.testing.algorithms import algorithm_checks
from corenas.testing.components import spec_fragments
from corenas.testing.distributions import distribution_checks
from corenas_algorithm_zennas import ZenNAS, corenas_algorithms

SPECS = Path(__file__).parents[4] / "spec"
SMALL = [
    "task.data=digits", "task.valid=200", "task.test=200", "search.trials=14", "search.batch=4",
    "search.constraints.flops=1M", "searcher.population=6", "searcher.first=2", "retrain.train.epochs=2",
    'export.formats=["safetensors"]',
]  # fmt: skip


@pytest.mark.parametrize("check", algorithm_checks)
def test_conforms(check):
    check(ZenNAS())


@pytest.mark.parametrize("check", distribution_checks)
def test_the_distribution_conforms(check):
    check("corenas_algorithm_zennas")


def test_options_are_an_algorithm_under_its_name():
    assert corenas_algorithms() == {"zennas": ZenNAS}
    assert isinstance(ZenNAS(), Algorithm)
    assert ZenNAS.stages == ("search", "retrain")
    with pytest.raises(UserError, match="no supernet"):
        ZenNAS().start(None)


def run(folder, *settings, killed=lambda event: False):
    """Run the small spec, until an event kills it."""
    spec, _, catalogue = open_spec(SPECS / "zennas.toml", [*SMALL, *settings])

    def emit(event):
        if killed(event):
            raise KeyboardInterrupt

    return run_spec(spec, catalogue, folder, emit)


def outcome(folder):
    """What a run ends with, times apart."""
    store = Store(folder / "run.sqlite", readonly=True)
    trials = [(trial.arch, dict(trial.metrics), dict(trial.extra)) for trial in store.trials()]
    network = (folder / "best" / "network.safetensors").read_bytes()
    return trials, store.get("result")["table"], store.curve("retrain"), network


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was left alone."""
    folder = tmp_path_factory.mktemp("zennas") / "run"
    run(folder)
    return folder


def test_the_best_by_its_score_is_trained_from_scratch(whole):
    trials, (row,), curve, _ = outcome(whole)
    assert len(trials) == 14
    assert all(metrics["flops"] <= 1e6 for _, metrics, _ in trials)
    assert row["metrics"]["zen_score"] == max(metrics["zen_score"] for _, metrics, _ in trials)
    assert len(curve) == 2
    assert row["test"]["top1"] > 15
    assert not (whole / "supernet.pt").exists()


def test_killed_in_every_stage_it_ends_with_the_same_bits(whole, tmp_path):
    """One run, killed in the search, between the stages and in the retraining."""
    seen = []

    def in_search(event):
        seen.append(event)
        return sum(isinstance(e, TrialDone) for e in seen) == 7

    def between(event):
        return getattr(event, "stage", "") == "retrain"

    def in_retraining(event):
        return isinstance(event, Progress) and event.stage == "retrain" and event.point

    for killed in (in_search, between, in_retraining):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", killed=killed)
    run(tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(whole)


def test_no_supernet_is_ever_allocated(tmp_path, monkeypatch):
    """Of a space whose supernet has 200 million weights no tensor comes near the largest of its layers."""
    spec, _, _ = open_spec(SPECS / "zennas.toml", SMALL)
    prepared = prepare(spec)
    assert all(tensor.is_meta for tensor in (*prepared.supernet.parameters(), *prepared.supernet.buffers()))
    assert sum(p.numel() for p in prepared.supernet.parameters()) > 100e6
    largest = []
    make = torch.nn.init.kaiming_uniform_

    def watched(tensor, *args, **kwargs):
        if not tensor.is_meta:
            largest.append(tensor.numel())
        return make(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", watched)
    run(tmp_path / "run", "retrain.train.epochs=1")
    trials, _, _, _ = outcome(tmp_path / "run")
    assert largest
    assert max(largest) <= max(metrics["params"] for _, metrics, _ in trials)


PAPER = SPECS / "imagenet" / "zennas.toml"


@pytest.mark.slow
def test_the_recipe_of_the_paper_runs_on_a_folder_of_images(tmp_path):
    rng = np.random.default_rng(0)
    for split, number in (("train", 8), ("val", 2)):
        for name in ("cat", "dog"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(number):
                Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8)).save(folder / f"{i}.png")
    settings = [
        f"task.data.root={tmp_path / 'images'}", "task.classes=2", "task.valid=4", "task.size=32",
        "task.augment.0.size=32", "evaluators.0.batch_size=2", "search.trials=3", "retrain.train.epochs=1",
        "retrain.train.batch_size=8", "retrain.train.workers=0", 'export.formats=["safetensors"]',
    ]  # fmt: skip
    spec, _, catalogue = open_spec(PAPER, settings)
    events = []
    result = run_spec(spec, catalogue, tmp_path / "run", events.append)
    started = [event for event in events if isinstance(event, StageStarted)]
    assert [(event.stage, event.total) for event in started[:2]] == [("search", 3), ("retrain", 2)]
    assert result["best"]["metrics"]["flops"] <= 400e6
    assert any("_se_scale_1_conv" in key for key in load_file(tmp_path / "run/best/network.safetensors"))


def test_the_readme_shows_a_spec_that_is_right():
    (spec,) = spec_fragments(Path(__file__).parents[1] / "README.md")
    assert load_catalogue().options("algorithms", spec["algorithm"]) == ZenNAS()
    assert {"searcher", "evaluators", "retrain"} <= spec.keys()
