"""Bring systemd in line with what the unit files are to say: one change, and
one daemon-reload, however many units it touches.

The rule it keeps: no address closes that is to stay. A unit that loses an
address, or a route that gets another target, needs no restart: at the
daemon-reload systemd lets go of what no file opens any more, and keeps the
rest (seen on 252 and 257); the daemon then ends, and the next connection
starts it with what is left.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import click

from ..errors import ActivateError, ManagerError
from ..routing.address import address_key
from ..systemd.systemctl import Systemctl
from .dropins import file_shown, remove_files, write_files
from .netproc import holders, listening, owner

__all__ = [
    "Change",
    "active_of",
    "carry_out",
    "show",
    "undo",
    "why_not_started",
]

#: A socket unit is refused while its daemon starts, which a connection to
#: another one of its ports may bring about at any moment.
TRIES = 5
#: Units told to systemd at once, so that a terminal shows how far it has come.
CHUNK = 100
#: The act of writing and removing files, among those of systemctl.
FILES = ("files",)


@dataclass(slots=True)
class Change:
    """What is to become of unit files and units."""

    #: Files to be made: whole texts.
    new: dict[Path, str] = field(default_factory=dict)
    #: Files that are there: new texts, None for those that go.
    files: dict[str, str | None] = field(default_factory=dict)
    enable: list[str] = field(default_factory=list)
    disable: list[str] = field(default_factory=list)
    stop: list[str] = field(default_factory=list)
    #: Units that get addresses which they have not opened yet.
    restart: list[str] = field(default_factory=list)
    start: list[str] = field(default_factory=list)
    #: Services that are to look at their sockets anew.
    refresh: set[str] = field(default_factory=set)
    #: Unit that is to listen → its addresses.
    wanted: dict[str, list[str]] = field(default_factory=dict)
    #: Address → the qube that it reached before.
    before: dict[str, str] = field(default_factory=dict)
    #: Whether systemd reads its files again also where nothing changes.
    reload: bool = False
    #: Whether systemd has none of the units in memory: it reads the files of
    #: such as it starts them. A daemon-reload reads those of all units.
    unread: bool = False

    @property
    def rereads(self) -> bool:
        return not self.unread and bool(
            self.new
            or self.files
            or self.enable
            or self.disable
            or self.refresh
            or self.reload
        )

    def acts(self) -> Iterator[tuple[str, ...]]:
        """What is done, in this order: FILES, or what systemctl is told."""
        if self.enable:
            yield ("enable", "--no-reload", *self.enable)
        if self.new or self.files:
            yield FILES
        if self.stop:
            yield ("stop", *self.stop)
            yield ("reset-failed", *self.stop)
        if self.disable:
            yield ("disable", "--no-reload", *self.disable)
        if self.rereads:
            yield ("daemon-reload",)
        if self.refresh:
            yield ("stop", *sorted(self.refresh))
        if self.restart or self.start:
            yield ("reset-failed", *self.restart, *self.start)
        if self.restart:
            yield ("restart", *self.restart)
        if self.start:
            yield ("start", *self.start)


def show(change: Change, systemctl: Systemctl) -> None:
    """Print what carry_out() does, in its order."""
    for act in change.acts():
        if act is not FILES:
            click.echo(f"$ {_teller(act, change, systemctl).written(*act)}")
            continue
        for path, text in change.new.items():
            click.echo(file_shown(path, text))
        for name, after in change.files.items():
            click.echo(file_shown(name, after))


def carry_out(change: Change, systemctl: Systemctl) -> None:
    """Do it, in an order in which whoever is killed in between runs it again,
    and what is left then is done.

    A link that enables a unit without any address does nothing, so that until
    a file is written nothing has changed. Raises ActivateError, with what
    stands in the way.
    """
    problem = None
    for act in change.acts():
        verb, *units = act
        if act is FILES:
            _write(change)
        elif verb == "stop":
            for chunk in _chunks("Stopping", units):
                _stop(systemctl, chunk)
        elif verb == "disable":
            problem = _disable(systemctl, units)
        elif verb in ("restart", "start"):
            for chunk in _chunks(f"{verb.capitalize()}ing", units):
                _start(systemctl, verb, chunk, change)
        else:
            # What has not failed cannot be reset, which is no error here.
            _teller(act, change, systemctl).run(
                *act, check=verb != "reset-failed"
            )
    if problem:
        raise problem


def _teller(
    act: Sequence[str], change: Change, systemctl: Systemctl
) -> Systemctl:
    """Whom to tell. Where no daemon-reload follows, systemd is not to wait for
    one."""
    offline = act[0] == "enable" and not change.rereads
    return replace(systemctl, offline=offline)


def _write(change: Change) -> None:
    write_files(
        change.new,
        {
            Path(path): text
            for path, text in change.files.items()
            if text is not None
        },
    )
    remove_files(
        Path(path) for path, text in change.files.items() if text is None
    )


def _stop(systemctl: Systemctl, units: Sequence[str]) -> None:
    """Stop units. One that systemd has never loaded is an error to systemctl,
    and keeps it (262) from stopping the others."""
    try:
        systemctl.run("stop", *units)
    except ManagerError:
        left = [unit for unit, yes in active_of(systemctl, units) if yes]
        if left:
            systemctl.run("stop", *left)


def _disable(systemctl: Systemctl, units: Sequence[str]) -> ManagerError | None:
    """Disable units; an error is returned, for when the rest is done: a broken
    link of another unit is one, and a link that stays enables a unit without
    any address."""
    try:
        systemctl.run("disable", *units)
    except ManagerError as error:
        return error
    return None


def _start(
    systemctl: Systemctl, verb: str, units: Sequence[str], change: Change
) -> None:
    failed = list(units)
    for attempt in range(TRIES):
        try:
            systemctl.run(verb if attempt == 0 else "start", *failed)
            return
        except ManagerError as error:
            if change.unread and attempt == 0:
                # Another program may have had systemd read one too early.
                systemctl.daemon_reload()
            failed = [
                unit for unit, yes in active_of(systemctl, failed) if not yes
            ]
            if not failed:
                return
            if reason := _taken(failed, change):
                raise ActivateError(reason) from None
            if attempt == TRIES - 1:
                raise ActivateError(
                    f"{error} ({systemctl.written('status', failed[0])} says"
                    f" more)"
                ) from None


def _taken(units: Iterable[str], change: Change) -> str:
    """Name who has the addresses of units that did not start, and what was
    there before; empty if nobody has."""
    reasons = []
    for unit in units:
        for address in change.wanted.get(unit, ()):
            if reason := why_not_started([address]):
                was = change.before.get(address)
                before = f"it reached {was}" if was else "it was closed"
                reasons.append(
                    f"{unit} does not start: {reason}; before, {before}"
                )
    return "; ".join(reasons)


def why_not_started(addresses: Iterable[str]) -> str:
    """Name who has an address that a unit wants; empty if nobody has."""
    now = listening()
    reasons = []
    for address in addresses:
        inode = now.in_the_way(address) if address_key(address) else None
        if inode is not None:
            holder = holders([inode]).get(inode) or "a program"
            whose = owner(inode, address)
            reasons.append(
                f"{address} is taken by {holder}"
                f"{f' of the user {whose}' if whose else ''}"
            )
    return "; ".join(reasons)


def undo(change: Change, systemctl: Systemctl) -> None:
    """Take back the making of new routes, as far as it came."""
    if change.start:
        systemctl.run("stop", *change.start, check=False)
    remove_files(change.new)
    if change.enable:
        systemctl.run("disable", "--no-reload", *change.enable, check=False)
    systemctl.run("daemon-reload", check=False)
    if change.start:
        systemctl.run("reset-failed", *change.start, check=False)


def active_of(
    systemctl: Systemctl, units: Sequence[str]
) -> list[tuple[str, bool]]:
    """Tell of each unit whether it listens, or did until it failed just now."""
    if not units:
        return []
    states = systemctl.run("is-active", *units, check=False).split()
    return [
        (unit, state in ("active", "activating", "reloading"))
        for unit, state in zip(units, states, strict=True)
    ]


# -------------------------------------------------------------------- progress


def _chunks(what: str, units: Sequence[str]) -> Iterator[Sequence[str]]:
    """Go through many units, and show on a terminal how far one is."""
    shown = len(units) > CHUNK and sys.stderr.isatty()
    for start in range(0, len(units), CHUNK):
        if shown:
            click.echo(f"\r{what} {start} of {len(units)}", nl=False, err=True)
        yield units[start : start + CHUNK]
    if shown:
        click.echo("\r\x1b[K", nl=False, err=True)
