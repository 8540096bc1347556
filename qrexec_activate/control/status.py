"""qrexec-activate status: the routes, and what is alive on them now."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import click

from ..errors import ActivateError, UsageProblem
from ..forward.outcome import format_bytes, format_seconds
from ..systemd.journalreader import Record, records
from ..systemd.units import open_manager
from .connections import Connection, Lookout, is_among
from .list import HEADER as LIST_HEADER
from .list import NO_ROUTES, entry_as_json, print_refusals
from .list import row as route_row
from .list import style as route_style
from .managers import ask
from .options import (
    complete_files,
    complete_routes,
    json_option,
    managers_option,
    wide_option,
)
from .policy import this_qube
from .select import select
from .survey import Entry, Survey, take_survey
from .table import (
    BAD,
    DOUBTFUL,
    GOOD,
    print_json,
    print_rows,
    printable,
    say,
    short_path,
    styled,
)
from .way import Hop, hops, picture, svg

__all__ = [
    "CONNECTION_HEADER",
    "HEADER",
    "Status",
    "command",
    "connection_rows",
    "connection_style",
    "daemon_lines",
    "look",
    "route_table",
    "style",
]

HEADER = (*LIST_HEADER[:3], "state", "open", "waiting", "last")
CONNECTION_HEADER = (
    "id",
    "age",
    "state",
    "peer",
    "listener",
    "target",
    "to qube",
    "from qube",
)
#: How far back the journal is searched for the last connection of each route,
#: in records.
LOOK_BACK = 500
INTERVAL = 2.0


@dataclass(slots=True)
class DaemonNow:
    """A daemon as systemd sees it, with what it says of itself."""

    unit: str
    rpc: str
    active: str
    pid: int | None
    status: str
    manager: str = "user"


@dataclass(slots=True)
class Status:
    """Everything that is shown."""

    surveys: list[Survey]
    entries: list[Entry]
    connections: list[Connection]
    daemons: list[DaemonNow]
    last: dict[tuple[str, str, str], Record] = field(default_factory=dict)
    #: Whether to say of each route whose it is.
    marked: bool = False
    #: What is not shown, in words.
    lost: str = ""

    def of(self, entry: Entry) -> list[Connection]:
        return [one for one in self.connections if is_among(one, [entry])]

    def counts(self, entry: Entry) -> tuple[int, int] | tuple[None, None]:
        """How many connections are open, and how many wait; None where this
        user may not see them."""
        if entry.manager == "system" and os.geteuid() != 0:
            return None, None
        mine = self.of(entry)
        is_open = sum(one.state == "open" for one in mine)
        return is_open, len(mine) - is_open

    def last_of(self, entry: Entry) -> Record | None:
        return self.last.get((entry.manager, entry.unit, entry.listener))


@click.command(
    "status",
    epilog="""\b
Examples:
    $ qrexec-activate status
    $ qrexec-activate status gitweb
    $ qrexec-activate status --watch
    $ qrexec-activate status --svg map.svg
