"""What every distiller promises: `@pytest.mark.parametrize("check", distiller_checks)` in a plugin's tests.

Each check takes the options of a distiller, and by keyword a live task if the small one has nothing for it to compare.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from corenas.contracts import Distiller, DistillerContext, LiveDistiller, LiveTask, Signals
from corenas.mutable import apply
from corenas.supernet import observe
from corenas.testing.components import checks_of_any_component, global_generators_untouched
from corenas.testing.small import Task, make_space, same, supernet


def start(distiller: Distiller, task: LiveTask | None = None) -> LiveDistiller:
    """Return the distiller of a training of the small supernet."""
    task = task or Task()
    return distiller.start(DistillerContext(task, supernet(make_space(), task), torch.device("cpu")))


def signals(live: LiveDistiller, seed: int, task: LiveTask | None = None, noise: float = 0.0) -> Signals:
    """What the small supernet's largest arch shows of some images, as leaves of a new graph.

    seed: of the supernet's weights; noise: standard deviation of what is added to all signals
    """
    task = task or Task()
    model = supernet(make_space(), task, seed=seed).train()
    dataset: Any = task.dataset("train", False)
    images, labels = zip(*(dataset[i] for i in range(12)), strict=True)
    batch = torch.stack(images), torch.stack([torch.as_tensor(label) for label in labels])
    generator = torch.Generator().manual_seed(7)

    def leaf(tensor: Tensor) -> Tensor:
        noisy = tensor.detach() + noise * torch.randn(tensor.shape, generator=generator)
        return noisy.requires_grad_()

    with apply(model, make_space().largest()):
        seen = observe(model, task, batch, live.taps)
    logits = None if seen.logits is None else leaf(seen.logits)
    outputs = logits if logits is not None and seen.outputs is seen.logits else seen.outputs
    return Signals(outputs, logits, [leaf(feature) for feature in seen.features])


def leaves(seen: Signals) -> list[Tensor]:
    """Logits and features."""
    return [tensor for tensor in (seen.logits, *seen.features) if tensor is not None]


def gives_a_finite_scalar(distiller: Distiller, task: LiveTask | None = None) -> None:
    """`loss` is one finite number, always the same for the same signals, which it leaves as they are."""
    live = start(distiller, task)
    student, teacher = signals(live, 0, task), signals(live, 1, task)
    before = [tensor.detach().clone() for tensor in (*leaves(student), *leaves(teacher))]
    with global_generators_untouched():
        first, second = live.loss(student, teacher), live.loss(student, teacher)
    assert first.dim() == 0
    assert math.isfinite(float(first.detach()))
    assert torch.equal(first, second)
    assert same(before, [tensor.detach() for tensor in (*leaves(student), *leaves(teacher))])


def its_loss_is_a_mean_over_samples(distiller: Distiller, task: LiveTask | None = None) -> None:
    """The loss of a batch of which each sample is there twice is that of the batch: parts of a batch are averaged."""
    live = start(distiller, task)
    given = [signals(live, seed, task) for seed in (0, 1)]
    twice = tree_map_only(Tensor, lambda x: torch.cat([x, x]), [(s.outputs, s.logits, [*s.features]) for s in given])
    losses = [float(live.loss(*pair).detach()) for pair in (given, [Signals(*each) for each in twice])]
    assert math.isclose(*losses, rel_tol=1e-3, abs_tol=1e-5), f"the loss of a batch and of it twice: {losses}"


def teaches_the_student_and_not_the_teacher(distiller: Distiller, task: LiveTask | None = None) -> None:
    """The gradient reaches something of the student and nothing of the teacher."""
    live = start(distiller, task)
    student, teacher = signals(live, 0, task), signals(live, 1, task)
    live.loss(student, teacher).backward()
    gradients = [tensor.grad for tensor in leaves(student) if tensor.grad is not None]
    assert any(gradient.any() for gradient in gradients), "the student learns nothing"
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert all(tensor.grad is None or not tensor.grad.any() for tensor in leaves(teacher)), "trains the teacher"


def is_least_where_student_and_teacher_agree(distiller: Distiller, task: LiveTask | None = None) -> None:
    """No student near the teacher has a lower loss than one that shows the same, and one far away has a higher."""
    live = start(distiller, task)
    teacher = signals(live, 1, task)
    losses = [float(live.loss(signals(live, 1, task, noise), teacher).detach()) for noise in (0.0, 0.03, 0.3, 3.0)]
    slack = 1e-6 * max(1.0, abs(losses[0]))
    assert all(losses[0] <= loss + slack for loss in losses[1:]), losses
    assert losses[0] < losses[-1], losses


def makes_a_student_more_like_its_teacher(distiller: Distiller, task: LiveTask | None = None) -> None:
    """Going down the gradient makes the loss smaller."""
    live = start(distiller, task)
    student, teacher = signals(live, 0, task), signals(live, 1, task)
    first = live.loss(student, teacher)
    first.backward()
    gradients = {id(t): t.grad for t in leaves(student) if t.grad is not None}
    size = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))

    def moved(tensor: Any, rate: float) -> Any:
        return tensor.detach() - rate * gradients[id(tensor)] if id(tensor) in gradients else tensor

    tried = []
    for rate in (1.0 / size, 1e-1 / size, 1e-2 / size):
        logits = moved(student.logits, rate)
        after = Signals(logits, logits, [moved(feature, rate) for feature in student.features])
        tried.append(float(live.loss(after, teacher).detach()))
    assert min(tried) < float(first.detach()), (float(first.detach()), tried)


distiller_checks = [
    *checks_of_any_component,
    gives_a_finite_scalar,
    its_loss_is_a_mean_over_samples,
    teaches_the_student_and_not_the_teacher,
    is_least_where_student_and_teacher_agree,
    makes_a_student_more_like_its_teacher,
]
"""What every distiller keeps to.

One that compares the samples of a batch with each other leaves `its_loss_is_a_mean_over_samples` out.
"""
