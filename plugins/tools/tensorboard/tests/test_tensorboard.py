import math
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import corenas_tool_tensorboard
from corenas.contracts import Progress, RunDone, RunStarted, StageStarted, TrialDone
from corenas.objectives import Trial
from corenas.space import Arch
from corenas.testing import listeners
from corenas.testing.distributions import distribution_checks
from corenas.testing.listeners import listener_checks
from corenas_tool_tensorboard import VARIABLE, corenas_event


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "boards"))
    return tmp_path / "boards"


def read(folder):
    found = EventAccumulator(str(folder), {"scalars": 0, "tensors": 0})
    found.Reload()
    return found


def text(board, tag):
    (event,) = board.Tensors(f"{tag}/text_summary")
    return event.tensor_proto.string_val[0].decode()


def test_curves_trials_and_the_front_are_what_the_run_told(folder, tmp_path):
    for event in listeners.events(tmp_path):
        corenas_event(event)
    board = read(folder / "small")
    points = [(e.step, e.value) for e in board.Scalars("train/loss")]
    assert points == [(i, pytest.approx(2.5 / i)) for i in range(10, 101, 10)]
    assert [(e.step, e.value) for e in board.Scalars("trials/top1")] == [(1, 70.0)]
    assert [e.value for e in board.Scalars("test/top1")] == [69.5]
    assert text(board, "front") == "| top1 | flops |\n| --- | --- |\n| 70.0 | 200000000.0 |"
    assert "| op | skip |" in text(board, "best")


def test_a_run_that_goes_on_counts_on(folder, tmp_path):
    trials = [Trial(Arch({"a": i}), {"top1": float(i)}) for i in range(4)]
    for resumed, part in ((False, trials[:3]), (True, trials[3:])):
        corenas_event(RunStarted("again", tmp_path, resumed))
        corenas_event(StageStarted("search", 4, "trials", 4 - len(part) if resumed else 0))
        for trial in part:
            corenas_event(TrialDone(trial))
        corenas_event(RunDone(tmp_path))
    found = [(event.step, event.value) for event in read(folder / "again").Scalars("trials/top1")]
    assert found == [(1, 0.0), (2, 1.0), (3, 2.0), (4, 3.0)]


def test_without_a_folder_nothing_is_written_nor_imported(tmp_path):
    script = (
        "import sys; from corenas_tool_tensorboard import corenas_event; from corenas.contracts import RunStarted; "
        "from pathlib import Path; corenas_event(RunStarted('a', Path('.'), False)); "
        "sys.exit('tensorboard' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=False).returncode == 0
    assert not [*tmp_path.iterdir()]


def test_what_is_no_number_is_written_as_it_is(folder, tmp_path):
    corenas_event(RunStarted("odd", tmp_path, False))
    corenas_event(Progress("train", 3, {"loss": math.nan}, point=True))
    corenas_event(RunDone(tmp_path))
    assert math.isnan(read(folder / "odd").Scalars("train/loss")[0].value)


@pytest.mark.parametrize("check", listener_checks)
def test_conforms(check, folder):
    check(corenas_event)


@pytest.mark.parametrize("check", distribution_checks)
def test_the_distribution_conforms(check):
    check("corenas_tool_tensorboard")


def test_the_readme_names_the_variable():
    assert f"{corenas_tool_tensorboard.VARIABLE}=" in (Path(__file__).parents[1] / "README.md").read_text()
