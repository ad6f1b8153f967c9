"""Weights of released supernets: Once-for-All's, AttentiveNAS's and AlphaNet's, by the names of their code.

What their code computes with such weights is written out here for one arch, with torch's functions alone. The code
itself agrees as well: 23 subnets of four of its supernets, in double precision, to 3e-11 and less.
"""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import tomli
import torch
import torch.nn.functional as F
from torch import nn

from corenas import SearchSpace, apply
from corenas.errors import UserError
from corenas.run.toml import SPECS
from corenas.supernet import build_supernet
from corenas_backbone_mobilenetv3 import MobileNetV3
from corenas_backbone_mobilenetv3.weights import recognise
from corenas_mutable_slices import LinearSlice
from corenas_mutable_slices.exchange import load_whole

STAGE = {"depth": [1, 2], "stride": 2, "block": {"kernel": [3, 5, 7], "expand": [2, 3]}}
OFA = {
    "stem": {"width": 16},
    "stages": [
        {"width": 16, "kernel": 3, "expand": 1},
        {"width": 24, **STAGE, "act": "relu"},
        {"width": 40, **STAGE, "act": "h_swish", "se": True},
    ],
    "head": {"expand": 64, "width": 72},
}
ATTENTIVE = {
    "stem": {"width": [8, 16], "act": "swish"},
    "stages": [
        {"width": [8, 16], "depth": [1, 2], "kernel": [3, 5], "expand": 1, "act": "swish", "shortcut": "pool"},
        {"width": [16, 24], "depth": [1, 2], "kernel": [3, 5], "expand": [4, 6], "stride": 2, "act": "swish",
         "se": True, "shortcut": "pool"},
    ],
    "head": {"ratio": 6, "width": [40, 48], "act": "swish"},
}  # fmt: skip
ACTS = {"relu": F.relu, "relu6": F.relu6, "h_swish": F.hardswish, "swish": F.silu}


