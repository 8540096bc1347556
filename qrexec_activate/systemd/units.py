"""What the commands ask of systemd beyond what serve does: any property of any
unit, and of thousands of units at once.

So the two messages that there are many of, a question for a property and a
reply, are written and read here and not by jeepney.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from ..errors import ManagerError
from . import manager
from .manager import (
    Property,
    of_manager,
    of_unit,
    raise_if_lost,
    short,
)

__all__ = ["LoadedUnit", "Manager", "open_manager"]


class LoadedUnit(NamedTuple):
    """A unit that systemd has loaded, and its LoadState, ActiveState and
    SubState."""

    name: str
    load: str
    active: str
    sub: str


class _Get:
    """A call of org.freedesktop.DBus.Properties.Get, as the D-Bus specification
    has it on the wire.

    A survey of 2,000 sockets asks for 8,000 properties, and jeepney needs half
    of the whole time to write them down.
    """

    __slots__ = ("_interface", "_name", "_path")

    def __init__(self, wanted: Property) -> None:
        self._path, self._interface, self._name = wanted

    def serialise(self, serial: int) -> bytes:
        body = _aligned(_wire_string(self._interface), 4) + _wire_string(
            self._name
        )
        fields = _GET_FIELDS + b"\1\1o\0" + _wire_string(self._path)
        return (
            _aligned(
                _GET_HEADER.pack(b"l", 1, 0, 1, len(body), serial, len(fields))
                + fields,
                8,
            )
            + body
        )


def _wire_string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<I", len(raw)) + raw + b"\0"


def _aligned(data: bytes, to: int) -> bytes:
    return data + bytes(-len(data) % to)


def _message_size(start: bytearray) -> int:
    """How long a message is, from its first 16 bytes."""
    body, _, fields = struct.unpack_from(f"{_order(start)}III", start, 4)
    return int(16 + fields + -fields % 8 + body)


def _order(message: bytes | bytearray) -> str:
    """The order of a message's bytes, as struct has it."""
    return {ord("l"): "<", ord("B"): ">"}[message[0]]


def _header_fields(message: bytes, order: str) -> dict[int, Any]:
    """Read the fields of a message's header: numbers, and texts as bytes.

    A field is its code, its type as a signature of one letter, and its value;
    each begins at 8 bytes. jeepney needs five times as long.
    """
    number = struct.Struct(f"{order}I")
    fields: dict[int, Any] = {}
    at, end = 16, 16 + number.unpack_from(message, 12)[0]
    while at < end:
        at += -at % 8
        code, letters, kind, _ = message[at : at + 4]
        if letters != 1 or kind not in b"gosu":
            raise ValueError("a field of a message's header makes no sense")
        if kind == ord("g"):
            length, at = message[at + 4], at + 5
        else:
            (length,), at = number.unpack_from(message, at + 4), at + 8
        if kind == ord("u"):
            fields[code] = length
        else:
            fields[code] = message[at : at + length]
            at += length + 1
    return fields


#: Types of messages, and codes of header fields.
_RETURN, _ERROR = 2, 3
_ERROR_NAME, _REPLY_SERIAL, _SIGNATURE = 4, 5, 8
#: Byte order, method call, flags, version of the protocol; length of the body,
#: serial, length of the header's fields.
_GET_HEADER = struct.Struct("<cBBBIII")
#: Interface, member, destination and signature of the body, which are the same
#: for all; each begins at 8 bytes.
_GET_FIELDS = b"".join(
    _aligned(bytes([code]) + value, 8)
    for code, value in (
        (2, b"\1s\0" + _wire_string("org.freedesktop.DBus.Properties")),
        (3, b"\1s\0" + _wire_string("Get")),
        (6, b"\1s\0" + _wire_string("org.freedesktop.systemd1")),
        (8, b"\1g\0\2ss\0"),
    )
)


