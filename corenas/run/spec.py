"""What a run is asked to do: one TOML file, read with all its mistakes at once, each with file, line and key."""

from __future__ import annotations

import copy
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import attrs
from attrs import field, frozen
from attrs.validators import ge, gt, le, lt, optional

from corenas.contracts import LaidOut, SpaceGiving
from corenas.errors import Fault, KeyPath, UserError, collecting, did_you_mean, raise_if_any
from corenas.objectives import parse_amount
from corenas.options import explanations, structure, to_table
from corenas.plugins import Catalogue, load_catalogue
from corenas.ranking import FEWEST
from corenas.run.toml import SPECS, Sources, read_toml, with_home
from corenas.settings import Calibration, Racing, Train
from corenas.space import Arch, Choice, SearchSpace, flatten
from corenas.variables import OVERRIDE

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_duration(text: str) -> float | None:
    """Return seconds of "90s", "20m", "1.5h" or "2d"; None for anything else."""
    try:
        seconds = float(text[:-1]) * _UNITS[text[-1:]]
    except (ValueError, KeyError):
        return None
    return seconds if 0 < seconds < math.inf else None


Duration = Annotated[str, 'a time such as "90s", "20m", "1.5h" or "2d"', parse_duration]


def _is_amount(amount: float | str) -> bool:
    return math.isfinite(parse_amount(amount.removesuffix("%") if isinstance(amount, str) else amount))


Amount = Annotated[float | str, 'an amount such as 2e8, "200M" or "60%"', _is_amount]
"""A number, or text such as "200M" or, of the largest subnet's, "60%"."""
Width = Annotated[float | str, 'an amount above 0 such as 2e5 or "1M"', lambda amount: parse_amount(amount) > 1e-9]


@frozen
class Range:
    """Bounds of a metric, both included.

    min: the least that is allowed
    max: the most that is allowed
    """

    min: Amount | None = None
    max: Amount | None = None

    def __attrs_post_init__(self) -> None:
        if self.min is None and self.max is None:
            raise UserError("expected `min`, `max` or both")


Bounds = Mapping[str, Amount | tuple[Amount, Amount] | Range]


@frozen
class Goal:
    """A metric to search for.

    metric: its name; those of the evaluators, and flops, params, activations
    direction: "max" or "min"; left out, what its evaluator says
    weight: what one unit of it is worth beside the other objectives; without `pareto` one of several must say it
    """

    metric: str
    direction: Literal["max", "min"] | None = None
    weight: float | None = field(default=None, validator=optional([gt(0.0), lt(math.inf)]))


@frozen
class Bins:
    """Pareto mode that keeps the best trial of each bin of a metric.

    metric: whose bins
    width: how wide a bin is
    """

    metric: str
    width: Width


@frozen
class Trust:
    """A check of what a search went by: some of its archs are trained alone, and the two rankings compared.

    archs: how many, spread over the front, and over what comes after it where that has fewer
    train: how they are trained; left out, as `retrain` says, or as the supernet
    """

    archs: int = field(default=20, validator=ge(FEWEST))
    train: Train | None = None


@frozen
class SearchSettings:
    """What is searched for, and how long.

    trials: archs to measure; those measured with a share of the whole effort count as this share
    batch: archs asked for at once
    budget: the search ends after this time, "20m" for instance, whatever is left of the trials
    objectives: metrics to make large or small; several are weighed against each other, unless `pareto`
    constraints: metric -> bounds: the most that is allowed (of what is to be large the least), [least, most], or min
        and max; "60%" is of the largest subnet. A list of such tables is searched under one after the other
    pareto: true keeps every trade-off that no other beats; a table keeps the best of each bin of a metric
    trust: how many archs are trained alone in the end, to see whether the search ranks them as they are
    racing: stops measuring archs that have lost; by itself the confidence, 0.95 for instance
    """

    trials: int = field(default=100, validator=ge(1))
    batch: int = field(default=10, validator=ge(1))
    budget: Duration | None = None
    objectives: tuple[str | Goal, ...] | str = ("top1",)
    constraints: Bounds | tuple[Bounds, ...] = field(factory=dict)
    pareto: bool | Bins = False
    trust: Trust | None = None
    racing: float | Racing | None = None

    @property
    def race(self) -> Racing | None:
        """`racing` in its long form. Raises UserError for a confidence that is none."""
        short = isinstance(self.racing, float | int)
        return structure({"confidence": self.racing}, Racing) if short else self.racing  # type: ignore[return-value]

    @property
    def bounds(self) -> Sequence[Bounds]:
        """The constraints of each search."""
        return (self.constraints or ({},)) if isinstance(self.constraints, tuple) else (self.constraints,)

    @property
    def goals(self) -> list[Goal]:
        """The objectives in their long form."""
        objectives = (self.objectives,) if isinstance(self.objectives, str) else self.objectives
        return [Goal(goal) if isinstance(goal, str) else goal for goal in objectives]


