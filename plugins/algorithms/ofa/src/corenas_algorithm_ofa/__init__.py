"""Once-for-All: progressive shrinking, from a full network to all of its subnets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from attrs import field, frozen
from attrs.validators import ge, gt, optional

from corenas.contracts import AlgorithmContext, Phase, Surroundings
from corenas.hookspecs import hookimpl

if TYPE_CHECKING:
    from corenas_algorithm_ofa.trainer import OnceForAllTrainer


def _choices(instance: object, attribute: object, opened: Mapping[str, int | str]) -> None:
    for pattern, number in opened.items():
        if isinstance(number, int) and number < 1:
            raise ValueError(f'{pattern}: expected a number of choices, at least 1, or "all", found {number}')


@frozen
class Shrinking:
    """A phase after that of the full network. What earlier phases opened stays open.

    open: variable, or a pattern of several -> how many of its largest choices there are from now on, or "all"
    epochs: of this phase; left out, those of `[train]`
    lr: the learning rate that it begins with; left out, that of `[train]`
    warmup: epochs in which the learning rate grows; left out, that of `[train]`
    paths: subnets of a step, whose gradients add up
    """

    # A mapping has no hash; equal options have equal ones all the same.
    open: Mapping[str, int | Literal["all"]] = field(validator=_choices, hash=False)
    epochs: int | None = field(default=None, validator=optional(ge(0)))
    lr: float | None = field(default=None, validator=optional(gt(0)))
    warmup: float | None = field(default=None, validator=optional(ge(0)))
    paths: int = field(default=1, validator=ge(1))


@frozen
class OnceForAll:
    """Once-for-All (Cai et al. 2020, arXiv:1908.09791): progressive shrinking.

    The full network is trained first, as `[train]` says, and then teaches. Phase by phase smaller kernels, depths and
    widths join in, several random subnets a step; channels are sorted before narrower ones do. Subnets are used as they
    are, without retraining.

    phases: what follows the full network; left out, the paper's, with epochs and learning rates in the same relation to
        those of `[train]`, without those that would open nothing
    kd_ratio: weight of what the full network says beside the labels; with 0 it does not teach
    batch_statistics: whether the teacher normalises by the batch that it sees, as in the released code, and not by the
        statistics of its training
    importance: which channels narrow subnets get: "input_l1" (the paper's), "l1", "l2" or "norm_scale" of
        corenas-mutable-sorting
    """

    phases: tuple[Shrinking, ...] | None = None
    kd_ratio: float = field(default=1.0, validator=ge(0))
    batch_statistics: bool = False
    importance: Literal["input_l1", "l1", "l2", "norm_scale"] = "input_l1"

    stages: ClassVar[tuple[str, ...]] = ("train", "search")
    needs: ClassVar[tuple[str, ...]] = ("mutator", "searcher", "distiller")
    defaults: ClassVar[Mapping[str, str]] = {"distiller": "soft_cross_entropy"}

    def check(self, context: AlgorithmContext) -> Sequence[Phase]:
        """Return the phases.

        Raises UserError for those that do not end with the whole space, and for widths that cannot be sorted.
        """
        from corenas_algorithm_ofa.phases import planned_stages

        stages = planned_stages(context, self.phases)
        return [Phase(stage.space, stage.train, paths=stage.paths) for stage in stages]

    def idle(self, around: Surroundings) -> Mapping[str, str]:
        """Return options that do nothing beside the others, and why."""
        return {"batch_statistics": "with kd_ratio = 0 nobody teaches"} if self.kd_ratio == 0 else {}

    def start(self, context: AlgorithmContext) -> OnceForAllTrainer:
        """Return the trainer of a supernet. Raises UserError for phases that do not end with the whole space."""
        from corenas_algorithm_ofa.trainer import OnceForAllTrainer

        return OnceForAllTrainer(self, context)


@hookimpl
def corenas_algorithms() -> dict[str, type]:
    """Offer the algorithm "ofa"."""
    return {"ofa": OnceForAll}
