"""serve: accept, admit, stop, notify.

One trio process for all listeners of an RPC prefix. It accepts a connection
only when it can start the call at once, so that what waits, waits in the
kernel's backlog, which systemd keeps: this process may stop at any time, and
the next one goes on where it left off.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import math
import os
import resource
import select
import signal
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import trio

from ..routing.claim import Claim, PassedSocket, Refusal, Route
from ..systemd.journal import Log, Priority
from ..systemd.passed import format_address
from .connection import (
    HANG_UP_LOOK,
    STARVED,
    Client,
    Connection,
    StartProblem,
    Starved,
    reset,
)
from .orphans import find_orphans
from .outcome import Ending, Outcome, format_seconds
from .peers import Gate, GateProblem, borrowed, exposure
from .settings import Settings

__all__ = ["Daemon"]

#: A set-up gives its place back when it is so old: then a prompt is open, and a
#: person is thinking about it.
PROMPT_AGE = 2.0
#: A call is lost in qrexec if others, started later on the same route, were set
#: up without a prompt, and it is older by this than they were then. About 0.3 %
#: of calls hang when 32 are set up at once (a race in qrexec-daemon 4.4.2).
OVERTAKEN_AGE = 5.0
#: From the first overtaking on, a call has so long before it is taken for lost.
OVERTAKEN_GRACE = 1.0
#: How often set-ups are looked at that have not been answered at once; in
#: seconds.
LOOK_INTERVAL = 0.02
#: A stop waits so long for set-ups that may yet need another try. Less than
#: TimeoutStopSec= in the units.
STOP_PATIENCE = 4.0
#: The margin before systemd's SIGKILL in which spliced connections are reset
#: and reported.
STOP_MARGIN = 0.6
#: How long accept pauses when the machine is short of descriptors or memory.
STARVED_PAUSE = 0.25
#: A shortage is over, and the next one worth a line in the log, after so long
#: without another failure. Meanwhile some connections go through, and more
#: wait.
SHORTAGE_OVER = 10.0
#: STATUS is not sent more often than this.
STATUS_INTERVAL = 0.5
#: The log speaks of connections reset at one refused listener not more often
#: than this.
REFUSAL_LOG_INTERVAL = 30.0
#: ... and of connections that --allow-uid keeps out.
KEPT_OUT_LOG_INTERVAL = 1.0
#: What one turn of the accept loop looks at.
BATCH = 64

_ACCEPT_AGAIN = {
    errno.EAGAIN,
    errno.ECONNABORTED,
    errno.EINTR,
    errno.EPERM,
    errno.EPROTO,
}


@dataclass(slots=True, eq=False)
class Listener:
    """A passed socket and what was decided about it."""

    sock: socket.socket
    claim: Claim
    #: When the log last spoke of connections reset here.
    spoke_at: float = -math.inf


@dataclass(slots=True)
class Tally:
    """What STATUS and the last line of the log say."""

    served: int = 0
    failed: int = 0
    reset: int = 0


class _Quick(NamedTuple):
    """The latest-begun set-up on a route that was established without a
    prompt."""

    began_at: float
    took: float


class Watch:
    """Calls back once when a descriptor has an event, and watches sockets
    without being woken by data.

    An epoll of its own, as trio waits for readable or writable only, and a
    hang-up is neither: with an empty event mask epoll reports hang-ups and
    errors alone.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[], None]] = {}

    def add(self, fd: int, events: int, callback: Callable[[], None]) -> None:
        self._epoll.register(fd, events)
        self._callbacks[fd] = callback

    def forget(self, fd: int) -> None:
        if self._callbacks.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    async def run(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._epoll.fileno())
            for fd, _ in self._epoll.poll(0, BATCH):
                # An earlier callback of this round may have forgotten it.
                if (callback := self._callbacks.pop(fd, None)) is not None:
                    # Once is enough, and a hang-up does not pass: left
                    # registered, it would wake us for ever.
                    self._epoll.unregister(fd)
                    callback()

    def close(self) -> None:
        self._epoll.close()


