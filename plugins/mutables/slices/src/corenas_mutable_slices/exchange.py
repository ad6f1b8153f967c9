"""How weights move between a supernet and a published network that is one of its subnets."""

from __future__ import annotations

import copy
import math
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn

from corenas.errors import UserError, regular, told
from corenas.export import flat_name
from corenas.mutable import Exportable, Gated, apply, elastic_of
from corenas.regularisation import DropPath
from corenas.space import Arch, SearchSpace
from corenas.value import Dimension, Value, grid
from corenas_mutable_slices.blocks import MixedOp
from corenas_mutable_slices.layers import InputResize

Rename = Callable[[str], str]
"""From a name in an exported network's state dict ("stages_0_blocks_1_body_conv1_conv.weight") to the published one."""


@torch.no_grad()
def load(model: nn.Module, arch: Mapping[str, Any], state: Mapping[str, Tensor], rename: Rename = str) -> None:
    """Give the weights of a published network to the subnet of a supernet that is that network.

    model: a supernet; what of its weights the arch does not use stays as it is; on the meta device nothing is written
    state: the published network's state dict; counts of batches, which old files lack, may be missing, and buffers that
        the supernet's own state dict leaves out, since they follow from its shape, are passed over
    Raises UserError for weights that are missing, have another shape (axes of length 1 apart) or are left over, and if
    the subnet has weights that are computed rather than a part of the supernet's; the model is then as it was.
    """
    writes, wrong = [], []
    for found in _matched(model, arch, state, rename):
        (wrong if isinstance(found, str) else writes).append(found)
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UserError(f"these are not the weights of this subnet: {'; '.join(wrong[:5])}{more}")
    for whole, indices, given in writes:
        if whole.is_meta:
            continue
        # Not through a view: a supernet may keep its weights channels-last.
        flat = whole.clone(memory_format=torch.contiguous_format).view(-1)
        flat[indices.reshape(-1)] = given.reshape(-1).to(flat)
        whole.copy_(flat.view(whole.shape))


def fits(network: nn.Module, state: Mapping[str, Tensor], rename: Rename = str) -> bool:
    """Return whether a state dict is of a network without a choice, which may be on the meta device."""
    return not any(isinstance(found, str) for found in _matched(network, {}, state, rename))


def _matched(
    model: nn.Module, arch: Mapping[str, Any], state: Mapping[str, Tensor], rename: Rename
) -> Iterator[tuple[Tensor, Tensor, Tensor] | str]:
    """Yield whole tensors of a model, with the indices of the chosen part and what is to stand there, or what is wrong.

    The arch is in force until the last one.
    """
    derived = {rename(_flat(name)) for name in dict(model.named_buffers()).keys() - model.state_dict().keys()}
    left = {name: tensor for name, tensor in state.items() if name not in derived}
    with apply(model, arch):
        for name, whole, numbers in _tensors(model, arch):
            theirs = rename(name)
            given = left.pop(theirs, None)
            if given is None and theirs.endswith("num_batches_tracked"):
                continue
            indices = numbers.long()
            if not _are_indices(numbers, whole):
                yield f"{name} is computed from the supernet's weights"
            elif given is None or _shape(given) != _shape(indices):
                theirs_has = "nothing" if given is None else f"{[*given.shape]}"
                yield f"{theirs_has} under {theirs} for {name}, {[*indices.shape]}"
            else:
                yield whole, indices, given
    yield from (f"no layer for {name}" for name in left)


class Published(NamedTuple):
    """A network whose weights are in a file.

    name: for messages
    network: the same, of the backbone's own layers, on the meta device; None for one that is not known
    rename: gives the names of its weights, for a backbone and the arch in which it is that network
    """

    name: str
    network: nn.Module | None
    rename: Callable[[nn.Module, Mapping[str, Any]], Rename]


class PublishedSupernet(NamedTuple):
    """A supernet whose weights are in a file.

    name: for messages
    rename: gives the names in the file of the tensors in a backbone's state dict, and may change the file's state dict
    """

    name: str
    rename: Callable[[nn.Module, dict[str, Tensor]], Rename]


