import json
import math
import re
from pathlib import Path

import attrs
import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from corenas.cli import main
from corenas.contracts import StageStarted
from corenas.errors import UserError
from corenas.run.prepare import load_supernet, prepare
from corenas.run.spec import open_spec
from corenas.store import Store
from corenas.testing.commands import command_checks
from corenas.testing.distributions import distribution_checks
from corenas_tool_compare import corenas_commands, running
from corenas_tool_compare.budget import alone_flops, counter, training_flops
from corenas_tool_compare.running import (
    _agrees,
    _opened,
    _reference_spec,
    _refuse_other_spaces,
    _spec_of_reference,
)
from corenas_tool_compare.settings import read_compare
from corenas_tool_compare.table import interval, spread_to_noise, summarize, tau

ROOT = Path(__file__).parents[4]
SPEC = f"""
space = "{ROOT}/spec/space/zennet-tiny.toml"
backbone = {{ type = "zennet", in_channels = 1 }}
algorithm = "bignas"
mutator = {{ type = "sandwich", paths = 3 }}
evaluators = ["accuracy"]
searcher = "random"
device = {{ threads = 1 }}
task = {{ type = "classification", data = "digits", valid = 700, test = 600 }}
train = {{ epochs = 1, batch_size = 64, optimizer = {{ lr = 0.05 }} }}
search = {{ trials = 3 }}
calibration = {{ batches = 1 }}
export.formats = []
"""
COMPARE = """
[compare]
spec = "base.toml"
seeds = 1
reference = { archs = 3, seeds = 2, kept = "kept.json" }
train = ["train.epochs=1"]
apart = { darts = "it mixes operations <by weights>" }

[compare.methods.bignas]

[compare.methods.uniform]
set = ['mutator={type="uniform"}', 'algorithm={type="spos"}']

[compare.methods.cream]
set = ['mutator={type="uniform"}', 'algorithm={type="cream", board=2, warmup=0, meta_every=100}']
"""
TWO = "[compare]\nspec = 'base.toml'\nmethods.a = {}\nmethods.b"


@pytest.mark.parametrize("check", distribution_checks)
def test_the_distribution_conforms(check):
    check("corenas_tool_compare")


