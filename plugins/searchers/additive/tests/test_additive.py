import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from corenas.cli import main
from corenas.constrained import FeasibleSpace
from corenas.contracts import Problem, Proposal
from corenas.objectives import Constraint, Objective, Objectives, Trial
from corenas.plugins import load_catalogue
from corenas.space import SearchSpace
from corenas.store import Store
from corenas.testing.components import spec_fragments
from corenas.testing.distributions import distribution_checks
from corenas.testing.searchers import additive, drive, large_space, learning_searcher_checks, simple_problem
from corenas.variables import Categorical, Condition
from corenas_searcher_additive import Additive
from corenas_searcher_additive.programme import Programme


@pytest.mark.parametrize("check", learning_searcher_checks)
def test_conforms(check):
    check(Additive(initial=360, per_round=20))


@pytest.mark.parametrize("check", distribution_checks)
def test_the_distribution_conforms(check):
    check("corenas_searcher_additive")


def conditional_space():
    depth = Categorical("depth", (1, 2, 3))
    deep = Condition("depth", frozenset({2, 3}))
    op = Categorical("op", ("a", "b"), when=[deep])
    both = [Condition("op", frozenset({"b"})), Condition("se", frozenset({True}))]
    return SearchSpace([depth, op, Categorical("se", (True, False)), Categorical("ratio", (1, 2, 3), when=both)])


def test_the_points_of_the_programme_are_the_archs_of_the_space():
    """Cut off one by one, largest gain first, they are all that there are, in the order of their gains."""
    space = conditional_space()
    programme = Programme(space)
    gains = np.random.default_rng(0).normal(size=programme.size)
    found, cuts = [], []
    while (codes := programme.solve(gains, [], cuts)) is not None:
        found += space.decode(codes)
        cuts.append(programme.features(codes)[0])
    worth = {arch: float(programme.features(space.encode([arch]))[0] @ gains) for arch in space}
    assert found == sorted(space, key=worth.__getitem__, reverse=True)


class Costly:
    """A cost that is no sum over variables: resolution squared times what stages cost, of 12 variables."""

    def __init__(self):
        stages = [Categorical(f"{kind}.{i}", (1, 2, 3)) for i in range(4) for kind in ("depth", "width")]
        self.space = SearchSpace([Categorical("resolution", (4, 6, 8)), *stages])
        self.keys = self.space.keys

    def on(self, space):
        return self

    def __call__(self, codes):
        choices = np.array([[arch[key] for key in self.keys] for arch in self.space.decode(codes)]).reshape(
            len(codes), 9
        )
        return {"flops": choices[:, 0] ** 2 * (choices[:, 1::2] * choices[:, 2::2] ** 2).sum(axis=1)}

    def of(self, archs):
        return [{"flops": int(n)} for n in self(self.space.encode(archs))["flops"]]


@pytest.fixture(scope="module")
def costly():
    """All archs with their flops and what they gain: a sum over their choices."""
    cost = Costly()
    weights = np.random.default_rng(1).uniform(0.5, 2, 9)
    archs = [*cost.space]
    codes = cost.space.encode(archs)
    gains = (codes * weights).sum(axis=1)
    return (
        cost,
        dict(zip(archs, gains.tolist(), strict=True)),
        dict(zip(archs, cost(codes)["flops"].tolist(), strict=True)),
    )


def test_budgets_are_answered_with_the_best_arch_of_all(costly):
    """19,683 archs: for each budget enumeration says what the best is. Later budgets ask it in their first rounds."""
    cost, gains, flops = costly
    known = []
    for budget in (2000, 900, 500):
        limit = [Constraint("flops", high=budget)]
        problem = Problem(
            FeasibleSpace(cost.space, cost, limit), Objectives((Objective("top1"),)), 60, cost, limit, known
        )
        search = Additive(initial=50).start(problem, np.random.default_rng(0))
        rounds = 20 if not known else 3
        told = drive(search, problem, lambda arch: Trial(arch, {"top1": gains[arch]}), rounds=rounds, batch=10)
        assert all(flops[trial.arch] <= budget for trial in told)
        best = max(gains[arch] for arch in gains if flops[arch] <= budget)
        assert max(trial.metrics["top1"] for trial in told) == pytest.approx(best)
        known += told


