import re
from pathlib import Path

import numpy as np
import pytest
import tomli

from corenas.contracts import TrialDone
from corenas.errors import UserError
from corenas.plugins import load_catalogue
from corenas.run.prepare import prepare
from corenas.run.spec import open_spec
from corenas.run.stages import run_spec
from corenas.store import Store
from corenas.testing.algorithms import algorithm_checks
from corenas.testing.components import spec_fragments
from corenas.testing.distributions import distribution_checks
from corenas.testing.evaluators import evaluator_checks
from corenas_algorithm_alone import Alone, StandAlone, corenas_algorithms, corenas_evaluators

SPACE = Path(__file__).parents[4] / "spec" / "space" / "zennet-tiny.toml"
PLUGIN = Path(__file__).parent / "rungs.py"
SPEC = f"""
space = {{ file = "{SPACE}", "spec:train.optimizer.lr" = {{ type = "float", low = 1e-4, high = 0.3, log = true }}}}
backbone = {{ type = "zennet", in_channels = 1 }}
algorithm = "alone"
evaluators = ["stand_alone"]
device = {{ threads = 1 }}
task = {{ type = "classification", data = "digits", valid = 600, test = 600 }}
train = {{ epochs = 4, batch_size = 64, schedule = {{ type = "cosine" }}, ema = 0.5 }}
search = {{ trials = 3, batch = 4 }}
export.formats = ["safetensors"]
"""


@pytest.mark.parametrize("check", algorithm_checks)
def test_conforms(check):
    check(Alone())


@pytest.mark.parametrize("check", evaluator_checks)
def test_the_evaluator_conforms(check):
    check(StandAlone())


@pytest.mark.parametrize("check", distribution_checks)
def test_the_distribution_conforms(check):
    check("corenas_algorithm_alone")


def test_options_are_an_algorithm_and_an_evaluator():
    assert corenas_algorithms() == {"alone": Alone}
    assert corenas_evaluators() == {"stand_alone": StandAlone}
    assert (Alone().stages, Alone(search=False).stages) == (("search", "retrain"), ("retrain",))
    assert Alone(search=False).needs == ()
    with pytest.raises(UserError, match="no supernet"):
        Alone().start(None)


def spec_of(folder, *settings, text=SPEC):
    folder.mkdir(exist_ok=True)
    (folder / "spec.toml").write_text(text)
    return open_spec(folder / "spec.toml", settings, [str(PLUGIN)])


def run(folder, *settings, emit=lambda event: None, text=SPEC):
    spec, _, catalogue = spec_of(folder, *settings, text=text)

    def tell(event):
        emit(event)
        catalogue.emit(event)

    run_spec(spec, catalogue, folder / "run", tell)
    store = Store(folder / "run" / "run.sqlite", readonly=True)
    return store.get("result"), store.trials(), (folder / "run/best/network.safetensors").read_bytes()


RUNGS = ("searcher=rungs", "search.trials=4")


@pytest.fixture(scope="module")
def halved(tmp_path_factory):
    """What a run of halving that was left alone ends with."""
    return run(tmp_path_factory.mktemp("alone"), *RUNGS)


def test_a_promoted_trial_goes_on_to_the_figures_of_one_that_was_never_cut(halved, tmp_path):
    _, trials, _ = halved
    whole = [trial for trial in trials if trial.fidelity == 1]
    assert [trial.fidelity for trial in trials] == [0.25] * 4 + [0.5] * 2 + [1.0]
    prepared = prepare(spec_of(tmp_path / "other", *RUNGS)[0])
    measure = StandAlone().start(prepared.evaluator_context(None))  # no folder: nothing to go on from
    assert whole[0].metrics["top1"] == measure([whole[0].arch], 1.0)[0].metrics["top1"]
    half = next(trial for trial in trials if trial.fidelity == 0.5)
    assert half.metrics["top1"] == measure([half.arch], 0.5)[0].metrics["top1"]


def test_promoted_trials_train_only_what_is_left(tmp_path, monkeypatch):
    from corenas.train import LivePhase

    steps, step = [], LivePhase.step_parts
    monkeypatch.setattr(LivePhase, "step_parts", lambda self, *args: steps.append(1) or step(self, *args))
    prepared = prepare(spec_of(tmp_path, *RUNGS)[0])
    per_epoch = prepared.task.splits["train"] // 64
    alone = prepared.evaluator_context(None, tmp_path / "trials").alone
    arch = prepared.spec.space.default()
    counts = []
    for fidelity in (0.25, 0.5, 0.25, 1.0):
        steps.clear()
        alone(arch, fidelity)
        counts.append(len(steps) / per_epoch)
    assert counts == [1, 1, 1, 2]  # one that would have to go back begins anew
    assert not [*(tmp_path / "trials").iterdir()]


