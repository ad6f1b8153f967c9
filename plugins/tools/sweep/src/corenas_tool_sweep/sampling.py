"""A population that is drawn and measured first: a run whose searcher draws at random."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import tomli
import tomli_w

from corenas.space import SearchSpace
from corenas.store import Store
from corenas_tool_sweep.settings import Sample
from corenas_tool_sweep.statistics import rank_agreement


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


def measure_fidelity(sample: Sample, folder: Path) -> dict[str, Any]:
    """Train some archs of the sample alone, spread over their errors. Returns how well the sample ranks them.

    What was trained is kept in `fidelity.json`, and not trained again.
    """
    from corenas.calibrate import evaluate
    from corenas.loading import Batches
    from corenas.run.alone import stand_alone
    from corenas.run.prepare import prepare
    from corenas.run.spec import open_spec

    store = Store(folder / "sample" / "run.sqlite", readonly=True)
    goal = store.get("objectives")["objectives"][0]["metric"]
    trials = sorted((trial for trial in store.trials() if trial.ok), key=lambda trial: trial.metrics[goal])
    store.close()
    places = np.unique(np.linspace(0, len(trials) - 1, min(sample.fidelity, len(trials))).astype(int))
    chosen = [trials[place] for place in places]
    prepared = prepare(open_spec(folder / "sample" / "spec.toml")[0], weights=False)
    spec, task = prepared.spec, prepared.task
    metric = goal if goal in task.metrics else next(iter(task.metrics))
    valid = Batches(task, "valid", 256, prepared.device)
    file = folder / "fidelity.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for number, trial in enumerate(chosen, 1):
        digest = trial.arch.digest
        if digest not in known:
            print(f"trained alone: {number} of {len(chosen)}", file=sys.stderr)
            network = stand_alone(spec, task, trial.arch, device=prepared.device)
            known[digest] = evaluate(network.eval(), task, valid)[metric]
            file.with_suffix(".part").write_text(json.dumps(known), encoding="utf-8")
            os.replace(file.with_suffix(".part"), file)
    pairs = np.array([(trial.metrics[goal], known[trial.arch.digest]) for trial in chosen])
    tau, interval = rank_agreement(*pairs.T)
    return {"archs": len(chosen), "tau": tau, "interval": [*interval]}


def _searched(run: Path, count: int) -> dict[str, Any]:
    search = tomli.loads((run / "spec.toml").read_text(encoding="utf-8"))["search"]
    return {**search, "trials": count}


def _searcher(sample: Sample) -> str:
    """Return the searcher of a sample, as `--set` takes it."""
    if sample.stratify is None and not sample.structure:
        return '{type="random"}'
    searcher: dict[str, Any] = {"type": "stratified", "bins": 1}
    if sample.stratify is not None:
        searcher |= {"metric": sample.stratify, "bins": sample.bins}
    searcher |= {key: list(getattr(sample, key)) for key in ("equal", "non_decreasing") if getattr(sample, key)}
    if sample.regnet is not None:
        searcher["regnet"] = attrs.asdict(sample.regnet, filter=lambda _, item: item is not None)
        searcher["pool"] = 2000  # of RegNets few fit a space
    return _inline(searcher)


def _inline(item: Any) -> str:
    """Return plain data as TOML on one line."""
    if isinstance(item, Mapping):
        return "{" + ", ".join(f"{key} = {_inline(value)}" for key, value in item.items()) + "}"
    if isinstance(item, list | tuple):
        return "[" + ", ".join(map(_inline, item)) + "]"
    return json.dumps(item)


def _settings(sample: Sample, count: int, seed: int) -> list[str]:
    settings = [
        f"searcher={_searcher(sample)}",
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
