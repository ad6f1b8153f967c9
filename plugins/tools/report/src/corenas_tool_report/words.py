"""How numbers, times and tables are written for people, with all text from files escaped."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any


class Html(str):
    """Text that is HTML already; any other text is escaped where it is put into a page."""

    __slots__ = ()


def esc(content: Any) -> Html:
    """Content as HTML."""
    return content if isinstance(content, Html) else Html(html.escape(str(content)))


def join(parts: Iterable[Any], between: str = "") -> Html:
    """Contents one after another."""
    return Html(between.join(map(esc, parts)))


def tag(name: str, *content: Any, **attributes: Any) -> Html:
    """An element; `class_` is written `class`, and `aria_label` is written `aria-label`."""
    given = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    text = "".join(f' {key}="{html.escape(str(value))}"' for key, value in given.items())
    return Html(f"<{name}{text}>{join(content)}</{name}>")


def table(
    caption: str, head: Sequence[Any], rows: Iterable[Sequence[Any]], class_: str | None = None, seen: bool = True
) -> Html:
    """A table in a box that scrolls by itself; the first cell of each row is its heading.

    seen: False shows its caption to screen readers alone, where what stands above says the same
    """
    top = tag("tr", *(tag("th", cell, scope="col") for cell in head))
    lines = [tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])) for row in rows]
    titled = tag("caption", caption, class_=None if seen else "unseen")
    body = tag("table", titled, tag("thead", top), tag("tbody", *lines), class_=class_)
    return tag("div", body, class_="scroll", tabindex="0", role="region", aria_label=caption)


_SUFFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def number(value: float) -> str:
    """Three digits: 1.95M, 97.7k, 0.0123."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return str(value)
    for size, suffix in _SUFFIXES:
        if abs(value) >= size * 0.9995:
            return f"{_three(value / size)}{suffix}"
    return f"{value:,}" if isinstance(value, int) else _three(value)


def _three(value: float) -> str:
    text = f"{value:.3g}"
    return f"{value:.0f}" if "e+" in text else text


def exact(value: float) -> Html:
    """Three digits, with all of them in a tooltip."""
    short, long = number(value), f"{value:,}"
    return esc(short) if short == long else tag("span", short, title=long)


def noise(percent: float, samples: int) -> float | None:
    """The binomial standard error of a percentage of samples, in points; None where there is no such thing."""
    return math.sqrt(percent * (100 - percent) / samples) if samples and 0 <= percent <= 100 else None


def measured(value: float, unit: str, samples: int = 0) -> str:
    """A metric: "98.2 ± 0.4 %" if it is a share of samples."""
    if unit != "%":
        return f"{number(value)} {unit}".rstrip()
    error = noise(value, samples)
    digits = 2 if error and error < 0.095 else 1
    return f"{value:.{digits}f}{f' ± {error:.{digits}f}' if error else ''} %"  # of 100 % the formula knows no noise


def duration(seconds: float) -> str:
    """As people say it: "0.13 s", "42 s", "7 min 12 s", "2 h 05 min"."""
    if seconds < 9.95:
        return f"{seconds:.2g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def plural(n: int, noun: str) -> str:
    """A count: "1 trial", "1,200 trials"."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"
