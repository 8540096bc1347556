"""The daemon that serves what `add` is told (tcp 1234, or a name of one's
own)."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import replace

from ..errors import ActivateError, UsageProblem
from ..given.kinds import KINDS
from ..routing.names import parse_unit_name
from ..systemd.unitdirs import scan
from ..systemd.units import Manager, open_manager
from .daemons import declared_daemon, is_mask
from .options import did_you_mean
from .survey import Daemon, Survey, find_daemon, masked_name, why_dead

__all__ = ["daemon_of", "own_kinds", "will_refuse"]


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


def daemon_of(manager: Manager, kind: str, unit: str, now: Survey) -> Daemon:
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
        own = is_mask(now.files.fragments.get(unit, ""))
        masked = masked_name(unit, "masked" if own else "")
        raise ActivateError(
            f"{masked} is masked; {now.systemctl} unmask {masked}"
        )
    for service in row["Triggers"] or ():
        (properties,) = manager.unit_properties(
            [service], "Service", ["ExecStart"]
        )
        if daemon := find_daemon(service, properties["ExecStart"] or ()):
            return daemon
    if declared := declared_daemon(unit, now.files):
        (row,) = manager.unit_properties([declared.unit], "Unit", ["LoadState"])
        load = row["LoadState"] or "not-found"
        raise ActivateError(
            why_dead(replace(declared, load=load), now.systemctl)
        )
    raise ActivateError(
        f"{template} starts"
        f" {' '.join(row['Triggers'] or ()) or 'no service'}, which does not"
        f" run qrexec-activate serve: see {now.systemctl} cat {template}"
    )
