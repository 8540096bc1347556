"""qrexec-activate remove: just the lines that a route needs, and nothing
else."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click

from ..errors import ActivateError, UsageProblem
from ..routing.claim import Claim, Route
from ..routing.routes import unit_specifiers
from ..routing.unitfile import (
    SourceFile,
    address_key,
    assignments,
    declared_listeners,
    expand_specifiers,
)
from ..systemd.manager import open_manager
from ..systemd.systemctl import Systemctl
from ..systemd.unitdirs import own_folder
from .dropins import (
    finishing,
    is_idle,
    locked,
    remove_file,
    replace_file,
    without_lines,
)
from .kinds import unit_of
from .options import complete_routes, system_option
from .select import select
from .settle import is_active, start, stop
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
class Change:
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
@click.option(
    "--dry-run",
    is_flag=True,
    help="Show what would be changed, and change nothing.",
)
@system_option
def command(
    words: tuple[str, ...], all_of_them: bool, dry_run: bool, system: bool
) -> None:
    """Remove routes: the lines that open an address, the drop-in if nothing
    else is in it, and the instance if it was its last.

    ROUTE is an address, a unit, a target, a call or a file. Open connections go
    on; other routes, comments and other settings stay.
    """
    systemctl = Systemctl(user=not system)
    folder = own_folder(user=not system)
    if dry_run:
        for change in _plan(words, all_of_them, folder, not system):
            _show(change, systemctl)
        return
    # Where no systemd answers, as it does not by sudo, nothing is made.
    with open_manager(user=not system):
        pass
    with locked(folder):
        for change in _plan(words, all_of_them, folder, not system):
            _carry_out(change, systemctl)
            _report(change)


# ---------------------------------------------------------------------- decide


def _plan(
    words: Sequence[str], all_of_them: bool, folder: Path, user: bool
) -> list[Change]:
    with open_manager(user=user) as manager:
        now = take_survey(manager)
    changes: dict[str, Change] = {}
    for entry in _meant(words, all_of_them, now):
        change = changes.setdefault(
            entry.unit, Change(entry.unit, now.units[entry.unit].daemon)
        )
        change.entries.append(entry)
        if entry.file and os.path.exists(entry.file):
            _check_ours(entry, folder)
    for change in changes.values():
        _decide(change, now)
    return list(changes.values())


def _meant(words: Sequence[str], all_of_them: bool, now: Survey) -> list[Entry]:
    """Find the routes that are meant: one for each word, unless all are."""
    if by_kind := _by_kind(words, now):
        return by_kind
    meant: dict[Entry, None] = {}
    for word in words:
        found = select(now.entries, [word])
        if len(found) > 1 and not all_of_them:
            listeners = ", ".join(entry.listener for entry in found)
            raise UsageProblem(
                f"{word!r} may mean {len(found)} routes: {listeners}; name"
                f" one of these, or add --all"
            )
        meant |= dict.fromkeys(found)
    return list(meant)


def _by_kind(words: Sequence[str], now: Survey) -> list[Entry]:
    """Understand KIND ARGUMENT [TARGET], as add takes it; empty if the words
    are no such thing."""
    if len(words) not in (2, 3):
        return []
    try:
        unit = unit_of(words[0], words[1])
    except ActivateError:
        return []
    mine = [entry for entry in now.entries if entry.unit == unit]
    # Whose file is gone has no target any more; an earlier run has not come to
    # its end.
    target = words[2] if len(words) == 3 else None
    return [
        entry
        for entry in mine
        if target is None or entry.target == target or not _has_file(entry)
    ]


def _has_file(entry: Entry) -> bool:
    return bool(entry.file) and os.path.exists(entry.file)


def _check_ours(entry: Entry, folder: Path) -> None:
    if not entry.file.startswith(f"{folder}/"):
        raise UsageProblem(
            f"{entry.listener} is opened by {entry.file}, which is not among"
            f" the units in {folder}:"
            f" hide it with an empty file of the same name there, or remove"
            f" it where it came from"
        )


def _decide(change: Change, now: Survey) -> None:
    """Work out the new texts, and make sure that no other route of the unit
    changes with them."""
    before = source_files(change.unit, now.files)
    values = unit_specifiers(change.unit, now.specifiers)
    for path in sorted(
        {entry.file for entry in change.entries if _has_file(entry)}
    ):
        doomed = [
            entry.listener for entry in change.entries if entry.file == path
        ]
        change.files[path] = _without(path, doomed, values)
    after = [
        SourceFile(file.path, change.files[file.path])
        if file.path in change.files
        else file
        for file in before
        if change.files.get(file.path, "") is not None
    ]
    claimed = foresee(change.daemon, change.unit, after, now.specifiers)
    change.left = [claim.address for claim in claimed]
    removed = {entry.listener for entry in change.entries}
    for claim in foresee(change.daemon, change.unit, before, now.specifiers):
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


def _carry_out(change: Change, systemctl: Systemctl) -> None:
    """Change the files, then systemd. Whoever is killed in between runs it
    again; what is left then is done."""
    was_active = is_active(systemctl, change.unit)
    with finishing():
        for path, text in change.files.items():
            if text is None:
                remove_file(Path(path))
            else:
                replace_file(Path(path), text)
        if not change.left:
            stop(systemctl, change.unit)
            return
        systemctl.daemon_reload()
        if was_active:
            start(systemctl, change.unit, change.left)


def _show(change: Change, systemctl: Systemctl) -> None:
    for path, text in change.files.items():
        click.echo(
            f"# {path}: removed" if text is None else f"# {path}\n{text}"
        )
    if change.left:
        commands = [("daemon-reload",), ("restart", change.unit)]
    else:
        commands = [("stop", change.unit), ("disable", change.unit)]
    for words in commands:
        click.echo(f"$ {systemctl.written(*words)}")


def _report(change: Change) -> None:
    for entry in change.entries:
        click.echo(
            f"{entry.listener} does not reach {entry.target or 'anything'}"
            f" any more"
        )
    for path, text in change.files.items():
        click.echo(
            f"{'Removed' if text is None else 'Changed'}: {short_path(path)}"
        )
    if not change.left:
        click.echo(f"{change.unit} had no other address: stopped and disabled")
