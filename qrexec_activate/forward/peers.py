"""Who may connect: the user behind a connection, and what a listener lets in.

Whoever can reach a listener makes calls as this qube. `--allow-uid` narrows
that to users. A unix socket tells who connected; of a TCP connection within
this machine the kernel knows whose its other end is (sock_diag). Where the user
cannot be told for certain, nobody is let in.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["Gate", "GateProblem", "borrowed", "exposure"]

_SO_NETNS_COOKIE = 71
_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLMSG_ERROR = 2
_NLM_F_REQUEST = 1
_NLMSGHDR = struct.Struct("=IHHII")
#: struct inet_diag_req_v2 (linux/inet_diag.h): family, protocol, ext, pad,
#: states, and the sockid: ports and addresses in network order, interface,
#: cookie. All states, any interface and any cookie.
_REQUEST = struct.Struct("=BBxxI")
_ALL_STATES = 0xFFFFFFFF
_ANYWHERE = bytes(4) + b"\xff" * 8
#: struct inet_diag_msg: family, state, timer, retrans, sockid, expires, rqueue,
#: wqueue, uid, inode.
_MESSAGE = struct.Struct("=xB62xII")
#: ESTABLISHED, FIN_WAIT1, FIN_WAIT2: connected, and perhaps half-closed. Not
#: SYN_SENT, which is another connection that is about to take these ports over.
_CONNECTED = {1, 4, 5}
_TCP_CLOSE = 7


class GateProblem(Exception):
    """Why a connection is not let in; the text follows "is refused: "."""


class Gate:
    """Lets in the connections of these users only."""

    def __init__(self, uids: Collection[int]) -> None:
        self.uids = frozenset(uids)
        self._diag: _SockDiag | None = None

    def close(self) -> None:
        if self._diag is not None:
            self._diag.close()
            self._diag = None

    def problem(self, listener: socket.socket) -> str:
        """Say why this listener can let nobody in; empty where all is well. To
        be asked before check()."""
        if listener.family == socket.AF_UNIX:
            return ""
        if listener.family not in (socket.AF_INET, socket.AF_INET6):
            return (
                "only unix sockets and TCP connections within this machine"
                " tell their users"
            )
        try:
            if self._diag is None:
                self._diag = _SockDiag()
            same_network = self._diag.sees(listener)
        except OSError as error:
            return (
                f"the kernel cannot be asked for the users of TCP connections"
                f" ({error.strerror or error}); in a unit,"
                " add RestrictAddressFamilies=AF_NETLINK"
            )
        return (
            ""
            if same_network
            else "its port is in another network namespace; in a unit, set"
            " PrivateNetwork=no"
        )

    def check(self, sock: socket.socket) -> None:
        """Return if the connection is that of a user who may connect; raises
        GateProblem if not, or if in doubt."""
        try:
            if sock.family == socket.AF_UNIX:
                uid = _unix_peer(sock)
            elif self._diag is not None:
                uid = _tcp_peer(sock, self._diag)
            else:
                raise GateProblem("who connects cannot be told")
        except OSError as error:
            raise GateProblem(
                f"who connects cannot be told ({error.strerror or error})"
            ) from error
        if uid not in self.uids:
            raise GateProblem(f"uid {uid} is not among those of --allow-uid")


def _unix_peer(sock: socket.socket) -> int:
    _, uid, _ = struct.unpack(
        "iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    )
    return int(uid)


def _tcp_peer(sock: socket.socket, diag: _SockDiag) -> int:
    """Return the user who made the socket at the other end of a TCP connection
    within this network namespace.

    The other end has our two addresses, the other way round. The kernel says
    uid 0 and inode 0 once nobody has that socket open any more, and looks at
    the uid first. So the uid counts only if the inode is not 0, and only if our
    own end is still connected after that: no other user can have come by these
    two ports meanwhile.
    """
    state, uid, inode = diag.look_up(
        sock.family, sock.getpeername(), sock.getsockname()
    )
    if state not in _CONNECTED or not inode:
        raise GateProblem(
            "who connects cannot be told: the other end has been closed already"
        )
    if sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _TCP_CLOSE:
        raise GateProblem("who connects cannot be told: the connection is over")
    return uid


class _SockDiag:
    """Asks the kernel whose a TCP socket is. Stays open, so that a shortage of
    descriptors keeps nobody out."""

    def __init__(self) -> None:
        # The kernel answers before sendto() returns, or not at all.
        kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        self._socket = socket.socket(
            socket.AF_NETLINK, kind, _NETLINK_SOCK_DIAG
        )
        try:
            self._socket.bind((0, 0))
            self._network = _network(self._socket)
        except BaseException:
            self._socket.close()
            raise
        self._number = 0

    def close(self) -> None:
        self._socket.close()

    def sees(self, sock: socket.socket) -> bool:
        """Whether that socket is in the network namespace that is asked
        here."""
        return _network(sock) == self._network

    def look_up(
        self, family: int, source: tuple[str, int], destination: tuple[str, int]
    ) -> tuple[int, int, int]:
        """Ask for exactly one TCP socket; returns its state, user and inode.
        OSError ENOENT if there is none."""
        # An address of one interface only (fe80::…%eth0) would need that
        # interface here: such a peer is not found.
        (source_host, source_port, *_), (host, port, *_) = source, destination
        request = (
            _REQUEST.pack(family, socket.IPPROTO_TCP, _ALL_STATES)
            + struct.pack("!HH", source_port, port)
            + _packed(family, source_host)
            + _packed(family, host)
            + _ANYWHERE
        )
        self._number = (self._number + 1) & 0xFFFFFFFF
        header = _NLMSGHDR.pack(
            _NLMSGHDR.size + len(request),
            _SOCK_DIAG_BY_FAMILY,
            _NLM_F_REQUEST,
            self._number,
            0,
        )
        self._socket.sendto(header + request, (0, 0))
        answer, (sender, _) = self._socket.recvfrom(8192)
        _, kind, _, number, _ = _NLMSGHDR.unpack_from(answer)
        if sender != 0 or number != self._number:
            raise GateProblem(
                "who connects cannot be told: that is no answer of the kernel"
            )
        if kind == _NLMSG_ERROR:
            (code,) = struct.unpack_from("=i", answer, _NLMSGHDR.size)
            raise OSError(-code, os.strerror(-code))
        state, uid, inode = _MESSAGE.unpack_from(answer, _NLMSGHDR.size)
        return state, uid, inode


def _packed(family: int, host: str) -> bytes:
    return socket.inet_pton(family, host.partition("%")[0]).ljust(16, b"\0")


def _network(sock: socket.socket) -> bytes:
    """What tells the network namespace of a socket from all others (Linux 5.14
    up)."""
    return sock.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8)


@contextmanager
def borrowed(fd: int) -> Iterator[socket.socket]:
    """Look at a descriptor as a socket, and leave it open."""
    sock = socket.socket(fileno=fd)
    try:
        yield sock
    finally:
        sock.detach()


def exposure(sock: socket.socket) -> str:
    """Say who else can reach a listener, and what to set; empty where only its
    own user, or only this machine, can.

    A port on loopback is open to every user of the machine, which is what such
    ports are, and nothing to warn of.
    """
    match sock.family, sock.getsockname():
        case ((socket.AF_INET | socket.AF_INET6), (str(host), *_)):
            return _exposed_host(host)
        case socket.AF_VSOCK, _:
            return (
                "other virtual machines of the same host may reach it; use a"
                " unix socket where they need not"
            )
        case socket.AF_UNIX, bytes():
            return (
                "every user of this machine can reach an abstract socket; use"
                " a path, or set --allow-uid"
            )
        case socket.AF_UNIX, str(path) if path:
            return _exposed_path(Path(path))
    return ""


def _exposed_host(host: str) -> str:
    if host in ("0.0.0.0", "::"):
        who = "every machine that can reach this one"
    elif host.startswith("127.") or host in ("::1", "::ffff:127.0.0.1"):
        return ""
    else:
        who = "other machines"
    return (
        f"{who} may reach it; listen on 127.0.0.1, or set BindToDevice=lo,"
        f" IPAddressAllow= or --allow-uid"
    )


def _exposed_path(path: Path) -> str:
    """Whether others may write to the socket, and get to it through all its
    folders."""
    group, others = True, True
    try:
        mode = path.stat().st_mode
        for folder in path.parents:
            mode_above = folder.stat().st_mode
            group &= bool(mode_above & (stat.S_IXGRP | stat.S_IXOTH))
            others &= bool(mode_above & stat.S_IXOTH)
    except OSError:
        # What cannot be looked at from here, such as a socket that was removed,
        # cannot be reached by it either.
        return ""
    if others and mode & stat.S_IWOTH:
        return (
            f"its mode is {mode & 0o777:04o}, so every user of this machine"
            f" can reach it; set SocketMode=0600"
        )
    if group and mode & stat.S_IWGRP:
        return (
            f"its mode is {mode & 0o777:04o}, so its group can reach it; set"
            f" SocketMode=0600 unless that is meant"
        )
    return ""
