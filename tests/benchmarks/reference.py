"""What reference runs find, beside as many random archs measured by the same supernet; run by hand.

uv run python tests/benchmarks/reference.py [--set KEY=VALUE]… [--keep DIR] [SPEC]…
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SPECS = ("spos", "fairnas", "attentivenas", "ofa", "quickstart", "zennas", "cream", "darts")


def run(spec: str | Path, folder: Path, settings: Sequence[str]) -> dict[str, Any]:
    """Return what a run finds, and the processor time that it took, in seconds; one that is there is not run again."""
    command = [sys.executable, "-m", "corenas", "run", str(spec), *(f"--set={item}" for item in settings), "--json"]
    before = _processor_time()
    done = subprocess.run([*command, "--out", str(folder)], stdout=subprocess.PIPE, check=True, text=True)
    return {**json.loads(done.stdout), "processor": _processor_time() - before}


def _processor_time() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def found(result: dict[str, Any]) -> str:
    """Return flops, the validated figure and test accuracy of the best."""
    best = result["best"]
    objective = next((best["metrics"][name] for name in ("top1", "zen_score") if name in best["metrics"]), None)
    valid = "" if objective is None else f"{objective:.1f}"
    return f"{best['metrics']['flops'] / 1e6:.3g}M | {valid} | {best['test']['top1']:.1f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("specs", metavar="SPEC", nargs="*", default=[f"spec/{name}.toml" for name in SPECS])
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--keep", type=Path, help="keep the runs here; those that are there are not run again")
    given = parser.parse_args()
    print("| spec | flops | valid | test | trials | random: flops | valid | test | seconds of each stage | processor |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for spec in map(Path, given.specs):
            folder = (given.keep or Path(scratch)) / spec.stem
            result, rival = run(spec, folder, given.set), " |  | "
            if result["trials"] and (folder / "supernet.pt").exists():
                again = Path(scratch) / f"{spec.stem}-random.toml"
                again.write_text(f'searcher = "random"\n[supernet]\nfrom = "{folder.resolve()}"\n')
                rival = found(run(again, folder.with_name(again.stem), ()))
            elif result["trials"]:
                rival = found(run(spec, folder.with_name(f"{spec.stem}-random"), [*given.set, "searcher=random"]))
            seconds = ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in result["seconds"].items())
            ours = f"{found(result)} | {result['trials'] or ''}"
            print(f"| {spec.stem} | {ours} | {rival} | {seconds} | {result['processor']:.0f} s |", flush=True)


if __name__ == "__main__":
    main()
