import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attrs import evolve
from PIL import Image
from torch import nn
from torch.func import functional_call, grad

from corenas.contracts import Algorithm, AlgorithmContext, Deriving
from corenas.cost import Cost
from corenas.errors import UserError
from corenas.mutable import apply
from corenas.options import structure
from corenas.run.spec import open_spec
from corenas.run.stages import run_spec
from corenas.settings import Train
from corenas.testing.algorithms import (
    SoftLabels,
    algorithm_checks,
    killed_and_resumed_ends_with_the_same_bits,
    own_loop,
    scene,
)
from corenas.testing.components import spec_fragments
from corenas.testing.distributions import distribution_checks
from corenas.testing.small import Paths, Task, make_space, same, some_archs, supernet
from corenas_algorithm_cream import Cream, corenas_algorithms
from corenas_algorithm_cream.board import Board, Entry

SPACE = make_space()
SETTINGS = Train(epochs=3, batch_size=16, optimizer={"type": "SGD", "lr": 0.1, "momentum": 0.9})
SMALL = Cream(warmup=1, board=4, meta_every=2, meta_lr=0.1)
AT_ONCE = evolve(SMALL, warmup=0)
RELEASED = Cream(
    warmup=0,
    board=4,
    meta_every=2,
    measured_on="train",
    loss="shared",
    virtual_lr=1e-4,
    last_match=True,
    borrowed_answers=True,
    duplicates=True,
)


@pytest.mark.parametrize(
    "options", [AT_ONCE, RELEASED, Cream(warmup=0, pick="best", through_match=False)], ids=range(3)
)
@pytest.mark.parametrize("check", algorithm_checks)
def test_conforms(check, options):
    check(options, mutator=Paths(1))


@pytest.mark.parametrize("check", distribution_checks)
def test_the_distribution_conforms(check):
    check("corenas_algorithm_cream")


def test_options_are_an_algorithm_under_its_name():
    assert corenas_algorithms() == {"cream": Cream}
    assert isinstance(Cream(), Algorithm)
    assert Cream.stages == ("train", "derive", "retrain")


# -- the board --------------------------------------------------------------------------------------------------------


def archs(n):
    return [*dict.fromkeys(some_archs(SPACE, n + 10))][:n]


def full_board(**changes):
    """Three paths of 90, 80 and 70 percent at 10, 20 and 30 flops."""
    board = Board(**{"size": 3, "gap": 5.0, "max_flops": 1e9, **changes})
    for arch, score, flops in zip(archs(3), (80.0, 90.0, 70.0), (20.0, 10.0, 30.0), strict=True):
        assert board.accepts(arch, score, flops)
        board.add(Entry(arch, score, flops))
    return board


def test_the_board_is_sorted_by_accuracy_then_by_flops():
    board = full_board(size=4)
    board.add(Entry(archs(4)[3], 80.0, 15.0))
    assert [(e.score, e.flops) for e in board.entries] == [(90, 10), (80, 15), (80, 20), (70, 30)]


@pytest.mark.parametrize(
    ("score", "flops", "taken"),
    [
        (75.1, 1000, True),  # beyond the gap, whatever it costs
        (75.0, 31, False),  # better, but not by more than the gap, and at more flops
        (75.0, 30, True),  # better at no more flops
        (70.0, 29, True),  # as good at fewer flops
        (70.0, 30, True),  # as good in both: the newer one
        (70.0, 31, False),
        (69.9, 1, False),  # worse, however cheap
    ],
)
def test_a_full_board_takes_what_is_better_by_the_gap_or_as_good_at_no_more_flops(score, flops, taken):
    board, arch = full_board(), archs(4)[3]
    assert board.accepts(arch, score, flops) == taken
    if taken:
        board.add(Entry(arch, score, flops))
        assert len(board.entries) == 3
        assert arch in [entry.arch for entry in board.entries]


def test_a_path_that_costs_too_much_is_never_taken():
    board = Board(3, 5.0, max_flops=100)
    assert board.accepts(archs(1)[0], 1.0, 100)
    assert not board.accepts(archs(1)[0], 99.0, 101)


