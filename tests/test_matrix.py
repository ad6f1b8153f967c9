"""Every algorithm on every backbone: two steps, what follows, and a network; or a reason before anything is trained.

Each run goes through all its stages on sixteen images. Which do not go together stands in `REFUSED`.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import tomli_w
import torch
from PIL import Image
from safetensors.torch import load_file

from corenas.contracts import Progress, StageStarted, TrialDone
from corenas.errors import UserError
from corenas.plugins import load_catalogue
from corenas.run.prepare import prepare
from corenas.run.spec import load_spec
from corenas.run.stages import run_spec
from corenas.store import Store
from corenas.testing.small import same

pytestmark = pytest.mark.slow
CATALOGUE = load_catalogue()
SEARCH = {"searcher": "random", "evaluators": ["accuracy"], "search": {"trials": 2, "batch": 2}}
SCORES = {"evaluators": [{"type": "zen_score", "batch_size": 2}], "search": {"trials": 2, "objectives": ["zen_score"]}}
ALONE = {"evaluators": ["stand_alone"], "search": {"trials": 2, "objectives": ["top1"]}, "searcher": "random"}
BACKBONES = CATALOGUE.names("backbones")
OWN = Path(__file__).parents[1] / "plugins/mutables/conversion/tests/nets.py"
EXAMPLES = {
    name: getattr(CATALOGUE.find("backbones", name).cls, "example", None)
    or {"backbone": {"model": f"{OWN}:tiny", "options": {"in_channels": 1, "num_classes": 2}, "image": [1, 28, 28]}}
    for name in BACKBONES
}
"""The network and the space with which a backbone is tried; of `converted`, whose models are the user's, a tiny one."""
HOW = {
    "alone": ALONE,
    "attentivenas": {"mutator": {"type": "attentive", "paths": 3, "candidates": 2, "draws": 50}, **SEARCH},
    "bignas": {"mutator": {"type": "sandwich", "paths": 3}, **SEARCH},
    "cream": {"algorithm": {"type": "cream", "warmup": 0, "meta_every": 1, "images": 2}, "mutator": "uniform"},
    "darts": {},
    "fairnas": {"mutator": "fair", **SEARCH},
    "ofa": {"algorithm": {"type": "ofa", "phases": [{"open": {"*": "all"}}]}, "mutator": "uniform", **SEARCH},
    "plain": {},
    "spos": {"mutator": "uniform", **SEARCH},
    "zennas": {**SEARCH, **SCORES},
}  # fmt: skip
"""What a spec of each algorithm has beside its task and its network."""
UNMIXED = "no layer of this network can mix what is searched"
REFUSED = {
    # DARTS weighs whole operations. Here they are kernels, widths, depths and heads,
    ("darts", "mobilenetv3"): UNMIXED,
    ("darts", "vit"): UNMIXED,
    ("darts", "converted"): UNMIXED,
    # or blocks which bring a width of their own, that later layers would need as a number.
    ("darts", "resnet"): f"{UNMIXED}: stages.1.op does not choose operations alone, other layers' shapes depend on it",
}
"""What makes no sense, and the reason that is given for it."""


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of sixteen images to train on and eight for each of the others, in two classes."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, number in (("train", 8), ("valid", 4), ("test", 4)):
        for name in ("cat", "dog"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(number):
                Image.fromarray(rng.integers(0, 255, (28, 28), np.uint8)).save(folder / f"{i}.png")
    return root


def read_spec(folder, images, algorithm, backbone, overrides=()):
    """A spec of two steps in each of an algorithm's trainings, of the space with which a backbone is tried."""
    example = EXAMPLES[backbone]
    table = {
        **example, "backbone": {"type": backbone, **example["backbone"]}, "algorithm": algorithm,
        "task": {"type": "classification", "data": {"type": "folder", "root": str(images)}, "size": 28, "channels": 1},
        "train": {"epochs": 1, "batch_size": 8, "optimizer": {"type": "SGD", "lr": 0.01}},
        "calibration": {"batches": 1, "batch_size": 8}, "export": {"formats": ["safetensors"]},
        "device": {"type": "cpu"}, **HOW[algorithm],
    }  # fmt: skip
    (folder / "spec.toml").write_text(tomli_w.dumps(table))
    return load_spec(folder / "spec.toml", CATALOGUE, overrides)[0]


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("algorithm", CATALOGUE.names("algorithms"))
def test_an_algorithm_runs_on_a_backbone_or_says_why_not_before_it_trains(tmp_path, images, algorithm, backbone):
    spec, run = read_spec(tmp_path, images, algorithm, backbone), tmp_path / "run"
    if reason := REFUSED.get((algorithm, backbone)):
        with pytest.raises(UserError) as caught:
            prepare(spec, data=False, weights=False)  # as `corenas check --no-data` does
        assert caught.value.faults[0].message == reason
        with pytest.raises(UserError):
            run_spec(spec, CATALOGUE, run, lambda event: None)
        assert not run.exists()
        return
    events = []
    result = run_spec(spec, CATALOGUE, run, events.append)
    steps = {event.stage: event.total for event in events if isinstance(event, StageStarted) and event.unit == "steps"}
    phases = len(Store(run / "run.sqlite", readonly=True).curve("train")) or 1  # of an epoch each
    assert steps == {stage: 2 * (phases if stage == "train" else 1) for stage in steps}
    assert steps, "something is trained"
    if "train" in spec.algorithm.stages:
        before = prepare(spec).supernet.state_dict()
        after = torch.load(run / "supernet.pt", weights_only=True)["model"]
        moved = [name for name in before if not torch.equal(before[name], after[name])]
        trained, there = ({name.partition(".")[0] for name in names} for names in (moved, before))
        assert trained == there == ({"backbone"} if backbone == "converted" else {"backbone", "head"})
        assert all(tensor.isfinite().all() for tensor in after.values())
    assert spec.space.arch(result["best"]["arch"]) in spec.space
    assert result["trials"] == (2 if "search" in spec.algorithm.stages else 0)
    assert 0 <= result["best"]["test"]["top1"] <= 100
    network = load_file(run / "best" / "network.safetensors")
    assert all(tensor.isfinite().all() for tensor in network.values())
    card = json.loads((run / "best" / "cost.json").read_text())
    kept = sum(
        t.numel() for name, t in network.items() if not name.endswith(("running_mean", "running_var", "tracked"))
    )
    assert card["params"] == kept


@pytest.mark.parametrize("task", ["multilabel", "regression"])
@pytest.mark.parametrize("algorithm", ["attentivenas", "bignas", "cream", "ofa"])
def test_answers_that_are_no_classes_are_learnt_from_or_refused_before_it_trains(tmp_path, images, algorithm, task):
    names = [
        f"{split}/{c}/{i}.png" for split, n in (("train", 8), ("valid", 4)) for c in ("cat", "dog") for i in range(n)
    ]
    rows = [f"{images}/{name},{i % 2},{int(i % 3 == 0)}" for i, name in enumerate(names)]
    (tmp_path / "labels.csv").write_text("\n".join(["file,a,b", *rows]))
    metric, sets = "map" if task == "multilabel" else "mae", []
    sets += [f"task.type={task}", f"task.data={{type='csv', file='{tmp_path}/labels.csv'}}", "train.batch_size=4",
             f"task.{'labels' if task == 'multilabel' else 'targets'}=2"]  # fmt: skip
    sets += [f"algorithm.metric={metric}"] if algorithm == "cream" else [f"search.objectives={metric}"]
    spec = read_spec(tmp_path, images, algorithm, "resnet", sets)
    if task == "regression":
        with pytest.raises(UserError) as caught:
            prepare(spec, data=False, weights=False)
        assert "are none" in caught.value.faults[0].message
        if algorithm == "cream":
            return
        spec = read_spec(tmp_path, images, algorithm, "resnet", [*sets, "distiller=mse"])
    result = run_spec(spec, CATALOGUE, tmp_path / "run", lambda event: None)
    assert metric in result["best"]["test"]


def outcome(run):
    """What a run ends with, times apart."""
    store = Store(run / "run.sqlite", readonly=True)
    trials = [(trial.arch, dict(trial.metrics), trial.state) for trial in store.trials()]
    network = (run / "best" / "network.safetensors").read_bytes()
    curves = [store.curve(stage) for stage in ("train", "retrain")]
    supernet = torch.load(run / "supernet.pt", weights_only=True)
    return trials, store.get("result")["table"], curves, network, supernet


SHORT = ["train.epochs=2", "train.ema=0.9", "search.trials=4"]
KILLED = [(name, "mobilenetv3", SHORT) for name in ("attentivenas", "bignas", "cream", "fairnas", "ofa", "spos")]
TUNED = ["retrain.begin=supernet", "train.precision=bfloat16"]


@pytest.mark.parametrize(("algorithm", "backbone", "sets"), [*KILLED, ("bignas", "converted", [*SHORT, *TUNED])])
def test_killed_in_every_one_of_its_stages_a_run_ends_with_the_same_bits(tmp_path, images, algorithm, backbone, sets):
    spec = read_spec(tmp_path, images, algorithm, backbone, sets)
    run_spec(spec, CATALOGUE, tmp_path / "whole", lambda event: None)
    for stage in (stage for stage in spec.stages if stage != "derive"):

        def kill(event, stage=stage):
            trained = isinstance(event, Progress) and event.point and event.stage == stage
            if trained or (isinstance(event, TrialDone) and stage == "search"):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run_spec(spec, CATALOGUE, tmp_path / "killed", kill)
        assert not (tmp_path / "killed" / "best").exists()
    run_spec(spec, CATALOGUE, tmp_path / "killed", lambda event: None)
    for ours, theirs in zip(outcome(tmp_path / "killed"), outcome(tmp_path / "whole"), strict=True):
        assert same(ours, theirs)
