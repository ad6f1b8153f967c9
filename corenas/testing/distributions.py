"""What a whole plugin promises: `@pytest.mark.parametrize("check", distribution_checks)` in its tests.

Each check takes the name of the module that the entry point names: `check("corenas_searcher_random")`.
"""

from __future__ import annotations

import importlib
import pkgutil
from importlib.metadata import EntryPoint, entry_points

import attrs

from corenas import hookspecs
from corenas.contracts import COMPONENTS, members_of
from corenas.options import explanations
from corenas.plugins import GROUP, Catalogue, load_catalogue
from corenas.testing.components import imports_no_torch


def catalogue_of(module: str) -> Catalogue:
    """What this plugin alone offers, through its own entry points if it is installed."""
    installed = [point for point in entry_points(group=GROUP) if point.module == module]
    return load_catalogue(found=installed or [EntryPoint("it", module, GROUP)])


def is_a_plugin_that_the_catalogue_takes(module: str) -> None:
    """`corenas plugins` says "ok": it imports, knows the contract, and has no hook that there is not."""
    plugins = catalogue_of(module).plugins
    assert [plugin.error for plugin in plugins] == [None] * len(plugins)


def answers_only_hooks_that_there_are(module: str) -> None:
    """Functions marked with `hookimpl` have names in `corenas.hookspecs`; those of such names are marked."""
    known = {name for name in dir(hookspecs) if name.startswith("corenas_")}
    loaded = vars(importlib.import_module(module))
    hooks = {name for name, member in loaded.items() if hasattr(member, "corenas_impl")}
    assert hooks <= known, f"no such hook: {', '.join(hooks - known)}"
    assert {*loaded} & known <= hooks, f"not marked with hookimpl: {', '.join({*loaded} & known - hooks)}"


def offers_what_the_contracts_ask_for(module: str) -> None:
    """Every class that it offers has the members of its kind, and explains each of its options."""
    for component in catalogue_of(module).components.values():
        if component.kind not in COMPONENTS:
            assert callable(component.cls)
            continue
        members = members_of(COMPONENTS[component.kind])
        missing = [member for member in members if not hasattr(component.cls, member)]
        assert not missing, f"{component.kind} {component.name!r} has no {' and no '.join(missing)}"
        silent = {option.name for option in attrs.fields(component.cls)} - explanations(component.cls).keys()
        assert not silent, f"{component.kind} {component.name!r} does not explain {', '.join(sorted(silent))}"


def all_its_modules_import(module: str) -> None:
    """`corenas plugins --deep` says "ok"."""
    package = importlib.import_module(module)
    for found in pkgutil.walk_packages(getattr(package, "__path__", []), f"{module}."):
        importlib.import_module(found.name)


distribution_checks = [
    imports_no_torch,
    is_a_plugin_that_the_catalogue_takes,
    answers_only_hooks_that_there_are,
    offers_what_the_contracts_ask_for,
    all_its_modules_import,
]
"""What every distribution keeps to."""
