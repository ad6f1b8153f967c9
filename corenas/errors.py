"""What a user did wrong: what, where, and what to do about it."""

from __future__ import annotations

import difflib
import errno
import os
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeAlias

from attrs import evolve, frozen

KeyPath: TypeAlias = tuple[str | int, ...]

LONGEST_LINE = 500
"""The largest number of characters in a line of a message."""


def shown(text: str) -> str:
    """Return a line as people can read it: what controls a terminal escaped, of a long one beginning and end.

    >>> from corenas.errors import shown
    >>> shown("red\\x1b[31m")
    'red\\\\x1b[31m'
    """
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE - 200]} … {line[-190:]}"


def dotted_key(*path: str | int) -> str:
    """Return a path as a key of TOML: `stages.2.block.kernel`."""
    return ".".join(map(str, path))


@frozen
class Fault:
    """One mistake: a message, the key it is about, and the file and line where it stands.

    hint: what to do about it, a line of its own
    """

    message: str
    key: KeyPath = ()
    file: str | None = None
    line: int | None = None
    hint: str | None = None

    @property
    def dotted(self) -> str:
        """The key as text: `stages[2].block.kernel`."""
        return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in self.key).removeprefix(".")

    def under(self, *prefix: str | int) -> Fault:
        """Return the same mistake, seen from a table further out; one that has its file is as it is."""
        return self if self.file else evolve(self, key=(*prefix, *self.key))

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.file and self.line else self.file
        first, *more = (self.message or "").split("\n")  # torch speaks in several lines
        lines = [": ".join(part for part in (place, self.dotted, first) if part), *more]
        return "\n".join([*map(shown, lines), *(f"  {shown(line)}" for line in (self.hint or "").splitlines())])


class UserError(Exception):
    """Mistakes of the user's, all that were found at once. The command line prints them and exits with status 2."""

    def __init__(self, message: str | None = None, *, faults: Iterable[Fault] = (), **where: object) -> None:
        self.faults = [*faults] if message is None else [Fault(message, **where), *faults]  # type: ignore[arg-type]
        super().__init__("\n".join(map(str, self.faults)))

    def __reduce__(self) -> tuple[object, ...]:  # keyword arguments do not pickle by themselves
        return partial(UserError, faults=self.faults), ()

    def under(self, *prefix: str | int) -> UserError:
        """Return the same mistakes, seen from a table further out."""
        return UserError(faults=[fault.under(*prefix) for fault in self.faults])


@contextmanager
def collecting(faults: list[Fault], *prefix: str | int, also: type[Exception] | tuple[()] = ()) -> Iterator[None]:
    """Add the mistakes that are raised inside to a list, seen from a table further out.

    also: another exception whose text is a mistake of the user's
    """
    try:
        yield
    except UserError as error:
        faults += error.under(*prefix).faults
    except also as error:
        faults.append(Fault(str(error), prefix))


def raise_if_any(faults: Iterable[Fault]) -> None:
    """Raise UserError with mistakes, if there are any."""
    if found := [*faults]:
        raise UserError(faults=found)


def did_you_mean(name: str, known: Iterable[str], noun: str = "known") -> str:
    """Return the closest names to one that is unknown, then all that would have been right."""
    names = sorted(known)
    room = [sum(map(len, names[: n + 1])) + 2 * n for n in range(len(names))]
    most = max(1, min(20, sum(length <= 300 for length in room)))  # so that the line is not cut
    listed = [*names[:most], f"and {len(names) - most} more"] if len(names) > most else names
    same_letters = [known for known in names if known.casefold() == name.casefold()]
    close = same_letters or difflib.get_close_matches(name, names, n=2)
    meant = f"did you mean {' or '.join(map(repr, close))}? {_foreign(name, close)}" if close else ""
    return f"{meant}{noun}: {', '.join(listed) or 'none'}"


def _foreign(name: str, close: Iterable[str]) -> str:
    """Return which letters of a name stand in none that is close to it, where they may look as if they did."""
    letters = dict.fromkeys(c for c in name if not c.isascii() and all(c not in other for other in close))
    told = " and ".join(f"{c!r} is {unicodedata.name(c, 'unnamed')} (U+{ord(c):04X})" for c in letters)
    return f"({told}) " if told else ""


def told(error: BaseException) -> str:
    """Return an exception's name and text, whatever a plugin's own exception does when it is printed."""
    try:
        text = str(error).strip()
    except BaseException:  # whatever it raises, which may be no Exception either
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def regular(path: Path) -> Path:
    """Return the path of a file that is to be read. Raises OSError for one that might never end: a pipe, a device."""
    if path.exists() and not path.is_file() and not path.is_dir():  # of a folder, the system says what it is
        raise OSError(errno.EINVAL, "this is no file", str(path))
    return path


@contextmanager
def staying_here() -> Iterator[None]:
    """Keep the working directory, to which paths of a run are relative, whatever a plugin does inside."""
    folder = os.getcwd()
    try:
        yield
    finally:
        os.chdir(folder)


@contextmanager
def blaming_plugin(who: str) -> Iterator[None]:
    """Tell what goes wrong inside as the fault of a plugin, with its name. Raises UserError for any exception.

    One that wants to end the program does not: a run that ends so would look as if it were done.
    """
    try:
        with staying_here():
            yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        hint = "this is no mistake of yours but its author's; CORENAS_TRACEBACK=1 shows where"
        raise UserError(f"{who} failed: {told(error)}", hint=hint) from error
