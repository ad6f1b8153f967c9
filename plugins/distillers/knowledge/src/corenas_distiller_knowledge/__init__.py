"""What a student learns from a teacher: its answers, compared in one of several ways, or its features."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import field, frozen
from attrs.validators import ge, gt, min_len

from corenas.contracts import DistillerContext, Tap
from corenas.errors import UserError
from corenas.hookspecs import hookimpl

if TYPE_CHECKING:
    from corenas_distiller_knowledge.answers import AdaptiveAlphaLoss, KLLoss, SoftCrossEntropyLoss, SquaredErrors
    from corenas_distiller_knowledge.features import FeatureLoss


@frozen
class SoftCrossEntropy:
    """Cross entropy with the teacher's answers (Hinton et al. 2015, arXiv:1503.02531): BigNAS, Once-for-All, Cream.

    temperature: what logits are divided by; more of it shows more of the classes that the teacher thinks unlikely
    """

    temperature: float = field(default=1.0, validator=gt(0))

    def start(self, context: DistillerContext) -> SoftCrossEntropyLoss:
        """Return the distiller of a training; its first loss raises UserError for a task without logits."""
        from corenas_distiller_knowledge.answers import SoftCrossEntropyLoss

        return SoftCrossEntropyLoss(self)


@frozen
class KL:
    """Kullback-Leibler divergence of the student's answers from the teacher's: 0 where both say the same.

    Its gradient is that of the soft cross entropy; its value leaves out the teacher's own entropy.

    temperature: what logits are divided by
    """

    temperature: float = field(default=1.0, validator=gt(0))

    def start(self, context: DistillerContext) -> KLLoss:
        """Return the distiller of a training; its first loss raises UserError for a task without logits."""
        from corenas_distiller_knowledge.answers import KLLoss

        return KLLoss(self)


@frozen
class MSE:
    """Mean squared difference of answers as they are: of numbers, and of logits (Ba and Caruana 2014, arXiv:1312.6184).

    The one for regression, whose answers are no probabilities.
    """

    def start(self, context: DistillerContext) -> SquaredErrors:
        """Return the distiller of a training."""
        from corenas_distiller_knowledge.answers import SquaredErrors

        return SquaredErrors()


@frozen
class AdaptiveAlpha:
    """AlphaNet's adaptive alpha-divergence (Wang et al. 2021, arXiv:2102.07954, section 4).

    Of two divergences, of a negative and of a positive alpha, each image counts by the larger: a positive alpha
    punishes a student that rules out what its teacher does not, a negative one the opposite.

    alpha_min: the one alpha
    alpha_max: the other; 1 is the Kullback-Leibler divergence
    clip: the largest weight that a class has, (teacher / student) ^ alpha
    """

    alpha_min: float = -1.0
    alpha_max: float = 1.0
    clip: float = field(default=5.0, validator=gt(0))

    def __attrs_post_init__(self) -> None:
        if 0.0 in (self.alpha_min, self.alpha_max):
            raise UserError("alpha 0 is the divergence the other way round: take a small number instead")
        if self.alpha_min > self.alpha_max:
            raise UserError(f"alpha_min {self.alpha_min} is above alpha_max {self.alpha_max}")

    def start(self, context: DistillerContext) -> AdaptiveAlphaLoss:
        """Return the distiller of a training; its first loss raises UserError for a task without logits."""
        from corenas_distiller_knowledge.answers import AdaptiveAlphaLoss

        return AdaptiveAlphaLoss(self)


@frozen
class Features:
    """Mean squared differences of features, beside the soft cross entropy of the answers (FitNets, arXiv:1412.6550).

    Where student and teacher differ in width, a linear map that is learnt with the student's weights projects its
    features; where they differ in size, the larger map is averaged down to the smaller one.

    at: parts of the student's backbone: numbers of its segments, -1 for the last, or names of modules
    teacher_at: the same parts of a fixed teacher; left out, they are called the same
    weight: of the features
    answers: weight of the soft cross entropy of the answers; 0 compares features alone
    """

    at: tuple[Tap, ...] = field(default=(-1,), validator=min_len(1))
    teacher_at: tuple[Tap, ...] | None = None
    weight: float = field(default=1.0, validator=gt(0))
    answers: float = field(default=1.0, validator=ge(0))

    def __attrs_post_init__(self) -> None:
        if self.teacher_at is not None and len(self.teacher_at) != len(self.at):
            raise UserError(f"{len(self.at)} parts of the student, {len(self.teacher_at)} of the teacher")

    def start(self, context: DistillerContext) -> FeatureLoss:
        """Return the distiller of a training. Raises UserError for parts that a network has not."""
        from corenas_distiller_knowledge.features import FeatureLoss

        return FeatureLoss(self, context)


@hookimpl
def corenas_distillers() -> dict[str, type]:
    """Offer "soft_cross_entropy", "kl", "mse", "adaptive_alpha" and "features"."""
    return {
        "soft_cross_entropy": SoftCrossEntropy,
        "kl": KL,
        "mse": MSE,
        "adaptive_alpha": AdaptiveAlpha,
        "features": Features,
    }
