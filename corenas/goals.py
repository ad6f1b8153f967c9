"""What a spec searches for, in plain numbers: its metrics, its objectives, its constraints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from corenas.contracts import Evaluator, LiveTask, Metric
from corenas.errors import Fault, UserError, did_you_mean
from corenas.objectives import Constraint, Objective, Objectives, parse_amount
from corenas.settings import Amount, Bins, Bounds, Range, SearchSettings

COST_METRICS: Mapping[str, Metric] = {name: Metric("", "min") for name in ("flops", "params", "activations")}
"""What is known of every arch without measuring it."""


def metrics_of(evaluators: Sequence[Evaluator], task: LiveTask) -> dict[str, Metric]:
    """All metrics that a search can speak of. Raises UserError for one that two evaluators give."""
    found, faults = dict(COST_METRICS), []
    for i, evaluator in enumerate(evaluators):
        given = evaluator.provides(task)
        twice = sorted(found.keys() & given.keys())
        if twice:
            faults.append(
                Fault(f"{', '.join(twice)} is measured already, by the core or another evaluator", ("evaluators", i))
            )
        found |= given
    if faults:
        raise UserError(faults=faults)
    return found


def read_objectives(settings: SearchSettings, metrics: Mapping[str, Metric]) -> Objectives:
    """The objectives of a spec. Raises UserError, keys under "search", for metrics that nothing measures."""
    faults = []
    objectives = []
    for i, goal in enumerate(settings.goals):
        if goal.metric not in metrics:
            faults.append(_unknown(goal.metric, metrics, "search", "objectives", i))
            continue
        objectives.append(Objective(goal.metric, goal.direction or metrics[goal.metric].direction, goal.weight))
    if not objectives and not faults:
        faults.append(Fault("expected at least one objective", ("search", "objectives")))
    bins = settings.pareto if isinstance(settings.pareto, Bins) else None
    if bins is not None and bins.metric not in metrics:
        faults.append(_unknown(bins.metric, metrics, "search", "pareto", "metric"))
    width = parse_amount(bins.width) if bins is not None else 0.0
    if faults:
        raise UserError(faults=faults)
    return Objectives(tuple(objectives), bool(settings.pareto), bins.metric if bins else None, width)


def read_constraints(
    bounds_of: Bounds, metrics: Mapping[str, Metric], largest: Mapping[str, float]
) -> list[Constraint]:
    """Constraints in plain numbers; `largest` has the metrics that "60%" can be of.

    Raises UserError, keys relative to their table, with all mistakes.
    """
    faults, constraints = [], []
    for metric, bounds in bounds_of.items():
        place = (metric,)
        if metric not in metrics:
            faults.append(_unknown(metric, metrics, metric))
            continue

        def plain(amount: Amount | None, open_end: float, metric: str = metric) -> float:
            if amount is None:
                return open_end
            if _relative(amount):
                return parse_amount(str(amount).strip()[:-1]) / 100 * largest[metric]
            return parse_amount(amount)

        if isinstance(bounds, Range):
            ends = (bounds.min, bounds.max)
        elif isinstance(bounds, tuple):
            ends = bounds
        else:  # one number bounds from the side that hurts
            ends = (bounds, None) if metrics[metric].direction == "max" else (None, bounds)
        relative = [end for end in ends if end is not None and _relative(end)]
        if relative and metric not in largest:
            hint = f"relative amounts are for {', '.join(largest)}"
            faults.append(Fault(f"{relative[0]!r}: {metric} is not known before the search", place, hint=hint))
            continue
        low, high = plain(ends[0], -float("inf")), plain(ends[1], float("inf"))
        if low > high:
            faults.append(Fault(f"the range {ends[0]} to {ends[1]} is empty", place))
        constraints.append(Constraint(metric, low, high))
    if faults:
        raise UserError(faults=faults)
    return constraints


def _relative(amount: Amount) -> bool:
    return isinstance(amount, str) and amount.strip().endswith("%")


def _unknown(metric: str, metrics: Mapping[str, Metric], *path: str | int) -> Fault:
    hint = did_you_mean(metric, metrics, "what the evaluators measure")
    return Fault(f"nothing measures {metric!r}", path, hint=hint)