def test_a_constraint_on_what_is_measured_is_a_row_as_well(costly):
    cost, gains, _ = costly
    problem = Problem(cost.space, Objectives((Objective("top1"),)), 60, None, [Constraint("latency", high=6)])

    def measure(arch):
        latency = float(cost.space.encode([arch]).sum())
        return Trial(arch, {"top1": gains[arch], "latency": latency}, "done" if latency <= 6 else "infeasible")

    told = drive(Additive(initial=50).start(problem, np.random.default_rng(0)), problem, measure, batch=10)
    best = max(gain for arch, gain in gains.items() if cost.space.encode([arch]).sum() <= 6)
    assert max(trial.metrics["top1"] for trial in told if trial.ok) == pytest.approx(best)


def test_rounds_have_what_was_expected_and_resume_in_their_midst():
    problem, measure = simple_problem(budget=100), additive(large_space())
    first, second = (Additive(per_round=8).start(problem, np.random.default_rng(seed)) for seed in (0, 1))
    drive(first, problem, measure, rounds=3)  # 50 at random
    asked = first.ask(20)
    assert len(asked) == 8
    for item in asked:
        assert isinstance(item, Proposal)
        assert item.extra["score_expected"] == pytest.approx(measure(item.arch).metrics["gain"], abs=0.15)
    first.tell([measure(item.arch) for item in asked[:3]])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for search in (first, second):
        search.tell([measure(item.arch) for item in asked[3:]])
    assert drive(first, problem, measure, rounds=2) == drive(second, problem, measure, rounds=2)


def test_in_pareto_mode_solutions_spread_over_the_front():
    problem, measure = simple_problem(pareto=True, budget=120), additive(large_space())
    told = drive(Additive(initial=60, per_round=30).start(problem, np.random.default_rng(0)), problem, measure)
    costs = [trial.metrics["cost"] for trial in problem.objectives.front(told)]
    assert len(costs) >= 8
    assert min(costs) < 0.1
    assert max(costs) > 0.6
    ahead = itertools.pairwise(sorted(problem.objectives.front(told), key=lambda trial: trial.metrics["cost"]))
    assert all(a.metrics["gain"] <= b.metrics["gain"] for a, b in ahead)


SPEC = """
evaluators = [{ type = "table", file = "%s", metrics = ["top1", { metric = "ms", direction = "min" }] }]
searcher = { type = "additive", initial = 30, per_round = 5 }
[space]
a = [0, 1, 2, 3]
b = [0, 1, 2, 3]
c = [0, 1, 2, 3]
d = [0, 1, 2, 3]
[search]
trials = 40
objectives = ["top1"]
constraints = [{ ms = 8 }, { ms = 4 }]
"""


def test_in_a_run_the_second_budget_is_answered_from_what_the_first_has_measured(tmp_path):
    space = SearchSpace([Categorical(key, (0, 1, 2, 3)) for key in "abcd"])
    rows = [{**arch, "top1": 1 + 2 * arch["a"] + arch["b"] + 3 * arch["c"], "ms": sum(arch.values())} for arch in space]
    lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    (tmp_path / "spec.toml").write_text(SPEC % (tmp_path / "t.csv").as_posix())
    assert main(["run", str(tmp_path / "spec.toml"), "--out", str(tmp_path / "run"), "--json"]) == 0
    store = Store(tmp_path / "run" / "run.sqlite", readonly=True)
    for number, budget in enumerate((8, 4)):
        best = max(row["top1"] for row in rows if row["ms"] <= budget)
        assert max(trial.metrics["top1"] for trial in store.trials(number) if trial.ok) == best
    assert store.trials(1)[0].metrics["top1"] == best


def test_the_readme_shows_a_spec_that_is_right():
    fragments = spec_fragments(Path(__file__).parents[1] / "README.md")
    assert [load_catalogue().options("searchers", spec["searcher"]) for spec in fragments] == [Additive(initial=200)]
