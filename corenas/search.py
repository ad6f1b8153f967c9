"""The search loop: ask, measure, store, tell."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from contextlib import nullcontext
from typing import Any, Protocol, Self, TypeAlias, runtime_checkable

from attrs import define, evolve, field, frozen

from corenas import distributed
from corenas.contracts import (
    Emit,
    Executor,
    Note,
    Progress,
    Proposal,
    Rival,
    Search,
    StageDone,
    StageStarted,
    TrialDone,
)
from corenas.errors import UserError, blaming_plugin, staying_here, told
from corenas.measure import plain
from corenas.objectives import Objectives, Trial
from corenas.settings import Racing
from corenas.space import Arch, SearchSpace
from corenas.store import Store
from corenas.timer import PROGRESS_EVERY_S, Timer

Key: TypeAlias = tuple[Arch, float]
"""An arch and the share of the whole effort that it is measured with: what a trial is known by."""

MAX_IDLE_ASKS = 200
"""How often a searcher may ask for nothing new before the search ends."""
STATE_EVERY_S = 0.5
"""Seconds between two states of a searcher that are kept: it may remember each of ten thousand archs."""
BUDGET_TOLERANCE = 1e-9
"""What is left of a budget when it is spent, up to rounding."""


@runtime_checkable
class Runner(Protocol):
    """Adds to trials what it measures of their archs; one that is not ok is left as it is (`measure.TrialRunner`).

    batch: how many trials, all of one fidelity, it is best called with
    """

    @property
    def batch(self) -> int:
        """How many trials at once."""
        ...

    def __call__(self, trials: Sequence[Trial]) -> list[Trial]:
        """Return the trials in order, measured."""
        ...


def run_search(
    searcher: Search,
    measure: Runner | Callable[..., Trial | Mapping[str, float]],
    budget: int,
    *,
    screen: Runner | None = None,
    alone: Runner | None = None,
    batch: int = 10,
    seconds: float = math.inf,
    space: SearchSpace | None = None,
    store: Store | None = None,
    number: int = 0,
    known: Mapping[Key, Trial] | None = None,
    objectives: Objectives | None = None,
    racing: Racing | None = None,
    executor: futures.Executor | Executor | None = None,
    catch: type[Exception] | tuple[type[Exception], ...] = (),
    emit: Emit = lambda event: None,
) -> list[Trial]:
    """Run a search until its budget of distinct archs is spent or the searcher asks for nothing more.

    measure: arch -> its metrics or trial, called with (arch, fidelity) where a searcher proposes a share of the effort;
        or a `Runner`. Under torchrun each process measures its share of the archs; an executor gets it pickled
    screen: measures all archs of an `ask` first, in this process; `measure` then gets those that are still ok
    alone: measures what is left in this process while nothing else is measured: timing
    seconds: end after this time as well
    space: archs outside it are refused
    store: where each trial goes as it finishes, and the searcher's state after each `tell`; what it holds counts
    number: which of a run's searches this is
    known: trials that need not be measured again
    racing: stops archs that have lost by the one objective; for a `measure` that has an attribute `rival`
    executor: workers, or options that start them (`contracts.Executor`); those start again when a worker dies, and what
        was lost with it is measured again: an arch at which one dies a second time is a failed trial
    catch: exceptions of a function `measure` that make its arch a failed trial, as of evaluators all do; all others are
        raised
    Returns all trials in order. No arch is measured twice with the same fidelity. Raises UserError for a searcher that
    does not do as it should, and if all trials failed.

    >>> from corenas import Objective, Objectives, Problem, SearchSpace, load_catalogue, run_search
    >>> import numpy as np
    >>> space = SearchSpace.from_table({"width": [4, 8, 12]})
    >>> problem = Problem(space, Objectives((Objective("size"),)), budget=3)
    >>> searcher = load_catalogue().options("searchers", "random").start(problem, np.random.default_rng(0))
    >>> trials = run_search(searcher, lambda arch: {"size": 2 * arch["width"]}, budget=3)
    >>> problem.objectives.best(trials, 1)[0].metrics
    {'size': 24}
    """
    store = store if store is not None and distributed.rank() == 0 else Store()
    asking = _Asking(searcher, space)
    ledger = _Ledger.restored(asking, store, number, budget, seconds, objectives)
    measure = measure if isinstance(measure, Runner) else _Function(measure, catch)
    started = time.perf_counter()
    emit(StageStarted("search", budget, "trials", ledger.spent_trials))
    with nullcontext() if executor is None else _Workers(executor) as workers:
        runners = _Runners(measure, screen, alone, workers, racing)
        _loop(asking, ledger, runners, batch, store, number, known or {}, emit)
    if not ledger.is_spent:
        why = "the time is over" if ledger.time_is_over() else "the searcher found nothing new"
        emit(Note(f"{why} after {len(ledger.trials)} of {budget} trials"))
    trials = [*ledger.trials.values()]
    if trials and all(trial.state == "failed" for trial in trials):
        raise UserError(f"all {len(trials)} trials failed", hint=f"the first: {trials[0].error}")
    emit(StageDone("search", time.perf_counter() - started, ledger.figures()))
    return trials


def _loop(
    asking: _Asking,
    ledger: _Ledger,
    runners: _Runners,
    batch: int,
    store: Store,
    number: int,
    known: Mapping[Key, Trial],
    emit: Emit,
) -> None:
    """Ask, measure, store and tell until nothing is left of the budget or nothing new is asked for."""
    idle_asks, keep, show = 0, Timer(STATE_EVERY_S), Timer(PROGRESS_EVERY_S)
    while ledger.left > BUDGET_TOLERANCE and idle_asks < MAX_IDLE_ASKS and not ledger.time_is_over():
        # A run that was killed between a trial and its `tell` asks again for what it had asked for.
        proposals = asking.ask(min(batch, math.ceil(ledger.left - BUDGET_TOLERANCE)))
        missing = {_key(p): p for p in proposals if _key(p) not in ledger.trials}
        # The store may hold trials that this searcher never heard of, and nothing be left of the budget.
        if not proposals or (missing and ledger.is_spent):
            break
        for trial in _in_order(missing, known, runners.of_round(ledger)):
            ledger.add(trial)
            store.add(trial, number)
            emit(TrialDone(trial))
            if ledger.is_spent or show.is_due():
                emit(Progress("search", ledger.spent_trials, ledger.figures()))
            if ledger.is_spent or ledger.time_is_over():
                break
        if not all(_key(proposal) in ledger.trials for proposal in proposals):
            break
        idle_asks = idle_asks + 1 if ledger.was_told(proposals) else 0
        asking.tell([ledger.trials[_key(proposal)] for proposal in proposals])
        ledger.tell(proposals)
        # A search that goes on from an older state asks for what it had asked for, and all that is known by then.
        if ledger.is_spent or keep.is_due():
            _keep_state(asking, ledger, store, number)


def _keep_state(asking: _Asking, ledger: _Ledger, store: Store, number: int) -> None:
    with blaming_plugin(asking.name):  # a state that is no plain data
        store.set(f"searcher:{number}", ledger.state(asking))


def _key(proposal: Proposal) -> Key:
    return proposal.arch, proposal.fidelity


@define
class _Ledger:
    """What a search has done: its trials, which of them its searcher was told of, and what they took.

    started: when it began, on this process's clock, as if all its sessions had been one
    """

    budget: int
    seconds: float
    objectives: Objectives | None
    trials: dict[Key, Trial]
    told: set[Key]
    started: float
    spent: float = field(init=False)
    spent_told: float = field(init=False)
    best: list[Trial] = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.spent, self.spent_told = _spent(self.trials), _spent(self.told)
        self.best = self._best(self.trials.values())

    @classmethod
    def restored(
        cls,
        asking: _Asking,
        store: Store,
        number: int,
        budget: int,
        seconds: float,
        objectives: Objectives | None,
    ) -> _Ledger:
        """Return what a store holds of a search, and give its searcher the state that belongs to it.

        All processes run the same search, told the same trials; the first one alone reads and writes the store.
        """
        before, saved = distributed.on_rank_zero(lambda: (store.trials(number), store.get(f"searcher:{number}")))
        trials = {(trial.arch, trial.fidelity): trial for trial in before}  # in the order in which they were made
        told: set[Key] = set()
        started = time.perf_counter()
        if saved is not None:
            asking.restore(saved["state"], store)
            told = {*[*trials][: saved["told"]]}  # trials are told of in the order in which they were made
            started -= saved["seconds"]
        return cls(budget, seconds, objectives, trials, told, started)

    def state(self, asking: _Asking) -> dict[str, Any]:
        """Return what `restored` needs beside the trials."""
        return {"state": asking.state(), "told": len(self.told), "seconds": time.perf_counter() - self.started}

    @property
    def left(self) -> float:
        """The share of the budget that the searcher has not been told of."""
        return self.budget - self.spent_told

    def was_told(self, proposals: Iterable[Proposal]) -> bool:
        """Return whether the searcher knows all of them already."""
        return self.told.issuperset(map(_key, proposals))

    def tell(self, proposals: Iterable[Proposal]) -> None:
        """Note that the searcher was told of some trials."""
        new = {*map(_key, proposals)} - self.told
        self.told |= new
        self.spent_told += _spent(new)

    def rival(self, racing: Racing) -> Rival:
        """Return whom the archs of an `ask` race against: what the searcher was told hangs on no order of arrival."""
        assert self.objectives is not None
        told = [trial for key, trial in self.trials.items() if key in self.told and trial.fidelity == 1]
        best = self.objectives.best(told, racing.best)
        arch = best[-1].arch if len(best) == racing.best else None
        return Rival(self.objectives.objectives[0].metric, arch, (1 - racing.confidence) / racing.best)

    @property
    def is_spent(self) -> bool:
        """Whether nothing is left of the budget."""
        return self.spent > self.budget - BUDGET_TOLERANCE

    @property
    def spent_trials(self) -> int:
        """How many whole trials were made, or what comes to as much."""
        return math.floor(self.spent + BUDGET_TOLERANCE)

    def time_is_over(self) -> bool:
        """Return whether the search has taken its time; the first process's clock counts for all."""
        if self.seconds == math.inf:
            return False
        return distributed.on_rank_zero(lambda: time.perf_counter() - self.started > self.seconds)

    def add(self, trial: Trial) -> None:
        """Take in a trial."""
        self.trials[trial.arch, trial.fidelity] = trial
        self.spent += trial.fidelity
        self.best = self._best([*self.best, trial])

    def figures(self) -> dict[str, float]:
        """Return the metrics of the best trial that are searched for; in Pareto mode the best of each."""
        if not self.best or self.objectives is None:
            return {}
        goals = self.objectives.objectives
        best = self.best if self.objectives.pareto else self.best * len(goals)
        return {goal.metric: trial.metrics[goal.metric] for goal, trial in zip(goals, best, strict=True)}

    def _best(self, trials: Iterable[Trial]) -> list[Trial]:
        return self.objectives.leaders(t for t in trials if t.fidelity == 1) if self.objectives else []