class Manager(manager.Manager):
    """An open connection to a systemd manager, for many questions."""

    _signatures = manager.SIGNATURES | {
        "BindsTo": "as",
        "ControlGroup": "s",
        "InvocationID": "ay",
        "MainPID": "u",
        "Slice": "s",
        "Triggers": "as",
    }

    def __init__(self, connection: socket.socket, user: bool) -> None:
        super().__init__(connection, user)
        self._waiting = bytearray()
        #: Signature → jeepney's reader of such bodies.
        self._readers: dict[str, Any] = {}

    def _get(self, wanted: Property) -> Any:
        return _Get(wanted)

    def _receive(self) -> tuple[int, tuple[Any, ...] | None]:
        """Wait for a reply; returns the serial that it replies to and its body,
        None for an error."""
        while True:
            message = self._next_bytes()
            order = _order(message)
            fields = _header_fields(message, order)
            # Others may claim to be replies, as in manager.py.
            if message[1] not in (_RETURN, _ERROR):
                continue
            signature = str(fields.get(_SIGNATURE, b""), "ascii")
            serial = fields.get(_REPLY_SERIAL, 0)
            body = self._body(message, order, signature)
            if message[1] == _RETURN:
                return serial, body
            name = str(fields.get(_ERROR_NAME, b""), "ascii")
            raise_if_lost(name, body)
            return serial, None

    def _body(
        self, message: bytes, order: str, signature: str
    ) -> tuple[Any, ...]:
        from jeepney.low_level import Endianness, parse_signature

        if not signature:
            return ()
        if (reader := self._readers.get(signature)) is None:
            reader = parse_signature([*"(", *signature, *")"])
            self._readers[signature] = reader
        (length,) = struct.unpack_from(f"{order}I", message, 4)
        ends = Endianness.little if order == "<" else Endianness.big
        body, _ = reader.parse_data(message, len(message) - length, ends)
        return tuple(body)

    def _next_bytes(self) -> bytes:
        waiting = self._waiting
        while len(waiting) < 16 or len(waiting) < _message_size(waiting):
            waiting += self._more()
        size = _message_size(waiting)
        message = bytes(waiting[:size])
        del waiting[:size]
        return message

    def manager_properties(self, *names: str) -> list[Any]:
        """Return properties of the manager itself, such as UnitPath; None in
        place of one that it does not have."""
        return self.properties([of_manager(name) for name in names])

    def unit_properties(
        self, units: Sequence[str], kind: str, names: Sequence[str]
    ) -> list[dict[str, Any]]:
        """Return properties of each unit, which systemd loads if need be;
        `kind` is Unit, Service or Socket."""
        wanted = [of_unit(unit, kind, name) for unit in units for name in names]
        values = iter(self.properties(wanted))
        return [{name: next(values) for name in names} for _ in units]

    def list_units(self, *patterns: str) -> list[LoadedUnit]:
        """Return the units that systemd has loaded and whose names match any of
        the patterns, as with `*.socket`."""
        return self._list("ListUnitsByPatterns", "asas", [], list(patterns))

    def _list(
        self, method: str, signature: str, *arguments: object
    ) -> list[LoadedUnit]:
        body = self._call(method, signature, *arguments)
        if body is None:
            raise ManagerError(
                "systemd does not list its units over D-Bus; it is older than"
                " version 230"
            )
        units = []
        for row in (
            body[0] if len(body) == 1 and isinstance(body[0], list) else [body]
        ):
            match row:
                case (str(name), str(), str(load), str(active), str(sub), *_):
                    units.append(LoadedUnit(name, load, active, sub))
                case _:
                    raise ManagerError(
                        f"systemd's list of units makes no sense: {short(row)}"
                    )
        return units

    def _states(self, names: Sequence[str]) -> Iterable[tuple[str, str, str]]:
        return [
            (unit.name, unit.load, unit.active)
            for unit in self._list("ListUnitsByNames", "as", list(names))
        ]


open_manager = Manager.open
