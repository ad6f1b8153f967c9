import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from corenas.contracts import Evaluator, ExportContext, Exporter
from corenas.errors import UserError
from corenas.export import export_subnet
from corenas.options import structure
from corenas.plugins import load_catalogue
from corenas.space import SearchSpace
from corenas.testing import evaluators
from corenas.testing.backbones import used_network
from corenas.testing.components import component_checks, spec_fragments
from corenas.testing.distributions import distribution_checks
from corenas.testing.evaluators import context
from corenas.testing.exporters import exporter_checks
from corenas.testing.small import Task, make_space
from corenas_exporter_onnx import Int8, Onnx, OnnxInt8
from corenas_exporter_onnx.graph import OnnxModule

IMAGE = (1, 28, 28)
CATALOGUE = load_catalogue()
EXAMPLES = [n for n in CATALOGUE.names("backbones") if hasattr(CATALOGUE.find("backbones", n).cls, "example")]


def ran(path, images):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: images.numpy()})


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_onnxruntime_computes_the_networks_of_every_backbone_for_any_batch_size(name, tmp_path):
    cls = CATALOGUE.find("backbones", name).cls
    backbone, space = structure(cls.example["backbone"], cls), SearchSpace.from_table(cls.example["space"])
    model = used_network(backbone, space, IMAGE)
    # The largest of each are right as well, which takes as long again.
    for number, arch in enumerate([space.sample(np.random.default_rng(1))]):
        plain = export_subnet(model, arch, torch.zeros(1, *IMAGE)).eval()
        path = Onnx().write(plain, tmp_path, ExportContext(torch.zeros(1, *IMAGE)))
        onnx.checker.check_model(onnx.load(path), full_check=True)
        for n in (1, 5):
            images = torch.randn(n, *IMAGE, generator=torch.Generator().manual_seed(number))
            with torch.no_grad():
                wanted = plain(images)
            for found, part in zip(ran(path, images), wanted, strict=True):
                assert np.abs(found - part.numpy()).max() <= 1e-4 * part.abs().max()


@pytest.fixture(scope="module")
def trained():
    """A context whose network has learnt, with the images that it is measured on."""
    torch.manual_seed(0)
    where = context()
    optimizer = torch.optim.Adam(where.supernet.parameters(), 1e-2)
    for _ in range(40):
        images, labels = where.task.data["train"]
        loss = F.cross_entropy(where.supernet.train()(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return where


def test_eight_bits_cost_at_most_two_points_of_accuracy(trained):
    archs = [make_space().largest()]
    exact = CATALOGUE.options("evaluators", "accuracy").start(trained)(archs, 1.0)
    for floating, whole in zip(exact, Int8().start(trained)(archs, 1.0), strict=True):
        assert floating["top1"] > 60
        assert whole.keys() == {f"int8_{name}" for name in floating}
        assert abs(whole["int8_top1"] - floating["top1"]) <= 2


def test_weights_are_whole_numbers_and_ranges_those_of_the_images_given(tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 3)).eval()
    images = [torch.randn(16, 1, 8, 8) for _ in range(3)]
    asked = []

    def inputs(n):
        asked.append(n)
        return images

    setting = ExportContext(torch.zeros(1, 1, 8, 8), "small", inputs)
    model = onnx.load(OnnxInt8(samples=7).write(network, tmp_path, setting))
    assert asked == [7]
    weights = {w.name: onnx.numpy_helper.to_array(w) for w in model.graph.initializer}
    assert {w.dtype for w in weights.values() if w.ndim > 1} == {np.dtype("int8")}
    (scale,) = (weights[node.input[1]] for node in model.graph.node if node.input[0] == model.graph.input[0].name)
    seen = torch.cat(images)
    assert float(scale) == pytest.approx(float(seen.max() - seen.min()) / 255, rel=0.01)
    with torch.no_grad():
        wanted = network(images[0])
    found = OnnxModule((tmp_path / "network-int8.onnx").read_bytes())(images[0])
    assert 0 < float((found - wanted).abs().max()) < 0.1 * float(wanted.abs().max())


def test_without_training_images_there_are_no_eight_bits(tmp_path):
    with pytest.raises(UserError, match="training images"):
        OnnxInt8().write(nn.Conv2d(1, 2, 1).eval(), tmp_path, ExportContext(torch.zeros(1, 1, 8, 8)))
    assert not [*tmp_path.iterdir()]


class Branching(nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x


class Nondeterministic(nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x)


@pytest.mark.parametrize("network", [Branching(), Nondeterministic()], ids=lambda network: type(network).__name__)
def test_a_network_that_onnx_does_not_hold_is_a_mistake_and_no_file(network, tmp_path):
    with pytest.raises(UserError, match="cannot be written as onnx"):
        Onnx().write(network.eval(), tmp_path, ExportContext(torch.zeros(1, 3, 4, 4)))
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("check", exporter_checks)
@pytest.mark.parametrize("options", [Onnx(), OnnxInt8()], ids=lambda options: type(options).__name__)
def test_conforms(options, check):
    check(options)


# The others would write a hundred graphs.
@pytest.mark.parametrize("check", [
    *component_checks, evaluators.promises_its_metrics_before_any_data_is_read, evaluators.says_whether_it_is_cheap,
    evaluators.works_without_a_supernet_or_says_so, evaluators.never_reads_test_data,
])  # fmt: skip
def test_the_evaluator_conforms(check):
    check(Int8(samples=16))


@pytest.mark.parametrize("check", distribution_checks)
def test_the_distribution_conforms(check):
    check("corenas_exporter_onnx")


def test_options_are_components_under_their_names():
    assert isinstance(CATALOGUE.options("exporters", "onnx"), Exporter)
    assert isinstance(CATALOGUE.options("evaluators", "int8"), Evaluator)
    assert Int8().provides(Task()).keys() == {f"int8_{name}" for name in Task().metrics}


def test_the_readme_shows_specs_that_are_right_and_code_that_runs(tmp_path):
    readme = Path(__file__).parents[1] / "README.md"
    formats, evaluators = spec_fragments(readme)
    assert [CATALOGUE.options("exporters", item) for item in formats["export"]["formats"]] == [
        Onnx(), OnnxInt8(samples=512, method="percentile"),
    ]  # fmt: skip
    assert [CATALOGUE.options("evaluators", item) for item in evaluators["evaluators"]][-1] == Int8()
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU()).eval()
    (tmp_path / "runs/quickstart/best").mkdir(parents=True)
    Onnx().write(network, tmp_path / "runs/quickstart/best", ExportContext(torch.zeros(1, 1, 28, 28)))
    code = readme.read_text().split("```python\n")[1].split("```")[0]
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
