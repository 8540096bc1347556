"""What the command line says about serving. Imports nothing heavy, as it is
read before anything else is loaded."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

__all__ = ["CARETAKER", "STOP_SIGNALS", "Relay", "Request", "Settings"]

#: Orders to stop. The second is that of the units (KillSignal=): one that comes
#: before there is somebody to receive it does no harm, and serve asks for it.
#: Of a hang-up systemd would take the end for a clean one, and start nobody.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGURG, signal.SIGHUP)

#: In the environment of a process that has no listeners, and looks after the
#: connections of an earlier daemon, whose number this says, until the next one
#: comes.
CARETAKER = "QREXEC_ACTIVATE_CARETAKER"


class Relay(Enum):
    """How the bytes get from the socket to qrexec-client-vm."""

    AUTO = "auto"
    HAND_OVER = "hand-over"
    SPLICE = "splice"


@dataclass(frozen=True, slots=True)
class Settings:
    """Limits and choices. Times in seconds."""

    client: str = "/usr/bin/qrexec-client-vm"
    relay: Relay = Relay.AUTO
    #: On Xen, more than 10 to 25 set-ups at once from one qube fail.
    max_setups: int = 8
    #: qrexec opens at most 128 connections to one target; others than ours need
    #: some, too.
    max_connections: int = 120
    #: qrexec's agent has 256 slots for all calls of a qube, whoever makes them.
    max_total: int = 240
    setup_timeout: float = 300.0
    exit_idle_time: float | None = None
    #: The users whose connections are let in; empty: everybody's who can reach
    #: a listener.
    allow_uids: tuple[int, ...] = ()
    #: How long systemd waits between an order to stop and SIGKILL.
    stop_timeout: float = 5.0


class Request(NamedTuple):
    """What is to be served. At most one of unit and argument is given. Here, as
    the daemon gets it from where click is, and is itself without."""

    service: str
    unit: str | None
    argument: str | None
    settings: Settings
    #: Whether systemd has told this unit to stop already.
    stopping: bool = False
