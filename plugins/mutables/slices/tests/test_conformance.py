"""Every layer keeps to what searchable layers promise."""

import pytest
from torch import nn

from corenas.testing.distributions import distribution_checks
from corenas.testing.mutables import mutable_checks, trains_the_active_part_alone
from corenas.value import make_divisible
from corenas.variables import Variable
from corenas_mutable_slices import (
    BatchNorm1dSlice,
    BatchNorm2dSlice,
    BatchNorm3dSlice,
    Conv1dSlice,
    Conv2dSlice,
    Conv3dSlice,
    ConvTranspose1dSlice,
    ConvTranspose2dSlice,
    ConvTranspose3dSlice,
    ElasticDepth,
    GroupNormSlice,
    InputResize,
    LinearSlice,
    MixedOp,
    Shortcut,
)

IN, OUT, KERNEL, GROUPS = (Variable(key, choices) for key, choices in
                           {"i": (2, 4, 6), "o": (4, 6, 8), "k": (1, 3, 5), "g": (1, 2)}.items())  # fmt: skip
INNER = make_divisible(IN * OUT, 4)

LAYERS = {
    "conv": lambda: Conv2dSlice(IN, OUT, KERNEL),
    "strided": lambda: Conv2dSlice(IN, OUT, KERNEL, 2, dilation=2, bias=False),
    "groups": lambda: Conv2dSlice(IN, OUT, KERNEL, groups=GROUPS),
    "depthwise": lambda: Conv2dSlice(INNER, INNER, KERNEL, groups="depthwise"),
    "parts": lambda: Conv2dSlice([IN, 3, OUT], [OUT, IN], 3),
    "even": lambda: Conv2dSlice(IN, OUT, Variable("k", (2, 4)), 2, padding=1),
    "oblong": lambda: Conv2dSlice(IN, OUT, (KERNEL, Variable("w", (1, 3))), (2, 1), padding=(2, 1)),
    "transposed": lambda: ConvTranspose2dSlice(IN, [OUT, 2], Variable("k", (2, 4))),
    "oblong transposed": lambda: ConvTranspose2dSlice([IN, 1], OUT, (3, KERNEL), (3, 1), bias=False),
    "group norm": lambda: GroupNormSlice(GROUPS, OUT),
    "group norm of parts": lambda: GroupNormSlice(2, [OUT, IN], affine=False),
    "norm": lambda: BatchNorm2dSlice(OUT),
    "norm of parts": lambda: BatchNorm2dSlice([OUT, 3, IN], affine=False),
    "switched norm": lambda: BatchNorm2dSlice(OUT, switch=OUT),
    "switched norm of parts": lambda: BatchNorm2dSlice([OUT, 3, IN], switch=KERNEL),
    "mixed": lambda: MixedOp(
        {"conv": nn.Conv2d(4, 4, 1), "skip": nn.Identity(), "pool": nn.AvgPool2d(3, 1, 1)},
        Variable("op", ("conv", "skip", "pool")),
    ),
    "depth": lambda: ElasticDepth([nn.Conv2d(4, 4, 1) for _ in range(3)], Variable("d", (1, 2, 3))),
    "resize": lambda: InputResize(Variable("r", (4, 6, 8))),
}


@pytest.mark.parametrize("check", mutable_checks)
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_conforms(layer, check):
    check(layer)


@pytest.mark.parametrize("check", [check for check in mutable_checks if check is not trains_the_active_part_alone])
def test_a_convolution_with_transforms_conforms_but_for_its_matrices(check):
    # They have gradients and are no part of the exported layer: see test_layers.py.
    check(lambda: Conv2dSlice(INNER, INNER, KERNEL, groups="depthwise", transforms=True))


@pytest.mark.parametrize("check", mutable_checks)
@pytest.mark.parametrize(("layer", "side"), [
    (lambda: Conv1dSlice(IN, OUT, KERNEL, 2, GROUPS), (9,)),
    (lambda: Conv3dSlice(IN, OUT, (2, KERNEL, 3), (1, 2, 1), padding=(0, 2, 1)), (3, 5, 4)),
    (lambda: ConvTranspose1dSlice(IN, OUT, Variable("k", (2, 4)), groups=GROUPS), (5,)),
    (lambda: ConvTranspose3dSlice(IN, [OUT, 2], (2, 3, Variable("k", (2, 4)))), (2, 3, 3)),
    (lambda: ConvTranspose2dSlice(IN, IN, 3, groups="depthwise"), (3, 4)),
    (lambda: BatchNorm1dSlice(IN), (5,)),
    (lambda: BatchNorm3dSlice(IN, switch=IN), (2, 3, 4)),
], ids=["one", "three", "up one", "up three", "up depthwise", "norm one", "norm three"])  # fmt: skip
def test_layers_of_other_axes_conform(layer, side, check):
    check(layer, shape=lambda arch: (2, arch["i"], *side))


@pytest.mark.parametrize("check", mutable_checks)
@pytest.mark.parametrize("between", [(), (5,)], ids=["features", "tokens"])
def test_a_linear_layer_conforms(between, check):
    check(lambda: LinearSlice(IN, OUT), shape=lambda arch: (2, *between, arch["i"]))


SHORTCUTS = {
    "widths": lambda: Shortcut(IN, OUT, Conv2dSlice(IN, OUT, 1)),
    "stride": lambda: Shortcut(6, 6, nn.Conv2d(6, 6, 1, 2), always=True),
    "same": lambda: Shortcut(IN, IN, nn.Identity()),
}


@pytest.mark.parametrize("check", mutable_checks)
@pytest.mark.parametrize("shortcut", SHORTCUTS.values(), ids=SHORTCUTS)
def test_a_shortcut_conforms(shortcut, check):
    check(shortcut, shape=lambda arch: (2, arch.get("i", 6), 6, 6))


@pytest.mark.parametrize("check", distribution_checks)
def test_the_distribution_conforms(check):
    check("corenas_mutable_slices")
