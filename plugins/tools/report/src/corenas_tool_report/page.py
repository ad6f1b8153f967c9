"""What stands on a page, of one run or of several compared, and how the file is written."""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import tomli_w

import corenas
from corenas.errors import UserError
from corenas.objectives import Trial
from corenas.run.folder import OwnFiles
from corenas.run.trust import sentence
from corenas_tool_report import drawing, plots
from corenas_tool_report.plots import Plot
from corenas_tool_report.reading import COSTS, Found, Growth, Run, counting, growth, read_runs, trade_off
from corenas_tool_report.words import Html, duration, esc, exact, join, measured, number, plural, table, tag

MOST_DIFFERENCES = 200
"""Rows of the table of differences between specs."""


def write_report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page of a run, or that of several compared. Returns its file.

    Raises UserError for folders that hold no run and for a file that cannot be written.
    """
    runs = read_runs(folders)
    path = out or (runs[0].folder / "report.html" if len(runs) == 1 else Path("report.html"))
    text = run_page(runs[0]) if len(runs) == 1 else comparison_page(runs)
    if path.exists() and not path.is_file():  # a folder; or a device, in whose place the page would be
        raise UserError("this is no file", file=str(path), hint="corenas report RUN --out FILE")
    part = path.with_name(f"{path.name}.part")
    try:
        if out is None and len(runs) == 1:
            OwnFiles(runs[0].folder).claim(path.name, part.name)
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise UserError(
            f"cannot write this page: {error.strerror}", file=str(path), hint="corenas report RUN --out FILE"
        ) from error
    return path


# -- one run ----------------------------------------------------------------------------------------------------------


def run_page(run: Run) -> str:
    """The page of a run."""
    training = {stage: plots.curves(run, stage) for stage in run.curves}
    cloud, grown = plots.trials(run), growth(run)
    volume = plots.hypervolume(run, grown) if grown else None
    body = [
        tag("header", tag("h1", run.name), tag("p", _subtitle(run), class_="soft"), _notice(run), _tiles(run)),
        tag("main", _result(run), _trials(run, cloud), _fronts(run, grown, volume), _training(training), *_rest(run)),
    ]
    shown = [plot for some in training.values() for plot in some]
    return _document(run.name, body, [*shown, *(plot for plot in (cloud, volume) if plot)])


def _rest(run: Run) -> list[Html]:
    return [_asked(run), _data(run), _time(run)]


def _subtitle(run: Run) -> str:
    parts = [f"a run of corenas in {run.folder}"]
    parts += [f"{key} {_type(run.spec[key])}" for key in ("algorithm", "searcher") if run.spec.get(key)]
    return " · ".join(parts)


def _notice(run: Run) -> Html:
    if run.finished:
        return Html()
    n, wanted = len(run.all_trials), run.spec.get("search", {}).get("trials")
    far = [f"{plural(n, 'trial')}{f' of {wanted:,}' if isinstance(wanted, int) and len(run.trials) == 1 else ''}"]
    far += [f"{plural(len(curve), 'point')} of the curve of {stage}" for stage, curve in run.curves.items()]
    text = f"This page shows what there was when it was written: {', '.join(far)}. To go on, start the run again."
    return tag("p", tag("strong", "This run is not finished. "), text, class_="notice", role="status")


def _tiles(run: Run) -> Html:
    tiles: list[tuple[Any, Any, Any]] = []
    if len(run.founds) == 1:
        found, y = run.founds[0], run.objective
        if y is not None and y in found.metrics:
            text = "in the search" if run.finished else "best so far"
            tiles.append((y, measured(found.metrics[y], run.unit(y), run.noisy(y, _split(run))), text))
        first = y if y in found.test else next(iter(found.test), None)
        if first is not None:
            text = measured(found.test[first], run.unit(first), run.noisy(first, "test"))
            tiles.append((f"{first} on test data", text, _touched(run)))
        costs = _costs(found)
        tiles += [(name, exact(costs[name]), "of the best arch") for name in COSTS[:2] if name in costs]
    counts = Counter(trial.state for trial in run.all_trials)
    if run.all_trials:
        rest = ", ".join(f"{n} {state}" for state, n in counts.items() if state != "done")
        tiles.append(("trials", f"{len(run.all_trials):,}", rest or "all done"))
    if run.seconds:
        tiles.append(("time", duration(sum(run.seconds.values())), f"on {run.device}" if run.device else ""))
    each = [tag("div", tag("dt", name), tag("dd", value, tag("small", text))) for name, value, text in tiles]
    return tag("dl", *each, class_="tiles") if tiles else Html()


def _result(run: Run) -> Html:
    several = len(run.searches) > 1
    if not run.founds:
        return _section("Result", tag("p", "Nothing was found so far."))
    parts: list[Any] = []
    if several:
        parts += [_searches(run), tag("p", _on_what(run), class_="soft")]
    for found in run.founds:
        parts.append(tag("h3", found.constraints or "without constraints") if several else "")
        parts += _found(run, found, open_=not several)
    return _section("Result" if run.finished else "Best so far", *parts)


def _searches(run: Run) -> Html:
    """The results of several searches, a row each."""
    names = _measured_names(run.founds)
    head = [
        "constraints",
        "arch",
        *(f"{name}, search" for name in names),
        *(f"{name}, test" for name in names),
        *COSTS[:2],
        "folder",
    ]
    rows = []
    for found in run.founds:
        costs = _costs(found)
        rows.append(
            [
                found.constraints or "none",
                tag("code", found.arch.digest),
                *_figures(run, found, names),
                *(exact(costs[name]) if name in costs else "–" for name in COSTS[:2]),
                found.folder.name if found.folder else "–",
            ]
        )
    missing = len(run.searches) - len(run.founds)
    text = f"{plural(missing, 'search')} found nothing." if missing > 0 and run.finished else ""
    return join([table("results of the searches", head, rows, "wide"), tag("p", text) if text else ""])


def _figures(run: Run, found: Found, names: Sequence[str]) -> list[Any]:
    """Metrics of the search, then those on test data."""
    sides = ((found.metrics, _split(run)), (found.test, "test"))
    return [
        measured(figures[n], run.unit(n), run.noisy(n, split)) if n in figures else "–"
        for figures, split in sides
        for n in names
    ]


def _measured_names(founds: Iterable[Found]) -> list[str]:
    """Metrics that are no costs."""
    names = dict.fromkeys(name for found in founds for name in (*found.metrics, *found.test))
    return [name for name in names if name not in COSTS]


def _found(run: Run, found: Found, open_: bool) -> list[Any]:
    """The picture of an arch, its metrics, its cost, and how to load it."""
    parts: list[Any] = [tag("p", "Arch ", tag("code", found.arch.digest))]
    try:
        parts += [drawing.picture(run.space, found.arch)] if run.space else []
    except (KeyError, ValueError):  # an arch of another space than the spec's
        parts.append(tag("p", "This arch is none of the spec's space.", class_="soft"))
    names = _measured_names([found])
    kind, valid, test = _kind(run), run.samples(_split(run)), run.samples("test")
    if names:
        head = [
            f"in the search{f': {valid:,} {_split_word(run)} {kind}' if valid else ''}",
            f"test: {f'{test:,} ' if test else ''}{kind}, {_touched(run)}",
        ]
        kept = [any(name in metrics for name in names) for metrics in (found.metrics, found.test)]
        rows = [["metric", *head], *([name, *_figures(run, found, [name])] for name in names)]
        rows = [[row[0], *itertools.compress(row[1:], kept)] for row in rows]
        parts.append(table("what was measured", rows[0], rows[1:]))
    parts.append(tag("p", _on_what(run), class_="soft") if open_ and names else "")
    costs = _costs(found)
    if costs:
        text = [f"of {found.card['convention']}"] if "convention" in found.card else []
        text += [f"input {'×'.join(map(str, found.card['input']))}"] if "input" in found.card else []
        parts.append(table("cost", [*costs], [[exact(x) for x in costs.values()]]))
        parts.append(tag("p", f"The cost is that {'; '.join(text)}.", class_="soft") if text else "")
    choices = [[key, esc(choice)] for key, choice in found.arch.items()]
    parts.append(_details("All choices of this arch", table("choices", ["variable", "choice"], choices, seen=False)))
    loading = _loading(found)
    if loading:
        parts.append(tag("h3", "How to load it") if open_ else "")
        parts += [loading] if open_ else [_details("How to load it", loading)]
    return parts


def _costs(found: Found) -> dict[str, float]:
    return {name: value for name in COSTS for value in [found.card.get(name, found.metrics.get(name))] if value}


def _loading(found: Found) -> Html | None:
    """Code to copy, for the formats that are there."""
    if found.folder is None or not found.files():
        return None
    names = {path.name for path in found.files()}

    def quoted(name: str = "") -> str:
        assert found.folder
        return json.dumps((found.folder / name).as_posix(), ensure_ascii=False)

    parts: list[Any] = []
    if {"network.py", "network.safetensors"} <= names:
        parts.append(
            tag(
                "pre",
                tag(
                    "code",
                    f"""import sys
