"""What the quickstart finds, over seeds, against 50 random archs of the same cost window; run by hand.

uv run python tests/benchmarks/quickstart.py [SEED]…
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from corenas import seeding
from corenas.plugins import load_catalogue
from corenas.run import open_run
from corenas.run.spec import load_spec


def main() -> None:
    print(f"{'seed':>4}{'seconds':>9}{'trials':>8}{'flops':>11}{'valid':>7}{'median':>8}{'best':>7}{'test':>7}")
    tests = []
    for seed in map(int, sys.argv[1:] or ("0", "1", "2")):
        with tempfile.TemporaryDirectory() as scratch:
            folder, start = Path(scratch) / "run", time.perf_counter()
            command = [sys.executable, "-m", "corenas", "run", "spec/quickstart.toml", f"--set=seed={seed}", "--json"]
            done = subprocess.run([*command, "--out", str(folder)], stdout=subprocess.PIPE, check=True, text=True)
            seconds, result = time.perf_counter() - start, json.loads(done.stdout)
            spec, _ = load_spec(folder / "spec.toml", load_catalogue())
            prepared, evaluation, _ = open_run(folder, spec)
            rng = seeding.generator(seed, "fifty random archs")
            drawn = [evaluation(prepared.region.sample(rng))["top1"] for _ in range(50)]
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
