"""What `corenas convert` does."""

from __future__ import annotations

import math
import re
import shutil
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli
import tomli_w
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from corenas.constrained import extremes
from corenas.errors import UserError, regular
from corenas.options import structure
from corenas.store import strict_json
from corenas_mutable_conversion.conversion import Converted, convert
from corenas_mutable_conversion.models import build_model, load_weights, shape_of
from corenas_mutable_conversion.rules import Rules


def command(options: Namespace) -> None:
    """Convert a model, write what it can be, and print it."""
    folder = options.to.resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError("this is no empty folder", file=str(options.to), hint="another one: --to DIR")
    model = build_model(options.model, dict(map(_option, options.option)))
    if options.weights is not None:
        load_weights(model, options.weights)
    made = convert(model.eval(), _example(options.example, model), _rules(options.rules))
    found = described(made)
    _write(folder, made, found, options.weights is not None)
    if options.json:
        print(strict_json(found))
    else:
        _print(options, made, found, folder)


def described(made: Converted) -> dict[str, Any]:
    """Return what a converted model can be as plain data."""
    space = made.space
    costs = dict(zip(("min", "max"), made.cost.of(extremes(made.cost, "flops")), strict=True)) if space.keys else {}
    return {
        "variables": len(space.keys),
        "size": space.size,
        "cost": costs,
        "left": [
            {"layer": f.layer, "axis": f.axis, "size": f.size, "reason": f.reason, "place": f.place} for f in made.left
        ],
    }


def _option(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise UserError(f"--option {text}: expected KEY=VALUE")
    try:
        return key, tomli.loads(f"value = {value}")["value"]
    except tomli.TOMLDecodeError:
        return key, value


def _rules(file: Path | None) -> Rules:
    if file is None:
        return Rules()
    try:
        return structure(tomli.loads(regular(file).read_text(encoding="utf-8")), Rules)
    except OSError as error:
        raise UserError(f"cannot read this file: {error.strerror}", file=str(file)) from None
    except (tomli.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"this is no TOML: {error}", file=str(file)) from None


def _example(shapes: Sequence[str], model: nn.Module) -> Any:
    """Return the inputs of a model. Raises UserError for what is no shape."""
    if not shapes:
        return torch.randn(1, *shape_of(model))
    return tuple(map(_tensor, shapes))


def _tensor(text: str) -> Tensor:
    match = re.fullmatch(r"(\d+(?:x\d+)*)(?::(float32|int64|int32|bool))?", text)
    if match is None or not all(int(n) for n in match[1].split("x")):
        raise UserError(f"--example {text}: expected sizes such as 1x3x224x224, or 1x12:int64 for whole numbers")
    shape = [*map(int, match[1].split("x"))]
    if math.prod(shape) > 1 << 28:
        raise UserError(f"--example {text}: an input of this size does not fit into memory")
    return torch.randn(shape) if match[2] in (None, "float32") else torch.zeros(shape, dtype=getattr(torch, match[2]))


def _write(folder: Path, made: Converted, found: dict[str, Any], weights: bool) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "space.toml").write_text(tomli_w.dumps(made.space.to_table()), encoding="utf-8")
        (folder / "report.json").write_text(strict_json(found, indent=2) + "\n", encoding="utf-8")
        if weights:
            state = {key: tensor.contiguous().clone() for key, tensor in made.supernet.state_dict().items()}
            save_file(state, folder / "weights.safetensors")
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)  # half of it would be in the way of the next try
        hint = "free some space, or another folder: --to DIR"
        raise UserError(f"cannot write: {error.strerror or error}", file=str(folder), hint=hint) from error


def _print(options: Namespace, made: Converted, found: dict[str, Any], folder: Path) -> None:
    size = found["size"]
    print(f"{options.model}: {found['variables']} variables, {size if size < 10**6 else f'{size:.1e}'} archs")
    for name, cost in found["cost"].items():
        print(f"  {name}: {', '.join(f'{metric} {number:,}' for metric, number in cost.items())}")
    layers = len({finding.layer for finding in made.report})
    fixed = [finding for finding in made.left if finding.axis == "outputs"]
    print(f"  {len(fixed)} of {layers} layers have outputs of one size; --explain says why" if fixed else "")
    if options.explain:
        for finding in made.left:
            print(f"  {finding}")
    print(f"{folder / 'space.toml'}")
    print(f'in a spec: backbone = {{ type = "converted", model = "{options.model}" }}, and no space')
