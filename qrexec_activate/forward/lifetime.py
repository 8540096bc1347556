"""When a daemon ends: idle for long enough, or told to stop. No I/O.

Nothing that was accepted is lost by either: what cannot go on without the
daemon is waited for, as long as systemd lets it.
"""

from __future__ import annotations

import math
from collections.abc import Sized
from dataclasses import dataclass

__all__ = ["STOP_MARGIN", "Idleness", "Stop"]

#: A stop waits so long for set-ups that may yet need another try. Less than
#: TimeoutStopSec= in the units.
STOP_PATIENCE = 4.0
#: The margin before systemd's SIGKILL in which spliced connections are reset
#: and reported; half of it is for what comes after that.
STOP_MARGIN = 1.0


@dataclass(slots=True)
class Idleness:
    """For how long a daemon that has nothing to do stays; None: for ever."""

    limit: float | None
    since: float

    def left(self, now: float, busy: bool) -> float:
        """In how many seconds it is over, if nothing comes."""
        if self.limit is None or busy:
            return math.inf
        return max(self.since + self.limit - now, 0.0)


@dataclass(frozen=True, slots=True)
class Stop:
    """A stop that was asked for at `at`, and how long systemd waits for it."""

    at: float
    timeout: float

    def waits(self, now: float, kept: Sized, soon: Sized) -> bool:
        """`kept`: those that cannot go on without the daemon; `soon`: set-ups
        that may yet need another try, and are quickly over."""
        waited = now - self.at
        if waited >= self.timeout - STOP_MARGIN:
            return False
        return bool(kept or (waited < STOP_PATIENCE and soon))
