"""The page of a comparison: one HTML file that needs nothing else."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from corenas.objectives import amount

_STYLE = """
:root { color-scheme: light dark; --back: #fbfbfa; --card: #fff; --ink: #1c2024; --soft: #5b6470; --line: #dfe3e8;
  --mark: #1a62b8; }
@media (prefers-color-scheme: dark) {
  :root { --back: #14171a; --card: #1b1f24; --ink: #e6e8ea; --soft: #9aa4af; --line: #2f363e; --mark: #6aaeff; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 24px 16px 48px; background: var(--back); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 4px; }
h2 { font-size: 20px; margin: 0 0 12px; }
.soft, caption { color: var(--soft); font-size: 14px; text-align: left; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 20px; margin: 16px 0; }
.notice { border-left: 4px solid #d9601a; background: var(--card); padding: 10px 14px 10px 32px; margin: 16px 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 15px; font-variant-numeric: tabular-nums; min-width: 760px; }
th, td { text-align: left; padding: 6px 18px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: normal; }
td:not(:last-child), tbody th { white-space: nowrap; }
td:last-child { min-width: 24ch; }
thead th { color: var(--soft); font-weight: 500; font-size: 14px; }
tbody th { font-weight: 500; }
svg { display: block; width: 100%; height: auto; max-width: 760px; min-width: 560px; }
svg text { font: 13px system-ui, sans-serif; fill: var(--ink); }
"""


def esc(content: Any) -> str:
    """Return text as HTML."""
    return html.escape(str(content))


def write_page(found: Mapping[str, Any], summary: Mapping[str, Any], path: Path) -> None:
    """Write the page."""
    metric, table = found["metric"], summary["table"]
    head = (
        "method",
        "runs",
        f"inherited {metric}",
        "its test",
        "trained alone, test",
        "flops",
        "training",
        "tau",
        "seconds",
    )
    rows = [
        (
            line["method"],
            line["runs"],
            *(said(line[key]) for key in ("inherited", "test", "retrained")),
            *(amount(line[key][0]) if line[key] and line[key][0] else "–" for key in ("flops", "training_flops")),
            said(line["tau"], 2),
            ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in line["seconds"].items()),
        )
        for line in table
    ]
    top = "".join(f"<th scope='col'>{esc(cell)}</th>" for cell in head)
    cells = [(row[0], "".join(f"<td>{esc(cell)}</td>" for cell in row[1:])) for row in rows]
    body = "".join(f"<tr><th scope='row'>{esc(name)}</th>{rest}</tr>" for name, rest in cells)
    caption = (
        "Means over seeds with 95% t intervals. Inherited: validation, weights of the supernet (of methods without "
        "one, as trained); trained alone: from scratch, all alike, on test data. Flops count a multiply-add once; "
        "training: those of the method's training."
    )
    reference = len(found["reference"])
    about = f"Budget {amount(found['budget'])} multiply-adds of training; {reference} archs trained alone for tau."
    notes = "".join(f"<li>{esc(note)}</li>" for note in summary["notes"])
    parts = [
        "<!DOCTYPE html><html lang='en'><head><meta charset='utf-8'><title>Comparison</title>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<style>{_STYLE}</style></head><body><main><h1>Methods compared</h1><p class='soft'>{esc(about)}</p>",
        f"<ul class='notice'>{notes}</ul>" if notes else "",
        f"<section><h2>Networks found, trained alone</h2><div class='scroll' tabindex='0'>"
        f"{_intervals(table, 'retrained')}</div></section>",
        f"<section><h2>All figures</h2><p class='soft'>{esc(caption)}</p>",
        "<div class='scroll' tabindex='0' role='region' aria-label='All figures'><table>",
        f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div></section>",
        "</main></body></html>",
    ]
    path.write_text("\n".join(parts), encoding="utf-8")


def said(pair: Sequence[float | None] | None, digits: int = 1) -> str:
    """Return a mean with its interval."""
    if pair is None or pair[0] is None:
        return "–"
    mean, half = pair
    return f"{mean:.{digits}f}" if half is None else f"{mean:.{digits}f} ± {half:.{digits}f}"


def _intervals(table: Sequence[Mapping[str, Any]], key: str) -> str:
    """Return a picture of means with their intervals, a line for each method."""
    some = [(line["method"], *line[key]) for line in table if line[key]]
    if not some:
        return "<p>Nothing to show yet.</p>"
    low = min(mean - (half or 0) for _, mean, half in some)
    high = max(mean + (half or 0) for _, mean, half in some)
    room = (high - low) * 0.08 or 1.0
    low, high = low - room, high + room

    def x(number: float) -> float:
        return 200 + 520 * (number - low) / (high - low)

    lines = []
    for i, (name, mean, half) in enumerate(some):
        y = 24 + 30 * i
        short = name if len(name) <= 26 else f"{name[:24]}…"
        lines.append(f"<text x='0' y='{y + 4}'>{esc(short)}</text>")
        if half is not None:
            ends = f"x1='{x(mean - half):.1f}' x2='{x(mean + half):.1f}'"
            lines.append(f"<line {ends} y1='{y}' y2='{y}' stroke='var(--mark)' stroke-width='2'/>")
        lines.append(f"<circle cx='{x(mean):.1f}' cy='{y}' r='5' fill='var(--mark)'/>")
        lines.append(f"<text x='{x(mean):.1f}' y='{y - 9}' text-anchor='middle'>{esc(said((mean, half)))}</text>")
    height = 30 * len(some) + 16
    return f"<svg viewBox='0 0 740 {height}' role='img' aria-label='Means with intervals'>{''.join(lines)}</svg>"
