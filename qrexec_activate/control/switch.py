"""What enable, disable, start and stop have in common: the units of routes,
switched by one command of systemd each."""

from __future__ import annotations

from collections.abc import Callable

import click

from ..errors import ActivateError
from ..systemd.systemctl import Systemctl
from ..systemd.units import open_manager
from .dom0 import refuse
from .finishing import finishing
from .options import complete_routes, dry_run_option, system_option
from .select import the_routes, whole_units, written
from .settle import Change, carry_out, show
from .survey import take_survey

__all__ = ["switch"]


def switch(
    name: str,
    help: str,
    done: str,
    change_of: Callable[[list[str], bool], Change],
    *,
    has_now: bool = False,
) -> click.Command:
    """Make a command that changes the units of routes, as `change_of` has it
    for units and whether --now was said; `done` says of each route what became
    of it."""

    def command(
        words: tuple[str, ...],
        all_of_them: bool,
        dry_run: bool,
        system: bool,
        at_once: bool = False,
    ) -> None:
        with open_manager(user=not system) as manager:
            now = take_survey(manager)
        meant = the_routes(now, words, all_of_them)
        changed = {entry.unit for entry in meant}
        units = whole_units(meant, written(now, changed))
        change = change_of(list(units), at_once)
        if change.enable or change.disable:
            refuse(meant)
        change.wanted = {
            unit: [entry.listener for entry in opened]
            for unit, opened in units.items()
        }
        systemctl = Systemctl(user=not system)
        if dry_run:
            show(change, systemctl)
            return
        with finishing():
            carry_out(change, systemctl)
        for entry in (entry for opened in units.values() for entry in opened):
            dead = now.daemons[entry.daemon].dead
            if change.start and dead:
                raise ActivateError(f"{entry.listener} reaches nobody: {dead}")
            click.echo(
                f"{done}: {entry.listener} to {entry.target or 'nowhere'}"
            )

    command.__doc__ = (
        f"{help}\n\nROUTE is an address, a unit, a label, a target, a call or"
        f" a file; a unit of several routes takes all of them."
    )
    if has_now:
        command = click.option(
            "--now",
            "at_once",
            is_flag=True,
            help=f"{'Start' if name == 'enable' else 'Stop'} it as well.",
        )(command)
    command = click.option(
        "--all",
        "all_of_them",
        is_flag=True,
        help="Take every route that ROUTE may mean.",
    )(command)
    command = click.argument(
        "words",
        metavar="ROUTE... | KIND ARGUMENT [TARGET]",
        nargs=-1,
        required=True,
        shell_complete=complete_routes,
    )(command)
    return click.command(
        name,
        epilog=f"""\b
Examples:
    $ qrexec-activate {name} 127.0.0.1:1234
    $ qrexec-activate {name} work --all
""",
    )(dry_run_option(system_option(command)))
