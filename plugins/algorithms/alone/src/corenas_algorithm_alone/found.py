"""The spec of what a search of hyper-parameters has found."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli
import tomli_w

from corenas.run.folder import OwnFiles
from corenas.space import SearchSpace
from corenas.variables import OVERRIDE

_OF_SEARCH = ("searcher", "evaluators", "executor", "search", "name")


def write_found_spec(folder: Path, result: Mapping[str, Any]) -> None:
    """Write `spec.toml` into each folder of a run's networks, if its trials were trained alone with overrides."""
    spec = tomli.loads((folder / "spec.toml").read_text(encoding="utf-8"))
    if spec["algorithm"]["type"] != "alone":
        return
    for row in result["table"]:
        if any(key.startswith(OVERRIDE) for key in row["arch"]) and (folder / row["folder"]).is_dir():
            name = f"{row['folder']}/spec.toml"
            OwnFiles(folder).claim(name, f"{name}.part")
            (folder / f"{name}.part").write_text(tomli_w.dumps(found_spec(spec, row["arch"])), encoding="utf-8")
            os.replace(folder / f"{name}.part", folder / name)


def found_spec(spec: Mapping[str, Any], arch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the spec that trains an arch alone: its choices in their places, and nothing left to search."""
    space = SearchSpace.from_table(spec["space"]).fix(arch).to_table()
    found: dict[str, Any] = {key: item for key, item in spec.items() if key not in _OF_SEARCH}
    found["space"] = {key: item for key, item in space.items() if not key.startswith(OVERRIDE)}
    found["algorithm"] = {"type": "alone", "search": False}
    for key, choice in arch.items():
        if key.startswith(OVERRIDE):
            _set(found, key.removeprefix(OVERRIDE).split("."), choice)
    return found


def _set(table: dict[str, Any], path: list[str], choice: Any) -> None:
    """Set a key deep in a table, which is not changed but where it is copied."""
    *outer, last = path
    for key in outer:
        table[key] = dict(table.get(key, {}))
        table = table[key]
    table[last] = choice
