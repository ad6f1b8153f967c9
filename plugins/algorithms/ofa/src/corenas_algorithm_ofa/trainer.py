"""Progressive shrinking (Cai et al. 2020, arXiv:1908.09791, section 3.2)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from corenas.calibrate import statistics_kept
from corenas.contracts import AlgorithmContext, Phase, Signals, Step
from corenas.errors import UserError
from corenas.mutable import apply
from corenas.regularisation import unregularised
from corenas.space import Arch, SearchSpace
from corenas.supernet import observe
from corenas.teaching import FixedTeacher
from corenas_algorithm_ofa.phases import planned_stages, resized
from corenas_mutable_sorting import sort_channels

if TYPE_CHECKING:
    from corenas_algorithm_ofa import OnceForAll


class OnceForAllTrainer:
    """Trains the full network, then ever smaller subnets of it beside the larger ones.

    teacher: a copy of the full network as it was at the end of its phase; None before
    """

    def __init__(self, options: OnceForAll, context: AlgorithmContext) -> None:
        if context.distiller is None:
            raise UserError("ofa learns from the full network by a distiller", key=("distiller",))
        self.options, self.supernet, self.task = options, context.supernet, context.task
        self.distiller = context.distiller
        self.full, self.resized = context.space.largest(), resized(context.supernet)
        self.teacher: nn.Module | None = None
        full, *shrinking = planned_stages(context, options.phases)
        self.phases, trained = [Phase(full.space, full.train, paths=full.paths)], full.space
        for stage in shrinking:
            begin = partial(self.begin, trained if stage.narrows else None)
            self.phases.append(Phase(stage.space, stage.train, begin, stage.paths))
            trained = stage.space

    def begin(self, trained: SearchSpace | None) -> None:
        """Make the full network the teacher, if none is yet; sort channels, if narrower ones join in.

        trained: the subnets that were trained so far, where channels are to be sorted: none of them changes
        """
        if self.teacher is None and self.options.kd_ratio > 0:
            self.teacher = self._copy()
        if trained is not None:
            sort_channels(self.supernet, self.task.example, self.options.importance, trained)

    def train_step(self, batch: Any, step: Step) -> Mapping[str, Tensor]:
        """Add up the gradients of all subnets of a step: loss = labels + kd_ratio * distillation."""
        losses, taught = [], {}
        for arch in step.archs:
            seen_at = self._full(arch)
            if self.teacher is not None and seen_at not in taught:  # once, where a step shares its resolution
                taught[seen_at] = self._teach(batch, seen_at)
            with apply(self.supernet, arch):
                student = observe(self.supernet, self.task, batch, self.distiller.taps)
                loss = self.task.loss(student.outputs, batch)
                if self.teacher is not None:
                    loss = loss + self.options.kd_ratio * self.distiller.loss(student, taught[seen_at])
                losses.append(step.backward(loss))
        return {"loss": torch.stack(losses).mean()}

    def state_dict(self) -> Mapping[str, Any]:
        """Return the teacher's weights."""
        return {"teacher": None if self.teacher is None else self.teacher.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the teacher that there was."""
        self.teacher = None
        if state["teacher"] is not None:
            self.teacher = self._copy()
            self.teacher.load_state_dict(state["teacher"])

    def _copy(self) -> nn.Module:
        """Return a copy of the supernet that learns nothing more."""
        return copy.deepcopy(self.supernet).requires_grad_(False).eval()

    def _full(self, arch: Arch) -> Arch:
        """Return the full network at the resolution of a subnet."""
        return Arch({**self.full, **{key: arch[key] for key in self.resized if key in arch}})

    def _teach(self, batch: Any, full: Arch) -> Signals:
        """Return what the full network shows of a batch."""
        assert self.teacher is not None
        taps = tuple(self.distiller.taps)
        with apply(self.teacher, full), statistics_kept(self.teacher):
            self.teacher.train(self.options.batch_statistics)
            with unregularised(self.teacher):
                return FixedTeacher(self.teacher, self.task, taps)(batch)
