"""A page of a run: the command `corenas report`, and a listener that writes the page when a run ends."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from corenas.contracts import Event, RunDone
from corenas.errors import shown
from corenas.hookspecs import hookimpl


def _parser(parser: ArgumentParser) -> Callable[[Any], int]:
    """Write a page of a run, or of several to compare them."""
    parser.description = "A run as one HTML page that needs nothing else; several runs, compared."
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="a run directory, finished or not")
    parser.add_argument(
        "--out", metavar="FILE", type=Path, help="the page (default: RUN/report.html, of several runs ./report.html)"
    )
    return _report


def _report(options: Namespace) -> int:
    from corenas_tool_report.page import write_report

    path = write_report(options.runs, options.out)
    print(json.dumps({"report": str(path)}) if options.json else path)
    return 0


@hookimpl
def corenas_commands() -> Mapping[str, Callable[[ArgumentParser], Callable[[Any], int]]]:
    """Offer `corenas report`."""
    return {"report": _parser}


@hookimpl
def corenas_event(event: Event) -> None:
    """Write the page of a run that has ended."""
    if isinstance(event, RunDone):
        from corenas_tool_report.page import write_report

        print(shown(f"report:    {write_report([event.folder])}"), file=sys.stderr)
