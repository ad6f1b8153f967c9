"""The command line. It imports torch only where a command needs it."""

from __future__ import annotations

import argparse
import csv
import inspect
import json
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import corenas
from corenas.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from corenas.plugins import Catalogue
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


def _parser(given: Sequence[str]) -> argparse.ArgumentParser:
    parser = _Parser(prog="corenas", description="One-shot neural architecture search.")
    parser.add_argument("--version", action="version", version=f"corenas {corenas.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, function: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("--json", action="store_true", help="print one JSON object on stdout, nothing else")
        sub.set_defaults(command=function)
        return sub

    def spec(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("spec", metavar="SPEC", help="a TOML file")
        sub.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="override a key of the spec")

    run = command("run", _run, "do everything a spec asks for; continue if its run directory has begun")
    spec(run)
    run.add_argument("--out", metavar="DIR", type=Path, help="the run directory (default: runs/NAME)")
    run.add_argument("--fresh", action="store_true", help="empty the run directory first")

    check = command("check", _check, "all mistakes of a spec, or what would run")
    spec(check)
    check.add_argument("--no-data", action="store_true", help="read no data")

    cost = command("cost", _cost, "flops, params and activations of archs")
    spec(cost)
    cost.add_argument("--arch", metavar="ARCH", action="append", default=[],
                      help="a TOML file, min, max, default or random:SEED (default: min, default, max)")  # fmt: skip
    cost.add_argument("--n", metavar="N", type=int, default=1, help="how many archs random:SEED draws")

    trials = command("trials", _trials, "the trials of a run")
    trials.add_argument("run", metavar="RUN", type=Path, help="a run directory")
    trials.add_argument("--pareto", action="store_true", help="only those that no other beats")
    trials.add_argument("--csv", action="store_true", help="as CSV")

    export = command(
        "export", _export, "write a subnet of a run, or of a spec with fresh weights, as a network of its own"
    )
    export.add_argument("source", metavar="RUN|SPEC", help="a run directory, or a TOML file")
    export.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="override a key of the spec")
    export.add_argument("--arch", metavar="ARCH", default=None,
                        help="a TOML file, min, max, default, random:SEED, or best, the default of a run")  # fmt: skip
    export.add_argument("--to", metavar="DIR", type=Path, required=True, help="the folder to write")
    export.add_argument(
        "--format",
        metavar="NAME",
        action="append",
        default=[],
        help="safetensors, python, pt2 (default: these three), or that of an exporter",
    )

    plugins = command("plugins", _plugins, "what is installed, and what is broken and why")
    plugins.add_argument("--deep", action="store_true", help="import all modules of all plugins")

    show = command("show", _show, "the options of a component, with defaults and what they mean")
    show.add_argument("kind", nargs="?", metavar="KIND", help="for instance searchers; or a table of a spec: train")
    show.add_argument("name", nargs="?", metavar="NAME", help="for instance evolution")

    word = next((word for word in given if not word.startswith("-")), None)
    if word is not None and word not in commands.choices:  # commands of plugins are looked up only when they are needed
        catalogue = _catalogue()
        if word in catalogue.names("commands"):
            sub = commands.add_parser(word)
            sub.set_defaults(command=catalogue.find("commands", word).cls(sub))
        if word not in commands.choices:
            known = [*commands.choices, *catalogue.names("commands")]
            raise UserError(f"no command {word!r}", hint=did_you_mean(word, known, "commands"))
    return parser


def _catalogue() -> Catalogue:
    from corenas.plugins import load_catalogue

    return load_catalogue()


def _load(options: argparse.Namespace) -> tuple[Spec, Sources, Catalogue]:
    from corenas.spec import load_spec

    catalogue = _catalogue()
    return *load_spec(options.spec, catalogue, options.set), catalogue


def _run(options: argparse.Namespace) -> int:
    spec, sources, catalogue = _load(options)
    from corenas.run import run

    def emit(event: Any) -> None:
        for line in catalogue.emit(event):
            print(line, file=sys.stderr)

    folder = options.out or Path("runs") / str(spec.name)
    try:
        result = run(spec, catalogue, folder, emit, options.fresh)
    except UserError as error:
        raise sources.located(error) from None
    if options.json:
        _print(result)
    return DONE


