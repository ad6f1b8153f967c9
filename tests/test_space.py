"""The search space: reading, drawing, counting, narrowing, writing."""

import collections
import copy
import itertools
import json
import math
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
import tomli
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from corenas.errors import UserError
from corenas.space import Arch, SearchSpace, flatten
from corenas.value import Constant
from corenas.variables import Categorical, Condition, Float, Int, Variable

STAGES = """
resolution = { type = "int", low = 128, high = 224, step = 32 }
op = ["conv", "pool"]

[stem]
width = 16
se = [true, false]

[[stages]]
width = [16, 24]
depth = [1, 2, 3]
act = "relu"
block.kernel = [3, 5]
block.ratio = { type = "float", low = 0.5, high = 1.5, step = 0.5, default = 1.0 }

[[stages]]
depth = 2
blocks = [{ kernel = 3 }, { kernel = [3, 7] }]
groups = { type = "categorical", choices = [1, 2], default = 1, when = { "stages.0.width" = 16 } }
"""

OFA = """
resolution = { type = "int", low = 128, high = 224, step = 4 }
""" + "".join("[[stages]]\ndepth = [2, 3, 4]\nblock.kernel = [3, 5, 7]\nblock.expand = [3, 4, 6]\n" for _ in range(5))


def read(text):
    return SearchSpace.from_table(tomli.loads(text))


def again(space):
    return SearchSpace.from_table(tomli.loads(tomli_w.dumps(space.to_table())))


def rng(seed=0):
    return np.random.default_rng(seed)


def brute_force(space):
    """All distinct archs, by trying every combination of choices and the conditions as they are defined."""
    found = set()
    for row in itertools.product(*(v.choices for v in space.variables)):
        choices, active = dict(zip(space.keys, row, strict=True)), {}
        for v in space.variables:
            active[v.key] = all(active[c.key] and choices[c.key] in c.choices for c in v.when)
            if not active[v.key]:
                choices[v.key] = v.default
        found.add(tuple(choices.items()))
    return {Arch(dict(items)) for items in found}


@st.composite
def spaces(draw, most=5):
    variables = []
    for i in range(draw(st.integers(1, most))):
        size = draw(st.integers(1, 3))
        when = []
        for parent in draw(st.lists(st.sampled_from(variables), max_size=2, unique=True)) if variables else []:
            when.append(Condition(parent.key, frozenset(draw(st.sets(st.sampled_from(list(parent.choices)))))))
        kind = draw(st.sampled_from(["number", "string", "int", "float", "bool"]))
        if kind == "int":
            low = draw(st.integers(-3, 3))
            variables.append(Int(f"v{i}", low, low + 2 * (size - 1), 2, default=low, when=when))
        elif kind == "float":
            variables.append(Float(f"v{i}", 0, 0.1 * (size - 1), step=0.1, when=when))
        elif kind == "bool":
            variables.append(Categorical(f"v{i}", [True, False][:size], when=when))
        else:
            choices = ["c", "a", "b"][:size] if kind == "string" else [3, 7, 5][:size]
            default = draw(st.sampled_from([None, *choices]))
            variables.append(Categorical(f"v{i}", choices, default=default, when=when))
    return SearchSpace(variables)


# -- reading ----------------------------------------------------------------------------------------------------------


def test_a_number_is_fixed_a_list_is_a_choice_and_a_table_is_typed():
    space = read("""
        a = 3
        b = [3, 5]
        c = ["x", "y"]
        d = [true, false]
        e = { type = "int", low = 1, high = 5, step = 2 }
        f = { type = "float", low = 1, high = 2, log = true }
        g = { type = "categorical", choices = [1, 2], default = 1 }
    """)
    assert space.variables == (
        Categorical("b", (3, 5), default=5), Categorical("c", ("x", "y"), default="x"), Categorical("d", (True, False)),
        Int("e", 1, 5, 2, default=5), Float("f", 1.0, 2.0, True), Categorical("g", (1, 2), default=1),
    )  # fmt: skip
    assert space.tree["a"] == Constant(3)
    assert space.tree["b"] == Variable("b", (3, 5))
    assert space.tree["e"] is space.value("e") is space["e"]
    assert space["e"].possible == (1, 3, 5)
    assert space["f"].possible == (1.0, 2.0), "the bounds stand for all numbers between"


