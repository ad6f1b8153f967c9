import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import attrs
import numpy as np
import pytest
import tomli
import tomli_w

from corenas.cli import main
from corenas.errors import UserError
from corenas.objectives import Trial
from corenas.plugins import load_catalogue
from corenas.space import SearchSpace
from corenas.store import Store
from corenas.testing.commands import command_checks
from corenas.testing.distributions import distribution_checks
from corenas.variables import Categorical
from corenas_tool_sweep import command, corenas_commands
from corenas_tool_sweep.analysis import analyse, figures
from corenas_tool_sweep.command import asked, run_sweep
from corenas_tool_sweep.narrowing import Narrowed, narrow
from corenas_tool_sweep.population import read_populations
from corenas_tool_sweep.settings import Bootstrap, Narrow, Normalise, Sample, Sweep, read_sweep
from corenas_tool_sweep.structured import regnet_stages

SPACE = {
    "width": [8, 16, 24, 32, 40],
    "depth": [1, 2, 3],
    "op": {"type": "categorical", "choices": ["conv", "mbconv", "pool"]},
    "block": {"kernel": [3, 5]},
    "one": {"type": "categorical", "choices": [7]},
    "spec:train.optimizer.lr": {"type": "float", "low": 0.01, "high": 1.0, "log": True},
}


@pytest.mark.parametrize("check", distribution_checks)
def test_the_distribution_conforms(check):
    check("corenas_tool_sweep")


@pytest.mark.parametrize("check", command_checks)
def test_the_command_conforms(check):
    check(corenas_commands()["sweep"])


def trials_of(space, n, seed, planted=False, noise=1.0):
    """Trials whose error hangs on cost alone, or on the width and the operation as well.

    What moves cost and does nothing else must not be found: width and depth; with effects planted, depth alone, since
    at equal cost a width that moved it would tell of the depth.
    """
    rng = np.random.default_rng(seed)
    trials = []
    for arch in space.decode(space.draw(rng, n)):
        flops = int(1e4 * (24 if planted else arch["width"]) * arch["depth"] * (1 + 0.2 * rng.random()))
        error = 20 - 1.5 * np.log(flops / 1e5) + noise * rng.normal()
        if planted:
            error += 4.0 * (arch["width"] in (8, 40)) + 3.0 * (arch["op"] == "pool")
        trials.append(Trial(arch, {"flops": flops, "params": flops // 7, "top1": 100 - float(error)}))
    return trials


def write_run(folder, trials, space, searcher="random"):
    folder.mkdir(parents=True)
    store = Store(folder / "run.sqlite")
    store.set("spec", {"space": space.to_table(), "searcher": {"type": searcher}, "evaluators": [{"type": "accuracy"}]})
    store.set("metrics", {"top1": {"unit": "%", "direction": "max", "share": True}})
    store.set("objectives", {"objectives": [{"metric": "top1", "direction": "max", "weight": 1.0}]})
    store.set("splits", {"train": 1000, "valid": 359, "test": 100})
    for trial in trials:
        store.add(trial)
    store.close()
    return folder


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0]])
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture(scope="module")
def space():
    return SearchSpace.from_table(SPACE)


@pytest.fixture(scope="module")
def planted(space, tmp_path_factory):
    """A run of 300 random archs in which width and operation matter."""
    return write_run(tmp_path_factory.mktemp("runs") / "planted", trials_of(space, 300, 0, planted=True), space)


@pytest.fixture(scope="module")
def swept(planted, tmp_path_factory):
    """What is written of it, by the command."""
    out = tmp_path_factory.mktemp("sweep")
    assert main(["sweep", str(planted), "--out", str(out)]) == 0
    return out


def of(source, **options):
    return analyse(populations := read_populations(sweep := Sweep((str(source),), **options)), sweep), populations


# -- what is found ----------------------------------------------------------------------------------------------------


