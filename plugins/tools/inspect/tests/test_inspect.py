"""What the commands promise; what they say of specs and runs is tested end to end in tests/test_cli.py."""

import csv
import io
import json
import math
import re
from pathlib import Path

import pytest

from corenas.cli import main
from corenas.objectives import Trial
from corenas.space import Arch
from corenas.store import Store
from corenas.testing.commands import command_checks
from corenas.testing.distributions import distribution_checks
from corenas_tool_inspect import corenas_commands
from corenas_tool_inspect.table import print_json


@pytest.fixture(autouse=True)
def piped(monkeypatch):
    """No terminal, whose width others may have set: pytest's workers do."""
    monkeypatch.delenv("COLUMNS", raising=False)


SPACES = Path(__file__).parents[4] / "spec" / "space"


@pytest.mark.parametrize("check", command_checks)
@pytest.mark.parametrize("name", corenas_commands())
def test_keeps_the_promises_of_commands(check, name):
    check(corenas_commands()[name])


@pytest.mark.parametrize("check", distribution_checks)
def test_keeps_the_promises_of_distributions(check):
    check("corenas_tool_inspect")


# -- a space drawn ----------------------------------------------------------------------------------------------------


def test_show_draws_the_space_of_a_backbone_with_its_size_and_the_costs_of_its_extremes(capsys):
    assert main(["show", "backbone", "mobilenetv3", "--space", str(SPACES / "ofa-mobilenetv3.toml")]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^stages\.1 +24 +2 \| 3 \| 4 +2$", text, re.MULTILINE)
    assert re.search(r"^stages\.1\.blocks\.0-3 +3 \| 5 \| 7 +3 \| 4 \| 6$", text, re.MULTILINE)
    assert "46 variables, 5.44e+20 archs; without the task's head, on 3x224x224:" in text
    # Once-for-All's figures without its classifier of 1280 x 1000 weights and 1000 biases
    assert f"max: flops {566_170_656 - 1_280_000:,}, params {7_664_760 - 1_281_000:,}," in text


def test_show_folds_a_table_that_is_wider_than_the_terminal(capsys, monkeypatch):
    draw = ["show", "backbone", "darts", "--space", str(SPACES / "darts.toml"), "--image", "32"]
    assert main(draw) == 0
    whole = capsys.readouterr().out.partition(".toml:\n")[2].splitlines()
    monkeypatch.setenv("COLUMNS", "100")
    assert main(draw) == 0
    folded = capsys.readouterr().out.partition(".toml:\n")[2].splitlines()
    assert max(map(len, whole)) > 130
    assert max(map(len, folded)) <= 100
    assert " ".join(folded).count("dil_conv_3x3 |") == " ".join(whole).count("dil_conv_3x3 |")
    assert whole[-4:] == folded[-4:]  # size and costs


def test_the_extremes_are_those_of_flops_where_choices_have_names(tmp_path, capsys):
    spec = tmp_path / "spec.toml"
    spec.write_text(f'''
backbone = {{ type = "mobilenetv3", in_channels = 1 }}
space = "{SPACES}/fairnas.toml"
task = {{ type = "classification", data = "digits", size = 64 }}
algorithm = "spos"
mutator = "uniform"
searcher = "random"
search.objectives = "flops"
''')
    archs = ["--arch", "min", "--arch", "max", "--arch", "random:3", "--n", "50"]
    assert main(["cost", str(spec), "--json", *archs]) == 0
    least, most, *others = json.loads(capsys.readouterr().out)["archs"]
    assert least["flops"] < min(other["flops"] for other in others)
    assert most["flops"] > max(other["flops"] for other in others)
    assert {*most["arch"].values()} == {"k7e6"}
    assert main(["show", "backbone", "mobilenetv3", "--space", "fairnas", "--json"]) == 0
    costs = json.loads(capsys.readouterr().out)["space"]["cost"]
    assert costs["min"]["flops"] < costs["max"]["flops"] / 2


def test_show_as_json_has_the_space_as_data(capsys):
    arguments = ["show", "backbone", "mobilenetv3", "--space", str(SPACES / "ofa-mobilenetv3.toml"), "--json"]
    assert main([*arguments, "--image", "192"]) == 0
    space = json.loads(capsys.readouterr().out)["space"]
    assert space["size"] == (9**2 + 9**3 + 9**4) ** 5 * 25
    assert space["image"] == [3, 192, 192]
    assert {row["table"] for row in space["tables"]} >= {"space", "stem", "stages.0", "stages.5.blocks.0-3", "head"}


def test_show_names_the_file_that_is_no_space(tmp_path, capsys):
    (tmp_path / "space.toml").write_text("width = []")
    assert main(["show", "backbone", "mobilenetv3", "--space", str(tmp_path / "space.toml")]) == 2
    assert "space.toml" in capsys.readouterr().err
    assert main(["show", "backbone", "mobilenetv3", "--space", str(tmp_path / "none.toml")]) == 2
    assert "none.toml" in capsys.readouterr().err


def test_show_names_the_lines_of_a_space_that_is_another_backbones(capsys):
    space = SPACES / "genet-tiny.toml"
    assert main(["show", "backbone", "vit", "--space", str(space)]) == 2
    line = space.read_text().splitlines().index("[head]") + 1
    assert f"genet-tiny.toml:{line}: head: unknown key" in capsys.readouterr().err


@pytest.mark.parametrize("side", ["0", "-3"])
def test_show_refuses_images_without_pixels(side, capsys):
    space = str(SPACES / "darts-tiny.toml")
    assert main(["show", "backbone", "darts", "--space", space, "--image", side]) == 2
    assert "--image" in capsys.readouterr().err


def test_options_within_lists_and_tables_are_shown(capsys):
    assert main(["show", "search"]) == 0
    shown = capsys.readouterr().out
    for line in ("      weight: what one unit", "      min: the least", "      width: how wide"):
        assert line in shown
    assert main(["show", "train"]) == 0
    assert '{"type": "SGD", "lr": 0.1, "momentum": 0.9}' in capsys.readouterr().out


def test_a_table_of_a_spec_is_named_where_it_stands_in_another(capsys):
    assert main(["show", "retrain"]) == 0
    shown = capsys.readouterr().out
    assert "its options: corenas show train" in shown
    assert "batch_size" not in shown
    assert main(["show", "retrain", "--json"]) == 0
    (train,) = [row for row in json.loads(capsys.readouterr().out)["retrain"] if row["option"] == "train"]
    assert "batch_size" in {row["option"] for row in train["options"]}


def test_json_has_no_nan(capsys):
    print_json({"a": [math.nan, math.inf, 1.5], "b": "NaN"})
    assert capsys.readouterr().out == '{"a": [null, null, 1.5], "b": "NaN"}\n'


def test_trials_say_why_one_failed(tmp_path, capsys):
    store = Store(tmp_path / "run.sqlite")
    store.add(Trial(Arch({"a": 1}), {"flops": 3}))
    store.add(Trial(Arch({"a": 2}), {}, "failed", error='no, "device"\nhere'))
    store.close()
    assert main(["trials", str(tmp_path), "--json"]) == 0
    assert [t.get("error") for t in json.loads(capsys.readouterr().out)["trials"]] == [None, 'no, "device"\nhere']
    assert main(["trials", str(tmp_path), "--csv"]) == 0
    rows = [*csv.DictReader(io.StringIO(capsys.readouterr().out))]
    assert [row["error"] for row in rows] == ["", 'no, "device"\nhere']
    assert main(["trials", str(tmp_path), "--pareto"]) == 2
    assert "has not begun to search" in capsys.readouterr().err
