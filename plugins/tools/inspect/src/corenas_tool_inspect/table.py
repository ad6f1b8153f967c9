"""How rows are printed: as JSON for programs, as columns for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from corenas.errors import shown
from corenas.store import strict_json


def print_json(content: Any) -> None:
    """One JSON object on stdout; what is no number, or infinite, is null there."""
    print(strict_json(content))


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Rows as columns of text, numbers to the right."""
    print("\n".join(columns(rows)))


def columns(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The lines of a table of rows."""
    if not rows:
        yield "nothing"
        return
    keys = [*dict.fromkeys(key for row in rows for key in row)]
    names = [*map(shown, keys)]
    cells = [[_cell(row.get(key, "")) for key in keys] for row in rows]
    widths = [max(map(len, column)) for column in zip(names, *cells, strict=True)]
    for line, values in [(names, None), *zip(cells, rows, strict=True)]:
        parts = []
        for i, (cell, width) in enumerate(zip(line, widths, strict=True)):
            number = isinstance((values or rows[0]).get(keys[i]), int | float)
            parts.append(cell.rjust(width) if number else cell.ljust(width))
        yield "  ".join(parts).rstrip()


def _cell(value: Any) -> str:
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.1f}"
    return f"{int(value):,}" if isinstance(value, int | float) else shown(str(value))
