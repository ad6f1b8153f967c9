"""Plugins: what is offered is found, what is broken is reported and harms nobody else."""

import inspect
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from attrs import field, frozen
from torch import nn

from corenas import CONTRACT, hookspecs
from corenas.cli import main
from corenas.contracts import Note
from corenas.errors import UserError, blaming_plugin
from corenas.hookspecs import hookimpl
from corenas.plugins import KINDS, load_catalogue

HOOKS = sorted(name for name in vars(hookspecs) if name.startswith("corenas_"))


@frozen
class Options:
    """A component.

    size: how large it is
    """

    size: int = 1

    start = build = write = provides = lambda self, *context: None
    stages: ClassVar = ("search",)
    needs: ClassVar = ("searcher",)
    cheap: ClassVar = True


@frozen
class NoVerb:
    pass


@frozen
class Nested:
    inner: Any = field(metadata={"kind": "searchers"})

    def start(self, problem, rng): ...


def plugin(**hooks):
    """A module with some hooks; what is no function stays as it is."""
    marked = {k: hookimpl(v) if inspect.isfunction(v) and k.startswith("corenas_") else v for k, v in hooks.items()}
    return SimpleNamespace(**marked)


def entry(name, module, distribution=None):
    def load():
        if isinstance(module, BaseException):
            raise module
        return module

    dist = SimpleNamespace(name=distribution or f"dist-{name}", version="1.2")
    return SimpleNamespace(name=name, value=f"module_{name}", group="corenas", dist=dist, load=load)


GOOD = entry("good", plugin(corenas_searchers=lambda: {"evolution": Options, "random": Options}))


def errors(catalogue):
    return {p.name: p.error for p in catalogue.plugins if p.error}


# -- the hooks --------------------------------------------------------------------------------------------------------


def offers_components(hook):
    kind = hook.removeprefix("corenas_")
    offered = (lambda parser: lambda arguments: 0) if kind == "commands" else Options
    catalogue = load_catalogue([entry("one", plugin(**{hook: lambda: {"a": offered, "b": offered}}))])
    assert catalogue.names(kind) == ["a", "b"]
    component = catalogue.find(kind, "a")
    assert component.cls is offered
    assert (component.distribution, component.version) == ("dist-one", "1.2")


def offers_layers(hook):
    catalogue = load_catalogue([entry("one", plugin(**{hook: lambda: {nn.Linear: nn.Bilinear}}))])
    assert getattr(catalogue.manager.hook, hook)() == [{nn.Linear: nn.Bilinear}]


def hears_events(hook):
    heard = []
    catalogue = load_catalogue([entry("one", plugin(**{hook: lambda event: heard.append(event)}))])
    assert catalogue.emit(Note("hello")) == []
    assert heard == [Note("hello")]


EXERCISES = {f"corenas_{kind}": offers_components for kind in KINDS} | {
    "corenas_mutables": offers_layers,
    "corenas_event": hears_events,
}


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_says_when_it_is_called_and_is_exercised(hook):
    text = inspect.getdoc(getattr(hookspecs, hook))
    assert text, "a hook has a docstring"
    assert "\nCalled " in text, "that says when it is called"
    assert hook in EXERCISES, "and a test"
    EXERCISES[hook](hook)


def test_nothing_is_exercised_that_is_no_hook():
    assert sorted(EXERCISES) == HOOKS


# -- broken plugins ---------------------------------------------------------------------------------------------------

IMPL_OF_NOTHING = plugin(corenas_serchers=lambda: {})


def raising():
    raise RuntimeError("no licence\nfor this")


