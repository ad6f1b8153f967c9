"""What a search space is worth: the command `corenas sweep`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from corenas.hookspecs import hookimpl


def _parser(parser: ArgumentParser) -> Callable[[Any], int]:
    """Compare populations of archs, test each variable, and suggest a narrower space."""
    parser.add_argument(
        "source",
        metavar="SPEC|RUN|CSV",
        nargs="+",
        type=Path,
        help="a TOML file with a table [sweep]; or run directories and CSV files, each a population",
    )
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("sweep"), help="where all is written (sweep)")
    return _sweep


def _sweep(options: Namespace) -> int:
    from corenas_tool_sweep.command import command

    return command(options)


@hookimpl
def corenas_commands() -> Mapping[str, Callable[[ArgumentParser], Callable[[Any], int]]]:
    """Offer `corenas sweep`."""
    return {"sweep": _parser}


@hookimpl
def corenas_searchers() -> Mapping[str, type]:
    """Offer the searcher "stratified"."""
    from corenas_tool_sweep.stratified import Stratified

    return {"stratified": Stratified}
