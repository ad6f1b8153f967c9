"""BigNAS: the sandwich rule with in-place distillation."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from attrs import frozen

from corenas.contracts import AlgorithmContext
from corenas.hookspecs import hookimpl

if TYPE_CHECKING:
    from corenas_algorithm_bignas.trainer import BigNASTrainer


@frozen
class BigNAS:
    """BigNAS (Yu et al. 2020, arXiv:2003.11142); goes with `mutator = "sandwich"`.

    Each step trains the largest subnet on the labels and the others on what the largest says of the same images. Only
    the largest is regularised, by dropout. Its subnets are used as they are, without retraining.

    zero_init: whether residual blocks start as the identity: the weight of their last batch norm at zero
    """

    zero_init: bool = True

    stages: ClassVar[tuple[str, ...]] = ("train", "search")
    needs: ClassVar[tuple[str, ...]] = ("mutator", "searcher")

    def start(self, context: AlgorithmContext) -> BigNASTrainer:
        """The trainer of a supernet; its first step raises UserError if the task has no logits to distil."""
        from corenas_algorithm_bignas.trainer import BigNASTrainer

        return BigNASTrainer(self, context)


@hookimpl
def corenas_algorithms() -> dict[str, type]:
    """The algorithm "bignas"."""
    return {"bignas": BigNAS}
