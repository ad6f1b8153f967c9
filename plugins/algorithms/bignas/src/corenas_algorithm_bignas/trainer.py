"""A step of BigNAS."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from corenas.contracts import AlgorithmContext, Phase, Step
from corenas.errors import UserError
from corenas.supernet import start_as_identity
from corenas.teaching import distil_in_place

if TYPE_CHECKING:
    from corenas_algorithm_bignas import BigNAS


class BigNASTrainer:
    """Trains the largest subnet on the labels, the others on its answers (section 3.1); one update for all."""

    def __init__(self, options: BigNAS, context: AlgorithmContext) -> None:
        if context.distiller is None:
            raise UserError("bignas distils: it needs a distiller", key=("distiller",))
        self.supernet, self.task, self.distiller = context.supernet, context.task, context.distiller
        self.phases = [Phase(context.space, context.train)]
        self.largest = context.space.largest()
        if options.zero_init:  # section 3.2: initialisation
            start_as_identity(context)

    def train_step(self, batch: Any, step: Step) -> Mapping[str, Tensor]:
        """Train the largest first, with dropout, then the others on what it says, without; their gradients add up.

        Raises UserError if the mutator does not put it there, or if the task has nothing to distil.
        """
        return distil_in_place(self.supernet, self.task, self.distiller, batch, step, self.largest)
