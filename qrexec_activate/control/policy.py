"""qrexec-activate policy: the lines that dom0 needs for the routes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence

import click

from ..errors import ActivateError, BadName
from ..routing.names import check_target
from .options import complete_routes, system_option
from .persistence import qubesdb
from .rule import TARGET_QUBE, policy_line
from .select import select
from .survey import Entry, survey

__all__ = [
    "FILE",
    "command",
    "file_name",
    "policy_file",
    "policy_lines",
    "this_qube",
]

#: Where a person's own rules go: files are read in order, and 90-default.policy
#: comes late enough.
FILE = "/etc/qubes/policy.d/30-user.policy"
#: What stands for this qube's name where it is not known. No qube can have it.
THIS_QUBE = "THIS-QUBE"


def this_qube() -> str:
    """This qube's name, or THIS-QUBE where it cannot be told."""
    try:
        return check_target(qubesdb("/name"))
    except BadName:
        return THIS_QUBE


def file_name(qube: str) -> str:
    """The name, without its suffix, of the file for what a qube calls.

    A qube may have capitals, but a file of policy that has some ends all calls
    of all qubes: `invalid filename`, says qrexec 4.4.2.
    """
    return f"30-qrexec-activate-{qube.lower()}"


def policy_lines(
    entries: Iterable[Entry], source: str, action: str, redirect: str | None
) -> list[str]:
    """The rules for routes, each once, in columns."""
    return _in_columns(_rules(entries, source, action, redirect))


def policy_file(
    entries: Sequence[Entry],
    known: Iterable[Entry],
    source: str,
    action: str,
    redirect: str | None,
) -> list[str]:
    """The lines of a whole file for these routes, of those that are known.

    What they call is denied to every other target, by the last lines: a
    misspelt qube, which dom0 takes for @default, is then not let through by a
    file that is read later. Not so where a route that is not among these makes
    the same call to another qube.
    """
    rules = _rules(entries, source, action, redirect)
    listed = {(rule[0], rule[1], rule[3]) for rule in rules}
    others = {
        (rule[0], rule[1])
        for rule in _rules(known, source, action, redirect)
        if (rule[0], rule[1], rule[3]) not in listed
    }
    denied = {
        (service, argument, source, "@anyvm", "deny"): None
        for service, argument, _ in sorted(listed)
        if (service, argument) not in others
    }
    return _in_columns([*rules, *denied])


def _rules(
    entries: Iterable[Entry], source: str, action: str, redirect: str | None
) -> list[tuple[str, ...]]:
    return sorted(
        {
            tuple(
                policy_line(
                    entry.service,
                    entry.argument,
                    source,
                    entry.target,
                    action,
                    redirect,
                )
            )
            for entry in entries
            if entry.target
        }
    )


def _in_columns(rules: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [
        max((len(rule[column]) for rule in rules), default=0)
        for column in range(5)
    ]
    return [
        " ".join(
            [
                *(
                    word.ljust(width)
                    for word, width in zip(rule[:5], widths, strict=True)
                ),
                *rule[5:],
            ]
        ).rstrip()
        for rule in rules
    ]


def _entries_of(*, user: bool) -> list[Entry]:
    """The routes of the other systemd, where it answers."""
    with contextlib.suppress(ActivateError):
        return survey(user=user).entries
    return []


@click.command(
    "policy",
    epilog="""\b
Example:
    $ qrexec-activate policy --allow
    # dom0: all of /etc/qubes/policy.d/30-qrexec-activate-work.policy, …
    qubes.ConnectTCP +1234 work gitweb  allow
    qubes.ConnectTCP +1234 work @anyvm  deny
""",
)
@click.argument(
    "routes", metavar="[ROUTE]...", nargs=-1, shell_complete=complete_routes
)
@click.option(
    "--ask/--allow",
    "asks",
    default=True,
    help="Let dom0 ask each time, or not at all.  [default: ask]",
)
@click.option(
    "--default-target",
    metavar="QUBE",
    help="The qube that dom0 is to choose for @default.",
)
@system_option
def command(
    routes: tuple[str, ...],
    asks: bool,
    default_target: str | None,
    system: bool,
) -> None:
    """Print a file of policy for all routes, the system's too, or for some, and
    how to open it in dom0.

    Nothing is changed, here or in dom0: copy the lines by hand. A line with an
    explicit target does not serve calls to @default, nor the other way round,
    so each line is as its route needs it. The last lines deny the same calls
    to every other qube, unless a route that is not among these makes one.
    """
    if default_target is not None:
        check_target(default_target)
    entries = survey(user=not system).entries
    known = [*entries, *_entries_of(user=system)]
    chosen = select(entries if system else known, routes)
    source = this_qube()
    lines = policy_file(
        chosen,
        known,
        source,
        "ask" if asks else "allow",
        default_target,
    )
    if not lines:
        click.echo(
            "There are no routes that reach a qube, so dom0 needs no policy.",
            err=True,
        )
        return
    name = file_name(source)
    path = f"/etc/qubes/policy.d/{name}.policy"
    click.echo(
        f"# dom0: all of {path}, opened by"
        if len(chosen) == len(known)
        else f"# dom0: for {path}, above what is denied there; opened by"
    )
    click.echo(f"#     qubes-policy-editor {name}")
    click.echo("# or, before qrexec 4.2.10, by any editor as root.")
    if source == THIS_QUBE:
        click.echo(f"# {THIS_QUBE} stands for the name of this qube.")
    text = os.linesep.join(lines)
    if TARGET_QUBE in text:
        click.echo(
            f"# {TARGET_QUBE} stands for the qube that dom0 is to choose;"
            f" --default-target names it."
        )
    for entry in chosen:
        if entry.key:
            click.echo(
                f"# {entry.listener}, to {entry.target}, is from dom0"
                f" (vm-config.{entry.key}), which may have its line already."
            )
    click.echo(text)
