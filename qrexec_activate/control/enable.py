"""qrexec-activate enable: routes by name, units to systemd."""

from __future__ import annotations

from .settle import Change
from .switch import switch

__all__ = ["command"]

command = switch(
    "enable",
    "Let routes start at login, or at boot with --system.",
    "Enabled",
    lambda units, now: Change(enable=units, start=units if now else []),
    has_now=True,
)
