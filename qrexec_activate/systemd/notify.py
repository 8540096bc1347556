"""What the service tells systemd: READY, STATUS, STOPPING, and that it lives.

One socket, open all the time, so that the watchdog is fed also when descriptors
run out. Nothing here waits: a manager that does not read holds up nobody.
"""

from __future__ import annotations

import os
import socket

__all__ = ["Notifier", "watchdog_interval"]


class Notifier:
    """The way to tell systemd something; where nobody wants to know, none."""

    def __init__(self) -> None:
        address = os.environ.get("NOTIFY_SOCKET", "")
        if address.startswith("@"):
            address = "\0" + address[1:]
        self._address = address
        self._sock: socket.socket | None = None
        if address:
            self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    @property
    def wanted(self) -> bool:
        """Whether somebody wants to know: a service of Type=notify."""
        return self._sock is not None

    def tell(self, state: str) -> bool:
        """Whether systemd was told; that it could not be is no reason to end.

        A manager that is busy has a full queue; what matters is told again.
        """
        if self._sock is None:
            return True
        try:
            self._sock.sendto(
                state.encode(), socket.MSG_DONTWAIT, self._address
            )
        except OSError:
            return False
        return True

    def close(self) -> None:
        if self._sock is not None:
            self._sock.close()


def watchdog_interval() -> float | None:
    """How often to feed the watchdog, in seconds: twice as often as systemd
    asks for; None: no watchdog."""
    try:
        interval = int(os.environ["WATCHDOG_USEC"])
        for_us = int(os.environ.get("WATCHDOG_PID", os.getpid())) == os.getpid()
    except (KeyError, ValueError):
        return None
    return interval / 2e6 if for_us and interval > 0 else None
