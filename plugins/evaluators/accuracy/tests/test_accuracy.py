import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from corenas.calibrate import Evaluation
from corenas.contracts import Evaluator, EvaluatorContext, Metric, Racer, Rival
from corenas.cost import Cost
from corenas.errors import UserError
from corenas.export import export_subnet
from corenas.mutable import mutables
from corenas.options import structure
from corenas.plugins import load_catalogue
from corenas.settings import Calibration, Racing
from corenas.space import SearchSpace
from corenas.testing.components import spec_fragments
from corenas.testing.distributions import distribution_checks
from corenas.testing.evaluators import evaluator_checks
from corenas.variables import Int
from corenas_evaluator_accuracy import Accuracy, corenas_evaluators
from corenas_mutable_slices import ConvNormAct, ElasticDepth, LinearSlice

SPACE = SearchSpace([Int("width", 4, 8, 2), Int("depth", 1, 3), Int("kernel", 1, 3, 2)])


class Data(torch.utils.data.Dataset):
    """Small images in three classes; augmented ones are mirrored."""

    def __init__(self, split, augmented=False):
        n = {"train": 70, "valid": 45, "test": 40}[split]
        generator = torch.Generator().manual_seed(n)
        self.x = torch.randn((n, 3, 6, 6), generator=generator) + 0.3
        self.y = (self.x.mean((2, 3)) + 0.1 * torch.randn((n, 3), generator=generator)).argmax(1)
        self.augmented = augmented

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        x = self.x[i]
        return (x.flip(-1) if self.augmented and torch.rand(()) < 0.5 else x), self.y[i]


class Meter:
    """top1 and the mean loss, which tells outputs apart that have the same top1."""

    def __init__(self):
        self.n = self.right = 0
        self.loss = 0.0

    def update(self, outputs, batch):
        self.n += len(outputs)
        self.right += int((outputs.argmax(1) == batch[1]).sum())
        self.loss += float(F.cross_entropy(outputs, batch[1], reduction="sum"))

    def compute(self):
        return {"top1": 100 * self.right / self.n, "loss": self.loss / self.n}


class RightMeter(Meter):
    """Says of each image whether it is right."""

    def __init__(self):
        super().__init__()
        self.each = []

    def update(self, outputs, batch):
        super().update(outputs, batch)
        self.each += (outputs.argmax(1) == batch[1]).tolist()

    def scores(self, metric):
        return torch.tensor(self.each) if metric == "top1" else None


class Images:
    """A task with three classes."""

    example = torch.zeros(1, 3, 6, 6)
    metrics = {"top1": Metric("%"), "loss": Metric("", "min")}  # noqa: RUF012
    splits = {"train": 70, "valid": 45, "test": 40}  # noqa: RUF012

    def __init__(self):
        self.read = []

    def dataset(self, split, augmented):
        self.read.append((split, augmented))
        return Data(split, augmented)

    def forward(self, model, batch):
        return model(batch[0])

    def meter(self):
        return Meter()


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        width, kernel = SPACE.value("width"), SPACE.value("kernel")
        self.stem = ConvNormAct(3, width, kernel, stride=2)
        blocks = [ConvNormAct(width, width, kernel, groups="depthwise", act="h_swish") for _ in range(3)]
        self.stage = ElasticDepth(blocks, SPACE.value("depth"))
        self.drop = nn.Dropout(0.5)
        self.head = LinearSlice(width, 3)

    def forward(self, x):
        return self.head(self.drop(self.stage(self.stem(x)).mean((2, 3))))


def network():
    """A supernet whose statistics are those of no arch."""
    torch.manual_seed(0)
    model = Network()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, 1, 2)
            nn.init.uniform_(module.running_var, 3, 4)
    return model.train()


def context(model, task=None, calibration=None):
    task, calibration = task or Images(), calibration or Calibration(batches=3, batch_size=16)
    evaluation = Evaluation(model, task, calibration, torch.device("cpu"), seed=1, batch_size=20)
    cost = Cost(model, SPACE, task.example)
    return EvaluatorContext(SPACE, cost, task, torch.device("cpu"), model, evaluation, None, None, None)


ARCHS = [SPACE.largest(), SPACE.smallest(), *SPACE.decode(SPACE.draw(np.random.default_rng(0), 4))]


