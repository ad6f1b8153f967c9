"""The searcher `bayesian` beside optuna's TPE and Gaussian process: regret with one objective; run by hand.

    OMP_NUM_THREADS=1 uv run --with optuna python tests/benchmarks/bayesian.py [--seeds N] [--trials N …] [--seconds N]

On the landscapes of searchers.py; batches of 10 for ours, one trial at a time, which is easier, for optuna. What takes
longer than so many seconds of the processor on one landscape is left where it is, and said. Means over the seeds, with
95% intervals.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Sequence

import numpy as np
from searchers import Landscape, figure, function, interval, searched, table

from corenas.contracts import Proposal
from corenas.objectives import Trial

Told = Sequence[tuple[float, Trial]]


def ours(name: str) -> Callable[[Landscape, int, int], Told]:
    """A searcher of ours."""
    return lambda landscape, seed, trials: searched(landscape, name, False, seed, trials)


def optuna(sampler: str) -> Callable[[Landscape, int, int], Told]:
    """A sampler of optuna, by name. Raises ImportError where it is not installed."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)

    def run(landscape: Landscape, seed: int, trials: int) -> Told:
        told: list[tuple[float, Trial]] = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            study = optuna.create_study(direction="maximize", sampler=getattr(optuna.samplers, sampler)(seed=seed))
            for number in range(trials):
                asked = study.ask()
                picked = {v.key: asked.suggest_categorical(v.key, v.choices) for v in landscape.space.variables}
                codes = landscape.space.encode([picked])
                (arch,) = landscape.space.decode(landscape.space.canonical(codes))
                told.append((number + 1.0, landscape.trial(Proposal(arch))))
                study.tell(asked, told[-1][1].metrics["gain"])
        return told

    return run


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line for each method on each landscape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--landscapes", nargs="+", default=["table", "sum", "chain"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trials", type=int, nargs="+", default=[50, 100])
    parser.add_argument("--seconds", type=float, default=120)
    given = parser.parse_args(arguments)
    methods = {name: ours(name) for name in ("random", "bayesian")}
    for sampler in ("TPESampler", "GPSampler"):
        try:
            methods[f"optuna {sampler}"] = optuna(sampler)
        except ImportError:
            print(f"optuna {sampler}: not installed")
    for name in given.landscapes:
        landscape = table() if name == "table" else function(name)
        print(f"{name + ': regret, %':28}" + "".join(f"{f'after {n}':>16}" for n in given.trials) + "  ms/trial  seeds")
        for method, run in methods.items():
            start, figures = time.process_time(), []
            for seed in range(given.seeds):
                told = run(landscape, seed, max(given.trials))
                figures.append([figure(landscape, told, n, False) for n in given.trials])
                spent = time.process_time() - start
                if spent > given.seconds:
                    break
            columns = np.array(figures).T
            cells = "".join(f"{f'{column.mean():.2f} ± {interval(column):.2f}':>16}" for column in columns)
            ms = 1000 * spent / (len(figures) * max(given.trials))
            print(f"  {method:26}{cells}{ms:10.1f}{len(figures):7}", flush=True)


if __name__ == "__main__":
    main()
