"""How a person names an arch."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import attrs

from corenas import seeding
from corenas.errors import UserError
from corenas.objectives import Trial
from corenas.run.toml import read_toml
from corenas.space import Arch

if TYPE_CHECKING:
    from corenas.cost import Cost

T = TypeVar("T")


def named_arch(cost: Cost, name: str, trials: Sequence[Trial] = ()) -> Arch:
    """The arch that a person names: "min" or "max" of flops, "default", "random:SEED", a TOML file.

    trials: those that may be named by the beginning of their digest
    Raises UserError for what is none of these.
    """
    space = cost.space
    found = {trial.arch for trial in trials if len(name) >= 4 and trial.arch.digest.startswith(name)}
    if len(found) == 1:
        return found.pop()
    if name in ("min", "max"):
        from corenas.constrained import extremes

        return extremes(cost, "flops")[name == "max"]
    if name == "default":
        return space.default()
    kind, colon, seed = name.partition(":")
    if kind == "random" and colon:
        if not re.fullmatch("[0-9]{1,18}", seed):
            raise UserError(f"random:{seed}: expected a whole number as seed", key=("--arch",))
        return space.sample(seeding.generator(int(seed), "arch"))
    if not Path(name).is_file():
        hint = (
            'expected a TOML file, "min", "max", "default", "random:SEED"; of a run, a trial as `corenas trials` has it'
        )
        raise UserError("no such arch", file=name, hint=hint)
    return from_file(name, space.arch)


def from_file(name: str, make: Callable[[dict[str, Any]], T]) -> T:
    """What is made of the table in a TOML file. Raises UserError, with the file's name."""
    try:
        return make(read_toml(Path(name), "TOML", file=name)[1])
    except UserError as error:
        raise UserError(
            faults=[fault if fault.file else attrs.evolve(fault, file=name) for fault in error.faults]
        ) from None
