"""The command line. It imports torch only where a command needs it."""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import corenas
from corenas.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from corenas.contracts import Trial
    from corenas.plugins import Catalogue
    from corenas.space import Arch, SearchSpace
    from corenas.spec import Sources, Spec

DONE, MISTAKE, INTERRUPTED = 0, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status: 0 done, 2 the user's mistake, 130 interrupted; our bug is a traceback."""
    given = [*(sys.argv[1:] if arguments is None else arguments)]
    options = None
    try:
        options = _parser(given).parse_args(given)
        return options.command(options) or DONE
    except UserError as error:
        if "CORENAS_TRACEBACK" in os.environ:
            traceback.print_exc()
        if os.environ.get("RANK", "0") == "0":  # of several processes under torchrun one complains for all
            _complain(error, options is not None and getattr(options, "json", False), given[:1])
        return MISTAKE
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `corenas trials … | head`
        sys.stderr.close()
        return DONE
    except OSError as error:  # a full disk, a folder that is gone
        print(f"{error.filename or 'output'}: {error.strerror or error}", file=sys.stderr)
        return MISTAKE


def _complain(error: UserError, as_json: bool, command: list[str]) -> None:
    for fault in error.faults:
        print(fault, file=sys.stderr)
    if as_json:
        errors = [{"file": f.file, "line": f.line, "key": f.dotted, "message": f.message} for f in error.faults]
        _print({"ok": False, "errors": errors} if command == ["check"] else {"errors": errors})


def _print(content: Any) -> None:
    json.dump(content, sys.stdout)
    sys.stdout.write("\n")


class _Parser(argparse.ArgumentParser):
    """Says what was meant where it can, and exits with our status for a mistake."""

    def error(self, message: str) -> Any:
        raise UserError(message, hint=f"{self.prog} --help")


_SPEC = ("spec", {"metavar": "SPEC", "help": "a TOML file"})
_SET = ("--set", {"metavar": "KEY=VALUE", "action": "append", "default": [], "help": "override a key of the spec"})
_RUN = ("run", {"metavar": "RUN", "type": Path, "help": "a run directory"})
_COMMANDS: dict[str, tuple[str, Sequence[tuple[str, dict[str, Any]]]]] = {
    "run": ("do everything a spec asks for; continue if its run directory has begun", [
        _SPEC, _SET,
        ("--out", {"metavar": "DIR", "type": Path, "help": "the run directory (default: runs/NAME)"}),
        ("--fresh", {"action": "store_true", "help": "empty the run directory first"}),
    ]),
    "check": ("all mistakes of a spec, or what would run, how long and with how much memory", [
        _SPEC, _SET, ("--no-data", {"action": "store_true", "help": "read no data, and try no step"}),
    ]),
    "cost": ("flops, params and activations of archs", [
        _SPEC, _SET,
        ("--arch", {"metavar": "ARCH", "action": "append", "default": [],
                    "help": "a TOML file, min, max, default or random:SEED (default: min, default, max)"}),
        ("--n", {"metavar": "N", "type": int, "default": 1, "help": "how many archs random:SEED draws"}),
    ]),
    "trials": ("the trials of a run", [
        _RUN,
        ("--pareto", {"action": "store_true", "help": "only those that no other beats"}),
        ("--csv", {"action": "store_true", "help": "as CSV"}),
    ]),
    "export": ("write a subnet of a run, or of a spec with fresh weights, as a network of its own", [
        ("source", {"metavar": "RUN|SPEC", "help": "a run directory, or a TOML file"}), _SET,
        ("--arch", {"metavar": "ARCH",
                    "help": "a TOML file, min, max, default, random:SEED; of a run a trial, or best, its default"}),
        ("--to", {"metavar": "DIR", "type": Path, "required": True, "help": "the folder to write"}),
        ("--format", {"metavar": "NAME", "action": "append", "default": [],
                      "help": "an exporter (default: those of the spec)"}),
    ]),
    "plugins": ("what is installed, and what is broken and why", [
        ("--deep", {"action": "store_true", "help": "import all modules of all plugins"}),
    ]),
    "show": ("the options of a component, with defaults and what they mean", [
        ("kind", {"nargs": "?", "metavar": "KIND", "help": "for instance searchers; or a table of a spec: train"}),
        ("name", {"nargs": "?", "metavar": "NAME", "help": "for instance evolution"}),
    ]),
}  # fmt: skip


