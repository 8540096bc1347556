"""Who may begin a call, and when. No I/O: events and times in, decisions out.

A place is held by a call that is being set up. A qube that does not answer must
not take what another needs, so each has its first place whatever the others do;
places beyond that are shared. A limit that was found by a failure (of a qube,
or of this machine) is a ceiling, which is tried from time to time.
"""

from __future__ import annotations

import enum
import errno
import itertools
import math
from collections import Counter
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field

from .outcome import Ending

__all__ = ["Admission", "Fault", "Verdict", "fault"]

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
#: How often to count the calls of others in this qube: far from the limit, near
#: to it, and while somebody waits for them to end.
CENSUS_INTERVAL, CENSUS_INTERVAL_NEAR, CENSUS_WAITING = 0.05, 0.001, 0.25

#: Errors of accept(2) that tell of the listener.
_NO_LISTENER = {errno.EBADF, errno.EFAULT, errno.EINVAL, errno.ENOTSOCK}
#: Those of a connection that has failed already, and is gone from the queue.
_LOST = {
    errno.ECONNABORTED,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ENONET,
    errno.ENOPROTOOPT,
    errno.EOPNOTSUPP,
    errno.EPROTO,
    errno.ETIMEDOUT,
}

Fault = enum.Enum("Fault", "NOBODY NO_LISTENER LOST SHORTAGE")


def fault(number: int | None) -> Fault:
    """What an error of accept(2) means."""
    if number == errno.EAGAIN:
        return Fault.NOBODY
    if number in _NO_LISTENER:
        return Fault.NO_LISTENER
    # Whatever else it is: tried again at once, it might fail for ever.
    return Fault.LOST if number in _LOST else Fault.SHORTAGE


#: Whether a call to a qube may begin now, or what is used up: the places of
#: those that are set up, or the connections to that qube, or of this one.
Verdict = enum.Enum("Verdict", "YES NO_PLACE TARGET_FULL ALL_FULL")


