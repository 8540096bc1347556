"""qrexec-activate disconnect: end connections that are open."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import click

from ..errors import ActivateError, ManagerError, UsageProblem
from .connections import Connection, end, is_among, open_connections
from .options import complete_routes, dry_run_option, system_option
from .select import means, of_other
from .survey import Entry, Survey, survey
from .terminal import say

__all__ = ["command"]


@click.command(
    "disconnect",
    epilog="""\b
Examples:
    $ qrexec-activate disconnect 3dac-2
    $ qrexec-activate disconnect gitweb
    $ qrexec-activate disconnect --all
""",
)
@click.argument(
    "words",
    metavar="[ID|ROUTE]...",
    nargs=-1,
    shell_complete=complete_routes,
)
@click.option(
    "--all", "everything", is_flag=True, help="End all that are open."
)
@dry_run_option
@system_option
def command(
    words: tuple[str, ...], everything: bool, dry_run: bool, system: bool
) -> None:
    """End open connections: one by its ID, as status shows it, or all of a
    route, unit, target or call.

    The route stays, and takes new connections.
    """
    if bool(words) is everything:
        raise UsageProblem("name an ID or a ROUTE, or else say --all")
    now = survey(user=not system)
    connections = open_connections(now)
    chosen = connections if everything else []
    for word in words:
        found = _meant(word, connections, now.entries)
        if not found:
            raise UsageProblem(f"{word!r} {_why_none(word, now)}")
        chosen += [one for one in found if one not in chosen]
    if everything and not chosen:
        whose = "the system's" if system else "your own"
        hint = f"; what else is open is {of_other(now.user)}"
        other = _other(now)
        say(
            f"No connection of {whose} is open"
            f"{hint if other and other.entries else ''}",
            err=True,
        )
    if dry_run:
        for connection in chosen:
            say(f"Would end {connection}")
        return
    left = end(chosen)
    for connection in chosen:
        if connection not in left:
            say(f"Ended {connection}")
    if left:
        raise ActivateError(
            f"{left[0]} goes on: pid {left[0].pid} does not end; see what it"
            f" waits for"
        )


def _meant(
    word: str, connections: Sequence[Connection], entries: Sequence[Entry]
) -> list[Connection]:
    """Those that a person who writes this word may mean: by what they are
    themselves, also where their route is no more, or by their route."""
    routes = [entry for entry in entries if means(word, entry)]
    return [
        one for one in connections if one.matches(word) or is_among(one, routes)
    ]


def _why_none(word: str, now: Survey) -> str:
    """What is to be said of a word that means no open connection."""
    if any(means(word, entry) for entry in now.entries):
        return "has no open connection; qrexec-activate status shows all"
    other = _other(now)
    if other and (
        any(means(word, entry) for entry in other.entries)
        or _meant(word, open_connections(other), ())
    ):
        return f"is {of_other(now.user)}"
    return (
        "is neither an open connection nor a route; qrexec-activate status"
        " shows all"
    )


def _other(now: Survey) -> Survey | None:
    """What the other manager has, if it answers."""
    with suppress(ManagerError):
        return survey(user=not now.user)
    return None
