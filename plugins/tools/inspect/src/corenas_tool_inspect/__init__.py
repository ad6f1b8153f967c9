"""The commands that look at specs, runs and plugins: check, cost, trials, export, evaluate, plugins, show."""

from __future__ import annotations

import importlib
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from corenas.cli import add_plugin_option
from corenas.hookspecs import hookimpl

Command: TypeAlias = Callable[[Namespace], int]


def _command(name: str) -> Command:
    """The command of a module here, imported when it runs."""
    return lambda options: importlib.import_module(f"corenas_tool_inspect.{name}").command(options) or 0


def _spec(parser: ArgumentParser) -> None:
    parser.add_argument("spec", metavar="SPEC", help="a TOML file")
    _set(parser)


def _set(parser: ArgumentParser) -> None:
    add_plugin_option(parser)
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="override a key of the spec")


def add_check(parser: ArgumentParser) -> Command:
    """All mistakes of a spec; or what would run, how long and with how much memory."""
    _spec(parser)
    parser.add_argument("--no-data", action="store_true", help="read no data, and try no step")
    parser.add_argument("--no-try", action="store_true", help="try no step, so that nothing is told of time and memory")
    return _command("check")


def add_cost(parser: ArgumentParser) -> Command:
    """Flops, params and activations of archs."""
    parser.add_argument("spec", metavar="SPEC|RUN", help="a TOML file, or a run directory")
    _set(parser)
    text = "a TOML file, min or max (of flops), default, or random:SEED; without one min, default and max"
    parser.add_argument("--arch", metavar="ARCH", action="append", default=[], help=text)
    parser.add_argument("--n", metavar="N", type=int, default=1, help="how many archs random:SEED draws")
    return _command("cost")


def add_trials(parser: ArgumentParser) -> Command:
    """The trials of a run."""
    parser.add_argument("run", metavar="RUN", type=Path, help="a run directory")
    parser.add_argument("--pareto", action="store_true", help="only those that no other beats")
    parser.add_argument("--sort", metavar="METRIC", help="the best of it first")
    parser.add_argument("--top", metavar="N", type=int, help="the first N alone")
    parser.add_argument("--csv", action="store_true", help="as CSV")
    return _command("trials")


def add_export(parser: ArgumentParser) -> Command:
    """Write a subnet of a run, or of a spec with fresh weights, as a network of its own."""
    parser.add_argument("source", metavar="RUN|SPEC", help="a run directory, or a TOML file")
    _set(parser)
    parser.add_argument(
        "--arch", metavar="ARCH", help="as of `cost`; of a run also a trial's digest, or best, its default"
    )
    parser.add_argument("--front", action="store_true", help="of a run: every network of its front, a folder each")
    parser.add_argument("--to", metavar="DIR", type=Path, required=True, help="the folder to write")
    parser.add_argument(
        "--format", metavar="NAME", action="append", default=[], help="an exporter (default: those of the spec)"
    )
    return _command("export")


def add_evaluate(parser: ArgumentParser) -> Command:
    """The task's metrics of archs of a run, with its weights, on validation or test data."""
    parser.add_argument("run", metavar="RUN", type=Path, help="a run directory")
    _set(parser)
    text = "as of `cost`, a trial's digest, best (its default), best-2, or begin: the largest, with its first weights"
    parser.add_argument("--arch", metavar="ARCH", action="append", default=[], help=text)
    text = "time the networks as well, in turn: as the run's evaluators say, or on this device"
    parser.add_argument("--latency", action="store_true", help=text)
    parser.add_argument("--split", choices=["valid", "test"], default="valid", help="on which data (default: valid)")
    return _command("evaluate")


def add_plugins(parser: ArgumentParser) -> Command:
    """What is installed, and what is broken and why."""
    add_plugin_option(parser)
    parser.add_argument("--deep", action="store_true", help="import all modules of all plugins")
    return _command("plugins")


def add_show(parser: ArgumentParser) -> Command:
    """The options of a component, with defaults and what they mean; of a backbone a search space as well."""
    parser.add_argument("kind", nargs="?", metavar="KIND", help="for instance searchers; or a table of a spec: train")
    parser.add_argument("name", nargs="?", metavar="NAME", help="for instance evolution")
    parser.add_argument("--space", metavar="FILE", help="the space to draw, of a backbone (default: its example)")
    add_plugin_option(parser)
    parser.add_argument("--image", metavar="N", type=int, default=224, help="side of the images that FILE is for")
    return _command("show")


@hookimpl
def corenas_commands() -> dict[str, Any]:
    """The commands `check`, `cost`, `trials`, `export`, `evaluate`, `plugins` and `show`."""
    added = (add_check, add_cost, add_trials, add_export, add_evaluate, add_plugins, add_show)
    return {function.__name__.removeprefix("add_"): function for function in added}
