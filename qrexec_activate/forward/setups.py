"""The calls that are being set up: when to look at each, and what is due then.
No I/O.

That a call is established is told only to who asks. So it is asked often while
that may be any moment, or while somebody waits for the place; and seldom while
a person thinks.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from .admission import Admission
from .call import OVERTAKEN_AGE, PROMPT_AGE, Call, Pace
from .outcome import Ending

__all__ = ["LOOK_INTERVAL", "Setups"]

#: How often set-ups are looked at that have not been answered at once, and
#: while a person may be thinking; in seconds.
LOOK_INTERVAL, PROMPT_INTERVAL = 0.02, 0.2
#: ... while the youngest may be answered any moment, being younger than YOUNG.
YOUNG, YOUNG_INTERVAL = 0.1, 0.002
#: ... and while somebody waits for the place: as often as it makes sense.
WANTED_INTERVAL = 0.001
#: How old a set-up is when it is first looked up in /proc, and how often.
ANSWER_LOOK = 1.0

Who = TypeVar("Who", bound=Hashable)


@dataclass(slots=True)
class Setups(Generic[Who]):
    """Knows each call from the start of its qrexec-client-vm until that is
    established, or over; a call is known by whatever its caller likes."""

    admission: Admission
    #: A call without an answer is given up when it is so old.
    timeout: float
    _calls: dict[Who, tuple[Call, str, str]] = field(default_factory=dict)
    _paces: defaultdict[tuple[str, str], Pace] = field(
        default_factory=lambda: defaultdict(Pace)
    )
    _asked_at: float = -math.inf

    def begins(self, who: Who, call: Call, target: str, service: str) -> None:
        self._calls[who] = call, target, service

    def ends(self, who: Who) -> bool | None:
        """It is established, or over: which of them; None if that is known."""
        if (known := self._calls.pop(who, None)) is None:
            return None
        call, target, service = known
        if call.established_at is None:
            self.admission.gives_place_back(who)
            return False
        self.admission.established(who)
        pace = self._paces[target, service]
        pace.is_established(call.began_at, call.established_at)
        return True

    def next_look(self, now: float) -> float:
        """In how many seconds to look at them all, and to ask for turns."""
        interval = math.inf
        if self._calls:
            if self.admission.is_wanted:
                return WANTED_INTERVAL
            youngest, _, _ = self._calls[next(reversed(self._calls))]
            age = now - youngest.began_at
            if age < YOUNG:
                return YOUNG_INTERVAL
            interval = LOOK_INTERVAL if age < PROMPT_AGE else PROMPT_INTERVAL
        due = self.admission.next_look(now) - now
        return min(interval, max(due, WANTED_INTERVAL))

    def look(self, now: float) -> list[tuple[Who, bool]]:
        """Those to look at: whether each is established, or due; and, if so
        said, whether dom0 has answered."""
        asks = now - self._asked_at >= ANSWER_LOOK
        if asks:
            self._asked_at = now
        return [
            (who, asks and now - call.began_at >= ANSWER_LOOK)
            for who, (call, _, _) in self._calls.items()
        ]

    def due(self, who: Who, now: float) -> Ending | None:
        """Whether to give up waiting for an answer to it, and why."""
        call, target, service = self._calls[who]
        # Most are too young.
        if now - call.began_at < min(OVERTAKEN_AGE, self.timeout):
            return None
        # Where every call starts a qube of its own, none overtakes another.
        overtaken = not target.startswith("@dispvm") and (
            self._paces[target, service].overtook(call.began_at)
        )
        return call.due(now, self.timeout, overtaken)

    def soon(self, now: float) -> list[Who]:
        """Those that a stop waits for: it may yet have to try them again.

        One that waits for a person would not be done in time anyway.
        """
        return [
            who
            for who, (call, _, _) in self._calls.items()
            if now - call.began_at < PROMPT_AGE
        ]
