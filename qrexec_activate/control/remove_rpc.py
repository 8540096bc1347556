"""qrexec-activate remove-rpc: take away what add-rpc wrote."""

from __future__ import annotations

import os

import click

from ..errors import UsageProblem
from ..systemd.systemctl import Systemctl
from ..systemd.unitdirs import own_folder
from ..systemd.units import open_manager
from .add_rpc import UNITS, check_prefix
from .dropins import locked
from .finishing import finishing
from .options import complete_own_kinds, dry_run_option, system_option
from .settle import Change, carry_out, show
from .survey import take_survey
from .table import short_path
from .terminal import say

__all__ = ["command"]


@click.command(
    "remove-rpc",
    epilog="""\b
Example:
    $ qrexec-activate remove-rpc my-rpc
""",
)
@click.argument("name", shell_complete=complete_own_kinds)
@dry_run_option
@system_option
def command(name: str, dry_run: bool, system: bool) -> None:
    """Remove the template units NAME@.socket, NAME.service and
    NAME-quiesce.target, which add-rpc wrote.

    Its routes have to be removed first.
    """
    check_prefix(name)
    folder = own_folder(user=not system)
    systemctl = Systemctl(user=not system)
    with open_manager(user=not system) as manager:
        now = take_survey(manager)
    if used := [one for one in now.units if one.startswith(f"{name}@")]:
        raise UsageProblem(
            f"{used[0]} is a unit of it: qrexec-activate remove {used[0]} first"
        )
    # The template first: without it, the others are of no use to anybody.
    files = [
        path
        for unit in reversed(UNITS)
        if os.path.lexists(path := folder / unit.format(name))
    ]
    if not files:
        raise UsageProblem(f"there are no units of {name} in {folder}")
    change = Change(
        stop=[f"{name}.service", f"{name}-quiesce.target"],
        files={str(path): None for path in files},
    )
    if dry_run:
        show(change, systemctl)
        return
    with locked(folder), finishing():
        carry_out(change, systemctl)
    for path in files:
        say(f"Removed: {short_path(str(path))}")
