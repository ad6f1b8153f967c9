"""Archs with a structure, against SWEEP.md's sections 5 and 7, enumeration, and pycls's rules drawn one by one."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from corenas.constrained import FeasibleSpace
from corenas.contracts import Problem
from corenas.cost import Cost
from corenas.errors import UserError
from corenas.objectives import Constraint, Objective, Objectives
from corenas.plugins import load_catalogue
from corenas.space import SearchSpace
from corenas_tool_sweep.stratified import Stratified
from corenas_tool_sweep.structured import RegNet, Structure, chained, regnet_stages

RNG = np.random.default_rng
STAGE = {"width": {"type": "int", "low": 8, "high": 512, "step": 8}, "depth": {"type": "int", "low": 1, "high": 24}}
ANYNET = SearchSpace.from_table({"stages": [STAGE] * 4})
PUBLISHED = [
    # (w_a, w_0, w_m, depth, group width), widths, depths, group widths, flops, params, activations (RegNetX)
    ((36.44, 24, 2.49, 13, 8), [24, 56, 152, 368], [1, 1, 4, 7], [8] * 4, 199_040_872, 2_684_792, 2_164_056),
    ((24.48, 24, 2.54, 22, 16), [32, 64, 160, 384], [1, 2, 7, 12], [16] * 4, 397_678_568, 5_157_512, 3_143_272),
]


# -- RegNet -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("numbers", "widths", "depths", "groups", "flops", "params", "activations"), PUBLISHED)
def test_stages_and_their_costs_are_those_of_published_regnets(
    numbers, widths, depths, groups, flops, params, activations
):
    w_a, w_0, w_m, depth, group = numbers
    stages = regnet_stages(depth, w_0, w_a, w_m, group)
    assert (stages.widths, stages.depths, stages.group_widths) == (widths, depths, groups)

    rows = zip(stages.widths, stages.depths, stages.group_widths, strict=True)
    table = {
        "stem": {"width": 32, "kernel": 3, "stride": 2, "pool": False},
        "stages": [
            {"bottleneck": {"width": w, "depth": d, "ratio": 1, "groups": w // g}, "stride": 2} for w, d, g in rows
        ],
    }
    space = SearchSpace.from_table(table)
    resnet = load_catalogue().components["backbones", "resnet"].cls
    with torch.device("meta"):
        model = Whole(resnet().build(space))
    found = Cost(model, space, torch.empty(1, 3, 224, 224)).of([space.default()])[0]
    # The classifier, and pycls counts its bias as flops.
    assert found["flops"] + widths[-1] * 1000 + 1000 == flops
    assert found["params"] + widths[-1] * 1000 + 1000 == params
    assert found["activations"] + 1000 == activations


class Whole(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, x):
        return self.backbone.features(x)[-1]


def test_the_best_of_pycls_on_cifar_has_its_stages_and_skipped_ones_are_none():
    stages = regnet_stages(12, 96, 19.5, 2.942, 8)
    assert (stages.widths, stages.depths) == ([96, 280], [4, 8])
    assert regnet_stages(12, 8, 256, 2.0, 8) is None  # from 8 to 264 wide, over several powers of two
    narrow = regnet_stages(4, 24, 0.1, 2.0, 64)  # a group is no wider than what it is of
    assert (narrow.widths, narrow.depths, narrow.group_widths) == ([24], [4], [24])
    assert regnet_stages(4, 24, 0.1, 2.0, 16, bottleneck=0.5).widths == [24]  # of 12 inner channels a group has 12
    assert regnet_stages(4, 48, 0.1, 2.0, 16, bottleneck=0.5).widths == [64]  # 24 / 16 is 1.5, halves go to even


def test_numbers_are_drawn_in_the_ranges_and_steps_of_pycls():
    variables = {variable.key: variable for variable in RegNet().variables}
    assert variables["depth"].choices == tuple(range(12, 29))
    for key, low, high, step in (("w_0", 8, 256, 8), ("w_a", 8, 256, 0.1), ("w_m", 2, 3, 0.001)):
        choices, likely = variables[key].choices, variables[key].chances
        assert (choices[0], choices[-1], len(choices)) == (low, high, round((high - low) / step) + 1)
        below = low - min(step, low / 2)
        expected = [math.log(v / max(below, v - step)) / math.log(high / below) for v in choices]
        assert likely == pytest.approx(expected, abs=1e-9)  # SWEEP.md, section 5: log_uniform
    assert variables["group_width"].choices == (8, *range(16, 129, 8))
    assert variables["bottleneck"].choices == (1,)


def test_drawn_archs_are_regnets_of_their_numbers_and_as_frequent_as_by_rejection():
    variables = RegNet().variables
    codes, numbers = Structure(regnet=RegNet()).draw(ANYNET, RNG(0), 20_000)
    for arch, own in zip(ANYNET.decode(codes), numbers, strict=True):
        stages = regnet_stages(int(own["depth"]), own["w_0"], own["w_a"], own["w_m"], int(own["group_width"]))
        assert [arch[f"stages.{i}.width"] for i in range(4)] == stages.widths
        assert [arch[f"stages.{i}.depth"] for i in range(4)] == stages.depths
        assert sorted(stages.widths) == stages.widths
    # one by one, by the page's formulas: u_j, s_j, w_j; runs of equal w_j are stages
    fits, rng, n = 0, RNG(1), 4_000
    columns = [[v.choices[code] for code in v.draw(rng, n)] for v in variables]
    for depth, w_0, w_a, w_m, group, _ in zip(*columns, strict=True):
        powers = [round(math.log((w_0 + w_a * j) / w_0) / math.log(w_m)) for j in range(depth)]
        widths = [8 * round(w_0 * w_m**s / 8) for s in powers]
        runs = [(w, len([*same])) for w, same in itertools.groupby(widths)]
        if len(runs) == 4 and powers[-1] == 3:
            groups = [min(group, w) for w, _ in runs]
            fitted = [max(g, g * round(w / g)) for (w, _), g in zip(runs, groups, strict=True)]
            fits += max(fitted) <= 512 and max(d for _, d in runs) <= 24
    share, other = len(codes) / 20_000, fits / n
    assert abs(share - other) < 4 * math.sqrt(other * (1 - other) * (1 / n + 1 / 20_000))
    assert share > 0.01


# -- ties -------------------------------------------------------------------------------------------------------------


def frequencies(space, keys, codes):
    columns = [space.keys.index(key) for key in keys]
    rows = [
        tuple(space.variables[c].choices[code] for c, code in zip(columns, row, strict=True))
        for row in codes[:, columns].tolist()
    ]
    return {row: rows.count(row) for row in {*rows}}


@pytest.mark.parametrize(("name", "holds"), [
    ("equal", lambda row: len({*row}) == 1),
    ("non_decreasing", lambda row: [*row] == sorted(row)),
])  # fmt: skip
def test_ties_hold_and_are_distributed_as_by_rejection(name, holds):
    """Chances by enumeration: independent draws, those thrown away where it does not hold."""
    space = SearchSpace.from_table({
        "s": [
            {"w": [8, 16, 32], "d": [1, 2]},
            {"w": [16, 8, 64], "d": [1, 2]},
            {"w": {"type": "int", "low": 8, "high": 32, "step": 8, "distribution": "log"}, "d": [1, 2]},
        ]
    })  # fmt: skip
    keys = [f"s.{i}.w" for i in range(3)]
    variables = [space[key] for key in keys]
    chances = {}
    for row in itertools.product(*(zip(v.choices, v.chances, strict=True) for v in variables)):
        values = tuple(value for value, _ in row)
        if holds(values):
            chances[values] = math.prod(chance for _, chance in row)
    n = 20_000
    codes, _ = Structure(**{name: ("s.*.w",)}).draw(space, RNG(0), n)
    found = frequencies(space, keys, codes)
    assert found.keys() == chances.keys()
    expected = [n * chance / sum(chances.values()) for chance in chances.values()]
    assert stats.chisquare([found[row] for row in chances], expected).pvalue > 0.001
    assert {*frequencies(space, ["s.0.d", "s.1.d"], codes)} == {*itertools.product([1, 2], [1, 2])}  # free as before


def test_tuples_that_never_fall_are_uniform_which_sorted_draws_are_not():
    chain = [SearchSpace.from_table({"w": [1, 2, 3]})["w"]] * 4
    rows = chained(chain, True, RNG(0), 15_000)
    _, counts = np.unique(rows, axis=0, return_counts=True)
    assert len(counts) == math.comb(3 + 4 - 1, 4)
    assert stats.chisquare(counts).pvalue > 0.001
    ordered = np.sort(RNG(0).integers(3, size=(15_000, 4)), 1)
    assert stats.chisquare(np.unique(ordered, axis=0, return_counts=True)[1]).pvalue < 1e-10


def test_ties_hold_within_constraints_on_cost():
    def cost(codes):
        return {"flops": np.asarray(codes).sum(1)}

    space = SearchSpace.from_table({"s": [{"w": [1, 2, 3, 4]} for _ in range(3)]})
    cost.space, cost.on = space, lambda space: cost
    cost.of = lambda archs: [{"flops": int(row.sum())} for row in space.encode(archs)]
    inside = FeasibleSpace(space, cost, [Constraint("flops", high=4)])
    codes, _ = Structure(non_decreasing=("s.*.w",)).draw(inside, RNG(0), 4_000)
    found = frequencies(space, [f"s.{i}.w" for i in range(3)], codes)
    wanted = {row for row in itertools.combinations_with_replacement([1, 2, 3, 4], 3) if sum(row) - 3 <= 4}
    assert found.keys() == wanted
    assert stats.chisquare([*found.values()]).pvalue > 0.001


@pytest.mark.parametrize(("options", "says"), [
    ({"equal": ("w*",)}, "no variable is called 'w*'"),
    ({"equal": ("s.*.w",), "non_decreasing": ("s.1.*",)}, "'s.1.w' is tied by another pattern too"),
    ({"non_decreasing": ("s.*.op",)}, "expected variables of lists of numbers"),
    ({"equal": ("s.*.k",)}, "can have no choices that hold together"),
    ({"regnet": RegNet(widths="s.*.w", depths="s.0.k")}, "one variable of each for every stage, found 2 widths"),
    ({"regnet": RegNet(widths="s.*.w", depths="s.*.k", w_0=(9, 20))}, "steps of 8 never ends"),
])  # fmt: skip
def test_structures_that_a_space_cannot_have_are_told(options, says):
    space = SearchSpace.from_table(
        {"s": [{"w": [8, 16], "op": ["a", "b"], "k": [1]}, {"w": [8], "op": ["a"], "k": [3]}]}
    )
    with pytest.raises(UserError) as raised:
        Structure(**options).draw(space, RNG(0), 10)
    assert says in str(raised.value)


# -- the searcher -----------------------------------------------------------------------------------------------------


def test_the_searcher_keeps_numbers_and_acceptance_with_each_trial():
    problem = Problem(ANYNET, Objectives((Objective("top1"),)), 20)
    search = Stratified(bins=1, pool=200, regnet=RegNet()).start(problem, RNG(0))
    asked = search.ask(20)
    assert len({proposal.arch for proposal in asked}) == 20
    assert {*asked[0].extra["variables"]} == {"depth", "w_0", "w_a", "w_m", "group_width", "bottleneck"}
    assert 0 < asked[0].extra["accepted"] < 1
    again = Stratified(bins=1, pool=200, regnet=RegNet()).start(problem, RNG(5))
    again.load_state_dict(search.state_dict())
    assert again.ask(5) == search.ask(5)
    empty = Problem(SearchSpace.from_table({"stages": [{"width": [4], "depth": [1]}]}), problem.objectives, 5)
    with pytest.raises(UserError) as raised:
        Stratified(bins=1, regnet=RegNet()).start(empty, RNG(0)).ask(1)
    assert "none has the structure" in str(raised.value)
