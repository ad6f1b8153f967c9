"""A population of archs as columns: errors, costs and variables, read from runs and from files."""

from __future__ import annotations

import csv
import fnmatch
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import tomli
from attrs import field, frozen

from corenas.errors import Fault, UserError, collecting, did_you_mean, raise_if_any, regular
from corenas.objectives import Trial
from corenas.space import Arch, SearchSpace, flatten
from corenas.store import Store
from corenas_tool_sweep.settings import Filter, Sweep

_NO_VARIABLES = {"seconds", "state", "fidelity", "arch", "search", "error", "seed", ""}
"""Columns of a file that are neither metrics nor variables."""


Curve = Sequence[tuple[float, float]]


@frozen(eq=False)
class Column:
    """A variable of all archs of a population.

    values: (n,) numbers, or strings
    active: (n,) whether an arch uses it, and it is known
    choices: all that there are, in order; none of a continuous one
    """

    values: np.ndarray
    active: np.ndarray
    choices: Sequence[Any] = ()

    @property
    def ordered(self) -> bool:
        """Whether its values are numbers."""
        return self.values.dtype != object

    def take(self, some: np.ndarray) -> Column:
        """Return it for some archs."""
        return Column(self.values[some], self.active[some], self.choices)

    def codes(self) -> np.ndarray:
        """Return the number of each value among the choices, (n,); 0 where it is not active."""
        places = {choice: code for code, choice in enumerate(self.choices)}
        pairs = zip(self.values.tolist(), self.active.tolist(), strict=True)
        return np.array([places[value] if on else 0 for value, on in pairs], np.int64)


