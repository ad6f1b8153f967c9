"""What `corenas evaluate` says."""

from __future__ import annotations

from argparse import Namespace

from corenas.errors import UserError
from corenas.run.spec import open_spec
from corenas_tool_inspect.export import network_of_run
from corenas_tool_inspect.table import print_json, print_table


def command(options: Namespace) -> None:
    """Measure archs of a run on one of its splits, and print what comes out."""
    if not (options.run / "spec.toml").exists():
        raise UserError("this is no run directory", file=str(options.run), hint="it has no spec.toml")
    spec, sources, _ = open_spec(options.run / "spec.toml", options.set, options.plugin)
    from corenas.calibrate import evaluate
    from corenas.run.prepare import prepare, trained_since
    from corenas.run.result import exported

    rows = []
    with sources.locating():
        of_run = prepare(trained_since(spec))
        for name in options.arch or ["best"]:
            prepared, trial, network, calibrated = network_of_run(of_run, options.run, name)
            if network is None:
                text = f"this run has no weights for {name}: it trained no supernet"
                raise UserError(text, file=str(options.run), hint="best, if it was retrained")
            plain = exported(prepared, trial.arch, network, calibrated)
            metrics = evaluate(plain, prepared.task, prepared.evaluation(plain).split(options.split))
            rows.append((trial.arch, {**prepared.cost.of([trial.arch])[0], **metrics}))
    if options.json:
        print_json({"split": options.split, "archs": [{"arch": dict(arch), **metrics} for arch, metrics in rows]})
    else:
        print_table([{"arch": arch.digest, "split": options.split, **metrics} for arch, metrics in rows])
