"""Metrics of archs that somebody has measured before, from a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from attrs import field, frozen
from attrs.validators import min_len

from corenas.contracts import EvaluatorContext, LiveEvaluator, LiveTask, Metric
from corenas.hookspecs import hookimpl


@frozen
class Column:
    """A column of metrics.

    metric: its name, which is the metric's
    unit: as it is printed, "%" for instance
    direction: whether more is better, "max", or less, "min"
    """

    metric: str
    unit: str = ""
    direction: Literal["max", "min"] = "max"


@frozen
class Table:
    """Looks archs up in a file: a row for each, with a column for each variable, under its key, and for each metric.

    Nothing is computed, and no torch is needed: searchers are tried in seconds. An arch that is not in the file is a
    failed trial.

    file: .csv, .sqlite or .db, or .parquet, which wants pyarrow or pandas; looked for in the working directory
    metrics: columns that are metrics: a name, or a table with `metric`, `unit` and `direction`
    table: of a SQLite file, the table or view; left out, the only one
    """

    file: str
    metrics: tuple[str | Column, ...] = field(validator=min_len(1))
    table: str | None = None

    cheap: ClassVar[bool] = True

    @property
    def columns(self) -> list[Column]:
        """The metrics in their long form."""
        return [Column(column) if isinstance(column, str) else column for column in self.metrics]

    def provides(self, task: LiveTask) -> Mapping[str, Metric]:
        """Return the metrics that are named."""
        return {column.metric: Metric(column.unit, column.direction) for column in self.columns}

    def start(self, context: EvaluatorContext) -> LiveEvaluator:
        """Read the file. Raises UserError if it cannot be read, lacks a column or has no arch of the space."""
        from corenas_evaluator_table.lookup import Lookup

        return Lookup(self, context.space)


@hookimpl
def corenas_evaluators() -> dict[str, type]:
    """Offer the evaluator "table"."""
    return {"table": Table}
