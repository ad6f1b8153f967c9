"""The metrics of archs that are trained one by one."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from corenas.calibrate import evaluate
from corenas.contracts import EvaluatorContext, Measured
from corenas.loading import Batches
from corenas.space import Arch

BATCH_SIZE = 256
"""Images that are measured at once."""


class TrainedAlone:
    """Trains each arch it is asked for, as often as there are seeds, and measures it on validation data."""

    def __init__(self, seeds: int, context: EvaluatorContext, curve: int = 0) -> None:
        self.seeds, self.context, self.curve = seeds, context, curve
        self.valid = Batches(context.task, "valid", BATCH_SIZE, context.device)

    def __call__(self, archs: Sequence[Arch], fidelity: float) -> list[Measured]:
        """Return their metrics: the mean over seeds, whose spread is a fact beside it, as is what they were before."""
        return [self._measured(arch, fidelity) for arch in archs]

    def _measured(self, arch: Arch, fidelity: float) -> Measured:
        shares = [fidelity / 2**halvings for halvings in range(self.curve, 0, -1)]
        runs = [[self._trained(arch, share, again) for share in (*shares, fidelity)] for again in range(self.seeds)]
        rows = [run[-1] for run in runs]
        means = {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}
        extra: dict[str, Any] = {}
        if self.seeds > 1:
            extra = {f"{name}_sd": statistics.stdev(row[name] for row in rows) for name in rows[0]}
        if shares:
            points = [[run[i] for run in runs] for i in range(len(shares))]
            extra["curve"] = {"share": shares} | {
                name: [statistics.fmean(row[name] for row in point) for point in points] for name in means
            }
        return Measured(means, extra)

    def _trained(self, arch: Arch, share: float, again: int) -> Mapping[str, float]:
        """Return the metrics after a share of the epochs; a training goes on from where the one before has come to."""
        alone = self.context.alone
        network = alone(arch, share, again) if again else alone(arch, share)
        return evaluate(network.eval(), self.context.task, self.valid)
