"""The page of a sweep: one HTML file that needs nothing else."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from corenas.objectives import amount
from corenas_tool_sweep import statistics as st
from corenas_tool_sweep.analysis import LEAST_FOR_RANGES, Analysis, Variable, curve_points, label, noise_of
from corenas_tool_sweep.narrowing import Narrowed
from corenas_tool_sweep.plots import Plot

SIZES = (32, 100, 250, 500, 1000)
"""Populations whose band and critical distance the page lists."""
_SECTIONS = {
    "edf": (
        "Which population is better",
        "Further up and left is better. Bands hold the true curve, 95% certain.",
    ),
    "cost": ("What accuracy costs", "Costs are of one image: flops count a multiply-add once."),
    "values": (
        "Which variables matter",
        "Each point is an arch, lines are means. Shaded: where the best of a quarter of the archs lies in 95% "
        "of draws; dashed: its median; grey bar below: where it would lie if the variable had no effect; under each "
        "choice how often the best has it.",
    ),
    "trends": ("Where the good range moves", "Thin: all values; thick: the good range; dot: the best."),
    "curves": (
        "Whether archs are trained out",
        "Hollow: within 1% of the least error of a curve. Where lines still fall, or cross, longer trainings may rank "
        "archs otherwise.",
    ),
    "archs": ("Patterns in the best and the worst", "Lines are moved apart a little, so that equal ones are seen."),
}


def esc(content: Any) -> str:
    """Return text as HTML."""
    return html.escape(str(content))


def write_page(
    analysis: Analysis, narrowed: Narrowed, words: str, toml: str | None, plots: Sequence[Plot], path: Path
) -> None:
    """Write the page."""
    style = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
    title = "Sweep: " + ", ".join(population.name for population in analysis.populations)
    parts = [
        f"<!DOCTYPE html><html lang='en'><head><meta charset='utf-8'><title>{esc(title)}</title>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<style>{style}</style></head><body><main><h1>{esc(title)}</h1>",
        f"<p class='soft'>{esc(_about(analysis))}</p>",
        _tiles(analysis),
        _list("notice", analysis.notes),
        _populations(analysis),
    ]
    for key, (heading, text) in _SECTIONS.items():
        some = [plot for plot in plots if plot.section == key]
        if not some:
            continue
        table = _variables(analysis) if key == "values" else _curves(analysis) if key == "curves" else ""
        figures = "".join(map(_figure, some))
        parts.append(_section(heading, f"<p class='soft'>{esc(text)}</p>{table}<div class='plots'>{figures}</div>"))
    parts.append(_section("A narrower space", _narrower(narrowed, words, toml)))
    parts.append("</main></body></html>")
    path.write_text("\n".join(parts), encoding="utf-8")


def _about(analysis: Analysis) -> str:
    metrics = {(population.metric, population.measured) for population in analysis.populations}
    what = ", ".join(f"{metric} ({measured})" for metric, measured in sorted(metrics))
    sweep = analysis.sweep
    return (
        f"Errors from {what}. Filter: {_filter(sweep.filter)}. Seed {sweep.seed}, {sweep.permutations:,} permutations."
    )


def _filter(wanted: Any) -> str:
    return ", ".join(f"{key} {' to '.join(map(str, (b[0], b[-1])))}" for key, b in wanted.items()) or "none"


def _tiles(analysis: Analysis) -> str:
    tiles = []
    for population in analysis.populations[:4]:
        best, noise = population.errors.min(), noise_of(population)
        text = f"{best:.2f}" + (f" ± {noise:.2f}" if noise else "")
        small = f"{len(population):,} archs, mean {(population.weights * population.errors).sum():.2f}"
        name = f"least error, {population.name}"
        tiles.append(f"<div><dt>{esc(name)}</dt><dd>{text}<small>{esc(small)}</small></dd></div>")
    certain = [v for v in analysis.variables[0] if v.holm is not None and v.holm < analysis.sweep.narrow.alpha]
    tested = sum(variable.p is not None for variable in analysis.variables[0])
    tiles.append(
        f"<div><dt>variables with an effect</dt><dd>{len(certain)}<small>of {tested} tested, Holm p below "
        f"{analysis.sweep.narrow.alpha:g}</small></dd></div>"
    )
    return f"<dl class='tiles'>{''.join(tiles)}</dl>"


def _list(class_: str, texts: Sequence[str]) -> str:
    return f"<ul class='{class_}'>{''.join(f'<li>{esc(text)}</li>' for text in texts)}</ul>" if texts else ""


def _section(heading: str, content: str) -> str:
    return f"<section><h2>{esc(heading)}</h2>{content}</section>"


def _table(caption: str, head: Iterable[Any], rows: Iterable[Sequence[Any]]) -> str:
    top = "".join(f"<th scope='col'>{esc(cell)}</th>" for cell in head)
    cells = [(row[0], "".join(f"<td>{esc(cell)}</td>" for cell in row[1:])) for row in rows]
    lines = "".join(f"<tr><th scope='row'>{esc(first)}</th>{rest}</tr>" for first, rest in cells)
    table = f"<table><caption>{esc(caption)}</caption><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table>"
    return f"<div class='scroll' tabindex='0' role='region' aria-label='{esc(caption)}'>{table}</div>"


def _figure(plot: Plot) -> str:
    svg = plot.svg.replace("<svg", f"<svg role='img' aria-label='{esc(plot.title)}'", 1)
    return f"<figure>{svg}<figcaption>{esc(plot.title)}</figcaption></figure>"


def _populations(analysis: Analysis) -> str:
    rows = []
    for i, population in enumerate(analysis.populations):
        views = {"all archs": (population.errors, population.weights)}
        for cost, at in analysis.at_cost.items():
            views[f"at equal {cost}"] = (at.errors(analysis.populations, i), at.weights(i))
        for name, (errors, weights) in views.items():
            n_eff = st.effective_size(weights)
            mean = float((weights * errors).sum())
            rows.append(
                (
                    population.name,
                    name,
                    len(errors),
                    f"{n_eff:.0f}",
                    f"{errors.min():.2f}",
                    f"{mean:.2f}",
                    f"± {st.band(n_eff):.3f}",
                )
            )
    head = ("population", "view", "n", "effective n", "least error", "mean error", "95% band")
    content = _table("Populations", head, rows)
    if analysis.pairs:
        content += _table(
            "Differences: error of the second less that of the first, with its 95% interval",
            ("pair", "view", "distance of EDFs (5% critical)", "p", "difference", "p", "the second is"),
            [
                (
                    f"{pair['first']} / {pair['second']}",
                    view.replace("_", " "),
                    f"{found['distance']:.3f} ({found['critical_distance']:.3f})",
                    f"{found['distance_p']:.3g}",
                    f"{found['difference']:+.2f} [{found['interval'][0]:+.2f}, {found['interval'][1]:+.2f}]",
                    f"{found['difference_p']:.3g}",
                    f"{found['verdict']} (margin {analysis.sweep.narrow.margin:g})",
                )
                for pair in analysis.pairs
                for view, found in pair.items()
                if isinstance(found, dict)
            ],
        )
    rows = [(f"{n:,}", f"± {st.band(n):.3f}", f"{st.critical_distance(n, n):.3f}") for n in SIZES]
    caption = "What so many archs can show: the 95% band of an EDF, and the distance of two that chance exceeds in 5%"
    table = _table(caption, ("archs (effective n)", "band", "critical distance"), rows)
    return _section("Populations", f"{content}<details><summary>how many archs it takes</summary>{table}</details>")


def _curves(analysis: Analysis) -> str:
    rows = [
        (
            population.name,
            f"{point['share']:.3g}",
            point["archs"],
            f"{point['gain']:+.2f}",
            f"{point['tau']:.2f} [{point['interval'][0]:.2f}, {point['interval'][1]:.2f}]",
        )
        for population in analysis.populations
        for point in curve_points(population)
    ]
    head = ("population", "share of the training", "archs", "error beyond that at the end", "tau with the end")
    return _table("What a part of the training says of its end", head, rows) if rows else ""


def _variables(analysis: Analysis) -> str:
    several = len(analysis.populations) > 1
    content = ""
    for population, known in zip(analysis.populations, analysis.variables, strict=True):
        failed = ["failed"] if population.failed.any() else []
        rows = [_row(variable)[: 8 + len(failed)] for variable in known]
        caption = "Variables, those that matter most first; p at equal cost"
        table = _table(
            f"{population.name}: {caption}" if several else caption,
            (
                "variable",
                "archs",
                "p",
                "Holm p",
                "verdict",
                "good range",
                "without effect",
                "as narrow by chance",
                *failed,
            ),
            rows,
        )
        table = f"<div class='wide'>{table}</div>"
        content += f"<details><summary>{esc(population.name)}</summary>{table}</details>" if several else table
    return content


def _row(variable: Variable) -> tuple[str, ...]:
    good = expected = narrow = "–"
    if variable.good is not None and variable.chance is not None:
        low, middle, high = map(short, variable.good)
        good = f"{low} to {high}, best {middle}"
        expected = " to ".join(map(short, variable.chance["range"]))
        narrow = f"{variable.chance['as_narrow']:.0%}"
    elif variable.full is None and len(variable.choices) > 1 and variable.n >= LEAST_FOR_RANGES:
        good = ", ".join(f"{row['choice']} {row['mass']:.0%}" for row in sorted(variable.choices, key=_by_mass)[:3])
    failed = ", ".join(f"{row['choice']}: {row['failed']}" for row in variable.choices if row["failed"]) or "–"
    p, holm = ("–" if x is None else f"{x:.2g}" for x in (variable.p, variable.holm))
    return variable.key, f"{variable.n:,}", p, holm, variable.verdict, good, expected, narrow, failed


def short(value: float) -> str:
    """Return a number in three digits, a whole one as it is."""
    return label(value) if value == int(value) else f"{value:.3g}"


def _by_mass(row: Any) -> float:
    return -row["mass"]


def _count(n: int) -> str:
    return f"{n} variable{' has' if n == 1 else 's have'}"


def _narrower(narrowed: Narrowed, words: str, toml: str | None) -> str:
    if narrowed.space is None:
        return _list("soft", narrowed.reasons)
    before = f"{_count(len(narrowed.changed))} fewer choices" if narrowed.changed else "Nothing is narrowed"
    size = f"; {amount(narrowed.space.size)} archs are left" if narrowed.space.finite and narrowed.changed else ""
    rest = "" if toml is None else f"<details><summary>its TOML</summary><pre>{esc(toml)}</pre></details>"
    reasons = "".join(f"<li>{esc(reason)}</li>" for reason in narrowed.reasons)
    reasons = f"<details><summary>why</summary><ul>{reasons}</ul></details>"
    words = f"{words[0].upper()}{words[1:]}."
    return f"<p>{esc(before)}{esc(size)}.</p>{f'<p>{esc(words)}</p>' if narrowed.changed else ''}{reasons}{rest}"
