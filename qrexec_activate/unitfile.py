"""Unit-file syntax, and the rule that decides which file owns which listener.

systemd gives one FileDescriptorName to all sockets of a unit (the last assignment wins), so which drop-in opened
which address, and which qube that drop-in names, has to be read from the files themselves. This module reads
them as systemd 252 to 257 does, from text, in the order in which systemd applied them. No I/O.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

__all__ = [
    "LISTEN_KINDS",
    "Assignment",
    "Declaration",
    "Declared",
    "FdName",
    "SourceFile",
    "address_key",
    "assignments",
    "declared_listeners",
    "expand_specifiers",
]

#: The settings that add a listener, and the kind by which systemd's D-Bus property Listen calls it.
LISTEN_KINDS = {
    "ListenStream": "Stream",
    "ListenDatagram": "Datagram",
    "ListenSequentialPacket": "SequentialPacket",
    "ListenFIFO": "FIFO",
    "ListenNetlink": "Netlink",
    "ListenSpecial": "Special",
    "ListenMessageQueue": "MessageQueue",
    "ListenUSBFunction": "USBFunction",
}

_WHITESPACE = " \t\n\r"
#: systemd ends a line at LF, CR or NUL, and takes two different ones in a row as one end.
_LINE_END = re.compile("\r\n|\n\r|[\n\r\0]")


@dataclass(frozen=True, slots=True)
class Assignment:
    """One `key=value` line; `line` is the number of the (last) line that it stands on."""

    section: str
    key: str
    value: str
    line: int


def _logical_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield the lines after joining: a trailing backslash joins, comment lines inside are skipped."""
    joined = ""
    number = 0
    for number, line in enumerate(_LINE_END.split(text.removeprefix("\ufeff")), start=1):
        stripped = line.lstrip(_WHITESPACE)
        if stripped.startswith(("#", ";")):
            continue
        joined += stripped
        backslashes = len(joined) - len(joined.rstrip("\\"))
        if backslashes % 2:
            joined = joined[:-1] + " "
            continue
        yield number, joined
        joined = ""
    if joined:
        yield number, joined


def assignments(text: str) -> Iterator[Assignment]:
    """Yield what systemd would read from a unit file or drop-in; never fails.

    systemd stops reading a file at a section header without its bracket and at bytes that are no UTF-8 (here:
    surrogates, as errors="surrogateescape" leaves them), and keeps what came before.
    """
    section = ""
    for number, joined in _logical_lines(text):
        line = joined.strip(_WHITESPACE)
        if any("\ud800" <= char <= "\udfff" for char in line):
            return
        if line.startswith("["):
            if not line.endswith("]"):
                return
            section = line[1:-1]
        elif section:
            key, equals, value = line.partition("=")
            if equals:
                yield Assignment(section, key.strip(_WHITESPACE), value.strip(_WHITESPACE), number)


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A fragment or drop-in of a unit; `text` is None where it cannot be trusted, and `problem` says why."""

    path: str
    text: str | None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class FdName:
    """A FileDescriptorName= as written, specifiers and escapes unexpanded; empty where it resets the name."""

    text: str
    path: str
    line: int

    @property
    def where(self) -> str:
        return f"{self.path}:{self.line}"


@dataclass(slots=True)
class Declaration:
    """A listener that a file adds, and the name that the files give it.

    `borrowed` is the name that systemd would report for a listener that no file names, where this name belongs to
    the listeners of another file. `doubts` are unreadable files that came later and may say otherwise.
    """

    kind: str
    address: str
    path: str
    line: int
    name: FdName | None = None
    borrowed: FdName | None = None
    doubts: list[SourceFile] = field(default_factory=list)

    @property
    def where(self) -> str:
        return f"{self.path}:{self.line}"


@dataclass(frozen=True, slots=True)
class Declared:
    """What a unit's files declare, all told: listeners in systemd's order and the name that systemd would report."""

    listeners: tuple[Declaration, ...]
    last_name: FdName | None
    untrusted: tuple[SourceFile, ...]


def declared_listeners(files: Sequence[SourceFile]) -> Declared:
    """Read a unit's fragment and drop-ins, in the order applied, and tell which file names which listener.

    - A file's FileDescriptorName is the name of every listener that this file adds.
    - A file that sets FileDescriptorName and adds no listener (an override) sets it for all that were added before.
    - A listener that no file names has the name that systemd reports, unless that one belongs to the listeners of
      another drop-in: its own file did not name that qube, so it gets none.
    """
    listeners: list[Declaration] = []
    last: FdName | None = None
    unit_wide: FdName | None = None
    untrusted = []
    for position, file in enumerate(files):
        if file.text is None:
            untrusted.append(file)
            for listener in listeners:
                listener.doubts.append(file)
            continue
        added: list[Declaration] = []
        name: FdName | None = None
        for item in assignments(file.text):
            if item.section != "Socket":
                continue
            if item.key == "FileDescriptorName":
                name = FdName(item.value, file.path, item.line)
            elif kind := LISTEN_KINDS.get(item.key):
                if item.value:
                    added.append(Declaration(kind, item.value, file.path, item.line))
                else:
                    # An empty value of any of these settings resets the whole list.
                    listeners.clear()
                    added.clear()
        if name:
            last = name
            for listener in added or listeners:
                listener.name = name
            if position == 0 or not added:
                unit_wide = name
        listeners += added
    for listener in listeners:
        if listener.name is None and last is not None:
            if last is unit_wide:
                listener.name = last
            else:
                listener.borrowed = last
    return Declared(tuple(listeners), last, tuple(untrusted))


def expand_specifiers(text: str, values: Mapping[str, str]) -> str | None:
    """Expand `%i` and the like from `values` (letter to text); None where one is not in there."""
    unknown = False

    def replace(match: re.Match[str]) -> str:
        nonlocal unknown
        if match[1] == "%":
            return "%"
        unknown |= match[1] not in values
        return values.get(match[1], "")

    expanded = re.sub(r"%([a-zA-Z%])", replace, text)
    return None if unknown else expanded


AddressKey = tuple[str, str, int]

_PORT = re.compile(r"[1-9][0-9]{0,4}|0", re.ASCII)
_VSOCK = re.compile(r"vsock(?:-stream)?:([0-9]*):([0-9]+)", re.ASCII)


def address_key(text: str) -> AddressKey | None:
    """Reduce a listener's address, as written or as systemd or the kernel prints it, to what can be compared.

    Returns (family, address, port), or None for a form that is not known here; a bare port is IPv6 any, as systemd
    shows it. A path below /var/run is one below /run, as systemd rewrites it.
    """
    if text.startswith("/"):
        parts = [part for part in text.split("/") if part not in ("", ".")]
        if parts[:2] == ["var", "run"]:
            del parts[0]
        return ("path", "/" + "/".join(parts), 0)
    if text.startswith("@"):
        return ("abstract", text, 0)
    if match := _VSOCK.fullmatch(text):
        return ("vsock", match[1], int(match[2]))
    host, colon, port = text.rpartition(":")
    if not _PORT.fullmatch(port) or int(port) > 65535:
        return None
    if not colon:
        return ("ip", "::", int(port))
    bracketed = host.startswith("[") and host.endswith("]")
    try:
        address = ipaddress.ip_address(host[1:-1] if bracketed else host)
    except ValueError:
        return None
    if bracketed is (address.version == 4) or "%" in host:
        return None
    return ("ip", str(address), int(port))
