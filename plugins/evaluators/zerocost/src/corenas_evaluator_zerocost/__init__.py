"""Scores of networks that were never trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from attrs import field, frozen
from attrs.validators import ge, gt, lt, optional

from corenas.contracts import EvaluatorContext, LiveEvaluator, LiveTask, Metric
from corenas.hookspecs import hookimpl


@frozen
class ZenScore:
    """The Zen-Score: how much a random network moves its features with its input (Lin et al. 2021, arXiv:2102.01063).

    convention: what stands for the variance of a batch norm: "reference", the running variance of the released code
        after the two forwards of a score (0.81 and 0.19 parts of the batch's); "paper", the batch's own. Scores of the
        two are never comparable
    repeats: of which the mean is taken, each with weights and images of its own
    batch_size: random images of each repeat
    gamma: how large the noise is that is added to them
    resolution: side of the random images; left out, that of the task's
    no_reslink: whether shortcuts, and projections on them, are left out, as the released code's search does
    """

    convention: Literal["reference", "paper"] = "reference"
    repeats: int = field(default=1, validator=ge(1))
    batch_size: int = field(default=64, validator=ge(2))
    gamma: float = field(default=0.01, validator=[gt(0.0), lt(float("inf"))])
    resolution: int | None = field(default=None, validator=optional(ge(1)))
    no_reslink: bool = True

    cheap: ClassVar[bool] = False

    def provides(self, task: LiveTask) -> Mapping[str, Metric]:
        """Return the metric `zen_score`."""
        return {"zen_score": Metric("", "max")}

    def start(self, context: EvaluatorContext) -> LiveEvaluator:
        """Return what measures networks with weights of its own; it reads no data."""
        from corenas_evaluator_zerocost.zen import LiveZenScore

        return LiveZenScore(self, context)


@frozen
class Synflow:
    """The logarithm of synaptic flow, summed over all weights (Tanaka et al. 2020, arXiv:2006.05467).

    As a score of networks: Abdelfattah et al. 2021, arXiv:2101.08134. It reads no data.
    """

    cheap: ClassVar[bool] = False

    def provides(self, task: LiveTask) -> Mapping[str, Metric]:
        """Return the metric `synflow`."""
        return {"synflow": Metric("", "max")}

    def start(self, context: EvaluatorContext) -> LiveEvaluator:
        """Return what measures networks as they are initialised."""
        from corenas_evaluator_zerocost.scores import LiveScore, synflow

        return LiveScore("synflow", synflow, context, None)


@frozen
class Naswot:
    """How differently a network's activations split a batch of images (Mellor et al. 2021, arXiv:2006.04647).

    batch_size: images, the same for all networks
    """

    batch_size: int = field(default=128, validator=ge(2))

    cheap: ClassVar[bool] = False

    def provides(self, task: LiveTask) -> Mapping[str, Metric]:
        """Return the metric `naswot`."""
        return {"naswot": Metric("", "max")}

    def start(self, context: EvaluatorContext) -> LiveEvaluator:
        """Return what measures networks as they are initialised, on training images."""
        from corenas_evaluator_zerocost.scores import LiveScore, naswot

        return LiveScore("naswot", naswot, context, self.batch_size)


@frozen
class GradNorm:
    """The norms of the gradients of all weights, summed (Abdelfattah et al. 2021, arXiv:2101.08134).

    batch_size: images, the same for all networks
    """

    batch_size: int = field(default=64, validator=ge(2))

    cheap: ClassVar[bool] = False

    def provides(self, task: LiveTask) -> Mapping[str, Metric]:
        """Return the metric `grad_norm`."""
        return {"grad_norm": Metric("", "max")}

    def start(self, context: EvaluatorContext) -> LiveEvaluator:
        """Return what measures networks as they are initialised, on training images."""
        from corenas_evaluator_zerocost.scores import LiveScore, grad_norm

        return LiveScore("grad_norm", grad_norm, context, self.batch_size)


@frozen
class JacobCov:
    """How little the gradients of different images are alike (Mellor et al. 2020, arXiv:2006.04647v1).

    batch_size: images, the same for all networks
    """

    batch_size: int = field(default=64, validator=ge(2))

    cheap: ClassVar[bool] = False

    def provides(self, task: LiveTask) -> Mapping[str, Metric]:
        """Return the metric `jacob_cov`."""
        return {"jacob_cov": Metric("", "max")}

    def start(self, context: EvaluatorContext) -> LiveEvaluator:
        """Return what measures networks as they are initialised, on training images."""
        from corenas_evaluator_zerocost.scores import LiveScore, jacob_cov

        return LiveScore("jacob_cov", jacob_cov, context, self.batch_size)


@hookimpl
def corenas_evaluators() -> dict[str, type]:
    """Offer the scores under their names."""
    return {
        "zen_score": ZenScore,
        "synflow": Synflow,
        "naswot": Naswot,
        "grad_norm": GradNorm,
        "jacob_cov": JacobCov,
    }