class Daemon:
    """The service: its listeners, its connections, and the limits between
    them."""

    def __init__(self, service: str, settings: Settings, log: Log) -> None:
        self.service = service
        self.settings = settings
        self.log = log
        self.client = Client(
            settings.client, settings.relay, _client_environment()
        )
        self._gate = Gate(settings.allow_uids) if settings.allow_uids else None
        self.tally = Tally()
        self.connections: set[Connection] = set()
        self._listeners: dict[int, Listener] = {}
        self._ready = select.epoll()
        self._parked: dict[str, list[int]] = {}
        self._open: Counter[str] = Counter()
        self._watch = Watch()
        self._notifier = _Notifier()
        self._client_gone: dict[Connection, float] = {}
        self._some_client_gone = trio.Event()
        self._places = trio.Semaphore(settings.max_setups)
        self._setups: dict[Connection, None] = {}
        self._setups_changed = trio.Event()
        self._quick: dict[tuple[str, str], _Quick] = {}
        self._some_ended = trio.Event()
        self._status_changed = trio.Event()
        self._last_status = ""
        self._starved_at = -math.inf
        self._looks_often = False
        self._nap = trio.CancelScope()
        self._idle_since = 0.0
        self._unusable = 0
        self._numbers = (
            f"{os.getpid():x}-{number}" for number in itertools.count(1)
        )
        self._watchdog = _watchdog_interval()

    # ---------------------------------------------------------------- listeners

    def add_listeners(
        self, sockets: Sequence[PassedSocket], claims: Iterable[Claim]
    ) -> None:
        """Take over the passed sockets, and say of each whether it is
        served."""
        for passed, claim in zip(sockets, claims, strict=True):
            claim = self._guarded(passed, claim)
            if isinstance(claim, Refusal):
                self.log(
                    Priority.ERROR,
                    str(claim),
                    QREXEC_SERVICE=self.service,
                    LISTENER=claim.address,
                    UNIT=claim.unit or None,
                    FILE=claim.file or None,
                )
            else:
                self.log(
                    Priority.INFO,
                    f"serving {claim}",
                    QREXEC_TARGET=claim.target,
                    QREXEC_SERVICE=claim.call,
                    LISTENER=claim.address,
                    UNIT=claim.unit or None,
                    FILE=claim.file or None,
                )
            if passed.kind in ("Stream", "SequentialPacket", "Datagram"):
                sock = socket.socket(fileno=passed.fd)
                sock.setblocking(False)
                self._listeners[passed.fd] = Listener(sock, claim)
                self._ready.register(passed.fd, select.EPOLLIN)
            else:
                # Nothing can connect to it; it is refused by name and left
                # alone.
                self._unusable += 1

    def _guarded(self, passed: PassedSocket, claim: Claim) -> Claim:
        """Warn of a listener that others can reach; with --allow-uid, refuse
        one whose users cannot be told."""
        if isinstance(claim, Refusal):
            return claim
        with borrowed(passed.fd) as sock:
            if self._gate is None:
                if danger := exposure(sock):
                    self.log(
                        Priority.NOTICE,
                        f"{claim.address}: {danger}",
                        LISTENER=claim.address,
                        UNIT=claim.unit or None,
                    )
            elif problem := self._gate.problem(sock):
                return Refusal(
                    claim.address,
                    f"--allow-uid is set, and {problem}",
                    claim.unit,
                    claim.file,
                )
        return claim

    # ------------------------------------------------------------------ run

    async def run(self) -> None:
        """Serve until SIGTERM, SIGINT or idleness; connections that were handed
        over outlive this."""
        self._idle_since = trio.current_time()
        _raise_descriptor_limit()
        with trio.open_signal_receiver(
            signal.SIGTERM, signal.SIGINT
        ) as signals:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                with trio.CancelScope() as accepting:
                    nursery.start_soon(self._stop_on_signal, signals, accepting)
                    nursery.start_soon(self._watch.run)
                    nursery.start_soon(self._look_after_hang_ups)
                    nursery.start_soon(self._look_after_setups)
                    nursery.start_soon(self._report)
                    nursery.start_soon(self._adopt)
                    self._notifier.tell(f"READY=1\nSTATUS={self.status()}")
                    await self._accept()
                self._notifier.tell("STOPPING=1")
                await self._wind_up()
                nursery.cancel_scope.cancel()
        for connection in self.connections:
            connection.abandon()
        self._watch.close()
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
            accepting.cancel()

    async def _wind_up(self) -> None:
        """Stop without losing what was accepted: see set-ups through, let
        spliced connections end, leave the rest."""
        deadline = trio.current_time() + max(
            self.settings.stop_timeout - STOP_MARGIN, 0
        )
        patience = min(deadline, trio.current_time() + STOP_PATIENCE)
        while (now := trio.current_time()) < deadline:
            waiting = [one for one in self.connections if not one.handed_over]
            if now < patience:
                # One that waits for a person's answer would not be done in time
                # anyway; it goes on by itself.
                waiting += [
                    one
                    for one in self._setups
                    if one.handed_over and now - one.began_at < PROMPT_AGE
                ]
            if not waiting:
                break
            await self._connection_ends(LOOK_INTERVAL)
        cut = [one for one in self.connections if not one.handed_over]
        for connection in cut:
            connection.interrupt(Ending.STOPPED)
        with trio.move_on_after(STOP_MARGIN):
            while any(one in self.connections for one in cut):
                await self._connection_ends(STOP_MARGIN)
        if left := len(self.connections):
            self.log(
                Priority.INFO,
                f"stopping; {_count(left, 'open connection')} go on without"
                f" the daemon",
            )

    async def _connection_ends(self, at_most: float) -> None:
        self._some_ended = trio.Event()
        with trio.move_on_after(at_most):
            await self._some_ended.wait()

    # ------------------------------------------------------------------ accept

    async def _accept(self) -> None:
        """Accept until there was nothing to do for long enough."""
        while not self._idle():
            self._feed_watchdog()
            with trio.move_on_after(self._tick()) as self._nap:
                await trio.lowlevel.wait_readable(self._ready.fileno())
            # One of each listener in turn, and then all others have theirs.
            for _ in range(BATCH):
                ready = self._ready.poll(0, BATCH)
                for fd, _ in ready:
                    await self._admit(fd)
                if not ready:
                    break
                await trio.lowlevel.checkpoint()

    async def _admit(self, fd: int) -> None:
        """Accept one connection from a listener that has one, once there is
        room for it."""
        listener = self._listeners[fd]
        route = listener.claim
        if isinstance(route, Refusal):
            self._turn_away(listener, route)
            return
        if self._open[route.target] >= self.settings.max_connections:
            self._park(fd, route)
            return
        while not await self._place_within(self._tick()):
            self._feed_watchdog()
        try:
            sock, address = listener.sock.accept()
        except OSError as error:
            self.give_place_back()
            if error.errno in STARVED - {errno.EAGAIN}:
                self.starved(error)
                await trio.sleep(STARVED_PAUSE)
            elif error.errno not in _ACCEPT_AGAIN:
                self._ready.unregister(fd)
                self.log(
                    Priority.ERROR,
                    f"{route.address} accepts no more: {error.strerror};"
                    f" restart {route.unit}",
                )
            return
        # No checkpoint from here to the start of qrexec-client-vm: what is
        # accepted is started.
        if self._gate is not None:
            try:
                self._gate.check(sock)
            except GateProblem as problem:
                self.give_place_back()
                self._keep_out(
                    listener, sock, _peer(sock, address), str(problem)
                )
                return
        connection = Connection(
            self, route, sock, next(self._numbers), _peer(sock, address)
        )
        with contextlib.suppress(StartProblem, Starved):
            # Either is met again, and dealt with, in carry().
            connection.start()
        self._begin(connection)

    def _begin(self, connection: Connection) -> None:
        self.connections.add(connection)
        self._open[connection.route.target] += 1
        self._status_changed.set()
        if not connection.go_untended():
            self._tend(connection)

    def _tend(self, connection: Connection) -> None:
        """Give a connection a task that sees it through, if it has none."""
        if not connection.tended:
            connection.tended = True
            self._nursery.start_soon(self._carry, connection)

    async def _adopt(self) -> None:
        """Watch again over the connections that outlived an earlier daemon."""
        adopted = 0
        try:
            for orphan in find_orphans():
                if orphan.sock is None:
                    # Its pipes led to the daemon that is gone, and with it went
                    # the client.
                    with contextlib.suppress(ProcessLookupError):
                        signal.pidfd_send_signal(orphan.pidfd, signal.SIGTERM)
                    os.close(orphan.pidfd)
                    continue
                connection = Connection(
                    self,
                    orphan.route,
                    orphan.sock,
                    orphan.connection,
                    orphan.peer,
                )
                connection.adopt(orphan.pid, orphan.pidfd, orphan.age)
                self._begin(connection)
                adopted += 1
                await trio.lowlevel.checkpoint()
        except OSError as error:
            self.log(
                Priority.NOTICE,
                f"connections of an earlier daemon go on unwatched: {error}",
            )
        if adopted:
            self.log(
                Priority.INFO,
                f"watching over {_count(adopted, 'connection')} of an earlier"
                f" daemon",
            )

    async def _place_within(self, seconds: float) -> bool:
        """Wait for a set-up place, but not for ever, as the watchdog wants to
        be fed."""
        with contextlib.suppress(trio.WouldBlock):
            self._places.acquire_nowait()
            return True
        self._look_at_setups()
        with trio.move_on_after(seconds):
            await self._places.acquire()
            return True
        return False

    def _turn_away(self, listener: Listener, refusal: Refusal) -> None:
        """Reset what comes to a listener that is not served."""
        if listener.sock.type == socket.SOCK_DGRAM:
            with contextlib.suppress(OSError):
                # Not until none is left: whoever sends them could keep
                # everybody else waiting.
                for _ in range(BATCH):
                    listener.sock.recv(1)
            return
        with contextlib.suppress(OSError):
            for _ in range(BATCH):
                sock, _ = listener.sock.accept()
                # Said before it is done: whoever sees the reset finds the
                # reason in the log.
                if (
                    trio.current_time() - listener.spoke_at
                    >= REFUSAL_LOG_INTERVAL
                ):
                    listener.spoke_at = trio.current_time()
                    self.log(
                        Priority.WARNING,
                        f"reset a connection: {refusal}",
                        LISTENER=refusal.address,
                        UNIT=refusal.unit or None,
                    )
                reset(sock)
                self.tally.reset += 1
                self._status_changed.set()

    def _keep_out(
        self, listener: Listener, sock: socket.socket, peer: str, problem: str
    ) -> None:
        """Reset a connection of somebody who may not connect."""
        reset(sock)
        self.tally.reset += 1
        self._status_changed.set()
        # Whoever is kept out decides how often there is something to say.
        if trio.current_time() - listener.spoke_at >= KEPT_OUT_LOG_INTERVAL:
            listener.spoke_at = trio.current_time()
            self.log(
                Priority.WARNING,
                f"reset a connection of {peer} on {listener.claim.address}:"
                f" {problem}",
                PEER=peer,
                LISTENER=listener.claim.address,
                UNIT=listener.claim.unit or None,
            )

    def _park(self, fd: int, route: Route) -> None:
        """Leave a listener alone until a connection to its target ends."""
        self._ready.unregister(fd)
        parked = self._parked.setdefault(route.target, [])
        parked.append(fd)
        if len(parked) == 1:
            self.log(
                Priority.NOTICE,
                f"{self.settings.max_connections} connections are open to"
                f" {route.target}; more wait until one ends",
                QREXEC_TARGET=route.target,
            )

    def _idle(self) -> bool:
        limit = self.settings.exit_idle_time
        if (
            limit is None
            or self.connections
            or trio.current_time() - self._idle_since < limit
        ):
            return False
        self.log(
            Priority.INFO,
            f"no connection for {format_seconds(limit)}; the next one starts"
            f" the daemon again",
        )
        return True

    def _tick(self) -> float:
        """How long the accept loop may sleep at most."""
        tick = self._watchdog or math.inf
        if self.settings.exit_idle_time is not None and not self.connections:
            tick = min(
                tick,
                max(
                    self._idle_since
                    + self.settings.exit_idle_time
                    - trio.current_time(),
                    0,
                ),
            )
        return tick

    def _feed_watchdog(self) -> None:
        if self._watchdog is not None:
            self._notifier.tell("WATCHDOG=1")

    # -------------------------------------------------------------- connections

    async def _carry(self, connection: Connection) -> None:
        """See one connection through. Nothing that goes wrong in it touches
        another."""
        try:
            outcome = await connection.carry()
        except Exception as error:
            self.log(
                Priority.ERROR,
                f"{connection}: internal error: {type(error).__name__}: {error}",
            )
            self.tally.failed += 1
        else:
            self._record(connection, outcome)
        finally:
            self._end(connection)

    def _end(self, connection: Connection) -> None:
        """Make room for the next one."""
        target = connection.route.target
        self.connections.discard(connection)
        self._client_gone.pop(connection, None)
        self._some_ended.set()
        if not self.connections:
            # The accept loop is to count from now.
            self._idle_since = trio.current_time()
            self._nap.cancel()
        self._open[target] -= 1
        for fd in self._parked.pop(target, ()):
            self._ready.register(fd, select.EPOLLIN)
        self._status_changed.set()

    def _record(self, connection: Connection, outcome: Outcome) -> None:
        if outcome.failed:
            self.tally.failed += 1
        else:
            self.tally.served += 1
        self.log(
            Priority.WARNING if outcome.failed else Priority.INFO,
            f"{connection}: {outcome.words()}",
            CONNECTION_ID=connection.id,
            QREXEC_TARGET=connection.route.target,
            QREXEC_SERVICE=connection.route.call,
            PEER=connection.peer,
            LISTENER=connection.route.address,
            UNIT=connection.route.unit or None,
            OUTCOME=outcome.ending.name.lower().replace("_", "-"),
            ESTABLISHED=int(outcome.established),
            EXIT_CODE=outcome.exit_code,
            TRIES=outcome.tries,
            SETUP_USEC=None
            if outcome.setup is None
            else round(outcome.setup * 1e6),
            DURATION_USEC=round(outcome.duration * 1e6),
            BYTES_TO_QUBE=outcome.bytes_to_qube,
            BYTES_FROM_QUBE=outcome.bytes_from_qube,
        )

    # ---------------------------------------------------- what connections need

    async def take_place(self) -> None:
        await self._places.acquire()

    def give_place_back(self) -> None:
        self._places.release()

    def setup_begins(self, connection: Connection) -> None:
        self._setups[connection] = None
        if not self._looks_often:
            self._setups_changed.set()

    def setup_ends(self, connection: Connection) -> None:
        if connection not in self._setups:
            return
        del self._setups[connection]
        self._free_place(connection)
        if connection.established_at is not None:
            took = connection.established_at - connection.began_at
            key = (connection.route.target, connection.route.call)
            latest = self._quick.get(key)
            if took < PROMPT_AGE and (
                latest is None or latest.began_at < connection.began_at
            ):
                self._quick[key] = _Quick(connection.began_at, took)
            self._status_changed.set()

    def _free_place(self, connection: Connection) -> None:
        if connection.holds_place:
            connection.holds_place = False
            self.give_place_back()

    def starved(self, error: Exception) -> None:
        before, self._starved_at = self._starved_at, trio.current_time()
        if self._starved_at - before > SHORTAGE_OVER:
            self.log(
                Priority.WARNING,
                f"connections wait, as the machine is short of something:"
                f" {error}",
            )

    def watch(self, fd: int, events: int, callback: Callable[[], None]) -> None:
        self._watch.add(fd, events, callback)

    def forget(self, fd: int) -> None:
        self._watch.forget(fd)

    def child_ended(self, connection: Connection) -> None:
        if (outcome := connection.over_at_once()) is None:
            self._tend(connection)
        else:
            self._record(connection, outcome)
            self._end(connection)

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
                    connection.interrupt(Ending.CLIENT_GONE)
                    self._tend(connection)

    # ------------------------------------------------------------------ set-ups

    async def _look_after_setups(self) -> None:
        """See when calls are established, or will not be. The kernel tells, but
        only who asks."""
        while True:
            interval = self._look_interval()
            self._looks_often = interval < LOOK_INTERVAL
            if not self._looks_often:
                self._setups_changed = trio.Event()
                with trio.move_on_after(interval):
                    await self._setups_changed.wait()
                    continue
            else:
                await trio.sleep(interval)
            self._look_at_setups()

    def _look_interval(self) -> float:
        if not self._setups:
            return math.inf
        if self._places.statistics().tasks_waiting:
            return 0.001
        age = trio.current_time() - next(reversed(self._setups)).began_at
        if age < 0.1:
            return 0.002
        return LOOK_INTERVAL if age < PROMPT_AGE else 10 * LOOK_INTERVAL

    def _look_at_setups(self) -> None:
        now = trio.current_time()
        for connection in list(self._setups):
            if connection.look_if_established():
                self.setup_ends(connection)
                continue
            age = now - connection.began_at
            if age >= PROMPT_AGE and connection.holds_place:
                self._free_place(connection)
                self._status_changed.set()
            if age >= self.settings.setup_timeout:
                connection.interrupt(Ending.TIMED_OUT)
                self._tend(connection)
            elif self._is_lost(connection, now):
                connection.interrupt(Ending.LOST)
                self._tend(connection)

    def _is_lost(self, connection: Connection, now: float) -> bool:
        """Whether a call was overtaken so clearly that it must have been lost.

        Where its qube has just started, all that waited are answered at once,
        in any order; so from the first overtaking on it has another second.
        """
        if connection.lost_at is None:
            quick = self._quick.get(
                (connection.route.target, connection.route.call)
            )
            if quick is None or quick.began_at <= connection.began_at:
                return False
            connection.lost_at = max(
                connection.began_at + quick.took + OVERTAKEN_AGE,
                now + OVERTAKEN_GRACE,
            )
        return now >= connection.lost_at

    # ------------------------------------------------------------------ status

    def status(self) -> str:
        """One line for systemctl status."""
        refused = (
            sum(
                isinstance(one.claim, Refusal)
                for one in self._listeners.values()
            )
            + self._unusable
        )
        served = sum(
            isinstance(one.claim, Route) for one in self._listeners.values()
        )
        prompts = sum(not one.holds_place for one in self._setups)
        parts = [
            f"{_count(served, 'listener')} served, {refused} refused",
            f"{_count(len(self.connections), 'connection')} open",
        ]
        if prompts:
            parts.append(f"{prompts} waiting for an answer")
        parts.append(
            f"{self.tally.served} ended well, {self.tally.failed} failed"
        )
        if self.tally.reset:
            parts.append(f"{self.tally.reset} reset")
        return "; ".join(parts)

    async def _report(self) -> None:
        """Keep STATUS true, and cheap."""
        while True:
            await self._status_changed.wait()
            self._status_changed = trio.Event()
            if (
                status := self.status()
            ) != self._last_status and self._notifier.tell(f"STATUS={status}"):
                self._last_status = status
            await trio.sleep(STATUS_INTERVAL)


