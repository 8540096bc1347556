"""qrexec-activate disable: routes by name, units to systemd."""

from __future__ import annotations

from .settle import Change
from .switch import switch

__all__ = ["command"]

command = switch(
    "disable",
    "Let routes not start by themselves any more.",
    "Disabled",
    lambda units, now: Change(disable=units, stop=units if now else []),
    has_now=True,
)
