"""A run of a model without data that follows the axes of all tensors from layer to layer.

The model runs on the meta device. Below Python every operation of ATen says what its outputs' axes are (`operations`);
in Python the whole numbers that come from shapes and from modules' attributes remember it (`numbers`, `sayings`), so
that `x.reshape(b, n, 3, self.num_heads, c // self.num_heads)` tells which of its numbers change with what.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from attrs import define
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from corenas.mutable import call_model
from corenas_mutable_conversion.axes import Axes, Axis, Fixed, Size, count, resolved
from corenas_mutable_conversion.numbers import Number
from corenas_mutable_conversion.operations import RESIDUAL, VIEWS, Op, Ran, outputs_of, shaped
from corenas_mutable_conversion.sayings import SAYINGS, Said


class UnfollowableError(Exception):
    """A model that cannot be run without data, with the reason and the place in its code."""


@define
class Call:
    """One call of a module.

    inputs, outputs: the axes of the tensors that went in and came out
    gives: where what came out is what went in with more added to it, 0 for that alone, n for a tuple of that and the
        next n - 1 arguments as they were; None for anything else
    """

    inputs: list[tuple[Axis, ...]]
    outputs: list[tuple[Axis, ...]]
    gives: int | None


class Followed:
    """All that is known of a model after its run.

    tensors: the axes of each parameter and buffer, by its name
    attributes: the size of each whole number that a module has: (module, attribute, place in a tuple or None)
    caches: dictionaries and lists that a run adds to: (module, attribute)
    ops, calls: of the latest run the operations in order, and by module its calls
    """

    def __init__(self, model: nn.Module) -> None:
        self.axes = Axes()
        self.ops: list[Op] = []
        self.calls: dict[str, list[Call]] = {}
        self.tensors: dict[str, tuple[Axis, ...]] = {}
        self.of_ids: dict[int, tuple[Axis, ...]] = {}
        self.caches: set[tuple[str, str]] = set()
        self.attributes: dict[tuple[str, str, int | None], Size] = {}
        kinds = model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
        for name, tensor in itertools.chain(*kinds):
            if id(tensor) not in self.of_ids:
                searchable = tensor.is_floating_point()  # indices and masks are not
                self.of_ids[id(tensor)] = tuple(Size(n) if n > 1 and searchable else n for n in tensor.shape)
            self.tensors[name] = self.of_ids[id(tensor)]
        for name, module in model.named_modules():
            for key, item in module.__dict__.items():
                if not key.startswith("_") and key != "training":
                    self._add_attribute(name, key, item)

    def _add_attribute(self, module: str, key: str, item: Any) -> None:
        several = isinstance(item, tuple | list)
        numbers = {(module, key, i): n for i, n in enumerate(item)} if several else {(module, key, None): item}
        if all(isinstance(n, int) and not isinstance(n, bool) for n in numbers.values()):
            self.attributes.update({place: Size(int(n)) for place, n in numbers.items() if n > 1})


def follow(model: nn.Module, example: Any, known: Followed | None = None, training: bool = False) -> Followed:
    """Run a model that is on the meta device and return what is found.

    example: an input, as `call_model` takes it
    known: what an earlier run found, to go on from
    Raises UnfollowableError where what is computed depends on the values of tensors.
    """
    found = known or Followed(model)
    below = _Below(found)
    inputs = tree_map(below.enter, example)
    model.train(training)
    found.ops, found.calls = [], {}
    before = {place: len(container) for place, container in _containers(model)}
    with _remembering(model, found), _without_overrides(), ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for hook in below.hooks(model):
            stack.callback(hook.remove)
        stack.enter_context(below)
        stack.enter_context(_Above(below))
        try:
            outputs = call_model(model, inputs)
        except Exception as error:  # whatever a forward may do with a tensor that has no values
            raise UnfollowableError(_reason(error)) from error
    for place, container in _containers(model):
        if len(container) > before.get(place, 0):  # what is kept from call to call is another under another arch
            found.caches.add(place)
            container.clear()
    found.axes.where = ""
    for tensor in tree_leaves(outputs):
        if isinstance(tensor, Tensor):
            for axis in below.of(tensor):
                found.axes.fix(axis, "the network's output")
    return found


def _containers(model: nn.Module) -> Iterator[tuple[tuple[str, str], Any]]:
    for name, module in model.named_modules():
        for key, item in module.__dict__.items():
            if isinstance(item, dict | list) and not key.startswith("_"):
                yield (name, key), item


# -- places in code ---------------------------------------------------------------------------------------------------

_INTERNAL = (f"{Path(torch.__file__).parent}/", f"{Path(__file__).parent}/", "<")
"""What the files of code begin with that is no model's: torch's and this package's."""


