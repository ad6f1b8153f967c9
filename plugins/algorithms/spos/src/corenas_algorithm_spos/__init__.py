"""Single Path One-Shot: train a supernet one path at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from attrs import frozen

from corenas.contracts import AlgorithmContext
from corenas.hookspecs import hookimpl

if TYPE_CHECKING:
    from corenas_algorithm_spos.trainer import SPOSTrainer


@frozen
class SPOS:
    """Single Path One-Shot (Guo et al. 2020, arXiv:1904.00420).

    Each step trains the paths that the mutator draws, one with `mutator = "uniform"`, on the labels. Operations that
    are on no path of a step get no gradient at all, so that neither momentum nor weight decay moves them. The arch that
    is found is trained from scratch.
    """

    stages: ClassVar[tuple[str, ...]] = ("train", "search", "retrain")
    needs: ClassVar[tuple[str, ...]] = ("mutator", "searcher")
    uses: ClassVar[tuple[str, ...]] = ("distiller", "teacher")

    def start(self, context: AlgorithmContext) -> SPOSTrainer:
        """Return the trainer of a supernet."""
        from corenas_algorithm_spos.trainer import SPOSTrainer

        return SPOSTrainer(context)


@hookimpl
def corenas_algorithms() -> dict[str, type]:
    """The algorithm "spos"."""
    return {"spos": SPOS}
