"""The search loop: what is measured and in which order, and that an interrupted search ends with the same trials."""

import math
from contextlib import suppress

import numpy as np
import pytest
from attrs import frozen

from corenas.contracts import (
    EvaluatorContext,
    Failure,
    Metric,
    Note,
    Progress,
    StageDone,
    StageStarted,
    Trial,
    TrialDone,
)
from corenas.errors import UserError
from corenas.objectives import Constraint, Objective, Objectives
from corenas.options import structure
from corenas.search import Stand, read_constraints, read_objectives, search, stand
from corenas.settings import Calibration, SearchSettings
from corenas.space import Categorical, Int, SearchSpace
from corenas.store import Store

pytestmark = pytest.mark.filterwarnings("error")
SPACE = SearchSpace([Int("width", 1, 50), Categorical("op", ("a", "b"))])
METRICS = {
    "flops": Metric("", "min"),
    "params": Metric("", "min"),
    "top1": Metric("%", "max"),
    "latency": Metric("ms", "min"),
}
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


# -- measuring --------------------------------------------------------------------------------------------------------


class FakeCost:
    def of(self, archs):
        return [{"flops": 10 * arch["width"], "params": arch["width"], "activations": 1} for arch in archs]


def make_evaluator(name, is_cheap, calls, result=lambda arch: {}, gives=()):
    @frozen
    class Evaluator:
        cheap = is_cheap

        def provides(self, task):
            return {metric: Metric() for metric in gives}

        def start(self, context):
            assert context.space is SPACE

            def measure(archs):
                calls.append(name)
                return [result(arch) for arch in archs]

            return measure

    return Evaluator()


CONTEXT = EvaluatorContext(SPACE, FakeCost(), None, None, None, Calibration(), np.random.default_rng(0))
ARCH = SPACE.arch({"width": 20, "op": "b"})


def test_costs_come_first_then_cheap_measures_then_the_others():
    calls = []
    table = {
        "slow": make_evaluator("slow", False, calls, lambda arch: {"top1": 90.5}, ["top1"]),
        "cheap": make_evaluator("cheap", True, calls, lambda arch: {"zen": 2}, ["zen"]),
        "later": make_evaluator(
            "later", False, calls, lambda arch: {"latency": np.float32(1.5), "n": np.int64(3)}, ["latency", "n"]
        ),
    }
    trial = stand(table, CONTEXT).trial(ARCH)
    assert calls == ["cheap", "slow", "later"]
    assert (trial.state, trial.error, trial.arch) == ("done", None, ARCH)
    assert trial.metrics == {
        "flops": 200,
        "params": 20,
        "activations": 1,
        "zen": 2,
        "top1": 90.5,
        "latency": 1.5,
        "n": 3,
    }
    assert trial.seconds >= 0
    store = Store()
    store.add(trial)  # plain numbers, whatever the evaluator gave
    assert store.trials() == [trial]


def test_a_broken_constraint_spares_what_is_costly():
    calls = []
    table = {
        "slow": make_evaluator("slow", False, calls, lambda arch: {"top1": 9.0}, ["top1"]),
        "cheap": make_evaluator("cheap", True, calls, lambda arch: {"zen": 2.0}, ["zen"]),
        "more": make_evaluator("more", False, calls),
    }
    for constraint, wanted in ((Constraint("flops", high=100), []), (Constraint("zen", low=3), ["cheap"]),
                               (Constraint("top1", low=10), ["cheap", "slow"])):  # fmt: skip
        calls.clear()
        trial = stand(table, CONTEXT, [constraint]).trial(ARCH)
        assert calls == wanted
        assert (trial.state, trial.error) == ("infeasible", f"not {constraint}")
        assert trial.metrics["flops"] == 200
    nan = make_evaluator("nan", True, calls, lambda arch: {"zen": math.nan}, ["zen"])
    assert stand({"nan": nan}, CONTEXT, [Constraint("zen", low=3)]).trial(ARCH).state == "infeasible"


def boom(arch):
    raise ValueError("no such layer")


@pytest.mark.parametrize(("result", "error"), [
    (lambda arch: Failure("device is gone"), "bad: device is gone"),
    (boom, "bad: ValueError: no such layer"),
    (lambda arch: {"x": "fast"}, "bad: ValueError: could not convert string to float: 'fast'"),
    (lambda arch: None, "bad: "),
])  # fmt: skip
def test_what_cannot_be_measured_is_a_failed_trial(result, error):
    calls = []
    table = {"bad": make_evaluator("bad", True, calls, result, ["x"]), "slow": make_evaluator("slow", False, calls)}
    trial = stand(table, CONTEXT).trial(ARCH)
    assert trial.state == "failed"
    assert trial.error.startswith(error)
    assert calls == ["bad"]
    assert trial.metrics == {"flops": 200, "params": 20, "activations": 1}
    assert Stand([("few", lambda archs: [])]).trial(ARCH).state == "failed"