def test_a_path_is_on_the_board_once_as_it_was_last_measured_unless_duplicates_are_asked_for():
    arch = archs(2)[1]  # the one of 90
    for duplicates, scores in ((False, [80, 70, 60]), (True, [90, 80, 70])):
        board = full_board(duplicates=duplicates)
        assert board.accepts(arch, 60.0, 10.0) == (not duplicates)
        if board.accepts(arch, 60.0, 10.0):
            board.add(Entry(arch, 60.0, 10.0))
        assert [entry.score for entry in board.entries] == scores


def test_no_path_teaches_itself():
    board = full_board()
    assert [entry.score for entry in board.teachers(archs(2)[1])] == [80, 70]


# -- the meta network -------------------------------------------------------------------------------------------------


class Smooth(nn.Module):
    """A small supernet with a smooth activation, that of its space's width."""

    def __init__(self):
        super().__init__()
        self.body = copy.deepcopy(supernet(SPACE, Task()))

    def forward(self, x):
        features = self.body.backbone.op(torch.tanh(self.body.backbone.norm(self.body.backbone.stem(x))))
        return self.body.head([torch.tanh(features)])


class Doubles(Task):
    """The task in float64."""

    def __init__(self):
        super().__init__()
        self.example = self.example.double()
        self.data = {split: (images.double(), labels) for split, (images, labels) in self.data.items()}


def smooth_trainer(model=None, **changes):
    task = Doubles()
    model = (model or Smooth()).double().train()
    space = SPACE
    cost = Cost(supernet(SPACE, Task()), space, Task().example)
    context = AlgorithmContext(model, space, cost, task, SETTINGS, torch.device("cpu"))
    torch.manual_seed(1)
    trainer = Cream(warmup=0, **changes).start(context)
    trainer.meta.double()
    return trainer


def taken(task, start, stop, split="train"):
    images, labels = task.data[split]
    return images[start:stop], labels[start:stop]


@pytest.mark.parametrize("through_match", [True, False])
@pytest.mark.parametrize("last_match", [True, False])
def test_the_meta_gradient_is_that_of_torch_func(through_match, last_match):
    trainer = smooth_trainer(through_match=through_match, last_match=last_match)
    task, model, lr = trainer.task, trainer.supernet, 0.3
    student, *teachers = archs(4)
    for number, arch in enumerate(teachers):
        images = taken(task, 4 * number, 4 * number + 4)
        with torch.no_grad(), apply(model, arch):
            trainer.board.add(Entry(arch, 90.0 - number, 1.0, images, model(images[0]).softmax(1)))
    best, last = trainer.board.entries[0], trainer.board.entries[-1]
    batch, other = taken(task, 20, 24), taken(task, 40, 44)
    found = trainer.meta_gradients(student, best, batch, other, lr)

    weights = {name: p.detach() for name, p in model.named_parameters()}
    stats = {name: b.clone() for name, b in model.named_buffers()}
    matched, sign = (last, -1) if last_match else (best, 1)
    with torch.no_grad(), apply(model, best.arch):
        soft = model(batch[0]).softmax(1)

    def outputs(weights, images):
        return functional_call(model, {**weights, **{name: b.clone() for name, b in stats.items()}}, (images,))

    def distilled(weights, meta):
        answers = outputs(weights, matched.images[0]).softmax(1)
        answers = answers if through_match else answers.detach()
        match = torch.sigmoid(sign * (meta[0] @ (answers - matched.answers).flatten() + meta[1]))
        return (match * -(soft * outputs(weights, batch[0]).log_softmax(1)).sum(1).mean()).squeeze()

    def after(meta):
        gradients = grad(distilled)(weights, meta)
        moved = {name: weight - lr * gradients[name] for name, weight in weights.items()}
        return F.cross_entropy(outputs(moved, other[0]), other[1])

    with apply(model, student):
        wanted = grad(after)((trainer.meta.weight.detach(), trainer.meta.bias.detach()))
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.abs().max() > 1e-6
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    # And what differences of numbers say of the bias.
    step = 1e-5 * torch.ones_like(trainer.meta.bias)
    weight, bias = (p.detach() for p in trainer.meta.parameters())
    if through_match:  # else the match is no function that could be differentiated by numbers
        with apply(model, student):
            slope = (after((weight, bias + step)) - after((weight, bias - step))) / 2e-5
        torch.testing.assert_close(found[1].squeeze(), slope, rtol=1e-4, atol=1e-9)


