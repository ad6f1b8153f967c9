"""How weights move between a supernet and a published network that is one of its subnets."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from corenas.errors import UserError
from corenas.mutable import Exportable, Gated, apply

Rename = Callable[[str], str]
"""From a name in an exported network's state dict ("stages_0_blocks_1_body_conv1_conv.weight") to the published one."""


@torch.no_grad()
def load(model: nn.Module, arch: Mapping[str, Any], state: Mapping[str, Tensor], rename: Rename = str) -> None:
    """Give the weights of a published network to the subnet of a supernet that is that network.

    model: a supernet; what of its weights the arch does not use stays as it is
    state: the published network's state dict
    Raises UserError for weights that are missing, have another number of elements, or are left over.
    """
    left, missing, writes = dict(state), [], []
    with apply(model, arch):
        for name, whole, places in _tensors(model, arch):
            given = left.pop(rename(name), None)
            if given is None or given.numel() != places.numel():
                shape = "no" if given is None else f"{[*given.shape]} as"
                missing.append(f"{shape} {rename(name)} for {name}, {[*places.shape]}")
            else:
                writes.append((whole, places, given))
    if wrong := [*missing, *(f"no layer for {name}" for name in left)]:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UserError(f"these are not the weights of this subnet: {'; '.join(wrong[:5])}{more}")
    for whole, places, given in writes:
        # Not through a view: a supernet may keep its weights channels-last.
        flat = whole.detach().clone(memory_format=torch.contiguous_format).view(-1)
        flat[places.reshape(-1)] = given.reshape(-1).to(flat)
        whole.copy_(flat.view(whole.shape))


def published(network: nn.Module, rename: Rename, like: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The state dict of an exported network under published names.

    like: a state dict whose shapes its tensors take, where a linear layer stands for a convolution of one pixel
    """
    state = {rename(name): tensor for name, tensor in network.state_dict().items()}
    if like is not None:
        state = {name: t.reshape(like[name].shape) if name in like else t for name, t in state.items()}
    return state


def _tensors(
    module: nn.Module, arch: Mapping[str, Any], path: str = "", shut: frozenset[nn.Module] = frozenset()
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The tensors that an exported network has: name there, the whole tensor, the places of the chosen part in it."""
    flat = path.removeprefix("backbone.").replace(".", "_")
    own = _own(module)
    if isinstance(module, Exportable):
        exported = _numbered(module).export()
        if isinstance(exported, nn.Parameter):
            yield flat, *own.values(), exported.data.long()
        else:
            for name, numbers in exported.state_dict().items():
                yield f"{flat}.{name}", own[name], numbers.long()
        return
    for name, tensor in own.items():
        yield f"{flat}.{name}", tensor, _numbers(tensor).long()
    if isinstance(module, Gated):
        shut |= {child for child, gate in module.gates() if not gate(arch)}
    for name, child in module.named_children():
        if child not in shut:
            yield from _tensors(child, arch, f"{path}.{name}" if path else name, shut)


def _own(module: nn.Module) -> dict[str, Tensor]:
    persistent = module.state_dict().keys()
    own = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
    return {name: tensor for name, tensor in own.items() if name in persistent}


def _numbers(tensor: Tensor) -> Tensor:
    return torch.arange(tensor.numel(), dtype=torch.float64).view(tensor.shape)


def _numbered(module: nn.Module) -> Any:
    """A layer whose weights are the numbers of their places: what it exports are the places of the chosen part."""
    twin = copy.copy(module)
    twin._parameters = {name: None if p is None else nn.Parameter(_numbers(p), requires_grad=False)
                        for name, p in module._parameters.items()}  # fmt: skip
    twin._buffers = {name: None if b is None else _numbers(b) for name, b in module._buffers.items()}
    return twin
