"""What `corenas cost` says."""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path

from corenas import seeding
from corenas.errors import UserError
from corenas.run.spec import open_spec
from corenas_tool_inspect.table import print_json, print_table


def command(options: Namespace) -> None:
    """Print it."""
    path = Path(options.spec)
    spec, sources, _ = open_spec(path / "spec.toml" if path.is_dir() else path, options.set, options.plugin)
    from corenas.run.prepare import prepare
    from corenas_tool_inspect.archs import named_arch

    if options.n < 1:
        raise UserError(f"--n {options.n}: expected at least 1")
    if options.n > 1 and not any(name.startswith("random:") for name in options.arch):
        raise UserError(f"--n {options.n}: there is nothing to draw", hint="it is for --arch random:SEED")
    with sources.locating():
        prepared = prepare(spec, data=False, weights=False)
    if not prepared.has_network:
        raise UserError("nothing here has a network, which would have costs", file=options.spec)
    archs = []
    for name in options.arch or ["min", "default", "max"]:
        kind, _, seed = name.partition(":")
        if kind == "random" and re.fullmatch("[0-9]{1,18}", seed) and options.n > 1:
            codes = spec.space.draw(seeding.generator(int(seed), "arch"), options.n)
            archs += [(f"{name}[{i}]", arch) for i, arch in enumerate(spec.space.decode(codes))]
        else:
            archs.append((name, named_arch(prepared.cost, name)))
    costs = prepared.cost.of(arch for _, arch in archs)
    if options.json:
        print_json({"archs": [{"arch": dict(arch), **cost} for (_, arch), cost in zip(archs, costs, strict=True)]})
    else:
        print_table([{"arch": name, **cost} for (name, _), cost in zip(archs, costs, strict=True)])