def test_each_block_that_the_depth_reaches_has_variables_of_its_own():
    space = read(STAGES)
    assert space.keys == (
        "resolution", "op", "stem.se", "stages.0.width", "stages.0.depth",
        "stages.0.blocks.0.kernel", "stages.0.blocks.0.ratio", "stages.0.blocks.1.kernel", "stages.0.blocks.1.ratio",
        "stages.0.blocks.2.kernel", "stages.0.blocks.2.ratio", "stages.1.groups", "stages.1.blocks.1.kernel",
    )  # fmt: skip
    assert space["stages.0.blocks.0.kernel"].when == ()
    assert space["stages.0.blocks.2.kernel"].when == (Condition("stages.0.depth", frozenset({3})),)
    assert space["stages.1.groups"].when == (Condition("stages.0.width", frozenset({16})),)
    assert space.tree["stages"][1]["blocks"][0]["kernel"] == Constant(3)
    assert space.tree["stages"][0]["act"] == "relu"
    assert set(space) == brute_force(space)


def test_a_condition_in_a_block_speaks_of_the_same_block():
    space = read('depth = [1, 2]\n[block]\nop = ["conv", "pool"]\n'
                 'kernel = { type = "categorical", choices = [3, 5], when = { op = "conv" } }')  # fmt: skip
    assert space["blocks.1.kernel"].when == (
        Condition("depth", frozenset({2})), Condition("blocks.1.op", frozenset({"conv"})),
    )  # fmt: skip
    assert space.size == len(brute_force(space)) == 3 + 9


def test_blocks_within_blocks_are_active_where_both_depths_reach():
    space = read("depth = [0, 1, 2]\nblock.depth = [1, 2]\nblock.block.kernel = [3, 5]")
    assert space["blocks.1.blocks.1.kernel"].when == (
        Condition("depth", frozenset({2})), Condition("blocks.1.depth", frozenset({2})),
    )  # fmt: skip
    assert space.size == len(brute_force(space)) == 1 + 6 + 36
    assert again(space).variables == space.variables


def test_blocks_of_a_stage_that_is_not_there_are_inactive_too():
    space = read('op = ["conv", "none"]\ndepth = { type = "int", low = 1, high = 2, when = { op = "conv" } }\n'
                 "block.kernel = [3, 5]")  # fmt: skip
    assert not space.active(space.encode([space.arch({"op": "none"})]))[0, 2:].any()
    assert space.size == len(brute_force(space)) == 1 + 2 + 4
    assert again(space).variables == space.variables


MISTAKES = """
a = []
b = [1, "x"]
c = [1, 1]
d = 2024-01-01
e = { type = "integer", low = 1 }
f = { type = "int", low = 1, high = 2.5, stepp = 1 }
g = { type = "float", low = 1 }
h = { type = "int", low = 1, high = 4, step = 2 }
i = { type = "categorical", choices = [1, 2], default = 3 }
j = { type = "float", low = 0, high = 1, log = true }
k = { type = "int", low = 1, high = 2, when = { c = 1, bb = 2 } }
l = [1, nan]
m = { type = "float", low = 0, high = inf }
n = { type = "float", low = 0, high = 1, log = "yes" }
o = { type = "int", low = true, high = 2 }
p = { type = "categorical", choices = [1, 2], default = true }
q = [3, 5]
r = { type = "int", low = 1, high = 2, when = { q = [3, 4] } }
t = { type = "int", low = 1, high = 2, when = 3 }
u = { type = "int", low = 0, high = 99999999999999999999999 }
v = { type = "float", low = 0, high = 1, step = 1e-300 }
w = { type = "float", low = 0, high = 1, step = 0.3 }
x = { type = "float", low = 0, high = 1, step = inf }

[[stages]]
block.kernel = [3, 3]
[[stages]]
depth = [1, 2]
blocks = [{ kernel = [] }]
[[stages]]
depth = [1, true]
block = { kernel = [3, "x"] }
[[stages]]
depth = [1, 2]
block = 3
[[stages]]
depth = [1.5, 2]
block.kernel = [3, 5]
[[stages]]
depth = 1
block.kernel = [3, 5]
blocks = []
[[stages]]
depth = 99999999999999999999999
block.kernel = [3, 5]
[[stages]]
depth = 1
blocks = [{ kernel = 3 }, { kernel = 5 }]
"""


def test_all_mistakes_are_told_at_once_each_with_its_key():
    with pytest.raises(UserError) as raised:
        read(MISTAKES)
    keys = [fault.dotted for fault in raised.value.faults]
    assert sorted(keys) == sorted([
        "a", "b", "c", "d", "e.type", "f.high", "f.stepp", "g.high", "h", "i", "j", "k.when.c", "k.when.bb", "l", "m",
        "n.log", "o.low", "p", "r.when.q", "t.when", "u", "v", "w", "x",
        "stages[0]", "stages[0].block.kernel", "stages[1].blocks", "stages[1].blocks[0].kernel", "stages[2].depth",
        "stages[2].block.kernel", "stages[3]", "stages[4]", "stages[5]", "stages[6].depth", "stages[7].blocks",
    ])  # fmt: skip
    text = str(raised.value)
    assert "did you mean 'int'? types of variables: categorical, float, int" in text
    assert "did you mean 'step'?" in text


