"""What Dask workers promise, and that a search in them finds what it finds in one process, whoever dies."""

import os
import signal
import time
from concurrent.futures import BrokenExecutor
from pathlib import Path

import pytest

from corenas.errors import UserError
from corenas.plugins import load_catalogue
from corenas.testing.components import spec_fragments
from corenas.testing.distributions import distribution_checks
from corenas.testing.executors import Fragile, executor_checks, searched
from corenas_executor_dask import Dask


def pid(number):
    time.sleep(0.05)
    return number, os.getpid(), os.environ["OMP_NUM_THREADS"]


@pytest.fixture(scope="module")
def cluster():
    """A local cluster, which all tests connect to: a start takes seconds."""
    with Dask(workers=2, threads=3).start() as executor:
        yield executor


@pytest.fixture
def options(cluster):
    return Dask(scheduler=cluster._cluster.scheduler_address)


def test_a_search_finds_the_same_and_a_killed_worker_loses_nothing(tmp_path, options):
    alone = searched(Fragile(tmp_path))
    once = alone[4].arch["width"]
    assert searched(Fragile(tmp_path, once=once), options) == alone
    assert (tmp_path / str(once)).exists()


def test_an_arch_at_which_workers_die_is_a_failed_trial_and_the_run_goes_on(tmp_path, options):
    alone = searched(Fragile(tmp_path))
    fatal = alone[2].arch["width"]
    found = {trial.arch: trial for trial in searched(Fragile(tmp_path, fatal=fatal), options)}
    assert len(found) == 30
    failed = [trial for trial in found.values() if not trial.ok]
    assert [(trial.arch["width"], trial.state) for trial in failed] == [(fatal, "failed")]
    assert failed[0].error == "its worker died twice: the Dask worker that measured it is gone"


def test_work_is_done_in_other_processes_in_the_order_in_which_it_was_given(cluster):
    found = [*cluster.map(pid, range(6))]
    assert isinstance(cluster.submit(die).exception(60), BrokenExecutor)
    assert cluster.submit(pid, 7).result(60)[0] == 7
    assert [number for number, _, _ in found] == [*range(6)]
    assert os.getpid() not in {process for _, process, _ in found}
    assert {threads for _, _, threads in found} == {"3"}


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_running_scheduler_is_left_running(options):
    for _ in range(2):
        with options.start() as executor:
            assert executor.submit(sum, (1, 2)).result(60) == 3


@pytest.mark.parametrize(("options", "message"), [
    (Dask(scheduler="tcp://127.0.0.1:9"), "no Dask scheduler answers"),
    (Dask(scheduler="nonsense://x"), "no Dask scheduler answers"),
    (Dask(queue={"type": "none"}), "no such queue"),
    (Dask(queue={"type": "slurm", "nonsense": 1}), "dask-jobqueue"),
    (Dask(scheduler="tcp://127.0.0.1:9", queue={"type": "slurm"}), "exclude each other"),
], ids=str)  # fmt: skip
def test_a_cluster_that_is_not_there_is_a_mistake(options, message, monkeypatch):
    monkeypatch.setattr("corenas_executor_dask.workers._PATIENCE", "1s")
    with pytest.raises(UserError, match=message):
        options.start()


def test_jobs_are_written_as_a_batch_system_takes_them():
    jobqueue = pytest.importorskip("dask_jobqueue")
    job = jobqueue.SLURMCluster.job_cls
    (spec,) = [f for f in spec_fragments(README) if "queue" in f.get("executor", {})]
    queue = {**spec["executor"]["queue"]}
    assert queue.pop("type") == "slurm"
    script = job("tcp://127.0.0.1:1", name="worker", **queue).job_script()
    assert "#SBATCH --cpus-per-task=4" in script
    assert "tcp://127.0.0.1:1" in script


README = Path(__file__).parents[1] / "README.md"


@pytest.mark.parametrize("check", executor_checks)
def test_conforms(check, options):
    check(options)


@pytest.mark.parametrize("check", distribution_checks)
def test_the_distribution_conforms(check):
    check("corenas_executor_dask")


def test_the_readme_shows_specs_that_are_right():
    found = [load_catalogue().options("executors", spec["executor"]) for spec in spec_fragments(README)]
    assert found[0] == Dask(workers=4)
    assert all(isinstance(options, Dask) for options in found)