BROKEN = {
    "raises at import": (ModuleNotFoundError("No module named 'foo'"), "ModuleNotFoundError: No module named 'foo'"),
    "does not parse": (SyntaxError("invalid syntax"), "SyntaxError: invalid syntax"),
    "says nothing": (ValueError(), "ValueError"),
    "is of an older contract": (
        plugin(corenas_contract=CONTRACT - 1, corenas_searchers=lambda: {"late": Options}),
        f"written for contract {CONTRACT - 1} of corenas, this one has contract {CONTRACT}",
    ),
    "has a hook that raises": (plugin(corenas_tasks=raising), "RuntimeError: no licence"),
    "has a hook that gives nothing": (plugin(corenas_tasks=lambda: None), "TypeError: corenas_tasks gives None"),
    "offers what has no start": (plugin(corenas_tasks=lambda: {"t": NoVerb}), "TypeError: tasks 't' has no start"),
    "offers names that are no text": (plugin(corenas_tasks=lambda: {3: Options}), "TypeError: corenas_tasks gives {3"),
    "has a hook of an unknown name": (IMPL_OF_NOTHING, "no hook 'corenas_serchers'; did you mean 'corenas_searchers'"),
    "offers what is no attrs class": (
        plugin(corenas_tasks=lambda: {"t": int}), "TypeError: tasks 't': <class 'int'> is no attrs class of options",
    ),
    "offers an object": (plugin(corenas_tasks=lambda: {"t": 3}), "TypeError: tasks 't': 3 is no attrs class"),
    "takes other arguments": (plugin(corenas_event=lambda evnt: None), "PluginValidationError"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plugin_is_reported_and_the_others_work(name):
    module, message = BROKEN[name]
    heard = []
    listener = entry("z", plugin(corenas_event=lambda event: heard.append(event)))
    catalogue = load_catalogue([entry("bad", module), GOOD, listener])
    assert list(errors(catalogue)) == ["bad"]
    assert errors(catalogue)["bad"].startswith(message)
    assert catalogue.names("searchers") == ["evolution", "random"]
    assert catalogue.names("tasks") == []
    assert catalogue.emit(Note("hello")) == []
    assert heard == [Note("hello")]


def test_a_plugin_of_this_contract_or_of_none_stated_is_welcome():
    stated = plugin(corenas_contract=CONTRACT, corenas_tasks=lambda: {"t": Options})
    assert errors(load_catalogue([entry("a", stated), GOOD])) == {}


def test_a_plugin_that_is_half_broken_offers_nothing():
    half = plugin(corenas_searchers=lambda: {"half": Options}, corenas_tasks=raising)
    catalogue = load_catalogue([entry("bad", half), GOOD])
    assert catalogue.names("searchers") == ["evolution", "random"]
    assert list(errors(catalogue)) == ["bad"]


def test_a_name_that_two_distributions_offer_is_usable_from_neither():
    other = entry("other", plugin(corenas_searchers=lambda: {"random": Options, "mine": Options}))
    catalogue = load_catalogue([GOOD, other])
    assert catalogue.names("searchers") == ["evolution", "mine"]
    assert errors(catalogue) == {}
    assert catalogue.conflicts == {("searchers", "random"): ("dist-good", "dist-other")}
    with pytest.raises(
        UserError, match="'random' is offered by dist-good and dist-other\n  leave one out: uninstall it"
    ):
        catalogue.find("searchers", "random")
    assert catalogue.options("searchers", "mine") == Options()


def test_one_entry_name_of_two_distributions_hides_neither():
    twin = entry("good", plugin(corenas_searchers=lambda: {"mine": Options}), "dist-twin")
    catalogue = load_catalogue([GOOD, twin])
    assert errors(catalogue) == {}
    assert catalogue.names("searchers") == ["evolution", "mine", "random"]


class UnprintableError(Exception):
    def __str__(self):
        raise Stopped("no text")

    __repr__ = __str__


class Stopped(BaseException):
    pass


def test_a_command_of_a_plugins_called_run_leaves_run_and_all_others_as_they_are(monkeypatch, capsys):
    catalogue = load_catalogue([entry("a", plugin(corenas_commands=lambda: dict.fromkeys(["run", "other"], _command)))])
    monkeypatch.setattr("corenas.plugins.load_catalogue", lambda *args, **more: catalogue)
    assert main(["other"]) == 0
    assert main(["run"]) == 2
    assert "the following arguments are required: SPEC" in capsys.readouterr().err


def _command(parser):
    """Do nothing."""
    return lambda options: 0


def test_an_exception_that_cannot_be_printed_is_told_by_its_name():
    def listener(event):
        raise UnprintableError

    catalogue = load_catalogue([entry("a", plugin(corenas_event=listener))])
    assert catalogue.emit(Note("hello")) == ["a failed at Note: UnprintableError"]
    with pytest.raises(UserError, match="the searcher failed: UnprintableError"), blaming_plugin("the searcher"):
        raise UnprintableError


def test_a_plugin_does_not_end_the_program():
    catalogue = load_catalogue([entry("a", plugin(corenas_event=lambda event: sys.exit(0)))])
    assert catalogue.emit(Note("hello")) == ["a failed at Note: SystemExit: 0"]
    with pytest.raises(UserError, match="the searcher failed: SystemExit: 0"), blaming_plugin("the searcher"):
        sys.exit(0)


def test_a_plugin_is_looked_for_anew_after_an_installation(tmp_path, monkeypatch):
    (tmp_path / "corenas_late.py").write_text("")
    assert load_catalogue() is load_catalogue()
    monkeypatch.syspath_prepend(tmp_path)
    assert not any(p.module == "corenas_late" for p in load_catalogue().plugins)
    (tmp_path / "late-1.dist-info").mkdir()
    (tmp_path / "late-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: late\nVersion: 1\n")
    (tmp_path / "late-1.dist-info" / "entry_points.txt").write_text("[corenas]\nlate = corenas_late\n")
    os.utime(tmp_path, (1, 1))  # another time, however coarse the clock of the file system is
    assert any(p.module == "corenas_late" for p in load_catalogue().plugins)


def test_what_a_module_does_at_its_import_disturbs_nothing(tmp_path, monkeypatch, capsys):
    (tmp_path / "loud.py").write_text("import os\nprint('hello')\nos.chdir('/')\n")
    monkeypatch.chdir(tmp_path)
    catalogue = load_catalogue([entry("odd", UnprintableError()), entry("x", Stopped("no")), GOOD], files=["loud.py"])
    assert errors(catalogue) == {"odd": "UnprintableError", "x": "Stopped: no"}
    assert Path.cwd() == tmp_path
    assert capsys.readouterr() == ("", "hello\n")
    with pytest.raises(KeyboardInterrupt):
        load_catalogue([entry("slow", KeyboardInterrupt())])


def test_plugins_of_a_notebook_join_without_an_entry_point():
    catalogue = load_catalogue([GOOD], extra=[("mine", plugin(corenas_tasks=lambda: {"t": Options}))])
    assert catalogue.find("tasks", "t").distribution == "mine"


# -- looking up -------------------------------------------------------------------------------------------------------


def test_an_unknown_name_is_answered_with_close_installed_broken_and_what_to_install():
    catalogue = load_catalogue([GOOD, entry("bad", ImportError("no foo"))])
    with pytest.raises(UserError) as raised:
        catalogue.find("searchers", "evolutoin")
    text = str(raised.value)
    assert text.startswith(
        "type: no searcher 'evolutoin'\n  did you mean 'evolution'? installed searchers: evolution, random"
    )
    assert "not usable: dist-bad (ImportError: no foo)" in text
    more = text.partition("more can be installed: pip install ")[2].partition(";")[0].split()
    assert {"corenas-searcher-evolution", "corenas-searcher-random", "corenas-searcher-zennas"} <= {*more}
    with pytest.raises(UserError) as raised:
        catalogue.find("mutators", "sandwich")
    text = (
        "type: no mutator 'sandwich'\n  it comes with corenas-mutator-sampling: pip install corenas-mutator-sampling;"
    )
    assert str(raised.value).startswith(text)
    for kind, name, owner in [("commands", "report", "tool-report"), ("commands", "check", "tool-inspect"),
                              ("evaluators", "int8", "exporter-onnx"), ("backbones", "vit", "backbone-vit"),
                              ("searchers", "coarse_to_fine", "searcher-coarse-to-fine")]:  # fmt: skip
        assert f"pip install corenas-{owner};" in catalogue.hint(kind, name, (), "known")


def test_what_is_installed_is_not_to_be_installed_however_its_name_is_spelled():
    with pytest.raises(UserError) as raised:
        load_catalogue().find("searchers", "none")
    assert "more can be installed" not in str(raised.value)


def test_options_are_read_from_a_table_or_a_name():
    catalogue = load_catalogue([GOOD, entry("deep", plugin(corenas_tasks=lambda: {"deep": Nested}))])
    assert catalogue.options("searchers", "random") == Options()
    assert catalogue.options("searchers", {"type": "random", "size": 3}) == Options(3)
    deep = catalogue.options("tasks", {"type": "deep", "inner": {"type": "random", "size": 4}})
    assert deep == Nested(Options(4))
    assert catalogue.name_of(deep) == "deep"
    cases = {
        "type": [{}, {"size": 3}, {"type": 3}, {"type": "rndom"}],
        "": [3, [], ["random"], None],
        "size": [{"type": "random", "size": "3"}],
        "sise": [{"type": "random", "sise": 3}],
    }
    for key, tables in cases.items():
        for table in tables:
            with pytest.raises(UserError) as raised:
                catalogue.options("searchers", table)
            assert [fault.dotted for fault in raised.value.faults] == [key]
    with pytest.raises(UserError) as raised:
        catalogue.options("tasks", {"type": "deep", "inner": {"type": "random", "size": "x", "sise": 1}})
    assert sorted(fault.dotted for fault in raised.value.faults) == ["inner.sise", "inner.size"]


# -- events -----------------------------------------------------------------------------------------------------------


def test_a_listener_that_raises_is_reported_and_the_others_still_hear():
    heard = []

    def broken(event):
        raise ZeroDivisionError("oh")

    catalogue = load_catalogue([
        entry("a", plugin(corenas_event=lambda event: heard.append(("a", event)))),
        entry("b", plugin(corenas_event=broken)),
        entry("c", plugin(corenas_event=lambda: heard.append("c"))),
    ])  # fmt: skip
    assert catalogue.emit(Note("hello")) == ["b failed at Note: ZeroDivisionError: oh"]
    assert sorted(map(str, heard)) == sorted([str(("a", Note("hello"))), "c"])
    assert errors(catalogue) == {}
