"""qrexec-activate policy: the lines that dom0 needs for the routes."""

from __future__ import annotations

import os
from collections.abc import Iterable

import click

from ..errors import BadName
from ..routing.names import check_target
from .options import complete_routes, system_option
from .persistence import qubesdb
from .select import select
from .survey import Entry, survey

__all__ = ["FILE", "command", "policy_line", "this_qube"]

#: Where a person's own rules go: files are read in order, and 90-default.policy
#: comes late enough.
FILE = "/etc/qubes/policy.d/30-user.policy"
#: What stands for a name that is not known here, and must be put in by the
#: reader. No qube can have it.
THIS_QUBE = "THIS-QUBE"
TARGET_QUBE = "TARGET-QUBE"


def this_qube() -> str:
    """This qube's name, or THIS-QUBE where it cannot be told."""
    try:
        return check_target(qubesdb("/name"))
    except BadName:
        return THIS_QUBE


def policy_line(
    service: str,
    argument: str,
    source: str,
    target: str,
    action: str = "ask",
    redirect: str | None = None,
) -> list[str]:
    """One rule of the 5.0 format, in its columns.

    An explicit target never matches a line for @default, so the line names what
    the call names. For @default, dom0 chooses the qube: `target=` where the
    call is allowed, `default_target=` where a person is asked.
    """
    words = [
        service,
        f"+{argument}",
        source,
        "@adminvm" if target == "dom0" else target,
        action,
    ]
    if target == "@default":
        if action == "allow":
            words.append(f"target={redirect or TARGET_QUBE}")
        elif redirect:
            words.append(f"default_target={redirect}")
    elif (
        action == "ask"
        and target != "@dispvm"
        and not target.startswith("@dispvm:")
    ):
        words.append(f"default_target={words[3]}")
    return words


def policy_lines(
    entries: Iterable[Entry], source: str, action: str, redirect: str | None
) -> list[str]:
    """The rules for routes, each once, in columns."""
    rules = {
        tuple(
            policy_line(
                entry.service,
                entry.argument,
                source,
                entry.target,
                action,
                redirect,
            )
        ): None
        for entry in entries
        if entry.target
    }
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
        for rule in sorted(rules)
    ]


@click.command(
    "policy",
    epilog="""\b
Example:
    $ qrexec-activate policy --allow
    # dom0: /etc/qubes/policy.d/30-user.policy
    qubes.ConnectTCP +1234 work gitweb allow
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
    """Print the policy that dom0 needs for all routes, or for some, and where
    to put it.

    Nothing is changed, here or in dom0: copy the lines by hand. A line with an
    explicit target does not serve calls to @default, nor the other way round,
    so each line is as its route needs it.
    """
    if default_target is not None:
        check_target(default_target)
    entries = select(survey(user=not system).entries, routes)
    source = this_qube()
    lines = policy_lines(
        entries, source, "ask" if asks else "allow", default_target
    )
    if not lines:
        click.echo(
            "There are no routes that reach a qube, so dom0 needs no policy.",
            err=True,
        )
        return
    click.echo(f"# dom0: {FILE}")
    text = os.linesep.join(lines)
    if source == THIS_QUBE:
        click.echo(f"# {THIS_QUBE} stands for the name of this qube.")
    if TARGET_QUBE in text:
        click.echo(
            f"# {TARGET_QUBE} stands for the qube that dom0 is to choose;"
            f" --default-target names it."
        )
    click.echo(text)
