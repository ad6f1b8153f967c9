"""What the quickstart finds, over seeds, against random archs of the same cost window; run by hand.

uv run python tests/benchmarks/quickstart.py [--set KEY=VALUE]… [--archs N] [SEED]…
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from corenas import seeding
from corenas.run.prepare import load_supernet, prepare
from corenas.run.spec import open_spec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seeds", metavar="SEED", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--archs", type=int, default=50)
    given = parser.parse_args()
    print(f"{'seed':>4}{'seconds':>9}{'trials':>8}{'flops':>11}{'valid':>7}{'median':>8}{'best':>7}{'test':>7}")
    tests = []
    for seed in given.seeds:
        with tempfile.TemporaryDirectory() as scratch:
            folder, start = Path(scratch) / "run", time.perf_counter()
            settings = [f"--set={item}" for item in (f"seed={seed}", *given.set)]
            command = [sys.executable, "-m", "corenas", "run", "spec/quickstart.toml", *settings, "--json"]
            done = subprocess.run([*command, "--out", str(folder)], stdout=subprocess.PIPE, check=True, text=True)
            seconds, result = time.perf_counter() - start, json.loads(done.stdout)
            prepared = prepare(open_spec(folder / "spec.toml")[0])
            evaluation = prepared.evaluation(load_supernet(prepared, folder))
            rng, region = seeding.generator(seed, "fifty random archs"), prepared.targets[0].region
            drawn = [evaluation(region.sample(rng))["top1"] for _ in range(given.archs)]
        best = result["best"]
        tests.append(best["test"]["top1"])
        print(
            f"{seed:>4}{seconds:>9.0f}{result['trials']:>8}{best['metrics']['flops']:>11,}{best['metrics']['top1']:>7.1f}"
            f"{statistics.median(drawn):>8.1f}{max(drawn):>7.1f}{tests[-1]:>7.1f}",
            flush=True,
        )
    print(f"mean test accuracy {statistics.mean(tests):.2f}")


if __name__ == "__main__":
    main()
