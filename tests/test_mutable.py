"""Mutables: how a model is given one arch, and how it gets the one before back."""

import copy
import gc
import pickle
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from corenas.mutable import Elastic, apply, call_model, channels_last, keys_used, largest_choice, mutables
from corenas.value import Constant, Dimension, as_value, equals, rounded
from corenas.variables import Float, Variable

WIDTH, OP = Variable("width", (4, 8)), Variable("op", ("skip", "double"))


class Slice(nn.Module):
    """The first rows of a matrix."""

    def __init__(self, outputs):
        super().__init__()
        self.elastic = Elastic({"outputs": Dimension.of(outputs)})
        self.weight = nn.Parameter(torch.ones(self.elastic.values["outputs"].allocated))

    def forward(self, x):
        return x * self.weight[: sum(self.elastic.choice["outputs"])].sum()


class Mixed(nn.Module):
    def __init__(self, op):
        super().__init__()
        self.elastic = Elastic({"op": op})

    def forward(self, x):
        op = self.elastic.choice["op"]
        return op[0] * x + op[1] * 2 * x if isinstance(op, torch.Tensor) else x if op == "skip" else 2 * x


def make():
    return nn.Sequential(Slice(WIDTH), nn.Identity(), nn.Sequential(Mixed(OP), Slice([WIDTH, 1])))


def choices(model):
    return [dict(mutable.elastic.choice) for mutable in mutables(model)]


FIRST = [{"outputs": (8,)}, {"op": "skip"}, {"outputs": (8, 1)}]


def test_a_new_mutable_has_the_largest_numbers_and_the_first_of_all_else():
    assert choices(make()) == FIRST
    assert largest_choice({"a": Variable("a", (False, True)), "b": Constant("x")}) == {"a": True, "b": "x"}