def recalibrated(plain, batches):
    """Each norm's mean and variance over batches as it sees them in training, averaged by their sizes, by hand."""
    seen = {}

    def note(module, args):
        (x,) = args
        mean = x.mean((0, 2, 3))
        variance = ((x - mean[:, None, None]) ** 2).mean((0, 2, 3))
        seen.setdefault(module, []).append((len(x), mean, variance))

    plain.eval()
    norms = [m for m in plain.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.register_forward_pre_hook(note)
        norm.train()
    with torch.no_grad():
        for x, _ in batches:
            plain(x)
    for norm in norms:
        total = sum(n for n, _, _ in seen[norm])
        norm.running_mean = sum(n * mean for n, mean, _ in seen[norm]) / total
        norm.running_var = sum(n * variance for n, _, variance in seen[norm]) / total
    return plain.eval()


@pytest.mark.parametrize("split", ["valid", "train"])
def test_it_is_what_the_exported_network_reaches_when_it_is_recalibrated_by_itself(split):
    model = network()
    setting = context(model)
    measured = Accuracy(split=split).start(setting)(ARCHS, 1.0)
    images = setting.evaluation.images
    assert [len(x) for x, _ in images] == [16, 16, 16]
    data = Data(split)
    for arch, metrics in zip(ARCHS, measured, strict=True):
        plain = recalibrated(export_subnet(model, arch, Images.example), images)
        with torch.no_grad():
            outputs = plain(data.x)
        assert metrics["top1"] == pytest.approx(100 * float((outputs.argmax(1) == data.y).double().mean()))
        assert metrics["loss"] == pytest.approx(float(F.cross_entropy(outputs, data.y)), rel=1e-5)
    assert len({metrics["loss"] for metrics in measured}) == len({*ARCHS})


def test_calibration_images_are_those_of_the_training_data():
    task = Images()
    setting = context(network(), task)
    Accuracy().start(setting)(ARCHS[:1], 1.0)
    assert sorted(task.read) == [("train", False), ("valid", False)]  # and the test data was not touched
    rows = {tuple(row) for row in Data("train").x.flatten(1).tolist()}
    used = [tuple(row) for x, _ in setting.evaluation.images for row in x.flatten(1).tolist()]
    assert {*used} <= rows
    assert len({*used}) == len(used) == 48


def test_the_order_of_archs_makes_no_difference():
    one, other = Accuracy().start(context(network())), Accuracy().start(context(network()))
    found = one(ARCHS, 1.0)
    assert found == other(ARCHS[::-1], 1.0)[::-1] == [metrics for arch in ARCHS for metrics in one([arch], 1.0)]


def test_a_lower_fidelity_is_a_share_of_the_images_the_same_for_all():
    setting = context(network())
    measured = Accuracy().start(setting)
    assert [len(setting.evaluation.split("valid", share)) for share in (1.0, 0.5, 0.1)] == [3, 2, 1]
    assert measured(ARCHS[:2], 0.5) == [*measured(ARCHS[:1], 0.5), *measured(ARCHS[1:2], 0.5)]


def test_nothing_of_it_stays_in_the_supernet():
    model = network()
    before = copy.deepcopy(model)
    Accuracy().start(context(model))(ARCHS, 1.0)
    assert all(map(torch.equal, model.state_dict().values(), before.state_dict().values()))
    for ours, theirs in zip(model.modules(), before.modules(), strict=True):
        assert ours.training == theirs.training
    choices = [[mutable.elastic.choice for mutable in mutables(network)] for network in (model, before)]
    assert choices[0] == choices[1]
    assert all(p.grad is None for p in model.parameters())


def test_without_calibration_batches_the_statistics_of_the_supernet_count():
    model = network()
    (metrics,) = Accuracy().start(context(model, calibration=Calibration(batches=0)))([SPACE.smallest()], 1.0)
    data = Data("valid")
    with torch.no_grad():
        outputs = export_subnet(model, SPACE.smallest(), Images.example).eval()(data.x)
    assert metrics["loss"] == pytest.approx(float(F.cross_entropy(outputs, data.y)), rel=1e-5)


def test_archs_that_race_against_nobody_are_measured_to_the_end():
    task = Images()
    task.meter = RightMeter
    alone, measured = (Accuracy().start(context(network(), task)) for _ in range(2))
    racing = measured.against(Rival("top1", None, 0.01))
    wanted = alone(ARCHS, 1.0)
    for ours, theirs in zip(racing(ARCHS, 1.0), wanted, strict=True):
        assert ours["top1"] == theirs["top1"]
        assert ours["loss"] == pytest.approx(theirs["loss"])
    assert Accuracy.races
    assert isinstance(measured, Racer)


def test_it_provides_the_metrics_of_the_task_and_no_other():
    task = Images()
    assert Accuracy().provides(task) == task.metrics
    (metrics,) = Accuracy().start(context(network(), task))(ARCHS[:1], 1.0)
    assert metrics.keys() == task.metrics.keys()


def test_without_a_supernet_it_says_so():
    model = network()
    cost = Cost(model, SPACE, Images.example)
    setting = EvaluatorContext(SPACE, cost, Images(), torch.device("cpu"), None, None, None, None, None)
    with pytest.raises(UserError, match="trained supernet") as caught:
        Accuracy().start(setting)
    assert caught.value.faults[0].dotted == "evaluators"


@pytest.mark.parametrize("check", evaluator_checks)
@pytest.mark.parametrize("options", [Accuracy(), Accuracy(split="train")], ids=repr)
def test_conforms(options, check):
    check(options)


@pytest.mark.parametrize("check", distribution_checks)
def test_the_distribution_conforms(check):
    check("corenas_evaluator_accuracy")


def test_options_are_an_evaluator_under_its_name():
    assert corenas_evaluators() == {"accuracy": Accuracy}
    assert isinstance(Accuracy(), Evaluator)
    assert not Accuracy.cheap


@pytest.mark.parametrize("table", [{"split": "test"}, {"split": 1}])
def test_wrong_options_are_named_and_test_data_is_one_of_them(table):
    with pytest.raises(UserError) as caught:
        structure(table, Accuracy)
    assert [fault.dotted for fault in caught.value.faults] == ["split"]


def test_the_readme_shows_a_spec_that_is_right():
    spec, racing = spec_fragments(Path(__file__).parents[1] / "README.md")
    assert [load_catalogue().options("evaluators", item) for item in spec["evaluators"]] == [Accuracy()]
    assert structure(spec["calibration"], Calibration).batches == 10
    assert structure(racing["search"]["racing"], Racing) == Racing(0.95, 10)
