"""Progress of a run on stderr: bars in a terminal, plain lines elsewhere."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from corenas.hookspecs import hookimpl

if TYPE_CHECKING:
    from corenas.contracts import Event
    from corenas_tool_progress.listener import Listener


@cache
def the_listener() -> Listener:
    """The listener of this process, made at its first event; whether stderr is a terminal is decided then."""
    from corenas_tool_progress.display import on_stderr
    from corenas_tool_progress.listener import Listener

    return Listener(on_stderr())


@hookimpl
def corenas_event(event: Event) -> None:
    """Show how far the run is."""
    the_listener()(event)
