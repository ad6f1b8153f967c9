"""BigNAS: the sandwich rule with in-place distillation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from attrs import frozen

from corenas.contracts import AlgorithmContext
from corenas.hookspecs import hookimpl
from corenas.space import Arch, SearchSpace

if TYPE_CHECKING:
    from corenas_algorithm_bignas.trainer import BigNASTrainer


@frozen
class BigNAS:
    """BigNAS (Yu et al. 2020, arXiv:2003.11142); goes with `mutator = "sandwich"`.

    Each step trains the largest subnet on the labels and the others on what the largest says of the same images, by
    soft cross entropy or another distiller. Only the largest is regularised, by dropout and drop path. Its subnets are
    used as they are, without retraining.

    zero_init: whether residual blocks start as the identity: the weight of their last batch norm at zero; not
        those of a backbone with pretrained `weights`
    """

    zero_init: bool = True

    stages: ClassVar[tuple[str, ...]] = ("train", "search")
    needs: ClassVar[tuple[str, ...]] = ("mutator", "searcher", "distiller")
    defaults: ClassVar[Mapping[str, str]] = {"distiller": "soft_cross_entropy"}

    def check_archs(self, archs: Sequence[Arch], space: SearchSpace) -> None:
        """Raise UserError if a mutator does not put the largest first."""
        from corenas.teaching import refuse_unless_largest_first

        refuse_unless_largest_first(archs, space.largest())

    def start(self, context: AlgorithmContext) -> BigNASTrainer:
        """Return the trainer of a supernet; its first step raises UserError if the task has nothing to distil."""
        from corenas_algorithm_bignas.trainer import BigNASTrainer

        return BigNASTrainer(self, context)


@hookimpl
def corenas_algorithms() -> dict[str, type]:
    """The algorithm "bignas"."""
    return {"bignas": BigNAS}
