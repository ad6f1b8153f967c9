"""FairNAS: every choice of every layer is trained equally often, in every step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from attrs import frozen

from corenas.contracts import AlgorithmContext
from corenas.hookspecs import hookimpl
from corenas.space import Arch, SearchSpace

if TYPE_CHECKING:
    from corenas_algorithm_fairnas.trainer import FairNASTrainer


@frozen
class FairNAS:
    """FairNAS (Chu et al. 2021, arXiv:1907.01845); goes with `mutator = "fair"`.

    Each step trains as many paths as a layer has choices on one batch, every choice on one of them, and adds their
    gradients up to one update. The arch that is found is trained from scratch.
    """

    stages: ClassVar[tuple[str, ...]] = ("train", "search", "retrain")
    needs: ClassVar[tuple[str, ...]] = ("mutator", "searcher")
    uses: ClassVar[tuple[str, ...]] = ("distiller", "teacher")

    def check_archs(self, archs: Sequence[Arch], space: SearchSpace) -> None:
        """Raise UserError for paths on which some choice is more often than another."""
        from corenas_algorithm_fairnas.trainer import refuse_unfair

        refuse_unfair(archs, space)

    def start(self, context: AlgorithmContext) -> FairNASTrainer:
        """Return the trainer of a supernet; its first step raises UserError for paths that are not fair."""
        from corenas_algorithm_fairnas.trainer import FairNASTrainer

        return FairNASTrainer(context)


@hookimpl
def corenas_algorithms() -> dict[str, type]:
    """Offer the algorithm "fairnas"."""
    return {"fairnas": FairNAS}
