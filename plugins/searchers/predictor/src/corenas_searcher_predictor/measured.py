"""Predictors that are fitted to a run or a file."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from corenas.contracts import Measured
from corenas.errors import UserError, regular
from corenas.features import Features
from corenas.space import Arch, SearchSpace
from corenas.store import Store
from corenas.variables import Variable
from corenas_searcher_predictor.regression import Regression, held_out

if TYPE_CHECKING:
    from corenas_searcher_predictor import Predicted

_FEWEST = 5
"""Archs without which nothing is fitted."""


class LivePredicted:
    """Predicts the metrics of archs; each trial is told how well that went on a fifth held out."""

    def __init__(self, options: Predicted, space: SearchSpace) -> None:
        self.space, self.features, self.facts = space, Features(space, squares=True), {}
        self.predictors: dict[str, Regression] = {}
        rows = [*_rows(Path(options.from_))]
        inside = [(arch, row) for arch, row in ((_arch(space, row), row) for row in rows) if arch is not None]
        matrix = self.features(space.encode(arch for arch, _ in inside))
        for target in options.targets:
            numbers = np.array([_number(row.get(target.metric)) for _, row in inside])
            known = np.isfinite(numbers)
            if known.sum() < _FEWEST:
                text = f"{known.sum()} of {len(rows)} rows are archs of this space with a number for {target.metric!r}"
                raise UserError(text, file=options.from_, hint=f"a predictor wants {_FEWEST} at least")
            name = f"predicted_{target.metric}"
            self.predictors[name] = Regression(options.model, matrix[known], numbers[known], 0)
            told = held_out(options.model, matrix[known], numbers[known], 0)
            self.facts |= {f"{name}_{fact}": number for fact, number in told.items()}

    def __call__(self, archs: Sequence[Arch], fidelity: float) -> list[Measured]:
        """Return the predictions for archs, whatever the fidelity."""
        if not archs:
            return []
        rows = self.features(self.space.encode(archs))
        # One by one: a product with a matrix rounds otherwise than one with a row.
        columns = {name: [float(predict(row[None])[0]) for row in rows] for name, predict in self.predictors.items()}
        return [
            Measured({name: column[at] for name, column in columns.items()}, self.facts) for at in range(len(archs))
        ]


def _rows(source: Path) -> Iterator[Mapping[str, Any]]:
    """Give choices and metrics of what was measured, under their names. Raises UserError if it cannot be read."""
    try:
        if source.is_dir():
            for trial in Store(source / "run.sqlite", readonly=True).trials():
                if trial.fidelity == 1:
                    yield {**trial.arch, **trial.metrics}
        else:
            with regular(source).open(encoding="utf-8-sig", newline="") as lines:
                yield from csv.DictReader(lines)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read this: {error}", file=str(source)) from None


def _arch(space: SearchSpace, row: Mapping[str, Any]) -> Arch | None:
    """Return the arch in a row; None if it is none of the space."""
    choices = {
        variable.key: _choice(variable, row[variable.key]) for variable in space.variables if variable.key in row
    }
    try:
        return space.arch(choices)
    except UserError:
        return None


def _choice(variable: Variable, cell: Any) -> Any:
    """Return what a cell says; the default for an empty one, which an inactive variable may have."""
    if cell in ("", None):
        return variable.default
    kind = type(variable.choices[0])
    if kind is bool:
        return {"true": True, "false": False}.get(str(cell).lower(), cell)
    return cell if kind is str else _number(cell)


def _number(cell: Any) -> float:
    try:
        return float(cell)
    except (TypeError, ValueError):
        return math.nan