def load_pretrained(
    model: nn.Module,
    space: SearchSpace,
    file: str,
    recognise: Callable[[dict[str, Tensor]], Published | PublishedSupernet],
    heads: Sequence[str],
) -> tuple[Arch, Sequence[str]]:
    """Give the backbone of a supernet the weights in a file.

    model: on the meta device names and shapes alone are read, to see whether they fit
    file: safetensors, or a state dict that torch reads with weights alone
    recognise: tells of which network or supernet a state dict is, and may change it; of one that is not known only a
        space of one network takes the weights
    heads: how names of the classifier begin; it is taken where the task's head has as many classes
    Returns the arch in which it is the network of the file, and what of the file is left out. Raises UserError, keys
    under "backbone", for a file that cannot be read, or of a network that the space has not; the model is then as it
    was.
    """
    backbone: nn.Module = getattr(model, "backbone", model)
    shapes = any(parameter.is_meta for parameter in backbone.parameters())
    found = _state_in(file, shapes)
    classifier = [tensor for name, tensor in found.items() if name.startswith(tuple(heads))]
    state = {name: tensor for name, tensor in found.items() if not name.startswith(tuple(heads))}
    name = "a network that is not known"
    try:
        origin = recognise(state)
        name = origin.name
        if isinstance(origin, PublishedSupernet):
            try:
                names = origin.rename(backbone, state)
            except (KeyError, RuntimeError) as error:  # of what is not there, or not of that shape
                raise UserError(f"it is not whole: {told(error)}") from error
            load_whole(backbone, state, names)
            return space.largest(), _load_classifier(model, classifier)
        _, network, rename = origin
        if network is not None:
            _same_channels(backbone, network)
            _cut_off(network, backbone)
            arch = arch_like(backbone, space, network)
        elif space.finite and space.size == 1:
            arch = space.default()
        else:
            raise UserError("a space of one network takes the weights of any")
        names = rename(backbone, arch)
        if getattr(backbone, "levels", ()):  # what comes after the last of them is nowhere
            with apply(backbone, arch):
                own = {names(name) for name, _, _ in _tensors(backbone, arch)}
            state = {name: tensor for name, tensor in state.items() if name in own}
        load(backbone, arch, state, names)
    except UserError as error:
        reason = str(error).split("\n")[0]
        text = f"{file} has the weights of {name}, which this space has not"
        raise UserError(text, key=("backbone", "weights"), hint=reason) from error
    return arch, _load_classifier(model, classifier)


@torch.no_grad()
def load_whole(model: nn.Module, state: Mapping[str, Tensor], rename: Rename) -> None:
    """Give a supernet the weights of one that is the same, or has more channels: of those the first.

    rename: from a name in the model's state dict to the one in `state`
    Raises UserError for weights that are missing, have another shape (axes of length 1 apart) or are left over; the
    model is then as it was.
    """
    left, writes, wrong = dict(state), [], []
    for name, whole in model.state_dict().items():
        given = left.pop(rename(name), None)
        if given is None:
            wrong += [] if name.endswith("num_batches_tracked") else [f"nothing under {rename(name)} for {name}"]
            continue
        if math.prod(given.shape[whole.dim() :]) == 1:  # a convolution of one pixel is a linear layer
            given = given.view(given.shape[: whole.dim()])
        channels = whole.shape[:2] if whole.dim() > 3 else whole.shape  # the other axes are those of a kernel
        part = given[tuple(slice(size) for size in channels[: given.dim()])]
        if part.shape != whole.shape:
            wrong.append(f"{[*given.shape]} under {rename(name)} for {name}, {[*whole.shape]}")
        writes.append((whole, part))
    wrong += [f"no layer for {name}" for name in left if not name.endswith("num_batches_tracked")]
    if wrong:
        raise UserError(wrong[0] + (f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""))
    for whole, part in writes:
        whole.copy_(part)


