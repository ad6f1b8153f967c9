"""An ONNX graph in whole numbers of 8 bits, and the metrics of a subnet that is one."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType, quantize_static

from corenas.calibrate import evaluate
from corenas.contracts import EvaluatorContext
from corenas.errors import UserError
from corenas.export import export_active
from corenas.loading import training_inputs
from corenas.mutable import as_arguments
from corenas.space import Arch
from corenas_exporter_onnx.graph import OnnxModule, checked_graph, output_structure, quiet

if TYPE_CHECKING:
    from corenas_exporter_onnx import Int8

_METHODS = {
    "minmax": CalibrationMethod.MinMax,
    "entropy": CalibrationMethod.Entropy,
    "percentile": CalibrationMethod.Percentile,
}


class _Inputs(CalibrationDataReader):
    """Inputs as onnxruntime's calibration asks for them."""

    def __init__(self, feeds: Iterator[dict[str, Any]]) -> None:
        self._feeds = feeds

    def get_next(self) -> Any:
        """Return the next batch; None after the last."""
        return next(self._feeds, None)


def quantised(graph: bytes, inputs: Iterable[Any], method: str) -> bytes:
    """Return a graph with weights and activations of 8 bits.

    inputs: batches that the ranges of activations are read off. Raises UserError if there are none.
    """
    feeds = [OnnxModule(graph).feed(*as_arguments(batch)) for batch in inputs]
    if not feeds:
        text = "onnx-int8 reads the ranges of activations off training images, and there are none here"
        raise UserError(text, key=("export", "formats"), hint="export from a run, or with the data of a spec")
    with tempfile.TemporaryDirectory() as folder, quiet():
        source, target = Path(folder, "float.onnx"), Path(folder, "int8.onnx")
        source.write_bytes(graph)
        quantize_static(
            source,
            target,
            _Inputs(iter(feeds)),
            per_channel=True,
            # Without VNNI a processor adds pairs of products in 16 bits, which whole 8 bits of weights would overflow.
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=_METHODS[method],
        )
        return target.read_bytes()


def measured(options: Int8, context: EvaluatorContext, arch: Arch, fidelity: float) -> Mapping[str, float]:
    """Return the metrics of an arch, quantised."""
    evaluation, task = context.evaluation, context.task
    assert evaluation is not None
    with evaluation.calibrated(arch) as model:
        network = copy.deepcopy(export_active(model, task.example)).cpu().eval()
    inputs = training_inputs(network, task, 0, options.samples)
    graph = quantised(checked_graph(network, task.example, options.format.opset), inputs, options.method)
    module = OnnxModule(graph, output_structure(network, task.example))
    metrics = evaluate(module, task, evaluation.split(options.split, fidelity))
    return {f"int8_{name}": number for name, number in metrics.items()}