class _Notifier:
    """The way to tell systemd something. Its socket stays open: the watchdog is
    fed also when descriptors run out."""

    def __init__(self) -> None:
        address = os.environ.get("NOTIFY_SOCKET", "")
        self._address = (
            "\0" + address[1:] if address.startswith("@") else address
        )
        self._sock = (
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            if address
            else None
        )

    def tell(self, state: str) -> bool:
        """Whether systemd was told; that it could not be is no reason to
        end."""
        if self._sock is None:
            return True
        try:
            self._sock.sendto(state.encode(), self._address)
        except OSError:
            return False
        return True

    def close(self) -> None:
        if self._sock is not None:
            self._sock.close()


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


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


def _client_environment() -> dict[str, str]:
    """The environment for qrexec-client-vm: ours, without what systemd meant
    for this process only."""
    ours = ("LISTEN_", "NOTIFY_", "WATCHDOG_", "QREXEC_ACTIVATE_")
    return {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(ours)
    }


def _watchdog_interval() -> float | None:
    """How often to feed the watchdog, in seconds: twice as often as systemd
    asks for; None: no watchdog."""
    try:
        interval = int(os.environ["WATCHDOG_USEC"])
        for_us = int(os.environ.get("WATCHDOG_PID", os.getpid())) == os.getpid()
    except (KeyError, ValueError):
        return None
    return interval / 2e6 if for_us and interval > 0 else None


def _raise_descriptor_limit() -> None:
    """Use as many descriptors as we are allowed to; the soft limit is low for
    programs that call select()."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
