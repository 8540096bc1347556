"""qrexec-activate logs: the journal of the daemons, one line per connection."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import PurePath
from typing import Any

import click

from ..errors import BadName, ManagerError, UsageProblem
from ..systemd.journalreader import (
    Record,
    control_groups_of,
    records,
    unit_records,
)
from .daemons import declared_daemon
from .options import complete_routes, system_option
from .publications import managers, published, services_of
from .select import means
from .survey import Survey, survey
from .table import BAD, DOUBTFUL, QUIET
from .terminal import print_json, say, styled

__all__ = ["command", "record_as_json"]


def record_as_json(record: Record) -> dict[str, Any]:
    """The shape that docs/json.md promises."""

    def text(name: str) -> str | None:
        return record.fields.get(name)

    def number(name: str) -> int | None:
        with contextlib.suppress(KeyError, ValueError):
            return int(record.fields[name])
        return None

    def seconds(name: str) -> float | None:
        count = number(name)
        return None if count is None else count / 1e6

    return {
        "when": round(record.when, 3),
        "daemon": record.unit or None,
        "id": text("CONNECTION_ID"),
        "listener": text("LISTENER"),
        "target": text("QREXEC_TARGET"),
        "call": text("QREXEC_SERVICE"),
        "unit": text("UNIT"),
        "peer": text("PEER"),
        "outcome": text("OUTCOME"),
        "established": text("ESTABLISHED") == "1"
        if record.connection
        else None,
        "exit_code": number("EXIT_CODE"),
        "tries": number("TRIES"),
        "setup": seconds("SETUP_USEC"),
        "duration": seconds("DURATION_USEC"),
        "bytes_to_qube": number("BYTES_TO_QUBE"),
        "bytes_from_qube": number("BYTES_FROM_QUBE"),
        "failed": record.is_warning,
        "message": record.message,
    }


@click.command(
    "logs",
    epilog="""\b
Examples:
    $ qrexec-activate logs gitweb
    $ qrexec-activate logs -f
    $ qrexec-activate logs --since "1 hour ago" 127.0.0.1:1234
