"""The search loop: ask, measure, store, tell."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, TypeAlias

from corenas import distributed
from corenas.contracts import Emit, Note, Progress, Proposal, Search, StageDone, StageStarted, Trial, TrialDone
from corenas.errors import UserError, blaming_plugin
from corenas.measure import plain
from corenas.objectives import Objectives
from corenas.space import Arch, SearchSpace
from corenas.store import Store

Key: TypeAlias = tuple[Arch, float]
"""An arch and the share of the whole effort that it is measured with: what a trial is known by."""

_PATIENCE = 200
"""How often a searcher may ask for nothing new before the search ends."""
_LITTLE = 1e-9
"""What is left of a budget when it is spent, up to rounding."""


def search(
    searcher: Search,
    measure: Callable[..., Trial | Mapping[str, float]],
    budget: int,
    *,
    batch: int = 10,
    seconds: float = math.inf,
    space: SearchSpace | None = None,
    store: Store | None = None,
    number: int = 0,
    known: Mapping[Key, Trial] | None = None,
    objectives: Objectives | None = None,
    executor: futures.Executor | None = None,
    emit: Emit = lambda event: None,
) -> list[Trial]:
    """Run a search until its budget of distinct archs is spent or the searcher asks for nothing more.

    measure: arch -> its metrics or trial; called with (arch, fidelity) where a searcher proposes a share of the effort.
        Under torchrun each process measures its share of the archs; an executor gets `measure` pickled
    seconds: end after this time as well
    space: archs outside it are refused
    store: where each trial goes as it finishes, and the searcher's state after each `tell`; what it holds counts
    number: which of a run's searches this is
    known: trials that need not be measured again
    Returns all trials in order. No arch is measured twice with the same fidelity. Raises UserError for a searcher that
    does not do as it should, and if all trials failed.
    """
    store = store if store is not None and distributed.rank() == 0 else Store()
    name = f"searcher {type(searcher).__module__}.{type(searcher).__name__}"
    # All processes run the same search, told the same trials; the first one alone writes into the store.
    before, saved = distributed.on_rank_zero(lambda: (store.trials(number), store.noted(f"searcher:{number}")))
    trials = {(trial.arch, trial.fidelity): trial for trial in before}  # in the order in which they were made
    told: set[Key] = set()
    session = start = time.perf_counter()  # of this session, and as if all of them had been one
    if saved is not None:
        with blaming_plugin(name):
            searcher.load_state_dict(saved["state"])
        told = {*[*trials][: saved["told"]]}
        start -= saved["seconds"]

    def over() -> bool:  # the first process's clock counts for all
        return seconds < math.inf and distributed.on_rank_zero(lambda: time.perf_counter() - start > seconds)

    idle, spent, best = 0, _spent(trials), _best(objectives, before)
    emit(StageStarted("search", budget, "trials", math.floor(spent + _LITTLE)))
    while (left := budget - _spent(told)) > _LITTLE and idle < _PATIENCE and not over():
        # A run that was killed between a trial and its `tell` asks again for what it had asked for.
        asked = _asked(searcher, name, min(batch, math.ceil(left - _LITTLE)), space)
        missing = [key for key in dict.fromkeys(asked) if key not in trials]
        # The store may hold trials that this searcher never heard of, and nothing be left of the budget.
        if not asked or (missing and spent > budget - _LITTLE):
            break
        for trial in _measured(measure, missing, known or {}, executor):
            spent += trial.fidelity
            trials[trial.arch, trial.fidelity] = trial
            store.add(trial, number)
            emit(TrialDone(trial))
            best = _best(objectives, [*best, trial])
            emit(Progress("search", math.floor(spent + _LITTLE), _figures(best, objectives)))
            if spent > budget - _LITTLE or over():
                break
        if not trials.keys() >= {*asked}:
            break
        idle = 0 if missing else idle + 1
        told |= {*asked}
        with blaming_plugin(name):
            searcher.tell([trials[key] for key in asked])
            state = {"state": searcher.state_dict(), "told": len(told), "seconds": time.perf_counter() - start}
            store.note(f"searcher:{number}", state)
    if spent < budget - _LITTLE:
        why = "the time is over" if over() else "the searcher found nothing new"
        emit(Note(f"{why} after {len(trials)} of {budget} trials"))
    found = [*trials.values()]
    if found and all(trial.state == "failed" for trial in found):
        raise UserError(f"all {len(found)} trials failed", hint=f"the first: {found[0].error}")
    emit(StageDone("search", time.perf_counter() - session, _figures(best, objectives)))
    return found


def _spent(keys: Any) -> float:
    return math.fsum(fidelity for _, fidelity in keys)


def _asked(searcher: Search, name: str, n: int, space: SearchSpace | None) -> list[Key]:
    """What the searcher asks for, as archs with their fidelities. Raises UserError, with its name, for nonsense."""
    with blaming_plugin(name):
        asked = [*searcher.ask(n)]
    keys = [(item.arch, item.fidelity) if isinstance(item, Proposal) else (item, 1.0) for item in asked]
    if len(keys) > n:
        raise UserError(f"{name} was asked for {n} archs and gave {len(keys)}")
    for arch, fidelity in keys:
        if not isinstance(arch, Arch) or not isinstance(fidelity, int | float) or not 0 < fidelity <= 1:
            raise UserError(f"{name} asked for {arch!r} with fidelity {fidelity!r}, which is no arch with 0 to 1")
        if space is not None and arch not in space:
            raise UserError(f"{name} asked for an arch that is not in the space: {dict(arch)}")
    return keys


def _measured(
    measure: Callable[..., Any], keys: Sequence[Key], known: Mapping[Key, Trial], executor: futures.Executor | None
) -> Iterator[Trial]:
    """The trials of archs, in order, as soon as they are there; those that are there already are not measured."""
    if executor is not None:
        running = {key: executor.submit(_trial, measure, *key) for key in keys if key not in known}
        try:
            for key in keys:
                with blaming_plugin("the executor"):
                    trial = known[key] if key in known else running[key].result()
                yield trial
        finally:
            for future in running.values():
                future.cancel()
        return
    world, rank = distributed.world(), distributed.rank()
    for at in range(0, len(keys), world):
        turn = keys[at : at + world]
        own = [known.get(key) or _trial(measure, *key) for key in turn[rank : rank + 1]]
        yield from (trial for given in distributed.all_gather(own) for trial in given)


def _trial(measure: Callable[..., Trial | Mapping[str, float]], arch: Arch, fidelity: float) -> Trial:
    start = time.perf_counter()
    with distributed.single_process():
        found = measure(arch) if fidelity == 1 else measure(arch, fidelity)
    if isinstance(found, Trial):
        return found
    seconds = time.perf_counter() - start
    try:
        metrics = plain(found)
    except (AttributeError, TypeError, ValueError, OverflowError):
        text = f"measuring an arch gave {found!r}: expected a mapping from metrics to numbers, or a Trial"
        raise UserError(text) from None
    return Trial(arch, metrics, "done", seconds, None, fidelity)


def _best(objectives: Objectives | None, trials: Sequence[Trial]) -> list[Trial]:
    return objectives.best([trial for trial in trials if trial.fidelity == 1], 1) if objectives else []


def _figures(best: Sequence[Trial], objectives: Objectives | None) -> dict[str, float]:
    return {goal.metric: best[0].metrics[goal.metric] for goal in objectives.objectives} if best and objectives else {}
