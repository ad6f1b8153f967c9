"""Components in a file of one's own: named in a spec or on the command line, in the run, its workers and its sequel."""

import json
import os
import subprocess
import sys

import pytest
import tomli_w
import toys

from corenas.cli import main
from corenas.contracts import Note
from corenas.errors import UserError
from corenas.plugins import load_catalogue
from corenas.run.spec import open_spec
from corenas.run.stages import run_spec
from corenas.store import Store

SOURCE = '''
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import toys
from attrs import frozen
from corenas.hookspecs import hookimpl


@frozen
class Workers:
    """Two processes that have imported nothing."""

    def start(self):
        return ProcessPoolExecutor(2, mp_context=get_context("spawn"))


@frozen
class Mine(toys.Accuracy):
    """The accuracy."""


def offering(cls):
    return hookimpl(lambda: {"mine": cls})


corenas_tasks, corenas_backbones = offering(toys.TaskOptions), offering(toys.BackboneOptions)
corenas_mutators, corenas_algorithms = offering(toys.MutatorOptions), offering(toys.AlgorithmOptions)
corenas_searchers, corenas_exporters = offering(toys.SearcherOptions), offering(toys.Names)
corenas_evaluators, corenas_executors = offering(Mine), offering(Workers)
'''


def write(folder, **changes):
    """A spec of which every component is in a file beside it; what is None is left out."""
    (folder / "my.py").write_text(SOURCE)
    table = {
        "space": toys.TABLE,
        **dict.fromkeys(["task", "backbone", "mutator", "algorithm", "searcher"], "mine"),
        "evaluators": ["mine"],
        "train": {"epochs": 1, "batch_size": 32},
        "search": {"trials": 6},
        "export": {"formats": ["mine"]},
        "plugins": ["my.py"],
        **changes,
    }
    path = folder / "spec.toml"
    path.write_text(tomli_w.dumps({key: item for key, item in table.items() if item is not None}))
    return path


def run(path, folder, emit=lambda event: None, plugins=()):
    spec, _, catalogue = open_spec(path, plugins=plugins)
    return run_spec(spec, catalogue, folder, emit)


def test_a_spec_names_files_beside_it_and_its_run_can_be_asked_later_from_anywhere(tmp_path, monkeypatch, capsys):
    run(write(tmp_path), tmp_path / "run")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert main(["export", str(tmp_path / "run"), "--to", "net", "--json"]) == 0
    assert "names.txt" in json.loads(capsys.readouterr().out)["files"][-1]


