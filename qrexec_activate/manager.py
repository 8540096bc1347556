"""What systemd knows: units over D-Bus, and the text of their files.

Read-only but for reset_start_limit(). Asks for many properties at once, since a manager may have thousands of
socket units. jeepney is imported when a Manager is opened, and can be forgotten afterwards.
"""

from __future__ import annotations

import os
import pwd
import struct
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import ManagerError
from .routes import SocketUnit
from .unitfile import SourceFile

if TYPE_CHECKING:
    from jeepney import Message
    from jeepney.io.blocking import DBusConnection

__all__ = ["LoadedUnit", "Manager", "open_manager", "runs_in_user_manager"]

#: systemd answers in milliseconds; a bus that says nothing for this long will not.
REPLY_TIMEOUT = 20.0
#: Requests on the way at once. dbus-daemon answers all beyond 128 with an error (max_replies_per_connection, which
#: system.conf leaves at that), and a unit whose properties are not told would be missing.
PIPELINE = 100

#: What jeepney raises for a bus that is not there, goes away, or talks nonsense.
_BUS_ERRORS = (OSError, ValueError, EOFError, LookupError, RuntimeError, TypeError, struct.error)

_SERVICE = "org.freedesktop.systemd1"
_UNIT = "org.freedesktop.systemd1.Unit"
_SOCKET = "org.freedesktop.systemd1.Socket"
_MANAGER = "org.freedesktop.systemd1.Manager"
_SYSTEM_BUS = "unix:path=/run/dbus/system_bus_socket"


def runs_in_user_manager() -> bool:
    """Whether this process is a service of a user manager: it sets MANAGERPID, the system manager does not."""
    return "MANAGERPID" in os.environ


def _bus_address(user: bool) -> str:
    if not user:
        return os.environ.get("DBUS_SYSTEM_BUS_ADDRESS", _SYSTEM_BUS)
    if address := os.environ.get("DBUS_SESSION_BUS_ADDRESS"):
        return address
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return f"unix:path={runtime}/bus"
    raise ManagerError(
        "cannot reach the user's systemd: neither DBUS_SESSION_BUS_ADDRESS nor XDG_RUNTIME_DIR is set; log in properly"
    )


def _unit_path(unit: str) -> str:
    """The D-Bus object path of a unit: every byte that is no letter or digit becomes _NN, as does a leading digit."""
    escaped = "".join(
        char if char.isascii() and char.isalnum() and not (char.isdigit() and index == 0) else f"_{ord(char):02x}"
        for index, char in enumerate(unit)
    )
    return f"/org/freedesktop/systemd1/unit/{escaped}"


class LoadedUnit(NamedTuple):
    """A unit that systemd has loaded, and its LoadState, ActiveState and SubState."""

    name: str
    load: str
    active: str
    sub: str