def test_planted_effects_are_found_and_nothing_else(planted):
    found, _ = of(planted)
    known = {variable.key: variable for variable in found.variables[0]}
    assert {key for key, variable in known.items() if variable.matters} == {"width", "op"}
    assert known["width"].good[0] > 8
    assert known["width"].good[2] < 40
    assert next(row["mass"] for row in known["op"].choices if row["choice"] == "pool") < 0.025
    assert known["one"].verdict == "one choice only"
    assert known["width"].chance["range"][0] <= 16
    assert known["width"].chance["as_narrow"] < 0.1


def test_the_space_is_narrowed_to_what_is_good_and_can_be_read_again(swept, space):
    text = (swept / "space.narrowed.toml").read_text()
    assert text.startswith("# unconfirmed")
    assert re.search(r"# width: 16, 24, 32 of 8, 16, 24, 32, 40, an effect .*default is now", text)
    narrower = SearchSpace.from_table(tomli.loads(text))
    assert set(narrower.keys) == set(space.keys)
    assert narrower["width"].choices == (16, 24, 32)
    assert narrower["width"].default in (16, 24, 32)
    assert narrower["op"].choices == ("conv", "mbconv")
    assert narrower["depth"].choices == (1, 2, 3)
    assert narrower["spec:train.optimizer.lr"].choices == (0.01, 1.0)


def test_a_continuous_variable_is_narrowed_to_a_part_of_its_range(space, tmp_path):
    trials = trials_of(space, 200, 3)
    key = "spec:train.optimizer.lr"
    worse = [10 * abs(np.log10(t.arch[key]) + 1) for t in trials]  # 0.1 is best
    trials = [
        attrs.evolve(t, metrics={**t.metrics, "top1": t.metrics["top1"] - x})
        for t, x in zip(trials, worse, strict=True)
    ]
    found, _ = of(write_run(tmp_path / "lr", trials, space))
    narrowed = narrow(found)
    low, high = narrowed.space[key].choices
    assert narrowed.changed == [key]
    assert 0.02 < low < 0.1 < high < 0.5
    assert low <= narrowed.space[key].default <= high
    assert narrowed.space[key].log


@pytest.mark.slow
def test_a_null_space_narrows_nothing_in_92_of_100_seeds(space, tmp_path):
    (tmp_path / "space.toml").write_text(tomli_w.dumps(space.to_table()))
    narrowed = 0
    for seed in range(200):
        rows = [{**trial.arch, **trial.metrics} for trial in trials_of(space, 100, 100 + seed)]
        source = write_csv(tmp_path / "null.csv", rows)
        found, _ = of(source, permutations=1000, seed=seed, space=str(tmp_path / "space.toml"))
        narrowed += bool(narrow(found).changed)
    assert narrowed <= 16


def test_trials_of_a_search_are_not_called_the_space(space, tmp_path):
    run = write_run(tmp_path / "evolved", trials_of(space, 300, 0, planted=True), space, searcher="evolution")
    found, _ = of(run)
    assert not any(variable.matters for variable in found.variables[0])
    assert any("a search chose these archs" in note for note in found.notes)
    assert narrow(found).changed == []


def test_a_variable_is_judged_by_the_archs_that_use_it(planted):
    found, (population,) = of(planted)
    known = {variable.key: variable for variable in found.variables[0]}
    deep = int((population.variables["depth"].values == 3).sum())
    assert known["blocks.2.kernel"].n == deep < len(population)
    assert known["blocks.0.kernel"].n == len(population)


def test_too_few_archs_give_no_range_and_fewer_than_a_hundred_no_suggestion(space, tmp_path):
    few, _ = of(write_run(tmp_path / "few", trials_of(space, 20, 0, planted=True), space))
    assert all(variable.good is None for variable in few.variables[0])
    assert any("too few for good ranges" in note for note in few.notes)
    some, _ = of(write_run(tmp_path / "some", trials_of(space, 80, 0, planted=True, noise=0.1), space))
    assert some.variables[0][0].good is not None or some.variables[0][0].full is None
    assert narrow(some).changed == []


