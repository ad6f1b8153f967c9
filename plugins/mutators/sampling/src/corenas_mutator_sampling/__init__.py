"""How the archs of a training step are drawn: the largest, uniformly, the sandwich."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

from attrs import field, frozen
from attrs.validators import ge

from corenas.contracts import MutatorContext
from corenas.errors import UserError
from corenas.hookspecs import hookimpl
from corenas.space import Arch

Score: TypeAlias = Callable[[Sequence[Arch]], Sequence[float]]


@frozen
class Max:
    """The largest arch at every step: trains the whole supernet, as Once-for-All does first (arXiv:1908.09791)."""

    def start(self, context: MutatorContext) -> MaxSampler:
        """A sampler that draws nothing."""
        return MaxSampler(context)


class MaxSampler:
    """One path, the largest arch of the space."""

    def __init__(self, context: MutatorContext) -> None:
        self.largest = context.space.largest()

    def sample(self, score: Score) -> list[Arch]:
        """One arch, always the same."""
        return [self.largest]


@frozen
class Uniform:
    """Archs drawn uniformly: one path a step (SPOS, Guo et al. 2020, arXiv:1904.00420) or several.

    paths: archs of a step
    over: "variables": each variable uniform, so that every choice of it is trained equally often; "archs": uniform
        over distinct archs, so that deep stages come up as often as there are such archs
    """

    paths: int = field(default=1, validator=ge(1))
    over: Literal["variables", "archs"] = "variables"

    def start(self, context: MutatorContext) -> UniformSampler:
        """A sampler; raises UserError for `over = "archs"` on a space whose archs cannot be counted."""
        endless = [v.key for v in context.space.variables if v.continuous]
        if self.over == "archs" and endless:
            raise UserError(
                f"archs cannot be counted: {', '.join(endless)} is continuous",
                key=("over",),
                hint='give it a step, or draw over = "variables"',
            )
        return UniformSampler(self, context)


class UniformSampler:
    """Independent paths; an arch can come up twice in a step."""

    def __init__(self, options: Uniform, context: MutatorContext) -> None:
        self.options = options
        self.space = context.space
        self.rng = context.rng

    def sample(self, score: Score) -> list[Arch]:
        """As many archs as there are paths."""
        if self.options.over == "archs":
            return [self.space.sample_uniform_archs(self.rng) for _ in range(self.options.paths)]
        return self.space.decode(self.space.draw(self.rng, self.options.paths))


@frozen
class Sandwich:
    """The largest arch, then random ones, then the smallest (BigNAS, Yu et al. 2020, arXiv:2003.11142, section 3.1).

    The largest comes first, so that an algorithm can distil the others from it within the step.

    random: random archs of a step, each variable uniform; they may repeat another one of the step
    """

    random: int = field(default=2, validator=ge(0))

    def start(self, context: MutatorContext) -> SandwichSampler:
        """A sampler of `random + 2` archs."""
        return SandwichSampler(self, context)


class SandwichSampler:
    """Both ends of the space at every step, and some of what lies between."""

    def __init__(self, options: Sandwich, context: MutatorContext) -> None:
        self.options = options
        self.space = context.space
        self.rng = context.rng
        self.largest, self.smallest = self.space.largest(), self.space.smallest()

    def sample(self, score: Score) -> list[Arch]:
        """Largest, random ones, smallest, in this order."""
        return [self.largest, *self.space.decode(self.space.draw(self.rng, self.options.random)), self.smallest]


@hookimpl
def corenas_mutators() -> dict[str, type]:
    """The mutators "max", "uniform" and "sandwich"."""
    return {"max": Max, "uniform": Uniform, "sandwich": Sandwich}
