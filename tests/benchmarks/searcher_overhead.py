"""What `ask` and `tell` take per trial, at 100 variables of four choices; run by hand.

    OMP_NUM_THREADS=1 uv run --with optuna --with nevergrad --with pymoo python tests/benchmarks/searcher_overhead.py \\
        [--trials N] [--batch N] [NAME …]

NAME: installed searchers; left out, all. Beside them the same with optuna, nevergrad and pymoo, those that are
installed. Seconds are those of the processor, on one thread; `with state` adds `state_dict` as JSON once per batch, as
a run stores it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from collections.abc import Callable, Iterator

import numpy as np

from corenas.contracts import Problem, Proposal
from corenas.objectives import Objective, Objectives, Trial
from corenas.plugins import load_catalogue
from corenas.space import SearchSpace
from corenas.variables import Categorical

VARIABLES, CHOICES = 100, 4
WEIGHTS = np.random.default_rng(0).random((2, VARIABLES, CHOICES))
SPACE = SearchSpace([Categorical(f"x{i}", (*range(CHOICES),)) for i in range(VARIABLES)])


def value(codes: np.ndarray) -> tuple[float, float]:
    """Return what is maximised and what is minimised."""
    gain, cost = WEIGHTS[:, np.arange(VARIABLES), codes].mean(axis=1)
    return float(gain), float(cost)


def ours(name: str, trials: int, batch: int, pareto: bool) -> tuple[float, float]:
    """Return the seconds of `ask` and `tell`, and of the state, per trial."""
    objectives = (Objective("gain"), Objective("cost", "min"))[: 1 + pareto]
    problem = Problem(SPACE, Objectives(objectives, pareto), trials, lambda codes: {"flops": codes.sum(axis=1)})
    search = load_catalogue().options("searchers", name).start(problem, np.random.default_rng(0))
    busy = stored = 0.0
    done = 0
    while done < trials:
        start = time.process_time()
        asked = search.ask(min(batch, trials - done))
        busy += time.process_time() - start
        if not asked:
            break
        told = []
        for item in asked:
            proposal = item if isinstance(item, Proposal) else Proposal(item)
            gain, cost = value(SPACE.encode([proposal.arch])[0])
            told.append(Trial(proposal.arch, {"gain": gain, "cost": cost}, fidelity=proposal.fidelity))
        start = time.process_time()
        search.tell(told)
        middle = time.process_time()
        json.dumps(search.state_dict())
        busy, stored, done = busy + middle - start, stored + time.process_time() - middle, done + len(asked)
    return busy / done, stored / done


def optuna_tpe(trials: int, batch: int) -> float:
    """TPE, one objective."""
    import optuna

    return _optuna(optuna.samplers.TPESampler(seed=0), trials, batch, ["maximize"])


def optuna_nsga2(trials: int, batch: int) -> float:
    """NSGA-II, two objectives."""
    import optuna

    return _optuna(optuna.samplers.NSGAIISampler(seed=0), trials, batch, ["maximize", "minimize"])


def _optuna(sampler: object, trials: int, batch: int, directions: list[str]) -> float:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(directions=directions, sampler=sampler)  # type: ignore[reportArgumentType]
    start = time.process_time()
    for _ in range(0, trials, batch):
        asked = [study.ask() for _ in range(batch)]
        for trial in asked:
            codes = np.array([trial.suggest_categorical(key, range(CHOICES)) for key in SPACE.keys])
            study.tell(trial, value(codes)[: len(directions)])
    return (time.process_time() - start) / trials


def nevergrad(name: str, array: bool) -> Callable[[int, int], float]:
    """An optimizer by name, over one integer array or over single choices."""

    def run(trials: int, batch: int) -> float:
        import nevergrad as ng

        if array:
            inner = ng.p.Array(shape=(VARIABLES,), lower=0, upper=CHOICES - 1).set_integer_casting()
        else:
            inner = ng.p.Tuple(*(ng.p.Choice([*range(CHOICES)]) for _ in range(VARIABLES)))
        space = ng.p.Instrumentation(inner)
        optimizer = ng.optimizers.registry[name](space, budget=trials, num_workers=batch)
        start = time.process_time()
        for _ in range(0, trials, batch):
            for asked in [optimizer.ask() for _ in range(batch)]:
                optimizer.tell(asked, -value(np.array(asked.args[0], int))[0])
        return (time.process_time() - start) / trials

    return run


def pymoo_nsga2(trials: int, batch: int) -> float:
    """NSGA-II over integers, two objectives, generations of 50."""
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.core.problem import Problem as PymooProblem
    from pymoo.operators.crossover.ux import UniformCrossover
    from pymoo.operators.mutation.pm import PM
    from pymoo.operators.repair.rounding import RoundingRepair
    from pymoo.operators.sampling.rnd import IntegerRandomSampling
    from pymoo.problems.static import StaticProblem

    problem = PymooProblem(n_var=VARIABLES, n_obj=2, xl=0, xu=CHOICES - 1, vtype=int)
    algorithm = NSGA2(
        pop_size=50,
        sampling=IntegerRandomSampling(),
        crossover=UniformCrossover(),
        mutation=PM(vtype=float, repair=RoundingRepair()),
    )
    algorithm.setup(problem, termination=("n_eval", trials), seed=0, verbose=False)
    start = time.process_time()
    while algorithm.has_next():
        asked = algorithm.ask()
        values = np.array([value(row) for row in asked.get("X").astype(int)]) * [-1, 1]
        algorithm.evaluator.eval(StaticProblem(problem, F=values), asked)
        algorithm.tell(infills=asked)
    return (time.process_time() - start) / trials


OTHERS: dict[str, tuple[str, Callable[[int, int], float]]] = {
    "optuna TPE": ("optuna", optuna_tpe),
    "optuna NSGA-II, 2 objectives": ("optuna", optuna_nsga2),
    "nevergrad OnePlusOne, array": ("nevergrad", nevergrad("DiscreteOnePlusOne", True)),
    "nevergrad OnePlusOne, Choices": ("nevergrad", nevergrad("DiscreteOnePlusOne", False)),
    "pymoo NSGA-II, 2 objectives": ("pymoo", pymoo_nsga2),
}


def others(trials: int, batch: int) -> Iterator[str]:
    """Give a row for each of what other libraries have."""
    for name, (module, run) in OTHERS.items():
        try:
            importlib.import_module(module)
        except ImportError:
            yield f"{name:<34}{'not installed: uv run --with ' + module:>30}"
            continue
        yield f"{name:<34}{1000 * run(trials, batch):>12.2f}"


def main() -> None:
    names = sorted(c.name for c in load_catalogue().components.values() if c.kind == "searchers")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", metavar="NAME", nargs="*")
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=10)
    given = parser.parse_args()
    print(f"{'ms a trial, ' + str(given.trials) + ' trials':<34}{'ask + tell':>12}{'with state':>12}")
    for name in given.names or names:
        for pareto in (False, True):
            busy, stored = ours(name, given.trials, given.batch, pareto)
            title = f"{name}{', 2 objectives' if pareto else ''}"
            print(f"{title:<34}{1000 * busy:>12.2f}{1000 * (busy + stored):>12.2f}", flush=True)
    if not given.names:
        for row in others(given.trials, given.batch):
            print(row, flush=True)


if __name__ == "__main__":
    main()
