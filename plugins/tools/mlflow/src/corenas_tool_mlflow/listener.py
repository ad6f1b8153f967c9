"""What of a run is written, and when."""

from __future__ import annotations

import atexit
import os
import re
import time
from collections.abc import Mapping
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# MLflow refuses folders unless told otherwise; who names one means it, and its client knows no other store.
os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")

from mlflow.entities import Metric, Param
from mlflow.tracking import MlflowClient

from corenas.contracts import Event, Progress, RunDone, RunStarted, StageDone, StageStarted, TrialDone

FOLDER = "corenas.folder"
"""The tag by which a run that goes on is found again."""
_SECONDS = 5.0
"""How long figures wait for others that are sent with them."""


class Listener:
    """Writes the run under way as a run of an experiment."""

    def __init__(self, uri: str, experiment: str) -> None:
        self._client = MlflowClient(tracking_uri=uri)
        self._experiment = experiment
        self._run: str | None = None
        self._waiting: list[Metric] = []
        self._sent = time.monotonic()
        self._trials = 0
        self._rows: list[dict[str, Any]] = []
        atexit.register(self._flush)

    def __call__(self, event: Event) -> None:
        """Hear an event."""
        if isinstance(event, RunStarted):
            self._flush()
            self._run = self._begun(event)
            self._trials, self._rows = 0, []
        if self._run is None:  # a stage of no run
            return
        if isinstance(event, StageStarted) and event.stage == "search":
            self._trials += event.done  # a search that goes on, or another one after the first
        elif isinstance(event, Progress) and event.point:
            self._add(event.stage, event.figures, event.done)
        elif isinstance(event, TrialDone):
            self._trials += 1
            self._rows.append(event.trial.to_json())
            if event.trial.ok:
                self._add("trials", event.trial.metrics, self._trials)
        elif isinstance(event, StageDone):
            self._add("seconds", {event.stage: event.seconds}, 0)
            self._flush()
        elif isinstance(event, RunDone):
            self._finish(self._run, event.result)
            self._run = None

    def _begun(self, event: RunStarted) -> str:
        """Return the run, the one that was begun before where it goes on."""
        found = self._client.get_experiment_by_name(self._experiment)
        experiment = self._client.create_experiment(self._experiment) if found is None else found.experiment_id
        folder = str(event.folder.resolve())
        if event.resumed:
            quoted = folder.replace("'", "\\'")
            runs = self._client.search_runs([experiment], f"tags.`{FOLDER}` = '{quoted}'", max_results=1)
            if runs:
                self._client.update_run(runs[0].info.run_id, "RUNNING")
                return runs[0].info.run_id
        return self._client.create_run(experiment, run_name=event.name, tags={FOLDER: folder}).info.run_id

    def _add(self, group: str, figures: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        self._waiting += [Metric(_name(f"{group}/{key}"), float(n), now, step) for key, n in figures.items()]
        if len(self._waiting) > 500 or time.monotonic() - self._sent > _SECONDS:
            self._flush()

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        self._sent = time.monotonic()
        for at in range(0, len(waiting), 1000):  # as many as a call takes
            if self._run is not None:
                self._client.log_batch(self._run, metrics=waiting[at : at + 1000])

    def _finish(self, run: str, result: Mapping[str, Any]) -> None:
        if result:
            self._add("test", result["best"]["test"], 0)
            arch = [Param(_name(key), str(choice)) for key, choice in result["best"]["arch"].items()]
            for at in range(0, len(arch), 100):
                self._client.log_batch(run, params=arch[at : at + 100])
            self._client.log_dict(run, {"front": result["front"]}, "front.json")
        if self._rows:
            self._client.log_dict(run, {"trials": self._rows}, f"trials-{self._trials}.json")
        self._flush()
        self._client.set_terminated(run)


def _name(text: str) -> str:
    """Return a name that MLflow takes."""
    return re.sub(r"[^\w\-. /]", "_", text)
