"""Ends a run with SIGKILL, SIGTERM or SIGINT at random moments, begins again, compares what it ends with bit for bit.

By hand, for the quickstart:  uv run python tests/kills.py spec/quickstart.toml --kills 20
With every option, small:     uv run python tests/kills.py spec/quickstart.toml --kills 100 --options
Commands on a finished run:   uv run python tests/kills.py spec/quickstart.toml --kills 160 --commands
"""

import argparse
import os
import random
import shutil
import signal
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path

import tomli
import tomli_w
import torch

from corenas import load_catalogue
from corenas.cli import main
from corenas.errors import UserError
from corenas.run import stages  # noqa: F401
from corenas.store import Store
from corenas.testing.small import same

SHORT = (
    "train.epochs=2", "train.batch_size=128", "search.trials=48", "search.batch=4",
    "searcher.population=8", "searcher.mutation=4", "searcher.crossover=2", "searcher.parents=3",
    "calibration.batches=4", "mutator.paths=3", "task.data=digits", "task.valid=200", "task.test=200",
    "space.narrow.stages.*.depth=[1, 2]", 'export.formats=["safetensors"]',
)  # fmt: skip
"""What makes the quickstart a run of seconds."""
OPTIONS = {
    "workers": ["train.workers=2"],
    "processes": ["executor.type=processes", "executor.workers=2"],
    "ema": ["train.ema=0.99"],
    "accumulation": ["train.accumulate=2"],
    "bfloat16": ["train.precision=bfloat16"],
    "several constraints": ['search.constraints=[{flops = "1M"}, {flops = "600k"}]', "search.trials=24"],
    "budget": ["search.budget=2h"],
    "retraining": ["algorithm=spos", "mutator=uniform", "retrain.seeds=2"],
    "fine-tuning, a front": ["retrain.begin=supernet", "search.pareto=true", "export.front=true", "search.trials=12",
                             "search.objectives=['top1', 'flops']"],
    "racing, trust": ["search.racing=0.95", "search.trust.archs=5", "search.trials=16"],
}  # fmt: skip
"""What a run may have beside, each killed by itself."""

COMMANDS = {
    "evaluate": ["evaluate", "run", "--arch", "best", "--arch", "random:3", "--json"],
    "export": ["export", "run", "--arch", "random:2", "--to", "out/network"],
    "export --front": ["export", "run", "--front", "--to", "out/networks"],
    "report": ["report", "run"],
    "sweep": ["sweep", "run", "--out", "out"],
    "sweep, sampled": ["sweep", "sweep.toml", "--out", "out"],
    "run": ["run", "run/spec.toml", "--out", "run"],
    "run --fresh": ["run", "SPEC", "--out", "run", "--fresh"],
}
"""What is killed on a run that is finished."""
TIMED = ("sweep, sampled", "run --fresh")
"""Commands that keep what time things took: of these the names of files and the trials are compared."""
SWEEP = {"seed": 1, "sample": {"spec": "run/spec.toml", "count": 24, "mode": "scratch", "epochs": 1}}


def begin(arguments, log):
    """A process of its own that runs a command. It is forked: torch is imported already, so it is at work at once.

    log: a file for what it says
    """
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        os.setsid()
        said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        status = main(arguments)
    except KeyboardInterrupt:
        status = 130  # it was killed before it began
    except BaseException:
        traceback.print_exc()
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


def found_in(folder):
    """The trials of a run, if it is one yet."""
    try:
        return Store(folder / "run.sqlite", readonly=True).trials()
    except UserError:
        return []


def trials(folder):
    """How many there are."""
    return len(found_in(folder))


def outcome(folder):
    """Everything that a run ends with, measured times apart."""
    store = Store(folder / "run.sqlite", readonly=True)
    trials = [(t.arch, dict(t.metrics), t.state, t.error, t.fidelity) for t in store.trials()]
    result = {key: store.get("result")[key] for key in ("best", "front", "table")}
    saved = torch.load(folder / "supernet.pt", weights_only=True)
    networks = {path.name: path.read_bytes() for path in sorted((folder / "best").glob("network.*"))}
    arch = tomli.loads((folder / "best" / "arch.toml").read_text())
    return trials, result, saved, networks, arch, store.curve("train")


