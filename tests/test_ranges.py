"""Chances of numbers against those of pycls's samplers, worked out and measured by running them (SWEEP.md, 5)."""

import itertools
import math
import re

import numpy as np
import pytest
from scipy import stats

from corenas.errors import UserError
from corenas.ranges import DISTRIBUTIONS, chances
from corenas.space import SearchSpace
from corenas.variables import Float, Int

SIXTH = pytest.approx(1 / 6)


@pytest.mark.parametrize(("bounds", "expected"), [
    ((32, 64, 8), {32: 0.2933, 40: 0.2275, 48: 0.1859, 56: 0.1572, 64: 0.1361}),
    ((64, 256, 64), {64: 1 / 3, 128: 1 / 3, 192: 0.1950, 256: 0.1383}),
])  # fmt: skip
def test_logarithms_are_uniform(bounds, expected):
    assert chances("log", *bounds) == pytest.approx(expected, abs=5e-5)


def test_of_logarithms_each_doubling_is_as_likely():
    found = chances("log", 1, 32, 1)
    ends = [0, 1, 2, 4, 8, 16, 32]
    for low, high in itertools.pairwise(ends):
        assert sum(chance for number, chance in found.items() if low < number <= high) == SIXTH


def test_powers_of_two_are_as_likely_and_those_above_the_step_are_drawn_again():
    assert chances("power2", 2, 64, 1) == dict.fromkeys([2, 4, 8, 16, 32, 64], SIXTH)
    found = chances("power2_or_log", 1, 32, 8)
    assert [found[n] for n in (1, 2, 4, 8, 16)] == [SIXTH] * 5
    assert found[24] == pytest.approx(0.0975, abs=5e-5)
    assert found[32] == pytest.approx(0.0692, abs=5e-5)


def test_ends_of_a_normal_get_half_a_cell():
    # SWEEP.md's figures were measured; these are the same to what 10,000 draws leave open.
    assert [*chances("normal", 0, 12, 3).values()] == pytest.approx([0.011, 0.213, 0.552, 0.213, 0.011], abs=0.005)
    logs = chances("log_normal", 8, 512, 8)
    assert max(logs, key=logs.get) in range(32, 72, 8)  # the middle of the logarithms is 64, cells grow


def sampled(name, low, high, step, rng, n):
    """What pycls's rules give, drawn one by one."""
    for _ in range(n):
        if name == "log":
            below = low - min(step, low / 2)
            yield math.ceil(below * (high / below) ** (1 - rng.random()) / step - 1e-9) * step
        elif name == "normal":
            x = math.inf
            while not low <= x <= high:
                x = rng.normal((low + high) / 2, (high - low) / 6)
            yield round(x / step) * step
        else:
            x = math.inf
            while not math.log(low) <= x <= math.log(high):
                x = rng.normal(math.log(low * high) / 2, math.log(high / low) / 6)
            yield round(math.exp(x) / step) * step


@pytest.mark.parametrize("name", ["log", "normal", "log_normal"])
def test_chances_are_those_of_draws_by_the_rule(name):
    rng = np.random.default_rng(0)
    drawn = [*sampled(name, 8, 64, 8, rng, 20_000)]
    for number, chance in chances(name, 8, 64, 8).items():
        assert drawn.count(number) / len(drawn) == pytest.approx(chance, abs=5 * math.sqrt(chance / 20_000))


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_variable_is_drawn_by_its_distribution_one_by_one_or_many_at_once(name):
    variable = Int("w", 8, 64, 8, distribution=name)
    expected = chances(name, 8, 64, 8)
    assert sum(expected.values()) == pytest.approx(1)
    assert variable.choices == (*expected,)
    assert variable.default == 64
    found = np.bincount(variable.draw(np.random.default_rng(0), 20_000)) / 20_000
    assert found == pytest.approx([*expected.values()], abs=0.02)
    space = SearchSpace.from_table({
        "w": {"type": "int", "low": 8, "high": 64, "step": 8, "distribution": name},
        "d": [1, 2],
        "v": {"type": "int", "low": 8, "high": 64, "step": 8},
    })  # fmt: skip
    assert SearchSpace.from_table(space.to_table()).variables == space.variables
    one, many = np.random.default_rng(3), np.random.default_rng(3)
    assert [space.sample(one) for _ in range(20)] == [space.decode(space.draw(many, 1))[0] for _ in range(20)]


