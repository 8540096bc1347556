"""qrexec-activate unpublish: take a name away from a socket."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import click

from ..control.dropins import (
    finishing,
    is_idle,
    locked,
    remove_file,
    replace_file,
    without_lines,
)
from ..control.options import debug_option
from ..control.publications import Publication, published, symlink_lines
from ..control.survey import read_file
from ..control.table import short_path
from ..errors import ActivateError, UsageProblem
from ..systemd.manager import open_manager
from ..systemd.systemctl import Systemctl
from ..systemd.unitdirs import own_folder
from .published import complete_names
from .services import Service, removal
from .steps import audit, undo_all

__all__ = ["command"]


@click.command(
    "unpublish",
    epilog="""\b
Example:
    $ qrexec-activate unpublish gpg-agent-ssh
""",
)
@click.argument(
    "names",
    metavar="NAME...",
    nargs=-1,
    required=True,
    shell_complete=complete_names,
)
@click.option(
    "-y",
    "--yes",
    is_flag=True,
    help="Do not ask before a user's files and a database are deleted.",
)
@debug_option
def command(names: tuple[str, ...], yes: bool) -> None:
    """In a service qube, take away a name that publish gave: the link, and the
    line of the drop-in that makes it.

    The socket itself, its unit and open connections stay. A program that was
    published with --exec ends, and all that was made for it goes: its units,
    its name in Caddy, its Linux user with all its files, and its database.
    """
    services = {
        name: Service.read(name, for_system=False)
        or Service.read(name, for_system=True)
        for name in names
    }
    for for_system in (False, True):
        if same := [
            one
            for one in services.values()
            if one and one.for_system == for_system
        ]:
            _end(same, yes=yes)
    for name, service in services.items():
        if service is None:
            with audit(
                f"unpublishing {name}",
                done=f"unpublished {name}",
                QREXEC_NAME=name,
            ):
                _take_back(name)
        click.echo(f"{name} is not published any more")


def _end(services: list[Service], *, yes: bool) -> None:
    one = services[0]
    if one.for_system and os.geteuid() != 0:
        raise UsageProblem(
            f"{one.name} belongs to the system: sudo qrexec-activate"
            f" unpublish {one.name}"
        )
    if one.for_system and not yes:
        what = ", ".join(
            f"{one.user} with all its files"
            + " and its database" * one.database
            for one in services
        )
        click.confirm(
            f"This deletes the Linux user {what}. Go on?", abort=True, err=True
        )
    files = [file for service in services for file in service.files()]
    with contextlib.ExitStack() as acts, locked(one.folder), finishing():
        for service in services:
            what = service.about
            acts.enter_context(
                audit(
                    f"unpublishing {what}",
                    done=f"unpublished {what}",
                    QREXEC_NAME=service.name,
                )
            )
        undo_all(removal(services))
    for file in files:
        click.echo(f"Removed: {short_path(str(file))}")


def _take_back(name: str) -> None:
    with open_manager(user=True) as manager:
        specifiers = manager.specifiers()
        one = next(
            (one for one in published(manager) if one.name == name), None
        )
    if one is None:
        raise UsageProblem(
            f"{name!r} is not published; qrexec-activate published shows what"
            f" is"
        )
    link = Path(one.link)
    if os.path.lexists(link) and not link.is_symlink():
        raise UsageProblem(
            f"{link} is a socket itself, and no link: it goes when"
            f" {one.unit or 'its program'} ends"
        )
    with locked(own_folder(user=True)), finishing():
        if one.file:
            _take_out(
                one, symlink_lines(one.file, one.unit, one.link, specifiers)
            )
        try:
            link.unlink(missing_ok=True)
        except OSError as error:
            raise ActivateError(
                f"cannot remove {link}: {error.strerror}"
            ) from error
        if one.file:
            Systemctl(user=True).daemon_reload()


def _take_out(one: Publication, lines: set[int]) -> None:
    if not one.file.startswith(f"{own_folder(user=True)}/"):
        raise UsageProblem(
            f"{one.file}, which makes {one.name}, is not among your own"
            f" units: hide it there with"
            " an empty file of the same name"
        )
    text = without_lines(read_file(one.file).text or "", lines)
    if is_idle(text) and ".d/" in one.file:
        remove_file(Path(one.file))
        click.echo(f"Removed: {short_path(one.file)}")
    else:
        replace_file(Path(one.file), text)
        click.echo(f"Changed: {short_path(one.file)}")