@torch.no_grad()
def _load_classifier(model: nn.Module, tensors: Sequence[Tensor]) -> list[str]:
    """Give a classifier's weight and bias to the one linear layer of a model's head, if it has as many classes.

    Returns what is left out, if anything is.
    """
    if not tensors or not hasattr(model, "head"):
        return []
    weights = [tensor for tensor in tensors if tensor.dim() > 1]
    layers = [layer for layer in model.head.modules() if isinstance(layer, nn.Linear)]
    if len(weights) != 1 or len(layers) != 1 or len(tensors) != 1 + (layers[0].bias is not None):
        return ["the classifier of the file is left out, the head is another one"]
    own, given = layers[0].weight, weights[0].flatten(1)
    if len(given) != len(own):
        return [f"the classifier of the file, for {len(given):,} classes, is left out: here are {len(own):,}"]
    features = min(given.shape[1], own.shape[1])
    own[:, :features] = given[:, :features]
    for bias in (tensor for tensor in tensors if tensor.dim() == 1):
        layers[0].bias.copy_(bias)
    return []


def once_for_all_name(name: str) -> str:
    """A tensor's name in Once-for-All's code and those after it (AttentiveNAS, AlphaNet), without what some repeat.

    "blocks.1.mobile_inverted_conv.inverted_bottleneck.conv.conv.weight" of a supernet, and the same without the last
    "conv." of one of its subnets, is "blocks.1.inverted_bottleneck.conv.weight".
    """
    name = re.sub(r"^((?:blocks|input_stem)\.\d+)\.(?:mobile_inverted_conv|conv)\.(?=\w+\.)", r"\1.", name)
    return re.sub(r"\b(conv|bn|linear)\.\1\.", r"\1.", name)


def once_for_all_blocks(state: dict[str, Tensor], norm: str, stages: Sequence[Any]) -> dict[tuple[int, int], int]:
    """The numbers of a supernet's blocks in Once-for-All's code, by stage and place.

    state: by names of `once_for_all_name`; the blocks for which the stages have no room go
    norm: the name in a block of the last batch norm; a stage begins where it has another width than before
    stages: a supernet's own, for the same network; in narrower spaces they have fewer blocks
    Raises UserError for another number of stages, and for stages of fewer blocks than the supernet's.
    """
    found: list[list[int]] = []
    width = 0
    for number in sorted({int(match[1]) for name in state if (match := re.match(r"blocks\.(\d+)\.", name))}):
        before, width = width, len(state[f"blocks.{number}.{norm}.weight"])
        if width != before:
            found.append([])
        found[-1].append(number)
    if len(found) != len(stages):
        raise UserError(f"it has {len(found)} stages, this one {len(stages)}")
    numbers = {}
    for i, (own, stage) in enumerate(zip(found, stages, strict=True)):
        room = len(stage.blocks)
        if len(own) < room:
            raise UserError(f"its stage {i} has {len(own)} blocks, this one up to {room}")
        numbers |= {(i, j): number for j, number in enumerate(own[:room])}
        drop(state, *(f"blocks.{number}." for number in own[room:]))
    return numbers


def drop(state: dict[str, Tensor], *paths: str) -> None:
    """Take out of a state dict what is under some paths, which end with a dot."""
    for name in [name for name in state if name.startswith(paths)]:
        del state[name]


def _cut_off(network: Any, model: Any) -> None:
    """Leave of a network what a supernet of the same kind has that ends at one of its levels."""
    if getattr(model, "levels", ()):
        del network.final
        network.stages = network.stages[: len(model.stages)]


def _same_channels(model: nn.Module, network: nn.Module) -> None:
    """Raise UserError for a network of images of another number of channels."""
    own, other = (next(m for m in net.modules() if isinstance(m, nn.Conv2d)).in_channels for net in (model, network))
    if own != other:
        raise UserError(
            f"it is for images of {other} channels, not {own}: `channels = {other}` in [task] makes them so"
        )


_AT_REST = (nn.Dropout, DropPath, InputResize)
"""Layers that a network may have or not: they do nothing in evaluation, or nothing to images of the right size."""


def arch_like(model: nn.Module, space: SearchSpace, network: nn.Module) -> Arch:
    """Return the arch under which a supernet computes what a network of the same backbone does.

    network: one without a choice; it may be on the meta device
    Raises UserError that names a layer that differs whatever the arch is, or what no arch has.
    """
    facts = [fact for fact in _facts(model, network, "", frozenset()) if fact[0].keys]
    chosen = _solved({}, facts)
    if chosen is None:
        raise UserError("no arch has all its layers' sizes at once")
    return space.arch(chosen)


