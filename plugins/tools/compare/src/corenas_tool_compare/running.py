"""All runs of a comparison: methods, networks trained again, references and baselines; each a run directory of its own.

What is finished is not done again, and what was killed goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import tomli_w
from attrs import frozen

from corenas.errors import UserError, regular
from corenas.objectives import Objective, Trial
from corenas.plugins import Catalogue
from corenas.run.prepare import load_supernet, prepare, start_trial_runner
from corenas.run.spec import Spec, open_spec
from corenas.run.stages import run_spec
from corenas.space import Arch
from corenas.store import Store
from corenas_tool_compare.budget import alone_flops, training_flops
from corenas_tool_compare.settings import Compare, Method

_OF_SEARCH = ("searcher", "evaluators", "executor", "search", "mutator", "distiller", "teacher", "supernet", "retrain")
"""Tables of a spec that the training of one arch alone does not look at."""
REFERENCE, RANDOM, LARGEST = "reference", "random archs alone", "largest network"


@frozen(eq=False)
class Opened:
    """A method, its spec read.

    settings: those by which its spec was read, without seed and budget
    flops: multiply-adds of its training
    """

    name: str
    spec: Spec
    catalogue: Catalogue
    path: str
    settings: tuple[str, ...]
    flops: float = 0.0


def run_comparison(compare: Compare, out: Path) -> dict[str, Any]:
    """Run all that is not finished. Returns a row for each method and seed, and what was found of the references.

    Raises UserError for specs that are wrong, or are not of one space and one task.
    """
    methods = [_opened(name, method, compare) for name, method in compare.methods.items()]
    _refuse_other_spaces(methods)
    out.mkdir(parents=True, exist_ok=True)
    first = methods[0]
    prepared = prepare(first.spec)
    metric = next(iter(prepared.task.metrics))
    epochs = _alone_spec(first, compare, out).train.epochs
    one = alone_flops(prepared, epochs)
    budget = compare.budget or (_training(first, out) if "train" in first.spec.algorithm.stages else 0.0)
    budget = budget or one * first.spec.search.trials
    methods = [_within_budget(method, budget, one, out) for method in methods]
    reference = _reference(first, compare, out, metric) if compare.reference.archs else []
    rows = []
    # All methods with one seed come before the next, so that fewer seeds are a whole table.
    for seed in range(compare.seeds):
        rows += [_row(m, seed, compare, out, reference, metric) for m in methods]
        for name in (RANDOM, LARGEST) if compare.baselines else ():
            rows.append(_baseline(name, first, seed, compare, out, metric, budget, one))
    order = [*dict.fromkeys(row["method"] for row in rows)]
    rows.sort(key=lambda row: order.index(row["method"]))
    return {
        "metric": metric,
        "budget": budget,
        "alone_flops": one,
        "rows": rows,
        "reference": [*map(_plain, reference)],
        "splits": dict(prepared.task.splits),
        "apart": dict(compare.apart),
    }


# -- specs ------------------------------------------------------------------------------------------------------------


def _opened(name: str, method: Method, compare: Compare) -> Opened:
    path, settings = str(method.spec or compare.spec), (*compare.set, *method.set)
    try:
        spec, _, catalogue = open_spec(path, settings)
        if "retrain" in spec.algorithm.stages:
            # What is found is trained alone afterwards, as that of all others: its own retraining would be for nothing.
            settings = (*settings, "retrain.train.epochs=0")
            spec, _, catalogue = open_spec(path, settings)
    except UserError as error:
        raise error.under("methods", name) from None
    return Opened(name, spec, catalogue, path, settings)


def _refuse_other_spaces(methods: Sequence[Opened]) -> None:
    """Raise UserError for methods whose space or data is another than the first one's."""
    first = methods[0].spec
    for method in methods[1:]:
        for key in ("space", "task"):
            one, other = (s.space.to_table() if key == "space" else s.task for s in (first, method.spec))
            if one != other:
                text = f"its {key} is another than that of {methods[0].name}: only methods on one {key} can be compared"
                raise UserError(text, key=("methods", method.name), hint=f"--set, or `set`, gives all specs one {key}")


def _within_budget(method: Opened, budget: float, one: float, out: Path) -> Opened:
    """Return a method whose training takes about the budget: other epochs, or trials that train each arch alone."""
    spec = method.spec
    if "train" in spec.algorithm.stages:
        flops = _training(method, out)
        epochs = max(1, round(spec.train.epochs * budget / flops))
        if epochs == spec.train.epochs:
            return attrs.evolve(method, flops=flops)
        settings = (*method.settings, f"train.epochs={epochs}")
        changed = attrs.evolve(method, spec=open_spec(method.path, settings)[0], settings=settings)
        return attrs.evolve(changed, flops=_training(changed, out))
    if any(evaluator["type"] == "stand_alone" for evaluator in spec.to_table(method.catalogue)["evaluators"]):
        trials = max(1, int(budget / one))
        settings = (*method.settings, f"search.trials={trials}")
        return attrs.evolve(method, spec=open_spec(method.path, settings)[0], settings=settings, flops=trials * one)
    return method


