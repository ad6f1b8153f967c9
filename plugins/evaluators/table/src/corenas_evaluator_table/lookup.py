"""Archs looked up by their codes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from corenas.contracts import Failure
from corenas.errors import Fault, UserError, did_you_mean, raise_if_any
from corenas.space import Arch, Codes, SearchSpace
from corenas.variables import Variable
from corenas_evaluator_table.reading import read_columns

if TYPE_CHECKING:
    from corenas_evaluator_table import Table

_DIGITS = 12
"""To which the codes of continuous variables are compared."""


class Lookup:
    """Gives archs the metrics of their rows; of several rows of one arch the mean.

    A row with a choice that the space lacks is left out; what a row's other choices make inactive may be anything.
    """

    def __init__(self, options: Table, space: SearchSpace) -> None:
        self.options, self.space = options, space
        self.names = [column.metric for column in options.columns]
        columns = read_columns(Path(options.file), self._wanted, options.table)
        metrics = np.array([[*map(_number, columns[name])] for name in self.names]).T
        codes, inside = self._codes(columns)
        if not inside.any():
            text = f"none of its {len(inside)} rows is an arch of this space"
            raise UserError(text, file=options.file, hint="cells under a variable's key are its choices")
        sums: dict[bytes, np.ndarray] = {}
        for key, row in zip(_keys(codes[inside]), metrics[inside], strict=True):
            sums[key] = sums.get(key, 0) + np.append(row, 1)
        self.rows: Mapping[bytes, list[float]] = {key: (row[:-1] / row[-1]).tolist() for key, row in sums.items()}

    def __call__(self, archs: Sequence[Arch], fidelity: float) -> list[Mapping[str, float] | Failure]:
        """Return the metrics of archs, whatever the fidelity."""
        return [self._found(key) for key in _keys(self.space.encode(archs))]

    def _found(self, key: bytes) -> Mapping[str, float] | Failure:
        row = self.rows.get(key)
        if row is None:
            return Failure(f"{self.options.file} has no row of this arch")
        for name, number in zip(self.names, row, strict=True):
            if math.isnan(number):
                return Failure(f"{self.options.file} has no number for its {name}")
        return dict(zip(self.names, row, strict=True))

    def _wanted(self, present: Sequence[str]) -> list[str]:
        """Return the columns to read. Raises UserError for those that are missing."""
        keys = [v.key for v in self.space.variables if len(v.choices) > 1 or v.key in present]
        raise_if_any(
            Fault(f"there is no column {name!r}", file=self.options.file, hint=did_you_mean(name, present, "columns"))
            for name in [*keys, *self.names]
            if name not in present
        )
        return [*dict.fromkeys([*keys, *self.names])]

    def _codes(self, columns: Mapping[str, Sequence[Any]]) -> tuple[Codes, np.ndarray]:
        """Return the canonical codes of all rows, and which of them are archs of the space."""
        n = len(columns[self.names[0]])
        codes = np.repeat(self.space.encode([self.space.default()]), n, axis=0)
        unknown = np.zeros(codes.shape, bool)
        for at, variable in enumerate(self.space.variables):
            if variable.key in columns:
                code_of = {cell: _code(variable, cell) for cell in {*columns[variable.key]}}
                found = [code_of[cell] for cell in columns[variable.key]]
                unknown[:, at] = [code is None for code in found]
                codes[:, at] = [codes[0, at] if code is None else code for code in found]
        outside = (unknown & self.space.active(codes)).any(axis=1)
        return self.space.canonical(codes), ~outside


def _keys(codes: Codes) -> list[bytes]:
    return [row.tobytes() for row in np.round(codes, _DIGITS) + 0]  # + 0: no -0.0


def _code(variable: Variable, cell: Any) -> float | None:
    """Return the code of a cell; None for what is none of the variable's choices."""
    kind = type(variable.choices[0])
    if kind is bool:  # SQLite knows 0 and 1, CSV text
        cell = {"true": True, "1": True, "false": False, "0": False}.get(str(cell).lower(), cell)
    elif kind is not str:
        cell = _number(cell)
    try:
        return variable.code_of(variable.canonical(cell))
    except ValueError:
        return None


def _number(cell: Any) -> float:
    """Return the number in a cell, NaN for what is none."""
    try:
        return float(cell)
    except (TypeError, ValueError):
        return math.nan
