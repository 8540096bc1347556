"""Acts that belong together: all of them are done, or none; the same ones,
backwards, take everything away again.

A person could type every one of them, and is shown them by --dry-run.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import click

from ..control.dropins import (
    create_file,
    file_shown,
    locked,
    remove_file,
)
from ..control.finishing import finishing
from ..errors import ActivateError, UsageProblem
from ..systemd.journal import IDENTIFIER, Priority
from ..systemd.programs import run
from ..systemd.unitdirs import own_folder

__all__ = [
    "Step",
    "audit",
    "command",
    "do_all",
    "do_own",
    "file_step",
    "link_step",
    "relink_step",
    "show",
    "undo_all",
]


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
    #: As text, of what undoes it.
    undone: str = ""


def do_all(steps: Sequence[Step]) -> None:
    """Do all of it; if one fails, undo those before it and raise
    ActivateError."""
    done: list[Step] = []
    try:
        for step in steps:
            step.do()
            done.append(step)
    except OSError as error:
        _undo_for(ActivateError(str(error)), done)
    except Exception as error:
        _undo_for(error, done)


def do_own(steps: Sequence[Step], name: str, doing: str, done: str) -> None:
    """Do steps that change a person's own units, one command at a time, and
    tell the journal."""
    with (
        audit(doing, done=done, QREXEC_NAME=name),
        locked(own_folder(user=True)),
        finishing(),
    ):
        do_all(steps)


def _undo_for(error: Exception, done: list[Step]) -> NoReturn:
    left = []
    for step in reversed(done):
        try:
            step.undo()
        except Exception as another:
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


def file_step(path: Path, text: str) -> Step:
    """A file that is made, or removed."""
    return Step(
        file_shown(path, text),
        lambda: create_file(path, text),
        lambda: remove_file(path),
        file_shown(path, None),
    )


def link_step(link: Path, target: str) -> Step:
    """A symbolic link that is made, or removed."""

    def make() -> None:
        with _in_words("make", link):
            link.parent.mkdir(mode=0o700, exist_ok=True)
            link.symlink_to(target)

    def remove() -> None:
        with _in_words("remove", link):
            link.unlink(missing_ok=True)

    return Step(
        f"$ {shlex.join(['ln', '-s', target, str(link)])}",
        make,
        remove,
        f"$ {shlex.join(['rm', str(link)])}",
    )


def relink_step(link: Path, old: str, new: str) -> Step:
    """A symbolic link that leads elsewhere from one moment to the next."""

    def lead(before: str, after: str) -> None:
        with _in_words("change", link):
            if os.readlink(link) != before:
                raise ActivateError(
                    f"{link} was changed by somebody else just now: try again"
                )
            # No name of a service begins so.
            new_one = link.with_name(f".{link.name}")
            new_one.unlink(missing_ok=True)
            new_one.symlink_to(after)
            new_one.replace(link)

    return Step(
        f"$ {shlex.join(['ln', '-sfT', new, str(link)])}",
        lambda: lead(old, new),
        lambda: lead(new, old),
    )


@contextlib.contextmanager
def _in_words(do: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ActivateError(f"cannot {do} {path}: {error.strerror}") from error


def show(texts: Iterable[str]) -> None:
    """Print what would be done, for --dry-run."""
    for text in filter(None, texts):
        click.echo(text)


def command(*words: str, undo: Sequence[str] = ()) -> Step:
    """A step that is a program, as is what undoes it."""
    return Step(
        f"$ {shlex.join(words)}",
        lambda: run(*words),
        lambda: run(*undo) if undo else None,
        f"$ {shlex.join(undo)}" if undo else "",
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
