"""The command line. It imports torch only where a command needs it."""

from __future__ import annotations

import argparse
import errno
import inspect
import io
import json
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import corenas
from corenas.errors import Fault, UserError

DONE, MISTAKE, INTERRUPTED, TERMINATED = 0, 2, 130, 143


class _Terminated(KeyboardInterrupt):
    """What SIGTERM raises, so that it ends as cleanly as Ctrl-C."""


@contextmanager
def _ending_cleanly_on_sigterm() -> Iterator[None]:
    """Let SIGTERM, which clusters send before they kill, raise in this process, not in those that it forks."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    own = os.getpid()

    def terminate(number: int, frame: Any) -> None:
        if os.getpid() != own:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        raise _Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _interrupts_as_such() -> Iterator[None]:
    """Raise an interrupt where another exception came of one: C code in which it falls answers with a SystemError."""
    try:
        yield
    except Exception as error:
        behind: BaseException | None = error
        while behind is not None and not isinstance(behind, KeyboardInterrupt):
            behind = behind.__cause__ or behind.__context__
        if behind is None:
            raise
        raise behind from None


@contextmanager
def _no_interrupt_lost() -> Iterator[None]:
    """Send an interrupt again that fell into a destructor or a callback of a weak reference: Python drops those."""
    before = sys.unraisablehook

    def again(dropped: Any) -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            before(dropped)
            return
        number = signal.SIGTERM if issubclass(dropped.exc_type, _Terminated) else signal.SIGINT
        later = threading.Timer(0.05, os.kill, (os.getpid(), number))
        later.daemon = True
        later.start()

    sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = before


def _open_standard_streams() -> None:
    """Give a program that was started without some of its streams empty ones: a run's file would get their numbers."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


