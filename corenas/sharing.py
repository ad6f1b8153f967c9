"""What the leading segments of a network gave, for the archs that begin in the same way."""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from attrs import define, field
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from corenas.contracts import Segmented
from corenas.mutable import Gated, elastic_of, keys_used
from corenas.value import Value

_BESIDE = 4096
"""About how many bytes what is kept takes beside the outputs: objects, keys, statistics."""
Key: TypeAlias = Hashable
"""What is run, and the leading segments with the choices that their outputs hang on."""


@define(eq=False)
class _Kept:
    """What the last of some leading segments gave for each batch of a pass.

    size: bytes, of all batches
    versions: of the tensors when they were kept: who changes one in place makes it useless
    aside: what else belongs to these segments and this pass
    """

    size: int
    outputs: list[Any] = field(factory=list)
    versions: list[list[int]] = field(factory=list)
    aside: Any = None

    def keep(self, output: Any) -> None:
        """Take in what one more batch gave."""
        self.outputs.append(output)
        self.versions.append(_versions(output))

    @property
    def is_intact(self) -> bool:
        """Whether the outputs are what they were."""
        return [*map(_versions, self.outputs)] == self.versions


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _versions(output: Any) -> list[int]:
    return [tensor._version for tensor in _tensors(output)]


def digest(modules: Iterable[nn.Module]) -> int:
    """Return a number that is another one where a weight or a statistic of modules is another one, all but surely."""
    number = 0
    for tensor in (t for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None):
        storage = tensor.detach().untyped_storage()
        data = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)  # type: ignore[call-overload]
        number = zlib.crc32(data.cpu().numpy().data, number)
    return number


class LeadingSegments:
    """Keeps the outputs of a network's leading segments, so that archs that agree on them run the others alone.

    An arch gets, to the last bit, what it would get by itself: what is kept was computed by the same operations on the
    same batches. The latest ones are kept.

    possible: whether the network names segments of which no two have a module in common
    budget: bytes that outputs may take; a quarter of them those of one segment
    """

    def __init__(self, model: nn.Module, budget: int) -> None:
        self._budget, self._size = budget, 0
        self._kept: OrderedDict[Key, _Kept] = OrderedDict()
        backbone: nn.Module = getattr(model, "backbone", model)
        head: nn.Module | None = getattr(model, "head", None)
        self._segments: Sequence[nn.Module] = backbone.segments if isinstance(backbone, Segmented) else ()
        self._gates: dict[nn.Module, list[tuple[nn.Module, Value]]] = {}
        leaves = [*self._leaves(self._segments)]
        modules = [module for leaf in leaves for module in leaf.modules()]
        self.possible = len(leaves) > 1 and len(modules) == len({*modules})
        # Whatever stands outside the segments may come before them; the head comes last.
        last = set() if head is None else {*head.modules()}
        rest = [module for module in backbone.modules() if module not in {*modules, *last, *self._gates}]
        self._before = sorted({key for module in rest for key in _own_keys(module)})
        self._keys = {leaf: sorted(keys_used(leaf)) for leaf in leaves}

    def _leaves(self, segments: Iterable[nn.Module]) -> Iterator[nn.Module]:
        for segment in segments:
            if isinstance(segment, Segmented) and isinstance(segment, Gated):
                self._gates[segment] = [*segment.gates()]
                yield from self._leaves(segment.segments)
            else:
                yield segment

    def running(self, arch: Mapping[str, Any], segments: Iterable[nn.Module] | None = None) -> list[nn.Module]:
        """Return the segments that run under an arch, in order, with those that run in a gated one in its place."""
        found = []
        for segment in self._segments if segments is None else segments:
            if segment in self._gates:
                found += self.running(arch, [child for child, gate in self._gates[segment] if gate(arch)])
            else:
                found.append(segment)
        return found

    def known(self, arch: Mapping[str, Any], what: Hashable) -> Any:
        """Return what was kept beside the outputs of the most leading segments that are known; None if none are."""
        number, keys = self._known(arch, what)
        return self._kept[keys[number - 1]].aside if number else None

    def _known(self, arch: Mapping[str, Any], what: Hashable) -> tuple[int, list[Key]]:
        """Return of how many leading segments the outputs are known, and the keys of all but the last."""
        keys: list[Key] = []
        key: Any = (what, *(arch[name] for name in self._before))
        for segment in self.running(arch)[:-1]:  # archs differ in something
            key = key, id(segment), *(arch[name] for name in self._keys[segment])
            keys.append(key)
        number = 0
        while number < len(keys) and keys[number] in self._kept and self._kept[keys[number]].is_intact:
            number += 1
        for key in reversed(keys[:number]):
            self._kept.move_to_end(key)  # fewer segments serve more archs
        return number, keys

    @contextmanager
    def reused(
        self, arch: Mapping[str, Any], what: Hashable, batches: int, aside: Callable[[Sequence[nn.Module]], Any]
    ) -> Iterator[None]:
        """Let the model under an arch, called for each of some batches in order, run only what is not known.

        aside: gives, at the end, what is kept beside the outputs of the first segments
        """
        first, keys = self._known(arch, what)
        running = self.running(arch)
        new: dict[int, _Kept] = {}
        with ExitStack() as after:
            for segment, key in zip(running, keys[:first], strict=False):  # who knows what looks at their outputs
                after.enter_context(_replaced_by(segment, _given(iter(self._kept[key].outputs))))
            for n, segment in enumerate(running[first:-1], first + 1):
                after.callback(segment.register_forward_hook(self._recorder(new, n, batches)).remove)
            yield
        for n, kept in new.items():
            if len(kept.outputs) == batches and kept.is_intact:
                kept.aside = aside(running[:n])
                self._add(keys[n - 1], kept)

    def _recorder(self, new: dict[int, _Kept], n: int, batches: int) -> Callable[..., None]:
        def record(segment: nn.Module, args: Any, output: Any) -> None:
            if n not in new:
                outputs = batches * sum(tensor.untyped_storage().nbytes() for tensor in _tensors(output))
                new[n] = _Kept(outputs + _BESIDE)
                self._make_room(sum(kept.size for kept in new.values() if kept.size <= self._budget // 4))
            if new[n].size <= self._budget // 4:
                new[n].keep(output)

        return record

    def _make_room(self, size: int) -> None:
        while self._kept and self._size + size > self._budget:
            self._size -= self._kept.popitem(last=False)[1].size

    def _add(self, key: Key, kept: _Kept) -> None:
        if key in self._kept:  # it was changed in place since
            self._size -= self._kept.pop(key).size
        self._make_room(kept.size)
        self._kept[key] = kept
        self._size += kept.size


@contextmanager
def _replaced_by(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _given(outputs: Iterator[Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: next(outputs)


def _own_keys(module: nn.Module) -> set[str]:
    elastic = elastic_of(module)
    return {key for value in elastic.values.values() for key in value.keys} if elastic is not None else set()
