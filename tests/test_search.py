"""The search loop: what is measured and in which order, and that an interrupted search ends with the same trials."""

import gc
import itertools
import math
import time
import tracemalloc
from concurrent.futures import BrokenExecutor, Future, ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest
from attrs import evolve

from corenas.contracts import Note, Progress, Proposal, StageDone, StageStarted, TrialDone
from corenas.errors import UserError
from corenas.objectives import Objective, Objectives, Trial
from corenas.search import run_search
from corenas.space import Arch, SearchSpace
from corenas.store import Store
from corenas.variables import Categorical, Int

pytestmark = pytest.mark.filterwarnings("error")
SPACE = SearchSpace([Int("width", 1, 50), Categorical("op", ("a", "b"))])
BEST = Objectives((Objective("top1"),))


class Random:
    """Draws anew each time, what it knows as well; with `told` it draws near the best."""

    def __init__(self, seed=0, space=SPACE):
        self.rng, self.space, self.best, self.heard = np.random.default_rng(seed), space, None, []

    def ask(self, n):
        mutate = self.best is not None
        return [
            self.space.mutate(self.best.arch, 0.5, self.rng) if mutate else self.space.sample(self.rng)
            for _ in range(n)
        ]

    def tell(self, trials):
        self.heard.append([trial.arch for trial in trials])
        self.best = max([*trials, *filter(None, [self.best])], key=BEST.score)

    def state_dict(self):
        return {"rng": self.rng.bit_generator.state, "best": self.best and self.best.to_json()}

    def load_state_dict(self, state):
        self.rng.bit_generator.state = state["rng"]
        self.best = state["best"] and Trial.from_json(state["best"])


def measured(arch):
    return Trial(arch, {"top1": float(arch["width"] % 17 + (arch["op"] == "b"))})


def test_a_thousand_trials_take_the_memory_of_their_records_and_no_more(tmp_path):
    space, memory = SearchSpace([Int(f"v{i}", 1, 50) for i in range(6)]), {}
    done = itertools.count(1)

    def emit(event):
        if isinstance(event, TrialDone) and (number := next(done)) in (200, 1200):
            gc.collect()
            memory[number] = tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        run_search(
            Random(space=space),
            lambda arch: Trial(arch, {"top1": float(arch["v0"])}),
            1200,
            store=Store(tmp_path / "run.sqlite"),
            objectives=BEST,
            emit=emit,
        )
    finally:
        tracemalloc.stop()
    # Seven numbers under names, in a trial: some 900 bytes.
    assert (memory[1200] - memory[200]) / 1000 < 2000


def test_no_arch_is_measured_twice_and_the_budget_is_kept():
    counts = {}

    def once(arch):
        counts[arch] = counts.get(arch, 0) + 1
        return measured(arch)

    events, searcher = [], Random()
    trials = run_search(searcher, once, 70, batch=9, objectives=BEST, emit=events.append)
    assert len(trials) == len(counts) == 70
    assert {*counts.values()} == {1}
    assert [e.trial for e in events if isinstance(e, TrialDone)] == trials
    assert isinstance(events[0], StageStarted)
    assert (events[0].total, events[0].unit, events[0].done) == (70, "trials", 0)
    assert isinstance(events[-1], StageDone)
    best = max(trial.metrics["top1"] for trial in trials)
    assert events[-1].figures == {"top1": best}
    shown = [e.done for e in events if isinstance(e, Progress)]
    assert shown == sorted({*shown}), "at times, and at the end"
    assert shown[-1] == 70
    assert all(len(heard) <= 9 for heard in searcher.heard)


def test_a_searcher_hears_all_it_asked_in_its_order_known_or_not():
    asked = []

    class Repeats(Random):
        def ask(self, n):
            first = SPACE.arch({"width": 1})
            asked.append([first, *super().ask(n - 2), first][:n])
            return asked[-1]

    searcher = Repeats()
    run_search(searcher, measured, 20, batch=6)
    assert searcher.heard == asked


def test_a_searcher_that_has_nothing_more_ends_the_search():
    class Short(Random):
        def ask(self, n):
            return super().ask(n) if len(self.heard) < 2 else []

    events = []
    trials = run_search(Short(), measured, 50, batch=5, emit=events.append)
    assert 0 < len(trials) <= 10
    assert any(isinstance(event, Note) for event in events)


