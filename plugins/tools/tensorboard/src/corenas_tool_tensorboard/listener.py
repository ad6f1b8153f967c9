"""What of a run is written, and when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from corenas.contracts import Event, Note, Progress, RunDone, RunStarted, StageStarted, TrialDone


class Listener:
    """Writes the run under way into a folder of its name below `folder`."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        self._writer: SummaryWriter | None = None
        self._trials = self._notes = 0

    def __call__(self, event: Event) -> None:
        """Hear an event."""
        if isinstance(event, RunStarted):
            self._close()
            self._writer = SummaryWriter(str(self._folder / event.name))
            self._trials = self._notes = 0
        if self._writer is None:  # a stage of no run
            return
        if isinstance(event, StageStarted) and event.stage == "search":
            self._trials += event.done  # a search that goes on, or another one after the first
        elif isinstance(event, Progress) and event.point:
            self._scalars(event.stage, event.figures, event.done)
        elif isinstance(event, TrialDone):
            self._trials += 1
            if event.trial.ok:
                self._scalars("trials", event.trial.metrics, self._trials)
        elif isinstance(event, Note):
            self._notes += 1
            self._writer.add_text("notes", event.text, self._notes)
        elif isinstance(event, RunDone):
            if event.result:
                self._result(self._writer, event.result)
            self._close()

    def _scalars(self, group: str, figures: Mapping[str, float], step: int) -> None:
        assert self._writer is not None
        for name, number in figures.items():
            self._writer.add_scalar(f"{group}/{name}", number, step)

    def _result(self, writer: SummaryWriter, result: Mapping[str, Any]) -> None:
        for name, number in result["best"]["test"].items():
            writer.add_scalar(f"test/{name}", number)
        writer.add_text("front", markdown([trial["metrics"] for trial in result["front"]]))
        writer.add_text("best", markdown([{"variable": k, "choice": v} for k, v in result["best"]["arch"].items()]))

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as a table."""
    keys = [*dict.fromkeys(key for row in rows for key in row)]
    lines = [keys, ["---"] * len(keys), *([str(row.get(key, "")) for key in keys] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
