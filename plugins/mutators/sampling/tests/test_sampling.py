import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from corenas.contracts import Mutator, MutatorContext
from corenas.errors import UserError
from corenas.options import structure
from corenas.plugins import load_catalogue
from corenas.space import SearchSpace
from corenas.testing.components import spec_fragments
from corenas.testing.distributions import distribution_checks
from corenas.testing.mutators import context, draws_every_choice, large_space, mutator_checks, scores
from corenas.variables import Categorical, Condition, Float, Int
from corenas_mutator_sampling import (
    Attentive,
    Fair,
    FlopsUniform,
    Max,
    Sandwich,
    Uniform,
    Weighted,
    corenas_mutators,
)
from corenas_mutator_sampling.predicted import LossPredictor

OPS = {"conv": 0.5, "mbconv": 0.3, "skip": 0.2}
MUTATORS = [
    Max(),
    Uniform(),
    Uniform(paths=3),
    Uniform(over="archs"),
    Uniform(paths=3, shared=("ratio", "width.*")),
    Sandwich(),
    Sandwich(paths=2),
    Sandwich(paths=3, shared=("depth",)),
    Weighted(),
    Weighted({"blocks.*.op": OPS}, paths=2, shared=("depth",)),
    FlopsUniform(draws=500),
    FlopsUniform(paths=3, width=5, draws=500),
    Fair(),
    Fair(paths=12, shared=("ratio",)),
    Attentive(draws=500),
    Attentive(paths=3, candidates=2, rule="worst-up", prior="uniform", width="4", draws=500, tries=0),
    Attentive(predictor=40, after=3, draws=500),
    Attentive(predictor=40, after=8, draws=500),
]

# Two stages of depth 1 would be 2 archs, depth 2 has 4 x 2 of them: 10 in all.
STAGE = SearchSpace([
    Int("depth", 1, 2),
    Categorical("first", (3, 5)),
    Categorical("second", (3, 5, 7, 9), when=[Condition("depth", frozenset({2}))]),
])  # fmt: skip


@pytest.mark.parametrize("check", mutator_checks)
@pytest.mark.parametrize("mutator", MUTATORS, ids=repr)
def test_conforms(mutator, check):
    if not (check is draws_every_choice and mutator in (Max(), Sandwich(paths=2))):  # these draw extremes alone
        check(mutator)


@pytest.mark.parametrize("check", distribution_checks)
def test_the_distribution_conforms(check):
    check("corenas_mutator_sampling")


def test_options_are_mutators_under_their_names():
    assert corenas_mutators() == {
        "max": Max,
        "uniform": Uniform,
        "weighted": Weighted,
        "flops_uniform": FlopsUniform,
        "fair": Fair,
        "sandwich": Sandwich,
        "attentive": Attentive,
    }
    assert all(isinstance(cls(), Mutator) for cls in corenas_mutators().values())


def steps(mutator, space, n, seed=0, score=scores):
    sampler = mutator.start(context(space, seed))
    return [sampler.sample(score) for _ in range(n)]


# -- max, uniform, sandwich -------------------------------------------------------------------------------------------


def test_max_is_the_largest_arch_at_every_step():
    sampler = Max().start(context())
    assert {*sampler.sample(scores), *sampler.sample(scores)} == {large_space().largest()}


def test_uniform_draws_as_many_paths_as_wanted():
    assert [len(Uniform(paths=n).start(context()).sample(scores)) for n in (1, 2, 5)] == [1, 2, 5]


def counted(mutator, draws=20_000):
    return Counter(arch for step in steps(mutator, STAGE, draws // 10) for arch in step)


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
    drawn = steps(Sandwich(paths=5), space, 50)
    assert all(step[0] == space.largest() and step[-1] == space.smallest() and len(step) == 5 for step in drawn)
    assert len({arch for step in drawn for arch in step[1:-1]}) > 140


def test_sandwich_repeats_its_ends_where_the_space_leaves_nothing_else():
    space = SearchSpace([Categorical("a", (1,))])
    assert Sandwich().start(context(space)).sample(scores) == [space.default()] * 4


# -- choices that a step shares ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mutator", [
    Uniform(paths=4, shared=("ratio", "width.*")),
    Sandwich(paths=5, shared=("ratio", "width.*")),
    Weighted(paths=4, shared=("ratio", "width.*")),
    Fair(shared=("ratio", "width.*")),
], ids=repr)  # fmt: skip
def test_shared_choices_are_those_of_the_whole_step_and_the_others_are_not(mutator):
    space = large_space()
    keys = ["ratio", *(key for key in space.keys if key.startswith("width."))]
    drawn = steps(mutator, space, 60)
    assert all(len({arch[key] for arch in step}) == 1 for step in drawn for key in keys)
    assert any(len({arch["blocks.0.op"] for arch in step}) > 1 for step in drawn)
    for key in keys:
        counts = Counter(step[0][key] for step in drawn)
        assert len(counts) == 4, key  # every choice comes up


