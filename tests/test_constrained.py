"""FeasibleSpace drawing: against spaces small enough to list, and windows too narrow for chance."""

import itertools

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn
from toys import Backbone, Conv, Task, make_space

from corenas import constrained, windows
from corenas.constrained import FeasibleSpace, extremes, reachable
from corenas.cost import METRICS, Cost
from corenas.errors import UserError
from corenas.mutable import LayerCost
from corenas.objectives import Constraint
from corenas.space import SearchSpace
from corenas.supernet import build_supernet, supernet_cost
from corenas.variables import Categorical, Condition, Float, Int

pytestmark = pytest.mark.filterwarnings("error")


def problem(**changes):
    space = make_space(**changes)
    return space, supernet_cost(build_supernet(Backbone(), space, Task()), space, Task())


SPACE, COST = problem()
ARCHS = [*SPACE]
COSTS = COST.of(ARCHS)


class Chain(nn.Module):
    """Layers of widths of their own: many variables, each beside two others."""

    def __init__(self, space, n):
        super().__init__()
        widths = [1, *(space.value(f"w{i}") for i in range(n))]
        kernels = [space.value(f"k{i}") for i in range(n)]
        self.layers = nn.Sequential(*map(Conv, widths[:-1], widths[1:], kernels))

    def forward(self, x):
        return self.layers(x)


def chain(n=12):
    variables = [Int(f"w{i}", 4, 32) for i in range(n)] + [Categorical(f"k{i}", (1, 3, 5)) for i in range(n)]
    space = SearchSpace(variables)
    return space, Cost(Chain(space, n), space, torch.zeros(1, 1, 8, 8))


LARGE, LARGE_COST = chain()


@pytest.mark.parametrize("changes", [{}, {"op": ["skip", "conv"]}, {"depth": [2, 3], "width": [8, 4]},
                                     {"block": {"kernel": [3, 1, 5]}}])  # fmt: skip
def test_what_can_be_reached_is_what_a_list_of_all_archs_says(changes):
    space, cost = problem(**changes)
    every = cost.of(space)
    for metric in METRICS:
        wanted = [arch[metric] for arch in every]
        assert reachable(cost, metric) == (min(wanted), max(wanted))


def test_what_a_narrower_space_reaches_is_its_own():
    narrow = SPACE.narrow({"width": [6], "depth": [2]})
    every = [c["flops"] for a, c in zip(ARCHS, COSTS, strict=True) if a["width"] == 6 and a["depth"] == 2]
    assert reachable(COST.on(narrow), "flops") == (min(every), max(every))
    drawing = FeasibleSpace(narrow, COST, [Constraint("flops", high=sorted(every)[3])])
    found = {drawing.sample(np.random.default_rng(i)) for i in range(60)}
    assert {arch["width"] for arch in found} == {6}


def test_where_the_best_choice_hangs_on_another_variable():
    """A kernel of 1 hides a width, which is then at its largest."""
    hidden = Categorical("w1", (4, 8), when=[Condition("k0", frozenset({3}))])
    space = SearchSpace([Categorical("w0", (4, 8)), Categorical("k0", (1, 3)), hidden, Categorical("k1", (1,))])
    cost = Cost(Chain(space, 2), space, torch.zeros(1, 1, 4, 4))
    every = cost.of(space)
    assert reachable(cost, "flops") == (min(c["flops"] for c in every), max(c["flops"] for c in every))


def test_the_extremes_hold_what_costs_nothing_at_its_extreme_too():
    space = SearchSpace([*LARGE.variables, Float("lr", 0.1, 1.0), Int("seed", 0, 9)])
    assert extremes(LARGE_COST.on(space), "params") == (space.smallest(), space.largest())


def test_a_variable_without_steps_does_not_matter_to_the_range():
    space = SearchSpace([*SPACE.variables, Float("lr", 0.1, 1.0)], SPACE.tree)
    cost = COST.on(space)
    assert reachable(cost, "flops") == reachable(COST, "flops")
    drawing = FeasibleSpace(space, cost, [Constraint("flops", high=6000)])
    assert 0.1 <= drawing.sample(np.random.default_rng(0))["lr"] <= 1