from safetensors.torch import load_file

sys.path.insert(0, {quoted()})
from network import Network

network = Network().eval()
network.load_state_dict(load_file({quoted("network.safetensors")}))""",
                ),
            )
        )
    if "network.pt2" in names:
        code = f"import torch\n\nnetwork = torch.export.load({quoted('network.pt2')}).module()"
        parts += [tag("p", "or, as one file:") if parts else "", tag("pre", tag("code", code))]
    listed = [f"{path.name} ({number(path.stat().st_size)}B)" for path in found.files() if path.is_file()]
    parts.append(tag("p", f"In {found.folder}: {', '.join(listed)}.", class_="soft"))
    prepared = found.card.get("preprocessing") or {}
    if prepared:
        facts = [(key, _plain(x)) for key, x in prepared.items()]
        parts += [tag("p", "Its input is prepared like this:"), _facts(facts)]
    return join(parts)


def _on_what(run: Run) -> str:
    """On which data figures were measured, in words."""
    kind, split, valid, test = _kind(run), _split_word(run), run.samples(_split(run)), run.samples("test")
    words = []
    if any(found.metrics.keys() - {*COSTS} for found in run.founds):
        words.append(
            f"Figures of the search were measured on {f'{valid:,} ' if valid else ''}{split} {kind}; the arch was "
            "chosen by them, so that they are likely a little too good."
        )
    if any(found.test for found in run.founds):
        again = ", trained from scratch," if "retrain" in run.curves else ""
        words.append(
            f"Test figures are those of the exported network{again} on {f'{test:,} ' if test else ''}other {kind}, "
            f"{_touched(run)}, when all choices had been made."
        )
        for found in run.founds:
            for name, mean in found.seeds.get("mean", {}).items():
                n, sd = len(found.seeds["test"]), found.seeds["sd"][name]
                words.append(
                    f"Trained with {n} seeds, its mean {name} on test data is {mean:.2f} {run.unit(name)}, with a "
                    f"standard deviation of {sd:.2f} between seeds: the figure to report."
                )
    elif not run.finished:
        words.append(f"Test {kind} were not touched so far.")
    if any(run.noisy(name, split) for name in _measured_names(run.founds) for split in ("test", _split(run))):
        formula = "√(p\u00a0(100\u00a0−\u00a0p)\u00a0/\u00a0n)"
        words.append(f"What stands behind ± is one binomial standard error, the noise of so few {kind}: {formula}.")
    return " ".join(words)


def _touched(run: Run) -> str:
    """How often test data was looked at, as far as this run knows."""
    before = (run.spec.get("supernet") or {}).get("from")
    often = f"once for each of {len(run.founds)} searches" if len(run.founds) > 1 else "once"
    return f"touched {often} here, and by the run {before} before" if before else f"touched {often}"


def _split(run: Run) -> str:
    """The split that evaluators measure on."""
    named = {e["split"] for e in run.spec.get("evaluators") or [] if isinstance(e, dict) and "split" in e}
    return str(named.pop()) if len(named) == 1 else "valid"


def _split_word(run: Run) -> str:
    return {"valid": "validation", "train": "training"}.get(_split(run), _split(run))


def _kind(run: Run) -> str:
    """What a data set holds."""
    return "images" if any(len(found.card.get("input", ())) == 3 for found in run.founds) else "samples"


def _trials(run: Run, cloud: Plot | None) -> Html:
    trials = run.all_trials
    if not trials:
        return _section("Trials", tag("p", "There are no trials."))
    counts = Counter(trial.state for trial in trials)
    words = [f"{n:,} {state}" for state in ("done", "infeasible", "failed", "stopped") for n in [counts[state]] if n]
    partly = sum(trial.fidelity < 1 for trial in trials)
    words += [f"{partly:,} of them with a part of the effort"] if partly else []
    parts: list[Any] = [tag("p", f"{plural(len(trials), 'trial')}: {', '.join(words)}.")]
    if cloud:
        metric = cloud.menu[0]["label"]
        caption = "Each point is a trial; point at it to see its arch. The line joins what no other trial beats."
        parts.append(cloud.html(caption))
        front = trade_off(run, trials, metric)
        names = [str(run.objective), *plots.metrics_of([run], str(run.objective))]
        rows = [
            [tag("code", t.arch.digest), *(_cell(run, name, t.metrics) for name in names), duration(t.seconds)]
            for t in front
        ]
        text = f"The front against {metric} as a table ({plural(len(rows), 'trial')})"
        parts.append(_details(text, table(text, ["arch", *names, "measured in"], rows, "wide", seen=False)))
    if told := _rounds(trials):
        text = "What the searcher said of its predictions, round by round"
        parts.append(_details(text, table(text, [*told[0]], [[*map(_fact, row.values())] for row in told], seen=False)))
    if run.trust:
        parts.append(tag("p", sentence(run.trust), "."))
    failed = [trial for trial in trials if trial.state == "failed"]
    if failed:
        rows = [[tag("code", trial.arch.digest), trial.error or "unknown"] for trial in failed]
        text = f"Why {plural(len(failed), 'trial')} failed"
        parts.append(_details(text, table(text, ["arch", "error"], rows, seen=False)))
    return _section("Trials", *parts)


def _fronts(run: Run, grown: Growth | None, volume: Plot | None) -> Html:
    """The fronts of all objectives, as tables, and how they grew."""
    if grown is None or volume is None:
        return Html()
    named = {goal.metric: goal.direction for goal in run.objectives.objectives}
    reference = ", ".join(f"{name} {_text(run, name, x)}" for name, x in grown.reference.items())
    ideal = ", ".join(f"{name} {_text(run, name, x)}" for name, x in grown.ideal.items())
    caption = (
        f"Hypervolume: what the front beats of the box between the reference point ({reference}: the worst of each "
        f"objective among the trials that count) and the best of each ({ideal})."
    )
    parts: list[Any] = [volume.html(caption)]
    for text, trials in zip(run.searches, run.trials, strict=True):
        front = run.objectives.front(counting(run.objectives, trials))
        front.sort(key=lambda trial: run.objectives.objectives[0].gain(trial.metrics), reverse=True)
        names = [*named, *(name for name in plots.metrics_of([run], str(run.objective)) if name not in named)]
        rows = [
            [n, tag("code", trial.arch.digest), *(_cell(run, name, trial.metrics) for name in names)]
            for n, trial in enumerate(front, 1)
        ]
        what = f"The front of {', '.join(named)}{f' under {text}' if len(run.searches) > 1 and text else ''}"
        title = f"{what} ({plural(len(rows), 'trial')})"
        parts.append(_details(title, table(title, ["", "arch", *names], rows, "wide", seen=False)))
    return _section("Front", *parts)


def _text(run: Run, name: str, value: float) -> str:
    return measured(value, "%") if run.unit(name) == "%" else number(value)


def _rounds(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """What the trials of each round of a searcher have in common beside their metrics, a row for each round."""
    groups: dict[int, list[Mapping[str, Any]]] = {}
    for trial in trials:
        if isinstance(trial.extra.get("round"), int):
            groups.setdefault(trial.extra["round"], []).append(trial.extra)
    keys = dict.fromkeys(key for group in groups.values() for extra in group for key in extra)
    shared = [
        key for key in keys if all(len({repr(extra.get(key)) for extra in group}) == 1 for group in groups.values())
    ]
    return [{key: group[0].get(key) for key in shared} for group in groups.values()] if len(shared) > 1 else []


def _fact(value: Any) -> str:
    return "–" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def _cell(run: Run, name: str, metrics: Mapping[str, float]) -> Any:
    if name not in metrics:
        return "–"
    return exact(metrics[name]) if run.unit(name) != "%" else measured(metrics[name], "%")


def _training(training: Mapping[str, Sequence[Plot]]) -> Html:
    parts: list[Any] = []
    for stage, some in training.items():
        parts.append(tag("h3", stage) if len(training) > 1 else "")
        parts.append(tag("div", *(plot.html() for plot in some), class_="plots"))
    return _section("Training", *parts) if parts else Html()


def _asked(run: Run) -> Html:
    spec = run.spec
    search = spec.get("search") or {}
    rows: list[tuple[str, Any]] = []
    data = (spec.get("task") or {}).get("data")
    for key in ("task", "data", "backbone", "algorithm", "distiller", "mutator", "searcher", "executor"):
        item = data if key == "data" else spec.get(key)
        if item:
            rows.append((key, _component(item, "data")))
    if spec.get("evaluators"):
        rows.append(("evaluators", join(map(_component, spec["evaluators"]), "<br>")))
    goals = run.objectives.objectives
    if goals:
        said = [
            f"{goal.metric}, {'more' if goal.direction == 'max' else 'less'} is better"
            + (f", weight {goal.weight:g}" if goal.weight != 1 else "")
            for goal in goals
        ]
        rows.append(("objectives", "; ".join(said) + (" (Pareto)" if run.objectives.pareto else "")))
    if run.all_trials or search:
        rows.append(("constraints", "; ".join(text or "none" for text in run.searches)))
    if search.get("trials"):
        rows.append(("trials", f"{search['trials']:,}"))
    if run.space:
        rows.append(("space", _space_text(run)))
    rows += [("train", _train_text(spec["train"]))] if spec.get("train") else []
    if any(stage.startswith("retrain") for stage in (*run.seconds, *run.curves)):
        rows.append(
            ("retrain", _train_text((spec.get("retrain") or {}).get("train") or {}) or "as the supernet was trained")
        )
    if (spec.get("supernet") or {}).get("from"):
        rows.append(("supernet", f"that of {spec['supernet']['from']}"))
    rows += [("seed", esc(spec["seed"]))] if "seed" in spec else []
    whole = tag("pre", tag("code", tomli_w.dumps(_without_none(spec))), tabindex="0")
    return _section("What was asked", _facts(rows), _details("The whole spec, with all defaults", whole))


def _component(item: Any, *hidden: str) -> Any:
    """A component's type with its options."""
    if not isinstance(item, Mapping):
        return esc(item)
    options = {key: x for key, x in item.items() if key not in ("type", *hidden) and isinstance(x, int | float | str)}
    text = ", ".join(f"{key} {_plain(x)}" for key, x in options.items())
    return join([item.get("type", ""), " ", tag("small", text)]) if text else esc(item.get("type", ""))


