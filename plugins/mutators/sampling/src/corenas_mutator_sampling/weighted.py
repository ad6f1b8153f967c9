"""A mutator that draws each choice with a probability of its own."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from attrs import field, frozen
from attrs.validators import ge

from corenas.contracts import MutatorContext
from corenas.errors import UserError
from corenas.space import Arch
from corenas.variables import Variable
from corenas_mutator_sampling.drawing import Score, SharedChoices, columns_named, with_paths


def _probabilities(instance: object, attribute: object, tables: Mapping[str, Mapping[str, float]]) -> None:
    for pattern, table in tables.items():
        if any(share < 0 for share in table.values()):
            raise ValueError(f"{pattern}: expected numbers of at least 0, found {dict(table)}")


@frozen
class Weighted:
    """Archs with a probability for each choice: the prior of Cream's code (Peng et al. 2020, arXiv:2010.15821).

    probabilities: variable, or a pattern of several -> choice -> how likely it is beside the others; they are divided
        by their sum. Variables that are not named are drawn uniformly
    paths: archs of a step
    shared: variables whose choice all archs of a step share
    """

    # A mapping has no hash; equal options have equal ones all the same.
    probabilities: Mapping[str, Mapping[str, float]] = field(factory=dict, validator=_probabilities, hash=False)
    paths: int = field(default=1, validator=ge(1))
    shared: tuple[str, ...] = ()

    def start(self, context: MutatorContext) -> WeightedSampler:
        """Return a sampler. Raises UserError for a variable or a choice that there is not, or one left out."""
        return WeightedSampler(with_paths(self, context), context)


class WeightedSampler:
    """Independent paths, each variable drawn by itself."""

    def __init__(self, options: Weighted, context: MutatorContext) -> None:
        self.options, self.space, self.rng = options, context.space, context.rng
        self.shared = SharedChoices(context, options.shared)
        self.weights: dict[int, np.ndarray] = {}
        for pattern, table in options.probabilities.items():
            for column in columns_named(self.space, [pattern], "probabilities"):
                self.weights[column] = _weights(pattern, table, self.space.variables[column])

    def sample(self, score: Score) -> list[Arch]:
        """Return as many archs as there are paths."""
        n = self.options.paths
        columns = [
            self.rng.choice(len(variable.choices), size=n, p=self.weights[column])
            if column in self.weights
            else variable.draw(self.rng, n)
            for column, variable in enumerate(self.space.variables)
        ]
        codes = np.array(columns).reshape(len(columns), n).T
        return self.shared.applied(codes)


def _weights(pattern: str, table: Mapping[str, float], variable: Variable) -> np.ndarray:
    """Return the probabilities of a variable's choices. A narrowed one has fewer choices than the table."""
    key = ("mutator", "probabilities", pattern)
    if variable.continuous:
        raise UserError(f"{variable.key} is continuous: it has no list of choices", key=key)
    names = [str(choice) for choice in variable.choices]
    missing = [name for name in names if name not in table]
    if missing:
        text = f"{variable.key} has no probability for {', '.join(missing)}"
        raise UserError(text, key=key, hint=f"its choices are {', '.join(names)}; 0 leaves one out")
    weights = np.array([table[name] for name in names])
    if not weights.sum() > 0:
        raise UserError(f"{variable.key} has no choice that is likelier than 0", key=key)
    return weights / weights.sum()
