"""How a student's features are compared with a teacher's, whatever their widths and sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corenas.contracts import DistillerContext, Signals
from corenas.errors import UserError
from corenas.mutable import keys_used
from corenas.teaching import show_example
from corenas_distiller_knowledge.answers import logits_of, soft_cross_entropy

if TYPE_CHECKING:
    from corenas_distiller_knowledge import Features


def channel_axis(feature: Tensor) -> int:
    """Return which axis holds the channels: the last of tokens (n, tokens, channels), else the second."""
    return 2 if feature.dim() == 3 else 1


def resized(feature: Tensor, size: tuple[int, ...]) -> Tensor:
    """Return a map (n, channels, h, w) averaged down to a size; one that has it already, or no map, as it is."""
    return feature if feature.dim() != 4 or tuple(feature.shape[2:]) == size else F.adaptive_avg_pool2d(feature, size)


class FeatureLoss(nn.Module):
    """Mean squared differences of features, the student's projected where they are of another width.

    projections: for each part a matrix (teacher's channels, student's channels), as large as the largest arch wants it;
        of a narrower student or teacher the first channels count. It begins as the identity.
    """

    def __init__(self, options: Features, context: DistillerContext) -> None:
        super().__init__()
        if options.teacher_at is not None and context.teacher is None:
            text = "there is no fixed teacher, whose parts would have other names"
            raise UserError(text, key=("distiller", "teacher_at"), hint="leave it out")
        self.taps = options.at
        self.teacher_taps = options.at if options.teacher_at is None else options.teacher_at
        self.weight, self.answers = options.weight, options.answers
        student = show_example(context.student, context.task, self.taps).features
        teacher = student
        if context.teacher is not None:
            teacher = show_example(context.teacher, context.task, self.teacher_taps).features
        elastic = bool(keys_used(context.student))
        self.projections = nn.ParameterList()
        for tap, mine, theirs in zip(self.taps, student, teacher, strict=True):
            if mine.dim() != theirs.dim():
                text = f"{tap!r} gives {[*mine.shape]} of one image, the teacher's {[*theirs.shape]}"
                raise UserError(text, key=("distiller", "teacher_at"))
            rows, columns = theirs.shape[channel_axis(theirs)], mine.shape[channel_axis(mine)]
            wanted = elastic or rows != columns
            self.projections.append(nn.init.eye_(torch.empty(rows, columns) if wanted else torch.empty(0, 0)))

    def loss(self, student: Signals, teacher: Signals) -> Tensor:
        """Return the sum over parts of their mean squared differences, and of the answers, by their weights."""
        loss = torch.zeros((), device=student.features[0].device)
        for matrix, mine, theirs in zip(self.projections, student.features, teacher.features, strict=True):
            loss = loss + self.weight * F.mse_loss(*_comparable(mine, theirs.detach(), matrix))
        if self.answers:
            loss = loss + self.answers * soft_cross_entropy(logits_of(student), logits_of(teacher).detach())
        return loss


def _comparable(mine: Tensor, theirs: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return two features of one shape."""
    if mine.dim() == 4:
        size = tuple(min(a, b) for a, b in zip(mine.shape[2:], theirs.shape[2:], strict=True))
        mine, theirs = resized(mine, size), resized(theirs, size)
    axis = channel_axis(mine)
    rows, columns = theirs.shape[axis], mine.shape[axis]
    if rows != columns:
        mine = (mine.movedim(axis, -1) @ matrix[:rows, :columns].T).movedim(-1, axis)
    return mine, theirs