def _type(item: Any) -> str:
    return str(item.get("type", "")) if isinstance(item, Mapping) else str(item)


def _space_text(run: Run) -> str:
    assert run.space
    count = plural(len(run.space.variables), "variable")
    try:
        size = run.space.size
    except TypeError:
        return f"{count}, some continuous"
    return f"{size:,} archs, {count}" if size < 10**9 else f"{float(size):.2e} archs, {count}"


def _train_text(train: Mapping[str, Any]) -> str:
    words = [f"{train['epochs']} epochs"] if "epochs" in train else []
    words += [f"batches of {train['batch_size']}"] if "batch_size" in train else []
    optimizer = train.get("optimizer") or {}
    words += [f"{_type(optimizer)}, lr {optimizer.get('lr', '?')}"] if optimizer else []
    words += [f"{_type(train['schedule'])} schedule"] if train.get("schedule") else []
    return ", ".join(words)


def _without_none(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _without_none(x) for key, x in data.items() if x is not None}
    return [_without_none(x) for x in data if x is not None] if isinstance(data, list) else data


_USES = {
    "train": "trains the weights",
    "valid": "measures archs in the search",
    "test": "measures the exported network, at the end",
}


def _data(run: Run) -> Html:
    if not run.splits:
        return Html()
    rows = [[split, f"{n:,}", _USES.get(split, "")] for split, n in run.splits.items()]
    text = " ".join([f"{run.cut[:1].upper()}{run.cut[1:]}."] if run.cut else [])
    return _section(
        "Data", table("splits", ["split", _kind(run), "what it does"], rows, seen=False), tag("p", text, class_="soft")
    )


