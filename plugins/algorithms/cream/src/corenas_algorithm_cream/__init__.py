"""Cream of the Crop: the best paths of a training teach the others, and the best of them is the result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from attrs import field, frozen
from attrs.validators import ge, gt, optional

from corenas.contracts import AlgorithmContext, Surroundings
from corenas.hookspecs import hookimpl
from corenas.objectives import parse_amount

if TYPE_CHECKING:
    from corenas_algorithm_cream.trainer import CreamTrainer


def _amount(instance: object, attribute: object, value: float | str | None) -> None:
    if value is not None and parse_amount(value) <= 0:
        raise ValueError(f'expected an amount above 0 such as 287e6 or "287M", found {value!r}')


@frozen
class Cream:
    """Cream of the Crop (Peng et al. 2020, arXiv:2010.15821); goes with `mutator = "uniform"` or "weighted".

    Each path learns from the labels and from a better one: that of a board of prioritized paths which suits it best, as
    a meta network says, whose gradient goes through an update of the path. The best of the board is retrained.

    board: how many paths the board has
    warmup: epochs on the labels alone, after which the board is filled
    gap: how much better than the last of a full board a path has to be to replace it whatever its flops; otherwise it
        has to be as good at no more flops
    max_flops: flops of the most costly path that the board takes, "287M" for instance; left out, it takes any
    metric: of the task, by which paths are ranked
    measured_on: what a path is ranked by and the meta network learns from: "valid", a batch of validation data, or
        "train", the images that the path is trained on, as in the released code
    pick: who teaches: "meta", whom the meta network chooses; "best", the first of the board, with weight 0.5
    images: how many each path of the board keeps to be compared on, and the meta network learns from at a time
    meta_every: steps between two updates of the meta network
    meta_lr: learning rate of the meta network
    meta_clip: largest norm of its gradient
    virtual_lr: step size of the update that the meta network looks through; left out, the learning rate in force. The
        released code takes that of the meta network
    through_match: whether the student's gradient goes through its match with the teacher too, rather than taking it
        for a number
    loss: "added", labels + match * distillation; "shared", ((2 - match) * labels + match * distillation) / 2, as in the
        released code
    last_match: whether the weight is that of the board's last path with the sign turned, as in the released code
    borrowed_answers: whether a path is compared by what its own teacher said of its images, as in the released code
    duplicates: whether a path may be on the board several times, as in the released code
    """

    board: int = field(default=10, validator=ge(1))
    warmup: int = field(default=20, validator=ge(0))
    gap: float = field(default=5.0, validator=ge(0))
    max_flops: float | str | None = field(default=None, validator=_amount)
    metric: str = "top1"
    measured_on: Literal["valid", "train"] = "valid"
    pick: Literal["meta", "best"] = "meta"
    images: int = field(default=4, validator=ge(1))
    meta_every: int = field(default=200, validator=ge(1))
    meta_lr: float = field(default=1e-4, validator=gt(0))
    meta_clip: float = field(default=1.0, validator=gt(0))
    virtual_lr: float | None = field(default=None, validator=optional(gt(0)))
    through_match: bool = True
    loss: Literal["added", "shared"] = "added"
    last_match: bool = False
    borrowed_answers: bool = False
    duplicates: bool = False

    stages: ClassVar[tuple[str, ...]] = ("train", "derive", "retrain")
    needs: ClassVar[tuple[str, ...]] = ("mutator",)
    uses: ClassVar[tuple[str, ...]] = ("distiller",)

    def check(self, context: AlgorithmContext) -> None:
        """Raise UserError for a task without logits, metric or validation data, and for a warm-up that never ends."""
        from corenas_algorithm_cream.trainer import refuse_unfit

        refuse_unfit(self, context)

    def idle(self, around: Surroundings) -> Mapping[str, str]:
        """Return options that do nothing beside the others, and why."""
        if self.pick == "meta":
            return {}
        names = ("images", "meta_every", "meta_lr", "meta_clip", "virtual_lr", "through_match", "last_match")
        return dict.fromkeys((*names, "borrowed_answers"), 'with pick = "best" no meta network chooses')

    def start(self, context: AlgorithmContext) -> CreamTrainer:
        """Return the trainer of a supernet.

        Raises UserError for a task without logits, metric or validation data, and for a warm-up that never ends.
        """
        from corenas_algorithm_cream.trainer import CreamTrainer

        return CreamTrainer(self, context)


@hookimpl
def corenas_algorithms() -> dict[str, type]:
    """Offer the algorithm "cream"."""
    return {"cream": Cream}
