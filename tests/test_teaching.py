"""Who teaches: a path of the step, or a network that learns no more."""

from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
import toys
from attrs import frozen
from torch import nn

from corenas.contracts import DistillerContext
from corenas.errors import UserError
from corenas.mutable import apply
from corenas.run.alone import stand_alone
from corenas.run.spec import TeacherSettings
from corenas.supernet import build_supernet
from corenas.teaching import FixedTeacher, lesson, load_network, show_example, start_distiller
from corenas.testing.algorithms import ScaledLabels, SoftLabels
from corenas.testing.small import condition, differing

CPU, SPACE = torch.device("cpu"), toys.make_space()


class Net(nn.Module):
    """A network of somebody else's, for images of 8x8."""

    def __init__(self, classes=3):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, classes)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


def saved(path, classes=3):
    """Write a network to a file. Returns it."""
    torch.manual_seed(0)
    network = Net(classes).eval()
    example = torch.zeros(2, 1, 8, 8)
    if path.suffix == ".pt2":
        batch = ({0: torch.export.Dim("batch", min=1)},)
        torch.export.save(torch.export.export(network, (example,), dynamic_shapes=batch), path)
    else:
        torch.jit.trace(network, example).save(path)
    return network


@frozen
class Soft:
    """Soft cross entropy, with a scale that is learnt or without.

    learns: whether it is
    taps: parts of the networks
    """

    learns: bool = False
    taps: tuple = ()

    def start(self, context: DistillerContext):
        live = ScaledLabels() if self.learns else SoftLabels()
        live.taps = self.taps
        return live


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", ["net.pt2", "net.pt", "run/best/network.pt2"])
def test_a_fixed_teacher_answers_as_the_network_did(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    network, task = saved(path), toys.Task()
    source = tmp_path / "run" if "run" in name else path
    student = build_supernet(toys.Backbone(), SPACE, task)
    _, teacher = start_distiller(Soft(), task, student, CPU, load_network(source, CPU))
    images = task.data["valid"][0][:5]
    seen = teacher((images, None))
    torch.testing.assert_close(seen.logits, network(images))
    assert not seen.logits.requires_grad


def test_modules_of_a_teacher_in_a_pt2_file_keep_their_names(tmp_path):
    network, task = saved(tmp_path / "net.pt2"), toys.Task()
    images = task.data["valid"][0][:5]
    seen = FixedTeacher(load_network(tmp_path / "net.pt2", CPU), task, ("body.0",))((images, None))
    torch.testing.assert_close(seen.features[0], network.body[0](images))


def test_what_is_no_network_is_refused(tmp_path):
    (tmp_path / "bad.pt2").write_bytes(b"no network")
    for source, text in ((tmp_path, "is no network"), (tmp_path / "bad.pt2", "cannot be read")):
        with pytest.raises(UserError, match=text) as caught:
            load_network(source, CPU)
        assert caught.value.faults[0].dotted == "teacher.from"


def test_a_teacher_of_other_classes_is_refused():
    task = toys.Task()
    with pytest.raises(UserError, match="answers with"):
        start_distiller(Soft(), task, build_supernet(toys.Backbone(), SPACE, task), CPU, Net(classes=7).eval())


def test_a_part_that_there_is_not_is_named():
    task = toys.Task()
    model = build_supernet(toys.Backbone(), SPACE, task)
    with pytest.raises(UserError, match="no part 'stagee'") as caught:
        show_example(model, task, ("stagee",))
    assert "did you mean 'stage'" in caught.value.faults[0].hint
    before = condition(model)
    assert len(show_example(model, task, ("stage", -1)).features) == 2
    assert not differing(before, condition(model))


def test_a_lesson_is_the_labels_and_what_the_teacher_says_by_its_weight():
    task, network, asked = toys.Task(), Net().eval(), []
    model = build_supernet(toys.Backbone(), SPACE, task).eval()
    network.register_forward_hook(lambda *_: asked.append(1))
    images, labels = (part[:8] for part in task.data["train"])
    batch, live = (images, labels), SoftLabels()
    loss_of = lesson(task, batch, live, FixedTeacher(network, task, (), 0.25))
    for arch in (SPACE.largest(), SPACE.smallest()):
        with apply(model, arch):
            logits = model(images)
            wanted = 0.25 * F.cross_entropy(logits, labels) + F.cross_entropy(logits, network(images).softmax(1))
            torch.testing.assert_close(loss_of(model), wanted)
    assert len(asked) == 1 + 2  # the lesson asks once, for all paths
    torch.testing.assert_close(lesson(task, batch)(model), task.loss(model(images), batch))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_network_is_retrained_with_a_teacher_and_goes_on_after_a_kill(tmp_path):
    saved(tmp_path / "net.pt2")
    spec = toys.make_spec(tmp_path, toys.make_catalogue(), train={"epochs": 3, "batch_size": 32})
    arch, teacher = SPACE.smallest(), TeacherSettings(str(tmp_path / "net.pt2"), 0.5)

    def trained(**more):
        return stand_alone(spec, toys.Task(), arch, **more).state_dict()

    alone, taught = trained(), trained(distiller=Soft(learns=True), teacher=teacher)
    assert not toys.same(alone, taught)
    assert alone.keys() == taught.keys()  # what the distiller learns is no part of the network
    again = {"distiller": Soft(learns=True), "teacher": teacher, "checkpoint": tmp_path / "c.pt"}
    with pytest.raises(KeyboardInterrupt):
        trained(**again, emit=toys.killer(points=2))
    kept = torch.load(tmp_path / "c.pt", weights_only=True)
    assert float(kept["distiller"]["scale"]) != 1.0
    assert toys.same(trained(**again), taught)


@frozen
class Labels(toys.AlgorithmOptions):
    """Trains on the labels; it may have a teacher."""

    uses: ClassVar = ("distiller", "teacher")


def test_tables_about_teaching_that_nobody_looks_at_are_refused(tmp_path):
    def keys(algorithm=toys.AlgorithmOptions, **tables):
        catalogue = toys.make_catalogue(distillers=Soft, algorithms=algorithm)
        try:
            toys.make_spec(tmp_path, catalogue, **tables)
        except UserError as error:
            return [fault.dotted for fault in error.faults]
        return []

    teacher = {"from": "runs/large"}
    assert keys(distiller="toy") == ["distiller"]
    assert keys(teacher=teacher) == ["teacher"]
    assert keys(Labels, distiller="toy") == ["teacher"]
    assert keys(Labels, teacher=teacher) == ["distiller"]
    assert keys(Labels, distiller="toy", teacher=teacher) == []
    assert keys(retrain={"distiller": "toy"}) == ["retrain.teacher"]
    assert keys(retrain={"distiller": "toy", "teacher": teacher}) == []


@frozen
class Distils(toys.AlgorithmOptions):
    """Distils by what it takes where a spec names none."""

    needs: ClassVar = ("mutator", "searcher", "distiller")
    defaults: ClassVar = {"distiller": "toy"}


def test_an_algorithm_names_the_component_that_stands_in(tmp_path):
    catalogue = toys.make_catalogue(distillers=Soft, algorithms=Distils)
    assert toys.make_spec(tmp_path, catalogue).distiller == Soft()
    assert toys.make_spec(tmp_path, catalogue, distiller={"type": "toy", "learns": True}).distiller == Soft(True)
    with pytest.raises(UserError, match="no distiller 'toy'") as caught:
        toys.make_spec(tmp_path, toys.make_catalogue(algorithms=Distils))
    assert caught.value.faults[0].dotted == "distiller"
