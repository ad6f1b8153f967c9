"""How good searchers are after 25 to 200 trials: regret with one objective, hypervolume with two; run by hand.

    OMP_NUM_THREADS=1 uv run python tests/benchmarks/searchers.py [--searchers NAME …] [--seeds N] [--trials N …]

On a table of 10,080 trained subnets (tests/data/archs.csv.gz, by make_table.py), and on two functions of 100 variables
of four choices: `sum`, in which each variable counts for itself, and `chain`, in which each counts together with the
next. Regret is what the best trial lacks to the best arch, in percent of the range from the worst arch to the best;
hypervolume is that of the front, in percent of what can be reached: of the true front of the table, of the box between
worst and best for the functions. Means over seeds with 95% intervals (Student's t). What is measured with a share of
the effort has noise, as that of so many images fewer. Last, the searchers whose mean is not better than random search's
after all trials, the interval of the difference considered. All of it takes some 40 minutes of one core, most of them
for `bayesian`, `predictor` and `additive`.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import tomli
from attrs import frozen

from corenas.contracts import Problem, Proposal
from corenas.objectives import Objective, Objectives, Trial, hypervolume
from corenas.plugins import load_catalogue
from corenas.space import Arch, SearchSpace
from corenas.variables import Categorical

ROOT = Path(__file__).parents[1]
OBJECTIVES = (Objective("gain"), Objective("cost", "min"))
T95 = {2: 12.71, 3: 4.30, 5: 2.78, 10: 2.26, 20: 2.09}
"""Student's t for so many seeds; others are near the next smaller one's."""


@frozen
class Landscape:
    """Something to search: gain and cost of archs, each from 0, that of the worst, to 1.

    noise: of the gain that is measured with half the effort
    front: the hypervolume that can be reached
    """

    name: str
    space: SearchSpace
    measure: Callable[[Arch], tuple[float, float]]
    noise: float
    front: float
    costs: Callable[[np.ndarray], Mapping[str, np.ndarray]]

    def trial(self, proposal: Proposal) -> Trial:
        """Measure what was proposed."""
        gain, cost = self.measure(proposal.arch)
        if proposal.fidelity < 1:
            rng = np.random.default_rng([int(proposal.arch.digest, 16), round(1e6 * proposal.fidelity)])
            gain += self.noise * math.sqrt(1 / proposal.fidelity - 1) * rng.standard_normal()
        return Trial(proposal.arch, {"gain": gain, "cost": cost}, fidelity=proposal.fidelity)


def table() -> Landscape:
    """The subnets of a supernet that was trained on MNIST."""
    space = SearchSpace.from_table(tomli.loads((ROOT / "benchmarks/table.toml").read_text())["space"])
    with gzip.open(ROOT / "data/archs.csv.gz", "rt", encoding="utf-8", newline="") as file:
        rows = [*csv.reader(file)]
    places = {key: rows[0].index(key) for key in (*space.keys, "top1", "flops")}
    codes = [[v.choices.index(int(row[places[v.key]])) for row in rows[1:]] for v in space.variables]
    top1, flops = (np.array([float(row[places[name]]) for row in rows[1:]]) for name in ("top1", "flops"))
    gain, cost = (top1 - top1.min()) / np.ptp(top1), (flops - flops.min()) / np.ptp(flops)
    known = {
        tuple(row): pair for row, *pair in zip(np.array(codes).T.tolist(), gain.tolist(), cost.tolist(), strict=True)
    }

    def measure(arch: Arch) -> tuple[float, float]:
        return known[tuple(space.encode([arch])[0].tolist())]

    def costs(some: np.ndarray) -> dict[str, np.ndarray]:
        return {"flops": np.array([known[tuple(row)][1] for row in some.tolist()])}

    noise = math.sqrt(top1.mean() * (100 - top1.mean()) / 1000) / np.ptp(top1)
    best = hypervolume(np.stack([gain, -cost], axis=1), (0, -1))
    return Landscape("table", space, measure, float(noise), best, costs)


def function(name: str, variables: int = 100) -> Landscape:
    """A function whose best and worst value are known exactly, with random coefficients."""
    rng = np.random.default_rng(14)
    space = SearchSpace([Categorical(f"x{i}", (0, 1, 2, 3)) for i in range(variables)])
    prices = rng.random((variables, 4))
    pairs = (
        rng.random((variables - 1, 4, 4)) if name == "chain" else rng.random((variables - 1, 4, 1)).repeat(4, axis=2)
    )
    bounds = []
    for pick in (np.min, np.max):  # over the last variable, then over the one before it, …
        rest = np.zeros(4)
        for pair in pairs[::-1]:
            rest = pick(pair + rest, axis=1)
        bounds.append(pick(rest))
    low, high = bounds
    cheap, dear = prices.min(axis=1).mean(), prices.max(axis=1).mean()
    at = np.arange(variables)

    def cost_of(codes: np.ndarray) -> np.ndarray:
        return (prices[at, codes].mean(axis=1) - cheap) / (dear - cheap)

    def measure(arch: Arch) -> tuple[float, float]:
        codes = space.encode([arch])
        gain = pairs[at[:-1], codes[0, :-1], codes[0, 1:]].sum()
        return float((gain - low) / (high - low)), float(cost_of(codes)[0])

    return Landscape(name, space, measure, 0.05, 1.0, lambda codes: {"flops": cost_of(codes)})


def searched(landscape: Landscape, searcher: str, pareto: bool, seed: int, trials: int) -> list[tuple[float, Trial]]:
    """Return the trials of one search, each with how many whole ones had been spent after it."""
    problem = Problem(landscape.space, Objectives(OBJECTIVES[: 1 + pareto], pareto), trials, landscape.costs)
    search = load_catalogue().options("searchers", searcher).start(problem, np.random.default_rng(seed))
    spent, told = 0.0, []
    while spent < trials - 1e-9:
        asked = search.ask(min(10, math.ceil(trials - spent - 1e-9)))
        if not asked:
            break
        done = [landscape.trial(item if isinstance(item, Proposal) else Proposal(item)) for item in asked]
        search.tell(done)
        for trial in done:
            spent += trial.fidelity
            told.append((spent, trial))
    return told


def figure(landscape: Landscape, told: Sequence[tuple[float, Trial]], after: int, pareto: bool) -> float:
    """Return regret or hypervolume after so many trials, in percent."""
    whole = [trial.metrics for spent, trial in told if spent <= after + 1e-9 and trial.fidelity == 1]
    if not pareto:
        return 100 * (1 - max((metrics["gain"] for metrics in whole), default=0.0))
    gains = np.array([[metrics["gain"], -metrics["cost"]] for metrics in whole]).reshape(-1, 2)
    return 100 * hypervolume(gains, (0, -1)) / landscape.front


def interval(numbers: np.ndarray) -> float:
    """Return half the width of the 95% interval of a mean."""
    if len(numbers) < 2:
        return math.inf
    return T95[max(n for n in T95 if n <= len(numbers))] * float(numbers.std(ddof=1)) / math.sqrt(len(numbers))


def main() -> None:
    catalogue = load_catalogue()
    names = sorted(c.name for c in catalogue.components.values() if c.kind == "searchers")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--searchers", nargs="+", default=names, choices=names)
    parser.add_argument("--landscapes", nargs="+", default=["table", "sum", "chain"])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--trials", type=int, nargs="+", default=[25, 50, 100, 200])
    given = parser.parse_args()
    order = ["random", *(name for name in given.searchers if name != "random")]
    beaten_not = []
    print(f"{'':<28}" + "".join(f"{f'after {n}':>16}" for n in given.trials) + f"{'ms/trial':>10}")
    for landscape in [table() if name == "table" else function(name) for name in given.landscapes]:
        for pareto in (False, True):
            what = "hypervolume, %" if pareto else "regret, %"
            print(f"{landscape.name}: {what}")
            baseline = np.zeros(0)
            for name in order:
                start = time.process_time()
                runs = [searched(landscape, name, pareto, seed, max(given.trials)) for seed in range(given.seeds)]
                ms = 1000 * (time.process_time() - start) / sum(map(len, runs))
                figures = np.array([[figure(landscape, run, n, pareto) for n in given.trials] for run in runs])
                cells = [f"{f'{column.mean():.2f} ± {interval(column):.2f}':>16}" for column in figures.T]
                print(f"  {name:<26}{''.join(cells)}{ms:>10.2f}", flush=True)
                if name == "random":
                    baseline = figures[:, -1]
                    continue
                lead = (figures[:, -1] - baseline) * (1 if pareto else -1)
                if lead.mean() <= interval(lead):
                    beaten_not.append(f"{name} ({landscape.name}, {what.split(',')[0]} {lead.mean():+.2f})")
    print(f"not better than random after {max(given.trials)}: {', '.join(beaten_not) or 'none'}")


if __name__ == "__main__":
    main()
