"""qrexec-activate published: what this qube offers by qubes.ConnectUnix, and whether it is alive."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ..manager import open_manager
from .options import debug_option, json_option
from .publications import published
from .table import BAD, GOOD, print_json, print_rows, short_path

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

__all__ = ["command", "complete_names"]

HEADER = ("name", "state", "socket", "made by")


def complete_names(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Offer the names that are published."""
    from click.shell_completion import CompletionItem

    try:
        with open_manager(user=True) as manager:
            names = [one.name for one in published(manager)]
    except Exception:
        return []
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def style(column: int, text: str) -> str:
    return {"alive": GOOD, "dead": BAD}.get(text, "") if column == 1 else ""


@click.command(
    "published",
    epilog="""\b
Example:
    $ qrexec-activate published
    NAME           STATE  SOCKET                                 MADE BY
    gpg-agent-ssh  alive  /run/user/1000/gnupg/S.gpg-agent.ssh  gpg-agent-ssh.socket
""",
)
@json_option
@debug_option
def command(as_json: bool) -> None:
    """In a service qube, list the names that other qubes can call by qubes.ConnectUnix, and whether they are alive."""
    with open_manager(user=True) as manager:
        found = published(manager)
    if as_json:
        print_json(
            [
                {
                    "name": one.name,
                    "link": one.link,
                    "socket": one.socket or None,
                    "unit": one.unit or None,
                    "file": one.file or None,
                    "alive": one.alive,
                    "problem": one.problem or None,
                }
                for one in found
            ]
        )
        return
    if not found:
        click.echo("Nothing is published. Publish a socket: qrexec-activate publish NAME --unit NAME.socket", err=True)
        return
    rows = [
        [one.name, "alive" if one.alive else "dead", short_path(one.socket) or "-", one.unit or "by hand"]
        for one in found
    ]
    print_rows(HEADER, rows, style)
    for one in found:
        if one.problem:
            click.echo(f"{one.name}: {one.problem}")
