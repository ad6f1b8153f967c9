"""What is installed: entry points become a catalogue of components. A broken plugin is reported, never fatal.

A file of one's own is a plugin as well, where it is named: `load_catalogue(files=["my.py"])`, `plugins = ["my.py"]`.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from functools import partial
from importlib.metadata import EntryPoint, entry_points, requires
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import attrs
import pluggy
import tomli
from attrs import field, frozen

import corenas
from corenas import hookspecs
from corenas.contracts import COMPONENTS, Event, members_of
from corenas.errors import UserError, did_you_mean, regular, shown, staying_here, told
from corenas.options import structure

GROUP = "corenas"
_OFFERS = Path(__file__).with_name("offers.toml")
"""Which distributions have components of other names than their own."""
KINDS = (*COMPONENTS, "commands")
"""The kinds of what has a name, offered by hooks `corenas_<kind>`."""


@frozen
class Component:
    """Something a plugin offers: a class of options (or a command), with the distribution it comes from."""

    kind: str
    name: str
    cls: Any
    distribution: str
    version: str


@frozen
class Plugin:
    """An entry point, or a file, and what is wrong with it, if anything.

    version: of a file the digest of its content
    """

    name: str
    distribution: str
    version: str
    module: str
    error: str | None = None


@frozen
class Catalogue:
    """All components, by kind and name.

    conflicts: of each name that several distributions offer, who they are; none of them can be used
    """

    plugins: tuple[Plugin, ...]
    components: dict[tuple[str, str], Component]
    conflicts: dict[tuple[str, str], tuple[str, ...]]
    manager: pluggy.PluginManager = field(repr=False)

    def names(self, kind: str) -> list[str]:
        """Return the names of a kind."""
        return sorted(name for k, name in self.components if k == kind)

    def find(self, kind: str, name: str) -> Component:
        """Return a component. Raises UserError with the closest names, what is installed and what is broken."""
        if (kind, name) in self.components:
            return self.components[kind, name]
        if (kind, name) in self.conflicts:
            text = f"{kind.removesuffix('s')} {name!r} is offered by {' and '.join(self.conflicts[kind, name])}"
            raise UserError(text, key=("type",), hint="leave one out: uninstall it, or do not name its file")
        noun = "formats" if kind == "exporters" else kind  # as a spec calls them
        hint = self.hint(kind, name, self.names(kind), f"installed {noun}")
        raise UserError(f"no {noun.removesuffix('s')} {name!r}", key=("type",), hint=hint)

    def hint(self, kind: str, name: str, known: Iterable[str], noun: str) -> str:
        """Return what to do about a name that there is not: what was meant, or can be installed; what is broken.

        known: the names that there are; noun: what they are called
        """
        prefix = f"corenas-{'tool' if kind == 'commands' else kind.removesuffix('s')}-"
        here = {_normal(plugin.distribution) for plugin in self.plugins}
        all_ = {re.split(r"[^\w.-]", requirement)[0] for requirement in requires("corenas") or ()}
        missing = {
            _normal(distribution): distribution for distribution in sorted(all_) if _normal(distribution) not in here
        }
        offers = tomli.loads(_OFFERS.read_text(encoding="utf-8"))
        owner = next((d for d, kinds in offers.items() if name in kinds.get(kind, ())), f"{prefix}{name}")
        if owner := missing.get(_normal(owner)):
            hint = f"it comes with {owner}: pip install {owner}"
        else:
            hint = did_you_mean(name, known, noun)
            if more := [distribution for distribution in missing.values() if distribution.startswith(prefix)]:
                hint += f"; more can be installed: pip install {' '.join(more)}"
        if broken := [f"{p.distribution} ({p.error})" for p in self.plugins if p.error]:
            hint += f"; not usable: {', '.join(broken)}"
        return hint

    def options(self, kind: str, table: Any) -> Any:
        """Return the options of a component from its table `{type = "…", …}`, or from its name alone.

        Raises UserError with all mistakes, keys relative to the table.
        """
        table = {"type": table} if isinstance(table, str) else table
        if not isinstance(table, dict):
            raise UserError(f"expected a table with `type`, found {table!r}")
        if not isinstance(table.get("type"), str):
            hint = f"installed {kind}: {', '.join(self.names(kind)) or 'none'}"
            raise UserError("expected `type`, the name of a component", key=("type",), hint=hint)
        component = self.find(kind, table["type"])
        return structure({k: v for k, v in table.items() if k != "type"}, component.cls, self.options)

    def name_of(self, options: Any) -> str:
        """Return the name under which a component's options were found."""
        return next(c.name for c in self.components.values() if c.cls is type(options))

    def emit(self, event: Event) -> list[str]:
        """Tell every listener of an event. Returns a line for each listener that raised."""
        complaints = []
        for hook in self.manager.hook.corenas_event.get_hookimpls():
            try:
                with staying_here():
                    hook.function(event=event) if "event" in hook.argnames else hook.function()
            except (Exception, SystemExit) as error:
                who = f"{hook.plugin_name} failed at {type(event).__name__}: "
                complaints.append(f"{who}{error}" if isinstance(error, UserError) else shown(who + told(error)))
        return complaints


