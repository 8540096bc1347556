"""Every call of the daemon to the kernel that can fail is made to fail, one
after the other, with every error that its manual page names.

The daemon runs in this process on real sockets, with real processes in the
place of qrexec-client-vm that do what the scenario says, on a clock that jumps
from one wait to the next: a run is repeatable, and takes some milliseconds.
First the scenario runs undisturbed, and says how often it makes each call. Then
it runs so that each of these calls fails once, and each error comes once (with
FAULTS=all, each call with each error: some minutes); and again with errors that
last. Whatever fails: nothing is left open and no process behind, no
connection is lost but the one that was hit, which sees a reset and not an empty
answer, whoever comes later is served, nobody spins, and the log says it in one
line.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import itertools
import os
import random
import re
import select
import signal
import socket
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import trio
from scenario import vanish
from trio._core import _run
from trio.testing import MockClock

from qrexec_activate.forward import child, daemon, orphans
from qrexec_activate.forward.daemon import Daemon
from qrexec_activate.forward.settings import Relay, Settings
from qrexec_activate.routing.claim import PassedSocket, Refusal, Route
from qrexec_activate.systemd.journal import Log, Priority

#: What the manual pages name (Linux man-pages 6), but for EINTR, after which
#: Python calls again by itself.
ERRORS = {
    # accept(2), with what the network may have to say, and other kernels.
    "accept": "EAGAIN EBADF ECONNABORTED EFAULT EINVAL EMFILE ENFILE ENOBUFS"
    " ENOMEM ENOTSOCK EOPNOTSUPP EPERM EPROTO ENETDOWN ENOPROTOOPT EHOSTDOWN"
    " ENONET EHOSTUNREACH ENETUNREACH ENOSR ESOCKTNOSUPPORT EPROTONOSUPPORT"
    " ETIMEDOUT",
    # posix_spawn(3): fork(2), execve(2), dup2(2), open(2).
    "spawn": "EAGAIN ENOMEM ENOSYS E2BIG EACCES EFAULT EINVAL EIO EISDIR"
    " ELIBBAD ELOOP EMFILE ENAMETOOLONG ENFILE ENOENT ENOEXEC ENOTDIR EPERM"
    " ETXTBSY EBADF EBUSY",
    "pidfd_open": "EINVAL EMFILE ENFILE ENODEV ENOMEM ESRCH",
    # epoll_ctl(2), by what is asked for.
    "epoll_add": "EBADF EEXIST EINVAL ELOOP ENOMEM ENOSPC EPERM",
    "epoll_del": "EBADF EINVAL ENOENT EPERM",
    # trio's own epoll_ctl: what it may say of a descriptor that is one.
    "wait": "ENOMEM ENOSPC",
    # fcntl(2), by what is asked for. (To F_GETFL the page has no answer but
    # EBADF, for what is no open descriptor.)
    "F_SETFL": "EBADF EPERM",
    "F_SETPIPE_SZ": "EBADF EBUSY EINVAL ENOMEM EPERM",
    "pipe2": "EFAULT EINVAL EMFILE ENFILE ENOPKG",
    # splice(2), and what a socket says to recv(2) and send(2).
    "splice": "EAGAIN EBADF EINVAL ENOMEM ESPIPE ECONNRESET EHOSTUNREACH"
    " ETIMEDOUT",
    "setsockopt": "EBADF EFAULT EINVAL ENOPROTOOPT ENOTSOCK ENOMEM ENOBUFS",
    "shutdown": "EBADF EINVAL ENOTCONN ENOTSOCK",
}
#: Errors of accept(2) with which a connection leaves the queue: tcp(7), and
#: accept(2) on error handling.
OF_THE_CONNECTION = {
    "ECONNABORTED",
    "EPROTO",
    "ENETDOWN",
    "ENOPROTOOPT",
    "EHOSTDOWN",
    "ENONET",
    "EHOSTUNREACH",
    "EOPNOTSUPP",
    "ENETUNREACH",
    "ETIMEDOUT",
}
#: What an error says is so already.
AFTER_ALL = {("epoll_add", "EEXIST")}
#: After these a listener is none any more, and it is given up.
OF_THE_LISTENER = {"EBADF", "EFAULT", "EINVAL", "ENOTSOCK"}
#: What passes, as the machine is short of something.
SHORTAGE = {"EAGAIN", "EMFILE", "ENFILE", "ENOBUFS", "ENOMEM", "ENOSPC"}

COMMANDS = {
    getattr(fcntl, name): name for name in ERRORS if name.startswith("F_")
}
#: What may be so for a while.
LASTS = {"EMFILE", "ENFILE", "ENOBUFS", "ENOMEM", "ENOSPC", "EPERM"}
MAY_LAST = {
    "accept",
    "spawn",
    "pidfd_open",
    "epoll_add",
    "wait",
    "pipe2",
    "splice",
}
#: The same in all scenarios.
ELSEWHERE = {"accept", "spawn"}

QUESTION, ANSWER = b"question" * 100, b"answer" * 100
#: Says that it is there, and ends with the code that it is told.
PUPPET = "echo >&8; read code <&9; exit ${code:-0}"
#: By the daemon's clock; longer than anything that it waits for.
FOREVER = 3600.0
#: So many turns are taken only by who spins.
SPINS = 20_000
#: How long an error lasts that does.
LASTING = 8.0
#: So many real seconds are needed by no run, however busy the machine is.
HANGS = 60
PREFIX = "qrexec_activate.forward"


def no_thread(*_: object) -> None:
    raise RuntimeError("can't start new thread")


class Faults:
    """Counts the calls of the daemon's modules, and lets some fail."""

    def __init__(
        self,
        name: str = "",
        nth: int = 0,
        error: str = "",
        lasting: float = 0.0,
    ) -> None:
        self.calls: Counter[str] = Counter()
        self.name = name
        self.nth = nth
        self.error = error
        self.lasting = lasting
        self._until: float | None = None
        self.failed = 0

    def __str__(self) -> str:
        return f"{self.name} {self.nth} {self.error}"

    def hits(self, name: str) -> OSError | None:
        """Count a call; what it is to fail with."""
        self.calls[name] += 1
        if name != self.name or self.calls[name] < self.nth:
            return None
        if self._until is None:
            self._until = trio.current_time() + self.lasting
        elif trio.current_time() >= self._until:
            return None
        self.failed += 1
        number = getattr(errno, self.error)
        return OSError(number, os.strerror(number))

    def wrap(self, fixed: str, genuine: Callable[..., Any]) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            module = sys._getframe(1).f_globals["__name__"]
            name = fixed or COMMANDS.get(arguments[1], "F_GETFL")
            if module.startswith(PREFIX) and (error := self.hits(name)):
                if (name, self.error) in AFTER_ALL or name == "epoll_del":
                    genuine(*arguments, **named)
                elif name == "accept" and self.error in OF_THE_CONNECTION:
                    taken, _ = genuine(*arguments)
                    taken.setsockopt(
                        socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0" * 2
                    )
                    taken.close()
                raise error
            return genuine(*arguments, **named)

        return call

    def install(self, patch: pytest.MonkeyPatch, qrexec: Qrexec) -> None:
        for owner, function, name in (
            (socket.socket, "accept", "accept"),
            (socket.socket, "setsockopt", "setsockopt"),
            (socket.socket, "shutdown", "shutdown"),
            (os, "pidfd_open", "pidfd_open"),
            (os, "pipe2", "pipe2"),
            (os, "splice", "splice"),
            (os, "set_blocking", "F_SETFL"),
            (fcntl, "fcntl", ""),
            (trio.lowlevel, "wait_readable", "wait"),
            (trio.lowlevel, "wait_writable", "wait"),
        ):
            patch.setattr(
                owner, function, self.wrap(name, getattr(owner, function))
            )
        patch.setattr(os, "posix_spawnp", self.wrap("spawn", qrexec.spawn))
        # One after the other, in this thread.
        patch.setattr(trio.lowlevel, "start_thread_soon", no_thread)
        make = select.epoll

        class Epoll:
            """An epoll whose epoll_ctl may fail."""

            def __init__(this) -> None:
                inner = make()
                this.poll, this.close = inner.poll, inner.close
                this.fileno = inner.fileno
                this.register = self.wrap("epoll_add", inner.register)
                this.unregister = self.wrap("epoll_del", inner.unregister)

        def epoll() -> object:
            # trio has one of its own.
            ours = sys._getframe(1).f_globals["__name__"].startswith(PREFIX)
            return Epoll() if ours else make()

        patch.setattr(select, "epoll", epoll)


