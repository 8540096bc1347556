"""Where a route listens: what a person writes, what systemd is told, and
whether it can be had."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

from ..errors import UsageProblem
from ..routing.unitfile import AddressKey, address_key, expand_specifiers
from .netproc import Listening, holders, is_wildcard, overlaps
from .survey import Entry

__all__ = [
    "Address",
    "Obstacle",
    "Trouble",
    "is_open_to_others",
    "next_free",
    "obstacle",
    "parse_address",
]

#: sun_path in struct sockaddr_un, less the terminating zero.
MAX_PATH = 107


@dataclass(frozen=True, slots=True)
class Address:
    """A listener as a unit file has it, and as it is once systemd has filled in
    the specifiers."""

    written: str
    expanded: str
    key: AddressKey

    @property
    def host(self) -> str:
        return self.key[1]

    @property
    def port(self) -> int:
        return self.key[2]

    @property
    def is_ip(self) -> bool:
        return self.key[0] == "ip"


class Trouble(Enum):
    """Why an address cannot be had."""

    TAKEN = "taken"
    PRIVILEGED = "privileged"
    IMPOSSIBLE = "impossible"


@dataclass(frozen=True, slots=True)
class Obstacle:
    """What stands in the way of an address; `words` says it, beginning with the
    address."""

    trouble: Trouble
    words: str


def parse_address(
    text: str, port: int | None, specifiers: Mapping[str, str]
) -> Address:
    """Understand ADDRESS[:PORT], a path (with specifiers, as %t/name),
    @abstract or vsock:; raises UsageProblem."""
    if not text or not text.isprintable() or text != text.strip():
        raise UsageProblem(
            f"{text!r} is no address: write it like 127.0.0.2, [::1]:8080 or"
            f" %t/name"
        )
    if text.isdigit():
        raise UsageProblem(
            f"a bare port would be open to other machines: write"
            f" 127.0.0.1:{text}, or 127.0.0.2 and the like"
        )
    if text.startswith(("/", "%")):
        return _parse_path(text, specifiers)
    if text.startswith(("@", "vsock:")):
        key = address_key(text)
        if key is None or "%" in text or len(text) > MAX_PATH + 1:
            raise UsageProblem(
                f"{text!r} is no address: write it like @name or vsock::1234"
            )
        return Address(text, text, key)
    return _parse_ip(text, port)


def _parse_path(text: str, specifiers: Mapping[str, str]) -> Address:
    expanded = expand_specifiers(text, specifiers)
    key = address_key(expanded) if expanded else None
    if expanded is None or key is None or not expanded.startswith("/"):
        raise UsageProblem(
            f"{text!r} is no path: write it from / on, or from %t or %h on"
        )
    if ".." in expanded.split("/") or expanded.endswith("/"):
        raise UsageProblem(
            f"{text!r} is no path of a socket: systemd takes neither .. nor a"
            f" / at the end"
        )
    if len(os.fsencode(expanded)) > MAX_PATH:
        raise UsageProblem(
            f"{expanded} is too long: the path of a unix socket holds"
            f" {MAX_PATH} bytes"
        )
    return Address(text, expanded, key)


def _parse_ip(text: str, port: int | None) -> Address:
    host, own_port = text, port
    # An IPv6 address without brackets has more than one colon, and so no port.
    if text.startswith("[") or text.count(":") == 1:
        front, colon, back = text.rpartition(":")
        if colon and not back.endswith("]"):
            host = front
            if not (
                back.isascii() and back.isdigit() and 1 <= int(back) <= 65535
            ):
                raise UsageProblem(
                    f"{back!r} in {text!r} is no port: write a number from 1"
                    f" to 65535"
                )
            own_port = int(back)
    host = (
        "127.0.0.1"
        if host == "localhost"
        else host.removeprefix("[").removesuffix("]")
    )
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        raise UsageProblem(
            f"{host!r} is no address of this machine: write it like 127.0.0.2"
            f" or [::1], or a path like %t/name"
        ) from None
    if own_port is None:
        raise UsageProblem(
            f"{text!r} has no port: write it like 127.0.0.1:8080"
        )
    return ip_address(address, own_port)


def ip_address(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int
) -> Address:
    written = (
        f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"
    )
    return Address(written, written, ("ip", str(address), port))


# --------------------------------------------------------------- can it be had?


def obstacle(
    address: Address, entries: Iterable[Entry], now: Listening
) -> Obstacle | None:
    """Find what keeps systemd from listening there: another route, another
    program, or the kernel."""
    for entry in entries:
        key = address_key(entry.listener)
        if key is not None and (
            key == address.key or overlaps(key, address.key)
        ):
            owner = (
                f"the route to {entry.target}"
                if entry.target
                else f"a refused route of {entry.file or entry.unit}"
            )
            return Obstacle(
                Trouble.TAKEN, f"{address.expanded} is taken by {owner}"
            )
    inode = now.in_the_way(address.expanded)
    if inode is not None:
        holder = holders([inode]).get(inode)
        return Obstacle(
            Trouble.TAKEN,
            f"{address.expanded} is taken by"
            f" {holder or 'a program of another user'}",
        )
    if address.is_ip:
        return _try_ip(address)
    return _look_at_path(address.expanded) if address.key[0] == "path" else None


def _try_ip(address: Address) -> Obstacle | None:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        with socket.socket(family) as sock:
            # As systemd does: connections that linger from an earlier listener
            # are not in the way.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((address.host, address.port))
            sock.listen()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return Obstacle(
                Trouble.TAKEN, f"{address.expanded} is taken by another program"
            )
        if error.errno in (errno.EACCES, errno.EPERM):
            return Obstacle(
                Trouble.PRIVILEGED,
                f"port {address.port} needs privileges here"
                f" (net.ipv4.ip_unprivileged_port_start)",
            )
        return Obstacle(
            Trouble.IMPOSSIBLE,
            f"{address.expanded} cannot be listened on: {error.strerror}",
        )
    return None


def _look_at_path(path: str) -> Obstacle | None:
    # systemd removes a socket that is in the way, whoever may listen on it; so
    # nothing but a dead one may be there.
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return Obstacle(
                Trouble.TAKEN, f"{path} is taken by a file that is no socket"
            )
    folder = os.path.dirname(path)
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
        return Obstacle(
            Trouble.IMPOSSIBLE,
            f"{path} cannot be made: {folder} cannot be written to",
        )
    return None


def next_free(
    address: Address, entries: list[Entry], now: Listening
) -> Address | None:
    """Return the next address of 127.0.0.0/24 that is free on this port; None
    where all are taken."""
    return next(
        (
            one
            for one in _loopback(address)
            if obstacle(one, entries, now) is None
        ),
        None,
    )


def _loopback(address: Address) -> Iterator[Address]:
    with contextlib.suppress(ValueError):
        first = ipaddress.IPv4Address(address.host)
        if first.is_loopback:
            for last in range(int(str(first).rpartition(".")[2]) + 1, 255):
                yield ip_address(
                    ipaddress.IPv4Address(
                        f"{str(first).rpartition('.')[0]}.{last}"
                    ),
                    address.port,
                )


def is_open_to_others(key: AddressKey | None) -> bool:
    """Whether other machines, as far as the network lets them, can reach a
    listener."""
    if key is None or key[0] == "vsock":
        return key is not None
    if key[0] != "ip":
        return False
    return is_wildcard(key) or not ipaddress.ip_address(key[1]).is_loopback
