"""What a sweep is asked: the table `[sweep]` of a TOML file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import attrs
from attrs import field, frozen
from attrs.validators import ge, gt, le, lt

from corenas.errors import Fault, UserError, raise_if_any
from corenas.options import structure
from corenas.run.toml import Sources, read_toml
from corenas_tool_sweep.structured import RegNet, Structure

Filter = tuple[Any, ...]
"""[least, most], both included; [least, anything, most], as pycls writes it; or the strings that are allowed."""
Bounds = Annotated[tuple[float, float], "two numbers, the lower first", lambda pair: pair[0] < pair[1]]


@frozen
class Normalise:
    """How populations are compared at equal cost: every cost bin weighs the same (Radosavovic et al. 2019).

    by: the cost
    bins: how many of equal width; fewer, where one would hold less than `min_per_bin`
    min_per_bin: archs of each population in each bin, at least
    range: bounds of the cost; left out, what all populations have; archs outside are dropped
    """

    by: str = "flops"
    bins: int = field(default=10, validator=ge(1))
    min_per_bin: int = field(default=5, validator=ge(1))
    range: Bounds | None = None


@frozen
class Bootstrap:
    """How good ranges are found: the values that the best of a few archs has.

    fraction: share of the archs that each draw takes; above 1 their number
    quantiles: of these values: the ends of the good range, and between them what is called best
    """

    fraction: float = field(default=0.25, validator=gt(0))
    quantiles: tuple[float, float, float] = (0.025, 0.5, 0.975)

    def __attrs_post_init__(self) -> None:
        low, middle, high = self.quantiles
        if not 0 <= low <= middle <= high <= 1:
            raise UserError("expected three numbers from 0 to 1 in order", key=("quantiles",))


@frozen
class Narrow:
    """When a variable is narrowed.

    alpha: the largest p, Holm's for all variables, of one that is
    margin: points of error by which another population may be worse and still count as no worse
    confirm: new archs of the narrowed space that are measured and compared at equal cost, if `sample` says how; 0: none
    """

    alpha: float = field(default=0.05, validator=[gt(0), lt(1)])
    margin: float = field(default=0.2, validator=ge(0))
    confirm: int = field(default=0, validator=ge(0))


@frozen
class Sample:
    """A population that is drawn and measured before it is analysed.

    spec: the spec whose space is asked about; left out, `input` is all there is
    count: archs that are drawn at random, within the spec's constraints
    stratify: the cost of which as many archs are drawn from each bin; left out, none
    bins: how many bins
    mode: "as_is" measures as the spec says; "scratch" trains every arch alone, for `epochs`
    epochs: of each training in the mode "scratch"; left out, as `[train]` says
    fidelity: how many of the archs, spread over their errors, are trained alone as well, to see how far the errors of a
        supernet can be trusted: Kendall's tau; 0: none
    equal, non_decreasing: patterns, `stages.*.width`: variables of the same choice, and ones that never fall
    regnet: stages by a few numbers, which become variables: `corenas_tool_sweep.structured.RegNet`
    set: keys of the spec with other values, as `--set` takes them
    """

    spec: str
    count: int = field(default=500, validator=ge(1))
    stratify: Literal["flops", "params", "activations"] | None = None
    bins: int = field(default=10, validator=ge(1))
    mode: Literal["as_is", "scratch"] = "as_is"
    epochs: int | None = None
    fidelity: int = field(default=0, validator=ge(0))
    equal: tuple[str, ...] = ()
    non_decreasing: tuple[str, ...] = ()
    regnet: RegNet | None = None
    set: tuple[str, ...] = ()

    @property
    def structure(self) -> Structure:
        """What its archs have in common."""
        return Structure(self.equal, self.non_decreasing, self.regnet)


@frozen
class Sweep:
    """A sweep: which populations of archs are compared, and how.

    input: run directories, CSV files with a header, JSON files with a list of tables; each is a population
    sample: one more, drawn and measured first
    error: the metric that says how wrong an arch is; left out, the first objective of the run
    direction: of the metric in files: "max" where more is better
    unit: of the metric in files: "%", "share" (0 to 1) or "" for what is no share
    images: how many samples the metric in files was measured on, for its noise
    space: a space's TOML file, for files: which variables an arch uses, and what is narrowed
    complexity: costs
    variables: which variables are asked about; `stages.*.depth` names all that match
    derived: further variables made of others, `depth = { sum = "stages.*.depth" }`: sum, mean, max, min, or rising (1
        where they never fall)
    normalise: how populations are compared at equal cost; left out, good ranges are of all archs alike
    filter: which archs count: variable or cost -> [least, most], in raw units, or the strings that are allowed
    split: name of a part -> its filter; a population is then its parts, which may overlap
    bootstrap: how good ranges are found
    narrow: when a variable is narrowed
    permutations: of each test
    seed: of everything that is drawn
    plots: variables that have a plot of their own, those that matter most first
    """

    input: tuple[str, ...] = ()
    sample: Sample | None = None
    error: str | None = None
    direction: Literal["max", "min"] = "max"
    unit: Literal["%", "share", ""] = "%"
    images: int | None = None
    space: str | None = None
    complexity: tuple[str, ...] = ("flops", "params", "activations")
    variables: tuple[str, ...] = ("*",)
    derived: Mapping[str, Mapping[str, str]] = field(factory=dict)
    normalise: Normalise | None = None
    filter: Mapping[str, Filter] = field(factory=dict)
    split: Mapping[str, Mapping[str, Filter]] = field(factory=dict)
    bootstrap: Bootstrap = Bootstrap()
    narrow: Narrow = Narrow()
    permutations: int = field(default=10_000, validator=[ge(100), le(1_000_000)])
    seed: int = field(default=0, validator=ge(0))
    plots: int = field(default=24, validator=ge(0))

    @property
    def filters(self) -> list[Mapping[str, Filter]]:
        """Its filter, and that of each part."""
        return [self.filter, *self.split.values()]

    def __attrs_post_init__(self) -> None:
        faults = [
            Fault("expected a list of bounds, [least, most], or of strings", ("filter", key))
            for wanted in self.filters
            for key, bounds in wanted.items()
            if not is_filter(bounds)
        ]
        faults += [
            Fault(f"expected one of {', '.join(DERIVED)} with the variables that it is made of", ("derived", key))
            for key, rule in self.derived.items()
            if len(rule) != 1 or next(iter(rule)) not in DERIVED
        ]
        raise_if_any(faults)


DERIVED = ("sum", "mean", "max", "min", "rising")
"""How a variable can be made of others."""
_PYCLS = {"PRE_FILTERS": "filter", "SPLIT_FILTERS": "split"}
"""What pycls calls the same."""


def is_filter(bounds: Filter) -> bool:
    """Return whether something is a filter: two or three numbers, or strings."""
    numbers = all(isinstance(item, int | float) and not isinstance(item, bool) for item in bounds)
    return (numbers and len(bounds) in (2, 3)) or (bool(bounds) and all(isinstance(item, str) for item in bounds))


def read_sweep(path: Path) -> Sweep:
    """Read a sweep's TOML file; paths in it are relative to it. Raises UserError with all mistakes."""
    text, content = read_toml(path, "sweep", file=str(path))
    sources = Sources()
    sources.add(str(path), text)
    with sources.locating():
        if "sweep" not in content:
            raise UserError("expected a table [sweep]", file=str(path))
        unknown = content.keys() - {"sweep"}
        raise_if_any(Fault("unknown key", (key,), hint="a sweep is one table: [sweep]") for key in unknown)
        table = content.get("sweep")
        if not isinstance(table, dict):
            raise UserError("expected a table [sweep]", file=str(path))
        table = {_PYCLS.get(key, key): item for key, item in table.items()}
        try:
            sweep = structure(table, Sweep)
        except UserError as error:
            raise error.under("sweep") from None

    def beside(name: str) -> str:
        return name if Path(name).exists() and not (path.parent / name).exists() else str(path.parent / name)

    sample = sweep.sample and attrs.evolve(sweep.sample, spec=beside(sweep.sample.spec))
    space = sweep.space and beside(sweep.space)
    return attrs.evolve(sweep, input=tuple(map(beside, sweep.input)), sample=sample, space=space)
