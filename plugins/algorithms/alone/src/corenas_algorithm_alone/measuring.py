"""The metrics of archs that are trained one by one."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from corenas.calibrate import evaluate
from corenas.contracts import EvaluatorContext, Measured
from corenas.loading import Batches
from corenas.space import Arch

BATCH_SIZE = 256
"""Images that are measured at once."""


class TrainedAlone:
    """Trains each arch it is asked for, as often as there are seeds, and measures it on validation data."""

    def __init__(self, seeds: int, context: EvaluatorContext) -> None:
        self.seeds, self.context = seeds, context
        self.valid = Batches(context.task, "valid", BATCH_SIZE, context.device)

    def __call__(self, archs: Sequence[Arch], fidelity: float) -> list[Measured]:
        """Return their metrics: the mean over seeds, whose spread is a fact beside it."""
        return [self._measured(arch, fidelity) for arch in archs]

    def _measured(self, arch: Arch, fidelity: float) -> Measured:
        alone, task = self.context.alone, self.context.task
        rows = []
        for again in range(self.seeds):
            network = alone(arch, fidelity, again) if again else alone(arch, fidelity)
            rows.append(evaluate(network.eval(), task, self.valid))
        means = {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}
        if self.seeds == 1:
            return Measured(means)
        return Measured(means, {f"{name}_sd": statistics.stdev(row[name] for row in rows) for name in rows[0]})
