"""What the commands promise; what they say of specs and runs is tested end to end in tests/test_cli.py."""

import json
import re
from pathlib import Path

import pytest

from corenas.cli import main
from corenas.testing.commands import command_checks
from corenas.testing.distributions import distribution_checks
from corenas_tool_inspect import corenas_commands

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
    assert "46 variables, 5.44e+20 archs; without a head, on 3x224x224:" in text
    # Once-for-All's figures without its classifier of 1280 x 1000 weights and 1000 biases
    assert f"max: flops {566_170_656 - 1_280_000:,}, params {7_664_760 - 1_281_000:,}," in text


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