def _spent(keys: Iterable[Key]) -> float:
    return math.fsum(fidelity for _, fidelity in keys)


class _Asking:
    """A searcher, of which every mistake is told with its name."""

    def __init__(self, searcher: Search, space: SearchSpace | None) -> None:
        self.searcher, self.space = searcher, space
        self.name = f"searcher {type(searcher).__module__}.{type(searcher).__name__}"

    def ask(self, n: int) -> list[Proposal]:
        """Return what the searcher asks for. Raises UserError for nonsense."""
        with blaming_plugin(self.name):
            asked = [*self.searcher.ask(n)]
        if len(asked) > n:
            raise UserError(f"{self.name} was asked for {n} archs and gave {len(asked)}")
        proposals = [item if isinstance(item, Proposal) else Proposal(item) for item in asked]
        for proposal in proposals:
            arch, fidelity = _key(proposal)
            if not isinstance(arch, Arch) or not isinstance(fidelity, int | float) or not 0 < fidelity <= 1:
                raise UserError(f"{self.name} asked for {arch!r} with fidelity {fidelity!r}, no arch with 0 to 1")
            if self.space is not None and arch not in self.space:
                raise UserError(f"{self.name} asked for an arch that is not in the space: {dict(arch)}")
        return proposals

    def tell(self, trials: Sequence[Trial]) -> None:
        """Tell the searcher of the trials that it asked for."""
        with blaming_plugin(self.name):
            self.searcher.tell(trials)

    def state(self) -> Mapping[str, Any]:
        """Return the searcher's state."""
        with blaming_plugin(self.name):
            return self.searcher.state_dict()

    def restore(self, state: Mapping[str, Any], store: Store) -> None:
        """Give the searcher a state that it had, as a store has kept it. Raises UserError if it cannot use it."""
        try:
            with staying_here():
                self.searcher.load_state_dict(state)
        except Exception as error:
            text = f"{self.name} cannot use the state that is kept of it: {told(error)}"
            hint = "is this database damaged, or of another version? put back a copy, or begin anew: --fresh"
            raise UserError(text, file=store.path and str(store.path), hint=hint) from error


