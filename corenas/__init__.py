"""A plugin-based framework for one-shot neural architecture search.

What is used most stands here, imported when it is asked for: `from corenas import SearchSpace, Cost, apply`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from corenas.calibrate import recalibrate as recalibrate
    from corenas.constrained import FeasibleSpace as FeasibleSpace
    from corenas.contracts import Problem as Problem
    from corenas.cost import Cost as Cost
    from corenas.errors import UserError as UserError
    from corenas.export import export_subnet as export_subnet
    from corenas.mutable import apply as apply
    from corenas.objectives import Constraint as Constraint
    from corenas.objectives import Objective as Objective
    from corenas.objectives import Objectives as Objectives
    from corenas.objectives import Trial as Trial
    from corenas.plugins import load_catalogue as load_catalogue
    from corenas.search import run_search as run_search
    from corenas.space import Arch as Arch
    from corenas.space import SearchSpace as SearchSpace
    from corenas.train import LivePhase as LivePhase
    from corenas.train import run_training as run_training

__version__ = "0.1.0"
CONTRACT = 3
"""The version of what plugins and core promise each other; a plugin may state the one it was written for."""

NAMES = {
    "Arch": "space",
    "FeasibleSpace": "constrained",
    "Constraint": "objectives",
    "Cost": "cost",
    "LivePhase": "train",
    "Objective": "objectives",
    "Objectives": "objectives",
    "Problem": "contracts",
    "SearchSpace": "space",
    "Trial": "objectives",
    "UserError": "errors",
    "apply": "mutable",
    "export_subnet": "export",
    "load_catalogue": "plugins",
    "recalibrate": "calibrate",
    "run_search": "search",
    "run_training": "train",
}
"""Where the names of this page stand."""


def __getattr__(name: str) -> Any:
    if name not in NAMES:
        raise AttributeError(f"module 'corenas' has no attribute {name!r}")
    return getattr(import_module(f"corenas.{NAMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *NAMES})