""",
)
@click.argument(
    "routes", metavar="[ROUTE]...", nargs=-1, shell_complete=complete_routes
)
@click.option(
    "-w",
    "--watch",
    is_flag=True,
    help="Go on, on the whole screen, until q; / filters, arrows scroll.",
)
@click.option(
    "--interval",
    metavar="SECONDS",
    type=click.FloatRange(0.2),
    default=INTERVAL,
    show_default=True,
    help="For --watch.",
)
@click.option(
    "--svg",
    "drawing",
    metavar="FILE",
    shell_complete=complete_files,
    help="Draw the way of each route into this file, as SVG.",
)
@wide_option
@json_option
@managers_option
def command(
    routes: tuple[str, ...],
    watch: bool,
    interval: float,
    drawing: str | None,
    wide: bool,
    as_json: bool,
    which: str | None,
) -> None:
    """Show the routes and what is alive on them: open connections with age,
    peer and bytes, and those that wait.

    Of routes that are named, it shows the way of a connection, hop by hop: what
    works (✓), what does not (✗), and what is not known (?).

    A connection waits while dom0 asks a person, or the qube starts. Connections
    that outlived their daemon are shown, too. Bytes are known for TCP only.
    Routes of the system are marked; only root sees what is alive on them.
    """
    if watch and (as_json or drawing):
        raise UsageProblem("--watch excludes --json and --svg")
    if watch:
        from .watch import watch as go_on

        with contextlib.suppress(KeyboardInterrupt):
            go_on(routes, which, interval=interval)
        return
    status = look(routes, which, Lookout())
    if status.lost:
        say(status.lost[0].upper() + status.lost[1:], err=True)
    if drawing:
        with open(drawing, "w", encoding="utf-8") as file:
            file.write(svg(_ways(status)))
    if as_json:
        print_json(_as_json(status))
    elif not drawing:
        _print(status, wide, ways=bool(routes))


def look(routes: Sequence[str], which: str | None, lookout: Lookout) -> Status:
    """See to everything anew."""
    seen, lost = ask(which, _see, lambda one: bool(one[0].entries))
    surveys = [now for now, _ in seen]
    everything = [entry for now in surveys for entry in now.entries]
    entries = select(everything, routes)
    connections = [
        one
        for one in lookout.look(surveys)
        if not routes or is_among(one, entries)
    ]
    daemons = [
        one
        for _, daemons in seen
        for one in daemons
        if not routes
        or any(
            (entry.manager, entry.daemon) == (one.manager, one.unit)
            for entry in entries
        )
    ]
    last = {
        (now.manager, *route): record
        for now in surveys
        for route, record in _last_records(now).items()
    }
    marked = which is None and any(not now.user for now in surveys)
    return Status(surveys, entries, connections, daemons, last, marked, lost)


def _see(user: bool) -> tuple[Survey, list[DaemonNow]]:
    with open_manager(user=user) as manager:
        now = take_survey(manager)
        units = sorted(now.daemons)
        rows = manager.unit_properties(
            units, "Service", ["MainPID", "StatusText"]
        )
    return now, [
        DaemonNow(
            unit,
            now.daemons[unit].service,
            now.daemons[unit].active,
            row["MainPID"] or None,
            # systemd keeps what one that has ended said last.
            (row["MainPID"] and row["StatusText"]) or "",
            now.manager,
        )
        for unit, row in zip(units, rows, strict=True)
    ]


def _last_records(now: Survey) -> dict[tuple[str, str], Record]:
    """The last connection of each route that the journal knows of; no journal,
    no answer."""
    last: dict[tuple[str, str], Record] = {}
    if not now.entries:
        return last
    with (
        contextlib.suppress(ActivateError),
        records(
            user=now.user,
            control_group=now.control_group,
            daemons=now.daemons,
            latest_first=True,
        ) as found,
    ):
        for count, record in enumerate(found):
            if count >= LOOK_BACK:
                break
            if record.connection:
                last.setdefault(
                    (
                        record.fields.get("UNIT", ""),
                        record.fields.get("LISTENER", ""),
                    ),
                    record,
                )
    return last


# ----------------------------------------------------------------- for programs


def _as_json(status: Status) -> dict[str, Any]:
    """The shape that docs/json.md promises."""
    return {
        "daemons": [
            {
                "unit": one.unit,
                "manager": one.manager,
                "rpc": one.rpc,
                "active": one.active,
                "pid": one.pid,
                "status": one.status or None,
            }
            for one in status.daemons
        ],
        "routes": [_route_as_json(status, entry) for entry in status.entries],
        "connections": [
            {
                "id": one.id,
                "pid": one.pid,
                "began": round(one.began, 3),
                "age": round(one.age, 3),
                "state": one.state,
                "relay": one.relay,
                "listener": one.listener,
                "target": one.target,
                "call": one.call,
                "unit": one.unit,
                "manager": one.manager,
                "peer": one.peer,
                "peer_pid": one.peer_process.pid if one.peer_process else None,
                "peer_name": one.peer_process.name
                if one.peer_process
                else None,
                "bytes_to_qube": one.bytes_to_qube,
                "bytes_from_qube": one.bytes_from_qube,
            }
            for one in status.connections
        ],
    }


def _route_as_json(status: Status, entry: Entry) -> dict[str, Any]:
    is_open, waiting = status.counts(entry)
    return {
        **entry_as_json(entry),
        "open": is_open,
        "waiting": waiting,
        "last": _record_as_json(status.last_of(entry)),
    }


def _record_as_json(record: Record | None) -> dict[str, Any] | None:
    if record is None:
        return None
    code = record.fields.get("EXIT_CODE")
    return {
        "when": round(record.when, 3),
        "outcome": record.fields.get("OUTCOME"),
        "established": record.fields.get("ESTABLISHED") == "1",
        "exit_code": int(code) if code is not None else None,
        "failed": record.is_warning,
        "message": record.message,
    }


# ------------------------------------------------------------------- for people


def route_table(
    status: Status, entries: Sequence[Entry] | None = None
) -> tuple[tuple[str, ...], list[list[str]]]:
    """Header and rows, of all routes or of some."""
    rows = []
    given = any(entry.key for entry in status.entries)
    for entry in status.entries if entries is None else entries:
        listener, target, call, _, state, _ = route_row(entry)
        counts = ["?" if n is None else str(n) for n in status.counts(entry)]
        rows.append(
            [
                listener,
                target,
                call,
                state,
                *counts,
                _last_words(status, entry),
                *([entry.manager] if status.marked else []),
                *(["dom0" if entry.key else "here"] if given else []),
            ]
        )
    marks = [("manager", status.marked), ("from", given)]
    return (*HEADER, *(name for name, shown in marks if shown)), rows


def _last_words(status: Status, entry: Entry) -> str:
    record = status.last_of(entry)
    if record is None:
        return "-"
    return (
        f"{'failed' if record.is_warning else 'ended'}"
        f" {_age(max(time.time() - record.when, 0))} ago"
    )


def connection_rows(connections: Sequence[Connection]) -> list[list[str]]:
    return [
        [
            one.id,
            _age(one.age),
            one.state,
            f"{one.peer_process}" if one.peer_process else one.peer,
            short_path(one.listener),
            one.target,
            "?"
            if one.bytes_to_qube is None
            else format_bytes(one.bytes_to_qube),
            "?"
            if one.bytes_from_qube is None
            else format_bytes(one.bytes_from_qube),
        ]
        for one in connections
    ]


def _age(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 60 else format_seconds(seconds)


def style(column: int, text: str) -> str:
    if column == 6 and text.startswith("failed"):
        return BAD
    return route_style(4, text) if column == 3 else ""


def connection_style(column: int, text: str) -> str:
    return (
        {"open": GOOD, "waiting": DOUBTFUL}.get(text, "") if column == 2 else ""
    )


def daemon_lines(status: Status) -> list[str]:
    lines = []
    for one in status.daemons:
        state = f"running, pid {one.pid}" if one.pid else one.active
        whose = f" ({one.manager})" if status.marked else ""
        lines.append(
            f"{one.unit}{whose}:"
            f" {state}{': ' + printable(one.status) if one.status else ''}"
        )
    return lines


def _ways(status: Status) -> list[list[Hop]]:
    qube = this_qube()
    states = {
        (now.manager, name): daemon.active
        for now in status.surveys
        for name, daemon in now.daemons.items()
    }
    return [
        hops(
            entry,
            status.of(entry),
            states[entry.manager, entry.daemon],
            status.last_of(entry),
            qube,
            seen=status.counts(entry) != (None, None),
        )
        for entry in status.entries
    ]


def _print_ways(status: Status) -> None:
    width = shutil.get_terminal_size().columns
    for entry, way in zip(status.entries, _ways(status), strict=True):
        whose = f" ({entry.manager})" if status.marked else ""
        if entry.key:
            whose += f", from dom0 by vm-config.{entry.key}"
        title = f"{entry.listener} → {entry.target or 'no target'}{whose}"
        say(styled(title, "bold"))
        for line in picture(way, width):
            say(line)
        say()


def _print(status: Status, wide: bool, ways: bool) -> None:
    if not status.entries and not status.connections:
        click.echo(NO_ROUTES, err=True)
        return
    if ways:
        _print_ways(status)
    else:
        print_rows(*route_table(status), style, wide=wide)
        click.echo()
    if status.connections:
        print_rows(
            CONNECTION_HEADER,
            connection_rows(status.connections),
            connection_style,
            wide=wide,
        )
    else:
        click.echo("No connection is open.")
    click.echo()
    for line in daemon_lines(status):
        say(line)
    print_refusals(status.entries)