def _training(method: Opened, out: Path) -> float:
    """Return what a method's training takes, counted once for each spec."""
    file = out / "training-flops.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    text = json.dumps(method.spec.to_table(method.catalogue), sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    if digest not in known:
        known[digest] = training_flops(prepare(method.spec))
        _replace(file, known)
    return known[digest]


def _replace(file: Path, content: Any, indent: int | None = None) -> None:
    """Write JSON, so that the file is whole or not there."""
    part = file.with_name(f"{file.name}.part")
    part.write_text(json.dumps(content, indent=indent), encoding="utf-8")
    os.replace(part, file)


def _alone_spec(method: Opened, compare: Compare, out: Path) -> Spec:
    return open_spec(_alone_file(method, compare, out, "alone", {}), ())[0]


def _alone_file(method: Opened, compare: Compare, out: Path, name: str, changes: Mapping[str, Any]) -> Path:
    """Write the spec of a training alone, which is the same for all methods. Returns its file."""
    table = json.loads(json.dumps(method.spec.to_table(method.catalogue)))
    table = {key: item for key, item in table.items() if key not in (*_OF_SEARCH, "plugins")}
    table |= {"name": _file_name(name), "algorithm": {"type": "alone", "search": False}, **changes}
    file = out / f"{_file_name(name)}.toml"
    file.write_text(tomli_w.dumps(table), encoding="utf-8")
    spec, _, catalogue = open_spec(file, compare.train)
    if compare.train:
        table["train"] = json.loads(json.dumps(spec.to_table(catalogue)["train"]))
        file.write_text(tomli_w.dumps(table), encoding="utf-8")
    return file


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in name)


# -- runs -------------------------------------------------------------------------------------------------------------


def _run(path: str | Path, settings: Sequence[str], folder: Path) -> dict[str, Any]:
    """Do a run, or what is left of it. Returns its result."""
    spec, sources, catalogue = open_spec(path, settings)
    print(f"{folder.name}:", file=sys.stderr)

    def emit(event: Any) -> None:
        for line in catalogue.emit(event):
            print(line, file=sys.stderr)

    with sources.locating():
        return run_spec(spec, catalogue, folder, emit)


def _reference(first: Opened, compare: Compare, out: Path, metric: str) -> list[Trial]:
    """Return the archs that were trained alone, with the mean of their seeds: those that are kept, if there are any."""
    spec_file = _reference_spec(first, compare, out, metric)
    kept = compare.reference.kept and Path(compare.reference.kept)
    spec = _spec_of_reference(spec_file)
    if kept and kept.exists():
        known = json.loads(regular(kept).read_text(encoding="utf-8"))
        if _agrees(known["spec"], spec):
            return [Trial(Arch(row["arch"]), row["metrics"], extra=row["extra"]) for row in known["archs"]]
        print(f"{kept} is of another space, data or training: its archs are trained again", file=sys.stderr)
    _run(spec_file, (), out / REFERENCE)
    store = Store(out / REFERENCE / "run.sqlite", readonly=True)
    trials = [trial for trial in store.trials() if trial.ok]
    store.close()
    if kept and not kept.exists():
        _replace(kept, {"spec": spec, "archs": [*map(_plain, trials)]}, indent=1)
    return trials


def _plain(trial: Trial) -> dict[str, Any]:
    return {"arch": dict(trial.arch), "metrics": dict(trial.metrics), "extra": dict(trial.extra)}


def _reference_spec(first: Opened, compare: Compare, out: Path, metric: str) -> Path:
    changes = {
        "algorithm": {"type": "alone"},
        "searcher": {"type": "random"},
        "evaluators": [{"type": "stand_alone", "seeds": compare.reference.seeds}],
        "search": {"trials": compare.reference.archs, "objectives": [metric]},
    }
    return _alone_file(first, compare, out, REFERENCE, changes)


def _spec_of_reference(file: Path) -> dict[str, Any]:
    """Return what the accuracies of references hang on."""
    spec, _, catalogue = open_spec(file, ())
    table = json.loads(json.dumps(spec.to_table(catalogue)))
    return {key: table[key] for key in ("space", "backbone", "task", "train", "seed", "evaluators", "search")}


def _agrees(known: Any, now: Any) -> bool:
    """Return whether a table says what a kept one says; options that are newer than that one are at their defaults."""
    if isinstance(known, dict):
        return isinstance(now, dict) and all(key in now and _agrees(item, now[key]) for key, item in known.items())
    if isinstance(known, list):
        pairs = zip(known, now, strict=False) if isinstance(now, list) else ()
        return isinstance(now, list) and len(known) == len(now) and all(_agrees(*pair) for pair in pairs)
    return known == now


