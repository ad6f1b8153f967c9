import json
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from corenas.contracts import RunDone, RunStarted, StageStarted, TrialDone
from corenas.objectives import Trial
from corenas.space import Arch
from corenas.testing import listeners
from corenas.testing.distributions import distribution_checks
from corenas.testing.listeners import listener_checks
from corenas_tool_mlflow import VARIABLE, corenas_event


@pytest.fixture
def client(tmp_path, monkeypatch):
    uri = (tmp_path / "tracked").as_uri()
    monkeypatch.setenv(VARIABLE, uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # of this client; the listener sets it itself
    return MlflowClient(tracking_uri=uri)


def runs(client):
    return client.search_runs([client.get_experiment_by_name("mine").experiment_id])


def test_curves_trials_and_the_front_are_what_the_run_told(client, tmp_path):
    for event in listeners.events(tmp_path):
        corenas_event(event)
    (run,) = runs(client)
    assert (run.info.run_name, run.info.status) == ("small", "FINISHED")
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == [(i, pytest.approx(2.5 / i)) for i in range(10, 101, 10)]
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "trials/top1")] == [(1, 70.0)]
    assert run.data.metrics["test/top1"] == 69.5
    assert run.data.metrics["seconds/train"] == 103.0
    assert run.data.params == {"width": "8", "op": "skip"}
    folder = Path(client.download_artifacts(run.info.run_id, "", str(tmp_path)))
    assert json.loads((folder / "front.json").read_text())["front"] == listeners.RESULT["front"]
    states = [trial["state"] for trial in json.loads((folder / "trials-4.json").read_text())["trials"]]
    assert states == ["done", "infeasible", "failed", "stopped"]


def test_a_run_that_goes_on_is_the_same_run_and_counts_on(client, tmp_path):
    trials = [Trial(Arch({"a": i}), {"top1": float(i)}) for i in range(4)]
    for resumed, part in ((False, trials[:3]), (True, trials[3:])):
        corenas_event(RunStarted("again", tmp_path, resumed))
        corenas_event(StageStarted("search", 4, "trials", 3 if resumed else 0))
        for trial in part:
            corenas_event(TrialDone(trial))
        if resumed:
            corenas_event(RunDone(tmp_path))
    (run,) = runs(client)
    history = client.get_metric_history(run.info.run_id, "trials/top1")
    assert [(m.step, m.value) for m in history] == [(1, 0.0), (2, 1.0), (3, 2.0), (4, 3.0)]


def test_without_a_uri_nothing_is_written_nor_imported(tmp_path):
    script = (
        "import sys; from corenas_tool_mlflow import corenas_event; from corenas.contracts import RunStarted; "
        "from pathlib import Path; corenas_event(RunStarted('a', Path('.'), False)); sys.exit('mlflow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=False).returncode == 0
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("check", listener_checks)
def test_conforms(check, client):
    check(corenas_event)


@pytest.mark.parametrize("check", distribution_checks)
def test_the_distribution_conforms(check):
    check("corenas_tool_mlflow")


def test_the_readme_names_the_variable():
    assert f"{VARIABLE}=" in (Path(__file__).parents[1] / "README.md").read_text()