def _parser(given: Sequence[str]) -> argparse.ArgumentParser:
    parser = _Parser(prog="corenas", description="One-shot neural architecture search.")
    parser.add_argument("--version", action="version", version=f"corenas {corenas.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("--json", action="store_true", help="print one JSON object on stdout, nothing else")
        return sub

    for name, (text, arguments) in _COMMANDS.items():
        sub = command(name, text)
        sub.set_defaults(command=globals()[f"_{name}"])
        for flag, settings in arguments:
            sub.add_argument(flag, **settings)
    word = next((word for word in given if not word.startswith("-")), None)
    if word not in _COMMANDS:  # commands of plugins are looked up only where they are needed
        catalogue = _catalogue()
        for name in catalogue.names("commands"):
            component = catalogue.find("commands", name)
            sub = command(name, f"from {component.distribution}")
            sub.set_defaults(command=component.cls(sub))
        if word is not None and word not in commands.choices:
            raise UserError(f"no command {word!r}", hint=did_you_mean(word, commands.choices, "commands"))
    return parser


def _catalogue() -> Catalogue:
    from corenas.plugins import load_catalogue

    return load_catalogue()


def _load(options: argparse.Namespace) -> tuple[Spec, Sources, Catalogue]:
    from corenas.spec import load_spec

    catalogue = _catalogue()
    return *load_spec(options.spec, catalogue, options.set), catalogue


def _run(options: argparse.Namespace) -> None:
    spec, sources, catalogue = _load(options)
    from corenas.run import run

    def emit(event: Any) -> None:
        for line in catalogue.emit(event):
            print(line, file=sys.stderr)

    folder = options.out or Path("runs") / str(spec.name)
    with sources.locating():
        result = run(spec, catalogue, folder, emit, options.fresh)
    if options.json and os.environ.get("RANK", "0") == "0":
        _print(result)


def _check(options: argparse.Namespace) -> None:
    spec, sources, _ = _load(options)
    from corenas.estimate import estimate
    from corenas.run import prepare

    with sources.locating():
        prepared = prepare(spec, data=not options.no_data, weights=False)
        needs = None if options.no_data else estimate(prepared, limit=3.0)
    archs = {name: named_arch(spec.space, name) for name in ("min", "default", "max")}
    costs = dict(zip(archs, prepared.cost.of(archs.values()), strict=True))
    size = spec.space.size if spec.space.finite else None
    if options.json:
        space = {"size": size, "variables": len(spec.space.variables)}
        told = {"seconds": dict(needs.seconds), "memory": needs.memory} if needs else None
        _print({"ok": True, "errors": [], "space": space, "cost": costs, "estimate": told})
        return
    print(f"{options.spec} is fine: {spec.name}, stages {', '.join([*prepared.stages, 'export'])}")
    if size is not None:
        print(f"space      {size:,} archs ({size:.2e}), {len(spec.space.variables)} variables")
    if prepared.task.splits:
        print("data       " + ", ".join(f"{name} {n:,}" for name, n in prepared.task.splits.items()))
    _table([{"arch": name, **cost} for name, cost in costs.items()])
    for wanted in prepared.wanted:
        if wanted.constraints:
            print(f"constraints {wanted}")
        if cheap := wanted.drawing.constraints:
            print(f"about {wanted.drawing.share:.1%} of drawn archs have {' and '.join(map(str, cheap))}")
    if needs is not None:
        stages = ", ".join(f"{stage} about {_duration(seconds)}" for stage, seconds in needs.seconds.items())
        memory = f", memory about {needs.memory / 1e9:.2g} GB" if needs.memory else ""
        print(f"needs      {stages or 'not known'}{memory} (tried: {needs.tried}, on {prepared.device})")


def _duration(seconds: float) -> str:
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.2g} {name}" if seconds < 10 * unit else f"{seconds / unit:.0f} {name}"
    return f"{seconds:.0f} s"


