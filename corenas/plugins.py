"""What is installed: entry points become a catalogue of components. A broken plugin is reported, never fatal."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any

import attrs
import pluggy
from attrs import field, frozen

import corenas
from corenas import hookspecs
from corenas.contracts import Event
from corenas.errors import UserError, did_you_mean
from corenas.options import structure

GROUP = "corenas"
KINDS = (
    "mutators", "algorithms", "distillers", "searchers", "evaluators", "backbones", "tasks", "executors", "exporters",
    "commands",
)  # fmt: skip
"""The kinds of components that have a name; each is offered through the hook `corenas_<kind>`."""
MEMBERS = dict.fromkeys(KINDS, ("start",)) | {
    "algorithms": ("start", "stages", "needs"), "evaluators": ("start", "provides", "cheap"), "backbones": ("build",),
    "exporters": ("write",), "commands": (),
}  # fmt: skip
"""What the options of each kind must have (`corenas.contracts`)."""


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
    """An entry point, and what is wrong with it, if anything."""

    name: str
    distribution: str
    version: str
    module: str
    error: str | None = None


@frozen
class Catalogue:
    """All components, by kind and name. `conflicts` are names that several distributions offer: none can be used."""

    plugins: tuple[Plugin, ...]
    components: dict[tuple[str, str], Component] = field(factory=dict)
    conflicts: dict[tuple[str, str], tuple[str, ...]] = field(factory=dict)
    manager: pluggy.PluginManager = field(factory=lambda: _manager(), repr=False)

    def names(self, kind: str) -> list[str]:
        """The names of a kind."""
        return sorted(name for k, name in self.components if k == kind)

    def find(self, kind: str, name: str) -> Component:
        """A component. Raises UserError with the closest names, what is installed and what is broken."""
        if (kind, name) in self.components:
            return self.components[kind, name]
        if (kind, name) in self.conflicts:
            owners = " and ".join(self.conflicts[kind, name])
            raise UserError(f"{name!r} is offered by {owners}", key=("type",), hint="uninstall one of them")
        hint = did_you_mean(name, self.names(kind), f"installed {kind}")
        broken = [f"{p.distribution} ({p.error})" for p in self.plugins if p.error]
        if broken:
            hint += f"; not usable: {', '.join(broken)}"
        hint += f"; to install it: pip install corenas-{kind.removesuffix('s')}-{name}" if _plain(name) else ""
        raise UserError(f"no {kind.removesuffix('s')} {name!r}", key=("type",), hint=hint)

    def options(self, kind: str, table: Any) -> Any:
        """The options of a component from its table `{type = "…", …}`, or from its name alone.

        Raises UserError with all mistakes, keys relative to the table.
        """
        table = {"type": table} if isinstance(table, str) else table
        if not isinstance(table, dict):
            raise UserError(f"expected a table with `type`, found {table!r}")
        if not isinstance(table.get("type"), str):
            names = ", ".join(self.names(kind)) or "none"
            raise UserError(
                "expected `type`, the name of a component", key=("type",), hint=f"installed {kind}: {names}"
            )
        component = self.find(kind, table["type"])
        return structure({k: v for k, v in table.items() if k != "type"}, component.cls, self.options)

    def name_of(self, options: Any) -> str:
        """The name under which a component's options were found."""
        return next(c.name for c in self.components.values() if c.cls is type(options))

    def import_all(self) -> dict[str, str]:
        """Import every module of every plugin; gives what cannot be imported: plugin -> why."""
        found = {}
        for plugin in self.plugins:
            try:
                package = importlib.import_module(plugin.module.partition(":")[0])
                for module in pkgutil.walk_packages(getattr(package, "__path__", []), f"{package.__name__}."):
                    importlib.import_module(module.name)
            except (Exception, SystemExit) as error:
                found[plugin.name] = _reason(error)
        return found

    def emit(self, event: Event) -> list[str]:
        """Tell every listener of an event. Returns a line for each listener that raised."""
        complaints = []
        for hook in self.manager.hook.corenas_event.get_hookimpls():
            try:
                hook.function(event=event) if "event" in hook.argnames else hook.function()
            except Exception as error:
                complaints.append(f"{hook.plugin_name} failed at {type(event).__name__}: {error!r}")
        return complaints