@pytest.mark.parametrize("check", command_checks)
def test_the_command_conforms(check):
    check(corenas_commands()["compare"])


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A folder in which two methods have been compared."""
    folder = tmp_path_factory.mktemp("compare")
    (folder / "base.toml").write_text(SPEC)
    (folder / "compare.toml").write_text(COMPARE)
    assert main(["compare", str(folder / "compare.toml"), "--out", str(folder / "out")]) == 0
    return folder


@pytest.fixture(scope="module")
def found(compared):
    return json.loads((compared / "out/compare.json").read_text())


@pytest.mark.slow
def test_each_method_is_run_and_its_network_is_trained_alone(compared, found):
    rows = {row["method"]: row for row in found["rows"]}
    assert list(rows) == ["bignas", "uniform", "cream", "random archs alone", "largest network"]
    for name in ("bignas", "uniform", "cream"):
        result = Store(compared / f"out/{name}-seed-0/run.sqlite", readonly=True).get("result")
        if name != "cream":  # which searches nothing
            assert rows[name]["inherited"] == result["best"]["metrics"]["top1"]
        alone = Store(compared / f"out/{name}-seed-0-retrained/run.sqlite", readonly=True).get("result")
        assert alone["best"]["arch"] == result["best"]["arch"]
        assert rows[name]["retrained"] == alone["best"]["test"]["top1"]


@pytest.mark.slow
def test_budgets_are_equal_by_more_epochs_of_what_takes_less(compared, found):
    rows = {row["method"]: row for row in found["rows"]}
    assert rows["bignas"]["training_flops"] == pytest.approx(found["budget"], rel=0.01)
    assert rows["uniform"]["training_flops"] == pytest.approx(found["budget"], rel=0.35)  # whole epochs
    spec = Store(compared / "out/uniform-seed-0/run.sqlite", readonly=True).get("spec")
    assert spec["train"]["epochs"] > 1
    trials = Store(compared / "out/random-archs-alone-seed-0/run.sqlite", readonly=True).trials()
    assert len(trials) == int(found["budget"] / found["alone_flops"]) >= 2


@pytest.mark.slow
def test_the_reference_is_kept_and_ranked_by_each_supernet(compared, found):
    trials = Store(compared / "out/reference/run.sqlite", readonly=True).trials()
    assert [row["metrics"]["top1"] for row in found["reference"]] == [trial.metrics["top1"] for trial in trials]
    assert len(trials) == 3
    gains = next(row["ranking"] for row in found["rows"] if row["method"] == "uniform")
    assert len({*gains}) > 1
    line = next(line for line in found["table"] if line["method"] == "uniform")
    expected = stats.kendalltau(gains, [trial.metrics["top1"] for trial in trials]).statistic
    assert line["tau"][0] == pytest.approx(expected)
    assert any("spread by" in note for note in found["notes"])


@pytest.mark.slow
def test_a_method_that_finds_its_arch_in_training_is_judged_by_its_supernet(compared, found):
    row = next(row for row in found["rows"] if row["method"] == "cream")
    store = Store(compared / "out/cream-seed-0/run.sqlite", readonly=True)
    spec, arch = store.get("spec"), store.get("result")["best"]["arch"]
    prepared = prepare(open_spec(compared / "out/cream-seed-0/spec.toml")[0])
    supernet = load_supernet(prepared, compared / "out/cream-seed-0")
    measure = prepared.evaluation(supernet)
    archs = [prepared.spec.space.arch(reference["arch"]) for reference in found["reference"]]
    assert row["ranking"] == pytest.approx([measure(arch)["top1"] for arch in archs])
    assert row["inherited"] == pytest.approx(measure(prepared.spec.space.arch(arch))["top1"])
    # What it would retrain itself is trained alone by the comparison, as that of all others.
    assert spec["retrain"]["train"]["epochs"] == 0
    assert row["test"] is None


@pytest.mark.slow
def test_kept_references_are_read_where_they_are_of_the_same_training(compared, found, tmp_path, capsys, monkeypatch):
    kept = json.loads((compared / "kept.json").read_text())
    assert kept["archs"] == found["reference"]
    runs = []

    def run(*args):
        """The references' run, which is there already: which of them are asked for again is what is looked at."""
        runs.append(args)
        (tmp_path / "reference").symlink_to(compared / "out/reference")

    monkeypatch.setattr(running, "_run", run)
    for name in ("base.toml", "compare.toml", "kept.json"):
        (tmp_path / name).write_text((compared / name).read_text())
    compare = read_compare([tmp_path / "compare.toml"])

    def references(settings):
        changed = attrs.evolve(compare, set=settings)
        first = running._opened("bignas", compare.methods["bignas"], changed)
        return running._reference(first, changed, tmp_path, "top1")

    trials = references(())
    assert [{"arch": dict(t.arch), "metrics": t.metrics, "extra": t.extra} for t in trials] == found["reference"]
    assert not runs
    references(("train.batch_size=32",))
    assert len(runs) == 1
    assert "kept.json is of another space, data or training: its archs are trained again" in capsys.readouterr().err
    assert json.loads((tmp_path / "kept.json").read_text()) == kept


@pytest.mark.slow
def test_what_is_finished_is_not_done_again(compared, found, monkeypatch, capsys):
    started, run_spec = [], running.run_spec
    monkeypatch.setattr(
        running,
        "run_spec",
        lambda spec, catalogue, folder, emit: run_spec(
            spec, catalogue, folder, lambda e: started.append(e) if isinstance(e, StageStarted) else None
        ),
    )
    before = (compared / "out/compare.json").read_text()
    assert main(["compare", str(compared / "compare.toml"), "--out", str(compared / "out"), "--json"]) == 0
    assert started == []
    assert (compared / "out/compare.json").read_text() == before
    assert json.loads(capsys.readouterr().out)["rows"] == found["rows"]