class Turns(trio.abc.Instrument):
    """Counts what a spinning daemon would do without end."""

    def __init__(self) -> None:
        self.count = 0
        self.stop: Callable[[], None]

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.count += 1
        if self.count == SPINS:
            self.stop()


class Records(Log):
    """The daemon's records, kept."""

    def __init__(self) -> None:
        self.lines: list[tuple[Priority, str, bool]] = []

    def __call__(
        self, priority: Priority, message: str, **fields: object
    ) -> None:
        self.lines.append((priority, message, "OUTCOME" in fields))


@dataclass(eq=False)
class Running:
    """A process in the place of qrexec-client-vm."""

    pid: int
    stdin: int
    stdout: int
    orders: int
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)

    def exits(self, code: int) -> None:
        """End; on return it has ended, in no time by the daemon's clock."""
        os.write(self.orders, f"{code}\n".encode())
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        self.close()

    def close(self) -> None:
        for fd in (self.stdin, self.stdout, self.orders):
            if fd >= 0:
                os.close(fd)
        self.stdin = self.stdout = self.orders = -1

    def has_ended(self) -> bool:
        flags = os.WEXITED | os.WNOWAIT | os.WNOHANG
        try:
            return os.waitid(os.P_PID, self.pid, flags) is not None
        except ChildProcessError:
            return True

    def reap(self) -> bool:
        """Leave nothing of it; whether there was something to leave."""
        self.close()
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            return True
        return False


