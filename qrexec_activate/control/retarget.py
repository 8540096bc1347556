"""qrexec-activate retarget: another qube for a route, its address staying open
all the while."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import click

from ..errors import ActivateError, UsageProblem
from ..given.escapes import escape_target
from ..routing.address import address_key
from ..routing.claim import Route
from ..routing.names import check_target
from ..routing.unitfile import assignments
from ..systemd.systemctl import Systemctl
from ..systemd.unitdirs import own_folder
from ..systemd.units import open_manager
from .dom0 import refuse
from .dropins import locked, with_lines
from .edit import checked, foreseen, use
from .options import (
    complete_routes,
    complete_targets,
    dry_run_option,
    system_option,
)
from .policy import FILE as POLICY_FILE
from .policy import policy_lines, this_qube
from .select import the_routes
from .survey import Entry, Survey, read_file, take_survey

__all__ = ["command"]


@click.command(
    "retarget",
    epilog="""\b
Examples:
    $ qrexec-activate retarget 127.0.0.1:1234 work
    $ qrexec-activate retarget gitweb git2 --all
""",
)
@click.argument("route", shell_complete=complete_routes)
@click.argument("target", shell_complete=complete_targets)
@click.option(
    "--all",
    "all_of_them",
    is_flag=True,
    help="Take every route that ROUTE may mean.",
)
@dry_run_option
@system_option
def command(
    route: str, target: str, all_of_them: bool, dry_run: bool, system: bool
) -> None:
    """Let a route reach the qube TARGET instead. The address stays open, and
    connections that are open go on to the qube that they reached.

    ROUTE is an address, a unit, a label, a target, a call or a file. Who waits
    there at this moment, not yet accepted, reaches the new qube.
    """
    check_target(target)
    user = not system
    folder = own_folder(user=user)
    # Where no systemd answers, as it does not by sudo, nothing is made.
    with open_manager(user=user):
        pass
    with contextlib.nullcontext() if dry_run else locked(folder):
        with open_manager(user=user) as manager:
            now = take_survey(manager)
        meant = the_routes(now, [route], all_of_them)
        refuse(meant)
        units: dict[str, dict[str, str]] = {}
        for entry in meant:
            if entry.target == target:
                click.echo(
                    f"{entry.listener} reaches {target} already", err=True
                )
            else:
                texts = units.setdefault(entry.unit, {})
                texts[entry.file] = _text(entry, target, folder)
        for unit, texts in units.items():
            _check(now, unit, texts, meant, target)
        use(now, Systemctl(user), units, dry_run)
    if dry_run:
        return
    click.echo(f"In dom0, {POLICY_FILE} needs:")
    for line in policy_lines(
        [replace(entry, target=target) for entry in meant],
        this_qube(),
        "ask",
        None,
    ):
        click.echo(f"    {line}")


def _text(entry: Entry, target: str, folder: Path) -> str:
    """The file of a route with another name in it; raises ActivateError."""
    by_hand = (
        f"qrexec-activate edit {entry.file}"
        if entry.file
        else f"see systemctl cat {entry.unit} (with --user for a user unit)"
    )
    if entry.file:
        checked(entry.file, entry.unit, folder)
    if not entry.file or "@." in Path(entry.file).parent.name:
        raise UsageProblem(
            f"{entry.listener} is opened by {entry.file or 'no file'}, which"
            f" is not this unit's own in {folder}: {by_hand}"
        )
    text = read_file(entry.file).text or ""
    names = [
        one.line
        for one in assignments(text)
        if (one.section, one.key) == ("Socket", "FileDescriptorName")
    ]
    if len(names) != 1:
        raise ActivateError(
            f"{entry.file} has {len(names) or 'no'} FileDescriptorName=:"
            f" {by_hand}"
        )
    return with_lines(
        text, names, f"FileDescriptorName={escape_target(target)}"
    )


def _check(
    now: Survey,
    unit: str,
    texts: Mapping[str, str],
    meant: Sequence[Entry],
    target: str,
) -> None:
    """Make sure that the new texts change the routes that are meant, and no
    other."""
    mine = {
        address_key(entry.listener) for entry in meant if entry.unit == unit
    }
    before = foreseen(now, unit, {})
    for old, new in zip(before, foreseen(now, unit, texts), strict=True):
        if address_key(old.address) not in mine:
            if old != new:
                raise ActivateError(
                    f"{old.address} would change, too, as it has its name from"
                    f" the same file: name both, or edit"
                    f" {' and '.join(texts)}"
                )
        elif not (isinstance(new, Route) and new.target == target):
            raise ActivateError(
                f"another file of {unit} decides about {old.address}: see"
                f" systemctl cat {unit} (with --user for a user unit)"
            )
