"""What `corenas check` says of time and memory."""

import re
import time
from types import SimpleNamespace
from typing import ClassVar

import pytest
import tomli_w
import torch
from attrs import frozen

from corenas.errors import UserError
from corenas.run.prepare import prepare
from corenas.run.spec import load_spec
from corenas.run.stages import run_spec
from corenas.store import Store
from corenas.testing import small
from corenas_tool_inspect.estimate import _of_whole_batches, estimate


@frozen
class Algorithm:
    """Trains on the labels."""

    stages: ClassVar = ("train", "search")
    needs: ClassVar = ("mutator", "searcher")

    def start(self, context):
        return small.Trainer(context.supernet, context.task, [(context.space, context.train)])


@frozen
class Searcher:
    """At random."""

    def start(self, problem, rng):
        ask = lambda n: [problem.space.sample(rng) for _ in range(n)]  # noqa: E731
        return SimpleNamespace(ask=ask, tell=lambda trials: None, state_dict=dict, load_state_dict=lambda state: None)


def make_spec(folder, catalogue, **changes):
    kinds = ("task", "backbone", "mutator", "algorithm", "searcher")
    table = {"space": small.TABLE, **dict.fromkeys(kinds, "small"), "evaluators": ["small"], "export": {"formats": []},
             "train": {"epochs": 1, "batch_size": 32}, "search": {"trials": 12}} | changes  # fmt: skip
    (folder / "spec.toml").write_text(tomli_w.dumps(table))
    return load_spec(folder / "spec.toml", catalogue)[0]


@pytest.fixture(scope="module")
def catalogue():
    offers = {"tasks": small.Patterns, "backbones": small.Backbone, "mutators": small.Paths, "algorithms": Algorithm,
              "searchers": Searcher, "evaluators": small.Accuracy}  # fmt: skip
    return small.make_catalogue("small", offers)


def test_the_estimate_is_near_what_a_run_takes(tmp_path, catalogue):
    spec = make_spec(
        tmp_path,
        catalogue,
        train={"epochs": 60, "batch_size": 16, "optimizer": {"type": "SGD", "lr": 0.02}},
        search={"trials": 30},
    )
    found = estimate(prepare(spec, weights=False))
    assert re.fullmatch(r"steps of 16 images and \d+ trials", found.tried)
    assert found.memory is not None
    assert found.memory > 50e6
    run_spec(spec, catalogue, tmp_path / "run", lambda event: None)
    seconds = Store(tmp_path / "run/run.sqlite", readonly=True).get("seconds")
    assert found.seconds.keys() == {"train", "search"}
    for stage, guess in found.seconds.items():
        assert seconds[stage] / 20 < guess < 20 * seconds[stage]  # of the same order, on a busy machine too


def test_a_training_of_no_epochs_takes_no_time(tmp_path, catalogue):
    spec = make_spec(tmp_path, catalogue, train={"epochs": 0, "batch_size": 16})
    assert estimate(prepare(spec, weights=False)).seconds["train"] == 0


def test_trying_leaves_what_is_random_as_it_was_and_nothing_behind(tmp_path, catalogue):
    spec = make_spec(tmp_path, catalogue)
    prepared, state = prepare(spec, weights=False), torch.get_rng_state()
    estimate(prepared)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.is_meta for p in prepared.supernet.parameters())
    assert [path.name for path in tmp_path.iterdir()] == ["spec.toml"]


def test_what_only_a_step_shows_is_told_by_a_check(tmp_path, monkeypatch, catalogue):
    def refuse(self, batch, step):
        raise UserError("this mutator does not suit", key=("mutator",))

    monkeypatch.setattr(small.Trainer, "train_step", refuse)
    with pytest.raises(UserError, match="does not suit"):
        estimate(prepare(make_spec(tmp_path, catalogue), weights=False))


def test_a_step_of_the_few_images_that_a_check_begins_with_is_not_refused_for_them(tmp_path, monkeypatch, catalogue):
    def want(number):
        def step(self, batch, step):
            if len(batch[0]) < number:
                raise UserError(f"wants {number} images", key=("algorithm",))
            return own(self, batch, step)

        return step

    own = small.Trainer.train_step
    monkeypatch.setattr(small.Trainer, "train_step", want(8))
    found = estimate(prepare(make_spec(tmp_path, catalogue), weights=False))
    assert found.tried.startswith("steps of 32 images")
    monkeypatch.setattr(small.Trainer, "train_step", want(33))
    with pytest.raises(UserError, match="wants 33 images"):
        estimate(prepare(make_spec(tmp_path, catalogue), weights=False))


