"""Where randomness comes from: named generators of a run's seed, so that a new consumer shifts no other."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from zlib import crc32

import numpy as np

if TYPE_CHECKING:
    import torch


def generator(seed: int, name: str) -> np.random.Generator:
    """Return the generator of one consumer ("searcher", "sampler") of a run."""
    return np.random.default_rng([seed & 0xFFFFFFFF, crc32(name.encode())])


def number(seed: int, name: str, *index: int) -> int:
    """Return a seed of 32 bits for what reads torch's global generator, from a name and a place (epoch, sample)."""
    return crc32(struct.pack(f"<{len(index) + 1}q", seed, *index), crc32(name.encode()))


@contextmanager
def seeded(seed: int, name: str, *index: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed torch's global generators for a while; they are then as they were."""
    import torch

    device = device or torch.device("cpu")
    seed_all = torch.default_generator.manual_seed if device.type == "cpu" else torch.manual_seed
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        seed_all(number(seed, name, *index))
        yield
