"""Networks as ONNX, in floating point and in whole numbers of 8 bits, and what the latter are worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from attrs import field, frozen
from attrs.validators import ge

from corenas.contracts import EvaluatorContext, ExportContext, LiveEvaluator, LiveTask, Metric
from corenas.errors import UserError
from corenas.hookspecs import hookimpl
from corenas.space import Arch

if TYPE_CHECKING:
    from torch import nn


@frozen
class Onnx:
    """The network as ONNX for any batch size, batch norm folded into convolutions: `network.onnx`.

    opset: version of the operators
    """

    opset: int = field(default=18, validator=ge(18))

    def write(self, network: nn.Module, folder: Path, context: ExportContext) -> Path:
        """Run the file with onnxruntime before it is written.

        Raises UserError for a network that torch cannot write as ONNX, and if the file computes something else: a
        difference of more than 1e-4 of the largest output.
        """
        from corenas_exporter_onnx.graph import checked_graph

        return _written(folder / "network.onnx", checked_graph(network, context.example, self.opset, context.title))


@frozen
class OnnxInt8:
    """The network as ONNX with weights and activations of 8 bits, quantised after training: `network-int8.onnx`.

    Ranges of activations are those that training images have in it; weights have a scale for each output channel
    (Jacob et al. 2018, arXiv:1712.05877; onnxruntime's static quantisation).

    samples: training images that ranges are read off
    method: "minmax", the least and the most that was seen; "entropy" or "percentile" cut outliers off
    opset: version of the operators
    """

    samples: int = field(default=256, validator=ge(1))
    method: Literal["minmax", "entropy", "percentile"] = "minmax"
    opset: int = field(default=18, validator=ge(18))

    def write(self, network: nn.Module, folder: Path, context: ExportContext) -> Path:
        """Raises UserError as `Onnx` does, and where there are no training images."""
        from corenas_exporter_onnx.graph import checked_graph
        from corenas_exporter_onnx.quantised import quantised

        graph = checked_graph(network, context.example, self.opset, context.title)
        inputs = context.inputs(self.samples)
        return _written(folder / "network-int8.onnx", quantised(graph, inputs, self.method))


@frozen
class Int8:
    """The task's metrics of a subnet after its quantisation to 8 bits, run by onnxruntime: `int8_top1` for instance.

    Batch norm is recalibrated first, as for `accuracy`. A lower fidelity is a share of the images.

    split: the data that is measured on; test data is for the end of a run alone
    samples: as of the format `onnx-int8`
    method: as of the format `onnx-int8`
    """

    split: Literal["valid", "train"] = "valid"
    samples: int = field(default=256, validator=ge(1))
    method: Literal["minmax", "entropy", "percentile"] = "minmax"

    cheap: ClassVar[bool] = False

    def provides(self, task: LiveTask) -> Mapping[str, Metric]:
        """What the task's meter computes, with "int8_" before its name."""
        return {f"int8_{name}": metric for name, metric in task.metrics.items()}

    def start(self, context: EvaluatorContext) -> LiveEvaluator:
        """Raises UserError if there is no trained supernet."""
        if context.evaluation is None:
            raise UserError("int8 needs a trained supernet", key=("evaluators",), hint="this algorithm trains none")
        from corenas_exporter_onnx.quantised import measured

        def measure(archs: Sequence[Arch], fidelity: float) -> list[Mapping[str, float]]:
            return [measured(self, context, arch, fidelity) for arch in archs]

        return measure

    @property
    def format(self) -> OnnxInt8:
        """The format that it measures."""
        return OnnxInt8(self.samples, self.method)


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@hookimpl
def corenas_exporters() -> dict[str, type]:
    """The formats "onnx" and "onnx-int8"."""
    return {"onnx": Onnx, "onnx-int8": OnnxInt8}


@hookimpl
def corenas_evaluators() -> dict[str, type]:
    """The evaluator "int8"."""
    return {"int8": Int8}