def _time(run: Run) -> Html:
    rows = [[stage, duration(seconds), run.device or "–"] for stage, seconds in run.seconds.items()]
    if rows:
        rows.append(["all", duration(sum(run.seconds.values())), ""])
    versions = [(str(name), esc(version)) for name, version in run.versions.items() if name != "device"]
    parts: list[Any] = (
        [table("time of each stage, over all sessions", ["stage", "time", "device"], rows)] if rows else []
    )
    parts += [tag("h3", "Versions"), _facts(versions)] if versions else []
    return _section("Time and versions", *parts) if parts else Html()


# -- several runs -----------------------------------------------------------------------------------------------------


def comparison_page(runs: Sequence[Run]) -> str:
    """The page of several runs."""
    counts = Counter(run.name for run in runs)
    names = [run.name if counts[run.name] == 1 else str(run.folder) for run in runs]
    goals = Counter(run.objective for run in runs if run.objective)
    objective = max(goals, key=goals.__getitem__) if goals else None
    plot = plots.fronts(runs, names, objective) if objective else None
    title = f"{len(runs)} runs compared"
    open_runs = [name for run, name in zip(runs, names, strict=True) if not run.finished]
    text = f"Not finished, shown as far as they have come: {', '.join(open_runs)}."
    head = [
        tag("h1", title),
        tag("p", " · ".join(names), class_="soft"),
        tag("p", text, class_="notice", role="status") if open_runs else "",
    ]
    others = [name for run, name in zip(runs, names, strict=True) if run.objective != objective]
    fronts: list[Any] = (
        [plot.html("What no other trial of the same run beats; point at it to see the arch.")]
        if plot
        else [tag("p", "There are no trials to plot.")]
    )
    fronts += [tag("p", f"Not in the plot, with another objective or none: {', '.join(others)}.")] if others else []
    main = [_section("Results", _runs_table(runs, names)), _section("Fronts", *fronts), _differences(runs, names)]
    return _document(title, [tag("header", *head), tag("main", *main)], [plot] if plot else [])


