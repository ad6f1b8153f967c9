"""Curves, trials and the front of a run in TensorBoard, where CORENAS_TENSORBOARD says."""

from __future__ import annotations

import os
from functools import cache
from typing import TYPE_CHECKING

from corenas.hookspecs import hookimpl

if TYPE_CHECKING:
    from corenas.contracts import Event
    from corenas_tool_tensorboard.listener import Listener

VARIABLE = "CORENAS_TENSORBOARD"
"""The environment variable that names the folder; without it nothing is written."""


@cache
def the_listener(folder: str) -> Listener:
    """Return the listener of this process that writes into a folder, made at its first event."""
    from corenas_tool_tensorboard.listener import Listener

    return Listener(folder)


@hookimpl
def corenas_event(event: Event) -> None:
    """Write what the event tells."""
    if folder := os.environ.get(VARIABLE):
        the_listener(folder)(event)
