"""Models by name: `torchvision:resnet50`, `timm:deit_tiny_patch16_224`, `my_models.py:build`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from corenas.checkpoint import Checkpoint
from corenas.errors import UserError, did_you_mean, regular

LIBRARIES = ("torchvision", "timm")
SHAPE = (3, 224, 224)
"""The input of a model that does not say its own."""


def build_model(name: str, options: Mapping[str, Any] | None = None) -> nn.Module:
    """Return a model with fresh weights.

    name: `torchvision:NAME` or `timm:NAME`, of timm also with a tag, or `FILE.py:FUNCTION`, a function in a file that
        gives a model
    options: what the function that builds it is called with, for instance `num_classes`
    Raises UserError for a model that there is not, and for options that it does not take.
    """
    source, colon, model = name.rpartition(":")
    if not colon or not source or not model:
        hint = "torchvision:NAME, timm:NAME, or FILE.py:FUNCTION"
        raise UserError(f"no model is called {name!r}", hint=hint)
    build = _function_of(source, model)
    try:
        built = build(**(options or {}))
    except UserError:
        raise
    except Exception as error:  # whatever somebody's code does
        raise UserError(f"{name} cannot be built: {type(error).__name__}: {error}") from error
    if not isinstance(built, nn.Module):
        raise UserError(f"{name} gives a {type(built).__name__}, expected a torch.nn.Module")
    return built


def _function_of(source: str, model: str) -> Callable[..., Any]:
    if source.endswith(".py"):
        functions = vars(_module_of(Path(source)))
        if not callable(functions.get(model)):
            own = [key for key, item in functions.items() if callable(item) and not key.startswith("_")]
            raise UserError(
                f"this file has no function {model!r}", file=source, hint=did_you_mean(model, own, "it has")
            )
        return functions[model]
    if source not in LIBRARIES:
        hint = f"{did_you_mean(source, LIBRARIES, 'libraries')}, or FILE.py:FUNCTION"
        raise UserError(f"no library is called {source!r}", hint=hint)
    try:
        library = importlib.import_module("torchvision.models" if source == "torchvision" else source)
    except ImportError:
        raise UserError(f"{source} is not installed", hint=f"pip install {source}") from None
    known = library.list_models()
    there = library.is_model(model) if source == "timm" else model in known  # timm's may name weights: resnet50.a1_in1k
    if not there:
        raise UserError(f"{source} has no model {model!r}", hint=did_you_mean(model, known, "models"))
    if source == "timm":
        return lambda **options: library.create_model(model, **options)
    quick = {"init_weights": False} if model in ("googlenet", "inception_v3") else {}  # else minutes go by
    return lambda **options: library.get_model(model, weights=None, **{**quick, **options})


def _module_of(file: Path) -> Any:
    """Return a Python file as a module; its classes are found again where a model of them is unpickled."""
    if not file.is_file():
        raise UserError("no such file", file=str(file))
    path = file.resolve()
    name = f"corenas_model_{path.stem}_{abs(hash(str(path))):x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # noqa: PT018
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UserError(f"it does not import: {type(error).__name__}: {error}", file=str(file)) from error
    return module


def shape_of(model: nn.Module) -> tuple[int, ...]:
    """Return the shape of an input (channels, height, width): what a model of timm says, else that of ImageNet."""
    config = getattr(model, "default_cfg", None)
    return tuple(config["input_size"]) if isinstance(config, Mapping) and "input_size" in config else SHAPE


def load_weights(model: nn.Module, source: Path) -> None:
    """Load the weights of a model: from safetensors, from what `torch.save` wrote of a state dict, or from a run.

    source: a file, or the directory of a run whose backbone the whole model was
    Raises UserError for a file that is none, or of another model.
    """
    state = _state_of_run(source) if source.is_dir() else _state_of(source)
    try:
        model.load_state_dict(state)
    except (RuntimeError, AttributeError, TypeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        text = f"these are weights of another model: {' '.join(lines[1:3] or lines)}"
        raise UserError(text, file=str(source)) from None


def weights_file(source: Path) -> Path:
    """Return the file that weights are in: of a run what it retrained, else its supernet. Raises UserError."""
    if not source.is_dir():
        return regular(source)
    for name in ("retrain.pt", "supernet.pt"):
        if (source / name).exists():
            return source / name
    raise UserError("this run has trained nothing yet", file=str(source), hint="a run directory, or a file of weights")


def _state_of_run(folder: Path) -> Mapping[str, Any]:
    found = Checkpoint(weights_file(folder)).found
    if not found["done"]:
        raise UserError("this training has not come to its end", file=str(folder))
    state = {**found.get("average", found["model"]), **found.get("statistics", {})}
    own = {key.removeprefix(PREFIX): item for key, item in state.items() if key.startswith(PREFIX)}
    return own or state


PREFIX = "backbone.model."
"""What a run calls the parameters of a model that is its backbone."""


def _state_of(file: Path) -> Mapping[str, Any]:
    try:
        if file.suffix == ".safetensors":
            return load_file(regular(file))
        state = torch.load(regular(file), map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read this file: {error.strerror or error}", file=str(file)) from None
    except Exception as error:  # a broken file breaks unpickling anywhere
        raise UserError(f"these are no weights: {str(error).splitlines()[0]}", file=str(file)) from error
    for key in ("state_dict", "model"):  # as training scripts nest it
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            return state[key]
    return state