class Qrexec:
    """Starts the processes, and does for them what they would do. How they do
    it depends on the target."""

    def __init__(self) -> None:
        self.nursery: trio.Nursery
        self.running: list[Running] = []
        self._failed: set[str] = set()
        self._send_signal = signal.pidfd_send_signal

    def spawn(
        self,
        path: str,
        argv: list[str],
        environment: dict[str, str],
        *,
        file_actions: list[Any],
        **options: Any,
    ) -> int:
        given = {
            action[2]: action[1]
            for action in file_actions
            if action[0] == os.POSIX_SPAWN_DUP2
        }
        reader, writer = os.pipe()
        up, ready = os.pipe()
        pid = os.posix_spawn(
            "/bin/sh",
            ["sh", "-c", PUPPET, *argv],
            environment,
            file_actions=[
                *file_actions,
                (os.POSIX_SPAWN_DUP2, ready, 8),
                (os.POSIX_SPAWN_DUP2, reader, 9),
            ],
            **options,
        )
        os.close(reader)
        os.close(ready)
        # Until it runs, it holds copies of all descriptors.
        os.read(up, 1)
        os.close(up)
        running = Running(
            pid,
            os.dup(given[0]),
            os.dup(given.get(1, given[0])),
            writer,
        )
        self.running.append(running)
        handed_over = argv[1] == "--use-stdin-socket"
        who = environment["QREXEC_ACTIVATE_CONNECTION"]
        self.nursery.start_soon(self._act, running, argv[-2], handed_over, who)
        return pid

    async def _act(
        self, one: Running, target: str, handed_over: bool, who: str
    ) -> None:
        # A descriptor is closed when nobody waits for it any more.
        with contextlib.closing(one), one.scope:
            await trio.sleep(0.001)
            if target == "old" and handed_over:
                one.exits(2)
                return
            if target == "fails-once" and who not in self._failed:
                self._failed.add(who)
                one.exits(1)
                return
            if target == "denies":
                one.exits(126)
                return
            os.set_blocking(one.stdin, False)
            os.set_blocking(one.stdout, False)
            heard = b""
            while chunk := await self._read(one.stdin):
                heard += chunk
            if target == "endless":
                await trio.sleep_forever()
            if target == "later":
                await trio.sleep(15)
            if heard != QUESTION:
                one.exits(3)
                return
            # Nobody may be there any more.
            with contextlib.suppress(OSError):
                os.write(one.stdout, ANSWER)
                if handed_over:
                    with socket.socket(fileno=os.dup(one.stdin)) as sock:
                        sock.shutdown(socket.SHUT_WR)
            one.exits(0)

    async def _read(self, fd: int) -> bytes:
        while True:
            try:
                return os.read(fd, 200)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(fd)
            except OSError:
                return b""

    def signal(self, pidfd: int, number: int) -> None:
        """Send a signal, and let who dies of it be dead in no time by the
        daemon's clock."""
        self._send_signal(pidfd, number)
        select.select([pidfd], [], [])
        for one in self.running:
            if one.has_ended():
                one.scope.cancel()


