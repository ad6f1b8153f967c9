"""A network as an ONNX graph, checked by running it, and such a graph as a module that onnxruntime computes."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_leaves, tree_map_only, tree_structure, tree_unflatten

from corenas.errors import UserError
from corenas.export import difference
from corenas.mutable import as_arguments, call_model

TOLERANCE = 1e-4
"""Largest difference to the network that is put down to rounding, relative to the largest output."""


class OnnxModule(nn.Module):
    """An ONNX graph that onnxruntime computes, on the CPU, with as many threads as torch has.

    forward: the network's inputs -> its outputs, in the tree of the network's where that is given
    """

    def __init__(self, graph: bytes, outputs: TreeSpec | None = None) -> None:
        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self.outputs = outputs

    def forward(self, *arguments: Any, **by_keyword: Any) -> Any:
        """Compute the graph."""
        device = next(leaf.device for leaf in tree_leaves((arguments, by_keyword)) if isinstance(leaf, Tensor))
        arrays: Any = self.session.run(None, self.feed(arguments, by_keyword))
        found = [torch.from_numpy(array).to(device) for array in arrays]
        if self.outputs is not None:
            return tree_unflatten(found, self.outputs)
        return found[0] if len(found) == 1 else tuple(found)

    def feed(self, arguments: Any, by_keyword: Any) -> dict[str, Any]:
        """Return the inputs as the graph names them."""
        tensors = [leaf for leaf in tree_leaves((arguments, by_keyword)) if isinstance(leaf, Tensor)]
        names = [given.name for given in self.session.get_inputs()]
        return {name: x.detach().cpu().contiguous().numpy() for name, x in zip(names, tensors, strict=True)}


def checked_graph(network: nn.Module, example: Any, opset: int, title: str = "") -> bytes:
    """Return a network, on the CPU and in evaluation mode, as an ONNX graph whose first axis is free.

    Raises UserError if it cannot be written so, or onnxruntime computes something else from it.
    """
    try:
        graph = _graph(network, example, opset, title)
        error = difference(network, OnnxModule(graph), example)
    except UserError:
        raise
    except Exception as error:  # whatever a tracer, an optimiser or a runtime meets
        raise _refusal((str(error).strip() or type(error).__name__).split("\n")[0]) from error
    if not error <= TOLERANCE:
        raise _refusal(f"onnxruntime's outputs differ by {error:.1e} of the largest")
    return graph


def output_structure(network: nn.Module, example: Any) -> TreeSpec:
    """Return the tree that a network's outputs are."""
    with torch.no_grad():
        return tree_structure(call_model(network, example))


def _graph(network: nn.Module, example: Any, opset: int, title: str) -> bytes:
    def three_of(tensor: Tensor) -> Tensor:  # torch takes a batch of 1 for a constant; the check is made with 2
        return torch.zeros((3, *tensor.shape[1:]), dtype=tensor.dtype)

    arguments, by_keyword = as_arguments(tree_map_only(Tensor, three_of, example))
    batch = {0: torch.export.Dim("batch", min=1)}
    shapes = tree_map_only(Tensor, lambda tensor: batch, by_keyword or arguments)
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            network,
            arguments,
            kwargs=by_keyword,
            dynamo=True,
            dynamic_shapes=shapes,
            opset_version=opset,
            external_data=False,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    model.doc_string = title
    return model.SerializeToString()


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out what torch, onnxscript and onnxruntime advise those who write graphs by hand."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _refusal(reason: str) -> UserError:
    return UserError(f"this network cannot be written as onnx: {reason}", hint="leave it out of export.formats")