def _facts(ours: nn.Module, theirs: nn.Module, path: str, idle: frozenset[nn.Module]) -> Iterator[tuple[Value, Any]]:
    """Yield which values of a supernet have to be which numbers. Raises UserError for what no arch can change.

    idle: what some arch leaves out
    """
    if isinstance(theirs, MixedOp):
        theirs = theirs.candidates[str(theirs.op({}))]
    if isinstance(ours, MixedOp):
        yield from _facts_of_one(ours, theirs, path, idle)
        return
    here = path or "the network"
    if type(ours) is not type(theirs):
        raise UserError(f"{here} is {type(ours).__name__}, in that network {type(theirs).__name__}")
    for name in ("eps", "stride", "dilation", "pool"):
        own, other = getattr(ours, name, None), getattr(theirs, name, None)
        if own != other and not isinstance(own, nn.Module):
            raise UserError(f"{here} has {name} = {own}, in that network {other}")
    own, other = elastic_of(ours), elastic_of(theirs)
    for name, value in (other.values if other else {}).items():
        if own is None or name not in own.values:
            raise UserError(f"{here} has no {name}, in that network {value({})}")
        pairs = zip(Dimension.of(own.values[name]).parts, Dimension.of(value).parts, strict=True)
        for part, number in ((part, like({})) for part, like in pairs):
            if number not in part.possible:
                raise UserError(f"{name} of {here} is never {number}, as in that network")
            yield part, number
    there = {name: child for name, child in theirs.named_children() if not isinstance(child, _AT_REST)}
    idle |= {child for child, _ in ours.gates()} if isinstance(ours, Gated) else set()
    for name, child in ours.named_children():
        if isinstance(child, _AT_REST):
            continue
        if name in there:
            yield from _facts(child, there.pop(name), f"{path}.{name}".removeprefix("."), idle)
        elif child not in idle:
            raise UserError(f"{here} has {name}, not in that network")
    if there:
        raise UserError(f"{here} has no {next(iter(there))}, as in that network")


def _facts_of_one(mixed: MixedOp, theirs: nn.Module, path: str, idle: frozenset[nn.Module]) -> list[tuple[Value, Any]]:
    """The facts of the first operation that can be a layer."""
    reasons = []
    for name in mixed.names:
        try:
            return [(mixed.op, name), *_facts(mixed.candidates[str(name)], theirs, path, idle)]
        except UserError as error:
            reasons.append(str(error))
    raise UserError(reasons[0])


def _solved(left: Mapping[str, Sequence[Any]], facts: Sequence[tuple[Value, Any]]) -> dict[str, Any] | None:
    """Return choices under which values are these numbers; None if there are none.

    left: of variables what they can still be
    """
    before: Mapping[str, Sequence[Any]] | None = None
    while left != before:
        before, left = left, dict(left)
        for value, number in facts:
            columns = grid({key: left.get(key, choices) for key, choices in value.domains.items()})
            hits = np.asarray(value(columns)) == number
            if not hits.any():
                return None
            for key, column in columns.items():
                kept = {*column[hits].tolist()}
                left[key] = [choice for choice in left.get(key, value.domains[key]) if choice in kept]
    open_key = next((key for key, choices in left.items() if len(choices) > 1), None)
    if open_key is None:
        return {key: choices[0] for key, choices in left.items()}
    tries = (_solved({**left, open_key: [choice]}, facts) for choice in left[open_key])
    return next((found for found in tries if found is not None), None)


