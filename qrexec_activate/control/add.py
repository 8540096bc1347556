"""qrexec-activate add: a drop-in, written, enabled and started."""

from __future__ import annotations

import os.path
from dataclasses import dataclass
from pathlib import Path

import click

from ..errors import ActivateError, UsageProblem
from ..routing.claim import Claim, Refusal, Route
from ..routing.names import check_target, decode_escapes, escape_target
from ..routing.unitfile import SourceFile, address_key
from ..systemd.manager import open_manager
from ..systemd.systemctl import Systemctl
from ..systemd.unitdirs import own_folder
from .address import (
    Address,
    Trouble,
    is_open_to_others,
    next_free,
    obstacle,
    parse_address,
)
from .dropins import create_file, finishing, locked, remove_file
from .kinds import daemon_of, unit_of
from .netproc import listening
from .options import complete_targets, system_option
from .policy import FILE as POLICY_FILE
from .policy import policy_line, this_qube
from .settle import is_active, is_enabled, start
from .survey import Daemon, Survey, foresee, source_files, take_survey
from .table import short_path

__all__ = ["command", "drop_in_text"]


def drop_in_text(listen: str, target: str) -> str:
    """The whole of a drop-in, as a person would write it."""
    return (
        f"[Socket]\nListenStream={listen}\n"
        f"FileDescriptorName={escape_target(target)}\n"
    )


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done, decided before anything is changed."""

    unit: str
    daemon: Daemon
    argument: str
    target: str
    address: Address
    path: Path
    text: str
    #: Things that a person should know, a line each.
    notes: tuple[str, ...] = ()
    #: The file is there already, with just this route.
    exists: bool = False


@click.command(
    "add",
    epilog="""\b
Examples:
    $ qrexec-activate add tcp 1234 gitweb
    $ qrexec-activate add tcp 5432 db --listen 127.0.0.2
    $ qrexec-activate add unix gpg-agent-ssh @default --listen %t/ssh-agent
    $ qrexec-activate add tcp-bind 2049-127.0.1.1 nfs