@frozen
class TeacherSettings:
    """A fixed network that teaches, by the distiller beside it.

    from: a run directory (its `best/network.pt2`), a .pt2 file of torch.export, or a TorchScript file
    labels: weight of the loss on the labels beside the distiller's; 0 learns from the teacher alone
    """

    from_: str
    labels: float = field(default=1.0, validator=[ge(0.0), lt(math.inf)])


@frozen
class Retrain:
    """How an arch that was found is trained again, where the algorithm or `begin` asks for it.

    begin: "scratch", or "supernet": with the weights that it has there, which fine-tunes it, whatever the algorithm
    train: how its weights are trained; left out, as the supernet's were
    data: what it is trained on: "train", or "train+valid" where the search is over and nothing is chosen any more
    backbone: its backbone's options, wider or deeper ones for instance; left out, the supernet's
    distiller: what it learns from `teacher`; left out, it learns from the labels alone
    teacher: a fixed network that teaches it
    task: the task's options, stronger augmentation for instance, of the same data cut in the same way; left out, the
        supernet's
    seeds: how often it is trained, each time with another seed: the first is exported, and their mean is told
    """

    begin: Literal["scratch", "supernet"] = "scratch"
    train: Train | None = None
    data: Literal["train", "train+valid"] = "train"
    backbone: Any = field(default=None, metadata={"kind": "backbones"})
    distiller: Any = field(default=None, metadata={"kind": "distillers"})
    teacher: TeacherSettings | None = None
    task: Any = field(default=None, metadata={"kind": "tasks"})
    seeds: int = field(default=1, validator=ge(1))


@frozen
class Source:
    """A supernet that was trained before.

    from: the directory of its run; what a spec leaves out is as it was there
    weights: of a training with `ema` the "average" or the "raw" weights; without, there is one set of them
    """

    from_: str
    weights: Literal["average", "raw"] = "average"


@frozen
class Export:
    """What is written into `best/` beside arch.toml and the cost card.

    formats: exporters, by name or as tables of their options with `type`; `corenas show exporters` lists them
    front: whether every network of the Pareto front is written, each into a folder of its own in `front/`
    """

    formats: tuple[str | Mapping[str, Any], ...] = ("safetensors", "python", "pt2")
    front: bool = False


@frozen
class Device:
    """Where a run computes.

    type: "auto" (a GPU if there is one), "cpu", "cuda", "mps"
    threads: of torch on the CPU; left out, torch's choice
    """

    type: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    threads: int | None = field(default=None, validator=optional([ge(1), le(1024)]))


def _file_name(instance: object, attribute: object, name: str) -> None:
    if not re.fullmatch(r"[\w-][\w.-]*", name):
        raise ValueError(f"expected letters, digits, '-', '_' or '.', found {name!r}")


