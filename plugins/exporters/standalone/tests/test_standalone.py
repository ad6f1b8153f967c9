"""Networks as files: each format loads without corenas and computes what the network does."""

import copy
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import fx, nn

from corenas.contracts import ExportContext, Exporter
from corenas.errors import UserError
from corenas.export import export_subnet
from corenas.plugins import load_catalogue
from corenas.testing.components import spec_fragments
from corenas.testing.distributions import distribution_checks
from corenas.testing.exporters import exporter_checks
from corenas.variables import Variable
from corenas_exporter_standalone import Program, Python, Safetensors, corenas_exporters
from corenas_mutable_slices import ConvNormAct, ElasticDepth, LinearSlice, MixedOp

EXAMPLE = torch.zeros(1, 1, 8, 8)
IMAGES = torch.randn((6, 1, 8, 8), generator=torch.Generator().manual_seed(5))
FORMATS = [Safetensors(), Python(), Program()]


class Subnet(nn.Module):
    """A searchable network with all kinds of choices."""

    def __init__(self):
        super().__init__()
        width, kernel = Variable("width", (4, 8)), Variable("kernel", (1, 3))
        self.stem = ConvNormAct(1, width, kernel, stride=2, act="h_swish")
        blocks = [ConvNormAct(width, width, kernel, groups="depthwise") for _ in range(3)]
        self.stage = ElasticDepth(blocks, Variable("depth", (1, 2, 3)))
        self.pool = MixedOp({"mean": nn.AvgPool2d(2), "max": nn.MaxPool2d(2)}, Variable("pool", ("mean", "max")))
        self.drop = nn.Dropout(0.3)
        self.head = LinearSlice(width, 5)

    def forward(self, x):
        return self.head(self.drop(self.pool(self.stage(self.stem(x))).mean((2, 3))))


ARCHS = [{"width": 8, "kernel": 3, "depth": 3, "pool": "mean"}, {"width": 4, "kernel": 1, "depth": 2, "pool": "max"}]


