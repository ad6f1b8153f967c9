"""How much faster two workers of an executor are than one where a trial takes a second, and that trials are the same.

A trial is a second's convolutions with one thread of torch. Two workers cannot be faster than two such processes side
by side, which share caches and the bus, and whatever else the machine does: their ratio to one stands first. With
`--waiting` a trial sleeps, as if each worker had a machine. Of several rounds the fastest counts.

python tests/benchmarks/executors.py dask ray processes
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from attrs import evolve, frozen

from corenas.contracts import Problem
from corenas.objectives import Objective, Objectives, Trial
from corenas.plugins import load_catalogue
from corenas.search import run_search
from corenas.space import SearchSpace

SPACE = SearchSpace.from_table({"width": [*range(200)]})
BEST = Objectives((Objective("gain"),))


def compute(steps):
    """Steps of 7 million multiply-adds."""
    layer, images = torch.nn.Conv2d(32, 32, 3), torch.randn(4, 32, 16, 16)
    with torch.inference_mode():
        for _ in range(steps):
            layer(images)


def seconds_of(steps):
    """Seconds that this process takes for steps."""
    start = time.perf_counter()
    compute(steps)
    return time.perf_counter() - start


def seconds_of_two(steps):
    """Seconds that two processes, side by side, take for steps each."""
    begin = "from executors import compute, seconds_of; compute(100); print(flush=True); input()"
    command, here = [sys.executable, "-c", f"{begin}; print(seconds_of({steps}))"], Path(__file__).parent
    running = [subprocess.Popen(command, cwd=here, stdin=-1, stdout=-1, text=True) for _ in range(2)]
    for process in running:
        process.stdout.readline()  # it is there
    for process in running:
        process.stdin.write("\n")
        process.stdin.flush()
    return max(float(process.communicate()[0]) for process in running)


@frozen
class Working:
    """Computes for each arch, or sleeps; at one its worker is killed, once."""

    steps: int
    seconds: float = 0.0
    once: int = -1
    mark: str = ""
    batch: int = 1

    def __call__(self, trials):
        compute(self.steps * len(trials))
        time.sleep(self.seconds * len(trials))
        if any(trial.arch["width"] == self.once for trial in trials) and not Path(self.mark).exists():
            Path(self.mark).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return [Trial(trial.arch, {"gain": float(trial.arch["width"] % 13)}) for trial in trials]


def searched(measure, n, executor=None):
    live = load_catalogue().options("searchers", "random").start(Problem(SPACE, BEST, n), np.random.default_rng(0))
    start = time.perf_counter()
    trials = run_search(live, measure, n, batch=10, executor=executor, objectives=BEST)
    return trials, time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("executors", nargs="*", default=["dask", "ray", "processes"])
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--waiting", action="store_true")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    alone, _ = searched(Working(0), options.trials)
    if options.waiting:
        work = Working(0, options.seconds)
        print(f"{options.trials} trials that wait {options.seconds} s, workers started before", flush=True)
    else:
        torch.set_num_threads(1)
        work = Working(int(1000 * options.seconds / min(seconds_of(1000) for _ in range(3))))
        one, two = (min(of(work.steps) for _ in range(options.rounds)) for of in (seconds_of, seconds_of_two))
        text = f"two processes: {2 * one / two:.2f} times"
        print(f"{options.trials} trials of {one:.2f} s, workers started before; {text}", flush=True)
    for name in options.executors:
        took = {}
        for workers in (1, 2):
            executor = load_catalogue().options("executors", {"type": name, "workers": workers})
            with executor.start() as live:
                searched(work, 4, live)  # all of them are there
                found = [searched(work, options.trials, live) for _ in range(options.rounds)]
            assert all(trials == alone for trials, _ in found)
            took[workers] = min(seconds for _, seconds in found)
        with TemporaryDirectory() as folder:
            once = alone[options.trials // 2].arch["width"]
            killed, seconds = searched(evolve(work, once=once, mark=f"{folder}/mark"), options.trials, executor)
            assert killed == alone
        ratio = took[1] / took[2]
        text = f"{ratio:.2f} times; one killed {seconds:.1f} s"
        print(f"{name:10} one {took[1]:5.1f} s, two {took[2]:5.1f} s: {text}", flush=True)


if __name__ == "__main__":
    main()
