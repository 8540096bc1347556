"""All TCP connections of this machine, with the bytes that went each way, and
its listening unix sockets, as the kernel tells them to anyone.

One dump by sock_diag (linux/inet_diag.h and unix_diag.h, what `ss` uses) for
each address family; needs no privileges. /proc/net/unix is not read: the name
of an abstract socket may hold line breaks, so anybody can forge its lines.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Container, Iterator
from dataclasses import dataclass

__all__ = [
    "TcpEnd",
    "connected_unix",
    "end_key",
    "listening_unix",
    "tcp_ends",
]

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_REQUEST, _DUMP = 0x1, 0x300
_HEADER = struct.Struct("=IHHII")
#: struct inet_diag_req_v2: family, protocol, extensions, states, and a socket
#: id of zeros: any.
_INET_DIAG_REQUEST = struct.Struct("=BBBxI48x")
#: struct inet_diag_msg: family, state; from 4 on the ports, from 8 on both
#: addresses in network order; inode.
_INET_DIAG_MESSAGE = struct.Struct("=xB2x36x12x4x4x4x4xI")
#: struct unix_diag_req: family, protocol, states, inode, what to show, cookie.
_UNIX_DIAG_REQUEST = struct.Struct("=BBxxIIIII")
#: struct unix_diag_msg: family, type, state, inode, cookie.
_UNIX_DIAG_MESSAGE = struct.Struct("=BBBxI8x")
_UNIX_DIAG_NAME, _UDIAG_SHOW_NAME = 0, 1
_ANY_COOKIE = 0xFFFFFFFF
_ESTABLISHED, _LISTEN = 1, 10
_ATTRIBUTE = struct.Struct("=HH")
_INET_DIAG_INFO = 2
#: tcpi_bytes_received, tcpi_bytes_sent and tcpi_bytes_retrans in struct
#: tcp_info (linux/tcp.h, 4.19 up).
_TCP_INFO = struct.Struct("=128xQ64xQQ")

#: States with two ends: ESTABLISHED, FIN_WAIT1 and 2, CLOSE_WAIT, LAST_ACK,
#: CLOSING.
_STATES = (1, 4, 5, 8, 9, 11)
#: States in which the peer's FIN has come, which the kernel counts as a byte.
_FIN_RECEIVED = (8, 9, 11)
_REPLY_TIMEOUT = 5.0


@dataclass(frozen=True, slots=True)
class TcpEnd:
    """One end of a connection. Bytes are None where the kernel is too old to
    count them."""

    inode: int
    received: int | None
    sent: int | None


def end_key(remote: str, remote_port: int, local_port: int) -> bytes:
    """What names the end of a connection that looks at this remote address."""
    family = socket.AF_INET6 if ":" in remote else socket.AF_INET
    return (
        socket.inet_pton(family, remote).ljust(16, b"\0")
        + remote_port.to_bytes(2, "big")
        + local_port.to_bytes(2, "big")
    )


def tcp_ends(
    wanted: Container[bytes],
) -> tuple[dict[bytes, TcpEnd], dict[bytes, TcpEnd]]:
    """Return, of the connections whose end here is wanted, that end, and the
    other one where it is within this machine; empty if nobody tells."""
    ours: dict[bytes, TcpEnd] = {}
    theirs: dict[bytes, TcpEnd] = {}
    with contextlib.suppress(OSError, struct.error):
        for family in (socket.AF_INET, socket.AF_INET6):
            for message in _messages(_tcp_request(family)):
                # A look at thousands of connections takes no more for each than
                # this, but where one is wanted.
                ports = message[4:8]
                source, destination = message[8:24], message[24:40]
                key = destination + ports[2:] + ports[:2]
                if key in wanted:
                    ours[key] = _end(message)
                key = source + ports
                if key in wanted:
                    theirs[key] = _end(message)
    return ours, theirs


def listening_unix() -> list[tuple[bytes, int]] | None:
    """Return name and inode of every unix socket that listens, as the kernel
    has it: an abstract name begins with a NUL. None if nobody tells."""
    return _unix_sockets(_LISTEN)


def connected_unix() -> list[tuple[bytes, int]] | None:
    """The same of those that have another end: on the server's side they bear
    the name of what they connected to."""
    return _unix_sockets(_ESTABLISHED)


def _unix_sockets(state: int) -> list[tuple[bytes, int]] | None:
    request = _UNIX_DIAG_REQUEST.pack(
        socket.AF_UNIX,
        0,
        1 << state,
        0,
        _UDIAG_SHOW_NAME,
        _ANY_COOKIE,
        _ANY_COOKIE,
    )
    try:
        found = []
        for message in _messages(request):
            *_, inode = _UNIX_DIAG_MESSAGE.unpack_from(message)
            for kind, value in _attributes(message, _UNIX_DIAG_MESSAGE.size):
                if kind == _UNIX_DIAG_NAME:
                    found.append((value, inode))
        return found
    except (OSError, struct.error):
        return None


def _tcp_request(family: socket.AddressFamily) -> bytes:
    states = sum(1 << state for state in _STATES)
    return _INET_DIAG_REQUEST.pack(
        family, socket.IPPROTO_TCP, 1 << (_INET_DIAG_INFO - 1), states
    )


def _messages(request: bytes) -> Iterator[bytes]:
    """Yield what the kernel answers; raises OSError where it does not know how
    to."""
    with socket.socket(
        socket.AF_NETLINK,
        socket.SOCK_RAW | socket.SOCK_CLOEXEC,
        _NETLINK_SOCK_DIAG,
    ) as netlink:
        netlink.settimeout(_REPLY_TIMEOUT)
        header = _HEADER.pack(
            _HEADER.size + len(request),
            _SOCK_DIAG_BY_FAMILY,
            _REQUEST | _DUMP,
            1,
            0,
        )
        netlink.sendto(header + request, (0, 0))
        while True:
            # Whoever guesses the port of a netlink socket can write to it.
            data, (sender, _) = netlink.recvfrom(1 << 17)
            while data and sender == 0:
                length, kind, *_ = _HEADER.unpack_from(data)
                if kind == _NLMSG_DONE:
                    return
                if kind == _NLMSG_ERROR or length < _HEADER.size:
                    raise OSError("sock_diag gives no answer")
                yield data[_HEADER.size : length]
                data = data[(length + 3) & ~3 :]


def _attributes(message: bytes, at: int) -> Iterator[tuple[int, bytes]]:
    while at + _ATTRIBUTE.size <= len(message):
        length, kind = _ATTRIBUTE.unpack_from(message, at)
        if length < _ATTRIBUTE.size:
            break
        yield kind, message[at + _ATTRIBUTE.size : at + length]
        at += (length + 3) & ~3


def _end(message: bytes) -> TcpEnd:
    state, inode = _INET_DIAG_MESSAGE.unpack_from(message)
    received = sent = None
    for kind, value in _attributes(message, _INET_DIAG_MESSAGE.size):
        if kind == _INET_DIAG_INFO and len(value) >= _TCP_INFO.size:
            received, all_sent, sent_again = _TCP_INFO.unpack_from(value)
            received -= state in _FIN_RECEIVED
            sent = all_sent - sent_again
    return TcpEnd(inode, received, sent)
