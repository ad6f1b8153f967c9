"""What a run directory holds, read for a page: whatever is missing of it is left empty."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from attrs import field, frozen

from corenas.errors import Fault, UserError
from corenas.objectives import Objective, Objectives, Trial, hypervolume
from corenas.space import Arch, SearchSpace
from corenas.store import Store

COSTS = ("flops", "params", "activations")
"""Metrics that are computed from an arch alone."""


@frozen
class Found:
    """The best arch of one search.

    constraints: what it had to obey, as text; "" for nothing
    test: metrics on test data; none of a run that has not come so far
    folder: where it was exported to, or None
    card: what its `cost.json` says
    seeds: metrics on test data of trainings with other seeds too, with their mean and spread
    """

    constraints: str
    arch: Arch
    metrics: Mapping[str, float]
    test: Mapping[str, float] = field(factory=dict)
    folder: Path | None = None
    card: Mapping[str, Any] = field(factory=dict)
    seeds: Mapping[str, Any] = field(factory=dict)

    def files(self) -> list[Path]:
        """What was exported."""
        return sorted(self.folder.iterdir()) if self.folder else []


@frozen(slots=False)
class Run:
    """A run as its directory tells it.

    searches: the constraints of each search, as text
    trials: those of each search
    curves: stage -> its points, each with the steps done and figures
    finished: whether it has its result
    trust: how far its ranking of archs is that of the same trained alone, where it was asked
    cut: how its splits were made, in words, "" where that is not known
    """

    folder: Path
    spec: Mapping[str, Any]
    splits: Mapping[str, int]
    versions: Mapping[str, Any]
    device: str | None
    seconds: Mapping[str, float]
    units: Mapping[str, Mapping[str, str]]
    objectives: Objectives
    searches: Sequence[str]
    trials: Sequence[Sequence[Trial]]
    curves: Mapping[str, Sequence[tuple[int, Mapping[str, float]]]]
    founds: Sequence[Found]
    finished: bool
    trust: Mapping[str, Any] | None = None
    cut: str = ""

    @property
    def name(self) -> str:
        """As the spec says, else that of its folder."""
        return str(self.spec.get("name") or self.folder.resolve().name)

    @cached_property
    def all_trials(self) -> list[Trial]:
        """The trials of all searches."""
        return [trial for trials in self.trials for trial in trials]

    @property
    def objective(self) -> str | None:
        """The metric of the first objective."""
        return self.objectives.objectives[0].metric if self.objectives.objectives else None

    @cached_property
    def space(self) -> SearchSpace | None:
        """The space, or None where it cannot be read."""
        try:
            return SearchSpace.from_table(self.spec["space"])
        except (KeyError, UserError):
            return None

    def unit(self, metric: str) -> str:
        """The unit of a metric, "" if nothing is known."""
        return str(self.units.get(metric, {}).get("unit", ""))

    def direction(self, metric: str) -> Any:
        """Whether more of a metric is better: "max" or "min"."""
        wanted = {objective.metric: objective.direction for objective in self.objectives.objectives}
        return self.units.get(metric, {}).get("direction") or wanted.get(metric, "min" if metric in COSTS else "max")

    def noisy(self, metric: str, split: str) -> int:
        """How many samples leave their binomial noise in a metric; 0 if it is no share of them."""
        return self.samples(split) if self.units.get(metric, {}).get("share") else 0

    def samples(self, split: str) -> int:
        """How many samples a split has; 0 if that is not known."""
        return int(self.splits.get(split, 0))


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Runs, finished or not, each once. Raises UserError with every folder that holds none."""
    runs: dict[Path, Run] = {}
    faults: list[Fault] = []
    for folder in folders:
        try:
            if folder.resolve() not in runs:
                runs[folder.resolve()] = read_run(folder)
        except UserError as error:
            faults += error.faults
    if faults:
        raise UserError(faults=faults)
    return [*runs.values()]


def read_run(folder: Path) -> Run:
    """A run, finished or not. Raises UserError for a folder that holds none."""
    if not (folder / "run.sqlite").is_file():
        hint = "it has no run.sqlite; a run directory is what corenas run writes, runs/NAME for instance"
        raise UserError("no run in this folder", file=str(folder), hint=hint)
    store = Store(folder / "run.sqlite", readonly=True)
    try:
        return _run(folder, store)
    finally:
        store.close()


def _run(folder: Path, store: Store) -> Run:
    spec, result = store.get("spec") or {}, store.get("result")
    units = store.get("metrics") or {}
    seconds = store.get("seconds") or {}
    searches = store.get("searches")
    trials = [store.trials()] if searches is None else [store.trials(i) for i in range(len(searches))]
    if searches is None:
        searches = [_constraints(spec)]
    objectives = _objectives(store.get("objectives"), spec, units)
    stages = ["train", "retrain", *(f"retrain-{i}" for i in range(2, len(searches) + 1)), *seconds]
    curves = {stage: store.curve(stage) for stage in dict.fromkeys(stages)}
    return Run(
        folder,
        spec,
        store.get("splits") or {},
        store.get("versions") or {},
        _device(store),
        seconds,
        units,
        objectives,
        searches,
        trials,
        {stage: curve for stage, curve in curves.items() if curve},
        _results(folder, result, searches) if result else _so_far(objectives, searches, trials),
        result is not None,
        (result or {}).get("trust"),
        store.get("cut") or "",
    )


