import json
import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import tomli
import tomli_w

import corenas
from corenas.errors import UserError
from corenas.plugins import load_catalogue
from corenas.run.spec import SPECS, load_spec
from corenas.run.stages import run_spec
from corenas.testing.commands import command_checks, parser_of
from corenas.testing.distributions import distribution_checks
from corenas_tool_new import KINDS, corenas_commands, new

COMMAND = corenas_commands()["new"]
ROOT = Path(__file__).parents[4]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A plugin of each kind: kind -> its folder."""
    to = tmp_path_factory.mktemp("plugins")
    return {kind: new(kind, "my-own2", to / f"corenas-{kind}-my-own2")[0] for kind in KINDS}


@pytest.mark.slow
def test_every_plugin_passes_its_own_tests_as_it_is_written(written):
    path = os.pathsep.join(str(folder / "src") for folder in written.values())
    tests = [folder / "tests" for folder in written.values()]
    options = ["-q", "-n0", "-c", ROOT / "pyproject.toml", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, *tests]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
    assert "warning" not in done.stdout


@pytest.mark.parametrize("command", [["check"], ["format", "--diff"]], ids=lambda command: command[0])
def test_what_is_written_is_as_clean_as_this_repository(written, command, tmp_path):
    longer = [new(kind, "a-name-of-some-length", tmp_path / kind)[0] for kind in KINDS]
    folders = [*written.values(), *longer]
    src = f"src = {json.dumps(['.', 'plugins/*/*/src', *(str(folder / 'src') for folder in folders)])}"
    tests = 'lint.per-file-ignores = { "test_*.py" = ["D1"] }'  # folders are matched in the repository alone
    config = [word for text in ("pyproject.toml", src, tests) for word in ("--config", text)]
    ruff = [sys.executable, "-m", "ruff", *command, "--no-cache", *config, *folders]
    found = subprocess.run(ruff, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr


def test_what_is_written_is_typed(written):
    sources = [folder / "src" for folder in written.values()]
    path = os.pathsep.join(map(str, sources))
    command = [sys.executable, "-m", "basedpyright", "--level", "error", *sources]
    found = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_the_catalogue_takes_it_under_its_name(written, kind, monkeypatch):
    monkeypatch.syspath_prepend(written[kind] / "src")
    project = tomli.loads((written[kind] / "pyproject.toml").read_text())
    ((name, module),) = project["project"]["entry-points"]["corenas"].items()
    assert (name, module) == (f"{kind}-my-own2", f"corenas_{kind}_my_own2")
    catalogue = load_catalogue(found=[EntryPoint(name, module, "corenas")])
    assert [plugin.error for plugin in catalogue.plugins] == [None]
    offers = {"tool": [("commands", "my-own2")], "mutable": []}.get(kind, [(f"{kind}s", "my-own2")])
    assert [*catalogue.components] == offers


def test_all_of_them_make_a_run_together(written, monkeypatch, tmp_path):
    for folder in written.values():
        monkeypatch.syspath_prepend(folder / "src")
    points = [EntryPoint(f"{kind}-my-own2", f"corenas_{kind}_my_own2", "corenas") for kind in KINDS]
    catalogue = load_catalogue(found=points)
    stage = {"width": [8, 16], "depth": [1, 2], "block": {"kernel": [3, 5]}}
    table = {
        "space": {"stem": [8, 16], "stages": [stage]},
        "task": {"type": "my-own2", "samples": 200}, "backbone": {"type": "my-own2", "in_channels": 1},
        **dict.fromkeys(["mutator", "algorithm", "searcher"], "my-own2"), "evaluators": ["my-own2"],
        "search": {"trials": 10, "objectives": ["my_own2_ms"]}, "export": {"formats": ["my-own2"]},
        "train": {"epochs": 2},
    }  # fmt: skip
    (tmp_path / "spec.toml").write_text(tomli_w.dumps(table))
    spec, _ = load_spec(tmp_path / "spec.toml", catalogue)
    complaints = []
    result = run_spec(spec, catalogue, tmp_path / "run", lambda event: complaints.extend(catalogue.emit(event)))
    assert not complaints
    assert result["trials"] == 10
    assert result["best"]["metrics"]["my_own2_ms"] > 0
    assert result["best"]["test"]["top1"] > 40  # of four angles
    assert (tmp_path / "run" / "my_own2.csv").stat().st_size > 0
    layers = json.loads((tmp_path / "run" / "best" / "my_own2.json").read_text())["layers"]
    assert sum(layer["params"] for layer in layers) == result["best"]["metrics"]["params"]


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_a_whole_project_of_this_version_of_corenas(written, kind):
    project = tomli.loads((written[kind] / "pyproject.toml").read_text())["project"]
    major, minor = map(int, corenas.__version__.split(".")[:2])
    assert project["name"] == written[kind].name
    assert project["dependencies"][0] == f"corenas>={major}.{minor},<{major}.{minor + 1}"
    assert (written[kind] / f"src/corenas_{kind}_my_own2/py.typed").exists()
    texts = [path.read_text() for path in written[kind].rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert "{{" not in "".join(texts)
    assert (written[kind] / "README.md").stat().st_size > 200


@pytest.mark.parametrize("name", ["problem", "true", "arch", "search", "x", "MySearch", "a1-b2-c3"])
def test_any_name_gives_a_class_that_is_its_own(tmp_path, name):
    folder, _ = new("searcher", name, tmp_path / "it")
    (module,) = folder.glob("src/*/__init__.py")
    script = f"import {module.parent.name} as m; [cls] = m.corenas_searchers().values(); print(cls.__name__, cls())"
    env = os.environ | {"PYTHONPATH": str(folder / "src")}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0].lower().startswith(name.lower().replace("-", ""))


@pytest.mark.parametrize("name", ["", "2opt", "a b", "a--b", "-a", "a-", "a_b", "ä", "../a", "a.b"])
def test_a_name_that_is_none_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="no name for a plugin") as caught:
        new("searcher", name, tmp_path / "it")
    assert caught.value.faults[0].dotted == "NAME"
    assert not (tmp_path / "it").exists()


@pytest.mark.parametrize(
    ("kind", "name", "holder"),
    [
        ("searcher", "random", "corenas-searcher-random"),  # both the distribution and what it offers
        ("distiller", "knowledge", "corenas-distiller-knowledge"),  # a distribution that offers other names
        ("evaluator", "synflow", "corenas-evaluator-zerocost"),  # a name that another distribution offers
        ("tool", "trials", "corenas-tool-inspect"),
        ("tool", "run", "corenas"),
    ],
)
def test_a_name_that_is_taken_is_refused(kind, name, holder, tmp_path):
    with pytest.raises(UserError, match=rf"'{name}' is taken by {holder} {corenas.__version__}"):
        new(kind, name, tmp_path / "it")
    assert not (tmp_path / "it").exists()


def test_a_kind_that_there_is_not_is_answered_with_those_that_there_are(tmp_path):
    with pytest.raises(UserError, match="did you mean 'searcher'") as caught:
        new("searchers", "mine", tmp_path / "it")
    assert caught.value.faults[0].dotted == "KIND"


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path):
    (tmp_path / "mine.py").write_text("")
    for folder in (tmp_path, tmp_path / "mine.py"):
        with pytest.raises(UserError, match="no empty folder"):
            new("searcher", "mine", folder)
    with pytest.raises(UserError, match="cannot write"):
        new("searcher", "mine", tmp_path / "mine.py" / "below")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]


def test_the_command_writes_beside_and_says_what(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    parser, run = parser_of(COMMAND)
    assert run(parser.parse_args(["mutator", "Mine", "--json"])) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["folder"] == "corenas-mutator-mine"
    assert sorted(said["files"]) == sorted(
        str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()
    )
    assert run(parser.parse_args(["mutator", "mine", "--to", "elsewhere"])) == 0
    assert "pip install pytest -e ./elsewhere" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["quickstart", "fairnas", "imagenet/ofa"])
def test_a_spec_is_written_that_runs_anywhere(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    parser, run = parser_of(COMMAND)
    assert run(parser.parse_args(["spec", *([] if name == "quickstart" else [name])])) == 0
    written = tmp_path / capsys.readouterr().out.strip()
    catalogue = load_catalogue()
    spec, theirs = (load_spec(path, catalogue)[0] for path in (written, SPECS / f"{name}.toml"))
    assert spec.to_table(catalogue) == theirs.to_table(catalogue)
    with pytest.raises(UserError, match="cannot write: File exists"):
        run(parser.parse_args(["spec", name]))
    with pytest.raises(UserError, match="no spec 'fairnass'\n  did you mean 'fairnas'"):
        run(parser.parse_args(["spec", "fairnass"]))


@pytest.mark.parametrize("check", command_checks)
def test_conforms(check):
    check(COMMAND)


@pytest.mark.parametrize("check", distribution_checks)
def test_the_distribution_conforms(check):
    check("corenas_tool_new")
