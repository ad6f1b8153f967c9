"""How an arch is measured: costs first, then what is cheap, and what is costly only where the constraints are met."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from attrs import frozen

from corenas import seeding
from corenas.contracts import Evaluator, EvaluatorContext, Failure, Measure, Trial
from corenas.cost import METRICS, Cost
from corenas.errors import UserError, blaming_plugin
from corenas.objectives import Constraint
from corenas.space import Arch


@frozen
class Stand:
    """A measuring stand: what gives the metrics of an arch, in the order in which it is asked.

    measures: name, metrics that it promises, function
    """

    measures: Sequence[tuple[str, frozenset[str], Measure]]
    constraints: Sequence[Constraint] = ()
    seed: int = 0

    def __call__(self, arch: Arch, fidelity: float = 1.0) -> Trial:
        """Measure an arch, with a share of the whole effort. What raises is a failed trial with the reason."""
        start = time.perf_counter()
        metrics: dict[str, float] = {}
        state, error = "done", None
        for name, promised, measure in self.measures:
            if (error := self._fill(metrics, promised, measure, arch, fidelity)) is not None:
                state, error = "failed", f"{name}: {error}"
            elif (error := broken(self.constraints, metrics)) is not None:
                state = "infeasible"
            if state != "done":
                break
        return Trial(arch, metrics, state, time.perf_counter() - start, error, fidelity)  # type: ignore[arg-type]

    def _fill(
        self, metrics: dict[str, float], promised: frozenset[str], measure: Measure, arch: Arch, fidelity: float
    ) -> str | None:
        """Add what a function measures; returns what went wrong."""
        try:
            with seeding.seeded(self.seed, "measure", int(arch.digest, 16) >> 1):
                (found,) = measure([arch], fidelity)
            if isinstance(found, Failure):
                return found.reason
            if found.keys() != promised:
                return f"promised {', '.join(sorted(promised))} and gave {', '.join(map(str, found)) or 'nothing'}"
            metrics |= plain(found)
        except UserError:
            raise
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return None


def plain(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Metrics as plain numbers, which can be stored; one of numpy or torch becomes a float. Raises as `float` does."""
    if text := [name for name, n in metrics.items() if isinstance(n, str | bytes)]:
        raise TypeError(f"{text[0]} is text, no number")
    return {str(name): n if type(n) is int and abs(n) < 1 << 63 else float(n) for name, n in metrics.items()}


def broken(constraints: Sequence[Constraint], metrics: Mapping[str, float]) -> str | None:
    """Which constraint metrics do not meet, as a reason; None if they meet all."""
    return next((f"not {constraint}" for constraint in constraints if not constraint.met(metrics)), None)


def stand(
    options: Mapping[str, Evaluator], context: EvaluatorContext, constraints: Sequence[Constraint] = (), seed: int = 0
) -> Stand:
    """The stand of some evaluators (name -> options): costs first, then cheap ones, then the others."""
    measures: list[tuple[str, frozenset[str], Measure]] = [("cost", frozenset(METRICS), _costs(context.cost))]
    for name, evaluator in sorted(options.items(), key=lambda item: not item[1].cheap):
        with blaming_plugin(name):
            measures.append((name, frozenset(evaluator.provides(context.task)), evaluator.start(context)))
    return Stand(measures, constraints, seed)


def _costs(cost: Cost) -> Measure:
    return lambda archs, fidelity: cost.of(archs)