@pytest.mark.slow
def test_the_page_shows_each_method_and_needs_nothing_else(compared):
    page = (compared / "out/compare.html").read_text()
    for name in ("bignas", "uniform", "random archs alone", "largest network"):
        assert name in page
    assert "darts is not here: it mixes operations &lt;by weights&gt;" in page
    assert "<script" not in page
    assert "<img" not in page
    assert (compared / "out/compare.csv").read_text().startswith("method,seed,inherited,test,retrained,flops")


def test_random_archs_alone_obey_a_constraint_on_what_another_evaluator_measures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    memory = 'evaluators = ["accuracy", "memory"]'
    text = SPEC.replace('evaluators = ["accuracy"]', memory).replace(
        "trials = 3", "trials = 3, constraints = { weight_memory = 1e9 }"
    )
    (tmp_path / "base.toml").write_text(text)
    (tmp_path / "compare.toml").write_text(COMPARE)
    spec, _, catalogue = open_spec(tmp_path / "base.toml", ())
    first = running.Opened("bignas", spec, catalogue, str(tmp_path / "base.toml"), ())
    assert [row["type"] for row in running._constraining(first)] == ["memory"]
    (tmp_path / "out").mkdir()
    compare = read_compare([tmp_path / "compare.toml"])
    row = running._baseline(running.RANDOM, first, 0, compare, tmp_path / "out", "top1", 1.0, 1.0)
    (trial,) = Store(next((tmp_path / "out").glob("*/run.sqlite")), readonly=True).trials()
    assert 0 < trial.metrics["weight_memory"] < 1e9
    assert row["inherited"] == trial.metrics["top1"]


def test_training_flops_agree_with_the_cost_of_the_archs(tmp_path):
    """One path a step: three forwards an image, but for the first layer's gradient of its input."""
    (tmp_path / "base.toml").write_text(SPEC)
    settings = ['mutator={type="uniform"}', 'algorithm={type="spos"}', "train.epochs=2"]
    spec = open_spec(tmp_path / "base.toml", settings)[0]
    prepared = prepare(spec)
    steps = prepared.task.splits["train"] // 64
    mean = alone_flops(prepared, 2) / prepared.task.splits["train"] * steps * 64
    assert training_flops(prepared) == pytest.approx(mean, rel=0.3)  # some steps of random archs


@pytest.mark.parametrize(("layer", "image"), [
    (nn.Conv2d(24, 24, 3, padding=1, groups=24), (24, 8, 8)), (nn.Conv2d(24, 12, 5, stride=2, groups=3), (24, 9, 9)),
    (nn.Conv2d(4, 6, 3), (4, 8, 8)), (nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2), (6, 5, 5)),
])  # fmt: skip
def test_a_step_through_a_convolution_takes_three_times_its_forward(layer, image):
    """Whatever its groups; two times where its input needs no gradient, as in a first layer."""
    x = torch.rand(2, *image)
    with counter() as forward:
        out = layer(x)
    macs = 2 * (math.prod(image) if isinstance(layer, nn.ConvTranspose2d) else out[0].numel())
    assert forward.get_total_flops() == 2 * macs * math.prod(layer.weight.shape[1:])
    for needed, times in ((True, 3), (False, 2)):
        with counter() as whole:
            layer(x.clone().requires_grad_(needed)).sum().backward()
        assert whole.get_total_flops() == times * forward.get_total_flops()