def _results(folder: Path, result: Mapping[str, Any], searches: Sequence[str]) -> list[Found]:
    """What a finished run says that it found."""
    rows = result.get("table") or []
    if not rows and result.get("best"):
        rows = [{"constraints": " / ".join(filter(None, searches)), "folder": "best", **result["best"]}]
    founds = []
    for row in rows:
        if not row.get("arch"):  # a search that found nothing
            continue
        exported = folder / Path(row.get("folder") or "best").name
        founds.append(
            Found(
                str(row.get("constraints") or ""),
                Arch(row["arch"]),
                row.get("metrics") or {},
                row.get("test") or {},
                exported if exported.is_dir() else None,
                _card(exported),
                row.get("seeds") or {},
            )
        )
    return founds


def _so_far(objectives: Objectives, searches: Sequence[str], trials: Sequence[Sequence[Trial]]) -> list[Found]:
    """The best trial of each search of a run that has not ended."""
    founds = []
    for text, some in zip(searches, trials, strict=True):
        best = objectives.leaders(counting(objectives, some))[:1] if objectives.objectives else []
        founds += [Found(text, trial.arch, trial.metrics) for trial in best]
    return founds


def _device(store: Store) -> str | None:
    return store.get("device") or (store.get("versions") or {}).get("device")


def _card(folder: Path) -> Mapping[str, Any]:
    try:
        card = json.loads((folder / "cost.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return card if isinstance(card, dict) else {}


def _constraints(spec: Mapping[str, Any]) -> str:
    """Constraints as the spec writes them."""
    asked = (spec.get("search") or {}).get("constraints") or {}
    return " and ".join(f"{metric}: {limit}" for metric, limit in asked.items()) if isinstance(asked, dict) else ""


def _objectives(noted: Mapping[str, Any] | None, spec: Mapping[str, Any], units: Mapping[str, Any]) -> Objectives:
    """The objectives that were noted, else what the spec names."""
    if noted is None:
        names = [goal for goal in (spec.get("search") or {}).get("objectives") or [] if isinstance(goal, str)]
        return Objectives(tuple(Objective(name, units.get(name, {}).get("direction", "max")) for name in names))
    goals = [Objective(goal["metric"], goal["direction"], goal["weight"]) for goal in noted["objectives"]]
    return Objectives(tuple(goals), noted["pareto"], noted["bin_metric"], noted["bin_width"])


def counting(objectives: Objectives, trials: Sequence[Trial]) -> list[Trial]:
    """The trials that may win: done, with the whole effort, and with every objective measured."""
    names = {objective.metric for objective in objectives.objectives}
    return [trial for trial in trials if trial.ok and trial.fidelity == 1 and names <= trial.metrics.keys()]


def trade_off(run: Run, trials: Sequence[Trial], metric: str) -> list[Trial]:
    """The Pareto front of the first objective against a metric, by that metric."""
    if run.objective is None:
        return []
    first, other = run.objectives.objectives[0], Objective(metric, run.direction(metric))
    some = [trial for trial in counting(run.objectives, trials) if metric in trial.metrics]
    front = Objectives((Objective(first.metric, first.direction), other), pareto=True).front(some)
    return sorted(front, key=lambda trial: trial.metrics[metric])


@frozen
class Growth:
    """How the hypervolume of each search's front grew, in percent of the box between two points.

    reference, ideal: the worst and the best of each objective among the trials that count, of all searches
    points: of each search, after how many trials it was how much; where it changed, and at the end
    """

    reference: Mapping[str, float]
    ideal: Mapping[str, float]
    points: Sequence[Sequence[tuple[int, float]]]


def growth(run: Run) -> Growth | None:
    """How the fronts of a run that searches for trade-offs grew; None where there is nothing to compare."""
    goals = run.objectives.objectives
    if not run.objectives.pareto or len(goals) < 2:
        return None
    counted = [set(map(id, counting(run.objectives, trials))) for trials in run.trials]
    gains = [
        [[goal.gain(trial.metrics) if id(trial) in some else -math.inf for goal in goals] for trial in trials]
        for trials, some in zip(run.trials, counted, strict=True)
    ]
    rows = np.array([row for some in gains for row in some if all(map(math.isfinite, row))]).reshape(-1, len(goals))
    if len(rows) < 2 or (np.ptp(rows, axis=0) == 0).any():
        return None
    worst, best = rows.min(axis=0), rows.max(axis=0)
    points = [_grown(np.array(some).reshape(-1, len(goals)), worst, best) for some in gains]
    signs = [1 if goal.direction == "max" else -1 for goal in goals]
    ends = [{goal.metric: sign * x for goal, sign, x in zip(goals, signs, end, strict=True)} for end in (worst, best)]
    return Growth(*ends, points)


def _grown(gains: np.ndarray, worst: np.ndarray, best: np.ndarray) -> list[tuple[int, float]]:
    scaled = (gains - worst) / (best - worst)
    front, points = np.zeros((0, gains.shape[1])), [(0, 0.0)]
    for n, row in enumerate(scaled, 1):
        if np.isfinite(row).all() and not (front >= row).all(axis=1).any():
            front = np.vstack([front[~(row >= front).all(axis=1)], row])
            points.append((n, 100 * hypervolume(front, np.zeros(len(row)))))
    return [*points, (len(gains), points[-1][1])] if points[-1][0] < len(gains) else points
