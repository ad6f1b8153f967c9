"""What `corenas evaluate` says."""

from __future__ import annotations

import sys
from argparse import Namespace

from attrs import evolve

from corenas.contracts import Failure, Measured
from corenas.errors import UserError
from corenas.run.spec import open_spec
from corenas_tool_inspect.export import network_of_run
from corenas_tool_inspect.table import print_json, print_table


def command(options: Namespace) -> None:
    """Measure archs of a run on one of its splits, and print what comes out."""
    if not (options.run / "spec.toml").exists():
        raise UserError("this is no run directory", file=str(options.run), hint="it has no spec.toml")
    spec, sources, catalogue = open_spec(options.run / "spec.toml", options.set, options.plugin)
    from corenas.calibrate import evaluate
    from corenas.measure import is_exclusive
    from corenas.run.prepare import prepare, trained_since
    from corenas.run.result import exported

    names, rows, networks = options.arch or ["best"], [], {}
    with sources.locating():
        of_run = prepare(trained_since(spec))
        for name in names:
            prepared, trial, network, calibrated = network_of_run(of_run, options.run, name)
            if network is None:
                text = f"this run has no weights for {name}: it trained no supernet"
                raise UserError(text, file=str(options.run), hint="best, if it was retrained")
            plain = exported(prepared, trial.arch, network, calibrated)
            metrics = evaluate(plain, prepared.task, prepared.evaluation(plain).split(options.split))
            networks[trial.arch] = plain
            rows.append((trial.arch, {**prepared.cost.of([trial.arch])[0], **metrics}))
        if options.latency:  # by the spec's own evaluator, or as it is by default; all in turn
            timing = [e for e in spec.evaluators if is_exclusive(e)] or [catalogue.options("evaluators", "latency")]
            context = evolve(of_run.evaluator_context(None), subnet=networks.__getitem__)
            for evaluator in timing:
                found = dict(zip(networks, evaluator.start(context)([*networks], 1.0), strict=True))
                for arch, row in rows:
                    row |= _timed(found[arch])
    if options.json:
        print_json({"split": options.split, "archs": [{"arch": dict(arch), **metrics} for arch, metrics in rows]})
    else:
        named = zip(names, rows, strict=True)
        print_table([{"name": n, "arch": a.digest, "split": options.split, **metrics} for n, (a, metrics) in named])


def _timed(found: object) -> dict[str, float]:
    """What a timing gave; what it could not say is told."""
    if isinstance(found, Failure):
        print(f"no latency: {found.reason}", file=sys.stderr)
        return {}
    return dict(found.metrics if isinstance(found, Measured) else found)  # type: ignore[call-overload]
