"""What `corenas plugins` says."""

from __future__ import annotations

import importlib
import pkgutil
from argparse import Namespace

from corenas.plugins import Catalogue, load_catalogue
from corenas_tool_inspect.table import print_json, print_table


def command(options: Namespace) -> None:
    """Print it."""
    catalogue = load_catalogue(files=options.plugin)
    deep = _imported(catalogue) if options.deep else {}
    rows = []
    for plugin in catalogue.plugins:
        error = plugin.error or deep.get(plugin.name)
        kind, _, name = plugin.name.partition("-")
        offers = {
            (c.kind, c.name): error for c in catalogue.components.values() if c.distribution == plugin.distribution
        }
        for key, owners in catalogue.conflicts.items():
            if plugin.distribution in owners:
                offers[key] = f"{key[1]!r} is offered by {' and '.join(owners)}"
        rows += [
            {
                "kind": kind,
                "name": name,
                "distribution": plugin.distribution,
                "version": plugin.version,
                "status": "broken" if wrong else "ok",
                "error": wrong,
            }
            for (kind, name), wrong in (offers or {(f"{kind}s", name or plugin.name): error}).items()
        ]
    if options.json:
        print_json({"plugins": rows})
    else:
        print_table([{**row, "error": row["error"] or ""} for row in rows])


def _imported(catalogue: Catalogue) -> dict[str, str]:
    """Import every module of every plugin; gives what cannot be imported: plugin -> why."""
    found = {}
    for plugin in catalogue.plugins:
        try:
            package = importlib.import_module(plugin.module.partition(":")[0])
            for module in pkgutil.walk_packages(getattr(package, "__path__", []), f"{package.__name__}."):
                importlib.import_module(module.name)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            found[plugin.name] = f"{type(error).__name__}: {error}".partition("\n")[0]
    return found