@frozen
class Spec:
    """A whole spec.

    task: the data and what is learnt from it
    backbone: the network
    algorithm: how the supernet is trained, and which stages a run has; without it, and without task and backbone, a run
        is a search alone, in what evaluators know of archs that are none of a network
    name: of the run, and of its folder in runs/
    seed: of everything that is random
    device: where the run computes
    supernet: the run of a supernet that was trained before, to be searched again; what this spec leaves out is as it
        was there
    mutator: how the archs of a training step are drawn
    distiller: what paths learn from a teacher, for algorithms that have one
    teacher: a fixed network that teaches, for algorithms that have none of their own
    searcher: how archs are proposed
    evaluators: what measures archs, beside flops, params and activations
    executor: where trials are measured; left out, in this process
    train: how the supernet's weights are trained
    search: what is searched for, and how long
    calibration: how batch-norm statistics are recomputed before an arch is measured
    retrain: how the arch that was found is trained again, where the algorithm does so
    export: what is written in the end
    space: a file, the name of a space that corenas comes with, or the space itself; with `file`, `fix` holds variables
        at a choice and `narrow` leaves fewer; `fix` may name the file of an arch, which holds all of them
    plugins: Python files with components of your own, relative to the spec
    """

    space: Any
    task: Any = field(default=None, metadata={"kind": "tasks"})
    backbone: Any = field(default=None, metadata={"kind": "backbones"})
    algorithm: Any = field(default=None, metadata={"kind": "algorithms"})
    supernet: Source | None = None
    mutator: Any = field(default=None, metadata={"kind": "mutators"})
    distiller: Any = field(default=None, metadata={"kind": "distillers"})
    teacher: TeacherSettings | None = None
    searcher: Any = field(default=None, metadata={"kind": "searchers"})
    evaluators: tuple[Any, ...] = field(default=(), metadata={"kind": "evaluators"})
    executor: Any = field(default=None, metadata={"kind": "executors"})
    name: str | None = field(default=None, validator=optional(_file_name))
    seed: int = field(default=0, validator=[ge(0), lt(1 << 32)])
    device: Device = Device()
    train: Train = Train()
    search: SearchSettings = SearchSettings()
    calibration: Calibration = Calibration()
    retrain: Retrain = Retrain()
    export: Export = Export()
    plugins: tuple[str, ...] = ()

    @property
    def stages(self) -> Sequence[str]:
        """The algorithm's stages in order, and a last one that fine-tunes if the spec asks for it."""
        stages = ("search",) if self.algorithm is None else (*self.algorithm.stages,)
        return stages if self.retrain.begin == "scratch" or "retrain" in stages else (*stages, "retrain")

    def to_table(self, catalogue: Catalogue) -> dict[str, Any]:
        """Return the spec with every default written out, as TOML: what a run directory keeps."""
        return {**to_table(attrs.evolve(self, space=None), catalogue.name_of), "space": self.space.to_table()}

    def overridden(self, choices: Mapping[str, Any]) -> Spec:
        """Return the spec with the choices of variables named `spec:…` in the places that they name.

        Raises UserError, keys being the variables', for one that names no place, or a choice that is refused there.
        """
        spec, faults = self, []
        for key in filter(lambda key: key.startswith(OVERRIDE), choices):
            path = key.removeprefix(OVERRIDE).split(".")
            try:
                if path[0] not in _SEARCHABLE:
                    raise ValueError(f"only keys under {', '.join(_SEARCHABLE)} can be searched")
                spec = _evolved(spec, path, choices[key])
            except (ValueError, TypeError, UserError) as error:
                faults.append(Fault(str(error), (key,)))
        raise_if_any(faults)
        return spec


_STAGES = ("train", "search", "derive", "retrain")
_NEEDS = ("mutator", "distiller", "searcher")
_SEARCHABLE = ("train", "task", "backbone")
"""What a training of one arch depends on."""


def spec_keys() -> dict[str, str]:
    """Return where each key stands that all specs have, by its last part; what stands further out comes first."""
    found: dict[str, str] = {f"{key}": f"train.optimizer.{key}" for key in Train().optimizer}

    def walk(cls: type, prefix: str, depth: int) -> None:
        for item in attrs.fields(attrs.resolve_types(cls)):
            if attrs.has(item.type):
                walk(item.type, f"{prefix}{item.name}.", depth + 1)
            if item.name not in found or found[item.name].count(".") > depth:
                found[item.name] = f"{prefix}{item.name}"

    walk(Spec, "", 0)
    return found


