"""Bring systemd in line with what the unit files now say, for one socket
unit."""

from __future__ import annotations

from ..errors import ActivateError, ManagerError
from ..routing.unitfile import address_key
from ..systemd.systemctl import Systemctl
from .netproc import holders, listening

__all__ = ["is_active", "is_enabled", "start", "stop", "why_not_started"]


def is_active(systemctl: Systemctl, unit: str) -> bool:
    """Whether the socket listens, or did until it failed just now."""
    return systemctl.run("is-active", unit, check=False).strip() in (
        "active",
        "activating",
        "reloading",
    )


def is_enabled(systemctl: Systemctl, unit: str) -> bool:
    return systemctl.run("is-enabled", unit, check=False).strip() in (
        "enabled",
        "enabled-runtime",
        "static",
        "alias",
    )


def start(systemctl: Systemctl, unit: str, addresses: list[str]) -> None:
    """Let the unit listen on what its files say now; raises ActivateError with
    the reason.

    A unit that is active has to be restarted for that. Its open connections go
    on.
    """
    systemctl.run("reset-failed", unit, check=False)
    try:
        systemctl.run("restart", unit)
    except ManagerError as error:
        if reason := why_not_started(addresses):
            raise ActivateError(f"{unit} does not start: {reason}") from None
        raise ActivateError(
            f"{error} ({systemctl.written('status', unit)} says more)"
        ) from None


def why_not_started(addresses: list[str]) -> str:
    """Name who has an address that the unit wants; empty if nobody has."""
    now = listening()
    reasons = []
    for address in addresses:
        key = address_key(address)
        inode = now.in_the_way(address) if key else None
        if inode is not None:
            holder = holders([inode]).get(inode)
            reasons.append(
                f"{address} is taken by {holder or 'a program of another user'}"
            )
    return "; ".join(reasons)


def stop(systemctl: Systemctl, unit: str) -> None:
    """Stop and disable a unit that has nothing left to listen on."""
    systemctl.run("stop", unit)
    systemctl.run("reset-failed", unit, check=False)
    systemctl.run("disable", "--no-reload", unit)
    systemctl.daemon_reload()