def test_a_step_that_takes_too_long_ends_the_trying(tmp_path, monkeypatch, catalogue):
    monkeypatch.setattr(small.Task, "loss", lambda self, outputs, batch: time.sleep(30))
    start = time.perf_counter()
    found = estimate(prepare(make_spec(tmp_path, catalogue), weights=False), limit=0.5)
    assert time.perf_counter() - start < 5
    assert (found.seconds.keys(), found.memory) == ({"search"}, None)
    assert re.fullmatch(r"\d+ trials", found.tried)


def test_a_supernet_that_fills_the_memory_is_not_even_tried(tmp_path, monkeypatch, catalogue):
    monkeypatch.setattr("corenas_tool_inspect.estimate.memory_of_machine", lambda: 2000.0)
    found = estimate(prepare(make_spec(tmp_path, catalogue), weights=False))
    assert found.seconds == {}
    assert "fill the memory" in found.tried


def test_what_a_step_takes_whatever_its_images_is_not_taken_for_each_of_them():
    """Of steps that take .3 s and .01 s an image: one of 64 images takes .94 s, not 3 s."""
    steps = [(2, 0.32), (8, 0.38)]
    assert _of_whole_batches(steps, 64) == pytest.approx(0.94)
    assert _of_whole_batches(steps[:1], 64) == pytest.approx(32 * 0.32)  # of one size alone nothing else is known
    assert _of_whole_batches([(2, 0.4), (8, 0.3)], 64) == pytest.approx(0.3)
    assert _of_whole_batches([*steps, (64, 0.9)], 64) == 0.9


def test_large_batches_are_judged_by_small_ones(tmp_path, monkeypatch, catalogue):
    sizes = []
    step = small.Trainer.train_step
    monkeypatch.setattr(small.Trainer, "train_step", lambda self, b, s: sizes.append(len(b[1])) or step(self, b, s))
    monkeypatch.setattr("corenas_tool_inspect.estimate._ENOUGH", 0.0)
    spec = make_spec(tmp_path, catalogue, train={"epochs": 4, "batch_size": 96})
    found = estimate(prepare(spec, weights=False))
    assert {*sizes} == {2, 8}
    assert found.seconds["train"] > 0
    assert re.fullmatch(r"steps of 2 and 8 images and \d+ trials", found.tried)


@frozen
class Retraining(Algorithm):
    """What was found is trained alone."""

    stages: ClassVar = ("train", "search", "retrain")


def test_a_retraining_is_tried_as_well(tmp_path, monkeypatch, catalogue):
    """Of .02 s of the processor a step: two seeds, 5 epochs of so many images, 32 at once."""
    offers = {"tasks": small.Patterns, "backbones": small.Backbone, "mutators": small.Paths, "algorithms": Retraining,
              "searchers": Searcher, "evaluators": small.Accuracy}  # fmt: skip
    loss = small.Task.loss

    def slow(self, outputs, batch):
        end = time.process_time() + 0.02
        while time.process_time() < end:
            pass
        return loss(self, outputs, batch)

    monkeypatch.setattr(small.Task, "loss", slow)
    monkeypatch.setattr("corenas_tool_inspect.estimate._ENOUGH", 0.1)
    retrain = {"seeds": 2, "data": "train+valid", "train": {"epochs": 5, "batch_size": 32}}
    spec = make_spec(tmp_path, small.make_catalogue("small", offers), retrain=retrain)
    prepared = prepare(spec, weights=False)
    images = prepared.task.splits["train"] + prepared.task.splits["valid"]
    found = estimate(prepared)
    least = 2 * 5 * images / 32 * 0.02  # a busy machine takes longer over the rest of a step
    assert 0.9 * least < found.seconds["retrain"] < 3 * least
    assert found.tried.endswith("images alone")


class Remembering(small.Accuracy):
    """Computes for a fiftieth of a second, unless it has measured an arch before."""

    def start(self, context):
        known = set()

        def measure(archs, fidelity):
            end = time.process_time() + 0.02 * len({*archs} - known)
            while time.process_time() < end:
                pass
            known.update(archs)
            return [dict.fromkeys(self.provides(context.task), 1.0) for _ in archs]

        return measure


def test_the_archs_of_a_search_are_not_taken_for_one_that_was_measured_before(tmp_path):
    offers = {"tasks": small.Patterns, "backbones": small.Backbone, "mutators": small.Paths, "algorithms": Algorithm,
              "searchers": Searcher, "evaluators": Remembering}  # fmt: skip
    spec = make_spec(tmp_path, small.make_catalogue("small", offers), search={"trials": 100, "batch": 4})
    assert 1.9 < estimate(prepare(spec, weights=False)).seconds["search"] < 6