def traced(model, arch=None):
    """The graph of a module, with weights and statistics that are not those it began with, in evaluation mode."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return export_subnet(model.eval(), arch or {}, EXAMPLE)


def rebuilt(network, folder):
    """The network of network.py, with the weights in network.safetensors."""
    file = Python().write(network, folder, ExportContext(EXAMPLE, "a title"))
    module = importlib.util.module_from_spec(spec := importlib.util.spec_from_file_location("network", file))
    spec.loader.exec_module(module)
    again = module.Network()
    again.load_state_dict(load_file(Safetensors().write(network, folder, ExportContext(EXAMPLE, "a title"))))
    return again.eval()


def program(network, folder):
    return torch.export.load(Program().write(network, folder, ExportContext(EXAMPLE, "a title"))).module()


# -- all formats ------------------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("arch", ARCHS, ids=str)
def test_the_files_load_without_corenas_and_compute_the_same(arch, tmp_path):
    plain = traced(Subnet(), arch)
    files = [
        options.write(plain, tmp_path, ExportContext(EXAMPLE, 'A "title" \\ with """ quotes')) for options in FORMATS
    ]
    assert files == [tmp_path / name for name in ("network.safetensors", "network.py", "network.pt2")]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    torch.save(IMAGES, tmp_path / "images.pt")
    done = subprocess.run(
        [sys.executable, "-I", "-c", LOAD, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    wanted = plain(IMAGES)
    for found, part in zip(torch.load(tmp_path / "found.pt"), (wanted, wanted, wanted[:1], wanted[:5]), strict=True):
        torch.testing.assert_close(found, part, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", FORMATS, ids=lambda options: type(options).__name__)
def test_the_same_network_is_the_same_file_bit_for_bit(options, tmp_path):
    contents = []
    for _ in range(2):  # the networks lie at other addresses
        file = options.write(traced(Subnet(), ARCHS[0]), tmp_path, ExportContext(EXAMPLE, "t"))
        contents.append(file.read_bytes())
    assert contents[0] == contents[1]


@pytest.mark.parametrize("options", FORMATS, ids=lambda options: type(options).__name__)
def test_writing_leaves_the_network_as_it_was(options, tmp_path):
    plain = traced(Subnet(), ARCHS[0])
    code, state = plain.code, {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    options.write(plain, tmp_path, ExportContext(EXAMPLE, "t"))
    assert plain.code == code
    assert plain.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in plain.state_dict().items())
    assert not any(module.training for module in plain.modules())
    assert all(p.requires_grad and p.grad is None for p in plain.parameters())


@pytest.mark.parametrize("options", FORMATS, ids=lambda options: type(options).__name__)
def test_a_folder_that_is_not_there_is_an_error_of_the_system(options, tmp_path):
    with pytest.raises(FileNotFoundError):
        options.write(traced(nn.Conv2d(1, 2, 1)), tmp_path / "none", ExportContext(EXAMPLE, "t"))


# -- safetensors ------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.register_buffer("turned", torch.randn(3, 2).t())

    def forward(self, x):
        return self.second(self.first(x))


def test_weights_that_share_memory_are_written_under_each_name(tmp_path):
    network = Tied()
    state = load_file(Safetensors().write(network, tmp_path, ExportContext(EXAMPLE, "t")))
    assert state.keys() == network.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in network.state_dict().items())


def test_a_state_that_is_not_tensors_alone_is_a_mistake(tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"note": "text"}

    with pytest.raises(UserError, match="cannot be written as safetensors") as caught:
        Safetensors().write(Extra(8, 8), tmp_path, ExportContext(EXAMPLE, "t"))
    assert caught.value.faults[0].hint == 'leave "safetensors" out of export.formats'
    assert not [*tmp_path.iterdir()]


# -- python -----------------------------------------------------------------------------------------------------------

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
def test_a_layer_of_torch_is_written_as_it_is(layer, tmp_path):
    plain = traced(nn.Sequential(nn.Conv2d(1, 8, 1), layer))
    again = rebuilt(plain, tmp_path)
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
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.layers = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(depth))
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


@pytest.mark.parametrize("depth", [1, 20])
def test_residual_and_dense_graphs_are_written_as_they_are(depth, tmp_path):
    plain = traced(Graph(depth))
    assert torch.equal(rebuilt(plain, tmp_path)(IMAGES), plain(IMAGES))
    torch.testing.assert_close(program(plain, tmp_path)(IMAGES), plain(IMAGES), atol=1e-5, rtol=1e-5)


READABLE = '''
"""a title"""

import torch
from torch import nn


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.ops_mix = nn.Conv2d(4, 4, 1)
        self.ops_act = nn.Hardswish(inplace=True)
        self.graph_ = nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.zeros((4, 1, 1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = self.norm(x)
        y = self.ops_mix(x)
        y = self.ops_act(y)
        z = self.scale
        y = y * z
        x = x + y
        x = x.mean((2, 3))
        x = self.graph_(x)
        return x
'''.lstrip()


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.ops = nn.ModuleDict({"mix": nn.Conv2d(4, 4, 1), "act": nn.Hardswish(inplace=True)})
        self.graph_ = nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, images):
        features = self.norm(self.stem(images))
        return self.graph_((features + self.ops["act"](self.ops["mix"](features)) * self.scale).mean((2, 3)))


def test_the_file_reads_as_if_a_person_had_written_it(tmp_path):
    assert Python().write(traced(Small()), tmp_path, ExportContext(EXAMPLE, "a title")).read_text() == READABLE


class Names(nn.Module):
    """Names that collide once dots are gone, or that Python or a graph module keep for themselves."""

    def __init__(self):
        super().__init__()
        self.a = nn.ModuleDict({"b_c": nn.Conv2d(1, 2, 1), "b": nn.ModuleDict({"c": nn.Conv2d(2, 3, 1)})})
        self.a_b_c = nn.Conv2d(3, 4, 1)
        self.graph = nn.Conv2d(4, 5, 1)
        self.ops = nn.ModuleDict({"3x3-conv": nn.Conv2d(5, 6, 1), "lambda": nn.Conv2d(6, 7, 1)})
        self.x = nn.Conv2d(7, 8, 1)
        self.code = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU())

    def forward(self, images):
        x = self.a_b_c(self.a["b"]["c"](self.a["b_c"](images)))
        return self.code(self.x(self.ops["lambda"](self.ops["3x3-conv"](self.graph(x)))))


