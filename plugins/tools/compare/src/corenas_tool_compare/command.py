"""What `corenas compare` does."""

from __future__ import annotations

import csv
import sys
from argparse import Namespace
from typing import Any

import attrs

from corenas.errors import UserError
from corenas.store import strict_json
from corenas_tool_compare.page import said, write_page
from corenas_tool_compare.running import run_comparison
from corenas_tool_compare.settings import read_compare
from corenas_tool_compare.table import summarize


def command(options: Namespace) -> int:
    """Run what is left to run, and write `compare.html`, `compare.json` and `compare.csv`."""
    compare = read_compare(options.spec)
    if options.seeds is not None:
        if options.seeds < 1:
            raise UserError(f"expected at least one run of each method, found {options.seeds}", key=("--seeds",))
        compare = attrs.evolve(compare, seeds=options.seeds)
    compare = attrs.evolve(compare, set=(*compare.set, *options.set))
    found = run_comparison(compare, options.out)
    summary = summarize(found)
    text = strict_json({**found, **summary}, indent=1)
    (options.out / "compare.json").write_text(text, encoding="utf-8")
    _write_csv(found["rows"], options.out / "compare.csv")
    write_page(found, summary, options.out / "compare.html")
    if options.json:
        print(strict_json({**found, **summary}))
        return 0
    for line in summary["table"]:
        print(f"{line['method']}: trained alone {said(line['retrained'])}, tau {said(line['tau'], 2)}", file=sys.stderr)
    for note in summary["notes"]:
        print(note, file=sys.stderr)
    print(options.out / "compare.html")
    return 0


def _write_csv(rows: Any, path: Any) -> None:
    keys = [key for key in rows[0] if key not in ("seconds", "ranking")]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*keys, "seconds"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows({**row, "seconds": round(sum(row["seconds"].values()), 1)} for row in rows)
