"""The board of prioritized paths: who is on it, and who comes next."""

from __future__ import annotations

from typing import Any

from attrs import frozen
from torch import Tensor

from corenas.space import Arch


@frozen(eq=False)
class Entry:
    """A path of the board.

    score: how good it was when it came, more is better
    images: some samples of the batch that it was trained on then
    answers: the probabilities that were given to them, (samples, classes)
    """

    arch: Arch
    score: float
    flops: float
    images: Any = None
    answers: Tensor | None = None


class Board:
    """So many paths, the best first; of two that are as good the one of fewer flops.

    size: how many
    gap: how much better a path has to be to count whatever its flops
    max_flops: what a path may cost
    duplicates: whether a path may be here several times; otherwise it is here as it was last measured
    """

    def __init__(self, size: int, gap: float, max_flops: float, duplicates: bool = False) -> None:
        self.size, self.gap, self.max_flops, self.duplicates = size, gap, max_flops, duplicates
        self.entries: list[Entry] = []

    def accepts(self, arch: Arch, score: float, flops: float) -> bool:
        """Return whether a path gets a place: one that is free, its own, or the last one's (section 3.2)."""
        if flops > self.max_flops:
            return False
        if len(self.entries) < self.size or self._has(arch):
            return True
        last = self.entries[-1]
        return score > last.score + self.gap or (score >= last.score and flops <= last.flops)

    def add(self, entry: Entry) -> None:
        """Put a path that was accepted where it belongs."""
        others = [other for other in self.entries if self.duplicates or other.arch != entry.arch]
        self.entries = sorted([entry, *others], key=lambda e: (-e.score, e.flops))[: self.size]

    def teachers(self, student: Arch) -> list[Entry]:
        """Return whom a path can learn from: all but itself."""
        return [entry for entry in self.entries if entry.arch != student]

    def _has(self, arch: Arch) -> bool:
        return not self.duplicates and any(entry.arch == arch for entry in self.entries)
