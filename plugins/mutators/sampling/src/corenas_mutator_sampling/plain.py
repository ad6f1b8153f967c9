"""Mutators that look at no cost and no loss: the largest arch, uniform draws, the sandwich."""

from __future__ import annotations

from typing import Literal

import numpy as np
from attrs import field, frozen
from attrs.validators import ge

from corenas.contracts import MutatorContext
from corenas.errors import UserError
from corenas.space import Arch
from corenas_mutator_sampling.drawing import Score, SharedChoices, drawn, with_paths


@frozen
class Max:
    """The largest arch at every step: trains the whole supernet, as Once-for-All does first (arXiv:1908.09791)."""

    def start(self, context: MutatorContext) -> MaxSampler:
        """Return a sampler that draws nothing."""
        return MaxSampler(context)


class MaxSampler:
    """One path, the largest arch of the space."""

    def __init__(self, context: MutatorContext) -> None:
        self.largest, self.paths = context.space.largest(), context.paths or 1

    def sample(self, score: Score) -> list[Arch]:
        """Return one arch, always the same, as often as the phase wants it."""
        return [self.largest] * self.paths


@frozen
class Uniform:
    """Archs drawn uniformly: one path a step (SPOS, Guo et al. 2020, arXiv:1904.00420) or several.

    paths: archs of a step
    over: "variables": each variable uniform, so that every choice of it is trained equally often; "archs": uniform
        over distinct archs, so that deep stages come up as often as there are such archs
    shared: variables whose choice all archs of a step share; "stages.*.depth" names all that match
    """

    paths: int = field(default=1, validator=ge(1))
    over: Literal["variables", "archs"] = "variables"
    shared: tuple[str, ...] = ()

    def start(self, context: MutatorContext) -> UniformSampler:
        """Return a sampler. Raises UserError for whole archs where they cannot be counted or share a choice."""
        if self.over == "archs" and self.shared:
            text = 'over = "archs" draws whole archs: they cannot share a choice'
            raise UserError(text, key=("mutator", "shared"), hint='draw over = "variables"')
        endless = [v.key for v in context.space.variables if v.continuous]
        if self.over == "archs" and endless:
            raise UserError(
                f"archs cannot be counted: {', '.join(endless)} is continuous",
                key=("mutator", "over"),
                hint='give it a step, or draw over = "variables"',
            )
        return UniformSampler(with_paths(self, context), context)


class UniformSampler:
    """Independent paths; an arch can come up twice in a step."""

    def __init__(self, options: Uniform, context: MutatorContext) -> None:
        self.options = options
        self.space = context.space
        self.rng = context.rng
        self.shared = SharedChoices(context, options.shared)

    def sample(self, score: Score) -> list[Arch]:
        """Return as many archs as there are paths."""
        if self.options.over == "variables":
            return self.shared.applied(drawn(self.space, self.rng, self.options.paths))
        return [self.space.sample_uniform_archs(self.rng) for _ in range(self.options.paths)]


@frozen
class Sandwich:
    """The largest arch, then random ones, then the smallest (BigNAS, Yu et al. 2020, arXiv:2003.11142, section 3.1).

    The largest comes first, so that an algorithm can distil the others from it within the step.

    paths: archs of a step; with 4 there are two random ones, each variable uniform
    shared: variables whose choice all archs of a step share, the largest and the smallest too; "stages.*.depth" names
        all that match
    """

    paths: int = field(default=4, validator=ge(2))
    shared: tuple[str, ...] = ()

    def start(self, context: MutatorContext) -> SandwichSampler:
        """Return a sampler of so many archs."""
        return SandwichSampler(with_paths(self, context), context)


class SandwichSampler:
    """Both ends of the space at every step, and some of what lies between."""

    def __init__(self, options: Sandwich, context: MutatorContext) -> None:
        self.options = options
        self.space = context.space
        self.rng = context.rng
        self.shared = SharedChoices(context, options.shared)
        variables = self.space.variables
        self.largest = np.array([[v.code_of(v.largest) for v in variables]])
        self.smallest = np.array([[v.code_of(v.smallest) for v in variables]])

    def sample(self, score: Score) -> list[Arch]:
        """Return the largest, random ones, the smallest, in this order."""
        between = drawn(self.space, self.rng, self.options.paths - 2)
        return self.shared.applied(np.concatenate([self.largest, between, self.smallest]))
