"""Acts that belong together: all of them are done, or none; the same ones,
backwards, take everything away again.

A person could type every one of them, and is shown them by --dry-run.
"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

from ..errors import ActivateError, UsageProblem
from ..systemd.journal import IDENTIFIER, Priority
from ..systemd.programs import run

__all__ = ["Step", "audit", "command", "do_all", "undo_all"]


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True)
class Step:
    """One act. To undo what was never done, or was undone, is no error."""

    #: What --dry-run shows: a command, or a file; empty for what goes without
    #: saying.
    text: str
    do: Callable[[], object] = _nothing
    undo: Callable[[], object] = _nothing


def do_all(steps: Sequence[Step]) -> None:
    """Do all of it; if one fails, undo those before it and raise
    ActivateError."""
    done: list[Step] = []
    try:
        for step in steps:
            step.do()
            done.append(step)
    except ActivateError as error:
        _undo_for(error, done)
    except OSError as error:
        _undo_for(ActivateError(str(error)), done)


def _undo_for(error: ActivateError, done: list[Step]) -> NoReturn:
    left = []
    for step in reversed(done):
        try:
            step.undo()
        except ActivateError as another:
            left.append(str(another))
    if left:
        raise ActivateError(
            f"{error}; and not all could be undone: {'; '.join(left)}"
        ) from error
    raise error


def undo_all(steps: Sequence[Step]) -> None:
    """Undo all of it, the last one first; raises ActivateError at the first
    that fails. It can then be said again."""
    for step in reversed(steps):
        step.undo()


def command(*words: str, undo: Sequence[str] = ()) -> Step:
    """A step that is a program, as is what undoes it."""
    return Step(
        f"$ {shlex.join(words)}",
        lambda: run(*words),
        lambda: run(*undo) if undo else None,
    )


@contextlib.contextmanager
def audit(act: str, *, done: str, **fields: str) -> Iterator[None]:
    """Note in the journal, where there is one, that an act was done, or why
    not; journald itself adds who did it."""
    try:
        yield
    except UsageProblem:
        # Nothing was begun.
        raise
    except ActivateError as error:
        _send(Priority.WARNING, f"{act} failed: {error}", fields)
        raise
    _send(Priority.NOTICE, done, fields)


def _send(priority: Priority, message: str, fields: dict[str, str]) -> None:
    from systemd import journal

    record = [
        f"MESSAGE={message}",
        f"PRIORITY={priority:d}",
        f"SYSLOG_IDENTIFIER={IDENTIFIER}",
    ]
    with contextlib.suppress(OSError):
        journal.sendv(
            *record, *(f"{key}={value}" for key, value in fields.items())
        )