class Manager:
    """An open connection to a systemd manager."""

    def __init__(self, connection: DBusConnection, user: bool) -> None:
        self.user = user
        self._connection = connection

    def specifiers(self) -> dict[str, str]:
        """What `%t`, `%h`, `%u` and `%U` stand for in this manager's units."""
        if not self.user:
            return {"t": "/run", "h": "/root", "u": "root", "U": "0"}
        values = {"U": str(os.getuid())}
        if runtime := os.environ.get("XDG_RUNTIME_DIR"):
            values["t"] = runtime
        if home := os.environ.get("HOME"):
            values["h"] = home
        with suppress(KeyError):
            values["u"] = pwd.getpwuid(os.getuid()).pw_name
        return values

    def properties(self, wanted: Sequence[tuple[str, str, str]]) -> list[Any]:
        """Return the values of (object path, interface, property) triples; an error in place of one is None."""
        from jeepney import DBusAddress, Properties

        requests = (Properties(DBusAddress(path, _SERVICE, interface)).get(name) for path, interface, name in wanted)
        return [body[0][1] if body else None for body in self._ask(requests)]

    def _ask(self, requests: Iterable[Message]) -> Iterator[tuple[Any, ...] | None]:
        """Send requests, several on the way at once, and yield the bodies of their replies in order."""
        from jeepney import HeaderFields, MessageType

        waiting: dict[int, int] = {}
        replies: dict[int, tuple[Any, ...] | None] = {}
        source = iter(requests)
        sent = given = 0
        more = True
        deadline = time.monotonic() + REPLY_TIMEOUT
        try:
            while more or waiting:
                while more and len(waiting) < PIPELINE:
                    request = next(source, None)
                    if request is None:
                        more = False
                        break
                    serial = next(self._connection.outgoing_serial)
                    self._connection.send(request, serial=serial)
                    waiting[serial] = sent
                    sent += 1
                if not waiting:
                    break
                reply = self._connection.receive(timeout=max(deadline - time.monotonic(), 0))
                # A bus delivers no reply that nobody asked for, but some let anybody send a signal that claims to be
                # one: it would tell us which files to believe.
                if reply.header.message_type not in (MessageType.method_return, MessageType.error):
                    continue
                position = waiting.pop(reply.header.fields.get(HeaderFields.reply_serial, 0), None)
                if position is None:
                    continue
                deadline = time.monotonic() + REPLY_TIMEOUT
                failed = reply.header.message_type is MessageType.error
                replies[position] = None if failed else reply.body
                while given in replies:
                    yield replies.pop(given)
                    given += 1
        except _BUS_ERRORS as error:
            raise ManagerError(f"systemd did not answer over D-Bus: {error or type(error).__name__}") from error

    def manager_properties(self, *names: str) -> list[Any]:
        """Return properties of the manager itself, such as UnitPath; None in place of one that it does not have."""
        return self.properties([("/org/freedesktop/systemd1", _MANAGER, name) for name in names])

    def unit_properties(self, units: Sequence[str], kind: str, names: Sequence[str]) -> list[dict[str, Any]]:
        """Return properties of each unit, which systemd loads if need be; `kind` is Unit, Service or Socket."""
        wanted = [(_unit_path(unit), f"{_SERVICE}.{kind}", name) for unit in units for name in names]
        values = iter(self.properties(wanted))
        return [{name: next(values) for name in names} for _ in units]

    def list_units(self, *patterns: str) -> list[LoadedUnit]:
        """Return the units that systemd has loaded and whose names match any of the patterns, as with `*.socket`."""
        from jeepney import DBusAddress, new_method_call

        address = DBusAddress("/org/freedesktop/systemd1", _SERVICE, _MANAGER)
        (body,) = self._ask([new_method_call(address, "ListUnitsByPatterns", "asas", ([], list(patterns)))])
        if body is None:
            raise ManagerError("systemd does not list its units over D-Bus; it is older than version 230")
        return [LoadedUnit(name, load, active, sub) for name, _, load, active, sub, *_ in body[0]]

    def trigger_units(self, service: str) -> list[str]:
        """Return the names of the socket units that start a service, sorted."""
        (names,) = self.properties([(_unit_path(service), _UNIT, "TriggeredBy")])
        if names is None:
            raise ManagerError(
                f"systemd does not know {service}; start the daemon with --unit %n from its service unit"
            )
        return sorted(name for name in names if name.endswith(".socket"))

    def socket_units(self, names: Sequence[str], *, only_active: bool = False) -> list[SocketUnit]:
        """Return socket units as systemd has loaded them, with the text of their files as it is on disk now."""
        asked = [
            (_unit_path(name), interface, key)
            for name in names
            for interface, key in (
                (_UNIT, "ActiveState"),
                (_UNIT, "FragmentPath"),
                (_UNIT, "DropInPaths"),
                (_UNIT, "NeedDaemonReload"),
                (_SOCKET, "Listen"),
                (_SOCKET, "FileDescriptorName"),
            )
        ]
        (loaded_at,) = self.properties([("/org/freedesktop/systemd1", _MANAGER, "UnitsLoadTimestamp")])
        values = iter(self.properties(asked))
        cache: dict[tuple[str, bool], SourceFile] = {}
        units = []
        for name, row in zip(names, zip(*[values] * 6, strict=True), strict=True):
            state, fragment, drop_ins, stale, listen, fd_name = row
            if None in row or (only_active and state in ("inactive", "failed")):
                continue
            paths = [path for path in (fragment, *drop_ins) if path]
            files = tuple(_source_file(path, bool(stale), loaded_at or 0, cache) for path in paths)
            units.append(SocketUnit(name, files, tuple((kind, address) for kind, address in listen), fd_name))
        return units

    def stop_timeout(self, service: str) -> float | None:
        """How long a service may take to stop, in seconds; None where systemd does not say."""
        (value,) = self.properties([(_unit_path(service), "org.freedesktop.systemd1.Service", "TimeoutStopUSec")])
        return None if value is None else min(value / 1e6, 86400.0)

    def reset_start_limit(self, service: str) -> None:
        """Start counting anew how often a service was started; no answer is waited for."""
        from jeepney import DBusAddress, MessageFlag, new_method_call

        address = DBusAddress("/org/freedesktop/systemd1", _SERVICE, _MANAGER)
        message = new_method_call(address, "ResetFailedUnit", "s", (service,))
        message.header.flags = MessageFlag.no_reply_expected
        try:
            self._connection.send(message)
        except OSError as error:
            raise ManagerError(f"systemd did not take a D-Bus message: {error}") from error


def _source_file(path: str, stale: bool, loaded_at: int, cache: dict[tuple[str, bool], SourceFile]) -> SourceFile:
    """Read a fragment or drop-in; one that may have changed since systemd read it is not trusted.

    systemd says only that some file of the unit is newer (NeedDaemonReload). Those touched since it last loaded
    units (`loaded_at`, in µs) are the ones that may be meant.
    """
    key = (path, stale)
    if key in cache:
        return cache[key]
    try:
        with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
            status = os.fstat(file.fileno())
            text: str | None = file.read()
        problem = ""
        if stale and max(status.st_mtime_ns, status.st_ctime_ns) // 1000 >= loaded_at:
            text, problem = None, "was changed after systemd read it"
    except FileNotFoundError:
        text, problem = None, "is gone"
    except OSError as error:
        text, problem = None, f"cannot be read ({error.strerror})"
    cache[key] = SourceFile(path, text, problem)
    return cache[key]


@contextmanager
def open_manager(*, user: bool) -> Iterator[Manager]:
    """Connect to the user's systemd, or to the system's; raises ManagerError where that cannot be done."""
    from jeepney.io.blocking import open_dbus_connection

    address = _bus_address(user)
    try:
        connection = open_dbus_connection(address, auth_timeout=REPLY_TIMEOUT)
    except _BUS_ERRORS as error:
        bus = "user" if user else "system"
        raise ManagerError(
            f"cannot reach systemd over the {bus} bus: {error or type(error).__name__};"
            f" is the {bus}'s dbus.service running?"
        ) from error
    try:
        yield Manager(connection, user)
    finally:
        connection.close()
