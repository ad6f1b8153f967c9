"""No search: one network, trained from scratch."""

from __future__ import annotations

from typing import ClassVar

from attrs import frozen

from corenas.contracts import AlgorithmContext, Trainer
from corenas.errors import UserError
from corenas.hookspecs import hookimpl


@frozen
class Plain:
    """Trains the default arch of a space from scratch: that of a file with `space = { file = …, arch = "arch.toml" }`.

    It is trained as the same arch would be after a search: as `[retrain]` says, or else `[train]`.
    """

    stages: ClassVar[tuple[str, ...]] = ("retrain",)
    needs: ClassVar[tuple[str, ...]] = ()

    def start(self, context: AlgorithmContext) -> Trainer:
        """Raise UserError: a run never asks for it, since "train" is none of the stages."""
        raise UserError("there is no supernet to train", key=("algorithm",))


@hookimpl
def corenas_algorithms() -> dict[str, type]:
    """Offer the algorithm "plain"."""
    return {"plain": Plain}
