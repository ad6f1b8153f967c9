"""The tables of backbones: limits of values, and what a stage's blocks must say."""

import math

import pytest
from attrs import field, frozen

from corenas.errors import UserError
from corenas.value import Constant, Value
from corenas.variables import Variable
from corenas_mutable_slices.layouts import check_blocks, each, odd, of_block, positive, whole


def accepts(validator, *choices):
    value = Variable("v", choices) if len(choices) > 1 else Constant(choices[0])
    validator(None, None, value)


GOOD = [(positive, 1), (positive, 0.25, 6.0), (whole, 1), (whole, 2, 64), (odd, 1), (odd, 3, 5, 7)]
BAD = [
    (positive, "numbers above 0, found 0", 0),
    (positive, "numbers above 0, found -1", -1, 2),
    (positive, "numbers above 0, found 'a'", "a", "b"),
    (positive, "numbers above 0, found nan", math.nan),
    (whole, "whole numbers of at least 1, found 0", 0, 1),
    (whole, r"whole numbers of at least 1, found 1\.5", 1, 1.5),
    (whole, "whole numbers of at least 1, found False", False, True),
    (odd, "odd whole numbers of at least 1, found 4", 3, 4, 5),
    (odd, "odd whole numbers of at least 1, found -1", -1),
    (odd, r"odd whole numbers of at least 1, found 3\.0", 3.0),
]


@pytest.mark.parametrize(("validator", "choices"), [(v, c) for v, *c in GOOD])
def test_numbers_within_the_limits_are_accepted(validator, choices):
    accepts(validator, *choices)


@pytest.mark.parametrize(("validator", "message", "choices"), [(v, m, c) for v, m, *c in BAD])
def test_one_number_beyond_the_limits_is_told_with_what_was_expected(validator, message, choices):
    with pytest.raises(ValueError, match=f"^expected {message}$"):
        accepts(validator, *choices)


def test_a_limit_holds_for_every_number_that_an_expression_can_be():
    width = Variable("w", (8, 16)) - 8
    with pytest.raises(ValueError, match="found 0"):
        positive(None, None, width)
    each(lambda n: n % 8 == 0, "multiples of 8")(None, None, width)


@frozen
class Block:
    kernel: Value | None = None
    expand: Value | None = None


@frozen
class Stage:
    kernel: Value | None = None
    expand: Value | None = None
    blocks: tuple[Block, ...] = ()
    depth: Value = field(default=Constant(1))


THREE, FIVE = Constant(3), Constant(5)


def test_a_block_says_what_it_has_and_its_stage_the_rest():
    stage = Stage(kernel=THREE, blocks=(Block(expand=FIVE), Block(kernel=FIVE, expand=THREE)), depth=Constant(2))
    check_blocks(stage, ("kernel", "expand"))
    assert [of_block(stage, i, "kernel") for i in (0, 1)] == [THREE, FIVE]
    assert [of_block(stage, i, "expand") for i in (0, 1)] == [FIVE, THREE]
    alone = Stage(kernel=THREE, expand=FIVE, depth=Constant(4))
    check_blocks(alone, ("kernel", "expand"))
    assert of_block(alone, 3, "kernel") == THREE


def test_what_neither_the_stage_nor_every_block_says_is_told_all_at_once():
    stage = Stage(blocks=(Block(expand=FIVE), Block(kernel=FIVE)), depth=Variable("d", (1, 2)))
    with pytest.raises(UserError) as caught:
        check_blocks(stage, ("kernel", "expand"))
    messages = [fault.message for fault in caught.value.faults]
    assert messages == [f"neither the stage nor each of its blocks has {name!r}" for name in ("kernel", "expand")]


def test_blocks_that_the_depth_does_not_reach_need_say_nothing():
    stage = Stage(blocks=(Block(kernel=THREE, expand=FIVE), Block()), depth=Constant(1))
    check_blocks(stage, ("kernel", "expand"))


def test_a_depth_that_reaches_beyond_the_blocks_is_refused():
    stage = Stage(kernel=THREE, expand=FIVE, blocks=(Block(), Block()), depth=Variable("d", (1, 3)))
    with pytest.raises(UserError, match="2 blocks, but depth reaches 3") as caught:
        check_blocks(stage, ("kernel", "expand"))
    assert caught.value.faults[0].key == ("blocks",)
