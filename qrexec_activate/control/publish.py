"""qrexec-activate publish: give a socket of this qube a name that other qubes can call."""

from __future__ import annotations

import os
from pathlib import Path

import click

from ..errors import ActivateError, UsageProblem
from ..manager import open_manager
from ..names import parse_unit_name
from .dropins import create_file, finishing, locked
from .netproc import listening
from .options import complete_units, debug_option
from .policy import FILE as POLICY_FILE
from .policy import policy_line, this_qube
from .publications import FOLDER, RPC, check_name, folder, published, socket_path, where_installed
from .systemctl import Systemctl
from .table import short_path
from .unitdirs import own_folder

__all__ = ["command"]

CLIENT_QUBE = "CLIENT-QUBE"


@click.command(
    "publish",
    epilog="""\b
Examples:
    $ qrexec-activate publish gpg-agent-ssh --unit gpg-agent-ssh.socket
    $ qrexec-activate publish notes --unix /run/user/1000/notes.sock
""",
)
@click.argument("name")
@click.option(
    "--unit", metavar="NAME.socket", help="The socket of this unit, from now on.", shell_complete=complete_units
)
@click.option("--unix", "path", metavar="PATH", help="The socket of this path, until you log out.")
@debug_option
def command(name: str, unit: str | None, path: str | None) -> None:
    """In a service qube, let other qubes reach a unix socket by qubes.ConnectUnix+NAME.

    With --unit, a drop-in with Symlinks= makes the name whenever the socket unit starts. With --unix, it is a symbolic
    link, and gone with the folder when you log out.
    """
    check_name(name)
    if (unit is None) == (path is None):
        raise UsageProblem("give either --unit NAME.socket or --unix PATH")
    if unit is not None:
        _publish_unit(name, unit if unit.endswith(".socket") else f"{unit}.socket")
    else:
        _publish_path(name, path or "")
    _report(name)


def _publish_unit(name: str, unit: str) -> None:
    parse_unit_name(unit)
    link = folder() / name
    drop_in = own_folder(user=True) / f"{unit}.d" / f"qrexec-{name}.conf"
    with open_manager(user=True) as manager:
        (row,) = manager.unit_properties([unit], "Unit", ["LoadState", "ActiveState"])
        if row["LoadState"] != "loaded":
            raise UsageProblem(f"systemd has no {unit} that it can start: see systemctl --user status {unit}")
        (socket,) = manager.unit_properties([unit], "Socket", ["Listen"])
        target = socket_path(socket, unit)
        for one in published(manager):
            if one.name == name and one.unit not in ("", unit):
                raise UsageProblem(f"{name} is made by {one.unit}: qrexec-activate unpublish {name} first")
            if one.name == name and one.unit == unit and one.file:
                click.echo(f"{short_path(one.file)} makes it already", err=True)
                drop_in = Path(one.file)
    with locked(own_folder(user=True)), finishing():
        if not drop_in.exists():
            create_file(drop_in, f"[Socket]\nSymlinks={FOLDER}/{name}\n")
        Systemctl(user=True).daemon_reload()
        if row["ActiveState"] == "active":
            # systemd makes the link when the socket starts, but does not start it again while its service runs.
            make_link(link, target)
    click.echo(f"File: {short_path(str(drop_in))}")
    if row["ActiveState"] != "active":
        click.echo(f"It comes when the socket starts: systemctl --user enable --now {unit}")


def _publish_path(name: str, path: str) -> None:
    target = os.path.abspath(path)
    if not os.path.isabs(path):
        raise UsageProblem(f"{path!r} is no path from / on: give {target}")
    if os.path.exists(target) and listening().holds(os.path.realpath(target)) is not True:
        click.echo(f"Nobody listens on {target} yet", err=True)
    elif not os.path.exists(target):
        click.echo(f"{target} is not there yet", err=True)
    make_link(folder() / name, target)


def make_link(link: Path, target: str) -> None:
    """Make a symbolic link in one step; raises ActivateError where something else has its name."""
    try:
        link.parent.mkdir(mode=0o700, exist_ok=True)
        if os.path.lexists(link):
            if not link.is_symlink():
                raise UsageProblem(f"{link} is there already, and no symbolic link: remove it first")
            if os.readlink(link) == target:
                return
            if link.exists():
                raise UsageProblem(
                    f"{link.name} leads to {os.readlink(link)} already: qrexec-activate unpublish {link.name} first"
                )
        unfinished = link.with_name(f".{link.name}.{os.getpid()}")
        unfinished.symlink_to(target)
        os.replace(unfinished, link)
    except OSError as error:
        raise ActivateError(f"cannot make {link}: {error.strerror}") from error


def _report(name: str) -> None:
    with open_manager(user=True) as manager:
        one = next((one for one in published(manager) if one.name == name), None)
    if one is not None:
        click.echo(f"{RPC}+{name} leads to {one.socket or 'nothing yet'}: {'alive' if one.alive else one.problem}")
    if not where_installed(RPC):
        click.echo(f"{RPC} is not installed in this qube: install the package qrexec-activate-services", err=True)
    click.echo(f"In dom0, {POLICY_FILE} needs ({CLIENT_QUBE} stands for the qube that calls):")
    click.echo(f"    {' '.join(policy_line(RPC, name, CLIENT_QUBE, this_qube()))}")
