"""Which sockets this machine listens on, and which process holds one, as the
kernel tells.

Nothing here connects to anything: a look must not start a service.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import pwd
import sys
from collections.abc import Iterable
from dataclasses import dataclass

from ..routing.address import AddressKey, address_key
from .sockdiag import listening_unix

__all__ = [
    "Holder",
    "Listening",
    "holders",
    "is_wildcard",
    "listening",
    "overlaps",
    "owner",
    "process_name",
]

_TCP_LISTEN = "0A"


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that holds a socket."""

    pid: int
    name: str

    def __str__(self) -> str:
        return f"{self.name} (pid {self.pid})"


@dataclass(slots=True)
class Listening:
    """The listening sockets of this network namespace: what address_key() makes
    of an address → inode."""

    inodes: dict[AddressKey, int]
    #: Whether the kernel tells of unix sockets, too.
    unix_is_known: bool = True

    def holds(self, address: str) -> bool | None:
        """Whether somebody listens on exactly this address; None where the
        kernel does not tell."""
        key = address_key(address)
        if key is None or key[0] == "vsock" or (key[0] == "ip" and key[2] == 0):
            return None
        if key in self.inodes:
            return True
        if key[0] != "ip" and not self.unix_is_known:
            return None
        # A bare port is IPv4 any where the kernel has no IPv6.
        return (
            key[:2] == ("ip", "::") and ("ip", "0.0.0.0", key[2]) in self.inodes
        )

    def in_the_way(self, address: str) -> int | None:
        """Return the inode of a socket that keeps others from listening on this
        address; None: nobody does."""
        key = address_key(address)
        if key is None:
            return None
        for other, inode in self.inodes.items():
            if other == key or overlaps(other, key):
                return inode
        return None


def is_wildcard(key: AddressKey) -> bool:
    """Whether an address stands for all addresses of the machine."""
    return key[0] == "ip" and key[1] in ("0.0.0.0", "::")


def overlaps(one: AddressKey, other: AddressKey) -> bool:
    """Whether two addresses exclude each other though they differ: one is all
    addresses, and the port is the same."""
    if one[0] != "ip" or other[0] != "ip" or one[2] != other[2] or one == other:
        return False
    if "::" in (one[1], other[1]):
        # systemd's IPv6 sockets take IPv4 as well (bindv6only is off by
        # default).
        return True
    both_v4 = ":" not in one[1] and ":" not in other[1]
    return both_v4 and "0.0.0.0" in (one[1], other[1])


def _address(text: str) -> tuple[str, int]:
    """Decode an address of /proc/net/tcp and tcp6: words in the machine's byte
    order, then the port."""
    host, _, port = text.partition(":")
    words = [
        int(host[at : at + 8], 16).to_bytes(4, sys.byteorder)
        for at in range(0, len(host), 8)
    ]
    address = ipaddress.ip_address(b"".join(words))
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    return str(address), int(port, 16)


def _lines(name: str) -> Iterable[str]:
    with (
        contextlib.suppress(OSError),
        open(
            f"/proc/net/{name}", encoding="utf-8", errors="surrogateescape"
        ) as file,
    ):
        next(file, None)
        yield from file


def listening() -> Listening:
    """Take down who listens now."""
    inodes: dict[AddressKey, int] = {}
    for name in ("tcp", "tcp6"):
        for line in _lines(name):
            fields = line.split()
            if fields[3] == _TCP_LISTEN:
                host, port = _address(fields[1])
                inodes["ip", host, port] = int(fields[9])
    unix = listening_unix()
    for bound, inode in unix or ():
        if key := _unix_key(bound):
            inodes[key] = inode
    return Listening(inodes, unix is not None)


def _unix_key(name: bytes) -> AddressKey | None:
    """What address_key() makes of the kernel's name for a unix socket."""
    if name[:1] == b"\0":
        # A person writes such a name with an @ in front, and so does systemd.
        return address_key(os.fsdecode(b"@" + name[1:]))
    # One that is relative to the folder of whoever made it may look like any
    # other address.
    path = os.fsdecode(name.partition(b"\0")[0])
    return address_key(path) if path.startswith("/") else None


def holders(inodes: Iterable[int]) -> dict[int, Holder]:
    """Find for each socket a process that holds it; without privileges, only
    the user's own can be seen.

    systemd holds all sockets that it made, so it is named only where no other
    process has the socket.
    """
    wanted = {f"socket:[{inode}]": inode for inode in inodes}
    found: dict[int, Holder] = {}
    if not wanted:
        return found
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        with contextlib.suppress(OSError):
            folder = f"/proc/{pid}/fd"
            for fd in os.listdir(folder):
                with contextlib.suppress(OSError):
                    inode = wanted.get(os.readlink(f"{folder}/{fd}"))
                    if inode is not None and (
                        inode not in found or found[inode].name == "systemd"
                    ):
                        found[inode] = Holder(pid, process_name(pid))
    return found


def owner(inode: int, address: str) -> str:
    """The name of the user who listens there, or the number of one without a
    name; empty where the kernel does not tell."""
    uid: int | None = None
    for name in ("tcp", "tcp6"):
        for line in _lines(name):
            fields = line.split()
            if fields[9] == str(inode):
                uid = int(fields[7])
    if uid is None and address.startswith("/"):
        with contextlib.suppress(OSError):
            uid = os.lstat(address).st_uid
    if uid is None:
        return ""
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
    return name if name.isprintable() else repr(name)


def process_name(pid: int) -> str:
    """The name of a process as the kernel has it; empty if there is none."""
    with (
        contextlib.suppress(OSError),
        open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file,
    ):
        name = file.read().strip()
        return name if name.isprintable() else repr(name)
    return ""
