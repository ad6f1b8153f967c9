"""Networks as files that load without corenas: weights, Python source, a torch.export program."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from attrs import frozen

from corenas.contracts import ExportContext
from corenas.errors import UserError
from corenas.hookspecs import hookimpl

if TYPE_CHECKING:
    from torch import Tensor, nn


@frozen
class Safetensors:
    """Weights and buffers by their names in the network: `network.safetensors`."""

    def write(self, network: nn.Module, folder: Path, context: ExportContext) -> Path:
        """Tensors that share memory are written one by one. Raises UserError for a state that is not tensors alone."""
        import torch
        from safetensors.torch import save

        state = network.state_dict()
        try:
            content = save({k: v.detach().clone(memory_format=torch.contiguous_format) for k, v in state.items()})
        except Exception as error:  # extra state of any kind, types of numbers that the format lacks
            raise _refusal("safetensors", error) from error
        return _written(folder / "network.safetensors", content)


@frozen
class Python:
    """A Python file whose class `Network` builds the network with torch alone, without its weights: `network.py`."""

    def write(self, network: nn.Module, folder: Path, context: ExportContext) -> Path:
        """Raises UserError if the file would not give back a network that computes the same."""
        from corenas_exporter_standalone.source import source

        try:
            content = source(network, context.example, context.title)
        except Exception as error:  # whatever Python says to a text that is none
            raise _refusal("python", error) from error
        return _written(folder / "network.py", content.encode())


@frozen
class Program:
    """A torch.export program, weights and graph, for inputs of any batch size: `network.pt2`."""

    def write(self, network: nn.Module, folder: Path, context: ExportContext) -> Path:
        """Raises UserError for a network that torch.export refuses, one for a single batch size for instance."""
        from io import BytesIO

        import torch
        from torch.utils._pytree import tree_map_only

        from corenas.mutable import as_arguments

        def two_of(tensor: Tensor) -> Tensor:  # torch.export takes a batch of 1 for a constant
            return torch.zeros((2, *tensor.shape[1:]), dtype=tensor.dtype)

        arguments, by_keyword = as_arguments(tree_map_only(torch.Tensor, two_of, context.example))
        batch = {0: torch.export.Dim("batch", min=1)}
        shapes = tree_map_only(torch.Tensor, lambda tensor: batch, by_keyword or arguments)
        file = BytesIO()
        try:
            program = torch.export.export(network, arguments, by_keyword, dynamic_shapes=shapes)
            for node in program.graph.nodes:  # addresses in memory, by which no two files would be the same
                node.meta.pop("from_node", None)
            torch.export.save(program, file)
        except Exception as error:  # whatever a tracer meets
            raise _refusal("pt2", error) from error
        return _written(folder / "network.pt2", file.getvalue())


def _refusal(name: str, error: Exception) -> UserError:
    reason = (str(error).strip() or type(error).__name__).split("\n")[0]
    return UserError(
        f"this network cannot be written as {name}: {reason}", hint=f'leave "{name}" out of export.formats'
    )


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@hookimpl
def corenas_exporters() -> dict[str, type]:
    """The formats "safetensors", "python" and "pt2"."""
    return {"safetensors": Safetensors, "python": Python, "pt2": Program}
