"""A converted model as a backbone: with its own head, its own costs and its own way to become a smaller network."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from attrs import evolve
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from corenas.errors import UserError
from corenas.mutable import LayerCost, apply
from corenas.space import SearchSpace
from corenas.value import Dimension
from corenas.variables import OVERRIDE
from corenas_backbone_converted import ConvertedModel
from corenas_mutable_conversion.conversion import Converted, convert, is_on_meta, without_weights
from corenas_mutable_conversion.elastic import plain_copy
from corenas_mutable_conversion.models import build_model, load_weights, weights_file
from corenas_mutable_conversion.rules import Rules
from corenas_mutable_conversion.sorting import sort_channels


class Outputs(nn.Module):
    """The head of a model that has its own: what the model gives.

    forward: [outputs, …] -> outputs, a tuple of them where there are several
    """

    def forward(self, features: list[Any]) -> Any:
        """Return the outputs."""
        return features[0] if len(features) == 1 else tuple(features)


class Featured(nn.Module):
    """A model whose outputs are the features of a backbone.

    feat_dims: their last axes
    forward: the features
    """

    def __init__(self, model: nn.Module, feat_dims: list[Dimension]) -> None:
        super().__init__()
        self.model = model
        self.feat_dims = feat_dims
        self.own_head = Outputs()

    def forward(self, x: Tensor) -> list[Any]:
        """Return the features."""
        return self.features(x)

    def features(self, x: Tensor) -> list[Any]:
        """Return the model's outputs."""
        outputs = self.model(x)
        return [*outputs] if isinstance(outputs, tuple | list) else [outputs]


class ConvertedNetwork(Featured):
    """A supernet that a model became.

    shape: of the input that its costs are those of
    """

    def __init__(self, made: Converted, feat_dims: list[Dimension], shape: tuple[int, ...]) -> None:
        super().__init__(made.supernet, feat_dims)
        self.costs, self.shape = made.costs, shape

    def whole_cost(self, example: Any) -> Iterable[LayerCost]:
        """Return what its cost is the sum of. Raises UserError for an input of another size."""
        found = tuple(tree_leaves(example)[0].shape[1:])
        if found != self.shape:
            given, own = ("x".join(map(str, shape)) for shape in (found, self.shape))
            text = f"the model was converted for inputs of {own}, the task gives {given}"
            raise UserError(text, key=("backbone", "image"), hint=f"image = [{', '.join(map(str, found))}]")
        return self.costs

    def reduced(self) -> nn.Module:
        """Return the subnet in force, of the model's own classes."""
        return Featured(plain_copy(self.model), self.feat_dims)


def space_of(options: ConvertedModel) -> SearchSpace:
    """Return all that a model can be."""
    model = without_weights(_built(options))
    return _converted(model, options).space


def build(options: ConvertedModel, space: SearchSpace) -> nn.Module:
    """Return the model as a supernet of a space, or as the one network that the space has."""
    own = SearchSpace([v for v in space.variables if not v.key.startswith(OVERRIDE)])
    model = _built(options)
    on_meta = torch.get_default_device().type == "meta"
    if options.weights is not None:
        try:
            file = weights_file(Path(options.weights))
            if not file.is_file():
                raise UserError(f"no such file of weights: {file}", hint="a file, or a run directory")
            load_weights(model, Path(options.weights))
        except UserError as error:
            raise UserError(faults=[evolve(f, key=("backbone", "weights")) for f in error.faults]) from None
    if on_meta:
        model = without_weights(model)
    try:
        made = _converted(model, options, own)
    except UserError as error:  # keys of the space are relative to it
        raise UserError(faults=[evolve(f, key=f.key[f.key[:1] == ("space",) :]) for f in error.faults]) from None
    if options.sort and not is_on_meta(made.supernet):
        sort_channels(made, options.sort)
    dims = [Dimension.of(out.shape[-1]) for out in _outputs(made.supernet, options.image)]
    if all(len(variable.choices) == 1 for variable in own.variables):  # one network alone
        network = made.plain(own.default())
        made = _converted(without_weights(network), evolve(options, rules=Rules()), SearchSpace([]))
        made.supernet = network
    apply(made.supernet, own.largest())
    return ConvertedNetwork(made, dims, options.image)


def _built(options: ConvertedModel) -> nn.Module:
    """Return the model with fresh weights, on the device that is the default."""
    device = torch.get_default_device()
    with torch.device("cpu" if device.type == "meta" else device):  # many models ask for numbers as they are made
        try:
            return build_model(options.model, options.options)
        except UserError as error:
            raise error.under("backbone", "model") from None


def _example(shape: tuple[int, ...]) -> Tensor:
    return torch.randn((1, *shape), generator=torch.Generator("cpu").manual_seed(0), device="cpu")


def _converted(model: nn.Module, options: ConvertedModel, space: SearchSpace | None = None) -> Converted:
    try:
        return convert(model, _example(options.image), options.rules, space=space)
    except UserError as error:
        faults = [f if f.key[:1] == ("space",) else f.under("backbone", "rules") if f.key else f for f in error.faults]
        raise UserError(faults=[f if f.key else evolve(f, key=("backbone", "model")) for f in faults]) from None


@torch.no_grad()
def _outputs(model: nn.Module, shape: tuple[int, ...]) -> list[Tensor]:
    twin = without_weights(model).eval()
    outputs = twin(torch.empty((1, *shape), device="meta"))
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
