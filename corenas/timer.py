"""When something that need not happen each time is due."""

from __future__ import annotations

import time

PROGRESS_EVERY_S = 0.25
"""Seconds between two signs of life."""


class Timer:
    """Says at most once in so many seconds that something is due."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.last = seconds, time.perf_counter()

    def is_due(self) -> bool:
        """Return whether the time has passed since the last time that it had."""
        now = time.perf_counter()
        due = now - self.last > self.seconds
        if due:
            self.last = now
        return due