def _check(options: argparse.Namespace) -> int:
    spec, sources, _ = _load(options)
    from corenas.run import named_arch, prepare

    try:
        prepared = prepare(spec, data=not options.no_data, weights=False)
    except UserError as error:
        raise sources.located(error) from None
    archs = {name: named_arch(spec.space, name) for name in ("min", "default", "max")}
    costs = dict(zip(archs, prepared.cost.of(archs.values()), strict=True))
    size = _size(spec)
    if options.json:
        space = {"size": size, "variables": len(spec.space.variables)}
        _print({"ok": True, "errors": [], "space": space, "cost": costs})
        return DONE
    print(f"{options.spec} is fine: {spec.name}, stages {', '.join([*spec.algorithm.stages, 'export'])}")
    if size is not None:
        print(f"space      {size:,} archs ({size:.2e}), {len(spec.space.variables)} variables")
    if prepared.task.splits:
        print("data       " + ", ".join(f"{name} {n:,}" for name, n in prepared.task.splits.items()))
    _table([{"arch": name, **cost} for name, cost in costs.items()])
    if prepared.constraints:
        print(f"constraints {' and '.join(map(str, prepared.constraints))}")
    if prepared.drawing.constraints:
        wanted = " and ".join(map(str, prepared.drawing.constraints))
        print(f"about {prepared.drawing.share:.1%} of drawn archs have {wanted}")
    return DONE


def _size(spec: Spec) -> int | None:
    try:
        return spec.space.size
    except TypeError:  # a continuous variable
        return None


def _cost(options: argparse.Namespace) -> int:
    spec, sources, _ = _load(options)
    from corenas import seeding
    from corenas.run import named_arch, prepare

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
    try:
        prepared = prepare(spec, data=False, weights=False)
    except UserError as error:
        raise sources.located(error) from None
    costs = prepared.cost.of(arch for _, arch in archs)
    if options.json:
        _print({"archs": [{"arch": dict(arch), **cost} for (_, arch), cost in zip(archs, costs, strict=True)]})
    else:
        _table([{"arch": name, **cost} for (name, _), cost in zip(archs, costs, strict=True)])
    return DONE


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


