"""What every searcher promises: `@pytest.mark.parametrize("check", searcher_checks)` in a plugin's tests.

Each check takes the options of a searcher. Needs no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import numpy as np

from corenas.contracts import Problem, Proposal, Search, Searcher
from corenas.errors import UserError
from corenas.objectives import Constraint, Objective, Objectives, Trial
from corenas.space import Arch, Codes, SearchSpace
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


def flat_space(endless: bool = False) -> SearchSpace:
    """Ten variables that are all active always; `endless`: with two more that can be any number."""
    variables = [Categorical(f"x.{i}", (0, 1, 2, 3)) for i in range(10)]
    return SearchSpace([*variables, *([Steps("lr", 1e-3, 1.0, log=True), Steps("ratio", 0.0, 1.0)] if endless else [])])


class Inside:
    """The part of a space that a predicate of codes leaves, and nothing else than a region promises."""

    def __init__(self, space: SearchSpace, holds: Callable[[Codes], np.ndarray]) -> None:
        self._space, self._holds = space, holds
        self.variables, self.encode, self.decode = space.variables, space.encode, space.decode

    def admit(self, codes: Codes) -> Codes:
        """Those that are inside."""
        codes = self._space.canonical(codes)
        return codes[self._holds(codes)]

    def draw(self, rng: np.random.Generator, n: int) -> Codes:
        """Draws of the space, those outside thrown away."""
        found = self._space.draw(rng, 0)
        while len(found) < n:
            found = np.concatenate([found, self.admit(self._space.draw(rng, 64))])
        return found[:n]

    def mutated(self, codes: Codes, prob: float, rng: np.random.Generator) -> Codes:
        """A mutant of each inside, or a draw."""
        return self._each(self._space.mutated(codes.repeat(16, axis=0), prob, rng), rng)

    def crossed(self, first: Codes, second: Codes, rng: np.random.Generator) -> Codes:
        """A child of each pair inside, or a draw."""
        return self._each(self._space.crossed(first.repeat(16, axis=0), second.repeat(16, axis=0), rng), rng)

    def sample(self, rng: np.random.Generator) -> Arch:
        """One draw."""
        return self.decode(self.draw(rng, 1))[0]

    def mutate(self, arch: Arch, prob: float, rng: np.random.Generator) -> Arch:
        """One mutant."""
        return self.decode(self.mutated(self.encode([arch]), prob, rng))[0]

    def cross(self, first: Arch, second: Arch, rng: np.random.Generator) -> Arch:
        """One child."""
        return self.decode(self.crossed(self.encode([first]), self.encode([second]), rng))[0]

    def _each(self, codes: Codes, rng: np.random.Generator) -> Codes:
        rows = []
        for at in range(0, len(codes), 16):
            inside = self.admit(codes[at : at + 16])
            rows.append((inside if len(inside) else self.draw(rng, 1))[:1])
        return np.concatenate(rows)


def simple_problem(space: SearchSpace | None = None, budget: int = 400, pareto: bool = False) -> Problem:
    """Make `gain` of `additive` large; in Pareto mode make `cost` small at the same time."""
    objectives = (Objective("gain"), Objective("cost", "min")) if pareto else (Objective("gain"),)
    return Problem(space or large_space(), Objectives(objectives, pareto=pareto), budget)


def additive(space: SearchSpace) -> Callable[..., Trial]:
    """A measure in which each variable counts for itself: `gain`, the mean place of the choices, each between 0 and 1.

    `cost` is the same over the second half of the variables, so that the two are at odds.
    """
    reach = np.array([max(len(variable.choices) - 1, 1) for variable in space.variables])

    def measure(arch: Arch, fidelity: float = 1.0) -> Trial:
        places = space.encode([arch])[0] / reach
        metrics = {"gain": float(places.mean()), "cost": float(places[len(places) // 2 :].mean())}
        return Trial(arch, metrics, fidelity=fidelity)

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


def plain(state: object) -> Any:
    """A state as it comes back from a database. Fails if it is no plain data."""
    try:
        return json.loads(json.dumps(state))
    except TypeError as error:
        raise AssertionError(
            f"`state_dict` gives what is no plain data (of a trial that is `to_json()`): {error}"
        ) from error


def all_differ(seen: Sequence[tuple[Arch, float]]) -> None:
    """Fails if an arch was asked twice with the same share of the effort."""
    again = len(seen) - len({*seen})
    assert not again, f"{again} of {len(seen)} archs were asked before: `corenas.space.unseen` leaves such out"


def wasted(arch: Arch) -> Trial:
    """A trial that failed."""
    return Trial(arch, state="failed", error="no luck")


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
    """No trial is wasted on an arch that was asked before; with another share of the effort it is another trial.

    Trials that it is told stay as they are: they are what the run reports.
    """
    search = searcher.start(simple_problem(), np.random.default_rng(0))
    measure = additive(large_space())
    seen: list[tuple[Arch, float]] = []
    for _ in range(20):
        trials = measured(search.ask(20), measure)
        seen += [(trial.arch, trial.fidelity) for trial in trials]
        before = json.dumps([trial.to_json() for trial in trials])
        search.tell(trials)
        assert json.dumps([trial.to_json() for trial in trials]) == before, "changes the trials that it is told"
    all_differ(seen)


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
    for rounds, batch in ((0, 20), (1, 20), (7, 20), (33, 1), (5, 7)):
        first = searcher.start(problem, np.random.default_rng(0))
        second = searcher.start(problem, np.random.default_rng(1))
        drive(first, problem, measure, rounds, batch)
        second.load_state_dict(plain(first.state_dict()))
        assert drive(first, problem, measure, 10, batch) == drive(second, problem, measure, 10, batch)


def what_was_asked_when_a_run_was_killed_is_asked_again(searcher: Searcher) -> None:
    """From the state before an `ask` whose results never came, the same is asked, in the middle of a generation too."""
    problem, measure = simple_problem(), additive(large_space())
    for rounds, batch in ((2, 7), (11, 7), (40, 1)):
        first = searcher.start(problem, np.random.default_rng(0))
        drive(first, problem, measure, rounds, batch)
        state = plain(first.state_dict())
        lost = [*first.ask(batch)]
        second = searcher.start(problem, np.random.default_rng(1))
        second.load_state_dict(state)
        assert [*second.ask(batch)] == lost
        for search in (first, second):
            search.tell(measured(lost, measure))
        assert drive(first, problem, measure, 5, batch) == drive(second, problem, measure, 5, batch)


def state_does_not_change_under_its_reader(searcher: Searcher) -> None:
    """`state_dict` is a snapshot: what the search does later does not reach into it."""
    problem, measure = simple_problem(), additive(large_space())
    search = searcher.start(problem, np.random.default_rng(0))
    drive(search, problem, measure, rounds=3)
    state = search.state_dict()
    before = plain(state)
    drive(search, problem, measure, rounds=3)
    assert plain(state) == before, "a state that was given earlier has changed: give a copy"


def survives_failed_and_infeasible_trials(searcher: Searcher) -> None:
    """Trials of all states and figures that are no finite numbers are heard, and the search goes on in the space."""
    for pareto in (False, True):
        problem, measure = simple_problem(pareto=pareto), additive(large_space())
        search = searcher.start(problem, np.random.default_rng(0))
        told = 0

        def unlucky(arch: Arch, measure: Callable[[Arch], Trial] = measure) -> Trial:
            nonlocal told
            told += 1
            kinds = (
                measure(arch),
                Trial(arch, state="failed", error="out of memory"),
                Trial(arch, {"cost": 1.0}, "infeasible"),
                Trial(arch, {"gain": math.nan, "cost": math.nan}),
                Trial(arch, {"gain": math.inf, "cost": -math.inf}),
                Trial(arch, {"gain": -math.inf, "cost": 0.5}),
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
    assert len(drive(search, problem, wasted)) >= 150


def goes_on_when_no_arch_is_feasible(searcher: Searcher) -> None:
    """Bounds on what is measured that no arch meets end no search early."""
    problem = attrs.evolve(simple_problem(budget=150), constraints=(Constraint("cost", high=-1.0),))
    search, measure = searcher.start(problem, np.random.default_rng(0)), additive(large_space())
    told = drive(search, problem, lambda arch: attrs.evolve(measure(arch), state="infeasible", error="not cheap"))
    assert len(told) >= 150


def goes_on_when_all_trials_are_equal(searcher: Searcher) -> None:
    """Ties are no reason to stop, nor to ask anything twice; not when a predictor has nothing to tell apart either."""
    for pareto in (False, True):
        problem = simple_problem(budget=150, pareto=pareto)
        search = searcher.start(problem, np.random.default_rng(0))
        told = drive(search, problem, lambda arch: Trial(arch, {"gain": 0.5, "cost": 0.5}))
        assert math.fsum(trial.fidelity for trial in told) > 30
        all_differ([(trial.arch, trial.fidelity) for trial in told])


def ends_on_a_tiny_space(searcher: Searcher) -> None:
    """When nothing new is to be found it asks nothing, soon; what is there is found before, each arch once."""
    problem = simple_problem(tiny_space())
    for batch in (1, 4, 20):
        search = searcher.start(problem, np.random.default_rng(0))
        told = drive(search, problem, additive(tiny_space()), rounds=50, batch=batch)
        assert not (more := [*search.ask(4)]), f"all archs were asked, and it asks for {more}"
        all_differ([(trial.arch, trial.fidelity) for trial in told])
        assert {*archs(told)} == {*tiny_space()}


def ends_on_a_space_of_one_arch(searcher: Searcher) -> None:
    """One choice for each variable, or no variable at all: one arch is asked."""
    for space in (SearchSpace([Categorical("a", (1,))]), SearchSpace([])):
        problem = simple_problem(space)
        search = searcher.start(problem, np.random.default_rng(0))
        told = drive(search, problem, lambda arch: Trial(arch, {"gain": 1.0}), rounds=10, batch=4)
        assert {*archs(told)} == {space.default()}
        assert not (more := [*search.ask(4)]), f"all archs were asked, and it asks for {more}"


def searches_spaces_without_conditions(searcher: Searcher) -> None:
    """Variables that are all active; with continuous ones as well, or it says at its start that it cannot."""
    for endless in (False, True):
        space = flat_space(endless)
        problem = simple_problem(space, budget=60)
        try:
            search = searcher.start(problem, np.random.default_rng(0))
        except UserError:
            assert endless
            continue
        told = drive(search, problem, lambda arch: Trial(arch, {"gain": sum(map(float, arch.values()))}))
        assert math.fsum(trial.fidelity for trial in told) > 30
        assert all(trial.arch in space for trial in told)


def stays_inside_the_region_that_it_was_given(searcher: Searcher) -> None:
    """It asks nothing outside `problem.space`, and needs no more of it than the contract says."""
    space = large_space()

    def holds(codes: Codes) -> np.ndarray:
        return codes[:, -9:-1].sum(axis=1) % 3 == 1

    problem = attrs.evolve(simple_problem(budget=100), space=Inside(space, holds))
    told = drive(searcher.start(problem, np.random.default_rng(0)), problem, additive(space))
    assert math.fsum(trial.fidelity for trial in told) > 30
    assert holds(space.encode(archs(told))).all()


def handles_several_objectives(searcher: Searcher) -> None:
    """In Pareto mode it works as well, and a run that is resumed goes on the same way."""
    problem, measure = simple_problem(pareto=True), additive(large_space())
    first, second = (searcher.start(problem, np.random.default_rng(seed)) for seed in (0, 1))
    assert all(arch in large_space() for arch in archs(drive(first, problem, measure, rounds=7)))
    second.load_state_dict(plain(first.state_dict()))
    assert drive(first, problem, measure, rounds=5) == drive(second, problem, measure, rounds=5)


def finds_better_archs_than_random_draws(searcher: Searcher) -> None:
    """Its best arch beats that of as many random draws on an additive objective, in the median of three seeds.

    Once more is better, once less.
    """
    space = large_space()
    measure = additive(space)
    for sign, wanted in ((1, Objective("gain", "max")), (-1, Objective("gain", "min"))):
        problem, lead = attrs.evolve(simple_problem(), objectives=Objectives((wanted,))), []
        for seed in range(3):
            told = drive(searcher.start(problem, np.random.default_rng(seed)), problem, measure)
            draws = map(measure, space.decode(space.draw(np.random.default_rng(100 + seed), 400)))
            found, drawn = (max(sign * trial.metrics["gain"] for trial in trials) for trials in (told, draws))
            lead.append(found - drawn)
        assert np.median(lead) > 0, f"finds nothing better than random draws where the {wanted.direction} is wanted"


searcher_checks = [
    *component_checks,
    asks_only_archs_of_its_space,
    asks_at_most_what_was_wanted,
    asks_each_arch_once,
    same_seed_same_archs,
    touches_no_global_generator,
    resumed_run_asks_what_the_first_would_have_asked,
    what_was_asked_when_a_run_was_killed_is_asked_again,
    state_does_not_change_under_its_reader,
    survives_failed_and_infeasible_trials,
    goes_on_when_every_trial_fails,
    goes_on_when_no_arch_is_feasible,
    goes_on_when_all_trials_are_equal,
    ends_on_a_tiny_space,
    ends_on_a_space_of_one_arch,
    searches_spaces_without_conditions,
    stays_inside_the_region_that_it_was_given,
    handles_several_objectives,
]
"""What every searcher keeps to."""

learning_searcher_checks = [*searcher_checks, finds_better_archs_than_random_draws]
"""What a searcher that learns from results keeps to."""
