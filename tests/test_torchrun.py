"""Two processes under torchrun give what one gives: archs, weights, trials; and a run from beginning to end."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from corenas.store import Store

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
SHORT = (
    "train.epochs=1", "train.batch_size=64", "train.sync_norm=true", "task.data=digits", "task.valid=200",
    "task.test=200", "task.augment=[]", "task.dropout=0.0", "space.narrow.stages.*.depth=[1, 2]",
)  # fmt: skip
SEARCH = (
    "search.trials=9", "search.batch=4", "searcher.population=4", "searcher.mutation=2", "searcher.crossover=1",
    "searcher.parents=2", "calibration.batches=1", 'export.formats=["safetensors"]', "mutator.paths=3",
)  # fmt: skip


def launch(processes, *arguments):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(torchrun if processes > 1 else []), *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


TRAININGS = {
    "spos": ("algorithm=spos", "mutator=uniform"),
    "fairnas": ("algorithm=fairnas", "mutator=fair"),
    "bignas": ("mutator.paths=3",),
    # Which of the candidates are trained hangs on their losses.
    "attentivenas": ("algorithm=attentivenas", 'mutator={type="attentive", paths=3, candidates=2, draws=100}'),
    # Four phases of five steps, channels sorted before the last.
    "ofa": ("algorithm=ofa", "mutator=uniform", "train.batch_size=256"),
    "alone": (),
}
CONVERTED = """
algorithm = "bignas"
mutator = {type = "sandwich", paths = 3}
backbone = {type = "converted", model = "plugins/mutables/conversion/tests/nets.py:tiny", image = [3, 8, 8]}
task = {type = "classification", data = "digits", channels = 3, valid = 200, test = 200}
train = {epochs = 1, batch_size = 64, sync_norm = true}
search = {trials = 2}
searcher = "random"
evaluators = ["accuracy"]
"""
"""A model of the user's, with batch norms of torch's own."""


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """What some steps of each training end with, of one process and of two."""
    # In double precision: in single precision rounding alone grows as far as between one and two threads.
    folder = tmp_path_factory.mktemp("ends")
    (folder / "converted.toml").write_text(CONVERTED)
    settings = {name: ["spec/quickstart.toml", *SHORT, *how] for name, how in TRAININGS.items()}
    settings["converted"] = [str(folder / "converted.toml")]
    for processes in (1, 2):
        launch(processes, "tests/steps.py", folder / str(processes), json.dumps(settings))
    return [torch.load(folder / name, weights_only=True) for name in ("1", "2")]


@pytest.mark.parametrize("name", [*TRAININGS, "converted"])
def test_two_processes_end_with_the_weights_of_one(ends, name):
    one, two = (end[name] for end in ends)
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["archs"] == two["archs"]
    if name != "alone":
        assert len(one["archs"]) == 20
        assert len({json.dumps(archs) for archs in one["archs"]}) > 5
    for key, tensor in one["model"].items():
        # What batch norm makes zero, means after one and biases before the next, is rounding noise and nothing else.
        scale = max(float(tensor.abs().max()), 1e-9)
        assert float((tensor - two["model"][key]).abs().max()) / scale < 1e-5, key


def test_a_run_of_two_processes_goes_from_beginning_to_end_and_deals_out_its_trials(tmp_path):
    arguments = ("-m", "corenas", "run", "spec/quickstart.toml", *(f"--set={item}" for item in (*SHORT, *SEARCH)))
    result = json.loads(launch(2, *arguments, "--out", tmp_path / "run", "--json"))
    assert result["trials"] == 9
    assert 30 < result["best"]["test"]["top1"] <= 100
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"best", "run.sqlite", "spec.toml", "supernet.pt"}
    store = Store(tmp_path / "run" / "run.sqlite", readonly=True)
    assert store.get("versions")["processes"] == 2
    # The search alone, in one process on the same supernet: the same trials.
    (tmp_path / "one.toml").write_text(f'[supernet]\nfrom = "{tmp_path / "run"}"\n')
    launch(1, "-m", "corenas", "run", tmp_path / "one.toml", "--out", tmp_path / "one")
    alone = Store(tmp_path / "one" / "run.sqlite", readonly=True).trials()
    assert [(t.arch, t.metrics, t.state) for t in alone] == [(t.arch, t.metrics, t.state) for t in store.trials()]


RANKS = """
import os, signal, socket, sys, time
import torch
from corenas import cli, distributed
from corenas.errors import UserError

def fail(options):
    with distributed.process_group(torch.device("cpu")):
        rank, (who, how) = distributed.rank(), options.how
        distributed.all_gather(rank)
        if how == "killed" and rank == who:
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "mistake" and who in (rank, "all"):
            raise UserError("the data of this one is gone")
        if how == "first":  # the first process says it to all
            distributed.on_rank_zero(lambda: (_ for _ in ()).throw(UserError("the disk is full")))
        distributed.all_reduce_([torch.ones(3)])
        distributed.all_gather("one is missing")

def run(how):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cli._parser = lambda given: type("P", (), {"parse_args": lambda self, given: type("O", (), {
        "json": False, "how": how, "command": staticmethod(fail)})})()
    start, children = time.monotonic(), []
    for rank in range(2):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.dup2(write, 2)
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": str(port),
                           "MASTER_ADDR": "127.0.0.1"}
            os._exit(cli.main(["run"]))
        os.close(write)
        children.append((child, read))
    ends = [(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), open(read).read()) for child, read in children]
    print(repr((*how, ends, time.monotonic() - start)), flush=True)

for how in ((1, "killed"), (0, "killed"), (1, "mistake"), (0, "mistake"), ("all", "mistake"), ("all", "first")):
    run(how)
"""


def test_whoever_of_two_processes_is_left_says_why_and_ends():
    command = [sys.executable, "-W", "ignore", "-c", RANKS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    ends = {(who, how): (told, seconds) for who, how, told, seconds in map(ast.literal_eval, done.stdout.splitlines())}
    assert len(ends) == 6, done.stderr
    assert all(seconds < 20 for _, seconds in ends.values())
    gone = "another process of this run has ended, and this one cannot go on without it\n  its own message, if it had"
    for killed in (0, 1):
        told, _ = ends[killed, "killed"]
        assert told[killed] == (-9, "")
        status, text = told[1 - killed]
        assert status == 2
        assert text.startswith(gone), text
        assert "Traceback" not in text
    for who in (0, 1):
        told, _ = ends[who, "mistake"]
        assert told[who] == (2, "the data of this one is gone\n")
        assert told[1 - who][0] == 2
        assert told[1 - who][1].startswith(gone) or (who == 0 and not told[1][1])
    for how, text in (("mistake", "the data of this one is gone\n"), ("first", "the disk is full\n")):
        assert ends["all", how][0] == [(2, text), (2, "")], "one tells for all"