def test_a_network_with_operations_that_torch_differentiates_once_has_a_meta_gradient_too():
    class Hard(Smooth):
        """With a hard sigmoid, as the squeeze-and-excite of MobileNetV3 has."""

        def __init__(self, gate):
            super().__init__()
            self.gate = gate

        def forward(self, x):
            return super().forward(self.gate(x * 2))

    class Written(nn.Module):
        def forward(self, x):
            return (x / 6 + 0.5).clamp(0, 1)

    found = []
    for gate in (nn.Hardsigmoid(inplace=True), Written()):
        trainer = smooth_trainer(model=Hard(gate))
        student, teacher = archs(2)
        images = taken(trainer.task, 0, 4)
        with torch.no_grad(), apply(trainer.supernet, teacher):
            trainer.board.add(Entry(teacher, 90.0, 1.0, images, trainer.supernet(images[0]).softmax(1)))
        batch, other = taken(trainer.task, 20, 24), taken(trainer.task, 40, 44)
        found.append(trainer.meta_gradients(student, trainer.board.entries[0], batch, other, 0.3))
    assert all(gradient.any() for gradient in found[0])
    torch.testing.assert_close(*found)


def test_the_virtual_update_changes_nothing_but_the_meta_network():
    this = scene(SMALL, Paths(1))
    steps = own_loop(this, 9)
    for _ in range(9):
        next(steps)
    trainer = this.trainer
    before = {name: tensor.clone() for name, tensor in this.model.state_dict().items()}
    gradients = [None if p.grad is None else p.grad.clone() for p in this.model.parameters()]
    entry = trainer.board.entries[0]
    student = next(arch for arch in archs(3) if arch != entry.arch)
    found = trainer.meta_gradients(student, entry, entry.images, taken(this.task, 0, 4), 0.1)
    assert any(gradient.any() for gradient in found)
    assert same(dict(this.model.state_dict()), before)
    assert same(
        [p.grad if p.grad is not None else 0 for p in this.model.parameters()],
        [0 if g is None else g for g in gradients],
    )


def test_a_step_down_the_meta_gradient_makes_the_taught_path_better():
    trainer = smooth_trainer(through_match=False)
    student, teacher = archs(2)
    images = taken(trainer.task, 0, 4)
    with torch.no_grad(), apply(trainer.supernet, teacher):
        trainer.board.add(Entry(teacher, 90.0, 1.0, images, trainer.supernet(images[0]).softmax(1)))
    (entry,) = trainer.board.entries
    batch, other, lr = taken(trainer.task, 20, 24), taken(trainer.task, 40, 44), 0.5

    def loss_of_the_taught():
        model = copy.deepcopy(trainer.supernet)
        soft = trainer._shows(teacher, batch).logits.softmax(1)
        with apply(trainer.supernet, student), apply(model, student):
            match = trainer._weight(entry).detach()
            shown = model(batch[0])
            loss = match * F.cross_entropy(shown, soft)
            weights = [*model.parameters()]
            for weight, gradient in zip(weights, torch.autograd.grad(loss, weights, allow_unused=True), strict=True):
                if gradient is not None:
                    weight.data -= lr * gradient
            return F.cross_entropy(model(other[0]), other[1]).item()

    before = loss_of_the_taught()
    gradients = trainer.meta_gradients(student, entry, batch, other, lr)
    for parameter, gradient in zip(trainer.meta.parameters(), gradients, strict=True):
        parameter.data -= 1.0 * gradient / gradient.norm()
    assert loss_of_the_taught() < before


# -- a training -------------------------------------------------------------------------------------------------------


