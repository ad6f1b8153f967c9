"""How weights move between a supernet and a published network that is one of its subnets."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, fx, nn

from corenas.errors import UserError
from corenas.export import flat_name
from corenas.mutable import Exportable, Gated, apply
from corenas.space import SearchSpace

Rename = Callable[[str], str]
"""From a name in an exported network's state dict ("stages_0_blocks_1_body_conv1_conv.weight") to the published one."""


@torch.no_grad()
def load(model: nn.Module, arch: Mapping[str, Any], state: Mapping[str, Tensor], rename: Rename = str) -> None:
    """Give the weights of a published network to the subnet of a supernet that is that network.

    model: a supernet; what of its weights the arch does not use stays as it is
    state: the published network's state dict; counts of batches, which old files lack, may be missing, and buffers that
        the supernet's own state dict leaves out, since they follow from its shape, are passed over
    Raises UserError for weights that are missing, have another shape (axes of length 1 apart) or are left over, and if
    the subnet has weights that are computed rather than a part of the supernet's; the model is then as it was.
    """
    derived = {rename(_flat(name)) for name in dict(model.named_buffers()).keys() - model.state_dict().keys()}
    left = {name: tensor for name, tensor in state.items() if name not in derived}
    wrong, writes = [], []
    with apply(model, arch):
        for name, whole, numbers in _tensors(model, arch):
            theirs = rename(name)
            given = left.pop(theirs, None)
            if given is None and theirs.endswith("num_batches_tracked"):
                continue
            indices = numbers.long()
            if not _are_indices(numbers, whole):
                wrong.append(f"{name} is computed from the supernet's weights")
            elif given is None or _shape(given) != _shape(indices):
                theirs_has = "nothing" if given is None else f"{[*given.shape]}"
                wrong.append(f"{theirs_has} under {theirs} for {name}, {[*indices.shape]}")
            else:
                writes.append((whole, indices, given))
    wrong += [f"no layer for {name}" for name in left]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UserError(f"these are not the weights of this subnet: {'; '.join(wrong[:5])}{more}")
    for whole, indices, given in writes:
        # Not through a view: a supernet may keep its weights channels-last.
        flat = whole.clone(memory_format=torch.contiguous_format).view(-1)
        flat[indices.reshape(-1)] = given.reshape(-1).to(flat)
        whole.copy_(flat.view(whole.shape))


def load_pretrained(
    model: nn.Module,
    space: SearchSpace,
    file: str,
    networks: Mapping[str, Mapping[str, Any]],
    renames: Callable[[nn.Module, Mapping[str, Any]], Iterable[Rename]],
    heads: Sequence[str],
) -> str:
    """Give the backbone of a supernet the weights in a file, of whichever network it is. Returns its name.

    file: safetensors, or a state dict that torch reads with weights alone
    networks: name -> choices of published networks; those that the space has not are passed over. In a space of one
        network that one is tried as well
    renames: give the ways in which weights may be named, for a backbone and an arch
    heads: how names of the classifier begin, which is the task's own
    Raises UserError, keys under "backbone", for a file that cannot be read or is of no such network; the model is
    then as it was.
    """
    state = {name: tensor for name, tensor in _state_in(file).items() if not name.startswith(tuple(heads))}
    backbone: nn.Module = getattr(model, "backbone", model)
    archs = {}
    for name, choices in networks.items():
        with suppress(UserError):
            archs[name] = space.arch(choices)
    if space.finite and space.size == 1:
        archs["the space's network"] = space.default()
    reasons = {}
    for name, arch in archs.items():
        for rename in renames(backbone, arch):
            try:
                load(backbone, arch, state, rename)
            except (UserError, KeyError) as error:
                reasons[name] = str(error).split("\n")[0]
            else:
                return name
    text = f"{file} has the weights of no network of this space that is known"
    known = ", ".join(networks)
    hint = next(iter(reasons.values()), f"of {known} the space has none") if len(reasons) < 2 else f"tried: {known}"
    raise UserError(text, key=("backbone", "weights"), hint=hint)


def _state_in(file: str) -> dict[str, Tensor]:
    """The state dict in a file. Raises UserError."""
    try:
        if file.endswith(".safetensors"):
            import safetensors.torch

            return safetensors.torch.load_file(file)
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of torch and safetensors, whatever the file is
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).split("\n")[0]
        raise UserError(f"cannot read {file}: {reason}", key=("backbone", "weights")) from error
    for key in ("state_dict", "model_ema", "model"):  # as training scripts keep it
        found = found[key] if isinstance(found, dict) and isinstance(found.get(key), dict) else found
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise UserError(f"{file} holds no state dict", key=("backbone", "weights"))
    return {name.removeprefix("module."): tensor for name, tensor in found.items()}


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
