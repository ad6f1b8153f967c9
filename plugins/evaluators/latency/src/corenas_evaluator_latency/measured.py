"""Latencies of archs by the clock."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from attrs import asdict
from torch import fx, nn
from torch.fx.experimental.optimization import fuse

from corenas.contracts import EvaluatorContext, Failure, Measured
from corenas.export import plain_graph
from corenas.loading import training_inputs
from corenas.mutable import apply
from corenas.space import Arch
from corenas_evaluator_latency.backends import Runtime
from corenas_evaluator_latency.timing import timed

if TYPE_CHECKING:
    from corenas_evaluator_latency import Latency


def deployed(context: EvaluatorContext, arch: Arch) -> fx.GraphModule:
    """Return an arch's network as it is deployed: on its own, batch norm folded, in evaluation mode, on the CPU."""
    if context.supernet is None:
        plain = plain_graph(context.subnet(arch).eval())
    else:
        with apply(context.supernet, arch):
            plain = plain_graph(context.supernet)
    return folded(copy.deepcopy(plain).cpu().eval())


def folded(plain: fx.GraphModule) -> fx.GraphModule:
    """Return a network in evaluation mode, its batch norms folded into the convolutions before them.

    What was traced of a node, the modules that it stands in, is kept.
    """
    for name, part in [*plain.named_children()]:
        if isinstance(part, nn.Sequential):
            setattr(plain, name, fuse(part))
    return fuse(plain, no_trace=True)  # type: ignore[return-value]


class LiveLatency:
    """The evaluator at work."""

    def __init__(self, options: Latency, context: EvaluatorContext) -> None:
        device = torch.device(options.device) if options.device else context.device
        self._options, self._context = options, context
        self._runtime = Runtime(options.backend, device, options.images, options.threads, options.precision)
        self._runtime.check()

    def __call__(self, archs: Sequence[Arch], fidelity: float) -> list[Measured | Failure]:
        """Return the latencies of archs that are timed in turn."""
        options, task = self._options, self._context.task
        with self._runtime.in_force():
            runners, given = [], self._runtime.given(task.example)
            for arch in archs:
                network = deployed(self._context, arch)
                runners.append(self._runtime.runner(network, given, partial(training_inputs, network, task, 0)))
            rounds = max(3, round(fidelity * options.rounds))
            timings = timed(runners, warmup=options.warmup, runs=options.runs, rounds=rounds, spread=options.spread)
        found: list[Measured | Failure] = []
        for timing in timings:
            if timing.spread > options.spread:
                text = f"timings around {timing.ms:.3g} ms are spread by {timing.spread:.0%} of it"
                found.append(Failure(f"{text}: does something else run here? Otherwise more `runs`, or `spread`"))
            else:
                facts = {options.name: {**asdict(timing), **self._runtime.facts}}
                found.append(Measured({options.name: timing.ms}, facts))
        return found