def place() -> str:
    """Return the innermost line of code that is neither torch's nor ours: file:line."""
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_INTERNAL):
        frame = frame.f_back
    return f"{short_path(frame.f_code.co_filename)}:{frame.f_lineno}" if frame else "?"


def short_path(file: str) -> str:
    """Return the path of a file within the environment, else its name."""
    return file.partition("site-packages/")[2] or file.rpartition("/")[2]


def _reason(error: Exception) -> str:
    frames = [*_frames(error.__traceback__)]
    own = [frame for frame in frames if not frame[0].startswith(_INTERNAL)] or frames
    where, text = f"{short_path(own[-1][0])}:{own[-1][1]}", str(error).strip().split("\n")[0]
    if any(word in text for word in ("item()", "_local_scalar_dense", "data-dependent", "nonzero", "meta tensor")):
        return f"{where}: what is computed depends on the values of tensors, not on their shapes alone"
    return f"{where}: {type(error).__name__}: {text}"


def _frames(traceback: TracebackType | None) -> Iterator[tuple[str, int]]:
    while traceback is not None:
        yield traceback.tb_frame.f_code.co_filename, traceback.tb_lineno
        traceback = traceback.tb_next


# -- modes ------------------------------------------------------------------------------------------------------------


@contextmanager
def _remembering(model: nn.Module, found: Followed) -> Iterator[None]:
    """Let the whole numbers that modules have remember what they count, for a while."""
    modules, before = dict(model.named_modules()), {}
    for (name, key, i), size in found.attributes.items():
        own = modules[name].__dict__
        before.setdefault((name, key), own[key])
        number = Number(size.n, (size,))
        if i is None:
            own[key] = number
        elif type(own[key]) in (tuple, list):
            own[key] = type(own[key])(number if at == i else x for at, x in enumerate(own[key]))
    try:
        yield
    finally:
        for (name, key), item in before.items():
            modules[name].__dict__[key] = item


@contextmanager
def _without_overrides() -> Iterator[None]:
    """Let functions of torch.nn.functional go through to the operations that they call, for a while."""
    before = {name: getattr(F, name) for name in vars(F) if name.startswith("has_torch_function")}
    try:
        for name in before:
            setattr(F, name, lambda *_: False)
        yield
    finally:
        for name, function in before.items():
            setattr(F, name, function)


