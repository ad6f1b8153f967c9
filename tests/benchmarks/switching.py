"""How many archs a second a supernet is given, and how many are drawn, in Once-for-All's space; run by hand.

Seconds are those of the processor, on one thread.

    OMP_NUM_THREADS=1 uv run python tests/benchmarks/switching.py [--rounds N]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tomli
import torch

from corenas.mutable import apply
from corenas.plugins import load_catalogue
from corenas.space import SearchSpace

SPACE = Path(__file__).parents[2] / "spec" / "space" / "ofa-mobilenetv3.toml"
ARCHS = 1000
"""Of each round; no two are alike."""


def rate(work: Callable[[], object], rounds: int) -> float:
    """Return how often a second the median round does one of the ARCHS things that it does."""
    seconds = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return ARCHS / statistics.median(seconds)


def main(arguments: list[str] | None = None) -> None:
    """Print both figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args(arguments).rounds
    torch.set_num_threads(1)
    space = SearchSpace.from_table(tomli.loads(SPACE.read_text(encoding="utf-8")))
    with torch.device("meta"):
        model = load_catalogue().find("backbones", "mobilenetv3").cls().build(space)
    rng = np.random.default_rng(0)

    def draw() -> None:
        for _ in range(ARCHS):
            space.sample(rng)

    fresh = iter([space.decode(space.draw(rng, ARCHS)) for _ in range(rounds)])

    def switch() -> None:
        for arch in next(fresh):
            with apply(model, arch):
                pass

    apply(model, space.largest())  # a model's first one makes its plan
    print(f"{rate(draw, rounds):,.0f} samples a second")
    print(f"{rate(switch, rounds):,.0f} applies a second, each with an arch of its own")


if __name__ == "__main__":
    main()