def test_a_space_that_is_spent_ends_the_search():
    events = []
    trials = run_search(
        Random(space=SPACE.fix({"op": "a"}).narrow({"width": [1, 2, 3]})), measured, 50, emit=events.append
    )
    assert len(trials) == 3
    assert "nothing new" in next(event.text for event in events if isinstance(event, Note))


def test_a_measure_that_raises_what_is_caught_is_a_failed_trial_and_all_else_is_raised():
    def some(arch):
        return measured(arch) if arch["width"] % 2 else 1 / 0

    trials = run_search(Random(), some, 40, catch=(ZeroDivisionError, OSError))
    failed = [trial for trial in trials if not trial.ok]
    assert {(trial.state, trial.error, trial.arch["width"] % 2) for trial in failed} == {
        ("failed", "ZeroDivisionError: division by zero", 0)
    }
    assert all(trial.arch["width"] % 2 for trial in trials if trial.ok)
    for catch in ((), ValueError):
        with pytest.raises(ZeroDivisionError):
            run_search(Random(), some, 40, catch=catch)


def test_failed_trials_do_not_stop_a_search_but_nothing_else_than_failed_ones_does():
    def some(arch):
        return measured(arch) if arch["width"] % 5 == 0 else Trial(arch, {}, "failed", 0, "x: boom")

    assert {trial.state for trial in run_search(Random(), some, 40)} == {"done", "failed"}
    store = Store()
    for _ in range(2):
        with pytest.raises(UserError, match="all 12 trials failed") as caught:
            run_search(Random(), lambda arch: Trial(arch, {}, "failed", 0, "x: boom"), 12, store=store)
        assert "x: boom" in caught.value.faults[0].hint


@pytest.mark.parametrize("seed", range(5))
def test_what_a_store_holds_counts_and_is_not_measured_again(seed):
    store = Store()
    for width in range(1, 41):
        store.add(measured(SPACE.arch({"width": width, "op": "b"})))
    new = []
    trials = run_search(Random(seed), lambda arch: new.append(arch) or measured(arch), 50, batch=20, store=store)
    assert len(trials) == 50
    assert len(new) == 10
    assert store.trials() == trials
    assert not {arch["op"] for arch in new if arch["width"] <= 40} & {"b"}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [0, 1, 5, 6, 7, 24, 39])
@pytest.mark.parametrize("where", ["measuring", "storing", "telling", "noting"])
@pytest.mark.parametrize("state_every_s", [0.0, 60.0])
def test_a_killed_search_ends_with_the_same_trials(tmp_path, monkeypatch, after, where, state_every_s):
    monkeypatch.setattr("corenas.search.STATE_EVERY_S", state_every_s)
    whole, wanted = Random(), Store()
    run_search(whole, measured, 40, batch=7, store=wanted)
    left = [after]

    def count(kind):
        if kind == where:
            left[0] -= 1
            if left[0] < 0:
                raise Killed

    class Fragile(Store):
        def add(self, trial, number):
            super().add(trial, number)
            count("storing")

        def set(self, key, value):
            count("noting")
            super().set(key, value)

    class Mortal(Random):
        def tell(self, trials):
            count("telling")
            super().tell(trials)

    def mortal(arch):
        count("measuring")
        return measured(arch)

    path = tmp_path / "run.sqlite"
    with suppress(Killed):
        run_search(Mortal(), mortal, 40, batch=7, store=Fragile(path))
    before = len(Store(path).trials())
    resumed = Random()
    trials = run_search(resumed, measured, 40, batch=7, store=Store(path))
    assert trials == wanted.trials() == Store(path).trials()
    assert resumed.state_dict() == whole.state_dict() or before == 40  # nothing was asked any more


