"""How a network is run: by torch as it is, compiled, by onnxruntime, by OpenVINO."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from corenas.contracts import ExportContext
from corenas.errors import UserError
from corenas.mutable import call_model, channels_last
from corenas.plugins import load_catalogue


@frozen
class Runtime:
    """A back end with what it is told.

    images: in a batch
    threads: of the CPU, None for torch's number
    """

    backend: str = "eager"
    device: torch.device = torch.device("cpu")
    images: int = 1
    threads: int | None = None
    precision: str = "float32"

    def check(self) -> None:
        """Raise UserError if it cannot run here."""
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise UserError("no cuda device here", key=("evaluators",), hint='device = "cpu"')
        if self.precision == "int8" and self.backend not in ("onnxruntime", "openvino"):
            text = f"{self.backend} runs no networks of 8 bits"
            raise UserError(text, key=("evaluators",), hint='backend = "onnxruntime"')
        if self.backend == "onnxruntime":
            provider = self._provider
            if provider not in _package("onnxruntime").get_available_providers():
                text = f"this onnxruntime has no {provider}"
                raise UserError(text, key=("evaluators",), hint="pip install onnxruntime-gpu")
        if self.backend == "openvino":
            _package("openvino")
            if self.device.type != "cpu":
                raise UserError("openvino is for CPUs here", key=("evaluators",), hint='device = "cpu"')
        if self.backend in ("onnxruntime", "openvino"):
            _exporter(self.precision)

    @property
    def _provider(self) -> str:
        return "CUDAExecutionProvider" if self.device.type == "cuda" else "CPUExecutionProvider"

    @property
    def _threads(self) -> int:
        return self.threads or torch.get_num_threads()

    @property
    def facts(self) -> dict[str, Any]:
        """What a figure has to be read with."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else processor()
        found = {"backend": self.backend, "device": name, "images": self.images, "precision": self.precision}
        return found if self.device.type == "cuda" else {**found, "threads": self._threads}

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Give torch its number of threads for a while."""
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def given(self, example: Any) -> Any:
        """Return a batch of inputs like an example: whole numbers are repeated, the others are noise."""
        return tree_map_only(Tensor, self._noise, example)

    def runner(
        self, network: nn.Module, given: Any, inputs: Callable[[int], Iterable[Any]] = lambda n: ()
    ) -> Callable[[], object]:
        """Return what runs a network once, to its end.

        given: what it gets, as `call_model` takes it
        inputs: as an exporter takes them
        """
        if self.backend in ("onnxruntime", "openvino"):
            with tempfile.TemporaryDirectory() as folder:
                path = _exporter(self.precision).write(network.cpu(), Path(folder), ExportContext(given, "", inputs))
                start = self._onnxruntime if self.backend == "onnxruntime" else self._openvino
                return start(path, [leaf.numpy() for leaf in tree_leaves(given) if isinstance(leaf, Tensor)])
        return self._torch(network, given)

    def _noise(self, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor[:1].expand(self.images, *tensor.shape[1:]).contiguous()
        return torch.randn((self.images, *tensor.shape[1:]), generator=torch.Generator().manual_seed(0))

    def _torch(self, network: nn.Module, given: Any) -> Callable[[], object]:
        network = channels_last(network.to(self.device))
        given = tree_map_only(Tensor, self._placed, given)
        forward: Callable[..., Any] = torch.compile(network, dynamic=False) if self.backend == "compile" else network

        @torch.inference_mode()
        def run() -> None:
            call_model(forward, given)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)

        try:
            run()
        except Exception as error:
            if self.backend != "compile":
                raise
            text = f"torch.compile does not work here: {(str(error).strip() or repr(error)).splitlines()[0]}"
            raise UserError(text, key=("evaluators",), hint='backend = "eager"') from error
        return run

    def _placed(self, tensor: Tensor) -> Tensor:
        layout = torch.channels_last if tensor.dim() == 4 else torch.preserve_format
        return tensor.to(self.device, memory_format=layout)

    def _onnxruntime(self, path: Path, arrays: list[Any]) -> Callable[[], object]:
        ort = _package("onnxruntime")
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 3
        session = ort.InferenceSession(path.read_bytes(), options, providers=[self._provider])
        feed = dict(zip([given.name for given in session.get_inputs()], arrays, strict=True))
        return lambda: session.run(None, feed)

    def _openvino(self, path: Path, arrays: list[Any]) -> Callable[[], object]:
        core = _package("openvino").Core()
        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": self._threads}
        request = core.compile_model(core.read_model(path), "CPU", settings).create_infer_request()
        return lambda: request.infer(arrays)


def processor() -> str:
    """Return the name of this machine's processor."""
    import platform

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        text = f'backend "{name}" wants the package {name}, which is not installed'
        raise UserError(text, key=("evaluators",), hint=f'pip install "corenas-evaluator-latency[{name}]"') from None


def _exporter(precision: str) -> Any:
    name = "onnx" if precision == "float32" else "onnx-int8"
    try:
        return load_catalogue().options("exporters", name)
    except UserError:
        text = f"this back end wants the exporter {name}, which is not installed"
        raise UserError(text, key=("evaluators",), hint="pip install corenas-exporter-onnx") from None
