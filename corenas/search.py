"""The search loop: ask, measure what is cheap, check constraints, measure the rest, store, tell."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence, Set

from attrs import frozen

from corenas.contracts import (
    Emit,
    Evaluator,
    EvaluatorContext,
    Failure,
    LiveTask,
    Measure,
    Metric,
    Note,
    Progress,
    Search,
    StageDone,
    StageStarted,
    Trial,
    TrialDone,
)
from corenas.cost import METRICS
from corenas.errors import Fault, UserError, did_you_mean
from corenas.objectives import Constraint, Objective, Objectives, parse_amount
from corenas.settings import Amount, Bins, Range, SearchSettings
from corenas.space import Arch
from corenas.store import Store

COST_METRICS: Mapping[str, Metric] = {name: Metric("", "min") for name in METRICS}
_PATIENCE = 200
"""How often a searcher may ask for nothing new before the search ends."""


@frozen
class Stand:
    """A measuring stand: what gives the metrics of an arch, cheap functions before costly ones."""

    measures: Sequence[tuple[str, Measure]]
    constraints: Sequence[Constraint] = ()

    def trial(self, arch: Arch) -> Trial:
        """Measure one arch; costly measures are spared where a constraint is not met."""
        start = time.perf_counter()
        metrics: dict[str, float] = {}
        for name, measure in self.measures:
            try:
                (found,) = measure([arch])
                # A numpy or torch number becomes a plain one, which can be stored.
                plain = (
                    {}
                    if isinstance(found, Failure)
                    else {m: n if type(n) is int else float(n) for m, n in found.items()}
                )
            except UserError:
                raise
            except Exception as error:
                found, plain = Failure(f"{type(error).__name__}: {error}"), {}
            if isinstance(found, Failure):
                return Trial(arch, metrics, "failed", time.perf_counter() - start, f"{name}: {found.reason}")
            metrics |= plain
            broken = next((str(c) for c in self.constraints if not c.met(metrics)), None)
            if broken:
                return Trial(arch, metrics, "infeasible", time.perf_counter() - start, f"not {broken}")
        return Trial(arch, metrics, "done", time.perf_counter() - start)


def stand(
    evaluators: Mapping[str, Evaluator], context: EvaluatorContext, constraints: Sequence[Constraint] = ()
) -> Stand:
    """The stand of some evaluators (name -> options), costs first, then cheap ones, then the others."""

    def cost(archs: Sequence[Arch]) -> Sequence[Mapping[str, float]]:
        return context.cost.of(archs)

    ordered = sorted(evaluators.items(), key=lambda item: not item[1].cheap)
    measures = [(name, _as_promised(e.start(context), e.provides(context.task).keys())) for name, e in ordered]
    return Stand([("cost", cost), *measures], constraints)


def _as_promised(measure: Measure, metrics: Set[str]) -> Measure:
    """The measure, failed where it gives other metrics than its evaluator says: constraints hang on them."""

    def checked(archs: Sequence[Arch]) -> Sequence[Mapping[str, float] | Failure]:
        wrong = f"promised {', '.join(sorted(metrics))} and gave "
        return [
            Failure(wrong + (", ".join(sorted(found)) or "nothing"))
            if isinstance(found, Mapping) and found.keys() != metrics
            else found
            for found in measure(archs)
        ]

    return checked


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
            faults.append(_unknown(goal.metric, metrics, "objectives", i))
            continue
        objectives.append(Objective(goal.metric, goal.direction or metrics[goal.metric].direction, goal.weight))
    if not objectives and not faults:
        faults.append(Fault("expected at least one objective", ("search", "objectives")))
    bins = settings.pareto if isinstance(settings.pareto, Bins) else None
    if bins is not None and bins.metric not in metrics:
        faults.append(_unknown(bins.metric, metrics, "pareto", "metric"))
    width = parse_amount(bins.width) if bins is not None else 0.0
    if faults:
        raise UserError(faults=faults)
    return Objectives(tuple(objectives), bool(settings.pareto), bins.metric if bins else None, width)


def read_constraints(
    settings: SearchSettings, metrics: Mapping[str, Metric], largest: Mapping[str, float]
) -> list[Constraint]:
    """The constraints of a spec in plain numbers; `largest` has the metrics that "60%" can be of.

    Raises UserError, keys under "search.constraints", with all mistakes.
    """
    faults, constraints = [], []
    for metric, bounds in settings.constraints.items():
        place = ("search", "constraints", metric)
        if metric not in metrics:
            faults.append(_unknown(metric, metrics, "constraints", metric))
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
    return Fault(f"nothing measures {metric!r}", ("search", *path), hint=hint)


def search(
    searcher: Search,
    measured: Callable[[Arch], Trial],
    budget: int,
    *,
    batch: int = 10,
    store: Store | None = None,
    objectives: Objectives | None = None,
    emit: Emit = lambda event: None,
) -> list[Trial]:
    """Run a search until its budget of distinct archs is spent or the searcher asks for nothing more.

    measured: gives the trial of an arch; `Stand.trial`, or any function of the user's
    store: where each trial goes as it finishes, and the searcher's state after each `tell`; what it holds counts
    Returns all trials in order. No arch is measured twice.
    """
    store = store or Store()
    trials = store.trials()
    known = {trial.arch: trial for trial in trials}
    told: set[Arch] = set()
    saved = store.noted("searcher")
    if saved is not None:
        searcher.load_state_dict(saved["state"])
        told = {trial.arch for trial in trials[: saved["told"]]}
    emit(StageStarted("search", budget, "trials", len(trials)))
    start, idle = time.perf_counter(), 0
    while len(trials) < budget and idle < _PATIENCE:
        # A run that was killed between a trial and its `tell` asks again for what it had asked for.
        asked = searcher.ask(min(batch, budget - len(told)))
        if not asked:
            break
        strange = next((arch for arch in asked if not isinstance(arch, Arch)), None)
        if strange is not None:
            raise UserError(f"the searcher asked for {strange!r}, which is no arch", key=("searcher", "type"))
        before = len(trials)
        for arch in asked:
            if arch in known:
                continue
            if len(trials) == budget:  # only where the store held trials that this searcher never heard of
                break
            trial = known[arch] = measured(arch)
            trials.append(trial)
            store.add(trial)
            emit(TrialDone(trial))
            emit(Progress("search", len(trials), _figures(trials, objectives)))
        if any(arch not in known for arch in asked):
            break
        idle = 0 if len(trials) > before else idle + 1
        searcher.tell([known[arch] for arch in asked])
        told.update(asked)
        store.note("searcher", {"state": searcher.state_dict(), "told": len(told)})
    if len(trials) < budget:
        emit(Note(f"the searcher found nothing new after {len(trials)} of {budget} trials"))
    failed = [trial for trial in trials if trial.state == "failed"]
    if failed and len(failed) == len(trials):
        raise UserError(f"all {len(trials)} trials failed", hint=f"the first: {failed[0].error}")
    emit(StageDone("search", time.perf_counter() - start, _figures(trials, objectives)))
    return trials


def _figures(trials: Sequence[Trial], objectives: Objectives | None) -> dict[str, float]:
    best = objectives.best(trials, 1) if objectives else []
    return {goal.metric: best[0].metrics[goal.metric] for goal in objectives.objectives} if best and objectives else {}
