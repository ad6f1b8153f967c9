"""What the whole loop of a search takes per trial beside what evaluators take; run by hand.

    OMP_NUM_THREADS=1 uv run python tests/benchmarks/loop.py [--trials N …] [--searchers NAME …] [--profile]

Runs of `corenas run`, as users start them: database, progress and all. `table`: 8 variables of 4 choices, looked up in
a CSV file of all archs. `network`: what a search of a network pays beside, costs and a constraint; it measures nothing.
Milliseconds of processor time between the search's start and its end, less those in evaluators, over the number of
trials. The goal is 1, at 10 trials and at 10,000.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import itertools
import os
import pstats
import tempfile
import time
from pathlib import Path
from typing import Any

from corenas.contracts import StageDone, StageStarted
from corenas.measure import TrialRunner
from corenas.run.spec import open_spec
from corenas.run.stages import run_spec

VARIABLES, CHOICES = 8, 4
TABLE = """
searcher = "{searcher}"
evaluators = [{{ type = "table", file = "table.csv", metrics = ["top1", {{ metric = "flops", direction = "min" }}] }}]
search = {{ trials = {trials}, objectives = ["top1"] }}
[space]
""" + "\n".join(f"x{i} = {[*range(CHOICES)]}" for i in range(VARIABLES))
NETWORK = """
plugins = ["free.py"]
algorithm = "zennas"
space = "mobilenetv3-small-images"
backbone = {{ type = "mobilenetv3", in_channels = 1 }}
task = {{ type = "classification", data = "digits" }}
train = {{ epochs = 0 }}
searcher = "{searcher}"
evaluators = ["free"]
search = {{ trials = {trials}, objectives = ["free"], constraints = {{ flops = "60%" }} }}
export = {{ formats = [] }}
"""
FREE = '''
from attrs import frozen
from corenas.hookspecs import hookimpl
from corenas.contracts import Metric


@frozen
class Free:
    """Costs nothing."""

    cheap = False

    def provides(self, task):
        return {"free": Metric("", "max")}

    def start(self, context):
        return lambda archs, fidelity: [{"free": hash(arch) % 1000 / 1000} for arch in archs]


@hookimpl
def corenas_evaluators():
    return {"free": Free}
'''


def write_table(folder: Path) -> None:
    rows = itertools.product(range(CHOICES), repeat=VARIABLES)
    lines = [",".join([*(f"x{i}" for i in range(VARIABLES)), "top1", "flops"])]
    lines += [
        ",".join(map(str, [*row, sum((i + 1) * (c + 1) % 7 for i, c in enumerate(row)), sum(row)])) for row in rows
    ]
    (folder / "table.csv").write_text("\n".join(lines))


class Watch:
    """Notes the processor time of the search and of what its evaluators take."""

    def __init__(self, emit: Any, profile: cProfile.Profile | None) -> None:
        self.emit, self.profile, self.search, self.inside = emit, profile, 0.0, 0.0

    def __call__(self, event: Any) -> None:
        if isinstance(event, StageDone) and event.stage == "search":
            self.search += time.process_time()
            if self.profile is not None:
                self.profile.disable()
        self.emit(event)
        if isinstance(event, StageStarted) and event.stage == "search":
            if self.profile is not None:
                self.profile.enable()
            self.search -= time.process_time()

    @contextlib.contextmanager
    def evaluators(self) -> Any:
        """Add up the time in evaluators, those of costs left out."""
        results = TrialRunner._results

        def timed(runner: TrialRunner, evaluator: Any, archs: Any, fidelity: float) -> Any:
            measure, spent = evaluator.measure, 0.0

            def inner(*given: Any) -> Any:
                nonlocal spent
                start = time.process_time()
                try:
                    return measure(*given)
                finally:
                    spent += time.process_time() - start

            own = type(evaluator)(evaluator.name, evaluator.metrics, inner) if evaluator.name != "cost" else evaluator
            found = results(runner, own, archs, fidelity)
            self.inside += spent
            return found

        TrialRunner._results = timed
        try:
            yield
        finally:
            TrialRunner._results = results


def overhead(case: str, searcher: str, trials: int, profile: cProfile.Profile | None) -> float:
    """Return milliseconds per trial."""
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        folder = Path(scratch)
        write_table(folder)
        (folder / "free.py").write_text(FREE)
        text = {"table": TABLE, "network": NETWORK}[case]
        (folder / "spec.toml").write_text(text.format(searcher=searcher, trials=trials))
        spec, _, catalogue = open_spec(folder / "spec.toml")
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            watch = Watch(lambda event: [*catalogue.emit(event)], profile)
            with watch.evaluators():
                run_spec(spec, catalogue, folder / "run", watch)
    return (watch.search - watch.inside) / trials * 1000


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, nargs="*", default=[10, 1000, 10000])
    parser.add_argument("--searchers", nargs="*", default=["random", "evolution"])
    parser.add_argument("--cases", nargs="*", default=["table", "network"])
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    for case, searcher, trials in itertools.product(options.cases, options.searchers, options.trials):
        profile = cProfile.Profile() if options.profile else None
        print(
            f"{case:8} {searcher:10} {trials:6} trials: {overhead(case, searcher, trials, profile):.2f} ms each",
            flush=True,
        )
        if profile is not None:
            pstats.Stats(profile).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    main()
