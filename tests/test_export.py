"""Export: a plain network that computes what the supernet does, in files that load with torch alone."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from toys import Backbone, Conv, Linear, Mixed, Task, make_space

from corenas.errors import UserError
from corenas.export import export, source, write
from corenas.mutable import apply, chosen
from corenas.supernet import Supernet, build_supernet
from corenas.value import Constant, Variable

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
        plain = export(model, arch, TASK.example)
        assert all(map(torch.equal, model.buffers(), buffers))
        assert {module.training for module in plain.modules()} == {training}
        with apply(model, arch):
            close(plain(IMAGES), model(IMAGES))
        assert all(type(module).__module__.startswith("torch") for module in plain.modules())
    assert [module.choice for module in model.modules() if hasattr(module, "choice")] == [
        chosen(module.values) for module in model.modules() if hasattr(module, "choice")]  # fmt: skip


def test_a_plain_network_has_weights_of_its_own():
    model = make().eval()
    plain = export(model, SPACE.largest(), TASK.example)
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
        export(model, {"width": 8}, TASK.example)


# -- files ------------------------------------------------------------------------------------------------------------

LOAD = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0].startswith("corenas"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
sys.path.insert(0, sys.argv[1])
import torch
from safetensors.torch import load_file
from network import Network
torch.set_num_threads(1)
images = torch.load(sys.argv[1] + "/images.pt")
network = Network()
network.load_state_dict(load_file(sys.argv[1] + "/network.safetensors"))
network.eval()
program = torch.export.load(sys.argv[1] + "/network.pt2").module()
torch.save([network(images), program(images), program(images[:1]), program(images[:5])], sys.argv[1] + "/found.pt")
assert not [name for name in sys.modules if name.startswith("corenas")]
"""