def gone(group, seconds=90):
    """Whether nothing runs of a process and its workers, at the latest after some seconds: Ray's wait for a minute."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(runs_in(group, path) for path in Path("/proc").glob("[0-9]*/stat")):
            return True
        time.sleep(0.05)
    return False


def runs_in(group, path):
    """Whether a process, of which this is the status, is one of a group and no zombie: not every init buries those."""
    try:
        state, _, own = path.read_text().rpartition(")")[2].split()[:3]
    except OSError:
        return False
    return int(own) == group and state != "Z"


def killed(child, draw, log, seconds):
    """Kill a process in one of three ways, of which it has to end cleanly within some seconds, with all its workers.

    Returns the signal and its status.
    """
    how = draw.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
    os.kill(child, how)
    status = ended(child, seconds)
    clean = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 130}
    assert status in (clean[how], 0), f"{how.name}: {status}\n{log.read_text()[-3000:]}"
    assert gone(child), f"{how.name} left workers behind"
    return how, status


def survive(spec, settings, kills, folder, seed=0, tell=lambda line: None):
    """Kill runs of a spec so many times; every run that ends has to end as the one that was left alone.

    In turn: soon after an epoch, at any time, soon after a trial. So a few kills meet all stages.
    Returns for each kill which files and how many trials there were; tells them as they come.
    """
    arguments = ["run", str(spec), *settings, "--out"]
    start, log = time.monotonic(), folder / "said.txt"
    assert ended(begin([*arguments, str(folder / "whole")], log), 3600) == 0, log.read_text()[-3000:]
    whole, length = outcome(folder / "whole"), time.monotonic() - start
    tell(f"left alone it takes {length:.0f} s")
    draw, moments, run = random.Random(seed), [], folder / "killed"
    while len(moments) < kills or run.exists():
        new, start, before = not run.exists(), time.monotonic(), trials(run)
        child = begin([*arguments, str(run)], log)
        if len(moments) == kills:
            status = ended(child, 3600)
        elif len(moments) % 3 == 0:
            status = ended(child, draw.uniform(0, 0.02) * length, (run / "supernet.pt").exists)
        elif len(moments) % 3 == 1:
            status = ended(child, draw.uniform(0.05, 0.7) * length)
        else:
            status = ended(child, draw.uniform(0, 0.1) * length, lambda n=before: trials(run) > n)
        if status is None:
            how, _ = killed(child, draw, log, 3600)
            names = sorted(path.name for path in run.iterdir()) if run.exists() else []
            moments.append((names, trials(run)))
            tell(f"kill {len(moments)}, {how.name}: {trials(run)} trials, {', '.join(names)}")
            continue
        assert status == 0, f"ended with {status} after {len(moments)} kills\n{log.read_text()[-3000:]}"
        assert all(map(same, outcome(run), whole)), f"another outcome after {len(moments)} kills"
        shutil.rmtree(run)
        if new:  # not killed: the machine has become quicker
            length = min(length, time.monotonic() - start)
        tell(f"the same outcome, bit for bit, after {len(moments)} kills")
    return moments


def left(place, timed):
    """All files under a place, without those that a database has while it is open; of a run what it ends with."""
    paths = [path for path in sorted(place.rglob("*")) if path.is_file() and "run.sqlite" not in path.name]
    runs = [found_in(path.parent) for path in sorted(place.rglob("run.sqlite"))]
    found = [[(trial.arch, dict(trial.metrics)) for trial in trials] for trials in runs]
    return {str(path.relative_to(place)): None if timed else path.read_bytes() for path in paths}, found


def survive_again(name, spec, settings, whole, kills, folder, seed=0, tell=lambda line: None):
    """Kill a command on a finished run so many times; the same command again prints and leaves what it would have.

    whole: the finished run, of which each time there is a copy
    Every other kill of `--fresh` meets it soon after it began to delete; half of these go on without it.
    """
    place, log, draw = folder / "place", folder / "said.txt", random.Random(f"{name}{seed}")
    arguments = [str(spec) if word == "SPEC" else word for word in COMMANDS[name]]
    arguments += settings if name == "run --fresh" else []

    def state():
        said = log.read_text().splitlines() if "--json" in arguments else []
        return *left(place, name in TIMED), [line for line in said if line.startswith("{")]

    def anew():
        os.chdir(folder)
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(whole, place / "run")
        os.chdir(place)
        (place / "sweep.toml").write_text(tomli_w.dumps({"sweep": SWEEP}))

    anew()
    start = time.monotonic()
    assert ended(begin(arguments, log), 3600) == 0, log.read_text()[-3000:]
    length, wanted = time.monotonic() - start, state()
    tell(f"{name}: left alone it takes {length:.1f} s")
    count = 0
    while count < kills:
        anew()
        child, early = begin(arguments, log), name == "run --fresh" and count % 2
        share, reached = (0.02, lambda: not (place / "run/spec.toml").exists()) if early else (1, lambda: True)
        status = ended(child, draw.uniform(0, share) * length, reached)
        if status is None:
            count += 1
            how, status = killed(child, draw, log, 60)
            assert "Traceback" not in log.read_text(), log.read_text()[-3000:]
            strange = sorted(left(place, True)[0].keys() ^ wanted[0].keys())
            tell(f"{name}: kill {count}, {how.name}: {len(strange)} files are missing or beside: {strange[:2]}")
        if status != 0 and state()[:2] != wanted[:2]:
            again = [word for word in arguments if word != "--fresh" or count % 4 < 2]
            status = ended(begin(again, log), 3600)
            assert status == 0, f"again: {status}\n{log.read_text()[-3000:]}"
            found = state()
            assert found[0].keys() == wanted[0].keys(), f"other files: {sorted(found[0].keys() ^ wanted[0].keys())}"
            other = [key for key in found[0] if found[0][key] != wanted[0][key]]
            assert found == wanted, f"another outcome: {other}"


def after_a_run(given, settings, tell):
    """Kill all commands in turn, on one run with a front, and tell."""
    with tempfile.TemporaryDirectory() as place:
        whole, spec = Path(place) / "whole", Path(given.spec).resolve()
        arguments = ["run", str(spec), *settings, "--out", str(whole)]
        assert ended(begin(arguments, Path(place) / "said.txt"), 3600) == 0, (Path(place) / "said.txt").read_text()
        for name in given.commands or COMMANDS:
            survive_again(name, spec, settings, whole, given.kills // len(COMMANDS), Path(place), given.seed, tell)
        os.chdir("/")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("spec")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--short", action="store_true", help="make the quickstart a run of seconds")
    parser.add_argument("--options", action="store_true", help="the same, with each option in turn")
    parser.add_argument("--commands", nargs="*", choices=COMMANDS, help="kill these on a finished run; all by default")
    given = parser.parse_args()
    load_catalogue()  # as `stages` is, it is then imported in all runs
    options = [*OPTIONS.items()] if given.options else [("", [])]
    if given.commands is not None:
        settings = [f"--set={item}" for item in (*SHORT, *OPTIONS["fine-tuning, a front"], *given.set)]
        after_a_run(given, settings, partial(print, flush=True))
        options = []
    for count, (name, more) in enumerate(options, 1):
        kills = given.kills * count // len(options) - given.kills * (count - 1) // len(options)
        settings = [*(SHORT if given.short or given.options else ()), *more, *given.set]
        print(name, end="\n" if name else "")
        with tempfile.TemporaryDirectory() as place:
            tell = partial(print, flush=True)
            survive(given.spec, [f"--set={item}" for item in settings], kills, Path(place), given.seed + count, tell)
    print(f"{given.kills} kills, the same outcome bit for bit")
