"""What comes out of a run: a network in files of its own, its cost card, and what is said of it in the end."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import tomli_w
from torch import fx, nn

import corenas
from corenas import calibrate, export
from corenas.alone import subnet
from corenas.contracts import Exporter
from corenas.errors import UserError
from corenas.objectives import amount
from corenas.plugins import Catalogue
from corenas.space import Arch

if TYPE_CHECKING:
    from corenas.run import Prepared

Exporters: TypeAlias = Mapping[str, Exporter]


def read_exporters(names: Sequence[str], catalogue: Catalogue) -> dict[str, Exporter]:
    """File formats by name, with their default options. Raises UserError for one that no exporter writes."""
    return {name: catalogue.find("exporters", name).cls() for name in names}


def plain_network(prepared: Prepared, arch: Arch, network: nn.Module | None, calibrated: bool) -> fx.GraphModule:
    """An arch as a plain network in evaluation mode.

    network: what it is taken from; None for one with fresh weights
    calibrated: whether its batch-norm statistics are recomputed first, as those of a supernet have to be
    """
    example = prepared.task.example.to(prepared.device)
    if network is not None and calibrated:
        with prepared.evaluation(network).calibrated(arch) as model:
            return export.export(model, arch, example)
    model = subnet(prepared.spec, prepared.task, arch) if network is None else network
    return export.export(model.to(prepared.device).eval(), arch, example)


def write(
    prepared: Prepared,
    plain: fx.GraphModule,
    arch: Arch,
    folder: Path,
    exporters: Exporters,
    metrics: Mapping[str, float],
    tested: bool,
) -> dict[str, float]:
    """Write a network into a folder, with arch.toml and a cost card. Returns its metrics on test data, if asked for.

    The folder appears whole or not at all. Raises UserError if it cannot be written.
    """
    task = prepared.task
    test = calibrate.measure(plain, task, prepared.evaluation(plain).split("test")) if tested else {}
    cost = prepared.cost.of([arch])[0]
    card = {
        "flops": cost["flops"],
        "params": cost["params"],
        "activations": cost["activations"],
        "convention": "one input; a multiply-add counts once; bias, norms, activations and pooling count nothing",
        "input": list(task.example.shape[1:]),
        "preprocessing": dict(getattr(task, "preprocessing", {})),
        "metrics": dict(metrics),
        "test": test,
        "splits": dict(task.splits),
        "seed": prepared.spec.seed,
    }
    temporary = folder.with_name(f"{folder.name}.part")
    title = f"{prepared.spec.name}: the subnet {arch.digest}, exported by corenas {corenas.__version__}."
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for exporter in exporters.values():
            exporter.write(plain.cpu().eval(), task.example, temporary, title)
        (temporary / "arch.toml").write_text(tomli_w.dumps(dict(arch)), encoding="utf-8")
        (temporary / "cost.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    except OSError as error:
        raise UserError(f"cannot write: {error.strerror or error}", file=str(folder)) from error
    return test


def closing_lines(prepared: Prepared, folder: Path, result: Mapping[str, Any], exporters: Exporters) -> list[str]:
    """What a run says in the end: what was found, where it is, how to load it."""
    splits, best, front = prepared.task.splits, result["best"], len(result["front"])
    valid, test = splits["valid"], splits["test"]
    lines = []
    if result["trials"]:
        which = f"of {front} on the front, by {prepared.objectives.objectives[0].metric} the " if front > 1 else ""
        figures = _text(prepared, best["metrics"], valid)
        lines.append(f"{which}best of {result['trials']} trials: {figures} on {valid} validation images")
    if best["test"]:
        lines.append(f"on {test} test images, touched once: {_text(prepared, best['test'], test)}")
    if len(result["table"]) > 1:
        lines += [f"{row['constraints']}: {_text(prepared, row['test'] or row['metrics'], test)} in {folder}/"
                  f"{row['folder']}/" for row in result["table"]]  # fmt: skip
    written = ", ".join(sorted(path.name for path in (folder / "best").iterdir()))
    lines.append(f"network:   {folder}/best/ ({written})")
    if result["trials"]:
        lines.append(f"trials:    {folder}/run.sqlite, listed by: corenas trials {folder}")
    if (folder / "supernet.pt").exists():
        lines.append(f"supernet:  {folder}/supernet.pt")
    if {"python", "safetensors"} <= exporters.keys():
        lines += [
            "load it, with torch alone:",
            f'    import sys; sys.path.insert(0, "{folder}/best"); from network import Network',
            "    from safetensors.torch import load_file; network = Network().eval()",
            f'    network.load_state_dict(load_file("{folder}/best/network.safetensors"))',
        ]
    if "pt2" in exporters:
        lines.append(f'    or: torch.export.load("{folder}/best/network.pt2").module()')
    return lines


def _text(prepared: Prepared, metrics: Mapping[str, float], n: int) -> str:
    """Metrics as people read them, accuracies with the noise that n images leave."""
    parts = []
    for name, number in metrics.items():
        metric = {**prepared.task.metrics, **prepared.metrics}.get(name)
        if metric is None:
            continue
        noise = f" ± {math.sqrt(max(number * (100 - number), 0.0) / n):.1f}" if metric.unit == "%" and n else ""
        plain = amount(number) if metric.unit != "%" else f"{number:.1f}"
        parts.append(f"{name} {plain}{noise}{metric.unit and ' ' + metric.unit}")
    return ", ".join(parts)