def _runs_table(runs: Sequence[Run], names: Sequence[str]) -> Html:
    metrics = _measured_names(found for run in runs for found in run.founds)
    tested = [name for name in metrics if any(name in found.test for run in runs for found in run.founds)]
    head = [
        "run",
        "algorithm",
        "searcher",
        "objective",
        "constraints",
        *(f"{name}, search" for name in metrics),
        *(f"{name}, test" for name in tested),
        *COSTS[:2],
        "trials",
        "time",
        "state",
    ]
    rows = []
    for run, name in zip(runs, names, strict=True):
        for found in run.founds or [None]:
            figures = _figures(run, found, metrics) if found else ["–"] * 2 * len(metrics)
            kept = [f for m, f in zip(metrics, figures[len(metrics) :], strict=True) if m in tested]
            costs = _costs(found) if found else {}
            goals = ", ".join(f"{goal.metric} {goal.direction}" for goal in run.objectives.objectives)
            asked = found.constraints if found else " / ".join(filter(None, run.searches))
            rows.append(
                [
                    name,
                    _type(run.spec.get("algorithm") or "–"),
                    _type(run.spec.get("searcher") or "–"),
                    goals or "–",
                    asked or "none",
                    *figures[: len(metrics)],
                    *kept,
                    *(exact(costs[c]) if c in costs else "–" for c in COSTS[:2]),
                    f"{len(run.all_trials):,}",
                    duration(sum(run.seconds.values())) if run.seconds else "–",
                    "finished" if run.finished else "not finished",
                ]
            )
    words = (
        "Search: on validation data, by which archs were chosen. Test: the exported network, on other data. "
        "What stands behind ± is one binomial standard error."
    )
    return join([table("the best of each run", head, rows, "wide"), tag("p", words, class_="soft")])