def test_failed_archs_are_errors_of_a_hundred_percent_and_no_part_of_tests(space, tmp_path):
    trials = [
        *trials_of(space, 60, 1),
        *(attrs.evolve(t, state="failed", metrics={"flops": 1e5}, error="x") for t in trials_of(space, 5, 2)),
    ]
    found, (population,) = of(write_run(tmp_path / "failed", trials, space))
    assert (population.errors == 100).sum() == population.failed.sum() == 5
    width = next(variable for variable in found.variables[0] if variable.key == "width")
    assert width.n == 60
    assert sum(row["failed"] for row in width.choices) == 5


def test_two_populations_that_differ_in_cost_alone_are_alike_at_equal_cost(space, tmp_path):
    trials = trials_of(space, 500, 5)
    costs = np.array([t.metrics["flops"] for t in trials])
    dear = np.random.default_rng(0).random(500) < (costs - costs.min()) / np.ptp(costs)
    for name, keep in (("cheap", ~dear), ("dear", dear)):
        write_run(tmp_path / name, [t for t, k in zip(trials, keep, strict=True) if k], space)
    sweep = Sweep((str(tmp_path / "cheap"), str(tmp_path / "dear")), normalise=Normalise(bins=6))
    pair = analyse(read_populations(sweep), sweep).pairs[0]
    assert pair["plain"]["verdict"] == "better"
    assert pair["plain"]["difference_p"] < 0.01
    assert abs(pair["equal_cost"]["difference"]) < abs(pair["plain"]["difference"]) / 2
    assert pair["equal_cost"]["difference_p"] > 0.01


def test_the_worked_example_comes_out_of_files_too(tmp_path):
    depth, flops, error = [2, 3, 2, 3, 4, 4], [110, 120, 150, 250, 280, 350], [12, 11, 10, 8, 9, 7]
    other = zip([2, 3, 3, 4, 4, 2], [180, 220, 260, 310, 330, 390], [11, 8, 9, 7.5, 7, 6.5], strict=True)
    a = write_csv(
        tmp_path / "a.csv", [{"depth": d, "flops": f, "error": e} for d, f, e in zip(depth, flops, error, strict=True)]
    )
    b = write_csv(tmp_path / "b.csv", [{"depth": d, "flops": f, "error": e} for d, f, e in other])
    normalise = Normalise(bins=3, min_per_bin=1, range=(100, 400))
    sweep = Sweep((str(a), str(b)), error="error", direction="min", complexity=("flops",), normalise=normalise)
    found = figures(analyse(read_populations(sweep), sweep))
    views = [population["views"] for population in found["populations"]]
    assert [view["flops"]["mean"] for view in views] == pytest.approx([8.8333, 8.8333], abs=5e-5)
    assert views[0]["flops"]["n_eff"] == pytest.approx(4.909, abs=5e-4)
    assert found["pairs"][0]["plain"]["distance"] == pytest.approx(1 / 3)
    assert found["pairs"][0]["equal_cost"]["distance"] == pytest.approx(1 / 9)
    assert found["pairs"][0]["equal_cost"]["distance_p"] == 1
    plain = attrs.evolve(sweep, bootstrap=Bootstrap(3), normalise=None)
    for wanted, masses in (
        (plain, [0.0926, 0.3148, 0.5926]),
        (attrs.evolve(sweep, bootstrap=Bootstrap(3)), [0.0274, 0.1809, 0.7917]),
    ):
        choices = analyse(read_populations(wanted), wanted).variables[0][0].choices
        assert [row["mass"] for row in choices] == pytest.approx(masses, abs=5e-5)


SPEC = f"""
space = {{ file = "{Path(__file__).parents[4]}/spec/space/zennet-tiny.toml" }}
backbone = {{ type = "zennet", in_channels = 1 }}
algorithm = "spos"
mutator = "uniform"
evaluators = ["accuracy"]
searcher = "random"
device = {{ threads = 1 }}
task = {{ type = "classification", data = "digits", valid = 700, test = 600 }}
train = {{ epochs = 1, batch_size = 64 }}
calibration = {{ batches = 1 }}
export.formats = []
"""


