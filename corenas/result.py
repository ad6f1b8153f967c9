"""What comes out of a run: a network in files of its own, with its cost card."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import tomli_w
from torch import fx, nn

import corenas
from corenas import calibrate, export
from corenas.alone import subnet
from corenas.contracts import Exporter, Trial
from corenas.errors import UserError
from corenas.plugins import Catalogue
from corenas.prepare import Prepared
from corenas.space import Arch
from corenas.store import strict_json


def read_exporters(names: Sequence[str], catalogue: Catalogue) -> list[Exporter]:
    """File formats with their default options. Raises UserError for one that no exporter writes."""
    return [catalogue.find("exporters", name).cls() for name in names]


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
    prepared: Prepared, plain: fx.GraphModule, trial: Trial, folder: Path, exporters: Sequence[Exporter], tested: bool
) -> dict[str, float]:
    """Write a trial's network into a folder, with arch.toml and a cost card. Returns its metrics on test data, if asked
    for.

    The folder appears whole or not at all. Raises UserError if it cannot be written.
    """  # fmt: skip
    task, arch = prepared.task, trial.arch
    test = calibrate.evaluate(plain, task, prepared.evaluation(plain).split("test")) if tested else {}
    card = {
        **prepared.cost.of([arch])[0],
        "convention": "one input; a multiply-add counts once; bias, norms, activations and pooling count nothing",
        "input": list(task.example.shape[1:]),
        "preprocessing": dict(getattr(task, "preprocessing", {})),
        "metrics": dict(trial.metrics),
        "test": test,
        "splits": dict(task.splits),
        "seed": prepared.spec.seed,
    }
    temporary = folder.with_name(f"{folder.name}.part")
    title = f"{prepared.spec.name}: the subnet {arch.digest}, exported by corenas {corenas.__version__}."
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for exporter in exporters:
            exporter.write(plain.cpu().eval(), task.example, temporary, title)
        (temporary / "arch.toml").write_text(tomli_w.dumps(dict(arch)), encoding="utf-8")
        (temporary / "cost.json").write_text(strict_json(card, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"cannot write: {error.strerror or error}", file=str(folder)) from error
    return test
