import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from corenas.contracts import Metric, Note, Progress, RunDone, RunStarted, StageDone, StageStarted, TrialDone
from corenas.objectives import Trial
from corenas.plugins import load_catalogue
from corenas.space import Arch
from corenas.testing.distributions import distribution_checks
from corenas.testing.listeners import RESULT, listener_checks
from corenas_tool_progress.closing import closing_lines, figure_text
from corenas_tool_progress.display import Bars, Lines
from corenas_tool_progress.listener import Listener, Stage, duration

METRICS = {"top1": Metric("%", share=True), "flops": Metric("", "min")}
HIDDEN, VISIBLE = "\x1b[?25l", "\x1b[?25h"


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Watching:
    """A listener with all that it wrote."""

    def __init__(self, kind, width=120):
        self.clock, self.file = Clock(), io.StringIO()
        if kind == "bars":
            console = Console(file=self.file, force_terminal=True, width=width, color_system=None, legacy_windows=False)
            self.listener = Listener(Bars(console, self.clock), self.clock)
        else:
            self.listener = Listener(Lines(self.file, self.clock), self.clock)

    def hear(self, *events, after=0.0):
        for event in events:
            self.clock.now += after
            self.listener(event)

    @property
    def text(self):
        return self.file.getvalue()

    @property
    def lines(self):
        return self.text.splitlines()


@pytest.fixture(params=["lines", "bars"])
def watching(request):
    return Watching(request.param)


ARCH = Arch({"a": 1})
RUN = [
    RunStarted("quickstart", Path("runs/none"), False),
    StageStarted("train", 1000, "steps"),
    *(Progress("train", i, {"loss": 2.5, "lr": 0.05}) for i in range(100, 1000, 100)),
    Note("look [bold]here[/bold]"),
    StageDone("train", 103.0, {"loss": 2.25}),
    StageStarted("search", 3, "trials"),
    TrialDone(Trial(ARCH, {"accuracy": 70.0})),
    TrialDone(Trial(ARCH, state="infeasible")),
    TrialDone(Trial(ARCH, state="failed", error="out of memory")),
    Progress("search", 3, {"top1": 70.125, "flops": 2e8}),
    StageDone("search", 7.0, {"top1": 70.125}),
    RunDone(Path("runs/none"), RESULT, {"train": 3500, "valid": 500, "test": 1000}, METRICS),
]


def test_a_percentage_that_is_no_share_of_images_has_no_binomial_error():
    figures, metrics = {"top1": 50.0, "map": 50.0}, {"top1": Metric("%", share=True), "map": Metric("%")}
    assert figure_text(figures, metrics, 100) == "top1 50.0 ± 5.0 %, map 50.0 %"  # sqrt(.5 * .5 / 100) = 0.05


def test_a_run_is_told_from_its_first_line_to_its_last(watching):
    watching.hear(*RUN, after=6.0)
    for line in (
        "quickstart: begins in runs/none",
        "look [bold]here[/bold]",
        "train: done in 1:43, loss 2.25",
        "search: done in 0:07, best top1 70.12",
        "search: 1 of 3 trials failed, the last one because: out of memory",
    ):
        assert line in watching.text, line
    assert watching.lines[-4:] == [
        "best of 4 trials: top1 70.0 ± 2.0 %, flops 200M on 500 validation images",
        "on 1000 test images: top1 69.5 ± 1.5 %",
        "network:   runs/none/best/ ()",
        "trials:    runs/none/run.sqlite, listed by: corenas trials runs/none",
    ]
    # 100 steps every 6 seconds, 100 steps to go
    assert "900/1,000 steps, 16.7 steps/s, 0:06 left, loss 2.5, lr 0.05" in watching.text
    assert "3/3 trials, 0.125 trials/s, 0:00 left, 1 failed, 1 infeasible, best top1 70.12, flops 200M" in watching.text