def test_a_training_killed_after_its_warm_up_ends_with_the_same_board():
    killed_and_resumed_ends_with_the_same_bits(SMALL, Paths(1))


def test_before_the_end_of_the_warm_up_there_is_the_loss_on_the_labels_alone():
    this = scene(SMALL, Paths(1))
    per_epoch = 96 // 16
    for step, figures in own_loop(this, 2 * per_epoch):
        if step.index <= per_epoch:  # the first path after the warm-up has nobody to learn from
            assert {*figures} == {"loss"}
        if step.index < per_epoch:
            assert not this.trainer.board.entries
        if step.index > per_epoch + 3:
            assert {*figures} == {"loss", "distilled", "match"}
            assert 0 < figures["match"] < 1


@pytest.mark.parametrize("loss", ["added", "shared"])
def test_the_loss_is_that_on_the_labels_and_that_of_the_best_match(loss):
    trainer = smooth_trainer(loss=loss, through_match=False, meta_every=10**6, measured_on="train")
    student, *teachers = archs(4)
    for number, arch in enumerate(teachers):
        images = taken(trainer.task, 4 * number, 4 * number + 4)
        with torch.no_grad(), apply(trainer.supernet, arch):
            answers = trainer.supernet(images[0]).softmax(1)
        trainer.board.add(Entry(arch, 90.0 - number, 1.0, images, answers))
    images, labels = batch = taken(trainer.task, 20, 36)
    entries = trainer.board.entries
    with torch.no_grad(), apply(trainer.supernet, student):
        differences = [trainer.supernet(e.images[0]).softmax(1) - e.answers for e in entries]
        matches = [trainer.meta(difference.flatten()).item() for difference in differences]
        logits = trainer.supernet(images)
    best = max(range(3), key=matches.__getitem__)
    match = torch.tensor(matches[best]).double().sigmoid()
    with torch.no_grad(), apply(trainer.supernet, entries[best].arch):
        soft = trainer.supernet(images).softmax(1)
    distilled = -(soft * logits.log_softmax(1)).sum(1).mean()
    on_labels = F.cross_entropy(logits, labels)
    shared = (match * distilled + (2 - match) * on_labels) / 2
    step = OwnStep([student])
    figures = trainer.train_step(batch, step)
    torch.testing.assert_close(figures["loss"], shared if loss == "shared" else on_labels + match * distilled)
    torch.testing.assert_close(figures["match"], match)
    assert step.calls == 1


class OwnStep:
    """A step of a hand-written loop, as small as can be."""

    index, part, lr, calls = 1, 0, 0.1, 0

    def __init__(self, archs):
        self.archs = archs

    def backward(self, loss):
        self.calls += 1
        loss.backward()
        return loss.detach()

    def more(self, split, augmented=False):
        return taken(Doubles(), 0, 16, split)

    def mean(self, tensors):
        return tensors


def test_other_processes_numbers_decide_whom_a_path_learns_from_and_what_the_meta_network_learns():
    """With several processes `step.mean` is what they agree on: here another process has turned everything round."""

    class Turned(OwnStep):
        def mean(self, tensors):
            return [-tensor for tensor in tensors]

    trainer = smooth_trainer()
    for number, arch in enumerate(archs(4)[1:]):
        images = taken(trainer.task, 4 * number, 4 * number + 4)
        with torch.no_grad(), apply(trainer.supernet, arch):
            trainer.board.add(Entry(arch, 90.0, 1.0, images, trainer.supernet(images[0]).softmax(1)))
    student, batch = archs(1)[0], taken(trainer.task, 20, 36)
    assert trainer.best_match(student, OwnStep([student])) is not trainer.best_match(student, Turned([student]))
    before = [p.detach().clone() for p in trainer.meta.parameters()]
    other = copy.deepcopy(trainer.meta.state_dict())
    moves = []
    for kind in (OwnStep, Turned):
        trainer.meta.load_state_dict(other)
        trainer.optimizer.state.clear()
        trainer.best_match = lambda student, step, entry=trainer.board.entries[0]: entry
        trainer.teach_meta(student, batch, kind([student]))
        moves.append([p.detach() - old for p, old in zip(trainer.meta.parameters(), before, strict=True)])
    for one, two in zip(*moves, strict=True):
        assert one.any()
        torch.testing.assert_close(one, -two)


