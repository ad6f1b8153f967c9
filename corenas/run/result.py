"""What comes out of a run: a network in files of its own, with its cost card."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import tomli_w
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

import corenas
from corenas.contracts import ExportContext, Exporter, Preprocessing
from corenas.errors import UserError, staying_here
from corenas.export import export_active, export_subnet
from corenas.loading import training_inputs
from corenas.objectives import Objectives, Trial, amount
from corenas.plugins import Catalogue
from corenas.run.alone import subnet
from corenas.run.folder import OwnFiles, appearing
from corenas.run.prepare import Prepared
from corenas.space import Arch
from corenas.store import strict_json


def read_exporters(formats: Sequence[str | Mapping[str, Any]], catalogue: Catalogue) -> list[Exporter]:
    """Return file formats by their names or tables of options. Raises UserError for one that no exporter writes."""
    return [catalogue.options("exporters", item) for item in formats]


def exported(prepared: Prepared, arch: Arch, network: nn.Module | None, calibrated: bool) -> fx.GraphModule:
    """Return an arch as a plain network in evaluation mode.

    network: what it is taken from; None for one with fresh weights
    calibrated: whether its batch-norm statistics are recomputed first, as those of a supernet have to be
    """
    example = prepared.task.example
    if network is not None and calibrated:
        with prepared.evaluation(network).calibrated(arch) as model:
            return export_active(model, example)
    model = subnet(prepared.spec, prepared.task, arch) if network is None else network
    return export_subnet(model.to(prepared.device).eval(), arch, example)


def cost_card(prepared: Prepared, trial: Trial, test: Mapping[str, float]) -> dict[str, Any]:
    """Return what is known of a network: its cost, its metrics and on what data they were measured, its input."""
    task = prepared.task
    shapes = [list(leaf.shape[1:]) for leaf in tree_leaves(task.example) if isinstance(leaf, Tensor)]
    if not prepared.has_network:
        return {"metrics": dict(trial.metrics), "seed": prepared.spec.seed}
    return {
        **prepared.cost.of([trial.arch])[0],
        "convention": "one input; a multiply-add counts once; bias, norms, activations and pooling count nothing",
        "input": shapes[0] if isinstance(task.example, Tensor) else shapes,
        "preprocessing": dict(task.preprocessing) if isinstance(task, Preprocessing) else {},
        "metrics": dict(trial.metrics),
        "test": dict(test),
        "splits": dict(task.splits),
        "seed": prepared.spec.seed,
    }


def front_folders(front: Sequence[Trial], objectives: Objectives) -> list[tuple[str, Trial]]:
    """Return the trials of a front, the best by the first objective first, each with the name of its folder.

    A name is a place in this order and the figures of the objectives: `02-top1-96.4-flops-1.21M`.
    """
    first = objectives.objectives[0]
    ranked = sorted(front, key=lambda trial: first.gain(trial.metrics), reverse=True)
    digits = len(str(len(ranked)))

    def name(place: int, trial: Trial) -> str:
        figures = [f"{goal.metric}-{amount(trial.metrics[goal.metric])}" for goal in objectives.objectives]
        return re.sub(r"[^\w.+-]", "_", "-".join([f"{place:0{digits}}", *figures]))

    return [(name(place, trial), trial) for place, trial in enumerate(ranked, 1)]


def write_folder(
    plain: fx.GraphModule | None,
    arch: Arch,
    card: Mapping[str, Any],
    prepared: Prepared,
    folder: Path,
    exporters: Sequence[Exporter],
    files: OwnFiles | None = None,
) -> None:
    """Write a network into a folder, with arch.toml and its cost card.

    plain: None where archs are none of a network; there are no exporters then
    files: those of the run directory that the folder is in; without them the folder is empty or not there
    Raises UserError if it cannot be written; there is nothing of it then.
    """
    title = f"{prepared.spec.name}: the subnet {arch.digest}, exported by corenas {corenas.__version__}."
    try:
        with appearing(folder) if files is None else files.replacing(folder) as temporary:
            if plain is not None:
                inputs = partial(training_inputs, plain, prepared.task, prepared.spec.seed)
                context = ExportContext(prepared.task.example, title, inputs)
                for exporter in exporters:
                    with staying_here():
                        exporter.write(plain.cpu().eval(), temporary, context)
            (temporary / "arch.toml").write_text(tomli_w.dumps(dict(arch)), encoding="utf-8")
            (temporary / "cost.json").write_text(strict_json(card, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        hint = "free some space, or take another folder, then run again"
        raise UserError(f"cannot write: {error.strerror or error}", file=str(folder), hint=hint) from error
