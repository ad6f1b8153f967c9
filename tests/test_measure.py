"""How an arch is measured: in which order, and what becomes of evaluators that fail or break their word."""

import math

import numpy as np
import pytest
import torch
from attrs import frozen

from corenas.contracts import EvaluatorContext, Failure, Metric
from corenas.errors import UserError
from corenas.measure import Stand, stand
from corenas.objectives import Constraint
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
    trial = stand(table, CONTEXT)(ARCH)
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
        trial = stand(table, CONTEXT, [constraint])(ARCH)
        assert calls == wanted
        assert (trial.state, trial.error) == ("infeasible", f"not {constraint}")
        assert trial.metrics["flops"] == 200
    nan = make_evaluator("nan", True, calls, lambda arch: {"zen": math.nan}, ["zen"])
    assert stand({"nan": nan}, CONTEXT, [Constraint("zen", low=3)])(ARCH).state == "infeasible"


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
    trial = stand(table, CONTEXT)(ARCH)
    assert trial.state == "failed"
    assert trial.error.startswith(error)
    assert calls == ["bad"]
    assert trial.metrics == {"flops": 200, "params": 20, "activations": 1}
    assert Stand([("few", frozenset(), lambda archs, fidelity: [])])(ARCH).state == "failed"


def test_an_evaluator_that_does_not_give_what_it_promised_fails_the_trial():
    for given in ({}, {"lat": 1.0}, {"latency": 1.0, "flops": -1}):
        table = {"e": make_evaluator("e", False, [], lambda arch, given=given: given, ["latency"])}
        trial = stand(table, CONTEXT, [Constraint("latency", high=0.5)])(ARCH)
        assert trial.state == "failed"
        assert trial.error.startswith("e: promised latency and gave ")
        assert trial.metrics["flops"] == 200


def test_a_users_mistake_in_a_measure_stops_the_search():
    def wrong(arch):
        raise UserError("no data")

    with pytest.raises(UserError, match="no data"):
        stand({"bad": make_evaluator("bad", True, [], wrong)}, CONTEXT)(ARCH)


def test_an_evaluator_that_cannot_start_is_named():
    class Broken:
        cheap = True

        def provides(self, task):
            return {}

        def start(self, context):
            raise KeyError("device")

    with pytest.raises(UserError, match="latency failed: KeyError: 'device'"):
        stand({"latency": Broken()}, CONTEXT)


def test_what_is_random_hangs_on_the_arch_alone():
    result = lambda arch: {"noise": float(torch.rand(()))}  # noqa: E731
    other = SPACE.arch({"width": 3})
    first, again = (stand({"n": make_evaluator("n", True, [], result, ["noise"])}, CONTEXT, seed=1) for _ in range(2))
    one, two = first(ARCH), first(other)
    assert one.metrics != two.metrics
    assert (again(other).metrics, again(ARCH).metrics) == (two.metrics, one.metrics)
    elsewhere = stand({"n": make_evaluator("n", True, [], result, ["noise"])}, CONTEXT, seed=2)
    assert elsewhere(ARCH).metrics["noise"] != one.metrics["noise"]