def divisible(width):
    """The next multiple of 8, the one below where that is not more than a tenth less."""
    near = max(8, int(width + 4) // 8 * 8)
    return near + 8 if near < 0.9 * width else near


def tensors(table, mult=1.0, matrices=True, tracking=0):
    """The names and shapes of a supernet: (name of a conv, a batch norm or a linear layer, shape)."""
    wide = lambda width: divisible(mult * (max(width) if isinstance(width, list) else width))  # noqa: E731
    largest = lambda choices: max(choices) if isinstance(choices, list) else choices  # noqa: E731
    inputs, number = wide(table["stem"]["width"]), 0
    yield from layer("first_conv", (inputs, 3, 3, 3), tracking)
    for stage in table["stages"]:
        width, block = wide(stage["width"]), stage.get("block", stage)
        for _ in range(largest(stage.get("depth", 1))):
            path, kernel, expand = (
                f"blocks.{number}.mobile_inverted_conv.",
                *map(largest, (block["kernel"], block["expand"])),
            )
            inner = divisible(inputs * expand) if expand > 1 else inputs
            if expand > 1:
                yield from layer(f"{path}inverted_bottleneck", (inner, inputs, 1, 1), tracking)
            yield from layer(f"{path}depth_conv", (inner, 1, kernel, kernel), tracking)
            if matrices and isinstance(block["kernel"], list):
                for size in range(kernel, min(block["kernel"]), -2):
                    yield f"{path}depth_conv.conv.{size}to{size - 2}_matrix", ((size - 2) ** 2, (size - 2) ** 2)
            if stage.get("se"):
                few = divisible(inner // 4)
                for name, shape in (("reduce", (few, inner)), ("expand", (inner, few))):
                    yield f"{path}depth_conv.se.fc.{name}.weight", (*shape, 1, 1)
                    yield f"{path}depth_conv.se.fc.{name}.bias", shape[:1]
            yield from layer(f"{path}point_linear", (width, inner, 1, 1), tracking)
            if stage.get("shortcut") == "pool":
                yield f"blocks.{number}.shortcut.conv.conv.weight", (width, inputs, 1, 1)
            inputs, number = width, number + 1
    head = table["head"]
    prefix = "last_conv." if "ratio" in head else ""
    before = wide(head["expand"]) if "expand" in head and "width" in head else inputs * head.get("ratio", 1)
    if before != inputs:
        yield from layer(f"{prefix}final_expand_layer", (before, inputs, 1, 1), tracking)
        inputs = before
    if "width" in head:
        yield f"{prefix}feature_mix_layer.conv.conv.weight", (wide(head["width"]), inputs, 1, 1)
        features = wide(head["width"])
    else:
        features = wide(head["expand"])
        yield from layer("feature_mix_layer", (features, inputs, 1, 1), tracking)
    yield "classifier.linear.linear.weight", (10, features)
    yield "classifier.linear.linear.bias", (10,)


def layer(path, shape, tracking):
    yield f"{path}.conv.conv.weight", shape
    for name in ("weight", "bias", "running_mean", "running_var"):
        yield f"{path}.bn.bn.{name}", shape[:1]
    yield f"{path}.bn.bn.num_batches_tracked", ()
    for i in range(tracking):
        yield f"{path}.bn.bn_tracking.{i}.running_mean", shape[:1]


def drawn(shapes):
    """A state dict in which no two channels are alike."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in shapes:
        state[name] = torch.randn(shape, generator=generator, dtype=torch.float64)
        if "matrix" in name:
            state[name] = torch.eye(len(state[name])) + 0.1 * state[name]
        elif name.endswith("running_var"):
            state[name] = state[name].abs() + 0.5
        elif len(shape) > 1:
            state[name] /= state[name][0].numel() ** 0.5
    return state


def computed(state, table, arch, x, matrices):
    """What a subnet gives for images, by the first channels of each tensor."""

    def conv(path, x, outputs, act=None, stride=1, kernel=None):
        weight = state[f"{path}.conv.conv.weight"]
        groups, inputs = (x.shape[1], 1) if weight.shape[1] == 1 else (1, x.shape[1])
        weight = weight[:outputs, :inputs]
        while kernel is not None and weight.shape[-1] > kernel:
            size = weight.shape[-1]
            weight = weight[..., 1:-1, 1:-1]
            if matrices:
                weight = (weight.flatten(1) @ state[f"{path}.conv.{size}to{size - 2}_matrix"].T).view(weight.shape)
        x = F.conv2d(x, weight, None, stride, weight.shape[-1] // 2, 1, groups)
        if f"{path}.bn.bn.weight" in state:
            mean, var, scale, shift = (
                state[f"{path}.bn.bn.{name}"][:outputs] for name in ("running_mean", "running_var", "weight", "bias")
            )
            x = F.batch_norm(x, mean, var, scale, shift, False, 0.0, 1e-5)
        return x if act is None else ACTS[act](x)

    choice = lambda value, key: arch[key] if isinstance(value, list) else value  # noqa: E731
    x = conv("first_conv", x, choice(table["stem"]["width"], "stem.width"), table["stem"].get("act", "h_swish"), 2)
    number = 0
    for i, stage in enumerate(table["stages"]):
        width, most = choice(stage["width"], f"stages.{i}.width"), max(stage.get("depth", [1]))
        for j in range(arch.get(f"stages.{i}.depth", 1)):
            block, key = (stage["block"], f"stages.{i}.blocks.{j}") if "block" in stage else (stage, f"stages.{i}")
            path, act = f"blocks.{number + j}.mobile_inverted_conv.", stage.get("act", "relu")
            stride, before, expand = (
                stage.get("stride", 1) if j == 0 else 1,
                x,
                choice(block["expand"], f"{key}.expand"),
            )
            inner = divisible(x.shape[1] * expand) if expand > 1 else x.shape[1]
            if expand > 1:
                x = conv(f"{path}inverted_bottleneck", x, inner, act)
            x = conv(f"{path}depth_conv", x, inner, act, stride, choice(block["kernel"], f"{key}.kernel"))
            if stage.get("se"):
                few = divisible(inner // 4)
                gate = x.mean((2, 3), keepdim=True)
                for name, outputs, last in (("reduce", few, F.relu), ("expand", inner, F.hardsigmoid)):
                    layer = f"{path}depth_conv.se.fc.{name}."
                    weight = state[f"{layer}weight"][:outputs, : gate.shape[1]]
                    gate = last(F.conv2d(gate, weight, state[f"{layer}bias"][:outputs]))
                x = x * gate
            x = conv(f"{path}point_linear", x, width)
            if stage.get("shortcut") == "pool":
                if stride > 1:
                    before = F.avg_pool2d(before, stride)
                if before.shape[1] != width:
                    weight = state[f"blocks.{number + j}.shortcut.conv.conv.weight"]
                    before = F.conv2d(before, weight[:width, : before.shape[1]])
                x = x + before
            elif before.shape == x.shape:
                x = x + before
        number += most
    head, prefix = table["head"], "last_conv." if "ratio" in table["head"] else ""
    x = conv(f"{prefix}final_expand_layer", x, head.get("expand") or 6 * x.shape[1], head.get("act", "h_swish"))
    x = x.mean((2, 3), keepdim=True)
    x = conv(f"{prefix}feature_mix_layer", x, choice(head["width"], "head.width"), head.get("act", "h_swish"))
    weight, bias = state["classifier.linear.linear.weight"], state["classifier.linear.linear.bias"]
    return F.linear(x.flatten(1), weight[:, : x.shape[1]], bias)


class Head(nn.Module):
    """A linear layer, as a task has."""

    def __init__(self, dims, classes=10):
        super().__init__()
        self.classifier = LinearSlice(dims[-1], classes)

    def forward(self, features):
        return self.classifier(features[-1].flatten(1))


def built(folder, state, space, classes=10, **options):
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, folder / "w.pth.tar")
    task = SimpleNamespace(head=lambda dims: Head(dims, classes), example=torch.zeros(1, 3, 32, 32))
    return build_supernet(MobileNetV3(weights=str(folder / "w.pth.tar"), **options), space, task).double().eval()


@pytest.mark.parametrize(("table", "matrices"), [(OFA, True), (OFA, False), (ATTENTIVE, False)])
def test_subnets_of_a_released_supernet_compute_what_its_code_computes(tmp_path, table, matrices):
    state = drawn(tensors(table, matrices=matrices, tracking=2 if table is ATTENTIVE else 0))
    space, x = SearchSpace.from_table(table), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    model = built(tmp_path, state, space, transforms=matrices)
    rng = np.random.default_rng(0)
    for arch in (space.largest(), space.smallest(), *(space.sample(rng) for _ in range(4))):
        with torch.no_grad(), apply(model, arch):
            torch.testing.assert_close(model(x), computed(state, table, arch, x, matrices), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", [
    {"narrow": {"stages.*.depth": [1], "stages.*.blocks.*.kernel": [3, 5]}},
    {"narrow": {"stages.*.blocks.*.expand": [2]}, "fix": {"stages.*.blocks.*.kernel": 3}},
    {"fix": {"stages.*.depth": 1, "stages.*.blocks.*.kernel": 5, "stages.*.blocks.*.expand": 2}},
])  # fmt: skip
def test_a_part_of_the_space_takes_its_part_of_the_weights(tmp_path, change):
    state, space = drawn(tensors(OFA)), SearchSpace.from_table(OFA)
    space = space.narrow(change.get("narrow", {})).fix(change.get("fix", {}))
    model, x = built(tmp_path, state, space, transforms=True), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for arch in (space.largest(), space.smallest()):
        with torch.no_grad(), apply(model, arch):
            # The matrices are applied once, in single precision, to a kernel that no arch takes whole.
            torch.testing.assert_close(model(x), computed(state, OFA, arch, x, True), rtol=1e-4, atol=1e-4)


def test_a_classifier_of_other_classes_is_left_out(tmp_path):
    state, space = drawn(tensors(OFA)), SearchSpace.from_table(OFA)
    model = built(tmp_path, state, space, transforms=True, classes=3)
    torch.manual_seed(0)
    assert model.head.classifier.weight.shape[0] == 3
    assert model.head.classifier.weight.abs().max() < 0.2  # as it was drawn, not as that of the file


@pytest.mark.parametrize(("change", "options", "says"), [
    (lambda state: None, {}, "set `transforms = true`"),
    (lambda state: None, {"transforms": True, "width_mult": 2.0}, r"\[16, 3, 3, 3\] under first_conv.conv.weight"),
    (lambda state: state.pop("blocks.2.mobile_inverted_conv.point_linear.conv.conv.weight"), {"transforms": True},
     "nothing under blocks.2.point_linear.conv.weight for stages.1.blocks.1.body.project.conv.weight"),
    (lambda state: state.update({"blocks.1.mobile_inverted_conv.more": torch.zeros(3)}), {"transforms": True},
     r"no layer for blocks.1.\w+.more"),
    (lambda state: [state.pop(name) for name in [*state] if name.startswith(("blocks.3.", "blocks.4."))],
     {"transforms": True}, "it has 2 stages, this one 3"),
    (lambda state: [state.pop(name) for name in [*state] if name.startswith("blocks.4.")],
     {"transforms": True}, "its stage 2 has 1 blocks, this one up to 2"),
    (lambda state: state.pop("blocks.1.mobile_inverted_conv.point_linear.bn.bn.weight"), {"transforms": True},
     "it is not whole: .*blocks.1.point_linear.bn.weight"),
    (lambda state: state.update({"blocks.1.mobile_inverted_conv.depth_conv.conv.7to5_matrix": torch.eye(3)}),
     {"transforms": True}, r"\[3, 3\] under blocks.1.depth_conv.conv.7to5_matrix"),
    (lambda state: state.update({"blocks.1.mobile_inverted_conv.point_linear.conv.conv.weight": torch.zeros(24)}),
     {"transforms": True}, r"\[24\] under blocks.1.point_linear.conv.weight"),
])  # fmt: skip
def test_weights_of_another_supernet_are_refused_with_the_reason(tmp_path, change, options, says):
    state = drawn(tensors(OFA))
    change(state)
    with pytest.raises(UserError, match="Once-for-All's family") as caught:
        built(tmp_path, state, SearchSpace.from_table(OFA), **options)
    (fault,) = caught.value.faults
    assert fault.dotted == "backbone.weights"
    assert re.search(says, fault.hint or ""), fault.hint


def test_a_space_of_operations_by_name_has_no_place_for_shared_kernels(tmp_path):
    space = SearchSpace.from_table({**OFA, "stages": [{"width": 16, "op": ["k3e3", "k5e6"]}] * 3})
    with pytest.raises(UserError) as caught:
        built(tmp_path, drawn(tensors(OFA)), space)
    assert "operations by name" in (caught.value.faults[0].hint or "")


@pytest.mark.parametrize(("name", "mult", "matrices"), [
    ("ofa-mobilenetv3", 1.0, True),
    ("ofa-mobilenetv3", 1.2, True),
    ("ofa-proxyless", 1.3, True),
    ("attentivenas", 1.0, False),
])  # fmt: skip
def test_the_released_supernets_have_a_place_for_each_weight(tmp_path, name, mult, matrices):
    table = tomli.loads((SPECS / "space" / f"{name}.toml").read_text())
    state = {key: torch.empty(shape, device="meta") for key, shape in tensors(table, mult, matrices)}
    state = {key: tensor for key, tensor in state.items() if not key.startswith("classifier")}
    with torch.device("meta"):
        model = MobileNetV3(width_mult=mult, transforms=matrices).build(SearchSpace.from_table(table))
    load_whole(model, state, recognise(model, state).rename(model, state))
    assert sum(tensor.numel() for name, tensor in model.named_parameters()) == sum(
        tensor.numel() for key, tensor in state.items() if not re.search(r"running_|tracked$", key)
    )