def test_an_evaluator_that_does_not_give_what_it_promised_fails_the_trial():
    for given in ({}, {"lat": 1.0}, {"latency": 1.0, "flops": -1}):
        table = {"e": make_evaluator("e", False, [], lambda arch, given=given: given, ["latency"])}
        trial = stand(table, CONTEXT, [Constraint("latency", high=0.5)]).trial(ARCH)
        assert trial.state == "failed"
        assert trial.error.startswith("e: promised latency and gave ")
        assert trial.metrics["flops"] == 200


def test_a_users_mistake_in_a_measure_stops_the_search():
    def wrong(arch):
        raise UserError("no data")

    with pytest.raises(UserError, match="no data"):
        stand({"bad": make_evaluator("bad", True, [], wrong)}, CONTEXT).trial(ARCH)


# -- the loop ---------------------------------------------------------------------------------------------------------


def test_no_arch_is_measured_twice_and_the_budget_is_kept():
    counts = {}

    def once(arch):
        counts[arch] = counts.get(arch, 0) + 1
        return measured(arch)

    events, searcher = [], Random()
    trials = search(searcher, once, 70, batch=9, objectives=BEST, emit=events.append)
    assert len(trials) == len(counts) == 70
    assert {*counts.values()} == {1}
    assert [e.trial for e in events if isinstance(e, TrialDone)] == trials
    assert isinstance(events[0], StageStarted)
    assert (events[0].total, events[0].unit, events[0].done) == (70, "trials", 0)
    assert isinstance(events[-1], StageDone)
    best = max(trial.metrics["top1"] for trial in trials)
    assert events[-1].figures == {"top1": best}
    assert [e.done for e in events if isinstance(e, Progress)] == [*range(1, 71)]
    assert all(len(heard) <= 9 for heard in searcher.heard)


def test_a_searcher_hears_all_it_asked_in_its_order_known_or_not():
    asked = []

    class Repeats(Random):
        def ask(self, n):
            first = SPACE.arch({"width": 1})
            asked.append([first, *super().ask(n - 2), first][:n])
            return asked[-1]

    searcher = Repeats()
    search(searcher, measured, 20, batch=6)
    assert searcher.heard == asked


def test_a_searcher_that_has_nothing_more_ends_the_search():
    class Short(Random):
        def ask(self, n):
            return super().ask(n) if len(self.heard) < 2 else []

    events = []
    trials = search(Short(), measured, 50, batch=5, emit=events.append)
    assert 0 < len(trials) <= 10
    assert any(isinstance(event, Note) for event in events)


def test_a_space_that_is_spent_ends_the_search():
    events = []
    trials = search(Random(space=SPACE.fix({"op": "a"}).narrow({"width": [1, 2, 3]})), measured, 50, emit=events.append)
    assert len(trials) == 3
    assert "nothing new" in next(event.text for event in events if isinstance(event, Note))


def test_failed_trials_do_not_stop_a_search_but_nothing_else_than_failed_ones_does():
    def some(arch):
        return measured(arch) if arch["width"] % 5 == 0 else Trial(arch, {}, "failed", 0, "x: boom")

    assert {trial.state for trial in search(Random(), some, 40)} == {"done", "failed"}
    store = Store()
    for _ in range(2):
        with pytest.raises(UserError, match="all 12 trials failed") as caught:
            search(Random(), lambda arch: Trial(arch, {}, "failed", 0, "x: boom"), 12, store=store)
        assert "x: boom" in caught.value.faults[0].hint


@pytest.mark.parametrize("seed", range(5))
def test_what_a_store_holds_counts_and_is_not_measured_again(seed):
    store = Store()
    for width in range(1, 41):
        store.add(measured(SPACE.arch({"width": width, "op": "b"})))
    new = []
    trials = search(Random(seed), lambda arch: new.append(arch) or measured(arch), 50, batch=20, store=store)
    assert len(trials) == 50
    assert len(new) == 10
    assert store.trials() == trials
    assert not {arch["op"] for arch in new if arch["width"] <= 40} & {"b"}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [0, 1, 5, 6, 7, 24, 39])