@pytest.mark.parametrize("constraints", [
    [Constraint("flops", high=6000)], [Constraint("flops", 9000, 11000)], [Constraint("params", low=1500)],
    [Constraint("flops", 5000, 12000), Constraint("params", 300, 900), Constraint("activations", low=400)],
], ids=lambda c: " ".join(map(str, c)))  # fmt: skip
def test_draws_mutants_and_children_obey(constraints):
    drawing, rng = FeasibleSpace(SPACE, COST, constraints), np.random.default_rng(0)
    allowed = {arch for arch, cost in zip(ARCHS, COSTS, strict=True) if all(c.met(cost) for c in constraints)}
    assert drawing.share == pytest.approx(
        sum(SPACE.sample(rng) in allowed for _ in range(3000)) / 3000, abs=0.04)  # fmt: skip
    drawn = [drawing.sample(rng) for _ in range(150)]
    assert {*drawn} <= allowed
    assert len({*drawn}) > min(len(allowed), 40) / 2
    for first, second in itertools.pairwise(drawn[:60]):
        for prob in (0.0, 0.1, 0.9):
            assert drawing.mutate(first, prob, rng) in allowed
        assert drawing.cross(first, second, rng) in allowed
    assert drawing.mutate(drawn[0], 0.0, rng) == drawn[0]
    assert drawing.cross(drawn[0], drawn[0], rng) in allowed


def test_a_parent_outside_has_children_inside():
    drawing, rng = FeasibleSpace(SPACE, COST, [Constraint("flops", high=5000)]), np.random.default_rng(0)
    for _ in range(20):
        for child in (drawing.mutate(SPACE.largest(), 0.1, rng), drawing.cross(SPACE.largest(), SPACE.largest(), rng)):
            assert COST.of([child])[0]["flops"] <= 5000


def test_draws_are_those_of_the_space_with_the_others_thrown_away():
    """The share of each arch among draws is its share among unconstrained draws that obey."""
    constraint = Constraint("flops", high=8000)
    drawing, rng = FeasibleSpace(SPACE, COST, [constraint]), np.random.default_rng(0)
    mine = [drawing.sample(rng)["depth"] for _ in range(600)]
    theirs = [arch["depth"] for arch in SPACE.decode(SPACE.draw(rng, 20_000)) if constraint.met(COST.of([arch])[0])]
    for depth in (1, 2, 3):
        assert mine.count(depth) / len(mine) == pytest.approx(theirs.count(depth) / len(theirs), abs=0.07)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("where", [0.0, 0.00005, 0.3, 0.9999])
def test_windows_of_a_ten_thousandth_of_the_space_are_found(metric, where):
    numbers = np.sort(LARGE_COST(LARGE.draw(np.random.default_rng(5), 100_000))[metric])
    low, high = numbers[int(where * 1e5)], numbers[int(where * 1e5) + 9]
    constraint = Constraint(metric, float(low), float(high))
    drawing, rng = FeasibleSpace(LARGE, LARGE_COST, [constraint]), np.random.default_rng(0)
    found = {drawing.sample(rng) for _ in range(12)}
    assert len(found) == 12
    assert all(constraint.met(cost) for cost in LARGE_COST.of(found))


def test_windows_at_the_ends_of_what_can_be_reached_are_found():
    for metric in METRICS:
        low, high = reachable(LARGE_COST, metric)
        for constraint in (Constraint(metric, high=low * 1.02), Constraint(metric, low=high * 0.98)):
            drawing = FeasibleSpace(LARGE, LARGE_COST, [constraint])
            assert constraint.met(LARGE_COST.of([drawing.sample(np.random.default_rng(1))])[0])


def test_several_narrow_windows_at_once_are_found():
    arch = LARGE.sample(np.random.default_rng(9))
    cost = LARGE_COST.of([arch])[0]
    constraints = [Constraint(metric, 0.99 * cost[metric], 1.01 * cost[metric]) for metric in METRICS]
    found = FeasibleSpace(LARGE, LARGE_COST, constraints).sample(np.random.default_rng(0))
    assert all(c.met(LARGE_COST.of([found])[0]) for c in constraints)


def test_what_no_arch_can_meet_is_refused_with_the_range_that_can_be_reached():
    low, high = reachable(COST, "flops")
    with pytest.raises(UserError) as caught:
        FeasibleSpace(SPACE, COST, [Constraint("flops", high=low - 1), Constraint("params", low=1e9)])
    first, second = caught.value.faults
    assert first.key == ("flops",)
    assert second.key == ("params",)
    assert f"{low:,}" in first.hint
    assert f"{high:,}" in first.hint
    FeasibleSpace(SPACE, COST, [Constraint("flops", low, low)])
    FeasibleSpace(SPACE, COST, [Constraint("flops", high, high)])


