"""All TCP connections of this machine, with the bytes that went each way, as
the kernel tells them to anyone.

One dump by sock_diag (linux/inet_diag.h, what `ss -ti` uses) for each address
family; needs no privileges.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["TcpConnection", "tcp_connections"]

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_REQUEST, _DUMP = 0x1, 0x300
_HEADER = struct.Struct("=IHHII")
#: struct inet_diag_req_v2: family, protocol, extensions, states, and a socket
#: id of zeros: any.
_INET_DIAG_REQUEST = struct.Struct("=BBBxI48x")
#: struct inet_diag_msg: family, state; ports and addresses in network order;
#: inode.
_INET_DIAG_MESSAGE = struct.Struct("=BB2x2s2s16s16s12x4x4x4x4xI")
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
class TcpConnection:
    """One end of a connection. Bytes are None where the kernel is too old to
    count them."""

    local: tuple[str, int]
    remote: tuple[str, int]
    inode: int
    received: int | None
    sent: int | None


def tcp_connections() -> list[TcpConnection]:
    """Return both ends of every connection within this machine, and this end of
    the others; empty if nobody tells."""
    found: list[TcpConnection] = []
    with contextlib.suppress(OSError, struct.error):
        for family in (socket.AF_INET, socket.AF_INET6):
            found += _dump(family)
    return found


def _dump(family: socket.AddressFamily) -> Iterator[TcpConnection]:
    with socket.socket(
        socket.AF_NETLINK,
        socket.SOCK_RAW | socket.SOCK_CLOEXEC,
        _NETLINK_SOCK_DIAG,
    ) as netlink:
        netlink.settimeout(_REPLY_TIMEOUT)
        states = sum(1 << state for state in _STATES)
        body = _INET_DIAG_REQUEST.pack(
            family, socket.IPPROTO_TCP, 1 << (_INET_DIAG_INFO - 1), states
        )
        header = _HEADER.pack(
            _HEADER.size + len(body),
            _SOCK_DIAG_BY_FAMILY,
            _REQUEST | _DUMP,
            1,
            0,
        )
        netlink.sendto(header + body, (0, 0))
        while True:
            data = netlink.recv(1 << 17)
            while data:
                length, kind, *_ = _HEADER.unpack_from(data)
                if kind in (_NLMSG_ERROR, _NLMSG_DONE) or length < _HEADER.size:
                    return
                yield _connection(data[_HEADER.size : length])
                data = data[(length + 3) & ~3 :]


def _connection(message: bytes) -> TcpConnection:
    family, state, sport, dport, source, destination, inode = (
        _INET_DIAG_MESSAGE.unpack_from(message)
    )
    received = sent = None
    at = _INET_DIAG_MESSAGE.size
    while at + _ATTRIBUTE.size <= len(message):
        length, kind = _ATTRIBUTE.unpack_from(message, at)
        if length < _ATTRIBUTE.size:
            break
        if (
            kind == _INET_DIAG_INFO
            and length - _ATTRIBUTE.size >= _TCP_INFO.size
        ):
            received, all_sent, sent_again = _TCP_INFO.unpack_from(
                message, at + _ATTRIBUTE.size
            )
            received -= state in _FIN_RECEIVED
            sent = all_sent - sent_again
        at += (length + 3) & ~3
    return TcpConnection(
        _endpoint(family, source, sport),
        _endpoint(family, destination, dport),
        inode,
        received,
        sent,
    )


def _endpoint(family: int, raw: bytes, port: bytes) -> tuple[str, int]:
    if family == socket.AF_INET:
        return str(ipaddress.IPv4Address(raw[:4])), int.from_bytes(port, "big")
    return str(ipaddress.IPv6Address(raw)), int.from_bytes(port, "big")
