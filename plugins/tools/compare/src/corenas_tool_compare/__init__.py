"""Methods of search compared on one space: the command `corenas compare`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from corenas.hookspecs import hookimpl


def _parser(parser: ArgumentParser) -> Callable[[Any], int]:
    """Run methods on one space at equal budget, over seeds, and tabulate what they find."""
    parser.add_argument(
        "spec",
        metavar="SPEC",
        nargs="+",
        type=Path,
        help="a TOML file with a table [compare]; or the specs of the methods, of one space and one task",
    )
    parser.add_argument("--seeds", metavar="N", type=int, help="runs of each method, with seeds 0, 1, … (3)")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="override a key of all specs")
    parser.add_argument(
        "--out", metavar="DIR", type=Path, default=Path("compare"), help="where all is written (compare)"
    )
    return _compare


def _compare(options: Namespace) -> int:
    from corenas_tool_compare.command import command

    return command(options)


@hookimpl
def corenas_commands() -> Mapping[str, Callable[[ArgumentParser], Callable[[Any], int]]]:
    """Offer `corenas compare`."""
    return {"compare": _parser}
