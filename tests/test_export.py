"""Export: a plain network that computes what the supernet does."""

import inspect
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toys import Backbone, Conv, Linear, Mixed, Task, make_space

from corenas.errors import UserError
from corenas.export import TOLERANCE, difference, export_subnet
from corenas.mutable import apply, largest_choice, mutables
from corenas.supernet import Supernet, build_supernet
from corenas.value import Constant
from corenas.variables import Variable

SPACE = make_space()
TASK = Task()
ARCHS = [SPACE.largest(), SPACE.smallest(), *(SPACE.sample(np.random.default_rng(i)) for i in range(6))]
IMAGES = TASK.data["valid"][0]
WIDTH = Variable("width", (4, 8))


def make(dropout=0.0):
    torch.manual_seed(0)
    model = build_supernet(Backbone(), SPACE, Task(dropout))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight)
    return model


def close(ours, theirs, tolerance=1e-6):
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("arch", ARCHS, ids=lambda arch: arch.digest[:4])
def test_a_plain_network_computes_what_the_supernet_does(arch):
    model = make()
    for training in (False, True):
        model.train(training)
        buffers = [buffer.clone() for buffer in model.buffers()]
        plain = export_subnet(model, arch, TASK.example)
        assert all(map(torch.equal, model.buffers(), buffers))
        assert {module.training for module in plain.modules()} == {training}
        with apply(model, arch):
            close(plain(IMAGES), model(IMAGES))
        assert all(type(module).__module__.startswith("torch") for module in plain.modules())
    assert all(mutable.elastic.choice == largest_choice(mutable.elastic.values) for mutable in mutables(model))


def test_a_plain_network_has_weights_of_its_own():
    model = make().eval()
    plain = export_subnet(model, SPACE.largest(), TASK.example)
    wanted = plain(IMAGES)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.zero_()
    assert torch.equal(plain(IMAGES), wanted)
    storages = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    assert not storages & {tensor.untyped_storage().data_ptr() for tensor in plain.state_dict().values()}
    assert all(p.requires_grad for p in plain.parameters())


class Wrong(Linear):
    def export(self):
        plain = super().export()
        with torch.no_grad():
            plain.bias += 0.01
        return plain


def test_a_network_that_differs_is_refused():
    model = nn.Sequential(nn.Flatten(), Wrong(64, WIDTH), nn.ReLU())
    with pytest.raises(UserError, match="differs from the supernet"):
        export_subnet(model, {"width": 8}, TASK.example)


class Reordered(Linear):
    """Adds up in another order than what it exports, as fused layers do."""

    def forward(self, x):
        return (x.flip(1).unsqueeze(1) * self.weight.flip(1) + self.bias[:, None] / x.shape[1]).sum(2)


def test_a_network_that_rounding_alone_makes_differ_is_exported():
    model = nn.Sequential(nn.Flatten(), Reordered(64, WIDTH), nn.BatchNorm1d(8)).eval()
    norm = model[2]
    with torch.no_grad():
        model[1].bias += 1000
        norm.running_mean.copy_(model[1].bias)  # what is left is a small difference of large numbers
    plain = export_subnet(model, {"width": 8}, TASK.example)
    assert difference(model, plain, TASK.example) > TOLERANCE
    assert {p.dtype for p in plain.parameters()} == {torch.float32}


def exported(*layers, arch=None, example=TASK.example):
    torch.manual_seed(0)
    return export_subnet(nn.Sequential(*layers).eval(), arch or {"width": 4}, example)


