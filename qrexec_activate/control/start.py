"""qrexec-activate start: routes by name, units to systemd."""

from __future__ import annotations

from .settle import Change
from .switch import switch

__all__ = ["command"]

command = switch(
    "start",
    "Let routes listen now, without making them start at login.",
    "Started",
    lambda units, _: Change(start=units),
)