def test_what_a_note_names_controls_no_terminal():
    watching = Watching("lines")
    watching.hear(Note("a class \x1b[2Jcat\u202e\nand " + "x" * 9000))
    assert watching.lines[0] == "a class \\x1b[2Jcat\\u202e"
    assert len(watching.lines[1]) <= 500


def test_a_run_that_goes_on_says_so_and_counts_only_its_own_pace(watching):
    watching.hear(RunStarted("a", Path("runs/a"), True), StageStarted("train", 1000, "steps", done=500))
    watching.hear(Progress("train", 510), after=10.0)
    assert "a: goes on in runs/a" in watching.text
    assert "500/1,000 steps" in watching.text
    assert "510/1,000 steps, 1 steps/s, 8:10 left" in watching.text


@pytest.mark.parametrize("width", [20, 30, 40, 60, 80])
def test_a_narrow_terminal_keeps_the_name_the_bar_and_how_far_it_is(width):
    watching = Watching("bars", width)
    watching.hear(
        StageStarted("retrain", 1000, "steps"), Progress("retrain", 500, {"loss": 2.5, "lr": 0.05}), after=6.0
    )
    drawn = [
        line for line in re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", watching.text).replace("\r", "\n").split("\n") if line
    ]
    assert all(len(line) <= width for line in drawn)
    assert all(line.startswith("retrain ") for line in drawn), drawn
    assert drawn[-1].count("\u2501") >= 2, "half of the bar"
    assert "500" in drawn[-1] or width < 30


def test_a_terminal_is_given_back_when_the_last_stage_ends():
    watching = Watching("bars")
    watching.hear(StageStarted("a", 10, "steps"), StageStarted("b", 10, "steps"), after=1.0)
    assert HIDDEN in watching.text
    watching.hear(StageDone("a", 1.0))
    assert VISIBLE not in watching.text
    watching.hear(StageDone("b", 1.0))
    assert watching.text.rindex(VISIBLE) > watching.text.rindex(HIDDEN)
    assert watching.lines[-1].endswith("b: done in 0:01")


def test_a_terminal_is_given_back_when_the_run_ends_inside_a_stage():
    watching = Watching("bars")
    stderr = sys.stderr
    watching.hear(StageStarted("a", 10, "steps"), RunDone(Path("x"), RESULT, {"valid": 5, "test": 4}, METRICS))
    assert watching.text.rindex(VISIBLE) > watching.text.rindex(HIDDEN)
    assert watching.lines[-1] == "trials:    x/run.sqlite, listed by: corenas trials x"
    assert sys.stderr is stderr


def test_bars_leave_stdout_alone(capsys):
    watching = Watching("bars")
    stdout = sys.stdout
    watching.hear(StageStarted("a", 10, "steps"))
    assert sys.stdout is stdout
    print("{}")
    watching.hear(StageDone("a", 1.0))
    assert capsys.readouterr().out == "{}\n"


@pytest.mark.parametrize("order", ["reversed", "twice", "each alone"])
def test_events_in_odd_order_break_nothing(watching, order):
    for some in {"reversed": [RUN[::-1]], "twice": [RUN + RUN], "each alone": [[event] for event in RUN]}[order]:
        watching.hear(*some)
    watching.hear(Progress("unheard of", 3), StageDone("unheard of", 1.0), RunDone(Path("x")))
    if HIDDEN in watching.text:
        assert watching.text.rindex(VISIBLE) > watching.text.rindex(HIDDEN)


def test_a_stage_of_no_known_length_shows_what_it_can(watching):
    watching.hear(StageStarted("search", 0, "trials"), Progress("search", 5, {"loss": float("nan")}), after=10.0)
    assert "5 trials, 0.5 trials/s, loss nan" in watching.text
    watching.hear(StageDone("search", 20.0, {"latency": float("inf"), "flops": 2e8}))
    assert "search: done in 0:20, latency inf, flops 200M" in watching.text


