"""What systemd knows: units over D-Bus, and the text of their files.

Read-only but for reset_start_limit(). Only what serve asks; units.py asks more,
and more quickly. jeepney is imported when a Manager is opened, and can be
forgotten afterwards. Whatever the bus or systemd may say, what comes out is of
the type that is promised, or a ManagerError of one line.
"""

from __future__ import annotations

import itertools
import math
import os
import pwd
import re
import socket
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ..errors import ManagerError
from ..routing.routes import SocketUnit
from ..routing.unitfile import SourceFile, is_silent

if TYPE_CHECKING:
    from jeepney import Message

__all__ = ["Manager", "runs_in_user_manager"]

#: systemd answers in milliseconds; a bus that says nothing for this many
#: seconds will not.
REPLY_TIMEOUT = 20.0
#: Requests on the way at once. dbus-daemon answers all beyond 128 with an error
#: (max_replies_per_connection, which system.conf leaves at that), and a unit
#: whose properties are not told would be missing.
PIPELINE = 100

#: Errors in place of a reply that are about the bus or systemd as a whole;
#: others are about one unit or property.
_LOST = frozenset(
    f"org.freedesktop.DBus.Error.{name}"
    for name in (
        "AccessDenied",
        "Disconnected",
        "LimitsExceeded",
        "NameHasNoOwner",
        "NoReply",
        "ServiceUnknown",
    )
)

#: Where `systemctl set-property` keeps what it has told systemd already. With
#: systemd 252 the unit counts as changed on disk from then on; but no listener,
#: and no name of one, can be set in this way.
_BY_SET_PROPERTY = re.compile(r"/systemd/(user|system)\.control/")

_SERVICE = "org.freedesktop.systemd1"
_ROOT = "/org/freedesktop/systemd1"
_MANAGER = "org.freedesktop.systemd1.Manager"
_SYSTEM_BUS = "unix:path=/run/dbus/system_bus_socket"

#: The properties that serve asks for, and their D-Bus types.
SIGNATURES = {
    "ActiveState": "s",
    "DropInPaths": "as",
    "FileDescriptorName": "s",
    "FragmentPath": "s",
    "InactiveExitTimestamp": "t",
    "Listen": "a(ss)",
    "LoadState": "s",
    "NeedDaemonReload": "b",
    "TimeoutStopUSec": "t",
    "TriggeredBy": "as",
    "UnitsLoadStartTimestamp": "t",
    "UnitsLoadTimestamp": "t",
}


def runs_in_user_manager() -> bool:
    """Whether this process is a service of a user manager: it sets MANAGERPID,
    the system manager does not."""
    return "MANAGERPID" in os.environ


def _bus_address(user: bool) -> str:
    if not user:
        return os.environ.get("DBUS_SYSTEM_BUS_ADDRESS") or _SYSTEM_BUS
    # The user's manager is on this bus, whatever other session bus a program
    # may have been started with.
    if (runtime := os.environ.get("XDG_RUNTIME_DIR")) and Path(
        runtime, "bus"
    ).exists():
        return f"unix:path={_escape_bus_path(f'{runtime}/bus')}"
    if address := os.environ.get("DBUS_SESSION_BUS_ADDRESS"):
        return address
    as_root = "" if os.geteuid() else "; for the system's, add --system"
    raise ManagerError(
        "cannot reach the user's systemd: $XDG_RUNTIME_DIR/bus is not there"
        " and DBUS_SESSION_BUS_ADDRESS is not set;"
        " log in as this user, not by su or sudo, and install dbus-user-session"
        f"{as_root}"
    )


def _escape_bus_path(path: str) -> str:
    return "".join(
        f"%{ord(char):02x}" if char in "%,;=" else char for char in path
    )


#: Where a property is: the path of an object, an interface, and its name.
Property = tuple[str, str, str]


def of_manager(name: str) -> Property:
    """A property of the manager itself."""
    return _ROOT, _MANAGER, name


def of_unit(unit: str, kind: str, name: str) -> Property:
    """A property of a unit, which systemd loads if need be; `kind` is Unit,
    Service or Socket."""
    return _unit_path(unit), f"{_SERVICE}.{kind}", name


