"""Zen-NAS: search by scores of networks that were never trained, then train the best of them."""

from __future__ import annotations

from typing import ClassVar

from attrs import frozen

from corenas.contracts import AlgorithmContext, Trainer
from corenas.errors import UserError
from corenas.hookspecs import hookimpl


@frozen
class ZenNAS:
    """Zen-NAS (Lin et al. 2021, arXiv:2102.01063): zero-shot search, then training from scratch.

    No supernet is ever allocated: archs are ranked by what evaluators say of fresh networks, `zen_score` or another
    zero-cost score, and the best is trained as `[retrain]` says. The paper's evolution is the searcher "zennas".
    """

    stages: ClassVar[tuple[str, ...]] = ("search", "retrain")
    needs: ClassVar[tuple[str, ...]] = ("searcher",)

    def start(self, context: AlgorithmContext) -> Trainer:
        """Raise UserError: a run never asks for it, since "train" is none of the stages."""
        raise UserError("Zen-NAS trains no supernet", key=("algorithm",))


@hookimpl
def corenas_algorithms() -> dict[str, type]:
    """Offer the algorithm "zennas"."""
    return {"zennas": ZenNAS}
