"""All routes, as systemd has them loaded and as the files have them: what every
command begins with.

Which units belong to this program is told by what their service runs, never by
their names: units that a person wrote by hand, or that another program brought,
count in the same way.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any

from ..errors import BadName
from ..given.line import is_of_dom0
from ..routing.address import (
    AddressKey,
    address_key,
    expand_specifiers,
    shown_address,
    written_key,
)
from ..routing.claim import Claim, PassedSocket, Refusal, Route
from ..routing.names import call_name, decode_escapes, parse_unit_name
from ..routing.routes import SocketUnit, by_name, claims, unit_specifiers
from ..routing.unitfile import (
    LISTEN_KINDS,
    Declaration,
    SourceFile,
    assignments,
    declared_listeners,
)
from ..systemd.shown import plain_address
from ..systemd.unitdirs import UnitFiles, scan
from ..systemd.units import LoadedUnit, Manager, open_manager
from .daemons import (
    Daemon,
    declared_daemon,
    find_daemon,
    is_mask,
    read_file,
)
from .managers import ask
from .netproc import Listening, listening

__all__ = [
    "Daemon",
    "Entry",
    "Survey",
    "Unit",
    "accepts",
    "all_entries",
    "find_daemon",
    "foresee",
    "is_utf_8",
    "masked_name",
    "read_file",
    "survey",
    "take_survey",
    "why_dead",
    "written_claims",
]


@dataclass(frozen=True, slots=True)
class Entry:
    """A listener: where its connections go, or why they go nowhere."""

    #: The address, as a person would write it.
    listener: str
    #: The qube that its file names, also where that counts for nothing.
    target: str | None
    service: str
    argument: str
    unit: str
    daemon: str
    #: The file that opens it; empty where no file is known to.
    file: str
    enabled: str
    active: str
    #: Whether somebody listens there now; None where the kernel does not tell.
    listens: bool | None
    #: Why its connections are reset, or never come; empty if they reach the
    #: target.
    refused: str = ""
    #: systemd's LoadState of the socket unit.
    load: str = "loaded"
    #: Whose unit it is: "user" or "system".
    manager: str = "user"

    @property
    def call(self) -> str:
        return call_name(self.service, self.argument)

    @property
    def label(self) -> str:
        return parse_unit_name(self.unit).label

    @property
    def key(self) -> str:
        """The feature by which dom0 gives it; empty of what is of this
        qube."""
        return is_of_dom0(self.file)

    @property
    def state(self) -> str:
        """In one word or two, how it is: `listening`, `not started`, `restart
        needed`, `failed`, `refused`, `masked`…

        `not readable` is one of the system whose file only root can read."""
        if self.enabled == "masked":
            return "masked"
        if self.load != "loaded":
            return "not loadable"
        if self.refused:
            return "refused"
        if self.active == "failed":
            return "failed"
        if self.active in ("inactive", "deactivating"):
            return "not started"
        if not self.target:
            return "not readable"
        return "restart needed" if self.listens is False else "listening"

    def matches(self, word: str) -> bool:
        """Whether a person who writes this word may mean this route."""
        name = parse_unit_name(self.unit)
        names = {
            self.listener,
            self.unit,
            self.unit.removesuffix(".socket"),
            *filter(None, (name.instance, name.argument, name.label)),
            self.call,
            self.target,
            self.file,
        }
        if self.file.endswith(".conf"):
            names.add(PurePath(self.file).stem)
        return word in names


@dataclass(slots=True)
class Unit:
    """A socket unit of a daemon, as systemd has it and as the disk has it."""

    socket: SocketUnit
    daemon: Daemon
    load: str
    active: str
    sub: str
    enabled: str
    #: Drop-ins that systemd has not read.
    unread: tuple[str, ...] = ()
    manager: str = "user"
    #: Whether systemd has it start another service than its files mean.
    astray: bool = False

    @property
    def name(self) -> str:
        return self.socket.name

    @property
    def unreadable(self) -> list[str]:
        """Files of the system that its daemon can read, and this user
        cannot."""
        return [
            file.path
            for file in self.socket.files
            if self.manager == "system"
            and os.geteuid() != 0
            and file.problem.startswith("cannot be read")
        ]

    @property
    def in_doubt(self) -> bool:
        """Whether the disk may hold listeners that systemd has not."""
        files = self.socket.files
        return (
            self.load != "loaded"
            or bool(self.unread)
            or any(file.text is None for file in files)
            or sum(
                one.key in LISTEN_KINDS
                for file in files
                for one in assignments(file.text or "")
            )
            > len(self.socket.listen)
        )


@dataclass(slots=True)
class Survey:
    """What there is. Entries are in the order in which a person would look for
    them."""

    user: bool
    daemons: dict[str, Daemon] = field(default_factory=dict)
    units: dict[str, Unit] = field(default_factory=dict)
    #: All socket and service units that systemd has in memory.
    loaded: frozenset[str] = frozenset()
    entries: list[Entry] = field(default_factory=list)
    files: UnitFiles = field(default_factory=UnitFiles)
    specifiers: dict[str, str] = field(default_factory=dict)
    listening: Listening = field(default_factory=lambda: Listening({}))
    control_group: str = ""

    @property
    def manager(self) -> str:
        return "user" if self.user else "system"

    @property
    def systemctl(self) -> str:
        return "systemctl --user" if self.user else "systemctl"


def survey(*, user: bool) -> Survey:
    """Connect to systemd and take a survey; raises ManagerError."""
    with open_manager(user=user) as manager:
        return take_survey(manager)


def all_entries(which: str | None) -> tuple[list[Entry], str]:
    """Return the routes of the manager that is named or else of both, the
    user's first; and in words what is not among them."""
    surveys, lost = ask(
        which, lambda user: survey(user=user), lambda now: bool(now.entries)
    )
    return [entry for now in surveys for entry in now.entries], lost


