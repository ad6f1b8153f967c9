"""What every command promises: `@pytest.mark.parametrize("check", command_checks)` in a plugin's tests.

Each check takes the function that `corenas_commands` offers. Needs no torch.
"""

from __future__ import annotations

import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import Any, TypeAlias

Command: TypeAlias = Callable[[ArgumentParser], Callable[[Any], int]]


def parser_of(command: Command) -> tuple[ArgumentParser, Callable[[Any], int]]:
    """The parser of a command, as `corenas` makes it: with `--json`, which all commands have. And the command."""
    parser = ArgumentParser(prog="corenas it")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, nothing else")
    return parser, command(parser)


def adds_arguments_and_gives_the_command(command: Command) -> None:
    """It is given a parser that has `--json` already, and gives a function of the parsed arguments."""
    parser, run = parser_of(command)
    assert callable(run)
    assert "usage: corenas it" in parser.format_help()
    assert isinstance(parser.get_default("json"), bool)


def explains_its_arguments(command: Command) -> None:
    """`--help` says what each argument is."""
    parser, _ = parser_of(command)
    silent = [action.dest for action in parser._actions if not action.help]
    assert not silent, f"says nothing of {', '.join(silent)}"


def keeps_to_its_own_parser(command: Command) -> None:
    """Two parsers know nothing of each other, and parsing alone does nothing but parse."""
    first, second = parser_of(command)[0], parser_of(command)[0]
    assert first.format_help() == second.format_help()
    needed = [action for action in first._actions if action.required]
    if not needed:
        assert isinstance(first.parse_args([]), Namespace)


def shows_its_help_without_torch(command: Command) -> None:
    """The command line answers at once: neither the parser nor its help imports torch."""
    name = f"{command.__module__}:{command.__qualname__}"  # type: ignore[attr-defined]
    script = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        "from importlib.metadata import EntryPoint; from corenas.testing.commands import parser_of\n"
        f"parser_of(EntryPoint('it', {name!r}, 'corenas').load())[0].format_help(); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{name} imports torch, or does not import: {done.stderr}"


command_checks = [
    adds_arguments_and_gives_the_command,
    explains_its_arguments,
    keeps_to_its_own_parser,
    shows_its_help_without_torch,
]
"""What every command keeps to."""
