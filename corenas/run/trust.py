"""Whether a search can be trusted: its ranking of some archs against that of the same archs trained alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from corenas.objectives import Objective, Objectives, Trial
from corenas.ranking import kendall_tau, tau_interval


def spread_trials(trials: Iterable[Trial], objectives: Objectives, n: int) -> list[Trial]:
    """Return n trials spread over a front by their flops, with those of the fronts behind it where it has fewer.

    With one objective the other side of the front is flops. All trials, if there are not more.
    """
    left = [*{trial.arch: trial for trial in trials if trial.ok and trial.fidelity == 1}.values()]
    goals = objectives.objectives
    if len(goals) == 1 and goals[0].metric != "flops":
        goals = (*goals, Objective("flops", "min"))
    fronts, chosen = Objectives(goals, True), []
    while left and len(chosen) < n:
        front = sorted(fronts.front(left), key=lambda trial: trial.metrics["flops"])
        if not front:  # what is left has a figure that is no number
            break
        rows = np.unique(np.linspace(0, len(front) - 1, min(n - len(chosen), len(front))).round().astype(int))
        chosen += [front[row] for row in rows]
        there = {trial.arch for trial in front}
        left = [trial for trial in left if trial.arch not in there]
    return chosen


def agreement(trials: Sequence[Trial], alone: Sequence[float], objectives: Objectives) -> dict[str, Any]:
    """Return Kendall's tau, with its interval, between what a search went by and what networks reach alone.

    alone: more is better
    Beside it that of plain flops: a search that ranks no better than the size of networks does tells nothing.
    """
    searched = [objectives.objectives[0].gain(trial.metrics) for trial in trials]
    flops = [trial.metrics["flops"] for trial in trials]
    tau, by_flops, n = kendall_tau(searched, alone), kendall_tau(flops, alone), len(trials)
    archs = [trial.arch.digest for trial in trials]
    return {
        "archs": n,
        "objective": objectives.objectives[0].metric,
        "tau": tau,
        "interval": [*tau_interval(tau, n)],
        "tau_of_flops": by_flops,
        "interval_of_flops": [*tau_interval(by_flops, n)],
        "trials": [{"arch": a, "searched": s, "alone": b} for a, s, b in zip(archs, searched, alone, strict=True)],
    }


def sentence(agreed: Mapping[str, Any]) -> str:
    """Return in words what `agreement` found."""
    taus = [
        "not known" if tau is None or tau != tau else f"{tau:.2f} (95 %: {low:.2f} to {high:.2f})"
        for tau, (low, high) in (
            (agreed["tau"], agreed["interval"]),
            (agreed["tau_of_flops"], agreed["interval_of_flops"]),
        )
    ]
    who = f"the {agreed['metric']} of {agreed['archs']} of its archs trained alone"
    return f"Kendall's tau between the search's {agreed['objective']} and {who}: {taus[0]}; of plain flops: {taus[1]}"
