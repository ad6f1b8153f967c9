"""Latency of networks, measured on the user's device, or looked up in a table that was measured there."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

from attrs import field, frozen
from attrs.validators import ge, gt, optional

from corenas.cli import add_plugin_option
from corenas.contracts import EvaluatorContext, LiveEvaluator, LiveTask, Metric, Surroundings
from corenas.hookspecs import hookimpl

Backend: TypeAlias = Literal["eager", "compile", "onnxruntime", "openvino"]
BACKENDS = ("eager", "compile", "onnxruntime", "openvino")


def _identifier(instance: object, attribute: object, name: str) -> None:
    if not name.isidentifier():
        raise ValueError(f"expected letters, digits and '_', found {name!r}")


@frozen
class Latency:
    """Milliseconds that the exported network takes for one batch of images, batch norm folded into convolutions.

    Archs are timed in turn, a few runs each and then the next, round by round, so that what else the machine does
    favours none. A latency is the median of the rounds, each the median of its runs. Where rounds differ too much for
    it to be trusted they are repeated, twice at most; then the trial has failed.

    backend: "eager" torch, "compile" (torch.compile), "onnxruntime", "openvino"; the last two want their packages
    precision: "float32", or "int8", quantised after training by the exporter `onnx-int8`, for onnxruntime and openvino
    device: "cpu" or "cuda"; left out, the run's
    images: in a batch
    threads: of the CPU; left out, torch's number
    warmup: runs before the first round, of each arch
    runs: in a round, after one that is not counted, since the arch before has emptied the caches
    rounds: how many; a lower fidelity takes a share of them, 3 at least
    spread: distance of the quartiles of the rounds, as a share of the median, up to which a latency is trusted
    batch: archs that are timed in turn
    name: of the metric, where a spec measures several
    """

    backend: Backend = "eager"
    precision: Literal["float32", "int8"] = "float32"
    device: Literal["cpu", "cuda"] | None = None
    images: int = field(default=1, validator=ge(1))
    threads: int | None = field(default=None, validator=optional(ge(1)))
    warmup: int = field(default=10, validator=ge(1))
    runs: int = field(default=10, validator=ge(1))
    rounds: int = field(default=11, validator=ge(3))
    spread: float = field(default=0.15, validator=gt(0.0))
    batch: int = field(default=10, validator=ge(1))
    name: str = field(default="latency_ms", validator=_identifier)

    cheap: ClassVar[bool] = False
    exclusive: ClassVar[bool] = True

    def idle(self, around: Surroundings) -> Mapping[str, str]:
        """Return options that do nothing beside the others, and why."""
        return {"threads": "it is timed on the GPU"} if self.device == "cuda" else {}

    def provides(self, task: LiveTask) -> Mapping[str, Metric]:
        """Return the one metric."""
        return {self.name: Metric("ms", "min")}

    def start(self, context: EvaluatorContext) -> LiveEvaluator:
        """Raises UserError for a back end or a device that is not here."""
        from corenas_evaluator_latency.measured import LiveLatency

        return LiveLatency(self, context)


@frozen
class LatencyTable:
    """Milliseconds of a network as the sum of its blocks, looked up in a file of `corenas latency-table`.

    Thousands of archs a second. The file says on what device it was measured, and how far it is off whole networks.

    file: of the table
    name: of the metric
    """

    file: str
    name: str = field(default="latency_ms", validator=_identifier)

    cheap: ClassVar[bool] = True

    def provides(self, task: LiveTask) -> Mapping[str, Metric]:
        """Return the one metric."""
        return {self.name: Metric("ms", "min")}

    def start(self, context: EvaluatorContext) -> LiveEvaluator:
        """Raises UserError for a file that is none, or that lacks something of the space."""
        from corenas_evaluator_latency.lookup import Table

        table = Table.read(Path(self.file))
        lookup = table.on(context.space)
        return lambda archs, fidelity: [{self.name: ms} for ms in lookup(archs)]


def add_latency_table(parser: ArgumentParser) -> Callable[[Namespace], int]:
    """Time the blocks of a spec's space on this device, for the evaluator `latency_table`."""
    parser.add_argument("spec", metavar="SPEC", help="a TOML file")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="override a key of the spec")
    add_plugin_option(parser)
    parser.add_argument("--to", metavar="FILE", type=Path, required=True, help="the file to write (JSON)")
    text = "how the networks are run (default: eager)"
    parser.add_argument("--backend", choices=BACKENDS, default="eager", help=text)
    parser.add_argument("--images", metavar="N", type=int, default=1, help="in a batch")
    parser.add_argument("--threads", metavar="N", type=int, help="of the CPU (default: of the spec, or torch's)")
    text = "whole networks to fit the sum of the blocks to, and as many others to state its error"
    parser.add_argument("--networks", metavar="N", type=int, default=12, help=text)
    text = "blocks to time at most; a larger space is refused"
    parser.add_argument("--blocks", metavar="N", type=int, default=20000, help=text)

    def command(options: Namespace) -> int:
        from corenas_evaluator_latency.command import command

        command(options)
        return 0

    return command


@hookimpl
def corenas_evaluators() -> dict[str, type]:
    """The evaluators "latency" and "latency_table"."""
    return {"latency": Latency, "latency_table": LatencyTable}


@hookimpl
def corenas_commands() -> dict[str, Any]:
    """The command `latency-table`."""
    return {"latency-table": add_latency_table}
