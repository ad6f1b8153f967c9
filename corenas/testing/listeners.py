"""What every listener promises: `@pytest.mark.parametrize("check", listener_checks)` in a plugin's tests.

Each check takes the function `corenas_event`, and by keyword the folder of a run if the listener reads it. Needs no
torch.
"""

from __future__ import annotations

import io
import math
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from corenas.contracts import Event, Metric, Note, Progress, RunDone, RunStarted, StageDone, StageStarted, TrialDone
from corenas.objectives import Trial
from corenas.space import Arch
from corenas.testing.components import global_generators_untouched

Listener = Callable[[Event], Any]
_BEST = {"arch": {"width": 8, "op": "skip"}, "metrics": {"top1": 70.0, "flops": 2e8}, "test": {"top1": 69.5}}
RESULT = {
    "run": "small",
    "best": _BEST,
    "front": [_BEST],
    "trials": 4,
    "seconds": {"train": 103.0, "search": 7.0},
    "table": [{**_BEST, "constraints": "flops at most 200M", "folder": "best"}],
}
"""What `corenas run --json` prints of such a run."""


def events(folder: Path, resumed: bool = False) -> list[Event]:
    """A run from its first event to its last, with trials in all states."""
    arch = Arch({"width": 8, "op": "skip"})
    trials = [
        Trial(arch, {"top1": 70.0, "flops": 2e8}),
        Trial(arch, {"flops": 3e8}, "infeasible", error="not flops <= 2e8"),
        Trial(arch, state="failed", error="out of memory"),
        Trial(arch, {"top1": math.nan}, "stopped", fidelity=0.25),
    ]
    return [
        RunStarted("small", folder, resumed),
        StageStarted("train", 100, "steps", 50 if resumed else 0),
        *(Progress("train", i, {"loss": 2.5 / i, "lr": 0.05}, i % 10 == 0) for i in range(1, 101)),
        Note("look [bold]here[/bold], 100% of {it}"),
        StageDone("train", 103.0, {"loss": 0.025}),
        StageStarted("search", 4, "trials"),
        *map(TrialDone, trials),
        Progress("search", 4, {"top1": 70.0}),
        StageDone("search", 7.0, {"top1": 70.0}),
        StageStarted("export", 0, "files"),
        StageDone("export", 0.5),
        RunDone(folder, RESULT, {"train": 9, "valid": 5, "test": 4}, {"top1": Metric("%", share=True)}),
    ]


def _heard(listener: Listener, folder: Path | None, wanted: Callable[[Path], list[Event]]) -> tuple[str, float]:
    """What a listener writes to stdout, and how many seconds it takes."""
    with tempfile.TemporaryDirectory() as temporary, redirect_stdout(io.StringIO()) as out:
        told = wanted(folder or Path(temporary))
        before = repr(told)
        start = time.perf_counter()
        for event in told:
            listener(event)
        seconds = time.perf_counter() - start
        assert repr(told) == before, "changes the events that it hears"
        return out.getvalue(), seconds


def hears_every_event(listener: Listener, folder: Path | None = None) -> None:
    """A whole run, one that goes on, and one that begins before another has ended; events stay as they are."""
    for wanted in (events, lambda folder: events(folder, True), lambda folder: events(folder)[:20], events):
        _heard(listener, folder, wanted)


def hears_what_it_does_not_expect(listener: Listener, folder: Path | None = None) -> None:
    """Stages of any name, figures that are no numbers, and events of stages that never began."""
    odd = [
        Progress("unheard of", 3, {"loss": math.nan, "new": math.inf}),
        StageDone("unheard of", 0.0),
        StageStarted("other", 0, ""),
        Progress("other", 10**9),
        TrialDone(Trial(Arch({}))),
        Note(""),
    ]
    _heard(listener, folder, lambda folder: odd)


def writes_nothing_to_stdout(listener: Listener, folder: Path | None = None) -> None:
    """stdout is the command's: what a person watches goes to stderr."""
    written, _ = _heard(listener, folder, events)
    assert not written, f"writes to stdout: {written[:80]!r}"


def is_quick(listener: Listener, folder: Path | None = None) -> None:
    """A run waits for it: a thousand signs of life take less than a second."""
    _heard(listener, folder, lambda folder: events(folder)[:3])  # what it imports at first is not counted
    signs = [Progress("train", i, {"loss": 1.0}) for i in range(1000)]
    _, seconds = _heard(listener, folder, lambda folder: [StageStarted("train", 1000, "steps"), *signs])
    assert seconds < 1, f"takes {seconds:.1f} s for 1,000 events"


def touches_no_global_generator(listener: Listener, folder: Path | None = None) -> None:
    """A run is the same whoever listens."""
    with global_generators_untouched():
        _heard(listener, folder, events)


listener_checks = [
    hears_every_event,
    hears_what_it_does_not_expect,
    writes_nothing_to_stdout,
    is_quick,
    touches_no_global_generator,
]
"""What every listener keeps to."""
