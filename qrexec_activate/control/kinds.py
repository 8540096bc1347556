"""From what `add` is told (tcp 1234, or a name of one's own) to the unit and
the daemon that serves it."""

from __future__ import annotations

import ipaddress
import socket

from ..errors import ActivateError, BadName, UsageProblem
from ..routing.names import escape_instance, parse_unit_name
from ..systemd.manager import Manager, open_manager
from ..systemd.unitdirs import scan
from .options import did_you_mean
from .survey import Daemon, find_daemon

__all__ = ["KINDS", "daemon_of", "own_kinds", "unit_of", "will_refuse"]

#: The prefixes that ship. Which RPC each of them calls is read from its
#: service.
KINDS = {
    "tcp": "qrexec-connect-tcp",
    "unix": "qrexec-connect-unix",
    "tcp-bind": "qrexec-connect-tcp-bind",
}


def own_kinds(*, user: bool) -> list[str]:
    """The prefixes of a person's own that start a daemon."""
    with open_manager(user=user) as manager:
        (path,) = manager.manager_properties("UnitPath")
        units = scan(path or ()).fragments
        templates = [
            name
            for name in units
            if name.endswith("@.socket")
            and f"{name.removesuffix('@.socket')}.service" in units
        ]
        prefixes = [name.removesuffix("@.socket") for name in templates]
        rows = manager.unit_properties(
            [f"{prefix}.service" for prefix in prefixes],
            "Service",
            ["ExecStart"],
        )
        return sorted(
            prefix
            for prefix, row in zip(prefixes, rows, strict=True)
            if prefix not in KINDS.values()
            and find_daemon(f"{prefix}.service", row["ExecStart"] or ())
        )


def will_refuse(service: str, argument: str) -> str:
    """Why the service in the other qube refuses an argument that is well formed
    otherwise; empty where it does not.

    As rpc/qubes.ConnectTCPBind has it, an address is that of a single host, and
    IPv6 has one spelling, as policy compares letters. Those of 0.1.0 took any.
    """
    if service != "qubes.ConnectTCPBind":
        return ""
    address = argument.partition("-")[2]
    parsed = ipaddress.ip_address(address.replace("+", ":"))
    if isinstance(parsed, ipaddress.IPv4Address):
        one = 0 < parsed.packed[0] < 224 and parsed.packed[3] not in (0, 255)
    else:
        one = not (parsed.is_multicast or parsed.is_unspecified)
        spelled = socket.inet_ntop(socket.AF_INET6, parsed.packed)
        if "." in spelled:
            return f"{service} refuses {address}, which stands for IPv4"
        if one and (right := spelled.replace(":", "+")) != address:
            return f"{service} refuses {address}: write it {right}"
    return "" if one else f"{service} refuses {address}: it is no single host's"


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


def daemon_of(manager: Manager, kind: str, unit: str) -> Daemon:
    """Find the daemon that socket units of this prefix would start."""
    prefix = parse_unit_name(unit).prefix
    template = f"{prefix}@.socket"
    (row,) = manager.unit_properties([unit], "Unit", ["LoadState", "Triggers"])
    if row["LoadState"] in (None, "not-found"):
        if kind in KINDS:
            raise ActivateError(
                f"{template} is not installed: install the package"
                f" qrexec-activate"
            )
        raise UsageProblem(
            f"there is no {template}{did_you_mean(kind, KINDS)}: the kinds are"
            f" {', '.join(KINDS)}, and what you have made with"
            f" qrexec-activate add-rpc {prefix} MY.RPC"
        )
    if row["LoadState"] == "masked":
        raise ActivateError(
            f"{unit} is masked: systemctl unmask {unit} (with --user for a"
            f" user unit)"
        )
    for service in row["Triggers"] or ():
        (properties,) = manager.unit_properties(
            [service], "Service", ["ExecStart"]
        )
        if daemon := find_daemon(service, properties["ExecStart"] or ()):
            return daemon
    raise ActivateError(
        f"{template} starts"
        f" {' '.join(row['Triggers'] or ()) or 'no service'}, which does not"
        f" run"
        f" qrexec-activate serve: see systemctl cat {template}"
    )
