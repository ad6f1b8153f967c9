"""Curves, trials and the front of a run in MLflow, at the server or in the folder that CORENAS_MLFLOW names."""

from __future__ import annotations

import os
from functools import cache
from typing import TYPE_CHECKING

from corenas.hookspecs import hookimpl

if TYPE_CHECKING:
    from corenas.contracts import Event
    from corenas_tool_mlflow.listener import Listener

VARIABLE = "CORENAS_MLFLOW"
"""The environment variable that names the tracking URI; without it nothing is written."""


@cache
def the_listener(uri: str) -> Listener:
    """Return the listener of this process that writes to a tracking URI, made at its first event."""
    from corenas_tool_mlflow.listener import Listener

    return Listener(uri, os.environ.get("MLFLOW_EXPERIMENT_NAME", "corenas"))


@hookimpl
def corenas_event(event: Event) -> None:
    """Write what the event tells."""
    if uri := os.environ.get(VARIABLE):
        the_listener(uri)(event)
