"""qrexec-activate list: every route, whoever wrote it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from .options import (
    complete_routes,
    json_option,
    managers_option,
    wide_option,
)
from .select import select
from .survey import Entry, all_entries
from .table import (
    BAD,
    DOUBTFUL,
    GOOD,
    print_json,
    print_rows,
    printable,
    say,
    short_path,
    with_short_paths,
)

__all__ = [
    "HEADER",
    "NO_ROUTES",
    "command",
    "entry_as_json",
    "print_refusals",
    "row",
    "style",
    "table",
]

HEADER = ("listener", "target", "service", "enabled", "state", "file")
NO_ROUTES = (
    "There are no routes yet. Make one: qrexec-activate add tcp 1234 QUBE"
)


def entry_as_json(entry: Entry) -> dict[str, Any]:
    """The shape that docs/json.md promises."""
    return {
        "listener": entry.listener,
        "target": entry.target,
        "call": entry.call,
        "rpc": entry.service,
        "argument": entry.argument,
        "label": entry.label or None,
        "unit": entry.unit,
        "daemon": entry.daemon,
        "manager": entry.manager,
        "file": entry.file or None,
        "origin": "dom0" if entry.key else "here",
        "enabled": entry.enabled,
        "active": entry.active,
        "listens": entry.listens,
        "refused": entry.refused or None,
    }


def row(entry: Entry) -> list[str]:
    where = short_path(entry.file) if entry.file else entry.unit
    if entry.key:
        where = f"dom0: vm-config.{entry.key}"
    return [
        short_path(entry.listener),
        entry.target or "-",
        entry.call,
        entry.enabled,
        entry.state,
        where,
    ]


def table(
    entries: Sequence[Entry], *, marked: bool
) -> tuple[tuple[str, ...], list[list[str]]]:
    """Header and rows; `marked` with whose each route is."""
    rows = [row(entry) for entry in entries]
    if not marked:
        return HEADER, rows
    return (*HEADER[:-1], "manager", HEADER[-1]), [
        [*cells[:-1], entry.manager, cells[-1]]
        for cells, entry in zip(rows, entries, strict=True)
    ]


def style(column: int, text: str) -> str:
    return (
        {
            "refused": BAD,
            "failed": BAD,
            "masked": BAD,
            "not loadable": BAD,
            "listening": GOOD,
            "enabled": GOOD,
            "not started": DOUBTFUL,
            "restart needed": DOUBTFUL,
            "not readable": DOUBTFUL,
            "disabled": DOUBTFUL,
        }.get(text, "")
        if column in (3, 4)
        else ""
    )


def print_refusals(entries: list[Entry]) -> None:
    """Say below the table why routes are refused: reasons are too long for a
    column."""
    refused = [entry for entry in entries if entry.refused]
    if refused:
        click.echo()
    for entry in refused:
        click.echo(
            with_short_paths(
                printable(f"{entry.listener} is refused: {entry.refused}")
            )
        )


@click.command(
    "list",
    epilog="""\b
Example:
    $ qrexec-activate list
    LISTENER        TARGET  SERVICE                ENABLED  STATE      FILE
    127.0.0.1:1234  gitweb  qubes.ConnectTCP+1234  enabled  listening  ~/.con…
""",
)
@click.argument(
    "routes", metavar="[ROUTE]...", nargs=-1, shell_complete=complete_routes
)
@wide_option
@json_option
@managers_option
def command(
    routes: tuple[str, ...], wide: bool, as_json: bool, which: str | None
) -> None:
    """List every route: listener, target, service, file, and whether it is
    enabled, listening or refused.

    ROUTE is an address, a unit, a label, a target, a call or a file; without
    one, all are listed. Routes that were written by hand, or by other
    programs, are listed too; your own, and the system's, marked as such.
    """
    entries, lost = all_entries(which)
    if lost:
        say(lost[0].upper() + lost[1:], err=True)
    entries = select(entries, routes)
    if as_json:
        print_json([entry_as_json(entry) for entry in entries])
    elif entries:
        marked = which is None and any(e.manager == "system" for e in entries)
        print_rows(*table(entries, marked=marked), style, wide=wide)
        print_refusals(entries)
    else:
        click.echo(NO_ROUTES, err=True)
