"""A step of Cream: a path learns from the labels and from its best match on the board, which it may then join."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from corenas import distributed
from corenas.calibrate import statistics_kept
from corenas.contracts import AlgorithmContext, Phase, Signals, Step
from corenas.errors import UserError, did_you_mean
from corenas.loading import to_device
from corenas.mutable import apply
from corenas.objectives import parse_amount
from corenas.regularisation import unregularised
from corenas.space import Arch
from corenas.supernet import observe
from corenas.teaching import detached, show_example
from corenas_algorithm_cream.board import Board, Entry

if TYPE_CHECKING:
    from corenas_algorithm_cream import Cream

T = TypeVar("T")


class CreamTrainer:
    """Trains paths on the labels and on what prioritized paths say; keeps the board and the meta network.

    board: the paths that teach
    meta: how well a teacher suits a student, of the differences of their answers, (images * numbers of each) -> 1
    """

    def __init__(self, options: Cream, context: AlgorithmContext) -> None:
        numbers = refuse_unfit(options, context)
        self.options, self.supernet, self.task = options, context.supernet, context.task
        self.space, self.cost, self.device = context.space, context.cost, context.device
        self.distiller = context.distiller
        self.phases = [Phase(context.space, context.train)]
        self.first_step = options.warmup * _steps_per_epoch(context)
        self.last_part = context.train.accumulate - 1
        max_flops = math.inf if options.max_flops is None else parse_amount(options.max_flops)
        self.board = Board(options.board, options.gap, max_flops, options.duplicates)
        self.meta = nn.Linear(options.images * numbers, 1).to(context.device)
        self.optimizer = torch.optim.SGD(self.meta.parameters(), options.meta_lr, momentum=0.9, nesterov=True)
        self._called = _Called(context.supernet)

    def train_step(self, batch: Any, step: Step) -> Mapping[str, Tensor]:
        """Train the paths of a step, their gradients averaged; after the warm-up they are taught and ranked."""
        if step.index >= self.first_step and self._teaches_meta(step):
            self.teach_meta(step.archs[0], batch, step)
        losses, figures = [], {}
        for arch in step.archs:
            loss, shown = self._train_path(arch, batch, step)
            losses.append(loss)
            figures.update(shown)
        return {"loss": torch.stack(losses).sum(), **figures}

    def _train_path(self, arch: Arch, batch: Any, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """Train a path (section 3.3) and let it onto the board. Returns the loss, and figures of its teaching."""
        entry = self.best_match(arch, step)
        teacher = None if entry is None else self._shows(entry.arch, batch)
        figures = {}
        with apply(self.supernet, arch):
            student = observe(self.supernet, self.task, batch, self._taps)
            loss = self.task.loss(student.outputs, batch)
            if entry is not None and teacher is not None:
                match, distilled = self._weight(entry), self._distilled(student, teacher)
                loss = self._blended(loss, distilled, match)
                figures = {"distilled": distilled.detach(), "match": match.detach()}
            loss = step.backward(loss / len(step.archs))
        if step.index >= self.first_step and step.part == self.last_part:
            self._rank(arch, entry, batch, student.outputs, step)
        return loss, figures

    def _blended(self, labels: Tensor, distilled: Tensor, match: Tensor) -> Tensor:
        if self.options.loss == "shared":
            return (match * distilled + (2 - match) * labels) / 2
        return labels + match * distilled

    # -- the board ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _rank(self, arch: Arch, teacher: Entry | None, batch: Any, outputs: Any, step: Step) -> None:
        """Measure a path that was trained, and put it on the board if it is good enough."""
        if self.options.measured_on == "valid":
            batch_measured = step.more("valid")
            with self._aside(arch):
                outputs = self.task.forward(self.supernet, batch_measured)
        else:
            batch_measured = batch
        meter = self.task.meter()
        meter.update(outputs, batch_measured)
        measured = torch.tensor(meter.compute()[self.options.metric], dtype=torch.float32, device=self.device)
        # All processes have seen the same path on images of their own: one number, one board.
        (measured,) = step.mean([measured])
        better = 1.0 if self.task.metrics[self.options.metric].direction == "max" else -1.0
        score, flops = better * float(measured), float(self.cost.of([arch])[0]["flops"])
        if not self.board.accepts(arch, score, flops):
            return
        images = self._same_everywhere(_samples(batch, 0, self.options.images))
        speaker = teacher.arch if teacher is not None and self.options.borrowed_answers else arch
        with self._aside(speaker):
            (answers,) = step.mean([self._answers(images)])
        self.board.add(Entry(arch, score, flops, images, answers))

    def _same_everywhere(self, images: Any) -> Any:
        """Return the first process's images."""
        if distributed.world() == 1:
            return images
        return to_device(distributed.on_rank_zero(lambda: to_device(images, torch.device("cpu"))), self.device)

    # -- the match ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def best_match(self, student: Arch, step: Step) -> Entry | None:
        """Return the path of the board that suits a student best, for it to learn from (section 3.3)."""
        teachers = self.board.teachers(student)
        if not teachers or self.options.pick == "best":
            return teachers[0] if teachers else None
        with self._aside(student):
            matches = torch.stack([self._match(entry, self._answers(entry.images)) for entry in teachers])
        (matches,) = step.mean([matches])  # rounding must not make processes choose otherwise
        return teachers[int(matches.argmax())]

    def _weight(self, entry: Entry, learnt: bool = False) -> Tensor:
        """Return how much the path in force is to learn from a teacher: a number from 0 to 1.

        learnt: whether a gradient reaches the meta network
        """
        if self.options.pick == "best":
            return torch.tensor(0.5, device=self.device)
        entry, sign = (self.board.entries[-1], -1.0) if self.options.last_match else (entry, 1.0)
        with torch.set_grad_enabled(self.options.through_match):
            answers = self._with_weights({}, lambda: self._answers(entry.images))
        return torch.sigmoid(sign * self._match(entry, answers, learnt))

    def _match(self, entry: Entry, answers: Tensor, learnt: bool = False) -> Tensor:
        """Return what the meta network says of a teacher and the answers of a student to the teacher's images."""
        assert entry.answers is not None
        weight, bias = self.meta.weight, self.meta.bias
        if not learnt:
            weight, bias = weight.detach(), bias.detach()
        return F.linear((answers - entry.answers).flatten(), weight, bias).squeeze(0)

    def _answers(self, images: Any) -> Tensor:
        """Return the probabilities that the path in force gives to images."""
        logits = self.task.logits(self.task.forward(self.supernet, images))
        assert logits is not None  # `refuse_unfit` has looked
        return logits.softmax(1)

    # -- the meta network ---------------------------------------------------------------------------------------------

    def _teaches_meta(self, step: Step) -> bool:
        due = step.index % self.options.meta_every == 0 and step.part == 0
        return due and self.options.pick == "meta" and bool(self.board.teachers(step.archs[0]))

    def teach_meta(self, student: Arch, batch: Any, step: Step) -> None:
        """Update the meta network, so that a path that is taught by its best match does better on other images."""
        entry, n = self.best_match(student, step), self.options.images
        assert entry is not None
        held_out = self.options.measured_on == "valid"
        others = _samples(step.more("valid"), 0, n) if held_out else _samples(batch, n, 2 * n)
        images, other_images = self._same_everywhere((_samples(batch, 0, n), others))
        lr = step.lr if self.options.virtual_lr is None else self.options.virtual_lr
        with distributed.single_process():  # all do the same: batch norms need not wait for each other
            gradients = self.meta_gradients(student, entry, images, other_images, lr)
        gradients = step.mean(gradients)
        for parameter, gradient in zip(self.meta.parameters(), gradients, strict=True):
            parameter.grad = gradient
        nn.utils.clip_grad_norm_(self.meta.parameters(), self.options.meta_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def meta_gradients(
        self, student: Arch, entry: Entry, images: Any, other_images: Any, lr: float
    ) -> Sequence[Tensor]:
        """Return the gradients of the meta network's parameters: those of the loss after an update.

        images: on which the student is distilled; other_images: on which it is then measured
        lr: step size of that update, a plain step of gradient descent which the network itself does not make
        """
        teacher = self._shows(entry.arch, images)
        weights = {name: p for name, p in self.supernet.named_parameters() if p.requires_grad}
        with apply(self.supernet, student), _twice_differentiable():
            shown = self._with_weights({}, lambda: observe(self.supernet, self.task, images, self._taps))
            distilled = self._weight(entry, learnt=True) * self._distilled(shown, teacher)
            # The graph of these gradients leads to the meta network.
            gradients = torch.autograd.grad(distilled, [*weights.values()], create_graph=True, allow_unused=True)
            pairs = zip(weights.items(), gradients, strict=True)
            updated = {name: weight - lr * gradient for (name, weight), gradient in pairs if gradient is not None}
            loss = self._with_weights(
                updated, lambda: self.task.loss(self.task.forward(self.supernet, other_images), other_images)
            )
        return torch.autograd.grad(loss, [*self.meta.parameters()])

    # -- what paths show ----------------------------------------------------------------------------------------------

    @property
    def _taps(self) -> Sequence[Any]:
        return () if self.distiller is None else self.distiller.taps

    def _shows(self, arch: Arch, batch: Any) -> Signals:
        """Return what a teacher shows of a batch, without gradient and without a trace in the statistics."""
        with torch.no_grad(), self._aside(arch):
            return detached(observe(self.supernet, self.task, batch, self._taps))

    def _distilled(self, student: Signals, teacher: Signals) -> Tensor:
        """Return how far a student is from its teacher: what the distiller says, else the soft cross entropy."""
        if self.distiller is not None:
            return self.distiller.loss(student, teacher)
        assert student.logits is not None
        assert teacher.logits is not None
        return F.cross_entropy(student.logits, teacher.logits.softmax(1))

    @contextmanager
    def _aside(self, arch: Arch) -> Iterator[None]:
        """Put a path in force whose forwards train nothing: neither weights nor statistics, and without dropout."""
        with apply(self.supernet, arch), unregularised(self.supernet), statistics_kept(self.supernet):
            yield

    def _with_weights(self, weights: Mapping[str, Tensor], function: Callable[[], T]) -> T:
        """Call a function while the supernet has other weights, and copies of its statistics to write into.

        A graph that outlives the call would not bear that statistics are written and put back.
        """
        copies = {name: buffer.clone() for name, buffer in self.supernet.named_buffers()}
        replaced = {f"supernet.{name}": tensor for name, tensor in {**copies, **weights}.items()}
        with unregularised(self.supernet):
            return functional_call(self._called, replaced, (function,))

    # -- what is kept, what is found ----------------------------------------------------------------------------------

    def derive(self) -> Mapping[str, Any]:
        """Return the best path of the board. Raises UserError if there is none."""
        if not self.board.entries:
            text = "no path has come onto the board"
            raise UserError(text, key=("algorithm", "max_flops"), hint="is it below what paths of this space cost?")
        return self.board.entries[0].arch

    def state_dict(self) -> dict[str, Any]:
        """Return the board, the meta network and its optimizer."""
        board = [
            {
                "arch": dict(entry.arch),
                "score": entry.score,
                "flops": entry.flops,
                "images": entry.images,
                "answers": entry.answers,
            }
            for entry in self.board.entries
        ]
        return {"board": board, "meta": self.meta.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        rows = to_device(state["board"], self.device)
        self.board.entries = [Entry(**{**row, "arch": self.space.arch(row["arch"])}) for row in rows]
        self.meta.load_state_dict(state["meta"])
        self.optimizer.load_state_dict(state["optimizer"])


class _HardSigmoid(TorchFunctionMode):
    """Computes hard sigmoids by an operation of the same values that torch differentiates twice."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.hardsigmoid:
            return F.relu6(args[0] + 3) / 6
        return func(*args, **(kwargs or {}))


@contextmanager
def _twice_differentiable() -> Iterator[None]:
    """Let torch take operations of which it has the second derivative for those of which it has not."""
    with _HardSigmoid(), sdpa_kernel(SDPBackend.MATH):
        yield


class _Called(nn.Module):
    """A supernet in which functions can be called while it has other weights."""

    def __init__(self, supernet: nn.Module) -> None:
        super().__init__()
        self.supernet = supernet

    def forward(self, function: Callable[[], T]) -> T:
        return function()


def _samples(batch: Any, start: int, stop: int) -> Any:
    """Return copies of some samples of a batch. Raises UserError if it has too few."""
    sizes = {len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()}
    _refuse_few(min(sizes, default=0), stop)
    return tree_map_only(Tensor, lambda tensor: tensor[start:stop].clone(), batch)


def _refuse_few(images: int, wanted: int) -> None:
    if images < wanted:
        text = f"cream takes {wanted} images of each part of a batch, which has {images}"
        raise UserError(text, key=("algorithm", "images"), hint="a larger train.batch_size, or fewer images")


def _steps_per_epoch(context: AlgorithmContext) -> int:
    return max(1, context.task.splits["train"] // context.train.batch_size)


def refuse_unfit(options: Cream, context: AlgorithmContext) -> int:
    """Return how many numbers the answers for an image are.

    Raises UserError for a task without logits, and for options under which no path could come onto the board.
    """
    logits = show_example(context.supernet, context.task).logits
    if logits is None:
        raise UserError("cream compares probabilities, and this task's answers are none", key=("algorithm",))
    _refuse_what_cannot_be_ranked(options, context)
    return logits.numel()


def _refuse_what_cannot_be_ranked(options: Cream, context: AlgorithmContext) -> None:
    """Raise UserError for options under which no path could come onto the board."""
    metrics = context.task.metrics
    if options.metric not in metrics:
        hint = did_you_mean(options.metric, metrics, "metrics")
        raise UserError(f"the task does not measure {options.metric!r}", key=("algorithm", "metric"), hint=hint)
    if options.measured_on == "valid" and context.task.splits and not context.task.splits.get("valid"):
        hint = 'hold some out (task.valid), or measured_on = "train"'
        raise UserError("there is no validation data", key=("algorithm", "measured_on"), hint=hint)
    there = min(context.train.batch_size, context.task.splits.get("train", context.train.batch_size))
    part = there // (context.train.accumulate * distributed.world())
    _refuse_few(part, options.images * (2 if options.pick == "meta" and options.measured_on == "train" else 1))
    if options.warmup >= context.train.epochs:
        text = f"the warm-up of {options.warmup} epochs is the whole training, of {context.train.epochs}"
        raise UserError(text, key=("algorithm", "warmup"), hint="the board is filled after it")
