"""A model of torchvision is a backbone like any other, and gives its space itself."""

import json
import shutil
from pathlib import Path

import pytest
import tomli
import torch
from torch import nn

from corenas.cli import main
from corenas.errors import UserError
from corenas.testing.backbones import backbone_checks
from corenas.testing.components import spec_fragments
from corenas.testing.distributions import distribution_checks
from corenas_backbone_converted import ConvertedModel
from corenas_mutable_conversion.rules import Rules

ROOT = Path(__file__).parents[4]
NETS = ROOT / "plugins/mutables/conversion/tests/nets.py"
IMAGE = (3, 32, 32)
BACKBONE = ConvertedModel(f"{NETS}:tiny", image=IMAGE, rules=Rules(keep=0.3))
SMALLEST = (
    "task.data=digits", "task.valid=200", "task.test=200", "train.epochs=1", "train.batch_size=256",
    "backbone.image=[3, 8, 8]", f"backbone.model={NETS}:tiny",
)  # fmt: skip
SEARCH = (
    "search.trials=2", "search.batch=2", "calibration.batches=1", "searcher=random", 'export.formats=["safetensors"]',
    'search.constraints=[{flops="80%"}, {flops="60%"}]', 'space.fix={"3.0.expand.width"=32}', "retrain.train.epochs=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def space():
    return BACKBONE.space()


@pytest.mark.parametrize("check", backbone_checks)
def test_keeps_the_promises_of_backbones(check, space):
    if "component" in check.__module__:
        check(BACKBONE)
    else:
        check(BACKBONE, space, image=IMAGE)


@pytest.mark.parametrize("check", distribution_checks)
def test_keeps_the_promises_of_distributions(check):
    check("corenas_backbone_converted")


def told(capsys, *arguments):
    """What a command prints as JSON."""
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def sets(items):
    return [f"--set={item}" for item in items]


@pytest.mark.slow
def test_a_trained_network_is_made_smaller_and_what_it_brought_is_a_table(tmp_path, capsys, monkeypatch):
    """The second job: an original is trained, then converted, sorted, trained as a supernet, searched and tuned."""
    monkeypatch.chdir(tmp_path)
    original = tmp_path / "runs/shrink-original"
    shorter = sets([*SMALLEST, 'export.formats=["pt2"]'])
    before = told(capsys, "run", ROOT / "spec/shrink-original.toml", *shorter)
    spec = ROOT / "spec/shrink.toml"
    own = sets([*SMALLEST, *SEARCH])
    checked = told(capsys, "check", spec, "--no-data", *own)
    assert checked["cost"]["max"]["flops"] == before["table"][0]["metrics"]["flops"]
    assert checked["space"]["variables"] == 4
    after = told(capsys, "run", spec, "--out", tmp_path / "a", *own)
    assert after["best"]["metrics"]["flops"] <= 0.8 * checked["cost"]["max"]["flops"]
    assert 0 <= after["best"]["test"]["top1"] <= 100
    assert after["best"]["arch"]["3.0.expand.width"] == 32
    # A run that is done once more, from the whole spec that the first has kept, ends with the same.
    again = told(capsys, "run", tmp_path / "a/spec.toml", "--out", tmp_path / "b")
    assert [t["arch"] for t in again["front"]] == [t["arch"] for t in after["front"]]
    assert again["table"] == after["table"]
    # The table: what it began with, and what it found, with the weights that tuning gave it.
    names = [word for name in ("begin", "best", "best-2") for word in ("--arch", name)]
    timing = 'evaluators=["accuracy", {type="latency", spread=1e9, runs=2, rounds=3, warmup=1}]'  # whatever else runs
    asked = told(capsys, "evaluate", tmp_path / "a", *names, "--split", "test", "--latency", "--set", timing)
    old, *new = asked["archs"]
    assert old["flops"] == checked["cost"]["max"]["flops"]
    assert old["top1"] == before["best"]["test"]["top1"]
    assert [row["top1"] for row in new] == [row["test"]["top1"] for row in after["table"]]
    assert [row["flops"] for row in new] == [row["metrics"]["flops"] for row in after["table"]]
    assert all(row["latency_ms"] > 0 for row in asked["archs"])
    exported = told(capsys, "export", tmp_path / "a", "--arch", "min", "--to", tmp_path / "min")
    assert exported["flops"] == checked["cost"]["min"]["flops"]
    # Other weights are another run.
    kept = torch.load(original / "retrain.pt", weights_only=True)
    kept["model"]["backbone.model.6.bias"] += 1
    torch.save(kept, original / "retrain.pt")
    shutil.rmtree(tmp_path / "b")
    assert main(["run", str(tmp_path / "a/spec.toml"), "--out", str(tmp_path / "a")]) == 2
    assert "the file of the backbone's weights has changed" in capsys.readouterr().err


@pytest.mark.parametrize(("change", "message"), [
    ("backbone.model=torchvision:resnet19", "torchvision has no model 'resnet19'"),
    ("backbone.model=resnet18", "torchvision:NAME, timm:NAME, or FILE.py:FUNCTION"),
    ("backbone.weights=nowhere.pt", "nowhere.pt"),
    ("backbone.image=[3, 32, 32]", "image = [3, 8, 8]"),
    ('space.fix={"conv9.width"=8}', "no variable 'conv9.width'"),
    ('backbone.rules.fix=["stage9.*"]', "no variable is called 'stage9.*'"),
])  # fmt: skip
def test_mistakes_are_told_with_their_place(change, message, capsys):
    spec = str(ROOT / "spec/shrink-original.toml")
    assert main(["check", "--no-data", spec, *sets([*SMALLEST, change])]) == 2
    assert message in capsys.readouterr().err


def test_a_model_of_ones_own_is_a_function_in_a_file():
    backbone = ConvertedModel(f"{NETS}:small_resnet", image=(1, 28, 28))
    space = backbone.space()
    network = backbone.build(space)
    assert isinstance(network.own_head, nn.Module)
    assert [dim.parts[0].number for dim in network.feat_dims] == [10]
    with pytest.raises(UserError, match="this file has no function 'small_resnets'"):
        ConvertedModel(f"{NETS}:small_resnets").space()


@pytest.mark.parametrize("fragment", spec_fragments(Path(__file__).parents[1] / "README.md"))
def test_the_readmes_spec_is_one(fragment, tmp_path):
    (tmp_path / "spec.toml").write_text(_toml(fragment))
    assert main(["check", "--no-data", str(tmp_path / "spec.toml")]) == 0


def _toml(table):
    import tomli_w

    assert tomli.loads(tomli_w.dumps(table)) == table
    return tomli_w.dumps(table)