""",
)
@click.argument("kind", metavar="KIND")
@click.argument("argument")
@click.argument("target", shell_complete=complete_targets)
@click.option(
    "--listen",
    metavar="ADDRESS[:PORT]|PATH",
    help="Where to listen in this qube.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Show what would be written and done, and change nothing.",
)
@click.option(
    "--no-start", is_flag=True, help="Write and enable it, but do not start it."
)
@system_option
def command(
    kind: str,
    argument: str,
    target: str,
    listen: str | None,
    dry_run: bool,
    no_start: bool,
    system: bool,
) -> None:
    """Let a local address reach the qube TARGET: write the drop-in, enable it
    and start it.

    KIND is tcp (ARGUMENT is the port there), unix (the name of a socket there),
    tcp-bind (PORT-ADDRESS), or a prefix that add-rpc made. TARGET is a qube,
    @default, @dispvm or @dispvm:NAME. Without --listen it is the same port on
    127.0.0.1 (or the next free 127.0.0.N), and for others a socket in
    $XDG_RUNTIME_DIR/qrexec.
    """
    check_target(target)
    unit = unit_of(kind, argument)
    folder = own_folder(user=not system)
    systemctl = Systemctl(user=not system)
    if dry_run:
        _show(
            _plan(kind, argument, target, listen, unit, folder, not system),
            systemctl,
            no_start,
        )
        return
    # Where no systemd answers, as it does not by sudo, nothing is made.
    with open_manager(user=not system):
        pass
    with locked(folder):
        plan = _plan(kind, argument, target, listen, unit, folder, not system)
        for note in plan.notes:
            click.echo(note, err=True)
        _carry_out(plan, systemctl, no_start)
    _report(plan, no_start)


# ---------------------------------------------------------------------- decide


def _plan(
    kind: str,
    argument: str,
    target: str,
    listen: str | None,
    unit: str,
    folder: Path,
    user: bool,
) -> Plan:
    """Check everything that can be checked before anything is written."""
    with open_manager(user=user) as manager:
        daemon = daemon_of(manager, kind, argument, unit)
        now = take_survey(manager)
    before = source_files(unit, now.files)
    claimed = foresee(daemon, unit, before, now.specifiers)
    wanted = _wanted(kind, argument, target, listen, now)
    if existing := _existing(
        claimed, target, wanted if listen is not None else None
    ):
        address = Address(
            existing.address,
            existing.address,
            address_key(existing.address) or ("", "", 0),
        )
        note = (
            f"{existing.address} reaches {target} already, by"
            f" {short_path(existing.file)}"
        )
        return Plan(
            unit,
            daemon,
            argument,
            target,
            address,
            Path(existing.file),
            "",
            (note,),
            exists=True,
        )
    address, notes = _free(wanted, target, listen is not None, now)
    if is_open_to_others(address.key):
        notes += (
            f"Warning: other machines may reach {address.expanded}, and so"
            f" make calls as this qube",
        )
    text = drop_in_text(address.written, target)
    path = _new_path(folder / f"{unit}.d", target)
    _check_effect(
        unit,
        daemon,
        before,
        claimed,
        SourceFile(str(path), text),
        target,
        address,
        now,
    )
    return Plan(unit, daemon, argument, target, address, path, text, notes)


def _wanted(
    kind: str, argument: str, target: str, listen: str | None, now: Survey
) -> Address:
    """Where it is to listen if nothing is in the way."""
    port = None
    if kind in ("tcp", "tcp-bind"):
        front = argument.partition("-")[0]
        port = int(front) if front.isdigit() else None
    if listen is None:
        name = argument if kind == "unix" else f"{kind}-{argument}"
        listen = "127.0.0.1" if port else f"%t/qrexec/{name.replace('%', '%%')}"
    return parse_address(listen, port, now.specifiers)


def _existing(
    claimed: list[Claim], target: str, address: Address | None
) -> Route | None:
    for claim in claimed:
        if not isinstance(claim, Route) or claim.target != target:
            continue
        if address is None or address_key(claim.address) == address.key:
            return claim
    return None


def _free(
    wanted: Address, target: str, insists: bool, now: Survey
) -> tuple[Address, tuple[str, ...]]:
    """The address that is wanted, or where nobody insists on it another one
    that is free."""
    hindrance = obstacle(wanted, now.entries, now.listening)
    if hindrance is None:
        return wanted, ()
    if hindrance.trouble is Trouble.PRIVILEGED:
        raise UsageProblem(
            f"{hindrance.words}: choose another with --listen"
            f" {wanted.host}:{8000 + wanted.port % 1000}"
        )
    if hindrance.trouble is Trouble.IMPOSSIBLE:
        raise UsageProblem(
            f"{hindrance.words}; choose another address with --listen"
        )
    other: Address | None = None
    if wanted.is_ip:
        other = next_free(wanted, now.entries, now.listening)
    elif wanted.key[0] == "path":
        name = f"{wanted.written}-{target.strip('@').replace(':', '-')}"
        other = parse_address(name, None, now.specifiers)
        other = (
            other
            if obstacle(other, now.entries, now.listening) is None
            else None
        )
    if other is None:
        raise UsageProblem(
            f"{hindrance.words}; choose another address with --listen"
        )
    if insists:
        raise UsageProblem(f"{hindrance.words}; {other.written} is free")
    return other, (f"{hindrance.words}, so this uses {other.expanded}",)


def _new_path(folder: Path, target: str) -> Path:
    """A name for the drop-in that nobody has taken: that of the target."""
    path = folder / f"{target}.conf"
    number = 2
    while os.path.lexists(path):
        path = folder / f"{target}-{number}.conf"
        number += 1
    return path


def _check_effect(
    unit: str,
    daemon: Daemon,
    before: list[SourceFile],
    claimed: list[Claim],
    added: SourceFile,
    target: str,
    address: Address,
    now: Survey,
) -> None:
    """Make sure that the new file does what it is for, and changes no other
    route; other files may interfere."""
    fragments, drop_ins = before[:1], before[1:]
    # systemd applies drop-ins in the order of their names, whatever folders
    # they are in.
    drop_ins = sorted(
        [*drop_ins, added], key=lambda file: os.path.basename(file.path)
    )
    after = foresee(daemon, unit, [*fragments, *drop_ins], now.specifiers)
    mine = [
        claim for claim in after if address_key(claim.address) == address.key
    ]
    if not mine:
        raise ActivateError(
            f"another file of {unit} resets the list of addresses after"
            f" {added.path}: see systemctl cat {unit}"
            " (with --user for a user unit)"
        )
    for claim in mine:
        if isinstance(claim, Refusal):
            raise ActivateError(
                f"{address.expanded} would be refused: {claim.reason}"
            )
        if claim.target != target:
            raise ActivateError(
                f"a file of {unit} that sets"
                f" FileDescriptorName={claim.target} for all addresses would"
                f" take this"
                f" one, too: see systemctl cat {unit} (with --user for a user"
                f" unit)"
            )
    others = {claim.address: claim for claim in after if claim not in mine}
    for claim in claimed:
        other = others.get(claim.address)
        if isinstance(claim, Route) and not (
            isinstance(other, Route) and other.target == claim.target
        ):
            raise ActivateError(
                f"{claim.address} reaches {claim.target} by a name that is"
                f" set for all addresses of {unit}, and would"
                f" not any more: add"
                f" FileDescriptorName={escape_target(claim.target)} to"
                f" {claim.file}"
            )


# ---------------------------------------------------------------------- do


def _carry_out(plan: Plan, systemctl: Systemctl, no_start: bool) -> None:
    """Enable, write, start, in this order: until the file is written nothing
    has changed, and then all will.

    A link that enables a unit without any address does nothing, so that whoever
    is killed in between leaves the old state; once the file is there, the route
    is enabled, too.
    """
    was_enabled = is_enabled(systemctl, plan.unit)
    was_active = is_active(systemctl, plan.unit)
    with finishing():
        if not was_enabled:
            systemctl.run("enable", "--no-reload", plan.unit)
        try:
            if not plan.exists:
                create_file(plan.path, plan.text)
            systemctl.daemon_reload()
            if not no_start and not (
                plan.exists
                and was_active
                and listening().holds(plan.address.expanded)
            ):
                start(systemctl, plan.unit, [plan.address.expanded])
        except BaseException:
            _undo(plan, systemctl, was_enabled, was_active)
            raise


def _undo(
    plan: Plan, systemctl: Systemctl, was_enabled: bool, was_active: bool
) -> None:
    if plan.exists:
        return
    remove_file(plan.path)
    if not was_enabled:
        systemctl.run("disable", "--no-reload", plan.unit, check=False)
    systemctl.run("daemon-reload", check=False)
    systemctl.run("reset-failed", plan.unit, check=False)
    if was_active:
        systemctl.run("restart", plan.unit, check=False)


def _show(plan: Plan, systemctl: Systemctl, no_start: bool) -> None:
    for note in plan.notes:
        click.echo(note, err=True)
    if not plan.exists:
        click.echo(f"# {plan.path}\n{plan.text}")
    click.echo(f"$ {systemctl.written('enable', plan.unit)}")
    click.echo(f"$ {systemctl.written('daemon-reload')}")
    if not no_start:
        click.echo(f"$ {systemctl.written('restart', plan.unit)}")


def _report(plan: Plan, no_start: bool) -> None:
    argument = (
        plan.argument if plan.daemon.argument is None else plan.daemon.argument
    )
    when = "will reach" if no_start else "now reaches"
    call = f"{plan.daemon.service}+{decode_escapes(argument)}"
    # Of one that is there already, a note has said so.
    if not plan.exists:
        click.echo(f"{plan.address.expanded} {when} {plan.target}, by {call}")
    click.echo(f"File: {short_path(str(plan.path))}")
    click.echo(f"In dom0, {POLICY_FILE} needs:")
    line = policy_line(plan.daemon.service, argument, this_qube(), plan.target)
    click.echo(f"    {' '.join(line)}")