@pytest.mark.parametrize("mode", ["as_is", "scratch"])
def test_a_population_is_drawn_and_measured_first_and_new_archs_confirm_a_narrower_space(tmp_path, mode, monkeypatch):
    (tmp_path / "spec.toml").write_text(SPEC)
    scratch = mode == "scratch"
    sample = Sample(
        str(tmp_path / "spec.toml"), count=4, mode=mode, epochs=1 if scratch else None, fidelity=0 if scratch else 3
    )
    key = "stages.1.width"

    def narrowed(found):  # four archs suggest nothing by themselves
        space = found.populations[0].space
        return Narrowed(space.replace({key: Categorical(key, [32])}), [key], [])

    monkeypatch.setattr(command, "narrow", narrowed)
    command.run_sweep(Sweep(sample=sample, plots=0, narrow=Narrow(confirm=5)), tmp_path / "out")
    found = json.loads((tmp_path / "out/sweep.json").read_text())
    (population,) = found["populations"]
    assert population["counts"]["analysed"] == 4
    assert population["sampled"]
    assert population["measured"] == {"as_is": "supernet proxy", "scratch": "trained alone"}[mode]
    assert (found["fidelity"] or {}).get("archs") == (None if scratch else 3)
    assert any("Kendall" in note for note in found["notes"]) != scratch
    new = Store(tmp_path / "out/confirm/run.sqlite", readonly=True).trials()
    assert {trial.arch[key] for trial in new} == {32}
    assert 1 <= found["confirmed"]["archs"] <= len(new) == 5
    assert (tmp_path / "out/space.narrowed.toml").read_text().startswith("# tested on")


def test_regnets_are_drawn_as_a_population_whose_numbers_are_variables(tmp_path):
    text = SPEC.replace(f'{{ file = "{Path(__file__).parents[4]}/spec/space/zennet-tiny.toml" }}', '"regnet.toml"')
    (tmp_path / "spec.toml").write_text(text)
    stage = """
[[stages]]
op = "XX"
stride = 2
kernel = 3
bottleneck = 8
width = { type = "int", low = 8, high = 64, step = 8 }
depth = { type = "int", low = 1, high = 6 }
"""
    ends = "stem = { kernel = 3, width = 8, stride = 1 }\nhead = { kernel = 1, width = 16 }\n"
    (tmp_path / "regnet.toml").write_text(ends + stage * 2)
    (tmp_path / "sweep.toml").write_text("""
[sweep]
plots = 0
sample = { spec = "spec.toml", count = 6, regnet = { depth = [2, 6], w_0 = [8, 16], w_a = [8, 16], w_m = [2, 2.5] } }
""")
    command.run_sweep(read_sweep(tmp_path / "sweep.toml"), tmp_path / "out")
    found = json.loads((tmp_path / "out/sweep.json").read_text())
    (population,) = found["populations"]
    assert population["sampled"]
    assert {"w_0", "w_a", "w_m", "stages.0.width"} <= {variable["key"] for variable in population["variables"]}
    trials = Store(tmp_path / "out/sample/run.sqlite", readonly=True).trials()
    assert len(trials) == population["counts"]["analysed"] == 6
    for trial in trials:
        own = trial.extra["variables"]
        stages = regnet_stages(int(own["depth"]), own["w_0"], own["w_a"], own["w_m"], int(own["group_width"]))
        assert [trial.arch[f"stages.{i}.width"] for i in range(2)] == stages.widths
        assert [trial.arch[f"stages.{i}.depth"] for i in range(2)] == stages.depths
    assert any("of what was drawn" in note for note in found["notes"])


