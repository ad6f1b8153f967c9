"""Options: TOML tables as attrs classes, nothing coerced, every mistake at once."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pytest
from attrs import field, frozen
from attrs.validators import ge, in_, le, matches_re, optional
from hypothesis import given, settings
from hypothesis import strategies as st

from corenas.errors import UserError
from corenas.options import expectation, explanations, structure, to_table
from corenas.value import Constant, Value
from corenas.variables import Variable


@frozen
class Inner:
    """An inner table.

    size: how large it is
    """

    size: int
    share: float = field(default=0.5, validator=[ge(0), le(1)])


@frozen
class Options:
    """Everything that options are made of.

    count: how many there are,
        at least one
    name, title: what it is called
    mode: the way it works
    """

    count: int = field(validator=ge(1))
    rate: float = 1.0
    name: str = field(default="a", validator=matches_re("[a-z]+"))
    title: str | None = None
    flag: bool = False
    mode: Literal["fast", "slow", 3] = "fast"
    inner: Inner = Inner(1)
    maybe: Inner | None = None
    items: tuple[int, ...] = ()
    pair: tuple[int, str] = (1, "x")
    inners: tuple[Inner, ...] = ()
    names: Sequence[str] = ()
    numbers: list[float] = field(factory=list)
    shares: Mapping[str, float] = field(factory=dict)
    free: Mapping[str, Any] = field(factory=dict)
    bound: float | str | tuple[float, float] | Inner = 0.0
    limit: float | None = field(default=None, validator=optional(ge(0)))
    width: Value = Constant(8)
    part: Any = field(default=None, metadata={"kind": "parts"})
    parts: tuple[Any, ...] = field(default=(), metadata={"kind": "parts"})
    hidden: int = field(default=0, init=False)


@frozen
class Window:
    """low: the lower bound"""

    low: int = 0
    high: int = field(default=1)

    @high.validator
    def _ordered(self, _, value):
        if value < self.low:
            raise ValueError(f"high {value} is below low {self.low}")


@frozen
class Finicky:
    """Nothing."""

    number: int = 0

    def __attrs_post_init__(self) -> None:
        if self.number == 13:
            raise ValueError("13 brings no luck")


def lookup(kind: str, table: Any) -> Any:
    if not isinstance(table, dict) or table.get("type") != "inner":
        raise UserError(f"no {kind} here", key=("type",), hint="there is: inner")
    return structure({k: v for k, v in table.items() if k != "type"}, Inner, lookup)


def faults(table: Any, cls: type = Options) -> dict[str, str]:
    with pytest.raises(UserError) as raised:
        structure(table, cls, lookup)
    return {fault.dotted: fault.message for fault in raised.value.faults}


def test_a_table_becomes_an_object_with_defaults_for_what_it_leaves_out():
    assert structure({"count": 2}, Options) == Options(2)
    table = {
        "count": 3, "rate": 2, "name": "abc", "title": "T", "flag": True, "mode": 3, "inner": {"size": 2},
        "maybe": {"size": 3, "share": 1}, "items": [1, 2], "pair": [2, "y"], "inners": [{"size": 1}, {"size": 2}],
        "names": ["a", "b"], "numbers": [1, 2.5], "shares": {"a": 1, "b": 0.5}, "free": {"x": [1, {"y": None}]},
        "bound": [1, 2], "limit": 0, "width": 16, "part": {"type": "inner", "size": 5},
        "parts": [{"type": "inner", "size": 6}],
    }  # fmt: skip
    options = structure(table, Options, lookup)
    assert options == Options(
        3, 2.0, "abc", "T", True, 3, Inner(2), Inner(3, 1.0), (1, 2), (2, "y"), (Inner(1), Inner(2)), ("a", "b"),
        [1.0, 2.5], {"a": 1.0, "b": 0.5}, {"x": [1, {"y": None}]}, (1.0, 2.0), 0.0, Constant(16), Inner(5), (Inner(6),),
    )  # fmt: skip
    assert type(options.rate) is float


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("count", "12", "expected a whole number, found '12'"),
        ("count", 3.0, "expected a whole number, found 3.0"),
        ("count", True, "expected a whole number, found true"),
        ("count", [1], "expected a whole number, found [1]"),
        ("count", 0, "must be >= 1: 0"),
        ("rate", "1", "expected a number, found '1'"),
        ("rate", False, "expected a number, found false"),
        ("rate", math.nan, "expected a number, found nan"),
        ("rate", 10**400, f"expected a number, found 1{'0' * 96}..."),
        ("flag", "false", "expected true or false, found 'false'"),
        ("flag", 0, "expected true or false, found 0"),
        ("title", 3, "expected a string, found 3"),
        ("mode", "fsat", "expected 'fast' or 'slow' or 3, found 'fsat'"),
        ("mode", 3.0, "expected 'fast' or 'slow' or 3, found 3.0"),
        ("mode", ["fast"], "expected 'fast' or 'slow' or 3, found ['fast']"),
        ("inner", 3, "expected a table, found 3"),
        ("inner", [], "expected a table, found []"),
        ("items", 3, "expected a list of whole numbers, found 3"),
        ("items", "12", "expected a list of whole numbers, found '12'"),
        ("names", "ab", "expected a list of strings, found 'ab'"),
        ("numbers", {"a": 1}, "expected a list of numbers, found {'a': 1}"),
        ("pair", [1], "expected 2 items, found 1"),
        ("inners", {"size": 1}, "expected a list, found {'size': 1}"),
        ("shares", [1], "expected a table, found [1]"),
        ("free", "x", "expected a table, found 'x'"),
        ("bound", True, "expected a number or a string or a list of numbers or a table, found true"),
        ("bound", [1, 2, 3], "expected 2 items, found 3"),
        ("limit", -1, "must be >= 0: -1.0"),
        ("limit", "x", "expected a number, found 'x'"),
        ("width", "8", "expected a number or a variable, found '8'"),
        ("width", True, "expected a number or a variable, found true"),
        ("width", math.inf, "expected a number or a variable, found inf"),
        ("width", [8, 16], "expected a number or a variable, found [8, 16]"),
        ("parts", {"type": "inner"}, "expected a list, found {'type': 'inner'}"),
        ("count", None, "expected a whole number, found None"),
        ("bound", None, "expected a number or a string or a list of numbers or a table, found None"),
        ("count", Variable("a", (1, 2)), "expected a whole number, found a variable: this cannot be searched"),
        ("flag", Variable("a", (True, False)), "expected true or false, found a variable: this cannot be searched"),
        ("items", Variable("a", (1, 2)), "expected a list of whole numbers, found a variable: this cannot be searched"),
    ],
)  # fmt: skip
def test_nothing_is_coerced(key, value, message):
    assert faults({"count": 1, key: value}) == {key: message}


def test_a_space_may_give_numbers_and_variables_as_values():
    options = structure({"count": Constant(3), "width": Variable("w", (8, 16)), "mode": Constant(3)}, Options)
    assert options.count == 3
    assert options.width == Variable("w", (8, 16))
    assert options.mode == 3


def test_every_mistake_is_told_at_once_with_its_key():
    table = {
        "rate": "x", "inner": {"share": 2, "sise": 1}, "items": [1, "a", [2]], "pair": ["1", 2], "flg": True,
        "inners": [{"size": 1}, {}, 3], "shares": {"a": "x", "b": 1, "c": [1]}, "bound": {"size": "1"},
        "part": {"type": "iner"}, "parts": [{"type": "inner", "size": "s"}, {"type": "x"}, 3], "limit": -1,
    }  # fmt: skip
    assert faults(table) == {
        "count": "required key is missing", "rate": "expected a number, found 'x'", "flg": "unknown key",
        "inner.share": "must be <= 1: 2.0", "inner.size": "required key is missing", "inner.sise": "unknown key",
        "items[1]": "expected a whole number, found 'a'", "items[2]": "expected a whole number, found [2]",
        "pair[0]": "expected a whole number, found '1'", "pair[1]": "expected a string, found 2",
        "inners[1].size": "required key is missing", "inners[2]": "expected a table, found 3",
        "shares.a": "expected a number, found 'x'", "shares.c": "expected a number, found [1]",
        "bound.size": "expected a whole number, found '1'", "part.type": "no parts here",
        "parts[0].size": "expected a whole number, found 's'", "parts[1].type": "no parts here",
        "parts[2].type": "no parts here", "limit": "must be >= 0: -1.0",
    }  # fmt: skip


def test_an_unknown_key_is_answered_with_the_closest_and_with_all():
    with pytest.raises(UserError) as raised:
        structure({"count": 1, "inner": {"size": 1, "sahre": 1}}, Options)
    assert str(raised.value) == "inner.sahre: unknown key\n  did you mean 'share'? keys here: share, size"


def test_a_mistake_comes_with_what_the_option_means():
    with pytest.raises(UserError) as raised:
        structure({"count": "3", "title": 1, "inner": {"size": "x"}}, Options)
    assert str(raised.value) == (
        "count: expected a whole number, found '3'\n  count: how many there are, at least one\n"
        "title: expected a string, found 1\n  title: what it is called\n"
        "inner.size: expected a whole number, found 'x'\n  size: how large it is"
    )
    assert explanations(Options)["name"] == "what it is called"


def test_the_key_of_a_field_has_no_underscore_at_its_end():
    @frozen
    class Copy:
        """A copy.

        from, to: where it comes from,
            and goes
        """

        from_: str
        to: str = "here"

    assert structure({"from": "runs/a"}, Copy) == Copy("runs/a")
    assert to_table(Copy("runs/a")) == {"from": "runs/a", "to": "here"}
    assert explanations(Copy) == dict.fromkeys(("from_", "to"), "where it comes from, and goes")
    assert faults({"from_": "x"}, Copy) == {"from": "required key is missing", "from_": "unknown key"}
    with pytest.raises(UserError) as raised:
        structure({"from": 3}, Copy)
    assert str(raised.value) == "from: expected a string, found 3\n  from: where it comes from, and goes"


def test_components_are_written_with_their_names():
    @frozen
    class Outer:
        inner: Inner
        part: Any = field(metadata={"kind": "parts"})
        parts: tuple[Any, ...] = field(default=(), metadata={"kind": "parts"})

    named = {"type": "Inner", "size": 2, "share": 0.5}
    table = to_table(Outer(Inner(2), Inner(2), (Inner(2),)), lambda options: type(options).__name__)
    assert table == {"inner": {"size": 2, "share": 0.5}, "part": named, "parts": [named]}


@pytest.mark.parametrize("table", [None, 3, "x", [], [1], True])
def test_what_is_no_table_is_told_to_be_none(table):
    assert faults(table) == {"": f"expected a table, found {'true' if table is True else repr(table)}"}


def test_validators_and_checks_of_the_whole_object_tell_their_own_words():
    assert structure({"low": 3, "high": 4}, Window) == Window(3, 4)
    assert faults({"low": 3, "high": 2}, Window) == {"": "high 2 is below low 3"}
    assert faults({"number": 13}, Finicky) == {"": "13 brings no luck"}

    @frozen
    class Outer:
        window: Window
        also: Finicky = Finicky()
        device: str = field(default="cpu", validator=in_(("cpu", "cuda")))

    assert faults({"window": {"low": 3, "high": 2}, "also": {"number": 13}}, Outer) == {
        "window": "high 2 is below low 3", "also": "13 brings no luck",
    }  # fmt: skip
    assert "must be in ('cpu', 'cuda')" in faults({"window": {}, "device": "gpu"}, Outer)["device"]


def test_long_and_huge_things_are_named_in_short():
    assert faults({"count": "x" * 1000})["count"].endswith("...")
    assert faults({"count": 1, "title": 10**5000}) == {"title": "expected a string, found a huge number"}


def test_a_bug_is_not_told_as_a_mistake_of_the_users():
    def broken(kind, table):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        structure({"count": 1, "part": {}}, Options, broken)


def test_types_are_told_in_the_words_of_toml():
    assert expectation(tuple[float, ...]) == "a list of numbers"
    assert expectation(int | None) == "a whole number"
    assert expectation(bool | Inner) == "true or false or a table"
    assert expectation(tuple[bool, ...]) == "a list of true and false"
    assert expectation(float | tuple[str | Inner, ...]) == "a number or a list"
    assert expectation(Any) == "anything"


def test_options_written_and_read_are_the_same():
    options = Options(
        3, 2.0, "abc", "T", True, 3, Inner(2), None, (1, 2), (2, "y"), (Inner(1), Inner(2)), ("a",), [1.0], {"a": 1.0},
        {"x": [1]}, Inner(3), None, Constant(16),
    )  # fmt: skip
    table = to_table(options)
    assert table["width"] == 16
    assert "maybe" not in table
    assert "hidden" not in table
    assert structure(table, Options) == options
    assert to_table(Options(1, width=Variable("w", (8, 16))))["width"] == [8, 16]


leaves = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
    | st.sampled_from([10**400, math.nan, math.inf, "fast", "inner"]) | st.builds(lambda: 10**5000)
)  # fmt: skip
anything = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["size", "share", "type", "low", "x"]), inner, max_size=3)
        | st.dictionaries(st.integers() | st.none() | st.text(max_size=2), inner, max_size=2)
    ),
    max_leaves=5,
)
NAMES = [*Options.__annotations__, "x"]


@given(st.dictionaries(st.sampled_from(NAMES), anything, max_size=6) | anything)
@settings(derandomize=True, deadline=None, max_examples=500)
def test_whatever_a_table_holds_options_or_a_user_error_come_of_it(table):
    for cls in (Options, Window, Finicky):
        with contextlib.suppress(UserError):
            structure(table, cls, lookup)
