"""A run: one scenario, and what must hold after each event of it.

Every accepted connection has exactly one outcome, and is in exactly one hand
until then; no service runs twice for it; no limit is exceeded; who waits, waits
for a reason; a healthy qube is kept from nobody by what others do; after a
crash the next daemon knows what is there.
"""

from __future__ import annotations

import math
import random
import re
import traceback
from collections.abc import Callable
from dataclasses import replace
from heapq import heappop, heappush
from typing import Any

from qrexec_activate.forward.admission import (
    FIRST_PLACES,
    PLACE_AGE,
    SLOW_AGE,
    SLOW_PLACES,
    Admission,
    Verdict,
)
from qrexec_activate.forward.call import PROMPT_AGE, PROMPTS, RETRIES
from qrexec_activate.forward.lifetime import STOP_PATIENCE, Stop
from qrexec_activate.forward.outcome import Ending, Outcome
from qrexec_activate.forward.setups import LOOK_INTERVAL

from .driver import STOP_TIMEOUT, Shell
from .world import (
    ASLEEP,
    BACKLOG,
    KINDS,
    LOOSE,
    OVER,
    STARTED,
    WAITS,
    Child,
    Conn,
    Qube,
    RouteOf,
    Scenario,
)

#: The clock when all must be over that began before the world calmed down.
CALM = 4000.0
#: Everything is looked at after so many events; what an event has touched, after
#: each.
ALL = 512
#: How long it takes at most until an answer is seen.
MARGIN = 0.021
#: A place is given back when a look finds it as old as PLACE_AGE.
OLD = PLACE_AGE + MARGIN
#: Of a listener.
BACKLOG_SIZE = 30
#: Open at once are so many to a qube that is full, or in all on Xen.
FULL, GRANTS = 40, 30
EXIT_CODES = (0, 0, 0, 0, 1, 3, 125, 126, 127, 255, -9)


class Broken(Exception):
    """Something does not hold."""