@dataclass
class World:
    """One run: a daemon, its clients, and what became of them."""

    faults: Faults
    records: Records = field(default_factory=Records)
    turns: Turns = field(default_factory=Turns)
    qrexec: Qrexec = field(default_factory=Qrexec)
    #: What each client has seen.
    seen: list[str] = field(default_factory=list)
    listeners: dict[str, socket.socket] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    nursery: trio.Nursery = field(init=False)
    daemons: int = 0
    #: Processes that still run when all should be over.
    alive: int = 0
    #: Clients that do not wait for their answer.
    left: int = 0

    def daemon(self, relay: Relay, targets: str) -> Daemon:
        """A daemon on the listeners of these targets, which stay open."""
        made = Daemon(
            "qubes.ConnectTCP", Settings(relay=relay, client="/c"), self.records
        )
        sockets, claims = [], []
        for target in targets.split():
            if target not in self.listeners:
                self.listeners[target] = socket.create_server(("127.0.0.1", 0))
            listener = self.listeners[target]
            port = listener.getsockname()[1]
            written = f"127.0.0.1:{port}"
            sockets.append(
                PassedSocket(
                    os.dup(listener.fileno()), target, "Stream", written
                )
            )
            claims.append(
                Refusal(written, "it names no qube")
                if target == "refused"
                else Route(written, target, "qubes.ConnectTCP", "80")
            )
        made.add_listeners(sockets, claims)
        return made

    def connect(self, target: str) -> trio.SocketStream:
        """Connect in no time by the daemon's clock."""
        listener = self.listeners[target]
        sock = socket.create_connection(listener.getsockname(), 60)
        # A busy kernel may take its time between the two.
        assert select.select([listener], [], [], 60)[0]
        sock.setblocking(False)
        return trio.SocketStream(trio.socket.from_stdlib_socket(sock))

    async def ask(self, target: str) -> None:
        """Be a client, and note what it sees."""
        number = len(self.seen)
        self.seen.append(f"{target}: still waiting")
        with trio.move_on_after(FOREVER / 10):
            stream = self.connect(target)
            self.seen[number] = f"{target}: {await self._asks(stream)}"
        stream.socket.close()

    async def _asks(self, stream: trio.SocketStream) -> str:
        received = b""
        try:
            await stream.send_all(QUESTION)
            await stream.send_eof()
            async for chunk in stream:
                received += chunk
        except (trio.BrokenResourceError, OSError) as error:
            cause = error.__cause__ or error
            assert isinstance(cause, OSError)
            # The other two: it came before the question was out.
            gone = (errno.ECONNRESET, errno.ENOTCONN, errno.EPIPE)
            return "reset" if cause.errno in gone else repr(cause)
        if received == ANSWER:
            return "served"
        return "an empty answer" if not received else "part of an answer"

    async def leave(self, target: str, after: float) -> None:
        """Be a client that goes without waiting for its answer."""
        self.left += 1
        stream = self.connect(target)
        with contextlib.suppress(trio.BrokenResourceError):
            await stream.send_all(QUESTION)
        await trio.sleep(after)
        vanish(stream)

    @contextlib.asynccontextmanager
    async def serving(self, relay: Relay, targets: str) -> AsyncIterator[None]:
        """A daemon, until it is stopped as systemd stops it."""
        daemon = self.daemon(relay, targets)
        self.daemons += 1
        over = trio.Event()

        async def run() -> None:
            try:
                await daemon.run()
            except Exception as error:
                self.problems.append(f"the daemon ends: {error!r}")
            over.set()

        self.nursery.start_soon(run)
        await trio.testing.wait_all_tasks_blocked()
        yield
        if not over.is_set():
            os.kill(os.getpid(), signal.SIGTERM)
            with trio.move_on_after(FOREVER):
                await over.wait()
                return
            self.problems.append("the daemon does not end")

    async def settles(self, idle: int) -> None:
        """When all is over: nothing is held, and whoever comes is served."""
        await trio.sleep(60)
        if (left := open_descriptors() - idle) != 0:
            self.problems.append(f"{left} descriptors are held")
        await self.ask("echo")
        await trio.sleep(60)

    async def play(self, scenario: Callable[[World], Awaitable[None]]) -> None:
        async with trio.open_nursery() as self.nursery:
            self.qrexec.nursery = self.nursery
            self.turns.stop = self.nursery.cancel_scope.cancel
            with trio.move_on_after(FOREVER):
                await scenario(self)
            self.alive = sum(not one.has_ended() for one in self.qrexec.running)
            self.nursery.cancel_scope.cancel()

    def duplicate(self, pidfd: int, fd: int) -> int:
        """What pidfd_getfd does, which some containers refuse."""
        with open(f"/proc/self/fdinfo/{pidfd}", encoding="ascii") as lines:
            pid = int(re.search(r"^Pid:\s*(\d+)", lines.read(), re.M)[1])
        (one,) = (one for one in self.qrexec.running if one.pid == pid)
        return os.dup(one.stdin)

    def warnings(self) -> int:
        return sum(
            priority <= Priority.NOTICE for priority, *_ in self.records.lines
        )

    def ended_well(self) -> int:
        return sum(": ended" in message for _, message, _ in self.records.lines)

    def close(self) -> None:
        for one in self.qrexec.running:
            # Those of an earlier daemon have nobody here to reap them.
            if one.reap() and self.daemons == 1:
                self.problems.append("a process is left")
        for listener in self.listeners.values():
            listener.close()


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


