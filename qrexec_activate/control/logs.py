"""qrexec-activate logs: the journal of the daemons, one line per connection."""

from __future__ import annotations

import contextlib
import time

import click

from ..errors import ManagerError
from ..systemd.journalreader import Record, records
from ..systemd.manager import open_manager
from .options import complete_routes, system_option
from .table import BAD, DOUBTFUL, QUIET, printable, styled

__all__ = ["command"]


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
    "routes", metavar="[ROUTE|ID]...", nargs=-1, shell_complete=complete_routes
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
    "--everything",
    is_flag=True,
    help="Also what the daemons say when they start, serve and stop.",
)
@system_option
def command(
    routes: tuple[str, ...],
    follow: bool,
    lines: int,
    since: str | None,
    everything: bool,
    system: bool,
) -> None:
    """Show the journal of all routes or of some: one line per connection that
    has ended, and all warnings.

    ROUTE is an address, a unit, a target or a call, also of a route that is no
    more; ID is that of a connection.
    """

    def is_wanted(record: Record) -> bool:
        if routes and not any(record.matches(word) for word in routes):
            return False
        return everything or bool(record.connection) or record.is_warning

    newest = None
    group = _control_group(user=not system)
    with records(
        user=not system, control_group=group, since=since, latest_first=True
    ) as found:
        shown: list[Record] = []
        for record in found:
            newest = newest or record.cursor
            if len(shown) >= lines:
                break
            if is_wanted(record):
                shown.append(record)
    for record in reversed(shown):
        _show(record)
    if follow:
        with records(
            user=not system, control_group=group, follow=True, after=newest
        ) as found:
            for record in filter(is_wanted, found):
                _show(record)


def _control_group(*, user: bool) -> str:
    """That of the manager; empty where it does not answer, which is when one
    wants the log all the more."""
    with contextlib.suppress(ManagerError), open_manager(user=user) as manager:
        (group,) = manager.manager_properties("ControlGroup")
        return str(group or "")
    return ""


def _show(record: Record) -> None:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.when))
    style = (
        BAD if record.priority < 4 else DOUBTFUL if record.is_warning else ""
    )
    click.echo(
        f"{styled(when, QUIET)} {styled(printable(record.message), style)}"
    )
