"""Plugins of strangers: wheels built and installed outside the repository; what is wrong with some disturbs no other.

By hand, with an environment of its own: uv venv, uv pip install of the same wheels, `corenas run` of the same spec.
"""

import json
import os
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
import tomli_w

from corenas.cli import main

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
KINDS = ("searcher", "evaluator", "algorithm", "backbone")
SPEC = {
    **dict.fromkeys(("algorithm", "searcher"), "outside"), "evaluators": ["outside"], "mutator": "uniform",
    "backbone": {"type": "outside", "in_channels": 1}, "task": {"type": "classification", "data": "digits"},
    "train": {"epochs": 1, "batch_size": 128}, "search": {"trials": 5, "objectives": ["outside_ms"]},
    "space": {"stem": [8, 16], "stages": [{"width": [8, 16], "depth": [1, 2], "block": {"kernel": [3, 5]}}]},
}  # fmt: skip
ODD = {
    "raises": "raise RuntimeError('no luck')",
    "older": "corenas_contract = 1",
    "taken": """
        from attrs import frozen
        from corenas.hookspecs import hookimpl

        @frozen
        class Searcher:
            def start(self, problem, rng): ...

        @hookimpl
        def corenas_searchers():
            return {"random": Searcher}
    """,
}


def tool(*command, cwd, **environment):
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=300, check=False,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **environment})  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def odd_plugin(folder, name, text):
    (folder / "src" / f"odd_{name}").mkdir(parents=True)
    (folder / "src" / f"odd_{name}" / "__init__.py").write_text(textwrap.dedent(text))
    (folder / "pyproject.toml").write_text(tomli_w.dumps({
        "build-system": {"requires": ["uv_build>=0.9,<1"], "build-backend": "uv_build"},
        "project": {"name": f"odd-{name}", "version": "1.0", "entry-points": {"corenas": {name: f"odd_{name}"}}},
    }))  # fmt: skip


def test_wheels_of_strangers_are_found_run_and_reported(tmp_path):
    uv = shutil.which("uv")
    if uv is None:
        pytest.skip("no uv to build wheels with")
    for kind in KINDS:
        assert main(["new", kind, "outside", "--to", str(tmp_path / kind)]) == 0
    for name, text in ODD.items():
        odd_plugin(tmp_path / name, name, text)
    for folder in (*KINDS, *ODD):
        tool(uv, "build", "--wheel", "--quiet", "--out-dir", tmp_path / "dist", tmp_path / folder, cwd=tmp_path)
    wheels = sorted((tmp_path / "dist").glob("*.whl"))
    assert len(wheels) == 7
    tool(uv, "pip", "install", "--quiet", "--no-deps", "--target", tmp_path / "site", *wheels, cwd=tmp_path)
    found = {"PYTHONPATH": str(tmp_path / "site")}

    listed = json.loads(tool(sys.executable, "-m", "corenas", "plugins", "--json", cwd=tmp_path, **found))["plugins"]
    rows = {(row["distribution"], row["name"]): row for row in listed}
    for kind in KINDS:
        assert rows[f"corenas-{kind}-outside", "outside"]["status"] == "ok"
    wrong = {distribution: row["error"] for (distribution, _), row in rows.items() if row["status"] == "broken"}
    assert wrong.keys() == {"odd-raises", "odd-older", "odd-taken", "corenas-searcher-random"}
    assert wrong["odd-raises"] == "RuntimeError: no luck"
    assert "written for contract 1" in wrong["odd-older"]
    assert "'random' is offered by" in wrong["odd-taken"]

    (tmp_path / "spec.toml").write_text(tomli_w.dumps(SPEC))
    done = tool(sys.executable, "-m", "corenas", "run", "spec.toml", "--json", cwd=tmp_path, **found)
    assert json.loads(done)["trials"] == 5


def test_the_wheel_of_corenas_has_its_specs_and_spaces(tmp_path):
    uv = shutil.which("uv")
    if uv is None:
        pytest.skip("no uv to build a wheel with")
    tool(uv, "build", "--wheel", "--quiet", "--out-dir", tmp_path, ROOT, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    here = {path.relative_to(ROOT).as_posix() for path in (ROOT / "corenas" / "spec").rglob("*.toml")}
    assert "corenas/spec/space/ofa-mobilenetv3.toml" in here
    assert here <= {*names}
    assert (ROOT / "spec").resolve() == ROOT / "corenas" / "spec", "one truth, by two paths"
