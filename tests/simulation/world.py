"""Clients, qubes, people, processes and a clock: the world around the core.

Knows the truth, of which the daemon sees a part: which service has run for
whom, who is alive, who waits since when. Times are seconds of a clock that
jumps from event to event.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, replace

from qrexec_activate.forward.call import Call

#: What may go wrong or be otherwise; a shrunk scenario has only what it needs.
FAULTS = (
    "crash",
    "stop",
    "idle",
    "vanish",
    "pipes",
    "old",
    "starved",
    "others",
    "silent",
    "prompt",
    "refusing",
    "broken",
    "lossy",
    "full",
    "flaky",
    "grants",
)
#: Of these, a scenario's qubes are made, beside healthy ones.
KINDS = (
    "silent",
    "prompt",
    "refusing",
    "broken",
    "lossy",
    "full",
    "flaky",
    "grants",
)

# Where a connection is. It is in one place at a time, and over once.
BACKLOG, STARTED, ASLEEP, WAITS, LOOSE, OVER = range(6)


@dataclass(frozen=True, slots=True)
class Scenario:
    """All that a run depends on."""

    seed: int
    targets: int
    faults: frozenset[str]
    events: int
    max_setups: int = 8
    max_connections: int = 120
    max_total: int = 240

    @classmethod
    def of(cls, seed: int, events: int) -> Scenario:
        rng = random.Random(seed)
        some = rng.random()
        return cls(
            seed,
            rng.choice((1, 2, 3, 5, 8, 12, 20, 40)),
            frozenset(fault for fault in FAULTS if rng.random() < some),
            events,
            *rng.choice(
                (
                    (8, 120, 240),
                    (8, 120, 240),
                    (2, 4, 9),
                    (1, 1, 1),
                    (3, 30, 12),
                )
            ),
        )

    def __str__(self) -> str:
        without = ",".join(
            fault for fault in FAULTS if fault not in self.faults
        )
        limits = f"{self.max_setups},{self.max_connections},{self.max_total}"
        return (
            f"--seed {self.seed} --targets {self.targets} --limits {limits}"
            f" --events {self.events}"
            + (f" --without {without}" if without else "")
        )

    def but(
        self, targets: int | None, limits: str | None, without: str
    ) -> Scenario:
        """The same, as a shrunk one is written."""
        numbers = [int(part) for part in limits.split(",")] if limits else []
        return replace(
            self,
            targets=targets or self.targets,
            faults=self.faults - set(without.split(",")),
            **dict(
                zip(
                    ("max_setups", "max_connections", "max_total"),
                    numbers,
                    strict=False,
                )
            ),
        )

    def smaller(self) -> list[Scenario]:
        """What may fail in the same way, and is less to look at."""
        return [
            *(replace(self, targets=n) for n in range(1, self.targets)),
            *(
                replace(self, faults=self.faults - {one})
                for one in sorted(self.faults)
            ),
        ]


class Child:
    """A qrexec-client-vm, which its connection may outlive, or the reverse."""

    __slots__ = (
        "alive",
        "answered",
        "answered_at",
        "code",
        "conn",
        "established",
        "flag",
        "given",
        "killed",
        "orphan",
        "started_at",
        "taken",
        "unseen",
    )

    def __init__(self, conn: Conn, now: float) -> None:
        self.conn = conn
        self.started_at = now
        self.alive = True
        self.answered = False
        self.answered_at: float | None = None
        #: O_NONBLOCK, as the daemon can see it.
        self.flag = False
        #: A service runs.
        self.established = False
        #: A byte came out of it, or was taken in.
        self.given = self.taken = False
        #: By pipes, nothing else tells at its end that a service ran.
        self.unseen = False
        #: The daemon has ended it.
        self.killed = False
        self.code: int | None = None
        #: Its daemon is gone, and with it the other end of its pipes.
        self.orphan = False


class Conn:
    """A connection, from connect(2) to its one outcome."""

    __slots__ = (
        "ahead",
        "arrived",
        "by_pipes",
        "call",
        "child",
        "gone",
        "place",
        "prompts",
        "ran",
        "route",
        "sent",
        "tended",
        "timer",
    )

    def __init__(self, route: RouteOf, arrived: float, ahead: int) -> None:
        self.route = route
        self.arrived = arrived
        self.ahead = ahead
        self.place = BACKLOG
        self.call: Call = None  # type: ignore[assignment]  # set before anybody looks
        self.child: Child | None = None
        self.by_pipes = False
        self.gone = False
        #: A unix client that has sent something before it goes.
        self.sent = False
        self.tended = False
        self.ran = 0
        #: Tries in a row that a person may have answered.
        self.prompts = 0
        #: Changes with whatever would make an event of before void.
        self.timer = 0


class Qube:
    """Answers calls, each kind in its own way."""

    __slots__ = (
        "blocked",
        "blocked_at",
        "kind",
        "name",
        "open",
        "orphans",
        "routes",
        "sick",
        "started",
    )

    def __init__(self, name: str, kind: str) -> None:
        self.name = name
        self.kind = kind
        #: Its living qrexec-client-vm, of which the daemon may know or not.
        self.open = 0
        #: ... those that have no answer yet, and those that are left by an
        #: earlier daemon and will not be adopted.
        self.started = 0
        self.orphans = 0
        #: It is not what it was.
        self.sick = False
        self.routes = 1
        #: Whether a limit keeps it from what is its own share, and since when
        #: none does.
        self.blocked = False
        self.blocked_at = 0.0


class RouteOf:
    """A listener in the hands of systemd: outlives every daemon."""

    __slots__ = ("backlog", "full", "parked", "qube", "target")

    def __init__(self, qube: Qube) -> None:
        self.qube = qube
        self.target = qube.name
        self.backlog: deque[Conn] = deque()
        #: Nobody comes until one is accepted.
        self.full = False
        self.parked = False
