"""What the commands promise; what they say of specs and runs is tested end to end in tests/test_cli.py."""

import pytest

from corenas.testing.commands import command_checks
from corenas.testing.distributions import distribution_checks
from corenas_tool_inspect import corenas_commands


@pytest.mark.parametrize("check", command_checks)
@pytest.mark.parametrize("name", corenas_commands())
def test_keeps_the_promises_of_commands(check, name):
    check(corenas_commands()[name])


@pytest.mark.parametrize("check", distribution_checks)
def test_keeps_the_promises_of_distributions(check):
    check("corenas_tool_inspect")
