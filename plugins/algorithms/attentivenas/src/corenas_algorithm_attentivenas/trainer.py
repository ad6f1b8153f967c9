"""A step of AttentiveNAS."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from corenas.contracts import AlgorithmContext, Phase, Step
from corenas.errors import UserError
from corenas.supernet import start_as_identity
from corenas.teaching import distil_in_place

if TYPE_CHECKING:
    from corenas_algorithm_attentivenas import AttentiveNAS


class AttentiveNASTrainer:
    """Trains the largest subnet, those that were attended to, and the smallest (algorithm 1).

    Lines 4 to 9, a cost drawn from the prior and the best or the worst of k archs of this cost, are the mutator's; this
    is what is done with them, eq. 3 with the sandwich rule and in-place distillation of BigNAS.
    """

    def __init__(self, options: AttentiveNAS, context: AlgorithmContext) -> None:
        if context.distiller is None:
            raise UserError("attentivenas distils: it needs a distiller", key=("distiller",))
        self.supernet, self.task, self.distiller = context.supernet, context.task, context.distiller
        self.phases = [Phase(context.space, context.train)]
        self.largest = context.space.largest()
        if options.zero_init:
            start_as_identity(context)

    def train_step(self, batch: Any, step: Step) -> Mapping[str, Tensor]:
        """Train the largest on the labels, with dropout and drop path, the others on its answers, without.

        Raises UserError if the mutator does not put the largest first, or if the task has nothing to distil.
        """
        return distil_in_place(self.supernet, self.task, self.distiller, batch, step, self.largest)
