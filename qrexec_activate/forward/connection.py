"""One connection, from admission to outcome.

accepted → qrexec-client-vm started → established → ended. The accepted socket
itself is handed to qrexec-client-vm, and one duplicate is kept here: its
O_NONBLOCK flag, which belongs to both, tells when the call is established; a
hang-up on it tells that the client has gone. The daemon may end at any time
without the connection noticing. Where qrexec-client-vm cannot take a socket,
its pipes are spliced to it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import select
import signal
import socket
import struct
import termios
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import trio

from ..routing.claim import Route
from .outcome import Ending, Outcome
from .settings import Relay
from .splice import ClientGone, Splice, half_close, unread

if TYPE_CHECKING:
    from types import TracebackType

__all__ = [
    "STARVED",
    "Client",
    "Connection",
    "Host",
    "StartProblem",
    "Starved",
    "reset",
]

#: A call that qrexec could not set up (exit code 1) is tried so often again. On
#: Xen, setting up more than 10 to 25 calls at once fails in this way
#: (QubesOS/qubes-issues 11059), and trying again after a random delay is the
#: cure.
RETRIES = 5
#: The first delay in seconds; it doubles each time, and is randomized by half
#: of itself either way.
RETRY_DELAY = 0.1
#: While the machine is short of descriptors, memory or processes, a start is
#: tried again after so many seconds.
STARVED_DELAY = 0.25
#: A client that hung up leaves qrexec-client-vm so long to end by itself before
#: SIGTERM, and then before SIGKILL.
HANG_UP_GRACE = 2.0
#: As long as bytes that the client had sent are waiting, and for so long after
#: the last of them moved.
STALL_GRACE = 10.0
#: How often to look whether they move.
HANG_UP_LOOK = 0.25
#: How long what was sent may take to reach a client that went on sending after
#: the service had ended.
FAREWELL = 30.0

#: A spliced connection is half-closed so long after the output of
#: qrexec-client-vm, unless it has ended by then.
KILLED_GRACE = 0.02
#: At a stop of the daemon, a spliced qrexec-client-vm has so long between
#: SIGTERM and SIGKILL.
STOP_GRACE = 0.2
#: What is kept of the stderr of a call that shows whether qrexec-client-vm
#: takes a socket.
KEPT_STDERR = 1 << 16
#: How often the farewell looks whether everything has arrived.
FAREWELL_LOOK = 0.05

#: Errors that say that the machine is short of something, and that pass.
STARVED = {
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.EAGAIN,
    errno.ENOBUFS,
}
#: tcpi_state, tcpi_bytes_received, tcpi_bytes_sent and tcpi_bytes_retrans in
#: struct tcp_info (linux/tcp.h, 4.19 up).
_TCP_INFO = struct.Struct("=B127xQ64xQQ")
#: States in which the peer's FIN has come, which the kernel counts as a byte:
#: CLOSE_WAIT, LAST_ACK, CLOSING, TIME_WAIT.
_FIN_RECEIVED = {6, 8, 9, 11}
_TCP_CLOSE = 7
_NO_OPTION = b"unrecognized option"


class StartProblem(Exception):
    """qrexec-client-vm could not be started, and trying again will not help."""


class Starved(Exception):
    """The machine is short of something; later it may work."""


@dataclass(slots=True)
class Client:
    """How to start qrexec-client-vm, and what has been learnt about it."""

    path: str
    relay: Relay
    environment: dict[str, str]
    #: Whether it takes a socket (--use-stdin-socket, since 4.2.19); None until
    #: a call has shown it.
    takes_socket: bool | None = None

    def __post_init__(self) -> None:
        if self.relay is not Relay.AUTO:
            self.takes_socket = self.relay is Relay.HAND_OVER

    def spawn(
        self,
        route: Route,
        environment: dict[str, str],
        stdin: int,
        stdout: int | None,
        stderr: int,
    ) -> int:
        """Start it and return its pid. `stdout` None: stdin is a socket that
        serves both ways."""
        argv = [self.path, route.target, route.call]
        if stdout is None:
            argv.insert(1, "--use-stdin-socket")
        actions: list[tuple[int, ...] | tuple[int, int, str, int, int]] = [
            (os.POSIX_SPAWN_DUP2, stdin, 0)
        ]
        if stdout is None:
            actions.append((os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0))
        else:
            actions.append((os.POSIX_SPAWN_DUP2, stdout, 1))
        if stderr != 2:
            actions.append((os.POSIX_SPAWN_DUP2, stderr, 2))
        try:
            return os.posix_spawnp(
                self.path,
                argv,
                {**self.environment, **environment},
                file_actions=actions,
                # A group of its own: Ctrl-C at a terminal stops the daemon, not
                # the connections.
                setpgroup=0,
                setsigmask=(),
                # Python ignores these two, and an ignored signal stays ignored
                # in a child.
                setsigdef=(signal.SIGPIPE, signal.SIGXFSZ),
            )
        except OSError as error:
            if error.errno in STARVED:
                raise Starved(str(error)) from error
            raise StartProblem(
                f"cannot start {self.path}: {error.strerror}; it comes with"
                f" qubes-core-qrexec, --client names another"
            ) from error


class Host(Protocol):
    """What a connection needs of the daemon."""

    client: Client

    async def take_place(self) -> None:
        """Wait for one of the set-up places."""

    def give_place_back(self) -> None: ...

    def setup_begins(self, connection: Connection) -> None:
        """From now on, look at this connection until it is established: it
        holds a place."""

    def setup_ends(self, connection: Connection) -> None: ...

    def starved(self, error: Starved | OSError) -> None:
        """Say, once, that the machine is short of something."""

    def watch(self, fd: int, events: int, callback: Callable[[], None]) -> None:
        """Call back once, when one of these events, a hang-up or an error
        comes."""

    def forget(self, fd: int) -> None:
        """Call back no more; must come before the descriptor is closed, as a
        duplicate would keep it watched."""

    def child_ended(self, connection: Connection) -> None:
        """The qrexec-client-vm of a connection without a task has ended."""

    def client_gone(self, connection: Connection) -> None:
        """The client of a connection without a task has hung up, or both sides
        are done and it is about to end."""


def _bounded_memory(name: str) -> int:
    """A file in memory that takes no more than KEPT_STDERR: the target qube
    decides how much there is to write.

    Further writes fail, which qrexec-client-vm 4.4.2 takes without ado.
    """
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, KEPT_STDERR)
        fcntl.fcntl(
            fd,
            fcntl.F_ADD_SEALS,
            fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL,
        )
    except BaseException:
        os.close(fd)
        raise
    return fd


def reset(sock: socket.socket) -> None:
    """Close so that the client sees a reset and no clean EOF: it must not take
    a refusal for an empty answer."""
    with contextlib.suppress(OSError):
        sock.setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
        )
    sock.close()


class _Child:
    """A running qrexec-client-vm: a pid that cannot be mistaken for another's,
    and what it said on stderr.

    One that comes with its pidfd was started by an earlier daemon, and is no
    child of this process.
    """

    __slots__ = ("_exit_code", "_pidfd", "_stderr", "adopted", "pid")

    def __init__(
        self, pid: int, stderr: int | None, pidfd: int | None = None
    ) -> None:
        self.pid = pid
        self.adopted = pidfd is not None
        self._pidfd = pidfd
        self._stderr = stderr
        self._exit_code: int | None = None

    def open(self) -> int:
        """Open its pidfd, and return it. The pid stays its own until wait() has
        taken the exit code."""
        if self._pidfd is None:
            self._pidfd = os.pidfd_open(self.pid)
        return self._pidfd

    async def attach(self, starved: Callable[[OSError], None]) -> None:
        """Open its pidfd, however long it takes until there are descriptors
        again."""
        while True:
            try:
                self.open()
                return
            except OSError as error:
                if error.errno not in STARVED:
                    raise
                starved(error)
                await trio.sleep(STARVED_DELAY)

    def forget(self, host: Host) -> None:
        if self._pidfd is not None:
            host.forget(self._pidfd)

    async def ended(self) -> None:
        assert self._pidfd is not None
        await trio.lowlevel.wait_readable(self._pidfd)

    def signal(self, number: signal.Signals) -> None:
        assert self._pidfd is not None
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    def wait(self) -> int | None:
        """Return the exit code of one that has ended, negative for a signal;
        None if only its parent can know."""
        if self._exit_code is None and not self.adopted:
            self._exit_code = os.waitstatus_to_exitcode(
                os.waitpid(self.pid, 0)[1]
            )
        return self._exit_code

    @property
    def kept_stderr(self) -> bool:
        return self._stderr is not None

    def said(self) -> bytes:
        """What it wrote to stderr, where that was kept back; only the
        beginning."""
        if self._stderr is None:
            return b""
        # Its writes have moved the position, which is shared; behind it are the
        # zeros of the bounded memory.
        return os.pread(self._stderr, os.lseek(self._stderr, 0, os.SEEK_CUR), 0)

    def close(self) -> None:
        for fd in (self._pidfd, self._stderr):
            if fd is not None:
                os.close(fd)
        self._pidfd = self._stderr = None

    def __enter__(self) -> _Child:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()


class Connection:
    """An accepted socket on its way to a qube. Owns the socket; carry() closes
    it."""

    __slots__ = (
        "_child",
        "_host",
        "_interrupted",
        "_pumping",
        "_scope",
        "_sock",
        "_splice",
        "accepted_at",
        "began_at",
        "established_at",
        "holds_place",
        "id",
        "lost_at",
        "peer",
        "route",
        "tended",
        "tries",
    )

    def __init__(
        self,
        host: Host,
        route: Route,
        sock: socket.socket,
        number: str,
        peer: str,
    ) -> None:
        self._host = host
        self._sock = sock
        self._splice: Splice | None = None
        self._pumping = False
        self._child: _Child | None = None
        self._scope: trio.CancelScope | None = None
        self._interrupted: Ending | None = None
        self.route = route
        self.id = number
        self.peer = peer
        self.tries = 0
        #: Whether it counts against the set-ups at once; the daemon gives the
        #: place back.
        self.holds_place = False
        self.accepted_at = trio.current_time()
        self.began_at = self.accepted_at
        self.established_at: float | None = None
        #: Whether a task sees it through, with carry().
        self.tended = False
        #: When it will be taken for lost in qrexec; the daemon's to set.
        self.lost_at: float | None = None

    def __str__(self) -> str:
        route = self.route
        return (
            f"{self.id}: {self.peer} on {route.address} → {route.target}"
            f" {route.call}"
        )

    # ------------------------------------------------- what the daemon looks at

    @property
    def pid(self) -> int | None:
        return self._child.pid if self._child else None

    @property
    def handed_over(self) -> bool:
        """Whether it goes on without the daemon: qrexec-client-vm is running
        and holds the socket itself."""
        return self._child is not None and self._splice is None

    def look_if_established(self) -> bool:
        """Ask the kernel whether qrexec-client-vm has begun to move data."""
        if self.established_at is None and self._child is not None:
            if self._splice is not None:
                begun = self._splice.established()
            else:
                begun = bool(
                    fcntl.fcntl(self._sock, fcntl.F_GETFL) & os.O_NONBLOCK
                )
            if begun:
                self.established_at = trio.current_time()
                if self._splice is not None:
                    self._splice.release_child_ends()
                elif self._host.client.takes_socket is None:
                    self._host.client.takes_socket = True
        return self.established_at is not None

    def interrupt(self, ending: Ending) -> None:
        """Stop waiting for qrexec-client-vm, and end the connection (or this
        try of it) for this reason."""
        if self._interrupted is None:
            self._interrupted = ending
        if self._scope is not None:
            self._scope.cancel()

    # ------------------------------------------------------------------ start

    def start(self) -> None:
        """Start qrexec-client-vm on the socket, without a checkpoint: between
        accept and this, nothing may be lost.

        Takes over the set-up place that the caller holds. Raises StartProblem
        or Starved, and has then given it back.
        """
        client = self._host.client
        stderr: int | None = None
        try:
            if client.takes_socket is False and self._splice is None:
                self._splice = Splice(self._sock)
            if client.takes_socket is None:
                # One that does not know --use-stdin-socket says so on stderr,
                # which is nothing for a user to see.
                stderr = _bounded_memory("qrexec-client-vm stderr")
            own = {
                "QREXEC_ACTIVATE_CONNECTION": self.id,
                "QREXEC_ACTIVATE_LISTENER": self.route.address,
                "QREXEC_ACTIVATE_PEER": self.peer,
                "QREXEC_ACTIVATE_UNIT": self.route.unit,
            }
            if self._splice is not None:
                pid = client.spawn(
                    self.route,
                    own,
                    self._splice.child_stdin,
                    self._splice.child_stdout,
                    2,
                )
            else:
                pid = client.spawn(
                    self.route,
                    own,
                    self._sock.fileno(),
                    None,
                    2 if stderr is None else stderr,
                )
        except BaseException as error:
            if stderr is not None:
                os.close(stderr)
            self._host.give_place_back()
            if isinstance(error, OSError) and error.errno in STARVED:
                raise Starved(str(error)) from error
            raise
        self._child = _Child(pid, stderr)
        self.tries += 1
        self.began_at = trio.current_time()
        self.lost_at = None
        self.holds_place = True
        self._host.setup_begins(self)

    def adopt(self, pid: int, pidfd: int, age: float) -> None:
        """Take over from an earlier daemon: this qrexec-client-vm, `age`
        seconds old, holds the socket already."""
        self._child = _Child(pid, None, pidfd)
        self.tries = 1
        self.accepted_at = self.began_at = trio.current_time() - age
        self._host.setup_begins(self)

    async def _started(self) -> Outcome | None:
        """See to it that qrexec-client-vm runs, however long the machine is
        short of something."""
        while self._child is None:
            if not await self._unless_interrupted(self._host.take_place):
                return self._over(self._reason())
            try:
                self.start()
            except StartProblem as problem:
                return self._over(Ending.NOT_STARTED, detail=str(problem))
            except Starved as error:
                self._host.starved(error)
                if not await self._unless_interrupted(
                    trio.sleep, STARVED_DELAY
                ):
                    return self._over(self._reason())
        return None

    # ----------------------------------------------------------- without a task

    def go_untended(self) -> bool:
        """Leave a handed-over connection to the kernel until something happens:
        most need no task in all their life.

        Returns False where a task is needed from the beginning.
        """
        if not self.handed_over or self._child is None:
            return False
        try:
            pidfd = self._child.open()
            self._host.watch(pidfd, select.EPOLLIN, self._call_child_ended)
            self._host.watch(self._sock.fileno(), 0, self._call_client_gone)
        except OSError:
            # Short of descriptors or memory: carry() waits until it can.
            self._end_untended()
            return False
        return True

    def _call_child_ended(self) -> None:
        self._host.child_ended(self)

    def _call_client_gone(self) -> None:
        self._host.client_gone(self)

    def _end_untended(self) -> None:
        self._host.forget(self._sock.fileno())
        if self._child is not None:
            self._child.forget(self._host)

    def over_at_once(self) -> Outcome | None:
        """The outcome of a connection whose qrexec-client-vm has just ended
        well, if nothing is left to wait for.

        None where it takes a task to see it through; nothing has been decided
        then.
        """
        child = self._child
        if child is None or child.kept_stderr or self._interrupted is not None:
            return None
        code = child.wait()
        if code is None or code < 0 or not self.look_if_established():
            return None
        with contextlib.suppress(OSError):
            if (
                half_close(self._sock)
                and _drop_input(self._sock)
                and _unsent(self._sock)
            ):
                return None
        self._host.setup_ends(self)
        outcome = self._over(Ending.CLIENT_EXITED, code)
        self._count_bytes(outcome)
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

    # ------------------------------------------------------------------ life

    async def carry(self) -> Outcome:
        """See the connection through to its end, close the socket, and tell
        what became of it."""
        try:
            self._end_untended()
            self._host.watch(self._sock.fileno(), 0, self._hung_up)
            outcome = await self._tries()
            if outcome is None:
                outcome = await self._spliced()
            if (
                outcome.ending is Ending.CLIENT_EXITED
                and outcome.established
                and (outcome.exit_code or 0) >= 0
            ):
                await self._farewell()
                self._count_bytes(outcome)
            else:
                self._count_bytes(outcome)
                if outcome.ending is not Ending.CLIENT_GONE:
                    self._reset()
            return outcome
        except trio.Cancelled:
            # The daemon ends. What qrexec-client-vm holds goes on without it;
            # the rest cannot.
            if not self.handed_over:
                self._reset()
            raise
        finally:
            self._host.setup_ends(self)
            self.abandon()

    def _reset(self) -> None:
        self._end_untended()
        reset(self._sock)

    def _hung_up(self) -> None:
        self.interrupt(Ending.CLIENT_GONE)

    def _reason(self) -> Ending:
        return self._interrupted or Ending.CLIENT_EXITED

    async def _unless_interrupted(
        self, wait: Callable[..., Awaitable[object]], *arguments: object
    ) -> bool:
        """Wait; False if interrupt() came first."""
        if self._interrupted is not None:
            return False
        with trio.CancelScope() as self._scope:
            await wait(*arguments)
        interrupted = self._scope.cancelled_caught
        self._scope = None
        return not interrupted

    async def _tries(self) -> Outcome | None:
        """Run qrexec-client-vm until the connection is over; None as soon as
        that takes a pump, and none is running."""
        while True:
            if (problem := await self._started()) is not None:
                return problem
            if self._splice is not None and not self._pumping:
                return None
            child = self._child
            assert child is not None
            ending, code = await self._child_ends(child)
            if self._splice is None and self._learn(child, code):
                # This qrexec-client-vm takes no socket. Nothing was read from
                # the client, so pipes can do it.
                self._host.client.takes_socket = False
                self._drop_child()
                self.tries = 0
                continue
            lost = ending is Ending.LOST and not child.adopted
            refused_for_now = ending is Ending.CLIENT_EXITED and code == 1
            if (
                self.established_at is not None
                or self.tries > RETRIES
                or not (lost or refused_for_now)
            ):
                return self._over(ending, code)
            self._drop_child()
            self._interrupted = None if lost else self._interrupted
            delay = (
                0.0
                if lost
                else RETRY_DELAY
                * 2 ** (self.tries - 1)
                * random.uniform(0.5, 1.5)
            )
            if not await self._unless_interrupted(trio.sleep, delay):
                return self._over(self._reason(), code)

    def _learn(self, child: _Child, code: int | None) -> bool:
        """Find out from a first call whether qrexec-client-vm takes a socket;
        True if it does not.

        What it said on stderr was kept back until now, and is passed on.
        """
        said = child.said()
        if (
            # Not whether that is known by now: several first calls may be under
            # way.
            child.kept_stderr
            and self.established_at is None
            and code == 2
            and _NO_OPTION in said
            and b"use-stdin-socket" in said
        ):
            return True
        if (
            self._host.client.takes_socket is None
            and code is not None
            and code >= 0
            and code != 2
        ):
            self._host.client.takes_socket = True
        if said:
            with contextlib.suppress(OSError):
                os.write(2, said)
        return False

    def _drop_child(self) -> None:
        if self._child is not None:
            self._child.close()
            self._child = None

    async def _child_ends(self, child: _Child) -> tuple[Ending, int | None]:
        """Wait until qrexec-client-vm has ended, by itself or because something
        interrupted the connection."""
        await child.attach(self._host.starved)
        ending = Ending.CLIENT_EXITED
        while not await self._unless_interrupted(child.ended):
            ending = self._reason()
            if (
                ending in (Ending.TIMED_OUT, Ending.LOST)
                and self.look_if_established()
            ):
                # The answer came at the last moment.
                self._interrupted = None
                ending = Ending.CLIENT_EXITED
                continue
            ending = await self._end(child, ending)
            break
        code = child.wait()
        self.look_if_established()
        self._host.setup_ends(self)
        return ending, code

    async def _end(self, child: _Child, ending: Ending) -> Ending:
        """End a qrexec-client-vm that is of no use any more, and tell whether
        it did so by itself."""
        try:
            if ending is Ending.CLIENT_GONE and await self._ends_by_itself(
                child
            ):
                return (
                    Ending.CLIENT_EXITED
                    if self.look_if_established()
                    else ending
                )
            if ending is not Ending.LOST:
                child.signal(signal.SIGTERM)
                with trio.move_on_after(
                    HANG_UP_GRACE
                    if ending is not Ending.STOPPED
                    else STOP_GRACE
                ):
                    await child.ended()
                    return ending
            child.signal(signal.SIGKILL)
            await child.ended()
        except trio.Cancelled:
            child.signal(signal.SIGKILL)
            raise
        return ending

    async def _ends_by_itself(self, child: _Child) -> bool:
        """Wait for a qrexec-client-vm whose client has gone; False if it is of
        no use to wait longer.

        It ends by itself in all cases but one: a service that goes on sending
        it drains for ever, at most of a CPU. What the client sent before it
        went is to arrive first, however slowly, as long as it moves at all.
        """
        left = self._unread()
        moved_at = trio.current_time()
        while True:
            with trio.move_on_after(HANG_UP_LOOK):
                await child.ended()
                return True
            before, left = left, self._unread()
            if left < before:
                moved_at = trio.current_time()
            if trio.current_time() - moved_at >= (
                STALL_GRACE if left else HANG_UP_GRACE
            ):
                return False

    def _unread(self) -> int:
        """How many bytes of the client are still on their way to an established
        call."""
        if not self.look_if_established():
            return 0
        with contextlib.suppress(OSError):
            return unread(self._sock.fileno()) + (
                self._splice.unread() if self._splice else 0
            )
        return 0

    def _over(
        self, ending: Ending, code: int | None = None, detail: str = ""
    ) -> Outcome:
        now = trio.current_time()
        # When an earlier daemon's call was established, it knew.
        adopted = self._child is not None and self._child.adopted
        return Outcome(
            ending,
            self.established_at is not None,
            duration=now - self.accepted_at,
            setup=None
            if self.established_at is None or adopted
            else self.established_at - self.began_at,
            exit_code=code,
            tries=self.tries,
            detail=detail,
        )

    # ----------------------------------------------------------------- by pipes

    async def _spliced(self) -> Outcome:
        """Carry the connection with the pump running; the pipes last through
        all tries."""
        splice = self._splice
        assert splice is not None
        self._pumping = True
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
            # If qrexec-client-vm was killed, its end follows at once, and what
            # is cut off must not look like an end.
            await trio.sleep(KILLED_GRACE)
            if self._interrupted is not Ending.STOPPED:
                half_close(self._sock)

        async with trio.open_nursery() as pumps:
            pumps.start_soon(pump, splice.pump_up)
            pumps.start_soon(pump_down)
            outcome = await self._tries()
            assert outcome is not None
            over = (
                outcome.established and outcome.ending is Ending.CLIENT_EXITED
            )
            # What qrexec-client-vm wrote last is still in the pipe. Once that
            # is delivered, both sides are done, which looks like a hang-up.
            if over and not (
                await self._unless_interrupted(delivered.wait)
                or delivered.is_set()
            ):
                outcome.ending = self._reason()
            pumps.cancel_scope.cancel()
        outcome.bytes_to_qube, outcome.bytes_from_qube = (
            splice.to_qube,
            splice.from_qube,
        )
        return outcome

    # ------------------------------------------------------------------ the end

    def _count_bytes(self, outcome: Outcome) -> None:
        """Ask the kernel what it moved on a TCP socket that was handed over;
        others it does not count."""
        if not outcome.established or outcome.bytes_to_qube is not None:
            return
        if self._sock.family not in (socket.AF_INET, socket.AF_INET6):
            return
        with contextlib.suppress(OSError, struct.error):
            info = self._sock.getsockopt(
                socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size
            )
            state, received, sent, sent_again = _TCP_INFO.unpack(info)
            closed = (
                state == _TCP_CLOSE and outcome.ending is Ending.CLIENT_EXITED
            )
            outcome.bytes_to_qube = received - (
                state in _FIN_RECEIVED or closed
            )
            outcome.bytes_from_qube = sent - sent_again

    async def _farewell(self) -> None:
        """Half-close, and see what was sent last to the client before closing.

        Closing a TCP socket with unread input, or input that comes later, sends
        a reset that destroys what the client has not read yet. So what the
        client still sends is dropped here until it has everything.
        """
        if not half_close(self._sock):
            return
        with trio.move_on_after(FAREWELL), contextlib.suppress(OSError):
            while _drop_input(self._sock) and _unsent(self._sock):
                with trio.move_on_after(FAREWELL_LOOK):
                    await trio.lowlevel.wait_readable(self._sock)


#: Where dropped bytes go.
_NOWHERE = bytearray(1 << 16)


def _drop_input(sock: socket.socket) -> bool:
    """Take and drop what has come; False once the client has half-closed."""
    for _ in range(64):
        try:
            if not sock.recv_into(_NOWHERE, 0, socket.MSG_DONTWAIT):
                return False
        except BlockingIOError:
            return True
    return True


def _unsent(sock: socket.socket) -> int:
    """How many bytes a TCP client's kernel has yet to acknowledge; other
    sockets deliver at once."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return 0
    return int(
        struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, b"\0" * 4))[0]
    )
