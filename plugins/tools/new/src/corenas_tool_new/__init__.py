"""The command `corenas new`: a plugin that passes its checks, to start from."""

from __future__ import annotations

import json
import keyword
import re
import shutil
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from corenas.errors import UserError, did_you_mean
from corenas.hookspecs import hookimpl
from corenas.plugins import load_catalogue
from corenas.run.toml import SPECS

TEMPLATES = Path(__file__).parent / "templates"
ATTRS, NUMPY, TORCH = "attrs>=24.1", "numpy>=1.26", "torch>=2.6"
KINDS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "mutator": ("Trains those of several paths that have the lowest loss", (ATTRS,)),
    "algorithm": ("Trains a supernet path by path, the largest subnet first", (ATTRS, TORCH)),
    "distiller": ("Soft cross entropy with a teacher", (ATTRS, TORCH)),
    "searcher": ("Searches by mutating the best archs found so far", (ATTRS, NUMPY)),
    "evaluator": ("A lower bound of the latency, from an arch's costs", (ATTRS,)),
    "backbone": ("Residual blocks with searchable width, depth and kernel", (ATTRS, TORCH, "corenas-mutable-slices")),
    "task": ("Tell the angle of noisy stripes", (ATTRS, NUMPY, TORCH, "corenas-mutable-slices")),
    "executor": ("Runs trials in processes on this machine", (ATTRS,)),
    "exporter": ("The layers of a network, as JSON", (ATTRS, TORCH)),
    "tool": ("Keeps the training curve of a run and shows it", ()),
    "mutable": ("A PReLU of which the first channels are active", (TORCH,)),
}
"""What each kind's template is, and what it needs beside corenas."""


def new(kind: str, name: str, folder: Path | None = None) -> tuple[Path, list[Path]]:
    """Write a plugin of a kind. Returns its folder and files.

    folder: where it goes; without it `corenas-KIND-NAME` in the working directory
    Raises UserError for a kind that there is not, a name that is none or taken, and a folder that is not empty.
    """
    if kind not in KINDS:
        raise UserError(f"no kind {kind!r}", key=("KIND",), hint=did_you_mean(kind, [*KINDS, "spec"], "kinds"))
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name.lower()):
        hint = 'letters, digits and single hyphens between them, a letter first: "my-search2"'
        raise UserError(f"{name!r} is no name for a plugin", key=("NAME",), hint=hint)
    if taken := _offered(kind, name.lower()):
        hint = "another name: installed, this plugin would stand in its place or make the name unusable"
        raise UserError(f"{name!r} is taken by {taken}", key=("NAME",), hint=hint)
    folder = folder or Path(f"corenas-{kind}-{name.lower()}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError("this is no empty folder", file=str(folder), hint="another one: --to DIR")
    contents = _contents(kind, name.lower())
    try:
        for path, text in contents.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text, encoding="utf-8")
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)  # half of it would be in the way of the next try
        raise UserError(f"cannot write: {error.strerror}", file=str(folder), hint="another folder: --to DIR") from error
    return folder, [folder / path for path in sorted(contents)]


def _offered(kind: str, name: str) -> str:
    """The distribution that is installed under the name of a plugin, or offers what it is to offer; "" if none does."""
    try:
        return f"corenas-{kind}-{name} {version(f'corenas-{kind}-{name}')}"
    except PackageNotFoundError:
        pass
    hook = {"tool": "commands"}.get(kind, f"{kind}s")
    if (found := load_catalogue().components.get((hook, name))) is not None:
        return f"{found.distribution} {found.version}"
    return f"corenas {version('corenas')}" if (kind, name) == ("tool", "run") else ""