def test_a_log_gets_a_line_every_five_seconds_at_first_and_every_minute_in_the_end():
    watching = Watching("lines")
    watching.hear(StageStarted("train", 10**6, "steps"))
    written = []
    for step in range(10_000):
        before = len(watching.lines)
        watching.hear(Progress("train", step), after=1.0)
        if len(watching.lines) > before:
            written.append(step)
    pauses = [b - a for a, b in itertools.pairwise(written)]
    assert pauses[:5] == [5] * 5
    assert pauses[-5:] == [60] * 5
    assert len(watching.lines) < 400


def test_thousands_of_events_a_second_are_drawn_ten_times_a_second():
    watching = Watching("bars")
    watching.hear(StageStarted("train", 5000, "steps"))
    before = len(watching.text)
    watching.hear(*(Progress("train", i) for i in range(5000)), after=0.001)
    draws = watching.text[before:].count("steps/s")
    assert 40 <= draws <= 50


def test_the_rate_is_that_of_the_last_half_minute():
    clock = Clock()
    stage = Stage("train", 100_000, "steps", 0, clock)
    for step in range(1, 101):  # compiling: one step a second
        clock.now += 1.0
        stage.reach(step, {})
    assert stage.rate == pytest.approx(1.0)
    for step in range(101, 4101):
        clock.now += 0.01
        stage.reach(step, {})
    assert stage.rate == pytest.approx(100.0)
    assert stage.left == pytest.approx(959.0)
    clock.now += 9
    assert stage.left == pytest.approx(950.0)


def test_units_that_take_longer_than_the_window_have_a_rate_as_well():
    clock = Clock()
    stage = Stage("search", 10, "trials", 0, clock)
    for done in (1, 2, 3):
        clock.now += 200.0
        stage.reach(done, {})
    assert stage.rate == pytest.approx(1 / 200)
    assert "0.005 trials/s, 23:20 left" in stage.text()


@pytest.mark.parametrize(("seconds", "text"), [
    (0, "0:00"), (59.6, "1:00"), (103, "1:43"), (7390, "2:03:10"), (3 * 86400 + 15000, "3 d 04:10:00"),
])  # fmt: skip
def test_durations_read_as_people_say_them(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize("check", distribution_checks)
def test_the_distribution_conforms(check):
    check("corenas_tool_progress")


@pytest.mark.parametrize("check", listener_checks)
def test_conforms(watching, check):
    check(watching.listener)


def test_the_entry_module_does_not_import_rich():
    script = "import sys, corenas_tool_progress; sys.exit('rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_the_catalogue_has_it_as_a_listener():
    catalogue = load_catalogue()
    plugin = next(p for p in catalogue.plugins if p.name == "tool-progress")
    assert plugin.error is None
    assert catalogue.manager.has_plugin("tool-progress")


SCRIPT = """
import json, pathlib, sys
from corenas_tool_progress import corenas_event
from corenas.contracts import *
corenas_event(RunStarted("a", pathlib.Path("runs/a"), False))
corenas_event(StageStarted("train", 2, "steps"))
corenas_event(Progress("train", 1, {"loss": 0.5}))
print("a warning", file=sys.stderr)
if "interrupted" in sys.argv:
    sys.exit(3)
corenas_event(StageDone("train", 1.0))
print(json.dumps({"ok": True}))
"""


def test_stdout_stays_one_json_object():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"ok": True}
    assert done.stderr.splitlines() == [
        "a: begins in runs/a",
        "train: 0/2 steps",
        "a warning",
        "train: done in 0:01",
    ]


def in_a_terminal(*arguments, **environment):
    """What the script writes to a terminal that is its stderr, and what to stdout."""
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", SCRIPT, *arguments]
    env = {**os.environ, "TERM": "xterm-256color", **environment}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=env) as process:
        os.close(theirs)
        assert process.stdout is not None
        out = process.stdout.read().decode()
    written = b""
    try:
        while chunk := os.read(ours, 65536):
            written += chunk
    except OSError:  # Linux says so when the other end is closed
        pass
    os.close(ours)
    return written.decode(), out


