"""Which plots a page has: plain data that plotly.js draws, with colours that read on a light and on a dark page."""

from __future__ import annotations

import html
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from attrs import frozen

from corenas.objectives import Trial
from corenas_tool_report import drawing
from corenas_tool_report.reading import COSTS, Growth, Run, trade_off
from corenas_tool_report.words import Html, duration, esc, join, measured, plural, tag

COLOURS = ("#2f7fd6", "#c2559d", "#12936f", "#8a6fe0", "#9a7a10", "#c94f4f")
"""Of searches or runs; each has a contrast of 3.7 and more against both backgrounds."""
FRONT, GREY = "#d9601a", "#858c94"
SYMBOLS = ("circle", "square", "triangle-up", "cross", "diamond-wide", "triangle-down")
DASHES = ("solid", "dash", "dot", "dashdot")


@frozen
class Plot:
    """One plot.

    label: what it shows, for those who do not see it
    traces, layout: as plotly.js takes them
    menu: other things to plot: each a label, the title of its x axis, and what changes in each trace
    """

    name: str
    label: str
    traces: Sequence[Mapping[str, Any]]
    layout: Mapping[str, Any]
    menu: Sequence[Mapping[str, Any]] = ()

    def html(self, caption: Any = "") -> Html:
        """The place where it is drawn, with its menu."""
        options = [tag("option", item["label"], value=i) for i, item in enumerate(self.menu)]
        menu = tag("label", "Against ", tag("select", *options, data_plot=self.name)) if len(options) > 1 else ""
        height = f"height:{self.layout['height']}px"
        place = tag("div", id=self.name, class_="plot", role="img", aria_label=self.label, style=height)
        return tag("figure", menu, place, tag("figcaption", caption) if caption else "")

    def data(self) -> dict[str, Any]:
        """What the script of the page needs."""
        return {"name": self.name, "traces": self.traces, "layout": self.layout, "menu": self.menu}


def embedded(plots: Sequence[Plot]) -> Html:
    """Plots as JSON in the page, with nothing in it that could end the element."""
    text = json.dumps(_finite([plot.data() for plot in plots]), separators=(",", ":"), allow_nan=False)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Html(f'<script type="application/json" id="plots">{text}</script>')


def _finite(data: Any) -> Any:
    """The same data with null for what JSON has no number for."""
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {str(key): _finite(item) for key, item in data.items()}
    return [_finite(item) for item in data] if isinstance(data, list | tuple) else data


def _layout(height: int, x: str, y: str, **more: Any) -> dict[str, Any]:
    axis = {"automargin": True, "zeroline": False}
    return {
        "height": height,
        "margin": {"l": 48, "r": 12, "t": 8, "b": 40},
        "xaxis": {**axis, "title": {"text": html.escape(x), "standoff": 8}, "exponentformat": "SI"},
        "yaxis": {**axis, "title": {"text": html.escape(y), "standoff": 8}, "exponentformat": "SI"},
        "hovermode": "closest",
        "hoverlabel": {"align": "left", "namelength": -1},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        **more,
    }


def titled(run: Run, metric: str) -> str:
    """A metric with its unit."""
    return f"{metric} ({run.unit(metric)})" if run.unit(metric) else metric


def metrics_of(runs: Sequence[Run], objective: str) -> list[str]:
    """What the objective can be plotted against: costs first."""
    found = {metric for run in runs for trial in run.all_trials for metric in trial.metrics} - {objective}
    return [*(metric for metric in COSTS if metric in found), *sorted(found - {*COSTS})]


def counted_on(epochs: Sequence[float]) -> list[float]:
    """Return the epochs of phases, each of which begins with 1, as those of the whole training."""
    counted: list[float] = []
    before = 0.0
    for epoch in epochs:
        if counted and before + epoch <= counted[-1]:
            before = counted[-1]
        counted.append(before + epoch)
    return counted


def curves(run: Run, stage: str) -> list[Plot]:
    """The figures of a stage, one plot each, over epochs if those are known, else over steps."""
    points = run.curves[stage]
    epochs = all("epoch" in figures for _, figures in points)
    x = counted_on([figures["epoch"] for _, figures in points]) if epochs else [done for done, _ in points]
    names = dict.fromkeys(name for _, figures in points for name in figures if name != "epoch")
    plots = []
    for name in names:
        y = [figures.get(name) for _, figures in points]
        last = next((value for value in reversed(y) if value is not None), math.nan)
        unit = "epoch" if epochs else "step"
        trace = {
            "x": x,
            "y": y,
            "mode": "lines+markers",
            "name": html.escape(name),
            "marker": {"size": 5, "color": COLOURS[0]},
            "line": {"width": 2, "color": COLOURS[0]},
            "hovertemplate": f"{unit} %{{x}}: %{{y:.4g}}<extra></extra>",
        }
        label = f"{name} over {plural(len(x), 'point')} of stage {stage}, {measured(last, run.unit(name))} at the end"
        plots.append(Plot(f"curve-{stage}-{len(plots)}", label, [trace], _layout(230, unit, name, showlegend=False)))
    return plots