def test_constraints_that_no_arch_meets_together_are_refused_with_the_nearest():
    low, high = reachable(COST, "flops")[0], reachable(COST, "params")[1]
    with pytest.raises(UserError) as caught:
        FeasibleSpace(SPACE, COST, [Constraint("flops", high=low), Constraint("params", low=high)])
    (fault,) = caught.value.faults
    assert fault.key == ()
    assert "nearest has flops" in fault.hint


def test_without_constraints_it_is_the_space():
    drawing = FeasibleSpace(SPACE, COST, [])
    assert drawing.share == 1.0
    assert drawing.variables == SPACE.variables
    for seed in range(5):
        ours, theirs = np.random.default_rng(seed), np.random.default_rng(seed)
        arch = drawing.sample(ours)
        assert arch == SPACE.sample(theirs)
        assert drawing.mutate(arch, 0.3, ours) == SPACE.mutate(arch, 0.3, theirs)


def test_the_same_generator_draws_the_same():
    drawing = FeasibleSpace(SPACE, COST, [Constraint("flops", high=8000)])
    first, second = ([drawing.sample(rng) for _ in range(9)] for rng in map(np.random.default_rng, (3, 3)))
    assert first == second


@pytest.mark.parametrize("constraints", [[], [Constraint("flops", high=8000)], [Constraint("flops", high=5000)]])
def test_many_are_drawn_as_one_is(constraints):
    drawing = FeasibleSpace(SPACE, COST, constraints)
    for seed in range(5):
        codes = drawing.draw(np.random.default_rng(seed), 1)
        assert drawing.decode(codes) == [drawing.sample(np.random.default_rng(seed))]
        assert drawing.encode(drawing.decode(codes)).tolist() == codes.tolist()
    many = drawing.draw(np.random.default_rng(0), 700)
    assert many.shape == (700, len(SPACE.variables))
    assert all(c.met(cost) for c in constraints for cost in COST.of(drawing.decode(many)))
    assert drawing.draw(np.random.default_rng(0), 0).shape == (0, len(SPACE.variables))
    inside = {arch for arch, cost in zip(ARCHS, COSTS, strict=True) if all(c.met(cost) for c in constraints)}
    assert {*drawing.decode(drawing.draw(np.random.default_rng(0), 4000))} == inside


def test_draws_by_mutation_are_as_many_as_are_asked_for():
    low, _ = reachable(LARGE_COST, "flops")
    drawing = FeasibleSpace(LARGE, LARGE_COST, [Constraint("flops", high=low * 1.05)])
    archs = drawing.decode(drawing.draw(np.random.default_rng(0), 3))
    assert len(archs) == 3
    assert all(cost["flops"] <= low * 1.05 for cost in LARGE_COST.of(archs))