@pytest.mark.parametrize("measured_on", ["valid", "train"])
def test_the_meta_network_steps_down_its_gradient_on_images_that_the_path_did_not_learn_from(measured_on):
    trainer = smooth_trainer(meta_clip=1e9, meta_lr=0.5, virtual_lr=0.3, measured_on=measured_on)
    student, teacher = archs(2)
    images = taken(trainer.task, 0, 4)
    with torch.no_grad(), apply(trainer.supernet, teacher):
        trainer.board.add(Entry(teacher, 90.0, 1.0, images, trainer.supernet(images[0]).softmax(1)))
    (entry,) = trainer.board.entries
    others = taken(trainer.task, 0, 4, "valid") if measured_on == "valid" else taken(trainer.task, 24, 28)
    wanted = trainer.meta_gradients(student, entry, taken(trainer.task, 20, 24), others, 0.3)
    before = [p.detach().clone() for p in trainer.meta.parameters()]
    trainer.teach_meta(student, taken(trainer.task, 20, 36), OwnStep([student]))
    for parameter, old, gradient in zip(trainer.meta.parameters(), before, wanted, strict=True):
        assert gradient.any()
        torch.testing.assert_close(parameter.detach() - old, -0.5 * 1.9 * gradient)  # Nesterov: 1 + momentum


@pytest.mark.parametrize("measured_on", ["valid", "train"])
def test_a_path_is_ranked_by_images_held_out_or_by_those_that_it_was_trained_on(measured_on):
    trainer = smooth_trainer(measured_on=measured_on)
    student, (images, _) = archs(1)[0], taken(trainer.task, 20, 36)
    others, labels = taken(trainer.task, 0, 16, "valid")
    with torch.no_grad(), apply(trainer.supernet, student):
        right = trainer.supernet(images).argmax(1)  # labels by which it is always right
        valid = 100 * float((trainer.supernet(others).argmax(1) == labels).double().mean())
    trainer.train_step((images, right), OwnStep([student]))
    assert valid < 100
    assert trainer.board.entries[0].score == pytest.approx(valid if measured_on == "valid" else 100)


def test_the_path_that_is_trained_alone_has_dropout():
    this, seen = scene(SMALL, Paths(1), dropout=0.5), []
    dropout = next(module for module in this.model.modules() if isinstance(module, nn.Dropout))
    dropout.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    for step, _ in own_loop(this, 12):
        # Its teacher, its match, what ranks it and what teaches the meta network have none.
        assert seen.count(True) == 1
        assert step.index < 8 or len(seen) > 4
        seen.clear()


def test_the_meta_networks_gradient_is_clipped():
    trainer = smooth_trainer(meta_clip=1e-6, meta_lr=1.0)
    student, teacher = archs(2)
    images = taken(trainer.task, 0, 4)
    with torch.no_grad(), apply(trainer.supernet, teacher):
        trainer.board.add(Entry(teacher, 90.0, 1.0, images, trainer.supernet(images[0]).softmax(1)))
    before = nn.utils.parameters_to_vector(trainer.meta.parameters()).detach()
    trainer.teach_meta(student, taken(trainer.task, 20, 36), OwnStep([student]))
    moved = nn.utils.parameters_to_vector(trainer.meta.parameters()).detach() - before
    assert 1e-6 < moved.norm() < 2e-6  # (1 + momentum) times the clipped gradient, by Nesterov


def test_a_trained_board_derives_its_best_path_and_its_state_is_whole():
    this = scene(SMALL, Paths(1))
    this.train()
    trainer = this.trainer
    assert isinstance(trainer, Deriving)
    assert trainer.derive() == trainer.board.entries[0].arch
    assert len({entry.arch for entry in trainer.board.entries}) == len(trainer.board.entries) == 4
    other = scene(SMALL, Paths(1)).trainer
    other.load_state_dict(copy.deepcopy(trainer.state_dict()))
    assert same(other.state_dict(), trainer.state_dict())
    assert other.derive() == trainer.derive()