@pytest.mark.parametrize(("name", "bounds", "says"), [
    ("log", (0, 8, 4), "above 0"), ("log", (6, 12, 4), "multiples"), ("power2", (3, 8, 1), "powers of 2"),
    ("power2_or_log", (1, 32, 6), "power of 2"), ("normal", (1, 12, 3), "multiples"),
    ("log_normal", (0, 4, 1), "above 0"),
])  # fmt: skip
def test_ranges_that_a_distribution_cannot_have_are_refused(name, bounds, says):
    with pytest.raises(ValueError) as raised:
        chances(name, *bounds)
    assert re.search(says, str(raised.value))


def test_numbers_with_steps_on_a_log_scale_round_up_to_one():
    """The same chances as whole numbers of steps: q.1 of [8, 256] is q1 of [80, 2560] (SWEEP.md, section 5)."""
    variable = Float("w_a", 8, 256, log=True, step=0.1)
    assert variable.choices[:3] == (8, 8.1, 8.2)
    assert not variable.continuous
    assert variable.chances == pytest.approx([*chances("log", 80, 2560, 1).values()])
    share = np.mean(variable.draw(np.random.default_rng(0), 20_000) < variable.code_of(45.2))
    assert share == pytest.approx(math.log(45.2 / 8) / math.log(256 / 8), abs=0.015)  # about a half
    with pytest.raises(ValueError, match="multiples of the step"):
        Float("w", 0.25, 1.05, log=True, step=0.2)


def test_a_list_is_so_many_independent_draws_of_one_item_and_may_nest():
    item = {"type": "int", "low": 32, "high": 64, "step": 8, "distribution": "log"}
    space = SearchSpace.from_table({
        "w": {"type": "list", "length": 2, "item": item},
        "n": {"type": "list", "length": 2, "item": {"type": "list", "length": 2, "item": [1, 2]}},
        "stages": {"type": "list", "length": 2, "item": {"width": 3}},
    })  # fmt: skip
    assert space.keys == ("w.0", "w.1", "n.0.0", "n.0.1", "n.1.0", "n.1.1")
    assert [stage["width"].number for stage in space.tree["stages"]] == [3, 3]
    assert SearchSpace.from_table(space.to_table()).variables == space.variables
    codes, n = space.draw(np.random.default_rng(0), 20_000), 20_000
    likely = np.array([0.2933, 0.2275, 0.1859, 0.1572, 0.1361])
    pairs = np.bincount(codes[:, 0] * 5 + codes[:, 1], minlength=25)
    assert stats.chisquare(pairs, n * np.outer(likely, likely).ravel() / likely.sum() ** 2).pvalue > 0.001
    nested = np.bincount(codes[:, 2:] @ [8, 4, 2, 1], minlength=16)
    assert stats.chisquare(nested).pvalue > 0.001


@pytest.mark.parametrize(("table", "says"), [
    ({"type": "list", "length": 0, "item": [1]}, "w.length: expected a whole number from 1"),
    ({"type": "list", "length": True, "item": [1]}, "w.length: expected a whole number"),
    ({"type": "list", "length": 2}, "w.item: expected what each"),
    ({"type": "list", "length": 2, "item": [1], "items": 3}, "w.items: unknown key"),
    ({"type": "list", "length": 2, "item": []}, "at least one choice"),
])  # fmt: skip
def test_lists_that_are_none_are_told(table, says):
    with pytest.raises(UserError, match=re.escape(says)):
        SearchSpace.from_table({"w": table})
