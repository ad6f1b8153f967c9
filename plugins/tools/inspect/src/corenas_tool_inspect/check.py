"""What `corenas check` says of a spec that has no mistake."""

from __future__ import annotations

import sys
from argparse import Namespace
from contextlib import redirect_stdout

from corenas.errors import shown
from corenas.run.spec import open_spec
from corenas_tool_inspect.table import print_json, print_table

_FIRST = {"train": "steps", "search": "trial", "retrain": "steps"}
"""What is tried of each stage."""
_NEARLY_ALL = 0.9995
"""Share of archs that would be shown as 100%."""
_DRAWN = {
    "rejection": "the others are drawn and thrown away",
    "tables": "they are drawn by the tables of the costs, distributed as if the others were thrown away",
    "walk": "they are found by mutating the nearest ones, so how they are distributed is not known",
}


def command(options: Namespace) -> None:
    """Print it."""
    spec, sources, catalogue = open_spec(options.spec, options.set, options.plugin)
    from corenas.run.prepare import files_of_other_runs, prepare, refuse_ahead
    from corenas_tool_inspect.archs import named_arch
    from corenas_tool_inspect.estimate import estimate

    with sources.locating(), redirect_stdout(sys.stderr):  # whatever a plugin prints
        files_of_other_runs(spec)
        prepared = prepare(spec, data=not options.no_data, weights=False)
        refuse_ahead(prepared, catalogue)
        needs = None if options.no_data or options.no_try else estimate(prepared, limit=5.0)
    named = ("min", "default", "max") if prepared.has_network else ()
    archs = {name: named_arch(prepared.cost, name) for name in named}
    costs = dict(zip(archs, prepared.cost.of(archs.values()), strict=True))
    size = spec.space.size if spec.space.finite else None
    if options.json:
        space = {"size": size, "variables": len(spec.space.variables)}
        told = {"seconds": dict(needs.seconds), "memory": needs.memory} if needs else None
        print_json(
            {"ok": True, "errors": [], "space": space, "cost": costs, "estimate": told, "notes": [*prepared.notes]}
        )
        return
    print(shown(f"{options.spec} is fine: {spec.name}, stages {', '.join([*prepared.stages, 'export'])}"))
    number = "archs without number" if size is None else "1 arch" if size == 1 else f"{size:,} archs ({size:.2e})"
    print(f"space      {number}, {len(spec.space.variables)} variables")
    if prepared.task.splits:
        print("data       " + ", ".join(f"{name} {n:,}" for name, n in prepared.task.splits.items()))
    if costs:
        print_table([{"arch": name, **cost} for name, cost in costs.items()])
    for target in prepared.targets:
        if target.constraints:
            print(shown(f"constraints {target}"))
        if cheap := target.region.constraints:
            share, wanted = target.region.share, " and ".join(map(str, cheap))
            few = f"about {share:.1%} of drawn archs have {wanted}; {_DRAWN[target.region.method]}"
            print(few if share < _NEARLY_ALL else f"nearly all drawn archs have {wanted}")
    for note in prepared.notes:
        print(f"note       {shown(note)}")
    if needs is not None:
        stages = ", ".join(f"{stage} about {_duration(seconds)}" for stage, seconds in needs.seconds.items())
        lacking = [stage for stage in _FIRST if stage in prepared.stages and stage not in needs.seconds]
        memory = f", memory about {needs.memory / 1e9:.2g} GB" if needs.memory else ""
        short = "".join(f"; {stage}: not known, its first {_FIRST[stage]} took too long" for stage in lacking if stages)
        unknown = "not known" + (": a step of few images takes longer than a check may" if lacking else "")
        print(f"needs      {stages or unknown}{memory}{short} (tried: {needs.tried}, on {prepared.device})")


def _duration(seconds: float) -> str:
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.2g} {name}" if seconds < 10 * unit else f"{seconds / unit:.0f} {name}"
    return f"{seconds:.0f} s"