@dataclass(slots=True)
class _Ceiling:
    """So many calls were open when there was no room for another one."""

    at: int
    since: float
    probe_at: float = field(init=False)
    delay: float = FIRST_PROBE

    def __post_init__(self) -> None:
        self.probe_at = self.since + self.delay

    def holds(self, count: int, now: float) -> bool:
        return count >= self.at and now < self.probe_at


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
        #: Whether all are counted here that an earlier daemon has left. Until
        #: then they are among the others, and may all be open to one qube.
        self.knows_all = True
        #: Connections of others in this qube, and when they were counted.
        self.others = 0
        self._counted_at = -math.inf
        #: Whether this qube may lack room for a call; whoever looks sets it.
        #: Where it does not, failures have another reason.
        self.scarce = True
        self._open: dict[Hashable, str] = {}
        self._per_target: Counter[str] = Counter()
        self._established: set[Hashable] = set()
        #: When each that has a place began: the oldest is the first, also among
        #: those to one qube.
        self._places: dict[Hashable, float] = {}
        self._by_target: dict[str, dict[Hashable, float]] = {}
        self._waiting: dict[Hashable, str] = {}
        #: Whether there may be room since everybody who waits was told no.
        self._may_have_room = False
        self._turns_at = -math.inf
        #: Where listeners lead to that have had their turn, and no call since.
        self._promised: list[str] = []
        #: By qube: so many were open to it when it refused another ...
        self._full: dict[str, _Ceiling] = {}
        #: ... or open in all when it could not be reached for another. Each
        #: qube finds that out for itself: one that fails keeps nobody waiting
        #: for another.
        self._no_room: dict[str, _Ceiling] = {}
        self._failures: Counter[str] = Counter()

    # --------------------------------------------------------------- questions

    def verdict(self, target: str, now: float, *, opened: bool) -> Verdict:
        """Whether a call may begin; `opened`: for a connection that counts."""
        more = not opened
        if len(self._open) + self.others + more > self.max_total:
            return Verdict.ALL_FULL
        to_target = self._per_target.get(target, 0) + more
        unknown = 0 if self.knows_all else self.others
        if to_target + unknown > self.max_connections:
            return Verdict.TARGET_FULL
        all_held = len(self._places)
        ceiling = self._no_room.get(target)
        if ceiling and ceiling.holds(len(self._established) + all_held, now):
            return Verdict.ALL_FULL
        ceiling = self._full.get(target)
        if ceiling and ceiling.holds(to_target - 1, now):
            return Verdict.TARGET_FULL
        held = self._by_target.get(target)
        if not held:
            may = all_held < self.max_setups * FIRST_PLACES
        else:
            may = all_held < self.max_setups and (
                len(held) < SLOW_PLACES
                or len(held) == all_held
                or now - next(iter(held.values())) < SLOW_AGE
            )
        return Verdict.YES if may else Verdict.NO_PLACE

    def open_to(self, target: str) -> int:
        return self._per_target[target]

    @property
    def open(self) -> int:
        return len(self._open)

    @property
    def somebody_waits(self) -> bool:
        return bool(self._waiting)

    @property
    def is_wanted(self) -> bool:
        """Whether somebody waits for a place."""
        return bool(self._waiting and self._places)

    @property
    def without_place(self) -> int:
        """How many are neither being set up nor established: prompts, waits."""
        return len(self._open) - len(self._places) - len(self._established)

    def next_look(self, now: float) -> float:
        """When something may change by itself: a place is old, a probe due, or
        others have made room."""
        soonest = math.inf
        if self._places:
            old_at = next(iter(self._places.values())) + PLACE_AGE
            if old_at > now:
                soonest = old_at
        if self._waiting:
            due = now if self._promised else self._next_probe(now)
            soonest = min(soonest, due)
            if self.waits_for_others:
                # That may be due already.
                due = max(self._counted_at + CENSUS_WAITING, now)
                soonest = min(soonest, due)
        return soonest

    def _next_probe(self, after: float) -> float:
        """When a ceiling may be tried next."""
        soonest = math.inf
        for one in (*self._no_room.values(), *self._full.values()):
            if after < one.probe_at < soonest:
                soonest = one.probe_at
        return soonest

    # -------------------------------------------------------------- the others

    def count_is_due(self, now: float) -> bool:
        near = 2 * (len(self._open) + self.others) >= self.max_total
        interval = CENSUS_INTERVAL_NEAR if near else CENSUS_INTERVAL
        return now - self._counted_at >= interval

    def counted(self, others: int, now: float) -> None:
        self.others = others
        self._counted_at = now
        self._may_have_room = True

    @property
    def waits_for_others(self) -> bool:
        """Whether somebody waits who might go if others had fewer open."""
        return (
            bool(self._waiting and self.others)
            and len(self._open) + self.others >= self.max_total
        )

    # ------------------------------------------------------------------ events

    def knows_all_now(self) -> None:
        """What an earlier daemon has left is counted here from now on."""
        self.knows_all = True
        self._may_have_room = True

    def opens(self, call: Hashable, target: str) -> None:
        """A connection counts from now on."""
        assert call not in self._open
        self._open[call] = target
        self._per_target[target] += 1
        if target in self._promised:
            self._promised.remove(target)

    def begins(self, call: Hashable, now: float) -> None:
        """It is being set up, and takes a place."""
        self._takes_place(call, now)
        target = self._open[call]
        for ceilings in (self._no_room, self._full):
            ceiling = ceilings.get(target)
            if ceiling is not None and now >= ceiling.probe_at:
                # This one is the probe; the next has to wait for longer.
                ceiling.delay = min(2 * ceiling.delay, LAST_PROBE)
                ceiling.probe_at = now + ceiling.delay

    def _takes_place(self, call: Hashable, now: float) -> None:
        assert call not in self._places
        self._places[call] = now
        self._by_target.setdefault(self._open[call], {})[call] = now

    def gives_place_back(self, call: Hashable) -> bool:
        """It is established, has ended, or is too old to hold a place."""
        if self._places.pop(call, None) is None:
            return False
        self._may_have_room = True
        del self._by_target[self._open[call]][call]
        return True

    def old(self, now: float) -> list[Hashable]:
        """Return the calls that have held a place for too long."""
        places = self._places.items()
        # As next_look() reckons, to the last bit.
        old = itertools.takewhile(lambda one: now >= one[1] + PLACE_AGE, places)
        return [call for call, _ in old]

    def established(self, call: Hashable) -> None:
        self.gives_place_back(call)
        self._established.add(call)
        target = self._open[call]
        self._failures.pop(target, None)
        for ceilings, count in (
            (self._no_room, len(self._established)),
            (self._full, self._per_target[target]),
        ):
            ceiling = ceilings.get(target)
            if ceiling is not None and count > ceiling.at:
                del ceilings[target]
                self._may_have_room = True

    def no_room(
        self, call: Hashable, ending: Ending, code: int | None, now: float
    ) -> bool:
        """A try has come to nothing: whether that was for want of room."""
        if ending is not Ending.CLIENT_EXITED:
            return False
        if code == 126:
            return self.refused(call, now)
        return code == 1 and self.failed(call, now)

    def failed(self, call: Hashable, now: float) -> bool:
        """It could not be set up; returns whether there is no room for it."""
        self.gives_place_back(call)
        target = self._open[call]
        if not self.scarce:
            self._no_room.clear()
            self._may_have_room = True
            return False
        self._failures[target] += 1
        at = len(self._established)
        if self._failures[target] >= FAILURES_IN_A_ROW and at:
            ceiling = self._no_room.setdefault(target, _Ceiling(at, now))
            ceiling.at = min(ceiling.at, at)
        return target in self._no_room

    def refused(self, call: Hashable, now: float) -> bool:
        """It was refused at once; returns whether its qube may just be full."""
        self.gives_place_back(call)
        target = self._open[call]
        ceiling = self._full.get(target)
        if ceiling is None:
            at = self._per_target[target] - 1
            if at >= MANY_OPEN:
                self._full[target] = _Ceiling(at, now)
            return at >= MANY_OPEN
        if now - ceiling.since >= FULL_PATIENCE:
            del self._full[target]
            self._may_have_room = True
            return False
        return True

    def closes(self, call: Hashable) -> None:
        """Its connection is over, and makes room."""
        self.gives_place_back(call)
        self._may_have_room = True
        self._established.discard(call)
        target = self._open.pop(call)
        self._per_target[target] -= 1
        if not self._per_target[target]:
            del self._per_target[target]
            self._full.pop(target, None)
        if not self._established:
            self._no_room.clear()

    # ----------------------------------------------------------------- waiting

    def waits(self, who: Hashable, target: str) -> None:
        """Somebody (a call that is open, or a listener) waits for its turn,
        whom `verdict` has just told no."""
        self._waiting.setdefault(who, target)

    def waits_no_more(self, who: Hashable) -> None:
        self._waiting.pop(who, None)

    def turns(self, now: float) -> Iterator[Hashable]:
        """Yield who may go now, first come first; each has to act at once.

        A call of which `begins` is told before the next is asked for takes its
        place; so whoever comes after sees what is left. A listener has a place
        meanwhile, for the call that it is about to accept. If nothing comes of
        that, the others are asked again.
        """
        if not self._waiting or not (
            self._may_have_room
            or self._promised
            or now >= self._next_probe(self._turns_at)
        ):
            return
        self._turns_at = now
        none_for: set[tuple[str, bool]] = set()
        listeners = {}
        self._promised = []
        room = len(self._open) + self.others < self.max_total
        for who, target in list(self._waiting.items()):
            opened = who in self._open
            kind = target, opened
            gone = who not in self._waiting
            # Who comes later does not find more.
            if gone or kind in none_for or not (room or opened):
                continue
            if self.verdict(target, now, opened=opened) is not Verdict.YES:
                none_for.add(kind)
                continue
            del self._waiting[who]
            if not opened:
                self.opens(who, target)
                self._takes_place(who, now)
                listeners[who] = target
            yield who
        for who in listeners:
            self.closes(who)
        self._promised = list(listeners.values())
        self._may_have_room = False