def test_a_sandwich_with_a_shared_choice_has_the_ends_of_what_is_left():
    space = large_space()
    for step in steps(Sandwich(shared=("depth",)), space, 20):
        fixed = space.fix({"depth": step[0]["depth"]})
        assert step[0] == space.arch(fixed.largest())
        assert step[-1] == space.arch(fixed.smallest())


def test_what_a_shared_choice_makes_active_is_drawn_uniformly():
    for mutator in (Uniform(paths=10, shared=("depth",)), Weighted(paths=10, shared=("depth",))):
        drawn = [arch for step in steps(mutator, STAGE, 1_000) for arch in step if arch["depth"] == 2]
        counts = Counter(arch["second"] for arch in drawn)
        assert chi_square(counts, dict.fromkeys((3, 5, 7, 9), len(drawn) / 4)) < 16.3


def test_whole_archs_cannot_share_a_choice():
    with pytest.raises(UserError, match="draws whole archs"):
        Uniform(over="archs", shared=("depth",)).start(context())


@pytest.mark.parametrize("cls", [Uniform, Sandwich, Weighted, Fair])
def test_a_shared_variable_that_there_is_not_is_named(cls):
    with pytest.raises(UserError, match="no variable 'widht") as caught:
        cls(shared=("depth", "widht.*")).start(context())
    assert caught.value.faults[0].dotted == "mutator.shared[1]"


# -- weighted ---------------------------------------------------------------------------------------------------------


def test_weighted_draws_choices_as_likely_as_it_is_told():
    drawn = [arch for step in steps(Weighted({"first": {"3": 3, "5": 1}}, paths=10), STAGE, 2_000) for arch in step]
    counts = Counter(arch["first"] for arch in drawn)
    assert chi_square(counts, {3: 15_000, 5: 5_000}) < 10.8  # 0.1% with one degree of freedom
    rest = Counter(arch["second"] for arch in drawn if arch["depth"] == 2)
    assert chi_square(rest, dict.fromkeys((3, 5, 7, 9), sum(rest.values()) / 4)) < 16.3


def test_a_choice_of_no_weight_is_never_drawn_and_a_narrower_space_shares_the_rest():
    mutator = Weighted({"second": {"3": 0, "5": 1, "7": 1, "9": 2}, "first": {"3": 1, "5": 1}}, paths=100)
    (step,) = steps(mutator, STAGE.fix({"depth": 2}), 1)
    assert {arch["second"] for arch in step} == {5, 7, 9}
    narrow = STAGE.narrow({"second": [5, 9], "depth": [2]})
    counts = Counter(arch["second"] for step in steps(mutator, narrow, 100) for arch in step)
    assert chi_square(counts, {5: 10_000 / 3, 9: 20_000 / 3}) < 10.8


@pytest.mark.parametrize(("probabilities", "text"), [
    ({"third": {"3": 1}}, "no variable 'third'"),
    ({"first": {"3": 1}}, "no probability for 5"),
    ({"first": {"3": 0, "5": 0}}, "no choice that is likelier than 0"),
])  # fmt: skip
def test_probabilities_that_say_nothing_of_a_choice_are_refused(probabilities, text):
    with pytest.raises(UserError, match=text) as caught:
        Weighted(probabilities).start(context(STAGE))
    assert caught.value.faults[0].dotted.startswith("mutator.probabilities")


# -- fair -------------------------------------------------------------------------------------------------------------

LAYERS = SearchSpace([Categorical(f"layer.{i}", tuple("abcdef")) for i in range(19)])  # FairNAS: 19 layers of 6 choices


