"""qrexec-activate remove: just the lines that a route needs, and nothing
else."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click

from ..errors import ActivateError, UsageProblem
from ..routing.address import address_key, expand_specifiers
from ..routing.claim import Claim, Route
from ..routing.routes import unit_specifiers
from ..routing.unitfile import SourceFile, assignments, declared_listeners
from ..systemd.systemctl import Systemctl
from ..systemd.unitdirs import own_folder
from ..systemd.units import open_manager
from .dom0 import refuse
from .dropins import is_idle, locked, without_lines
from .finishing import finishing
from .options import complete_routes, dry_run_option, system_option
from .select import the_routes
from .settle import Change, carry_out, show
from .survey import (
    Daemon,
    Entry,
    Survey,
    foresee,
    read_file,
    source_files,
    take_survey,
)
from .table import short_path

__all__ = ["command"]


@dataclass(slots=True)
class Removal:
    """What becomes of one socket unit: new texts of files, None for those that
    go."""

    unit: str
    daemon: Daemon
    entries: list[Entry] = field(default_factory=list)
    files: dict[str, str | None] = field(default_factory=dict)
    #: What the unit listens on afterwards.
    left: list[str] = field(default_factory=list)


@click.command(
    "remove",
    epilog="""\b
Examples:
    $ qrexec-activate remove 127.0.0.1:1234
    $ qrexec-activate remove tcp 1234 gitweb
    $ qrexec-activate remove gitweb --all
""",
)
@click.argument(
    "words",
    metavar="ROUTE... | KIND ARGUMENT [TARGET]",
    nargs=-1,
    required=True,
    shell_complete=complete_routes,
)
@click.option(
    "--all",
    "all_of_them",
    is_flag=True,
    help="Remove every route that ROUTE may mean.",
)
@dry_run_option
@system_option
def command(
    words: tuple[str, ...], all_of_them: bool, dry_run: bool, system: bool
) -> None:
    """Remove routes: the lines that open an address, the drop-in if nothing
    else is in it, and the instance if it was its last.

    ROUTE is an address, a unit, a label, a target, a call or a file. Open
    connections go on; other routes, comments and other settings stay.
    """
    systemctl = Systemctl(user=not system)
    folder = own_folder(user=not system)
    if dry_run:
        removals = _plan(words, all_of_them, folder, not system)
        show(_change(removals), systemctl)
        return
    # Where no systemd answers, as it does not by sudo, nothing is made.
    with open_manager(user=not system):
        pass
    with locked(folder):
        removals = _plan(words, all_of_them, folder, not system)
        with finishing():
            carry_out(_change(removals), systemctl)
    for removal in removals:
        _report(removal)


# ---------------------------------------------------------------------- decide


def _plan(
    words: Sequence[str], all_of_them: bool, folder: Path, user: bool
) -> list[Removal]:
    with open_manager(user=user) as manager:
        now = take_survey(manager)
    removals: dict[str, Removal] = {}
    for entry in the_routes(now, words, all_of_them):
        removal = removals.setdefault(
            entry.unit, Removal(entry.unit, now.units[entry.unit].daemon)
        )
        removal.entries.append(entry)
        if _has_file(entry):
            _check_ours(entry, folder)
    for removal in removals.values():
        _decide(removal, now)
    return list(removals.values())


def _has_file(entry: Entry) -> bool:
    return bool(entry.file) and os.path.exists(entry.file)


def _check_ours(entry: Entry, folder: Path) -> None:
    refuse([entry])
    if not entry.file.startswith(f"{folder}/"):
        raise UsageProblem(
            f"{entry.listener} is opened by {entry.file}, which is not among"
            f" the units in {folder}:"
            f" hide it with an empty file of the same name there, or remove"
            f" it where it came from"
        )
    if "@." in Path(entry.file).parent.name:
        raise UsageProblem(
            f"{entry.listener} is opened by {entry.file}, which all units of"
            f" this kind share: change it by hand"
        )


def _decide(removal: Removal, now: Survey) -> None:
    """Work out the new texts, and make sure that no other route of the unit
    changes with them."""
    before = source_files(removal.unit, now.files)
    values = unit_specifiers(removal.unit, now.specifiers)
    for path in sorted(
        {entry.file for entry in removal.entries if _has_file(entry)}
    ):
        doomed = [
            entry.listener for entry in removal.entries if entry.file == path
        ]
        removal.files[path] = _without(path, doomed, values)
    after = [
        SourceFile(file.path, removal.files[file.path])
        if file.path in removal.files
        else file
        for file in before
        if removal.files.get(file.path, "") is not None
    ]
    claimed = foresee(removal.daemon, removal.unit, after, now.specifiers)
    removal.left = [claim.address for claim in claimed]
    removed = {entry.listener for entry in removal.entries}
    if stays := removed.intersection(removal.left):
        raise ActivateError(
            f"{', '.join(sorted(stays))} is opened by more than one line, or"
            f" by one that is not understood here: see systemctl cat"
            f" {removal.unit} (with --user for a user unit), and take it out"
            f" by hand"
        )
    for claim in foresee(removal.daemon, removal.unit, before, now.specifiers):
        if (
            isinstance(claim, Route)
            and claim.address not in removed
            and not _survives(claim, claimed)
        ):
            raise ActivateError(
                f"{claim.address} has its target {claim.target} from the file"
                f" of the route that is to be removed:"
                f" add FileDescriptorName={claim.target} to {claim.file},"
                f" then try again"
            )


def _survives(claim: Route, claimed: list[Claim]) -> bool:
    return any(
        isinstance(one, Route)
        and one.address == claim.address
        and one.target == claim.target
        for one in claimed
    )


def _without(
    path: str, listeners: list[str], values: dict[str, str]
) -> str | None:
    """The text of a file without these listeners; None if nothing worth keeping
    is left of it."""
    file = read_file(path)
    if file.text is None:
        raise ActivateError(f"{path} {file.problem}")
    keys = {address_key(listener) for listener in listeners} - {None}
    declared = declared_listeners([file]).listeners
    doomed = [
        one
        for one in declared
        if (expanded := expand_specifiers(one.address, values) or one.address)
        in listeners
        or address_key(expanded) in keys
    ]
    lines = {one.line for one in doomed}
    if len(doomed) == len(declared) and ".d/" in path:
        # A name without an address would be that of all addresses in the files
        # before it.
        lines |= {
            one.line
            for one in assignments(file.text)
            if one.section == "Socket" and one.key == "FileDescriptorName"
        }
    text = without_lines(file.text, lines)
    return None if is_idle(text) and ".d/" in path else text


# ---------------------------------------------------------------------- do


def _change(removals: Sequence[Removal]) -> Change:
    change = Change()
    for removal in removals:
        change.files |= removal.files
        if removal.left:
            change.refresh.add(removal.daemon.unit)
        else:
            change.stop.append(removal.unit)
            change.disable.append(removal.unit)
    return change


def _report(removal: Removal) -> None:
    for entry in removal.entries:
        click.echo(
            f"{entry.listener} does not reach {entry.target or 'anything'}"
            f" any more"
        )
    for path, text in removal.files.items():
        click.echo(
            f"{'Removed' if text is None else 'Changed'}: {short_path(path)}"
        )
    if not removal.left:
        click.echo(f"{removal.unit} had no other address: stopped and disabled")
