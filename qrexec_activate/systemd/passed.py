"""What systemd passed: the inherited sockets, with the kind and the address by
which systemd would call them.

It takes the descriptors out of LISTEN_FDS once, marks them close-on-exec, and
judges nothing.
"""

from __future__ import annotations

import os
import socket
import stat

from systemd import daemon as sd_daemon

from ..routing.claim import PassedSocket
from ..routing.names import c_escape

__all__ = ["describe", "format_address", "passed_sockets", "split_names"]

_KINDS = {
    socket.SOCK_STREAM: "Stream",
    socket.SOCK_DGRAM: "Datagram",
    socket.SOCK_SEQPACKET: "SequentialPacket",
}


def format_address(family: int, name: object) -> str:
    """Write a socket's name (from getsockname() or getpeername()) as systemd's
    property Listen does."""
    match family, name:
        case socket.AF_INET, (str(host), int(port)):
            return f"{host}:{port}"
        case socket.AF_INET6, (str(host), int(port), _, int(scope)):
            return f"[{host}]:{port}{_interface(scope)}"
        case socket.AF_VSOCK, (int(cid), int(port)):
            any_cid = cid == socket.VMADDR_CID_ANY
            return f"vsock:{'' if any_cid else cid}:{port}"
        case socket.AF_UNIX, b"" | "":
            return "unix socket without a name"
        case socket.AF_UNIX, bytes(raw):
            return f"@{c_escape(raw[1:])}"
        case socket.AF_UNIX, str(path):
            return c_escape(os.fsencode(path))
    return f"socket of address family {int(family)}"


def _interface(scope: int) -> str:
    if not scope:
        return ""
    try:
        return f"%{socket.if_indextoname(scope)}"
    except OSError:
        return f"%{scope}"


def describe(fd: int, name: str) -> PassedSocket:
    """Tell kind and address of one inherited descriptor."""
    mode = os.fstat(fd).st_mode
    if not stat.S_ISSOCK(mode):
        kind = "FIFO" if stat.S_ISFIFO(mode) else "Special"
        return PassedSocket(fd, name, kind, os.readlink(f"/proc/self/fd/{fd}"))
    probe = socket.socket(fileno=fd)
    try:
        kind = _KINDS.get(probe.type, "Special")
        if probe.family == socket.AF_NETLINK:
            kind = "Netlink"
        elif kind == "Stream" and not probe.getsockopt(
            socket.SOL_SOCKET, socket.SO_ACCEPTCONN
        ):
            kind = "Connection"
        return PassedSocket(
            fd, name, kind, format_address(probe.family, probe.getsockname())
        )
    finally:
        probe.detach()


def split_names(text: str, count: int) -> list[str]:
    """Split LISTEN_FDNAMES into the names of so many descriptors.

    systemd joins them by colons, which a FileDescriptorName cannot hold; but a
    unit without one goes by its own name, which can, in what follows its @.
    libsystemd's own sd_listen_fds_with_names (252 to 257) takes a backslash for
    an escape, and drops it: `@dispvm\\x3aNAME` becomes `@dispvmx3aNAME`.
    Raises ValueError where the two do not agree.
    """
    names = text.split(":")
    if len(names) > count:
        names = _with_unit_names(names)
    if len(names) != count:
        raise ValueError(f"{count} descriptors, and LISTEN_FDNAMES={text}")
    return names


def _with_unit_names(parts: list[str]) -> list[str]:
    """Put the names of units together again. No name of a target has anything
    before an @."""
    names: list[str] = []
    for part in parts:
        last = names[-1] if names else ""
        if last.find("@") > 0 and not last.endswith(".socket"):
            names[-1] += f":{part}"
        else:
            names.append(part)
    return names


def passed_sockets() -> list[PassedSocket]:
    """Return the sockets that systemd passed to this process, in order; empty
    where it passed none."""
    text = os.environ.get("LISTEN_FDNAMES")
    fds = sd_daemon.listen_fds(True)
    # It takes them out of C's environment only, and children get Python's.
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)
    if text is None:
        names = ["unknown"] * len(fds)
    else:
        names = split_names(text, len(fds)) if fds else []
    return [describe(fd, name) for fd, name in zip(fds, names, strict=True)]