# --------------------------------------------------------------- the scenarios


async def calls(world: World, relay: Relay) -> None:
    """Calls that go well, fail at first, are refused, and go on without end."""
    targets = "echo fails-once denies endless refused"
    async with world.serving(relay, targets):
        idle = open_descriptors()
        async with trio.open_nursery() as clients:
            for target in "echo", "fails-once", "denies", "refused", "echo":
                clients.start_soon(world.ask, target)
                await trio.sleep(0.0005)
            clients.start_soon(world.leave, "endless", 0.5)
            clients.start_soon(world.leave, "echo", 0.0)
        await world.settles(idle)


async def hand_over(world: World) -> None:
    await calls(world, Relay.HAND_OVER)


async def splice(world: World) -> None:
    await calls(world, Relay.SPLICE)


async def first_calls(world: World) -> None:
    """Calls that show what qrexec-client-vm can do."""
    async with world.serving(Relay.AUTO, "old echo"):
        idle = open_descriptors()
        async with trio.open_nursery() as clients:
            for target in "old", "old", "echo":
                clients.start_soon(world.ask, target)
                await trio.sleep(0.0005)
        await world.settles(idle)


async def takes_socket(world: World) -> None:
    async with world.serving(Relay.AUTO, "echo"):
        idle = open_descriptors()
        for _ in range(2):
            await world.ask("echo")
        await world.settles(idle)


async def adopted(world: World) -> None:
    """Calls that outlive their daemon."""
    async with trio.open_nursery() as clients:
        async with world.serving(Relay.HAND_OVER, "later endless"):
            clients.start_soon(world.ask, "later")
            clients.start_soon(world.ask, "later")
            clients.start_soon(world.leave, "endless", 20)
            await trio.sleep(10)
        async with world.serving(Relay.HAND_OVER, "later echo"):
            await trio.sleep(60)
            await world.ask("echo")


SCENARIOS = {
    one.__name__: one
    for one in (hand_over, splice, first_calls, takes_socket, adopted)
}


def hangs(*_: object) -> None:
    raise TimeoutError(
        f"it hangs, after {HANGS} seconds of no clock's but ours"
    )


def run(name: str, faults: Faults, patch: pytest.MonkeyPatch) -> World:
    world = World(faults)
    before = open_descriptors()
    with patch.context() as context:
        context.setattr(signal, "pidfd_send_signal", world.qrexec.signal)
        context.setattr(daemon.Census, "others", lambda self, ours: 0)
        # Who goes on without end drains a service, at all of a CPU.
        context.setattr(child.Child, "cpu_time", lambda _: trio.current_time())
        context.setattr(
            orphans,
            "_members",
            lambda: [one.pid for one in world.qrexec.running],
        )
        context.setattr(orphans, "_has_daemon", lambda *_: False)
        context.setattr(orphans, "_duplicate", world.duplicate)
        faults.install(context, world.qrexec)
        # Else the order of tasks is random.
        context.setattr(_run, "_ALLOW_DETERMINISTIC_SCHEDULING", True)
        context.setattr(_run, "_r", random.Random(11))
        # For a daemon that has ended before it is told to.
        earlier = signal.signal(signal.SIGTERM, lambda *_: None)
        # Ends what blocks or spins without a turn, where no clock of the
        # daemon's would help.
        alarm = signal.signal(signal.SIGALRM, hangs)
        signal.alarm(HANGS)
        try:
            trio.run(
                world.play,
                SCENARIOS[name],
                clock=MockClock(autojump_threshold=0),
                instruments=[world.turns],
            )
        except BaseException as error:
            world.problems.append(f"it ends with {error!r}")
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, alarm)
            signal.signal(signal.SIGTERM, earlier)
    world.close()
    if world.problems:
        # What failed is not to be taken for a leak of the next run.
        gc.collect()
    elif (left := open_descriptors() - before) != 0:
        world.problems.append(f"{left} descriptors stay open")
    return world