def trials(run: Run) -> Plot | None:
    """The first objective against cost, one point a trial, with the front; None where there is nothing to show."""
    y = run.objective
    shown = [[t for t in some if t.ok and t.fidelity == 1 and y in t.metrics] for some in run.trials]
    if y is None or not any(shown):
        return None
    names = [text or "without constraints" for text in run.searches] if len(run.searches) > 1 else ["trials"]
    outside = [t for t in run.all_trials if t.state == "infeasible" and y in t.metrics]
    best = [Trial(found.arch, found.metrics) for found in run.founds if y in found.metrics]
    groups: list[tuple[str, Sequence[Trial], dict[str, Any]]] = [
        (
            name,
            some,
            {"color": COLOURS[i % len(COLOURS)], "size": 8, "opacity": 0.75, "symbol": SYMBOLS[i % len(SYMBOLS)]},
        )
        for i, (name, some) in enumerate(zip(names, shown, strict=True))
    ]
    if outside:
        groups.append(
            ("infeasible", outside, {"color": GREY, "size": 7, "symbol": "x-thin-open", "line": {"width": 1.5}})
        )
    groups.append(("best", best, {"color": FRONT, "size": 15, "symbol": "star"}))
    traces = [
        {
            "mode": "markers",
            "name": html.escape(name),
            "marker": marker,
            "y": [t.metrics[y] for t in some],
            "text": [_hover(run, t, name) for t in some],
            "hovertemplate": "%{text}<extra></extra>",
        }
        for name, some, marker in groups
    ]
    front = {"mode": "lines", "name": "front", "line": {"color": FRONT, "width": 2}, "hoverinfo": "skip"}
    traces.insert(-1, front)
    menu = []
    for metric in metrics_of([run], y):
        line = trade_off(run, run.all_trials, metric)
        changes: list[dict[str, Any]] = [{"x": [t.metrics.get(metric) for t in some]} for _, some, _ in groups]
        changes.insert(-1, _line(run, line, metric, y) | {"line": {**front["line"], "shape": _shape(run, metric)}})
        menu.append({"label": metric, "title": html.escape(titled(run, metric)), "changes": changes})
    if not menu:
        return None
    done = Counter(trial.state for trial in run.all_trials)["done"]
    label = f"{y} of {plural(done, 'trial')} against {menu[0]['label']}, with the Pareto front"
    return Plot("trials", label, traces, _layout(440, menu[0]["label"], titled(run, y)), menu)


def hypervolume(run: Run, grown: Growth) -> Plot:
    """How much of the box between the worst and the best figures the front of each search beats, over trials."""
    several = len(run.searches) > 1
    traces = [
        {
            "x": [n for n, _ in points],
            "y": [share for _, share in points],
            "mode": "lines",
            "name": html.escape((run.searches[i] or "without constraints") if several else "hypervolume"),
            "line": {"width": 2, "color": COLOURS[i % len(COLOURS)], "shape": "hv"},
            "hovertemplate": "after %{x} trials: %{y:.4g} %<extra></extra>",
        }
        for i, points in enumerate(grown.points)
    ]
    ends = ", ".join(f"{points[-1][1]:.4g} % after {plural(points[-1][0], 'trial')}" for points in grown.points)
    layout = _layout(280, "trials", "hypervolume (%)", showlegend=several)
    return Plot("hypervolume", f"hypervolume of the front over trials: {ends}", traces, layout)


def fronts(runs: Sequence[Run], names: Sequence[str], objective: str) -> Plot | None:
    """The Pareto fronts of several runs in one plot."""
    menu, metrics = [], metrics_of(runs, objective)
    some = [i for i, run in enumerate(runs) if run.objective == objective]
    for metric in metrics:
        changes = []
        for i in some:
            run = runs[i]
            line = trade_off(run, run.all_trials, metric)
            look = {
                "color": COLOURS[i % len(COLOURS)],
                "width": 2,
                "dash": DASHES[i // len(COLOURS) % len(DASHES)],
                "shape": _shape(run, metric),
            }
            text = [_hover(run, trial, names[i]) for trial in line]
            changes.append(_line(run, line, metric, objective) | {"line": look, "text": text})
        menu.append({"label": metric, "title": html.escape(titled(runs[some[0]], metric)), "changes": changes})
    if not any(change["x"] for item in menu for change in item["changes"]):
        return None
    traces = [
        {
            "mode": "lines+markers",
            "name": html.escape(names[i]),
            "hovertemplate": "%{text}<extra></extra>",
            "marker": {"color": COLOURS[i % len(COLOURS)], "size": 9, "symbol": SYMBOLS[i % len(SYMBOLS)]},
        }
        for i in some
    ]
    label = f"Pareto fronts of {plural(len(some), 'run')}, {objective} against {menu[0]['label']}"
    return Plot("fronts", label, traces, _layout(460, menu[0]["label"], titled(runs[some[0]], objective)), menu)


def _line(run: Run, front: Sequence[Trial], metric: str, y: str) -> dict[str, Any]:
    return {"x": [trial.metrics[metric] for trial in front], "y": [trial.metrics[y] for trial in front]}


def _shape(run: Run, metric: str) -> str:
    """How a front runs between its points: what is attained there is what the point before, or behind, attains."""
    return "hv" if run.direction(metric) == "min" else "vh"


def _hover(run: Run, trial: Trial, group: str) -> Html:
    """What a point says: whose it is, what was measured, what was chosen."""
    figures = ", ".join(f"{name} {measured(value, run.unit(name))}" for name, value in trial.metrics.items())
    state = "" if group == "best" else f"{trial.state}, {duration(trial.seconds)}"
    rows = [_wrapped(text) for text in [figures, *drawing.lines(run.space, trial.arch), state] if text]
    return join([tag("b", trial.arch.digest), esc(f" {group}"), *(Html(f"<br>{row}") for row in rows)])


def _wrapped(text: str, width: int = 44) -> Html:
    """A text in lines that a phone can show."""
    lines, line = [], ""
    for word in text.split(" "):
        if line and len(line) + len(word) >= width:
            lines.append(line)
            line = "  " + word
        else:
            line = f"{line} {word}" if line else word
    return join([*lines, line], "<br>")
