"""How many archs a second the cost of is known, flops, params and activations together; run by hand.

OMP_NUM_THREADS=1 uv run python tests/benchmarks/cost.py
"""

from __future__ import annotations

import statistics
import sys
import time

import numpy as np

from corenas.plugins import load_catalogue
from corenas.prepare import prepare
from corenas.spec import load_spec

ARCHS = 100_000


def main() -> None:
    print(f"{'spec':<34}{'set-up, s':>10}{'archs/s':>12}{'drawing too':>13}")
    for path in sys.argv[1:] or ("spec/ofa-mobilenetv3.toml", "spec/quickstart.toml"):
        spec, _ = load_spec(path, load_catalogue())
        start = time.perf_counter()
        cost = prepare(spec, data=False).cost
        setup, rng, pure, drawn = time.perf_counter() - start, np.random.default_rng(0), [], []
        for _ in range(5):
            start = time.perf_counter()
            codes = spec.space.draw(rng, ARCHS)
            middle = time.perf_counter()
            columns = cost(codes)
            pure.append(ARCHS / (time.perf_counter() - middle))
            drawn.append(ARCHS / (time.perf_counter() - start))
        some = rng.integers(ARCHS, size=200)
        one_by_one = [cost.of([arch])[0] for arch in spec.space.decode(codes[some])]
        assert all(columns[name][i] == row[name] for i, row in zip(some, one_by_one, strict=True) for name in row)
        print(f"{path:<34}{setup:>10.1f}{statistics.median(pure):>12,.0f}{statistics.median(drawn):>13,.0f}")


if __name__ == "__main__":
    main()
