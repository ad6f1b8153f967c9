"""Values: the same on numbers and on columns; dimensions; the rounding of channels."""

import copy
import itertools
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corenas.value import (
    Constant,
    Dimension,
    Expression,
    Value,
    at_least,
    equals,
    grid,
    looked_up,
    make_divisible,
    rounded,
)
from corenas.variables import Variable

VARIABLES = [
    Variable("width", (8, 24, 40)),
    Variable("ratio", (0.25, 0.5, 1.5, 3.0)),
    Variable("depth", range(1, 5)),
    Variable("se", (False, True)),
]

values = st.recursive(
    st.sampled_from(VARIABLES) | st.integers(1, 9).map(Constant),
    lambda inner: st.one_of(
        st.builds(lambda a, b: a + b, inner, inner),
        st.builds(lambda a, b: a - b, inner, inner),
        st.builds(lambda a, b: a * b, inner, inner),
        st.builds(lambda a, n: a // n, inner, st.integers(1, 9)),
        st.builds(rounded, inner),
        st.builds(make_divisible, inner, st.sampled_from([1, 3, 8])),
        st.builds(at_least, inner, st.integers(0, 9)),
        st.builds(equals, inner, st.integers(0, 9)),
    ),
    max_leaves=6,
)


def test_a_number_beyond_64_bits_is_no_column():
    with pytest.raises(OverflowError):
        make_divisible(Variable("width", (8.0, 1e300))).possible  # noqa: B018
    assert rounded(Variable("width", (8.0, 1e18))).possible == (8, 10**18)


def rows(value: Value) -> list[dict]:
    domains = value.domains
    return [dict(zip(domains, row, strict=True)) for row in itertools.product(*domains.values())]


@given(values)
@settings(derandomize=True, deadline=None, max_examples=200)
def test_an_expression_gives_on_columns_what_it_gives_on_numbers(value):
    if value.domains:
        one_by_one = [value(row) for row in rows(value)]
        assert np.asarray(value(grid(value.domains))).tolist() == one_by_one
        assert list(value.possible) == sorted(set(one_by_one))
        assert value.largest == max(one_by_one)
    else:
        assert value.possible == (value({}),)


@given(values)
@settings(derandomize=True, deadline=None, max_examples=50)
def test_values_are_equal_by_structure_and_survive_copies_and_pickles(value):
    for twin in (copy.deepcopy(value), pickle.loads(pickle.dumps(value))):
        assert twin == value
        assert hash(twin) == hash(value)
        assert twin.possible == value.possible
    assert value != value + 1


def test_a_pickled_value_finds_its_equal_in_a_process_that_hashes_otherwise(tmp_path):
    make = "rounded(Variable('a', ('x', 'y')) * 2)"
    (tmp_path / "value").write_bytes(pickle.dumps({eval(make, {"rounded": rounded, "Variable": Variable}): 1}))
    code = (
        "import pickle; from corenas.value import *; from corenas.variables import *; "
        f"t = pickle.load(open({str(tmp_path / 'value')!r}, 'rb')); "
        f"assert t[{make}] == 1"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONHASHSEED": "7"})


@pytest.mark.parametrize("divisor", [1, 3, 4, 8, 16])
def test_make_divisible_follows_the_reference_rule_of_mobilenetv2(divisor):
    def reference(v, divisor, min_value=None):  # as in tensorflow/models, slim/nets/mobilenet/mobilenet.py
        min_value = divisor if min_value is None else min_value
        new_v = max(min_value, int(v + divisor / 2) // divisor * divisor)
        return new_v + divisor if new_v < 0.9 * v else new_v

    numbers = [*range(1, 400), *np.linspace(0.1, 299.9, 777).tolist()]
    column = np.array(numbers)
    for smallest in (None, 24):
        value = make_divisible(Variable("v", numbers), divisor, smallest)
        expected = [reference(v, divisor, smallest) for v in numbers]
        assert [value({"v": v}) for v in numbers] == expected
        assert value({"v": column}).tolist() == expected
        assert all(type(value({"v": v})) is int for v in numbers)


def test_rounded_is_pythons_round_with_halves_to_even():
    numbers = [0.5, 1.5, 2.5, 3.49, 7.51, 12, -0.5, -1.5]
    value = rounded(Variable("v", numbers))
    assert [value({"v": v}) for v in numbers] == [round(v) for v in numbers]
    assert value({"v": np.array(numbers)}).tolist() == [round(v) for v in numbers]


def test_gates_count_when_they_are_added_up():
    depth = Variable("depth", (1, 2, 3))
    total = at_least(depth, 2) + at_least(depth, 3) + equals(depth, 3)
    assert [total({"depth": d}) for d in (1, 2, 3)] == [0, 1, 3]
    assert total({"depth": np.array([1, 2, 3])}).tolist() == [0, 1, 3]


def test_a_choice_of_strings_is_compared_by_column_and_by_name():
    op = Variable("op", ("conv", "pool", "attention"))
    assert equals(op, "pool")({"op": "pool"}) == 1
    assert equals(op, "pool")({"op": np.array(["conv", "pool"])}).tolist() == [0, 1]
    assert op.possible == ("attention", "conv", "pool")
    assert op.largest == "conv", "of strings the first"


def test_what_depends_on_nothing_is_computed_at_once():
    assert make_divisible(Constant(3) * 5 - 1, 8) == Constant(16)
    assert rounded(2.5) == Constant(2)
    assert Constant(3).keys == ()


def test_a_table_is_looked_up_by_number_and_by_column():
    a, b = Variable("a", (3, 1)), Variable("b", ("x", "y"))
    table = {(i, j): 10 * i + (j == "y") for i in (1, 3) for j in ("x", "y")}
    value = looked_up(table, a, b)
    assert [value({"a": i, "b": j}) for i, j in table] == [*table.values()]
    columns = {"a": np.array([i for i, _ in table]), "b": np.array([j for _, j in table])}
    assert value(columns).tolist() == [*table.values()]
    assert looked_up(dict.fromkeys(table, 7), a, b) == Constant(7)


def test_a_grid_has_every_combination_the_last_key_fastest():
    columns = grid({"a": (1, 2), "b": ("x", "y", "z")})
    found = list(zip(columns["a"].tolist(), columns["b"].tolist(), strict=True))
    assert found == [*itertools.product((1, 2), ("x", "y", "z"))]


def test_too_many_combinations_are_refused_before_they_are_made():
    wide = [Variable(f"v{i}", range(1000)) for i in range(3)]
    product = wide[0] * wide[1] * wide[2]
    with pytest.raises(ValueError, match="1,000,000,000 combinations of v0, v1, v2"):
        _ = product.possible
    assert product({"v0": 999, "v1": 999, "v2": 999}) == 999**3


def test_one_key_with_two_sets_of_choices_is_an_error():
    value = Variable("a", (1, 2)) * Variable("a", (1, 3))
    with pytest.raises(ValueError, match="'a' has the choices"):
        _ = value.domains


def test_a_dimension_is_made_from_a_number_a_value_or_parts():
    width = Variable("width", (8, 16))
    assert Dimension.of(3).parts == (Constant(3),)
    assert Dimension.of(width) == Dimension((width,))
    both = Dimension.of([width, 4]) + Dimension.of(width * 2)
    assert both.parts == (width, Constant(4), Expression(width.__mul__(2).function, (width, Constant(2))))
    assert both({"width": 8}) == (8, 4, 16)
    assert both.allocated == 16 + 4 + 32
    assert both.size({"width": 8}) == 28
    assert both.keys == ("width",)
    assert Dimension.of(both) is both
    assert len({both, copy.deepcopy(both)}) == 1