def test_a_condition_needs_an_earlier_variable_with_choices():
    with pytest.raises(UserError, match="condition on 'b', which is no earlier variable"):
        SearchSpace([Int("a", 0, 1, when=[Condition("b", frozenset({1}))]), Int("b", 0, 1)])
    with pytest.raises(UserError, match="condition on 'a', which has no list of choices"):
        SearchSpace([Float("a", 0, 1), Int("b", 0, 1, when=[Condition("a", frozenset({1}))])])
    with pytest.raises(UserError, match=r"b\.when\.a: condition on 'a', which has no list of choices"):
        read('a = { type = "float", low = 0, high = 1 }\nb = { type = "int", low = 0, high = 1, when = { a = 1 } }')
    with pytest.raises(UserError, match="a: this variable stands twice"):
        SearchSpace([Int("a", 0, 1), Int("a", 0, 2)])
    with pytest.raises(UserError, match=r"a\.b: this variable stands twice"):
        SearchSpace.from_table({"a": {"b": [1, 2]}, "a.b": [1, 2]})


KEYS = ["type", "choices", "low", "high", "step", "default", "log", "when", "depth", "block", "blocks", "a"]
hostile = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.sampled_from(["int", "float", "x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(KEYS), inner, max_size=5),
    max_leaves=12,
)  # fmt: skip


@given(hostile)
@settings(derandomize=True, deadline=None, max_examples=600)
def test_whatever_stands_in_the_file_a_space_or_a_user_error_comes_of_it(table):
    try:
        space = SearchSpace.from_table(table)
    except UserError:
        return
    space.draw(rng(), 3)
    assert SearchSpace.from_table(space.to_table()).variables == space.variables


# -- variables --------------------------------------------------------------------------------------------------------


def test_steps_of_a_float_carry_no_noise_and_end_on_the_bound():
    assert Float("x", 0.1, 0.7, step=0.1).choices == (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
    assert Float("x", 1, 2, step=0.25).choices == (1.0, 1.25, 1.5, 1.75, 2.0)
    assert Float("x", 3, 3, step=1).choices == (3.0,)
    assert Float("x", 1e12, 1e12 + 1, step=0.5).choices == (1e12, 1e12 + 0.5, 1e12 + 1)
    with pytest.raises(ValueError, match="lost beside"):
        Float("x", 1e15, 1e15 + 1, step=0.01)
    with pytest.raises(ValueError, match="expected finite numbers"):
        Float("x", 1, math.inf)


def test_a_continuous_float_is_drawn_between_its_bounds_on_its_scale():
    space = SearchSpace([Float("x", 1, 3), Float("y", 1e-4, 1e2, log=True), Int("n", 1, 3)])
    archs = space.decode(space.draw(rng(), 4000))
    x, y = (np.array([a[k] for a in archs]) for k in "xy")
    assert 1 <= x.min() < 1.01 < 2.99 < x.max() <= 3
    assert np.log10(y).mean() == pytest.approx(-1, abs=0.1)
    assert np.histogram(np.log10(y), 6, (-4, 2))[0] == pytest.approx(4000 / 6, rel=0.15)
    assert all(type(a["n"]) is int and type(a["x"]) is float for a in archs)
    for again, arch in zip(space.decode(space.encode(archs)), archs, strict=True):
        assert dict(again) == pytest.approx(dict(arch), rel=1e-12)
    for error in (lambda: space.size, lambda: [*space], lambda: space.sample_uniform_archs(rng())):
        with pytest.raises(TypeError, match="x is continuous"):
            error()


def test_numbers_that_are_equal_are_one_choice_but_truth_values_are_no_numbers():
    space = SearchSpace([Categorical("k", (3, 5)), Categorical("se", (True, False)), Int("n", 0, 1)])
    assert space.arch({"k": 3.0}) == space.arch({"k": 3})
    assert type(space.arch({"k": 3.0})["k"]) is int
    for key, choice in [("se", 1), ("n", True), ("k", "3"), ("k", math.nan), ("k", None), ("n", 0.5), ("n", 10**400)]:
        with pytest.raises(UserError):
            space.arch({key: choice})


# -- archs ------------------------------------------------------------------------------------------------------------


def test_an_arch_is_read_from_nested_tables_lists_and_dotted_keys():
    space = read(STAGES)
    nested = {"op": "pool", "stages": [{"depth": 2, "blocks": [{}, {"kernel": 3}]}, {}]}
    dotted = {"op": "pool", "stages.0.depth": 2, "stages.0.blocks.1.kernel": 3}
    mixed = {"op": "pool", "stages.0": {"depth": 2, "blocks.1.kernel": 3}}
    assert space.arch(nested) == space.arch(dotted) == space.arch(mixed)
    assert space.arch(dict(space.arch(nested))) == space.arch(nested)
    assert space.arch(nested) in space
    assert Arch(dotted) not in space
    assert flatten({"a": [{"b": 1}, 2], "c": {"d": {"e": 3}}, "f": {}}) == {"a.0.b": 1, "a.1": 2, "c.d.e": 3, "f": {}}


def test_every_mistake_of_an_arch_is_told():
    with pytest.raises(UserError) as raised:
        read(STAGES).arch({"opp": "conv", "op": "cov", "stages": [{"depth": 4, "width": [16]}], "stem.se": []})
    faults = {fault.dotted: str(fault) for fault in raised.value.faults}
    assert set(faults) == {"opp", "op", "stages.0.depth", "stages.0.width.0", "stem.se"}
    assert "did you mean 'op'?" in faults["opp"]
    assert "'cov' is none of the choices conv, pool" in faults["op"]


def test_what_is_inactive_holds_its_default_so_equal_subnets_are_equal_archs():
    space = read(STAGES)
    one, other = (space.arch({"stages.0.depth": 1, "stages.0.blocks.2.kernel": k}) for k in (3, 5))
    assert one == other
    assert hash(one) == hash(other)
    assert one.digest == other.digest
    assert one != space.arch({"stages.0.depth": 3})
    assert space.default()["stages.1.groups"] == 1
    assert space.smallest()["resolution"] == 128
    assert space.largest()["stages.0.depth"] == 3
    assert space.largest()["op"] == "conv"


def test_an_arch_is_immutable_and_survives_json_toml_pickle_and_copies():
    space = read(STAGES)
    arch = space.sample(rng())
    for twin in (
        space.arch(json.loads(json.dumps(dict(arch)))), space.arch(tomli.loads(tomli_w.dumps(dict(arch)))),
        pickle.loads(pickle.dumps(arch)), copy.deepcopy(arch), copy.copy(arch), Arch(dict([*arch.items()][::-1])),
    ):  # fmt: skip
        assert twin == arch
        assert hash(twin) == hash(arch)
        assert twin.digest == arch.digest
    with pytest.raises(TypeError):
        arch["op"] = "pool"
    assert arch != dict(arch)
    assert repr(arch).startswith("Arch({'resolution': ")


@given(spaces())
@settings(derandomize=True, deadline=None, max_examples=80)
def test_codes_and_archs_are_inverse_and_canonical(space):
    codes = space.draw(rng(), 20)
    archs = space.decode(codes)
    assert (space.encode(archs) == codes).all()
    assert (space.canonical(codes) == codes).all()
    assert all(space.arch(arch) == arch for arch in archs)
    assert space.encode([]).shape == (0, len(space.keys))


def test_a_hundred_thousand_archs_are_encoded_in_well_under_a_second():
    space = read(OFA)
    codes = space.draw(rng(), 100_000)
    archs = space.decode(codes)
    start = time.process_time()  # a loaded machine takes longer, not more of it
    encoded = space.encode(archs)
    assert time.process_time() - start < 4, "0.25 s on the machine it was written on"
    assert (encoded == codes).all()


# -- counting ---------------------------------------------------------------------------------------------------------


@given(spaces(6))
@settings(derandomize=True, deadline=None, max_examples=150)
def test_the_size_is_what_enumeration_finds(space):
    expected = brute_force(space)
    listed = [*space]
    assert space.size == len(listed) == len(expected)
    assert set(listed) == expected


def test_the_size_of_once_for_alls_space_is_its_papers():
    # Cai et al. 2020, section 3.1: ((3*3)^2 + (3*3)^3 + (3*3)^4)^5, about 2e19, for each of 25 resolutions
    assert read(OFA).size == (9**2 + 9**3 + 9**4) ** 5 * 25


def test_long_chains_of_conditions_are_counted_at_once():
    chain = [Int("v0", 1, 3)]
    for i in range(1, 60):
        chain.append(Int(f"v{i}", 1, 3, when=[Condition(f"v{i - 1}", frozenset({1, 2}))]))
    # f(n): archs of the last n variables of the chain, given that the first of them is active
    f = 3
    for _ in range(59):
        f = 2 * f + 1
    assert SearchSpace(chain).size == f
    parents = [Int(f"p{i}", 0, 2) for i in range(30)]
    child = Int("c", 1, 5, when=[Condition(p.key, frozenset({2})) for p in parents])
    assert SearchSpace([*parents, child]).size == 3**30 - 1 + 5


# -- drawing ----------------------------------------------------------------------------------------------------------

NESTED = """
op = ["conv", "pool", "none"]
depth = { type = "int", low = 1, high = 3, when = { op = "conv" } }
block.kernel = [3, 5]
size = { type = "categorical", choices = [2, 3], when = { op = ["pool", "conv"], depth = [1, 2, 3] } }
"""


def chi_square(counts, expected):
    return sum((counts.get(k, 0) - e) ** 2 / e for k, e in expected.items())


def test_uniform_archs_come_up_equally_often():
    space = read(NESTED)
    archs = [*space]
    assert len(archs) == len(brute_force(space)) == 2 * (2 + 4 + 8) + 1 + 1
    generator = rng()
    counts = collections.Counter(space.sample_uniform_archs(generator) for _ in range(300 * len(archs)))
    assert set(counts) == set(archs)
    # 29 degrees of freedom: 58.3 is exceeded once in a thousand times
    assert chi_square(counts, dict.fromkeys(archs, 300)) < 58.3


@given(spaces())
@settings(derandomize=True, deadline=None, max_examples=30)
def test_uniform_archs_are_uniform_in_any_space(space):
    archs = brute_force(space)
    generator = rng()
    counts = collections.Counter(space.sample_uniform_archs(generator) for _ in range(40 * len(archs)))
    n = len(archs) - 1
    assert set(counts) <= archs
    assert chi_square(counts, dict.fromkeys(archs, 40)) <= n + 4.5 * math.sqrt(2 * n) + 10


def test_a_space_larger_than_any_float_is_drawn_from_too():
    root = Int("root", 0, 1)
    many = [Int(f"v{i}", 1, 9, when=[Condition("root", frozenset({1}))]) for i in range(600)]
    space = SearchSpace([root, *many])
    assert space.size == 9**600 + 1
    assert space.sample_uniform_archs(rng())["root"] == 1


@given(spaces(6), st.integers(0, 40))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_many_archs_are_drawn_as_one_variable_after_the_other(space, n):
    ours, theirs = rng(3), rng(3)
    codes = space.draw(ours, n)
    raw = [variable.draw(theirs, n) for variable in space.variables]
    assert (codes == space.canonical(np.array(raw).reshape(len(raw), n).T)).all()
    assert ours.bit_generator.state == theirs.bit_generator.state


@given(spaces(6))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_a_variable_is_active_where_its_parents_are_and_hold_what_its_conditions_name(space):
    codes = space.draw(rng(), 20)
    for arch, row in zip(space.decode(codes), space.active(codes), strict=True):
        active = {}
        for variable in space.variables:
            active[variable.key] = all(active[c.key] and arch[c.key] in c.choices for c in variable.when)
        assert [*active.values()] == row.tolist()


@given(spaces(5))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_moves_change_one_active_variable_to_each_of_its_other_choices(space):
    arch = space.sample(rng())
    (codes,), (active,) = space.encode([arch]), space.active(space.encode([arch]))
    columns, new = space.moves(arch)
    wanted = [
        (column, code)
        for column, (variable, on) in enumerate(zip(space.variables, active, strict=True))
        if on
        for code in range(len(variable.choices))
        if code != codes[column]
    ]
    assert [*zip(columns.tolist(), new.tolist(), strict=True)] == wanted
    moved = space.with_codes(codes[None].repeat(len(columns), axis=0), columns, new, rng(1))
    assert (moved == space.canonical(moved)).all()
    both = space.active(moved) & active
    assert [np.flatnonzero((row != codes) & on).tolist() for row, on in zip(moved, both, strict=True)] == [
        [column] for column, _ in wanted
    ]
    assert (moved[np.arange(len(columns)), columns] == new).all()


def test_steps_are_to_the_next_numbers_and_strings_have_none():
    space = SearchSpace(
        [Categorical("n", (7, 3, 5)), Int("i", 1, 9), Categorical("s", ("a", "b", "c")), Float("f", 0, 1)]
    )
    arch = space.arch({"n": 5, "i": 9, "s": "b", "f": 0.5})
    columns, codes = space.moves(arch, step=True)
    assert [*zip(columns.tolist(), codes.tolist(), strict=True)] == [(0, 1), (0, 0), (1, 7), (2, 0), (2, 2), (3, -1)]


def test_a_moved_arch_differs_in_one_variable_all_and_all_choices_as_likely():
    space = SearchSpace(
        [Categorical("a", (0, 1, 2, 3)), Categorical("b", (0, 1)), Categorical("one", (1,)), Float("f", 0, 1)]
    )
    start = space.encode([space.arch({"a": 2, "b": 0, "f": 0.25})])
    moved = space.moved(start.repeat(6000, axis=0), rng())
    changed = moved != start
    assert (changed.sum(axis=1) == 1).all()
    counts = [*np.bincount(moved[changed[:, 0], 0].astype(int), minlength=4), *changed[:, 1:].sum(axis=0)]
    assert counts[2] == counts[5] == 0
    places = chi_square(dict(enumerate(changed.sum(axis=0))), {0: 2000, 1: 2000, 3: 2000})
    choices = chi_square(dict(enumerate(counts)), dict.fromkeys((0, 1, 3), sum(counts[:4]) / 3))
    assert max(places, choices) < 13.8  # 0.1% with 2 degrees of freedom
    assert len(SearchSpace([Categorical("one", (1,))]).moved(np.zeros((5, 1), int), rng())) == 0


def test_sampling_is_uniform_for_each_variable():
    space = read(NESTED)
    archs = space.decode(space.draw(rng(), 9000))
    ops = collections.Counter(a["op"] for a in archs)
    assert chi_square(ops, dict.fromkeys(["conv", "pool", "none"], 3000)) < 13.8  # 2 degrees of freedom
    conv = [a for a in archs if a["op"] == "conv"]
    depths = collections.Counter(a["depth"] for a in conv)
    assert chi_square(depths, dict.fromkeys([1, 2, 3], len(conv) / 3)) < 13.8
    assert all(a["depth"] == 3 and a["size"] == 3 for a in archs if a["op"] == "none")
    assert space.sample(rng(5)) == space.sample(rng(5))


@given(spaces(), st.floats(0, 1))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_children_are_archs_of_the_space(space, prob):
    first, second = space.draw(rng(1), 30), space.draw(rng(2), 30)
    for codes in (space.mutated(first, prob, rng(3)), space.crossed(first, second, rng(3))):
        assert (space.canonical(codes) == codes).all()
        assert all(arch in space for arch in space.decode(codes))
    assert (space.mutated(first, 0.0, rng()) == first).all()
    assert (space.crossed(first, first, rng()) == first).all()


def test_what_a_mutation_makes_active_is_drawn_afresh():
    space = read(NESTED)
    parent = space.arch({"op": "none"})
    children = space.decode(space.mutated(space.encode([parent] * 6000), 0.5, rng()))
    conv = [c for c in children if c["op"] == "conv"]
    assert len(conv) > 500
    depths = collections.Counter(c["depth"] for c in conv)
    assert chi_square(depths, dict.fromkeys([1, 2, 3], len(conv) / 3)) < 13.8
    sizes = collections.Counter(c["size"] for c in conv)
    assert chi_square(sizes, dict.fromkeys([2, 3], len(conv) / 2)) < 10.8
    mutated = space.mutate(parent, 1.0, rng())
    assert mutated in space


def test_a_crossing_takes_a_variable_from_the_parent_in_which_it_is_active():
    space = read("depth = [1, 2, 3]\nblock.kernel = [3, 5, 7]")
    shallow = space.arch({"depth": 1, "blocks.0.kernel": 3})
    deep = space.arch({"depth": 3, "blocks.0.kernel": 5, "blocks.1.kernel": 3, "blocks.2.kernel": 5})
    n = 2000
    for first, second in [(shallow, deep), (deep, shallow)]:
        children = space.decode(space.crossed(space.encode([first] * n), space.encode([second] * n), rng()))
        assert {c["depth"] for c in children} == {1, 3}
        assert {(c["blocks.1.kernel"], c["blocks.2.kernel"]) for c in children if c["depth"] == 3} == {(3, 5)}
        assert {c["blocks.0.kernel"] for c in children} == {3, 5}
        assert abs(sum(c["depth"] == 3 for c in children) - n / 2) < 4 * math.sqrt(n / 4)
    assert space.cross(shallow, deep, rng()) in space


def test_a_variable_active_in_neither_parent_is_drawn_afresh():
    space = read('a = [0, 1]\nb = [0, 1]\n[c]\ntype = "int"\nlow = 1\nhigh = 4\nwhen = { a = 1, b = 1 }')
    first, second = space.arch({"a": 0, "b": 1}), space.arch({"a": 1, "b": 0})
    children = space.decode(space.crossed(space.encode([first] * 8000), space.encode([second] * 8000), rng()))
    drawn = collections.Counter(c["c"] for c in children if c["a"] == c["b"] == 1)
    assert chi_square(drawn, dict.fromkeys([1, 2, 3, 4], drawn.total() / 4)) < 16.3


# -- narrower spaces --------------------------------------------------------------------------------------------------


def test_a_narrower_space_is_a_space_with_fewer_choices():
    space = read(STAGES)
    narrow = space.narrow({"stages.*.depth": [1, 2], "resolution": [224, 128], "op": ["pool"]})
    assert narrow.keys == space.keys
    assert narrow["resolution"].choices == (224, 128)
    assert narrow["op"].default == "pool"
    assert narrow.size == len(brute_force(narrow))
    expected = {a for a in space if a["stages.0.depth"] < 3 and a["resolution"] in (128, 224) and a["op"] == "pool"}
    assert {space.arch(a) for a in narrow} == expected
    assert narrow.tree["stages"][0]["depth"] == Variable("stages.0.depth", (1, 2))
    assert type(space.fix({"resolution": 224.0}).default()["resolution"]) is int


def test_fixing_keeps_the_conditions_that_still_say_something():
    space = read('op = ["conv", "none"]\nse = { type = "categorical", choices = [0, 1], when = { op = "conv" } }\n'
                 'ratio = { type = "int", low = 1, high = 4, when = { se = 1 } }')  # fmt: skip
    fixed = space.fix({"se": 1})
    assert fixed.size == len(brute_force(fixed)) == 4 + 1
    assert fixed.fix({"op": "conv"})["ratio"].when == ()
    assert fixed.fix({"op": "none"}).size == 1


@given(spaces(), st.data())
@settings(derandomize=True, deadline=None, max_examples=80)
def test_a_narrower_space_holds_just_the_archs_that_obey(space, data):
    chosen = {v.key: data.draw(st.lists(st.sampled_from(list(v.choices)), min_size=1, unique=True))
              for v in space.variables if data.draw(st.booleans())}  # fmt: skip
    narrow = space.narrow(chosen)
    assert narrow.size == len(brute_force(narrow))
    # Fewer choices for every variable, conditions as they were; inactive ones hold the narrower default.
    plain = SearchSpace(
        Categorical(v.key, chosen.get(v.key, v.choices), default=narrow[v.key].default, when=v.when)
        for v in space.variables
    ) if space.variables else space  # fmt: skip
    assert {frozenset(a.items()) for a in narrow} == {frozenset(a.items()) for a in plain}
    assert again(narrow).size == narrow.size


def test_a_variable_is_replaced_by_one_with_another_default_or_a_narrower_range():
    space = read('width = [8, 16, 24]\nlr = { type = "float", low = 0.01, high = 1.0, log = true }\n'
                 'se = { type = "categorical", choices = [0, 1], when = { width = [8, 24] } }\n')  # fmt: skip
    narrow = space.replace({
        "width": Categorical("width", [8, 16], default=8), "lr": Float("lr", 0.1, 0.2, log=True),
    })  # fmt: skip
    assert dict(narrow.default()) == {"width": 8, "lr": 0.2, "se": 1}
    assert narrow.active(narrow.encode([narrow.arch({"width": 16})])).tolist() == [[True, True, False]]
    assert narrow.tree["width"].choices == (8, 16)


def test_every_mistake_of_a_narrowing_is_told():
    with pytest.raises(UserError) as raised:
        read(STAGES).narrow(
            {"stagess.*": [1], "op": ["cnv"], "stages.*.depth": [], "stem.se": [1], "resolution": [128, 128]}
        )
    faults = {fault.dotted: str(fault) for fault in raised.value.faults}
    assert set(faults) == {"stagess.*", "op", "stages.*.depth", "stem.se", "resolution"}
    assert "'cnv' is none of the choices conv, pool" in faults["op"]
    assert "1 is none of the choices true, false" in faults["stem.se"]


# -- writing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", [STAGES, NESTED, OFA, "", "a = 3", 'x = { type = "float", low = 1, high = 2, log = true }']
)
def test_a_space_written_and_read_is_the_same(text):
    space = read(text)
    twin = again(space)
    assert twin.variables == space.variables
    assert twin.tree == space.tree
    assert twin.to_table() == space.to_table()
    if "float" not in text:
        assert twin.size == space.size


def test_variables_of_the_spec_keep_their_place():
    space = read('a = [1, 2]\nb.c = [3, 4]\n["spec:train.epochs"]\ntype = "int"\nlow = 1\nhigh = 9\n[d]\ne = [5, 6]\n')
    assert space.keys == ("a", "b.c", "spec:train.epochs", "d.e")
    assert again(space).variables == space.variables
    with pytest.raises(UserError, match=r"spec:train\.epochs: expected a variable"):
        SearchSpace.from_table({"a": [1, 2], "spec:train.epochs": 3})


@given(spaces())
@settings(derandomize=True, deadline=None, max_examples=80)
def test_a_space_of_loose_variables_is_written_with_its_conditions(space):
    assert again(space).variables == space.variables


def test_a_narrowed_space_is_written_as_it_is():
    narrow = read(STAGES).narrow({"stages.0.depth": [1, 2], "resolution": [128], "stages.0.width": [16]})
    twin = again(narrow)
    assert twin.size == narrow.size
    assert twin.variables == narrow.variables


def test_the_depth_is_not_written_as_a_condition():
    assert "when" not in tomli_w.dumps(read(OFA).to_table())
    assert tomli_w.dumps(read(STAGES).to_table()).count("when") == 1


def test_a_space_survives_pickle_and_copies():
    space = read(STAGES)
    for twin in (pickle.loads(pickle.dumps(space)), copy.deepcopy(space)):
        assert twin.variables == space.variables
        assert twin.size == space.size
        assert twin.sample(rng(3)) == space.sample(rng(3))


# -- drawing one arch -------------------------------------------------------------------------------------------------


class Lowest(Int):
    """A variable that is drawn in a way of its own."""

    def draw(self, rng, n):
        return rng.integers(2, size=n)


SAMPLED = [
    *(read(path.read_text()) for path in (Path(__file__).parent.parent / "spec" / "space").glob("*.toml")),
    SearchSpace([]),
    SearchSpace([
        Categorical("one", (5,)),
        Float("lr", 1e-4, 1e-1, log=True, default=3e-3),
        Categorical("op", ("a", "b", "c")),
        Float("p", 0, 0.3, default=0.1, when=[Condition("op", frozenset("ab"))]),
        Int("many", 1, 1_000_000, when=[Condition("op", frozenset("b"))]),
        Categorical("on", (True, False), when=[Condition("op", frozenset("ac"))]),
        Lowest("low", 1, 9, when=[Condition("on", frozenset([True])), Condition("op", frozenset("a"))]),
        Float("step", 0, 1, step=0.25),
        Categorical("last", (1, 2.5), default=1, when=[Condition("on", frozenset([True]))]),
    ]),
]  # fmt: skip


def slow_and_fast(space, make_bits, seed, n=40):
    """Archs and what the generators are like afterwards, drawn by way of matrices and one by one."""
    slow, fast = (np.random.Generator(make_bits(seed)) for _ in range(2))
    for rng in (slow, fast):
        rng.integers(5)  # half of a word is left in the generator
    wanted, archs = [space.decode(space.draw(slow, 1))[0] for _ in range(n)], [space.sample(fast) for _ in range(n)]
    exact = [[[(key, type(x), x) for key, x in arch.items()] for arch in some] for some in (wanted, archs)]
    assert exact[0] == exact[1]
    assert wanted == archs
    assert [*map(hash, wanted)] == [*map(hash, archs)]
    assert str(slow.bit_generator.state) == str(fast.bit_generator.state)


@pytest.mark.parametrize("make_bits", [np.random.PCG64, np.random.MT19937, np.random.Philox, np.random.SFC64])
def test_one_arch_is_drawn_bit_for_bit_as_a_matrix_of_one_row(make_bits):
    for seed, space in enumerate(SAMPLED):
        slow_and_fast(space, make_bits, seed)


@given(spaces(), st.integers(0, 100))
def test_one_arch_of_any_space_is_drawn_bit_for_bit_as_a_matrix_of_one_row(space, seed):
    slow_and_fast(space, np.random.PCG64, seed, n=6)
    slow_and_fast(pickle.loads(pickle.dumps(space)), np.random.PCG64, seed, n=2)


def test_numbers_that_no_network_has_are_refused_where_a_variable_is_made():
    table = {
        "a": {"depth": 10**9},
        "b": {"depth": [1, 301], "block": {"kernel": 3}},
        "c": [1, 10**20],
        "d": 1e20,
        "e": {"type": "float", "low": -1e16, "high": 1.0},
        "f": {"depth": [1, 300], "width": [1e15, -1e15]},
    }
    with pytest.raises(UserError) as raised:
        SearchSpace.from_table(table)
    found = {fault.dotted: fault.message for fault in raised.value.faults}
    large = "expected numbers of at most 1e+15"
    assert found == {
        "a.depth": "expected a depth of at most 300, found 1e+09",
        "b": "blocks need a `depth` beside them: whole numbers from 0 to 200",
        "c": large,
        "d": large,
        "e": large,
    }
