"""How fast the command line answers where it needs no torch; run by hand.

uv run python tests/benchmarks/startup.py [ROUNDS]
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    script = Path(sys.executable).with_name("corenas")
    with tempfile.TemporaryDirectory() as scratch:
        bad = Path(scratch) / "bad.toml"
        spec = Path("spec/quickstart.toml").read_text(encoding="utf-8")
        bad.write_text(
            spec.replace("trials = 120", 'trials = "many"').replace('"space/', f'"{Path("spec").resolve()}/space/')
        )
        for arguments in (
            ["--help"],
            ["plugins"],
            ["check", str(bad)],
            ["run", str(bad)],
            ["show", "searchers", "evolution"],
        ):
            times = []
            for _ in range(rounds + 1):
                start = time.perf_counter()
                subprocess.run([script, *arguments], capture_output=True, check=False)
                times.append(time.perf_counter() - start)
            print(f"{statistics.median(times[1:]):.3f} s  corenas {' '.join(arguments[:2])}")


if __name__ == "__main__":
    main()
