"""From KIND and ARGUMENT (tcp 1234, unix NAME) to a unit, an RPC, and where it
listens if nobody says."""

from __future__ import annotations

from ..errors import BadName, UsageProblem
from ..routing.names import parse_unit_name
from .escapes import escape_instance

__all__ = ["KINDS", "RPCS", "default_listen", "port_of", "unit_of"]

#: The prefixes that ship. Which RPC each of them calls is read from its
#: service.
KINDS = {
    "tcp": "qrexec-connect-tcp",
    "unix": "qrexec-connect-unix",
    "tcp-bind": "qrexec-connect-tcp-bind",
}
#: What their services call, as they ship.
RPCS = {
    "tcp": "qubes.ConnectTCP",
    "unix": "qubes.ConnectUnix",
    "tcp-bind": "qubes.ConnectTCPBind",
}


def unit_of(kind: str, argument: str, label: str = "") -> str:
    """Return the socket unit for tcp, unix, tcp-bind or a prefix of one's own;
    raises BadName."""
    if kind == "udp":
        raise UsageProblem(
            "UDP cannot be carried: a qrexec call is a stream of bytes, without"
            " the bounds of datagrams; use a service of TCP, or one that wraps"
            " UDP in a stream"
        )
    prefix = KINDS.get(kind, kind.removesuffix(".socket").removesuffix("@"))
    unit = f"{prefix}@{escape_instance(argument, label)}.socket"
    name = parse_unit_name(unit)
    if not argument or name.prefix != prefix:
        raise BadName(
            f"{kind} {argument}: write it like tcp 1234, unix NAME, tcp-bind"
            f" 2049-127.0.1.1 or my-rpc ARGUMENT"
        )
    return unit


def port_of(kind: str, argument: str) -> int | None:
    """The port of an address that names none; None where there is none."""
    if kind not in ("tcp", "tcp-bind"):
        return None
    front = argument.partition("-")[0]
    return int(front) if front.isdigit() else None


def default_listen(kind: str, argument: str) -> str:
    """Where a route listens if nobody says."""
    if port_of(kind, argument):
        return "127.0.0.1"
    name = argument if kind == "unix" else f"{kind}-{argument}"
    return f"%t/qrexec/{name.replace('%', '%%')}"