class _Below(TorchDispatchMode):
    """What ATen sees: every operation, with its tensors."""

    def __init__(self, found: Followed) -> None:
        super().__init__()
        self.found = found
        self.known: dict[int, tuple[Axis, ...]] = dict(found.of_ids)
        self.kin: dict[int, frozenset[int]] = {}  # of which tensors another is the sum
        self.weights = {*found.of_ids}
        self.kept: list[Any] = []  # ids stay unique while their objects live
        self.stack: list[str] = []

    def of(self, tensor: Tensor) -> tuple[Axis, ...]:
        """Return the axes of a tensor; those of one that comes from nowhere are numbers."""
        found = self.known.get(id(tensor))
        return tuple(tensor.shape) if found is None else tuple(map(resolved, found))

    def put(self, tensor: Tensor, axes: tuple[Axis, ...]) -> None:
        """Note the axes of a tensor."""
        axes = tuple(map(resolved, axes))
        if [*map(count, axes)] != [*tensor.shape]:
            raise AssertionError(f"{axes} for {[*tensor.shape]}")
        self.known[id(tensor)] = axes
        self.kept.append(tensor)

    def enter(self, leaf: Any) -> Any:
        """Return an input of the network on the meta device, its axes fixed."""
        if not isinstance(leaf, Tensor):
            return leaf
        leaf = torch.empty_like(leaf, device="meta")
        self.put(leaf, tuple(Fixed(n, "the network's input") if n > 1 else n for n in leaf.shape))
        return leaf

    def hooks(self, model: nn.Module) -> Iterator[Any]:
        """Hang hooks on all modules that note their calls; yield their handles."""
        names = {module: name for name, module in model.named_modules()}
        starts: dict[str, list[Any]] = {}

        def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.stack.append(names[module])
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self.kept.extend(tensors)
            # The axes as they are now: an operation in place may change them.
            starts.setdefault(names[module], []).append(([*map(self.of, tensors)], {id(t) for t in tensors[:1]}))

        def end(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            name = self.stack.pop()
            inputs, ids = starts[name].pop()
            outs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
            kin = self.kin.get(id(outs[0]), frozenset()) - {id(outs[0])} if outs else frozenset()
            gives = _gives([*args, *kwargs.values()], output) if kin & ids and len(outs) == 1 else None
            self.found.calls.setdefault(name, []).append(Call(inputs, [*map(self.of, outs)], gives))

        for module in model.modules():
            yield module.register_forward_pre_hook(begin, with_kwargs=True)
            yield module.register_forward_hook(end, with_kwargs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = shaped(func, args, kwargs)
        name, axes = func.overloadpacket.__name__, self.found.axes
        axes.where = place()
        outs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        op = Op(name, axes.where, (*self.stack,))
        ran = Ran(op, args, kwargs, outs, axes, self.of, self.weights)
        found = outputs_of(ran, torch.Tag.pointwise in func.tags)
        for out, own in zip(outs, found, strict=True):
            self._note(ran, out, tuple(own))
        self.found.ops.append(op)
        return result

    def _note(self, ran: Ran, out: Tensor, axes: tuple[Axis, ...]) -> None:
        """Note what an output is."""
        plain = ran.op.name.rstrip("_")
        self.put(out, axes)
        ran.op.outputs.append(axes)
        if plain in RESIDUAL:
            terms = [id(tensor) for tensor in ran.tensors if id(tensor) not in self.weights]
            self.kin[id(out)] = frozenset(terms).union(*(self.kin.get(term, ()) for term in terms))
        elif any(tensor is out for tensor in ran.tensors):  # in place: what it was is gone
            self.kin.pop(id(out), None)
        if ran.op.name in VIEWS and id(ran.tensors[0]) in self.weights:
            self.weights.add(id(out))


def _gives(arguments: Sequence[Any], output: Any) -> int | None:
    """Return how many arguments an output, in which one is a tensor, stands for (`Call.gives`)."""
    if isinstance(output, Tensor):
        return 0
    if type(output) is not tuple or not isinstance(output[0], Tensor) or len(output) > len(arguments):
        return None
    return len(output) if [*output[1:]] == [*arguments[1 : len(output)]] else None


class _Above(TorchFunctionMode):
    """What Python sees: shapes whose numbers remember, and what the numbers in calls say of axes."""

    def __init__(self, below: _Below) -> None:
        super().__init__()
        self.below = below
        self.attributes = {*below.found.attributes.values()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, below = kwargs or {}, self.below
        name = getattr(func, "__name__", "")
        if func == torch.Tensor.shape.__get__ or (name == "size" and isinstance(args[0], Tensor)):
            return self._shape(args, kwargs)
        before = len(below.found.ops)
        result = func(*args, **kwargs)
        if name in SAYINGS:
            axes = below.found.axes
            axes.where = place()
            SAYINGS[name](Said(below.found.ops[before:], result, args, kwargs, axes, below.of, self.attributes))
        return result

    def _shape(self, args: Any, kwargs: Mapping[str, Any]) -> Any:
        axes = self.below.of(args[0])
        numbers = [Number(n, (axis,)) if n > 1 else n for n, axis in zip(args[0].shape, axes, strict=True)]
        shape = torch.Size(numbers)
        rest = [*args[1:], *kwargs.values()]
        return shape[rest[0]] if rest and rest[0] is not None else shape