def test_a_search_goes_on_from_a_state_of_hundreds_of_asks_ago(tmp_path, monkeypatch):
    """It asks for all of them again, which are known; no more is measured than what was left."""
    monkeypatch.setattr("corenas.search.STATE_EVERY_S", math.inf)
    space, new = SearchSpace([Int("width", 1, 10000)]), []
    wanted = run_search(Random(space=space), lambda arch: {"top1": arch["width"]}, 700, batch=2)

    def mortal(arch):
        if len(new) == 600:
            raise Killed
        new.append(arch)
        return {"top1": arch["width"]}

    with suppress(Killed):
        run_search(Random(space=space), mortal, 700, batch=2, store=Store(tmp_path / "run.sqlite"))
    store = Store(tmp_path / "run.sqlite")
    assert store.get("searcher:0") is None
    trials = run_search(Random(space=space), lambda arch: new.append(arch) or {"top1": arch["width"]}, 700, batch=2,
                        store=store)  # fmt: skip
    assert [trial.metrics for trial in trials] == [trial.metrics for trial in wanted]
    assert [trial.arch for trial in trials] == new
    assert store.get("searcher:0")["told"] == 700


def test_plain_functions_can_be_searched_and_nonsense_from_them_is_a_message():
    trials = run_search(Random(), lambda arch: {"top1": np.float32(arch["width"])}, 9)
    assert [trial.metrics for trial in trials] == [{"top1": float(trial.arch["width"])} for trial in trials]
    assert all(type(trial.metrics["top1"]) is float for trial in trials)
    for nonsense in (None, 3.0, {"top1": "high"}, {"top1": "3"}, {"top1": 10**400}, [1]):
        with pytest.raises(UserError, match="expected a mapping from metrics to numbers"):
            run_search(Random(), lambda arch, nonsense=nonsense: nonsense, 9)


@pytest.mark.parametrize(("method", "answer", "message"), [
    ("ask", lambda *a: 1 / 0, "Random failed: ZeroDivisionError"), ("ask", lambda *a: None, "Random failed: TypeError"),
    ("ask", lambda *a: [Proposal(SPACE.default(), "x")], "with fidelity 'x'"),
    ("ask", lambda *a: [3], "asked for 3 "), ("tell", lambda *a: {}["x"], "Random failed: KeyError"),
    ("ask", lambda *a: [Arch({"width": 99, "op": "a"})], "not in the space"),
    ("ask", lambda *a: [SPACE.arch({"width": w}) for w in range(1, 31)], "was asked for 10 archs and gave 30"),
    ("state_dict", lambda *a: {"rng": np.random.default_rng(0)}, "Random failed: TypeError"),
])  # fmt: skip
def test_a_searcher_that_does_not_do_as_it_should_is_named(monkeypatch, method, answer, message):
    monkeypatch.setattr(Random, method, answer)
    with pytest.raises(UserError, match=message) as caught:
        run_search(Random(), measured, 30, space=SPACE)
    assert "searcher " in str(caught.value)


def test_an_executor_measures_the_same_trials_in_the_same_order():
    with ThreadPoolExecutor(3) as executor:
        assert run_search(Random(), measured, 40, executor=executor) == run_search(Random(), measured, 40)


def test_what_another_search_knows_is_not_measured_again():
    known = {(trial.arch, 1.0): trial for trial in run_search(Random(), measured, 60)}
    new = []
    trials = run_search(Random(1), lambda arch: new.append(arch) or measured(arch), 60, known=known)
    assert trials == run_search(Random(1), measured, 60)
    assert not {(arch, 1.0) for arch in new} & known.keys()


