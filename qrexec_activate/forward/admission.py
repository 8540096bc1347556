"""Who may begin a call, and when. No I/O: events and times in, decisions out.

A place is held by a call that is being set up. A qube that does not answer must
not take what another needs, so each has its first place whatever the others do;
places beyond that are shared. A limit that was found by a failure (of a qube,
or of this machine) is a ceiling, which is tried from time to time.
"""

from __future__ import annotations

import enum
import math
from collections import Counter
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

__all__ = ["Admission", "Verdict"]

#: A set-up gives its place back when it is so old: then a prompt is open, and a
#: person is thinking about it.
PLACE_AGE = 2.0
#: A qube that has left a call unanswered for so long gets fewer places.
SLOW_AGE = 0.1
#: So many, where the others have more to do.
SLOW_PLACES = 2
#: First places of many qubes at once may exceed the shared places by this
#: factor. On Xen, more than 10 to 25 set-ups at once from one qube fail
#: (QubesOS/qubes-issues 11059), and are tried again.
FIRST_PLACES = 3
#: So many set-ups that fail in a row, while calls are open, mean that there is
#: no room for more: xen_gntalloc's limit of 1,024 grants is 30 open calls.
FAILURES_IN_A_ROW = 3
#: With so many connections open to a qube, a refusal may mean that it is full:
#: qrexec opens 128 to one qube, and counts those of all qubes that call it.
MANY_OPEN = 32
#: A ceiling is tried after so long, and then after twice as long each time. On
#: Xen each try that fails leaves a process and three watches in the target for
#: 120 s, and the target has room for about 40.
FIRST_PROBE, LAST_PROBE = 1.0, 40.0
#: A qube that refuses is taken for full so long.
FULL_PATIENCE = 60.0


class Verdict(enum.Enum):
    """Whether a call to a qube may begin now."""

    YES = "yes"
    NO_PLACE = "too many calls are being set up"
    TARGET_FULL = "too many connections are open to that qube"
    ALL_FULL = "too many connections are open from this qube"


@dataclass(slots=True)
class _Ceiling:
    """So many calls were open when there was no room for another one."""

    at: int
    since: float
    probe_at: float
    delay: float = FIRST_PROBE


@dataclass(slots=True)
class _SetUp:
    target: str
    began_at: float


