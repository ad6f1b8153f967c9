"""What `corenas trials` says."""

from __future__ import annotations

import csv
import math
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

from corenas.errors import UserError, did_you_mean
from corenas.objectives import Objective, Objectives, Trial
from corenas.store import Store
from corenas_tool_inspect.table import print_json, print_table


def command(options: Namespace) -> None:
    """Print it."""
    store = Store(options.run / "run.sqlite", readonly=True)
    searches = store.get("searches", [""])
    listed = [(wanted, trial) for number, wanted in enumerate(searches) for trial in store.trials(number)]
    if options.pareto:
        asked = store.get("objectives")
        if asked is None:
            raise UserError("this run has not begun to search", file=str(options.run))
        objectives = [Objective(**goal) for goal in asked["objectives"]]
        known = any("flops" in trial.metrics for _, trial in listed)
        if not asked["pareto"] and len(objectives) == 1 and known:  # one goal has no trade-off: cost is the other side
            objectives.append(Objective("flops", "min"))
        best = Objectives(tuple(objectives), True, asked["bin_metric"], asked["bin_width"])
        listed = [("", trial) for trial in best.front(trial for _, trial in listed if trial.fidelity == 1)]
    marked = _best(store, listed)
    if options.sort is not None:
        listed = _sorted(listed, options.sort, store.get("metrics", {}))
    if options.top is not None:
        if options.top < 1:
            raise UserError(f"--top {options.top}: expected at least 1")
        listed = listed[: options.top]
    if options.json:
        keys = ["arch", "metrics", "state", "seconds"]
        keys += ["fidelity"] if any(t.fidelity < 1 for _, t in listed) else []
        rows = [trial.to_json() for _, trial in listed]
        failed = [*keys, "error"]
        print_json({"trials": [{k: row[k] for k in (failed if row["state"] == "failed" else keys)} for row in rows]})
        return
    rows = []
    for wanted, trial in listed:
        star = {"best": "*" if id(trial) in marked else ""} if marked and not options.csv else {}
        row: dict[str, Any] = star | {"arch": trial.arch.digest, "state": trial.state}
        row |= {"search": wanted} if len(searches) > 1 and not options.pareto else {}
        row |= {"fidelity": trial.fidelity} if any(t.fidelity < 1 for _, t in listed) else {}
        why = {"error": trial.error or ""} if any(t.error for _, t in listed) else {}
        rows.append(row | dict(trial.metrics) | {"seconds": trial.seconds} | why)
    if options.csv:
        full = [trial.row | row for (_, trial), row in zip(listed, rows, strict=True)]
        writer = csv.DictWriter(sys.stdout, [*dict.fromkeys(key for row in full for key in row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(full)
    else:
        print_table(rows)


def _best(store: Store, listed: Sequence[tuple[str, Trial]]) -> set[int]:
    """Return which trials (their ids) are those of the networks that the run has found."""
    result = store.get("result")
    found = [row["arch"] for row in result["table"]] if result else []
    return {id(trial) for _, trial in listed if trial.fidelity == 1 and dict(trial.arch) in found}


def _sorted(
    listed: Sequence[tuple[str, Trial]], metric: str, metrics: Mapping[str, Mapping[str, Any]]
) -> list[tuple[str, Trial]]:
    """Return trials with the best of a metric first, of equal ones the cheaper, those without it last.

    Raises UserError if none has it."""
    known = sorted({name for _, trial in listed for name in trial.metrics})
    if listed and metric not in known:
        raise UserError(f"no trial has {metric!r}", key=("--sort",), hint=did_you_mean(metric, known, "metrics"))
    goal = Objective(metric, metrics.get(metric, {}).get("direction", "min"))
    rank = Objectives((goal,)).rank
    figured, rest = [], []
    for item in listed:
        (figured if math.isfinite(item[1].metrics.get(metric, math.nan)) else rest).append(item)
    return [*sorted(figured, key=lambda item: rank(goal, item[1])), *rest]