def _differences(runs: Sequence[Run], names: Sequence[str]) -> Html:
    """The keys of the specs that are not the same in all runs."""
    flat = [{key: x for key, x in _flat(run.spec).items() if key != "name"} for run in runs]
    keys = [*dict.fromkeys(key for spec in flat for key in spec)]
    absent = object()
    differing = [key for key in keys if any(spec.get(key, absent) != flat[0].get(key, absent) for spec in flat[1:])]
    if not differing:
        return _section("What differs", tag("p", "The specs are the same but for the name."))
    rows = [[tag("code", key), *(esc(spec[key]) if key in spec else "–" for spec in flat)] for key in differing]
    more = len(rows) - MOST_DIFFERENCES
    text = tag("p", f"and {more:,} keys more") if more > 0 else ""
    shown = table("keys of the specs that differ", ["key", *names], rows[:MOST_DIFFERENCES], "long")
    return _section("What differs", shown, text)


def _flat(item: Any, prefix: str = "") -> dict[str, str]:
    """Nested tables as texts by dotted key; a list of plain values is one of them."""
    if isinstance(item, Mapping):
        pairs = item.items()
    elif isinstance(item, list) and any(isinstance(x, Mapping | list) for x in item):
        pairs = enumerate(item)
    else:
        return {prefix: _plain(item)}
    return {k: x for key, each in pairs for k, x in _flat(each, f"{prefix}.{key}" if prefix else str(key)).items()}