""",
)
@click.argument(
    "routes",
    metavar="[ROUTE|ID|NAME]...",
    nargs=-1,
    shell_complete=complete_routes,
)
@click.option(
    "-f", "--follow", is_flag=True, help="Go on, and show what comes."
)
@click.option(
    "-n",
    "--lines",
    metavar="N",
    type=click.IntRange(0),
    default=50,
    show_default=True,
    help="How many.",
)
@click.option(
    "--since",
    metavar="TIME",
    help="The oldest to show, as journalctl takes it: 10:30, yesterday, -1h.",
)
@click.option(
    "--until", metavar="TIME", help="The newest to show, written likewise."
)
@click.option(
    "--everything",
    is_flag=True,
    help="Also what the daemons say when they start, serve and stop.",
)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print JSON, an object a line, as docs/json.md describes.",
)
@system_option
def command(
    routes: tuple[str, ...],
    follow: bool,
    lines: int,
    since: str | None,
    until: str | None,
    everything: bool,
    as_json: bool,
    system: bool,
) -> None:
    """Show the journal of all routes or of some: one line per connection that
    has ended, and all warnings.

    ROUTE is an address, a unit, a label, a target, a call, an argument or a
    file, also of a route that is no more; ID is that of a connection. In a
    service qube, NAME is one that is published: all that its program writes,
    and what systemd says of it.
    """
    if follow and until:
        raise UsageProblem("--follow and --until exclude each other")
    now = _survey(user=not system)
    routes = tuple(_unit_of_gone(word, now) or word for word in routes)
    meant = {word: _meant(word, now) for word in routes}

    def is_by(record: Record, word: str) -> bool:
        return (
            record.matches(word)
            or (record.fields.get("UNIT"), record.fields.get("LISTENER"))
            in meant[word]
        )

    def is_wanted(record: Record) -> bool:
        if routes and not any(is_by(record, word) for word in routes):
            return False
        return everything or bool(record.connection) or record.is_warning

    show = _show_json if as_json else _show
    newest = None
    # Words that nothing is known by, so far.
    unknown = [word for word in routes if not meant[word]]
    read: Callable[..., AbstractContextManager[Iterator[Record]]]
    if unknown and (programs := _published(unknown, system=system)):
        if len(unknown) < len(routes):
            raise UsageProblem(
                f"{unknown[0]} is published here, and the others are routes:"
                f" ask for them one by one"
            )
        read, unknown, everything, routes = programs, [], True, ()
    else:
        read = partial(
            records,
            user=not system,
            control_group=now.control_group if now else "",
            daemons=_daemons(now) if now else None,
        )
    with read(since=since, until=until, latest_first=True) as found:
        shown: list[Record] = []
        for record in found:
            newest = newest or record.cursor
            unknown = [word for word in unknown if not is_by(record, word)]
            if len(shown) < lines and is_wanted(record):
                shown.append(record)
            if len(shown) >= lines and not unknown:
                break
    if unknown:
        raise UsageProblem(
            f"{unknown[0]!r} is no route, and nothing in the log is of it;"
            f" qrexec-activate list shows all routes"
        )
    for record in reversed(shown):
        show(record)
    if not shown and lines and not follow:
        say("The journal has nothing of that", err=True)
    if follow:
        # Ctrl-C is how one ends it.
        with (
            contextlib.suppress(KeyboardInterrupt),
            read(follow=True, after=newest) as found,
        ):
            for record in filter(is_wanted, found):
                show(record)


def _published(
    words: list[str], *, system: bool
) -> Callable[..., AbstractContextManager[Iterator[Record]]] | None:
    """What reads the log of the programs that are published by these names, all
    of one manager; None where none of them is. Raises UsageProblem for one
    that has no unit."""
    with contextlib.suppress(ManagerError), managers() as found:
        for manager in found:
            if system and manager.user:
                continue
            there = {one.name: one for one in published(manager)}
            if not there.keys() & set(words):
                continue
            for word in words:
                if word not in there:
                    raise UsageProblem(
                        f"{word!r} is not published like {words[0]}; ask for"
                        f" them one by one"
                    )
                if not there[word].unit:
                    raise UsageProblem(
                        f"{word} leads to {there[word].socket}, which no unit"
                        f" makes: its program has a log of its own"
                    )
            sockets = [there[word].unit for word in words]
            services = [
                service
                for socket in sockets
                for service in services_of(manager, socket)
            ]
            groups = control_groups_of(manager, [*sockets, *services])
            return partial(unit_records, groups, user=manager.user)
    return None


def _survey(*, user: bool) -> Survey | None:
    """None where systemd does not answer, which is when one wants the log all
    the more."""
    with contextlib.suppress(ManagerError):
        return survey(user=user)
    return None


def _daemons(now: Survey) -> set[str]:
    """The daemons that there are, and those that the templates would start:
    systemd forgets a service with its last route."""
    found = set(now.daemons)
    for unit in now.files.fragments:
        if unit.endswith("@.socket"):
            with contextlib.suppress(BadName):
                daemon = declared_daemon(unit, now.files)
                found |= {daemon.unit} if daemon else set()
    return found


def _meant(word: str, now: Survey | None) -> set[tuple[str, str]]:
    """Unit and listener of each route that a word means."""
    return {
        (entry.unit, entry.listener)
        for entry in (now.entries if now else ())
        if means(word, entry)
    }


def _unit_of_gone(word: str, now: Survey | None) -> str:
    """The unit that a file of no route lay with, as the log knows no files;
    empty where the word is none."""
    folder = PurePath(word).parent.name
    is_unit = folder.endswith(".socket.d") and "@." not in folder
    return folder[:-2] if is_unit and not _meant(word, now) else ""


def _show_json(record: Record) -> None:
    print_json(record_as_json(record), indent=None)


def _show(record: Record) -> None:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.when))
    style = (
        BAD if record.priority < 4 else DOUBTFUL if record.is_warning else ""
    )
    say(styled(when, QUIET), " ", styled(record.message, style))
