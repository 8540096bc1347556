"""The core, called as daemon.py and connection.py call it.

One method for each of theirs that decides nothing: what these do with
descriptors and tasks, this does with pretend ones. Keep the two alike.
"""

from __future__ import annotations

from signal import SIGKILL
from typing import TYPE_CHECKING

from qrexec_activate.forward.admission import Admission, Verdict
from qrexec_activate.forward.call import (
    HANG_UP_GRACE,
    Call,
    has_run,
    signals,
)
from qrexec_activate.forward.lifetime import Idleness, Stop
from qrexec_activate.forward.outcome import Ending
from qrexec_activate.forward.setups import LOOK_INTERVAL, Setups

from .world import ASLEEP, LOOSE, OVER, STARTED, WAITS, Child, Conn, RouteOf

if TYPE_CHECKING:
    from .simulation import Simulation

#: Of connection.py, which holds descriptors and cannot be imported for less.
STARVED_DELAY = 0.25
HANG_UP_LOOK = 0.25
#: TimeoutStopSec= of the units.
STOP_TIMEOUT = 10.0


class Shell:
    """One daemon, from its start to its end."""

    def __init__(self, world: Simulation, timeout: float) -> None:
        limits = world.scenario
        self.world = world
        self.admission = Admission(
            limits.max_setups, limits.max_connections, limits.max_total
        )
        self.admission.knows_all = False
        self.has_adopted = False
        self.setups: Setups[Conn] = Setups(self.admission, timeout)
        self.ours: set[Conn] = set()
        #: How many of these have a qrexec-client-vm that lives.
        self.alive = 0
        self.accepts = True
        #: It has learnt that qrexec-client-vm takes no socket.
        self.by_pipes = False
        self.stop: Stop | None = None
        self.idleness = Idleness(world.idle_time, world.now)
        self.woken: list[Conn] = []
        self.ready: list[RouteOf] = list(world.routes)
        self.look_id = 0
        self.looks_often = False
        self.up_at = self.turned_at = world.now
        for route in world.routes:
            route.parked = False
        self.is_idle()

    # ------------------------------------------------------------------ accept

    def settle(self) -> None:
        """All that trio's tasks do before the clock moves on."""
        rounds = 0
        while self.woken or self.ready:
            rounds += 1
            assert rounds < 10_000, "it spins"
            woken, self.woken = self.woken, []
            for conn in woken:
                if conn.place == WAITS:
                    self.has_place(conn)
            ready, self.ready = self.ready, []
            if self.accepts:
                self.ready += [
                    route
                    for route in ready
                    if route.backlog and not route.parked and self.admit(route)
                ]
                # A client that had gone has not used its turn.
                self.next_turns()

    def admit(self, route: RouteOf) -> bool:
        """_admit(): whether there may be more to accept."""
        world, now = self.world, self.world.now
        if self.count_others(now):
            self.next_turns()
        verdict = self.admission.verdict(route.target, now, opened=False)
        if verdict is not Verdict.YES:
            route.parked = True
            self.admission.waits(route, route.target)
            self.changed()
            return False
        conn = route.backlog.popleft()
        world.accepted(conn)
        if conn.gone and not conn.sent:
            world.over(conn)
            return bool(route.backlog)
        conn.call = Call(now, random=world.random)
        conn.by_pipes |= self.by_pipes
        self.opens(conn)
        self.begins(conn)
        self.start(conn)
        if conn.gone:
            self.hung_up(conn)
        return bool(route.backlog)

    def opens(self, conn: Conn) -> None:
        self.world.moves += 1
        self.ours.add(conn)
        self.admission.opens(conn, conn.route.target)

    def begins(self, conn: Conn) -> None:
        self.admission.begins(conn, self.world.now)
        self.world.has_place(conn, self.admission)

    def count_others(self, now: float) -> bool:
        if not self.admission.count_is_due(now):
            return False
        before = self.admission.others
        self.admission.counted(self.world.others_for(self), now)
        return self.admission.others < before

    def next_turns(self) -> None:
        admission, now = self.admission, self.world.now
        self.turned_at = now
        if admission.waits_for_others:
            self.count_others(now)
        for who in admission.turns(now):
            if type(who) is RouteOf:
                who.parked = False
                self.ready.append(who)
            else:
                assert isinstance(who, Conn)
                self.begins(who)
                self.woken.append(who)

    # ------------------------------------------------------------- connections

    def start(self, conn: Conn) -> None:
        """Connection.start(): the place is taken."""
        world = self.world
        if world.is_starved():
            self.place_back(conn)
            self.sleeps(conn, STARVED_DELAY)
            return
        world.spawn(conn)
        conn.place = STARTED
        conn.call.begins(world.now)
        self.setups.begins(conn, conn.call, conn.route.target, "service")
        if not self.looks_often:
            self.changed()

    def sleeps(self, conn: Conn, delay: float) -> None:
        conn.tended = True
        conn.place = ASLEEP
        conn.timer += 1
        self.world.at(delay, self.wakes, conn, conn.timer)

    def wakes(self, conn: Conn, timer: int) -> bool:
        """The delay before another try is over: turn()."""
        if (
            conn.place != ASLEEP
            or conn.timer != timer
            or self.world.shell is not self
        ):
            return False
        now = self.world.now
        if (
            self.admission.verdict(conn.route.target, now, opened=True)
            is Verdict.YES
        ):
            self.begins(conn)
            self.has_place(conn)
        else:
            conn.place = WAITS
            self.admission.waits(conn, conn.route.target)
            self.changed()
        return True

    def has_place(self, conn: Conn) -> None:
        if conn.gone and not conn.sent:
            self.place_back(conn)
            self.closes(conn)
        else:
            self.start(conn)

    def place_back(self, conn: Conn) -> None:
        if self.admission.gives_place_back(conn):
            self.next_turns()

    def closes(self, conn: Conn) -> None:
        self.ours.discard(conn)
        self.world.over(conn)
        self.admission.closes(conn)
        self.next_turns()
        if not self.ours:
            self.is_idle()

    def look_if_established(self, conn: Conn) -> bool:
        call, child = conn.call, conn.child
        if call.established_at is None and child is not None and child.flag:
            call.is_established(self.world.now)
        return call.established_at is not None

    def child_ended(self, conn: Conn, child: Child) -> None:
        """_child_ends(), _after_try(), and what _tries() does then."""
        world, call = self.world, conn.call
        self.look_if_established(conn)
        ending = call.interrupted or Ending.CLIENT_EXITED
        self.setup_ends(conn)
        # An earlier daemon's child tells no exit code.
        code = child.code if child in world.children_of_this_daemon else None
        if not conn.tended and not conn.by_pipes and call.is_over_at_once(code):
            # over_at_once(): no task sees it through.
            assert conn.ran == 1, "over at once, and nothing has run"
            self.closes(conn)
            return
        if not conn.by_pipes and self.learns(conn, code):
            return
        if (
            conn.by_pipes
            and call.established_at is None
            and has_run(
                # Its stdout was made blocking, and tells so at its end.
                (child.established and not child.unseen)
                or child.given
                or child.taken,
                code,
            )
        ):
            call.is_established(world.now)
        no_room = call.established_at is None and self.no_room(
            conn, ending, code
        )
        again = call.after_try(world.now, ending, code, no_room)
        if again is None:
            world.ended(conn, call.over(world.now, ending, code, ""))
            self.closes(conn)
            return
        conn.child = None
        self.sleeps(conn, again)

    def learns(self, conn: Conn, code: int | None) -> bool:
        """This qrexec-client-vm takes no socket; pipes can do it."""
        if not conn.call.takes_no_socket(code):
            return False
        self.by_pipes = conn.by_pipes = True
        conn.child = None
        conn.call.tries = 0
        self.sleeps(conn, 0.0)
        self.wakes(conn, conn.timer)
        return True

    def no_room(self, conn: Conn, ending: Ending, code: int | None) -> bool:
        if code == 1:
            self.admission.scarce = self.world.random.random() < 0.9
        full = self.admission.no_room(conn, ending, code, self.world.now)
        self.next_turns()
        return full

    def interrupt(self, conn: Conn, ending: Ending) -> None:
        call = conn.call
        before = call.interrupted
        call.interrupt(ending)
        conn.tended = True
        if before is not None:
            return
        if conn.place == STARTED:
            child = conn.child
            assert child is not None
            if ending is not Ending.CLIENT_GONE:
                self.world.last_moment(child)
            self.look_if_established(conn)
            if call.takes_back(self.world.now):
                return
            (number, grace), *_ = signals(ending)
            if number == SIGKILL:
                self.world.kill(child, 0.005)
            elif ending is not Ending.CLIENT_GONE or not child.established:
                self.world.kill(child, grace)
            else:
                # _last_bytes(): nearly always it ends by itself.
                self.world.kill(child, 5 * HANG_UP_GRACE)
        elif conn.place in (ASLEEP, WAITS):
            self.admission.waits_no_more(conn)
            self.place_back(conn)
            self.closes(conn)

    # -------------------------------------------------------------- the client

    def hung_up(self, conn: Conn) -> None:
        """The kernel says so, once."""
        if conn.tended:
            self.hangs_up(conn)
        else:
            self.world.at(HANG_UP_LOOK, self.looks_after_hang_up, conn, 0)

    def looks_after_hang_up(self, conn: Conn, timer: int) -> bool:
        if conn not in self.ours or self.world.shell is not self:
            return False
        self.hangs_up(conn)
        return True

    def hangs_up(self, conn: Conn) -> None:
        if conn.place == OVER:
            return
        self.look_if_established(conn)
        if conn.call.hangs_up(not conn.sent):
            self.world.left_alone(conn)
            self.interrupt(conn, Ending.CLIENT_GONE)

    # ----------------------------------------------------------------- set-ups

    def setup_ends(self, conn: Conn) -> None:
        established = self.setups.ends(conn)
        if established is None:
            return
        if established and conn.call.client_left:
            self.hung_up(conn)
        self.next_turns()

    def changed(self) -> None:
        """_setups_changed: whoever sleeps for long looks at the clock again."""
        if not self.looks_often:
            self.plan_look()

    def plan_look(self) -> None:
        world = self.world
        interval = self.setups.next_look(world.now)
        self.looks_often = interval < LOOK_INTERVAL
        self.look_id += 1
        if interval < 1e6:
            self.look_at = world.now + interval
            world.at(interval, self.look, None, self.look_id)
        else:
            self.look_at = interval

    def look(self, _: None, number: int) -> bool:
        """_look_at_setups()."""
        if number != self.look_id or self.world.shell is not self:
            return False
        now, setups = self.world.now, self.setups
        self.world.looks += len(setups._calls)
        for conn, asks_dom0 in setups.look(now):
            if conn.child.flag and self.look_if_established(conn):  # type: ignore[union-attr]  # it has one as long as it is here
                self.setup_ends(conn)
                continue
            if asks_dom0 and conn.child.answered:  # type: ignore[union-attr]  # likewise
                conn.call.is_answered(now)
            if (ending := setups.due(conn, now)) is not None:
                self.interrupt(conn, ending)
        for one in self.admission.old(now):
            self.admission.gives_place_back(one)
        self.next_turns()
        if self.woken or self.ready:
            self.settle()
        self.plan_look()
        return True

    # ------------------------------------------------------------ start and end

    def adopt(self, conn: Conn, number: int) -> bool:
        """_take_over() of one that outlived an earlier daemon."""
        if self.world.shell is not self or conn.place != LOOSE:
            return False
        child = conn.child
        assert child is not None
        age = self.world.now - child.started_at
        conn.call = Call(self.world.now, random=self.world.random)
        self.opens(conn)
        conn.call.adopt(self.world.now, age)
        self.alive += 1
        conn.place = STARTED
        conn.prompts = 0
        conn.tended = False
        self.setups.begins(conn, conn.call, conn.route.target, "service")
        if not self.looks_often:
            self.changed()
        if conn.gone:
            self.hung_up(conn)
        return True

    def adopted(self, _: None, number: int) -> bool:
        if self.world.shell is not self:
            return False
        self.admission.knows_all_now()
        self.has_adopted = True
        self.world.moves += 1
        self.next_turns()
        return True

    def is_idle(self) -> None:
        """_closes(): the accept loop is to count from now."""
        self.idleness.since = self.world.now
        left = self.idleness.left(self.world.now, False)
        if left < 1e6:
            self.world.at(left, self.world.goes, self, 0)

    def waits(self) -> bool:
        """_wind_up(): whether a stop is not over yet."""
        assert self.stop is not None
        kept = [one for one in self.ours if not self.outlives_daemon(one)]
        now = self.world.now
        return self.stop.waits(now, kept, self.setups.soon(now))

    def outlives_daemon(self, conn: Conn) -> bool:
        # What is sent by pipes is never all there here.
        return conn.place == STARTED and conn.call.goes_on_alone(
            conn.by_pipes, False
        )