def test_a_searchers_own_archs_are_admitted_if_they_obey_and_made_canonical():
    limit = sorted(cost["flops"] for cost in COSTS)[len(COSTS) // 2]
    feasible = FeasibleSpace(SPACE, COST, [Constraint("flops", high=limit)])
    codes = SPACE.encode(ARCHS)
    inside = [arch for arch, cost in zip(ARCHS, COSTS, strict=True) if cost["flops"] <= limit]
    assert feasible.decode(feasible.admit(codes)) == inside
    assert 0 < len(inside) < len(ARCHS)
    raw = SPACE._raw(np.random.default_rng(0), 50)
    assert SPACE.decode(SPACE.admit(raw)) == SPACE.decode(SPACE.canonical(raw))
    free = FeasibleSpace(SPACE, COST, [])
    assert all(arch in SPACE for arch in free.decode(free.admit(raw)))


def exact(space, inside):
    """The probability of each arch under `draw` given that it is inside, by a list of all of them."""
    archs = [arch for arch in space if inside(arch)]
    codes = space.encode(archs)
    of_choices = [variable.chances[own] for variable, own in zip(space.variables, codes.T.astype(int), strict=True)]
    chances = np.where(space.active(codes), np.transpose(of_choices), 1).prod(axis=1)
    return archs, chances / chances.sum()


def is_drawn_from(archs, drawn, chances):
    """Whether a chi-square test, its level 0.1%, has nothing against a sample of a distribution over some archs."""
    number = {arch: index for index, arch in enumerate(archs)}
    counts = np.bincount([number[arch] for arch in drawn], minlength=len(archs))
    return scipy.stats.chisquare(counts, chances * len(drawn)).pvalue > 0.001


WINDOWS = [
    [Constraint("flops", 5000, 8000)],
    [Constraint("flops", high=2700)],
    [Constraint("params", 500, 800)],
    [Constraint("flops", 3000, 8000), Constraint("params", 300, 700)],
]


@pytest.mark.parametrize("bins", [64, 1 << 16])
@pytest.mark.parametrize("constraints", WINDOWS, ids=lambda c: " ".join(map(str, c)))
def test_draws_in_a_narrow_window_are_those_of_the_space_given_the_window(constraints, bins, monkeypatch):
    monkeypatch.setattr(windows, "_MOST_BINS", bins)
    monkeypatch.setattr(windows, "_FEWEST_BINS", 1)
    monkeypatch.setattr(constrained, "_LOOSE", 1.1)
    drawing, rng = FeasibleSpace(SPACE, COST, constraints), np.random.default_rng(0)
    costs = dict(zip(ARCHS, COSTS, strict=True))
    archs, chances = exact(SPACE, lambda arch: all(c.met(costs[arch]) for c in constraints))
    assert drawing.method == "tables"
    assert len(archs) > 5
    codes = drawing.draw(rng, 300 * len(archs))
    assert is_drawn_from(archs, drawing.decode(codes), chances)
    if len(constraints) == 1:  # drawn again in full, a mutant is a new arch
        assert is_drawn_from(archs, drawing.decode(drawing.mutated(codes, 1.0, rng)), chances)
    assert (drawing.mutated(codes, 0.0, rng) == codes).all()
    share = sum(exact(SPACE, lambda arch: True)[1][[ARCHS.index(arch) for arch in archs]])
    assert drawing.share == pytest.approx(share, rel=0.1)


def test_choices_that_are_not_equally_likely_are_not_so_in_a_window_either(monkeypatch):
    monkeypatch.setattr(constrained, "_LOOSE", 1.1)
    variables = [Int(f"w{i}", 1, 12, distribution="log") for i in range(2)] + [Categorical("k0", (1, 3, 5))]
    space = SearchSpace([*variables, Categorical("k1", (1, 3))])
    cost = Cost(Chain(space, 2), space, torch.zeros(1, 1, 8, 8))
    drawing, rng = FeasibleSpace(space, cost, [Constraint("flops", 20_000, 60_000)]), np.random.default_rng(0)
    archs, chances = exact(space, lambda arch: 20_000 <= cost.of([arch])[0]["flops"] <= 60_000)
    assert drawing.method == "tables"
    assert chances.max() > 5 * chances.min()
    codes = drawing.draw(rng, 300 * len(archs))
    assert is_drawn_from(archs, drawing.decode(codes), chances)
    assert is_drawn_from(archs, drawing.decode(drawing.mutated(codes, 1.0, rng)), chances)


@pytest.mark.parametrize("cells", [300, 40_000])
@pytest.mark.parametrize("constraints", [
    WINDOWS[-1],
    [Constraint("flops", high=3000), Constraint("params", low=200)],
    [Constraint("params", 300, 800), Constraint("activations", 300, 500), Constraint("flops", high=9000)],
], ids=lambda c: " ".join(map(str, c)))  # fmt: skip
def test_draws_in_two_windows_are_those_of_the_space_given_both(constraints, cells, monkeypatch):
    monkeypatch.setattr(windows, "_MOST_CELLS", cells)
    monkeypatch.setattr(windows, "_MOST_JOINED", 40)
    for limit in ("_LOOSE", "_RARE"):
        monkeypatch.setattr(constrained, limit, 1.1)
    drawing = FeasibleSpace(SPACE, COST, constraints)
    drawing._drawing = windows.JointWindow(SPACE, COST, tuple(constraints[:2]))  # if another way threw less away too
    costs = dict(zip(ARCHS, COSTS, strict=True))
    archs, chances = exact(SPACE, lambda arch: all(c.met(costs[arch]) for c in constraints))
    assert len(archs) > 5
    codes = drawing.draw(np.random.default_rng(0), 300 * len(archs))
    assert is_drawn_from(archs, drawing.decode(codes), chances)
    of_all = sum(exact(SPACE, lambda arch: True)[1][[ARCHS.index(arch) for arch in archs]])
    raw = drawing._drawing.draw(np.random.default_rng(1), 4000)
    share = np.exp(drawing._drawing.log_share) * len(drawing.admit(raw)) / len(raw)
    assert share == pytest.approx(of_all, rel=0.1)


def test_two_narrow_windows_throw_little_away_and_breed_inside():
    prices = np.random.default_rng(1).integers(100, 1000, size=(24, 2))
    space = SearchSpace([*(Categorical(f"v{i}", (1, 2, 3, 4)) for i in range(24)), Float("lr", 0.1, 1.0)])
    values = [space.value(f"v{i}") for i in range(24)]
    layers = [LayerCost(int(a) * v, int(b) * v) for (a, b), v in zip(prices, values, strict=True)]
    cost = Cost.adding(layers, space)
    free = space.draw(np.random.default_rng(5), 300_000)
    costs = cost(free)
    around = [Constraint(m, 0.99 * np.median(costs[m]), 1.01 * np.median(costs[m])) for m in ("flops", "params")]
    drawing, rng = FeasibleSpace(space, cost, around), np.random.default_rng(0)
    assert drawing.method == "tables"
    assert isinstance(drawing._drawing, windows.JointWindow)
    raw = drawing._drawing.draw(rng, 4000)
    assert len(drawing.admit(raw)) / len(raw) > 0.25
    parents = drawing.draw(rng, 500)
    children = drawing.crossed(parents, parents[::-1], rng)
    for bred in (parents, drawing.mutated(parents, 0.1, rng), children):
        assert len(drawing.admit(bred)) == 500
    assert parents[:, -1].mean() == pytest.approx(0.5, abs=0.06)
    assert (drawing.mutated(parents, 0.1, rng) == parents).mean() > 0.7
    assert ((children == parents) | (children == parents[::-1])).mean() > 0.8
    kept = drawing.admit(free)
    assert drawing.share == pytest.approx(len(kept) / len(free), rel=0.1)
    drawn = drawing.draw(rng, 20_000)
    error = np.sqrt(kept.var(axis=0) / len(kept) + drawn.var(axis=0) / len(drawn))
    assert (np.abs(drawn.mean(axis=0) - kept.mean(axis=0)) < 4 * error).all()


def test_mutants_and_children_in_a_narrow_window_are_like_their_parents():
    middle = np.median(LARGE_COST(LARGE.draw(np.random.default_rng(5), 9999))["flops"])
    constraint = Constraint("flops", middle, middle * 1.0005)
    drawing, rng = FeasibleSpace(LARGE, LARGE_COST, [constraint]), np.random.default_rng(0)
    assert drawing.method == "tables"
    parents = drawing.draw(rng, 2000)
    for bred in (parents, drawing.mutated(parents, 0.1, rng), drawing.crossed(parents, parents[::-1], rng)):
        assert (constraint.violation(drawing.cost(bred)["flops"]) == 0).all()
    mutants, children = drawing.mutated(parents, 0.1, rng), drawing.crossed(parents, parents[::-1], rng)
    free = LARGE.mutated(parents, 0.1, rng)
    assert (mutants != parents).sum() < 2 * (free != parents).sum()
    assert (mutants != parents).any(axis=1).mean() > 0.25
    assert ((children == parents) | (children == parents[::-1])).mean() > 0.9
    assert ((children == parents).mean(axis=1)[: len(parents) // 2]).mean() == pytest.approx(0.55, abs=0.1)


def test_what_tables_cannot_say_is_found_by_a_walk_and_said(monkeypatch):
    middle = np.median(LARGE_COST(LARGE.draw(np.random.default_rng(5), 9999))["flops"])
    monkeypatch.setattr(windows, "_MOST_MOVES", 10)
    drawing = FeasibleSpace(LARGE, LARGE_COST, [Constraint("flops", middle, middle * 1.0005)])
    assert drawing.method == "walk"
    codes = drawing.draw(np.random.default_rng(0), 3)
    assert (np.abs(drawing.cost(codes)["flops"] - middle * 1.00025) <= middle * 0.00026).all()


def test_what_costs_nothing_is_drawn_as_ever_in_a_narrow_window():
    space = SearchSpace([*LARGE.variables, Float("lr", 0.1, 1.0), Int("seed", 0, 9)])
    middle = np.median(LARGE_COST(LARGE.draw(np.random.default_rng(5), 9999))["flops"])
    drawing = FeasibleSpace(space, LARGE_COST.on(space), [Constraint("flops", middle, middle * 1.001)])
    assert drawing.method == "tables"
    codes = drawing.draw(np.random.default_rng(0), 4000)
    assert codes[:, -2].mean() == pytest.approx(0.5, abs=0.03)
    assert np.bincount(codes[:, -1].astype(int), minlength=10) == pytest.approx(400, abs=80)
    assert (drawing.mutated(codes, 0.0, np.random.default_rng(1)) == codes).all()
