"""How an arch is measured: in which order, and what becomes of evaluators that fail or break their word."""

import math

import numpy as np
import pytest
import torch
from attrs import frozen

from corenas.contracts import EvaluatorContext, Failure, Measured, Metric
from corenas.errors import UserError
from corenas.measure import NamedEvaluator, TrialRunner, trial_runner
from corenas.objectives import Constraint, Trial
from corenas.space import SearchSpace
from corenas.store import Store
from corenas.variables import Categorical, Int

pytestmark = pytest.mark.filterwarnings("error")
SPACE = SearchSpace([Int("width", 1, 50), Categorical("op", ("a", "b"))])


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

            def measure(archs, fidelity):
                calls.append(name)
                return [result(arch) for arch in archs]

            return measure

    return Evaluator()


CONTEXT = EvaluatorContext(SPACE, FakeCost(), None, None, None, None, None, None, None)
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
    trial = trial_runner(table, CONTEXT).measure(ARCH)
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
        trial = trial_runner(table, CONTEXT, [constraint]).measure(ARCH)
        assert calls == wanted
        assert (trial.state, trial.error) == ("infeasible", f"not {constraint}")
        assert trial.metrics["flops"] == 200
    nan = make_evaluator("nan", True, calls, lambda arch: {"zen": math.nan}, ["zen"])
    assert trial_runner({"nan": nan}, CONTEXT, [Constraint("zen", low=3)]).measure(ARCH).state == "infeasible"


def boom(arch):
    raise ValueError("no such layer")


@pytest.mark.parametrize(("result", "error"), [
    (lambda arch: Failure("device is gone"), "bad: device is gone"),
    (boom, "bad: ValueError: no such layer"),
    (lambda arch: {"x": "3"}, "bad: TypeError: x is text, no number"),
    (lambda arch: {"x": 10**400}, "bad: OverflowError"),
    (lambda arch: None, "bad: "),
])  # fmt: skip
def test_what_cannot_be_measured_is_a_failed_trial(result, error):
    calls = []
    table = {"bad": make_evaluator("bad", True, calls, result, ["x"]), "slow": make_evaluator("slow", False, calls)}
    trial = trial_runner(table, CONTEXT).measure(ARCH)
    assert trial.state == "failed"
    assert trial.error.startswith(error)
    assert calls == ["bad"]
    assert trial.metrics == {"flops": 200, "params": 20, "activations": 1}
    assert TrialRunner([NamedEvaluator("few", frozenset(), lambda archs, fidelity: [])]).measure(ARCH).state == "failed"


def test_an_evaluator_that_does_not_give_what_it_promised_fails_the_trial():
    for given in ({}, {"lat": 1.0}, {"latency": 1.0, "flops": -1}):
        table = {"e": make_evaluator("e", False, [], lambda arch, given=given: given, ["latency"])}
        trial = trial_runner(table, CONTEXT, [Constraint("latency", high=0.5)]).measure(ARCH)
        assert trial.state == "failed"
        assert trial.error.startswith("e: promised latency and gave ")
        assert trial.metrics["flops"] == 200


def test_a_users_mistake_in_a_measure_stops_the_search():
    def wrong(arch):
        raise UserError("no data")

    with pytest.raises(UserError, match="no data"):
        trial_runner({"bad": make_evaluator("bad", True, [], wrong)}, CONTEXT).measure(ARCH)


def test_an_evaluator_that_cannot_start_is_named():
    class Broken:
        cheap = True

        def provides(self, task):
            return {}

        def start(self, context):
            raise KeyError("device")

    with pytest.raises(UserError, match="latency failed: KeyError: 'device'"):
        trial_runner({"latency": Broken()}, CONTEXT)


def test_what_is_random_hangs_on_the_arch_alone():
    result = lambda arch: {"noise": float(torch.rand(()))}  # noqa: E731
    other = SPACE.arch({"width": 3})
    first, again = (
        trial_runner({"n": make_evaluator("n", True, [], result, ["noise"])}, CONTEXT, seed=1) for _ in range(2)
    )
    one, two = first.measure(ARCH), first.measure(other)
    assert one.metrics != two.metrics
    assert (again.measure(other).metrics, again.measure(ARCH).metrics) == (two.metrics, one.metrics)
    elsewhere = trial_runner({"n": make_evaluator("n", True, [], result, ["noise"])}, CONTEXT, seed=2)
    assert elsewhere.measure(ARCH).metrics["noise"] != one.metrics["noise"]


def test_cheap_evaluators_are_asked_once_for_all_archs_and_costly_ones_as_they_wish():
    sizes = []

    class Fast:
        cheap = True

        def provides(self, task):
            return {"zen": Metric()}

        def start(self, context):
            return lambda archs, fidelity: sizes.append(len(archs)) or [{"zen": arch["width"]} for arch in archs]

    archs = [SPACE.arch({"width": width}) for width in (1, 2, 30, 4)]
    runner = trial_runner({"fast": Fast()}, CONTEXT, [Constraint("flops", high=100)])
    trials = runner([Trial(arch) for arch in archs])
    assert sizes == [3]
    assert [trial.state for trial in trials] == ["done", "done", "infeasible", "done"]
    assert [trial.metrics.get("zen") for trial in trials] == [1, 2, None, 4]
    assert [trial.metrics for trial in trials] == [runner.measure(arch).metrics for arch in archs]


def test_one_arch_that_fails_does_not_spoil_those_that_are_measured_with_it():
    def picky(arch):
        if arch["width"] == 3:
            raise ValueError("odd")
        if arch["width"] == 5:
            raise SystemExit
        return Measured({"n": 1.0}, {"device": "here"})

    runner = trial_runner({"picky": make_evaluator("picky", True, [], picky, ["n"])}, CONTEXT)
    trials = runner([Trial(SPACE.arch({"width": width})) for width in (2, 3, 4, 5)])
    assert [trial.error for trial in trials] == [None, "picky: ValueError: odd", None, "picky: SystemExit"]
    assert [dict(trial.extra) for trial in trials] == [{"device": "here"}, {}, {"device": "here"}, {}]


def test_what_draws_from_torchs_generator_gives_each_arch_the_same_alone_and_in_company():
    evaluator = make_evaluator("n", True, [], lambda arch: {"noise": float(torch.rand(()))}, ["noise"])
    runner = trial_runner({"n": evaluator}, CONTEXT)
    archs = [SPACE.arch({"width": width}) for width in (2, 3, 4)]
    together = runner([Trial(arch) for arch in archs])
    assert [trial.metrics for trial in together] == [runner.measure(arch).metrics for arch in archs]
