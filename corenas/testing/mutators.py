"""What every mutator promises: `@pytest.mark.parametrize("check", mutator_checks)` in a plugin's tests.

Each check takes the options of a mutator. Needs no torch.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np

from corenas.contracts import Mutator, MutatorContext, Stateful
from corenas.errors import UserError
from corenas.space import Arch, Codes, SearchSpace
from corenas.testing.components import component_checks, global_generators_untouched
from corenas.testing.searchers import large_space


class PlainCost:
    """Stands in for `corenas.cost.Cost` without a model: every metric is 1 plus the sum of an arch's codes."""

    def __init__(self, space: SearchSpace) -> None:
        self.space = space

    def __call__(self, codes: Codes) -> dict[str, np.ndarray]:
        """Columns of metrics for a matrix of codes."""
        return dict.fromkeys(("flops", "params", "activations"), 1 + codes.sum(axis=1))

    def of(self, archs: Iterable[Mapping[str, Any]]) -> list[dict[str, int]]:
        """Metrics of archs, one mapping each."""
        return [
            dict.fromkeys(("flops", "params", "activations"), int(n)) for n in self(self.space.encode(archs))["flops"]
        ]

    def on(self, space: SearchSpace) -> PlainCost:
        """The same for a narrower space."""
        return PlainCost(space)


def context(space: SearchSpace | None = None, seed: int = 0, paths: int | None = None) -> MutatorContext:
    """What a sampler gets, with a cost that needs no model."""
    space = space or large_space()
    return MutatorContext(space, cast(Any, PlainCost(space)), np.random.default_rng(seed), paths)


def scores(archs: Sequence[Arch]) -> list[float]:
    """Losses on a batch, as a training step would give them: they depend on the arch alone."""
    return [int(arch.digest, 16) / 2**64 for arch in archs]


def _steps(mutator: Mutator, where: MutatorContext, n: int = 30) -> list[list[Arch]]:
    sampler = mutator.start(where)
    return [sampler.sample(scores) for _ in range(n)]


def draws_archs_of_its_space(mutator: Mutator) -> None:
    """Each step has at least one arch; all are canonical archs of the space."""
    where = context()
    for step in _steps(mutator, where):
        assert step
        assert all(isinstance(arch, Arch) and arch in where.space for arch in step)


def draws_from_a_narrower_space(mutator: Mutator) -> None:
    """The context's space counts, not the supernet's: Once-for-All's phases open it step by step."""
    space = large_space().narrow({"depth": [1, 2], "width.*": [16, 24]})
    assert all(arch in space for step in _steps(mutator, context(space)) for arch in step)


def draws_as_many_archs_as_a_phase_wants(mutator: Mutator) -> None:
    """Where the context says how many, each step has so many; a mutator that cannot draw so many says so at once."""
    for paths in (1, 2, 12):
        with contextlib.suppress(UserError):
            assert {len(step) for step in _steps(mutator, context(paths=paths), 5)} == {paths}


def draws_every_choice(mutator: Mutator) -> None:
    """Sooner or later each choice of each variable is drawn where it is active: none is never trained."""
    where = context()
    codes = where.space.encode(arch for step in _steps(mutator, where, 300) for arch in step)
    for variable, column in zip(where.space.variables, codes.T, strict=True):
        missing = [choice for i, choice in enumerate(variable.choices) if i not in column]
        assert not missing, f"never draws {variable.key} = {missing}"


def scores_only_archs_of_its_space(mutator: Mutator) -> None:
    """Where it asks for losses, it asks for those of archs that the supernet has."""
    where = context()
    sampler = mutator.start(where)

    def score(archs: Sequence[Arch]) -> list[float]:
        assert all(arch in where.space for arch in archs)
        return scores(archs)

    for _ in range(10):
        sampler.sample(score)


def same_seed_same_archs(mutator: Mutator) -> None:
    """So that all processes of a training train the same subnets."""
    assert _steps(mutator, context(seed=1)) == _steps(mutator, context(seed=1))


def its_state_is_the_generator_and_what_it_gives(mutator: Mutator) -> None:
    """A training that is resumed restores the generator, and the state of a sampler that has one, and goes on so."""
    first, second = context(), context(seed=1)
    sampler = mutator.start(first)
    for _ in range(5):
        sampler.sample(scores)
    second.rng.bit_generator.state = first.rng.bit_generator.state
    resumed = mutator.start(second)
    if isinstance(sampler, Stateful):
        assert isinstance(resumed, Stateful)
        resumed.load_state_dict(json.loads(json.dumps(sampler.state_dict())))  # plain data
    assert [sampler.sample(scores) for _ in range(10)] == [resumed.sample(scores) for _ in range(10)]


def touches_no_global_generator(mutator: Mutator) -> None:
    """All randomness comes from the generator in the context."""
    with global_generators_untouched():
        _steps(mutator, context())


mutator_checks = [
    *component_checks,
    draws_archs_of_its_space,
    draws_from_a_narrower_space,
    draws_as_many_archs_as_a_phase_wants,
    draws_every_choice,
    scores_only_archs_of_its_space,
    same_seed_same_archs,
    its_state_is_the_generator_and_what_it_gives,
    touches_no_global_generator,
]
"""What every mutator keeps to. One that draws certain archs alone (the largest) leaves `draws_every_choice` out."""
