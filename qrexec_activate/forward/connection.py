"""One connection: its socket, its qrexec-client-vm, and what happens to them.

accepted → qrexec-client-vm started → established → ended. The accepted socket
itself is handed to qrexec-client-vm, and one duplicate is kept here: its
O_NONBLOCK flag, which belongs to both, tells when the call is established; a
hang-up on it tells that the client has gone. The daemon may end at any time
without the connection noticing. Where qrexec-client-vm cannot take a socket,
its pipes are spliced to it. What comes next is decided in call.py.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import socket
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import trio

from ..routing.claim import Route
from .call import Call, LastBytes, has_run, is_heard, output_grace, signals
from .child import STARVED, Child, Client
from .outcome import TCP_INFO, Ending, Outcome
from .settings import Relay
from .spawn import Order
from .splice import (
    INTERNET,
    NO_LINGER,
    RESET_AT_CLOSE,
    ClientGone,
    Splice,
    at_close,
    drop_input,
    half_close,
    is_stuck,
    unread,
    unsent,
)
from .watch import readable

if TYPE_CHECKING:
    from .daemon import Daemon

__all__ = ["STARVED_DELAY", "Connection", "end", "reset", "start"]

#: While the machine is short of descriptors, memory or processes, what has
#: failed is tried again after so many seconds.
STARVED_DELAY = 0.25
#: How often to look whether the last bytes of a client that has gone move.
HANG_UP_LOOK = 0.25
#: How often the farewell looks whether everything has arrived.
FAREWELL_LOOK = 0.05


async def end(child: Child, ending: Ending, left: Callable[[], int]) -> bool:
    """End a qrexec-client-vm that is of no use any more; whether it did so by
    itself. `left`: how many bytes of its client it has yet to read."""
    if ending is Ending.CLIENT_GONE:
        last = LastBytes(left(), trio.current_time(), child.cpu_time())
        over = False
        while not over:
            with trio.move_on_after(HANG_UP_LOOK):
                await child.ended()
                return True
            now, used = trio.current_time(), child.cpu_time()
            over = last.are_over(left(), now, used)
    for number, grace in signals(ending):
        child.signal(number)
        with trio.move_on_after(grace):
            await child.ended()
            break
    return False


def reset(sock: socket.socket) -> None:
    """Close so that the client sees a reset and no clean EOF: it must not take
    a refusal for an empty answer."""
    at_close(sock, RESET_AT_CLOSE)
    sock.close()


class Connection:
    """An accepted socket on its way to a qube. Owns the socket; carry() closes
    it."""

    __slots__ = (
        "_child",
        "_child_over",
        "_host",
        "_scope",
        "_sock",
        "_splice",
        "_watched",
        "call",
        "id",
        "outcome",
        "peer",
        "route",
        "tended",
    )

    def __init__(
        self,
        host: Daemon,
        route: Route,
        sock: socket.socket,
        number: str,
        peer: str,
    ) -> None:
        self._host = host
        self._sock = sock
        self._splice: Splice | None = None
        self._child: Child | None = None
        self._child_over: trio.Event | None = None
        self._scope: trio.CancelScope | None = None
        self._watched = False
        self.route = route
        self.id = number
        self.peer = peer
        self.call = Call(trio.current_time())
        #: What became of it, once that is sure.
        self.outcome: Outcome | None = None
        #: Whether a task sees it through, with carry().
        self.tended = False

    def __str__(self) -> str:
        route = self.route
        return (
            f"{self.id}: {self.peer} on {route.address} →"
            f" {route.target} {route.call}"
        )

    # ----------------------------------------------- what the daemon looks at

    @property
    def pid(self) -> int | None:
        return self._child.pid if self._child else None

    @property
    def outlives_daemon(self) -> bool:
        """Whether it goes on without the daemon: qrexec-client-vm is running,
        and holds the socket itself, or has all that the client will send."""
        if self._child is None:
            return False
        splice = self._splice
        return self.call.goes_on_alone(
            splice is not None, splice is not None and splice.all_sent
        )

    def look_if_established(self) -> bool:
        """Ask the kernel whether qrexec-client-vm has begun to move data."""
        call = self.call
        if call.established_at is None and self._child is not None:
            if self._splice is not None:
                begun = self._splice.in_data_phase()
            else:
                flags = fcntl.fcntl(self._sock, fcntl.F_GETFL)
                begun = bool(flags & os.O_NONBLOCK)
            if begun:
                self._is_established()
        return call.established_at is not None

    def _is_established(self) -> None:
        self.call.is_established(trio.current_time())
        if self._splice is not None:
            # If this daemon is killed, the kernel closes the socket: that must
            # not look like the end of the service. So SO_LINGER stays.
            self._splice.release_child_ends()
        else:
            at_close(self._sock, NO_LINGER)

    def look_if_answered(self) -> None:
        """See whether dom0 has answered, where the call is not established."""
        if self._child is not None and self._child.is_answered():
            self.call.is_answered(trio.current_time())

    def interrupt(self, ending: Ending) -> None:
        """Stop waiting for qrexec-client-vm, and end the connection (or this
        try of it) for this reason."""
        self.call.interrupt(ending)
        if self._scope is not None:
            self._scope.cancel()

    # -------------------------------------------------------------- the client

    def client_is_gone(self) -> bool:
        """Whether there is nobody to make a call for."""
        poll = select.poll()
        poll.register(self._sock, 0)
        if not poll.poll(0):
            return False
        # Both ways are closed. What a unix client sent before is still here; a
        # TCP client that half-closed has not hung up; one that has was reset.
        return self._sock.family in INTERNET or not self._waiting()

    def _waiting(self) -> int:
        """How many bytes of the client have not been read for the qube."""
        splice = self._splice
        in_pipe = splice.unread() if splice is not None else 0
        # Else nobody takes what the socket may still hold.
        if splice is None or not splice.input_over:
            with contextlib.suppress(OSError):
                return unread(self._sock.fileno()) + in_pipe
        return in_pipe

    def hangs_up(self) -> bool:
        """The client has hung up: whether that ends the connection now."""
        ends = self.call.hangs_up(
            self.look_if_established() or self.client_is_gone()
        )
        if ends:
            self.interrupt(Ending.CLIENT_GONE)
        return ends

    # ------------------------------------------------------------------- start

    def _order(self) -> Order:
        """How qrexec-client-vm is to be started on the socket."""
        client = self._host.client
        if client.relay is Relay.SPLICE and self._splice is None:
            self._splice = Splice(self._sock)
        ends: tuple[int, int | None] = self._sock.fileno(), None
        if self._splice is not None:
            ends = self._splice.child_ends
        own = {
            "QREXEC_ACTIVATE_CONNECTION": self.id,
            "QREXEC_ACTIVATE_LISTENER": self.route.address,
            "QREXEC_ACTIVATE_PEER": self.peer,
            "QREXEC_ACTIVATE_UNIT": self.route.unit,
        }
        return client.order(self.route, own, *ends)

    def _begins(self, pid: int) -> None:
        self._child = Child(pid)
        self.call.begins(trio.current_time())
        self._host.setup_begins(self)

    def adopt(self, pid: int, pidfd: int, age: float) -> None:
        """Take over from an earlier daemon: this qrexec-client-vm, `age`
        seconds old, holds the socket already."""
        self._child = Child(pid, pidfd)
        self.call.adopt(trio.current_time(), age)
        self._host.setup_begins(self)

    async def _started(self) -> Outcome | None:
        """See to it that qrexec-client-vm runs, however long the machine is
        short of something."""
        while self._child is None:
            if not await self._unless_interrupted(self._host.turn, self):
                return self._over(self.call.reason)
            if self.client_is_gone():
                self._host.place_back(self)
                return self._over(Ending.CLIENT_GONE)
            client = self._host.client
            error = start(client, [self]).get(self)
            if error is None:
                break
            if error.errno not in STARVED:
                return self._over(
                    Ending.NOT_STARTED,
                    detail=f"cannot start {client.path}: {error.strerror}; it"
                    " comes with qubes-core-qrexec, --client names another",
                )
            self._host.starved(error)
            if not await self._unless_interrupted(trio.sleep, STARVED_DELAY):
                return self._over(self.call.reason)
        return None

    # ---------------------------------------------------------- without a task

    def go_untended(self) -> bool:
        """Leave a handed-over connection to the kernel until something happens:
        most need no task in all their life.

        Returns False where a task is needed from the beginning.
        """
        if self._child is None or self._splice is not None:
            return False
        try:
            host, pidfd = self._host, self._child.open()
            host.watch(pidfd, select.EPOLLIN, partial(host.child_ended, self))
            gone = partial(host.client_gone, self)
            host.watch(self._sock.fileno(), 0, gone)
        except OSError:
            # Short of descriptors or memory: carry() waits until it can.
            self._end_untended()
            return False
        return True

    def _end_untended(self) -> None:
        self._host.forget(self._sock.fileno())
        if self._child is not None and self._child.pidfd is not None:
            self._host.forget(self._child.pidfd)

    def over_at_once(self) -> Outcome | None:
        """The outcome of a connection whose qrexec-client-vm has just ended
        well, if nothing is left to wait for.

        None where it takes a task to see it through.
        """
        child = self._child
        if child is None:
            return None
        code = child.wait()
        self.look_if_established()
        if not self.call.is_over_at_once(code):
            return None
        outcome = self._over(Ending.CLIENT_EXITED, code)
        self._count_bytes(outcome)
        if not outcome.ends_cleanly:
            return None
        if half_close(self._sock) and not self._is_heard(0.0):
            return None
        self._host.setup_ends(self)
        self.abandon()
        return outcome

    def abandon(self) -> None:
        """Close what is held here; what qrexec-client-vm holds goes on."""
        self._end_untended()
        if self._splice is not None:
            self._splice.close()
        if self._child is not None:
            self._child.close()
        self._sock.close()

    # -------------------------------------------------------------------- life

    async def carry(self) -> None:
        """See the connection through to its end, and close the socket; what
        became of it is its outcome."""
        try:
            self._end_untended()
            self._watch_client()
            self.outcome = await self._tries(pumping=False)
            if self.outcome is None:
                self.outcome = await self._spliced()
            await self._part(self.outcome)
        except BaseException as error:
            # If it is no failure, the daemon ends (Cancelled, perhaps in a
            # group). What qrexec-client-vm holds goes on without it, and what
            # the kernel has arrives; the rest cannot.
            if isinstance(error, Exception):
                self._cut()
            elif self.outcome is None and not self.outlives_daemon:
                self.outcome = self._over(Ending.STOPPED)
                self._cut()
            raise
        finally:
            self._host.setup_ends(self)
            self.abandon()

    def _cut(self) -> None:
        """Leave nothing behind of a connection that cannot go on."""
        if self._child is not None and self._splice is not None:
            with contextlib.suppress(OSError):
                self._child.signal(signal.SIGKILL)
        self._reset()

    async def _part(self, outcome: Outcome) -> None:
        """Let the client see what became of it, as far as it still can."""
        self._count_bytes(outcome)
        if outcome.ending is Ending.CLIENT_GONE:
            return
        if outcome.ends_cleanly:
            await self._farewell()
            self._count_bytes(outcome)
        else:
            self._reset()

    def _reset(self) -> None:
        self._end_untended()
        reset(self._sock)

    def _watch_client(self) -> None:
        """Be told when the client hangs up, unless the machine is too short of
        something even for that."""
        if self._watched or self.call.client_left:
            return
        try:
            self._host.watch(self._sock.fileno(), 0, self._hung_up)
            self._watched = True
        except OSError as error:
            self._host.starved(error)

    def _hung_up(self) -> None:
        self._watched = False
        self.hangs_up()

    async def _unless_interrupted(
        self, wait: Callable[..., Awaitable[object]], *arguments: object
    ) -> bool:
        """Wait; False if interrupt() came first."""
        if self.call.interrupted is not None:
            return False
        with trio.CancelScope() as self._scope:
            await wait(*arguments)
        interrupted = self._scope.cancelled_caught
        self._scope = None
        return not interrupted

    async def _tries(self, *, pumping: bool) -> Outcome | None:
        """Run qrexec-client-vm until the connection is over; None as soon as
        that takes a pump, and none is running."""
        while True:
            if (problem := await self._started()) is not None:
                return problem
            if self._splice is not None and not pumping:
                return None
            child = self._child
            assert child is not None
            ending, code = await self._child_ends(child)
            client = self._host.client
            if (
                self._splice is None
                and client.relay is not Relay.HAND_OVER
                and self.call.takes_no_socket(code)
            ):
                # Pipes are what each one knows.
                client.relay = Relay.SPLICE
                self.call.tries = 0
                continue
            again = self._after_try(ending, code)
            if again is None:
                return self._over(ending, code)
            if not await self._unless_interrupted(trio.sleep, again):
                return self._over(self.call.reason, code)

    def _after_try(self, ending: Ending, code: int | None) -> float | None:
        """In how many seconds to make the call again, now that qrexec-client-vm
        has ended; None: not at all."""
        call, splice = self.call, self._splice
        if (
            splice is not None
            and call.established_at is None
            and has_run(splice.has_moved_data(), code)
        ):
            self._is_established()
        no_room = call.established_at is None and self._host.no_room(
            self, ending, code
        )
        return call.after_try(trio.current_time(), ending, code, no_room)

    async def _child_ends(self, child: Child) -> tuple[Ending, int | None]:
        """Wait until qrexec-client-vm has ended, by itself or because something
        interrupted the connection."""
        self._child_over = trio.Event()
        await self._open_pidfd(child)
        ending = Ending.CLIENT_EXITED
        while not await self._unless_interrupted(self._ended, child):
            self.look_if_established()
            if self.call.takes_back(trio.current_time()):
                # The answer came at the last moment.
                continue
            ending = await self._end(child, self.call.reason)
            break
        code = child.wait()
        self.look_if_established()
        self._host.setup_ends(self)
        child.close()
        self._child = None
        self._child_over.set()
        return ending, code

    async def _open_pidfd(self, child: Child) -> None:
        """Open its pidfd, however long it takes until that is possible: only
        so is its end seen."""
        while True:
            try:
                child.open()
                return
            except OSError as error:
                self._host.starved(error)
                await trio.sleep(STARVED_DELAY)

    async def _ended(self, child: Child) -> None:
        """Wait for its end, and until then for a hang-up to be watched for."""
        while not self._watched and not self.call.client_left:
            with trio.move_on_after(STARVED_DELAY):
                await child.ended()
                return
            self._watch_client()
        await child.ended()

    async def _end(self, child: Child, ending: Ending) -> Ending:
        """End a qrexec-client-vm that is of no use any more, and tell whether
        it did so by itself."""
        if await end(child, ending, self._unread):
            self.look_if_established()
            return self.call.ended_by_itself()
        return ending

    def _unread(self) -> int:
        """How many bytes of the client are still on their way to an established
        call."""
        return self._waiting() if self.look_if_established() else 0

    def _stream_is_ended(self) -> bool:
        """Whether qrexec-client-vm has ended the stream to the client before it
        ended itself; one that was killed, or failed, has not."""
        try:
            self._sock.send(b"", socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError as error:
            # EPIPE: it was shut down. Else the client has gone anyway.
            return not isinstance(error, BlockingIOError)
        return False

    def _over(
        self, ending: Ending, code: int | None = None, detail: str = ""
    ) -> Outcome:
        outcome = self.call.over(trio.current_time(), ending, code, detail)
        if self._splice is None and outcome.may_be_cut:
            outcome.cut = not self._stream_is_ended()
        return outcome

    # ---------------------------------------------------------------- by pipes

    async def _spliced(self) -> Outcome:
        """Carry the connection with the pump running; the pipes last through
        all tries."""
        splice = self._splice
        assert splice is not None
        delivered = trio.Event()

        async def pump(move: Callable[[], Awaitable[None]]) -> bool:
            try:
                await move()
            except ClientGone:
                self.interrupt(Ending.CLIENT_GONE)
                return False
            return True

        async def pump_down() -> None:
            if not await pump(splice.pump_down):
                return
            delivered.set()
            if not await self._ends_with_its_output(splice):
                half_close(self._sock)

        async with trio.open_nursery() as pumps:
            pumps.start_soon(pump, splice.pump_up)
            pumps.start_soon(pump_down)
            outcome = await self._tries(pumping=True)
            assert outcome is not None
            # What qrexec-client-vm wrote last is still in the pipe. Once that
            # is delivered, both sides are done, which looks like a hang-up.
            if outcome.has_run and not (
                await self._unless_interrupted(delivered.wait)
                or delivered.is_set()
            ):
                outcome.ending = self.call.reason
            pumps.cancel_scope.cancel()
        outcome.bytes_to_qube, outcome.bytes_from_qube = (
            splice.to_qube,
            splice.from_qube,
        )
        return outcome

    async def _ends_with_its_output(self, splice: Splice) -> bool:
        """Whether qrexec-client-vm, whose output is over, is ending too: then
        its exit code decides what the client is to see."""
        child, over = self._child, self._child_over
        if child is None or over is None:
            return True
        with trio.move_on_after(output_grace(splice.from_qube > 0)):
            await over.wait()
        if child.is_ending():
            await over.wait()
        return over.is_set() or self.call.interrupted is Ending.STOPPED

    # ----------------------------------------------------------------- the end

    def _count_bytes(self, outcome: Outcome) -> None:
        """Ask the kernel what it moved on a TCP socket that was handed over;
        others it does not count."""
        if not outcome.established or self._splice is not None:
            return
        if self._sock.family not in INTERNET:
            return
        with contextlib.suppress(OSError):
            outcome.count(
                self._sock.getsockopt(
                    socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO.size
                )
            )

    async def _farewell(self) -> None:
        """Half-close, and see what was sent last to the client before closing.
        (Where qrexec-client-vm has shut down both ways, the kernel resets a
        client that goes on sending, whatever is done here.)"""
        if not half_close(self._sock):
            return
        began_at = trio.current_time()
        try:
            while not self._is_heard(trio.current_time() - began_at):
                with trio.move_on_after(FAREWELL_LOOK):
                    if self._splice is None:
                        await trio.sleep_forever()
                    await readable(self._sock.fileno())
        except OSError:
            return
        finally:
            # The kernel goes on, unless close() finds input.
            if unsent(self._sock):
                drop_input(self._sock)

    def _is_heard(self, waited: float) -> bool:
        """Whether the client has all that it will have."""
        sock = self._sock
        stuck = self._splice is None and is_stuck(sock)
        may_send = stuck or drop_input(sock)
        # Other sockets deliver at once.
        tells = sock.family in INTERNET
        return is_heard(waited, may_send, unsent(sock) if tells else 0)


def start(
    client: Client, connections: Sequence[Connection]
) -> dict[Connection, OSError]:
    """Start qrexec-client-vm on each socket, all at once and without a
    checkpoint: between accept and this, nothing may be lost.

    Takes over the places that the caller has taken for them. Returns what went
    wrong, and where; those give their places back.
    """
    orders: dict[Connection, Order] = {}
    problems: dict[Connection, OSError] = {}
    for one in connections:
        try:
            orders[one] = one._order()
        except OSError as error:
            problems[one] = error
    client.start(list(orders.values()))
    for one, order in orders.items():
        try:
            pid = order.pid()
        except OSError as error:
            problems[one] = error
        else:
            one._begins(pid)
    for one in problems:
        one._host.place_back(one)
    return problems
