"""A population that is drawn and measured first: a run whose searcher draws at random."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli
import tomli_w

from corenas.space import SearchSpace
from corenas_tool_sweep.settings import Sample


def measure(sample: Sample, folder: Path, seed: int) -> Path:
    """Run a spec with archs drawn at random, or go on with it. Returns the run directory, `sample` in the folder.

    Raises UserError for a spec that is wrong.
    """
    return _run(sample.spec, _settings(sample, sample.count, seed), folder / "sample")


def measure_narrowed(
    sample: Sample, space: SearchSpace, changed: Sequence[str], count: int, folder: Path, seed: int
) -> Path:
    """Measure archs of a narrowed space as those of the whole one were. Returns the run directory, `confirm`.

    A supernet that was trained for the first sample is searched again; nothing is trained twice.
    """
    first = folder / "sample"
    if (first / "supernet.pt").exists():
        narrow = {key: [*space[key].choices] for key in changed}
        table = {"supernet": {"from": str(first)}, "space": {"narrow": narrow}, "search": _searched(first, count)}
        spec = folder / "confirm.toml"
        spec.write_text(tomli_w.dumps(table), encoding="utf-8")
        return _run(str(spec), [], folder / "confirm")
    file = folder / "confirm.space.toml"
    file.write_text(tomli_w.dumps(space.to_table()), encoding="utf-8")
    settings = [*_settings(sample, count, seed), f"space={json.dumps(str(file.resolve()))}"]
    return _run(sample.spec, settings, folder / "confirm")


def _searched(run: Path, count: int) -> dict[str, Any]:
    search = tomli.loads((run / "spec.toml").read_text(encoding="utf-8"))["search"]
    return {**search, "trials": count}


def _settings(sample: Sample, count: int, seed: int) -> list[str]:
    searcher = '{type="random"}'
    if sample.stratify is not None:
        searcher = f'{{type="stratified", metric="{sample.stratify}", bins={sample.bins}}}'
    settings = [
        f"searcher={searcher}",
        f"search.trials={count}",
        f"name={Path(sample.spec).stem}-sample",
        f"seed={seed}",
    ]
    if sample.mode == "scratch":
        settings += ['algorithm={type="alone"}', 'evaluators=["stand_alone"]']
        settings += [] if sample.epochs is None else [f"train.epochs={sample.epochs}"]
    return [*settings, *sample.set]


def _run(path: str, settings: Sequence[str], folder: Path) -> Path:
    """Do a run, or what is left of it. Returns its directory."""
    from corenas.run.spec import open_spec

    spec, sources, catalogue = open_spec(path, settings)
    from corenas.run.stages import run_spec

    def emit(event: Any) -> None:
        for line in catalogue.emit(event):
            print(line, file=sys.stderr)

    with sources.locating():
        run_spec(spec, catalogue, folder, emit)
    return folder