@pytest.mark.parametrize("where", ["measuring", "storing", "telling", "noting"])
def test_a_killed_search_ends_with_the_same_trials(tmp_path, after, where):
    whole, wanted = Random(), Store()
    search(whole, measured, 40, batch=7, store=wanted)
    left = [after]

    def count(kind):
        if kind == where:
            left[0] -= 1
            if left[0] < 0:
                raise Killed

    class Fragile(Store):
        def add(self, trial):
            super().add(trial)
            count("storing")

        def note(self, key, value):
            count("noting")
            super().note(key, value)

    class Mortal(Random):
        def tell(self, trials):
            count("telling")
            super().tell(trials)

    def mortal(arch):
        count("measuring")
        return measured(arch)

    path = tmp_path / "run.sqlite"
    with suppress(Killed):
        search(Mortal(), mortal, 40, batch=7, store=Fragile(path))
    before = len(Store(path).trials())
    resumed = Random()
    trials = search(resumed, measured, 40, batch=7, store=Store(path))
    assert trials == wanted.trials() == Store(path).trials()
    assert resumed.state_dict() == whole.state_dict() or before == 40  # nothing was asked any more


# -- objectives and constraints ---------------------------------------------------------------------------------------


def settings(**table):
    return structure(table, SearchSettings)


def faults(call):
    with pytest.raises(UserError) as caught:
        call()
    return [(fault.dotted, fault.message) for fault in caught.value.faults]


LARGEST = {"flops": 1000, "params": 50}


@pytest.mark.parametrize(("metric", "bounds", "low", "high"), [
    ("flops", "200M", -math.inf, 2e8), ("flops", 300, -math.inf, 300), ("flops", "60%", -math.inf, 600),
    ("top1", 70, 70, math.inf), ("latency", 5.5, -math.inf, 5.5), ("flops", ["1k", "2.5k"], 1000, 2500),
    ("flops", ["10%", " 90 %"], 100, 900), ("params", {"min": 3}, 3, math.inf),
    ("params", {"max": "50%"}, -math.inf, 25),
    ("top1", {"min": 3, "max": 4}, 3, 4), ("top1", {"max": 4}, -math.inf, 4), ("flops", [5, 5], 5, 5),
])  # fmt: skip
def test_constraints_are_read_in_all_their_forms(metric, bounds, low, high):
    (found,) = read_constraints(settings(constraints={metric: bounds}), METRICS, LARGEST)
    assert found == Constraint(metric, pytest.approx(low), pytest.approx(high))


def test_mistakes_in_constraints_are_told_at_once():
    wrong = settings(constraints={"flpos": 1, "top1": "60%", "params": [3, 2], "latency": {"min": "5%"}, "flops": 1})
    assert faults(lambda: read_constraints(wrong, METRICS, LARGEST)) == [
        ("search.constraints.flpos", "nothing measures 'flpos'"),
        ("search.constraints.top1", "'60%': top1 is not known before the search"),
        ("search.constraints.params", "the range 3.0 to 2.0 is empty"),
        ("search.constraints.latency", "'5%': latency is not known before the search"),
    ]
    for bounds in ([1], [1, 2, 3], {}, {"mni": 1}, "x", True, [1, "y"]):
        assert faults(lambda b=bounds: settings(constraints={"flops": b}))[0][0].startswith("constraints.flops")


def test_objectives_take_their_direction_from_the_metric_unless_told():
    found = read_objectives(settings(objectives=["top1", {"metric": "latency", "weight": 0.5}]), METRICS)
    assert found == Objectives((Objective("top1", "max"), Objective("latency", "min", 0.5)))
    found = read_objectives(settings(objectives=[{"metric": "flops", "direction": "max"}], pareto=True), METRICS)
    assert found == Objectives((Objective("flops", "max"),), True)
    found = read_objectives(settings(objectives="top1", pareto={"metric": "flops", "width": "1M"}), METRICS)
    assert found == Objectives((Objective("top1"),), True, "flops", 1e6)


def test_mistakes_in_objectives_are_told_at_once():
    wrong = settings(objectives=["top1", "top5", {"metric": "x"}], pareto={"metric": "flop", "width": "1M"})
    assert faults(lambda: read_objectives(wrong, METRICS)) == [
        ("search.objectives[1]", "nothing measures 'top5'"),
        ("search.objectives[2]", "nothing measures 'x'"),
        ("search.pareto.metric", "nothing measures 'flop'"),
    ]
    assert faults(lambda: read_objectives(settings(objectives=[]), METRICS))[0][0] == "search.objectives"
    for width in ("5%", 0, "-1M"):
        assert faults(lambda w=width: settings(pareto={"metric": "flops", "width": w}))[0][0] == "pareto.width"
    with pytest.raises(UserError, match=r"did you mean 'top1'\?"):
        read_objectives(settings(objectives="top"), METRICS)
