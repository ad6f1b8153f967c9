"""The file that a training goes on from, which is whole or not there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from corenas import distributed
from corenas.contracts import Stateful
from corenas.errors import UserError, regular


class Checkpoint:
    """The file of a training; without a path there is none.

    found: what was read from it: a state for each part of the training; `place`, the number of the phase, epochs done
        in it, steps done in the next epoch, and steps done in all; `figures` of an epoch that ends there; `done`,
        whether the training has come to its end; `statistics`, of batch norms, where they were recomputed after it
    Raises UserError for a file that cannot be read or is no checkpoint.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.found: Mapping[str, Any] = {}
        if path is None or not path.exists():
            return
        try:
            self.found = torch.load(regular(path), map_location="cpu", weights_only=True)
        except Exception as error:
            raise self.unusable(f"cannot be read: {type(error).__name__}") from error
        if not isinstance(self.found, dict) or not self.found.keys() >= {"model", "place", "figures", "done"}:
            raise self.unusable("belongs to another model: it is none of this program")

    @property
    def place(self) -> tuple[int, int, int, int]:
        """Where the training goes on: its beginning, where there is no file."""
        return self.found.get("place", (0, 0, 0, 0))

    def unusable(self, text: str) -> UserError:
        """Make the error of a checkpoint that something is wrong with."""
        hint = "put back a copy of its own, or begin anew: --fresh"
        return UserError(f"this checkpoint {text}", file=str(self.path), hint=hint)

    def restore(self, live: Stateful) -> Mapping[str, float]:
        """Load its states and let go of them: they take as much memory as the model and its optimizer.

        Returns its figures. Raises UserError if it is of another training.
        """
        try:
            live.load_state_dict(self.found)
        except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise self.unusable(f"belongs to another model: {_first_line(error)}") from error
        figures, self.found = self.found["figures"], {}
        return figures

    def write(self, live: Stateful, figures: Mapping[str, float], done: bool = False) -> None:
        """Replace the file, in the first process alone. Raises UserError where that fails or it could not be read."""
        if self.path is not None and distributed.rank() == 0:
            self._replace(self.path, {**live.state_dict(), "figures": dict(figures), "done": done})

    def amend(self, **more: Any) -> None:
        """Add to what the file holds that a training does not go on from. Raises UserError where that fails."""
        if self.path is not None and self.path.exists() and distributed.rank() == 0:
            found = Checkpoint(self.path).found
            if not more.keys() <= found.keys():  # a finished run is only read, maybe where nothing can be written
                self._replace(self.path, {**found, **more})

    def _replace(self, path: Path, content: Mapping[str, Any]) -> None:
        temporary = path.with_name(f"{path.name}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(content, temporary)
            if alien := torch.serialization.get_unsafe_globals_in_checkpoint(temporary):
                temporary.unlink()
                text = f"the state of what is trained holds {', '.join(alien)}, which could not be read again"
                raise UserError(text, hint="a `state_dict` of an algorithm or a sampler is tensors and plain data")
            os.replace(temporary, path)
        except (OSError, RuntimeError) as error:  # torch's own writer raises RuntimeError for a full disk
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            reason = error.strerror if isinstance(error, OSError) else None
            reason = reason or f"the disk may be full (torch: {_first_line(error)})"
            raise UserError(
                f"cannot write: {reason}", file=str(path), hint="free some space, then run again"
            ) from error


def states_of(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the states of parts that have one, by name."""
    return {name: part.state_dict() for name, part in parts.items() if isinstance(part, Stateful)}


def load_states(parts: Mapping[str, Any], states: Mapping[str, Any]) -> None:
    """Give parts the states that they had; those without one stay. Raises ValueError that names a part it fails for."""
    for name, part in parts.items():
        try:
            if isinstance(part, Stateful):
                part.load_state_dict(states[name])
        except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            kind = "" if isinstance(error, RuntimeError) else f"{type(error).__name__}: "  # torch's say it in words
            raise ValueError(f"{name}: {kind}{_first_line(error)}") from error


def load_weights(model: nn.Module, path: Path, raw: bool = False) -> None:
    """Give a supernet the weights of a checkpoint: of the moving average where there is one, unless `raw`.

    Raises UserError if there is no checkpoint, none of this model, or one of a training that has not come to its end.
    """
    checkpoint = Checkpoint(path)
    if not checkpoint.found:
        raise UserError("no such checkpoint", file=str(path), hint="has this run trained its supernet?")
    if not checkpoint.found["done"]:
        text = "this training has not come to its end"
        raise UserError(text, file=str(path), hint="the command that began its run goes on with it")
    name = "average" if "average" in checkpoint.found and not raw else "model"
    try:
        load_states({name: model}, checkpoint.found)
    except ValueError as error:
        raise checkpoint.unusable(f"belongs to another model: {error}") from error


def _first_line(error: Exception) -> str:
    first, *more = str(error).strip().splitlines() or [type(error).__name__]
    return more[0].strip() if more and first.startswith("Error(s) in loading state_dict") else first
