"""DARTS: differentiable architecture search."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from attrs import field, frozen
from attrs.validators import ge, lt

from corenas.contracts import AlgorithmContext
from corenas.hookspecs import hookimpl

if TYPE_CHECKING:
    from corenas_algorithm_darts.trainer import DARTSTrainer


def _momenta(instance: object, attribute: object, betas: tuple[float, float]) -> None:
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"expected numbers of at least 0 and less than 1, found {[*betas]}")


@frozen
class DARTS:
    """DARTS (Liu et al. 2019, arXiv:1806.09055); goes with a backbone of mixed operations such as "darts".

    Each operation that is searched becomes the sum of all candidates, weighted by the softmax of architecture weights.
    Before each step of the network's weights on a training batch, these take a step on a validation batch. What is
    strongest in the end is the arch, which is then trained from scratch.

    order: 2 asks what the architecture weights do after one more step of the network's weights, 1 what they do now
    lr: learning rate of the architecture weights' own Adam, which is constant
    betas: of this Adam
    weight_decay: of this Adam
    """

    order: Literal[1, 2] = 2
    lr: float = field(default=3e-4, validator=[ge(0), lt(math.inf)])
    betas: tuple[float, float] = field(default=(0.5, 0.999), validator=_momenta)
    weight_decay: float = field(default=1e-3, validator=[ge(0), lt(math.inf)])

    stages: ClassVar[tuple[str, ...]] = ("train", "derive", "retrain")
    needs: ClassVar[tuple[str, ...]] = ()

    def check(self, context: AlgorithmContext) -> None:
        """Raise UserError if no layer of a network can mix operations."""
        from corenas_algorithm_darts.trainer import mixed_variables

        mixed_variables(context.supernet, context.space)

    def start(self, context: AlgorithmContext) -> DARTSTrainer:
        """Return the trainer of a supernet. Raises UserError if no layer of it can mix operations."""
        from corenas_algorithm_darts.trainer import DARTSTrainer

        return DARTSTrainer(self, context)


@hookimpl
def corenas_algorithms() -> dict[str, type]:
    """Offer the algorithm "darts"."""
    return {"darts": DARTS}
