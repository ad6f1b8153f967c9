"""Every extension point of corenas, each one an empty documented function: the page a plugin author reads.

A plugin is a distribution with an entry point in the group `corenas`; the entry point names a module that has functions
of these names, marked with `hookimpl`. That module imports no torch: options are plain data, and their `start` or
`build` imports what it needs. `corenas.contracts` says what the offered classes fulfil.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from torch import nn

    from corenas import contracts

hookspec = pluggy.HookspecMarker("corenas")
hookimpl = pluggy.HookimplMarker("corenas")


@hookspec
def corenas_mutators() -> Mapping[str, type[contracts.Mutator]]:  # type: ignore[empty-body]
    """Offer mutators: the name in `[mutator] type = "…"` -> a frozen attrs class of its options.

    Called once, before the spec is read. A name that two distributions offer is usable from neither.
    """


@hookspec
def corenas_algorithms() -> Mapping[str, type[contracts.Algorithm]]:  # type: ignore[empty-body]
    """Offer algorithms: the name in `[algorithm] type = "…"` -> a frozen attrs class of its options.

    Called once, before the spec is read.
    """


@hookspec
def corenas_distillers() -> Mapping[str, type[contracts.Distiller]]:  # type: ignore[empty-body]
    """Offer distillers: the name in `[distiller] type = "…"` -> a frozen attrs class of its options.

    Called once, before the spec is read.
    """


@hookspec
def corenas_searchers() -> Mapping[str, type[contracts.Searcher]]:  # type: ignore[empty-body]
    """Offer searchers: the name in `[searcher] type = "…"` -> a frozen attrs class of its options.

    Called once, before the spec is read.
    """


@hookspec
def corenas_evaluators() -> Mapping[str, type[contracts.Evaluator]]:  # type: ignore[empty-body]
    """Offer evaluators: the name in `[[evaluators]] type = "…"` -> a frozen attrs class of its options.

    Called once, before the spec is read. `flops`, `params` and `activations` are always there.
    """


@hookspec
def corenas_backbones() -> Mapping[str, type[contracts.Backbone]]:  # type: ignore[empty-body]
    """Offer backbones: the name in `[backbone] type = "…"` -> a frozen attrs class of its options.

    Called once, before the spec is read.
    """


@hookspec
def corenas_tasks() -> Mapping[str, type[contracts.Task]]:  # type: ignore[empty-body]
    """Offer tasks: the name in `[task] type = "…"` -> a frozen attrs class of its options.

    Called once, before the spec is read.
    """


@hookspec
def corenas_executors() -> Mapping[str, type[contracts.Executor]]:  # type: ignore[empty-body]
    """Offer executors, which run trials elsewhere: name -> a frozen attrs class of its options.

    Called once, before the spec is read.
    """


@hookspec
def corenas_exporters() -> Mapping[str, type[contracts.Exporter]]:  # type: ignore[empty-body]
    """Offer file formats: the name in `[export] formats` -> a frozen attrs class of its options.

    Called once, before the spec is read.
    """


@hookspec
def corenas_commands() -> Mapping[str, Callable[[ArgumentParser], Callable[[Any], int]]]:  # type: ignore[empty-body]
    """Offer sub-commands of `corenas`: name -> a function that adds arguments to its parser and returns the command.

    Called once, when the command line is read; the command gets the parsed arguments and returns an exit status. Its
    parser has `--json` already; the first line of the function's docstring is its help.
    """


@hookspec
def corenas_mutables() -> Mapping[type[nn.Module], type[nn.Module]]:  # type: ignore[empty-body]
    """Offer searchable layers: reference layer class -> searchable class, used by conversion.

    Called when a model is converted, so this one may import torch.
    """


@hookspec
def corenas_event(event: contracts.Event) -> None:
    """Hear of everything that happens in a run, as frozen event classes: progress bars, reports, trackers.

    Called in the main process at each event, quickly; a listener that raises is reported and does not stop the run.
    """