def test_a_terminal_shows_bars_and_is_given_back():
    text, out = in_a_terminal()
    assert json.loads(out) == {"ok": True}
    assert "0/2 steps" in text
    assert "a warning" in text
    assert "train: done in 0:01" in text
    assert text.rindex(VISIBLE) > text.rindex(HIDDEN)


def test_a_terminal_is_given_back_by_a_run_that_is_interrupted():
    text, _ = in_a_terminal("interrupted")
    assert text.rindex(VISIBLE) > text.rindex(HIDDEN)


def test_colours_are_left_out_where_nobody_wants_them():
    assert "\x1b[3" in in_a_terminal(NO_COLOR="")[0]
    assert "\x1b[3" not in in_a_terminal(NO_COLOR="1")[0]


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"COLUMNS": "0"}, {"COLUMNS": "1"}])
def test_a_dumb_terminal_and_one_without_columns_get_lines(environment):
    text, _ = in_a_terminal(**environment)
    assert "\x1b" not in text
    assert "train: 0/2 steps" in text
    assert "train: done in 0:01" in text


def test_the_end_says_where_what_is_there_is_and_how_to_load_it(tmp_path):
    (tmp_path / "best").mkdir()
    for name in ("network.py", "network.safetensors"):
        (tmp_path / "best" / name).touch()
    (tmp_path / "supernet.pt").touch()
    (tmp_path / "my run").mkdir()
    (tmp_path / "my run" / "run.sqlite").touch()
    spaced = closing_lines(RunDone(tmp_path / "my run", RESULT, {"valid": 0, "test": 4}, METRICS))
    assert any(line.endswith(f"listed by: corenas trials '{tmp_path}/my run'") for line in spaced)
    row = {**RESULT["table"][0], "constraints": "", "folder": "best-2"}
    result = {**RESULT, "table": [*RESULT["table"], row], "front": RESULT["front"] * 3}
    lines = closing_lines(RunDone(tmp_path, result, {"valid": 0, "test": 4}, METRICS))
    text = "\n".join(lines)
    assert lines[0] == "of 3 on the front the best with flops at most 200M: top1 70.0 %, flops 200M"
    assert f"flops at most 200M: top1 69.5 ± 23.0 %, flops 200M, in {tmp_path}/best/" in lines
    assert f"no constraint: top1 69.5 ± 23.0 %, flops 200M, in {tmp_path}/best-2/" in lines
    assert f"supernet:  {tmp_path}/supernet.pt" in lines
    assert "from network import Network" in text
    assert "torch.export" not in text
    trust = {"metric": "top1", "objective": "top1", "archs": 20, "tau": 0.5, "interval": [0.2, 0.7],
             "tau_of_flops": math.nan, "interval_of_flops": [-1, 1]}  # fmt: skip
    told = "Kendall's tau between the search's top1 and the top1 of 20 of its archs trained alone: "
    told += "0.50 (95 %: 0.20 to 0.70); of plain flops: not known"
    assert told in closing_lines(RunDone(tmp_path, {**result, "trust": trust}, {"valid": 0, "test": 4}, METRICS))
    seeds = {"test": [{"top1": 70.0}, {"top1": 72.0}, {"top1": 71.0}], "mean": {"top1": 71.0}, "sd": {"top1": 1.0}}
    again = {**RESULT, "table": [{**RESULT["table"][0], "seeds": seeds}]}
    lines = closing_lines(RunDone(tmp_path, again, {"valid": 0, "test": 4}, METRICS))
    assert "mean of 3 seeds: top1 71.00 ± 0.58 %" in lines
    (tmp_path / "best" / "network.py").unlink()
    (tmp_path / "best" / "network.pt2").touch()
    text = "\n".join(closing_lines(RunDone(tmp_path, result, {"valid": 0, "test": 4}, METRICS)))
    assert "from network import" not in text
    assert "torch.export.load" in text