def test_the_command_line_names_files_too(tmp_path, monkeypatch, capsys):
    path = write(tmp_path, plugins=None)
    monkeypatch.chdir(tmp_path)
    assert main(["check", str(path), "--no-data", "--plugin", "my.py", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"]
    assert main(["show", "searchers", "mine", "--plugin", "my.py"]) == 0
    assert str(tmp_path / "my.py") in capsys.readouterr().out
    assert main(["run", str(path), "--plugin", "my.py", "--out", "run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trials"] == 6
    assert main(["run", str(path), "--out", "run"]) == 2
    assert "no task 'mine'" in capsys.readouterr().err


def test_workers_load_the_same_file_and_find_what_one_process_finds(tmp_path):
    one = run(write(tmp_path), tmp_path / "one")
    two = run(write(tmp_path, executor="mine"), tmp_path / "two")
    assert (one["best"], one["front"]) == (two["best"], two["front"])


DISTURBING = """
import os
import sys

import toys
from attrs import frozen
from corenas.hookspecs import hookimpl

os.write(1, b"past Python\\n")


def disturb(who):
    print(who, "speaks")
    sys.stdout.flush()
    os.chdir("/")


@frozen
class Wanders(toys.Accuracy):
    def start(self, context):
        measure = super().start(context)
        disturb("start")

        def wandering(archs, fidelity):
            disturb("measure")
            return measure(archs, fidelity)

        return wandering


corenas_evaluators = hookimpl(lambda: {"wanders": Wanders})
corenas_event = hookimpl(lambda event: disturb(type(event).__name__))
"""


def test_a_plugin_may_print_and_change_the_working_directory(tmp_path, monkeypatch, capsys):
    (tmp_path / "loud.py").write_text(DISTURBING)
    spec = write(tmp_path, evaluators=["wanders"], plugins=["my.py", "loud.py"])
    monkeypatch.chdir(tmp_path)
    for command in (
        ["check", spec.name], ["cost", spec.name], ["run", spec.name, "--out", "here"], ["evaluate", "here"],
        ["export", "here", "--to", "there"], ["trials", "here"],
    ):  # fmt: skip
        assert main([*command, "--json"]) == 0
        assert isinstance(json.loads(capsys.readouterr().out), dict), command
    assert {path.name for path in tmp_path.iterdir()} >= {"here", "there"}


def test_what_is_written_past_python_is_not_in_the_json(tmp_path):
    (tmp_path / "loud.py").write_text(DISTURBING)
    (tmp_path / "toys.py").write_text("class Accuracy: pass")  # no torch
    command = [sys.executable, "-m", "corenas", "plugins", "--plugin", "loud.py", "--json"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": "."}, capture_output=True, text=True)
    assert "past Python" in done.stderr
    assert len(json.loads(done.stdout)["plugins"]) > 10


DYING = """
import os
import signal

import toys
from attrs import frozen
from corenas.hookspecs import hookimpl
from torch.utils.data import Dataset, get_worker_info


class Data(Dataset):
    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        if get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.data[i]


@frozen
class Dying(toys.TaskOptions):
    def start(self, *given):
        task = super().start(*given)
        whole = task.dataset
        task.dataset = lambda *which: Data(whole(*which))
        return task


corenas_tasks = hookimpl(lambda: {"dying": Dying})
"""


def test_a_process_that_reads_data_and_dies_is_a_message(tmp_path, capsys):
    (tmp_path / "dying.py").write_text(DYING)
    train = {"epochs": 1, "batch_size": 32, "workers": 1}
    spec = write(tmp_path, task="dying", train=train, plugins=["my.py", "dying.py"])
    for workers, status in ((1, 2), (0, 0)):  # what has come so far goes on
        command = ["run", str(spec), "--out", str(tmp_path / "run"), "--set", f"train.workers={workers}"]
        assert main(command) == status
        assert ("a process that reads data has died" in capsys.readouterr().err) == (workers == 1)


def test_a_file_that_has_changed_is_told_when_its_run_goes_on(tmp_path):
    path, notes = write(tmp_path), []
    run(path, tmp_path / "run")
    before = Store(tmp_path / "run/run.sqlite", readonly=True).get("plugins")
    assert [*before] == [str(tmp_path / "my.py")]
    (tmp_path / "my.py").write_text(SOURCE + "\n# another line\n")
    run(path, tmp_path / "run", lambda event: notes.append(event.text) if isinstance(event, Note) else None)
    assert [note for note in notes if "my.py has changed since this run was begun" in note]


@pytest.mark.parametrize(("content", "message"), [
    (None, r"spec.toml:\d+: plugins\[0\]: .*my.py cannot be used: no such Python file"),
    ("def broken(:", r"plugins\[0\]: .*my.py cannot be used: SyntaxError"),
    ("import no_such_module", r"plugins\[0\]: .*my.py cannot be used: ModuleNotFoundError: No module named 'no_such"),
])  # fmt: skip
def test_a_file_that_cannot_be_used_is_a_message_with_its_line(tmp_path, content, message):
    path = write(tmp_path)
    (tmp_path / "my.py").unlink() if content is None else (tmp_path / "my.py").write_text(content)
    with pytest.raises(UserError, match=message):
        open_spec(path)
    with pytest.raises(UserError, match=r"--plugin: .* cannot be used"):
        open_spec(write(tmp_path, plugins=[]), plugins=[str(tmp_path / "other.py")])


def test_only_files_that_are_named_are_imported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("conftest.py", "corenas_plugin.py", "plugin.py"):
        (tmp_path / name).write_text("raise SystemExit('imported')")
    path = write(tmp_path)
    before = {*sys.modules}
    open_spec(path)
    assert {name.rpartition("_")[0] for name in {*sys.modules} - before if "local" in name} <= {"corenas_local_my"}


def test_the_same_content_is_imported_once_and_another_is_another_module(tmp_path):
    (tmp_path / "a.py").write_text(SOURCE)
    first = load_catalogue([], files=[tmp_path / "a.py"]).find("searchers", "mine")
    assert load_catalogue([], files=[tmp_path / "a.py"]).find("searchers", "mine").cls is first.cls
    (tmp_path / "a.py").write_text(SOURCE + "\nx = 1")
    assert load_catalogue([], files=[tmp_path / "a.py"]).find("evaluators", "mine").cls.__module__ != "a"
    assert load_catalogue([], files=[tmp_path / "a.py"]).find("evaluators", "mine").version != first.version