def take_survey(manager: Manager) -> Survey:
    """Ask systemd and read the disk."""
    search_path, control_group = manager.manager_properties(
        "UnitPath", "ControlGroup"
    )
    result = Survey(
        manager.user,
        specifiers=manager.specifiers(),
        control_group=control_group or "",
    )
    result.files = scan(search_path or ())
    result.listening = listening()
    loaded = {
        unit.name: unit for unit in manager.list_units("*.socket", "*.service")
    }
    result.loaded = frozenset(loaded)
    sockets = _our_sockets(manager, result, loaded)
    lost = _lost_sockets(manager, result, loaded, set(sockets))
    sockets |= lost
    names = sorted(sockets)
    states = {name: loaded[name] for name in names if name in loaded}
    load_states = dict(
        _load_states(manager, [name for name in names if name not in states])
    )
    known_to_systemd = {
        socket.name: socket for socket in manager.socket_units(names)
    }
    for name in names:
        socket = known_to_systemd.get(name) or SocketUnit(name, (), (), name)
        known = states.get(name)
        drop_ins = result.files.drop_ins(name)
        socket = _as_written(socket, drop_ins)
        read = {file.path for file in socket.files}
        result.units[name] = Unit(
            socket,
            result.daemons[sockets[name]],
            known.load if known else load_states.get(name, "loaded"),
            known.active if known else "inactive",
            known.sub if known else "dead",
            _enabled(result.files, name),
            tuple(path for path in drop_ins if path not in read),
            result.manager,
            name in lost,
        )
    for unit in result.units.values():
        result.entries += _entries(unit, result)
    result.entries.sort(key=_order)
    return result


def _our_sockets(
    manager: Manager, result: Survey, loaded: Mapping[str, LoadedUnit]
) -> dict[str, str]:
    """Find the socket units that start a daemon, by name, with the name of the
    daemon's unit."""
    services = [name for name in loaded if name.endswith(".service")]
    # A unit that nothing has asked for yet is not loaded; asking for its
    # properties loads it.
    unloaded = sorted(
        name for name in result.files.units("socket") if name not in loaded
    )
    triggered: dict[str, str] = {}
    for name, row in zip(
        unloaded,
        manager.unit_properties(unloaded, "Unit", ["Triggers"]),
        strict=True,
    ):
        for service in row["Triggers"] or ():
            triggered[name] = service
    services += sorted(set(triggered.values()) - set(services))
    rows = manager.unit_properties(services, "Service", ["ExecStart"])
    for name, row in zip(services, rows, strict=True):
        if daemon := find_daemon(name, row["ExecStart"] or ()):
            result.daemons[name] = _as_it_is(daemon, loaded)
    sockets = {
        name: service
        for name, service in triggered.items()
        if service in result.daemons
    }
    daemons = sorted(result.daemons)
    for daemon_name, row in zip(
        daemons,
        manager.unit_properties(daemons, "Unit", ["TriggeredBy", "LoadState"]),
        strict=True,
    ):
        if (load := row["LoadState"] or "not-found") != "loaded":
            daemon = replace(result.daemons[daemon_name], load=load)
            why = why_dead(daemon, result.systemctl)
            result.daemons[daemon_name] = replace(daemon, dead=why)
        sockets |= {
            name: daemon_name
            for name in row["TriggeredBy"] or ()
            if name.endswith(".socket")
        }
    return sockets


