"""What a comparison says: means with intervals, rank correlations, words on what can be concluded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

LEVEL = 0.95


def interval(numbers: Sequence[float], level: float = LEVEL) -> tuple[float, float | None]:
    """Return the mean of some runs and the half-width of its t interval; None for a single run."""
    mean = float(np.mean(numbers))
    if len(numbers) < 2:
        return mean, None
    error = float(np.std(numbers, ddof=1)) / math.sqrt(len(numbers))
    return mean, float(stats.t.ppf((1 + level) / 2, len(numbers) - 1)) * error


def tau(gains: Sequence[float] | None, truth: Sequence[float]) -> float | None:
    """Return Kendall's tau-b of two rankings; None where there is nothing to compare."""
    if gains is None or len(truth) < 3:
        return None
    found = float(stats.kendalltau(gains, truth).statistic)
    return found if math.isfinite(found) else None


def summarize(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row for each method, over its seeds, and notes."""
    metric, reference = found["metric"], found["reference"]
    truth = [row["metrics"][metric] for row in reference]
    methods: dict[str, list[Mapping[str, Any]]] = {}
    for row in found["rows"]:
        methods.setdefault(row["method"], []).append(row)
    table = []
    for name, rows in methods.items():
        line: dict[str, Any] = {"method": name, "runs": len(rows)}
        for key in ("inherited", "test", "retrained", "flops", "training_flops"):
            numbers = [row[key] for row in rows if row[key] is not None]
            line[key] = interval(numbers) if numbers else None
        taus = [t for t in (tau(row["ranking"], truth) for row in rows) if t is not None]
        line["tau"] = interval(taus) if taus else None
        stages = {stage for row in rows for stage in row["seconds"]}
        line["seconds"] = {s: float(np.mean([row["seconds"].get(s, 0.0) for row in rows])) for s in sorted(stages)}
        table.append(line)
    by_flops = tau([row["metrics"]["flops"] for row in reference], truth)
    return {"table": table, "tau_of_flops": by_flops, "notes": _notes(found, table, truth, by_flops)}


def spread_to_noise(reference: Sequence[Mapping[str, Any]], metric: str) -> tuple[float, float] | None:
    """Return the standard deviation of the references' accuracies, and that of one accuracy over seeds."""
    spreads = [row["extra"][f"{metric}_sd"] for row in reference if f"{metric}_sd" in row["extra"]]
    if len(reference) < 3 or not spreads:
        return None
    noise = math.sqrt(float(np.mean(np.square(spreads))))
    return float(np.std([row["metrics"][metric] for row in reference], ddof=1)), noise


def _notes(
    found: Mapping[str, Any], table: Sequence[Mapping[str, Any]], truth: Sequence[float], by_flops: float | None
) -> list[str]:
    notes = []
    measured = spread_to_noise(found["reference"], found["metric"])
    if measured is not None:
        spread, noise = measured
        text = f"archs trained alone spread by {spread:.2f} points, seeds of one arch by {noise:.2f}"
        if spread <= 2 * noise:
            text += ": less than twice, so this data cannot rank archs; make it harder (fewer images, noise, rotations)"
        notes.append(text)
    if by_flops is not None:
        better = [row["method"] for row in table if row["tau"] and row["tau"][0] > by_flops]
        words = ", ".join(better) or "no method"
        words += " rank" if len(better) > 1 else " ranks"
        notes.append(f"ranked by flops alone tau is {by_flops:.2f} over {len(truth)} archs; {words} them better")
    ranked = sorted((row for row in table if row["retrained"]), key=lambda row: -row["retrained"][0])
    if len(ranked) > 1:
        first = ranked[0]
        alike = [r["method"] for r in ranked[1:] if _overlap(first["retrained"], r["retrained"])]
        if alike:
            notes.append(
                f"the interval of {first['method']} overlaps with that of {', '.join(alike)}: no order between them"
            )
    trained = [(row["method"], row["training_flops"][0]) for row in table if row["training_flops"]]
    far = [name for name, flops in trained if flops > 0 and abs(flops / found["budget"] - 1) > 0.15]
    if far:
        notes.append(f"more than 15% off the budget: {', '.join(far)}")
    return [*notes, *(f"{name} is not here: {reason}" for name, reason in found.get("apart", {}).items())]


def _overlap(one: tuple[float, float | None], other: tuple[float, float | None]) -> bool:
    return abs(one[0] - other[0]) <= (one[1] or 0.0) + (other[1] or 0.0)
