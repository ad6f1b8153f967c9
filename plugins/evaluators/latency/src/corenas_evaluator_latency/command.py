"""What `corenas latency-table` does."""

from __future__ import annotations

import sys
from argparse import Namespace

from attrs import asdict, evolve

import corenas
from corenas.errors import UserError
from corenas.run.spec import open_spec
from corenas.store import strict_json


def command(options: Namespace) -> None:
    """Measure, write the file and say how good it is."""
    spec, sources, _ = open_spec(options.spec, options.set, options.plugin)
    import torch

    from corenas.run.prepare import prepare
    from corenas_evaluator_latency.backends import Runtime
    from corenas_evaluator_latency.table import Maker

    for name in ("images", "networks", "blocks"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: expected at least 1")
    if options.to.is_dir() or not options.to.resolve().parent.is_dir():
        raise UserError("cannot write a file there", file=str(options.to), hint="--to latency.json")
    with sources.locating():
        prepared = prepare(spec, data=False)
        runtime = Runtime(options.backend, prepared.device, options.images, options.threads)
        runtime.check()
        context = prepared.evaluator_context(prepared.supernet if prepared.has_supernet else None)
        with runtime.in_force():
            maker = Maker(context, runtime, prepared.supernet, options.blocks, _tell)
            table = maker.made(options.networks, spec.seed)
    versions = {"corenas": corenas.__version__, "torch": torch.__version__}
    table = evolve(table, facts={**table.facts, "spec": str(spec.name), **versions})
    table.write(options.to)
    error = table.error
    assert error is not None
    print("", file=sys.stderr)
    if options.json:
        print(
            strict_json({"file": str(options.to), "blocks": len(table.blocks), "error": asdict(error), **table.facts})
        )
    else:
        off = f"{error.median:.1%} in the median, {error.worst:.1%} at worst"
        print(f"{options.to}: {len(table.blocks)} blocks; on {error.networks} other networks it is off by {off}")


def _tell(what: str, done: int, total: int) -> None:
    print(f"\rlatency-table: {what} {done:,}/{total:,}   ", end="", file=sys.stderr, flush=True)
