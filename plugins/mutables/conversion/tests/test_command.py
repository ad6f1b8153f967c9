"""`corenas convert` writes what a model can be, and says what it cannot."""

import json
from pathlib import Path

import pytest
import tomli
import torch
from safetensors.torch import save_file

from corenas.cli import main
from corenas.space import SearchSpace
from corenas.testing.commands import command_checks
from corenas_mutable_conversion import add_convert
from corenas_mutable_conversion.models import build_model

NETS = Path(__file__).with_name("nets.py")


@pytest.mark.parametrize("check", command_checks)
def test_keeps_the_promises_of_commands(check):
    check(add_convert)


def test_a_model_is_described_in_files_and_in_json(tmp_path, capsys):
    model, folder = f"{NETS}:TwoInputs", tmp_path / "out"
    save_file(build_model(model).state_dict(), tmp_path / "weights.safetensors")
    shapes = ["--example", "1x3x32x32", "--example", "1x7"]
    weights = ["--weights", str(tmp_path / "weights.safetensors")]
    assert main(["convert", model, *shapes, *weights, "--to", str(folder), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads((folder / "report.json").read_text())
    space = SearchSpace.from_table(tomli.loads((folder / "space.toml").read_text()))
    assert (told["variables"], told["size"]) == (len(space.keys), space.size)
    assert told["cost"]["min"]["flops"] < told["cost"]["max"]["flops"]
    assert {"layer": "values.0", "axis": "inputs", "size": 7, "reason": "the network's input"}.items() <= next(
        row for row in told["left"] if row["layer"] == "values.0"
    ).items()
    assert (folder / "weights.safetensors").exists()


def test_it_explains_what_is_left_and_takes_rules(tmp_path, capsys):
    (tmp_path / "rules.toml").write_text('fix = ["b"]\n')
    model = ["convert", f"{NETS}:Literal", "--example", "1x3x32x32", "--rules", str(tmp_path / "rules.toml")]
    assert main([*model, "--explain", "--to", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "b inputs: fixed at 16: the code says 16 (nets.py:" in text
    assert "b outputs: fixed at 32: fixed by the rule 'b'" in text


def test_models_of_timm_have_the_names_that_timm_takes():
    sizes = [
        sum(weight.numel() for weight in build_model(f"timm:{name}").parameters())
        for name in ("resnet18", "resnet18.a1_in1k", "gluon_resnet18_v1b")
    ]
    assert sizes == [11_689_512] * 3


@pytest.mark.parametrize(("arguments", "message"), [
    ([f"{NETS}:Branching", "--example", "1x3x8x8"], "depends on the values of tensors"),
    ([f"{NETS}:Literal", "--example", "3 by 8"], "expected sizes such as 1x3x224x224"),
    ([f"{NETS}:Nothing"], "this file has no function 'Nothing'"),
    (["nowhere.py:build"], "no such file"),
    (["torchvision:resnet17"], "torchvision has no model 'resnet17'"),
    (["timm:resnet18.none"], "Invalid pretrained tag (none)"),
    (["keras:resnet18"], "no library is called 'keras'"),
    ([f"{NETS}:Literal", "--weights", "LITTLE"], "weights of another model"),
    ([f"{NETS}:Literal", "--option", "widths"], "expected KEY=VALUE"),
    ([f"{NETS}:Literal", "--option", "widths=3"], "cannot be built: TypeError"),
])  # fmt: skip
def test_mistakes_are_told_without_a_traceback(arguments, message, tmp_path, capsys):
    torch.save({"a": torch.zeros(2)}, tmp_path / "little.pt")
    arguments = [str(tmp_path / "little.pt") if word == "LITTLE" else word for word in arguments]
    assert main(["convert", *arguments, "--to", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
