"""What a spec searches for, in plain numbers: its metrics, its objectives, its constraints."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from corenas.contracts import Evaluator, LiveTask, Metric
from corenas.cost import METRICS
from corenas.errors import Fault, blaming_plugin, did_you_mean, raise_if_any
from corenas.objectives import Constraint, Objective, Objectives, parse_amount
from corenas.run.spec import Amount, Bins, Bounds, Range, SearchSettings

COST_METRICS: Mapping[str, Metric] = dict.fromkeys(METRICS, Metric("", "min"))
"""What is known of every arch without measuring it."""


def metrics_of(
    evaluators: Sequence[Evaluator], task: LiveTask, costs: Mapping[str, Metric] = COST_METRICS
) -> dict[str, Metric]:
    """Return all metrics that a search can speak of. Raises UserError for one that two evaluators give.

    costs: what is known without them; nothing where archs are none of a network
    """
    found, faults = dict(costs), []
    for i, evaluator in enumerate(evaluators):
        with blaming_plugin(f"evaluators[{i}] ({type(evaluator).__name__})"):
            given = dict(evaluator.provides(task))
        if twice := sorted(found.keys() & given.keys()):
            measured = f"{'is' if len(twice) == 1 else 'are'} measured already"
            text = f"{', '.join(twice)} {measured}, by the core or another evaluator"
            faults.append(Fault(text, ("evaluators", i)))
        found |= given
    raise_if_any(faults)
    return found


def read_objectives(settings: SearchSettings, metrics: Mapping[str, Metric]) -> Objectives:
    """Return the objectives of a spec. Raises UserError, keys under "search", for metrics that nothing measures."""
    bins = settings.pareto if isinstance(settings.pareto, Bins) else None
    named = [(goal.metric, "objectives", i) for i, goal in enumerate(settings.goals)]
    named += [(bins.metric, "pareto", "metric")] if bins else []
    faults = [_unknown(metric, metrics, "search", *place) for metric, *place in named if metric not in metrics]
    if not settings.goals:
        faults.append(Fault("expected at least one objective", ("search", "objectives")))
    if len(settings.goals) > 1 and not settings.pareto and all(goal.weight is None for goal in settings.goals):
        text = "several objectives are added up, so it has to be said what one unit of each is worth"
        hint = 'for instance { metric = "flops", weight = 1e-6 }; or pareto = true; or a constraint instead'
        faults.append(Fault(text, ("search", "objectives"), hint=hint))
    raise_if_any(faults)
    objectives = tuple(
        Objective(g.metric, g.direction or metrics[g.metric].direction, g.weight or 1.0) for g in settings.goals
    )
    if bins is None:
        return Objectives(objectives, bool(settings.pareto))
    return Objectives(objectives, True, bins.metric, parse_amount(bins.width))


def read_constraints(
    bounds_of: Bounds, metrics: Mapping[str, Metric], largest: Callable[[str], float] | None
) -> list[Constraint]:
    """Return constraints in plain numbers; `largest` gives what "60%" of a cost is of, and is asked for that alone.

    largest: None where no cost is known
    Raises UserError, keys relative to their table, with all mistakes.
    """
    faults, constraints = [], []
    for metric, bounds in bounds_of.items():
        if metric not in metrics:
            faults.append(_unknown(metric, metrics, metric))
            continue
        ends = _ends(bounds, metrics[metric].direction)
        relative = [end for end in ends if str(end).strip().endswith("%")]
        if relative and (largest is None or metric not in METRICS):
            hint = f"relative amounts are for {', '.join(METRICS)}"
            faults.append(Fault(f"{relative[0]!r}: {metric} is not known before the search", (metric,), hint=hint))
            continue
        most = largest(metric) if relative and largest is not None else None
        low, high = (parse_amount(end, most) if isinstance(end, str) else end for end in ends)
        if low > high:
            faults.append(Fault(f"the range {ends[0]} to {ends[1]} is empty", (metric,)))
        constraints.append(Constraint(metric, low, high))
    raise_if_any(faults)
    return constraints


def _ends(bounds: Amount | tuple[Amount, Amount] | Range, direction: str) -> tuple[Amount, Amount]:
    """Return both bounds; one that is open lies at infinity."""
    if isinstance(bounds, tuple):
        return bounds
    if not isinstance(bounds, Range):  # one number bounds from the side that hurts
        bounds = Range(min=bounds) if direction == "max" else Range(max=bounds)
    return -math.inf if bounds.min is None else bounds.min, math.inf if bounds.max is None else bounds.max


def _unknown(metric: str, metrics: Mapping[str, Metric], *path: str | int) -> Fault:
    hint = did_you_mean(metric, metrics, "what the evaluators measure")
    return Fault(f"nothing measures {metric!r}", path, hint=hint)