def _evolved(item: Any, path: Sequence[str], value: Any) -> Any:
    """Return a nest of options with the value in one place. Raises ValueError if there is no such place."""
    if not path:
        return value
    key, *rest = path
    if attrs.has(type(item)) and key in (fields := attrs.fields_dict(attrs.resolve_types(type(item)))):
        inner = _evolved(getattr(item, key), rest, value) if rest else structure(value, fields[key].type or Any)
        return attrs.evolve(item, **{key: inner})
    if isinstance(item, Mapping) and key in item:
        return {**item, key: _evolved(item[key], rest, value)}
    raise ValueError(f"the spec has no key {key!r} there")


def open_spec(
    path: str | Path, overrides: Sequence[str] = (), plugins: Sequence[str] = ()
) -> tuple[Spec, Sources, Catalogue]:
    """Read a spec file with the components that are installed, and those of the files that it names.

    overrides: as `load_spec` takes them
    plugins: further files with components
    Raises UserError as `load_spec` does.
    """
    _, table = read_toml(Path(path), "spec", file=str(path))
    named = _named_plugins(table, Path(path).parent)
    source = table.get("supernet")
    if isinstance(source, Mapping) and isinstance(source.get("from"), str):
        with suppress(UserError):  # `load_spec` tells of it, with its line
            base = Path(with_home(source["from"]))
            named += _named_plugins(read_toml(base / "spec.toml", "spec")[1], base)
    catalogue = load_catalogue(files=[*named, *plugins])
    return *load_spec(path, catalogue, overrides, plugins), catalogue