@frozen
class _Function:
    """A user's function as a `Runner`."""

    function: Callable[..., Trial | Mapping[str, float]]
    catch: type[Exception] | tuple[type[Exception], ...] = ()
    batch: int = 1

    def __call__(self, trials: Sequence[Trial]) -> list[Trial]:
        return [self._measured(trial) for trial in trials]

    def _measured(self, trial: Trial) -> Trial:
        start = time.perf_counter()
        try:
            result = self.function(trial.arch) if trial.fidelity == 1 else self.function(trial.arch, trial.fidelity)
        except self.catch as error:
            seconds = trial.seconds + time.perf_counter() - start
            return evolve(trial, state="failed", error=told(error), seconds=seconds)
        if isinstance(result, Trial):
            return evolve(result, extra={**trial.extra, **result.extra})
        seconds = time.perf_counter() - start
        try:
            metrics = plain(result)
        except (AttributeError, TypeError, ValueError, OverflowError):
            text = f"measuring an arch gave {result!r}: expected a mapping from metrics to numbers, or a Trial"
            raise UserError(text) from None
        return evolve(trial, metrics={**trial.metrics, **metrics}, seconds=trial.seconds + seconds)


@runtime_checkable
class _RacingRunner(Runner, Protocol):
    rival: Rival | None


