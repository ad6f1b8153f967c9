"""AttentiveNAS: the best, or the worst, of subnets that cost the same are trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from attrs import frozen

from corenas.contracts import AlgorithmContext
from corenas.hookspecs import hookimpl
from corenas.space import Arch, SearchSpace

if TYPE_CHECKING:
    from corenas_algorithm_attentivenas.trainer import AttentiveNASTrainer


@frozen
class AttentiveNAS:
    """AttentiveNAS (Wang et al. 2021, arXiv:2011.09011); goes with `mutator = "attentive"`.

    Each step trains the largest subnet on the labels and the others, which the mutator chose by their loss, on what the
    largest says of the same images. With the distiller "adaptive_alpha" it is AlphaNet (arXiv:2102.07954).

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

    def start(self, context: AlgorithmContext) -> AttentiveNASTrainer:
        """Return the trainer of a supernet; its first step raises UserError if the task has nothing to distil."""
        from corenas_algorithm_attentivenas.trainer import AttentiveNASTrainer

        return AttentiveNASTrainer(self, context)


@hookimpl
def corenas_algorithms() -> dict[str, type]:
    """Offer the algorithm "attentivenas"."""
    return {"attentivenas": AttentiveNAS}
