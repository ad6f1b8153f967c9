"""A mutator that draws archs uniformly over what they cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from attrs import field, frozen
from attrs.validators import ge

from corenas.contracts import MutatorContext, Surroundings
from corenas.space import Arch
from corenas_mutator_sampling.drawing import CostBins, Score, check_amount, check_width, with_paths


@frozen
class FlopsUniform:
    """A bin of flops drawn uniformly, then an arch in it: what SPOS's released code does (Guo et al. 2020).

    Its paper (arXiv:1904.00420) draws choices uniformly: `uniform`.

    paths: archs of a step, each with a bin of its own
    metric: what is binned: "flops", "params" or "activations"
    bins: how many bins there are between `low` and `high`, unless `width` says how wide they are
    width: how wide a bin is, "10M" for instance
    low: where the first bin begins; left out, at the cheapest of the archs drawn beforehand
    high: where the last bin ends; left out, at the most costly of these
    draws: archs drawn beforehand, to know what there is; a bin that none of them falls into is left out
    tries: archs drawn at a step to find one in a bin, before one that was drawn beforehand is taken
    """

    paths: int = field(default=1, validator=ge(1))
    metric: Literal["flops", "params", "activations"] = "flops"
    bins: int = field(default=7, validator=ge(1))
    width: float | str | None = field(default=None, validator=check_width)
    low: float | str | None = field(default=None, validator=check_amount)
    high: float | str | None = field(default=None, validator=check_amount)
    draws: int = field(default=10_000, validator=ge(1))
    tries: int = field(default=500, validator=ge(0))

    def idle(self, around: Surroundings) -> Mapping[str, str]:
        """Return options that do nothing beside the others, and why."""
        return {} if self.width is None else {"bins": "`width` says how wide they are"}

    def start(self, context: MutatorContext) -> FlopsUniformSampler:
        """Return a sampler. Raises UserError if no arch costs what the bounds say."""
        return FlopsUniformSampler(with_paths(self, context), context)


class FlopsUniformSampler:
    """Independent paths, all bins equally often."""

    def __init__(self, options: FlopsUniform, context: MutatorContext) -> None:
        self.paths, self.space = options.paths, context.space
        self.bins = CostBins(options, context)

    def sample(self, score: Score) -> list[Arch]:
        """Return as many archs as there are paths."""
        codes = [self.bins.draw(self.bins.choose(uniform=True), 1) for _ in range(self.paths)]
        return self.space.decode(np.concatenate(codes))