def test_curves_say_how_far_a_part_of_the_training_ranks_as_its_end(space, tmp_path):
    """Errors fall by halves to what they come to; a quarter of the training ranks as the end, an eighth at random."""
    rng = np.random.default_rng(0)
    trials = []
    for trial in trials_of(space, 60, 0, planted=True):
        end = trial.metrics["top1"]
        curve = {"share": [0.125, 0.5], "top1": [float(40 + 10 * rng.random()), end - 5]}
        trials.append(attrs.evolve(trial, extra={"curve": curve}))
        trials.append(Trial(trial.arch, {"top1": end - 10}, fidelity=0.25))
    run = write_run(tmp_path / "curves", trials, space)
    store = Store(run / "run.sqlite")
    store.set("spec", {**store.get("spec"), "train": {"epochs": 16}})
    store.close()
    sweep = Sweep((str(run),), plots=0, filter={"depth": (2, 3)})
    found, _ = run_sweep(sweep, tmp_path / "out")
    (population,) = found.populations
    assert len(population) == len(population.curves) < 60
    for curve, error in zip(population.curves, population.errors, strict=True):
        assert [share for share, _ in curve] == [0.125, 0.25, 0.5, 1]
        assert [e for _, e in curve][1:] == pytest.approx([error + 10, error + 5, error])
    eighth, quarter, half = figures(found)["populations"][0]["curves"]
    assert (quarter["tau"], quarter["gain"]) == (pytest.approx(1), pytest.approx(10))
    assert (half["tau"], half["gain"]) == (pytest.approx(1), pytest.approx(5))
    assert abs(eighth["tau"]) < 0.4
    page = (tmp_path / "out/sweep.html").read_text()
    assert "Whether archs are trained out" in page
    assert (tmp_path / "out/curves-0.svg").exists()


# -- filters, parts, made variables -----------------------------------------------------------------------------------


def test_the_filters_of_pycls_are_understood(planted, tmp_path):
    spec = tmp_path / "sweep.toml"
    spec.write_text(f"""
[sweep]
input = ["{planted}"]
PRE_FILTERS = {{ flops = [1e5, 0, 8e5] }}
SPLIT_FILTERS = {{ shallow = {{ depth = [1, 1, 2] }}, deep = {{ depth = [3, 3] }}, convs = {{ op = ["conv"] }} }}
derived.total = {{ sum = "*.kernel" }}
""")
    sweep = read_sweep(spec)
    shallow, deep, convs = read_populations(sweep)
    assert [shallow.name, deep.name, convs.name] == ["shallow", "deep", "convs"]
    assert {*shallow.variables["depth"].values} == {1, 2}
    assert {*deep.variables["depth"].values} == {3}
    assert {*convs.variables["op"].values} == {"conv"}
    for population in (shallow, deep, convs):
        assert population.costs["flops"].min() >= 1e5
        assert population.costs["flops"].max() <= 8e5
    assert deep.variables["total"].values.min() >= 9  # three kernels of 3
    assert "a part of a population" in narrow(analyse([shallow, deep, convs], sweep)).reasons[0]


@pytest.mark.parametrize(("text", "says"), [
    ("filter = { flops = [1, 2] }", "nothing is left .*\n.*raw units"),
    ("filter = { flopps = [1, 2] }", "has no 'flopps'\n.*did you mean 'flops'"),
    ("filter = { op = [1, 2] }", "expected a list of strings"),
    ("filter = { flops = [1] }", r"sweep.filter.flops: expected a list of bounds"),
    ("derived = { x = { product = 'width' } }", "expected one of sum"),
    ("error = 'top5'", "no trial has 'top5'"),
    ("variables = ['nothing*']", "no variable is called"),
    ("bins = 3", "sweep.bins: unknown key"),
    ("bootstrap = { quantiles = [0.9, 0.5, 0.1] }", "in order"),
])  # fmt: skip
def test_mistakes_are_told_with_what_would_be_right(planted, tmp_path, text, says, capsys):
    spec = tmp_path / "sweep.toml"
    spec.write_text(f'[sweep]\ninput = ["{planted}"]\n{text}\n')
    assert main(["sweep", str(spec), "--out", str(tmp_path / "out")]) == 2
    assert re.search(says, capsys.readouterr().err)


