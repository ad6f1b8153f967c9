"""What a comparison is asked: the table `[compare]` of a TOML file, or specs alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs
from attrs import field, frozen
from attrs.validators import ge, gt, optional

from corenas.errors import Fault, UserError, raise_if_any
from corenas.options import structure
from corenas.run.toml import Sources, read_toml


@frozen
class Method:
    """One of the methods.

    spec: its spec; left out, the comparison's
    set: keys of the spec with other values, as `--set` takes them
    """

    spec: str | None = None
    set: tuple[str, ...] = ()


@frozen
class Reference:
    """Archs that are trained alone, by which the rankings of supernets are judged.

    archs: how many, drawn at random
    seeds: trainings of each
    kept: a JSON file of their accuracies: read where it is of the same space, data and training; written where it is
        not there yet
    """

    archs: int = field(default=30, validator=ge(0))
    seeds: int = field(default=2, validator=ge(1))
    kept: str | None = None


@frozen
class Compare:
    """A comparison.

    methods: name -> its spec and its settings
    spec: the spec of methods that name none
    seeds: runs of each method
    set: keys of all specs with other values
    budget: multiply-adds that the training of each method may take; left out, those of the first
    reference: archs that are trained alone
    train: keys under `train` with other values for every arch that is trained alone: references, baselines and the
        networks found, so that all are trained alike
    baselines: whether the best of as many random archs as the budget trains alone, and the largest network, are run
    apart: methods that cannot be run on this space -> why, which is told beside the others' figures
    """

    methods: Mapping[str, Method]
    spec: str | None = None
    seeds: int = field(default=3, validator=ge(1))
    set: tuple[str, ...] = ()
    budget: float | None = field(default=None, validator=optional(gt(0)))
    reference: Reference = Reference()
    train: tuple[str, ...] = ()
    baselines: bool = True
    apart: Mapping[str, str] = field(factory=dict)

    def __attrs_post_init__(self) -> None:
        if not self.methods:
            raise UserError("expected at least one method", key=("methods",))
        raise_if_any(
            Fault("it has no spec, and neither has the comparison", ("methods", name))
            for name, method in self.methods.items()
            if method.spec is None and self.spec is None
        )
        raise_if_any(
            Fault("it is among the methods that are run", ("apart", name))
            for name in self.apart
            if name in self.methods
        )


def read_compare(paths: Sequence[Path]) -> Compare:
    """Return what a comparison's file says, or one of several specs. Raises UserError with all mistakes."""
    if len(paths) == 1:
        text, content = read_toml(paths[0], "comparison", file=str(paths[0]))
        if "compare" in content:
            return _read(paths[0], text, content)
    names = [path.stem for path in paths]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"two specs are called {sorted(twice)}", hint="a file with a table [compare] can name them")
    return Compare({path.stem: Method(str(path)) for path in paths})


def _read(path: Path, text: str, content: Mapping[str, object]) -> Compare:
    sources = Sources()
    sources.add(str(path), text)
    with sources.locating():
        raise_if_any(
            Fault("unknown key", (key,), hint="it is one table: [compare]") for key in {*content} - {"compare"}
        )
        try:
            compare = structure(content["compare"], Compare)
        except UserError as error:
            raise error.under("compare") from None

    def beside(name: str | None) -> str | None:
        return None if name is None else str(path.parent / name)

    methods = {name: attrs.evolve(method, spec=beside(method.spec)) for name, method in compare.methods.items()}
    reference = attrs.evolve(compare.reference, kept=beside(compare.reference.kept))
    return attrs.evolve(compare, methods=methods, spec=beside(compare.spec), reference=reference)
