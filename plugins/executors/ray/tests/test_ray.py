"""What Ray workers promise, and that a search in them finds what it finds in one process, whoever dies."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from corenas.errors import UserError
from corenas.plugins import load_catalogue
from corenas.testing.components import spec_fragments
from corenas.testing.distributions import distribution_checks
from corenas.testing.executors import Fragile, executor_checks, searched
from corenas_executor_ray import Ray, workers

CONNECTED = Ray(threads=3)


def pid(number):
    time.sleep(0.05)
    return number, os.getpid(), os.environ["OMP_NUM_THREADS"], os.nice(0)


def marking(path):
    """Leave marks at the begin and at the end."""
    path.touch()
    time.sleep(0.5)
    path.with_suffix(".end").touch()


def waited_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def handled(number):
    """Whether the system calls a handler of this process, whatever Python thinks."""
    mask = Path("/proc/self/status").read_text().partition("SigCgt:")[2].split()[0]
    return bool(int(mask, 16) >> (number - 1) & 1)


def processes_below(folder):
    """Command lines of this machine's processes in which a folder stands."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = path.read_bytes()
        except OSError:
            continue
        if os.fsencode(folder) in text:
            found.append(text)
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupt_while_a_cluster_begins_is_that_of_the_run_once_it_can_be_ended(monkeypatch, number):
    ray = workers._ray(None)  # imported with what the executor tells it by the environment, which later tests look at
    happened = []

    def begin(*args, **settings):
        ray._private.utils.set_sigterm_handler(lambda *_: sys.exit(15))  # as Ray does
        signal.raise_signal(number)
        happened.append("begun")

    def interrupted(number, frame):
        happened.append(number)
        raise KeyboardInterrupt

    monkeypatch.setattr(ray, "init", begin)
    monkeypatch.setattr(ray, "shutdown", lambda: happened.append("ended"))
    before = signal.signal(number, interrupted)
    try:
        with pytest.raises(KeyboardInterrupt):
            Ray(workers=1).start()
        assert signal.getsignal(number) is interrupted
    finally:
        signal.signal(number, before)
    assert happened == ["begun", number, "ended"]


@pytest.fixture(scope="module")
def cluster():
    """A local cluster, which all tests use: a start takes seconds. Of it nothing may be left."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
    own = signal.getsignal(signal.SIGTERM)
    with Ray(workers=2, threads=3).start() as executor:
        import ray

        assert signal.getsignal(signal.SIGTERM) is own
        folder = Path(ray._private.worker._global_node.get_session_dir_path()).parent
        assert processes_below(folder)
        yield executor
    assert not ray.is_initialized()
    assert handled(signal.SIGTERM)
    signal.signal(signal.SIGTERM, before)
    assert waited_for(lambda: not processes_below(folder), 20)
    assert not folder.exists()


def test_a_search_finds_the_same_a_killed_worker_loses_nothing_and_one_that_dies_twice_is_a_failed_trial(
    tmp_path, cluster
):
    alone = searched(Fragile(tmp_path))
    once, fatal = (alone[row].arch["width"] for row in (4, -1))
    found = searched(Fragile(tmp_path, fatal, once), CONNECTED)
    assert (tmp_path / str(once)).exists()
    assert found[:-1] == alone[:-1]
    assert (found[-1].arch, found[-1].state) == (alone[-1].arch, "failed")
    assert found[-1].error == "its worker died twice: the Ray worker that measured it is gone"


def test_work_is_done_in_other_processes_in_the_order_in_which_it_was_given(cluster):
    found = [*cluster.map(pid, range(6))]
    assert [number for number, *_ in found] == [*range(6)]
    assert os.getpid() not in {process for _, process, *_ in found}
    assert {(threads, nice) for *_, threads, nice in found} == {("3", os.nice(0))}


def test_workers_stay_with_what_they_have_read(cluster):
    first = {cluster.submit(pid, n).result(60)[1] for n in range(4)}
    time.sleep(1.5)  # Ray ends idle workers after a second, if they are more than the CPUs allow
    assert {cluster.submit(pid, n).result(60)[1] for n in range(4)} & first


def test_a_task_that_runs_goes_on_when_it_is_cancelled_and_its_worker_stays_fit(cluster, tmp_path):
    task = cluster.submit(marking, tmp_path / "task")
    assert waited_for((tmp_path / "task").exists)
    assert task.cancel()
    assert waited_for((tmp_path / "task.end").exists)
    assert cluster.submit(sum, (1, 2)).result(60) == 3


def test_what_a_program_is_connected_to_is_left_running(cluster):
    for _ in range(2):
        with CONNECTED.start() as executor:
            assert executor.submit(sum, (1, 2)).result(60) == 3
    assert cluster.submit(sum, (1, 2)).result(60) == 3


SCRIPT = """
import os, sys
from corenas_executor_ray import Ray
with Ray(address=sys.argv[1], threads=3).start() as executor:
    print(executor.submit(sum, (1, 2)).result(60))
    print(executor.submit(os._exit, 1).exception(60))
"""


def test_a_running_cluster_is_used_by_its_address_left_running_and_silent_on_stdout(cluster):
    import ray

    address = ray.get_runtime_context().gcs_address
    done = subprocess.run([sys.executable, "-c", SCRIPT, address], capture_output=True, text=True, timeout=120)
    assert done.stdout == "3\nthe Ray worker that measured it is gone\n", done.stderr
    assert cluster.submit(sum, (1, 2)).result(60) == 3


def test_a_local_cluster_listens_on_the_loopback_address_alone(cluster):
    own = {int(path.parent.name) for path in Path("/proc").glob("[0-9]*/stat") if descends(path)}
    sockets = {link for pid in own for link in links(pid)}
    listening = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                listening.append(fields[1].partition(":")[0])
    assert listening
    assert {*listening} <= {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


def descends(path):
    """Whether a process is this one or descends from it."""
    number = int(path.parent.name)
    while number > 1:
        if number == os.getpid():
            return True
        try:
            number = int(Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return False
    return False


def links(number):
    try:
        return [os.readlink(link) for link in Path(f"/proc/{number}/fd").iterdir()]
    except OSError:
        return []


@pytest.mark.parametrize(("options", "message"), [
    (Ray(address="127.0.0.1:9"), "no Ray cluster answers at 127.0.0.1:9"),
    (Ray(address="nonsense"), 'expected "host:port" or "auto"'),
    (Ray(address="ray://127.0.0.1:9"), 'expected "host:port" or "auto"'),
    (Ray(address="127.0.0.1:99999"), "no Ray cluster answers"),
    (Ray(threads=1000), "has the 1000 CPUs of a worker, but 6 at most"),
], ids=str)  # fmt: skip
def test_a_cluster_that_is_not_there_is_a_mistake(cluster, options, message):
    with pytest.raises(UserError, match=message):
        options.start()


def test_ray_that_is_missing_is_named_with_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match="not installed") as caught:
        Ray().start()
    assert caught.value.faults[0].hint.startswith("pip install ray")


@pytest.mark.parametrize("check", executor_checks)
def test_conforms(check, cluster):
    check(CONNECTED)


@pytest.mark.parametrize("check", distribution_checks)
def test_the_distribution_conforms(check):
    check("corenas_executor_ray")


def test_the_readme_shows_specs_that_are_right():
    found = [
        load_catalogue().options("executors", spec["executor"])
        for spec in spec_fragments(Path(__file__).parents[1] / "README.md")
    ]
    assert found == [Ray(workers=4), Ray(address="host:6379", threads=4)]