def _as_it_is(daemon: Daemon, loaded: Mapping[str, LoadedUnit]) -> Daemon:
    state = loaded.get(daemon.unit)
    return (
        replace(daemon, active=state.active, sub=state.sub) if state else daemon
    )


def _lost_sockets(
    manager: Manager,
    result: Survey,
    loaded: Mapping[str, LoadedUnit],
    found: set[str],
) -> dict[str, str]:
    """Find the socket units whose files mean to start a daemon of ours, though
    as systemd has them loaded they do not."""
    sockets = {}
    dead: dict[str, Daemon] = {}
    for name in sorted(result.files.units("socket") - found):
        with suppress(BadName):
            if daemon := declared_daemon(name, result.files):
                sockets[name] = daemon.unit
                dead.setdefault(daemon.unit, daemon)
    units = sorted(dead.keys() - result.daemons.keys())
    rows = manager.unit_properties(units, "Unit", ["LoadState"])
    for unit, row in zip(units, rows, strict=True):
        load = row["LoadState"] or "not-found"
        daemon = replace(_as_it_is(dead[unit], loaded), load=load)
        why = why_dead(daemon, result.systemctl)
        result.daemons[unit] = replace(daemon, dead=why)
    return sockets


def why_dead(daemon: Daemon, systemctl: str) -> str:
    """Why a service that should serve cannot."""
    unit, load = daemon.unit, daemon.load
    if load == "masked":
        return f"{unit} is masked; {systemctl} unmask {unit}"
    if load == "not-found":
        return f"{unit} is not installed: " + (
            "install the package qrexec-activate"
            if daemon.is_shipped
            else "write it, or take it out of the files that say Service="
        )
    if load != "loaded":
        return (
            f"systemd cannot load {unit} (LoadState={load}); {systemctl}"
            f" status {unit} says why"
        )
    return (
        f"{unit} does not run qrexec-activate serve; {systemctl} cat {unit}"
        f" shows which file makes it run something else"
    )


def _load_states(
    manager: Manager, names: Sequence[str]
) -> Iterable[tuple[str, str]]:
    for name, row in zip(
        names,
        manager.unit_properties(names, "Unit", ["LoadState"]),
        strict=True,
    ):
        yield name, row["LoadState"] or "not-found"


def _enabled(files: UnitFiles, name: str) -> str:
    if name in files.fragments and is_mask(files.fragments[name]):
        return "masked"
    return files.enabled.get(name, "disabled")


def _as_written(socket: SocketUnit, drop_ins: Sequence[str]) -> SocketUnit:
    """Name the files as they were found on the way that systemd searches: it
    resolves the links of folders, as those into a folder of dotfiles are."""
    strange = [
        file
        for file in socket.files[1:]
        if file.path not in drop_ins and not file.path.endswith(".socket")
    ]
    if not strange:
        return socket
    written = {os.path.realpath(path): path for path in drop_ins}
    return replace(
        socket,
        files=tuple(
            replace(
                file,
                path=written.get(os.path.realpath(file.path), file.path),
            )
            if file in strange
            else file
            for file in socket.files
        ),
    )


def _order(entry: Entry) -> tuple[Any, ...]:
    name = parse_unit_name(entry.unit)
    argument = name.argument
    number = (
        int(argument)
        if argument.isascii() and argument.isdigit() and len(argument) < 10
        else -1
    )
    return (
        name.prefix,
        number,
        argument,
        name.label,
        entry.file,
        entry.listener,
    )


# --------------------------------------------------- from a unit to its entries


def loaded_claims(
    daemon: Daemon, socket: SocketUnit, specifiers: Mapping[str, str]
) -> list[Claim]:
    """Decide on each listener that systemd has loaded, as the daemon will."""
    if daemon.argument is None:
        found = claims(daemon.service, socket, specifiers)
    else:
        try:
            passed = [
                PassedSocket(-1, socket.fd_name, kind, address)
                for kind, address in socket.listen
            ]
            found = by_name(daemon.service, daemon.argument, passed)
        except BadName as error:
            found = [
                Refusal(address, f"{daemon.unit}: {error}", socket.name)
                for _, address in socket.listen
            ]
    return [
        replace(claim, address=plain_address(claim.address)) for claim in found
    ]


