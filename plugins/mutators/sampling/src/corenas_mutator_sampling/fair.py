"""A mutator that uses every choice of every variable equally often in each step."""

from __future__ import annotations

import numpy as np
from attrs import field, frozen
from attrs.validators import ge, optional

from corenas.contracts import MutatorContext
from corenas.errors import UserError
from corenas.space import Arch, Codes
from corenas_mutator_sampling.drawing import Score, SharedChoices, with_paths


@frozen
class Fair:
    """Strict fairness: as many paths as choices, each choice on one (FairNAS, Chu et al. 2021, arXiv:1907.01845).

    A variable with fewer choices than there are paths has each on as many paths as any other one, or on one more; which
    ones have more is drawn anew at each step. If the number of its choices divides `paths`, that is strictly fair too.
    A variable under a condition is dealt out among the paths on which it is active, in the same way.

    paths: archs of a step; left out, the largest number of choices of a variable. Their least common multiple is
        strictly fair to all variables without a condition
    shared: variables whose choice all archs of a step share, at random: they are exempt
    """

    paths: int | None = field(default=None, validator=optional(ge(1)))
    shared: tuple[str, ...] = ()

    def start(self, context: MutatorContext) -> FairSampler:
        """Return a sampler. Raises UserError for a continuous variable, and for fewer paths than choices."""
        return FairSampler(with_paths(self, context), context)


class FairSampler:
    """Deals the choices of each variable out to the paths of a step, in an order of its own (algorithm 1)."""

    def __init__(self, options: Fair, context: MutatorContext) -> None:
        self.space, self.rng = context.space, context.rng
        self.shared = SharedChoices(context, options.shared)
        variables = self.space.variables
        endless = [v.key for v in variables if v.continuous]
        if endless:
            hint = "give it a step; or leave it to the mutator uniform"
            raise UserError(f"{endless[0]} is continuous: its choices cannot be dealt out", key=("mutator",), hint=hint)
        most = max((len(v.choices) for i, v in enumerate(variables) if i not in self.shared.columns), default=1)
        self.paths = options.paths or most
        if self.paths < most:
            text = f"{self.paths} paths cannot use all {most} choices of a variable"
            raise UserError(text, key=("mutator", "paths"))
        self.defaults = [variable.code_of(variable.default) for variable in variables]
        # For each variable its conditions: the parent's column, and whether each of its choices is allowed.
        self.conditions = [
            [
                (self.space.keys.index(c.key), np.array([x in c.choices for x in self.space[c.key].choices]))
                for c in variable.when
            ]
            for variable in variables
        ]

    def sample(self, score: Score) -> list[Arch]:
        """Return as many archs as there are paths."""
        shared = self.shared.draw()
        codes = np.empty((self.paths, len(self.space.variables)), np.int64)
        active = np.ones(codes.shape, bool)
        for column, variable in enumerate(self.space.variables):
            for parent, allowed in self.conditions[column]:
                active[:, column] &= active[:, parent] & allowed[codes[:, parent]]
            rows = np.flatnonzero(active[:, column])
            codes[:, column] = self.defaults[column]
            if shared is not None and column in self.shared.columns:
                codes[rows, column] = shared[column]
            else:
                codes[rows, column] = self._dealt(len(variable.choices), len(rows))
        return self.space.decode(codes)

    def _dealt(self, choices: int, paths: int) -> Codes:
        """Return a code for each path, in random order, every one equally often or once more."""
        rounds = [self.rng.permutation(choices) for _ in range(-(-paths // choices))]
        return self.rng.permutation(np.concatenate([*rounds, np.empty(0, np.int64)])[:paths])
