"""How a student's answers are compared with a teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from corenas.contracts import Signals, Tap
from corenas.errors import UserError

if TYPE_CHECKING:
    from corenas_distiller_knowledge import KL, AdaptiveAlpha, SoftCrossEntropy


def logits_of(signals: Signals) -> Tensor:
    """Return logits. Raises UserError for a task whose outputs are none."""
    if signals.logits is None:
        text = "this distiller compares probabilities, and the task's answers are none: nothing can be distilled"
        raise UserError(text, key=("distiller", "type"), hint='distiller = "mse" compares answers as they are')
    return signals.logits


def soft_cross_entropy(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the cross entropy of logits (n, classes) with the probabilities that a teacher's logits give."""
    # The square keeps gradients as large as those of the labels, whatever the temperature (Hinton et al., section 2).
    return temperature**2 * F.cross_entropy(student / temperature, (teacher / temperature).softmax(1))


def alpha_divergence(student: Tensor, teacher: Tensor, alpha: float, clip: float) -> tuple[Tensor, Tensor]:
    """Return for each row of logits (n, classes) a student's divergence from its teacher, and what has its gradient.

    AlphaNet (Wang et al. 2021, arXiv:2102.07954), eqs. 5 to 7: sum q ((p / q)^alpha - 1) / (alpha (alpha - 1)) of a
    student q and a teacher p. Its gradient is that of -1 / alpha sum q (p / q)^alpha log q, all but log q taken for
    constants; the weights (p / q)^alpha are cut off at `clip`, since a class that the student rules out would have any.
    Alpha 1 is the Kullback-Leibler divergence, which has no weights to cut off.
    """
    log_q, log_p = student.log_softmax(1), teacher.log_softmax(1)
    q, ratio = log_q.detach().exp(), log_p.detach() - log_q.detach()
    if alpha == 1:
        p = log_p.detach().exp()
        return (p * ratio).sum(1), -(p * log_q).sum(1)
    weights = (alpha * ratio).exp().clamp(max=clip)
    value = (q * (weights - 1)).sum(1) / (alpha * (alpha - 1))
    return value, -(q * weights * log_q).sum(1) / alpha


class SquaredErrors:
    """Mean squared difference of answers as they are."""

    taps: Sequence[Tap] = ()

    def loss(self, student: Signals, teacher: Signals) -> Tensor:
        """Return the mean over images and answers, 0 where both say the same."""
        if student.answers is None or teacher.answers is None:
            text = "this task's outputs are no one tensor, and it has no logits: nothing can be distilled"
            raise UserError(text, key=("distiller", "type"))
        return F.mse_loss(student.answers, teacher.answers.detach())


class SoftCrossEntropyLoss:
    """Soft cross entropy with a temperature."""

    taps: Sequence[Tap] = ()

    def __init__(self, options: SoftCrossEntropy) -> None:
        self.temperature = options.temperature

    def loss(self, student: Signals, teacher: Signals) -> Tensor:
        """Return the mean over images, least where both say the same."""
        return soft_cross_entropy(logits_of(student), logits_of(teacher).detach(), self.temperature)


class KLLoss:
    """Kullback-Leibler divergence with a temperature."""

    taps: Sequence[Tap] = ()

    def __init__(self, options: KL) -> None:
        self.temperature = options.temperature

    def loss(self, student: Signals, teacher: Signals) -> Tensor:
        """Return the mean over images, 0 where both say the same."""
        t = self.temperature
        log_q, log_p = (logits_of(student) / t).log_softmax(1), (logits_of(teacher).detach() / t).log_softmax(1)
        return t**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


class AdaptiveAlphaLoss:
    """For each image the larger of two alpha-divergences."""

    taps: Sequence[Tap] = ()

    def __init__(self, options: AdaptiveAlpha) -> None:
        self.options = options

    def loss(self, student: Signals, teacher: Signals) -> Tensor:
        """Return the mean over images (eq. 8). Its gradient is that of the divergences with weights cut off."""
        q, p, options = logits_of(student), logits_of(teacher).detach(), self.options
        low, low_gradient = alpha_divergence(q, p, options.alpha_min, options.clip)
        high, high_gradient = alpha_divergence(q, p, options.alpha_max, options.clip)
        larger = low > high
        value, surrogate = torch.where(larger, low, high), torch.where(larger, low_gradient, high_gradient)
        return (value + surrogate - surrogate.detach()).mean()
