"""The pictures of a sweep, each as SVG and PNG; the colours of the SVG are the page's, light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from attrs import frozen
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from corenas_tool_sweep import statistics as st
from corenas_tool_sweep.analysis import LEAST_FOR_RANGES, Analysis, Variable, label, powers
from corenas_tool_sweep.population import Column, Population

CARD, INK, SOFT, LINE = "#ffffff", "#1c2024", "#5b6470", "#dfe3e8"
COLOURS = ("#2f7fd6", "#d9601a", "#12936f", "#8a6fe0", "#c2559d", "#9a7a10")
_THEMED = {CARD: "var(--card)", INK: "var(--ink)", SOFT: "var(--soft)", LINE: "var(--line)"}
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": SOFT,
    "axes.facecolor": "none",
    "figure.facecolor": CARD,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "axes.grid": True,
    "grid.color": LINE,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.dpi": 100,
    "text.parse_math": False,
}
MOST_POINTS = 800
"""Above, points of a scatter are one picture in the SVG."""
EXTREMES = 10
"""How many of the best and of the worst archs are drawn."""


@frozen
class Plot:
    """A picture.

    name: of its files
    title: what it shows, for those who do not see it too
    section: of the page
    svg: for the page, in its colours
    wide: whether it wants the whole width
    """

    name: str
    title: str
    section: str
    svg: str
    wide: bool = False


def draw_all(analysis: Analysis, folder: Path) -> list[Plot]:
    """Draw everything there is to see, and write each picture into a folder, as SVG and PNG."""
    plots = []
    with mpl.rc_context(_STYLE):
        for name, title, section, size, draw in _wanted(analysis):
            figure = Figure(figsize=size, layout="constrained")
            FigureCanvasAgg(figure)
            draw(figure)
            plots.append(Plot(name, title, section, _written(figure, folder, name), size[0] > 6))
    return plots


Wanted = tuple[str, str, str, tuple[float, float], Callable[[Figure], None]]
_SIZE, _WIDE = (4.8, 3.3), (9.6, 3.6)


def _wanted(analysis: Analysis) -> Iterator[Wanted]:
    error = _error_name(analysis.populations[0])
    yield "edf", f"Share of archs whose {error} is at most this", "edf", _SIZE, lambda f: _edf(f, analysis, None)
    for cost, _ in analysis.at_cost.items():
        title = f"The same at equal {cost}: every cost bin weighs the same"
        yield f"edf-{cost}", title, "edf", _SIZE, lambda f, cost=cost: _edf(f, analysis, cost)
    title = "What random search finds: error of the best of so many archs, with its standard deviation"
    yield "random-search", title, "edf", _SIZE, lambda f: _random_search(f, analysis)
    costs = [c for c in analysis.sweep.complexity if any(c in p.costs for p in analysis.populations)]
    for cost in costs:
        yield (
            f"error-{cost}",
            f"Error against {cost}",
            "cost",
            _SIZE,
            lambda f, cost=cost: _error_cost(f, analysis, cost),
        )
        yield f"archs-{cost}", f"Archs by {cost}", "cost", _SIZE, lambda f, cost=cost: _histogram(f, analysis, cost)
    shown = _most_telling(analysis)
    for key in shown:
        height = 0.7 + 2.4 * len(analysis.populations)
        name = f"values-{_file_name(key)}"
        title = f"Error against {key}"
        yield name, title, "values", (4.8, min(height, 12)), lambda f, key=key: _values(f, analysis, key)
    if len(analysis.populations) > 1:
        for key in shown:
            if any(v.good for known in analysis.variables for v in known if v.key == key):
                title = f"{key}: full range (thin), good range (thick) and best, by population"
                yield f"trend-{_file_name(key)}", title, "trends", _SIZE, lambda f, key=key: _trend(f, analysis, key)
    pair = [v.key for v in analysis.variables[0] if v.full is not None and v.p is not None][:2]
    if len(pair) == 2:
        title = f"Two variables, coloured by rank: {pair[0]} and {pair[1]}"
        yield "values-2d", title, "values", _SIZE, lambda f: _two(f, analysis.populations[0], *pair)
    for i, population in enumerate(analysis.populations):
        if any(population.curves):
            title = (
                f"Error along the training of {population.name}: the {EXTREMES} best archs, and the {EXTREMES} worst"
            )
            yield f"curves-{i}", title, "curves", _SIZE, lambda f, population=population: _curves(f, population)
    for stem, keys in _profiles(analysis.populations[0]).items():
        title = f"{stem} along the network: the {EXTREMES} best archs, and the {EXTREMES} worst"
        yield (
            f"archs-{_file_name(stem)}",
            title,
            "archs",
            _SIZE,
            lambda f, keys=keys, stem=stem: _profile(f, analysis.populations[0], stem, keys),
        )


def _most_telling(analysis: Analysis) -> list[str]:
    """Return the variables that get a plot of their own: by their smallest p in any population."""
    best: dict[str, float] = {}
    for known in analysis.variables:
        for variable in known:
            if variable.n and (len(variable.choices) > 1 or variable.key not in best):
                p = 2.0 if variable.p is None else variable.p
                best[variable.key] = min(best.get(variable.key, 3.0), p)
    return sorted(best, key=lambda key: best[key])[: analysis.sweep.plots]


def _file_name(key: str) -> str:
    return re.sub(r"[^\w.-]", "_", key)


def _error_name(population: Population) -> str:
    unit = {"%": "%", "share": "%"}.get(population.unit, population.unit)
    proxy = f"{population.measured} " if population.measured in ("supernet proxy", "proxy") else ""
    return f"{proxy}error{f' [{unit}]' if unit else ''}"


def _written(figure: Figure, folder: Path, name: str) -> str:
    """Write a figure as SVG and PNG. Returns the SVG as it stands in the page."""
    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    (folder / f"{name}.svg").write_text(svg, encoding="utf-8")
    figure.savefig(folder / f"{name}.png", dpi=150)
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r' id="(?:figure|axes|patch|line2d|text|matplotlib\.axis|xtick|ytick|legend)_\d+"', "", svg)
    for colour, theme in _THEMED.items():
        svg = svg.replace(colour, theme)
    return svg


def _limits(axes: Axes, populations: Sequence[Population], ends: tuple[float, float] = (0, 99)) -> None:
    """Show the errors that matter: failed archs and a long tail would press all others together."""
    some = np.concatenate([p.errors[~p.failed] for p in populations])
    low, high = np.percentile(some, ends) if len(some) else (0.0, 1.0)
    room = 0.06 * (high - low) or 1.0
    axes.set_ylim(low - room, high + room)


def _amounts(axes: Axes, axis: str) -> None:
    getattr(axes, axis).set_major_formatter(mpl.ticker.EngFormatter(sep=""))


# -- populations ------------------------------------------------------------------------------------------------------


def _edf(figure: Figure, analysis: Analysis, cost: str | None) -> None:
    axes = figure.subplots()
    right = -np.inf
    for i, population in enumerate(analysis.populations):
        errors, weights = population.errors, population.weights
        if cost is not None:
            at = analysis.at_cost[cost]
            errors, weights = at.errors(analysis.populations, i), at.weights(i)
        x, y = st.edf(errors, weights)
        x, y = np.append(x[:1], x), np.append(0.0, y)
        n_eff = st.effective_size(weights)
        half = st.band(n_eff)
        n = f"{len(errors)}" if cost is None else f"n_eff {n_eff:.0f}"
        colour = COLOURS[i % len(COLOURS)]
        text = f"{_short(population.name)}: {n} | {errors.min():.2f} | {(weights * errors).sum():.2f}"
        axes.step(x, y, where="post", color=colour, label=text)
        axes.fill_between(
            x, np.clip(y - half, 0, 1), np.clip(y + half, 0, 1), step="post", color=colour, alpha=0.15, lw=0
        )
        # A few failed archs, at 100%, would press all others together.
        ok = population.errors[~population.failed]
        right = max(right, np.percentile(ok, 100 if len(ok) < 50 else 99)) if len(ok) else right
    left = min(population.errors.min() for population in analysis.populations)
    axes.set_xlim(left - 0.03 * (right - left) - 1e-9, right + 0.03 * (right - left) + 1e-9)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel(_error_name(analysis.populations[0]))
    axes.set_ylabel("share of archs" if cost is None else f"share | {cost}")
    axes.legend(title="n | min | mean", loc="lower right", title_fontsize=9)


def _short(name: str) -> str:
    return name if len(name) <= 22 else f"{name[:20]}…"


def _random_search(figure: Figure, analysis: Analysis) -> None:
    axes = figure.subplots()
    for i, population in enumerate(analysis.populations):
        m = powers(len(population))
        mean = np.array([st.expected_best(population.errors, population.weights, k) for k in m])
        spread = np.array([st.spread_of_best(population.errors, population.weights, k) for k in m])
        colour = COLOURS[i % len(COLOURS)]
        axes.plot(m, mean, "o-", ms=3, color=colour, label=_short(population.name))
        axes.fill_between(m, mean - spread, mean + spread, color=colour, alpha=0.15, lw=0)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%d"))
    axes.set_xlabel("archs drawn")
    axes.set_ylabel(f"best {_error_name(analysis.populations[0])}")
    axes.margins(y=0.05)
    axes.legend()


def _scatter(axes: Axes, x: Any, y: Any, colour: Any, **options: Any) -> Any:
    many = len(x) > MOST_POINTS
    size = 4 if many else 12 if len(x) > 60 else 22
    points = axes.scatter(x, y, s=size, c=colour, alpha=0.35 if many else 0.65, lw=0, rasterized=many, **options)
    return points


def _error_cost(figure: Figure, analysis: Analysis, cost: str) -> None:
    axes = figure.subplots()
    for i, population in enumerate(analysis.populations):
        if cost in population.costs:
            some = ~population.failed & np.isfinite(population.costs[cost])
            name = _short(population.name)
            _scatter(axes, population.costs[cost][some], population.errors[some], COLOURS[i % len(COLOURS)], label=name)
    _limits(axes, analysis.populations)
    _amounts(axes, "xaxis")
    axes.set_xlabel(cost)
    axes.set_ylabel(_error_name(analysis.populations[0]))
    if len(analysis.populations) > 1:
        axes.legend(markerscale=2)


def _histogram(figure: Figure, analysis: Analysis, cost: str) -> None:
    axes = figure.subplots()
    found = [
        p.costs[cost][np.isfinite(p.costs[cost])] if cost in p.costs else np.zeros(0) for p in analysis.populations
    ]
    at = analysis.at_cost.get(cost)
    edges = np.histogram_bin_edges(np.concatenate(found), 20)
    for i, (population, costs) in enumerate(zip(analysis.populations, found, strict=True)):
        colour = COLOURS[i % len(COLOURS)]
        axes.hist(costs, edges, color=colour, alpha=0.5, label=_short(population.name))
    for edge in [] if at is None else at.edges:
        axes.axvline(edge, color=SOFT, lw=0.7, ls=":")
    _amounts(axes, "xaxis")
    axes.set_xlabel(cost if at is None else f"{cost} (dotted: bins of equal weight)")
    axes.set_ylabel("archs")
    if len(analysis.populations) > 1:
        axes.legend()


# -- variables --------------------------------------------------------------------------------------------------------


def _places(columns: Sequence[Column]) -> list[Any] | None:
    """Return the choices that have a place each on an axis; None for a scale of numbers."""
    choices = [*dict.fromkeys(choice for column in columns for choice in column.choices)]
    if not choices or len(choices) > 16:
        return None
    return sorted(choices) if columns[0].ordered else choices


def _values(figure: Figure, analysis: Analysis, key: str) -> None:
    rows = [
        (p, v) for p, known in zip(analysis.populations, analysis.variables, strict=True) for v in known if v.key == key
    ]
    rows = rows[:5]
    all_axes = figure.subplots(len(rows), 1, sharex=True, squeeze=False)[:, 0]
    choices = _places([population.variables[key] for population, _ in rows])
    for i, (axes, (population, variable)) in enumerate(zip(all_axes, rows, strict=True)):
        column = population.variables[key]
        some = np.flatnonzero(column.active & ~population.failed)
        x = _x(column.values[some], choices)
        spread = np.random.default_rng(0).uniform(-0.22, 0.22, len(some)) if choices is not None else 0.0
        colour = COLOURS[i % len(COLOURS)]
        _scatter(axes, x + spread, population.errors[some], colour)
        _shade(axes, variable, choices, colour)
        if choices is not None:
            for place in np.unique(x):
                axes.plot(
                    [place - 0.3, place + 0.3], [population.errors[some][x == place].mean()] * 2, color=INK, lw=1.6
                )
        _limits(axes, [population for population, _ in rows])
        axes.set_ylabel("error")
        if len(rows) > 1:
            axes.set_title(_short(population.name), loc="left")
    last = all_axes[-1]
    _name_places(last, choices, rows)
    unused = sum(int((~population.variables[key].active).sum()) for population, _ in rows)
    last.set_xlabel(key + (f"\nunused, or unknown, in {unused:,} archs" if unused else ""))


def _x(values: np.ndarray, choices: list[Any] | None) -> np.ndarray:
    return values.astype(float) if choices is None else np.array([choices.index(value) for value in values], float)


def _shade(axes: Axes, variable: Variable, choices: list[Any] | None, colour: str) -> None:
    """Draw the good range, the best, and the range that chance gives."""
    if variable.good is None or variable.chance is None:
        return
    room = 0.4 if choices is not None else 0.0
    low, middle, high = (_x(np.array([end]), choices)[0] for end in variable.good)
    axes.axvspan(low - room, high + room, color=colour, alpha=0.13, lw=0)
    axes.axvline(middle, color=colour, lw=1, ls="--")
    ends = [
        _x(np.array([end]), choices)[0] if choices is None or end in choices else np.nan
        for end in variable.chance["range"]
    ]
    bar = axes.get_xaxis_transform()
    axes.plot([ends[0] - room, ends[1] + room], [0.015, 0.015], color=SOFT, lw=3, transform=bar, solid_capstyle="butt")


def _name_places(axes: Axes, choices: list[Any] | None, rows: Sequence[tuple[Population, Variable]]) -> None:
    if choices is None:
        numbers = np.concatenate([p.variables[v.key].values[p.variables[v.key].active] for p, v in rows])
        _log_if_wide(axes, "x", numbers)
        return
    known = rows[0][1]
    masses = (
        {row["choice"]: row["mass"] for row in known.choices} if len(rows) == 1 and known.n >= LEAST_FOR_RANGES else {}
    )
    texts = [label(choice) for choice in choices]
    named = [f"{text}\n{masses[text]:.0%}" if text in masses and len(choices) <= 8 else text for text in texts]
    long = max(map(len, texts)) * len(texts) > 48
    axes.set_xticks(range(len(choices)), named, rotation=30 if long else 0, ha="right" if long else "center")
    axes.set_xlim(-0.6, len(choices) - 0.4)


def _log_if_wide(axes: Axes, axis: str, numbers: np.ndarray) -> None:
    """Give an axis a log scale where its numbers are of several sizes."""
    if len(numbers) and numbers.min() > 0 and numbers.max() / numbers.min() > 50:
        getattr(axes, f"set_{axis}scale")("log")
        getattr(axes, f"{axis}axis").set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
        getattr(axes, f"{axis}axis").set_minor_formatter(mpl.ticker.NullFormatter())


def _trend(figure: Figure, analysis: Analysis, key: str) -> None:
    axes = figure.subplots()
    names = []
    for i, (population, known) in enumerate(zip(analysis.populations, analysis.variables, strict=True)):
        names.append(_short(population.name))
        variable = next((v for v in known if v.key == key), None)
        if variable is None or variable.full is None:
            continue
        colour = COLOURS[i % len(COLOURS)]
        axes.plot([i, i], variable.full, color=SOFT, lw=1.2)
        if variable.good is not None:
            axes.plot(
                [i, i], [variable.good[0], variable.good[2]], color=colour, lw=7, alpha=0.5, solid_capstyle="butt"
            )
            axes.plot([i], [variable.good[1]], "o", color=colour)
    axes.set_xticks(range(len(names)), names, rotation=30 if len(names) > 3 else 0)
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.set_ylabel(key)


def _two(figure: Figure, population: Population, first: str, second: str) -> None:
    axes = figure.subplots()
    columns = population.variables[first], population.variables[second]
    some = np.flatnonzero(columns[0].active & columns[1].active & ~population.failed)
    ranks = np.argsort(np.argsort(population.errors[some], kind="stable"), kind="stable") / max(1, len(some))
    rng = np.random.default_rng(0)
    numbers = []
    for column, axis in zip(columns, ("x", "y"), strict=True):
        choices = _places([column])
        numbers.append(_x(column.values[some], choices))
        if choices is None:
            _log_if_wide(axes, axis, numbers[-1])
        else:
            numbers[-1] = numbers[-1] + rng.uniform(-0.3, 0.3, len(some))
            getattr(axes, f"set_{axis}ticks")(range(len(choices)), [label(choice) for choice in choices])
    order = np.argsort(-ranks)
    points = _scatter(axes, numbers[0][order], numbers[1][order], ranks[order], cmap="viridis_r")
    figure.colorbar(points, ax=axes, label="rank / n (0: best)")
    axes.set_xlabel(first)
    axes.set_ylabel(second)


def _curves(figure: Figure, population: Population) -> None:
    """Draw how errors fell; hollow: within 1% of the least of a curve."""
    axes = figure.subplots()
    some = [i for i in np.argsort(population.errors, kind="stable") if population.curves[i]]
    count = max(1, min(EXTREMES, len(some) // 2))
    for group, archs in (("worst", some[len(some) - count :]), ("best", some[:count])):
        colour = COLOURS[0] if group == "best" else COLOURS[1]
        for number, arch in enumerate(archs):
            at, errors = np.array(population.curves[arch]).T
            at = np.maximum(1, np.rint(at * population.epochs)) if population.epochs else at
            text = f"{len(archs)} {group}" if number == 0 else None
            axes.plot(at, errors, "-", lw=1, color=colour, alpha=0.6, label=text)
            near = errors <= 1.01 * errors.min() if errors.min() > 0 else errors == errors.min()
            for those, face in ((near, "none"), (~near, colour)):
                axes.scatter(at[those], errors[those], s=14, facecolors=face, edgecolors=colour, alpha=0.8)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
    axes.set_xlabel("epochs" if population.epochs else "share of the training")
    axes.set_ylabel(_error_name(population))
    axes.legend()


def _profiles(population: Population) -> dict[str, list[str]]:
    """Return variables of numbers that stand in a row of parts, such as `stages.0.width`, `stages.1.width`, by name."""
    rows: dict[str, list[str]] = {}
    for key, column in population.variables.items():
        if column.ordered and re.search(r"\d+", key):
            rows.setdefault(re.sub(r"\d+", "*", key), []).append(key)
    return {stem: keys for stem, keys in [*rows.items()][:8] if len(keys) > 1}


def _profile(figure: Figure, population: Population, stem: str, keys: Sequence[str]) -> None:
    axes = figure.subplots()
    order = np.argsort(np.where(population.failed, np.inf, population.errors), kind="stable")
    order = order[: int((~population.failed).sum())]
    count = min(EXTREMES, len(order) // 2)
    values = np.stack([np.where(population.variables[k].active, population.variables[k].values, np.nan) for k in keys])
    step = 0.02 * (np.nanmax(values) - np.nanmin(values) or 1.0) if np.isfinite(values).any() else 0.0
    groups: Mapping[str, np.ndarray] = {"worst": order[len(order) - count :], "best": order[:count]}
    for group, some in groups.items():
        colour = COLOURS[0] if group == "best" else COLOURS[1]
        for number, arch in enumerate(some):
            shift = (number - count / 2) * step * 0.4
            text = f"{count} {group}" if number == 0 else None
            axes.plot(values[:, arch] + shift, "o-", ms=3, lw=1, color=colour, alpha=0.6, label=text)
    axes.set_xticks(
        range(len(keys)), [".".join(re.findall(r"\d+", key)) for key in keys], rotation=90 if len(keys) > 8 else 0
    )
    axes.set_xlabel("part")
    axes.set_ylabel(stem)
    if count:
        axes.legend()