def judge(base: World, world: World) -> Iterator[str]:
    """Say what a disturbed run did that it must not do."""
    faults = world.faults
    yield from world.problems
    if not faults.failed:
        yield "nothing has failed"
    messages = [message for _, message, _ in world.records.lines]
    # What no daemon can adopt outlives its client, too; it says so. And one
    # that is said to have gone, as the kernel says of none that runs.
    unwatched = faults.name == "pidfd_open" and (
        faults.error == "ESRCH"
        or (
            faults.error not in SHORTAGE
            and any("go on, unwatched" in message for message in messages)
        )
    )
    if world.alive and not unwatched:
        yield f"{world.alive} processes still run"
    if len(world.seen) < len(base.seen):
        return
    given_up = faults.name == "accept" and faults.error in OF_THE_LISTENER
    harmless = faults.error in SHORTAGE and faults.name != "setsockopt"
    lost = 0
    for before, after in zip(base.seen, world.seen, strict=True):
        if before == after:
            continue
        if given_up and after.endswith("still waiting"):
            continue
        lost += 1
        if harmless or not after.endswith("reset"):
            yield f"{after}, and not {before.split()[-1]}"
    if lost > (faults.failed if faults.lasting else 1):
        yield f"{lost} are lost"
    if any("internal error" in message for message in messages):
        yield "an internal error"
    more = world.warnings() - base.warnings()
    # Where it is the record of the connection that says it.
    other = base.ended_well() - world.ended_well()
    if lost and more < 1 and other < 1 and faults.name != "setsockopt":
        yield "no line in the log"
    # One for each that is hit, among them those who have left and see nothing.
    most = lost + world.left + world.daemons if faults.lasting else 1
    if more > most:
        yield f"{more} warnings more"
    if world.turns.count > base.turns.count + 2000:
        yield f"{world.turns.count} turns in place of {base.turns.count}"
    total = faults.calls.total()
    if total > base.faults.calls.total() + 2000:
        yield f"{total} calls in place of {base.faults.calls.total()}"


def faults_of(base: World, name: str, lasting: float) -> Iterator[Faults]:
    """Yield one for each call that the scenario makes, and each error."""
    for call, errors in ERRORS.items():
        if call in ELSEWHERE and name not in ("hand_over", "adopted"):
            continue
        if lasting and call not in MAY_LAST:
            continue
        named = [
            error for error in errors.split() if not lasting or error in LASTS
        ]
        count = base.faults.calls[call]
        if not count:
            continue
        pairs = (
            itertools.product(range(count), range(len(named)))
            if os.environ.get("FAULTS") == "all"
            # Each call and each error, if not each call with each error.
            else (
                (number % count, number % len(named))
                for number in range(max(count, len(named)))
            )
        )
        for nth, number in pairs:
            yield Faults(call, nth + 1, named[number], lasting)


@pytest.mark.slow
@pytest.mark.parametrize("lasting", [0.0, LASTING], ids=["once", "lasting"])
@pytest.mark.parametrize("name", SCENARIOS)
def test_what_fails_hits_one_connection_at_most(
    name: str, lasting: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What an earlier test has left is not to be taken for a leak.
    gc.collect()
    base = run(name, Faults(), monkeypatch)
    assert not base.problems
    assert not base.alive
    found = [
        f"{faults}: {problem}"
        for faults in faults_of(base, name, lasting)
        for problem in judge(base, run(name, faults, monkeypatch))
    ]
    assert not found, "\n".join(found)


def test_the_scenarios_make_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    reached: Counter[str] = Counter()
    for name in SCENARIOS:
        reached += run(name, Faults(), monkeypatch).faults.calls
    assert set(ERRORS) <= set(reached)