class Admission:
    """Counts calls by qube; a call is known by whatever its caller likes.

    A call is opened once, has a place while it is being set up (perhaps more
    than once, if it is tried again), is established or not, and is closed.
    """

    def __init__(
        self, max_setups: int, max_connections: int, max_total: int
    ) -> None:
        self.max_setups = max_setups
        self.max_connections = max_connections
        self.max_total = max_total
        #: Connections of others in this qube; whoever looks sets it.
        self.others = 0
        self._open: dict[Hashable, str] = {}
        self._per_target: Counter[str] = Counter()
        self._established: set[Hashable] = set()
        self._places: dict[Hashable, _SetUp] = {}
        self._young: Counter[str] = Counter()
        self._waiting: dict[Hashable, str] = {}
        self._ceilings: dict[str | None, _Ceiling] = {}
        self._failures = 0

    # --------------------------------------------------------------- questions

    def verdict(self, target: str, now: float, *, opened: bool) -> Verdict:
        """Whether a call may begin; `opened`: for a connection that counts."""
        more = 0 if opened else 1
        if len(self._open) + self.others + more > self.max_total:
            return Verdict.ALL_FULL
        if self._per_target[target] + more > self.max_connections:
            return Verdict.TARGET_FULL
        if self._at_ceiling(None, len(self._established), now):
            return Verdict.ALL_FULL
        to_target = self._per_target[target] - (1 if opened else 0)
        if self._at_ceiling(target, to_target, now):
            return Verdict.TARGET_FULL
        held, all_held = self._young[target], len(self._places)
        if held == 0:
            may = all_held < self.max_setups * FIRST_PLACES
        elif self._is_slow(target, now):
            may = all_held < self.max_setups and held < SLOW_PLACES
        else:
            may = all_held < self.max_setups
        return Verdict.YES if may else Verdict.NO_PLACE

    def _at_ceiling(self, key: str | None, count: int, now: float) -> bool:
        ceiling = self._ceilings.get(key)
        if ceiling is None or count < ceiling.at:
            return False
        return now < ceiling.probe_at

    def _is_slow(self, target: str, now: float) -> bool:
        """Whether a call to it has been without an answer for long."""
        return len(self._young) > 1 and any(
            setup.target == target and now - setup.began_at >= SLOW_AGE
            for setup in self._places.values()
        )

    def open_to(self, target: str) -> int:
        return self._per_target[target]

    @property
    def open(self) -> int:
        return len(self._open)

    @property
    def is_wanted(self) -> bool:
        """Whether somebody waits for a place."""
        return bool(self._waiting) and bool(self._places)

    @property
    def without_place(self) -> int:
        """How many are neither being set up nor established: prompts, waits."""
        return len(self._open) - len(self._places) - len(self._established)

    def next_look(self, now: float) -> float:
        """When something may change by itself: a place is old, a probe due."""
        times = [setup.began_at + PLACE_AGE for setup in self._places.values()]
        if self._waiting:
            times += [one.probe_at for one in self._ceilings.values()]
        return min((time for time in times if time > now), default=math.inf)

    # ------------------------------------------------------------------ events

    def opens(self, call: Hashable, target: str) -> None:
        """A connection counts from now on."""
        assert call not in self._open
        self._open[call] = target
        self._per_target[target] += 1

    def begins(self, call: Hashable, now: float) -> None:
        """It is being set up, and takes a place."""
        target = self._open[call]
        assert call not in self._places
        self._places[call] = _SetUp(target, now)
        self._young[target] += 1
        for key in (None, target):
            ceiling = self._ceilings.get(key)
            if ceiling is not None and now >= ceiling.probe_at:
                # This one is the probe; the next has to wait for longer.
                ceiling.delay = min(2 * ceiling.delay, LAST_PROBE)
                ceiling.probe_at = now + ceiling.delay

    def gives_place_back(self, call: Hashable) -> bool:
        """It is established, has ended, or is too old to hold a place."""
        setup = self._places.pop(call, None)
        if setup is None:
            return False
        self._young[setup.target] -= 1
        if not self._young[setup.target]:
            del self._young[setup.target]
        return True

    def old(self, now: float) -> list[Hashable]:
        """Return the calls that have held a place for too long."""
        return [
            call
            for call, setup in self._places.items()
            if now - setup.began_at >= PLACE_AGE
        ]

    def established(self, call: Hashable) -> None:
        self.gives_place_back(call)
        self._established.add(call)
        self._failures = 0
        for key, count in (
            (None, len(self._established)),
            (self._open[call], self._per_target[self._open[call]]),
        ):
            ceiling = self._ceilings.get(key)
            if ceiling is not None and count > ceiling.at:
                del self._ceilings[key]

    def failed(self, call: Hashable, now: float) -> bool:
        """It could not be set up; returns whether there is no room for it."""
        self.gives_place_back(call)
        self._failures += 1
        at = len(self._established)
        if self._failures < FAILURES_IN_A_ROW or not at:
            return None in self._ceilings
        self._lower(None, at, now)
        return True

    def refused(self, call: Hashable, now: float) -> bool:
        """It was refused at once; returns whether its qube may just be full."""
        self.gives_place_back(call)
        target = self._open[call]
        ceiling = self._ceilings.get(target)
        if ceiling is None:
            if self._per_target[target] - 1 < MANY_OPEN:
                return False
            self._lower(target, self._per_target[target] - 1, now)
            return True
        if now - ceiling.since >= FULL_PATIENCE:
            del self._ceilings[target]
            return False
        return True

    def _lower(self, key: str | None, at: int, now: float) -> None:
        ceiling = self._ceilings.get(key)
        if ceiling is None:
            self._ceilings[key] = _Ceiling(at, now, now + FIRST_PROBE)
        else:
            ceiling.at = min(ceiling.at, at)

    def closes(self, call: Hashable) -> None:
        """Its connection is over, and makes room."""
        self.gives_place_back(call)
        self._established.discard(call)
        self._waiting.pop(call, None)
        target = self._open.pop(call)
        self._per_target[target] -= 1
        if not self._per_target[target]:
            del self._per_target[target]
            self._ceilings.pop(target, None)
        if not self._established:
            self._ceilings.pop(None, None)

    # ----------------------------------------------------------------- waiting

    def waits(self, who: Hashable, target: str) -> None:
        """Somebody (a call that is open, or a listener) waits for its turn."""
        self._waiting.setdefault(who, target)

    def waits_no_more(self, who: Hashable) -> None:
        self._waiting.pop(who, None)

    def turns(self, now: float) -> Iterator[Hashable]:
        """Yield who may go now, first come first; each has to act at once.

        A call of which `begins` is told before the next is asked for takes its
        place; so whoever comes after sees what is left.
        """
        for who, target in list(self._waiting.items()):
            if who not in self._waiting:
                continue
            verdict = self.verdict(target, now, opened=who in self._open)
            if verdict is Verdict.YES:
                del self._waiting[who]
                yield who
