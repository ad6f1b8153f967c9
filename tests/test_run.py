"""What a run does with what it is given: events, formats, evaluators, stages; with toy components only."""

import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from concurrent import futures
from pathlib import Path
from typing import ClassVar

import pytest
import tomli
import torch
import toys
from attrs import evolve, frozen

from corenas import calibrate
from corenas.contracts import Metric, Note, RunDone, RunStarted, StageDone, StageStarted, TrialDone
from corenas.errors import UserError
from corenas.mutable import apply
from corenas.objectives import Trial, amount
from corenas.ranking import kendall_tau
from corenas.run.alone import inherit, stand_alone, subnet
from corenas.run.folder import appearing, opened
from corenas.run.prepare import load_supernet, prepare
from corenas.run.result import cost_card, exported, write_folder
from corenas.run.spec import load_spec
from corenas.run.stages import run_spec
from corenas.run.workers import WorkerRunner
from corenas.store import Store
from corenas.testing.small import same


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
    result = run_spec(spec(), catalogue, tmp_path / "run", events.append)
    assert isinstance(events[0], RunStarted)
    assert isinstance(events[-1], RunDone)
    assert [e.stage for e in events if isinstance(e, StageStarted)] == ["train", "search", "export"]
    assert [e.stage for e in events if isinstance(e, StageDone)] == ["train", "search", "export"]
    assert len([e for e in events if isinstance(e, TrialDone)]) == result["trials"] == 12


def test_trials_that_fail_are_kept_with_their_reason_and_never_win(spec, catalogue, tmp_path):
    result = run_spec(spec(), catalogue, tmp_path / "run", lambda event: None)
    trials = Store(tmp_path / "run" / "run.sqlite", readonly=True).trials()
    failed = [trial for trial in trials if trial.state == "failed"]
    assert failed
    assert all("no pooling on this device" in trial.error for trial in failed)
    assert result["best"]["arch"]["op"] != "pool"


def test_a_network_is_written_by_exporters_with_its_arch_and_its_cost(spec, catalogue, tmp_path):
    run_spec(spec(), catalogue, tmp_path / "run", lambda event: None)
    names = {path.name for path in (tmp_path / "run" / "best").iterdir()}
    assert names == {"arch.toml", "cost.json", "names.txt"}


def test_no_epochs_leave_a_supernet_as_it_was_made(spec, catalogue, tmp_path):
    chosen = spec(train={"epochs": 0, "batch_size": 32})
    run_spec(chosen, catalogue, tmp_path / "run", lambda event: None)
    saved = torch.load(tmp_path / "run" / "supernet.pt", weights_only=True)
    assert saved["place"][-1] == 0
    again = run_spec(chosen, catalogue, tmp_path / "run", lambda event: None)
    assert again["trials"] == 12


def test_an_evaluator_that_does_not_say_what_it_measures_is_named(tmp_path):
    for given in (lambda *_: 1 / 0, lambda *_: None):
        broken = frozen(type("Broken", (Letters,), {"__doc__": "Broken.", "provides": given}))
        catalogue = toys.make_catalogue(evaluators=broken)
        with pytest.raises(UserError, match=r"evaluators\[0\] \(Broken\) failed"):
            prepare(toys.make_spec(tmp_path, catalogue), data=False)


def test_a_metric_that_two_evaluators_give_is_a_mistake(spec, catalogue, tmp_path):
    with pytest.raises(UserError, match="letters is measured already") as error:
        run_spec(spec(evaluators=["toy", "toy"]), catalogue, tmp_path / "run", lambda event: None)
    assert error.value.faults[0].dotted == "evaluators[1]"
    with pytest.raises(UserError, match="flops is measured already"):
        run_spec(
            spec(evaluators=["toy", {"type": "toy", "metric": "flops"}]), catalogue, tmp_path / "r", lambda event: None
        )


def test_two_evaluators_of_one_type_measure_side_by_side(spec, catalogue, tmp_path):
    chosen = spec(evaluators=["toy", {"type": "toy", "metric": "more"}])
    result = run_spec(chosen, catalogue, tmp_path / "run", lambda event: None)
    assert result["best"]["metrics"]["letters"] == result["best"]["metrics"]["more"]


def test_pareto_mode_gives_a_front_that_no_trial_beats(spec, catalogue, tmp_path):
    search = {"trials": 20, "objectives": ["letters", "flops"], "pareto": True}
    result = run_spec(spec(search=search), catalogue, tmp_path / "run", lambda event: None)
    trials = [t for t in Store(tmp_path / "run" / "run.sqlite", readonly=True).trials() if t.ok]
    pairs = [(t.metrics["letters"], -t.metrics["flops"]) for t in trials]
    best = {pair for pair in pairs if not [p for p in pairs if p != pair and p[0] >= pair[0] and p[1] >= pair[1]]}
    assert {(row["metrics"]["letters"], -row["metrics"]["flops"]) for row in result["front"]} == best


def test_every_network_of_a_front_is_exported_the_best_by_the_first_objective_first(spec, catalogue, tmp_path):
    search = {"trials": 20, "objectives": [{"metric": "params", "direction": "max"}, "flops"], "pareto": True}
    chosen = spec(search=search, export={"formats": ["toy"], "front": True})
    folder = tmp_path / "run"
    result = run_spec(chosen, catalogue, folder, lambda event: None)
    ranked = sorted(result["front"], key=lambda row: row["folder"])
    params = [row["metrics"]["params"] for row in ranked]
    assert len(ranked) > 1
    assert params == sorted(params, reverse=True)
    for place, row in enumerate(ranked, 1):
        figures = [f"{name}-{amount(row['metrics'][name])}" for name in ("params", "flops")]
        assert row["folder"] == "-".join([f"front/{place:0{len(str(len(ranked)))}}", *figures])
    assert {path.name for path in (folder / "front").iterdir()} == {row["folder"][6:] for row in ranked}
    for row in ranked:
        inside = folder / row["folder"]
        assert tomli.loads((inside / "arch.toml").read_text()) == row["arch"]
        card = json.loads((inside / "cost.json").read_text())
        assert card["flops"] == row["metrics"]["flops"]
        assert card["test"] == {}  # test data is touched once, for the best
        assert (inside / "names.txt").exists()
    shutil.rmtree(folder / ranked[1]["folder"])  # what is gone is written again
    assert run_spec(chosen, catalogue, folder, lambda event: None)["front"] == result["front"]
    assert (folder / ranked[1]["folder"]).is_dir()


