"""What every component promises, whatever its kind. Needs no torch."""

from __future__ import annotations

import copy
import functools
import random
import re
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

import attrs
import numpy as np
import tomli

from corenas.contracts import PartlyIdle, Surroundings
from corenas.options import explanations
from corenas.space import SearchSpace


def options_are_frozen_and_hashable(component: Any) -> None:
    """Options are data: they cannot be changed, are equal by value and can be keys."""
    assert attrs.has(type(component)), f"{type(component)} is no attrs class"
    try:
        component.surely_not_an_option = 1
    except attrs.exceptions.FrozenInstanceError:
        pass
    else:
        raise AssertionError(f"{type(component).__name__} is not frozen")
    twin = attrs.evolve(component)
    assert component == twin
    assert hash(component) == hash(twin)


def every_option_is_explained(component: Any) -> None:
    """The docstring of the class has a line `name: what it means` for each option: `corenas show` prints it."""
    cls = type(component)
    missing = {option.name for option in attrs.fields(cls) if option.init} - set(explanations(cls))
    assert not missing, f"the docstring of {cls.__name__} says nothing of {', '.join(sorted(missing))}"


def idle_options_are_its_own(component: Any) -> None:
    """What it says to do nothing (`contracts.PartlyIdle`) are options of its own, each with a reason."""
    if not isinstance(component, PartlyIdle):
        return
    names = {option.name for option in attrs.fields(type(component))} | {"type"}
    for trials in (0, 1, 1_000_000):
        idle = component.idle(Surroundings(_SPACE, _NoTask(), trials=trials))  # type: ignore[arg-type]
        assert idle.keys() <= names, f"{sorted(idle.keys() - names)} are no options of {type(component).__name__}"
        assert all(idle.values())


def imports_no_torch(module: str) -> None:
    """A module, that of an entry point for instance, leaves torch alone, so that the command line answers at once."""
    script = f"import sys; sys.path[:] = {sys.path!r}; import {module}; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{module} imports torch, or does not import: {done.stderr}"


def spec_fragments(readme: Path) -> list[dict[str, Any]]:
    """The TOML in a README, for a test to read as a command would. Raises ValueError if it is none."""
    return [tomli.loads(text) for text in re.findall(r"^```toml\n(.*?)^```", readme.read_text("utf-8"), re.S | re.M)]


@contextmanager
def global_generators_untouched() -> Iterator[None]:
    """Fails if the block draws from Python's or numpy's global generator; what its own threads draw counts as well.

    Threads that were there before may draw from Python's: the loop of a client of dask does so at any time.
    """
    drawn: list[str] = []

    def see(frame: FrameType, event: str, function: Any) -> None:
        if event == "c_call" and getattr(function, "__self__", None) is random.random.__self__:
            drawn.append("".join(traceback.format_stack(frame, limit=4)))

    before = random.getstate(), repr(np.random.get_state())
    outer = sys.getprofile(), threading.getprofile()
    sys.setprofile(see)
    threading.setprofile(see)
    try:
        yield
    finally:
        sys.setprofile(outer[0])
        threading.setprofile(outer[1])  # pyright: ignore[reportArgumentType]
    moved = random.getstate() != before[0]
    assert not (moved and drawn), f"drew from Python's global generator:\n{drawn[0]}"
    assert repr(np.random.get_state()) == before[1], "drew from numpy's global generator"


class _NoTask:
    """A task of which nothing is known."""

    example: Any = None
    metrics: ClassVar[Mapping[str, Any]] = {}
    splits: ClassVar[Mapping[str, int]] = {}


_SPACE = SearchSpace.from_table({"width": [8, 16]})


def _of_options_alone(check: Callable[[Any], None]) -> Callable[..., None]:
    @functools.wraps(check)
    def checked(component: Any, *rest: Any, **more: Any) -> None:
        check(component)

    return checked


component_checks = [options_are_frozen_and_hashable, every_option_is_explained, idle_options_are_its_own]
"""What holds for the options of any component; the lists of the kinds include it."""

checks_of_any_component = [*map(_of_options_alone, component_checks)]
"""The same for kinds whose checks take more than the options; they do not look at the rest."""


def changed(table: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy of nested tables with something else (None: nothing) under a dotted key: "stages.1.width"."""
    copied = copy.deepcopy(dict(table))
    *path, last = [int(part) if part.isdigit() else part for part in key.split(".")]
    inner: Any = copied
    for part in path:
        inner = inner[part]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return copied
