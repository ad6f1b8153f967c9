"""What `corenas sweep` does: read populations, analyse them, write page, pictures, figures and the narrower space."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from corenas.errors import UserError
from corenas.store import strict_json
from corenas_tool_sweep.analysis import Analysis, analyse, confirmation, figures
from corenas_tool_sweep.narrowing import Narrowed, narrow, status, to_toml
from corenas_tool_sweep.population import read_population, read_populations
from corenas_tool_sweep.settings import Sweep, read_sweep


def command(options: Namespace) -> int:
    """Do it; with `--json` the figures are printed too."""
    sweep = asked(options.source)
    found, narrowed = run_sweep(sweep, options.out)
    if options.json:
        print(strict_json(result(found, narrowed)))
        return 0
    for note in found.notes:
        print(note, file=sys.stderr)
    for variable in found.variables[0]:
        if variable.holm is not None and variable.holm < sweep.narrow.alpha:
            print(f"{variable.key}: {variable.verdict} (Holm p {variable.holm:.2g})", file=sys.stderr)
    print(options.out / "sweep.html")
    return 0


def asked(sources: Sequence[Path]) -> Sweep:
    """Return the sweep of a TOML file, or of populations. Raises UserError for a mixture."""
    specs = [path for path in sources if path.suffix == ".toml"]
    if not specs:
        return Sweep(tuple(map(str, sources)))
    if len(sources) > 1:
        hint = "`input` in [sweep] lists these"
        raise UserError("expected one TOML file, or run directories and CSV files", hint=hint)
    return read_sweep(specs[0])


def run_sweep(sweep: Sweep, folder: Path) -> tuple[Analysis, Narrowed]:
    """Analyse populations and write all there is into a folder: page, pictures, figures, the narrower space."""
    folder.mkdir(parents=True, exist_ok=True)
    trusted = None
    if sweep.sample is not None:
        from corenas_tool_sweep.sampling import measure, measure_fidelity

        run = measure(sweep.sample, folder, sweep.seed)
        trusted = measure_fidelity(sweep.sample, folder) if sweep.sample.fidelity else None
        sweep = attrs.evolve(sweep, input=(*sweep.input, str(run)))
    found = analyse(read_populations(sweep), sweep)
    if trusted is not None:
        found = attrs.evolve(found, notes=[*found.notes, _said(trusted)])
    narrowed = narrow(found)
    confirmed = _confirmed(sweep, found, narrowed, folder)
    toml = to_toml(narrowed, found.populations[0].name, confirmed) if narrowed.space is not None else None
    content = {**result(found, narrowed), "confirmed": confirmed, "fidelity": trusted}
    (folder / "sweep.json").write_text(strict_json(content, indent=1), encoding="utf-8")
    space_file = folder / "space.narrowed.toml"
    if toml is not None:
        space_file.write_text(toml, encoding="utf-8")
    else:
        space_file.unlink(missing_ok=True)
    from corenas_tool_sweep.page import write_page
    from corenas_tool_sweep.plots import draw_all

    write_page(found, narrowed, status(confirmed), toml, draw_all(found, folder), folder / "sweep.html")
    return found, narrowed


def _said(trusted: Mapping[str, Any]) -> str:
    low, high = trusted["interval"]
    tau = f"{trusted['tau']:.2f} [{low:.2f}, {high:.2f}]"
    return f"Kendall's tau of the sample's errors and those of {trusted['archs']} of its archs trained alone: {tau}"


def _confirmed(sweep: Sweep, found: Analysis, narrowed: Narrowed, folder: Path) -> dict[str, Any] | None:
    """Measure new archs of the narrowed space, if the sweep says how, and compare them with the old ones."""
    if not sweep.narrow.confirm or sweep.sample is None or not narrowed.changed or narrowed.space is None:
        return None
    from corenas_tool_sweep.sampling import measure_narrowed

    run = measure_narrowed(sweep.sample, narrowed.space, narrowed.changed, sweep.narrow.confirm, folder, sweep.seed)
    return confirmation(found.populations[0], read_population(run, sweep), sweep)


def result(found: Analysis, narrowed: Narrowed) -> dict[str, Any]:
    """Return what `sweep.json` holds."""
    return {**figures(found), "narrowed": {"changed": [*narrowed.changed], "reasons": [*narrowed.reasons]}}
