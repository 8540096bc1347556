"""qrexec-activate add: for each route a unit of its own, written, enabled and
started; for many, all or none."""

from __future__ import annotations

import contextlib
import os.path
import re
import shlex
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TextIO

import click

from ..errors import ActivateError, BadName, UsageProblem
from ..given.address import Address, parse_address
from ..given.escapes import escape_target
from ..given.kinds import default_listen, port_of, unit_of
from ..routing.address import AddressKey, address_key
from ..routing.claim import Refusal
from ..routing.names import (
    call_name,
    check_argument,
    check_service,
    check_target,
    parse_unit_name,
)
from ..routing.unitfile import SourceFile
from ..systemd.systemctl import Systemctl
from ..systemd.unitdirs import own_folder
from ..systemd.units import Manager, open_manager
from .address import (
    Trouble,
    is_open_to_others,
    is_plain,
    next_free,
    obstacle,
)
from .dropins import locked
from .finishing import finishing
from .kinds import daemon_of, will_refuse
from .options import (
    complete_files,
    complete_kinds,
    complete_targets,
    dry_run_option,
    system_option,
)
from .persistence import warn_of_loss
from .policy import FILE as POLICY_FILE
from .policy import policy_lines, this_qube
from .select import written
from .settle import Change, carry_out, show, undo
from .survey import Daemon, Entry, Survey, foresee, source_files, take_survey
from .table import short_path

__all__ = ["command", "drop_in_text"]

_LABEL = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.-]*", re.ASCII)


class Wish(NamedTuple):
    """A route as a person asks for it."""

    kind: str
    argument: str
    target: str
    listen: str | None = None
    label: str | None = None
    #: File and line that ask for it; empty where it was the command line.
    where: str = ""


def drop_in_text(listen: str, target: str) -> str:
    """The whole of a drop-in, as a person would write it."""
    return (
        f"[Socket]\nListenStream={listen}\n"
        f"FileDescriptorName={escape_target(target)}\n"
    )


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done for a route, decided before anything is changed."""

    #: The route as it will be, or as it is already.
    entry: Entry
    path: Path
    text: str
    #: Things that a person should know, a line each.
    notes: tuple[str, ...] = ()
    #: The file is there already, with just this route.
    exists: bool = False
    #: systemd has the unit in memory.
    loaded: bool = False

    @property
    def listens(self) -> bool:
        """Whether nothing is left to be started."""
        return (
            self.exists
            and self.entry.state == "listening"
            and self.entry.listens is not False
        )


def _listen_option(command: click.decorators.FC) -> click.decorators.FC:
    return click.option(
        "--listen",
        metavar="ADDRESS[:PORT]|PATH",
        shell_complete=complete_files,
        help="Where to listen in this qube.",
    )(command)


def _label_option(command: click.decorators.FC) -> click.decorators.FC:
    return click.option(
        "--label",
        metavar="NAME",
        help="What to call the route and its unit.  [default: the target]",
    )(command)


@click.command(
    "add",
    epilog="""\b
Examples:
    $ qrexec-activate add tcp 1234 gitweb
    $ qrexec-activate add tcp 5432 db --listen 127.0.0.2 --label shop
    $ qrexec-activate add unix gpg-agent-ssh @default --listen %t/ssh-agent
    $ qrexec-activate add tcp-bind 2049-127.0.1.1 nfs
    $ qrexec-activate add --from routes.txt
