"""qrexec-activate stop: routes by name, units to systemd."""

from __future__ import annotations

from .settle import Change
from .switch import switch

__all__ = ["command"]

command = switch(
    "stop",
    "Close routes now, until they are started again. Connections that are"
    " open go on.",
    "Stopped",
    lambda units, _: Change(stop=units),
)
