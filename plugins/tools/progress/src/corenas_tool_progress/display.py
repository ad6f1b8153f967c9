"""The two ways to show progress: bars in a terminal, lines in a log."""

from __future__ import annotations

import atexit
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

from corenas.errors import shown
from corenas_tool_progress.listener import Display, Stage

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID


NARROWEST = 12
"""Columns that a bar and a name need; `COLUMNS=0`, which some systems set, would show nothing at all."""


def on_stderr() -> Display:
    """Bars if stderr is a terminal that can move its cursor, else lines."""
    if sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown"):
        from rich.console import Console

        console = Console(stderr=True)
        if console.width >= NARROWEST:
            return Bars(console)
    return Lines()


class Lines:
    """Lines, few of them: a stage is shown when it begins, then every 5 seconds, after a long time every minute.

    file: where to, stderr as it is at that moment unless given
    """

    def __init__(self, file: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.file = file
        self.clock = clock
        self._shown: dict[Stage, float] = {}

    def say(self, line: str) -> None:
        """Write a line, at once."""
        print(shown(line), file=self.file or sys.stderr, flush=True)

    def show(self, stage: Stage) -> None:
        """Write where the stage is, if the last time is long enough ago."""
        now = self.clock()
        pause = min(60.0, max(5.0, stage.seconds / 50))
        if stage not in self._shown or now - self._shown[stage] >= pause:
            self._shown[stage] = now
            self.say(f"{stage.name}: {stage.text()}")

    def drop(self, stage: Stage) -> None:
        """Forget the stage."""
        self._shown.pop(stage, None)


class Bars:
    """A bar for each stage under way, below the lines that stay; stdout is left to the command.

    It is drawn at events, ten times a second at most, and by no thread of its own: processes that load data are forked
    meanwhile, and a lock that a thread holds at that moment stays locked in them.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        self.console = console
        self.clock = clock
        self._bar = BarColumn(bar_width=24)
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            self._bar,
            TextColumn("{task.fields[text]}", markup=False),
            console=console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
        )
        self._tasks: dict[Stage, TaskID] = {}
        self._drawn = -1.0
        atexit.register(self.progress.stop)  # a run that is interrupted gives the cursor back, too

    def say(self, line: str) -> None:
        """Print a line above the bars."""
        self.console.print(shown(line), markup=False, highlight=False, soft_wrap=True)

    def show(self, stage: Stage) -> None:
        """Move the stage's bar, drawing it if the last time is long enough ago."""
        new = stage not in self._tasks
        if new:
            self._tasks[stage] = self.progress.add_task(stage.name, text="")
            self.progress.start()
        now = self.clock()
        if new or now - self._drawn >= 0.1:
            self._drawn = now
            texts = self._fitted({each: shown(each.text()) for each in self._tasks})
            for each, task in self._tasks.items():
                total = each.total if each.total > 0 else None
                self.progress.update(task, total=total, completed=each.done, text=texts[each])
            self.progress.refresh()

    def _fitted(self, texts: dict[Stage, str]) -> dict[Stage, str]:
        """Fit texts into the terminal: in a narrow one the bar is shorter first, then the texts; names stay."""
        left = self.console.width - max(len(stage.name) for stage in texts) - 2
        self._bar.bar_width = min(24, max(4, min(8, left // 3), left - max(map(len, texts.values()))))
        room = max(1, left - self._bar.bar_width)
        return {stage: text if len(text) <= room else f"{text[: room - 1]}…" for stage, text in texts.items()}

    def drop(self, stage: Stage) -> None:
        """Remove the stage's bar; with the last one the terminal is as it was."""
        task = self._tasks.pop(stage, None)
        if task is not None:
            self.progress.remove_task(task)
        if not self._tasks:
            self.progress.stop()
