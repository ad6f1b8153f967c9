"""What a run does with what it is given: events, formats, evaluators, stages; with toy components only."""

import json
from typing import ClassVar

import pytest
import torch
import toys
from attrs import frozen

from corenas.contracts import Metric, RunDone, RunStarted, StageDone, StageStarted, TrialDone
from corenas.errors import UserError
from corenas.run import run
from corenas.spec import load_spec
from corenas.store import Store


@frozen
class Letters:
    """Counts the letters of an arch; fails for those with pooling."""

    metric: str = "letters"
    cheap: ClassVar = True

    def provides(self, task):
        return {self.metric: Metric("", "max")}

    def start(self, context):
        def measure(archs, fidelity):
            if archs[0]["op"] == "pool":
                raise RuntimeError("no pooling on this device")
            return [{self.metric: float(len(str(dict(archs[0]))))}]

        return measure


@pytest.fixture(scope="module")
def catalogue():
    return toys.make_catalogue(evaluators=Letters)


@pytest.fixture
def spec(tmp_path, catalogue):
    def write(**changes):
        return toys.make_spec(tmp_path, catalogue, **{"search": {"trials": 12, "objectives": ["letters"]}} | changes)

    return write


def test_a_run_tells_its_listeners_of_every_stage_and_trial(spec, catalogue, tmp_path):
    events = []
    result = run(spec(), catalogue, tmp_path / "run", events.append)
    assert isinstance(events[0], RunStarted)
    assert isinstance(events[-1], RunDone)
    assert [e.stage for e in events if isinstance(e, StageStarted)] == ["train", "search", "export"]
    assert [e.stage for e in events if isinstance(e, StageDone)] == ["train", "search", "export"]
    assert len([e for e in events if isinstance(e, TrialDone)]) == result["trials"] == 12


def test_trials_that_fail_are_kept_with_their_reason_and_never_win(spec, catalogue, tmp_path):
    result = run(spec(), catalogue, tmp_path / "run", lambda event: None)
    trials = Store(tmp_path / "run" / "run.sqlite", readonly=True).trials()
    failed = [trial for trial in trials if trial.state == "failed"]
    assert failed
    assert all("no pooling on this device" in trial.error for trial in failed)
    assert result["best"]["arch"]["op"] != "pool"


def test_a_network_is_written_by_exporters_with_its_arch_and_its_cost(spec, catalogue, tmp_path):
    run(spec(), catalogue, tmp_path / "run", lambda event: None)
    names = {path.name for path in (tmp_path / "run" / "best").iterdir()}
    assert names == {"arch.toml", "cost.json", "names.txt"}


def test_no_epochs_leave_a_supernet_as_it_was_made(spec, catalogue, tmp_path):
    chosen = spec(train={"epochs": 0, "batch_size": 32})
    run(chosen, catalogue, tmp_path / "run", lambda event: None)
    saved = torch.load(tmp_path / "run" / "supernet.pt", weights_only=True)
    assert saved["index"] == 0
    again = run(chosen, catalogue, tmp_path / "run", lambda event: None)
    assert again["trials"] == 12


def test_a_metric_that_two_evaluators_give_is_a_mistake(spec, catalogue, tmp_path):
    with pytest.raises(UserError, match="letters is measured already") as error:
        run(spec(evaluators=["toy", "toy"]), catalogue, tmp_path / "run", lambda event: None)
    assert error.value.faults[0].dotted == "evaluators[1]"
    with pytest.raises(UserError, match="flops is measured already"):
        run(spec(evaluators=["toy", {"type": "toy", "metric": "flops"}]), catalogue, tmp_path / "r", lambda event: None)


def test_two_evaluators_of_one_type_measure_side_by_side(spec, catalogue, tmp_path):
    chosen = spec(evaluators=["toy", {"type": "toy", "metric": "more"}])
    result = run(chosen, catalogue, tmp_path / "run", lambda event: None)
    assert result["best"]["metrics"]["letters"] == result["best"]["metrics"]["more"]


def test_pareto_mode_gives_a_front_that_no_trial_beats(spec, catalogue, tmp_path):
    search = {"trials": 20, "objectives": ["letters", "flops"], "pareto": True}
    result = run(spec(search=search), catalogue, tmp_path / "run", lambda event: None)
    trials = [t for t in Store(tmp_path / "run" / "run.sqlite", readonly=True).trials() if t.ok]
    pairs = [(t.metrics["letters"], -t.metrics["flops"]) for t in trials]
    best = {pair for pair in pairs if not [p for p in pairs if p != pair and p[0] >= pair[0] and p[1] >= pair[1]]}
    assert {(row["metrics"]["letters"], -row["metrics"]["flops"]) for row in result["front"]} == best


def test_the_resolved_spec_in_the_run_directory_gives_the_same_run(spec, catalogue, tmp_path):
    first = run(spec(), catalogue, tmp_path / "one", lambda event: None)
    resolved, _ = load_spec(tmp_path / "one" / "spec.toml", catalogue)
    second = run(resolved, catalogue, tmp_path / "two", lambda event: None)
    assert first["best"] == second["best"]
    assert json.dumps(first["front"]) == json.dumps(second["front"])


def test_a_finished_run_started_again_tells_its_result_and_leaves_its_test_data_alone(
    spec, catalogue, tmp_path, monkeypatch
):
    first = run(spec(), catalogue, tmp_path / "run", lambda event: None)
    asked, dataset = [], toys.Task.dataset
    monkeypatch.setattr(
        toys.Task, "dataset", lambda self, split, augmented: asked.append(split) or dataset(self, split, augmented)
    )
    events = []
    assert run(spec(), catalogue, tmp_path / "run", events.append) == first
    assert "test" not in asked
    assert [type(event) for event in events] == [RunStarted, RunDone]