@frozen
class _Runners:
    """Where trials are measured: first all of them here, then spread, then here again while nothing else runs."""

    measure: Runner
    screen: Runner | None
    alone: Runner | None
    workers: _Workers | None
    racing: Racing | None = None

    def of_round(self, ledger: _Ledger) -> _Runners:
        """Return what measures the archs of the next `ask`."""
        if self.racing is None or not isinstance(self.measure, _RacingRunner):
            return self
        return evolve(self, measure=evolve(self.measure, rival=ledger.rival(self.racing)))

    def __call__(self, trials: Sequence[Trial]) -> Iterator[Trial]:
        """Give the trials in order, each as soon as it is measured."""
        screened = [*trials]
        if self.screen is not None:
            screened = [trial for same in _of_one_fidelity(trials) for trial in self.screen(same)]
        spread = self._spread([trial for trial in screened if trial.ok])
        measured = (next(spread) if trial.ok else trial for trial in screened)
        alone = self.alone
        if alone is None:
            yield from measured
            return
        if self.workers is not None:
            measured = [*measured]  # the workers are done before anything is timed
        for same in _of_one_fidelity(measured):
            for at in range(0, len(same), alone.batch):
                chunk = same[at : at + alone.batch]
                yield from distributed.on_rank_zero(lambda chunk=chunk: alone(chunk))

    def _spread(self, trials: Sequence[Trial]) -> Iterator[Trial]:
        """Give the trials in order, measured by an executor's workers, by torchrun's processes, or here."""
        size = self.measure.batch
        chunks = [same[at : at + size] for same in _of_one_fidelity(trials) for at in range(0, len(same), size)]
        if self.workers is not None:
            yield from self.workers.measured(self.measure, chunks)
            return
        world, rank = distributed.world(), distributed.rank()
        for at in range(0, len(chunks), world):
            own = [_run(self.measure, chunk) for chunk in chunks[at : at + world][rank : rank + 1]]
            yield from itertools.chain(*itertools.chain(*distributed.all_gather(own)))


