"""How many archs a second the cost of is known, flops, params and activations together; run by hand.

Seconds are those of the processor, on one thread.

    OMP_NUM_THREADS=1 uv run python tests/benchmarks/cost.py [--archs N] [SPACE …]

SPACE: a file in spec/space, its backbone named by the comment at its top; left out, all of them.
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from pathlib import Path

import numpy as np
import tomli
import torch

from corenas.cost import Cost
from corenas.plugins import load_catalogue
from corenas.space import SearchSpace
from corenas.supernet import Supernet
from corenas.testing.backbones import AllFeatures

SMALL = {"darts": 32, "nasnet-cells": 32, "zennet-cifar": 32}
"""Sides of images that are not 224."""


def main() -> None:
    catalogue = load_catalogue()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", metavar="SPACE", nargs="*", type=Path)
    parser.add_argument("--archs", type=int, default=100_000)
    given = parser.parse_args()
    files = given.files or sorted(Path("spec/space").glob("*.toml"))
    print(f"{'space':<34}{'variables':>10}{'set-up, s':>10}{'archs/s':>12}{'drawing too':>13}")
    for path in files:
        text = path.read_text()
        found = re.search(r'backbone[\s#]+["`](\w+)', text)
        assert found, path
        backbone = catalogue.find("backbones", found[1]).cls
        backbone = backbone(in_channels=1 if path.stem.endswith(("tiny", "small-images")) else 3)
        space = SearchSpace.from_table(tomli.loads(text))
        side = 28 if backbone.in_channels == 1 else SMALL.get(path.stem, 224)
        start = time.process_time()
        with torch.device("meta"):
            model = Supernet(backbone.build(space), AllFeatures())
        cost = Cost(model, space, torch.empty(1, backbone.in_channels, side, side))
        setup, rng, pure, drawn = time.process_time() - start, np.random.default_rng(0), [], []
        for _ in range(5):
            start = time.process_time()
            codes = space.draw(rng, given.archs)
            middle = time.process_time()
            columns = cost(codes)
            pure.append(given.archs / (time.process_time() - middle))
            drawn.append(given.archs / (time.process_time() - start))
        some = rng.integers(given.archs, size=200)
        one_by_one = [cost.of([arch])[0] for arch in space.decode(codes[some])]
        assert all(columns[name][i] == row[name] for i, row in zip(some, one_by_one, strict=True) for name in row)
        figures = f"{setup:>10.1f}{statistics.median(pure):>12,.0f}{statistics.median(drawn):>13,.0f}"
        print(f"{path.stem:<34}{len(space.variables):>10}{figures}", flush=True)


if __name__ == "__main__":
    main()
