"""qrexec-activate disconnect: end connections that are open."""

from __future__ import annotations

import click

from ..errors import ActivateError, UsageProblem
from .connections import end, open_connections
from .options import complete_routes, dry_run_option, system_option
from .survey import survey
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
    chosen = [
        one
        for one in connections
        if everything or any(one.matches(word) for word in words)
    ]
    if everything and not chosen:
        say("No connection is open", err=True)
    for word in words:
        if not any(one.matches(word) for one in connections):
            known = any(entry.matches(word) for entry in now.entries)
            what = (
                "has no open connection"
                if known
                else "is neither an open connection nor a route"
            )
            raise UsageProblem(
                f"{word!r} {what}; qrexec-activate status shows all"
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
