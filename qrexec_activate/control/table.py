"""Rows for a person or for a program: tables and colour on a terminal, plain
columns in a pipe, JSON on request."""

from __future__ import annotations

import os
import shutil
import sys
import unicodedata
from collections.abc import Callable, Sequence

from ..printable import printable
from .terminal import Styled, print_json, say, styled, wants_colour

__all__ = [
    "BAD",
    "DOUBTFUL",
    "GOOD",
    "QUIET",
    "cells",
    "lay_out",
    "print_json",
    "print_rows",
    "printable",
    "say",
    "short_path",
    "styled",
    "wants_colour",
    "with_short_paths",
]

#: Styles by meaning, as click.style() knows them.
GOOD, DOUBTFUL, BAD, QUIET = "green", "yellow", "red", "bright_black"

#: Columns of which nothing is ever left out: what one must not mistake.
WHOLE = frozenset({"id", "listener", "name", "target"})
#: Columns that are left out where there is no room for all: the first is not
#: worth that others are shortened for it.
SPARE = frozenset({"file"})
LESS_SPARE = frozenset({"to qube", "from qube"})
LEAST_OF_SPARE = 20
#: Below this width a record for each row is easier to read, and as near to
#: nothing is a cell cut.
NARROWEST_TABLE, SHORTEST_CELL = 60, 6

Style = Callable[[int, str], str]


def short_path(path: str) -> str:
    """Write the home folder as ~, as a person does."""
    home = os.environ.get("HOME", "")
    return (
        f"~{path[len(home) :]}"
        if home not in ("", "/") and path.startswith(home + "/")
        else path
    )


def with_short_paths(text: str) -> str:
    """Write the home folder as ~ wherever a text names something in it."""
    home = os.environ.get("HOME", "")
    return text.replace(f"{home}/", "~/") if home not in ("", "/") else text


def print_rows(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    style: Style = lambda column, text: "",
    *,
    wide: bool = False,
) -> None:
    """Print a table; `style` says how a cell looks, from its column and its
    text."""
    fits = not wide and sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if fits else None
    for line in lay_out(header, rows, width, style):
        say(line)


def lay_out(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    width: int | None,
    style: Style = lambda column, text: "",
) -> list[Styled]:
    """Lay rows out in columns, two blanks apart, in lines of at most this
    width; where that is too narrow for columns, in a record for each row.

    Without a width, everything is shown.
    """
    clean = [[printable(cell) for cell in row] for row in rows]
    titles = [cell.upper() for cell in header]
    columns = list(range(len(titles)))
    natural = [
        max(map(cells, column)) for column in zip(titles, *clean, strict=True)
    ]
    widths: list[int] | None = natural
    if width is not None:
        needed = [at for at in columns if header[at] not in SPARE]
        room = width - _total([natural[at] for at in needed]) - 2
        if _total(natural) > width and room < LEAST_OF_SPARE:
            columns = needed
        widths = _narrowed(header, natural, columns, width)
        if widths is None:
            columns = [at for at in columns if header[at] not in LESS_SPARE]
            widths = _narrowed(header, natural, columns, width)
        if width < NARROWEST_TABLE:
            widths = None
    if widths is None:
        assert width is not None
        return _records(titles, clean, width, style)
    lines = []
    for number, row in enumerate([titles, *clean]):
        line = ""
        for at, room in zip(columns, widths, strict=True):
            look = style(at, row[at]) if number else "bold"
            line += styled(shortened(row[at], room), look)
            if at != columns[-1]:
                line += " " * (room - min(cells(row[at]), room) + 2)
        lines.append(Styled(line.rstrip()))
    return lines


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + 2 * (len(widths) - 1)


def _narrowed(
    header: Sequence[str],
    natural: Sequence[int],
    columns: Sequence[int],
    width: int,
) -> list[int] | None:
    """The widths at which the columns fit, each time taken from the widest that
    may be shortened; None if that leaves too little of one."""
    widths = [natural[at] for at in columns]
    least = [
        natural[at]
        if header[at] in WHOLE
        else min(natural[at], max(len(header[at]), SHORTEST_CELL))
        for at in columns
    ]
    while _total(widths) > width:
        spare, at = max(
            (room if room > low else 0, at)
            for at, (room, low) in enumerate(zip(widths, least, strict=True))
        )
        if not spare:
            return None
        widths[at] -= 1
    return widths


def _records(
    titles: Sequence[str],
    rows: Sequence[Sequence[str]],
    width: int,
    style: Style,
) -> list[Styled]:
    """A line for each cell, and one between rows."""
    margin = max(map(cells, titles)) + 2
    lines: list[Styled] = []
    for row in rows:
        lines += [Styled("")] if lines else []
        for at, title in enumerate(titles):
            cell = row[at]
            if title.lower() not in WHOLE:
                cell = shortened(cell, max(width - margin, SHORTEST_CELL))
            lines.append(
                Styled(
                    styled(title, "bold")
                    + " " * (margin - cells(title))
                    + styled(cell, style(at, row[at]))
                )
            )
    return lines


def shortened(text: str, width: int) -> str:
    """Take out the middle of a text that has no room, so that a path keeps its
    file, and a call its argument."""
    if cells(text) <= width:
        return text
    tail = (width - 1) // 2
    while cells(text[len(text) - tail :]) > (width - 1) // 2:
        tail -= 1
    end = text[len(text) - tail :]
    head = width - 1 - cells(end)
    while cells(text[:head]) > width - 1 - cells(end):
        head -= 1
    return f"{text[:head]}…{end}"


def cells(text: str) -> int:
    """How many columns of a terminal a text takes."""
    if text.isascii():
        return len(text)
    return sum(
        0
        if unicodedata.combining(c)
        else 1 + (unicodedata.east_asian_width(c) in "WF")
        for c in text
    )