def test_a_new_mutable_has_what_the_largest_arch_gives_even_where_another_gives_more():
    groups, wide = Variable("groups", (1, 4)), Variable("wide", ("no", "yes"))
    values = {"per_group": as_value(16) // groups, "outputs": Dimension.of([equals(wide, "yes") * 8 + 8, groups])}
    assert largest_choice(values) == {"per_group": 4, "outputs": (8, 4)}


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


# -- the plan by which a model is switched ----------------------------------------------------------------------------


def random_choices(rng):
    return {"width": WIDTH.choices[rng.integers(2)], "op": OP.choices[rng.integers(2)]}


def expected(model, arch):
    return [{name: value(arch) for name, value in m.elastic.values.items()} for m in mutables(model)]


def test_any_order_of_archs_gives_what_each_gives_alone():
    model, rng = make(), np.random.default_rng(0)
    for _ in range(50):
        arch, other = random_choices(rng), random_choices(rng)
        with apply(model, arch):
            assert choices(model) == expected(model, arch)
            with apply(model[2], other):
                assert choices(model) == [*expected(model[0], arch), *expected(model[2], other)]
            assert choices(model) == expected(model, arch)
            apply(model[2], other)  # for good: only the `with` around it takes it back
        assert choices(model) == FIRST


def test_a_part_that_was_switched_alone_is_switched_back_by_the_same_arch():
    model, arch = make(), {"width": 4, "op": "double"}
    apply(model, arch)
    apply(model[2], {"width": 8, "op": "skip"})
    apply(model, arch)
    assert choices(model) == expected(model, arch)


def test_layers_that_come_and_go_are_switched_from_then_on():
    model, arch = make(), {"width": 4, "op": "double"}
    apply(model, arch)
    model.append(Slice(Variable("late", (1, 2))))
    with pytest.raises(KeyError, match="late"):
        apply(model, arch)
    apply(model, arch | {"late": 1})
    assert choices(model)[-1] == {"outputs": (1,)}
    del model[3]
    model[2][0] = Slice(Variable("height", (16, 32)))
    model[1].inner = Slice(WIDTH)
    apply(model, {"width": 4, "height": 16})
    assert choices(model) == [{"outputs": (4,)}] * 2 + [{"outputs": (16,)}, {"outputs": (4, 1)}]


def test_a_layer_that_gets_other_values_is_switched_by_them():
    model = make()
    apply(model, {"width": 4, "op": "double"})
    model[0].elastic = Elastic({"outputs": Dimension.of(Variable("height", (2, 3)))})
    apply(model, {"width": 4, "op": "double", "height": 2})
    assert choices(model)[0] == {"outputs": (2,)}


def test_equal_numbers_of_any_type_are_the_variables_own_choice():
    model = nn.Sequential(Mixed(WIDTH))
    for width in (8.0, 8, np.int64(4), 4, np.float32(8)):
        apply(model, {"width": width})
        (op,) = choices(model)[0].values()
        assert (op, type(op)) == (width, int)


@pytest.mark.parametrize("width", [5, 5.0, 9, "8", np.int64(2), float("nan")])
def test_a_choice_that_no_variable_has_is_refused_and_leaves_the_model_as_it_was(width):
    model = make()
    apply(model, {"width": 4, "op": "double"})
    before = choices(model)
    with pytest.raises(ValueError, match="none of its choices, 4, 8"):
        apply(model, {"width": width, "op": "skip"})
    assert choices(model) == before


def test_a_continuous_variable_takes_any_number_between_its_bounds():
    ratio = Float("ratio", 0.5, 2.0)
    model = nn.Sequential(Mixed(rounded(ratio * 10) + 1))
    for given, expected in ((0.5, 6), (0.77, 9), (np.float64(1.5), 16), (1, 11)):
        apply(model, {"ratio": given})
        assert choices(model)[0] == {"op": expected}
    with pytest.raises(ValueError, match=r"ratio = 2\.5"):
        apply(model, {"ratio": 2.5})


def test_weights_are_never_remembered():
    model, weights = make(), torch.tensor([0.25, 0.75])
    for _ in range(2):
        with apply(model, {"width": 4, "op": weights}):
            assert choices(model)[1]["op"] is weights
        apply(model, {"width": 4, "op": "skip"})
    reference = weakref.ref(weights)
    del weights
    assert reference() is None


def test_what_was_not_switched_keeps_its_choice_and_what_hangs_on_it():
    model = make()
    apply(model, {"width": 4, "op": "skip"})
    first = [mutable.elastic.choice for mutable in mutables(model)]
    apply(model, {"width": 4, "op": "double"})
    assert [m.elastic.choice is choice for m, choice in zip(mutables(model), first, strict=True)] == [True, False, True]


def test_a_model_that_was_switched_goes_when_it_is_let_go():
    model = make()
    apply(model, {"width": 4, "op": "skip"})
    with apply(model, {"width": 8, "op": "skip"}):
        pass
    references = [weakref.ref(module) for module in model.modules()]
    gc.disable()
    try:
        del model
        assert [reference() for reference in references] == [None] * len(references)
    finally:
        gc.enable()


def test_copies_of_a_model_that_was_switched_are_switched_alone():
    model, arch = make(), {"width": 4, "op": "double"}
    apply(model, arch)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model)):
        assert choices(twin) == choices(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        apply(twin, {"width": 8, "op": "skip"})
        assert choices(twin) == FIRST
        assert choices(model) == expected(model, arch)
        assert model(torch.ones(())) == 4 * 2 * 5
    assert {*model.state_dict()} == {"0.weight", "2.1.weight"}


def test_more_combinations_than_a_plan_keeps_are_computed_again():
    many = Variable("many", tuple(range(1, 2001)))
    model = nn.Sequential(Mixed(many))
    for number in (*many.choices, 1, 2):
        apply(model, {"many": number})
        assert choices(model) == [{"op": number}]


def test_users_may_have_attributes_of_any_name():
    class Own(nn.ModuleDict):
        def __init__(self):
            super().__init__({"slice": Slice(WIDTH)})
            self.choice, self.elastic = "mine", "mine"

    model = Own()
    apply(model, {"width": 4})
    assert (model.choice, model.elastic, [*model.values()]) == ("mine", "mine", [model["slice"]])
    assert choices(model) == [{"outputs": (4,)}]


@pytest.mark.parametrize(("example", "expected"), [
    (torch.ones(1), 7),
    ((torch.ones(1), 2), 9),
    ([torch.ones(1), 2], 9),
    ({"x": torch.ones(1), "z": 1}, 5),
], ids=["tensor", "tuple", "list", "dict"])  # fmt: skip
def test_an_example_is_the_argument_or_the_arguments(example, expected):
    def model(x, y=1, z=2):
        return x + 2 * y + 2 * z

    assert call_model(model, example) == expected


def test_weights_of_four_axes_become_channels_last_and_others_stay():
    model = nn.Sequential(nn.Conv3d(2, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 2))
    strides = [parameter.stride() for parameter in model.parameters()]
    assert channels_last(model) is model
    assert model[1].weight.is_contiguous(memory_format=torch.channels_last)
    same = [p.stride() == stride for p, stride in zip(model.parameters(), strides, strict=True)]
    assert same == [True, True, False, True, True, True]
    plain, ours = (nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 4, 3)) for _ in range(2))
    plain.to(memory_format=torch.channels_last)
    assert [p.stride() for p in channels_last(ours).parameters()] == [p.stride() for p in plain.parameters()]