def _trials(options: argparse.Namespace) -> int:
    from corenas.objectives import Objective, Objectives
    from corenas.store import Store

    store = Store(options.run / "run.sqlite", readonly=True)
    trials = store.trials()
    if options.pareto:
        asked = store.noted("objectives")
        goals = [Objective(**goal) for goal in asked["objectives"]]
        if not asked["pareto"] and len(goals) == 1:  # one goal alone has no trade-off: cost is the other side
            goals.append(Objective("flops", "min"))
        trials = Objectives(tuple(goals), True, asked["bin_metric"], asked["bin_width"]).front(trials)
    if options.json:
        keys = ("arch", "metrics", "state", "seconds")
        _print({"trials": [{key: trial.to_json()[key] for key in keys} for trial in trials]})
        return DONE
    rows = []
    for trial in trials:
        rows.append({"arch": trial.arch.digest, "state": trial.state, **trial.metrics, "seconds": trial.seconds})
    if options.csv:
        full = [{**trial.arch, **row} for trial, row in zip(trials, rows, strict=True)]
        writer = csv.DictWriter(sys.stdout, [*dict.fromkeys(key for row in full for key in row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(full)
    else:
        _table(rows)
    return DONE


def _export(options: argparse.Namespace) -> int:
    from corenas.settings import FORMATS
    from corenas.spec import format_faults, load_spec

    catalogue, folder = _catalogue(), Path(options.source)
    path = folder / "spec.toml" if folder.is_dir() else folder
    if folder.is_dir() and not path.exists():
        raise UserError("this is no run directory", file=str(folder), hint="it has no spec.toml")
    unknown = format_faults(options.format, catalogue)
    if unknown:
        raise UserError(faults=[fault.under("--format") for fault in unknown])
    options.to = options.to.resolve()
    if options.to.exists() and (not options.to.is_dir() or any(options.to.iterdir())):
        raise UserError("this is no empty folder", file=str(options.to), hint="another one: --to DIR")
    spec, sources = load_spec(path, catalogue, options.set)
    from corenas.run import named_arch, open_run, prepare, read_formats, write_best

    try:
        metrics: dict[str, float] = {}
        if folder.is_dir():
            prepared, evaluation, store = open_run(folder, spec)
            name = options.arch or "best"
            if name == "best":
                result = store.noted("result")
                if result is None:
                    raise UserError("this run has no best arch yet", file=str(folder), hint="finish it: corenas run")
                arch, metrics = spec.space.arch(result["best"]["arch"]), result["best"]["metrics"]
            else:
                arch = named_arch(spec.space, name, store.trials())
        else:
            prepared, evaluation = prepare(spec, data=False), None
            arch = named_arch(spec.space, options.arch or "default")
        formats = read_formats(options.format or FORMATS, catalogue)
        write_best(prepared, evaluation, arch, options.to, formats, metrics, False)
    except UserError as error:
        raise sources.located(error) from None
    files = sorted(str(file) for file in options.to.iterdir())
    if options.json:
        _print({"arch": dict(arch), **prepared.cost.of([arch])[0], "files": files})
    else:
        print("\n".join(files))
    return DONE


def _plugins(options: argparse.Namespace) -> int:
    catalogue = _catalogue()
    deep = _import_all(catalogue) if options.deep else {}
    rows = []
    for plugin in catalogue.plugins:
        own = [c for c in catalogue.components.values() if c.distribution == plugin.distribution]
        error = plugin.error or deep.get(plugin.name)
        status = "broken" if error else "ok"
        common = {"distribution": plugin.distribution, "version": plugin.version, "status": status, "error": error}
        for component in own:
            rows.append({"kind": component.kind, "name": component.name, **common})
        if not own:
            kind, _, name = plugin.name.partition("-")
            rows.append({"kind": f"{kind}s", "name": name or plugin.name, **common})
    if options.json:
        _print({"plugins": rows})
    else:
        _table([{**row, "error": row["error"] or ""} for row in rows])
    return DONE


def _import_all(catalogue: Catalogue) -> dict[str, str]:
    """Plugin -> why one of its modules cannot be imported."""
    import importlib
    import pkgutil

    broken = {}
    for plugin in catalogue.plugins:
        try:
            package = importlib.import_module(plugin.module.partition(":")[0])
            for module in pkgutil.walk_packages(getattr(package, "__path__", []), f"{package.__name__}."):
                importlib.import_module(module.name)
        except Exception as error:
            broken[plugin.name] = f"{type(error).__name__}: {error}"
    return broken


def _show(options: argparse.Namespace) -> int:
    import attrs

    from corenas.plugins import KINDS
    from corenas.spec import Spec

    catalogue = _catalogue()
    kinds = [kind for kind in KINDS if kind != "commands"]
    tables = {field.name: type(field.default) for field in attrs.fields(Spec) if attrs.has(type(field.default))}
    if options.kind in ("spec", *tables):
        cls = tables.get(options.kind, Spec)
        if options.json:
            _print({options.kind: _described(cls)})
        else:
            _describe(cls, "")
        return DONE
    if options.kind is None:
        found = {kind: catalogue.names(kind) for kind in kinds}
        if options.json:
            _print(found)
        else:
            print("\n".join(f"{kind:<12} {', '.join(names) or 'none installed'}" for kind, names in found.items()))
            print(f"{'tables':<12} spec, {', '.join(tables)}")
        return DONE
    kind = options.kind if options.kind.endswith("s") else f"{options.kind}s"
    if kind not in kinds:
        known = [*kinds, "spec", *tables]
        raise UserError(
            f"no kind {options.kind!r}", hint=did_you_mean(options.kind, known, "kinds and tables of a spec")
        )
    names = [options.name] if options.name else catalogue.names(kind)
    components = [catalogue.find(kind, name) for name in names]
    if options.json:
        _print({kind: {c.name: _described(c.cls) for c in components}})
        return DONE
    for component in components:
        print(f"{component.name} ({component.distribution} {component.version})")
        _describe(component.cls, "  ")
        print()
    return DONE


def _described(cls: type) -> list[dict[str, Any]]:
    """The options of a class, those of classes inside it under `options`."""
    import attrs

    from corenas.options import expectation, explanations, to_table

    attrs.resolve_types(cls)
    texts = explanations(cls)
    rows = []
    for attribute in attrs.fields(cls):
        default: Any = attribute.default
        if isinstance(default, attrs.Factory):  # type: ignore[arg-type]
            default = default.factory()  # type: ignore[union-attr]
        row: dict[str, Any] = {"option": attribute.name, "expects": expectation(attribute.type)}
        row["required"] = default is attrs.NOTHING
        if not row["required"]:
            row["default"] = to_table(default)
        row["meaning"] = texts.get(attribute.name, "")
        inner = [arm for arm in (attribute.type, *typing.get_args(attribute.type)) if attrs.has(arm)]
        if inner:
            row["options"] = _described(inner[0])
        rows.append(row)
    return rows


def _describe(cls: type, indent: str) -> None:
    """Print a component's summary and options."""
    summary = inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0]
    for line in summary.splitlines():
        print(f"{indent}{line}")
    _describe_options(_described(cls), f"{indent}  ")


def _describe_options(rows: Sequence[dict[str, Any]], indent: str) -> None:
    for row in rows:
        default = "required" if row["required"] else f"default {_toml(row['default'])}"
        print(f"{indent}{row['option']}: {row['meaning']}\n{indent}  {row['expects']}, {default}")
        _describe_options(row.get("options", []), f"{indent}    ")


def _toml(value: Any) -> str:
    return "none" if value is None else json.dumps(value)