class Graph(nn.Module):
    """Residual and dense connections, functions, a parameter, buffers and a layer that is called twice."""

    def __init__(self, depth):
        super().__init__()
        self.stem = Conv(1, WIDTH, 3)
        self.layers = nn.ModuleList(Conv(WIDTH, WIDTH) for _ in range(depth))
        self.scale = nn.Parameter(torch.randn(1, 1, 8, 8))
        self.register_buffer("shift", torch.randn(8))
        self.register_buffer("order", torch.arange(8).flip(0))
        self.shared = nn.Sequential(nn.ReLU(), nn.Conv2d(1, 1, 3, padding=1))
        self.free = nn.Linear(8, 4)

    def forward(self, images):
        x = self.shared(self.shared(images)) * self.scale + self.shift[self.order]
        found = [self.stem(x)]
        for layer in self.layers:
            found.append(layer(found[-1]) + found[len(found) // 2])
        x = torch.cat(found, dim=1)
        x = F.interpolate(x - 0.5 * x[:, :1], size=(4, 4), mode="bilinear", align_corners=False).clamp(max=float("inf"))
        x = F.pad(F.avg_pool2d(x, 2).flatten(1), (0, 8), value=0.5)[:, :8]
        return self.free(x) + x.mean(dim=-1, keepdim=True) @ torch.ones_like(x[:1, :4])


@pytest.mark.parametrize("width", [4, 8])
@pytest.mark.parametrize("depth", [1, 20])
def test_residual_and_dense_graphs_are_exported_as_they_are(width, depth):
    torch.manual_seed(0)
    model = Graph(depth).eval()
    plain = export_subnet(model, {"width": width}, TASK.example)
    with apply(model, {"width": width}):
        close(plain(IMAGES), model(IMAGES), 1e-5)


class Names(nn.Module):
    """Names that collide once dots are gone, or that Python or a graph module keep for themselves."""

    def __init__(self):
        super().__init__()
        self.a = nn.ModuleDict({"b_c": nn.Conv2d(1, 2, 1), "b": nn.ModuleDict({"c": nn.Conv2d(2, 3, 1)})})
        self.a_b_c = nn.Conv2d(3, 4, 1)
        self.a_b_c_ = nn.Conv2d(4, 3, 1)
        self.graph = nn.Conv2d(3, 5, 1)
        self.ops = nn.ModuleDict({"3x3-conv": nn.Conv2d(5, 6, 1), "lambda": nn.Conv2d(6, 7, 1)})
        self.x = nn.Conv2d(7, 8, 1)
        self.code = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU())
        self.feat_dims = [Constant(8)]

    def features(self, images):
        x = self.a_b_c_(self.a_b_c(self.a["b"]["c"](self.a["b_c"](images))))
        x = self.x(self.ops["lambda"](self.ops["3x3-conv"](self.graph(x))))
        return [self.code(x).mean((2, 3))]

    def forward(self, images):
        return self.features(images)[0]


class Last(nn.Module):
    def __init__(self):
        super().__init__()
        self.graph = nn.Linear(8, 4)

    def forward(self, features):
        return self.graph(features[0])


def test_names_are_unique_and_names_in_python():
    for model in (Names().eval(), Supernet(Names(), Last()).eval()):
        plain = export_subnet(model, {}, TASK.example)
        names = [name for name, _ in plain.named_children()]
        assert len({*names}) == len(names) == 10 + isinstance(model, Supernet)
        assert all(name.isidentifier() for name in names)
        close(plain(IMAGES), model(IMAGES))


class Branches(nn.Module):
    def forward(self, x):
        return x if x.mean() > 0 else -x


class Counts(nn.Module):
    def forward(self, x):
        return torch.stack([x[i] for i in range(len(x))])


class Gathers(nn.Module):
    def forward(self, x):
        return x * float(x.mean())


@pytest.mark.parametrize("layer", [Branches(), Counts(), Gathers()], ids=lambda layer: type(layer).__name__)
def test_a_model_that_cannot_be_traced_is_a_mistake(layer):
    with pytest.raises(UserError, match="cannot be traced") as caught:
        exported(nn.Conv2d(1, 2, 1), nn.Sequential(nn.ReLU(), layer))
    assert "export" in caught.value.faults[0].hint
    source, first = inspect.getsourcelines(type(layer).forward)
    place = rf"1\.1, a {type(layer).__name__}, {__file__}:{first + 1} \({re.escape(source[1].strip())}\)"
    assert re.search(place, str(caught.value))


def test_a_mixed_operation_leaves_its_choice_alone():
    op = Variable("op", ("conv", "pool"))
    model = nn.Sequential(Mixed({"conv": Conv(1, 2), "pool": nn.AvgPool2d(2)}, op), nn.ReLU())
    assert [type(m) for m in export_subnet(model.eval(), {"op": "pool"}, TASK.example).children()] == [
        nn.AvgPool2d,
        nn.ReLU,
    ]
    assert [type(m) for m in export_subnet(model.eval(), {"op": "conv"}, TASK.example).children()] == [
        nn.Conv2d,
        nn.ReLU,
    ]


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = Conv(1, WIDTH)

    def forward(self, x):
        return self.conv(x), {"a": x.mean(1)}


def test_an_output_may_have_several_parts():
    model = Parts().eval()
    plain = export_subnet(model, {"width": 8}, TASK.example)
    close(plain(IMAGES)[0], model(IMAGES)[0])
    close(plain(IMAGES)[1]["a"], model(IMAGES)[1]["a"])


class Mine(nn.Conv2d):
    """No layer of torch."""


class Auxiliary(Parts):
    def forward(self, x):
        return (x, self.conv(x)) if self.training else self.conv(x)


def test_what_a_model_gives_in_training_alone_is_not_exported():
    model = Auxiliary().train()
    plain = export_subnet(model, {"width": 8}, TASK.example)
    assert model.training
    assert plain.training
    close(plain(IMAGES), model(IMAGES)[1])


def test_an_export_that_is_no_layer_of_torch_is_refused():
    class Careless(Conv):
        def export(self):
            return Mine(1, 8, 1)

    with pytest.raises(UserError, match="Mine is no layer of torch"):
        export_subnet(nn.Sequential(Careless(1, 8)), {}, TASK.example)


def test_an_export_may_be_a_sequence():
    class Pair(Conv):
        def export(self):
            return nn.Sequential(super().export(), nn.Sequential(nn.Identity(), nn.Dropout(0.5))).train(self.training)

    pair, relu = exported(Pair(1, 8), nn.ReLU()).children()
    assert [type(m) for m in pair.modules() if not isinstance(m, nn.Sequential)] == [nn.Conv2d, nn.Identity, nn.Dropout]
    assert type(relu) is nn.ReLU


# -- difference -------------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """Two outputs, the second of them multiplied."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x, {"scaled": x * self.factor}


def test_a_difference_is_relative_to_the_largest_output_and_the_worst_output_counts():
    assert difference(Scaled(2.0), Scaled(2.0), TASK.example) == 0
    assert difference(Scaled(2.0), Scaled(2.5), TASK.example) == pytest.approx(0.25)
    assert difference(Scaled(200.0), Scaled(250.0), TASK.example) == pytest.approx(0.25)


def test_outputs_of_different_shapes_and_nan_are_within_no_tolerance():
    assert difference(nn.Flatten(), nn.Identity(), TASK.example) == math.inf
    assert not difference(Scaled(1.0), Scaled(math.nan), TASK.example) <= TOLERANCE
    assert not difference(Scaled(math.nan), Scaled(1.0), TASK.example) <= TOLERANCE


def test_taking_a_difference_leaves_both_networks_as_they_were():
    model = make().train()
    before = [tensor.clone() for tensor in model.state_dict().values()]
    assert difference(model, model, TASK.example) == 0
    assert all(map(torch.equal, model.state_dict().values(), before))
    assert all(module.training for module in model.modules())


class TwoInputs(nn.Module):
    """An image and words."""

    def __init__(self):
        super().__init__()
        self.image, self.words = Conv(1, SPACE["width"], 3), nn.Embedding(5, 4)

    def forward(self, image, words):
        return {"image": self.image(image), "words": self.words(words)}


def test_an_example_may_be_any_tree_of_inputs():
    model, arch = TwoInputs(), {"width": 4}
    image, words = torch.zeros(1, 1, 5, 5), torch.tensor([[4, 0, 3]])
    for example in ((image, words), [image, words], {"words": words, "image": image}):
        plain = export_subnet(model, arch, example)
        assert plain.image.out_channels == 4
        with apply(model, arch):
            assert difference(model, plain, example) == 0
        assert difference(model, TwoInputs(), example) > 0
    clip = nn.Sequential(nn.Conv3d(1, 4, 2))
    assert difference(clip, export_subnet(clip, {}, torch.zeros(1, 1, 3, 3, 3)), torch.zeros(1, 1, 3, 3, 3)) == 0


def test_what_can_reduce_itself_is_traced_as_what_it_becomes():
    class Own(nn.Module):
        """Layers that tracing as they are would not get through."""

        def __init__(self):
            super().__init__()
            self.conv = Conv(1, WIDTH, 3)

        def forward(self, x):
            return self.conv(x) if self.conv.elastic.choice["kernel"] else float(x.sum())

        def reduced(self):
            return nn.Sequential(self.conv.export(), nn.Identity())

    model = nn.Sequential(nn.ReLU(), nn.Sequential(Own()), Conv(WIDTH, 2))
    modules = [*model.modules()]
    plain = export_subnet(model, {"width": 4}, TASK.example)
    assert [type(part) for part in plain.children()] == [nn.ReLU, nn.Conv2d, nn.Identity, nn.Conv2d]
    assert [*model.modules()] == modules
    with apply(model, {"width": 4}):
        assert difference(model, plain, TASK.example) == 0


def test_an_exported_network_keeps_its_modules_through_torch_export():
    network = export_subnet(make().eval(), SPACE.smallest(), TASK.example)
    again = torch.export.unflatten(torch.export.export(network, (IMAGES,)))
    assert {name for name, _ in again.named_parameters()} == {name for name, _ in network.named_parameters()}
    close(again(IMAGES), network(IMAGES))
