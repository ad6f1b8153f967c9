"""What `corenas export` does."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from corenas.errors import UserError
from corenas.objectives import Trial
from corenas.run.spec import open_spec
from corenas.store import Store
from corenas_tool_inspect.archs import named_arch
from corenas_tool_inspect.table import print_json

if TYPE_CHECKING:
    from torch import nn

    from corenas.contracts import Exporter
    from corenas.run.prepare import Prepared


def command(options: Namespace) -> None:
    """Write the network and print its files."""
    from corenas.run.folder import refuse_filled

    folder = Path(options.source)
    path = folder / "spec.toml" if folder.is_dir() else folder
    if folder.is_dir() and not path.exists():
        raise UserError("this is no run directory", file=str(folder), hint="it has no spec.toml")
    options.to = options.to.resolve()
    refuse_filled(options.to)
    spec, sources, catalogue = open_spec(path, options.set, options.plugin)
    if options.front and (options.arch or not folder.is_dir()):
        raise UserError("a front is that of a run, with all its archs", key=("--front",), hint="RUN --front, no --arch")
    from corenas.run.prepare import prepare, trained_since
    from corenas.run.result import cost_card, exported, read_exporters, write_folder

    if spec.backbone is None:
        raise UserError("nothing here has a network, which could be exported", file=str(path))
    exporters = read_exporters(options.format or spec.export.formats, catalogue)
    if options.front:
        with sources.locating():
            _write_front(prepare(trained_since(spec)), folder, exporters, options)
        return
    with sources.locating():
        if folder.is_dir():
            prepared = prepare(trained_since(spec))
            prepared, trial, network, calibrated = network_of_run(prepared, folder, options.arch or "best")
        else:
            prepared, network, calibrated = prepare(spec, data=False), None, False
            trial = Trial(named_arch(prepared.cost, options.arch or "default"))
        plain = exported(prepared, trial.arch, network, calibrated)
        write_folder(plain, trial.arch, cost_card(prepared, trial, test={}), prepared, options.to, exporters)
    files = sorted(str(file) for file in options.to.iterdir())
    if options.json:
        print_json({"arch": dict(trial.arch), **prepared.cost.of([trial.arch])[0], "files": files})
    else:
        print("\n".join(files))


def _write_front(prepared: Prepared, folder: Path, exporters: Sequence[Exporter], options: Namespace) -> None:
    """Write every network of a run's front into a folder of its own, and print these folders.

    Raises UserError if the run has not come so far, or if retraining has left weights for some of them only.
    """
    from corenas.run.folder import appearing
    from corenas.run.prepare import load_supernet
    from corenas.run.result import cost_card, exported, front_folders, write_folder
    from corenas.run.stages import retrain

    result = Store(folder / "run.sqlite", readonly=True).get("result")
    if result is None:
        raise UserError("this run has no front yet", file=str(folder), hint="finish it: corenas run")
    front = [Trial(prepared.spec.space.arch(row["arch"]), row["metrics"]) for row in result["front"]]
    supernet = load_supernet(prepared, folder) if prepared.has_supernet else None
    retrained = "retrain" in prepared.stages
    rows = []
    with appearing(options.to) as part:
        for place, (name, trial) in enumerate(front_folders(front, prepared.objectives), 1):
            own, network = prepared, supernet
            if retrained:
                file = folder / ("retrain.pt" if place == 1 else f"retrain-front-{place}.pt")
                if not file.exists():
                    text = "this run has retrained the best of its front alone"
                    raise UserError(text, file=str(folder), hint="run it with export.front = true to train them all")
                own, network = retrain(prepared, trial.arch, file)
            plain = exported(own, trial.arch, network, calibrated=not retrained)
            write_folder(plain, trial.arch, cost_card(own, trial, test={}), own, part / name, exporters)
            rows.append({"arch": dict(trial.arch), "metrics": dict(trial.metrics), "folder": str(options.to / name)})
    if options.json:
        print_json({"front": rows})
    else:
        print("\n".join(row["folder"] for row in rows))


def network_of_run(prepared: Prepared, folder: Path, name: str) -> tuple[Prepared, Trial, nn.Module | None, bool]:
    """An arch of a run by its name; where its weights are, and whether its batch norm has to be recalibrated: it has
    where they are a supernet's.

    name: "best" for that of its result, "best-2" for that of its second search; "begin" for the largest with the
        weights that the run began with; else as of `named_arch`
    Raises UserError if the run has not come so far, or began with fresh weights.
    """
    from corenas.run.alone import subnet
    from corenas.run.prepare import load_supernet
    from corenas.run.stages import retrain

    store = Store(folder / "run.sqlite", readonly=True)
    if name == "begin":
        if getattr(prepared.spec.backbone, "weights", None) is None:
            raise UserError("this run began with fresh weights", file=str(folder), hint="another --arch than begin")
        arch = named_arch(prepared.cost, "max")
        return prepared, Trial(arch), subnet(prepared.spec, prepared.task, arch).to(prepared.device), False
    result = store.get("result")
    table = [] if result is None else result["table"]
    rows = {row["folder"]: row for row in table}
    if name in rows:
        trial = Trial(prepared.spec.space.arch(rows[name]["arch"]), rows[name]["metrics"])
    elif name == "best":
        raise UserError("this run has no best arch yet", file=str(folder), hint="finish it: corenas run")
    else:
        trial = Trial(named_arch(prepared.cost, name, store.trials()))
    for row in table:
        file = folder / f"retrain{row['folder'].removeprefix('best')}.pt"
        if dict(trial.arch) == row["arch"] and file.exists():
            prepared, network = retrain(prepared, trial.arch, file)
            return prepared, trial, network, False
    return prepared, trial, load_supernet(prepared, folder) if prepared.has_supernet else None, True
