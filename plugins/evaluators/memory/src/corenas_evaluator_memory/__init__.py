"""How much memory a network needs: activations at their peak, weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from attrs import frozen

from corenas.contracts import EvaluatorContext, LiveEvaluator, LiveTask, Metric
from corenas.hookspecs import hookimpl


@frozen
class Memory:
    """Bytes that the exported network needs for one input: activations at their peak, and weights.

    `peak_memory` is the most that tensors take together which are alive at one operation of the network, in the order
    of its graph: what the operation reads, what it writes, and what a later one still reads, a residual for instance.
    Views, and what is computed in place, take nothing of their own; weights and what an operation needs inside itself
    do not count. `weight_memory` is all parameters and buffers. Both are exact; nothing is computed for them.

    element: bytes of a number: 4, 2 for half precision, 1 for whole numbers of 8 bits
    """

    element: Literal[1, 2, 4] = 4

    cheap: ClassVar[bool] = False

    def provides(self, task: LiveTask) -> Mapping[str, Metric]:
        """Return the metrics `peak_memory` and `weight_memory`."""
        return {"peak_memory": Metric("bytes", "min"), "weight_memory": Metric("bytes", "min")}

    def start(self, context: EvaluatorContext) -> LiveEvaluator:
        """Return what measures networks without their weights; a supernet need not be trained."""
        from corenas_evaluator_memory.peak import LiveMemory

        return LiveMemory(self.element, context)


@hookimpl
def corenas_evaluators() -> dict[str, type]:
    """The evaluator "memory"."""
    return {"memory": Memory}
