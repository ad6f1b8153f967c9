"""How tests/data/archs.csv.gz was made: all archs of a small space, measured with one trained supernet; run by hand.

    OMP_NUM_THREADS=1 uv run corenas run tests/benchmarks/table.toml --out runs/table
    uv run python tests/benchmarks/make_table.py runs/table     # or --check: what is there

The first takes a quarter of an hour on one core, and goes on where it was interrupted. Columns: the variables of
the space, then top1 (percent of 1,000 validation images, batch norm recalibrated) and flops; rows in the space's order.
"""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

from corenas.run.spec import open_spec
from corenas.store import Store

FILE = Path(__file__).parents[1] / "data/archs.csv.gz"


def write(run: Path) -> None:
    space = open_spec(run / "spec.toml")[0].space
    trials = [trial for trial in Store(run / "run.sqlite", readonly=True).trials() if trial.ok]
    rows = sorted((space.encode([trial.arch])[0].tolist(), trial) for trial in trials)
    assert len(rows) == space.size, f"{len(rows)} of {space.size} archs were measured"
    lines = [",".join([*space.keys, "top1", "flops"])]
    for _, trial in rows:
        figures = [f"{trial.metrics['top1']:.1f}", str(trial.metrics["flops"])]
        lines.append(",".join([*map(str, trial.arch.values()), *figures]))
    FILE.parent.mkdir(parents=True, exist_ok=True)
    # Without name and time, so that the same table is the same file.
    FILE.write_bytes(gzip.compress("\n".join([*lines, ""]).encode(), mtime=0))


def main() -> None:
    if sys.argv[1:] != ["--check"]:
        write(Path(sys.argv[1]))
    names, *lines = gzip.decompress(FILE.read_bytes()).decode().splitlines()
    print(f"{FILE.name}: {len(lines):,} archs, {FILE.stat().st_size / 1024:.0f} KB")
    columns = zip(*(line.split(",") for line in lines), strict=True)
    for name, column in zip(names.split(","), columns, strict=True):
        numbers = [*map(float, column)]
        print(f"{name:<24}{len({*numbers}):>6} values from {min(numbers):g} to {max(numbers):g}")


if __name__ == "__main__":
    main()