@frozen
class Retraining(toys.AlgorithmOptions):
    """Trains what it has found from scratch."""

    stages: ClassVar = ("search", "retrain")
    needs: ClassVar = ("searcher",)


def test_a_front_is_trained_from_scratch_where_the_best_is(tmp_path):
    catalogue = toys.make_catalogue(evaluators=Letters, algorithms=Retraining)
    spec = toys.make_spec(
        tmp_path,
        catalogue,
        mutator=None,
        search={"trials": 12, "objectives": [{"metric": "params", "direction": "max"}, "flops"], "pareto": True},
        export={"formats": ["toy"], "front": True},
        train={"epochs": 1, "batch_size": 32},
    )
    events = []
    result = run_spec(spec, catalogue, tmp_path / "run", events.append)
    stages = [e.stage for e in events if isinstance(e, StageStarted) and e.stage.startswith("retrain")]
    assert len(result["front"]) > 1
    assert {*stages} == {"retrain", *(f"retrain-front-{i}" for i in range(2, len(result["front"]) + 1))}
    assert (tmp_path / "run/retrain-front-2.pt").exists()


def test_the_resolved_spec_in_the_run_directory_gives_the_same_run(spec, catalogue, tmp_path):
    first = run_spec(spec(), catalogue, tmp_path / "one", lambda event: None)
    resolved, _ = load_spec(tmp_path / "one" / "spec.toml", catalogue)
    second = run_spec(resolved, catalogue, tmp_path / "two", lambda event: None)
    assert first["best"] == second["best"]
    assert json.dumps(first["front"]) == json.dumps(second["front"])


def test_a_finished_run_started_again_tells_its_result_and_leaves_its_test_data_alone(
    spec, catalogue, tmp_path, monkeypatch
):
    first = run_spec(spec(), catalogue, tmp_path / "run", lambda event: None)
    asked, dataset = [], toys.Task.dataset
    monkeypatch.setattr(
        toys.Task, "dataset", lambda self, split, augmented: asked.append(split) or dataset(self, split, augmented)
    )
    events = []
    assert run_spec(spec(), catalogue, tmp_path / "run", events.append) == first
    assert "test" not in asked
    assert [type(event) for event in events] == [RunStarted, RunDone]


# -- other stages -----------------------------------------------------------------------------------------------------


@frozen
class Deriving(toys.AlgorithmOptions):
    """Says itself which arch is best, after training."""

    stages: ClassVar = ("train", "derive", "retrain")
    needs: ClassVar = ("mutator",)

    def start(self, context):
        trainer = super().start(context)
        trainer.derive = lambda: {"op": "skip", "width": 4}
        return trainer


@frozen
class Wide(toys.BackboneOptions):
    """The toy network, its convolutions with or without batch norm."""

    norm: bool = True

    def build(self, space):
        return toys.Body(space.tree, self.norm)


def test_an_arch_that_an_algorithm_derives_is_trained_again_as_the_spec_says(tmp_path):
    catalogue = toys.make_catalogue(algorithms=Deriving, backbones=Wide)
    retrain = {"train": {"epochs": 2, "batch_size": 16}, "backbone": {"type": "toy", "norm": False}}
    spec = toys.make_spec(tmp_path, catalogue, searcher=None, evaluators=[], retrain=retrain)
    events = []
    result = run_spec(spec, catalogue, tmp_path / "run", events.append)
    assert [e.stage for e in events if isinstance(e, StageStarted)] == ["train", "retrain", "export"]
    assert result["best"]["arch"] == dict(spec.space.arch({"op": "skip", "width": 4}))
    assert result["trials"] == 0
    assert result["best"]["test"]["top1"] > 34
    saved = torch.load(tmp_path / "run/retrain.pt", weights_only=True)
    assert saved["place"][-1] == 12
    assert not [name for name in saved["model"] if "norm" in name]
    card = json.loads((tmp_path / "run/best/cost.json").read_text())
    assert card["params"] == sum(t.numel() for n, t in saved["model"].items() if "op.candidates" not in n)


@frozen
class Baseline(toys.AlgorithmOptions):
    """Trains one arch, the default."""

    stages: ClassVar = ("retrain",)
    needs: ClassVar = ()


