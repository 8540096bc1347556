"""qrexec-activate add-rpc: template units for an RPC of one's own."""

from __future__ import annotations

import os
from pathlib import Path

import click

from ..errors import ActivateError, BadName, UsageProblem
from ..given.kinds import KINDS
from ..routing.names import check_service, parse_unit_name
from ..systemd.systemctl import Systemctl
from ..systemd.unitdirs import UnitFiles, own_folder, scan
from ..systemd.units import open_manager
from .dropins import locked
from .finishing import finishing
from .options import dry_run_option, system_option
from .persistence import warn_of_loss
from .settle import Change, carry_out, show
from .survey import read_file
from .table import short_path

__all__ = ["UNITS", "check_prefix", "command"]

#: The units that ship for unix sockets are the pattern: their sockets are the
#: owner's alone.
_PATTERN_PREFIX, _PATTERN_RPC = "qrexec-connect-unix", "qubes.ConnectUnix"
#: The template comes last: without it, the others are of no use to anybody.
UNITS = ("{}-quiesce.target", "{}.service", "{}@.socket")


@click.command(
    "add-rpc",
    epilog="""\b
Example:
    $ qrexec-activate add-rpc my-rpc my.Rpc
    $ qrexec-activate add my-rpc backup archive
""",
)
@click.argument("name")
@click.argument("rpc")
@dry_run_option
@system_option
def command(name: str, rpc: str, dry_run: bool, system: bool) -> None:
    """Write the template units NAME@.socket, NAME.service and
    NAME-quiesce.target, which call RPC.

    `add NAME ARGUMENT TARGET` then works as for tcp and unix: ARGUMENT is that
    of the RPC. A connection can be a TCP port or a unix socket, as --listen
    says there.
    """
    check_service(rpc)
    check_prefix(name)
    user = not system
    folder = own_folder(user=user)
    with open_manager(user=user) as manager:
        (search_path,) = manager.manager_properties("UnitPath")
    files = scan(search_path or (), suffixes=("socket", "service", "target"))
    texts = {unit.format(name): _text(files, unit, name, rpc) for unit in UNITS}
    warn_of_loss(folder)
    new = [
        unit
        for unit, text in texts.items()
        if not _is_there(files, folder, unit, text)
    ]
    # Whoever was killed before the reload runs it again.
    change = Change(
        new={folder / unit: texts[unit] for unit in new}, reload=True
    )
    systemctl = Systemctl(user)
    if dry_run:
        show(change, systemctl)
        return
    with locked(folder), finishing():
        carry_out(change, systemctl)
    for unit in new:
        click.echo(f"Wrote {short_path(str(folder / unit))}")
    click.echo(
        f"Now: qrexec-activate add {name} ARGUMENT"
        f" QUBE{' --system' if system else ''}"
    )


def check_prefix(name: str) -> None:
    """Raise BadName or UsageProblem where no RPC of one's own can have this
    name."""
    template = parse_unit_name(f"{name}@.socket")
    if template.prefix != name or name.endswith("-"):
        raise BadName(f"{name!r} is no prefix of units: write it like my-rpc")
    if name in KINDS or name in KINDS.values():
        raise UsageProblem(
            f"{name} ships with qrexec-activate: choose another name"
        )


def _text(files: UnitFiles, unit: str, name: str, rpc: str) -> str:
    pattern = files.fragments.get(unit.format(_PATTERN_PREFIX))
    text = read_file(pattern).text if pattern else None
    if text is None:
        raise ActivateError(
            f"{unit.format(_PATTERN_PREFIX)} is not installed: install the"
            f" package qrexec-activate"
        )
    text = text.replace(_PATTERN_PREFIX, name).replace(_PATTERN_RPC, rpc)
    return text.replace(
        "Local addresses for a unix socket of other qubes: %i",
        f"Local addresses for {rpc}: %i",
    )


def _is_there(files: UnitFiles, folder: Path, unit: str, text: str) -> bool:
    """Whether the very unit is there already; raises UsageProblem where another
    one has its name."""
    path = files.fragments.get(unit)
    if path is None and not os.path.lexists(folder / unit):
        return False
    path = path or str(folder / unit)
    if read_file(path).text == text:
        return True
    raise UsageProblem(
        f"there is a {unit} already, {path}: choose another name, or remove it"
    )
