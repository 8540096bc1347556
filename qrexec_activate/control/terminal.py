"""Where the commands' words leave this program: stdout and stderr.

Whatever is written there becomes printable on its way, so that no text from
elsewhere can move the cursor, hide or forge anything; only what is made here
from printable text, colours and tables, goes past that.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import sys
from typing import Any, TextIO

import click

from ..errors import ActivateError
from ..printable import printable

__all__ = [
    "Styled",
    "draw",
    "guard_streams",
    "print_json",
    "say",
    "silence",
    "styled",
    "wants_colour",
]


class Styled(str):
    """Printable text, and around it escapes of our own."""

    __slots__ = ()


class _Guarded(io.TextIOWrapper):
    """Makes printable what is written, and names itself where it fails."""

    def write(self, text: str) -> int:
        return self.write_raw(printable(text, keep="\n\t"))

    def write_raw(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            raise self._problem(error) from error

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            raise self._problem(error) from error

    def _problem(self, error: OSError) -> Exception:
        # A reader that has had enough is what click knows how to end on.
        if error.errno == errno.EPIPE:
            return error
        return ActivateError(f"cannot write to its output: {error.strerror}")


def guard_streams() -> None:
    """Let nothing out that is not printable, in whatever locale; and open what
    the caller has closed, so that no other file takes its place."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdin = sys.stdin or open(0)  # noqa: SIM115
    sys.stdout = _guarded(sys.stdout, 1)
    sys.stderr = _guarded(sys.stderr, 2)


def _guarded(stream: TextIO | None, fd: int) -> TextIO:
    if stream is None:
        stream = open(fd, "w", closefd=False)  # noqa: SIM115
    encoding = codecs.lookup(stream.encoding).name
    return _Guarded(
        # Of which the old stream must not dispose.
        open(fd, "wb", closefd=False),
        # As Python itself does where the locale knows ASCII only.
        encoding="utf-8" if encoding == "ascii" else encoding,
        errors="backslashreplace",
        line_buffering=bool(stream.line_buffering),
    )


def silence() -> None:
    """Let Python end without another word about output that nobody takes."""
    for fd, stream in enumerate((sys.stdout, sys.stderr), 1):
        try:
            # click puts a wrapper around one whose reader has gone, which says
            # nothing of it; Python 3.14 does, as it ends.
            getattr(stream, "wrapped", stream).flush()
        except Exception:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, fd)
            os.close(null)


def wants_colour() -> bool:
    """Whether stdout is a terminal and nobody has said no
    (https://no-color.org)."""
    return (
        sys.stdout.isatty()
        and not os.environ.get("NO_COLOR")
        and os.environ.get("TERM") != "dumb"
    )


def styled(text: str, style: str) -> Styled:
    """Colour a text where colour is wanted, for say()."""
    text = printable(text)
    if not style or not wants_colour():
        return Styled(text)
    look = {"bold": True} if style == "bold" else {"fg": style}
    return Styled(click.style(text, **look))


def say(*parts: str, err: bool = False) -> None:
    """Print one line, of texts and of what styled() has made."""
    line = "".join(
        part if isinstance(part, Styled) else printable(part) for part in parts
    )
    draw(Styled(f"{line}\n"), sys.stderr if err else sys.stdout)


def draw(text: Styled, stream: TextIO | None = None) -> None:
    """Write what was made here, as it is."""
    stream = stream or sys.stdout
    if isinstance(stream, _Guarded):
        stream.write_raw(text)
    else:
        stream.write(text)
    stream.flush()


def print_json(value: Any, indent: int | None = 2) -> None:
    import json
    import re

    utf8 = codecs.lookup(sys.stdout.encoding or "utf-8").name == "utf-8"
    text = json.dumps(value, indent=indent, ensure_ascii=not utf8)

    def escaped(match: re.Match[str]) -> str:
        found = match[0]
        return found if found.isprintable() else json.dumps(found)[1:-1]

    # json escapes what is below a blank; a terminal obeys more than that.
    click.echo(re.sub(r"[^\n -~]", escaped, text))
