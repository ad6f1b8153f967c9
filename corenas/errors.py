"""What a user did wrong: what, where, and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TypeAlias

from attrs import evolve, frozen

Path: TypeAlias = tuple[str | int, ...]


@frozen
class Fault:
    """One mistake: a message, the key it is about, and the file and line where it stands.

    hint: what to do about it, a line of its own
    """

    message: str
    key: Path = ()
    file: str | None = None
    line: int | None = None
    hint: str | None = None

    @property
    def dotted(self) -> str:
        """The key as text: `stages[2].block.kernel`."""
        text = ""
        for part in self.key:
            text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
        return text

    def under(self, *prefix: str | int) -> Fault:
        """The same mistake, seen from a table further out."""
        return evolve(self, key=(*prefix, *self.key))

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.file and self.line else self.file
        text = ": ".join(part for part in (place, self.dotted, self.message) if part)
        return f"{text}\n  {self.hint}" if self.hint else text


class UserError(Exception):
    """Mistakes of the user's, all that were found at once. The command line prints them and exits with status 2."""

    def __init__(self, message: str | None = None, *, faults: Iterable[Fault] = (), **where: object) -> None:
        self.faults = [*faults] if message is None else [Fault(message, **where), *faults]  # type: ignore[arg-type]
        super().__init__("\n".join(map(str, self.faults)))

    def __reduce__(self) -> tuple[object, ...]:  # keyword arguments do not pickle by themselves
        return _rebuilt, (self.faults,)

    def under(self, *prefix: str | int) -> UserError:
        """The same mistakes, seen from a table further out."""
        return UserError(faults=[fault.under(*prefix) for fault in self.faults])


def _rebuilt(faults: list[Fault]) -> UserError:
    return UserError(faults=faults)


def did_you_mean(name: str, known: Iterable[str], noun: str = "known") -> str:
    """The closest names to one that is unknown, then all that would have been right."""
    names = sorted(known)
    shown = [*names[:20], f"and {len(names) - 20} more"] if len(names) > 20 else names
    close = difflib.get_close_matches(name, names, n=2, cutoff=0.6)
    listed = f"{noun}: {', '.join(shown)}" if names else f"{noun}: none"
    return (f"did you mean {' or '.join(repr(c) for c in close)}? " if close else "") + listed