def _argument(unit: str, daemon: Daemon) -> str:
    if daemon.argument is not None:
        return daemon.argument
    try:
        return decode_escapes(parse_unit_name(unit).argument)
    except BadName:
        return parse_unit_name(unit).argument


def _entries(unit: Unit, result: Survey) -> list[Entry]:
    decided = (
        loaded_claims(unit.daemon, unit.socket, result.specifiers)
        if unit.load == "loaded"
        else []
    )
    refused = any(isinstance(claim, Refusal) for claim in decided)
    on_disk = _on_disk(unit, result) if refused or unit.in_doubt else _Disk()
    entries: dict[Entry, None] = {}
    for claim in decided:
        listens = result.listening.holds(claim.address)
        reason, target, file = _why_lost(unit), "", claim.file
        if isinstance(claim, Refusal):
            reason = reason or ("" if unit.unreadable else claim.reason)
            target = on_disk.targets.get(claim.address, "")
            file = file or on_disk.files.get(claim.address, "")
        else:
            target = claim.target
            file = file or _only_file(unit)
            if listens and unit.active == "active" and _is_gone(claim.address):
                reason = reason or (
                    f"the file of the socket was removed, so nobody can"
                    f" connect; {result.systemctl} restart {unit.name}"
                )
        # A file may open the same address twice; that is one line to a person.
        entry = _entry(unit, claim.address, target, file, listens, reason)
        entries[entry] = None
    loaded = Counter(address_key(claim.address) for claim in decided)
    for listener, path, reason in _missing(unit, on_disk, loaded, result):
        target = on_disk.targets.get(listener, "")
        # One that was loaded before listens on.
        listens = (
            result.listening.holds(listener)
            if unit.load != "loaded" and unit.active == "active"
            else False
        )
        entry = _entry(unit, listener, target, path, listens, reason)
        entries[entry] = None
    return list(entries)


def _why_lost(unit: Unit) -> str:
    """Why connections never come to the daemon, though systemd has loaded the
    unit; empty if they do."""
    if unit.daemon.dead or not unit.astray:
        return unit.daemon.dead
    return (
        f"{unit.name} does not start {unit.daemon.unit}: add"
        f" Service={unit.daemon.unit} to its section [Socket]"
    )


def _entry(
    unit: Unit,
    listener: str,
    target: str,
    file: str,
    listens: bool | None,
    refused: str,
) -> Entry:
    return Entry(
        listener,
        target or None,
        unit.daemon.service,
        _argument(unit.name, unit.daemon),
        unit.name,
        unit.daemon.unit,
        file,
        unit.enabled,
        unit.active,
        listens,
        refused,
        unit.load,
        unit.manager,
    )


def _is_gone(address: str) -> bool:
    """Whether a path that somebody listens on leads nowhere any more."""
    if not address.startswith("/"):
        return False
    try:
        return not stat.S_ISSOCK(os.stat(address).st_mode)
    except PermissionError:
        return False
    except OSError:
        return True


@dataclass(slots=True)
class _Disk:
    """What the disk says of a unit now: each listener as declared and expanded,
    and the target of each that would be served."""

    listeners: list[tuple[str, Declaration]] = field(default_factory=list)
    targets: dict[str, str] = field(default_factory=dict)

    @property
    def files(self) -> dict[str, str]:
        return {address: one.path for address, one in self.listeners}


def _on_disk(unit: Unit, result: Survey) -> _Disk:
    files = source_files(unit.name, result.files)
    values = unit_specifiers(unit.name, result.specifiers)
    return _Disk(
        [
            (expand_specifiers(one.address, values) or one.address, one)
            for one in declared_listeners(files).listeners
        ],
        {
            claim.address: claim.target
            for claim in foresee(
                unit.daemon, unit.name, files, result.specifiers
            )
            if isinstance(claim, Route)
        },
    )


def _missing(
    unit: Unit,
    on_disk: _Disk,
    loaded: Counter[AddressKey | None],
    result: Survey,
) -> Iterator[tuple[str, str, str]]:
    """Find listeners that the disk declares and systemd has not loaded:
    (address, path, why)."""
    left = loaded.copy()
    doubtful = []
    for listener, declaration in on_disk.listeners:
        key = address_key(listener)
        if key is not None and left[key]:
            left[key] -= 1
        else:
            doubtful.append((key, listener, declaration))
    # What systemd shows and nobody has claimed accounts for as many whose
    # address cannot be compared.
    strays = left.total()
    for key, listener, declaration in doubtful:
        if key is None and strays:
            strays -= 1
            continue
        yield (
            listener,
            declaration.path,
            _why_missing(unit, listener, declaration, result.systemctl),
        )


