"""Mutables: how a model is given one arch, and how it gets the one before back."""

import copy

import pytest
import torch
from torch import nn

from corenas.mutable import apply, chosen, keys_used, mutables
from corenas.value import Constant, Dimension, Variable, as_value, equals

WIDTH, OP = Variable("width", (4, 8)), Variable("op", ("skip", "double"))


class Slice(nn.Module):
    """The first rows of a matrix."""

    def __init__(self, outputs):
        super().__init__()
        self.values = {"outputs": Dimension.of(outputs)}
        self.choice = chosen(self.values)
        self.weight = nn.Parameter(torch.ones(self.values["outputs"].allocated))

    def forward(self, x):
        return x * self.weight[: sum(self.choice["outputs"])].sum()


class Mixed(nn.Module):
    def __init__(self, op):
        super().__init__()
        self.values = {"op": op}
        self.choice = chosen(self.values)

    def forward(self, x):
        op = self.choice["op"]
        return op[0] * x + op[1] * 2 * x if isinstance(op, torch.Tensor) else x if op == "skip" else 2 * x


def make():
    return nn.Sequential(Slice(WIDTH), nn.Identity(), nn.Sequential(Mixed(OP), Slice([WIDTH, 1])))


def choices(model):
    return [dict(mutable.choice) for mutable in mutables(model)]


FIRST = [{"outputs": (8,)}, {"op": "skip"}, {"outputs": (8, 1)}]


def test_a_new_mutable_has_the_largest_numbers_and_the_first_of_all_else():
    assert choices(make()) == FIRST
    assert chosen({"a": Variable("a", (False, True)), "b": Constant("x")}) == {"a": True, "b": "x"}


def test_a_new_mutable_has_what_the_largest_arch_gives_even_where_another_gives_more():
    groups, wide = Variable("groups", (1, 4)), Variable("wide", ("no", "yes"))
    values = {"per_group": as_value(16) // groups, "outputs": Dimension.of([equals(wide, "yes") * 8 + 8, groups])}
    assert chosen(values) == {"per_group": 4, "outputs": (8, 4)}


def test_a_call_gives_every_mutable_its_part_of_an_arch():
    model = make()
    apply(model, {"width": 4, "op": "double", "other": 3})
    assert choices(model) == [{"outputs": (4,)}, {"op": "double"}, {"outputs": (4, 1)}]
    assert model(torch.ones(())) == 4 * 2 * 5


def test_leaving_the_with_puts_the_arch_before_it_back_in_force():
    model = make()
    with apply(model, {"width": 4, "op": "double"}) as inside:
        assert inside is model
        outer = choices(model)
        with apply(model, {"width": 8, "op": "double"}):
            assert choices(model)[0] == {"outputs": (8,)}
        assert choices(model) == outer
        with pytest.raises(ZeroDivisionError), apply(model, {"width": 8, "op": "skip"}):
            raise ZeroDivisionError
        assert choices(model) == outer
    assert choices(model) == FIRST


def test_a_key_that_is_missing_leaves_the_model_as_it_was():
    model = make()
    with pytest.raises(KeyError, match="op"):
        apply(model, {"width": 4})
    assert choices(model) == FIRST


def test_a_mixed_operation_may_be_given_a_tensor_of_weights():
    model = make()
    weights = torch.tensor([0.25, 0.75], requires_grad=True)
    with apply(model, {"width": 4, "op": weights}):
        model(torch.ones(())).backward()
    assert weights.grad.tolist() == [20, 40]
    assert choices(model) == FIRST


def test_equal_numbers_keep_their_own_type():
    model = nn.Sequential(Mixed(as_value(1.0)), Mixed(as_value(1)), Mixed(as_value(True)))
    apply(model, {})
    assert [type(choice["op"]) for choice in choices(model)] == [float, int, bool]


def test_keys_and_mutables_are_found_wherever_they_are():
    model = make()
    assert keys_used(model) == {"width", "op"}
    assert len([*mutables(model)]) == 3
    assert len([*mutables(model[0])]) == 1
    shared = nn.Sequential(model[0], model[0])
    assert len([*mutables(shared)]) == 1


def test_a_copy_has_an_arch_of_its_own():
    model = make()
    twin = copy.deepcopy(model)
    apply(twin, {"width": 4, "op": "double"})
    assert choices(model) == FIRST
    assert choices(twin)[0] == {"outputs": (4,)}