def test_any_name_of_a_layer_can_be_written(tmp_path):
    plain = traced(Names())
    assert torch.equal(rebuilt(plain, tmp_path)(IMAGES), plain(IMAGES))


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 1)

    def forward(self, x):
        return self.conv(x), {"x_1": x.mean(1), "t2_3": [x]}


def test_an_output_may_have_several_parts_with_names_of_their_own(tmp_path):
    plain = traced(Parts())
    first, second = rebuilt(plain, tmp_path)(IMAGES)
    assert torch.equal(first, plain(IMAGES)[0])
    assert second.keys() == {"x_1", "t2_3"}
    assert torch.equal(second["x_1"], IMAGES.mean(1))


class Pair(nn.Module):
    """A part that is exported as a sequence of layers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 8, 1), nn.Sequential(nn.Identity(), nn.Dropout(0.5)))

    def forward(self, x):
        return self.layers(x)

    def export(self):
        return copy.deepcopy(self.layers)


def test_a_part_may_be_a_sequence(tmp_path):
    plain = traced(nn.Sequential(Pair(), nn.ReLU()))
    assert isinstance(plain.get_submodule("layer_0"), nn.Sequential)
    assert torch.equal(rebuilt(plain, tmp_path)(IMAGES), plain(IMAGES))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(8, 4, batch_first=True)

    def forward(self, x):
        return self.lstm(x[:, 0])[0]


class Sum(nn.Module):
    def forward(self, x, y):
        return x + y


class Mine(nn.Conv2d):
    """No layer of torch."""


def alien():
    graph = fx.Graph()
    graph.output(graph.call_module("mine", (graph.placeholder("x"),)))
    return fx.GraphModule({"mine": Mine(1, 2, 1)}, graph)


def hooked():
    """A layer that does something which no argument of its class says."""
    layer = nn.Conv2d(1, 2, 1)
    layer.register_forward_hook(lambda module, args, output: 2 * output)
    return traced(nn.Sequential(layer))


REFUSED = {
    "Subnet is no graph": Subnet,
    "Mine is no layer of torch.nn": alien,
    "RNNBase": lambda: traced(Recurrent()),
    "argument: 'y'": lambda: fx.symbolic_trace(Sum()),
    "its layers come out different": hooked,
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_network_that_python_cannot_hold_is_a_mistake(reason, tmp_path):
    with pytest.raises(UserError, match="cannot be written as python") as caught:
        Python().write(REFUSED[reason]().eval(), tmp_path, ExportContext(EXAMPLE, "t"))
    assert reason in str(caught.value)
    assert caught.value.faults[0].hint == 'leave "python" out of export.formats'
    assert not [*tmp_path.iterdir()]


# -- pt2 --------------------------------------------------------------------------------------------------------------


def test_a_program_needs_no_traced_network(tmp_path):
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2)).eval()
    torch.testing.assert_close(program(network, tmp_path)(IMAGES), network(IMAGES))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1)

    def forward(self, x):
        return self.conv(x).reshape(2, -1)


def test_a_network_for_one_batch_size_is_no_program(tmp_path):
    with pytest.raises(UserError, match="cannot be written as pt2") as caught:
        Program().write(traced(Two()), tmp_path, ExportContext(EXAMPLE, "t"))
    assert caught.value.faults[0].hint == 'leave "pt2" out of export.formats'
    assert not [*tmp_path.iterdir()]


# -- the plugin -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", exporter_checks)
@pytest.mark.parametrize("options", FORMATS, ids=lambda options: type(options).__name__)
def test_conforms(options, check):
    check(options)


@pytest.mark.parametrize("check", distribution_checks)
def test_the_distribution_conforms(check):
    check("corenas_exporter_standalone")


def test_options_are_exporters_under_their_names():
    assert corenas_exporters() == {"safetensors": Safetensors, "python": Python, "pt2": Program}
    assert all(isinstance(options, Exporter) for options in FORMATS)


def test_the_readme_shows_formats_that_exist_and_how_to_load_them():
    readme = Path(__file__).parents[1] / "README.md"
    (spec,) = spec_fragments(readme)
    assert [load_catalogue().options("exporters", name) for name in spec["export"]["formats"]] == FORMATS
    for code in re.findall(r"^```python\n(.*?)^```", readme.read_text("utf-8"), re.DOTALL | re.MULTILINE):
        compile(code, "README.md", "exec")
