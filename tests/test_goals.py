"""What a spec searches for: objectives and constraints in all their forms, and what is wrong with them."""

import math

import pytest

from corenas.contracts import Metric
from corenas.errors import UserError
from corenas.objectives import Constraint, Objective, Objectives
from corenas.options import structure
from corenas.run.goals import read_constraints, read_objectives
from corenas.run.spec import SearchSettings

METRICS = {
    "flops": Metric("", "min"),
    "params": Metric("", "min"),
    "top1": Metric("%", "max"),
    "latency": Metric("ms", "min"),
}


def settings(**table):
    return structure(table, SearchSettings)


def faults(call):
    with pytest.raises(UserError) as caught:
        call()
    return [(fault.dotted, fault.message) for fault in caught.value.faults]


LARGEST = {"flops": 1000, "params": 50}.__getitem__


@pytest.mark.parametrize(("metric", "bounds", "low", "high"), [
    ("flops", "200M", -math.inf, 2e8), ("flops", 300, -math.inf, 300), ("flops", "60%", -math.inf, 600),
    ("top1", 70, 70, math.inf), ("latency", 5.5, -math.inf, 5.5), ("flops", ["1k", "2.5k"], 1000, 2500),
    ("flops", ["10%", " 90 %"], 100, 900), ("params", {"min": 3}, 3, math.inf),
    ("params", {"max": "50%"}, -math.inf, 25),
    ("top1", {"min": 3, "max": 4}, 3, 4), ("top1", {"max": 4}, -math.inf, 4), ("flops", [5, 5], 5, 5),
])  # fmt: skip
def test_constraints_are_read_in_all_their_forms(metric, bounds, low, high):
    (found,) = read_constraints(settings(constraints={metric: bounds}).bounds[0], METRICS, LARGEST)
    assert found == Constraint(metric, pytest.approx(low), pytest.approx(high))


def test_mistakes_in_constraints_are_told_at_once():
    wrong = settings(constraints={"flpos": 1, "top1": "60%", "params": [3, 2], "latency": {"min": "5%"}, "flops": 1})
    assert faults(lambda: read_constraints(wrong.bounds[0], METRICS, LARGEST)) == [
        ("flpos", "nothing measures 'flpos'"),
        ("top1", "'60%': top1 is not known before the search"),
        ("params", "the range 3.0 to 2.0 is empty"),
        ("latency", "'5%': latency is not known before the search"),
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
    for width in ("5%", 0, "-1M", 1e-310):
        assert faults(lambda w=width: settings(pareto={"metric": "flops", "width": w}))[0][0] == "pareto.width"
    two = ["top1", "flops"]
    (found,) = faults(lambda: read_objectives(settings(objectives=two), METRICS))
    assert found[0] == "search.objectives"
    assert "what one unit of each is worth" in found[1]
    assert read_objectives(settings(objectives=two, pareto=True), METRICS).pareto
    with pytest.raises(UserError, match=r"did you mean 'top1'\?"):
        read_objectives(settings(objectives="top"), METRICS)
