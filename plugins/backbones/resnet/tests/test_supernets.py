"""Weights of Once-for-All's ResNets, by the names of its code.

What its code computes with them is written out here for one arch, with torch's functions alone. The code itself agrees
as well: six subnets of its ResNet-50D, in double precision, to 1e-15.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from corenas import SearchSpace, apply
from corenas.errors import UserError
from corenas.supernet import build_supernet
from corenas_backbone_resnet import ResNet
from corenas_mutable_slices import LinearSlice

RATIOS = [0.25, 0.5]
TABLE = {
    "shortcut": "pool",
    "stem": {"kernel": 3, "inner": [8, 16], "depth": [0, 1], "width": [16, 24]},
    "stages": [
        {"bottleneck": {"width": [32, 48], "depth": [1, 2], "block": {"ratio": RATIOS}}},
        {"stride": 2, "bottleneck": {"width": [64, 80], "depth": [1, 2, 3], "block": {"ratio": RATIOS}}},
    ],
}


def divisible(width):
    return max(8, int(width + 4) // 8 * 8)


def drawn():
    """A state dict of the largest network in which no two channels are alike."""
    shapes = {"input_stem.0": (16, 3, 3, 3), "input_stem.1.conv": (16, 16, 3, 3), "input_stem.2": (24, 16, 3, 3)}
    inputs, number = 24, 0
    for width, depth in ((48, 2), (80, 3)):
        for j in range(depth):
            inner, path = divisible(width * 0.5), f"blocks.{number + j}."
            shapes |= {f"{path}conv1": (inner, inputs, 1, 1), f"{path}conv2": (inner, inner, 3, 3)}
            shapes |= {f"{path}conv3": (width, inner, 1, 1)}
            shapes |= {f"{path}downsample": (width, inputs, 1, 1)} if j == 0 else {}
            inputs = width
        number += depth
    generator, state = torch.Generator().manual_seed(0), {}
    for path, shape in shapes.items():
        draw = lambda *size: torch.randn(size, generator=generator, dtype=torch.float64)  # noqa: E731
        state[f"{path}.conv.conv.weight"] = draw(*shape) / np.prod(shape[1:]) ** 0.5
        state |= {f"{path}.bn.bn.{name}": draw(shape[0]) for name in ("weight", "bias", "running_mean")}
        state[f"{path}.bn.bn.running_var"] = draw(shape[0]).abs() + 0.5
    state |= {"classifier.linear.linear.weight": draw(10, 80), "classifier.linear.linear.bias": draw(10)}
    return state


def computed(state, arch, x):
    """What a subnet gives for images, by the first channels of each tensor."""

    def conv(path, x, outputs, stride=1):
        weight = state[f"{path}.conv.conv.weight"][:outputs, : x.shape[1]]
        x = F.conv2d(x, weight, None, stride, weight.shape[-1] // 2)
        names = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(state[f"{path}.bn.bn.{name}"][:outputs] for name in names), False, 0.0, 1e-5)

    x = F.relu(conv("input_stem.0", x, arch["stem.inner"], 2))
    if arch["stem.depth"]:
        x = x + F.relu(conv("input_stem.1.conv", x, arch["stem.inner"]))
    x = F.max_pool2d(F.relu(conv("input_stem.2", x, arch["stem.width"])), 3, 2, 1)
    for i, (first, stride) in enumerate(((0, 1), (2, 2))):
        width = arch[f"stages.{i}.bottleneck.width"]
        for j in range(arch[f"stages.{i}.bottleneck.depth"]):
            path, inner = f"blocks.{first + j}.", divisible(width * arch[f"stages.{i}.bottleneck.blocks.{j}.ratio"])
            before = x
            if j == 0:
                pooled = F.avg_pool2d(x, stride, stride, 0, ceil_mode=True)
                before = conv(f"{path}downsample", pooled, width)
            x = F.relu(conv(f"{path}conv1", x, inner))
            x = F.relu(conv(f"{path}conv2", x, inner, stride if j == 0 else 1))
            x = F.relu(conv(f"{path}conv3", x, width) + before)
    x = x.mean((2, 3))
    return F.linear(
        x, state["classifier.linear.linear.weight"][:, : x.shape[1]], state["classifier.linear.linear.bias"]
    )


class Head(nn.Module):
    """A linear layer, as a task has."""

    def __init__(self, dims):
        super().__init__()
        self.classifier = LinearSlice(dims[-1], 10)

    def forward(self, features):
        return self.classifier(features[-1].flatten(1))


def built(folder, state, space):
    torch.save({"state_dict": state}, folder / "supernet")
    task = SimpleNamespace(head=Head, example=torch.zeros(1, 3, 32, 32))
    return build_supernet(ResNet(weights=str(folder / "supernet")), space, task).double().eval()


@pytest.mark.parametrize("narrow", [{}, {"stages.*.bottleneck.depth": [1, 2], "stages.1.bottleneck.width": [64]}])
def test_subnets_of_a_released_supernet_compute_what_its_code_computes(tmp_path, narrow):
    state, space = drawn(), SearchSpace.from_table(TABLE).narrow(narrow)
    model, x, rng = (
        built(tmp_path, state, space),
        torch.randn(2, 3, 64, 64, dtype=torch.float64),
        np.random.default_rng(0),
    )
    for arch in (space.largest(), space.smallest(), *(space.sample(rng) for _ in range(4))):
        with torch.no_grad(), apply(model, arch):
            torch.testing.assert_close(model(x), computed(state, arch, x), rtol=1e-4, atol=1e-4)


def test_weights_of_another_supernet_are_refused_with_the_reason(tmp_path):
    state = drawn()
    del state["blocks.4.conv2.bn.bn.bias"]
    with pytest.raises(UserError, match="Once-for-All's ResNets") as caught:
        built(tmp_path, state, SearchSpace.from_table(TABLE))
    assert "nothing under blocks.4.conv2.bn.bias for stages.1" in (caught.value.faults[0].hint or "")


def test_a_space_without_bottleneck_blocks_has_no_place_for_them(tmp_path):
    stages = [{"basic": {"width": 32, "ratio": 1}}, TABLE["stages"][1]]
    with pytest.raises(UserError) as caught:
        built(tmp_path, drawn(), SearchSpace.from_table({**TABLE, "stages": stages}))
    assert "bottleneck blocks" in (caught.value.faults[0].hint or "")