def test_a_distiller_replaces_the_soft_cross_entropy():
    class Tripled(SoftLabels):
        def loss(self, student, teacher):
            return 3 * super().loss(student, teacher)

    def figures_with(distiller):
        this = scene(SMALL, Paths(1))
        this.trainer.distiller = distiller
        shown = [figures for _, figures in own_loop(this, 8)]
        return next(figures for figures in shown if "distilled" in figures)

    torch.testing.assert_close(3 * figures_with(None)["distilled"], figures_with(Tripled())["distilled"])


def test_what_could_never_work_is_refused():
    class NoLogits(Task):
        def logits(self, outputs):
            return None

    def start(options, task=None, settings=SETTINGS):
        task = task or Task()
        model = supernet(SPACE, Task())
        cost = Cost(model, SPACE, Task().example)
        return options.start(AlgorithmContext(model, SPACE, cost, task, settings, torch.device("cpu")))

    with pytest.raises(UserError, match="warm-up of 3 epochs is the whole training"):
        start(Cream(warmup=3))
    with pytest.raises(UserError, match="does not measure 'top2'"):
        start(Cream(warmup=1, metric="top2"))
    with pytest.raises(UserError, match="no validation data"):
        start(Cream(warmup=1), Task(valid=0))
    with pytest.raises(UserError, match="compares probabilities"):
        start(Cream(warmup=1), NoLogits())
    with pytest.raises(UserError, match="no path has come"):
        start(Cream(warmup=1)).derive()
    with pytest.raises(UserError, match="takes 20 images of each part of a batch, which has 16"):
        start(Cream(warmup=1, images=20))


# -- whole runs -------------------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[4]


@pytest.mark.slow
def test_two_processes_have_the_board_the_meta_network_and_the_weights_of_one(tmp_path):
    script = str(Path(__file__).with_name("processes.py"))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    for launch in ([], torchrun):
        command = [sys.executable, *launch, script, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env, check=False)
        assert done.returncode == 0, done.stderr
    one, first, second = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1"))
    assert same(first, second)
    assert len(one["trainer"]["board"]) == 4
    paths = [[row.pop("arch") for row in end["trainer"]["board"]] for end in (first, one)]
    assert paths[0] == paths[1]
    torch.testing.assert_close(first, one, rtol=1e-7, atol=1e-10)


def test_specs_in_the_readme_are_read():
    fragments = spec_fragments(ROOT / "plugins/algorithms/cream/README.md")
    first, released = (structure({k: v for k, v in f["algorithm"].items() if k != "type"}, Cream) for f in fragments)
    assert first.max_flops == "200k"
    assert evolve(released, board=4, warmup=0, meta_every=2) == RELEASED


SHORT = ["train.epochs=1", "train.workers=0", "train.batch_size=8", "algorithm.warmup=0", "algorithm.meta_every=1"]
SHORT_RETRAINING = ["retrain.train.epochs=1", "retrain.train.workers=0", "retrain.train.batch_size=8"]


@pytest.mark.slow
def test_the_imagenet_spec_runs_on_a_folder_of_a_few_images(tmp_path):
    rng = np.random.default_rng(0)
    for split, n in (("train", 12), ("val", 4)):
        for name in ("cat", "dog"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(n):
                Image.fromarray(rng.integers(255, size=(40, 40, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    settings = [*SHORT, *SHORT_RETRAINING, "retrain.data=train", 'export.formats=["safetensors"]']
    for task in ("task", "retrain.task"):
        settings += [f"{task}.data.root={tmp_path / 'images'}", f"{task}.classes=2", f"{task}.valid=8"]
        settings += [f"{task}.size=32", f"{task}.augment.0.size=32"]
    spec, _, catalogue = open_spec(ROOT / "spec/imagenet/cream.toml", settings)
    result = run_spec(spec, catalogue, tmp_path / "run", lambda event: None)
    assert spec.space.arch(result["best"]["arch"])
    assert "top1" in result["best"]["test"]