def _row(
    method: Opened, seed: int, compare: Compare, out: Path, reference: Sequence[Trial], metric: str
) -> dict[str, Any]:
    """Run a method with one seed. Returns what it found, and what that is worth when it is trained alone."""
    folder = out / f"{_file_name(method.name)}-seed-{seed}"
    result = _run(method.path, (*method.settings, f"seed={seed}"), folder)
    best = result["best"]
    retrained = _retrained(method, best["arch"], seed, compare, out, folder.name)
    ranking, own = _measured(method, seed, folder, reference, Arch(best["arch"]), metric)
    return {
        "method": method.name,
        "seed": seed,
        "inherited": best["metrics"].get(metric, own),
        "test": None if "retrain" in method.spec.algorithm.stages else best["test"].get(metric),
        "retrained": retrained["best"]["test"].get(metric),
        "flops": best["metrics"]["flops"],
        "training_flops": method.flops,
        "seconds": {**result["seconds"], "trained again": sum(retrained["seconds"].values())},
        "ranking": ranking,
    }


def _retrained(
    method: Opened, arch: Mapping[str, Any], seed: int, compare: Compare, out: Path, name: str
) -> dict[str, Any]:
    space = method.spec.space.fix(arch).to_table()
    file = _alone_file(method, compare, out, f"{name}-retrained", {"space": space})
    return _run(file, (f"seed={seed}",), out / f"{name}-retrained")


def _measured(
    method: Opened, seed: int, folder: Path, reference: Sequence[Trial], found: Arch, metric: str
) -> tuple[list[float] | None, float | None]:
    """Return what a method says of the references, more being better, and the metric that it measures of its own arch.

    None for a method that ranks none. One that finds its arch while it trains says what its supernet does.
    """
    spec = open_spec(method.path, (*method.settings, f"seed={seed}"))[0]
    kinds = {row["type"] for row in spec.to_table(method.catalogue)["evaluators"]}
    if not {"search", "train"} & {*spec.algorithm.stages} or "stand_alone" in kinds:
        return None, None
    archs = [*(Arch(dict(trial.arch)) for trial in reference), found]
    file = folder.with_name(f"{folder.name}.ranking.json")
    digest = hashlib.sha256("".join(arch.digest for arch in archs).encode()).hexdigest()
    if file.exists() and (known := json.loads(file.read_text(encoding="utf-8")))["archs"] == digest:
        return known["gains"], known["found"]
    prepared = prepare(spec)
    goals = prepared.objectives.objectives or [
        Objective(m, prepared.metrics[m].direction) for m in {metric} & {*prepared.metrics}
    ]
    if not goals:
        return None, None
    supernet = load_supernet(prepared, folder) if prepared.has_supernet else None
    # Constraints are for the search; here every reference is ranked.
    free = attrs.evolve(prepared, targets=[attrs.evolve(target, constraints=()) for target in prepared.targets])
    *trials, own = start_trial_runner(free, 0, supernet)([Trial(arch) for arch in archs])
    gains = [goals[0].gain(trial.metrics) if trial.ok else float("-inf") for trial in trials]
    _replace(file, {"archs": digest, "gains": gains, "found": own.metrics.get(metric)})
    return gains, own.metrics.get(metric)


def _constraining(first: Opened) -> list[dict[str, Any]]:
    """Return the evaluators of what a search constrains that training alone does not measure: a latency, an energy."""
    table, task = first.spec.to_table(first.catalogue), first.spec.task.start(np.random.default_rng(0), data=False)
    asked = table["search"]["constraints"]
    names = {name for window in (asked if isinstance(asked, list) else [asked]) for name in window}
    given = [{*evaluator.provides(task)} for evaluator in first.spec.evaluators]
    return [
        row for row, own in zip(table["evaluators"], given, strict=True) if own & names and not own & {*task.metrics}
    ]


def _baseline(
    name: str, first: Opened, seed: int, compare: Compare, out: Path, metric: str, budget: float, one: float
) -> dict[str, Any]:
    """Run a baseline with one seed: random archs, each trained alone, or the largest network."""
    trials = max(1, int(budget / one)) if name == RANDOM else 0
    folder = f"{_file_name(name)}-seed-{seed}"
    if trials:
        search = first.spec.to_table(first.catalogue)["search"]
        changes = {
            "algorithm": {"type": "alone"},
            "searcher": {"type": "random"},
            "evaluators": [*_constraining(first), {"type": "stand_alone"}],
            "search": {"trials": trials, "objectives": [metric], "constraints": search["constraints"]},
        }
    else:
        changes = {"space": first.spec.space.fix(first.spec.space.largest()).to_table()}
    result = _run(_alone_file(first, compare, out, folder, changes), (f"seed={seed}",), out / folder)
    best = result["best"]
    return {
        "method": name,
        "seed": seed,
        "inherited": best["metrics"].get(metric),
        "test": None,
        "retrained": best["test"].get(metric),
        "flops": best["metrics"]["flops"],
        "training_flops": trials * one,
        "seconds": result["seconds"],
        "ranking": None,
    }