def _state_in(file: str, shapes: bool) -> dict[str, Tensor]:
    """The state dict in a file; with `shapes` its tensors are on the meta device. Raises UserError."""
    try:
        if file.endswith(".safetensors"):
            import safetensors

            with safetensors.safe_open(regular(Path(file)), "pt", device="cpu") as whole:
                names = whole.keys()
                return {name: _shaped(whole.get_slice(name)) if shapes else whole.get_tensor(name) for name in names}
        # Weights that nobody looks at are not read.
        mapped = shapes and zipfile.is_zipfile(regular(Path(file)))
        found = torch.load(regular(Path(file)), map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        hint = f'if you trust it: torch.save(torch.load("{file}", weights_only=False)["state_dict"], NEW)'
        text = f"{file} holds more than tensors, or none: torch does not read it with weights_only=True"
        raise UserError(text, key=("backbone", "weights"), hint=hint) from error
    except Exception as error:  # of torch and safetensors, whatever the file is
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).split("\n")[0]
        hint = "a .safetensors file, or a state dict that torch.save has written"
        raise UserError(f"cannot read {file}: {reason}", key=("backbone", "weights"), hint=hint) from error
    for key in ("state_dict", "model_ema", "model"):  # as training scripts keep it
        found = found[key] if isinstance(found, dict) and isinstance(found.get(key), dict) else found
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise UserError(f"{file} holds no state dict", key=("backbone", "weights"))
    return {name.removeprefix("module."): t.to("meta") if shapes else t for name, t in found.items()}


def _shaped(part: Any) -> Tensor:
    """A tensor without numbers that has the shape and the type of one in a file of safetensors."""
    numbers = part[:0] if part.get_shape() else part[...]
    return torch.empty(part.get_shape(), dtype=numbers.dtype, device="meta")


def published(network: nn.Module, rename: Rename = str, like: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The state dict of an exported network under published names.

    like: a state dict whose shapes its tensors take, where a linear layer stands for a convolution of one pixel
    """
    state = {rename(name): tensor for name, tensor in network.state_dict().items()}
    if like is not None:
        state = {name: t.reshape(like[name].shape) if name in like else t for name, t in state.items()}
    return state


def _shape(tensor: Tensor) -> list[int]:
    return [n for n in tensor.shape if n > 1]


def _are_indices(numbers: Tensor, whole: Tensor) -> bool:
    """Return whether they are whole numbers, each once, of elements that there are."""
    if not ((numbers == numbers.floor()) & (numbers >= 0) & (numbers < whole.numel())).all():
        return False
    seen = torch.zeros(whole.numel(), dtype=torch.bool)
    seen[numbers.long().reshape(-1)] = True
    return int(seen.sum()) == numbers.numel()


def _tensors(
    module: nn.Module, arch: Mapping[str, Any], path: str = "", shut: frozenset[nn.Module] = frozenset()
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The tensors that an exported network has: name there, the whole tensor, the indices of the chosen part in it.

    arch: in force; shut: what does not run under it
    """
    own, prefix = module.state_dict(), f"{_flat(path)}."
    if isinstance(module, Exportable):
        exported = _numbered(module).export()
        if isinstance(exported, nn.Parameter):
            yield _flat(path), *own.values(), exported.data
        else:
            yield from ((prefix + name, own[name], numbers) for name, numbers in exported.state_dict().items())
    elif _is_leaf(module):
        yield from ((prefix + name, tensor, _numbers(tensor)) for name, tensor in own.items())
    else:
        bare = [name for name in own if "." not in name]
        yield from ((_flat(f"{path}.{name}"), own[name], _numbers(own[name])) for name in bare)
        if isinstance(module, Gated):
            shut |= {child for child, gate in module.gates() if not gate(arch)}
        for name, child in module.named_children():
            if child not in shut:
                yield from _tensors(child, arch, f"{path}.{name}", shut)


def _flat(path: str) -> str:
    return flat_name(path.removeprefix("."))


def _is_leaf(module: nn.Module) -> bool:
    """Whether export takes it as one layer: it is torch's own, and no mere list of others."""
    return fx.Tracer().is_leaf_module(module, "") and not isinstance(module, nn.ModuleList | nn.ModuleDict)


def _numbers(tensor: Tensor) -> Tensor:
    return torch.arange(tensor.numel(), dtype=torch.float64).view(tensor.shape)


def _numbered(module: nn.Module) -> Any:
    """A layer whose weights are their own indices: what it exports are the indices of the chosen part."""
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): _numbers(tensor) for tensor in tensors})
