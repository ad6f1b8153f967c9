"""Which sizes of a followed model are variables (widths, kernels, heads, groups), and which blocks have a depth."""

from __future__ import annotations

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from attrs import define, field, frozen
from torch import nn

from corenas.errors import Fault, UserError, did_you_mean, raise_if_any
from corenas.space import SearchSpace
from corenas.value import Constant, Value, at_least
from corenas.variables import Categorical, Condition, Int, Variable
from corenas_mutable_conversion.axes import Axis, Join, Product, Size, count, free_sizes, reason, resolved
from corenas_mutable_conversion.elastic import CONV
from corenas_mutable_conversion.follow import Followed
from corenas_mutable_conversion.rules import Rules
from corenas_mutable_conversion.values import form_of

Element = tuple[str, int]
"""An axis of a tensor: its name, and which of its axes."""


@frozen
class Run:
    """Residual blocks beside each other, each of which can be passed by.

    paths: their names, in order; depth: how many of them run, the first ones
    """

    paths: tuple[str, ...]
    depth: Variable


@define
class Reading:
    """One reading of what was followed.

    rules: what is to be searched
    space: the variables that there may be; None for all that are found
    least: of a run of blocks, by its first one, how many have to run

    modules: by name, each once; places: also by the other names that some have
    values: the value of every size that has one; runs: of each block that can be passed by, 1 where it runs
    why: of sizes that have no variable the reason
    """

    model: nn.Module
    known: Followed
    rules: Rules
    space: SearchSpace | None = None
    least: dict[str, int] = field(factory=dict)
    modules: dict[str, nn.Module] = field(init=False)
    places: dict[str, nn.Module] = field(init=False)
    values: dict[Size, Value] = field(factory=dict, init=False)
    runs: dict[str, Value] = field(factory=dict, init=False)
    blocks: list[Run] = field(factory=list, init=False)
    variables: dict[str, Variable] = field(factory=dict, init=False)
    why: dict[Size, str] = field(factory=dict, init=False)
    kernels: dict[Size, str] = field(factory=dict, init=False)
    _held: set[Size] = field(factory=set, init=False)
    _counts: set[Size] = field(factory=set, init=False)
    _together: dict[Size, Size] = field(factory=dict, init=False)
    _used: set[str] = field(factory=set, init=False)
    _named: set[str] = field(factory=set, init=False)

    def __attrs_post_init__(self) -> None:
        self.modules = dict(self.model.named_modules())
        self.places = dict(self.model.named_modules(remove_duplicate=False))

    def read(self) -> None:
        """Give every size its value and every block its gate. Raises UserError for rules about nothing."""
        self.values, self.runs, self.blocks, self.variables, self.why = {}, {}, [], {}, {}
        self._used, self._named = set(), set()
        self._read_kernels()
        self._read_sizes()
        self._read_blocks()
        self._read_widths()
        self._refuse_idle_rules()

    def searched(self) -> SearchSpace:
        """Return the space: that which was given, else depths first, since others are active where they reach."""
        if self.space is not None:
            return self.space
        depths = {run.depth.key: run.depth for run in self.blocks}
        return SearchSpace({**depths, **self.variables}.values())

    def largest(self) -> dict[str, Any]:
        """Return the choices of the model as it was, whatever the space has."""
        runs = {run.depth.key: run.depth.largest for run in self.blocks}
        return runs | {key: variable.largest for key, variable in self.variables.items()}

    # -- sizes --------------------------------------------------------------------------------------------------------

    def module_of(self, name: str) -> nn.Module | None:
        """Return the module that a tensor belongs to."""
        return self.places.get(name.rpartition(".")[0])

    def _kernel_tensors(self) -> Iterator[tuple[Any, tuple[Axis, ...]]]:
        for name, axes in self.known.tensors.items():
            module = self.module_of(name)
            if isinstance(module, CONV) and name.rpartition(".")[2] == "weight":
                yield module, axes[2:]

    def _read_kernels(self) -> None:
        """Find the sizes that are kernels of convolutions, each with the reason why it is fixed, or "" if it is not."""
        axes, self.kernels = self.known.axes, {}
        axes.where = ""
        for _, own in self._kernel_tensors():
            for axis in own[1:]:  # square kernels stay square
                if count(axis) == count(own[0]):
                    axes.unify(own[0], axis)
        for module, own in self._kernel_tensors():
            for i, size in enumerate(map(resolved, own)):
                if isinstance(size, Size):
                    self.kernels[size] = self.kernels.get(size) or self._against_kernel(module, i, size.n)
        for size, why in self.kernels.items():
            if why:
                axes.fix(size, why)

    def _against_kernel(self, module: Any, i: int, n: int) -> str:
        plain = type(module).forward in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
        padding = module.padding if isinstance(module.padding, str) else module.padding[i]
        fits = padding in ("same", module.dilation[i] * (n // 2))
        if not (n % 2 and plain and fits and module.padding_mode == "zeros"):
            return f"a kernel of {n} with padding {padding}"
        if n <= self.rules.smallest_kernel:
            return f"a kernel of {n} leaves no smaller choice"
        return "" if self.rules.kernels else "the rules leave kernels as they are"

    def _read_sizes(self) -> None:
        """Find out which sizes are held, which count others, and which change together."""
        known = self.known
        every = [axis for own in known.tensors.values() for axis in own]
        every += [axis for op in known.ops for own in op.outputs for axis in own]
        while True:
            self._held, self._counts = set(), set()
            for axis in dict.fromkeys(map(resolved, every)):
                self._hold(axis)
            if not self._tie():
                return

    def _hold(self, axis: Axis) -> None:
        """Of a product of free sizes the outer one may change, the inner ones are held."""
        if isinstance(axis, Join):
            for part in axis.parts:
                self._hold(part)
        if isinstance(axis, Product):
            free = [factor for factor in axis.factors if any(True for _ in free_sizes(factor))]
            for factor in free[1:]:
                self._held.update(free_sizes(factor))
            if len(free) > 1 and isinstance(free[0], Size):
                self._counts.add(free[0])

    def _tie(self) -> bool:
        """Gather sizes that change in proportion; True if one was fixed on the way, so that all is to be read again."""
        parent: dict[Size, Size] = {}

        def find(size: Size) -> Size:
            while parent.get(size, size) is not size:
                size = parent[size]
            return size

        for tied, why in self.known.axes.tied:
            together = [*map(resolved, tied)]
            if len({form_of(axis, self._held) for axis in together}) == 1:
                continue
            scaled: list[Size] = []
            for axis in together:
                own = self._scaled(axis)
                if not own and self._fix_all(together, reason(axis) or why):  # one does not change: none does
                    return True
                scaled += own
            for size in scaled[1:]:
                parent.setdefault(find(size), find(size))
                parent[find(size)] = find(scaled[0])
        self._together = {size: find(size) for size in [*parent, *parent.values()]}
        return False

    def _fix_all(self, axes: Iterable[Axis], why: str) -> bool:
        loose = [size for axis in axes for size in free_sizes(axis) if size not in self._held]
        self.known.axes.where = ""
        for size in loose:
            self.known.axes.fix(size, why)
        return bool(loose)

    def _scaled(self, axis: Axis) -> list[Size]:
        """Return the sizes that change where an axis changes in proportion."""
        axis = resolved(axis)
        if isinstance(axis, Size):
            return [] if axis in self._held else [axis]
        if isinstance(axis, Join):
            return [*itertools.chain(*map(self._scaled, axis.parts))]
        return next((own for own in map(self._scaled, axis.factors) if own), []) if isinstance(axis, Product) else []

    # -- depth --------------------------------------------------------------------------------------------------------

    def _read_blocks(self) -> None:
        """Give every run of residual blocks a depth."""
        runs = self._runs() if self.rules.depth else []
        containers = [run[0].rpartition(".")[0] for run in runs]
        for run, container in zip(runs, containers, strict=True):
            least = max(math.ceil(self.rules.keep * len(run)), self.least.get(run[0], 0))
            alone = containers.count(container) == 1 and container
            key = f"{container}.depth" if alone else f"{run[0]}.depth"
            least_by_need = self.least.get(run[0], 0)
            choices = self._choices(key, (key, container), [*range(least, len(run) + 1)], (least_by_need, len(run)))
            if isinstance(choices, str):
                continue
            whole = choices == [*range(choices[0], choices[-1] + 1)]
            depth = Int(key, choices[0], choices[-1]) if whole else Categorical(key, choices)
            self.blocks.append(Run(tuple(run), depth))
            for i, path in enumerate(run):
                if i >= depth.smallest:
                    self.runs[path] = at_least(depth, i + 1)

    def _runs(self) -> list[list[str]]:
        found: list[list[str]] = []
        for name, container in self.modules.items():
            if isinstance(container, nn.Sequential | nn.ModuleList):
                paths = [f"{name}.{child}" if name else child for child, _ in container.named_children()]
                found += [[*run] for on, run in itertools.groupby(paths, self._can_be_skipped) if on]
        every = [path for run in found for path in run]  # of blocks in blocks the inner ones
        return [run for run in found if not any(path != b and inside(path, b) for b in run for path in every)]

    def _can_be_skipped(self, path: str) -> bool:
        block, calls = self.modules[path], self.known.calls.get(path, [])
        if isinstance(block, nn.ModuleDict) or not any(weight.dim() > 1 for weight in block.parameters()):
            return False
        return len({call.gives for call in calls}) == 1 and all(
            call.gives is not None
            and len(call.outputs) == 1
            and call.inputs
            and [*map(resolved, call.inputs[0])] == [*map(resolved, call.outputs[0])]
            for call in calls
        )

    # -- widths -------------------------------------------------------------------------------------------------------

    def _read_widths(self) -> None:
        """Give every size that is free a value."""
        places: dict[Size, list[Element]] = defaultdict(list)
        wide: set[Size] = set()
        for name, axes in self.known.tensors.items():
            for i, axis in enumerate(axes):
                sizes = [*free_sizes(axis)]
                for size in sizes:
                    places[size].append((name, i))
                if isinstance(resolved(axis), Size | Join) and len(axes) > 1:
                    wide.update(sizes)
        classes: dict[Size, list[Size]] = defaultdict(list)
        for size in places:
            if size not in self._held:
                classes[self._together.get(size, size)].append(size)
        for own in classes.values():
            self._read_width(own, places, wide)

    def _read_width(self, own: list[Size], places: Mapping[Size, list[Element]], wide: set[Size]) -> None:
        """Give sizes that change together one variable."""
        first = own[0]
        writer = next((p for size in own for p in places[size] if self._writes(p)), places[first][0])
        owner = writer[0].rpartition(".")[0]
        root = self._together.get(first)
        linked = {size for size, other in self._together.items() if other is root} | {*own}
        unit = functools.reduce(math.gcd, (size.n for size in linked))
        step = first.n // unit if len(linked) > 1 else 1
        if first in self.kernels:
            kind, choices = "kernel", self.rules.kernel_sizes(first.n)
        elif len(linked) > 1:
            kind, choices = "width", [n * step for n in self.rules.counts(unit)]
        elif first in self._counts and first not in wide:
            kind, choices = self._kind_of_count(owner), self.rules.counts(first.n)
        else:
            kind, choices = "width", self.rules.widths(first.n)
        key = f"{owner}.{kind}" if owner else f"{writer[0]}.{kind}"
        while key in self._named:
            key += "_"
        self._named.add(key)
        written = [place for size in own for place in places[size] if self._writes(place)]
        layers = dict.fromkeys(name.rpartition(".")[0] for name, _ in written or [writer])
        names = (key, *layers, *(f"{layer}.{kind}" for layer in layers))
        found = self._choices(key, names, choices, (step, first.n, step if kind != "kernel" else 2))
        if isinstance(found, str):
            for size in own:
                self.values[size], self.why[size] = Constant(size.n), found
            return
        variable = self.variables[key] = Categorical(key, found, when=self._when(places, own))
        for size in own:
            self.values[size] = variable if size.n == first.n else variable * size.n // first.n

    def _kind_of_count(self, owner: str) -> str:
        around = {owner, owner.rpartition(".")[0]}
        ops = (op.name for op in self.known.ops if around & {*op.modules})
        return "heads" if any(name == "bmm" or "attention" in name for name in ops) else "groups"

    def _writes(self, place: Element) -> bool:
        """Return whether an axis of a tensor is the output, or the kernel, of a layer."""
        name, axis = place
        module = self.module_of(name)
        transposed = isinstance(module, CONV) and module.transposed
        layer = name.endswith("weight") and isinstance(module, CONV | nn.Linear)
        return layer and axis in ((1,) if transposed else (0, 2, 3))

    def _when(self, places: Mapping[Size, list[Element]], own: Sequence[Size]) -> tuple[Condition, ...]:
        """Return where a variable is active: where the first block runs that has it, if nothing else does."""
        reached: dict[str, tuple[Variable, int]] = {}
        blocks = {path: (run.depth, i + 1) for run in self.blocks for i, path in enumerate(run.paths)}
        for name, _ in (place for size in own for place in places[size]):
            path = next((path for path in self.runs if inside(name, path)), None)
            if path is None:
                return ()
            depth, i = blocks[path]
            reached[depth.key] = depth, min(i, reached.get(depth.key, (depth, i))[1])
        if len(reached) != 1:
            return ()
        ((depth, i),) = reached.values()
        return (Condition(depth.key, frozenset(d for d in depth.choices if d >= i)),)

    # -- rules --------------------------------------------------------------------------------------------------------

    def _choices(self, key: str, names: Sequence[str], choices: list[int], bounds: tuple[int, ...]) -> list[int] | str:
        """Return the choices of what may become a variable, the largest among them, or why it becomes none.

        names: what rules may call it
        bounds: the smallest and the largest number that it may have, and its step
        """
        if self.space is not None:
            if key not in self.space.keys:
                return "the space has no variable for it"
            given = self.space[key].choices
            self._check(given, ("space", key), bounds)
            return sorted({*given, bounds[1]})  # the largest is what there are weights for
        if pattern := self.rules.fixing(names):
            self._used.add(pattern)
            return f"fixed by the rule {pattern!r}"
        if pattern := self.rules.chosen(names):
            self._used.add(pattern)
            wanted = [_of_share(choice, bounds) for choice in self.rules.choices[pattern]]
            fitting = [choice for choice in wanted if _fits(choice, bounds)]  # a pattern may be about several
            self._check(fitting or wanted, ("choices", pattern), bounds)
            choices = sorted({*fitting, bounds[1]})
        if len(choices) < 2 or choices[0] == choices[-1]:
            return f"{bounds[1]} elements leave no smaller choice"
        return choices

    def _check(self, choices: Iterable[Any], key: tuple[str, ...], bounds: tuple[int, ...]) -> None:
        low, high, step = (*bounds, 1)[:3]
        for choice in choices:
            if not _fits(choice, bounds):
                steps = f" in steps of {step}" if step > 1 else ""
                raise UserError(f"found {choice!r}, expected a whole number from {low} to {high}{steps}", key=key)

    def _refuse_idle_rules(self) -> None:
        """Raise UserError for rules that name nothing, and for variables that the model has not."""
        known = [*self.variables, *(run.depth.key for run in self.blocks)]
        if self.space is not None:
            missing = [key for key in self.space.keys if key not in known and not key.startswith("spec:")]
            hint = did_you_mean(missing[0], self._named, "variables") if missing else None
            text = "this model has no such variable"
            raise_if_any(Fault(text, (key,), hint=hint) for key in missing)
            return
        names = {*self._named, *self.modules}
        for table in ("fix", "choices"):
            for pattern in getattr(self.rules, table):
                if pattern not in self._used and not _names_something(pattern, names):
                    hint = did_you_mean(pattern, self._named, "variables")
                    raise UserError(f"no variable is called {pattern!r}", key=(table,), hint=hint)


def _names_something(pattern: str, names: Iterable[str]) -> bool:
    return Rules(fix=(pattern,)).fixing(names) is not None


def _fits(choice: Any, bounds: tuple[int, ...]) -> bool:
    low, high, step = (*bounds, 1)[:3]
    return isinstance(choice, int) and low <= choice <= high and (high - choice) % step == 0


def _of_share(choice: float, bounds: tuple[int, ...]) -> int:
    """Return a choice that may be a share of the largest as a whole number that is possible."""
    low, high, step = (*bounds, 1)[:3]
    if isinstance(choice, int) or choice >= 1:
        return choice  # type: ignore[return-value]
    return max(low, high - round((high - choice * high) / step) * step)


def inside(name: str, path: str) -> bool:
    """Return whether a module or a tensor is in a module, or is it."""
    return name == path or name.startswith(f"{path}.")
