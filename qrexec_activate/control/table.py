"""Rows for a person or for a program: tables and colour on a terminal, plain
columns in a pipe, JSON on request."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import click

from ..printable import printable
from .terminal import print_json, raw_stdout, say, styled, wants_colour

__all__ = [
    "BAD",
    "DOUBTFUL",
    "GOOD",
    "QUIET",
    "print_json",
    "print_rows",
    "printable",
    "raw_stdout",
    "say",
    "short_path",
    "styled",
    "wants_colour",
    "with_short_paths",
]

#: Styles by meaning, as rich and click.style() both know them.
GOOD, DOUBTFUL, BAD, QUIET = "green", "yellow", "red", "bright_black"

#: rich takes about 1 ms a row to lay out a table; past so many rows nobody
#: looks at it as a table.
LONGEST_TABLE = 400


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
    style: Callable[[int, str], str] = lambda column, text: "",
) -> None:
    """Print a table; `style` says how a cell looks, from its column and its
    text."""
    clean = [[printable(cell) for cell in row] for row in rows]
    if sys.stdout.isatty() and len(clean) <= LONGEST_TABLE:
        from rich.console import Console

        Console(file=raw_stdout(), highlight=False).print(
            rich_table(header, clean, style)
        )
    else:
        click.echo("\n".join(plain_lines(header, clean)))


def plain_lines(
    header: Sequence[str], rows: Sequence[Sequence[str]]
) -> list[str]:
    """Lay rows out in columns, two blanks apart."""
    lines = [[cell.upper() for cell in header], *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) for cell, width in zip(row, widths, strict=True)
        ).rstrip()
        for row in lines
    ]


def rich_table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    style: Callable[[int, str], str],
) -> Any:
    """Lay rows out as a rich table."""
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold"
    )
    for title in header:
        # Where the terminal is too narrow, the last column goes on below: names
        # and addresses stay whole.
        table.add_column(
            title.upper(), no_wrap=title != header[-1], overflow="fold"
        )
    for row in rows:
        table.add_row(
            *(
                Text(printable(cell), style=style(column, cell))
                for column, cell in enumerate(row)
            )
        )
    return table
