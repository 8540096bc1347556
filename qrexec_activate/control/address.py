"""Where a route is to listen: whether it can be had, and what else could
be."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum

from ..given.address import Address, parse_address
from ..routing.address import AddressKey, address_key
from ..routing.names import c_escape
from .netproc import Listening, holders, is_wildcard, overlaps
from .survey import Entry

__all__ = [
    "Obstacle",
    "Trouble",
    "is_open_to_others",
    "is_plain",
    "next_free",
    "obstacle",
]


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


def is_plain(listener: str) -> bool:
    """Whether systemd shows an address as it is. Others, which it has to show
    with a backslash, 252 does not know again at a daemon-reload, and closes."""
    if not listener.startswith(("/", "@")):
        return True
    return c_escape(os.fsencode(listener)) == listener


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
                host = f"{str(first).rpartition('.')[0]}.{last}"
                yield parse_address(host, address.port, {})


def is_open_to_others(key: AddressKey | None) -> bool:
    """Whether other machines, as far as the network lets them, can reach a
    listener."""
    if key is None or key[0] == "vsock":
        return key is not None
    if key[0] != "ip":
        return False
    return is_wildcard(key) or not ipaddress.ip_address(key[1]).is_loopback
