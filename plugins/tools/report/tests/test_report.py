import itertools
import json
import os
import re
import subprocess
import sys
from argparse import ArgumentParser
from html.parser import HTMLParser

import numpy as np
import pytest
import tomli

from corenas.contracts import Note, RunDone
from corenas.errors import UserError
from corenas.objectives import Trial
from corenas.plugins import load_catalogue
from corenas.space import SearchSpace
from corenas.store import Store
from corenas.testing.commands import command_checks
from corenas.testing.components import imports_no_torch
from corenas.testing.distributions import distribution_checks
from corenas.testing.listeners import listener_checks
from corenas.variables import Categorical
from corenas_tool_report import corenas_commands, corenas_event, drawing
from corenas_tool_report.page import write_report
from corenas_tool_report.plots import counted_on
from corenas_tool_report.reading import read_run, trade_off
from corenas_tool_report.words import duration, measured, noise, number

VOID = {"meta", "link", "br"}


class Page(HTMLParser):
    """A page: its elements with attributes and text, the tables as rows of cells, and the plots."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.open, self.script = [], [], ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append({"tag": tag, **dict(attrs), "text": ""})
        if tag not in VOID:
            self.open.append(self.elements[-1])

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag, **attrs):
        return [e for e in self.elements if e["tag"] == tag and attrs.items() <= e.items()]

    def texts(self, tag):
        return [e["text"] for e in self.all(tag)]

    @property
    def text(self):
        return next(e["text"] for e in self.all("body"))

    @property
    def plots(self):
        found = self.all("script", id="plots")
        return {plot["name"]: plot for plot in json.loads(found[0]["text"])} if found else {}

    def facts(self):
        return dict(zip(self.texts("dt"), self.texts("dd"), strict=True))

    def rows(self, caption):
        """The cells of a table, row by row."""
        table = next(t for t in re.findall(r"<table.*?</table>", self.source, re.S) if caption in t)
        rows = re.findall(r"<tr>(.*?)</tr>", table, re.S)
        return [[re.sub(r"<.*?>", "", cell) for cell in re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row)] for row in rows]


def page_of(*folders, out=None):
    return Page(write_report(folders, out))


def test_a_run_has_a_page_with_all_that_it_found(run_writer):
    folder = run_writer("digits")
    page = page_of(folder)
    result = Store(folder / "run.sqlite", readonly=True).get("result")["table"][0]
    assert page.texts("h1") == ["digits"]
    assert page.texts("h2") == ["Result", "Trials", "Training", "What was asked", "Data", "Time and versions"]
    rows = page.rows("what was measured")
    assert rows[0] == ["metric", "in the search: 500 validation images", "test: 1,000 images, touched once"]
    valid, test = result["metrics"]["top1"], result["test"]["top1"]
    assert rows[1][1:] == [f"{p:.1f} ± {(p * (100 - p) / n) ** 0.5:.1f} %" for p, n in [(valid, 500), (test, 1000)]]
    facts = page.facts()
    assert facts["task"].startswith("classification")
    assert facts["searcher"] == "evolution population 20, parents 8, mutation 10"
    assert facts["constraints"] == "flops at most 2M"
    assert facts["objectives"] == "top1, more is better"
    assert facts["torch"] == "2.15.0"
    assert "a multiply-add counts once" in page.text
    assert page.rows("time of each stage")[1:] == [["train", "6 min 32 s", "cpu"], ["search", "18 s", "cpu"],
                                                   ["export", "1.2 s", "cpu"], ["all", "6 min 51 s", ""]]  # fmt: skip
    assert [row[:2] for row in page.rows("splits")[1:]] == [["train", "3,500"], ["valid", "500"], ["test", "1,000"]]
    assert "not finished" not in page.text
    assert "Why 1 trial failed" in page.text
    assert "out of <memory>" in page.text


def test_a_page_says_only_what_was_done(run_writer):
    page = page_of(run_writer("again", retrain=False, supernet={"from": "runs/a"}))
    assert "touched once here, and by the run runs/a before" in page.text
    assert "as the supernet was trained" not in page.text
    assert "two splits" not in page.text


def test_the_whole_spec_stands_there_as_toml(run_writer):
    folder = run_writer("digits")
    text = page_of(folder).all("pre")[-1]["text"]
    assert tomli.loads(text) == Store(folder / "run.sqlite", readonly=True).get("spec")


def test_trials_are_plotted_against_every_cost_with_their_front(run_writer):
    folder = run_writer("digits")
    plot = page_of(folder).plots["trials"]
    assert [item["label"] for item in plot["menu"]] == ["flops", "params", "activations", "top5"]
    names = [trace["name"] for trace in plot["traces"]]
    assert names == ["trials", "infeasible", "front", "best"]
    trials = [trial for trial in Store(folder / "run.sqlite", readonly=True).trials() if trial.ok]
    points, front = (plot["menu"][0]["changes"][names.index(name)] for name in ("trials", "front"))
    assert points["x"] == [trial.metrics["flops"] for trial in trials]
    for x, y in zip(front["x"], front["y"], strict=True):  # nothing is as good at less cost
        assert not [t for t in trials if t.metrics["flops"] < x and t.metrics["top1"] >= y]
    assert front["y"][-1] == max(trial.metrics["top1"] for trial in trials)
    hover = plot["traces"][0]["text"][0]
    assert trials[0].arch.digest in hover
    assert re.search(r"stage 1: width \d+, .*k\d e\d", hover)
    assert "done, 0.1" in hover


def test_curves_have_one_plot_for_each_figure_over_epochs(run_writer):
    page = page_of(run_writer("digits", retrain=True))
    curves = [plot for name, plot in page.plots.items() if name.startswith("curve-")]
    assert [(c["name"], c["layout"]["yaxis"]["title"]["text"]) for c in curves] == [
        ("curve-train-0", "loss"), ("curve-train-1", "lr"), ("curve-retrain-0", "loss"), ("curve-retrain-1", "lr"),
    ]  # fmt: skip
    assert curves[0]["traces"][0]["x"] == [*range(1, 16)]
    assert {e["id"] for e in page.all("div", role="img")} == page.plots.keys()


def test_epochs_of_several_phases_are_counted_on():
    assert counted_on([1, 2, 3]) == [1, 2, 3]
    assert counted_on([1, 2, 1, 2, 3, 1]) == [1, 2, 3, 4, 5, 6]
    assert counted_on([2, 4, 2, 4]) == [2, 4, 6, 8]


def test_a_run_for_trade_offs_shows_its_fronts_and_how_they_grew(run_writer):
    folder = run_writer("fronts", limits=(2e6, 1.6e6))
    store = Store(folder / "run.sqlite")
    goals = [{"metric": m, "direction": d, "weight": 1.0} for m, d in (("top1", "max"), ("flops", "min"))]
    store.set("objectives", {"objectives": goals, "pareto": True, "bin_metric": None, "bin_width": 0.0})
    searches = [[t for t in store.trials(i) if t.state == "done"] for i in range(2)]
    sizes = [len(store.trials(i)) for i in range(2)]
    store.close()
    page = page_of(folder)
    points = [(t.metrics["top1"], t.metrics["flops"]) for some in searches for t in some]
    (low, most), (high, least) = (
        (pick(p[0] for p in points), other(p[1] for p in points)) for pick, other in ((min, max), (max, min))
    )
    caption = next(text for text in page.texts("figcaption") if "Hypervolume" in text)
    assert f"reference point (top1 {measured(low, '%')}, flops {number(most)}: the worst" in caption
    for trace, some, n in zip(page.plots["hypervolume"]["traces"], searches, sizes, strict=True):
        # The union of rectangles, column by column.
        corners = sorted({t.metrics["top1"] for t in some})
        area, before = 0.0, low
        for top1 in corners:
            area += (top1 - before) * (most - min(t.metrics["flops"] for t in some if t.metrics["top1"] >= top1))
            before = top1
        assert trace["y"][-1] == pytest.approx(100 * area / ((high - low) * (most - least)))
        assert trace["x"][-1] == n
        assert trace["y"] == sorted(trace["y"])
    rows = page.rows("The front of top1, flops under flops at most 2M")
    beaten = [[q for q in points[: len(searches[0])] if q != p and q[0] >= p[0] and q[1] <= p[1]] for p in points]
    front = {p for p, better in zip(points[: len(searches[0])], beaten, strict=False) if not better}
    assert [row[2] for row in rows[1:]] == [measured(p[0], "%") for p in sorted(front, reverse=True)]


def test_every_part_of_the_page_can_be_read_out(run_writer):
    page = page_of(run_writer("digits"), run_writer("other", seed=1), out=run_writer("third") / "page.html")
    for path in [page, page_of(run_writer("fourth"))]:
        assert path.all("html", lang="en")
        assert path.all("meta", name="viewport")
        assert all(e.get("aria-label") for e in path.elements if e.get("role") in ("img", "region", "group"))
        assert len(path.all("caption")) == len(path.all("table"))
        assert {e.get("scope") for e in path.all("th")} == {"col", "row"}
        levels = [int(e["tag"][1]) for e in path.elements if re.fullmatch("h[1-6]", e["tag"])]
        assert levels[0] == 1
        assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
        ids = [e["id"] for e in path.elements if "id" in e]
        assert len(ids) == len(set(ids))


EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


def test_text_from_files_is_never_markup(run_writer, tmp_path):
    folder = run_writer("evil", name=EVIL, searcher={"type": EVIL, EVIL: EVIL}, task={"type": EVIL, "data": EVIL})
    store = Store(folder / "run.sqlite")
    store.set("searches", [EVIL])
    store.set("versions", {"corenas": EVIL, "device": EVIL, EVIL: 1})
    space = SearchSpace.from_table(store.get("spec")["space"])
    store.add(Trial(space.default(), {"top1": 99.0, "flops": 1e6, EVIL: 3.0}))
    store.add(Trial(space.smallest(), {EVIL: 3.0}, "failed", error=EVIL))
    store.point("train", 1000, {"epoch": 16, "loss": 1.0, EVIL: float("nan")})
    result = store.get("result")
    result["table"][0]["constraints"] = EVIL
    store.set("result", result)
    store.close()
    other = run_writer("other")
    plain = page_of(other)
    for page in [page_of(folder), page_of(folder, other, out=tmp_path / "both.html")]:
        assert len(page.all("script")) == len(plain.all("script")) == 3
        assert not page.all("img")
        assert not [name for e in page.elements for name in e if name.startswith("on")]
        assert EVIL in page.text
        shown = [text for plot in page.plots.values() for trace in plot["traces"] for text in trace.get("text", ())]
        shown += [text for plot in page.plots.values() for item in plot["menu"] for change in item["changes"]
                  for text in change.get("text", ())]  # fmt: skip
        assert shown
        assert not [text for text in shown if "<img" in text or "<script" in text]


def test_the_page_lets_browsers_load_nothing_and_names_no_address(run_writer):
    page = page_of(run_writer("digits"))
    policy = page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    assert policy.startswith("default-src 'none'; ")
    assert "http" not in policy
    for element in page.elements:
        for name in ("src", "href"):
            assert element.get(name, "data:,") == "data:,", element


@pytest.mark.parametrize("n", [0, 37])
def test_an_unfinished_run_has_a_page_that_says_so(run_writer, n):
    page = page_of(run_writer("half", finished=False, n=n, epochs=3))
    assert "This run is not finished" in page.all("p", role="status")[0]["text"]
    assert "3 points of the curve of train" in page.text
    assert "How to load it" not in page.text
    assert ("Best so far" in page.texts("h2")) == bool(n)
    assert "trials" in page.plots or not n
    assert "were not touched so far" in page.text or not n


def test_a_run_that_has_only_begun_has_a_page(tmp_path):
    Store(tmp_path / "run.sqlite").close()
    page = page_of(tmp_path)
    assert page.texts("h1") == [tmp_path.name]
    assert "Nothing was found so far" in page.text
    assert not page.plots


def test_a_percentage_that_is_no_share_of_images_has_no_binomial_error(run_writer):
    folder = run_writer("precision")
    store = Store(folder / "run.sqlite")
    store.set("metrics", {name: {**told, "share": False} for name, told in store.get("metrics").items()})
    store.close()
    page = page_of(folder)
    assert page.rows("what was measured")[1][1].endswith(" %")
    assert "±" not in page.text


def test_a_run_of_an_older_version_has_a_page_without_what_it_did_not_note(run_writer):
    page = page_of(run_writer("old", noted=False))
    assert "±" not in page.text.replace("What stands behind ±", "")
    assert page.facts()["constraints"] == "flops: 2M"
    assert page.plots["trials"]["menu"][0]["label"] == "flops"


def test_several_searches_have_one_table_and_a_picture_each(run_writer):
    page = page_of(run_writer("sweep", limits=(1.6e6, 1.8e6, 2e6), n=60))
    rows = page.rows("results of the searches")
    assert [row[0] for row in rows[1:]] == ["flops at most 1.6M", "flops at most 1.8M", "flops at most 2M"]
    assert [row[-1] for row in rows[1:]] == ["best", "best-2", "best-3"]
    assert len(page.all("div", **{"class": "arch"})) == 3
    names = [trace["name"] for trace in page.plots["trials"]["traces"]]
    assert names == [*(row[0] for row in rows[1:]), "infeasible", "front", "best"]


@pytest.mark.parametrize(("gone", "left"), [
    ("network.py", {"torch.export.load"}), ("network.pt2", {"load_state_dict"}),
    ("arch.toml", {"torch.export.load", "load_state_dict"}),
])  # fmt: skip
def test_how_to_load_speaks_only_of_files_that_are_there(run_writer, gone, left):
    folder = run_writer("digits")
    (folder / "best" / gone).unlink()
    code = " ".join(page_of(folder).texts("pre"))
    assert {word for word in ("torch.export.load", "load_state_dict") if word in code} == left


def test_several_runs_are_compared(run_writer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [run_writer("a"), run_writer("b", seed=1, searcher={"type": "random"}),
               run_writer("c", seed=2, finished=False, n=30)]  # fmt: skip
    page = page_of(*folders, folders[0])
    assert (tmp_path / "report.html").exists()
    rows = page.rows("the best of each run")
    assert [row[0] for row in rows[1:]] == ["a", "b", "c"]
    assert [row[2] for row in rows[1:]] == ["evolution", "random", "evolution"]
    assert [row[-1] for row in rows[1:]] == ["finished", "finished", "not finished"]
    assert all("±" in row[rows[0].index("top1, test")] for row in rows[1:3])
    assert "Not finished, shown as far as they have come: c." in page.text
    assert [trace["name"] for trace in page.plots["fronts"]["traces"]] == ["a", "b", "c"]
    differing = {row[0]: row[1:] for row in page.rows("keys of the specs that differ")[1:]}
    assert differing == {
        "seed": ["0", "1", "2"],
        "searcher.type": ["evolution", "random", "evolution"],
        **{f"searcher.{key}": [n, "–", n] for key, n in [("population", "20"), ("parents", "8"), ("mutation", "10")]},
    }


def test_runs_of_one_name_are_told_apart_by_their_folders(run_writer, tmp_path):
    folders = [run_writer("a/one", name="same"), run_writer("b/one", name="same")]
    page = page_of(*folders, out=tmp_path / "both.html")
    assert [row[0] for row in page.rows("the best of each run")[1:]] == [*map(str, folders)]
    assert "The specs are the same" in page.text


def test_folders_without_a_run_are_all_named(run_writer, tmp_path):
    with pytest.raises(UserError) as error:
        write_report([tmp_path / "nowhere", run_writer("a"), tmp_path])
    assert [(fault.message, fault.file) for fault in error.value.faults] == [
        ("no run in this folder", str(tmp_path / "nowhere")), ("no run in this folder", str(tmp_path)),
    ]  # fmt: skip
    assert all("run.sqlite" in str(fault.hint) for fault in error.value.faults)


def test_a_page_that_cannot_be_written_is_a_mistake_of_the_users(run_writer, tmp_path):
    with pytest.raises(UserError, match="cannot write this page"):
        write_report([run_writer("a")], tmp_path / "nowhere" / "page.html")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no such files there")
def test_a_page_takes_the_place_of_no_device_and_no_folder(run_writer, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    run = run_writer("a")
    for place in ("pipe", ""):
        with pytest.raises(UserError, match="this is no file"):
            write_report([run], tmp_path / place)
    assert (tmp_path / "pipe").is_fifo()


def test_the_command_says_where_the_page_is(run_writer, capsys, tmp_path):
    folder = run_writer("a")
    parser = ArgumentParser("report")
    parser.add_argument("--json", action="store_true", help="as JSON")
    command = corenas_commands()["report"](parser)
    assert command(parser.parse_args([str(folder)])) == 0
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"
    out = tmp_path / "page.html"
    assert command(parser.parse_args([str(folder), "--out", str(out), "--json"])) == 0
    assert json.loads(capsys.readouterr().out) == {"report": str(out)}
    assert out.stat().st_size > 1e6
    assert not [*tmp_path.rglob("*.part")]
    assert all(action.help for action in parser._actions)


def test_corenas_knows_the_command(run_writer):
    folder = run_writer("a")
    command = [sys.executable, "-m", "corenas", "report", str(folder), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {"report": str(folder / "report.html")}


def test_a_run_that_ends_gets_its_page(run_writer, capsys):
    folder = run_writer("a")
    corenas_event(Note("something"))
    assert not (folder / "report.html").exists()
    corenas_event(RunDone(folder))
    assert (folder / "report.html").exists()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"report:    {folder / 'report.html'}\n"
    folder = folder.rename(folder.with_name("two\nlines"))
    corenas_event(RunDone(folder))
    assert capsys.readouterr().err == f"report:    {folder.parent}/two\\nlines/report.html\n"


def test_the_entry_module_imports_neither_torch_nor_plotly():
    imports_no_torch("corenas_tool_report")
    script = "import sys, corenas_tool_report; sys.exit('plotly' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_the_catalogue_has_command_and_listener():
    catalogue = load_catalogue()
    plugin = next(p for p in catalogue.plugins if p.name == "tool-report")
    assert plugin.error is None
    assert "report" in catalogue.names("commands")


def test_a_run_without_a_search_has_a_page(run_writer):
    folder = run_writer("derived", n=30)
    store = Store(folder / "run.sqlite")
    result = store.get("result")
    row = result["table"][0]
    row["metrics"] = {name: row["metrics"][name] for name in ("flops", "params", "activations")}
    for key, value in {"objectives": {"objectives": [], "pareto": False, "bin_metric": None, "bin_width": 0.0},
                       "searches": [], "device": "cuda", "result": result}.items():  # fmt: skip
        store.set(key, value)
    store.close()
    page = page_of(folder)
    assert page.rows("what was measured")[0] == ["metric", "test: 1,000 images, touched once"]
    assert "Figures of the search" not in page.text
    assert "There are no trials" in page.text
    assert page.facts()["top1 on test data"].startswith(f"{row['test']['top1']:.1f} ± ")
    assert page.rows("time of each stage")[1][2] == "cuda"
    assert page_of(folder, run_writer("other"), out=folder / "both.html").plots["fronts"]


def test_trials_of_less_effort_are_on_no_front(run_writer):
    folder = run_writer("a")
    store = Store(folder / "run.sqlite")
    space = SearchSpace.from_table(store.get("spec")["space"])
    store.add(Trial(space.smallest(), {"top1": 99.9, "flops": 1.0}, fidelity=0.5))
    store.close()
    run = read_run(folder)
    assert all(trial.fidelity == 1 for trial in trade_off(run, run.all_trials, "flops"))
    assert "1 of them with a part of the effort" in page_of(folder).text


# -- pictures ---------------------------------------------------------------------------------------------------------

BLOCK = {"op": ["mbconv", "skip"], "kernel": {"type": "categorical", "choices": [3, 5], "when": {"op": "mbconv"}}}
SPACES = {
    "stages": {"resolution": [160, 224], "stem": {"width": 16},
               "stages": [{"width": [16, 32], "depth": [0, 1, 3], "block": BLOCK},
                          {"width": 64, "kernel": 3, "depth": 2}], "head": {"width": 128}},
    "transformer": {"embed_dim": [192, 384],
                    "encoder": {"depth": [12, 14], "block": {"heads": [3, 4], "mlp": {"ratio": [3, 3.5]}}}},
    "cell": {"cell": {"edges": [{"op": ["none", "conv"]}, {"op": ["none", "conv"]}]}},
    "nested": {"parts": {"backbone": {"stages": [{"width": 8, "depth": [1, 2], "block": {"se": [True, False]}}]}}},
}  # fmt: skip


@pytest.mark.parametrize("name", SPACES)
def test_every_block_that_is_there_is_drawn_whatever_the_space(name):
    space = SearchSpace.from_table(SPACES[name])
    rng = np.random.default_rng(0)
    for arch in [space.smallest(), space.largest(), *(space.sample(rng) for _ in range(20))]:
        loose, parts = drawing.parts_of(space, arch)
        picture = drawing.picture(space, arch)
        blocks = sum(len(part.blocks) for part in parts)
        drawn = picture[: picture.index('<ul class="legend"')]
        assert drawn.count("<rect") == blocks
        depths = [arch[key] for key in arch if key.endswith("depth")]
        assert blocks == sum(depths) + {"stages": 4, "cell": 2}.get(name, 0)
        assert all(str(choice) in picture for choice in loose.values())


def test_a_picture_shows_width_and_depth_and_no_choice_that_does_not_count():
    space = SearchSpace.from_table(SPACES["stages"])
    arch = space.arch({"stages.0.depth": 1, "stages.0.width": 16, "stages.0.blocks.0.op": "skip"})
    _, (_, first, second, head) = drawing.parts_of(space, arch)
    assert first.blocks == [{"op": "skip"}]
    assert first.text() == "stage 1: width 16, 1 of at most 3 blocks"
    assert second.blocks == [{"kernel": 3}] * 2
    assert head.text() == "head: width 128"
    heights = [int(h) for h in re.findall(r'<rect [^>]*height="(\d+)" rx="4"', drawing.picture(space, arch))]
    assert heights == [28, 28, 112, 112, 112]  # 16, 16, 64, 64 wide, and the head as high as a picture gets
    assert "a dashed line: wider than drawn" in drawing.picture(space, arch)


def test_a_space_of_loose_variables_is_a_list_of_choices():
    space = SearchSpace([Categorical("a<b", ["x<y", "z"])])
    assert "<li>a&lt;b x&lt;y</li>" in drawing.picture(space, space.default())
    assert drawing.lines(None, space.default()) == ["a<b x<y"]


# -- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "text"), [
    (1972064, "1.97M"), (97722, "97.7k"), (999_900, "1M"), (999_400, "999k"), (0.012345, "0.0123"), (7, "7"),
    (98.6, "98.6"), (1234.5, "1.23k"), (2.3e8, "230M"), (5e13, "50T"), (float("nan"), "nan"), (0.0, "0"),
    (-1500.0, "-1.5k"),
])  # fmt: skip
def test_numbers_have_three_digits(value, text):
    assert number(value) == text


def test_a_share_comes_with_its_noise():
    assert measured(97.6, "%", 1000) == "97.6 ± 0.5 %"  # sqrt(.976 * .024 / 1000) = 0.0048
    assert measured(76.25, "%", 500_000) == "76.25 ± 0.06 %"
    assert measured(97.6, "%") == "97.6 %"
    assert measured(100.0, "%", 500) == "100.0 %"
    assert measured(12.345, "ms", 1000) == "12.3 ms"
    assert noise(120.0, 1000) is None


@pytest.mark.parametrize(("seconds", "text"), [
    (0.1289, "0.13 s"), (9.97, "10 s"), (42.4, "42 s"), (59.7, "1 min 00 s"), (432, "7 min 12 s"), (7500, "2 h 05 min"),
    (200_000, "2 d 7 h"), (0, "0 s"),
])  # fmt: skip
def test_times_read_as_people_say_them(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize("check", command_checks)
def test_keeps_the_promises_of_commands(check):
    check(corenas_commands()["report"])


@pytest.mark.parametrize("check", listener_checks)
def test_keeps_the_promises_of_listeners(check, run_writer):
    check(corenas_event, folder=run_writer("a"))


@pytest.mark.parametrize("check", distribution_checks)
def test_keeps_the_promises_of_distributions(check):
    check("corenas_tool_report")
