import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from attrs import evolve
from torch import nn

from corenas.cli import main
from corenas.contracts import Algorithm, AlgorithmContext
from corenas.cost import Cost
from corenas.errors import UserError
from corenas.mutable import Elastic, apply
from corenas.optim import Schedule
from corenas.options import structure
from corenas.plugins import load_catalogue
from corenas.run.prepare import prepare, start_trainer
from corenas.run.spec import load_spec
from corenas.settings import Train
from corenas.space import SearchSpace
from corenas.supernet import Supernet
from corenas.testing.algorithms import OwnStep, SoftLabels, algorithm_checks
from corenas.testing.components import spec_fragments
from corenas.testing.distributions import distribution_checks
from corenas.testing.small import TABLE, Body, Paths, Task, same
from corenas.train import LivePhase, run_training
from corenas_algorithm_ofa import OnceForAll, Shrinking, corenas_algorithms

SPEC = Path(__file__).parents[4] / "spec"
SPACE = SearchSpace.from_table({**TABLE, "resolution": [6, 8], "op": "skip", "block": {"kernel": [1, 3]}})
TRAIN = Train(epochs=1, batch_size=16, optimizer={"lr": 0.1, "weight_decay": 1e-3}, schedule=Schedule("constant"))
SHORT = (
    Shrinking({"*kernel": "all"}, lr=0.04, warmup=0.5),
    Shrinking({"depth": 2}, epochs=2, lr=0.02, paths=2),
    Shrinking({"depth": "all"}, paths=2),
    Shrinking({"width": 2}, lr=0.01, paths=4),
    Shrinking({"width": 3}, paths=3),
)


class Resize(nn.Module):
    resizes = ("size",)

    def __init__(self, size):
        super().__init__()
        self.elastic = Elastic({"size": size})

    def forward(self, x):
        return F.interpolate(x, (self.elastic.choice["size"],) * 2)


class Resized(nn.Module):
    """The small network of corenas.testing, with a resolution."""

    def __init__(self, tree):
        super().__init__()
        self.resize, self.body = Resize(tree["resolution"]), Body(tree)
        self.segments, self.feat_dims = self.body.segments, self.body.feat_dims

    def features(self, x):
        return self.body.features(self.resize(x))


class Scene:
    """What trains the small network."""

    def __init__(self, options=None, space=SPACE, train=TRAIN, **task):
        options = OnceForAll(SHORT) if options is None else options
        torch.manual_seed(0)
        self.task = Task(**{"train": 32} | task)
        body = Resized(space.tree)
        self.model = Supernet(body, self.task.head(body.feat_dims))
        self.cost = Cost(self.model, space, self.task.example)
        device = torch.device("cpu")
        context = AlgorithmContext(self.model, space, self.cost, self.task, train, device, SoftLabels())
        self.trainer = options.start(context)

    def train(self, **more):
        run_training(self.trainer, self.model, self.task, Paths(), self.cost, **more)
        return self

    def state(self):
        return self.model.state_dict(), dict(self.trainer.state_dict())

    def outputs(self, archs):
        images = self.task.data["valid"][0]
        self.model.eval()
        with torch.no_grad():
            found = []
            for arch in archs:
                with apply(self.model, arch):
                    found.append(self.model(images))
        return torch.stack(found)


