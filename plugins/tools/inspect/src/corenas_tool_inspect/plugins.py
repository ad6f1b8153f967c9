"""What `corenas plugins` says."""

from __future__ import annotations

from argparse import Namespace

from corenas.plugins import load_catalogue
from corenas_tool_inspect.table import print_json, print_table


def command(options: Namespace) -> None:
    """Print it."""
    catalogue = load_catalogue()
    deep = catalogue.import_all() if options.deep else {}
    rows = []
    for plugin in catalogue.plugins:
        own = [c for c in catalogue.components.values() if c.distribution == plugin.distribution]
        error = plugin.error or deep.get(plugin.name)
        kind, _, name = plugin.name.partition("-")
        offers = [(c.kind, c.name) for c in own] or [(f"{kind}s", name or plugin.name)]
        rows += [{"kind": kind, "name": name, "distribution": plugin.distribution, "version": plugin.version,
                  "status": "broken" if error else "ok", "error": error} for kind, name in offers]  # fmt: skip
    if options.json:
        print_json({"plugins": rows})
    else:
        print_table([{**row, "error": row["error"] or ""} for row in rows])