def test_fair_uses_every_choice_of_every_variable_once_a_step():
    for step in steps(Fair(), LAYERS, 50):
        assert len(step) == 6
        assert all(sorted(arch[key] for arch in step) == [*"abcdef"] for key in LAYERS.keys)


def test_fair_paths_are_independent_of_each_other_from_layer_to_layer():
    pairs = Counter((arch["layer.0"], arch["layer.1"]) for step in steps(Fair(), LAYERS, 3_000) for arch in step)
    assert chi_square(pairs, {(a, b): 500 for a in "abcdef" for b in "abcdef"}) < 66.6  # 0.1%, 35 degrees of freedom


@pytest.mark.parametrize(
    ("paths", "spread"), [(None, {(2, 2, 1), (2, 3)}), (15, {(5, 5, 5), (7, 8)}), (30, {(10, 10, 10), (15, 15)})]
)
def test_a_variable_with_fewer_choices_has_each_as_often_or_once_more(paths, spread):
    space = SearchSpace([Int("five", 1, 5), Int("three", 1, 3), Int("two", 1, 2)])
    totals = Counter()
    for step in steps(Fair(paths), space, 200):
        assert len(step) == (paths or 5)
        assert {*Counter(arch["five"] for arch in step).values()} == {len(step) // 5}
        for key, choices in (("three", 3), ("two", 2)):
            counts = Counter(arch[key] for arch in step)
            totals += Counter((key, choice) for choice in counts.elements())
            assert tuple(sorted(counts.values())) in {tuple(sorted(s)) for s in spread if len(s) == choices}
    # Whoever has one more is drawn anew at each step, so that over many steps none is ahead.
    for key in ("three", "two"):
        counts = [n for (name, _), n in totals.items() if name == key]
        assert max(counts) - min(counts) <= 6 * math.sqrt(200)


def test_a_variable_under_a_condition_is_dealt_out_where_it_is_active():
    when = [[Condition("depth", frozenset(range(i + 1, 5)))] for i in range(4)]
    ops = [Categorical(f"op.{i}", tuple("abc"), when=conditions) for i, conditions in enumerate(when)]
    space = SearchSpace([Int("depth", 1, 4), *ops])
    for step in steps(Fair(paths=12), space, 30):
        assert {*Counter(arch["depth"] for arch in step).values()} == {3}
        for i in range(4):
            counts = Counter(arch[f"op.{i}"] for arch in step if arch["depth"] > i)
            assert {*counts.values()} == {(4 - i) * 3 // 3}, i  # it is active on 12, 9, 6 and 3 paths
    few = steps(Fair(), space, 30)
    assert all(Counter(arch["op.3"] for arch in step if arch["depth"] == 4).total() == 1 for step in few)


def test_fair_says_what_it_cannot_deal_out():
    with pytest.raises(UserError, match="ratio is continuous"):
        Fair().start(context(SearchSpace([Float("ratio", 0, 1)])))
    with pytest.raises(UserError, match="5 paths cannot use all 6 choices") as caught:
        Fair(paths=5).start(context(LAYERS))
    assert caught.value.faults[0].dotted == "mutator.paths"


# -- bins of a cost ---------------------------------------------------------------------------------------------------


class Sum:
    """Ten flops for each choice, as a cost of the space of layers; the bell curve of a real one."""

    def __init__(self, space):
        self.space = space

    def __call__(self, codes):
        return {"flops": 10 * codes.sum(1), "params": codes.sum(1)}

    def on(self, space):
        return Sum(space)


def costly(space=LAYERS, seed=0):
    return MutatorContext(space, Sum(space), np.random.default_rng(seed))


def flops(archs, space=LAYERS):
    return Sum(space)(space.encode(archs))["flops"]


def test_flops_uniform_draws_all_bins_equally_often():
    sampler = FlopsUniform(paths=7, low=400, high=540, bins=7).start(costly())
    drawn = [arch for _ in range(300) for arch in sampler.sample(scores)]
    costs = flops(drawn)
    assert costs.min() >= 400
    assert costs.max() <= 540
    assert chi_square(Counter(np.minimum((costs - 400) // 20, 6)), dict.fromkeys(range(7), 300)) < 22.5  # 6 degrees
    assert len({*drawn}) > 2_000  # not again and again the archs that were drawn beforehand


def test_bins_are_as_wide_or_as_many_as_they_are_told():
    edges = {
        "width": FlopsUniform(width="25", draws=1000).start(costly()).bins.edges,
        "bounds": FlopsUniform(width=20, low="400", high="0.5k").start(costly()).bins.edges,
        "number": FlopsUniform(bins=5, low=400, high=500).start(costly()).bins.edges,
    }
    assert {*np.diff(edges["width"])} == {25}
    assert edges["width"][0] % 25 == 0
    assert [*edges["bounds"]] == [*edges["number"]] == [400, 420, 440, 460, 480, 500]


def test_a_bin_that_no_arch_falls_into_is_left_out():
    sampler = FlopsUniform(paths=20, low=0, high=1000, bins=10, draws=1000).start(costly())
    assert not {*sampler.bins.numbers} & {0, 1, 8, 9}
    assert sampler.bins.prior.sum() == pytest.approx(1)
    costs = flops(sampler.sample(scores))
    assert {*(costs // 100)} <= {*sampler.bins.numbers}


@pytest.mark.parametrize("cls", [FlopsUniform, Attentive])
def test_bounds_that_no_arch_costs_are_refused_with_what_they_cost(cls):
    with pytest.raises(UserError, match="no arch of 1,000 has 5k to 6k flops: they have") as caught:
        cls(low="5k", high="6k", draws=1000).start(costly())
    assert caught.value.faults[0].dotted == "mutator.low"
    with pytest.raises(UserError, match="600 is above 500"):
        cls(low=600, high=500).start(costly())


def test_an_arch_drawn_beforehand_steps_in_where_none_is_found():
    sampler = FlopsUniform(paths=5, tries=0, draws=200, bins=3).start(costly())
    known = {*LAYERS.decode(sampler.bins.known)}
    assert {arch for _ in range(20) for arch in sampler.sample(scores)} <= known


# -- attentive --------------------------------------------------------------------------------------------------------


def test_attentive_is_largest_then_sampled_then_smallest():
    for paths in (2, 4):
        sampler = Attentive(paths=paths).start(costly())
        step = sampler.sample(scores)
        assert (step[0], step[-1], len(step)) == (LAYERS.largest(), LAYERS.smallest(), paths)


def test_attentively_sampled_costs_follow_the_prior():
    sampler = Attentive(paths=12, width=50, candidates=1).start(costly())
    bins = sampler.bins
    drawn = bins.bins_of(flops([arch for _ in range(300) for arch in sampler.sample(scores)[1:-1]]))
    expected = {number: 3_000 * share for number, share in zip(bins.numbers, bins.prior, strict=True) if share > 0.005}
    assert sum(expected.values()) > 2_900
    assert chi_square(Counter(drawn), expected) < 29.6  # 0.1% with 10 degrees of freedom
    # And the prior is that of the space: the flops of its archs, here a sum of 19 independent choices.
    costs = flops(LAYERS.decode(LAYERS.draw(np.random.default_rng(5), 20_000)))
    shares = [np.mean(bins.bins_of(costs) == number) for number in bins.numbers]
    np.testing.assert_allclose(bins.prior, shares, atol=0.02)


def test_a_uniform_prior_draws_all_bins_equally_often():
    sampler = Attentive(paths=12, bins=4, low=350, high=600, prior="uniform", candidates=1).start(costly())
    drawn = sampler.bins.bins_of(flops([arch for _ in range(100) for arch in sampler.sample(scores)[1:-1]]))
    assert chi_square(Counter(drawn), dict.fromkeys(range(4), 250)) < 16.3


@pytest.mark.parametrize(("rule", "pick"), [("best-up", min), ("worst-up", max)])
def test_the_best_or_the_worst_of_candidates_in_one_bin_is_trained(rule, pick):
    asked = []

    def score(archs):
        asked.append(archs)
        return scores(archs)

    sampler = Attentive(paths=5, candidates=4, rule=rule, width=40).start(costly())
    for _ in range(20):
        asked.clear()
        step = sampler.sample(score)
        assert len(asked) == 3
        for candidates, arch in zip(asked, step[1:-1], strict=True):
            assert len(candidates) == 4
            assert len({*sampler.bins.bins_of(flops(candidates))}) == 1
            assert scores([arch]) == [pick(scores(candidates))]


def additive(archs):
    """Losses that choices add up to, a lesson that a predictor can learn."""
    return [3 + sum(math.sin(7 * i + ord(choice)) for i, choice in enumerate(arch.values())) for arch in archs]


@pytest.mark.parametrize(("rule", "pick"), [("best-up", min), ("worst-up", max)])
def test_a_predictor_that_is_fitted_once_tells_many_candidates_apart(rule, pick, monkeypatch):
    asked, offered = [], []

    def score(archs):
        asked.append(len(archs))
        return additive(archs)

    sampler = Attentive(paths=4, candidates=50, predictor=300, after=2, rule=rule, width=40).start(costly())
    draw = sampler.bins.draw
    monkeypatch.setattr(sampler.bins, "draw", lambda *args: offered.append(draw(*args)) or offered[-1])
    found, wanted, middle = [], [], []
    for number in range(22):
        offered.clear()
        step = sampler.sample(score)
        assert asked == ([] if number < 2 else [300])
        losses = [additive(LAYERS.decode(codes)) for codes in offered]
        if number < 2:  # there is no predictor yet
            assert step[1:-1] == [LAYERS.decode(codes)[0] for codes in offered]
        else:
            found += additive(step[1:-1])
            wanted += map(pick, losses)
            middle += map(np.mean, losses)
    # What is picked is the best of fifty, or next to it.
    assert np.mean(np.isclose(found, wanted)) > 0.8
    assert np.mean(np.abs(np.subtract(found, wanted))) < 0.02 * np.mean(np.abs(np.subtract(middle, wanted)))


def test_a_predictor_reads_long_and_continuous_variables_and_none_that_is_inactive():
    space = SearchSpace([
        Int("depth", 1, 2), Float("ratio", 0.0, 1.0), Int("width", 8, 80, 8),
        Categorical("second", (3, 5, 7), when=[Condition("depth", frozenset({2}))]),
    ])  # fmt: skip

    def loss(archs):
        return [
            (a["ratio"] - 0.4) ** 2 + (a["width"] / 80) ** 2 + a["depth"] + (a["second"] == 5) * (a["depth"] == 2)
            for a in archs
        ]

    rng = np.random.default_rng(0)
    codes, others = space.draw(rng, 2_000), space.draw(rng, 200)
    predicted = LossPredictor.fitted(space, codes, loss(space.decode(codes)))(others)
    np.testing.assert_allclose(predicted, loss(space.decode(others)), atol=0.05)


# -- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cls", "table", "key"), [
    (Uniform, {"paths": 0}, "paths"),
    (Uniform, {"over": "bits"}, "over"),
    (Sandwich, {"paths": 1}, "paths"),
    (Sandwich, {"random": 2}, "random"),
    (Weighted, {"probabilities": {"first": {"3": -1}}}, "probabilities"),
    (FlopsUniform, {"bins": 0}, "bins"),
    (FlopsUniform, {"width": "wide"}, "width"),
    (FlopsUniform, {"width": 0}, "width"),
    (FlopsUniform, {"low": -1}, "low"),
    (Attentive, {"rule": "best"}, "rule"),
    (Attentive, {"candidates": 0}, "candidates"),
    (Fair, {"paths": 0}, "paths"),
])  # fmt: skip
def test_wrong_options_are_named(cls, table, key):
    with pytest.raises(UserError) as caught:
        structure(table, cls)
    assert [fault.dotted for fault in caught.value.faults] == [key]


def test_the_readme_shows_specs_that_are_right():
    fragments = spec_fragments(Path(__file__).parents[1] / "README.md")
    assert [load_catalogue().options("mutators", spec["mutator"]) for spec in fragments] == [
        Sandwich(),
        FlopsUniform(low="290M", high="360M", width="10M"),
        Attentive(width="25M"),
        Attentive(width="25M", candidates=50, predictor=1024, after=18_000),
        Weighted({"stages.*.op": {"mb_k3_e4": 0.1, "mb_k3_e6": 0.4, "mb_k5_e4": 0.1, "mb_k5_e6": 0.4}}),
        Uniform(paths=2, shared=("resolution",)),
    ]
