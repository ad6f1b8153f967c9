import json
from collections import Counter
from pathlib import Path

import attrs
import numpy as np
import pytest

from corenas.contracts import Searcher
from corenas.errors import UserError
from corenas.objectives import Trial
from corenas.plugins import load_catalogue
from corenas.space import SearchSpace
from corenas.testing.components import spec_fragments
from corenas.testing.distributions import distribution_checks
from corenas.testing.searchers import additive, archs, drive, measured, searcher_checks, simple_problem, tiny_space
from corenas.variables import Categorical
from corenas_searcher_random import Random, corenas_searchers


@pytest.mark.parametrize("check", searcher_checks)
def test_conforms(check):
    check(Random())


@pytest.mark.parametrize("check", distribution_checks)
def test_the_distribution_conforms(check):
    check("corenas_searcher_random")


def test_options_are_a_searcher_under_its_name():
    assert corenas_searchers() == {"random": Random}
    assert isinstance(Random(), Searcher)


def test_every_order_of_a_tiny_space_is_as_likely_as_any_other():
    space = SearchSpace([Categorical("a", (1, 2, 3))])
    problem = simple_problem(space)
    orders = Counter(
        tuple(arch["a"] for arch in Random().start(problem, np.random.default_rng(seed)).ask(3)) for seed in range(1200)
    )
    assert sum((orders[order] - 200) ** 2 / 200 for order in orders) < 20.5  # 0.1% with 5 degrees of freedom
    assert len(orders) == 6


def test_archs_that_were_measured_elsewhere_are_not_asked():
    space = tiny_space()
    known = [*space][:2]
    search = Random().start(simple_problem(space), np.random.default_rng(0))
    search.tell([Trial(arch, {"gain": 1.0}) for arch in known])
    assert set(archs(drive(search, simple_problem(space), additive(space)))) == set(space) - set(known)


def flops(codes):
    return {"flops": codes[:, -9:].sum(axis=1)}


def test_each_range_of_a_cost_comes_up_as_often_as_any_other():
    problem = attrs.evolve(simple_problem(), cost=flops)
    space = problem.space
    drawn = flops(space.draw(np.random.default_rng(5), 400))["flops"]
    edges = np.linspace(3, 24, 8)  # of 0 to 27, what 4096 draws reach or nearly
    search = Random("flops", bins=7).start(problem, np.random.default_rng(1))
    asked = flops(space.encode(archs(drive(search, problem, additive(space)))))["flops"]
    assert len(asked) == 400
    plain, even = (np.histogram(costs, edges)[0] for costs in (drawn, asked))
    assert plain.max() > 20 * max(plain.min(), 1)
    assert even.min() > 30
    assert even.max() < 90


def test_a_stratified_run_goes_on_as_it_would_have():
    problem = attrs.evolve(simple_problem(), cost=flops)
    first, second = (Random("flops").start(problem, np.random.default_rng(seed)) for seed in (0, 1))
    drive(first, problem, additive(problem.space), rounds=3, batch=7)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert archs(measured(first.ask(20), additive(problem.space))) == [*second.ask(20)]


def test_ranges_that_are_used_up_are_made_up_for():
    problem = attrs.evolve(simple_problem(tiny_space()), cost=lambda codes: {"params": codes.sum(axis=1)})
    search = Random("params", bins=4).start(problem, np.random.default_rng(0))
    assert set(archs(drive(search, problem, additive(tiny_space()), batch=4))) == set(tiny_space())


def test_a_cost_that_archs_do_not_have_is_refused():
    with pytest.raises(UserError, match="no cost 'flop'") as caught:
        Random("flop").start(attrs.evolve(simple_problem(), cost=flops), np.random.default_rng(0))
    assert "did you mean 'flops'" in str(caught.value)
    with pytest.raises(UserError, match="no cost 'flops'"):
        Random("flops").start(simple_problem(), np.random.default_rng(0))


def test_the_readme_shows_a_spec_that_is_right():
    fragments = spec_fragments(Path(__file__).parents[1] / "README.md")
    assert [load_catalogue().options("searchers", spec["searcher"]) for spec in fragments] == [
        Random(),
        Random("flops"),
    ]
