"""How much faster two workers of each executor are than one where a trial takes a second, and that trials are the same.

python tests/benchmarks/executors.py dask ray processes
"""

import argparse
import os
import signal
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from attrs import frozen

from corenas.contracts import Problem
from corenas.objectives import Objective, Objectives, Trial
from corenas.plugins import load_catalogue
from corenas.search import run_search
from corenas.space import SearchSpace

SPACE = SearchSpace.from_table({"width": [*range(200)]})
BEST = Objectives((Objective("gain"),))


@frozen
class Waiting:
    """Takes its time for each arch; at one its worker is killed, once."""

    seconds: float
    once: int = -1
    mark: str = ""
    batch: int = 1

    def __call__(self, trials):
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
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=1.0)
    options = parser.parse_args()
    alone, _ = searched(Waiting(0.0), options.trials)
    print(f"{options.trials} trials of {options.seconds} s, workers started before")
    for name in options.executors:
        took = {}
        for workers in (1, 2):
            executor = load_catalogue().options("executors", {"type": name, "workers": workers})
            with executor.start() as live:
                [*live.map(time.sleep, [0.2] * 4)]  # all of them are there
                trials, took[workers] = searched(Waiting(options.seconds), options.trials, live)
            assert trials == alone
        with TemporaryDirectory() as folder:
            once = alone[options.trials // 2].arch["width"]
            killed, seconds = searched(Waiting(options.seconds, once, f"{folder}/mark"), options.trials, executor)
            assert killed == alone
        ratio = took[1] / took[2]
        print(f"{name:10} one {took[1]:5.1f} s, two {took[2]:5.1f} s: {ratio:.2f} times; one killed {seconds:.1f} s")


if __name__ == "__main__":
    main()