@lru_cache(maxsize=16)
def _unit_path(unit: str) -> str:
    """The D-Bus object path of a unit: every byte that is no letter or digit
    becomes _NN, as does a leading digit."""
    raw = unit.encode(errors="surrogateescape")
    escaped = re.sub(
        rb"[^A-Za-z0-9]|^[0-9]", lambda match: b"_%02x" % ord(match[0]), raw
    )
    return f"{_ROOT}/unit/{escaped.decode() or '_'}"


def _describe(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def short(answer: object) -> str:
    return ascii(answer)[:80]


def raise_if_lost(name: str, body: Sequence[object]) -> None:
    """Raise RuntimeError for an error that is not about one unit alone."""
    if name in _LOST:
        raise RuntimeError(f"{name}: {body[0] if body else ''}")


class Manager:
    """An open connection to a systemd manager."""

    _signatures = SIGNATURES

    def __init__(self, connection: socket.socket, user: bool) -> None:
        from jeepney.low_level import Parser

        self.user = user
        self._socket = connection
        self._parser = Parser()
        self._serials = itertools.count(1)

    @classmethod
    @contextmanager
    def open(cls, *, user: bool) -> Iterator[Self]:
        """Connect to the user's systemd, or to the system's; raises
        ManagerError where that cannot be done."""
        from jeepney.bus import get_bus
        from jeepney.io.blocking import prep_socket

        address = _bus_address(user)
        try:
            connection = prep_socket(get_bus(address), timeout=REPLY_TIMEOUT)
        except Exception as error:
            bus = "user" if user else "system"
            raise ManagerError(
                f"cannot reach systemd over the {bus} bus, {address}:"
                f" {_describe(error)};"
                f" is the {bus}'s dbus.service running?"
            ) from error
        with connection:
            connection.settimeout(REPLY_TIMEOUT)
            manager = cls(connection, user)
            manager.hello()
            yield manager

    def specifiers(self) -> dict[str, str]:
        """What `%t`, `%h`, `%u` and `%U` stand for in this manager's units."""
        if not self.user:
            return {"t": "/run", "h": "/root", "u": "root", "U": "0"}
        uid = os.getuid()
        values = {"u": str(uid), "U": str(uid)}
        for letter, name in (("t", "XDG_RUNTIME_DIR"), ("h", "HOME")):
            if value := os.environ.get(name):
                values[letter] = value
        with suppress(KeyError):
            values["u"] = pwd.getpwuid(uid).pw_name
        return values

    def properties(self, wanted: Sequence[Property]) -> list[Any]:
        """Return the values of properties; an error in place of one is None.

        Those that are known here have the type that systemd documents.
        """
        replies = self._ask([self._get(one) for one in wanted])
        return [
            self._value(path, name, body)
            for (path, _, name), body in zip(wanted, replies, strict=True)
        ]

    def _get(self, wanted: Property) -> Message:
        from jeepney import DBusAddress, Properties

        path, interface, name = wanted
        return Properties(DBusAddress(path, _SERVICE, interface)).get(name)

    def _ask(self, requests: Sequence[Message]) -> list[tuple[Any, ...] | None]:
        """Send requests, several on the way at once, and return the bodies of
        their replies, None for errors."""
        bodies: dict[int, tuple[Any, ...] | None] = {}
        waiting: set[int] = set()
        left = iter(requests)
        try:
            while waiting or len(bodies) < len(requests):
                # systemd looks for the next answers while these are read.
                if len(waiting) <= PIPELINE // 2:
                    batch = {
                        next(self._serials): request
                        for request in itertools.islice(
                            left, PIPELINE - len(waiting)
                        )
                    }
                    self._socket.sendall(
                        b"".join(
                            request.serialise(serial=serial)
                            for serial, request in batch.items()
                        )
                    )
                    waiting |= batch.keys()
                serial, body = self._receive()
                if serial in waiting:
                    waiting.remove(serial)
                    bodies[serial] = body
        # Whatever the socket and jeepney may raise for a bus that goes away, or
        # talks nonsense.
        except Exception as error:
            raise ManagerError(
                f"systemd did not answer over D-Bus: {_describe(error)}"
            ) from error
        # Serials count up, so that this is the order of the requests.
        return [bodies[serial] for serial in sorted(bodies)]

    def _receive(self) -> tuple[int, tuple[Any, ...] | None]:
        """Wait for a reply; returns the serial that it replies to and its body,
        None for an error."""
        from jeepney import HeaderFields, MessageType

        while True:
            while (message := self._parser.get_next_message()) is None:
                self._parser.add_data(self._more())
            fields, body = message.header.fields, message.body
            serial = fields.get(HeaderFields.reply_serial, 0)
            # A bus delivers no reply that nobody asked for, but some let
            # anybody send a signal that claims to be one: it would tell us
            # which files to believe.
            if message.header.message_type is MessageType.method_return:
                return serial, body
            if message.header.message_type is MessageType.error:
                raise_if_lost(fields.get(HeaderFields.error_name, ""), body)
                return serial, None

    def _more(self) -> bytes:
        """Wait for more from the bus."""
        if not (data := self._socket.recv(65536)):
            raise EOFError("the bus closed the connection")
        return data

    def hello(self) -> None:
        """Introduce this connection to the bus, which relays nothing before;
        raises ManagerError."""
        from jeepney import message_bus

        if self._ask([message_bus.Hello()]) == [None]:
            raise ManagerError("the bus refused this program's greeting")

    def _call(self, method: str, signature: str, *arguments: object) -> Any:
        """Call a method of the manager's own; returns the body of its reply."""
        from jeepney import DBusAddress, new_method_call

        address = DBusAddress(_ROOT, _SERVICE, _MANAGER)
        (body,) = self._ask(
            [new_method_call(address, method, signature, arguments)]
        )
        return body

    def _property(self, unit: str, kind: str, name: str) -> Any:
        (value,) = self.properties([of_unit(unit, kind, name)])
        return value

    def trigger_units(self, service: str) -> list[str]:
        """Return the names of the socket units that start a service, sorted."""
        names = self._property(service, "Unit", "TriggeredBy")
        if names is None:
            raise ManagerError(
                f"systemd does not know {service}; start the daemon with"
                f" --unit %n from its service unit"
            )
        return sorted(name for name in names if name.endswith(".socket"))

    def _states(self, names: Sequence[str]) -> Iterable[tuple[str, str, str]]:
        """Tell LoadState and ActiveState of units."""
        states = ("LoadState", "ActiveState")
        asked = [of_unit(name, "Unit", one) for name in names for one in states]
        values = iter(self.properties(asked))
        return zip(names, values, values, strict=True)

    def socket_units(
        self, names: Sequence[str], *, only_active: bool = False
    ) -> list[SocketUnit]:
        """Return socket units as systemd has loaded them, with the text of
        their files as it is on disk now."""
        wanted = [
            (name, load)
            for name, load, active in self._states(names)
            if not (only_active and active in ("inactive", "failed"))
        ]
        asked = [
            of_unit(unit, kind, name)
            for unit, _ in wanted
            for kind, name in (
                ("Unit", "FragmentPath"),
                ("Unit", "DropInPaths"),
                ("Socket", "Listen"),
                ("Socket", "FileDescriptorName"),
            )
        ]
        # The first is unset until somebody asks for a reload; then units are
        # as old as the manager at most.
        loaded = ("UnitsLoadTimestamp", "UnitsLoadStartTimestamp")
        loaded_at = self.properties([of_manager(name) for name in loaded])
        values = iter(self.properties(asked))
        reader = _Reader(max(moment or 0 for moment in loaded_at))
        answers = zip(wanted, zip(*[values] * 4, strict=True), strict=True)
        rows = [(*one, *row) for one, row in answers if None not in row]
        # systemd looks for drop-ins anew to answer this, and so takes 20 times
        # as long as for any other: only what is in doubt is asked about.
        late = [
            name
            for name, _, fragment, drop_ins, *_ in rows
            if any(map(reader.is_late, (fragment, *drop_ins)))
        ]
        ages = ("InactiveExitTimestamp", "NeedDaemonReload")
        asked = [of_unit(unit, "Unit", name) for unit in late for name in ages]
        values = iter(self.properties(asked))
        known = dict(zip(late, zip(*[values] * 2, strict=True), strict=True))
        units = []
        for name, load, fragment, drop_ins, listen, fd_name in rows:
            started_at, stale = known.get(name, (0, False))
            problem = ""
            if load != "loaded" or not fragment:
                problem = (
                    f"systemd could not load it (LoadState={load}):"
                    f" systemctl status says why; mend its files"
                )
            since = started_at or math.inf if stale is False else 0
            paths = filter(None, (fragment, *drop_ins))
            files = tuple(reader.read(path, since) for path in paths)
            units.append(
                SocketUnit(name, files, tuple(listen), fd_name, problem, stale)
            )
        return units

    def stop_timeout(self, service: str) -> float | None:
        """How long a service may take to stop, in seconds; None where systemd
        does not say."""
        value = self._property(service, "Service", "TimeoutStopUSec")
        return None if value is None else min(value / 1e6, 86400.0)

    def is_stopping(self, service: str) -> bool:
        """Whether it has been told to stop, and has yet to do so."""
        state = self._property(service, "Unit", "ActiveState")
        return bool(state == "deactivating")

    def reset_start_limit(self, service: str) -> None:
        """Start counting anew how often a service was started.

        The answer is waited for: systemd asks the bus who has sent this, and
        does nothing for one that has gone by then.
        """
        self._call("ResetFailedUnit", "s", service)

    def _value(self, path: str, name: str, body: tuple[Any, ...] | None) -> Any:
        """Unwrap a property from a reply; raises ManagerError where it is not
        of the type that systemd documents."""
        match body:
            case None:
                return None
            case ((str(signature), value),) if (
                self._signatures.get(name, signature) == signature
            ):
                return value
        raise ManagerError(
            f"systemd's answer for {name} of {path} makes no sense:"
            f" {short(body)}"
        )


class _Reader:
    """Reads fragments and drop-ins, each once; `loaded_at` is when systemd last
    loaded all units, in µs."""

    def __init__(self, loaded_at: int) -> None:
        self._loaded_at = loaded_at
        self._look = lru_cache(maxsize=None)(_examine)

    def is_late(self, path: str) -> bool:
        """Whether a file was touched since systemd last loaded all units."""
        return self._look(path)[0] >= self._loaded_at

    def read(self, path: str, since: float) -> SourceFile:
        """Read a file; one that may have changed since systemd read it is not
        trusted.

        Those touched since it last loaded all units are the ones that may have,
        but for units that it has loaded on demand after that. So a file must
        also have been touched since its unit was started (`since`, in µs): or
        at all, where systemd says that some file of the unit is newer than what
        it has read (NeedDaemonReload). By itself that is not enough: systemd
        goes by the time of the last change, which `cp -p` and packages set.
        """
        touched, file = self._look(path)
        if touched < max(self._loaded_at, since):
            return file
        problem = "was changed after systemd read it"
        if touched > time.time() * 1e6:
            problem = "is of a time that is yet to come (touch it)"
        return SourceFile(path, None, problem, file.text)


def _examine(path: str) -> tuple[float, SourceFile]:
    """Read a file as it is now, and tell when it was last touched, in µs, if
    that can matter."""
    try:
        touched, text = _read_file(path)
    except FileNotFoundError:
        # systemd reports a link to nothing as if it were a drop-in, and asks
        # for a daemon-reload for ever.
        problem = "is gone"
        if os.path.islink(path):
            problem = "is a symbolic link to nothing (remove it)"
        return -math.inf, SourceFile(path, None, problem, "")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        problem = f"cannot be read ({reason}; mend or remove it)"
        return -math.inf, SourceFile(path, None, problem)
    by_systemd = _BY_SET_PROPERTY.search(path) and is_silent(text)
    return -math.inf if by_systemd else touched, SourceFile(path, text)


def _read_file(path: str) -> tuple[int, str]:
    """Return when a file was last touched, in µs, and its text; raises
    OSError."""
    touched = os.lstat(path).st_ctime_ns
    # A FIFO must not hold up the daemon.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        target = os.fstat(fd)
        # systemd reads nothing from a folder, nor from a link to /dev/null,
        # which masks drop-ins of its name.
        text = ""
        if stat.S_ISREG(target.st_mode):
            touched = max(touched, target.st_ctime_ns)
            with open(fd, "rb", closefd=False) as file:
                text = file.read().decode(errors="surrogateescape")
    finally:
        os.close(fd)
    return touched // 1000, text