def _cost(options: argparse.Namespace) -> None:
    spec, sources, _ = _load(options)
    from corenas import seeding
    from corenas.run import prepare

    if options.n < 1:
        raise UserError(f"--n {options.n}: expected at least 1")
    archs = []
    for name in options.arch or ["min", "default", "max"]:
        kind, _, seed = name.partition(":")
        if kind == "random" and seed.isdigit() and options.n > 1:
            codes = spec.space.draw(seeding.generator(int(seed), "arch"), options.n)
            archs += [(f"{name}[{i}]", arch) for i, arch in enumerate(spec.space.decode(codes))]
        else:
            archs.append((name, named_arch(spec.space, name)))
    with sources.locating():
        prepared = prepare(spec, data=False, weights=False)
    costs = prepared.cost.of(arch for _, arch in archs)
    if options.json:
        _print({"archs": [{"arch": dict(arch), **cost} for (_, arch), cost in zip(archs, costs, strict=True)]})
    else:
        _table([{"arch": name, **cost} for (name, _), cost in zip(archs, costs, strict=True)])


def _table(rows: Sequence[dict[str, Any]]) -> None:
    """Rows as columns of text, numbers to the right."""
    if not rows:
        print("nothing")
        return
    keys = [*dict.fromkeys(key for row in rows for key in row)]
    cells = [[_cell(row.get(key, "")) for key in keys] for row in rows]
    widths = [max(map(len, column)) for column in zip(keys, *cells, strict=True)]
    for line, values in [(keys, None), *zip(cells, rows, strict=True)]:
        parts = []
        for i, (cell, width) in enumerate(zip(line, widths, strict=True)):
            number = isinstance((values or rows[0]).get(keys[i]), int | float)
            parts.append(cell.rjust(width) if number else cell.ljust(width))
        print("  ".join(parts).rstrip())


def _cell(value: Any) -> str:
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.1f}"
    return f"{int(value):,}" if isinstance(value, int | float) else str(value)


def named_arch(space: SearchSpace, name: str, trials: Sequence[Trial] = ()) -> Arch:
    """The arch that a person names: "min", "max", "default", "random:SEED", a TOML file.

    trials: those that may be named by the beginning of their digest
    Raises UserError for what is none of these.
    """
    import attrs
    import tomli

    from corenas import seeding

    found = {trial.arch for trial in trials if len(name) >= 4 and trial.arch.digest.startswith(name)}
    if len(found) == 1:
        return found.pop()
    if name in ("min", "max", "default"):
        return {"min": space.smallest, "max": space.largest, "default": space.default}[name]()
    kind, colon, seed = name.partition(":")
    if kind == "random" and colon:
        if not seed.isdigit():
            raise UserError(f"random:{seed}: expected a whole number as seed", key=("--arch",))
        return space.sample(seeding.generator(int(seed), "arch"))
    if not Path(name).is_file():
        hint = (
            'expected a TOML file, "min", "max", "default", "random:SEED"; of a run, a trial as `corenas trials` has it'
        )
        raise UserError("no such arch", file=name, hint=hint)
    try:
        return space.arch(tomli.loads(Path(name).read_text(encoding="utf-8")))
    except (tomli.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"this is no TOML: {error}", file=name) from None
    except UserError as error:
        raise UserError(faults=[attrs.evolve(fault, file=name) for fault in error.faults]) from None