def _plain(value: Any) -> str:
    """A plain value, or a list of some, as text."""
    if isinstance(value, list):
        return ", ".join(map(_plain, value)) or "none"
    return str(value).lower() if isinstance(value, bool) else f"{value:.5g}" if isinstance(value, float) else str(value)


# -- parts of pages ---------------------------------------------------------------------------------------------------


def _section(title: str, *content: Any) -> Html:
    return tag("section", tag("h2", title), *content)


def _details(summary: str, *content: Any) -> Html:
    return tag("details", tag("summary", summary), *content)


def _facts(rows: Iterable[tuple[str, Any]]) -> Html:
    return tag("dl", *(join([tag("dt", name), tag("dd", fact)]) for name, fact in rows), class_="facts")


_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:"
"""What browsers keep the page to: nothing from any network."""


def _document(title: str, body: Sequence[Any], shown: Sequence[Plot]) -> str:
    """A whole page; plotly.js is in it if there is a plot."""
    own = files("corenas_tool_report")
    parts: list[Any] = []
    if shown:
        from plotly.offline import get_plotlyjs

        script = (own / "page.js").read_text(encoding="utf-8")
        parts = [
            tag("noscript", tag("p", "The plots need JavaScript; the tables do not.")),
            plots.embedded(shown),
            Html(f"<script>{get_plotlyjs()}</script>\n<script>{script}</script>"),
        ]
    style = Html(f"<style>{(own / 'page.css').read_text(encoding='utf-8')}</style>")
    written = f"Written by corenas {corenas.__version__} on {datetime.now():%Y-%m-%d at %H:%M}."
    return join(
        [
            Html(
                "<!DOCTYPE html>\n"
                '<html lang="en">\n<head>\n<meta charset="utf-8">\n'
                f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
                '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
                '<link rel="icon" href="data:,">\n'
            ),
            tag("title", f"{title} – corenas"),
            style,
            Html("\n</head>\n<body>\n"),
            *body,
            tag("footer", written),
            *parts,
            Html("\n</body>\n</html>\n"),
        ],
        "\n",
    )