class _Workers:
    """An executor's workers, started again when one of them has died, if there are options to start them with."""

    def __init__(self, executor: futures.Executor | Executor) -> None:
        self._options = None if isinstance(executor, futures.Executor) else executor
        self._given = executor if isinstance(executor, futures.Executor) else None

    def __enter__(self) -> Self:
        self._live = self._given or self._started()
        return self

    def __exit__(self, *error: object) -> None:
        if self._options is not None:
            self._live.shutdown()

    def _started(self) -> futures.Executor:
        assert self._options is not None
        with blaming_plugin("the executor"):
            return self._options.start()

    def measured(self, measure: Runner, chunks: Sequence[Sequence[Trial]]) -> Iterator[Trial]:
        """Give the trials of chunks in order."""
        running = [self._submitted(measure, chunk) for chunk in chunks]
        try:
            for chunk, future in zip(chunks, running, strict=True):
                result = _result(future)
                if not isinstance(result, futures.BrokenExecutor):
                    yield from result
                    continue
                if self._options is None:
                    raise _died(result)
                for trial in chunk:  # of all that ran none is known to be the cause: each goes on by itself
                    yield self._again(measure, trial)
        finally:
            for future in running:
                future.cancel()

    def _again(self, measure: Runner, trial: Trial) -> Trial:
        """Return a trial measured while no other of the lost ones is; a failed one if a worker dies of it."""
        result = _result(self._submitted(measure, [trial]))
        if isinstance(result, futures.BrokenExecutor):
            return evolve(trial, state="failed", error=f"its worker died twice: {result}")
        return result[0]

    def _submitted(self, measure: Runner, trials: Sequence[Trial]) -> futures.Future[list[Trial]]:
        try:
            return self._live.submit(_run, measure, trials)
        except futures.BrokenExecutor as error:
            if self._options is None:
                raise _died(error) from error
            self._live.shutdown(wait=False)
            self._live = self._started()
            return self._live.submit(_run, measure, trials)


def _died(error: Exception) -> UserError:
    return UserError(f"a worker of the executor died: {error}", hint="options that start it again instead of workers")


def _result(future: futures.Future[list[Trial]]) -> list[Trial] | futures.BrokenExecutor:
    """Return what a future gives; the exception where its worker has died."""
    with blaming_plugin("the executor"):
        try:
            return future.result()
        except futures.BrokenExecutor as error:
            return error


def _of_one_fidelity(trials: Iterable[Trial]) -> Iterator[list[Trial]]:
    """Give runs of trials with the same fidelity."""
    for _, same in itertools.groupby(trials, key=lambda trial: trial.fidelity):
        yield [*same]


def _run(measure: Runner, trials: Sequence[Trial]) -> list[Trial]:
    """Measure some trials in this process alone, whatever the others of torchrun do."""
    with distributed.single_process():
        return measure(trials)


def _in_order(missing: Mapping[Key, Proposal], known: Mapping[Key, Trial], runners: _Runners) -> Iterator[Trial]:
    """Give the trials of proposals in order; those that are known already are not measured."""
    drafts = [Trial(p.arch, fidelity=p.fidelity, extra=p.extra) for key, p in missing.items() if key not in known]
    measured = runners(drafts)
    for key in missing:
        yield known[key] if key in known else next(measured)