def test_a_search_ends_when_its_time_is_over_and_counts_the_time_of_all_sessions(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("corenas.search.time.perf_counter", lambda: clock[0])

    def slow(arch):
        clock[0] += 10
        return measured(arch)

    store, events = Store(), []
    assert len(run_search(Random(), slow, 50, seconds=95, store=store, batch=2, emit=events.append)) == 10
    assert any("the time is over after 10 of 50" in e.text for e in events if isinstance(e, Note))
    clock[0] = 1000.0
    assert len(run_search(Random(), slow, 50, seconds=135, store=store, batch=2)) == 14


class Counting:
    """A runner that keeps the sizes of what it is called with, and how many run at once."""

    running = 0

    def __init__(self, batch=1):
        self.batch, self.sizes, self.most = batch, [], 0

    def __call__(self, trials):
        Counting.running += 1
        self.most = max(self.most, Counting.running)
        self.sizes.append(len(trials))
        time.sleep(0.002)
        Counting.running -= 1
        return [evolve(t, metrics={**t.metrics, **measured(t.arch).metrics}) if t.ok else t for t in trials]


def test_all_archs_of_an_ask_are_screened_at_once_and_the_rest_measured_in_batches():
    def screen(trials):
        sizes.append(len(trials))
        wide = [trial.arch["width"] > 25 for trial in trials]
        return [evolve(t, state="infeasible") if too else t for t, too in zip(trials, wide, strict=True)]

    screen.batch, sizes, costly = 100, [], Counting(batch=3)
    trials = run_search(Random(), costly, 40, batch=10, screen=screen, objectives=BEST)
    assert sizes[0] == 10
    assert sum(sizes) == 40
    assert sum(costly.sizes) == sum(trial.ok for trial in trials) < 40
    assert max(costly.sizes) == 3
    assert [trial.metrics for trial in trials if trial.ok] == [measured(t.arch).metrics for t in trials if t.ok]


def test_what_wants_the_machine_for_itself_runs_while_nothing_else_does():
    alone = Counting(batch=4)
    with ThreadPoolExecutor(3) as executor:
        trials = run_search(Random(), Counting(), 30, batch=10, alone=alone, executor=executor)
    assert len(trials) == sum(alone.sizes) == 30
    assert alone.most == 1
    assert alone.sizes[:3] == [4, 4, 2]
    assert max(alone.sizes) == 4


class Dying(ThreadPoolExecutor):
    """Workers that die of some archs: all that are not done are lost, and nothing more is taken."""

    started = 0

    def __init__(self, fatal, once=()):
        super().__init__(2)
        self.fatal, self.once, self.broken, self.lost = fatal, once, False, []
        Dying.started += 1

    def submit(self, function, measure, trials):
        if self.broken:
            raise BrokenExecutor("broken")
        width = trials[0].arch["width"]
        if width in self.fatal or width in self.once:
            self.once, self.broken = (), True
        if not self.broken:
            return super().submit(function, measure, trials)
        future = Future()
        future.set_exception(BrokenExecutor("out of memory"))
        return future


def test_what_is_lost_with_a_worker_is_measured_again_and_fails_if_one_dies_of_it_twice():
    alone = run_search(Random(), Counting(), 30, batch=30, objectives=BEST)
    once, fatal = ({trial.arch["width"]} for trial in (alone[4], alone[21]))
    pools = []

    class Options:
        def start(self):
            pools.append(Dying(fatal, () if pools else once))
            return pools[-1]

    found = run_search(Random(), Counting(), 30, batch=30, executor=Options(), objectives=BEST)
    assert [trial.arch for trial in found] == [trial.arch for trial in alone]
    failed = [trial for trial in found if trial.arch["width"] in fatal]
    assert {(trial.state, trial.error) for trial in failed} == {("failed", "its worker died twice: out of memory")}
    others = [(trial, other) for trial, other in zip(found, alone, strict=True) if trial not in failed]
    assert all(trial.metrics == other.metrics and trial.ok for trial, other in others)
    assert len(failed) < 5
    assert len(pools) > 2


def test_workers_that_someone_else_started_are_not_started_again():
    alone = run_search(Random(), Counting(), 30, batch=30)
    with pytest.raises(UserError, match="a worker of the executor died"):
        run_search(Random(), Counting(), 30, batch=30, executor=Dying({alone[4].arch["width"]}))


def test_facts_of_a_proposal_are_kept_with_its_trial(tmp_path):
    class Predicting(Random):
        def ask(self, n):
            return [Proposal(arch, extra={"expected": arch["width"] / 2}) for arch in super().ask(n)]

    store = Store(tmp_path / "run.sqlite")
    trials = run_search(Predicting(), lambda arch: {"top1": 1.0 * arch["width"]}, 9, store=store)
    assert [trial.extra for trial in trials] == [{"expected": trial.arch["width"] / 2} for trial in trials]
    assert store.trials() == trials
    assert trials[0].row["expected"] == trials[0].arch["width"] / 2
    assert Trial.from_json(trials[0].to_json()) == trials[0]
