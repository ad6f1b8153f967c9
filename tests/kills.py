"""Ends a run with SIGKILL, SIGTERM or SIGINT at random moments, begins again, compares what it ends with bit for bit.

By hand, for the quickstart:  uv run python tests/kills.py spec/quickstart.toml --kills 20
"""

import argparse
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

import tomli
import torch

from corenas.cli import main
from corenas.errors import UserError
from corenas.store import Store
from corenas.testing.small import same


def begin(arguments):
    """A process of its own that runs a command. It is forked: torch is imported already, so it is at work at once."""
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        log = os.open("/dev/null", os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        status = main(arguments)
    finally:
        os._exit(status)


def ended(child, seconds, reached=lambda: True):
    """The exit status of a process that ends within some seconds since it has reached something, else None."""
    deadline = None
    while deadline is None or time.monotonic() < deadline:
        if deadline is None and reached():
            deadline = time.monotonic() + seconds
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return None


def trials(folder):
    """How many trials a run has, if it is one yet."""
    try:
        return len(Store(folder / "run.sqlite", readonly=True).trials())
    except UserError:
        return 0


def outcome(folder):
    """Everything that a run ends with, measured times apart."""
    store = Store(folder / "run.sqlite", readonly=True)
    trials = [(t.arch, dict(t.metrics), t.state, t.error, t.fidelity) for t in store.trials()]
    result = {key: store.get("result")[key] for key in ("best", "front", "table")}
    saved = torch.load(folder / "supernet.pt", weights_only=True)
    network = (folder / "best" / "network.safetensors").read_bytes()
    return (
        trials,
        result,
        saved,
        network,
        tomli.loads((folder / "best" / "arch.toml").read_text()),
        store.curve("train"),
    )


def survive(spec, settings, kills, folder, seed=0, tell=lambda line: None):
    """Kill runs of a spec so many times; every run that ends has to end as the one that was left alone.

    In turn: soon after an epoch, at any time, soon after a trial. So a few kills meet all stages.
    Returns for each kill which files and how many trials there were; tells them as they come.
    """
    arguments = ["run", str(spec), *settings, "--out"]
    start = time.monotonic()
    assert ended(begin([*arguments, str(folder / "whole")]), 3600) == 0
    whole, length = outcome(folder / "whole"), time.monotonic() - start
    tell(f"left alone it takes {length:.0f} s")
    draw, moments, run = random.Random(seed), [], folder / "killed"
    while len(moments) < kills or run.exists():
        new, start, before = not run.exists(), time.monotonic(), trials(run)
        child = begin([*arguments, str(run)])
        if len(moments) == kills:
            status = ended(child, 3600)
        elif len(moments) % 3 == 0:
            status = ended(child, draw.uniform(0, 0.02) * length, (run / "supernet.pt").exists)
        elif len(moments) % 3 == 1:
            status = ended(child, draw.uniform(0.05, 0.7) * length)
        else:
            status = ended(child, draw.uniform(0, 0.1) * length, lambda n=before: trials(run) > n)
        if status is None:
            how = draw.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
            os.kill(child, how)
            _, status = os.waitpid(child, 0)
            clean = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 130}
            assert os.waitstatus_to_exitcode(status) in (clean[how], 0), f"{how.name} ended it with {status}"
            names = sorted(path.name for path in run.iterdir()) if run.exists() else []
            moments.append((names, trials(run)))
            tell(f"kill {len(moments)}: {trials(run)} trials, {', '.join(names)}")
            continue
        assert status == 0, f"ended with {status} after {len(moments)} kills"
        assert all(map(same, outcome(run), whole)), f"another outcome after {len(moments)} kills"
        shutil.rmtree(run)
        if new:  # not killed: the machine has become quicker
            length = min(length, time.monotonic() - start)
        tell(f"the same outcome, bit for bit, after {len(moments)} kills")
    return moments


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("spec")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        settings = [f"--set={item}" for item in given.set]
        survive(given.spec, settings, given.kills, Path(place), given.seed, tell=lambda line: print(line, flush=True))
    print(f"{given.kills} kills, the same outcome bit for bit")