def test_killed_it_ends_with_the_same_trials(halved, tmp_path):
    def kill(event):
        if isinstance(event, TrialDone) and event.trial.fidelity == 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, *RUNGS, emit=kill)
    assert [*(tmp_path / "run" / "trials").iterdir()]
    result, trials, network = run(tmp_path, *RUNGS)
    assert [(t.arch, t.fidelity, t.metrics) for t in trials] == [(t.arch, t.fidelity, t.metrics) for t in halved[1]]
    assert (result["table"], network) == (halved[0]["table"], halved[2])
    assert not (tmp_path / "run" / "trials").exists()


@pytest.mark.slow
def test_two_workers_give_the_trials_of_one(halved, tmp_path):
    _, trials, network = run(tmp_path, *RUNGS, 'executor={type="processes", workers=2}')
    assert [(t.arch, t.fidelity, t.metrics) for t in trials] == [(t.arch, t.fidelity, t.metrics) for t in halved[1]]
    assert network == halved[2]


def test_the_result_is_a_spec_that_trains_the_same_network_again(halved, tmp_path):
    result, _, network = run(tmp_path / "first", "searcher=random", "search.trials=2", "train.epochs=1")
    found = (tmp_path / "first/run/best/spec.toml").read_text()
    table = tomli.loads(found)
    best = result["best"]["arch"]
    assert table["train"]["optimizer"]["lr"] == best["spec:train.optimizer.lr"]
    assert not [key for key in table["space"] if key.startswith("spec:")]
    again, trials, same = run(tmp_path / "second", text=found)
    assert trials == []
    assert same == network
    assert again["best"]["test"] == result["best"]["test"]


def test_the_best_is_trained_with_other_seeds_and_their_mean_is_told(tmp_path):
    result, _, _ = run(tmp_path, "searcher=random", "search.trials=2", "train.epochs=2", "retrain.seeds=3")
    seeds = result["table"][0]["seeds"]
    rates = [row["top1"] for row in seeds["test"]]
    assert rates[0] == result["best"]["test"]["top1"]
    assert len({*rates}) > 1
    assert seeds["mean"]["top1"] == pytest.approx(np.mean(rates))
    assert seeds["sd"]["top1"] == pytest.approx(np.std(rates, ddof=1))


def test_the_evaluator_averages_over_seeds(tmp_path):
    prepared = prepare(spec_of(tmp_path, "train.epochs=1", "searcher=random")[0])
    context, arch = prepared.evaluator_context(None), prepared.spec.space.default()
    (once,), (twice,) = (StandAlone(seeds).start(context)([arch], 1.0) for seeds in (1, 2))
    assert twice.extra["top1_sd"] > 0
    assert abs(twice.metrics["top1"] - once.metrics["top1"]) == pytest.approx(twice.extra["top1_sd"] / np.sqrt(2))


def test_a_curve_is_what_shorter_trainings_of_the_same_schedule_reach(tmp_path):
    """With checkpoints each point goes on from the one before; the end is that of a training that never stopped."""
    prepared = prepare(spec_of(tmp_path, "train.epochs=4", "searcher=random")[0])
    arch = prepared.spec.space.default()
    measure = StandAlone(curve=2).start(prepared.evaluator_context(None, tmp_path / "trials"))
    (found,) = measure([arch], 1.0)
    assert found.extra["curve"]["share"] == [0.25, 0.5]
    plain = StandAlone().start(prepared.evaluator_context(None))
    rates = [plain([arch], share)[0].metrics["top1"] for share in (0.25, 0.5, 1.0)]
    assert [*found.extra["curve"]["top1"], found.metrics["top1"]] == rates
    assert len({*rates}) == 3


def test_the_readme_shows_a_spec_that_is_right():
    (spec,) = spec_fragments(Path(__file__).parents[1] / "README.md")
    assert load_catalogue().options("algorithms", spec["algorithm"]) == Alone()
    assert load_catalogue().options("evaluators", spec["evaluators"][0]) == StandAlone()
    assert re.match(r"spec:", next(key for key in spec["space"] if key != "file"))