def load_catalogue(
    found: Iterable[EntryPoint] | None = None,
    extra: Iterable[tuple[str, ModuleType]] = (),
    files: Iterable[str | Path] = (),
) -> Catalogue:
    """Import the entry modules and collect what they offer; what is installed is looked through once.

    found: entry points, those that are installed unless given
    extra: further plugins as (name, module or object), for tests and notebooks
    files: modules of one's own with hooks in them

    >>> from corenas import load_catalogue
    >>> "random" in load_catalogue().names("searchers")
    True
    """
    extra, files = [*extra], [*files]
    place = _place() if found is None and not extra and not files else None
    if place in _whole:
        return _whole[place]
    manager = pluggy.PluginManager("corenas")
    manager.add_hookspecs(hookspecs)
    plugins: list[Plugin] = []
    offers: dict[tuple[str, str], list[Component]] = defaultdict(list)

    def add(plugin: Plugin, load: Callable[[], Any]) -> None:
        try:
            with _undisturbed():
                for component in _collect(manager, plugin, load()):
                    offers[component.kind, component.name].append(component)
        except KeyboardInterrupt:  # of the user's
            raise
        except BaseException as error:
            plugin = attrs.evolve(plugin, error=_reason(error))
        plugins.append(plugin)

    points = entry_points(group=GROUP) if found is None else found
    for point in sorted(points, key=lambda p: p.name):
        name, version = (point.dist.name, point.dist.version) if point.dist else ("?", "?")
        add(Plugin(point.name, name, version, point.value), point.load)
    for name, module in extra:
        add(Plugin(name, name, "?", getattr(module, "__name__", name)), lambda module=module: module)
    for file in dict.fromkeys(Path(file).resolve() for file in files):
        add(Plugin(str(file), str(file), file_digest(file), file.stem), partial(import_file, file))
    components = {key: found[0] for key, found in offers.items() if len(found) == 1}
    conflicts = {}
    for (kind, name), several in offers.items():
        if len(several) > 1:
            conflicts[kind, name] = tuple(component.distribution for component in several)
    catalogue = Catalogue(tuple(plugins), components, conflicts, manager)
    if place is not None and not any(plugin.error for plugin in plugins):  # what is broken may be mended
        _whole.clear()
        _whole[place] = catalogue
    return catalogue


def _normal(distribution: str) -> str:
    """Return the name of a distribution as all its spellings have it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


_Place = tuple[tuple[str, int], ...]
_whole: dict[_Place | None, Catalogue] = {}
"""What is installed, under the state that the folders of modules had when it was looked through."""


def _place() -> _Place:
    """Return the folders in which modules are found, each with the time it was changed, as by an installation."""
    return tuple((folder, os.stat(folder or ".").st_mtime_ns) for folder in sys.path if os.path.exists(folder or "."))


def file_digest(file: Path) -> str:
    """Return 16 hexadecimal digits of a file's content; of one that cannot be read "?"."""
    try:
        return hashlib.sha256(regular(file).read_bytes()).hexdigest()[:16]
    except OSError:
        return "?"


def import_file(file: Path) -> ModuleType:
    """Import a module from its file. Raises UserError if there is none, and whatever the module raises.

    It is called after its content, so that what is pickled in one process is found in another that imported it too.
    """
    name = f"corenas_local_{re.sub(r'[^0-9a-zA-Z]', '_', file.stem)}_{file_digest(file)}"
    if name in sys.modules:
        return sys.modules[name]
    if file.suffix != ".py" or not file.is_file():
        raise UserError("no such Python file" if file.suffix == ".py" else "this is no Python file (.py)")
    spec = spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep the working directory, and stdout for what a command says: a module that prints does so on stderr."""
    with staying_here(), redirect_stdout(sys.stderr):
        yield


def _reason(error: BaseException) -> str:
    text = str(error) if isinstance(error, UserError) else told(error)  # one in our own words needs no name
    return shown(text.strip().partition("\n")[0])


def _collect(manager: pluggy.PluginManager, plugin: Plugin, module: Any) -> list[Component]:
    """Register one plugin; gives what it offers. Nothing of it stays if any of it is wrong."""
    contract = getattr(module, "corenas_contract", corenas.CONTRACT)
    if contract != corenas.CONTRACT:
        raise UserError(f"written for contract {contract} of corenas, this one has contract {corenas.CONTRACT}")
    taken = manager.has_plugin(plugin.name)  # by the entry point of another distribution
    name = f"{plugin.name} of {plugin.distribution}" if taken else plugin.name
    try:
        manager.register(module, name=name)
        return [*_offers(manager, plugin, module)]
    except BaseException:
        if manager.has_plugin(name):
            manager.unregister(name=name)
        raise


def _offers(manager: pluggy.PluginManager, plugin: Plugin, module: Any) -> Iterator[Component]:
    for caller in manager.get_hookcallers(module) or ():
        if not caller.has_spec():
            known = [name for name in vars(hookspecs) if name.startswith("corenas_")]
            raise UserError(f"no hook {caller.name!r}; {did_you_mean(caller.name, known, 'hooks')}")
        kind = caller.name.removeprefix("corenas_")
        if kind not in KINDS:
            continue
        offered = getattr(module, caller.name)()
        if not isinstance(offered, Mapping) or not all(isinstance(name, str) for name in offered):
            raise TypeError(f"{caller.name} gives {offered!r}, no mapping from names")
        for name, cls in offered.items():
            if kind != "commands" and not (isinstance(cls, type) and attrs.has(cls)):
                raise TypeError(f"{kind} {name!r}: {cls!r} is no attrs class of options")
            members = members_of(COMPONENTS[kind]) if kind in COMPONENTS else []
            if missing := [member for member in members if not hasattr(cls, member)]:
                raise TypeError(f"{kind} {name!r} has no {' and no '.join(missing)}")
            yield Component(kind, name, cls, plugin.distribution, plugin.version)