def test_the_files_load_with_torch_alone_and_compute_the_same(tmp_path):
    plain = export(make(0.3).eval(), ARCHS[4], TASK.example)
    written = write(plain, TASK.example, tmp_path, ("safetensors", "python", "pt2"), 'A "title" \\ with """ quotes')
    assert {name: path.name for name, path in written.items()} == {
        "safetensors": "network.safetensors", "python": "network.py", "pt2": "network.pt2"}  # fmt: skip
    torch.save(IMAGES, tmp_path / "images.pt")
    done = subprocess.run(
        [sys.executable, "-I", "-c", LOAD, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    network, program, one, five = torch.load(tmp_path / "found.pt")
    wanted = plain(IMAGES)
    for found, part in ((network, wanted), (program, wanted), (one, wanted[:1]), (five, wanted[:5])):
        close(found, part, 1e-5)


def test_only_what_is_asked_for_is_written(tmp_path):
    plain = export(make().eval(), ARCHS[0], TASK.example)
    assert [*write(plain, TASK.example, tmp_path, ("python",), "t")] == ["python"]
    assert [path.name for path in tmp_path.iterdir()] == ["network.py"]


def rebuilt(plain):
    """The network that its source builds, with its weights."""
    namespace = {}
    exec(source(plain, "a title", TASK.example), namespace)
    network = namespace["Network"]()
    network.load_state_dict(plain.state_dict())
    return network.train(plain.training)


def exported(*layers, arch=None, example=TASK.example):
    torch.manual_seed(0)
    return export(nn.Sequential(*layers).eval(), arch or {"width": 4}, example)


LAYERS = [
    nn.ReLU(), nn.ReLU6(inplace=True), nn.LeakyReLU(0.3), nn.ELU(0.7), nn.CELU(1.3), nn.SELU(), nn.GELU("tanh"),
    nn.GELU(), nn.SiLU(), nn.Mish(), nn.Hardswish(), nn.Hardsigmoid(), nn.Hardtanh(-0.3, 0.4),
    nn.Hardtanh(0, float("inf")), nn.Tanh(), nn.Sigmoid(), nn.Softplus(2, 3), nn.Softsign(), nn.Softshrink(0.2),
    nn.Hardshrink(0.1), nn.Tanhshrink(), nn.LogSigmoid(), nn.Threshold(0.1, 0.2), nn.PReLU(), nn.PReLU(8, 0.1),
    nn.RReLU(0.1, 0.2), nn.Softmax(1), nn.LogSoftmax(1), nn.Softmax2d(), nn.GLU(1), nn.Identity(), nn.Dropout(0.3),
    nn.Dropout2d(0.2, inplace=True), nn.AlphaDropout(0.1), nn.Upsample(scale_factor=2),
    nn.Upsample((12, 12), mode="bilinear"), nn.Upsample((6, 9)),
    nn.Upsample(scale_factor=(2.0, 1.5), mode="bilinear", align_corners=True), nn.LayerNorm((8, 8, 8)),
    nn.LayerNorm(8), nn.LayerNorm((8, 8)), nn.LayerNorm((8, 8), elementwise_affine=False),
    nn.LayerNorm(8, 0.1, bias=False), nn.GroupNorm(2, 8), nn.GroupNorm(4, 8, 0.1, False), nn.InstanceNorm2d(8),
    nn.InstanceNorm2d(8, affine=True), nn.BatchNorm2d(8), nn.BatchNorm2d(8, 0.01, None),
    nn.BatchNorm2d(8, affine=False), nn.BatchNorm2d(8, track_running_stats=False), nn.RMSNorm((8, 8)),
    nn.LocalResponseNorm(3, 0.1), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d((2, 3), ceil_mode=True), nn.AvgPool2d(2),
    nn.AvgPool2d((3, 1), 1, (1, 0), False, False), nn.AdaptiveAvgPool2d(1), nn.AdaptiveAvgPool2d((2, None)),
    nn.AdaptiveMaxPool2d((3, 2)), nn.LPPool2d(2, 2), nn.ZeroPad2d(1), nn.ZeroPad2d((1, 0, 2, 0)),
    nn.ConstantPad2d(1, 0.5), nn.ReflectionPad2d((1, 2, 1, 2)), nn.ReplicationPad2d(2), nn.Conv2d(8, 4, 3),
    nn.Conv2d(8, 4, (3, 1), (1, 2), (1, 0), bias=False), nn.Conv2d(8, 8, 3, padding="same", groups=4, dilation=2),
    nn.Conv2d(8, 4, 3, padding=1, padding_mode="reflect"), nn.ConvTranspose2d(8, 4, 3, 2, 1, output_padding=1),
    nn.Linear(8, 3), nn.Linear(8, 3, bias=False), nn.PixelShuffle(2), nn.PixelUnshuffle(2), nn.ChannelShuffle(2),
    nn.Flatten(), nn.Flatten(2, 3), nn.Unflatten(1, (2, 4)), nn.Unflatten(1, (2, 2, 2)), nn.Unfold(3, padding=1),
    nn.Hardswish(inplace=True),
]  # fmt: skip


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_a_layer_of_torch_is_written_as_it_is(layer):
    torch.manual_seed(1)
    for p in layer.parameters():
        nn.init.normal_(p)
    plain = exported(nn.Conv2d(1, 8, 1), layer)
    again = rebuilt(plain)
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(again(x), plain(x))
    assert re.sub(r"\((\d+), \1\)", r"\1", str(again.get_submodule("layer_1"))) == re.sub(
        r"\((\d+), \1\)", r"\1", str(layer)
    )
    torch.manual_seed(2)
    wanted = plain.train()(x)
    torch.manual_seed(2)
    assert torch.equal(again.train()(x), wanted)


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
def test_residual_and_dense_graphs_are_written_as_they_are(width, depth, tmp_path):
    torch.manual_seed(0)
    model = Graph(depth).eval()
    plain = export(model, {"width": width}, TASK.example)
    with apply(model, {"width": width}):
        close(plain(IMAGES), model(IMAGES), 1e-5)
    assert torch.equal(rebuilt(plain)(IMAGES), plain(IMAGES))
    if depth == 1:
        assert set(write(plain, TASK.example, tmp_path, ("safetensors", "python", "pt2"), "t")) == {
            "safetensors",
            "python",
            "pt2",
        }
        assert load_file(tmp_path / "network.safetensors").keys() == plain.state_dict().keys()


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
        plain = export(model, {}, TASK.example)
        names = [name for name, _ in plain.named_children()]
        assert len({*names}) == len(names) == 10 + isinstance(model, Supernet)
        assert all(name.isidentifier() for name in names)
        close(plain(IMAGES), model(IMAGES))
        assert torch.equal(rebuilt(plain)(IMAGES), plain(IMAGES))


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
        exported(nn.Conv2d(1, 2, 1), layer)
    assert "export" in caught.value.faults[0].hint


def test_a_layer_that_cannot_be_written_as_python_is_a_mistake():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(8, 4, batch_first=True)

        def forward(self, x):
            return self.lstm(x[:, 0])[0]

    plain = export(Recurrent().eval(), {}, TASK.example)
    with pytest.raises(UserError, match="cannot be written as Python"):
        source(plain, "t", TASK.example)


def test_a_network_for_one_batch_size_is_no_program(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 1)

        def forward(self, x):
            return self.conv(x).reshape(2, -1)

    plain = export(Two().eval(), {}, TASK.example)
    with pytest.raises(UserError, match="pt2"):
        write(plain, TASK.example, tmp_path, ("pt2",), "t")


def test_a_mixed_operation_leaves_its_choice_alone():
    op = Variable("op", ("conv", "pool"))
    model = nn.Sequential(Mixed({"conv": Conv(1, 2), "pool": nn.AvgPool2d(2)}, op), nn.ReLU())
    assert [type(m) for m in export(model.eval(), {"op": "pool"}, TASK.example).children()] == [nn.AvgPool2d, nn.ReLU]
    assert [type(m) for m in export(model.eval(), {"op": "conv"}, TASK.example).children()] == [nn.Conv2d, nn.ReLU]


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = Conv(1, WIDTH)

    def forward(self, x):
        return self.conv(x), {"a": x.mean(1)}


def test_an_output_may_have_several_parts():
    model = Parts().eval()
    plain = export(model, {"width": 8}, TASK.example)
    close(plain(IMAGES)[0], model(IMAGES)[0])
    close(plain(IMAGES)[1]["a"], model(IMAGES)[1]["a"])
    assert torch.equal(rebuilt(plain)(IMAGES)[0], plain(IMAGES)[0])


class Mine(nn.Conv2d):
    """No layer of torch."""


def test_an_export_that_is_no_layer_of_torch_is_refused():
    class Careless(Conv):
        def export(self):
            return Mine(1, 8, 1)

    with pytest.raises(UserError, match="Mine is no layer of torch"):
        export(nn.Sequential(Careless(1, 8)), {}, TASK.example)


def test_an_export_may_be_a_sequence():
    class Pair(Conv):
        def export(self):
            return nn.Sequential(super().export(), nn.Sequential(nn.Identity(), nn.Dropout(0.5))).train(self.training)

    plain = exported(Pair(1, 8), nn.ReLU())
    assert torch.equal(rebuilt(plain)(IMAGES), plain(IMAGES))
