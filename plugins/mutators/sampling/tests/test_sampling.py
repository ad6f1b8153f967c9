from collections import Counter
from pathlib import Path

import pytest

from corenas.contracts import Mutator
from corenas.errors import UserError
from corenas.options import structure
from corenas.plugins import load_catalogue
from corenas.space import SearchSpace
from corenas.testing.components import spec_fragments
from corenas.testing.distributions import distribution_checks
from corenas.testing.mutators import context, large_space, mutator_checks, scores
from corenas.variables import Categorical, Condition, Float, Int
from corenas_mutator_sampling import Max, Sandwich, Uniform, corenas_mutators

MUTATORS = [Max(), Uniform(), Uniform(paths=3), Uniform(over="archs"), Sandwich(), Sandwich(random=0)]

# Two stages of depth 1 would be 2 archs, depth 2 has 4 x 2 of them: 10 in all.
STAGE = SearchSpace([
    Int("depth", 1, 2),
    Categorical("first", (3, 5)),
    Categorical("second", (3, 5, 7, 9), when=[Condition("depth", frozenset({2}))]),
])  # fmt: skip


@pytest.mark.parametrize("check", mutator_checks)
@pytest.mark.parametrize("mutator", MUTATORS, ids=repr)
def test_conforms(mutator, check):
    check(mutator)


@pytest.mark.parametrize("check", distribution_checks)
def test_the_distribution_conforms(check):
    check("corenas_mutator_sampling")


def test_options_are_mutators_under_their_names():
    assert corenas_mutators() == {"max": Max, "uniform": Uniform, "sandwich": Sandwich}
    assert all(isinstance(cls(), Mutator) for cls in corenas_mutators().values())


def test_max_is_the_largest_arch_at_every_step():
    sampler = Max().start(context())
    assert {*sampler.sample(scores), *sampler.sample(scores)} == {large_space().largest()}


def test_uniform_draws_as_many_paths_as_wanted():
    assert [len(Uniform(paths=n).start(context()).sample(scores)) for n in (1, 2, 5)] == [1, 2, 5]


def counted(mutator, draws=20_000):
    sampler = mutator.start(context(STAGE))
    return Counter(arch for _ in range(draws // 10) for arch in sampler.sample(scores))


def chi_square(counts, expected):
    return sum((counts[arch] - n) ** 2 / n for arch, n in expected.items())


def test_uniform_over_variables_trains_each_depth_equally_often():
    counts = counted(Uniform(paths=10))
    chance = {arch: 1 / 4 if arch["depth"] == 1 else 1 / 16 for arch in STAGE}
    assert sum(chance.values()) == 1
    assert chi_square(counts, {arch: 20_000 * p for arch, p in chance.items()}) < 27.9  # 0.1% with 9 degrees of freedom


def test_uniform_over_archs_draws_every_arch_equally_often():
    counts = counted(Uniform(paths=10, over="archs"))
    assert len(counts) == STAGE.size == 10
    assert chi_square(counts, dict.fromkeys(STAGE, 2_000)) < 27.9


def test_uniform_over_archs_says_why_a_continuous_space_has_no_such_thing():
    space = SearchSpace([Float("ratio", 0, 1)])
    Uniform().start(context(space)).sample(scores)
    with pytest.raises(UserError, match="ratio is continuous"):
        Uniform(over="archs").start(context(space))


def test_sandwich_is_largest_then_random_then_smallest():
    space = large_space()
    sampler = Sandwich(random=3).start(context(space))
    steps = [sampler.sample(scores) for _ in range(50)]
    assert all(step[0] == space.largest() and step[-1] == space.smallest() and len(step) == 5 for step in steps)
    assert len({arch for step in steps for arch in step[1:-1]}) > 140


def test_sandwich_repeats_its_ends_where_the_space_leaves_nothing_else():
    space = SearchSpace([Categorical("a", (1,))])
    assert Sandwich().start(context(space)).sample(scores) == [space.default()] * 4


@pytest.mark.parametrize(
    ("cls", "table", "key"),
    [(Uniform, {"paths": 0}, "paths"), (Uniform, {"over": "bits"}, "over"), (Sandwich, {"random": -1}, "random")],
)
def test_wrong_options_are_named(cls, table, key):
    with pytest.raises(UserError) as caught:
        structure(table, cls)
    assert [fault.dotted for fault in caught.value.faults] == [key]


def test_the_readme_shows_a_spec_that_is_right():
    fragments = spec_fragments(Path(__file__).parents[1] / "README.md")
    assert [load_catalogue().options("mutators", spec["mutator"]) for spec in fragments] == [Sandwich()]