class Simulation:
    """The world's clock, and its account of the truth."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.random = random.Random(scenario.seed)
        self.now = 0.0
        self.events = 0
        #: How often the clock was held against a call: several in one event.
        self.looks = 0
        self.calm = False
        self.accepted_count = self.over_count = 0
        self._heap: list[
            tuple[float, int, Callable[[Any, int], bool], Any, int]
        ] = []
        self._number = 0
        #: Counts whatever may change a verdict, but the clock.
        self.moves = 0
        self._checked: object = None
        self._check_at = 0.0
        #: Whether a limit keeps every qube from what is its own share, and since
        #: when none does.
        self.all_blocked, self.all_blocked_at = False, 0.0
        rng, faults = self.random, scenario.faults
        self.timeout = rng.choice((5.0, 30.0, 300.0))
        kinds = ["healthy", *(kind for kind in KINDS if kind in faults)]
        self.routes: list[RouteOf] = []
        for number in range(scenario.targets):
            name = rng.choice(("qube", "qube", "@dispvm:")) + str(number)
            qube = Qube(name, rng.choice(kinds))
            qube.routes = rng.choice((1, 1, 2))
            self.routes += [RouteOf(qube) for _ in range(qube.routes)]
        self.rate = rng.choice((2.0, 20.0, 100.0)) / len(self.routes) ** 0.5
        #: How often each thing happens to daemons, in a second.
        self.change = rng.choice((0.2, 2.0))
        #: A healthy qube answers within so many seconds.
        self.answer = rng.choice((0.004, 0.06))
        self.life = rng.choice((0.01, 0.3, 5.0))
        #: A daemon without connections ends after so many seconds.
        self.idle_time = rng.choice((0.01, 0.5)) if "idle" in faults else None
        #: Its qrexec-client-vm takes no socket.
        self.is_old = "old" in faults
        self.alive = 0
        self.others = 0
        #: How many wait in a backlog.
        self.queued = 0
        #: Connections that are neither in a backlog nor over.
        self.flying: set[Conn] = set()
        self.children_of_this_daemon: set[Child] = set()
        self.shell: Shell | None = None
        for route in self.routes:
            self.at(rng.expovariate(self.rate), self.connects, route, 0)
        for fault, do in (
            ("crash", self.crashes),
            ("stop", self.stops),
            ("others", self.change_others),
        ):
            if fault in faults:
                self.at(rng.expovariate(self.change), do, None, 0)
        self.starts(None, 0)

    # ------------------------------------------------------------------- clock

    def at(
        self,
        delay: float,
        do: Callable[[Any, int], bool],
        what: Any,
        timer: int,
    ) -> None:
        self._number += 1
        heappush(self._heap, (self.now + delay, self._number, do, what, timer))

    def until(self, events: float, end: float) -> None:
        """One event after the other, and what must hold after each."""
        heap, check = self._heap, self.check
        while (
            heap
            and self.events < events
            and (
                not self.calm
                or (self.now < end and (self.flying or self.queued))
            )
        ):
            self.now, _, do, what, timer = heappop(heap)
            if not do(what, timer):
                # Nothing has happened.
                continue
            shell = self.shell
            if shell is not None and (shell.woken or shell.ready):
                shell.settle()
            self.events += 1
            check()
            if what is not None and self.shell is not None:
                kind = type(what)
                if kind is Child:
                    self.check_one(what.conn, self.shell)
                elif kind is Conn:
                    self.check_one(what, self.shell)
            if not self.events % ALL:
                self.check_all()

    def run(self) -> None:
        """The scenario, and then calm until all is over."""
        self.until(self.scenario.events, math.inf)
        self.calm = True
        self.others = 0
        for route in self.routes:
            route.qube.sick = True
            route.qube.kind = "healthy"
        self.life = 0.01
        self.until(math.inf, self.now + CALM)
        self.check_all()
        hold(not self.flying, "connections hang", self.flying)
        hold(not self.queued, "clients wait for ever")

    def problem(self) -> str | None:
        """Run, and tell what does not hold."""
        try:
            self.run()
        except Broken as broken:
            return str(broken)
        except (AssertionError, LookupError) as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            return f"{type(error).__name__} in {where.name}: {error}"
        return None

    # ----------------------------------------------------------------- clients

    def connects(self, route: RouteOf, _: int) -> bool:
        rng = self.random
        if self.calm:
            return False
        if len(route.backlog) > BACKLOG_SIZE:
            route.full = True
            return False
        self.at(rng.expovariate(self.rate), self.connects, route, 0)
        conn = Conn(route, self.now, len(route.backlog))
        if "pipes" in self.scenario.faults:
            conn.by_pipes = rng.random() < 0.5
        if "vanish" in self.scenario.faults and rng.random() < 0.3:
            conn.sent = rng.random() < 0.3
            self.at(rng.expovariate(2.0), self.vanishes, conn, 0)
        route.backlog.append(conn)
        self.queued += 1
        if self.shell is not None and not route.parked:
            self.shell.ready.append(route)
        return True

    def vanishes(self, conn: Conn, _: int) -> bool:
        if conn.place == OVER or conn.gone:
            return False
        conn.gone = True
        child = conn.child
        if (
            child is not None
            and child.established
            and self.random.random() < 0.8
        ):
            self.at(0.01, self.exits, child, 0)
        if self.shell is not None and conn.place in (STARTED, ASLEEP, WAITS):
            self.shell.hung_up(conn)
        return True

    # ------------------------------------------------------------ the daemon's

    def accepted(self, conn: Conn) -> None:
        self.accepted_count += 1
        hold(conn.place == BACKLOG, "accepted twice", conn)
        assert self.shell is not None
        hold(
            len(self.shell.ours) + self.shell.admission.others
            < self.scenario.max_total,
            "more than may be open in all",
            conn,
        )
        conn.place = ASLEEP
        self.flying.add(conn)
        self.queued -= 1
        self.moves += 1
        route = conn.route
        if route.full:
            route.full = False
            delay = self.random.expovariate(self.rate)
            self.at(delay, self.connects, route, 0)
        qube = route.qube
        if (
            qube.kind == "healthy"
            and not qube.sick
            and "starved" not in self.scenario.faults
        ):
            since = max(
                conn.arrived,
                self.now if qube.blocked else qube.blocked_at,
                self.now if self.all_blocked else self.all_blocked_at,
                self.shell.up_at,
            )
            # Those ahead, and as many on each other route to that qube; and
            # what is being set up already.
            share = ((conn.ahead + 1) * qube.routes + 1) * (
                self.answer + MARGIN
            )
            if self.now - since > share:
                hold(
                    False,
                    f"waited {self.now - since} s, its share is {share} s",
                    conn,
                )

    def over(self, conn: Conn) -> None:
        """Its one outcome."""
        hold(conn.place not in (OVER, BACKLOG), "two outcomes", conn)
        conn.place = OVER
        self.over_count += 1
        self.moves += 1
        self.flying.remove(conn)

    def has_place(self, conn: Conn, admission: Admission) -> None:
        """It has been given one."""
        held = admission._by_target[conn.route.target]
        hold(
            len(held) <= SLOW_PLACES
            or len(held) == len(admission._places)
            or self.now - next(iter(held.values())) < SLOW_AGE,
            "a slow qube takes what others need",
            conn,
        )

    def is_starved(self) -> bool:
        return (
            "starved" in self.scenario.faults
            and not self.calm
            and self.random.random() < 0.05
        )

    def others_for(self, shell: Shell) -> int:
        """What a census counts: all that are alive, without those of a
        daemon's own."""
        return self.others + self.alive - shell.alive

    # --------------------------------------------------------- qrexec-client-vm

    def spawn(self, conn: Conn) -> None:
        """A call begins: what its qube will make of it is decided now."""
        hold(conn.ran == 0, "a call is made again whose service has run", conn)
        hold(
            conn.child is None or not conn.child.alive,
            "two calls for one connection",
            conn,
        )
        hold(conn.prompts < PROMPTS, "a person is asked too often", conn)
        qube, limits = conn.route.qube, self.scenario
        conn.child = child = Child(conn, self.now)
        self.children_of_this_daemon.add(child)
        qube.open += 1
        qube.started += 1
        self.alive += 1
        assert self.shell is not None
        self.shell.alive += 1
        self.moves += 1
        hold(
            qube.open - qube.orphans <= limits.max_connections,
            "more than may be open to a qube",
            conn,
        )
        rng = self.random.random
        after = rng() * self.answer
        kind = qube.kind
        if self.is_old and not conn.by_pipes:
            self.at(0.001, self.exits, child, 2)
            return
        if kind == "silent" and rng() < 0.95:
            return
        if kind == "prompt":
            after += self.random.expovariate(0.3)
            if rng() < 0.3:
                self.at(after, self.exits, child, 126)
                return
            if rng() < (0.9 if conn.prompts else 0.5):
                # Allowed, and not set up: the person is asked again.
                self.at(after, self.exits, child, 1)
                return
            self.at(after, self.answers, child, 0)
            if rng() < 0.3:
                self.at(after + 0.1, self.exits, child, 1)
                return
        elif kind == "refusing":
            self.at(after, self.exits, child, 126)
            return
        elif kind == "broken":
            self.at(after, self.exits, child, 1)
            return
        elif kind == "lossy":
            lost = rng()
            if lost < 0.05:
                return
            if lost < 0.2:
                self.at(after, self.answers, child, 0)
                return
        elif kind == "flaky":
            if rng() < 0.5:
                self.at(
                    after,
                    self.exits,
                    child,
                    self.random.choice((1, 1, 1, 2, 255, -9)),
                )
                return
        elif (kind == "full" and qube.open > FULL) or (
            kind == "grants" and self.alive > GRANTS
        ):
            self.at(after, self.exits, child, 126 if kind == "full" else 1)
            return
        self.at(after, self.establishes, child, 0)

    def answers(self, child: Child, _: int) -> bool:
        child.answered = child.alive
        child.answered_at = self.now
        if child.alive and not self.random.random() < 0.1:
            self.at(
                self.random.random() * self.answer, self.establishes, child, 0
            )
        return child.alive

    def establishes(self, child: Child, _: int) -> bool:
        """A service runs."""
        if not child.alive or child.established:
            return False
        conn, rng = child.conn, self.random
        child.established = child.flag = child.answered = True
        child.given = rng.random() < 0.5
        child.taken = rng.random() < 0.5
        conn.ran += 1
        if child.answered_at is None:
            child.answered_at = self.now
        conn.route.qube.started -= 1
        hold(conn.ran == 1, "a service runs twice", conn)
        life = rng.expovariate(1 / self.life)
        if conn.gone:
            life = min(life, 0.01)
        code = rng.choice(EXIT_CODES)
        child.unseen = conn.by_pipes and rng.random() < 0.5
        self.at(life, self.exits, child, code)
        return True

    def last_moment(self, child: Child) -> None:
        """An answer may come just as the daemon gives up waiting for it."""
        if self.random.random() < 0.2:
            self.establishes(child, 0)

    def kill(self, child: Child, within: float) -> None:
        child.killed = True
        self.at(self.random.random() * within, self.exits, child, -9)

    def ended(self, conn: Conn, outcome: Outcome) -> None:
        """What is said of a connection whose qrexec-client-vm was seen to
        end."""
        child = conn.child
        assert child is not None
        hold(
            outcome.established == bool(conn.ran),
            "said to have run, or not to, and it is not so",
            conn,
        )
        hold(
            outcome.ending is Ending.CLIENT_EXITED or child.killed,
            f"said to be {outcome.ending.value}, and has ended by itself",
            conn,
        )

    def left_alone(self, conn: Conn) -> None:
        """The daemon ends a call, as its client has gone."""
        hold(
            not conn.sent or conn.call.established_at is not None,
            "what a client sent is dropped",
            conn,
        )

    def exits(self, child: Child, code: int) -> bool:
        if not child.alive:
            return False
        conn, qube = child.conn, child.conn.route.qube
        child.alive = False
        child.code = code
        answer = self.now if child.answered_at is None else child.answered_at
        slow = answer - child.started_at >= PROMPT_AGE
        conn.prompts = conn.prompts + 1 if slow else 0
        if conn.by_pipes and code >= 0:
            # Whoever is not killed makes its stdin blocking again.
            child.flag = False
            # Its exit code, or a byte, tells all the same.
            child.unseen &= (
                child.given or child.taken or code in (0, 3, 125, 127)
            )
        else:
            child.unseen = False
        qube.open -= 1
        if not child.established:
            qube.started -= 1
        self.alive -= 1
        self.moves += 1
        if conn.child is child:
            if conn.place == LOOSE:
                # The kernel closes the last copy of its socket.
                self.over(conn)
            elif self.shell is not None and conn in self.shell.ours:
                self.shell.alive -= 1
                self.shell.child_ended(conn, child)
        self.children_of_this_daemon.discard(child)
        if child.orphan:
            qube.orphans -= 1
        return True

    # ------------------------------------------------------- starts and stops

    def starts(self, _: None, number: int) -> bool:
        if self.shell is not None:
            return False
        self.shell = shell = Shell(self, self.timeout)
        self.moves += 1
        delay = 0.0
        for conn in sorted(self.flying, key=lambda one: one.arrived):
            hold(
                conn.place == LOOSE,
                "neither over nor alone while there is no daemon",
                conn,
            )
            delay += self.random.random() * 0.002
            self.at(delay, shell.adopt, conn, 0)
        self.at(delay, shell.adopted, None, 0)
        return True

    def crashes(self, _: None, number: int) -> bool:
        if self.calm:
            return False
        self.at(self.random.expovariate(self.change), self.crashes, None, 0)
        if self.shell is None:
            return False
        self.is_gone()
        return True

    def is_gone(self) -> None:
        """There is no daemon any more: what holds its socket itself goes on."""
        shell, self.shell = self.shell, None
        assert shell is not None
        for conn in sorted(shell.ours, key=lambda one: one.arrived):
            child = conn.child
            if (
                conn.place == STARTED
                and child is not None
                and child.alive
                and not conn.by_pipes
            ):
                conn.place = LOOSE
            else:
                if child is not None and child.alive and not child.orphan:
                    conn.route.qube.orphans += 1
                    child.orphan = True
                    self.kill(child, 4.0)
                self.over(conn)
        self.children_of_this_daemon.clear()
        self.at(self.random.choice((0.0, 0.1, 1.0)), self.starts, None, 0)

    def stops(self, _: None, number: int) -> bool:
        """_wind_up(): accept no more, and let go when nobody is waited for."""
        if self.calm:
            return False
        self.at(self.random.expovariate(self.change), self.stops, None, 0)
        shell = self.shell
        if shell is None or not shell.accepts:
            return False
        shell.accepts = False
        shell.stop = Stop(self.now, STOP_TIMEOUT)
        return self.winds_up(shell, 0)

    def winds_up(self, shell: Shell, number: int) -> bool:
        if self.shell is not shell or shell.stop is None:
            return False
        if shell.waits():
            self.at(LOOK_INTERVAL, self.winds_up, shell, 0)
            return False
        waited = self.now - shell.stop.at
        hold(waited < STOP_TIMEOUT, "systemd kills it")
        for conn in shell.ours:
            hold(
                waited > STOP_TIMEOUT - 1
                or (conn.place == STARTED and not conn.by_pipes),
                "cut off by a stop that had time",
                conn,
            )
            hold(
                waited > STOP_PATIENCE - 1
                or conn.call.established_at is not None
                or self.now - conn.call.began_at > PROMPT_AGE - 0.1,
                "left, and may yet need another try",
                conn,
            )
        self.is_gone()
        return True

    def goes(self, shell: Shell, number: int) -> bool:
        """_idle(): nothing has come for long enough."""
        busy = bool(shell.ours) or shell.admission.somebody_waits
        if (
            self.calm
            or self.shell is not shell
            or not shell.accepts
            or shell.idleness.left(self.now, busy) > 0
        ):
            return False
        hold(not shell.ours, "ends with connections")
        self.is_gone()
        return True

    def change_others(self, _: None, number: int) -> bool:
        if self.calm:
            return False
        self.at(
            self.random.expovariate(5 * self.change),
            self.change_others,
            None,
            0,
        )
        self.others = self.random.choice(
            (0, 0, 1, self.scenario.max_total // 2, self.scenario.max_total)
        )
        return True

    # ------------------------------------------------------- what must hold

    def check(self) -> None:
        """What may have changed with any event."""
        shell = self.shell
        if shell is None:
            return
        admission, limits = shell.admission, self.scenario
        places = len(admission._places)
        if places > limits.max_setups * FIRST_PLACES:
            raise Broken("more are set up than may be")
        if places and (self.now - next(iter(admission._places.values())) > OLD):
            raise Broken("a place is held for too long")
        if admission._no_room and not admission._established:
            raise Broken("without room, and nothing is open")
        if not admission._waiting or not shell.accepts:
            return
        # Of all that a verdict depends on, the clock is the part that moves
        # most, and does little: with time, only a probe can turn it to yes.
        at, state = (
            shell.turned_at,
            (
                self.moves,
                admission.others,
                places,
                len(admission._established),
                len(admission._waiting),
            ),
        )
        if state == self._checked and at < self._check_at:
            return
        self._checked, self._check_at = state, admission._next_probe(at)
        if shell.look_at > max(self._check_at, self.now) + MARGIN:
            raise Broken("nobody looks when there may be room")
        self.check_waiting(shell, at)

    def check_waiting(self, shell: Shell, at: float) -> None:
        """Nobody waits who could go when it was last asked who may, and still
        can."""
        admission, limits, now = shell.admission, self.scenario, self.now
        # What keeps a qube from its own share: what the limits say, and nothing
        # else.
        all_open = len(shell.ours) + admission.others >= limits.max_total
        for_all = all_open or not shell.has_adopted
        if for_all or self.all_blocked:
            self.all_blocked, self.all_blocked_at = for_all, now
        no_first = len(admission._places) >= limits.max_setups * FIRST_PLACES
        seen = set()
        for who, target in admission._waiting.items():
            opened = type(who) is Conn
            if (all_open and not opened) or (target, opened) in seen:
                continue
            seen.add((target, opened))
            if (
                admission.verdict(target, at, opened=opened) is Verdict.YES
                and admission.verdict(target, now, opened=opened) is Verdict.YES
            ):
                raise Broken("a place is free, wanted and not given")
            qube = who.route.qube if opened else who.qube  # type: ignore[attr-defined]  # only calls and listeners of the world wait
            blocked = qube.open >= limits.max_connections or (
                no_first and not qube.started
            )
            if blocked or qube.blocked:
                qube.blocked_at = now
                qube.blocked = blocked

    def check_all(self) -> None:
        """Each connection is in one hand, and the core knows which."""
        shell = self.shell
        if shell is None:
            hold(
                all(conn.place == LOOSE for conn in self.flying),
                "in no hand while there is no daemon",
            )
            return
        hold(
            shell.ours == set(shell.admission._open),
            "the core counts others than there are",
        )
        hold(
            shell.admission._established <= shell.ours,
            "the core counts who is over",
        )
        assert shell.alive == sum(
            one.child is not None and one.child.alive for one in shell.ours
        )
        for conn in self.flying:
            self.check_one(conn, shell)
        for route in self.routes:
            hold(
                not route.backlog
                or route.parked
                or not shell.accepts
                or route in shell.ready,
                "a client waits, and nobody looks",
                route,
            )
            hold(
                route.parked == (route in shell.admission._waiting),
                "parked unknown",
                route,
            )

    def check_one(self, conn: Conn, shell: Shell) -> None:
        """It is in one hand, and the core knows in which."""
        admission = shell.admission
        if conn.place in (BACKLOG, OVER):
            hold(conn not in shell.ours, "still in a hand", conn)
            hold(conn not in admission._waiting, "waits, and is over", conn)
            return
        if conn.place == LOOSE:
            hold(not shell.has_adopted, "left behind by the next daemon", conn)
            return
        hold(conn in shell.ours, "in no hand", conn)
        hold(conn.call.tries <= RETRIES + 1, "tried too often", conn)
        if conn.place == STARTED:
            hold(
                conn.child is not None and conn.child.alive,
                "waits for nothing",
                conn,
            )
            # One that is established is forgotten at the next look.
            hold(
                conn in shell.setups._calls
                or conn.call.established_at is not None,
                "not looked at",
                conn,
            )
        elif conn.place == WAITS:
            hold(conn in admission._waiting, "waits unknown", conn)
        hold(
            conn not in admission._waiting or conn.place == WAITS,
            "in two hands",
            conn,
        )
        hold(
            conn not in admission._places or conn.place == STARTED,
            "holds a place for nothing",
            conn,
        )


def hold(truth: object, words: str, what: object = None) -> None:
    if not truth:
        if isinstance(what, Conn):
            words += ": " + ", ".join(
                f"{name}={getattr(what, name)!r}" for name in what.__slots__
            )
        raise Broken(words)


def failure(scenario: Scenario) -> str | None:
    """What does not hold in a scenario."""
    return Simulation(scenario).problem()


def shrunk(scenario: Scenario) -> Scenario:
    """The least scenario found that fails in the same way."""
    kind, scenario = failing(scenario)
    while True:
        for other in scenario.smaller():
            found, shorter = failing(other)
            if found == kind:
                scenario = shorter
                break
        else:
            return scenario


def failing(scenario: Scenario) -> tuple[str | None, Scenario]:
    """How it fails, and as much of it as that takes."""
    simulation = Simulation(scenario)
    problem = simulation.problem()
    if problem is None:
        return None, scenario
    # What is said before the first number or colon is the kind.
    events = min(simulation.events + 1, scenario.events)
    return re.split(r"[:\d]", problem)[0], replace(scenario, events=events)