def load_catalogue(
    found: Iterable[EntryPoint] | None = None, extra: Iterable[tuple[str, ModuleType]] = ()
) -> Catalogue:
    """Import the entry modules and collect what they offer.

    found: entry points, those that are installed unless given
    extra: further plugins as (name, module or object), for tests and notebooks
    """
    manager = _manager()
    plugins: list[Plugin] = []
    offers: dict[tuple[str, str], list[Component]] = {}
    points = entry_points(group=GROUP) if found is None else found
    for point in sorted(points, key=lambda p: p.name):
        distribution = point.dist.name if point.dist else "?"
        version = point.dist.version if point.dist else "?"
        plugin = Plugin(point.name, distribution, version, point.value)
        try:
            plugins.append(_collect(manager, plugin, point.load(), offers))
        except (Exception, SystemExit) as error:
            plugins.append(attrs.evolve(plugin, error=_reason(error)))
    for name, module in extra:
        plugins.append(_collect(manager, Plugin(name, name, "?", getattr(module, "__name__", name)), module, offers))
    components = {key: found[0] for key, found in offers.items() if len(found) == 1}
    conflicts = {key: tuple(c.distribution for c in found) for key, found in offers.items() if len(found) > 1}
    for key, owners in conflicts.items():
        text = f"{key[0].removesuffix('s')} {key[1]!r} is offered by {' and '.join(owners)}"
        plugins = [attrs.evolve(p, error=p.error or text) if p.distribution in owners else p for p in plugins]
    return Catalogue(tuple(plugins), components, conflicts, manager)


def _manager() -> pluggy.PluginManager:
    manager = pluggy.PluginManager("corenas")
    manager.add_hookspecs(hookspecs)
    return manager


def _reason(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _collect(
    manager: pluggy.PluginManager, plugin: Plugin, module: Any, offers: dict[tuple[str, str], list[Component]]
) -> Plugin:
    """Register one plugin and note what it offers; nothing of it stays if any of it is wrong."""
    contract = getattr(module, "corenas_contract", corenas.CONTRACT)
    if contract != corenas.CONTRACT:
        text = f"written for contract {contract} of corenas, this one has contract {corenas.CONTRACT}"
        return attrs.evolve(plugin, error=text)
    if manager.has_plugin(plugin.name):
        return attrs.evolve(plugin, error=f"another distribution has an entry point {plugin.name!r} too")
    known = [name for name in dir(hookspecs) if name.startswith("corenas_")]
    unknown = [name for name in dir(module) if name.startswith("corenas_") and name not in known
               and hasattr(getattr(module, name), "corenas_impl")]  # fmt: skip
    if unknown:
        return attrs.evolve(plugin, error=f"no hook {unknown[0]!r}; {did_you_mean(unknown[0], known, 'hooks')}")
    try:
        manager.register(module, name=plugin.name)
        own = list(_offers(manager, plugin))
    except Exception as error:
        if manager.has_plugin(plugin.name):
            manager.unregister(name=plugin.name)
        return attrs.evolve(plugin, error=_reason(error))
    for component in own:
        offers.setdefault((component.kind, component.name), []).append(component)
    return plugin


def _offers(manager: pluggy.PluginManager, plugin: Plugin) -> Iterator[Component]:
    for kind in KINDS:
        for hook in getattr(manager.hook, f"corenas_{kind}").get_hookimpls():
            if hook.plugin_name != plugin.name:
                continue
            offered = hook.function()
            if not isinstance(offered, Mapping) or not all(isinstance(name, str) for name in offered):
                raise TypeError(f"corenas_{kind} gives {offered!r}, no mapping from names")
            for name, cls in offered.items():
                if kind != "commands" and not (isinstance(cls, type) and attrs.has(cls)):
                    raise TypeError(f"{kind} {name!r}: {cls!r} is no attrs class of options")
                missing = [member for member in MEMBERS.get(kind, ()) if not hasattr(cls, member)]
                if missing:
                    raise TypeError(f"{kind} {name!r} has no {' and no '.join(missing)}")
                yield Component(kind, name, cls, plugin.distribution, plugin.version)


def _plain(name: str) -> bool:
    return name.replace("-", "").replace("_", "").isalnum()