def new_spec(name: str = "quickstart", folder: Path | None = None) -> Path:
    """Write one of the specs that corenas comes with, to be changed. Returns the file.

    folder: where it goes; without it the working directory
    Raises UserError for a name that none has, and for a file that is there already.
    """
    files = {path.relative_to(SPECS).with_suffix("").as_posix(): path for path in SPECS.rglob("*.toml")}
    files = {known: path for known, path in files.items() if not known.startswith("space/")}
    if name not in files:
        raise UserError(f"no spec {name!r}", key=("NAME",), hint=did_you_mean(name, files, "specs"))
    file = (folder or Path()) / files[name].name
    text = re.sub(r"(?:\.\./)?\bspace/([\w-]+)\.toml", r"\1", files[name].read_text("utf-8"))  # found at any place
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("x", encoding="utf-8") as out:
            out.write(re.sub(r"(#   corenas \w+ )spec/(?:imagenet/)?", r"\1", text))
    except OSError as error:
        raise UserError(f"cannot write: {error.strerror}", file=str(file), hint="another folder: --to DIR") from error
    return file


def _contents(kind: str, name: str) -> dict[str, str]:
    """The files of a plugin: path in its folder -> text."""
    package = f"corenas_{kind}_{name.replace('-', '_')}"
    sources = {path.name.removesuffix(".template"): path.read_text("utf-8") for path in (TEMPLATES / kind).iterdir()}
    sources |= {"pyproject.toml": (TEMPLATES / "pyproject.toml.template").read_text("utf-8"), "py.typed": ""}
    cls = "".join(part.capitalize() for part in name.split("-"))
    taken = any(re.search(rf"\b{cls}\b", text) for file, text in sources.items() if file.endswith(".py"))
    if taken or keyword.iskeyword(cls):
        cls += kind.capitalize()
    description, needs = KINDS[kind]
    major, minor = version("corenas").split(".")[:2]
    bounds = f">={major}.{minor},<{major}.{int(minor) + 1}"
    dependencies = ["corenas", *needs]
    words = {
        "kind": kind,
        "name": name,
        "package": package,
        "Class": cls,
        "snake": name.replace("-", "_"),
        "distribution": f"corenas-{kind}-{name}",
        "description": description,
        "dependencies": json.dumps([d + bounds if d.startswith("corenas") else d for d in dependencies]),
    }
    places = {"README.md": "", "pyproject.toml": "", "test.py": "tests/"}
    files = {}
    for file, text in sources.items():
        path = places.get(file, f"src/{package}/") + (f"test_{words['snake']}.py" if file == "test.py" else file)
        files[path] = re.sub(r"\{\{(\w+)\}\}", lambda match: words[match[1]], text)
    return files


def _parser(parser: ArgumentParser) -> Callable[[Any], int]:
    """Write a plugin of your own to start from, complete with tests that pass, or a spec."""
    parser.description = "A plugin that passes its checks as it is written, or a spec that runs, to start from."
    parser.add_argument("kind", metavar="KIND", help=f"{', '.join(KINDS)}; or spec")
    text = "its name in a spec: letters, digits and hyphens; of specs which one (quickstart)"
    parser.add_argument("name", metavar="NAME", nargs="?", help=text)
    text = "the folder to write (default: ./corenas-KIND-NAME; of a spec the working directory)"
    parser.add_argument("--to", metavar="DIR", type=Path, help=text)
    return _new


def _new(options: Namespace) -> int:
    if options.kind == "spec":
        file = new_spec(options.name or "quickstart", options.to)
        print(json.dumps({"folder": str(file.parent), "files": [str(file)]}) if options.json else file)
        return 0
    if options.name is None:
        raise UserError("required argument is missing", key=("NAME",), hint=f"corenas new {options.kind} mine")
    folder, files = new(options.kind, options.name, options.to)
    if options.json:
        print(json.dumps({"folder": str(folder), "files": [*map(str, files)]}))
    else:
        print("\n".join(map(str, files)))
        where = folder if folder.is_absolute() else f"./{folder}"
        print(f"\nNow: pip install pytest -e {where}, then python -m pytest {folder}")
    return 0


@hookimpl
def corenas_commands() -> Mapping[str, Callable[[ArgumentParser], Callable[[Any], int]]]:
    """Offer `corenas new`."""
    return {"new": _parser}
