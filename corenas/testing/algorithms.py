"""What every algorithm promises: `@pytest.mark.parametrize("check", algorithm_checks)` in a plugin's tests.

Each check takes the options of an algorithm, and by keyword a mutator where `Paths(3)` (the largest arch, one at
random, the smallest) is none that it works with: `check(MyAlgorithm(), mutator=Paths(1))`.
"""

from __future__ import annotations

import functools
import itertools
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import evolve, frozen
from torch import Tensor, nn
from torch.nn import functional

from corenas import loading, seeding
from corenas.calibrate import statistics_kept
from corenas.contracts import (
    Algorithm,
    AlgorithmContext,
    Checking,
    LiveDistiller,
    Mutator,
    MutatorContext,
    Phase,
    Selective,
    Signals,
    Stateful,
    Tap,
    Trainer,
)
from corenas.cost import Cost
from corenas.errors import UserError
from corenas.mutable import apply, mutables
from corenas.optim import Schedule
from corenas.settings import Train
from corenas.space import Arch
from corenas.testing.components import checks_of_any_component, global_generators_untouched
from corenas.testing.small import (
    Paths,
    Task,
    condition,
    differing,
    make_space,
    same,
    some_archs,
    supernet,
    used,
)
from corenas.train import run_training

STAGES = ("train", "search", "derive", "retrain")
NEEDS = ("mutator", "searcher", "distiller")
SETTINGS = Train(
    epochs=3,
    batch_size=16,
    optimizer={"type": "SGD", "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3},
    schedule=Schedule("constant"),
)


class SoftLabels:
    """The distiller of an algorithm that needs one: cross entropy with the teacher's answers."""

    taps: Sequence[Tap] = ()

    def loss(self, student: Any, teacher: Any) -> Tensor:
        """A scalar."""
        return functional.cross_entropy(student.logits, teacher.logits.detach().softmax(1))


class ScaledLabels(nn.Module):
    """The same with a scale of the student's logits that is learnt: a distiller with something of its own to train."""

    taps: Sequence[Tap] = ()

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def loss(self, student: Any, teacher: Any) -> Tensor:
        """Return a scalar."""
        return functional.cross_entropy(self.scale * student.logits, teacher.logits.detach().softmax(1))


class Oracle:
    """A fixed teacher that is nearly sure of one class, the same for all images."""

    labels = 1.0

    def __call__(self, batch: Any) -> Signals:
        """Return its answers."""
        return Signals(None, torch.tensor([2.0, 0.0, 0.0]).expand(len(batch[0]), 3))


@frozen
class Scene:
    """A small supernet with the trainer that an algorithm starts for it."""

    model: nn.Module
    task: Task
    cost: Cost
    mutator: Mutator | None
    trainer: Trainer

    def train(self, **more: Any) -> nn.Module:
        """Train it through all phases."""
        return run_training(self.trainer, self.model, self.task, self.mutator, self.cost, seed=1, **more)

    def state(self) -> dict[str, Any]:
        """The weights, and what the trainer keeps."""
        own = self.trainer.state_dict() if isinstance(self.trainer, Stateful) else {}
        distiller = getattr(self.trainer, "distiller", None)
        learnt = distiller.state_dict() if isinstance(distiller, nn.Module) else {}
        return {
            "model": {k: v.clone() for k, v in self.model.state_dict().items()},
            "trainer": own,
            "distiller": learnt,
        }


def scene(
    algorithm: Algorithm,
    mutator: Mutator | None = None,
    settings: Train = SETTINGS,
    distiller: LiveDistiller | None = None,
    teacher: Any = None,
    **task: Any,
) -> Scene:
    """Return what an algorithm starts on the small network; with a mutator and a distiller if it needs them."""
    space, data = make_space(), Task(**task)
    model = supernet(space, data)
    cost = Cost(model, space, data.example)
    if distiller is None and "distiller" in algorithm.needs:
        distiller = SoftLabels()
    context = AlgorithmContext(model, space, cost, data, settings, torch.device("cpu"), distiller, teacher)
    with seeding.seeded(0, "algorithm"):
        trainer = algorithm.start(context)
    return Scene(model, data, cost, mutator if "mutator" in algorithm.needs else None, trainer)


class OwnStep:
    """A step of somebody's own loop (`corenas.contracts.Step`)."""

    def __init__(self, archs: Sequence[Arch], optimizer: torch.optim.Optimizer, index: int, task: Task) -> None:
        self.archs, self.optimizer, self.index, self.part = archs, optimizer, index, 0
        self.lr: float = optimizer.param_groups[0]["lr"]
        self.rng = np.random.default_rng(index)
        self.calls = 0
        self.weights = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
        self._task = task

    def backward(self, loss: Tensor) -> Tensor:
        """Add gradients."""
        self.calls += 1
        loss.backward()
        return loss.detach()

    def more(self, split: str, augmented: bool = False) -> Any:
        """A batch of another split."""
        return next(batches(self._task, split, self.index + 1))

    def mean(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """There is one process."""
        return tensors


def batches(task: Task, split: str = "train", seed: int = 0) -> Iterator[Any]:
    """Batches without end."""
    return loading.Stream(task, split, 16, seed).forever()


def own_loop(
    scene: Scene, n: int, phase: Phase | None = None, lr: float = 0.05, gradient: float | None = None
) -> Iterator[tuple[OwnStep, Mapping[str, Tensor]]]:
    """Somebody's own loop of n steps over one phase. After each step its gradients are still there.

    gradient: of all weights before each step
    """
    phase = phase or scene.trainer.phases[0]
    if phase.begin is not None:
        phase.begin()
    optimizer = torch.optim.SGD(scene.model.parameters(), lr=lr, momentum=0.9)
    sampler = None
    if scene.mutator is not None:
        cost = scene.cost.on(phase.space)
        sampler = scene.mutator.start(MutatorContext(phase.space, cost, np.random.default_rng(0), phase.paths))
    for index, batch in enumerate(itertools.islice(batches(scene.task), n)):
        optimizer.zero_grad(set_to_none=True)
        scene.model.train()
        if gradient is not None:
            for parameter in scene.model.parameters():
                parameter.grad = torch.full_like(parameter, gradient)
        archs = [] if sampler is None else sampler.sample(lambda archs: [0.0] * len(archs))
        step = OwnStep(archs, optimizer, index, scene.task)
        with seeding.seeded(0, "step", index):
            yield step, scene.trainer.train_step(batch, step)
        optimizer.step()


class _Killed:
    """A trainer that is interrupted in the middle of a training; all else is the trainer's own."""

    def __init__(self, trainer: Trainer, step: int) -> None:
        self.trainer, self.step = trainer, step
        self.phases = trainer.phases
        if isinstance(trainer, Stateful):
            self.state_dict, self.load_state_dict = trainer.state_dict, trainer.load_state_dict
        if hasattr(trainer, "distiller"):
            self.distiller = trainer.distiller  # type: ignore[attr-defined]

    def train_step(self, batch: Any, step: Any) -> Any:
        if step.index >= self.step:
            raise KeyboardInterrupt
        return self.trainer.train_step(batch, step)


def _where_it_trains(check: Callable[[Algorithm, Mutator], None]) -> Callable[..., None]:
    """A check of the trainer: there is nothing to check where an algorithm trains no supernet."""

    @functools.wraps(check)
    def checked(algorithm: Algorithm, mutator: Mutator = Paths()) -> None:
        if "train" in algorithm.stages:
            check(algorithm, mutator)

    return checked


def names_stages_and_needs_that_there_are(algorithm: Algorithm, mutator: Mutator | None = None) -> None:
    """`stages` are some of "train", "search", "derive", "retrain", in this order; `needs` are tables of a spec."""
    stages, needs = [*algorithm.stages], [*algorithm.needs]
    assert stages, "has no stage"
    assert stages == [stage for stage in STAGES if stage in stages], f"stages {stages}: of {STAGES} some, in order"
    assert {*needs} <= {*NEEDS}, f"needs {needs}: of {NEEDS} some"
    assert "searcher" in needs or "search" not in stages, "a search needs a searcher"


@_where_it_trains
def has_phases_within_its_space(algorithm: Algorithm, mutator: Mutator) -> None:
    """There is at least one phase, and the archs of each are archs of the supernet's space."""
    space, phases = make_space(), scene(algorithm, mutator).trainer.phases
    assert phases
    for phase in phases:
        assert isinstance(phase, Phase)
        assert all(arch in space for arch in some_archs(phase.space))


@_where_it_trains
def gives_figures_that_are_finite_and_detached(algorithm: Algorithm, mutator: Mutator) -> None:
    """`train_step` gives "loss" and other figures as single numbers without a graph, and calls `backward`."""
    for step, figures in own_loop(scene(algorithm, mutator), 3):
        assert "loss" in figures
        assert step.calls, "never called step.backward"
        for name, figure in figures.items():
            assert isinstance(figure, Tensor), f"{name} is no tensor"
            assert figure.numel() == 1, f"{name} is no single number"
            assert not figure.requires_grad, f"{name} is not detached"
            assert math.isfinite(float(figure)), f"{name} is {float(figure)}"


@_where_it_trains
def trains_only_what_its_archs_use(algorithm: Algorithm, mutator: Mutator) -> None:
    """No gradient, not even zeros, for layers that no arch of the step runs, nor for the rest of those that are cut."""
    this, any_gradient = scene(algorithm, mutator), False
    for step, _ in own_loop(this, 4):
        if not step.archs:
            return
        marks = used(this.model, step.archs, this.task.data["train"][0][:4])
        for name, parameter in this.model.named_parameters():
            if parameter.grad is not None:
                any_gradient = True
                assert marks[name].any(), f"{name} has a gradient, but none of {step.archs} uses it"
                assert not parameter.grad[~marks[name]].any(), f"parts of {name} have a gradient that no arch uses"
    assert any_gradient, "trains nothing"


@_where_it_trains
def trains_each_arch_that_is_drawn(algorithm: Algorithm, mutator: Mutator) -> None:
    """Each arch of a step is in force in a forward with a graph, and the network in training mode."""
    this, ran = scene(algorithm, mutator), []

    def choices() -> list[dict[str, Any]]:
        return [dict(mutable.elastic.choice) for mutable in mutables(this.model)]

    def note(module: nn.Module, args: Any) -> None:
        if torch.is_grad_enabled():
            assert module.training, "trains the network in evaluation mode"
            ran.append(choices())

    this.model.register_forward_pre_hook(note)
    for step, _ in own_loop(this, 3):
        for arch in step.archs:
            with apply(this.model, arch):
                assert choices() in ran, f"of {len(step.archs)} archs it does not train {arch}"
        ran.clear()


@_where_it_trains
def leaves_the_network_as_it_was_but_for_gradients(algorithm: Algorithm, mutator: Mutator) -> None:
    """After a step the network is as it was lent: its arch, its mode, what of it is trainable, its hooks, its weights.

    Gradients are added to those that other parts of the batch have left; the loop alone clears them and steps.
    """
    this, others = scene(algorithm, mutator), scene(algorithm, mutator)
    for phase in this.trainer.phases:
        apply(this.model, some_archs(this.cost.space, 5)[3])  # neither the largest nor the smallest
        this.model.train()
        before = condition(this.model)
        for step, _ in own_loop(this, 2, phase):
            after = condition(this.model)
            changed = {*differing(before, after)} - {"state", "gradients"}
            assert not changed, f"changes the supernet's {', '.join(sorted(changed))}"
            assert same(step.weights, [*this.model.parameters()]), "changes the supernet's weights"
    this = scene(algorithm, mutator)
    for _ in zip(own_loop(this, 1), own_loop(others, 1, gradient=1.0), strict=True):
        for (name, clean), other in zip(this.model.named_parameters(), others.model.parameters(), strict=True):
            expected = torch.ones_like(clean) if clean.grad is None else clean.grad + 1
            text = f"does away with the gradients of {name} that were there before"
            torch.testing.assert_close(other.grad, expected, rtol=1e-4, atol=1e-4, msg=text)


@_where_it_trains
def learns_in_anyones_loop(algorithm: Algorithm, mutator: Mutator) -> None:
    """With steps of somebody's own loop the loss of the archs falls on a task that is easily learnt.

    Gradients of several paths may add up, which wants a lower learning rate.
    """
    told = []
    for lr in (0.05, 0.015):
        before, after = _losses_around_60_steps(algorithm, mutator, lr)
        if after < 0.8 * before:
            return
        told.append(f"at a learning rate of {lr} the loss is {before:.3f} before 60 steps, {after:.3f} after them")
    raise AssertionError("; ".join(told))


def _losses_around_60_steps(algorithm: Algorithm, mutator: Mutator, lr: float) -> tuple[float, float]:
    """Return the mean loss of some archs before and after 60 steps."""
    this = scene(algorithm, mutator)
    images, labels = this.task.data["train"]
    archs = some_archs(this.trainer.phases[0].space)

    @torch.no_grad()
    def loss() -> float:
        total = 0.0
        with statistics_kept(this.model):
            this.model.train()
            for arch in archs:
                with apply(this.model, arch):
                    total += float(this.task.loss(this.model(images), (images, labels)))
        return total / len(archs)

    before = loss()
    for _ in own_loop(this, 60, lr=lr):
        pass
    return before, loss()


@_where_it_trains
def killed_and_resumed_ends_with_the_same_bits(algorithm: Algorithm, mutator: Mutator) -> None:
    """Wherever a training is killed, a new process ends it with the weights of one that was never killed.

    So do their moving average and what a distiller learns. A trainer with a state of its own gives and takes it as
    tensors and plain data (`torch.load(weights_only=True)`).
    """

    def fresh() -> Scene:
        return scene(algorithm, mutator, evolve(SETTINGS, ema=0.9), **_learning_teaching(algorithm))

    whole = fresh()
    average = whole.train()
    steps = sum(p.train.epochs * (whole.task.splits["train"] // p.train.batch_size) for p in whole.trainer.phases)
    for step in {steps // 3 + 1, steps - 2}:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "checkpoint.pt"
            first, then = fresh(), fresh()
            killed = _Killed(first.trainer, step)
            try:
                run_training(killed, first.model, first.task, first.mutator, first.cost, seed=1, checkpoint=path)  # type: ignore[arg-type]
            except KeyboardInterrupt:
                pass
            else:
                raise AssertionError("the training ended before its last step")
            end = then.train(checkpoint=path)
            text = f"killed at step {step} of {steps} it ends otherwise"
            assert same(then.state(), whole.state()), text
            assert same(end.state_dict(), average.state_dict()), f"{text}: its moving average"


def _learning_teaching(algorithm: Algorithm) -> dict[str, Any]:
    """Return a distiller that learns something, and a fixed teacher, for an algorithm that looks at them."""
    uses = {*algorithm.needs, *getattr(algorithm, "uses", ())}
    teacher = Oracle() if "teacher" in uses else None
    return {"distiller": ScaledLabels(), "teacher": teacher} if "distiller" in uses else {}


@_where_it_trains
def checks_a_network_that_has_no_weights(algorithm: Algorithm, mutator: Mutator) -> None:
    """What it says before there are weights and data (`Checking`) refuses no network that it trains.

    The phases that it tells of are those that its trainer then has.
    """
    if not isinstance(algorithm, Checking):
        return
    space, data = make_space(), Task()
    model = supernet(space, data).to("meta")
    cost = Cost(model, space, data.example)
    try:
        told = algorithm.check(AlgorithmContext(model, space, cost, data, SETTINGS, torch.device("meta")))
    except UserError as error:
        raise AssertionError(f"refuses a network that it trains: {error}") from error
    told = told or [Phase(space, SETTINGS)]
    has = scene(algorithm, mutator).trainer.phases
    wanted = [[(phase.space.to_table(), phase.train, phase.paths) for phase in phases] for phases in (told, has)]
    assert wanted[0] == wanted[1], f"tells of {len(told)} phases, its trainer has {len(has)}, or others"


@_where_it_trains
def refuses_archs_before_a_run_as_in_a_step(algorithm: Algorithm, mutator: Mutator) -> None:
    """Archs that `train_step` refuses are refused by `check_archs` too (`Selective`), and no others."""
    if "mutator" not in algorithm.needs:
        return
    space = make_space()
    largest, smallest = space.largest(), space.smallest()
    for archs in ([largest], [smallest], [smallest, largest], [largest, smallest], some_archs(space)):
        this = scene(algorithm, mutator)
        step = OwnStep(archs, torch.optim.SGD(this.model.parameters(), lr=0.01), 0, this.task)
        in_step = _refused(lambda this=this, step=step: this.trainer.train_step(next(batches(this.task)), step))
        before = isinstance(algorithm, Selective) and _refused(
            lambda archs=archs: algorithm.check_archs(archs, space)  # type: ignore[attr-defined]
        )
        says = {True: "refuses", False: "takes"}
        text = f"`train_step` {says[in_step]} {[dict(arch) for arch in archs]}, which `check_archs` {says[before]}"
        assert in_step == before, text


def _refused(action: Callable[[], Any]) -> bool:
    try:
        action()
    except UserError:
        return True
    return False


@_where_it_trains
def trains_what_its_distiller_learns(algorithm: Algorithm, mutator: Mutator) -> None:
    """What a distiller learns itself is trained beside the supernet: its trainer keeps it as `distiller`."""
    teaching = _learning_teaching(algorithm)
    if not teaching:
        return
    scene(algorithm, mutator, **teaching).train()
    assert float(teaching["distiller"].scale.detach()) != 1.0, "what the distiller learns is not trained"


@_where_it_trains
def takes_a_batch_in_parts(algorithm: Algorithm, mutator: Mutator) -> None:
    """With `train.accumulate`, `train_step` is called for each part of a batch."""
    settings = Train(epochs=1, batch_size=16, accumulate=2, optimizer={"type": "SGD", "lr": 0.01})
    this = scene(algorithm, mutator, settings)
    this.train()
    assert all(tensor.isfinite().all() for tensor in this.model.state_dict().values())


@_where_it_trains
def derives_where_it_says_so(algorithm: Algorithm, mutator: Mutator) -> None:
    """With the stage "derive" its trainer finds an arch of the space, and leaves the network as it was."""
    if "derive" not in algorithm.stages:
        return
    this = scene(algorithm, mutator)
    this.train()
    before = condition(this.model)
    assert this.trainer.derive() in make_space()  # type: ignore[attr-defined]
    changed = differing(before, condition(this.model))
    assert not changed, f"to derive changes the supernet's {', '.join(changed)}"


@_where_it_trains
def never_reads_test_data(algorithm: Algorithm, mutator: Mutator) -> None:
    """Test data is for the end of a run."""
    this = scene(algorithm, mutator)
    this.train()
    assert "test" not in this.task.asked


@_where_it_trains
def touches_no_global_generator(algorithm: Algorithm, mutator: Mutator) -> None:
    """Randomness comes from `step.rng`, or from torch's global generator, which is seeded for each step."""
    with global_generators_untouched():
        for _ in own_loop(scene(algorithm, mutator), 3):
            pass


algorithm_checks = [
    *checks_of_any_component,
    names_stages_and_needs_that_there_are,
    has_phases_within_its_space,
    gives_figures_that_are_finite_and_detached,
    trains_only_what_its_archs_use,
    trains_each_arch_that_is_drawn,
    leaves_the_network_as_it_was_but_for_gradients,
    learns_in_anyones_loop,
    killed_and_resumed_ends_with_the_same_bits,
    checks_a_network_that_has_no_weights,
    refuses_archs_before_a_run_as_in_a_step,
    trains_what_its_distiller_learns,
    takes_a_batch_in_parts,
    derives_where_it_says_so,
    never_reads_test_data,
    touches_no_global_generator,
]
"""What every algorithm keeps to."""