def test_files_that_are_none_are_told_of(tmp_path, capsys):
    (tmp_path / "empty.csv").write_text("a,b\n")
    write_csv(tmp_path / "words.csv", [{"width": 1, "flops": "many", "top1": 3}])
    write_csv(tmp_path / "nothing.csv", [{"width": 1, "accurracy": 3}])
    names = ["empty.csv", "words.csv", "nothing.csv", "gone.csv", "folder"]
    (tmp_path / "folder").mkdir()
    assert main(["sweep", *(str(tmp_path / name) for name in names), "--out", str(tmp_path / "out")]) == 2
    seen = capsys.readouterr().err
    assert all(name in seen for name in names)
    assert "no column 'top1'" in seen
    with pytest.raises(UserError, match="one TOML file"):
        asked([tmp_path / "a.toml", tmp_path / "b.csv"])


def test_repeats_with_other_seeds_are_averaged(tmp_path):
    rng = np.random.default_rng(0)
    rows = [
        {"width": w, "flops": w * f, "seed": s, "top1": 80 + w + 0.5 * rng.normal()}
        for w in (1, 2, 3) for f in (1, 2) for s in range(40)
    ]  # fmt: skip
    write_csv(tmp_path / "seeds.csv", rows)
    (population,) = read_populations(Sweep((str(tmp_path / "seeds.csv"),)))
    assert len(population) == 3
    assert population.errors == pytest.approx([19, 18, 17], abs=0.3)
    assert population.repeats == pytest.approx(0.5, abs=0.1)


# -- what is written --------------------------------------------------------------------------------------------------


def test_figures_are_plain_json_with_all_that_the_page_says(swept):
    found = json.loads((swept / "sweep.json").read_text())
    (population,) = found["populations"]
    assert population["views"]["plain"]["n"] == 300
    assert population["views"]["plain"]["band"] == pytest.approx(np.sqrt(np.log(40) / 600))
    assert population["noise_floor"] > 0
    assert {*found["narrowed"]["changed"]} == {"width", "op"}
    assert sum(population["views"]["flops"]["bins"]) == 300


def test_each_plot_is_there_as_svg_and_png_and_the_page_needs_nothing_else(swept):
    page = (swept / "sweep.html").read_text()
    pictures = {path.stem for path in swept.glob("*.png")}
    assert pictures == {path.stem for path in swept.glob("*.svg")}
    assert {"edf", "edf-flops", "random-search", "error-flops", "values-width", "values-op", "values-2d"} <= pictures
    assert page.count("<svg") == len(pictures)
    assert not re.findall(r"<(?:script|link|img)|@import|url\((?!#)", page)
    assert "var(--ink)" in page
    assert (swept / "edf.svg").read_text().count("#1c2024") > 0  # by itself it has its own colours


def test_the_same_sweep_writes_the_same_figures(planted, swept, tmp_path):
    run_sweep(Sweep((str(planted),), plots=0), tmp_path)
    assert (tmp_path / "sweep.json").read_text() == (swept / "sweep.json").read_text()


def test_the_analysis_needs_no_torch(planted, tmp_path):
    code = (
        "import sys; from corenas_tool_sweep.command import run_sweep; from corenas_tool_sweep.settings import Sweep\n"
        f"from pathlib import Path; run_sweep(Sweep(({str(planted)!r},), plots=1), Path({str(tmp_path)!r}))\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_names_of_archs_that_are_markup_are_shown_as_text(tmp_path):
    rng = np.random.default_rng(0)
    rows = [{"<b>op</b>": "<i>" if rng.random() < 0.5 else "$x_$", "top1": rng.random()} for _ in range(40)]
    write_csv(tmp_path / "odd.csv", rows)
    run_sweep(Sweep((str(tmp_path / "odd.csv"),)), tmp_path / "out")
    page = (tmp_path / "out" / "sweep.html").read_text()
    assert "<b>op" not in page
    assert "&lt;b&gt;op" in page


def test_the_readme_shows_a_sweep_that_is_right(tmp_path):
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    (fragment,) = re.findall(r"```toml\n(.*?)```", readme, re.DOTALL)
    (tmp_path / "sweep.toml").write_text(fragment)
    assert read_sweep(tmp_path / "sweep.toml").normalise is not None
    assert "sweep" in load_catalogue().names("commands")