@frozen(eq=False)
class Population:
    """Archs with what was measured of them.

    errors: (n,) smaller is better; a failed arch has the worst there can be
    failed: (n,) which have failed
    costs, variables: name -> (n,) or its column
    weights: (n,) of the plain distribution; equal, unless archs were drawn with unequal chances
    metric, unit: what the errors are made of
    sampled: whether the archs were drawn at random, so that they stand for the space
    measured: how, in words: "supernet proxy"
    images: how many samples an error was measured on, where that is known
    counts: what became of the others: name -> archs
    repeats: standard deviation of an error over seeds, where archs were measured more than once
    curves: of each arch (share of its training, error), from early to late, the end included; empty where only that
        was measured
    epochs: of a whole training, where that is known
    accepted: share of what was drawn that has the structure asked for and fits the space
    """

    name: str
    errors: np.ndarray
    failed: np.ndarray
    costs: Mapping[str, np.ndarray]
    variables: Mapping[str, Column]
    weights: np.ndarray
    metric: str
    unit: str
    sampled: bool
    measured: str
    images: int | None = None
    space: SearchSpace | None = None
    counts: Mapping[str, int] = field(factory=dict)
    repeats: float | None = None
    curves: Sequence[Curve] = ()
    epochs: int | None = None
    accepted: float | None = None

    def __len__(self) -> int:
        return len(self.errors)

    def take(self, some: np.ndarray) -> Population:
        """Return the population of some archs: a boolean (n,), or their indices."""
        weights = self.weights[some]
        curves = [self.curves[i] for i in np.arange(len(self))[some]] if self.curves else ()
        return attrs.evolve(
            self,
            errors=self.errors[some],
            failed=self.failed[some],
            costs={name: cost[some] for name, cost in self.costs.items()},
            variables={key: column.take(some) for key, column in self.variables.items()},
            weights=weights / weights.sum() if len(weights) else weights,
            curves=curves,
        )

    def rows(self) -> list[tuple[str, ...]]:
        """Return each arch by the choices that it uses, so that equal archs are equal."""
        columns = [
            [str(value) if on else "" for value, on in zip(c.values.tolist(), c.active.tolist(), strict=True)]
            for c in self.variables.values()
        ]
        return [*zip(*columns, strict=True)]

    def asked(self, patterns: Sequence[str], derived: Iterable[str]) -> list[str]:
        """Return which variables a sweep asks about. Raises UserError if no name matches."""
        keys = [key for key in self.variables if any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)]
        keys = [*dict.fromkeys([*keys, *derived])]
        if not keys and self.variables:
            hint = did_you_mean("", self.variables, "variables")
            raise UserError(f"no variable is called {' or '.join(patterns)}", key=("variables",), hint=hint)
        return keys

    def numbers(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return a cost, a variable or the error, and where it is known. Raises UserError if there is none."""
        if name in self.variables:
            return self.variables[name].values, self.variables[name].active
        known = {**self.costs, "error": self.errors, "done": 1.0 - self.failed}
        if name not in known:
            hint = did_you_mean(name, [*self.variables, *known], "columns")
            raise UserError(f"{self.name} has no {name!r}", hint=hint)
        return known[name], np.isfinite(known[name])

    def kept(self, wanted: Mapping[str, Filter]) -> np.ndarray:
        """Return which archs pass a filter, all of its keys: (n,). Raises UserError for a key that is none."""
        keep = np.ones(len(self), bool)
        faults: list[Fault] = []
        for key, bounds in wanted.items():
            with collecting(faults, key):
                values, active = self.numbers(key)
                if isinstance(bounds[0], str):
                    keep &= active & np.isin(values.astype(str), bounds)
                elif values.dtype == object:
                    raise UserError(f"{key!r} has no numbers: expected a list of strings")
                else:
                    keep &= active & (values >= bounds[0]) & (values <= bounds[-1])
        raise_if_any(faults)
        return keep


# -- reading ----------------------------------------------------------------------------------------------------------


def read_populations(sweep: Sweep) -> list[Population]:
    """Return what a sweep compares, filtered and split. Raises UserError with all mistakes."""
    populations: list[Population] = []
    faults: list[Fault] = []
    for name in sweep.input:
        with collecting(faults):
            populations.append(_derived(read_population(Path(name), sweep), sweep.derived))
    raise_if_any(faults)
    if not populations:
        raise UserError("no population to look at", hint="a run directory or a CSV file: corenas sweep runs/a b.csv")
    populations = _with_distinct_names(populations)
    for population, wanted in itertools.product(populations, sweep.filters):
        with collecting(faults, "sweep"):
            population.kept(wanted)
    raise_if_any(faults)
    filtered = [_filtered(population, sweep.filter, population.name, "filtered") for population in populations]
    if not sweep.split:
        return filtered
    several = len(filtered) > 1
    return [
        _filtered(population, wanted, f"{population.name}: {part}" if several else part, "in other parts")
        for population in filtered
        for part, wanted in sweep.split.items()
    ]


def _filtered(population: Population, wanted: Mapping[str, Filter], name: str, word: str) -> Population:
    keep = population.kept(wanted)
    if not keep.any():
        hint = "bounds are in raw units: flops as 360e6, a learning rate as 0.1 (pycls writes 0.36 and -1)"
        raise UserError(f"nothing is left of {name}: no arch passes {dict(wanted)}", hint=hint)
    counts = {**population.counts, word: int((~keep).sum())} if wanted else population.counts
    return attrs.evolve(population.take(keep), name=name, counts=counts)


def _with_distinct_names(populations: Sequence[Population]) -> list[Population]:
    names: dict[str, int] = {}
    result = []
    for population in populations:
        names[population.name] = names.get(population.name, 0) + 1
        count = names[population.name]
        result.append(attrs.evolve(population, name=f"{population.name} {count}") if count > 1 else population)
    return result


def read_population(path: Path, sweep: Sweep) -> Population:
    """Return the population of a run directory or of a file. Raises UserError if it holds none."""
    if path.is_dir():
        return _of_run(path, sweep)
    if path.suffix in (".csv", ".json"):
        return _of_file(path, sweep)
    raise UserError("expected a run directory, a .csv or a .json file", file=str(path))


def _of_run(folder: Path, sweep: Sweep) -> Population:
    if not (folder / "run.sqlite").is_file():
        raise UserError("no run in this folder", file=str(folder), hint="it has no run.sqlite")
    store = Store(folder / "run.sqlite", readonly=True)
    try:
        spec, metrics, objectives = store.get("spec") or {}, store.get("metrics") or {}, store.get("objectives") or {}
        images = (store.get("splits") or {}).get("valid")
        space = SearchSpace.from_table(spec.get("space", {}))
        store.check_trials(space)
        distinct = {(trial.arch, trial.fidelity): trial for trial in store.trials()}
    finally:
        store.close()
    name, metric = folder.resolve().name, sweep.error
    if metric is None:
        goals = objectives.get("objectives") or [{"metric": "top1"}]
        metric = goals[0]["metric"]
    whole = [trial for trial in distinct.values() if trial.fidelity == 1]
    known = {key for trial in whole for key in trial.metrics}
    if metric not in known:
        raise UserError(f"no trial has {metric!r}", file=str(folder), hint=did_you_mean(metric, known, "metrics"))
    told = metrics.get(metric, {})
    trials = [t for t in whole if t.state == "failed" or (t.ok and math.isfinite(t.metrics.get(metric, math.nan)))]
    direction, unit = told.get("direction", "max"), told.get("unit", "")
    failed = np.array([not trial.ok for trial in trials])
    found = np.array([trial.metrics.get(metric, np.nan) if trial.ok else np.nan for trial in trials], float)
    inclusion = np.array([float(trial.extra.get("inclusion", 1.0)) for trial in trials])
    counts = {
        "of a lower fidelity": len(distinct) - len(whole),
        "infeasible or stopped": len(whole) - len(trials),
        "failed": int(failed.sum()),
    }
    return Population(
        name,
        _errors(found, failed, direction, unit),
        failed,
        {c: _numbers([t.metrics.get(c) for t in trials]) for c in sweep.complexity if c in known},
        {**_columns_of_space(space, [trial.arch for trial in trials]), **_columns_of_facts(trials)},
        (1 / inclusion) / (1 / inclusion).sum(),
        metric,
        unit,
        (spec.get("searcher") or {}).get("type") in ("random", "stratified"),
        _how(spec, folder),
        images if told.get("share") else None,
        space,
        {word: count for word, count in counts.items() if count},
        curves=_curves(trials, [*distinct.values()], metric, direction, unit),
        epochs=None if spec.get("supernet") else (spec.get("train") or {}).get("epochs"),
        accepted=next((trial.extra["accepted"] for trial in trials if "accepted" in trial.extra), None),
    )


def _how(spec: Mapping[str, Any], folder: Path) -> str:
    if any(evaluator.get("type") == "stand_alone" for evaluator in spec.get("evaluators", ())):
        return "trained alone"
    return "supernet proxy" if (folder / "supernet.pt").exists() or spec.get("supernet") else "proxy"


def _errors(found: np.ndarray, failed: np.ndarray, direction: str, unit: str) -> np.ndarray:
    """Return errors: 100 - accuracy of percents; what failed has the worst there can be, or the worst that was seen."""
    whole = {"%": 100.0, "share": 1.0}.get(unit)
    errors = found if direction == "min" else -found if whole is None else whole - found
    errors = errors * 100 if unit == "share" else errors
    worst = np.nanmax(errors) if whole is None and len(errors) else 100.0
    return np.where(failed, worst, errors)


def _curves(trials: Sequence[Trial], known: Sequence[Trial], metric: str, direction: str, unit: str) -> Sequence[Curve]:
    """Return how the error of each arch fell while it was trained.

    From what its trial kept of the way (`stand_alone` with `curve`), and from trials of a lower fidelity.
    """
    found: dict[Arch, dict[float, float]] = {trial.arch: {} for trial in trials if trial.ok}
    for trial in known:
        if trial.arch in found and trial.ok and math.isfinite(trial.metrics.get(metric, math.nan)):
            kept = trial.extra.get("curve") or {}
            found[trial.arch] |= dict(zip(kept.get("share", ()), kept.get(metric, ()), strict=False))
            found[trial.arch][trial.fidelity] = trial.metrics[metric]
    if not any(len(points) > 1 for points in found.values()):
        return ()
    curves = []
    for trial in trials:
        points = sorted(found.get(trial.arch, {}).items())
        values = np.array([value for _, value in points], float)
        errors = _errors(values, np.zeros(len(points), bool), direction, unit).tolist()
        curves.append(
            [(share, error) for (share, _), error in zip(points, errors, strict=True)] if len(points) > 1 else []
        )
    return curves


def _numbers(items: Iterable[Any]) -> np.ndarray:
    return np.array([np.nan if item is None or item == "" else float(item) for item in items], float)


def _columns_of_space(space: SearchSpace, archs: Sequence[Arch]) -> dict[str, Column]:
    active = space.active(space.encode(archs))
    columns = {}
    for place, key in enumerate(space.keys):
        variable = space[key]
        values = [arch[key] for arch in archs]
        numeric = not isinstance(variable.choices[0], str | bool)
        array = np.array(values, float) if numeric else np.array([str(value) for value in values] or [""], object)
        choices = [] if variable.continuous else [float(c) if numeric else str(c) for c in variable.choices]
        choices = sorted(choices) if numeric else choices
        columns[key] = Column(array[: len(values)], active[:, place], choices)
    return columns


def _columns_of_facts(trials: Sequence[Trial]) -> dict[str, Column]:
    """Return what archs were made from, such as the numbers of a RegNet."""
    facts = [trial.extra.get("variables") or {} for trial in trials]
    return {key: _column([row.get(key) for row in facts]) for key in dict.fromkeys(itertools.chain(*facts))}


def _of_file(path: Path, sweep: Sweep) -> Population:
    rows = _rows(path)
    metric = sweep.error or next((name for name in ("top1", "accuracy", "error") if name in rows[0]), None)
    names = [*dict.fromkeys(name for row in rows for name in row)]
    if metric is None or metric not in names:
        hint = did_you_mean(metric or "", names, "columns")
        raise UserError(f"no column {metric or 'top1'!r} to rank archs by", file=str(path), key=("error",), hint=hint)
    other = {*sweep.complexity, metric, *_NO_VARIABLES}
    keys = [name for name in names if name not in other]
    rows = [row for row in rows if str(row.get("fidelity") or 1) in ("1", "1.0")]
    rows = [row for row in rows if row.get("state") in (None, "", "done", "failed")]
    rows, repeats = _averaged(rows, metric, keys) if "seed" in names else (rows, None)
    found = _column_of_numbers([row.get(metric) for row in rows], path, metric)
    failed = ~np.isfinite(found)
    if failed.all():
        raise UserError("no row has a result", file=str(path))
    space = None
    if sweep.space is not None:
        space = SearchSpace.from_table(tomli.loads(regular(Path(sweep.space)).read_text(encoding="utf-8")))
        known = [{key: row[key] for key in space.keys if row.get(key) not in (None, "")} for row in rows]
        archs = [space.arch({key: _read(item) for key, item in row.items()}) for row in known]
        columns = _columns_of_space(space, archs)
    else:
        columns = {key: _column([row.get(key) for row in rows]) for key in keys}
    return Population(
        path.stem,
        _errors(found, failed, sweep.direction, sweep.unit),
        failed,
        {c: _column_of_numbers([row.get(c) for row in rows], path, c) for c in sweep.complexity if c in names},
        columns,
        np.full(len(rows), 1 / len(rows)),
        metric,
        sweep.unit,
        True,
        "from a file",
        sweep.images,
        space,
        {"failed": int(failed.sum())} if failed.any() else {},
        repeats,
    )


def _rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file. Raises UserError if there are none."""
    try:
        if path.suffix == ".json":
            content = json.loads(regular(path).read_text(encoding="utf-8"))
            rows = [flatten(row, lists=False) for row in content if isinstance(row, dict)]
        else:
            with regular(path).open(newline="", encoding="utf-8-sig") as file:
                rows = [*csv.DictReader(file)]
    except OSError as error:
        raise UserError(error.strerror or str(error), file=str(path)) from None
    except (ValueError, csv.Error) as error:
        raise UserError(f"this is no {path.suffix[1:].upper()}: {error}", file=str(path)) from None
    if not rows or not isinstance(rows[0], dict):
        raise UserError("no rows in this file", file=str(path), hint="a header, then a row for each arch")
    return rows


def _averaged(rows: Sequence[Mapping[str, Any]], metric: str, keys: Sequence[str]) -> tuple[list[Any], float | None]:
    """Return one row for each arch, its metric averaged over seeds, and the spread of one measurement."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    averaged, variances = [], []
    for same in groups.values():
        numbers = [float(row[metric]) for row in same if row.get(metric) not in (None, "")]
        averaged.append({**same[0], metric: sum(numbers) / len(numbers) if numbers else None})
        if len(numbers) > 1:
            variances.append(np.var(numbers, ddof=1))
    return averaged, math.sqrt(np.mean(variances)) if variances else None


def _read(text: Any) -> Any:
    """Return what a cell says, as TOML would read it; any other text as it is."""
    if not isinstance(text, str):
        return text
    try:
        return tomli.loads(f"x = {text.lower() if text in ('True', 'False') else text}")["x"]
    except (ValueError, RecursionError):
        return text


def _column_of_numbers(items: Sequence[Any], path: Path, name: str) -> np.ndarray:
    try:
        return _numbers(items)
    except (TypeError, ValueError) as error:
        raise UserError(f"column {name!r} has no number: {error}", file=str(path)) from None


def _column(items: Sequence[Any]) -> Column:
    """Return a column of a file: of numbers, if all that is there are; an empty cell is an arch that has none."""
    active = np.array([item not in (None, "") for item in items])
    try:
        values = _numbers(items)
        active &= np.isfinite(values)
    except (TypeError, ValueError):
        values = np.empty(len(items), object)
        values[:] = ["" if item is None else str(item) for item in items]
    return Column(values, active, sorted({*values[active].tolist()}))


def _derived(population: Population, rules: Mapping[str, Mapping[str, str]]) -> Population:
    """Return a population with variables made of others."""
    columns = {**population.variables}
    for key, rule in rules.items():
        ((how, pattern),) = rule.items()
        parts = [column for name, column in population.variables.items() if fnmatch.fnmatchcase(name, pattern)]
        if not parts or not all(part.ordered for part in parts):
            raise UserError(f"no variables of numbers are called {pattern!r}", key=("derived", key))
        values = np.where([part.active for part in parts], [part.values for part in parts], np.nan)
        active = np.isfinite(values).any(0)
        values = np.where(active, values, 0.0)
        made = _RULES[how](values, 0)
        columns[key] = Column(np.where(active, made, np.nan), active, sorted({*made[active].tolist()}))
    return attrs.evolve(population, variables=columns)


def _rising(values: np.ndarray, axis: int) -> np.ndarray:
    """Return 1 for each arch whose values, those that it uses, never fall."""
    return np.array([float((np.diff(column[np.isfinite(column)]) >= 0).all()) for column in values.T])


_RULES = {"sum": np.nansum, "mean": np.nanmean, "max": np.nanmax, "min": np.nanmin, "rising": _rising}
"""How a variable is made of others, by the names that `settings.DERIVED` has."""
