"""What a machine can check of how the code looks and is packaged."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import attrs
import pytest
import tomli

from corenas import hookspecs
from corenas.optim import Schedule
from corenas.options import explanations
from corenas.plugins import load_catalogue
from corenas.run.spec import Bins, Device, Export, Goal, Range, SearchSettings, Spec, Trust
from corenas.settings import Calibration, Stop, Train

ROOT = Path(__file__).parent.parent
PROJECTS = [ROOT, *sorted(path.parent for path in ROOT.glob("plugins/*/*/pyproject.toml"))]
SOURCES = [*sorted((ROOT / "corenas").rglob("*.py")), *sorted(ROOT.glob("plugins/*/*/src/**/*.py"))]


def project(folder: Path) -> dict:
    return tomli.loads((folder / "pyproject.toml").read_text())


@pytest.mark.parametrize("command", [
    ["ruff", "check"],
    ["ruff", "format", "--check"],
    ["basedpyright", "--level", "error"],
], ids=" ".join)  # fmt: skip
def test_the_code_is_linted_formatted_and_typed(command):
    found = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr


def test_all_projects_have_one_version_and_plugins_take_this_core():
    versions = {project(folder)["project"]["version"] for folder in PROJECTS}
    assert len(versions) == 1
    major, minor, _ = versions.pop().split(".")
    for folder in PROJECTS[1:]:
        bound = next(d for d in project(folder)["project"]["dependencies"] if re.match(r"corenas\W", d))
        assert bound == f"corenas>={major}.{minor},<{major}.{int(minor) + 1}"


def test_every_plugin_is_in_the_extra_all_and_in_the_sources():
    root = project(ROOT)
    names = {project(folder)["project"]["name"] for folder in PROJECTS[1:]}
    assert set(root["project"]["optional-dependencies"]["all"]) == names
    assert root["tool"]["uv"]["sources"].keys() - {"corenas"} == names


def test_what_plugins_offer_under_other_names_than_their_own_is_known_without_them():
    told = tomli.loads((ROOT / "corenas/offers.toml").read_text())
    listed = {(kind, name): owner for owner, kinds in told.items() for kind, names in kinds.items() for name in names}
    plugins = {project(folder)["project"]["name"] for folder in PROJECTS[1:]}
    for (kind, name), component in load_catalogue().components.items():
        if component.distribution in plugins:
            own = f"corenas-{'tool' if kind == 'commands' else kind.removesuffix('s')}-{name}"
            assert listed.pop((kind, name), own) == component.distribution, f"{kind} {name}"
    assert not listed


def test_every_plugin_is_named_after_its_folder_and_is_a_whole_project():
    for folder in PROJECTS[1:]:
        kinds, name = folder.parts[-2:]
        kind = kinds.removesuffix("s") if kinds != "mutables" else "mutable"
        content = project(folder)
        package = f"corenas_{kind}_{name}"
        assert content["project"]["name"] == f"corenas-{kind}-{name}"
        assert content["project"]["entry-points"]["corenas"] == {f"{kind}-{name}": package}
        assert (folder / "src" / package / "py.typed").exists()
        assert (folder / "README.md").stat().st_size > 200
        assert list((folder / "tests").glob("test_*.py")), folder


def imports(path: Path) -> set[str]:
    """Modules that a file imports, those under TYPE_CHECKING too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_the_core_and_its_tests_import_no_plugin():
    for path in [*(ROOT / "corenas").rglob("*.py"), *(ROOT / "tests").glob("test_*.py")]:
        assert not [name for name in imports(path) if name.startswith("corenas_")], path


def test_plugins_import_no_other_plugin_but_the_mutables_and_no_private_name_of_the_core():
    for path in ROOT.glob("plugins/*/*/src/**/*.py"):
        own = path.relative_to(ROOT).parts[4]
        for name in imports(path):
            if name.startswith("corenas_"):
                package = name.split(".")[0]
                assert package == own or package.startswith("corenas_mutable_"), (path, name)
            if name.startswith("corenas."):
                assert not any(part.startswith("_") for part in name.split(".")), (path, name)


MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "corenas").rglob("*.py"))
    if path != ROOT / "corenas/__init__.py"  # the page of names, each imported when it is asked for
}


def module_level_imports(name: str) -> set[str]:
    """Modules of the core that one imports at its top, those for types alone too."""
    statements = ast.parse(MODULES[name].read_text()).body
    for node in statements:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            statements = [*statements, *node.body]
    imported = set()
    for node in statements:
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return imported & MODULES.keys() - {name}


def test_the_modules_of_the_core_import_each_other_without_circles():
    arrows = {name: module_level_imports(name) for name in MODULES}
    while arrows:
        leaves = [name for name, to in arrows.items() if not to]
        assert leaves, f"a circle among {sorted(arrows)}"
        arrows = {name: to - set(leaves) for name, to in arrows.items() if name not in leaves}


def test_the_library_knows_no_spec_and_no_run_directory():
    for name, path in MODULES.items():
        if not name.startswith(("corenas.run", "corenas.cli", "corenas.__main__")):
            assert not {module for module in imports(path) if module.startswith("corenas.run")}, name


def test_no_function_of_the_core_is_longer_than_a_screen():
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                docstring = ast.get_docstring(node, clean=False)
                lines = node.end_lineno - node.lineno + 1 - (docstring.count("\n") + 1 if docstring else 0)
                assert lines <= 60, f"{name}.{node.name} has {lines} lines"


def test_sources_are_laid_out_by_the_formatter():
    text = "".join(path.read_text() for path in SOURCES)
    assert text.count("# fmt: skip") <= text.count("\n") / 1000


def test_the_names_of_the_first_page_are_there_without_torch():
    code = (
        "import sys, time; start = time.process_time(); import corenas; seconds = time.process_time() - start; "
        "names = [name for name in dir(corenas) if name in corenas.NAMES]; assert 'torch' not in sys.modules; "
        "from corenas import SearchSpace, load_catalogue; assert 'torch' not in sys.modules; "
        "assert len(names) >= 15; [getattr(corenas, name) for name in names]; assert seconds < 0.05, seconds"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_module_says_in_its_first_line_which_question_it_answers():
    for path in SOURCES:
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_every_option_of_the_core_and_of_every_component_is_explained():
    own = (Spec, Train, Stop, Schedule, SearchSettings, Trust, Goal, Range, Bins, Calibration, Export, Device)
    components = [c.cls for c in load_catalogue().components.values() if c.kind != "commands"]
    for cls in (*own, *components):
        assert {field.name for field in attrs.fields(cls)} == explanations(cls).keys(), cls


def test_every_hook_says_when_it_is_called():
    hooks = [getattr(hookspecs, name) for name in dir(hookspecs) if name.startswith("corenas_")]
    assert len(hooks) == 12
    for hook in hooks:
        assert re.search(r"\b[Cc]alled\b", hook.__doc__ or ""), hook


def test_the_contributing_page_fits_one_screen():
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 60


def test_no_machine_path_and_no_registry_host_stands_in_the_project():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in listed:
        path = ROOT / name
        if path.suffix in (".py", ".toml", ".md", "") and path.is_file() and path != Path(__file__):
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"/work/|/root/|pythonhosted|pypi\.org|index-url", text), name