def _why_missing(
    unit: Unit, listener: str, declaration: Declaration, systemctl: str
) -> str:
    path = declaration.path
    reload = f"{systemctl} daemon-reload, then {systemctl} restart {unit.name}"
    if unit.load == "masked":
        masked = masked_name(unit.name, unit.enabled)
        return f"{unit.name} is masked; {systemctl} unmask {masked}"
    if unit.daemon.load == unit.load == "not-found":
        return unit.daemon.dead
    not_taken = (
        f"{declaration.where}: systemd did not take this address; mend it,"
        f" then {systemctl} daemon-reload"
    )
    if unit.load != "loaded":
        if where := accepts(unit, path):
            return (
                f"{where} sets Accept=yes, and one daemon serves all"
                f" connections: take it out, then {systemctl} daemon-reload"
            )
        if written_key(listener) is None:
            return not_taken
        return (
            f"systemd cannot load {unit.name} (LoadState={unit.load});"
            f" {systemctl} status {unit.name} says why"
        )
    if not is_utf_8(path):
        return (
            f"{path}: its name is no UTF-8, so systemd cannot tell of it;"
            f" rename it, then {reload}"
        )
    if path in unit.unread:
        return f"{path}: systemd has not read this file yet; {reload}"
    if any(f.path == path and f.text is None for f in unit.socket.files):
        return f"{path} was changed after systemd read it; {reload}"
    return not_taken


def is_utf_8(path: str) -> bool:
    """Whether a path can go over D-Bus, which takes no other bytes."""
    return not any("\udc80" <= char <= "\udcff" for char in path)


def masked_name(unit: str, enabled: str) -> str:
    """What is masked: a unit itself, or its template."""
    name = parse_unit_name(unit)
    own = enabled == "masked" or not name.instance
    return unit if own else f"{name.prefix}@.{name.suffix}"


def accepts(unit: Unit, path: str) -> str:
    """Where a file asks systemd for a process per connection; empty if none
    does."""
    for file in (*unit.socket.files, read_file(path)):
        for one in assignments(file.text or ""):
            if (one.section, one.key) == ("Socket", "Accept") and (
                one.value.lower() in ("1", "yes", "y", "true", "t", "on")
            ):
                return f"{file.path}:{one.line}"
    return ""


def _only_file(unit: Unit) -> str:
    """The file that opens listeners, where the names and not the files decide
    and there is only one such file."""
    files = {
        declaration.path
        for declaration in declared_listeners(unit.socket.files).listeners
    }
    return files.pop() if len(files) == 1 else ""


# -------------------------------- what would be, were files other than they are


def foresee(
    daemon: Daemon,
    unit: str,
    files: Sequence[SourceFile],
    specifiers: Mapping[str, str],
) -> list[Claim]:
    """Tell what would be claimed if systemd had loaded exactly these files, in
    this order.

    Listeners whose address holds a specifier that only systemd knows keep it as
    written.
    """
    declared = declared_listeners(files)
    values = unit_specifiers(unit, specifiers)
    listen = tuple(
        (
            one.kind,
            shown_address(
                expand_specifiers(one.address, values) or one.address
            ),
        )
        for one in declared.listeners
    )
    name = unit
    if declared.last_name is not None and declared.last_name.text:
        name = (
            expand_specifiers(declared.last_name.text, values)
            or declared.last_name.text
        )
    return loaded_claims(
        daemon, SocketUnit(unit, tuple(files), listen, name), specifiers
    )


def written_claims(
    daemon: Daemon, unit: str, files: UnitFiles, specifiers: Mapping[str, str]
) -> list[Claim]:
    """Tell what systemd would have after a daemon-reload, judged by what is on
    the disk now."""
    return foresee(daemon, unit, source_files(unit, files), specifiers)


def source_files(unit: str, files: UnitFiles) -> list[SourceFile]:
    """Read the fragment and the drop-ins of a unit from the disk, in the order
    in which systemd would apply them."""
    name = parse_unit_name(unit)
    template = f"{name.prefix}@.{name.suffix}" if name.instance else unit
    # What is masked has a template below the mask.
    fragment = next(
        (
            path
            for owner in (unit, template)
            for path in files.all_fragments.get(owner, ())
            if not is_mask(path)
        ),
        None,
    )
    paths = [fragment] if fragment else []
    return [read_file(path) for path in (*paths, *files.drop_ins(unit))]