""",
)
@click.argument(
    "kind", metavar="KIND", required=False, shell_complete=complete_kinds
)
@click.argument("argument", required=False)
@click.argument("target", required=False, shell_complete=complete_targets)
@_listen_option
@_label_option
@click.option(
    "--from",
    "source",
    metavar="FILE",
    type=click.File(encoding="utf-8", errors="surrogateescape"),
    help="Add a route for each line, KIND ARGUMENT TARGET with its --listen"
    " and --label; all or none.",
)
@dry_run_option
@click.option(
    "--no-start", is_flag=True, help="Write and enable it, but do not start it."
)
@system_option
def command(
    kind: str | None,
    argument: str | None,
    target: str | None,
    listen: str | None,
    label: str | None,
    source: TextIO | None,
    dry_run: bool,
    no_start: bool,
    system: bool,
) -> None:
    """Let a local address reach the qube TARGET: write a unit of its own for
    it, enable it and start it.

    KIND is tcp (ARGUMENT is the port there), unix (the name of a socket there),
    tcp-bind (PORT-ADDRESS), or a prefix that add-rpc made. TARGET is a qube,
    @default, @dispvm or @dispvm:NAME. Without --listen it is the same port on
    127.0.0.1 (or the next free 127.0.0.N), and for others a socket in
    $XDG_RUNTIME_DIR/qrexec. The unit is qrexec-connect-KIND@ARGUMENT:LABEL.
    Without any argument, lines are read from standard input, as with --from.
    """
    if kind is None:
        if listen is not None or label is not None:
            raise UsageProblem("--listen and --label stand in each line")
        if source is None and sys.stdin.isatty():
            raise UsageProblem(
                "what is to be added? Write it like add tcp 1234 QUBE; add"
                " --help says more"
            )
        wishes = list(_wishes(source or sys.stdin))
    elif argument is None or target is None or source is not None:
        raise UsageProblem(
            "write add KIND ARGUMENT TARGET, such as add tcp 1234 gitweb, or"
            " add --from FILE"
        )
    else:
        wishes = [Wish(kind, argument, target, listen, label)]
    if not wishes:
        raise UsageProblem(
            "there is no route to add: write one a line, such as tcp 1234 QUBE"
        )
    for wish in wishes:
        with _placed(wish):
            check_target(wish.target)
            unit_of(wish.kind, wish.argument)
            if wish.label is not None and not _LABEL.fullmatch(wish.label):
                raise BadName(
                    f"{wish.label!r} is no label: letters, digits, '_', '.'"
                    f" and '-'"
                )
    folder = own_folder(user=not system)
    systemctl = Systemctl(user=not system)
    warn_of_loss(folder)
    if dry_run:
        plans = _plan(wishes, folder, not system)
        _tell(plans)
        show(_change(plans, no_start), systemctl)
        return
    # Where no systemd answers, as it does not by sudo, nothing is made.
    with open_manager(user=not system):
        pass
    with locked(folder):
        plans = _plan(wishes, folder, not system)
        _tell(plans)
        change = _change(plans, no_start)
        with finishing():
            try:
                carry_out(change, systemctl)
            except BaseException:
                undo(change, systemctl)
                raise
    _report(plans, no_start)


# ----------------------------------------------------------------------- lines


@click.command("add", add_help_option=False)
@click.argument("kind")
@click.argument("argument")
@click.argument("target")
@_listen_option
@_label_option
def _line(
    kind: str, argument: str, target: str, listen: str | None, label: str | None
) -> Wish:
    return Wish(kind, argument, target, listen, label)


def _wishes(lines: Iterable[str]) -> Iterator[Wish]:
    """Read a route from each line; empty ones and comments are passed over."""
    name = getattr(lines, "name", "-")
    for number, line in enumerate(lines, start=1):
        where = f"{name}:{number}"
        try:
            words = shlex.split(line, comments=True)
            if words:
                wish = _line.main(words, "add", standalone_mode=False)
                yield wish._replace(where=where)
        except (ValueError, click.UsageError) as error:
            said = (
                error.format_message()
                if isinstance(error, click.UsageError)
                else str(error)
            )
            raise UsageProblem(f"{where}: {said}") from None


@contextlib.contextmanager
def _placed(wish: Wish) -> Iterator[None]:
    """Let an error say which line it is about."""
    try:
        yield
    except ActivateError as error:
        if wish.where:
            raise type(error)(f"{wish.where}: {error}") from None
        raise


# ---------------------------------------------------------------------- decide


@dataclass(slots=True)
class _Situation:
    """What there is, and what the routes that were planned so far will take."""

    now: Survey
    manager: Manager
    folder: Path
    entries: list[Entry]
    daemons: dict[str, Daemon] = field(default_factory=dict)
    #: Routes that may be in the way of an address: by port, or by the address.
    _near: dict[object, list[Entry]] = field(default_factory=dict)
    units: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        for entry in self.entries:
            self._note(entry)

    def _note(self, entry: Entry) -> None:
        key = address_key(entry.listener)
        if key is not None:
            self._near.setdefault(_nearness(key), []).append(entry)
        self.units.add(entry.unit)

    def take(self, entry: Entry) -> None:
        self.entries.append(entry)
        self._note(entry)

    def near(self, address: Address) -> list[Entry]:
        return self._near.get(_nearness(address.key), [])

    def daemon(self, wish: Wish) -> Daemon:
        unit = unit_of(wish.kind, wish.argument)
        prefix = parse_unit_name(unit).prefix
        if prefix not in self.daemons:
            self.daemons[prefix] = daemon_of(
                self.manager, wish.kind, unit, self.now
            )
        daemon = self.daemons[prefix]
        check_argument(
            check_service(daemon.service), _argument(daemon, wish.argument)
        )
        return daemon


def _nearness(key: AddressKey) -> object:
    return key[2] if key[0] == "ip" else key


def _argument(daemon: Daemon, argument: str) -> str:
    return argument if daemon.argument is None else daemon.argument


def _plan(wishes: list[Wish], folder: Path, user: bool) -> list[Plan]:
    """Check everything that can be checked before anything is written."""
    plans: dict[Entry, Plan] = {}
    with open_manager(user=user) as manager:
        now = take_survey(manager)
        there = _Situation(now, manager, folder, written(now))
        for wish in wishes:
            with _placed(wish):
                plan = _plan_one(wish, there)
            if not plan.exists:
                there.take(plan.entry)
            # Another line may have said the same.
            plans.setdefault(plan.entry, plan)
    return list(plans.values())


def _plan_one(wish: Wish, there: _Situation) -> Plan:
    daemon = there.daemon(wish)
    wanted = _wanted(
        wish.kind, wish.argument, wish.target, wish.listen, there.now
    )
    if existing := _existing(wish, daemon, wanted, there):
        note = (
            f"{existing.listener} reaches {wish.target} already, by"
            f" {short_path(existing.file)}"
        )
        return Plan(existing, Path(existing.file), "", (note,), exists=True)
    unit = _new_unit(wish, there)
    before = source_files(unit, there.now.files)
    address, notes = _free(wanted, wish.target, wish.listen is not None, there)
    if is_open_to_others(address.key):
        notes += (
            f"Warning: other machines may reach {address.expanded}, and so"
            f" make calls as this qube",
        )
    argument = _argument(daemon, wish.argument)
    if refuses := will_refuse(daemon.service, argument):
        notes += (refuses,)
    text = drop_in_text(address.written, wish.target)
    path = _new_path(there.folder / f"{unit}.d", wish.target)
    _check_effect(
        unit,
        daemon,
        before,
        SourceFile(str(path), text),
        wish.target,
        address,
        there.now,
    )
    entry = Entry(
        address.expanded,
        wish.target,
        daemon.service,
        argument,
        unit,
        daemon.unit,
        str(path),
        "disabled",
        "inactive",
        None,
    )
    return Plan(entry, path, text, notes, loaded=unit in there.now.loaded)


def _new_unit(wish: Wish, there: _Situation) -> str:
    """The unit that the route is to have for itself: nobody else may open
    anything there."""
    label = wish.label or wish.target.strip("@").replace(":", "-")
    unit = unit_of(wish.kind, wish.argument, label)
    if wish.label is not None and unit in there.units:
        raise UsageProblem(f"there is a {unit} already: choose another --label")
    number = 2
    while unit in there.units:
        unit = unit_of(wish.kind, wish.argument, f"{label}-{number}")
        number += 1
    return unit


def _wanted(
    kind: str, argument: str, target: str, listen: str | None, now: Survey
) -> Address:
    """Where it is to listen if nothing is in the way."""
    if listen is None:
        listen = default_listen(kind, argument)
    return parse_address(listen, port_of(kind, argument), now.specifiers)


def _existing(
    wish: Wish, daemon: Daemon, wanted: Address, there: _Situation
) -> Entry | None:
    """Find a route that does just what is asked for, whoever wrote it."""
    call = call_name(daemon.service, _argument(daemon, wish.argument))
    for entry in there.entries:
        if (entry.target, entry.daemon, entry.call) != (
            wish.target,
            daemon.unit,
            call,
        ):
            continue
        if (
            wish.listen is not None
            and address_key(entry.listener) != wanted.key
        ):
            continue
        if wish.label is not None and entry.unit != unit_of(
            wish.kind, wish.argument, wish.label
        ):
            continue
        return entry
    return None


def _free(
    wanted: Address, target: str, insists: bool, there: _Situation
) -> tuple[Address, tuple[str, ...]]:
    """The address that is wanted, or where nobody insists on it another one
    that is free."""
    hindrance = obstacle(wanted, there.near(wanted), there.now.listening)
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
        other = next_free(wanted, there.near(wanted), there.now.listening)
    elif wanted.key[0] == "path":
        name = f"{wanted.written}-{target.strip('@').replace(':', '-')}"
        other = parse_address(name, None, there.now.specifiers)
        other = (
            other
            if obstacle(other, there.near(other), there.now.listening) is None
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
    added: SourceFile,
    target: str,
    address: Address,
    now: Survey,
) -> None:
    """Make sure that the new file does what it is for: files that were there
    before may interfere."""
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


# ---------------------------------------------------------------------- do


def _tell(plans: list[Plan]) -> None:
    for plan in plans:
        for note in plan.notes:
            click.echo(note, err=True)
        if not is_plain(plan.entry.listener):
            click.echo(
                f"{plan.entry.listener}: systemd 252 closes it at each"
                " daemon-reload; use plain letters",
                err=True,
            )


def _change(plans: list[Plan], no_start: bool) -> Change:
    change = Change(
        unread=not no_start
        and not any(plan.exists or plan.loaded for plan in plans)
    )
    for plan in plans:
        entry = plan.entry
        if entry.enabled != "enabled" and entry.unit not in change.enable:
            change.enable.append(entry.unit)
        if not plan.exists:
            change.new[plan.path] = plan.text
        if no_start or plan.listens or entry.unit in change.wanted:
            continue
        change.wanted[entry.unit] = [entry.listener]
        waits = plan.exists and entry.state == "restart needed"
        (change.restart if waits else change.start).append(entry.unit)
    return change


def _report(plans: list[Plan], no_start: bool) -> None:
    when = "will reach" if no_start else "now reaches"
    for plan in plans:
        if not plan.listens:
            entry = plan.entry
            click.echo(
                f"{entry.listener} {when} {entry.target}, by {entry.call}"
            )
    if len(plans) == 1:
        click.echo(f"File: {short_path(str(plans[0].path))}")
    click.echo(f"In dom0, {POLICY_FILE} needs:")
    for line in policy_lines(
        [plan.entry for plan in plans], this_qube(), "ask", None
    ):
        click.echo(f"    {line}")