def randomise(model):
    """Give every weight and statistic a value of its own, as after some training."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.5 if "var" in name else torch.randn_like(tensor))


# -- phases -----------------------------------------------------------------------------------------------------------


def test_phases_nest_from_the_full_network_to_the_whole_space():
    phases = Scene().trainer.phases
    assert [phase.space.size for phase in phases] == [2, 16, 24, 28, 56, 84]
    for before, after in itertools.pairwise(phases):
        assert {*before.space} < {*after.space}
    assert {*phases[0].space} == {SPACE.arch({**SPACE.largest(), "resolution": r}) for r in (6, 8)}
    assert {*phases[-1].space} == {*SPACE}


def test_each_phase_has_its_epochs_rate_warm_up_and_paths():
    phases = Scene().trainer.phases
    assert [phase.paths for phase in phases] == [1, 1, 2, 2, 4, 3]
    assert [phase.train.epochs for phase in phases] == [1, 1, 2, 1, 1, 1]
    assert [phase.train.optimizer["lr"] for phase in phases] == [0.1, 0.04, 0.02, 0.1, 0.01, 0.1]
    assert [phase.train.schedule.warmup for phase in phases] == [0, 0.5, 0, 0, 0, 0]
    for phase in phases:
        assert evolve(phase.train, epochs=1, optimizer=TRAIN.optimizer, schedule=TRAIN.schedule) == TRAIN


def test_without_phases_they_are_the_papers():
    train = Train(epochs=180, optimizer={"lr": 2.6}, schedule=Schedule("cosine", warmup=5))
    table = {**TABLE, "resolution": [6, 8], "depth": [1, 2, 3, 4], "block": {"kernel": [1, 3, 5], "expand": 1}}
    phases = Scene(OnceForAll(), SearchSpace.from_table({**table, "op": "skip"}), train).trainer.phases
    assert [phase.train.epochs for phase in phases] == [180, 125, 25, 125, 25, 125]
    rates = [phase.train.optimizer["lr"] for phase in phases]
    assert rates == pytest.approx([2.6, 0.96, 0.08, 0.24, 0.08, 0.24])
    assert [phase.train.schedule.warmup for phase in phases] == pytest.approx([5, 5, 0, 5, 0, 5])
    assert [phase.paths for phase in phases] == [1, 1, 2, 2, 4, 4]
    assert [len(phase.space["depth"].choices) for phase in phases] == [1, 1, 2, 4, 4, 4]
    assert [len(phase.space["width"].choices) for phase in phases] == [1, 1, 1, 1, 2, 3]


def test_what_a_space_does_not_have_makes_no_phase_of_the_papers():
    space = SearchSpace.from_table({**TABLE, "resolution": 8, "op": "skip", "depth": [1, 2], "block": {"kernel": 3}})
    phases = Scene(OnceForAll(), space).trainer.phases
    assert [phase.space.size for phase in phases] == [1, 2, 4, 6]


def test_choices_that_are_no_numbers_open_in_their_order():
    space = SearchSpace.from_table({**TABLE, "resolution": 8, "depth": 1, "width": 8, "block": {"kernel": 3}})
    phases = Scene(OnceForAll(), space).trainer.phases
    assert [phase.space["op"].choices for phase in phases] == [("conv",), ("conv", "pool"), ("conv", "pool", "skip")]


@pytest.mark.parametrize(
    ("phases", "key", "text"),
    [
        ([{"width": "all"}, {"widht": 2}], "algorithm.phases[1].open", "no variable 'widht'"),
        ([{"*": "all"}, {"depth": 2}], "algorithm.phases[1]", "opens nothing"),
        ([{"depth": "all"}, {"width": 2, "*kernel": 2}], "algorithm.phases", "no phase opens all of width"),
    ],
)
def test_phases_that_do_not_open_the_whole_space_are_refused(phases, key, text):
    with pytest.raises(UserError, match=text) as caught:
        Scene(OnceForAll(tuple(Shrinking(opened) for opened in phases)))
    assert key in [fault.dotted for fault in caught.value.faults]


# -- the teacher ------------------------------------------------------------------------------------------------------


def test_the_teacher_is_the_full_network_as_its_phase_left_it_and_stays_so():
    scene = Scene()
    steps, taught = [], []
    train_step = scene.trainer.train_step

    def step(batch, step):
        teacher = scene.trainer.teacher
        if step.index == 2:  # the first step of the second phase: only the phase's begin came between
            assert same(teacher.state_dict(), scene.model.state_dict())
        taught.append(None if teacher is None else {k: v.clone() for k, v in teacher.state_dict().items()})
        steps.append((step.lr, len(step.archs)))
        return train_step(batch, step)

    scene.trainer.train_step = step
    scene.train()
    assert taught[:2] == [None, None]
    assert all(same(state, taught[2]) for state in taught[3:])
    assert same(scene.trainer.teacher.state_dict(), taught[2])
    assert not same(scene.model.state_dict(), taught[2])
    assert not any(p.requires_grad or p.grad is not None for p in scene.trainer.teacher.parameters())
    assert [n for _, n in steps] == [1] * 4 + [2] * 6 + [4] * 2 + [3] * 2


@pytest.mark.parametrize("batch_statistics", [False, True])
@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_the_gradient_of_a_step_is_that_of_the_losses_written_out_by_hand(ratio, batch_statistics):
    options = OnceForAll(SHORT, kd_ratio=ratio, batch_statistics=batch_statistics)
    ours, twin = Scene(options, dropout=0.0), Scene(options)
    teacher = Scene(options)
    for scene in (ours, twin, teacher):
        randomise(scene.model)
    ours.trainer.begin(None)
    images, labels = batch = [tensor[:16] for tensor in ours.task.data["train"]]
    archs = [SPACE.smallest(), SPACE.arch({**SPACE.largest(), "width": 6}), SPACE.arch({"depth": 2, "resolution": 6})]
    step = OwnStep(archs, torch.optim.SGD(ours.model.parameters(), lr=0.1), 0, ours.task)
    ours.model.train()
    figures = ours.trainer.train_step(batch, step)
    twin.model.train()
    teacher.model.train(batch_statistics)
    losses = []
    for arch in archs:
        with torch.no_grad(), apply(teacher.model, {**SPACE.largest(), "resolution": arch["resolution"]}):
            says = teacher.model(images).softmax(1)
        with apply(twin.model, arch):
            logits = twin.model(images)
        soft = -(says * logits.log_softmax(1)).sum(1).mean()
        losses.append(F.cross_entropy(logits, labels) + ratio * soft)
        losses[-1].backward()
    for (name, mine), hers in zip(ours.model.named_parameters(), twin.model.parameters(), strict=True):
        assert (mine.grad is None) == (hers.grad is None), name
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, hers.grad, msg=name)
    torch.testing.assert_close(figures["loss"], torch.stack(losses).mean().detach())
    assert step.calls == 3
    if ratio:
        assert same(ours.trainer.teacher.state_dict(), Scene.state(ours)[1]["teacher"])


def test_the_teacher_sees_a_batch_once_for_each_resolution():
    scene = Scene()
    scene.trainer.begin(None)
    seen = []
    scene.trainer.teacher.register_forward_hook(lambda module, *_: seen.append(module.training))
    archs = [SPACE.smallest(), SPACE.arch({"resolution": 6, "width": 6}), SPACE.largest(), SPACE.largest()]
    step = OwnStep(archs, torch.optim.SGD(scene.model.parameters(), lr=0.1), 0, scene.task)
    scene.trainer.train_step([tensor[:8] for tensor in scene.task.data["train"]], step)
    assert seen == [False, False]


@pytest.mark.parametrize("batch_statistics", [False, True])
def test_the_teacher_never_has_dropout_and_keeps_its_statistics(batch_statistics):
    scene = Scene(OnceForAll(SHORT, batch_statistics=batch_statistics), dropout=0.5)
    scene.trainer.begin(None)
    teacher, seen = scene.trainer.teacher, []
    for module in teacher.modules():
        if isinstance(module, nn.Dropout | nn.modules.batchnorm._BatchNorm):
            module.register_forward_pre_hook(lambda module, _: seen.append((type(module).__name__, module.training)))
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    step = OwnStep([SPACE.smallest()], torch.optim.SGD(scene.model.parameters(), lr=0.1), 0, scene.task)
    scene.model.train()
    scene.trainer.train_step([tensor[:8] for tensor in scene.task.data["train"]], step)
    assert {training for name, training in seen if name == "Dropout"} == {False}
    assert {training for name, training in seen if name != "Dropout"} == {batch_statistics}
    assert same(teacher.state_dict(), before)


def test_without_a_teacher_nothing_is_copied():
    scene = Scene(OnceForAll(SHORT, kd_ratio=0.0)).train()
    assert scene.trainer.teacher is None
    assert scene.trainer.state_dict() == {"teacher": None}


def test_it_learns_by_a_distiller():
    with pytest.raises(UserError, match="by a distiller"):
        OnceForAll().start(evolve_context(Scene()))


def evolve_context(scene):
    return AlgorithmContext(scene.model, SPACE, scene.cost, scene.task, TRAIN, torch.device("cpu"))


# -- channels ---------------------------------------------------------------------------------------------------------


def test_channels_are_sorted_before_widths_open_and_no_trained_subnet_changes():
    scene = Scene()
    phases = scene.trainer.phases
    sorts = []
    for before, phase in itertools.pairwise(phases):
        randomise(scene.model)
        archs = [*before.space]
        outputs, weights = scene.outputs(archs), {k: v.clone() for k, v in scene.model.state_dict().items()}
        phase.begin()
        torch.testing.assert_close(scene.outputs(archs), outputs, rtol=1e-4, atol=1e-4)
        sorts.append(not same(scene.model.state_dict(), weights))
    assert sorts == [False, False, False, True, True]


# -- going on ---------------------------------------------------------------------------------------------------------


class Killed:
    """The trainer of a scene, which is killed at a step."""

    def __init__(self, trainer, at):
        self.trainer, self.at, self.phases = trainer, at, trainer.phases
        self.state_dict, self.load_state_dict = trainer.state_dict, trainer.load_state_dict

    def train_step(self, batch, step):
        if step.index == self.at:
            raise KeyboardInterrupt
        return self.trainer.train_step(batch, step)


@pytest.fixture(scope="module")
def whole():
    return Scene().train().state()


@pytest.mark.parametrize("at", range(1, 14))
def test_a_training_killed_at_any_step_ends_with_the_same_bits(at, whole, tmp_path, monkeypatch):
    monkeypatch.setattr("corenas.train.CHECKPOINT_EVERY_S", 0.0)  # a checkpoint at each step
    path = tmp_path / "checkpoint.pt"
    first = Scene()
    with pytest.raises(KeyboardInterrupt):
        run_training(Killed(first.trainer, at), first.model, first.task, Paths(), first.cost, checkpoint=path)
    assert same(Scene().train(checkpoint=path).state(), whole)


def test_somebodys_own_loop_trains_through_all_phases():
    scene = Scene()
    images, labels = scene.task.data["train"]
    index = 0
    for number, phase in enumerate(scene.trainer.phases):
        live = LivePhase(
            scene.trainer,
            scene.model,
            scene.task,
            phase,
            2,
            mutator=Paths(),
            cost=scene.cost,
            number=number,
            index=index,
        )
        for start in (0, 16):
            figures = live.step((images[start : start + 16], labels[start : start + 16]))
            assert figures["loss"].isfinite()
        index = live.index
    assert index == 12


class TooMany:
    """A mutator that draws three archs, whatever a phase wants."""

    def start(self, context):
        return Paths(3).start(evolve(context, paths=None))


def test_a_mutator_that_draws_another_number_of_subnets_is_refused():
    scene = Scene()
    with pytest.raises(UserError, match="draws 3 archs a step where the algorithm wants 1"):
        run_training(scene.trainer, scene.model, scene.task, TooMany(), scene.cost)


# -- contracts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", algorithm_checks, ids=lambda check: check.__name__)
def test_keeps_what_algorithms_promise(check):
    check(OnceForAll())


@pytest.mark.parametrize("check", distribution_checks, ids=lambda check: check.__name__)
def test_keeps_what_distributions_promise(check):
    check("corenas_algorithm_ofa")


def test_is_offered():
    assert corenas_algorithms() == {"ofa": OnceForAll}
    assert isinstance(OnceForAll(), Algorithm)


@pytest.mark.parametrize(
    ("table", "key"),
    [
        ({"phases": [{"open": {"width": 0}}]}, "phases[0].open"),
        ({"phases": [{"open": {"width": "some"}}]}, "phases[0].open.width"),
        ({"phases": [{"epochs": 2}]}, "phases[0].open"),
        ({"phases": [{"open": {"*": "all"}, "paths": 0}]}, "phases[0].paths"),
        ({"kd_ratio": -1}, "kd_ratio"),
        ({"importance": "l3"}, "importance"),
    ],
)
def test_wrong_options_are_named(table, key):
    with pytest.raises(UserError) as caught:
        structure(table, OnceForAll)
    assert [fault.dotted for fault in caught.value.faults] == [key]


def test_the_readme_shows_specs_that_are_right():
    for fragment in spec_fragments(Path(__file__).parents[1] / "README.md"):
        if "algorithm" in fragment:
            options = load_catalogue().options("algorithms", fragment["algorithm"])
            assert isinstance(options, OnceForAll)


def test_a_check_of_a_spec_finds_what_is_wrong_with_its_phases(capsys):
    wrong = ["--set", 'algorithm.phases.0.open={"*kernl" = "all"}', "--set", "search.constraints.flops=1"]
    assert main(["check", "--no-data", str(SPEC / "ofa.toml"), *wrong]) == 2
    told = capsys.readouterr().err
    assert "algorithm.phases.0.open: no variable '*kernl'" in told
    assert "search.constraints" in told, "what else is wrong is told as well"


@pytest.mark.parametrize("name", ["ofa.toml", "imagenet/ofa.toml"])
def test_the_specs_that_come_with_corenas_are_right(name):
    spec, _ = load_spec(SPEC / name, load_catalogue())
    assert isinstance(spec.algorithm, OnceForAll)


def test_the_papers_recipe_has_its_phases():
    spec, _ = load_spec(SPEC / "imagenet" / "ofa.toml", load_catalogue())
    prepared = prepare(spec, data=False, weights=False, device=torch.device("meta"))
    phases = start_trainer(prepared).phases
    assert [phase.train.epochs for phase in phases] == [180, 125, 25, 125, 25, 125]
    assert [phase.train.optimizer["lr"] for phase in phases] == [2.6, 0.96, 0.08, 0.24, 0.08, 0.24]
    assert [phase.paths for phase in phases] == [1, 1, 2, 2, 4, 4]
    sizes = [phase.space.fix({"resolution": 224}).size for phase in phases]
    depths = [(3**3 + 3**4) ** 5, (3**2 + 3**3 + 3**4) ** 5]
    assert sizes == [1, 3**20, *depths, (6**2 + 6**3 + 6**4) ** 5, (9**2 + 9**3 + 9**4) ** 5]
