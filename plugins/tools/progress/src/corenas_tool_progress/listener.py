"""What is said of a run's events, and how fast its stages go."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import Protocol

from corenas.contracts import Event, Note, Progress, RunDone, RunStarted, StageDone, StageStarted, TrialDone
from corenas.errors import shown
from corenas.objectives import amount
from corenas_tool_progress.closing import closing_lines

WINDOW = 30.0
"""Seconds over which the rate of a stage is averaged."""


class Display(Protocol):
    """Where it is shown."""

    def say(self, line: str) -> None:
        """Show a line that stays."""
        ...

    def show(self, stage: Stage) -> None:
        """Show how far a stage is; called as often as there is something new."""
        ...

    def drop(self, stage: Stage) -> None:
        """Show a stage no more; the last one to go releases the terminal."""
        ...


class Stage:
    """How far a stage is, how fast it goes and how long it will take.

    clock: gives seconds
    """

    def __init__(self, name: str, total: int, unit: str, done: int, clock: Callable[[], float]) -> None:
        self.name = name
        self.total = total
        self.unit = unit
        self.clock = clock
        self.figures: Mapping[str, float] = {}
        self.states: Counter[str] = Counter()
        self.error: str | None = None
        self.began = clock()
        self._marks = deque([(self.began, done)])

    @property
    def done(self) -> int:
        """Units done, those of an earlier run included."""
        return self._marks[-1][1]

    @property
    def seconds(self) -> float:
        """Since it began, here."""
        return self.clock() - self.began

    def reach(self, done: int, figures: Mapping[str, float]) -> None:
        """Note that it has come so far, now."""
        now = self.clock()
        if len(self._marks) > 1 and now - self._marks[-2][0] < WINDOW / 100:  # few marks, however many steps
            self._marks.pop()
        self._marks.append((now, done))
        while len(self._marks) > 2 and now - self._marks[1][0] >= WINDOW:
            self._marks.popleft()
        self.figures = {**self.figures, **figures}

    @property
    def rate(self) -> float | None:
        """Units a second over the last half minute, or a longer time if units take longer; None if not known yet."""
        (then, before), (now, done) = self._marks[0], self._marks[-1]
        return (done - before) / (now - then) if now > then and done > before else None

    @property
    def left(self) -> float | None:
        """Seconds that it will take from now on; None if not known."""
        if not self.rate or self.total <= 0:
            return None
        return max(0.0, (self.total - self.done) / self.rate - (self.clock() - self._marks[-1][0]))

    def text(self) -> str:
        """`1,200/10,000 steps, 85.3 steps/s, 1:43 left, loss 2.31`."""
        parts = [f"{self.done:,}/{self.total:,} {self.unit}" if self.total > 0 else f"{self.done:,} {self.unit}"]
        if self.rate:
            parts.append(f"{self.rate:.3g} {self.unit}/s" if self.rate < 1000 else f"{self.rate:,.0f} {self.unit}/s")
        if self.left is not None:
            parts.append(f"{duration(self.left)} left")
        parts += [f"{count} {state}" for state, count in sorted(self.states.items()) if state != "done"]
        return ", ".join([*parts, *self.figure_texts(self.figures)])

    def figure_texts(self, figures: Mapping[str, float]) -> list[str]:
        """`["loss 2.31", "flops 200M"]`; where trials are measured, the figures are those of the best so far."""
        texts = [f"{key} {amount(x) if 1e4 <= abs(x) < math.inf else format(x, '.4g')}" for key, x in figures.items()]
        return [f"best {', '.join(texts)}"] if texts and self.states else texts


def duration(seconds: float) -> str:
    """Seconds as people say them: `0:07`, `1:43`, `2:03:10`, `3 d 04:10:00`."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days} d {h:02}:{m:02}:{s:02}"
    return f"{h}:{m:02}:{s:02}" if h else f"{m}:{s:02}"


class Listener:
    """Keeps the stages that are under way. What is heard of a stage that is not under way is not shown."""

    def __init__(self, display: Display, clock: Callable[[], float] = time.monotonic) -> None:
        self.display = display
        self.clock = clock
        self.stages: dict[str, Stage] = {}

    def __call__(self, event: Event) -> None:
        """Hear an event."""
        match event:
            case RunStarted():
                self._end_all()
                self.display.say(f"{event.name}: {'goes on' if event.resumed else 'begins'} in {event.folder}")
            case StageStarted():
                self._end(event.stage)
                stage = Stage(event.stage, event.total, event.unit, event.done, self.clock)
                self.stages[event.stage] = stage
                self.display.show(stage)
            case Progress():
                if event.stage in self.stages:
                    self.stages[event.stage].reach(event.done, event.figures)
                    self.display.show(self.stages[event.stage])
            case TrialDone():
                if self.stages:  # trials belong to the stage that began last
                    stage = [*self.stages.values()][-1]
                    stage.states[event.trial.state] += 1
                    stage.error = event.trial.error or stage.error
                    self.display.show(stage)
            case StageDone():
                stage = self._end(event.stage) or Stage(event.stage, 0, "", 0, self.clock)
                parts = [f"done in {duration(event.seconds)}", *stage.figure_texts(event.figures)]
                self.display.say(f"{event.stage}: {', '.join(parts)}")
                if stage.states["failed"]:
                    failed = f"{stage.states['failed']} of {stage.states.total()} trials failed"
                    reason = shown(stage.error or "unknown")
                    self.display.say(f"{event.stage}: {failed}, the last one because: {reason}")
            case Note():
                for line in event.text.split("\n"):
                    self.display.say(shown(line))
            case RunDone():
                self._end_all()
                for line in closing_lines(event):
                    self.display.say(line)

    def _end(self, name: str) -> Stage | None:
        stage = self.stages.pop(name, None)
        if stage is not None:
            self.display.drop(stage)
        return stage

    def _end_all(self) -> None:
        for name in [*self.stages]:
            self._end(name)
