"""Hyper-parameters as variables: each trial is a training of its own with the spec overridden, without test data."""

from typing import ClassVar

import pytest
import toys
from attrs import frozen
from torch import nn

from corenas.calibrate import evaluate
from corenas.contracts import Metric
from corenas.errors import UserError
from corenas.loading import Batches
from corenas.run.prepare import prepare
from corenas.run.stages import run_spec
from corenas.store import Store

SPACE = {
    "spec:train.optimizer.lr": {"type": "float", "low": 1e-6, "high": 0.3, "log": True},
    "spec:train.ema": [0.0, 0.5],
    **toys.TABLE, "width": [4, 8], "op": ["skip"], "depth": 1,
}  # fmt: skip


@frozen
class Tune:
    """Trains nothing that is shared: a search, then the best arch with the best options."""

    stages: ClassVar = ("search", "retrain")
    needs: ClassVar = ("searcher",)

    def start(self, context):
        raise AssertionError("there is no supernet to train")


@frozen
class Alone:
    """The accuracy of an arch that is trained by itself."""

    cheap: ClassVar = False

    def provides(self, task):
        return {"top1": Metric("%", "max")}

    def start(self, context):
        assert context.supernet is None
        valid = Batches(context.task, "valid", 48, context.device)
        return lambda archs, fidelity: [evaluate(context.alone(a, fidelity).eval(), context.task, valid) for a in archs]


@pytest.fixture(scope="module")
def catalogue():
    return toys.make_catalogue(algorithms=Tune, evaluators=Alone)


def settings(**changes):
    train = {"epochs": 6, "batch_size": 16, "optimizer": {"type": "SGD", "lr": 1e-5, "momentum": 0.9}}
    return {"space": SPACE, "mutator": None, "train": train, "search": {"trials": 8}} | changes


def test_the_best_options_are_found_and_used_for_the_last_training(tmp_path, catalogue, monkeypatch):
    asked, dataset = [], toys.Task.dataset
    monkeypatch.setattr(toys.Task, "dataset", lambda self, *args: asked.append(args[0]) or dataset(self, *args))
    spec = toys.make_spec(tmp_path, catalogue, **settings())
    result = run_spec(spec, catalogue, tmp_path / "run", lambda event: None)
    trials = Store(tmp_path / "run/run.sqlite", readonly=True).trials()
    rates = {t.arch["spec:train.optimizer.lr"]: t.metrics["top1"] for t in trials}
    assert len(rates) == 8
    assert max(rates.values()) > 60 > min(rates.values())
    best = result["best"]["arch"]["spec:train.optimizer.lr"]
    assert rates[best] == max(rates.values())
    alike = [t for t in trials if t.metrics["top1"] == rates[best]]  # of which the cheaper one is taken
    assert result["best"]["metrics"]["flops"] == min(t.metrics["flops"] for t in alike)
    assert result["best"]["test"]["top1"] > 60
    assert asked.count("test") == 1
    assert asked[-1] == "test"
    assert {"search", "retrain", "export"} == result["seconds"].keys()


def test_a_variable_that_overrides_nothing_is_a_mistake_with_its_place(tmp_path, catalogue):
    for key, text in (("spec:train.lr", "no key"), ("spec:train.epochs.x", "no key"), ("spec:search.trials", "only")):
        with pytest.raises(UserError, match=text):
            toys.make_spec(tmp_path, catalogue, **settings(space={**toys.TABLE, key: [1, 2]}))
    for key, choices, text in (
        ("spec:train.precision", ["float32", "float31"], "found 'float31'"),
        ("spec:train.optimizer.type", ["SGD", "Adam", "Adan"], "no optimizer 'Adan'"),
        ("spec:train.batch_size", {"type": "float", "low": 8, "high": 9}, "expected a whole number, found 8.0"),
        ("spec:train.epochs", ["many"], "expected a whole number, found 'many'"),
    ):
        with pytest.raises(UserError, match=text):
            toys.make_spec(tmp_path, catalogue, **settings(space={**toys.TABLE, key: choices}))
    with pytest.raises(UserError, match="epochs"):
        toys.make_spec(tmp_path, catalogue, **settings(space={**toys.TABLE, "spec:train.epochs": [-1, 2]}))


def test_a_subnet_without_training_is_built_with_the_options_of_its_arch(tmp_path, catalogue):
    table = {**SPACE, "spec:backbone.norm": [True, False]}
    prepared = prepare(toys.make_spec(tmp_path, catalogue, **settings(space=table)))
    context = prepared.evaluator_context(None)
    for norm in (True, False):
        network = context.subnet(prepared.spec.space.arch({"spec:backbone.norm": norm}))
        assert any(isinstance(module, nn.BatchNorm2d) for module in network.modules()) == norm