def test_a_retraining_may_see_the_validation_images_as_well(tmp_path):
    catalogue, seen = toys.make_catalogue(algorithms=Deriving), []
    for data in ("train", "train+valid"):
        retrain = {"train": {"epochs": 1, "batch_size": 8}, "data": data}
        spec = toys.make_spec(tmp_path, catalogue, searcher=None, evaluators=[], retrain=retrain)
        events = []
        run_spec(spec, catalogue, tmp_path / data, events.append)
        seen.append(next(e.total for e in events if isinstance(e, StageStarted) and e.stage == "retrain"))
        assert torch.load(tmp_path / data / "retrain.pt", weights_only=True)["place"][-1] == seen[-1]
    splits = prepare(spec).task.splits
    assert seen == [splits["train"] // 8, (splits["train"] + splits["valid"]) // 8]


@pytest.mark.parametrize(("stages", "message"), [
    (("train", "search", "retrian"), "expected some of train, search, derive, retrain"), ("train", "expected some of"),
    (("search", "train"), "in this order"), (("derive",), "derive comes after train"),
    (("train", "search", "derive"), "without search"),
], ids=str)  # fmt: skip
def test_stages_that_there_are_not_are_refused(tmp_path, stages, message):
    odd = frozen(type("Odd", (toys.AlgorithmOptions,), {"__doc__": "Odd.", "stages": stages}))
    with pytest.raises(UserError, match=message):
        toys.make_spec(tmp_path, toys.make_catalogue(algorithms=odd))


def test_a_need_that_there_is_not_is_refused(tmp_path):
    odd = frozen(type("Odd", (toys.AlgorithmOptions,), {"__doc__": "Odd.", "needs": ("mutators",)}))
    with pytest.raises(UserError, match="this algorithm needs \\['mutators'\\]"):
        toys.make_spec(tmp_path, toys.make_catalogue(algorithms=odd))


def test_what_does_not_derive_is_refused_before_it_trains_and_so_are_constraints_that_nothing_holds_to(tmp_path):
    silent = frozen(type("Silent", (Deriving,), {"__doc__": "Silent.", "start": toys.AlgorithmOptions.start}))
    catalogue = toys.make_catalogue(algorithms=silent)
    with pytest.raises(UserError, match="has no `derive`"):
        run_spec(toys.make_spec(tmp_path, catalogue, searcher=None), catalogue, tmp_path / "run", lambda event: None)
    assert not (tmp_path / "run" / "supernet.pt").exists()
    spec = toys.make_spec(tmp_path, catalogue, searcher=None, search={"constraints": {"flops": "50%"}})
    with pytest.raises(UserError, match="no search, which would hold to these"):
        prepare(spec, weights=False)


@frozen
class Choosy(toys.AlgorithmOptions):
    """Trains no network of more than 20,000 flops."""

    def check(self, context):
        assert context.supernet is not None
        if context.cost.of([context.space.largest()])[0]["flops"] > 20e3:
            raise UserError("this network is too large for it", key=("space",))


def test_what_an_algorithm_cannot_train_is_told_with_the_other_mistakes_before_there_are_weights(tmp_path):
    catalogue = toys.make_catalogue(algorithms=Choosy)
    spec = toys.make_spec(tmp_path, catalogue, search={"constraints": {"latency": 1.0}})
    with pytest.raises(UserError, match="latency") as caught:
        prepare(spec, data=False, weights=False)
    assert "space: this network is too large for it" in str(caught.value)
    small = toys.make_spec(tmp_path, catalogue, space=toys.TABLE | {"width": [4], "depth": [1]})
    prepare(small, data=False, weights=False)


@frozen
class Rare(toys.AlgorithmOptions):
    """A checkpoint after every second epoch, whatever the spec says."""

    def start(self, context):
        trainer = super().start(context)
        trainer.phases = [evolve(phase, train=evolve(phase.train, checkpoint_every=2)) for phase in trainer.phases]
        return trainer


def test_a_phase_that_has_written_no_checkpoint_yet_begins_again(tmp_path):
    catalogue = toys.make_catalogue(algorithms=Rare)
    spec = begun(tmp_path, catalogue, points=1)
    assert not (tmp_path / "run" / "supernet.pt").exists()
    assert run_spec(spec, catalogue, tmp_path / "run", lambda event: None)["trials"] == 12


def test_a_retraining_that_the_algorithm_does_not_have_is_refused(tmp_path):
    catalogue = toys.make_catalogue()
    spec = toys.make_spec(tmp_path, catalogue, retrain={"train": {"epochs": 2}})
    with pytest.raises(UserError, match="no retraining") as caught:
        run_spec(spec, catalogue, tmp_path / "run", lambda event: None)
    assert caught.value.faults[0].dotted == "retrain"


def test_a_baseline_is_the_default_arch_trained_alone(tmp_path):
    catalogue = toys.make_catalogue(algorithms=Baseline)
    spec = toys.make_spec(tmp_path, catalogue, searcher=None, mutator=None, evaluators=[])
    result = run_spec(spec, catalogue, tmp_path / "run", lambda event: None)
    assert result["best"]["arch"] == dict(spec.space.default())
    assert not (tmp_path / "run/supernet.pt").exists()
    assert run_spec(spec, catalogue, tmp_path / "run", lambda event: None) == result


# -- one supernet, several questions ----------------------------------------------------------------------------------


def test_several_constraints_give_one_table_and_no_arch_is_measured_twice(tmp_path, monkeypatch):
    catalogue, measured = toys.make_catalogue(), []
    call = calibrate.Evaluation.__call__
    monkeypatch.setattr(calibrate.Evaluation, "__call__",
                        lambda self, arch, *rest: measured.append(arch) or call(self, arch, *rest))  # fmt: skip
    search = {"trials": 20, "constraints": [{"flops": "30%"}, {"flops": "60%", "params": ["10%", "90%"]}, {}]}
    spec = toys.make_spec(tmp_path, catalogue, search=search)
    events = []
    result = run_spec(spec, catalogue, tmp_path / "run", events.append)
    largest = prepare(spec).cost.of([spec.space.largest()])[0]
    assert [row["folder"] for row in result["table"]] == ["best", "best-2", "best-3"]
    assert [row["metrics"]["flops"] <= share * largest["flops"]
            for row, share in zip(result["table"], (0.3, 0.6, 1.0), strict=True)] == [True] * 3  # fmt: skip
    assert result["table"][0]["constraints"].startswith("flops at most")
    assert {"arch": result["table"][0]["arch"], "metrics": result["table"][0]["metrics"],
            "test": result["table"][0]["test"]} == result["best"]  # fmt: skip
    assert len(measured) == len({*measured})
    met = [trial for i in range(3) for trial in Store(tmp_path / "run/run.sqlite", readonly=True).trials(i)
           if trial.ok and trial.metrics["flops"] <= 0.3 * largest["flops"]]  # fmt: skip
    assert result["best"]["metrics"]["top1"] == max(trial.metrics["top1"] for trial in met), "whoever measured it"
    store = Store(tmp_path / "run/run.sqlite", readonly=True)
    assert [len(store.trials(i)) for i in range(3)] == [20, 20, 20]
    assert result["trials"] == 60
    (done,) = (event for event in events if isinstance(event, RunDone))
    assert done.result == result
    assert done.metrics["top1"].unit == "%"


def test_a_network_that_is_gone_is_written_again(tmp_path):
    catalogue = toys.make_catalogue()
    spec = toys.make_spec(tmp_path, catalogue, search={"trials": 3, "constraints": [{}, {}]})
    result = run_spec(spec, catalogue, tmp_path / "run", lambda event: None)
    shutil.rmtree(tmp_path / "run" / "best-2")
    again = run_spec(spec, catalogue, tmp_path / "run", lambda event: None)
    assert {**again, "seconds": 0} == {**result, "seconds": 0}
    assert (tmp_path / "run" / "best-2" / "arch.toml").exists()


def test_no_constraints_at_all_are_one_search(tmp_path):
    catalogue = toys.make_catalogue()
    for constraints in ([], [{}], {}):
        spec = toys.make_spec(tmp_path, catalogue, search={"trials": 3, "constraints": constraints})
        assert [str(target) for target in prepare(spec, weights=False).targets] == [""]


def test_a_supernet_is_searched_again_under_other_constraints(tmp_path, monkeypatch):
    catalogue = toys.make_catalogue()
    first = toys.make_spec(tmp_path, catalogue, search={"trials": 6})
    run_spec(first, catalogue, tmp_path / "a", lambda event: None)

    def again(text):
        (tmp_path / "again.toml").write_text(f'[supernet]\nfrom = "{tmp_path}/a"\n{text}')
        return load_spec(tmp_path / "again.toml", catalogue)[0]

    spec = again('[search]\ntrials = 9\nconstraints = { flops = "50%" }\n[space]\nfix = { op = "skip" }')
    events = []
    result = run_spec(spec, catalogue, tmp_path / "b", events.append)
    assert [e.stage for e in events if isinstance(e, StageStarted)] == ["search", "export"]
    trials = Store(tmp_path / "b/run.sqlite", readonly=True).trials()
    assert {trial.arch["op"] for trial in trials} == {"skip"}
    assert not (tmp_path / "b/supernet.pt").exists()
    weights = torch.load(tmp_path / "a/supernet.pt", weights_only=True)["model"]
    assert toys.same(dict(load_supernet(prepare(spec), tmp_path / "b").state_dict()), dict(weights))
    resolved, _ = load_spec(tmp_path / "b/spec.toml", catalogue)
    assert run_spec(resolved, catalogue, tmp_path / "b", lambda event: None) == result
    kept, _ = load_spec(tmp_path / "again.toml", catalogue, ["search.trials=4", "train.workers=2"])
    assert (kept.search.trials, kept.search.constraints) == (4, {"flops": "50%"})
    (tmp_path / "bare.toml").write_text(f'[supernet]\nfrom = "{tmp_path}/a"\n')
    kept, _ = load_spec(tmp_path / "bare.toml", catalogue, ["search.trials=4", "space.fix.op=skip"])
    assert kept.search == evolve(first.search, trials=4)
    assert [*kept.space["op"].choices] == ["skip"]
    for text, message in (
        ("seed = 3", "seed: the supernet was trained with another one"),
        ('space = { width = [4, 16], op = ["skip"] }', "trained in another space"),
    ):
        with pytest.raises(UserError, match=message):  # noqa: PT012
            (tmp_path / "bad.toml").write_text(f'{text}\n[supernet]\nfrom = "{tmp_path}/a"\n')
            prepare(load_spec(tmp_path / "bad.toml", catalogue)[0])
    (tmp_path / "bad.toml").write_text('[supernet]\nfrom = "nowhere"\n')
    with pytest.raises(UserError, match="is no run that has trained a supernet"):
        load_spec(tmp_path / "bad.toml", catalogue)
    with open(tmp_path / "a/supernet.pt", "ab") as file:
        file.write(b" ")
    with pytest.raises(UserError, match="the supernet has changed since this run was begun"):
        run_spec(spec, catalogue, tmp_path / "b", lambda event: None)


@frozen
class Threads:
    """Four threads of this process."""

    def start(self):
        return futures.ThreadPoolExecutor(4)


@pytest.mark.parametrize(("evaluator", "metric"), [(Letters, "letters"), (toys.Accuracy, "top1")])
def test_an_executor_gives_the_trials_of_one_process(tmp_path, evaluator, metric):
    catalogue = toys.make_catalogue(executors=Threads, evaluators=evaluator)
    search = {"trials": 24, "objectives": [metric]}
    alone, spread = (
        run_spec(
            toys.make_spec(tmp_path, catalogue, search=search, executor=executor), catalogue, tmp_path / name, print
        )
        for name, executor in (("one", None), ("two", "toy"))
    )
    assert alone["front"] == spread["front"]
    one, two = (Store(tmp_path / name / "run.sqlite", readonly=True).trials() for name in ("one", "two"))
    assert [(t.arch, t.metrics, t.state) for t in one] == [(t.arch, t.metrics, t.state) for t in two]


def test_fresh_deletes_what_the_run_has_written_and_leaves_all_else_as_it_is(tmp_path):
    catalogue, folder, events = toys.make_catalogue(), tmp_path / "run", []
    spec = toys.make_spec(tmp_path, catalogue)
    run_spec(spec, catalogue, folder, lambda event: None)
    tempting = [
        "best-of-2019.txt", "best-7/weights.pt", "best/notes.md", "retrain.pt", "retrain-old.pt.part", "report.html",
        "bestiary", "runs/run.sqlite", "supernet.pt.part.bak", "spec.toml.orig",
    ]  # fmt: skip
    for name in tempting:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(name)
    outside = [tmp_path / "elsewhere" / "thesis.tex", tmp_path / "mine" / "own.txt", tmp_path / "list"]
    for path in outside:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    (folder / "linked").symlink_to(tmp_path / "mine")
    with (folder / ".corenas").open("a") as listed:  # as a directory may have it that somebody else has made
        listed.write(f"../elsewhere/\n{tmp_path}/elsewhere/\n../list\n{tmp_path}/list\n./\n\n.\nlinked/own.txt\n")
    again = run_spec(spec, catalogue, folder, events.append, fresh=True)
    assert all(path.exists() for path in outside)
    assert [(folder / name).read_text() for name in tempting] == tempting
    assert again["trials"] == 12
    assert (folder / "best/arch.toml").exists()
    (told,) = [event.text for event in events if isinstance(event, Note) and "has not written stays" in event.text]
    assert "best-of-2019.txt" in told


@pytest.mark.parametrize("at", range(5))
def test_killed_while_fresh_empties_it_a_directory_is_a_run_or_as_good_as_new(tmp_path, monkeypatch, at):
    catalogue, folder = toys.make_catalogue(), tmp_path / "run"
    search = {"trials": 2, "batch": 1}
    old, new = (toys.make_spec(tmp_path, catalogue, search=search, seed=seed) for seed in (0, 1))
    before, after = (
        run_spec(spec, catalogue, place, lambda event: None) for spec, place in ((old, folder), (new, tmp_path / "new"))
    )
    unlink, left = Path.unlink, iter([True] * at)

    def killed(path, missing_ok=False):
        if not next(left, False):
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", killed)
    with pytest.raises(KeyboardInterrupt):
        run_spec(new, catalogue, folder, lambda event: None, fresh=True)
    monkeypatch.undo()
    spec, expected = (old, before) if (folder / "run.sqlite").exists() else (new, after)
    assert run_spec(spec, catalogue, folder, lambda event: None)["table"] == expected["table"]
    saved = (torch.load(place / "supernet.pt", weights_only=True) for place in (folder, tmp_path / "new"))
    assert spec is old or same(*saved)


def test_a_file_of_the_users_under_a_name_that_the_run_needs_is_a_message_and_stays(tmp_path):
    catalogue, folder = toys.make_catalogue(), tmp_path / "run"
    spec = begun(tmp_path, catalogue)
    (folder / "best").mkdir()
    (folder / "best/arch.toml").write_text("mine")
    with pytest.raises(UserError, match=r"best/arch\.toml: this file was not written by this run"):
        run_spec(spec, catalogue, folder, lambda event: None)
    assert (folder / "best/arch.toml").read_text() == "mine"
    assert [path.name for path in folder.glob(".best*")] == []


@pytest.mark.parametrize("names", [["spec.toml"], ["best", "retrain.pt"], ["run.sqlite", "spec.toml"], [".corenas"]])
def test_a_folder_of_the_users_is_no_run_whatever_its_files_are_called(tmp_path, names):
    catalogue, folder = toys.make_catalogue(), tmp_path / "mine"
    folder.mkdir()
    for name in names:
        (folder / name).write_text("mine")
    for fresh in (False, True):
        with pytest.raises(UserError, match=r"holds no run|another version"):
            run_spec(toys.make_spec(tmp_path, catalogue), catalogue, folder, lambda event: None, fresh=fresh)
    assert {path.name: path.read_text() for path in folder.iterdir()} == dict.fromkeys(names, "mine")


# -- what can happen to a run directory --------------------------------------------------------------------------------


def begun(tmp_path, catalogue, points=2):
    """A run that is interrupted in its training."""
    spec = toys.make_spec(tmp_path, catalogue, train={"epochs": 3, "batch_size": 32})
    with pytest.raises(KeyboardInterrupt):
        run_spec(spec, catalogue, tmp_path / "run", toys.killer(points))
    return spec


@pytest.mark.parametrize(("name", "content", "message"), [
    ("supernet.pt", None, "supernet.pt: this checkpoint is gone, and training had come further"),
    ("supernet.pt", b"", "supernet.pt: this checkpoint cannot be read"),
    ("supernet.pt", b"PK half", "supernet.pt: this checkpoint cannot be read"),
    ("run.sqlite", None, "run.sqlite: the database of this run is gone"),
    ("run.sqlite", b"", "run.sqlite: the database of this run is gone"),
    ("run.sqlite", b"SQLite for" + bytes(3000), "cannot use this database"),
])  # fmt: skip
def test_a_file_that_is_gone_or_broken_is_a_message_and_fresh_begins_anew(tmp_path, name, content, message):
    catalogue = toys.make_catalogue()
    spec = begun(tmp_path, catalogue)
    folder = tmp_path / "run"
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != name}
    if name == "run.sqlite":
        for left in ("run.sqlite-wal", "run.sqlite-shm"):
            (folder / left).unlink(missing_ok=True)
            before.pop(left, None)
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        run_spec(spec, catalogue, folder, lambda event: None)
    assert "--fresh" in str(caught.value)
    assert {n: (folder / n).read_bytes() for n in before if n.endswith((".pt", ".toml"))} == {
        n: content for n, content in before.items() if n.endswith((".pt", ".toml"))}  # fmt: skip
    assert run_spec(spec, catalogue, folder, lambda event: None, fresh=True)["trials"] == 12


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no such processes here")
def test_processes_that_outlive_a_killed_run_do_not_hold_its_directory(tmp_path):
    code = """
import os, sys, time
from pathlib import Path
from corenas.ranking import kendall_tau
from corenas.run.alone import stand_alone
from corenas.mutable import apply
from corenas.run.alone import inherit, subnet
from corenas.run.folder import opened
with opened(Path(sys.argv[1]), {}, {}, False, print):
    if os.fork() == 0:
        time.sleep(20)
    os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", code, tmp_path / "run"], check=False).returncode == 9
    with opened(tmp_path / "run", {}, {}, False, print):
        pass


def test_a_network_that_cannot_be_written_leaves_nothing(tmp_path):
    catalogue = toys.make_catalogue()
    prepared = prepare(toys.make_spec(tmp_path, catalogue))

    class Full:
        def write(self, *args):
            raise OSError(28, "No space left on device")

    arch = prepared.spec.space.default()
    plain = exported(prepared, arch, None, False)
    card = cost_card(prepared, Trial(arch), {})
    with pytest.raises(UserError, match="No space left on device"):
        write_folder(plain, arch, card, prepared, tmp_path / "net", [Full()])
    assert not [*tmp_path.glob("*net*")]


def test_a_folder_that_is_exported_appears_whole_and_what_a_killed_export_left_is_deleted(tmp_path):
    folder, beside = tmp_path / "net", tmp_path / ".net.part"
    killed = "import os, pathlib\nfrom corenas.run.folder import appearing\n"
    killed += "with appearing(pathlib.Path('net')) as f: (f / 'half').touch(); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", killed], cwd=tmp_path, check=False).returncode == 9
    assert [*tmp_path.iterdir()] == [beside]
    with appearing(folder) as first:
        (first / "whole").touch()
        assert not folder.exists()
        with pytest.raises(UserError, match="another corenas is at work"), appearing(folder):
            pass
    assert [*tmp_path.iterdir()] == [folder]
    assert [path.name for path in folder.iterdir()] == ["whole"]
    with pytest.raises(UserError, match="this is no empty folder"), appearing(folder):
        pass
    (folder / "whole").unlink()
    beside.mkdir()
    (beside / "thesis.tex").touch()
    with pytest.raises(UserError, match="not written by corenas"), appearing(folder):
        pass
    assert [path.name for path in beside.iterdir()] == ["thesis.tex"]


@frozen
class Heavy(toys.BackboneOptions):
    """The toy network with 200 kB beside its weights."""

    def build(self, space):
        body = super().build(space)
        body.register_buffer("ballast", torch.zeros(50_000))
        return body


@frozen
class Long:
    """Writes 400 kB."""

    def write(self, network, folder, context):
        (folder / "long").write_bytes(bytes(400_000))
        return folder / "long"


@pytest.mark.skipif(sys.platform == "win32", reason="no such limits there")
def test_wherever_a_disk_is_full_it_is_a_message_and_the_run_goes_on_when_there_is_space(tmp_path):
    import resource

    catalogue, met = toys.make_catalogue(backbones=Heavy, exporters=Long), set()
    spec = toys.make_spec(tmp_path, catalogue)
    expected = run_spec(spec, catalogue, tmp_path / "whole", lambda event: None)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (0, 150, 600, 4_000, 12_000, 20_000, 30_000, 50_000, 100_000, 180_000, 300_000):  # of a file
        folder = tmp_path / str(size)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            with pytest.raises(UserError, match=r"cannot write|cannot use this database") as raised:
                run_spec(spec, catalogue, folder, lambda event: None)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        assert raised.value.faults[0].hint
        met.add(Path(raised.value.faults[0].file).name)
        assert {**run_spec(spec, catalogue, folder, lambda event: None), "run": "", "seconds": 0} == {
            **expected, "run": "", "seconds": 0}  # fmt: skip
    assert met >= {"run.sqlite", "supernet.pt", "best"}


@pytest.mark.parametrize("change", [
    "arch = '{}'", """arch = json_insert(arch, '$.other', 1)""", """arch = json_replace(arch, '$.op', 'sing')""",
    "metrics = '{}'", "metrics = '{\"letters\": 3}'",
])  # fmt: skip
def test_trials_that_are_none_of_the_space_or_the_objectives_are_damage(tmp_path, change):
    catalogue, folder = toys.make_catalogue(), tmp_path / "run"
    spec = toys.make_spec(tmp_path, catalogue)
    run_spec(spec, catalogue, folder, lambda event: None)
    with sqlite3.connect(folder / "run.sqlite") as database:
        database.execute(f"UPDATE trials SET {change} WHERE id = 2")
        database.execute("DELETE FROM notes WHERE key = 'result'")
    database.close()
    with pytest.raises(UserError, match="this database is damaged: of its trials not all can be read"):
        run_spec(spec, catalogue, folder, lambda event: None)


def test_another_number_of_threads_is_told(tmp_path, monkeypatch):
    catalogue, events = toys.make_catalogue(), []
    spec = begun(tmp_path, catalogue)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    run_spec(spec, catalogue, tmp_path / "run", events.append)
    assert [e.text for e in events if isinstance(e, Note) and "goes on with 77" in e.text]


def test_data_with_other_content_is_refused(tmp_path, monkeypatch):
    catalogue = toys.make_catalogue()
    spec = begun(tmp_path, catalogue)
    monkeypatch.setattr(toys.Task, "fingerprint", "other", raising=False)
    with pytest.raises(UserError, match="the data has changed since this run was begun"):
        run_spec(spec, catalogue, tmp_path / "run", lambda event: None)


def test_curves_have_a_point_for_each_epoch_also_of_a_run_that_was_interrupted(tmp_path):
    catalogue = toys.make_catalogue()
    spec = begun(tmp_path, catalogue)
    run_spec(spec, catalogue, tmp_path / "run", lambda event: None)
    curve = Store(tmp_path / "run/run.sqlite", readonly=True).curve("train")
    assert [(done, figures["epoch"]) for done, figures in curve] == [(3, 1), (6, 2), (9, 3)]
    assert all(figures.keys() == {"epoch", "loss", "lr"} for _, figures in curve)


def test_a_plugin_that_raises_is_named(tmp_path):
    @frozen
    class Broken(toys.SearcherOptions):
        """Cannot start."""

        def start(self, problem, rng):
            raise IndexError("no parents")

    catalogue = toys.make_catalogue(searchers=Broken)
    with pytest.raises(UserError, match="searcher toy failed: IndexError: no parents"):
        run_spec(toys.make_spec(tmp_path, catalogue), catalogue, tmp_path / "run", lambda event: None)


def test_a_worker_that_outlives_a_run_measures_with_the_supernet_of_the_next(tmp_path):
    catalogue = toys.make_catalogue()
    first = toys.make_spec(tmp_path, catalogue)
    run_spec(first, catalogue, tmp_path / "run", lambda event: None)
    arch = first.space.default()
    one = WorkerRunner.of(first, 0, tmp_path / "run", "weights of the first")([Trial(arch)])[0]
    other = toys.make_spec(tmp_path, catalogue, seed=5)
    run_spec(other, catalogue, tmp_path / "run", lambda event: None, fresh=True)
    two = WorkerRunner.of(other, 0, tmp_path / "run", "weights of the second")([Trial(arch)])[0]
    prepared = prepare(other)
    expected = prepared.evaluation(load_supernet(prepared, tmp_path / "run"))(arch)
    assert dict(two.metrics) == dict(expected)
    assert WorkerRunner.of(first, 0, tmp_path / "run", "weights of the first")([Trial(arch)])[0].metrics == one.metrics


def test_a_trust_check_trains_archs_alone_once_and_compares_the_rankings(spec, catalogue, tmp_path):
    search = {"trials": 12, "objectives": ["letters"], "trust": {"archs": 6}}
    asked, folder, events = spec(search=search), tmp_path / "run", []
    result = run_spec(asked, catalogue, folder, events.append)
    trust = result["trust"]
    assert (trust["archs"], trust["objective"]) == (6, "letters")
    store = Store(folder / "run.sqlite", readonly=True)
    trials = {trial.arch.digest: trial for trial in store.trials()}
    task = prepare(asked).task
    trust_metric = trust["metric"]
    assert trust_metric in task.metrics
    for row in trust["trials"]:
        trial = trials[row["arch"]]
        assert row["searched"] == trial.metrics["letters"]
        network = stand_alone(asked, task, trial.arch).eval()
        alone = calibrate.evaluate(network, task, prepare(asked).evaluation(network).split("valid"))
        assert row["alone"] == alone[trust_metric]
    searched, alone = ([row[key] for row in trust["trials"]] for key in ("searched", "alone"))
    assert trust["tau"] == pytest.approx(kendall_tau(searched, alone), nan_ok=True)
    assert StageStarted("trust", 6, "networks") in events
    # What was trained is not trained again.
    Store(folder / "run.sqlite").set("result", None)
    events.clear()
    assert run_spec(asked, catalogue, folder, events.append)["trust"] == trust


def test_training_ends_where_the_ranking_of_a_sample_no_longer_changes(spec, catalogue, tmp_path):
    train = {"epochs": 40, "batch_size": 32, "stop": {"archs": 5, "tau": 0.6}}
    stopping, folder, events = spec(train=train), tmp_path / "run", []
    run_spec(stopping, catalogue, folder, events.append)
    curve = Store(folder / "run.sqlite", readonly=True).curve("train")
    taus = [figures.get("tau") for _, figures in curve]
    assert taus[0] is None
    assert taus[-1] >= 0.6
    assert all(not tau >= 0.6 for tau in taus[1:-1])
    assert len(curve) < 40
    # Killed after its last epoch, it does not train on.
    Store(folder / "run.sqlite").set("result", None)
    run_spec(stopping, catalogue, folder, events.append)
    assert Store(folder / "run.sqlite", readonly=True).curve("train") == curve


def test_the_smallest_and_the_largest_subnet_are_looked_at_while_training(tmp_path):
    catalogue, weights = toys.make_catalogue(), {}
    for every in (None, 2):
        train = {"epochs": 4, "batch_size": 32} | ({} if every is None else {"validate": every})
        watched = toys.make_spec(tmp_path, catalogue, train=train)
        run_spec(watched, catalogue, tmp_path / str(every), lambda event: None)
        weights[every] = torch.load(tmp_path / str(every) / "supernet.pt", weights_only=True)["model"]
    assert same(weights[None], weights[2])
    curve = [figures for _, figures in Store(tmp_path / "2" / "run.sqlite", readonly=True).curve("train")]
    assert ["valid_smallest" in figures for figures in curve] == [False, True, False, True]
    prepared = prepare(watched)
    measure, space = prepared.evaluation(load_supernet(prepared, tmp_path / "2")), watched.space
    ends = [measure(arch)["top1"] for arch in (space.smallest(), space.largest())]
    assert [curve[-1]["valid_smallest"], curve[-1]["valid_largest"]] == ends


def told(spec):
    return prepare(spec).notes


def test_what_may_be_meant_otherwise_is_told_and_the_run_says_it_too(spec, catalogue, tmp_path):
    assert told(spec()) == []
    images = toys.Task().splits["train"]
    (large,) = told(spec(train={"epochs": 1, "batch_size": images + 1}))
    assert f"batch_size = {images + 1}, but there are {images} images" in large
    (long,) = told(spec(train={"epochs": 2, "batch_size": 16, "ema": 0.9998}))
    assert f"remembers 5,000 steps, more than the {2 * (images // 16)} of this training" in long
    assert told(spec(train={"epochs": 2, "batch_size": 16, "ema": 0.5})) == []
    (slow,) = told(spec(train={"epochs": 2, "batch_size": 16, "schedule": {"type": "cosine", "warmup": 2}}))
    assert "warmup = 2 epochs are the whole training, of 2: the learning rate never comes to its own" in slow
    assert told(spec(train={"epochs": 2, "batch_size": 16, "schedule": {"type": "cosine", "warmup": 1}})) == []
    search = {"trials": 4, "objectives": ["top1"], "constraints": {"top1": 0.6}}
    catalogue = toys.make_catalogue()
    wrong = toys.make_spec(tmp_path, catalogue, search=search)
    (unit,) = told(wrong)
    assert "this is 0.6 of 100" in unit
    events = []
    run_spec(wrong, catalogue, tmp_path / "run", events.append)
    assert unit in [event.text for event in events if isinstance(event, Note)]
    assert told(toys.make_spec(tmp_path, catalogue, search=search | {"constraints": {"top1": 60}})) == []


def test_a_mutator_that_nothing_looks_at_is_told(tmp_path):
    catalogue = toys.make_catalogue(evaluators=Letters, algorithms=Retraining)
    search = {"trials": 2, "objectives": ["letters"]}
    assert told(toys.make_spec(tmp_path, catalogue, search=search)) == [
        "this algorithm looks at no mutator: that of the spec is for nothing"
    ]
    assert told(toys.make_spec(tmp_path, catalogue, search=search, mutator=None)) == []


def test_a_search_may_ask_for_the_weights_beside_the_average(tmp_path, catalogue):
    toys.make_spec(tmp_path, catalogue, train={"epochs": 1, "batch_size": 16, "ema": 0.9}, search={"trials": 2})
    first = load_spec(tmp_path / "spec.toml", toys.make_catalogue())[0]
    run_spec(first, toys.make_catalogue(), tmp_path / "a", lambda event: None)
    saved = torch.load(tmp_path / "a/supernet.pt", weights_only=True)
    for weights, part in (("average", "average"), ("raw", "model")):
        (tmp_path / "b.toml").write_text(f'[supernet]\nfrom = "{tmp_path}/a"\nweights = "{weights}"\n')
        prepared = prepare(load_spec(tmp_path / "b.toml", toys.make_catalogue())[0])
        assert toys.same(load_supernet(prepared, tmp_path / "b").state_dict(), saved[part])
    (tmp_path / "b.toml").write_text(f'[supernet]\nfrom = "{tmp_path}/a"\n[train]\nepochs = 9\n')
    with pytest.raises(UserError, match="nothing in this run is trained") as caught:
        load_spec(tmp_path / "b.toml", toys.make_catalogue())
    assert caught.value.faults[0].line == 3


def test_a_finished_run_is_extended_by_more_trials_and_other_formats(tmp_path):
    catalogue = toys.make_catalogue()
    train = {"epochs": 1, "batch_size": 32}
    run_spec(toys.make_spec(tmp_path, catalogue, search={"trials": 4}), catalogue, tmp_path / "run", lambda event: None)
    before = Store(tmp_path / "run/run.sqlite", readonly=True).trials()
    more = toys.make_spec(tmp_path, catalogue, search={"trials": 9}, train=train | {"workers": 1})
    events = []
    result = run_spec(more, catalogue, tmp_path / "run", events.append)
    after = Store(tmp_path / "run/run.sqlite", readonly=True).trials()
    assert (len(after), result["trials"]) == (9, 9)
    assert after[:4] == before
    assert result["best"]["metrics"]["top1"] == max(trial.metrics["top1"] for trial in after)
    without = toys.make_spec(tmp_path, catalogue, search={"trials": 9}, export={"formats": []})
    run_spec(without, catalogue, tmp_path / "run", lambda event: None)
    assert not (tmp_path / "run/best/names.txt").exists()
    longer = "\n  a search goes on for longer, not for less; or --out DIR"
    for changes, text in (
        ({"search": {"trials": 3}}, f"search.trials (9 then, 3 now){longer}"),
        ({"search": {"trials": 9, "budget": "1h"}}, f"search.budget (left out then, 1h now){longer}"),
        (
            {"search": {"trials": 9, "constraints": {"flops": "90%"}}},
            "search.constraints.flops (left out then, 90% now)",
        ),
        ({"seed": 1}, "seed (0 then, 1 now)\n  --out DIR"),
    ):
        with pytest.raises(UserError, match=re.escape(f"another spec: {text}")):
            run_spec(toys.make_spec(tmp_path, catalogue, **{"search": {"trials": 9}} | changes), catalogue,
                     tmp_path / "run", lambda event: None)  # fmt: skip


def test_a_finished_run_is_trained_for_more_epochs_where_its_schedule_allows_it(tmp_path):
    catalogue, notes = toys.make_catalogue(), []

    def run(epochs, folder, schedule="constant", emit=lambda event: None, **more):
        train = {"epochs": epochs, "batch_size": 32, "schedule": schedule} | more
        return run_spec(toys.make_spec(tmp_path, catalogue, search={"trials": 4}, train=train), catalogue,
                        tmp_path / folder, emit)  # fmt: skip

    run(1, "grown", ema=0.9)
    result = run(3, "grown", ema=0.9, emit=lambda event: notes.append(str(event)))
    assert any("4 trials that were measured with its weights so far are gone" in note for note in notes)
    wanted = run(3, "whole", ema=0.9)
    grown, whole = (torch.load(tmp_path / name / "supernet.pt", weights_only=True) for name in ("grown", "whole"))
    assert toys.same(grown["model"], whole["model"])
    assert toys.same(grown["average"], whole["average"])
    assert (result["trials"], result["best"], result["front"]) == (4, wanted["best"], wanted["front"])

    run(2, "cosine", "cosine")
    run(2, "linear", "linear")
    for folder, epochs, schedule, why in (
        ("cosine", 3, "cosine", "the cosine schedule of this run has ended"),
        ("linear", 3, "linear", "the linear schedule of this run has ended"),
        ("grown", 2, "constant", "not for fewer"),
    ):
        with pytest.raises(UserError, match=r"another spec: train\.epochs") as caught:
            run(epochs, folder, schedule, **({"ema": 0.9} if folder == "grown" else {}))
        assert why in caught.value.faults[0].hint


def test_what_the_supernets_run_has_measured_is_not_measured_again(tmp_path):
    catalogue = toys.make_catalogue()
    run_spec(toys.make_spec(tmp_path, catalogue, search={"trials": 6}), catalogue, tmp_path / "a", lambda event: None)
    before = {t.arch: t for t in Store(tmp_path / "a/run.sqlite", readonly=True).trials()}
    (tmp_path / "again.toml").write_text(f'[supernet]\nfrom = "{tmp_path}/a"\n[search]\ntrials = 9\n')
    run_spec(load_spec(tmp_path / "again.toml", catalogue)[0], catalogue, tmp_path / "b", lambda event: None)
    after = Store(tmp_path / "b/run.sqlite", readonly=True).trials()
    assert len(after) == 9
    assert sum(trial == before.get(trial.arch) for trial in after) == 6  # their seconds as well


@frozen
class WithRetraining(toys.AlgorithmOptions):
    """As the toy, but for a last stage."""

    stages: ClassVar = ("train", "search", "retrain")


def test_a_found_arch_is_fine_tuned_from_its_weights_in_the_supernet(tmp_path):
    catalogue = toys.make_catalogue()
    train = {"epochs": 6, "batch_size": 32}
    toys.make_spec(tmp_path, catalogue, train=train, search={"trials": 4})
    run_spec(load_spec(tmp_path / "spec.toml", catalogue)[0], catalogue, tmp_path / "a", lambda event: None)
    losses = {}
    for begin, offered in (("supernet", catalogue), ("scratch", toys.make_catalogue(algorithms=WithRetraining))):
        retrain = f'[retrain]\nbegin = "{begin}"\ntrain = {{ epochs = 1, batch_size = 32 }}\n'
        (tmp_path / "again.toml").write_text(f'[supernet]\nfrom = "{tmp_path}/a"\n{retrain}')
        spec, events = load_spec(tmp_path / "again.toml", offered)[0], []
        result = run_spec(spec, offered, tmp_path / begin, events.append)
        assert [e.stage for e in events if isinstance(e, StageStarted)] == ["search", "retrain", "export"]
        (losses[begin],) = [e.figures["loss"] for e in events if isinstance(e, StageDone) and e.stage == "retrain"]
        assert result["best"]["test"]["top1"] > 0
    with pytest.raises(UserError, match="no retraining"):
        prepare(load_spec(tmp_path / "again.toml", catalogue)[0])
    assert losses["supernet"] < 0.85 * losses["scratch"]


def test_a_network_inherits_all_that_its_export_has(tmp_path):
    prepared = prepare(toys.make_spec(tmp_path, toys.make_catalogue()))
    arch = prepared.spec.space.smallest()
    plain = exported(prepared, arch, prepared.supernet, calibrated=True)
    network = subnet(prepared.spec, prepared.task, arch)
    inherit(network, plain.state_dict())
    images = prepared.task.data["valid"][0]
    with torch.no_grad(), apply(network.eval(), arch):
        torch.testing.assert_close(network(images), plain(images), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="no place for other"):
        inherit(network, {"other.weight": torch.zeros(1)})


@pytest.mark.parametrize("epochs", [1, 30])
def test_a_network_that_is_trained_for_few_steps_has_statistics_of_its_data_not_those_it_began_with(tmp_path, epochs):
    catalogue, batches, notes = toys.make_catalogue(), {"batches": 2, "batch_size": 8}, []
    train = {"epochs": epochs, "batch_size": 32}
    spec = toys.make_spec(tmp_path, catalogue, train=train, calibration=batches)
    task, arch = toys.Task(), spec.space.default()
    network = stand_alone(spec, task, arch, emit=lambda event: notes.append(event) if isinstance(event, Note) else None)
    as_trained = stand_alone(evolve(spec, calibration=evolve(spec.calibration, batches=0)), task, arch)
    assert same([*network.parameters()], [*as_trained.parameters()])
    norm, seen = next(m for m in network.eval().modules() if isinstance(m, toys.Norm)), []
    handle = norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for images, _ in calibrate.Evaluation(network, task, spec.calibration, torch.device("cpu"), spec.seed).images:
        network(images)
    handle.remove()
    by_hand = [torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0),
               torch.stack([x.var((0, 2, 3), correction=0) for x in seen]).mean(0)]  # fmt: skip
    found = [norm.running_mean, norm.running_var]
    if epochs == 1:
        torch.testing.assert_close(found, by_hand)
        assert "are recomputed" in notes[0].text
    else:
        before = next(m for m in as_trained.modules() if isinstance(m, toys.Norm))
        assert torch.equal(before.running_mean, found[0])
        assert notes == []
    file = tmp_path / "retrain.pt"
    stand_alone(spec, task, arch, checkpoint=file)
    written = file.stat().st_ino
    assert same(stand_alone(spec, task, arch, checkpoint=file).state_dict(), network.state_dict())
    assert file.stat().st_ino == written  # a finished training is read alone, as `corenas evaluate` does
