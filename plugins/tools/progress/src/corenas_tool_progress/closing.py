"""What a run says in the end: what was found, where it is, how to load it."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from corenas.contracts import Metric, RunDone
from corenas.objectives import amount
from corenas.run.trust import sentence


def closing_lines(event: RunDone) -> list[str]:
    """The lines to print; none of what is not there."""
    folder, result, splits = event.folder, event.result, event.splits
    if not result:
        return []
    best, front, table = result["best"], len(result["front"]), result["table"]
    lines = []
    if result["trials"]:
        which = f"of {front} on the front the " if front > 1 else ""
        valid = splits.get("valid", 0)
        figures = figure_text(best["metrics"], event.metrics, valid)
        several = (
            f"with {table[0]['constraints'] or 'no constraint'}" if len(table) > 1 else f"of {result['trials']} trials"
        )
        lines.append(f"{which}best {several}: {figures}" + (f" on {valid} validation images" if valid else ""))
    if best["test"]:
        figures = figure_text(best["test"], event.metrics, splits["test"])
        lines.append(f"on {splits['test']} test images: {figures}")
    for row in table if len(table) > 1 else ():
        figures = figure_text({**row["metrics"], **row["test"]}, event.metrics, splits.get("test", 0))
        lines.append(f"{row['constraints'] or 'no constraint'}: {figures}, in {folder}/{row['folder']}/")
    for row in table:
        if seeds := row.get("seeds"):
            which = f" ({row['constraints'] or 'no constraint'})" if len(table) > 1 else ""
            lines.append(f"mean of {len(seeds['test'])} seeds{which}: {_over_seeds(seeds, event.metrics)}")
    if trust := result.get("trust"):
        lines.append(sentence(trust))
    files = sorted(path.name for path in (folder / "best").glob("*") if path.is_file())
    lines.append(f"network:   {folder}/best/ ({', '.join(files)})")
    if result["trials"]:
        lines.append(f"trials:    {folder}/run.sqlite, listed by: corenas trials {shlex.quote(str(folder))}")
    if (folder / "supernet.pt").exists():
        lines.append(f"supernet:  {folder}/supernet.pt")
    if {"network.py", "network.safetensors"} <= {*files}:
        lines += [
            "load it, with torch alone:",
            f"    import sys; sys.path.insert(0, {_quoted(folder / 'best')}); from network import Network",
            "    from safetensors.torch import load_file; network = Network().eval()",
            f"    network.load_state_dict(load_file({_quoted(folder / 'best/network.safetensors')}))",
        ]
    if "network.pt2" in files:
        lines.append(f"    or: torch.export.load({_quoted(folder / 'best/network.pt2')}).module()")
    return lines


def _over_seeds(seeds: Mapping[str, Any], metrics: Mapping[str, Metric]) -> str:
    """Means with the standard error of the mean, as seeds tell it."""
    errors = {name: sd / math.sqrt(len(seeds["test"])) for name, sd in seeds["sd"].items()}
    return ", ".join(
        f"{name} {mean:.2f} ± {errors[name]:.2f} {metrics[name].unit}".rstrip() for name, mean in seeds["mean"].items()
    )


def _quoted(path: Path) -> str:
    """A path as Python text, whatever its name."""
    return json.dumps(path.as_posix(), ensure_ascii=False)


def figure_text(figures: Mapping[str, float], metrics: Mapping[str, Metric], n: int) -> str:
    """Metrics as people read them, shares of images with the noise that n of them leave."""
    parts = []
    for name in filter(metrics.__contains__, figures):
        number, unit, share = figures[name], metrics[name].unit, metrics[name].share
        noise = f" ± {math.sqrt(max(number * (100 - number), 0.0) / n):.1f}" if share and n else ""
        parts.append(f"{name} {f'{number:.1f}' if unit == '%' else amount(number)}{noise}{unit and ' ' + unit}")
    return ", ".join(parts)
