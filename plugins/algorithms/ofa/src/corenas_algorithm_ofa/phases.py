"""What progressive shrinking opens, and when: spaces that nest, from the full network to the whole space."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence

from attrs import evolve, frozen
from torch import Tensor, nn

from corenas.contracts import AlgorithmContext
from corenas.errors import Fault, UserError, did_you_mean, raise_if_any
from corenas.mutable import Resizing, mutables
from corenas.settings import Train
from corenas.space import Choice, SearchSpace
from corenas.value import Dimension
from corenas.variables import Variable
from corenas_algorithm_ofa import Shrinking

PAPER: Sequence[tuple[Mapping[str, int | str], float, float, float, int]] = (
    ({"*kernel": "all"}, 125 / 180, 0.96 / 2.6, 5 / 180, 1),  # elastic kernel size
    ({"*depth": 2}, 25 / 180, 0.08 / 2.6, 0, 2),  # elastic depth, first stage
    ({"*depth": "all"}, 125 / 180, 0.24 / 2.6, 5 / 180, 2),  # and second
    ({"*": 2}, 25 / 180, 0.08 / 2.6, 0, 4),  # elastic width, first stage: whatever is not open yet
    ({"*": "all"}, 125 / 180, 0.24 / 2.6, 5 / 180, 4),  # and second
)
"""Of each phase what it opens, epochs, learning rate and warm-up beside the full network's (180 epochs, 2.6), paths."""


@frozen
class Stage:
    """A phase with its space.

    space: what is open by now
    train: its settings
    paths: subnets of a step
    narrows: whether some width has more choices than before, so that channels are sorted first
    """

    space: SearchSpace
    train: Train
    paths: int = 1
    narrows: bool = False


def planned_stages(context: AlgorithmContext, phases: Sequence[Shrinking] | None) -> Sequence[Stage]:
    """Return the stages of a training. Raises UserError as `read_stages` does, and where channels cannot be sorted."""
    stages = read_stages(context.space, context.supernet, context.train, phases)
    if any(stage.narrows for stage in stages) and not isinstance(context.task.example, Tensor):
        text = "this network takes more than one tensor: its channels cannot be sorted"
        raise UserError(text, key=("algorithm",), hint="a space without widths to choose from")
    return stages


def read_stages(
    space: SearchSpace, model: nn.Module, train: Train, phases: Sequence[Shrinking] | None
) -> Sequence[Stage]:
    """Return the full network's phase and those after it.

    In the full network every variable is at its largest but those of the resolution, which is random from the start.
    phases: None for the paper's
    Raises UserError for a pattern that names no variable, a phase that opens nothing, and for a space that no phase
    opens wholly.
    """
    opened = {variable.key: 1 for variable in space.variables if variable.key not in resized(model)}
    widths = keys_of_widths(model)
    stages, faults = [Stage(_opened(space, opened), train)], []
    for number, phase in enumerate(paper_phases(train) if phases is None else phases):
        before = dict(opened)
        for pattern, wanted in phase.open.items():
            keys = fnmatch.filter(space.keys, pattern)
            if not keys and phases is not None:
                hint = did_you_mean(pattern, space.keys, "variables")
                faults.append(Fault(f"no variable {pattern!r}", ("algorithm", "phases", number, "open"), hint=hint))
            for key in opened.keys() & {*keys}:
                opened[key] = max(opened[key], _number(space[key], wanted))
        more = {key for key in opened if opened[key] > before[key]}
        if more:
            settings = _settings(train, phase)
            stages.append(Stage(_opened(space, opened), settings, phase.paths, bool(more & widths)))
        elif phases is not None:
            faults.append(Fault("this phase opens nothing that is not open already", ("algorithm", "phases", number)))
    closed = [key for key, number in opened.items() if number < _number(space[key], "all")]
    if closed:
        text = f"no phase opens all of {closed[0]}" + (f" and {len(closed) - 1} more" if len(closed) > 1 else "")
        hint = 'a last phase with open = { "*" = "all" }, or a space that leaves those choices out'
        faults.append(Fault(text, ("algorithm", "phases"), hint=hint))
    raise_if_any(faults)
    return stages


def paper_phases(train: Train) -> list[Shrinking]:
    """Return the paper's phases, in their relation to the full network's epochs and learning rate."""
    rate = train.optimizer.get("lr")
    return [
        Shrinking(
            opened,  # type: ignore[arg-type]
            epochs=max(1, round(train.epochs * epochs)) if train.epochs else 0,
            lr=None if rate is None else rate * lr,
            warmup=train.epochs * warmup,
            paths=paths,
        )
        for opened, epochs, lr, warmup, paths in PAPER
    ]


def resized(model: nn.Module) -> set[str]:
    """Return the keys of variables that set the size of images."""
    layers = [mutable for mutable in mutables(model) if isinstance(mutable, Resizing)]
    return {key for layer in layers for name in layer.resizes for key in layer.elastic.values[name].keys}


def keys_of_widths(model: nn.Module) -> set[str]:
    """Return the keys of variables that some number of channels depends on."""
    values = [value for mutable in mutables(model) for value in mutable.elastic.values.values()]
    return {key for value in values if isinstance(value, Dimension) for key in value.keys}


def _number(variable: Variable, wanted: int | str) -> int:
    """Return how many choices of a variable are meant; a continuous one is open or is not."""
    if variable.continuous:
        return 1 if wanted == 1 else 2
    return len(variable.choices) if wanted == "all" else min(int(wanted), len(variable.choices))


def _opened(space: SearchSpace, opened: Mapping[str, int]) -> SearchSpace:
    """Return the part of a space with so many of the largest choices of each variable."""
    closed = {key: number for key, number in opened.items() if number < _number(space[key], "all")}
    return space.narrow({key: _largest(space[key], number) for key, number in closed.items()})


def _largest(variable: Variable, number: int) -> list[Choice]:
    """Return the largest choices in the variable's order: the first ones, where they are no numbers."""
    if variable.continuous:
        return [variable.largest]
    choices: Iterable[Choice] = variable.choices
    if not isinstance(variable.largest, str):
        largest = sorted(choices)[-number:]  # type: ignore[type-var]
        return [choice for choice in choices if choice in largest]
    return [*choices][:number]


def _settings(train: Train, phase: Shrinking) -> Train:
    """Return `[train]` with a phase's epochs, learning rate and warm-up."""
    return evolve(
        train,
        epochs=train.epochs if phase.epochs is None else phase.epochs,
        optimizer=train.optimizer if phase.lr is None else {**train.optimizer, "lr": phase.lr},
        schedule=train.schedule if phase.warmup is None else evolve(train.schedule, warmup=phase.warmup),
    )