def test_intervals_and_ranks_agree_with_scipy():
    numbers = [70.1, 71.3, 69.9]
    low, high = stats.t.interval(0.95, 2, np.mean(numbers), stats.sem(numbers))
    mean, half = interval(numbers)
    assert (mean - half, mean + half) == (pytest.approx(low), pytest.approx(high))
    assert interval([3.0]) == (3.0, None)
    assert tau([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(4 / 6)
    assert tau(None, [1, 2, 3]) is None


def test_notes_say_when_data_cannot_rank_archs_and_what_intervals_leave_open():
    def reference(spread):
        return [
            {"arch": {}, "metrics": {"top1": 70 + spread * i, "flops": i}, "extra": {"top1_sd": 1.0}} for i in range(5)
        ]

    def row(method, seed, rate):
        return {"method": method, "seed": seed, "inherited": None, "test": None, "retrained": rate, "flops": 1.0,
                "training_flops": 1.0, "seconds": {}, "ranking": [5, 4, 3, 2, 1]}  # fmt: skip

    rows = [row("a", s, 80 + s) for s in range(3)] + [row("b", s, 79.5 + s) for s in range(3)]
    noisy = summarize({"metric": "top1", "budget": 1.0, "reference": reference(0.1), "rows": rows})
    assert any("cannot rank archs" in note for note in noisy["notes"])
    assert any("a overlaps with that of b" in note for note in noisy["notes"])
    clear = summarize({"metric": "top1", "budget": 2.0, "reference": reference(5.0), "rows": rows})
    assert not any("cannot rank archs" in note for note in clear["notes"])
    assert clear["table"][0]["tau"][0] == pytest.approx(-1)
    assert clear["tau_of_flops"] == pytest.approx(1)
    assert any("off the budget: a, b" in note for note in clear["notes"])


@pytest.mark.parametrize(("text", "says"), [
    ("[compare]\nmethods = {}", "at least one method"),
    ("[compare.methods.a]\nset = []", "has no spec"),
    ("[compare]\nspec = 'base.toml'\nmethods.a = {}\napart = { a = 'no' }", "compare.apart.a: it is among the methods"),
    ("[compare]\nseeds = 0\nspec = 'base.toml'\nmethods.a = {}", "compare.seeds"),
    (f"{TWO} = {{ set = ['space.stem.width=[8]'] }}", "fix., `narrow` and"),
    (f"{TWO} = {{ set = ['task.valid=600'] }}", "its task is another"),
])  # fmt: skip
def test_mistakes_are_told(tmp_path, capsys, text, says):
    (tmp_path / "base.toml").write_text(SPEC)
    (tmp_path / "compare.toml").write_text(text)
    assert main(["compare", str(tmp_path / "compare.toml"), "--out", str(tmp_path / "out")]) == 2
    assert re.search(says, capsys.readouterr().err)


def test_the_comparison_of_all_methods_is_right_and_its_references_are_of_its_training(tmp_path):
    compare = read_compare([ROOT / "spec/compare.toml"])
    methods = {name: _opened(name, method, compare) for name, method in compare.methods.items()}
    _refuse_other_spaces([*methods.values()])
    assert {"spos", "fairnas", "bignas", "attentivenas", "zennas", "ofa", "cream"} <= {*methods}
    assert {*compare.apart} == {"darts"}
    kept = json.loads(Path(compare.reference.kept).read_text())
    now = _spec_of_reference(_reference_spec(methods["bignas"], compare, tmp_path, "top1"))
    assert _agrees(kept["spec"], now)
    assert not _agrees(kept["spec"], {**now, "seed": 1})
    assert len(kept["archs"]) == compare.reference.archs == 30
    spread, noise = spread_to_noise(kept["archs"], "top1")
    assert spread >= 2 * noise


def test_darts_refuses_the_space_of_the_comparison():
    """As `apart` of spec/compare.toml says: what mixes operations by weights needs layers that can."""
    compare = read_compare([ROOT / "spec/compare.toml"])
    spec = open_spec(compare.spec, [*compare.set, "search.constraints={}", 'algorithm={type="darts"}'])[0]
    with pytest.raises(UserError, match="no layer of this network can mix"):
        prepare(spec, weights=False)


def test_a_run_of_a_comparison_is_told_which_command_reads_it(capsys):
    assert main(["check", str(ROOT / "spec/compare.toml")]) == 2
    assert re.search(r"compare.toml:\d+: compare: .*another command\n.*corenas compare", capsys.readouterr().err)