def _trials(options: argparse.Namespace) -> None:
    from corenas.objectives import Objective, Objectives
    from corenas.store import Store

    store = Store(options.run / "run.sqlite", readonly=True)
    searches = store.noted("searches", [""])
    listed = [(wanted, trial) for number, wanted in enumerate(searches) for trial in store.trials(number)]
    if options.pareto:
        asked = store.noted("objectives")
        objectives = [Objective(**goal) for goal in asked["objectives"]]
        if not asked["pareto"] and len(objectives) == 1:  # one goal has no trade-off: cost is the other side
            objectives.append(Objective("flops", "min"))
        best = Objectives(tuple(objectives), True, asked["bin_metric"], asked["bin_width"])
        listed = [("", trial) for trial in best.front(trial for _, trial in listed if trial.fidelity == 1)]
    if options.json:
        keys = (
            "arch",
            "metrics",
            "state",
            "seconds",
            *(["fidelity"] if any(t.fidelity < 1 for _, t in listed) else []),
        )
        _print({"trials": [{key: trial.to_json()[key] for key in keys} for _, trial in listed]})
        return
    rows = []
    for wanted, trial in listed:
        row: dict[str, Any] = {"arch": trial.arch.digest, "state": trial.state}
        row |= {"search": wanted} if len(searches) > 1 and not options.pareto else {}
        row |= {"fidelity": trial.fidelity} if any(t.fidelity < 1 for _, t in listed) else {}
        rows.append(row | dict(trial.metrics) | {"seconds": trial.seconds})
    if options.csv:
        full = [trial.row | row for (_, trial), row in zip(listed, rows, strict=True)]
        writer = csv.DictWriter(sys.stdout, [*dict.fromkeys(key for row in full for key in row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(full)
    else:
        _table(rows)


def _export(options: argparse.Namespace) -> None:
    from corenas.spec import load_spec

    catalogue, folder = _catalogue(), Path(options.source)
    path = folder / "spec.toml" if folder.is_dir() else folder
    if folder.is_dir() and not path.exists():
        raise UserError("this is no run directory", file=str(folder), hint="it has no spec.toml")
    options.to = options.to.resolve()
    if options.to.exists() and (not options.to.is_dir() or any(options.to.iterdir())):
        raise UserError("this is no empty folder", file=str(options.to), hint="another one: --to DIR")
    spec, sources = load_spec(path, catalogue, options.set)
    from corenas.result import plain_network, read_exporters, write
    from corenas.run import open_run, prepare

    exporters = read_exporters(options.format or spec.export.formats, catalogue)
    with sources.locating():
        if folder.is_dir():
            prepared, trial, network, calibrated = open_run(prepare(spec), folder, options.arch or "best", named_arch)
            arch, metrics = trial.arch, trial.metrics
        else:
            prepared, network, calibrated, metrics = prepare(spec, data=False), None, False, {}
            arch = named_arch(spec.space, options.arch or "default")
        plain = plain_network(prepared, arch, network, calibrated)
        write(prepared, plain, arch, options.to, exporters, metrics, tested=False)
    files = sorted(str(file) for file in options.to.iterdir())
    if options.json:
        _print({"arch": dict(arch), **prepared.cost.of([arch])[0], "files": files})
    else:
        print("\n".join(files))


def _plugins(options: argparse.Namespace) -> None:
    catalogue = _catalogue()
    deep = catalogue.import_all() if options.deep else {}
    rows = []
    for plugin in catalogue.plugins:
        own = [c for c in catalogue.components.values() if c.distribution == plugin.distribution]
        error = plugin.error or deep.get(plugin.name)
        kind, _, name = plugin.name.partition("-")
        offers = [(c.kind, c.name) for c in own] or [(f"{kind}s", name or plugin.name)]
        rows += [{"kind": kind, "name": name, "distribution": plugin.distribution, "version": plugin.version,
                  "status": "broken" if error else "ok", "error": error} for kind, name in offers]  # fmt: skip
    if options.json:
        _print({"plugins": rows})
    else:
        _table([{**row, "error": row["error"] or ""} for row in rows])


def _show(options: argparse.Namespace) -> None:
    from corenas.show import show

    found, lines = show(_catalogue(), options.kind, options.name)
    if options.json:
        _print(found)
    else:
        print("\n".join(lines))
