"""What `corenas trials` says."""

from __future__ import annotations

import csv
import sys
from argparse import Namespace
from typing import Any

from corenas.errors import UserError
from corenas.objectives import Objective, Objectives
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
    if options.json:
        keys = ["arch", "metrics", "state", "seconds"]
        keys += ["fidelity"] if any(t.fidelity < 1 for _, t in listed) else []
        rows = [trial.to_json() for _, trial in listed]
        failed = [*keys, "error"]
        print_json({"trials": [{k: row[k] for k in (failed if row["state"] == "failed" else keys)} for row in rows]})
        return
    rows = []
    for wanted, trial in listed:
        row: dict[str, Any] = {"arch": trial.arch.digest, "state": trial.state}
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
