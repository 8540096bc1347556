"""serve: accept, admit, stop, notify.

One trio process for all listeners of an RPC prefix. It accepts a connection
only when it can start the call at once, so that what waits, waits in the
kernel's backlog, which systemd keeps: this process may stop at any time, and
the next one goes on where it left off. Who may begin is decided in
admission.py, what becomes of a call in call.py, when to end in lifetime.py.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import select
import signal
import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass

import trio

from ..routing.claim import Claim, PassedSocket, Refusal, Route
from ..systemd.journal import Log, Priority
from ..systemd.notify import Notifier, watchdog_interval
from ..systemd.passed import format_address
from . import xen
from .admission import Admission, Fault, Verdict, fault
from .census import Census
from .child import Client
from .connection import (
    HANG_UP_LOOK,
    STARVED_DELAY,
    Connection,
    reset,
    start,
)
from .lifetime import STOP_MARGIN, Idleness, Stop
from .orphans import Orphan
from .outcome import Ending, Outcome, format_seconds
from .peers import Gate, GateProblem, borrowed, exposure
from .process import (
    client_environment,
    leave_caretaker,
    raise_descriptor_limit,
)
from .reports import Reports
from .settings import STOP_SIGNALS, Settings
from .setups import LOOK_INTERVAL, Setups
from .spawn import AT_ONCE
from .splice import RESET_AT_CLOSE, at_close
from .succession import see_out, take_over
from .watch import Watch, readable

__all__ = ["Daemon"]

#: STATUS is not sent more often than this.
STATUS_INTERVAL = 0.5
#: What one turn of the accept loop looks at.
BATCH = 64


@dataclass(slots=True, eq=False)
class Listener:
    """A passed socket and what was decided about it."""

    sock: socket.socket
    claim: Claim


class Daemon:
    """The service: its listeners, its connections, and what they wait for."""

    def __init__(self, service: str, settings: Settings, log: Log) -> None:
        self.settings = settings
        self.client = Client(
            settings.client, settings.relay, client_environment()
        )
        self.admission = Admission(
            settings.max_setups, settings.max_connections, settings.max_total
        )
        self._reports = Reports(service, log)
        self.connections: set[Connection] = set()
        #: Those of an earlier daemon that are only seen out, by their pids.
        self._orphans: set[int] = set()
        self._gate = Gate(settings.allow_uids) if settings.allow_uids else None
        self._listeners: dict[int, Listener] = {}
        self._ready = select.epoll()
        #: Listeners that are yet to be listened to.
        self._unheard: set[int] = set()
        self._turns: dict[Connection, trio.Event] = {}
        self._watch = Watch()
        self._hang_ups = Watch(HANG_UP_LOOK)
        self._notifier = Notifier()
        self._census = Census()
        self._client_gone: dict[Connection, float] = {}
        self._some_client_gone = trio.Event()
        self._setups: Setups[Connection] = Setups(
            self.admission, settings.setup_timeout
        )
        self._setups_changed = trio.Event()
        self._first_round = trio.Event()
        self._some_ended = trio.Event()
        self._last_status = ""
        self._nap = trio.CancelScope()
        self._idleness = Idleness(settings.exit_idle_time, 0.0)
        pid = os.getpid()
        self._numbers = (f"{pid:x}-{number}" for number in itertools.count(1))

    # --------------------------------------------------------------- listeners

    def add_listeners(
        self, sockets: Sequence[PassedSocket], claims: Iterable[Claim]
    ) -> None:
        """Take over the passed sockets, and say of each whether it is
        served."""
        for passed, claim in zip(sockets, claims, strict=True):
            claim = self._guarded(passed, claim)
            self._reports.listens(claim)
            if passed.kind in ("Stream", "SequentialPacket", "Datagram"):
                sock = socket.socket(fileno=passed.fd)
                sock.setblocking(False)
                # Also of what systemd accepts, and closes, while a unit stops.
                at_close(sock, RESET_AT_CLOSE)
                self._listeners[passed.fd] = Listener(sock, claim)
                self._hear(passed.fd)
            # Else nothing can connect to it; it is left alone.

    def _guarded(self, passed: PassedSocket, claim: Claim) -> Claim:
        """Warn of a listener that others can reach; with --allow-uid, refuse
        one whose users cannot be told."""
        if isinstance(claim, Refusal):
            return claim
        with borrowed(passed.fd) as sock:
            if self._gate is None:
                if danger := exposure(sock):
                    self._reports.of_listener(
                        claim, Priority.NOTICE, f"{claim.address}: {danger}"
                    )
            elif problem := self._gate.problem(sock):
                return Refusal(
                    claim.address,
                    f"--allow-uid is set, and {problem}",
                    claim.unit,
                    claim.file,
                )
        return claim

    # --------------------------------------------------------------------- run

    async def run(self) -> None:
        """Serve until told to stop, or idle for long enough; connections that
        were handed over outlive this."""
        self._idleness.since = trio.current_time()
        self.admission.knows_all = False
        async with self._at_work() as told_to_stop:
            with told_to_stop:
                self._nursery.start_soon(self._feed)
                self._nursery.start_soon(self._report)
                self._nursery.start_soon(self._adopt)
                self._notifier.tell(f"READY=1\nSTATUS={self.status()}")
                await self._accept()
            self._notifier.tell("STOPPING=1")
            left = await self._wind_up() or not self.admission.knows_all
        if left and self._notifier.wanted:
            leave_caretaker()
        self._close()

    async def look_after(self) -> None:
        """Without listeners: see to the connections that an earlier daemon left
        until they are over, or the next daemon comes and says so.

        Who would else reset the client of a call that is refused after a
        prompt, or make a call again that was lost?
        """
        self._first_round.set()
        async with self._at_work() as told_to_stop:
            with told_to_stop:
                await self._adopt()
                while self.connections or self._orphans:
                    await self._connection_ends(math.inf)
        self._close()

    @contextlib.asynccontextmanager
    async def _at_work(self) -> AsyncIterator[trio.CancelScope]:
        """Look after the connections meanwhile; an order to stop cancels the
        scope."""
        raise_descriptor_limit()
        told_to_stop = trio.CancelScope()
        with trio.open_signal_receiver(signal.SIGINT, *STOP_SIGNALS) as signals:
            # They were blocked until there was somebody to receive them.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
            async with trio.open_nursery() as self._nursery:
                self._nursery.start_soon(
                    self._stop_on_signal, signals, told_to_stop
                )
                self._nursery.start_soon(self._watch.run)
                self._nursery.start_soon(self._hang_ups.run)
                self._nursery.start_soon(self._look_after_hang_ups)
                self._nursery.start_soon(self._look_after_setups)
                yield told_to_stop
                self._nursery.cancel_scope.cancel()

    def _close(self) -> None:
        for connection in self.connections:
            # What is established by now must not be reset by its end, should
            # that come before anybody looks after it again.
            connection.look_if_established()
            connection.abandon()
        self._watch.close()
        self._hang_ups.close()
        self._notifier.close()
        self._ready.close()
        if self._gate is not None:
            self._gate.close()
        for listener in self._listeners.values():
            listener.sock.close()

    async def _stop_on_signal(
        self, signals: AsyncIterator[int], accepting: trio.CancelScope
    ) -> None:
        async for _ in signals:
            # Whoever waited for this start is served first: changes of units
            # that come one after the other must not keep everybody waiting.
            await self._first_round.wait()
            accepting.cancel()

    async def _wind_up(self) -> int:
        """Stop without losing what was accepted: see set-ups through, let
        spliced connections end, leave the rest; returns how many."""
        stop = Stop(trio.current_time(), self.settings.stop_timeout)
        while stop.waits(
            now := trio.current_time(),
            self._kept_by_daemon(),
            self._setups.soon(now),
        ):
            await self._connection_ends(LOOK_INTERVAL)
        cut = self._kept_by_daemon()
        for connection in cut:
            connection.interrupt(Ending.STOPPED)
        with trio.move_on_after(STOP_MARGIN / 2):
            while any(one in self.connections for one in cut):
                await self._connection_ends(STOP_MARGIN)
        if left := sum(one.outlives_daemon for one in self.connections):
            self._reports.info(
                f"stopping; open connections that go on without it: {left}"
            )
        return left or len(self._orphans)

    def _kept_by_daemon(self) -> list[Connection]:
        """The connections that cannot go on without this process."""
        return [one for one in self.connections if not one.outlives_daemon]

    async def _connection_ends(self, at_most: float) -> None:
        self._some_ended = trio.Event()
        with trio.move_on_after(at_most):
            await self._some_ended.wait()

    # ------------------------------------------------------------------ accept

    async def _accept(self) -> None:
        """Accept until there was nothing to do for long enough."""
        while not (self._first_round.is_set() and self._idle()):
            if self._first_round.is_set():
                starved = STARVED_DELAY if self._unheard else math.inf
                at_most = min(starved, self._idle_for())
                with trio.move_on_after(at_most) as self._nap:
                    await readable(self._ready.fileno())
            for fd in tuple(self._unheard):
                self._hear(fd)
            for _ in range(BATCH):
                more, short = self._accept_some()
                if short:
                    await trio.sleep(STARVED_DELAY)
                if short or not more:
                    break
                # All others have their turn.
                await trio.lowlevel.checkpoint()
            self._first_round.set()

    def _accept_some(self) -> tuple[bool, bool]:
        """Accept from each listener in turn, as many as are started at once,
        and start them; whether there may be more, and whether the machine is
        short of something.

        No checkpoint in here: what is accepted is started.
        """
        accepted: list[Connection] = []
        short = False
        for _ in range(AT_ONCE):
            ready = self._ready.poll(0, AT_ONCE - len(accepted))
            for fd, _ in ready:
                short |= not self._admit(fd, accepted)
            if not ready or short or len(accepted) >= AT_ONCE:
                break
        # A problem is met again, and dealt with, in carry().
        start(self.client, accepted)
        for connection in accepted:
            if not connection.go_untended():
                self._tend(connection)
        # A client that had gone has not used its turn.
        self._next_turns()
        return bool(ready), short

    def _admit(self, fd: int, accepted: list[Connection]) -> bool:
        """Accept one connection from a listener that has one, if there is room
        for it; False if the machine is short of something."""
        listener = self._listeners[fd]
        route = listener.claim
        if isinstance(route, Refusal):
            return self._turn_away(listener, route)
        now = trio.current_time()
        verdict = self._verdict(route.target, now)
        if verdict is not Verdict.YES:
            self._park(fd, route, verdict)
            return True
        try:
            sock, address = listener.sock.accept()
        except OSError as error:
            return self._cannot_accept(fd, route, error)
        # Whatever closes it before a call is established: that is a reset.
        at_close(sock, RESET_AT_CLOSE)
        if self._gate is not None:
            try:
                self._gate.check(sock)
            except GateProblem as problem:
                peer = _peer(sock, address)
                reset(sock)
                self._reports.kept_out(route, peer, str(problem))
                return True
        connection = Connection(
            self, route, sock, next(self._numbers), _peer(sock, address)
        )
        if connection.client_is_gone():
            # No call for nobody: each might ask a person.
            self._reports.ended(
                connection, Outcome(Ending.CLIENT_GONE, False, 0.0)
            )
            connection.abandon()
            return True
        self._opens(connection)
        self.admission.begins(connection, now)
        accepted.append(connection)
        return True

    def _hear(self, fd: int) -> None:
        """Look for connections at a listener from now on, or as soon as the
        kernel can."""
        try:
            self._ready.register(fd, select.EPOLLIN)
        except FileExistsError:
            pass
        except OSError as error:
            self.starved(error)
            self._unheard.add(fd)
            self._nap.cancel()
            return
        self._unheard.discard(fd)

    def _ignore(self, fd: int) -> None:
        """Leave a listener alone."""
        self._unheard.discard(fd)
        with contextlib.suppress(OSError):
            self._ready.unregister(fd)

    def _cannot_accept(self, fd: int, claim: Claim, error: OSError) -> bool:
        what = fault(error.errno)
        if what is Fault.SHORTAGE:
            self.starved(error)
        elif what is Fault.NO_LISTENER:
            self._ignore(fd)
            self._reports.accepts_no_more(claim, error)
        elif what is Fault.LOST:
            self._reports.lost(claim, error)
        return what is not Fault.SHORTAGE

    def _verdict(self, target: str, now: float) -> Verdict:
        if self._count_others(now):
            # Who waits already comes first.
            self._next_turns()
        return self.admission.verdict(target, now, opened=False)

    def _count_others(self, now: float) -> bool:
        """Count them, if it is time; whether there are fewer than before."""
        before = others = self.admission.others
        if self.admission.count_is_due(now):
            ours = {one.pid or 0 for one in self.connections}
            with contextlib.suppress(OSError):
                others = self._census.others(ours)
            self.admission.counted(others, now)
        return others < before

    def _opens(self, connection: Connection) -> None:
        self.connections.add(connection)
        self.admission.opens(connection, connection.route.target)
        self._reports.changed.set()

    def _tend(self, connection: Connection) -> None:
        """Give a connection a task that sees it through, if it has none."""
        if not connection.tended:
            connection.tended = True
            self._nursery.start_soon(self._carry, connection)

    def _turn_away(self, listener: Listener, refusal: Refusal) -> bool:
        """Reset what comes to a listener that is not served."""
        if listener.sock.type == socket.SOCK_DGRAM:
            with contextlib.suppress(OSError):
                # Not until none is left: whoever sends them could keep
                # everybody else waiting.
                for _ in range(BATCH):
                    listener.sock.recv(1)
            return True
        for _ in range(BATCH):
            try:
                sock, _ = listener.sock.accept()
            except OSError as error:
                return self._cannot_accept(
                    listener.sock.fileno(), refusal, error
                )
            # Said before it is done: whoever sees the reset finds the reason in
            # the log.
            self._reports.turned_away(refusal)
            reset(sock)
        return True

    def _idle(self) -> bool:
        if self._idle_for() > 0:
            return False
        limit = format_seconds(self.settings.exit_idle_time or 0)
        self._reports.info(
            f"no connection for {limit}; the next one starts the daemon again"
        )
        return True

    def _idle_for(self) -> float:
        """How long to stay if nothing comes."""
        busy = self.connections or self.admission.somebody_waits
        return self._idleness.left(trio.current_time(), bool(busy))

    # -------------------------------------------------- what waits for its turn

    def _park(self, fd: int, route: Route, verdict: Verdict) -> None:
        """Leave a listener alone until there may be room for another call."""
        self._ignore(fd)
        self.admission.waits(fd, route.target)
        self._setups_changed.set()
        self._reports.waits(route.target, verdict, self.admission)

    def _next_turns(self) -> None:
        """Let those go on who wait for room, as far as there is some."""
        now = trio.current_time()
        if self.admission.waits_for_others:
            self._count_others(now)
        for who in self.admission.turns(now):
            if isinstance(who, Connection):
                self.admission.begins(who, now)
                self._turns.pop(who).set()
            elif isinstance(who, int):
                self._hear(who)
                # Should nothing come of that, a look passes it on.
                self._setups_changed.set()

    async def turn(self, connection: Connection) -> None:
        """Wait until it may be set up; it has a place then."""
        now, target = trio.current_time(), connection.route.target
        if self.admission.verdict(target, now, opened=True) is Verdict.YES:
            self.admission.begins(connection, now)
            return
        self.admission.waits(connection, target)
        self._setups_changed.set()
        self._turns[connection] = event = trio.Event()
        try:
            await event.wait()
        except trio.Cancelled:
            self._turns.pop(connection, None)
            self.admission.waits_no_more(connection)
            self.place_back(connection)
            raise

    def place_back(self, connection: Connection) -> None:
        if self.admission.gives_place_back(connection):
            self._next_turns()

    def no_room(
        self, connection: Connection, ending: Ending, code: int | None
    ) -> bool:
        """A try has failed: whether that was for want of room."""
        now, target = trio.current_time(), connection.route.target
        if code == 1:
            self.admission.scarce = xen.grants_are_scarce(
                self.settings.max_total
            )
        full = self.admission.no_room(connection, ending, code, now)
        if full:
            open_to_it = self.admission.open_to(target) - 1
            self._reports.no_room(target, code, open_to_it)
        self._next_turns()
        return full

    # ------------------------------------------------------------- connections

    async def _carry(self, connection: Connection) -> None:
        """See one connection through. Nothing that goes wrong in it touches
        another."""
        try:
            await connection.carry()
        except Exception as error:
            self._reports.broke(connection, error)
            connection.outcome = None
        finally:
            if connection.outcome is not None:
                self._reports.ended(connection, connection.outcome)
            self._closes(connection)

    def _closes(self, connection: Connection) -> None:
        """Make room for the next one."""
        self.connections.discard(connection)
        self._client_gone.pop(connection, None)
        self._some_ended.set()
        if not self.connections:
            # The accept loop is to count from now.
            self._idleness.since = now = trio.current_time()
            self._nap.deadline = min(self._nap.deadline, now + self._idle_for())
        self.admission.closes(connection)
        self._next_turns()
        self._reports.changed.set()

    def starved(self, error: OSError) -> None:
        self._reports.starved(error)

    def watch(self, fd: int, events: int, callback: Callable[[], None]) -> None:
        """Call back once, when one of these events, a hang-up or an error
        comes."""
        (self._watch if events else self._hang_ups).add(fd, events, callback)

    def forget(self, fd: int) -> None:
        """Call back no more; must come before the descriptor is closed, as a
        duplicate would keep it watched."""
        self._watch.forget(fd)
        self._hang_ups.forget(fd)

    def child_ended(self, connection: Connection) -> None:
        if (outcome := connection.over_at_once()) is None:
            self._tend(connection)
        else:
            self._reports.ended(connection, outcome)
            self._closes(connection)

    def client_gone(self, connection: Connection) -> None:
        # Nearly always both sides are done, and qrexec-client-vm is about to
        # end.
        self._client_gone[connection] = trio.current_time()
        self._some_client_gone.set()

    async def _look_after_hang_ups(self) -> None:
        """Tend the connections that go on a while after their clients have
        gone."""
        while True:
            await self._some_client_gone.wait()
            self._some_client_gone = trio.Event()
            while self._client_gone:
                await trio.sleep(HANG_UP_LOOK)
                before = trio.current_time() - HANG_UP_LOOK
                for connection in [
                    one
                    for one, since in self._client_gone.items()
                    if since <= before
                ]:
                    del self._client_gone[connection]
                    if connection.hangs_up():
                        self._tend(connection)

    # ------------------------------------------ what outlived an earlier daemon

    async def _adopt(self) -> None:
        """Watch again over the connections that outlived an earlier daemon."""
        try:
            await take_over(self._take_over, self._reports)
        finally:
            self.admission.knows_all_now()
            self._next_turns()

    def _take_over(self, orphan: Orphan) -> None:
        if orphan.sock is None:
            self._orphans.add(orphan.pid)
            self._nursery.start_soon(self._see_out, orphan)
            return
        connection = Connection(
            self, orphan.route, orphan.sock, orphan.connection, orphan.peer
        )
        self._opens(connection)
        connection.adopt(orphan.pid, orphan.pidfd, orphan.age)
        if not connection.go_untended():
            self._tend(connection)

    async def _see_out(self, orphan: Orphan) -> None:
        await see_out(orphan)
        self._orphans.discard(orphan.pid)
        self._some_ended.set()

    # ----------------------------------------------------------------- set-ups

    def setup_begins(self, connection: Connection) -> None:
        route = connection.route
        self._setups.begins(
            connection, connection.call, route.target, route.call
        )
        self._setups_changed.set()

    def setup_ends(self, connection: Connection) -> None:
        established = self._setups.ends(connection)
        if established is None:
            return
        if established:
            self._reports.changed.set()
            if connection.call.client_left:
                self.client_gone(connection)
        self._next_turns()

    async def _look_after_setups(self) -> None:
        """See when calls are established, or will not be. The kernel tells, but
        only who asks."""
        while True:
            interval = self._setups.next_look(trio.current_time())
            if interval < LOOK_INTERVAL:
                await trio.sleep(interval)
            else:
                self._setups_changed = trio.Event()
                with trio.move_on_after(interval):
                    await self._setups_changed.wait()
                    continue
            self._look_at_setups()
            self._next_turns()

    def _look_at_setups(self) -> None:
        now = trio.current_time()
        for connection, asks_dom0 in self._setups.look(now):
            if connection.look_if_established():
                self.setup_ends(connection)
                continue
            if asks_dom0:
                connection.look_if_answered()
            ending = self._setups.due(connection, now)
            if ending is not None:
                connection.interrupt(ending)
                self._tend(connection)
        for one in self.admission.old(now):
            self.admission.gives_place_back(one)
            self._reports.changed.set()

    # ------------------------------------------------------------------ status

    def status(self) -> str:
        """One line for systemctl status."""
        return self._reports.status(
            len(self.connections), self.admission.without_place
        )

    async def _feed(self) -> None:
        """Tell the watchdog that tasks have their turn; soon again, if systemd
        does not read at the moment."""
        if interval := watchdog_interval():
            while True:
                told = self._notifier.tell("WATCHDOG=1")
                await trio.sleep(interval / 2 if told else STATUS_INTERVAL)

    async def _report(self) -> None:
        """Keep STATUS true, and cheap."""
        while True:
            await self._reports.changed.wait()
            self._reports.changed = trio.Event()
            if (status := self.status()) != self._last_status:
                if self._notifier.tell(f"STATUS={status}"):
                    self._last_status = status
                else:
                    # systemd does not read at the moment.
                    self._reports.changed.set()
            await trio.sleep(STATUS_INTERVAL)


def _peer(sock: socket.socket, address: object) -> str:
    """Who connects: an address, or for a unix socket the process and the user,
    as far as the kernel tells."""
    if sock.family != socket.AF_UNIX:
        return format_address(sock.family, address)
    try:
        pid, uid, _ = struct.unpack(
            "iii", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        )
    except OSError:
        return "unknown process"
    return f"pid {pid} uid {uid}"