def _named_plugins(table: Mapping[str, Any], folder: Path) -> list[Path]:
    names = with_home(table.get("plugins", ()))
    return [folder / name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def load_spec(
    path: str | Path, catalogue: Catalogue, overrides: Sequence[str] = (), plugins: Sequence[str] = ()
) -> tuple[Spec, Sources]:
    """Read a spec file. Raises UserError with every mistake that can be found without data and without torch.

    overrides: "train.epochs=3" and the like; a value is TOML, or text where it is no TOML
    plugins: files with components, in the catalogue, beside those that the spec names
    """
    file = Path(path)
    extra = [str(Path(plugin).resolve()) for plugin in plugins]
    raise_if_any(_plugin_faults(extra, catalogue, ("--plugin",)))
    text, table = read_toml(file, "spec", file=str(path))
    table = with_home(table)
    sources = Sources()
    sources.add(str(path), text)
    with sources.locating():
        spec = _read_spec(table, file.parent, catalogue, overrides, sources)
    files = tuple(dict.fromkeys([*spec.plugins, *extra]))
    name = re.sub(r"[^\w.-]+", "-", file.stem).strip("-.") or "run"  # "my spec (1)" is a file's name, not a folder's
    return attrs.evolve(spec, name=spec.name or name, plugins=files), sources


def _plugin_faults(files: Iterable[str], catalogue: Catalogue, key: KeyPath) -> list[Fault]:
    """Return which files with components cannot be used."""
    loaded = {plugin.name: plugin.error for plugin in catalogue.plugins}
    hint = "--plugin FILE loads it, or `plugins` in the spec's own file; in Python load_catalogue(files=[…])"
    faults = []
    for i, file in enumerate(files):
        where = (*key, i) if key == ("plugins",) else key
        if file not in loaded:
            faults.append(Fault(f"{file} is not loaded", where, hint=hint))
        elif loaded[file]:
            faults.append(Fault(f"{file} cannot be used: {loaded[file]}", where))
    return faults


def _read_spec(
    table: dict[str, Any], folder: Path, catalogue: Catalogue, overrides: Sequence[str], sources: Sources
) -> Spec:
    """Return the spec of a table. Raises UserError with all mistakes, keys relative to the spec."""
    faults: list[Fault] = []
    fields = {field.name for field in attrs.fields(Spec)}
    for name in (name for name in catalogue.names("commands") if name in table and name not in fields):
        raise UserError("this file is for another command", key=(name,), hint=f"corenas {name} reads it")

    def override(assignments: Iterable[str]) -> None:
        for assignment in assignments:
            with collecting(faults):
                sources.override(table, assignment)

    override(text for text in overrides if text.startswith("supernet"))
    table, base = _over_base(table)
    override(text for text in overrides if not text.startswith("supernet"))  # in what that run gives
    if isinstance(table.get("device"), str):  # as short as a component's name
        table["device"] = {"type": table["device"]}
    if "plugins" in table:
        with collecting(faults, "plugins"):
            names = structure(table["plugins"], tuple[str, ...])
            table["plugins"] = [str((folder / name).resolve()) for name in names]
            faults += _plugin_faults(table["plugins"], catalogue, ("plugins",))
    given = _is_given(table, catalogue)
    raw = table.get("space", {})
    if "space" in table or given:
        table["space"] = None
    if "space" in table and not given:
        with collecting(faults, "space"):
            table["space"] = _read_space(raw, folder, sources)
            _check_layout(table["space"], table.get("backbone"), catalogue)
    faults += _network_faults(table)
    try:
        spec = structure(table, Spec, catalogue.options)
    except UserError as error:
        raise UserError(faults=[*faults, *error.faults]) from None
    if given:
        with collecting(faults):
            spec = attrs.evolve(spec, space=_given_space(spec.backbone, raw, folder, sources))
    spec = _with_defaults(spec, catalogue, faults)
    faults += _algorithm_faults(spec, catalogue)
    faults += _teaching_faults(spec)
    faults += _override_faults(spec)
    faults += _racing_faults(spec)
    faults += _format_faults(spec, catalogue)
    trained = structure({**base, "space": None}, Spec, catalogue.options) if base is not None else None
    faults += _idle_faults(spec, trained)
    if trained is not None:
        faults += _base_faults(spec, trained)
    raise_if_any(faults)
    return spec


_NETWORK = ("task", "backbone", "algorithm")
"""What goes together: with all of them a network is searched, without any of them what evaluators know of archs."""
_OF_NETWORKS = ("supernet", "mutator", "distiller", "teacher", "train", "calibration", "retrain", "export")


def _network_faults(table: Mapping[str, Any]) -> list[Fault]:
    """Return what a spec lacks that a network needs; of one without a network, what would be for nothing."""
    missing = [key for key in _NETWORK if key not in table]
    if len(missing) == len(_NETWORK) and table.get("evaluators") and table.get("searcher"):
        text, hint = "nothing here has a network", "leave it out, or say task, backbone and algorithm"
        return [Fault(text, (key,), hint=hint) for key in _OF_NETWORKS if key in table]
    meant = explanations(Spec)
    return [Fault("required key is missing", (key,), hint=f"{key}: {meant[key]}") for key in missing]


def _algorithm_faults(spec: Spec, catalogue: Catalogue) -> list[Fault]:
    """Return what is wrong with an algorithm's stages, and which tables it needs that the spec lacks."""
    if spec.algorithm is None:
        return []
    faults: list[Fault] = []
    stages, needs = spec.stages, {*spec.algorithm.needs}
    in_order = [*stages] == [stage for stage in _STAGES if stage in stages]
    derives_untrained = "derive" in stages and ("train" not in stages or "search" in stages)
    if not in_order or derives_untrained:
        text = f"this algorithm has the stages {stages!r}: expected some of {', '.join(_STAGES)}, in this order"
        faults.append(Fault(text, ("algorithm",), hint="derive comes after train, and without search"))
    if unknown := sorted(needs - {*_NEEDS}):
        faults.append(Fault(f"this algorithm needs {unknown}: expected some of {', '.join(_NEEDS)}", ("algorithm",)))
    needed = {*needs, "searcher"} if "search" in stages else needs
    for key in _NEEDS:
        if key in needed and key not in _defaults(spec) and getattr(spec, key) is None:
            hint = did_you_mean("", catalogue.names(f"{key}s"), f"this algorithm needs one; installed {key}s")
            faults.append(Fault("required key is missing", (key,), hint=hint))
    return faults


def _defaults(spec: Spec) -> Mapping[str, str]:
    """Return the components that an algorithm takes where a spec leaves them out."""
    return getattr(spec.algorithm, "defaults", {})


def _with_defaults(spec: Spec, catalogue: Catalogue, faults: list[Fault]) -> Spec:
    """Return a spec with these; those that there are not are added to the faults."""
    missing = {key: name for key, name in _defaults(spec).items() if getattr(spec, key) is None}
    for key, name in missing.items():
        try:
            spec = attrs.evolve(spec, **{key: catalogue.options(f"{key}s", name)})
        except UserError as error:
            faults += [
                attrs.evolve(f, message=f"{f.message}, this algorithm's default", key=(key,)) for f in error.faults
            ]
    return spec


def _teaching_faults(spec: Spec) -> list[Fault]:
    """Return which tables about teaching nobody would look at, and which lack the other one."""
    faults: list[Fault] = []
    needs = {*getattr(spec.algorithm, "needs", ())}
    uses = needs | {*getattr(spec.algorithm, "uses", ())}
    for key in ("distiller", "teacher"):
        if getattr(spec, key) is not None and key not in uses:
            faults.append(Fault(f"this algorithm looks at no {key}", (key,), hint="leave it out"))
    pairs: list[tuple[Any, Any, KeyPath]] = [(spec.retrain.distiller, spec.retrain.teacher, ("retrain",))]
    if "teacher" in uses and "distiller" not in needs:
        pairs.append((spec.distiller, spec.teacher, ()))
    for distiller, teacher, prefix in pairs:
        if (distiller is None) != (teacher is None):
            key = "distiller" if distiller is None else "teacher"
            text = "required key is missing: what is learnt, `distiller`, and from whom, `teacher`, go together"
            faults.append(Fault(text, (*prefix, key)))
    return faults


def _idle_faults(spec: Spec, trained: Spec | None) -> list[Fault]:
    """Return what a spec says that nothing in its run would look at; what a supernet's run says is not its own."""
    faults: list[Fault] = []
    if spec.algorithm is None:  # whose tables are looked at by `_faults_without_network`
        return faults
    stages = spec.stages
    has_supernet = "train" in stages or trained is not None
    trains_supernet = "train" in stages and trained is None
    alone = any(getattr(evaluator, "alone", not has_supernet) for evaluator in spec.evaluators)
    retrains = "retrain" in stages
    if spec.retrain.begin == "supernet":
        if not has_supernet:
            faults.append(Fault("this algorithm trains no supernet to begin with", ("retrain", "begin")))
        if spec.retrain.backbone is not None:
            text = "a network of another backbone has no weights in the supernet"
            faults.append(Fault(text, ("retrain", "backbone"), hint='leave it out, or begin = "scratch"'))
    own = attrs.evolve(spec.train, workers=0)  # which evaluation has as well
    given = attrs.evolve(Train() if trained is None else trained.train, workers=0)
    if own != given and not (trains_supernet or alone or retrains):
        hint = "its supernet is trained already" if trained is not None else "leave this table out"
        faults.append(Fault("nothing in this run is trained with these settings", ("train",), hint=hint))
    for key in spec.space.keys if spec.space is not None else ():
        if key.startswith(OVERRIDE) and not (alone or retrains or not has_supernet):
            text = "nothing in this run trains an arch alone, so that this variable would change nothing"
            hint = "an algorithm that retrains, or an evaluator that trains archs alone"
            faults.append(Fault(text, ("space", key), hint=hint))
    return faults


def _racing_faults(spec: Spec) -> list[Fault]:
    """Return why archs cannot race."""
    if spec.search.racing is None:
        return []
    faults: list[Fault] = []
    with collecting(faults, "search", "racing"):
        _ = spec.search.race
    if len(spec.search.goals) > 1 or spec.search.pareto:
        faults.append(Fault("archs race by one objective alone", ("search", "racing"), hint="leave it out"))
    if not any(getattr(evaluator, "races", False) for evaluator in spec.evaluators):
        hint = 'evaluators = ["accuracy"], or leave it out'
        faults.append(Fault("no evaluator lets archs race", ("search", "racing"), hint=hint))
    return faults


def _override_faults(spec: Spec) -> list[Fault]:
    """Return which variables named `spec:…` name no place, or have a choice that is refused there."""
    faults: list[Fault] = []
    variables = spec.space.variables if spec.space is not None else ()
    for variable in variables:
        if not variable.key.startswith(OVERRIDE):
            continue
        for choice in dict.fromkeys((*variable.choices[:100], variable.choices[-1])):
            with collecting(faults, "space"):
                spec.overridden({variable.key: choice})
    return faults


def _format_faults(spec: Spec, catalogue: Catalogue) -> list[Fault]:
    """Return which formats nothing writes, or not with these options."""
    faults: list[Fault] = []
    for i, item in enumerate(spec.export.formats):
        key = ("export", "formats", i)
        try:
            catalogue.options("exporters", item)
        except UserError as error:
            named = isinstance(item, str)
            faults += [attrs.evolve(fault, key=key if named else (*key, *fault.key)) for fault in error.faults]
    return faults


def _base_faults(spec: Spec, trained: Spec) -> list[Fault]:
    """Return in what a spec differs from the run whose supernet it uses, where it must not."""
    faults = [
        Fault("the supernet was trained with another one", (key,), hint=f"leave `{key}` out")
        for key in ("task", "backbone", "seed")  # data cut by another seed would be seen in training
        if _unplaced(getattr(spec, key)) != _unplaced(getattr(trained, key))
    ]
    if "derive" in spec.stages:
        text = "this algorithm finds its arch while it trains"
        faults.append(Fault(text, ("algorithm",), hint="leave `supernet` out"))
    return faults


def _unplaced(options: Any) -> Any:
    """Return options without where their data lies: whether it is the same data, a run's fingerprint of it says."""
    data = getattr(options, "data", None)
    if not attrs.has(type(options)) or not attrs.has(type(data)):
        return options
    return type(options), {**to_table(options), "data": {**to_table(data), "root": None, "file": None}}


def _over_base(table: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return a spec's table over that of the run whose supernet it uses; and that table, None where it uses none."""
    source = table.get("supernet")
    if not isinstance(source, dict) or not isinstance(source.get("from"), str):
        return table, None
    folder, key = Path(source["from"]), ("supernet", "from")
    if not (folder / "supernet.pt").exists():
        raise UserError(f"{folder} is no run that has trained a supernet", key=key)
    _, trained = read_toml(folder / "spec.toml", "spec", key=key)
    base = {name: item for name, item in trained.items() if name not in ("name", "supernet")}
    space = table.get("space")
    if isinstance(space, dict) and space.keys() <= {"fix", "narrow"}:
        table = {**table, "space": {**base["space"], **space}}
    return copy.deepcopy({**base, **table}), base


def _check_layout(space: SearchSpace, backbone: Any, catalogue: Catalogue) -> None:
    """Raise UserError where the space's tables are not those of the backbone, whatever else is wrong with that."""
    name = backbone.get("type") if isinstance(backbone, dict) else backbone
    laid_out = {c.name: c.cls for c in catalogue.components.values() if isinstance(c.cls, LaidOut)}
    if not isinstance(name, str) or name not in laid_out:
        return
    try:
        structure(space.tree, laid_out[name].layout)
    except UserError:
        others = [other for other, cls in laid_out.items() if other != name and _has_layout(space, cls)]
        if others:
            text = f"this is a space of the backbone {' or '.join(map(repr, others))}, not of {name!r}"
            raise UserError(text, hint="another space, or [backbone] with another `type`") from None
        raise


def _has_layout(space: SearchSpace, backbone: LaidOut) -> bool:
    """Return whether a space's tables are those of a backbone."""
    try:
        structure(space.tree, backbone.layout)
    except UserError:
        return False
    return True


_CHANGES = {
    "fix": (SearchSpace.fix, Mapping[str, Choice]),
    "narrow": (SearchSpace.narrow, Mapping[str, tuple[Choice, ...]]),
}
"""What may stand beside a space: how it changes the space, and the type of its table, keys dotted."""


def _is_given(table: Mapping[str, Any], catalogue: Catalogue) -> bool:
    """Return whether the backbone gives the space: it can, and the spec says none, or how it is narrower."""
    backbone, raw = table.get("backbone"), table.get("space", {})
    name = backbone.get("type") if isinstance(backbone, dict) else backbone
    component = catalogue.components.get(("backbones", str(name)))
    can = component is not None and isinstance(component.cls, SpaceGiving)
    return can and isinstance(raw, dict) and all(key in _CHANGES or key.startswith(OVERRIDE) for key in raw)


def _given_space(backbone: SpaceGiving, raw: dict[str, Any], folder: Path, sources: Sources) -> SearchSpace:
    """Return the space that a backbone gives, as a spec narrows it. Raises UserError, keys relative to the spec."""
    space = backbone.space()
    try:
        return _read_space(raw, folder, sources, space)
    except UserError as error:
        raise error.under("space") from None


def _read_space(raw: Any, folder: Path, sources: Sources, given: SearchSpace | None = None) -> SearchSpace:
    """Return the space that a spec names or holds. Raises UserError, keys relative to it.

    given: what stands for a space where there is only what changes it
    """
    table = {"file": raw} if isinstance(raw, str) else raw
    if not isinstance(table, dict):
        raise UserError("expected a file name or a table")
    changes = {name: table.pop(name, {}) for name in _CHANGES}
    if "file" in table:
        table = _read_space_file(table, folder, sources)
    space, faults = SearchSpace.from_table(table), []
    if given is not None:
        space = SearchSpace([*given.variables, *space.variables], given.tree)
    if isinstance(changes["fix"], str):
        with collecting(faults, "fix"):
            space = space.fix(_read_arch(changes["fix"], space, folder, sources))
        del changes["fix"]
    for name in changes:
        change, choices = _CHANGES[name]
        with collecting(faults, name):
            space = change(space, structure(flatten(structure(changes[name], dict), lists=False), choices))
    raise_if_any(faults)
    return space


def _read_arch(name: str, space: SearchSpace, folder: Path, sources: Sources) -> Arch:
    """Return the arch in a file, looked for beside the spec, then in the working directory. Raises UserError."""
    beside = folder / name
    file = beside if os.path.exists(beside) else Path(name)  # Path.exists raises for names that are too long
    text, table = read_toml(file, "arch")
    sources.add(str(file), text, "space", "fix")
    return space.arch(table)


def space_file(name: str, folder: Path = Path()) -> Path:
    """Return the file of a space: one in a folder, or one of those that corenas comes with.

    Those are called by their names, or as their own specs call them: "space/NAME.toml".
    Raises UserError for a name that none of them has.
    """
    if os.path.isfile(folder / name):
        return folder / name
    if not re.fullmatch(r"[\w-]+", name):
        own = SPECS / name if re.fullmatch(r"space/[\w-]+\.toml", name) else folder
        return own if own.is_file() else folder / name
    if not (file := SPECS / "space" / f"{name}.toml").exists():
        known = [path.stem for path in file.parent.glob("*.toml")]
        hint = did_you_mean(name, known, "a file (.toml), or one of the spaces that corenas comes with")
        raise UserError(f"no space {name!r}", key=("file",), hint=hint)
    return file


def _read_space_file(table: Mapping[str, Any], folder: Path, sources: Sources) -> dict[str, Any]:
    """Return the table in the file that a spec takes its space from, with the spec's variables beside its name."""
    own = {key: item for key, item in table.items() if key.startswith(OVERRIDE)}
    hint = "with `file`, only `fix`, `narrow` and variables of the spec (`spec:…`) may stand beside it"
    raise_if_any(Fault("unknown key", (key,), hint=hint) for key in table.keys() - own.keys() - {"file"})
    file = space_file(structure(table["file"], str), folder)
    text, space = read_toml(file, "space", key=("file",))
    sources.add(str(file), text, "space")
    return {**space, **own}
