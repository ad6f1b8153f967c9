"""What every searcher promises: `@pytest.mark.parametrize("check", searcher_checks)` in a plugin's tests.

Each check takes the options of a searcher. Needs no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence

import attrs
import numpy as np

from corenas.contracts import Problem, Proposal, Search, Searcher
from corenas.objectives import Objective, Objectives, Trial
from corenas.space import Arch, SearchSpace
from corenas.testing.components import component_checks, global_generators_untouched
from corenas.variables import Categorical, Condition, Int
from corenas.variables import Float as Steps


def large_space() -> SearchSpace:
    """Some 200 million archs over variables of every finite kind, four of them active only sometimes."""
    depth = Int("depth", 1, 3)
    blocks: list[Categorical] = []
    for i in range(3):
        when = [Condition("depth", frozenset(range(i + 1, 4)))] if i else []
        blocks.append(Categorical(f"blocks.{i}.op", ("conv", "mbconv", "skip"), when=when))
        blocks.append(Categorical(f"blocks.{i}.kernel", (3, 5, 7), when=when))
    widths = [Categorical(f"width.{i}", (8, 16, 24, 32)) for i in range(8)]
    return SearchSpace([depth, *blocks, *widths, Steps("ratio", 0.25, 1.0, step=0.25)])


def tiny_space() -> SearchSpace:
    """Six archs."""
    return SearchSpace([Categorical("a", (1, 2, 3)), Categorical("b", ("x", "y"))])


def simple_problem(space: SearchSpace | None = None, budget: int = 400, pareto: bool = False) -> Problem:
    """Make `gain` of `additive` large; in Pareto mode make `cost` small at the same time."""
    objectives = (Objective("gain"), Objective("cost", "min")) if pareto else (Objective("gain"),)
    return Problem(space or large_space(), Objectives(objectives, pareto=pareto), budget)


def additive(space: SearchSpace) -> Callable[[Arch], Trial]:
    """A measure in which each variable counts for itself: `gain`, the mean place of the choices, each between 0 and 1.

    `cost` is the same over the second half of the variables, so that the two are at odds.
    """
    reach = np.array([max(len(variable.choices) - 1, 1) for variable in space.variables])

    def measure(arch: Arch) -> Trial:
        places = space.encode([arch])[0] / reach
        return Trial(arch, {"gain": float(places.mean()), "cost": float(places[len(places) // 2 :].mean())})

    return measure


def measured(asked: Sequence[Arch | Proposal], measure: Callable[[Arch], Trial]) -> list[Trial]:
    """The trials of what was asked: an arch, or a proposal to measure one with a share of the whole effort."""
    proposals = [item if isinstance(item, Proposal) else Proposal(item) for item in asked]
    return [attrs.evolve(measure(item.arch), fidelity=item.fidelity) for item in proposals]


def drive(
    search: Search, problem: Problem, measure: Callable[[Arch], Trial], rounds: int = 20, batch: int = 20
) -> list[Trial]:
    """Ask and tell until the search asks nothing, the budget is spent or the rounds are over. Returns what was told."""
    told: list[Trial] = []
    for _ in range(rounds):
        left = problem.budget - math.fsum(trial.fidelity for trial in told)
        asked = search.ask(min(batch, math.ceil(left - 1e-9)))
        if not asked:
            break
        trials = measured(asked, measure)
        search.tell(trials)
        told += trials
    return told


def archs(trials: Sequence[Trial]) -> list[Arch]:
    """The archs of trials, in order."""
    return [trial.arch for trial in trials]


def _run(searcher: Searcher, seed: int = 0, problem: Problem | None = None) -> list[Arch]:
    problem = problem or simple_problem()
    assert isinstance(problem.space, SearchSpace)
    search = searcher.start(problem, np.random.default_rng(seed))
    return archs(drive(search, problem, additive(problem.space)))


def asks_only_archs_of_its_space(searcher: Searcher) -> None:
    """Every proposal is a canonical arch of the space; its share of the whole effort is above 0 and up to 1."""
    problem = simple_problem()
    assert isinstance(problem.space, SearchSpace)
    search = searcher.start(problem, np.random.default_rng(0))
    told = drive(search, problem, additive(problem.space))
    assert told
    assert all(isinstance(trial.arch, Arch) and trial.arch in problem.space for trial in told)
    assert all(0 < trial.fidelity <= 1 for trial in told)


def asks_at_most_what_was_wanted(searcher: Searcher) -> None:
    """`ask(n)` gives n archs or fewer, and at least one while there is much left to find."""
    problem = simple_problem()
    measure = additive(large_space())
    search = searcher.start(problem, np.random.default_rng(0))
    for n in (1, 7, 64, 3, 1, 100, 2):
        asked = search.ask(n)
        assert 1 <= len(asked) <= n
        search.tell(measured(asked, measure))


def asks_each_arch_once(searcher: Searcher) -> None:
    """No trial is wasted on an arch that was asked before; with another share of the effort it is another trial."""
    search = searcher.start(simple_problem(), np.random.default_rng(0))
    measure = additive(large_space())
    seen: list[tuple[Arch, float]] = []
    for _ in range(20):
        trials = measured(search.ask(20), measure)
        seen += [(trial.arch, trial.fidelity) for trial in trials]
        search.tell(trials)
    assert len(set(seen)) == len(seen)


def same_seed_same_archs(searcher: Searcher) -> None:
    """What is asked depends on the generator and the results alone; another seed asks something else."""
    assert _run(searcher, seed=1) == _run(searcher, seed=1)
    assert _run(searcher, seed=1) != _run(searcher, seed=2)


def touches_no_global_generator(searcher: Searcher) -> None:
    """All randomness comes from the generator handed in."""
    with global_generators_untouched():
        _run(searcher)


def resumed_run_asks_what_the_first_would_have_asked(searcher: Searcher) -> None:
    """The state is plain JSON and holds everything, the generator too; wherever the run was when it was saved."""
    problem, measure = simple_problem(), additive(large_space())
    for rounds in (0, 1, 7):
        first = searcher.start(problem, np.random.default_rng(0))
        second = searcher.start(problem, np.random.default_rng(1))
        drive(first, problem, measure, rounds=rounds)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert drive(first, problem, measure, rounds=10) == drive(second, problem, measure, rounds=10)


def state_does_not_change_under_its_reader(searcher: Searcher) -> None:
    """`state_dict` is a snapshot: what the search does later does not reach into it."""
    problem, measure = simple_problem(), additive(large_space())
    search = searcher.start(problem, np.random.default_rng(0))
    drive(search, problem, measure, rounds=3)
    state = search.state_dict()
    before = json.dumps(state)
    drive(search, problem, measure, rounds=3)
    assert json.dumps(state) == before


def survives_failed_and_infeasible_trials(searcher: Searcher) -> None:
    """Trials of all states and figures that are no numbers are heard, and the search goes on in the space."""
    problem, measure = simple_problem(), additive(large_space())
    search = searcher.start(problem, np.random.default_rng(0))
    told = 0

    def unlucky(arch: Arch) -> Trial:
        nonlocal told
        told += 1
        kinds = (
            measure(arch),
            Trial(arch, state="failed", error="out of memory"),
            Trial(arch, {"cost": 1.0}, "infeasible"),
            Trial(arch, {"gain": math.nan, "cost": math.nan}),
            Trial(arch, {"gain": math.inf, "cost": math.inf}, "stopped"),
        )
        return kinds[told % len(kinds)]

    asked = archs(drive(search, problem, unlucky))
    assert len(asked) > 80, "gave up early"
    assert all(arch in large_space() for arch in asked)


def goes_on_when_every_trial_fails(searcher: Searcher) -> None:
    """With nothing to learn from, it still asks something new."""
    problem = simple_problem(budget=150)
    search = searcher.start(problem, np.random.default_rng(0))
    told = drive(search, problem, lambda arch: Trial(arch, state="failed", error="no luck"))
    assert len(told) >= 150


def ends_on_a_tiny_space(searcher: Searcher) -> None:
    """When nothing new is to be found it asks nothing, soon; what is there is found before, each arch once."""
    problem = simple_problem(tiny_space())
    search = searcher.start(problem, np.random.default_rng(0))
    told = drive(search, problem, additive(tiny_space()), rounds=50, batch=4)
    assert [*search.ask(4)] == []
    assert len({(trial.arch, trial.fidelity) for trial in told}) == len(told)
    assert {*archs(told)} == {*tiny_space()}


def handles_several_objectives(searcher: Searcher) -> None:
    """In Pareto mode it works as well, and a run that is resumed goes on the same way."""
    problem, measure = simple_problem(pareto=True), additive(large_space())
    first, second = (searcher.start(problem, np.random.default_rng(seed)) for seed in (0, 1))
    assert all(arch in large_space() for arch in archs(drive(first, problem, measure, rounds=7)))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert drive(first, problem, measure, rounds=5) == drive(second, problem, measure, rounds=5)


def finds_better_archs_than_random_draws(searcher: Searcher) -> None:
    """On an additive objective its best arch beats that of as many random draws, in the median of five seeds."""
    problem, space = simple_problem(), large_space()
    measure = additive(space)
    lead = []
    for seed in range(5):
        search = searcher.start(problem, np.random.default_rng(seed))
        found = max(trial.metrics["gain"] for trial in drive(search, problem, measure))
        rng = np.random.default_rng(100 + seed)
        lead.append(found - max(measure(arch).metrics["gain"] for arch in space.decode(space.draw(rng, 400))))
    assert np.median(lead) > 0


searcher_checks = [
    *component_checks,
    asks_only_archs_of_its_space,
    asks_at_most_what_was_wanted,
    asks_each_arch_once,
    same_seed_same_archs,
    touches_no_global_generator,
    resumed_run_asks_what_the_first_would_have_asked,
    state_does_not_change_under_its_reader,
    survives_failed_and_infeasible_trials,
    goes_on_when_every_trial_fails,
    ends_on_a_tiny_space,
    handles_several_objectives,
]
"""What every searcher keeps to."""

learning_searcher_checks = [*searcher_checks, finds_better_archs_than_random_draws]
"""What a searcher that learns from results keeps to."""