def _tell(text: object, end: str = "\n") -> None:
    """Say something on stderr, which may be a full disk or a closed pipe by now."""
    with suppress(OSError):
        print(text, file=sys.stderr, end=end)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status.

    0 done, 2 the user's mistake, 130 interrupted, 143 terminated (SIGTERM); our bug is a traceback.
    """
    if arguments is None:
        _open_standard_streams()
    given = [*(sys.argv[1:] if arguments is None else arguments)]
    given = [re.sub(r"^(--[\w-]+=)?~(?=/)", lambda m: f"{m[1] or ''}{Path.home()}", word) for word in given]
    try:
        with _no_interrupt_lost(), _ending_cleanly_on_sigterm(), _interrupts_as_such():
            _refuse_empty(given)
            options = _parser(given).parse_args(given)
            with _stdout_for_json() if options.json else nullcontext():
                return options.command(options) or DONE
    except UserError as error:
        if "CORENAS_TRACEBACK" in os.environ:
            traceback.print_exc()
        if _speaks(error):
            _complain(error, "--json" in given, given[:1])
        return MISTAKE
    except KeyboardInterrupt as error:
        if arguments is None:  # the program ends, and a second Ctrl-C would make torch complain
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        terminated = isinstance(error, _Terminated)
        word = "terminated" if terminated else "interrupted"
        if _speaks(error):
            _tell(f"{word}; the same command goes on from here")
        return TERMINATED if terminated else INTERRUPTED
    except RuntimeError as error:
        hint = "has it had too little memory? train.workers = 0 reads data here; the same command goes on from here"
        if str(error).startswith("DataLoader worker"):  # torch tells of it wherever the program is at that moment
            found = UserError("a process that reads data has died", hint=hint)
        elif str(error).startswith("Symlink loop from "):
            found = UserError(f"links lead round in a circle: {str(error).removeprefix('Symlink loop from ')}")
        else:
            raise
        _complain(found, "--json" in given, given[:1])
        return MISTAKE
    except BrokenPipeError:  # `corenas trials … | head`
        sys.stderr.close()
        return DONE
    except OSError as error:  # a full disk, a folder that is gone
        hint = "free some space, then run the same command again" if error.errno == errno.ENOSPC else None
        fault = Fault(error.strerror or str(error), file=str(error.filename or "output"), hint=hint)
        _complain(UserError(faults=[fault]), "--json" in given, given[:1])
        return MISTAKE


def _refuse_empty(given: Sequence[str]) -> None:
    """Raise UserError for a word of nothing: as a path it would be the working directory."""
    for before, word in zip(["corenas", *given], given, strict=False):
        option = re.fullmatch(r"(--[\w-]+)=", word)
        if option or not word:
            text = f"nothing is said after {option[1] if option else before}"
            raise UserError(text, hint="is a variable of the shell not set?")


def _speaks(error: BaseException) -> bool:
    """Return whether this one of several processes under torchrun is to tell of an error.

    Once they are joined, they have found out who; before, one of each machine tells.
    """
    found: BaseException | None = error
    while found is not None:  # a message that was given its place is a new one
        if (speaks := getattr(found, "speaks", None)) is not None:
            return speaks
        found = found.__context__
    return os.environ.get("LOCAL_RANK", "0") == "0"


@contextmanager
def _stdout_for_json() -> Iterator[None]:
    """Let a command have stdout for the object that it prints in the end; what else is printed goes to stderr.

    That is what plugins print, also those in other processes and those that write past Python.
    """
    printed, real, found = io.StringIO(), sys.stdout, ""
    with ExitStack() as after:
        with suppress(OSError, ValueError):  # in a test, or a notebook, it is no file
            if real.fileno() == 1:
                own = os.dup(1)
                after.callback(os.close, own)
                after.callback(os.dup2, own, 1)
                after.callback(real.flush)
                os.dup2(2, 1)
        try:
            with redirect_stdout(printed):
                yield
            found = _last_object(printed.getvalue())
        finally:
            _tell(printed.getvalue().removesuffix(found), end="")
    print(found.rstrip("\n"), file=real)


def _last_object(text: str) -> str:
    """Return the JSON object with which a text ends, "" if there is none."""
    lines = text.splitlines(keepends=True)
    for i in reversed(range(len(lines))):
        with suppress(ValueError):
            if lines[i].startswith("{") and isinstance(json.loads("".join(lines[i:])), dict):
                return "".join(lines[i:])
    return ""


def _complain(error: UserError, as_json: bool, command: list[str]) -> None:
    for fault in error.faults:
        _tell(fault)
    if as_json and os.environ.get("RANK", "0") == "0":
        errors = [{"file": f.file, "line": f.line, "key": f.dotted, "message": f.message} for f in error.faults]
        with suppress(OSError):
            print(json.dumps({"ok": False, "errors": errors} if command == ["check"] else {"errors": errors}))


class _Parser(argparse.ArgumentParser):
    """Says what was meant where it can, and exits with our status for a mistake."""

    given: Sequence[str] = ()

    def error(self, message: str) -> Any:
        prog = self.prog if " " in self.prog or not self.given else f"{self.prog} {self.given[0]}"
        raise UserError(message, hint=_key_meant(self.given) or f"{prog} --help")


def _key_meant(given: Sequence[str]) -> str | None:
    """Return how a key of the spec is said on the command line, where it was said as an option of its own."""
    from corenas.run.spec import spec_keys

    keys = spec_keys()
    for i, word in enumerate(given):
        name, _, value = word.removeprefix("--").partition("=")
        path = keys.get(name.replace("-", "_").rpartition(".")[2])
        if word.startswith("--") and path is not None and given[:1] == ["run"]:
            return f"a key of the spec: --set {path}={value or (*given, 'VALUE')[i + 1]}"
    return None


def _parser(given: Sequence[str]) -> argparse.ArgumentParser:
    parser = _Parser(prog="corenas", description="One-shot neural architecture search.")
    parser.given = given
    parser.add_argument("--version", action="version", version=f"corenas {corenas.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, add: Any) -> None:
        text = (inspect.getdoc(add) or "").partition("\n")[0]
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("--json", action="store_true", help="print one JSON object on stdout, nothing else")
        sub.set_defaults(command=add(sub))

    command("run", _run)
    word = next((word for word in given if not word.startswith("-")), None)
    if word != "run":  # all others are commands of plugins
        from corenas.plugins import load_catalogue

        catalogue = load_catalogue()
        for name in (name for name in catalogue.names("commands") if name != "run"):  # ours stays ours
            command(name, catalogue.find("commands", name).cls)
        if ("commands", str(word)) in catalogue.conflicts:
            catalogue.find("commands", str(word))
        if word is not None and word not in commands.choices:
            hint = catalogue.hint("commands", word, commands.choices, "commands")
            raise UserError(f"no command {word!r}", hint=hint)
    return parser


def _run(parser: argparse.ArgumentParser) -> Any:
    """Do everything a spec asks for; continue if its run directory has begun."""
    parser.add_argument("spec", metavar="SPEC", help="a TOML file")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="override a key of the spec")
    parser.add_argument("--out", metavar="DIR", type=Path, help="the run directory (default: runs/NAME)")
    parser.add_argument("--fresh", action="store_true", help="delete what the run has written there first")
    add_plugin_option(parser)
    return _do_run


def add_plugin_option(parser: argparse.ArgumentParser) -> None:
    """Let a command use components of files that are not installed."""
    text = "a Python file with components of your own, as `plugins` in a spec names them"
    parser.add_argument("--plugin", metavar="FILE", action="append", default=[], help=text)


def _do_run(options: argparse.Namespace) -> None:
    from corenas.run.spec import open_spec
    from corenas.store import strict_json

    spec, sources, catalogue = open_spec(options.spec, options.set, options.plugin)
    from corenas.run.stages import run_spec

    def emit(event: Any) -> None:
        for line in catalogue.emit(event):
            _tell(line)

    folder = options.out or Path("runs") / str(spec.name)
    with sources.locating(), redirect_stdout(sys.stderr):  # whatever a plugin prints
        result = run_spec(spec, catalogue, folder, emit, options.fresh)
    if os.environ.get("RANK", "0") != "0":
        return
    if options.json:
        print(strict_json(result))
    elif not catalogue.manager.hook.corenas_event.get_hookimpls():  # nothing has told of it
        print(f"{folder / 'best'}: {result['best']['metrics']}", file=sys.stderr)
