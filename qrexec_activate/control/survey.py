"""All routes, as systemd has them loaded and as the files have them: what every
command begins with.

Which units belong to this program is told by what their service runs, never by
their names: units that a person wrote by hand, or that another program brought,
count in the same way.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any

from ..errors import BadName
from ..routing.claim import Claim, PassedSocket, Refusal, Route
from ..routing.names import call_name, decode_escapes, parse_unit_name
from ..routing.routes import SocketUnit, by_name, claims, unit_specifiers
from ..routing.unitfile import (
    LISTEN_KINDS,
    SourceFile,
    address_key,
    assignments,
    declared_listeners,
    expand_specifiers,
)
from ..systemd.manager import Manager, open_manager
from ..systemd.unitdirs import UnitFiles, scan
from .netproc import Listening, listening

__all__ = [
    "Daemon",
    "Entry",
    "Survey",
    "Unit",
    "find_daemon",
    "foresee",
    "survey",
    "take_survey",
    "written_claims",
]

#: Options of `serve` that stand alone; all others are followed by their value.
_FLAGS = {"--help", "-h", "--debug"}


@dataclass(frozen=True, slots=True)
class Daemon:
    """A service that runs `qrexec-activate serve RPC`, and how it is now."""

    unit: str
    service: str
    #: The argument of all its calls, where it was given by --argument; None:
    #: each unit's instance is the argument.
    argument: str | None
    active: str = "inactive"
    sub: str = "dead"
    argv: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Entry:
    """A listener: where its connections go, or why they go nowhere."""

    listener: str
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

    @property
    def call(self) -> str:
        return call_name(self.service, self.argument)

    @property
    def state(self) -> str:
        """In one word or two, how it is: `listening`, `not started`, `restart
        needed`, `failed`…"""
        if self.active == "failed":
            return "failed"
        if self.active in ("inactive", "deactivating"):
            return "not started"
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

    @property
    def name(self) -> str:
        return self.socket.name


@dataclass(slots=True)
class Survey:
    """What there is. Entries are in the order in which a person would look for
    them."""

    user: bool
    daemons: dict[str, Daemon] = field(default_factory=dict)
    units: dict[str, Unit] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)
    files: UnitFiles = field(default_factory=UnitFiles)
    specifiers: dict[str, str] = field(default_factory=dict)
    listening: Listening = field(default_factory=lambda: Listening({}))
    control_group: str = ""


def find_daemon(
    unit: str, exec_start: Sequence[Sequence[Any]]
) -> Daemon | None:
    """Read from a service's ExecStart which RPC it serves; None if it runs
    another program.

    `exec_start` is the D-Bus property: (path, argv, …) for each command line.
    """
    for _, argv, *_ in exec_start:
        words = list(argv)
        if "serve" not in words:
            continue
        at = words.index("serve")
        # As a program, as `python3 -m qrexec_activate`, or by a path of one's
        # own.
        if any(
            PurePath(word).name in ("qrexec-activate", "qrexec_activate")
            for word in words[:at]
        ):
            service, argument = _serve_options(words[at + 1 :])
            if service:
                return Daemon(unit, service, argument, argv=tuple(words))
    return None


def _serve_options(words: list[str]) -> tuple[str, str | None]:
    """Find the RPC and --argument among the words after `serve`."""
    service, argument = "", None
    rest = iter(words)
    for word in rest:
        if not word.startswith("-"):
            service = service or word
            continue
        option, equals, value = word.partition("=")
        if not equals and option not in _FLAGS:
            value = next(rest, "")
        if option == "--argument":
            argument = value
    return service, argument


def survey(*, user: bool) -> Survey:
    """Connect to systemd and take a survey; raises ManagerError."""
    with open_manager(user=user) as manager:
        return take_survey(manager)


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
    sockets = _our_sockets(manager, result, loaded)
    names = sorted(sockets)
    states = {name: loaded[name] for name in names if name in loaded}
    load_states = dict(
        _load_states(manager, [name for name in names if name not in states])
    )
    for socket in manager.socket_units(names):
        name = socket.name
        known = states.get(name)
        result.units[name] = Unit(
            socket,
            result.daemons[sockets[name]],
            known.load if known else load_states.get(name, "loaded"),
            known.active if known else "inactive",
            known.sub if known else "dead",
            _enabled(result.files, name),
            _unread(result.files, socket),
        )
    for unit in result.units.values():
        result.entries += _entries(unit, result)
    result.entries.sort(key=_order)
    return result


def _our_sockets(
    manager: Manager, result: Survey, loaded: Mapping[str, Any]
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
            state = loaded.get(name)
            result.daemons[name] = (
                replace(daemon, active=state.active, sub=state.sub)
                if state
                else daemon
            )
    sockets = {
        name: service
        for name, service in triggered.items()
        if service in result.daemons
    }
    daemons = sorted(result.daemons)
    for daemon_name, row in zip(
        daemons,
        manager.unit_properties(daemons, "Unit", ["TriggeredBy"]),
        strict=True,
    ):
        sockets |= {
            name: daemon_name
            for name in row["TriggeredBy"] or ()
            if name.endswith(".socket")
        }
    return sockets


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
    if (
        name in files.fragments
        and os.path.realpath(files.fragments[name]) == "/dev/null"
    ):
        return "masked"
    return files.enabled.get(name, "disabled")


def _unread(files: UnitFiles, socket: SocketUnit) -> tuple[str, ...]:
    read = {file.path for file in socket.files}
    return tuple(
        path for path in files.drop_ins(socket.name) if path not in read
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
        return claims(daemon.service, socket, specifiers)
    try:
        passed = [
            PassedSocket(-1, socket.fd_name, kind, address)
            for kind, address in socket.listen
        ]
        return by_name(daemon.service, daemon.argument, passed)
    except BadName as error:
        return [
            Refusal(address, f"{daemon.unit}: {error}", socket.name)
            for _, address in socket.listen
        ]


def _argument(unit: str, daemon: Daemon) -> str:
    if daemon.argument is not None:
        return daemon.argument
    try:
        return decode_escapes(parse_unit_name(unit).argument)
    except BadName:
        return parse_unit_name(unit).argument


def _entries(unit: Unit, result: Survey) -> list[Entry]:
    def entry(
        listener: str,
        target: str | None,
        file: str,
        refused: str = "",
        listens: bool | None = None,
    ) -> Entry:
        return Entry(
            listener,
            target,
            unit.daemon.service,
            _argument(unit.name, unit.daemon),
            unit.name,
            unit.daemon.unit,
            file,
            unit.enabled,
            unit.active,
            listens,
            refused,
        )

    entries = []
    seen: dict[str, int] = {}
    for claim in loaded_claims(unit.daemon, unit.socket, result.specifiers):
        listens = result.listening.holds(claim.address)
        if isinstance(claim, Route):
            entries.append(
                entry(
                    claim.address,
                    claim.target,
                    claim.file or _only_file(unit),
                    "",
                    listens,
                )
            )
        else:
            reason = claim.reason
            # A file may open the same address twice; that is one line to a
            # person.
            if (
                claim.address in seen
                and entries[seen[claim.address]].refused == reason
            ):
                continue
            seen[claim.address] = len(entries)
            entries.append(
                entry(claim.address, None, claim.file, reason, listens)
            )
    systemctl = "systemctl" if not result.user else "systemctl --user"
    for listener, path, where in _not_taken(unit, result.specifiers):
        entries.append(
            entry(
                listener,
                None,
                path,
                f"{where}: systemd did not take this address; mend it, then"
                f" {systemctl} daemon-reload",
                False,
            )
        )
    for path in unit.unread:
        for listener in _listeners_in(path, unit.name, result.specifiers):
            entries.append(
                entry(
                    listener,
                    None,
                    path,
                    f"{path}: systemd has not read this file yet; {systemctl}"
                    f" daemon-reload,"
                    f" then {systemctl} restart {unit.name}",
                    False,
                )
            )
    return entries


def _only_file(unit: Unit) -> str:
    """The file that opens listeners, where the names and not the files decide
    and there is only one such file."""
    files = {
        declaration.path
        for declaration in declared_listeners(unit.socket.files).listeners
    }
    return files.pop() if len(files) == 1 else ""


def _not_taken(
    unit: Unit, specifiers: Mapping[str, str]
) -> Iterable[tuple[str, str, str]]:
    """Find listeners that a file declares and systemd has not loaded: (address,
    path, file and line)."""
    lines = sum(
        one.key in LISTEN_KINDS
        for file in unit.socket.files
        for one in assignments(file.text or "")
    )
    if lines <= len(unit.socket.listen):
        return
    declared = declared_listeners(unit.socket.files)
    values = unit_specifiers(unit.name, specifiers)
    loaded = [address_key(address) for _, address in unit.socket.listen]
    doubtful = []
    for declaration in declared.listeners:
        written = expand_specifiers(declaration.address, values)
        key = address_key(written) if written is not None else None
        if key is not None and key in loaded:
            loaded.remove(key)
        else:
            doubtful.append(
                (
                    written or declaration.address,
                    declaration.path,
                    declaration.where,
                )
            )
    # What systemd shows and nobody has claimed accounts for as many whose
    # address cannot be compared.
    yield from doubtful[len(loaded) :]


def _listeners_in(
    path: str, unit: str, specifiers: Mapping[str, str]
) -> list[str]:
    """The stream listeners that one file declares, read from the disk now."""
    file = read_file(path)
    values = unit_specifiers(unit, specifiers)
    found = [
        one.address
        for one in declared_listeners([file]).listeners
        if one.kind == "Stream"
    ]
    return [expand_specifiers(address, values) or address for address in found]


def read_file(path: str) -> SourceFile:
    """Read a unit file as it is on the disk now."""
    try:
        with open(
            path, encoding="utf-8", errors="surrogateescape", newline=""
        ) as file:
            return SourceFile(path, file.read())
    except OSError as error:
        return SourceFile(path, None, f"cannot be read ({error.strerror})")


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
        (one.kind, expand_specifiers(one.address, values) or one.address)
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
    fragment = files.fragments.get(unit) or files.fragments.get(template)
    paths = [fragment] if fragment else []
    return [read_file(path) for path in (*paths, *files.drop_ins(unit))]
