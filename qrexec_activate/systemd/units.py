"""What the commands ask of systemd beyond what serve does: any property of any
unit, and of thousands of units at once.

So the two messages that there are many of, a question for a property and a
reply, are written and read here and not by jeepney.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
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
        fields = _get_fields(self._path)
        body = _get_body(self._interface, self._name)
        return (
            _GET_HEADER.pack(b"l", 1, 0, 1, len(body), serial, len(fields))
            + _aligned(fields, 8)
            + body
        )


@lru_cache(maxsize=16)
def _get_fields(path: str) -> bytes:
    return _GET_FIELDS + b"\1\1o\0" + _wire_string(path)


@lru_cache(maxsize=64)
def _get_body(interface: str, name: str) -> bytes:
    return _aligned(_wire_string(interface), 4) + _wire_string(name)


def _wire_string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<I", len(raw)) + raw + b"\0"


def _aligned(data: bytes, to: int) -> bytes:
    return data + bytes(-len(data) % to)


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

#: Reads a value that begins at a place in a message, or behind it where its
#: type has to be aligned; also tells where it ends.
Reader = Callable[[bytes, int], tuple[Any, int]]
#: Types of a fixed size, as struct calls them.
_FIXED = dict(zip("ybnqiuxtd", "BIhHiIqQd", strict=True))


@lru_cache(maxsize=64)
def _readers(signature: str, order: str) -> Sequence[Reader]:
    """Readers of the types of a signature, one after the other, of a message
    whose bytes are in this order. jeepney needs ten times as long."""
    left = iter(signature)
    return [_reader(letter, left, order)[0] for letter in left]


def _reader(letter: str, left: Iterator[str], order: str) -> tuple[Reader, int]:
    """A reader of the type that begins with this letter, the rest of which is
    taken from what is left; and what its values are aligned to."""
    if letter in "so":
        return _text_reader(order), 4
    if letter == "g":
        return _signature, 1
    if letter == "v":
        return partial(_variant, order), 1
    if letter == "a":
        return _array_reader(*_reader(next(left), left, order), order), 4
    if letter == "(":
        rest = iter(partial(next, left), ")")
        return _struct_reader([_reader(one, left, order)[0] for one in rest]), 8
    fixed = struct.Struct(order + _FIXED[letter])

    def read(message: bytes, at: int) -> tuple[Any, int]:
        at += -at % fixed.size
        (value,) = fixed.unpack_from(message, at)
        return bool(value) if letter == "b" else value, at + fixed.size

    return read, fixed.size


def _text_reader(order: str) -> Reader:
    length_at = struct.Struct(f"{order}I").unpack_from

    def read(message: bytes, at: int) -> tuple[str, int]:
        at += -at % 4
        (length,) = length_at(message, at)
        end = at + 4 + length
        if message[end]:
            raise ValueError("a text in a message does not end")
        return message[at + 4 : end].decode(), end + 1

    return read


def _signature(message: bytes, at: int) -> tuple[str, int]:
    end = at + 1 + message[at]
    return message[at + 1 : end].decode("ascii"), end + 1


def _variant(order: str, message: bytes, at: int) -> tuple[Any, int]:
    signature, at = _signature(message, at)
    (reader,) = _readers(signature, order)
    value, at = reader(message, at)
    return (signature, value), at


def _array_reader(read_one: Reader, alignment: int, order: str) -> Reader:
    length_at = struct.Struct(f"{order}I").unpack_from

    def read(message: bytes, at: int) -> tuple[list[Any], int]:
        at += -at % 4
        (length,) = length_at(message, at)
        at += 4
        at += -at % alignment
        end = at + length
        found = []
        while at < end:
            one, at = read_one(message, at)
            found.append(one)
        return found, at

    return read


def _struct_reader(members: Sequence[Reader]) -> Reader:
    if not members:
        raise ValueError("a struct in a message is empty")

    def read(message: bytes, at: int) -> tuple[tuple[Any, ...], int]:
        at += -at % 8
        values = []
        for member in members:
            value, at = member(message, at)
            values.append(value)
        return tuple(values), at

    return read


#: The order of a message's bytes, as struct has it, by its first byte.
_ORDERS = {ord("l"): "<", ord("B"): ">"}
#: How long the body and the header's fields are, in its first 16 bytes.
_LENGTHS = {first: struct.Struct(f"{o}I4xI") for first, o in _ORDERS.items()}
_NUMBERS = {first: struct.Struct(f"{o}I") for first, o in _ORDERS.items()}
#: Types of messages, and codes of header fields.
_RETURN, _ERROR = 2, 3
_ERROR_NAME, _REPLY_SERIAL, _SIGNATURE = 4, 5, 8


def _message_size(start: bytearray) -> int:
    """How long a message is, from its first 16 bytes."""
    body, fields = _LENGTHS[start[0]].unpack_from(start, 4)
    return int(16 + fields + -fields % 8 + body)


def _header_fields(message: bytes) -> dict[int, Any]:
    """Read the fields of a message's header: numbers, and texts as bytes.

    A field is its code, its type as a signature of one letter, and its value;
    each begins at 8 bytes. A reader of any type needs twice as long.
    """
    number = _NUMBERS[message[0]]
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


def _body(message: bytes, signature: str) -> tuple[Any, ...]:
    (length,) = _NUMBERS[message[0]].unpack_from(message, 4)
    at = len(message) - length
    body = []
    for reader in _readers(signature, _ORDERS[message[0]]):
        value, at = reader(message, at)
        body.append(value)
    return tuple(body)


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

    def _get(self, wanted: Property) -> Any:
        return _Get(wanted)

    def _receive(self) -> tuple[int, tuple[Any, ...] | None]:
        """Wait for a reply; returns the serial that it replies to and its body,
        None for an error."""
        while True:
            message = self._next_bytes()
            # Others may claim to be replies, as in manager.py.
            if message[1] not in (_RETURN, _ERROR):
                continue
            fields = _header_fields(message)
            signature = str(fields.get(_SIGNATURE, b""), "ascii")
            serial = fields.get(_REPLY_SERIAL, 0)
            body = _body(message, signature)
            if message[1] == _RETURN:
                return serial, body
            raise_if_lost(str(fields.get(_ERROR_NAME, b""), "ascii"), body)
            return serial, None

    def _next_bytes(self) -> bytes:
        waiting = self._waiting
        while len(waiting) < 16 or len(waiting) < (
            size := _message_size(waiting)
        ):
            waiting += self._more()
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
