"""Where the daemon waits for hours, seconds or a random moment: its own clock,
moved by the test.

The daemon runs in this process, on real sockets. In place of qrexec-client-vm
it starts processes that do nothing: the test decides when each is established,
and when and how it ends. Nothing real takes time, so the clock jumps from one
wait of the daemon to its next. (pytest-trio takes a clock only from a test's
own arguments.)
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import select
import signal
import socket
import stat
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from scenario import is_reset_error, sees_reset, vanish
from trio.testing import MockClock

from qrexec_activate.forward import daemon as daemon_module
from qrexec_activate.forward import succession
from qrexec_activate.forward.call import (
    HANG_UP_GRACE,
    OVERTAKEN_AGE,
    PROMPT_AGE,
    RETRY_DELAY,
)
from qrexec_activate.forward.child import Child, Client
from qrexec_activate.forward.connection import Connection
from qrexec_activate.forward.daemon import Daemon
from qrexec_activate.forward.orphans import Orphan
from qrexec_activate.forward.settings import Relay, Settings
from qrexec_activate.forward.spawn import AT_ONCE
from qrexec_activate.forward.splice import NO_LINGER, RESET_AT_CLOSE, at_close
from qrexec_activate.routing.claim import PassedSocket, Refusal, Route
from qrexec_activate.systemd.journal import Log, Priority
from qrexec_activate.systemd.passed import format_address


class Started:
    """A process in the place of qrexec-client-vm, and the socket or pipe that
    it was given."""

    def __init__(
        self,
        pid: int,
        orders: int,
        stdin: int,
        stdout: int | None,
        route: Route,
    ) -> None:
        self.pid = pid
        self.at = trio.current_time()
        self.route = route
        self._orders = orders
        self._stdin = os.dup(stdin)
        self.takes_pipes = stdout is not None
        self._stdout = -1 if stdout is None else os.dup(stdout)

    def establish(self) -> None:
        """What qrexec-client-vm does first in its data phase."""
        os.set_blocking(self._stdin, False)

    def reads(self, count: int) -> bytes:
        return os.read(self._stdin, count)

    def writes(self, data: bytes) -> None:
        os.write(self._stdout, data)

    def ends_its_output(self) -> None:
        os.close(self._stdout)
        self._stdout = -1

    def exits(self, code: int) -> None:
        """End with an exit code; on return it has ended, in no time at all by
        the daemon's clock."""
        os.write(self._orders, f"{code}\n".encode())
        self.has_ended()

    def has_ended(self) -> None:
        """Wait, by no clock, until it has ended."""
        with contextlib.suppress(ChildProcessError):
            # The daemon may have seen it already.
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        self.close()

    def loses(self, stream: trio.SocketStream) -> None:
        """Let its client go; on return that shows, in no time by the daemon's
        clock."""
        vanish(stream)
        await_hang_up(self._stdin)

    def is_alive(self) -> bool:
        try:
            return (
                os.waitid(
                    os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG
                )
                is None
            )
        except ChildProcessError:
            return False

    def reap(self) -> None:
        """Leave nothing of it behind, whatever became of it."""
        self.close()
        if self.is_alive():
            os.kill(self.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)

    def close(self) -> None:
        for fd in (self._orders, self._stdin, self._stdout):
            if fd >= 0:
                os.close(fd)
        self._orders = self._stdin = self._stdout = -1


def await_hang_up(fd: int) -> None:
    """Wait, by no clock, until the kernel has made it known."""
    poll = select.poll()
    poll.register(fd, 0)
    assert poll.poll(60_000)


#: Exits with the code that it is told; ends, too, when the test does.
PUPPET = "read code; exit ${code:-0}"
STUBBORN = "trap '' TERM; echo; " + PUPPET


class Puppets(Client):
    """Starts processes that do as the test says."""

    def __init__(self) -> None:
        super().__init__("qrexec-client-vm", Relay.HAND_OVER, {})
        self.started: list[Started] = []
        self.at_once: list[int] = []
        self.another = trio.lowlevel.ParkingLot()
        self.program = PUPPET
        self.send_signal = signal.pidfd_send_signal
        self.signals: list[int] = []

    def order(
        self, route: Route, environment: dict[str, str], *ends: Any
    ) -> Any:
        return SimpleNamespace(pid=partial(self.begin, route, *ends))

    def start(self, orders: Sequence[Any]) -> None:
        if orders:
            self.at_once.append(len(orders))

    def begin(self, route: Route, stdin: int, stdout: int | None) -> int:
        reader, writer = os.pipe()
        up, told = os.pipe()
        pid = os.posix_spawn(
            "/bin/sh",
            ["/bin/sh", "-c", self.program],
            {},
            file_actions=[
                (os.POSIX_SPAWN_DUP2, reader, 0),
                (os.POSIX_SPAWN_DUP2, told, 1),
            ],
            setsigdef=[signal.SIGPIPE],
        )
        os.close(reader)
        os.close(told)
        if self.program is STUBBORN:
            # It has said that it is deaf.
            os.read(up, 1)
        os.close(up)
        self.started.append(Started(pid, writer, stdin, stdout, route))
        self.another.unpark_all()
        return pid

    def signal(self, pidfd: int, number: int) -> None:
        """Send a signal, and let who dies of it be dead in no time by the
        daemon's clock."""
        self.send_signal(pidfd, number)
        self.signals.append(number)
        if self.program is PUPPET or number == signal.SIGKILL:
            select.select([pidfd], [], [])
        for started in self.started:
            if not started.is_alive():
                started.close()


class Records(Log):
    """The daemon's records, kept."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.another = trio.lowlevel.ParkingLot()

    def __call__(
        self, priority: Priority, message: str, **fields: object
    ) -> None:
        self.lines.append(message)
        self.another.unpark_all()

    def count(self, words: str) -> int:
        return sum(words in line for line in self.lines)


class Stage:
    """A daemon on listeners of its own, in this process."""

    def __init__(
        self,
        settings: Settings,
        targets: tuple[str, ...] = ("work",),
        *,
        unix: bool = False,
    ) -> None:
        self.over = trio.Event()
        self.told = False
        self.records = Records()
        self.client = Puppets()
        self.daemon = Daemon("qubes.ConnectTCP", settings, self.records)
        self.daemon.client = self.client
        self.addresses = []
        self._listening: list[socket.socket] = []
        sockets, routes = [], []
        for target in targets:
            family = socket.AF_UNIX if unix else socket.AF_INET
            listener = socket.socket(family)
            # Of a unix socket: any abstract name.
            listener.bind("" if unix else ("127.0.0.1", 0))
            listener.listen(300)
            address = listener.getsockname()
            self.addresses.append(address)
            self._listening.append(listener.dup())
            written = format_address(family, address)
            sockets.append(
                PassedSocket(listener.detach(), target, "Stream", written)
            )
            routes.append(Route(written, target, "qubes.ConnectTCP", "80"))
        self.daemon.add_listeners(sockets, routes)

    async def connect(self, listener: int = 0) -> trio.SocketStream:
        """Connect, in no time by the daemon's clock, and before the daemon has
        its next turn."""
        sock = socket.socket(self._listening[listener].family)
        sock.connect(self.addresses[listener])
        # A busy kernel may take its time between the two.
        assert select.select([self._listening[listener]], [], [], 60)[0]
        sock.setblocking(False)
        return trio.SocketStream(trio.socket.from_stdlib_socket(sock))

    async def nth(self, count: int) -> Started:
        """The qrexec-client-vm that was started as the count-th, counting from
        1."""
        with trio.fail_after(3600):
            while len(self.client.started) < count:
                await self.client.another.park()
        return self.client.started[count - 1]

    async def recorded(self, words: str, times: int = 1) -> None:
        with trio.fail_after(3600):
            while self.records.count(words) < times:
                await self.records.another.park()

    async def run(self) -> None:
        await self.daemon.run()
        self.over.set()

    def tell_to_stop(self) -> None:
        """As systemd does; once, as a second signal may find nobody who takes
        it, and end the tests."""
        if not self.told and not self.over.is_set():
            self.told = True
            os.kill(os.getpid(), signal.SIGTERM)

    async def stop(self) -> None:
        """End the daemon, and what it has left running."""
        if not self.over.is_set():
            self.tell_to_stop()
            with trio.fail_after(3600):
                await self.over.wait()
        for started in self.client.started:
            started.reap()
        for listener in self._listening:
            listener.close()
        print(*self.records.lines, sep="\n")


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of other daemons in this control group, which are those of other tests.
    A test that is about them says otherwise."""
    monkeypatch.setattr(succession, "find_orphans", lambda known: iter(()))
    monkeypatch.setattr(succession, "find_caretakers", lambda: iter(()))


@pytest.fixture
async def settings() -> Settings:
    return Settings()


@pytest.fixture
async def stage(
    settings: Settings, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Stage]:
    stage = Stage(settings)
    monkeypatch.setattr(signal, "pidfd_send_signal", stage.client.signal)
    nursery.start_soon(stage.run)
    await trio.testing.wait_all_tasks_blocked()
    yield stage
    await stage.stop()


def now() -> float:
    return trio.current_time()


async def test_what_is_accepted_is_reset_whatever_kills_the_daemon_then(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    class Looked(Connection):
        def __init__(
            self,
            host: Daemon,
            route: Route,
            sock: socket.socket,
            number: int,
            peer: str,
        ) -> None:
            seen.append(
                sock.getsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, len(RESET_AT_CLOSE)
                )
            )
            super().__init__(host, route, sock, number, peer)

    monkeypatch.setattr(daemon_module, "Connection", Looked)
    # As of one that came before this daemon saw its listener.
    at_close(stage._listening[0], NO_LINGER)
    async with await stage.connect():
        await stage.nth(1)
    assert seen == [RESET_AT_CLOSE]


@pytest.fixture
def watchdog(monkeypatch: pytest.MonkeyPatch) -> None:
    """systemd ends a daemon that it has not heard for 30 s."""
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)


async def test_the_watchdog_is_fed_in_time_and_not_at_each_connection(
    watchdog: None,
    nursery: trio.Nursery,
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: MockClock,
) -> None:
    stage, fed = Stage(Settings()), []

    def tell(state: str) -> bool:
        if state == "WATCHDOG=1":
            fed.append(now())
        return True

    monkeypatch.setattr(
        type(stage.daemon._notifier), "tell", lambda _, s: tell(s)
    )
    nursery.start_soon(stage.run)
    began = now()
    for number in range(1, 41):
        stream = await stage.connect()
        started = await stage.nth(number)
        started.establish()
        started.exits(0)
        await stage.recorded("ended", number)
        await stream.aclose()
        if number > 20:
            await trio.sleep(3)
    await trio.sleep(60)
    times = [began, *fed, now()]
    assert max(b - a for a, b in itertools.pairwise(times)) < 30
    assert min(b - a for a, b in itertools.pairwise(fed)) > 5
    await stage.stop()


async def test_the_watchdog_is_fed_though_systemd_seldom_reads(
    watchdog: None,
    nursery: trio.Nursery,
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: MockClock,
) -> None:
    """Its queue is full nearly always, as it is busy."""
    stage, fed = Stage(Settings()), []

    def tell(_: object, state: str) -> bool:
        reads = now() % 20 >= 18
        if reads and state == "WATCHDOG=1":
            fed.append(now())
        return reads

    monkeypatch.setattr(type(stage.daemon._notifier), "tell", tell)
    began = now()
    nursery.start_soon(stage.run)
    await trio.sleep(200)
    times = [began, *fed, now()]
    assert max(b - a for a, b in itertools.pairwise(times)) < 30
    await stage.stop()


async def test_the_watchdog_is_fed_while_many_are_started_slowly(
    watchdog: None,
    nursery: trio.Nursery,
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: MockClock,
) -> None:
    stage, fed = Stage(Settings(max_setups=50)), []

    def tell(_: object, state: str) -> bool:
        if state == "WATCHDOG=1":
            fed.append(now())
        return True

    def slowly(*arguments: Any) -> Any:
        autojump_clock.jump(10)
        return begin(*arguments)

    begin = daemon_module.start
    monkeypatch.setattr(type(stage.daemon._notifier), "tell", tell)
    monkeypatch.setattr(daemon_module, "start", slowly)
    streams = [await stage.connect() for _ in range(40)]
    began = now()
    nursery.start_soon(stage.run)
    await stage.nth(40)
    times = [began, *fed, now()]
    assert times[-1] - began >= 100
    assert max(b - a for a, b in itertools.pairwise(times)) < 30
    for started in stage.client.started:
        started.exits(0)
    for stream in streams:
        await stream.aclose()
    await stage.stop()


async def test_status_counts_who_had_gone_before_the_daemon_came(
    nursery: trio.Nursery,
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: MockClock,
) -> None:
    stage, told = Stage(Settings()), []

    def tell(_: object, state: str) -> bool:
        told.extend(line for line in state.split("\n") if "STATUS=" in line)
        return True

    monkeypatch.setattr(type(stage.daemon._notifier), "tell", tell)
    vanish(await stage.connect())
    nursery.start_soon(stage.run)
    await stage.recorded("127.0.0.1")
    await trio.sleep(60)
    assert stage.daemon.status() in told[-1]
    assert "0 ended well, 0 failed" not in told[-1]
    await stage.stop()


async def test_those_who_wait_are_started_side_by_side(
    stage: Stage, autojump_clock: MockClock
) -> None:
    # Nobody else has a turn meanwhile.
    streams = [await stage.connect() for _ in range(AT_ONCE + 1)]
    await stage.nth(AT_ONCE + 1)
    assert stage.client.at_once == [AT_ONCE, 1]
    for started in stage.client.started:
        started.exits(0)
    for stream in streams:
        await stream.aclose()


async def test_failed_set_ups_are_tried_again_after_growing_random_delays(
    stage: Stage, autojump_clock: MockClock
) -> None:
    async with await stage.connect() as stream:
        for attempt in range(1, 7):
            (await stage.nth(attempt)).exits(1)
        assert await sees_reset(stream)
    moments = [started.at for started in stage.client.started]
    delays = [later - earlier for earlier, later in itertools.pairwise(moments)]
    assert len(delays) == 5
    for number, delay in enumerate(delays):
        middle = RETRY_DELAY * 2**number
        assert 0.5 * middle <= delay <= 1.5 * middle + 0.5
    await stage.recorded("after 6 tries")


@pytest.mark.parametrize("sign", ["it has read", "it has written", "none"])
async def test_what_may_have_run_is_never_tried_again(
    stage: Stage, autojump_clock: MockClock, sign: str
) -> None:
    """A qrexec-client-vm on pipes that is killed as it closes them: nothing but
    the bytes tells."""
    stage.client.relay = Relay.SPLICE
    async with await stage.connect() as stream:
        await stream.send_all(b"word")
        first = await stage.nth(1)
        await trio.testing.wait_all_tasks_blocked()
        if sign == "it has read":
            assert first.reads(2) == b"wo"
        elif sign == "it has written":
            first.writes(b"answer")
        first.exits(1)
        await trio.sleep(60)
        again = len(stage.client.started) == 2
        assert again is (sign == "none")
        if again:
            (await stage.nth(2)).exits(0)
            await stage.recorded("ended, after 2 tries")
        else:
            await stage.recorded("ended with the service's exit code 1")


async def test_an_exit_code_of_the_service_shows_that_it_has_run(
    stage: Stage, autojump_clock: MockClock
) -> None:
    stage.client.relay = Relay.SPLICE
    async with await stage.connect() as stream:
        (await stage.nth(1)).exits(5)
        with trio.fail_after(3600):
            assert await stream.receive_some() == b""
    await stage.recorded("ended with the service's exit code 5")


async def test_an_answer_that_takes_ten_seconds_is_waited_for(
    stage: Stage, autojump_clock: MockClock
) -> None:
    async with await stage.connect() as stream:
        started = await stage.nth(1)
        await trio.sleep(10)
        started.establish()
        await trio.sleep(1)
        started.exits(0)
        assert await stream.receive_some() == b""
    await stage.recorded("ended, set up in 10")


async def test_a_prompt_that_nobody_answers_is_given_up_after_the_time_limit(
    stage: Stage, autojump_clock: MockClock
) -> None:
    began = now()
    async with await stage.connect() as stream:
        started = await stage.nth(1)
        with (
            trio.fail_after(3600),
            pytest.raises(trio.BrokenResourceError) as caught,
        ):
            await stream.receive_some()
        assert is_reset_error(caught.value.__cause__)
    assert not started.is_alive()
    assert 300 <= now() - began < 301
    await stage.recorded("no answer in time")
    assert len(stage.client.started) == 1
    # It may have something to clear up.
    assert stage.client.signals == [signal.SIGTERM]


async def test_an_answer_at_the_last_moment_counts(
    stage: Stage, autojump_clock: MockClock
) -> None:
    async with await stage.connect() as stream:
        started = await stage.nth(1)
        await trio.sleep(299.9)
        started.establish()
        await trio.sleep(60)
        assert started.is_alive()
        started.exits(0)
        assert await stream.receive_some() == b""


@pytest.mark.parametrize("settings", [Settings(max_setups=2)])
async def test_a_set_up_gives_its_place_back_once_it_is_a_prompt(
    stage: Stage, autojump_clock: MockClock
) -> None:
    streams = [await stage.connect() for _ in range(4)]
    await stage.nth(2)
    assert len(stage.client.started) == 2
    third = await stage.nth(3)
    assert third.at - stage.client.started[0].at >= PROMPT_AGE
    await stage.nth(4)
    assert "waiting for an answer" in stage.daemon.status()
    for stream in streams:
        await stream.aclose()


async def test_a_call_that_was_overtaken_is_ended_and_made_again(
    stage: Stage, autojump_clock: MockClock
) -> None:
    lost = await stage.connect()
    first = await stage.nth(1)
    await trio.sleep(1)
    quick = [await stage.connect() for _ in range(2)]
    others = [await stage.nth(2), await stage.nth(3)]
    for other in others:
        other.establish()
    again = await stage.nth(4)
    assert not first.is_alive()
    # One that would go on after SIGTERM might yet be answered.
    assert stage.client.signals == [signal.SIGKILL]
    assert again.at - first.at >= OVERTAKEN_AGE
    assert again.at - first.at < OVERTAKEN_AGE + 3
    again.establish()
    await trio.sleep(1)
    again.exits(0)
    for other in others:
        other.exits(0)
    for stream in (lost, *quick):
        assert await stream.receive_some() == b""
        await stream.aclose()
    await stage.recorded("ended, after 2 tries")


async def test_a_call_without_rivals_is_never_taken_for_lost(
    stage: Stage, autojump_clock: MockClock
) -> None:
    before = await stage.connect()
    (await stage.nth(1)).establish()
    await trio.sleep(1)
    patient = await stage.connect()
    second = await stage.nth(2)
    # Nobody overtakes it: the one that was established had begun before.
    await trio.sleep(100)
    assert second.is_alive()
    assert len(stage.client.started) == 2
    await before.aclose()
    await patient.aclose()


async def test_a_call_is_not_taken_for_lost_because_another_prompt_was_answered(
    stage: Stage, autojump_clock: MockClock
) -> None:
    """A person answers the later prompt first; the earlier one is still
    open."""
    first = await stage.connect()
    one = await stage.nth(1)
    await trio.sleep(1)
    second = await stage.connect()
    two = await stage.nth(2)
    await trio.sleep(20)
    two.establish()
    await trio.sleep(60)
    assert one.is_alive()
    assert len(stage.client.started) == 2
    await first.aclose()
    await second.aclose()


async def test_of_many_calls_the_few_that_get_lost_are_made_again(
    stage: Stage, autojump_clock: MockClock
) -> None:
    """0.3 %, as in qrexec 4.4.2, where every lost one would otherwise hang for
    five minutes."""
    lost = {100, 250}
    served = 0

    async def customer() -> None:
        nonlocal served
        async with await stage.connect() as stream:
            with trio.fail_after(120):
                assert await stream.receive_some() == b""
            served += 1

    async def qrexec(count: int) -> None:
        for number in range(1, count + 1):
            started = await stage.nth(number)
            if number not in lost:
                started.establish()
                await trio.sleep(0.01)
                started.exits(0)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(qrexec, 300 + len(lost))
        for _ in range(300):
            nursery.start_soon(customer)
            await trio.sleep(0.02)
    assert served == 300
    await stage.recorded("after 2 tries", times=len(lost))


async def test_a_client_that_hung_up_leaves_qrexec_two_seconds_and_then_two_more(
    stage: Stage, autojump_clock: MockClock
) -> None:
    stage.client.program = STUBBORN
    stream = await stage.connect()
    started = await stage.nth(1)
    started.establish()
    await trio.sleep(1)
    gone = now()
    started.loses(stream)
    await trio.sleep(HANG_UP_GRACE - 0.5)
    assert started.is_alive()
    await stage.recorded("the client hung up")
    assert not started.is_alive()
    assert now() - gone >= 2 * HANG_UP_GRACE


@pytest.mark.parametrize("settings", [Settings(exit_idle_time=600)])
async def test_the_daemon_ends_ten_minutes_after_its_last_connection(
    stage: Stage, autojump_clock: MockClock
) -> None:
    async with await stage.connect() as stream:
        started = await stage.nth(1)
        started.establish()
        await trio.sleep(3600)
        assert stage.records.count("no connection for") == 0
        started.exits(0)
        assert await stream.receive_some() == b""
    ended = now()
    await stage.recorded("no connection for 10 min 0 s")
    assert 600 <= now() - ended < 601


async def test_a_stop_waits_for_a_set_up_that_may_need_another_try(
    stage: Stage, autojump_clock: MockClock
) -> None:
    async with await stage.connect() as stream:
        (await stage.nth(1)).exits(1)
        stage.tell_to_stop()
        second = await stage.nth(2)
        second.establish()
        await trio.sleep(1)
        second.exits(0)
        with trio.fail_after(60):
            assert await stream.receive_some() == b""


async def test_an_order_to_stop_waits_until_those_are_served_who_wait(
    nursery: trio.Nursery,
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: MockClock,
) -> None:
    """They have waited for this start; the next may end as early."""
    stage = Stage(Settings())
    monkeypatch.setattr(signal, "pidfd_send_signal", stage.client.signal)
    streams = [await stage.connect() for _ in range(5)]
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    # To this thread: those that other tests have left have it not blocked.
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
    nursery.start_soon(stage.run)
    for number, stream in enumerate(streams, 1):
        (await stage.nth(number)).establish()
        await stream.aclose()
    with trio.fail_after(3600):
        await stage.over.wait()
    await stage.stop()


SILENT = tuple(f"silent{number}" for number in range(12))


@pytest.fixture
async def crowd(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Stage]:
    """A daemon with twelve qubes that do not answer, and one that does."""
    stage = Stage(Settings(), ("work", *SILENT))
    monkeypatch.setattr(signal, "pidfd_send_signal", stage.client.signal)
    nursery.start_soon(stage.run)
    await trio.testing.wait_all_tasks_blocked()
    yield stage
    await stage.stop()


async def test_qubes_that_do_not_answer_slow_no_other(
    crowd: Stage, autojump_clock: MockClock
) -> None:
    waiting = [
        await crowd.connect(1 + number % len(SILENT))
        for number in range(8 * len(SILENT))
    ]
    for number in range(20):
        await trio.sleep(0.3)
        began, count = now(), len(crowd.client.started)
        async with await crowd.connect(0):
            while True:
                count += 1
                started = await crowd.nth(count)
                if started.route.target == "work":
                    break
            assert started.at - began <= 0.02, f"connection {number}"
            started.establish()
            await trio.sleep(0.01)
            started.exits(0)
    for stream in waiting:
        await stream.aclose()


async def test_a_person_who_answers_the_newest_prompt_first_keeps_the_others(
    stage: Stage, autojump_clock: MockClock
) -> None:
    streams = [await stage.connect() for _ in range(4)]
    prompts = [await stage.nth(number) for number in range(1, 5)]
    await trio.sleep(60)
    for _ in range(2):
        count = len(stage.client.started)
        streams.append(await stage.connect())
        newest = await stage.nth(count + 1)
        await trio.sleep(1.5)
        newest.establish()
    await trio.sleep(100)
    assert all(prompt.is_alive() for prompt in prompts)
    assert len(stage.client.started) == 6
    for stream in streams:
        await stream.aclose()


async def test_a_slow_first_call_is_waited_for_though_later_ones_are_quick(
    stage: Stage, autojump_clock: MockClock
) -> None:
    """As of a disposable that has to start, beside those that are preloaded."""
    first = await stage.connect()
    slow = await stage.nth(1)
    others = []
    for number in range(2, 6):
        others.append(await stage.connect())
        (await stage.nth(number)).establish()
        await trio.sleep(1)
    await trio.sleep(4)
    assert slow.is_alive()
    assert len(stage.client.started) == 5
    for stream in (first, *others):
        await stream.aclose()


@pytest.mark.parametrize("answered", [False, True])
async def test_a_call_that_dom0_has_answered_is_lost_without_rivals(
    stage: Stage,
    autojump_clock: MockClock,
    monkeypatch: pytest.MonkeyPatch,
    answered: bool,
) -> None:
    monkeypatch.setattr(Child, "is_answered", lambda self: answered)
    stream = await stage.connect()
    first = await stage.nth(1)
    await trio.sleep(15)
    assert first.is_alive() is not answered
    if answered:
        second = await stage.nth(2)
        assert second.at - first.at <= 15
        assert len(stage.client.started) == 2
    await stream.aclose()


async def test_a_lost_call_of_an_earlier_daemon_is_made_again(
    nursery: trio.Nursery,
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: MockClock,
) -> None:
    """As soon as one of its own."""
    ours, theirs = socket.socketpair()
    pids: list[int] = []

    def find(known: set[int]) -> Iterator[Orphan]:
        lost = os.posix_spawn("/bin/sleep", ["sleep", "1000"], {})
        pids.append(lost)
        route = Route("127.0.0.1:80", "work", "qubes.ConnectTCP", "80")
        pidfd = os.pidfd_open(lost)
        yield Orphan(lost, pidfd, ours, route, "1-1", "pid 1", 5.0)

    monkeypatch.setattr(succession, "find_orphans", find)
    monkeypatch.setattr(Child, "is_answered", lambda self: True)
    stage = Stage(Settings())
    monkeypatch.setattr(signal, "pidfd_send_signal", stage.client.signal)
    began = now()
    nursery.start_soon(stage.run)
    again = await stage.nth(1)
    assert again.at - began <= 15
    reap(*pids)
    again.establish()
    await trio.sleep(1)
    again.exits(0)
    await stage.recorded("ended, after 2 tries")
    assert theirs.recv(1) == b""
    theirs.close()
    await stage.stop()


async def test_who_hangs_up_while_a_call_is_lost_causes_no_other(
    stage: Stage, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Child, "is_answered", lambda self: True)
    stream = await stage.connect()
    first = await stage.nth(1)
    hang_up = stage.client.signal

    def leave(pidfd: int, number: int) -> None:
        # Just as the lost one is ended, the client goes.
        first.loses(stream)
        hang_up(pidfd, number)

    monkeypatch.setattr(signal, "pidfd_send_signal", leave)
    await stage.recorded("the client hung up")
    await trio.sleep(600)
    assert not first.is_alive()
    assert len(stage.client.started) == 1


async def test_a_call_that_fails_after_prompts_asks_at_most_twice(
    stage: Stage, autojump_clock: MockClock
) -> None:
    async with await stage.connect() as stream:
        for number in (1, 2):
            prompt = await stage.nth(number)
            await trio.sleep(3)
            prompt.exits(1)
        assert await sees_reset(stream)
    await trio.sleep(600)
    assert len(stage.client.started) == 2


async def test_more_calls_than_there_is_room_for_wait_and_are_all_served(
    stage: Stage, autojump_clock: MockClock
) -> None:
    """On Xen, without Qubes' GUI agent, 30 calls can be open; each try beyond
    takes away from what the target can take."""
    served = 0
    failed_at: list[float] = []
    open_now: list[Started] = []

    async def customer() -> None:
        nonlocal served
        async with await stage.connect() as stream:
            with trio.fail_after(3600):
                assert await stream.receive_some() == b""
            served += 1

    async def xen() -> None:
        for number in itertools.count(1):
            started = await stage.nth(number)
            await trio.sleep(0.05)
            if len(open_now) < 30:
                open_now.append(started)
                started.establish()
            else:
                failed_at.append(now())
                started.exits(1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(xen)
        for _ in range(60):
            nursery.start_soon(customer)
        await trio.sleep(120)
        assert len(open_now) == 30
        # After about 40 in 120 s the target itself would take no more.
        assert len(failed_at) <= 20
        assert stage.records.count("qrexec sets up no more calls") > 0
        while served < 60:
            if open_now:
                open_now.pop(0).exits(0)
            await trio.sleep(1)
        nursery.cancel_scope.cancel()


def pretend_orphan(pids: list[int]) -> Orphan:
    """A qrexec-client-vm of an earlier daemon; who asks for it ends it."""
    ours, theirs = socket.socketpair()
    theirs.detach()
    pid = os.posix_spawn("/bin/sleep", ["sleep", "1000"], {})
    pids.append(pid)
    route = Route("127.0.0.1:80", "work", "qubes.ConnectTCP", "80")
    return Orphan(pid, os.pidfd_open(pid), ours, route, "1-1", "pid 1", 1.0)


async def test_what_an_earlier_daemon_left_counts_before_it_is_adopted(
    nursery: trio.Nursery,
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: MockClock,
) -> None:
    pids: list[int] = []
    rounds = itertools.count(1)

    def find(known: set[int]) -> Iterator[Orphan]:
        if next(rounds) < 20:
            raise OSError(errno.EMFILE, "Too many open files")
        for _ in range(2):
            yield pretend_orphan(pids)

    monkeypatch.setattr(succession, "find_orphans", find)
    stage = Stage(Settings(max_connections=2))
    monkeypatch.setattr(signal, "pidfd_send_signal", stage.client.signal)
    stage.daemon._census = Others(2)  # type: ignore[assignment]  # says what it is told
    async with await stage.connect():
        nursery.start_soon(stage.run)
        await stage.recorded("watching over 2 connections")
        stage.daemon._census.count = 0  # type: ignore[attr-defined]  # it is an Others
        await trio.sleep(5)
        assert not stage.client.started
        os.kill(pids[0], signal.SIGKILL)
        await stage.nth(1)
    await stage.stop()
    for pid in pids:
        reap(pid)


class Others:
    """The calls of others in this qube, as many as the test says."""

    def __init__(self, count: int) -> None:
        self.count = count

    def others(self, ours: object) -> int:
        return self.count


@pytest.mark.parametrize("taken", [False, True])
async def test_the_turn_of_a_listener_whose_client_has_gone_is_the_next_ones(
    nursery: trio.Nursery,
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: MockClock,
    taken: bool,
) -> None:
    """Also where nothing is left to accept."""
    adopting, known_at = True, 0.0

    def find(known: set[int]) -> Iterator[Orphan]:
        nonlocal known_at
        if adopting:
            raise OSError(errno.EMFILE, "Too many open files")
        known_at = now()
        yield from ()

    monkeypatch.setattr(succession, "find_orphans", find)
    stage = Stage(Settings(max_connections=1), ("work", "work"))
    stage.daemon._census = Others(1)  # type: ignore[assignment]  # says what it is told
    gone = await stage.connect(0)
    nursery.start_soon(stage.run)
    await trio.sleep(1)
    async with await stage.connect(1):
        await trio.sleep(1)
        if taken:
            accepted, _ = stage._listening[0].accept()
            accepted.close()
        else:
            vanish(gone)
        adopting = False
        started = await stage.nth(1)
        if not taken:
            # At once, and not at the next look.
            await stage.recorded("hung up")
            assert started.at == known_at
    await gone.aclose()
    await stage.stop()


async def test_who_waits_for_the_calls_of_others_goes_when_they_end(
    stage: Stage, autojump_clock: MockClock
) -> None:
    others = Others(stage.daemon.settings.max_total)
    stage.daemon._census = others  # type: ignore[assignment]  # says what it is told
    async with await stage.connect():
        await stage.recorded("of others in this qube")
        await trio.sleep(60)
        assert not stage.client.started
        others.count -= 1
        (await stage.nth(1)).establish()


async def test_a_daemon_is_not_idle_while_somebody_waits_for_others(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    stage = Stage(Settings(exit_idle_time=60))
    others = Others(stage.daemon.settings.max_total)
    stage.daemon._census = others  # type: ignore[assignment]  # says what it is told
    nursery.start_soon(stage.run)
    async with await stage.connect():
        await stage.recorded("of others in this qube")
        await trio.sleep(600)
        assert not stage.over.is_set()
        others.count -= 1
        (await stage.nth(1)).exits(126)
        with trio.fail_after(3600):
            await stage.over.wait()
    await stage.stop()


def reap(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


class Fussy:
    """A listening socket whose accept fails, so often."""

    def __init__(self, sock: socket.socket, number: int, times: int) -> None:
        self._sock = sock
        self._number = number
        self.times = times
        self.tried = 0

    def accept(self) -> tuple[socket.socket, object]:
        self.tried += 1
        # Whoever spins would keep the clock from moving.
        assert self.tried < 1000
        if self.tried <= self.times:
            raise OSError(self._number, os.strerror(self._number))
        return self._sock.accept()

    def __getattr__(self, name: str) -> object:
        return getattr(self._sock, name)


def make_fussy(stage: Stage, number: int, times: int) -> Fussy:
    (listener,) = stage.daemon._listeners.values()
    fussy = Fussy(listener.sock, number, times)
    listener.sock = fussy  # type: ignore[assignment]  # as much of a socket as is used
    return fussy


def refuse(stage: Stage) -> None:
    (listener,) = stage.daemon._listeners.values()
    listener.claim = Refusal("127.0.0.1:80", "it names no qube")


@pytest.mark.parametrize(
    "number",
    [errno.ENETDOWN, errno.EPROTO, errno.EHOSTUNREACH, errno.ECONNABORTED],
)
async def test_an_error_of_one_connection_is_none_of_its_listener(
    stage: Stage, autojump_clock: MockClock, number: int
) -> None:
    make_fussy(stage, number, 1)
    stream = await stage.connect()
    await stage.nth(1)
    assert stage.records.count("a connection was lost before it was") == 1
    await stream.aclose()


@pytest.mark.parametrize("refused", [False, True])
async def test_a_client_that_has_gone_before_it_is_accepted_is_no_shortage(
    stage: Stage, autojump_clock: MockClock, refused: bool
) -> None:
    """Or another daemon on the same listener was quicker."""
    make_fussy(stage, errno.EAGAIN, 1)
    if refused:
        refuse(stage)
    stream = await stage.connect()
    if refused:
        assert await sees_reset(stream)
    else:
        await stage.nth(1)
    assert stage.records.count("short of something") == 0
    await stream.aclose()


@pytest.mark.parametrize("refused", [False, True])
async def test_a_listener_that_is_none_is_given_up_with_a_word(
    stage: Stage, autojump_clock: MockClock, refused: bool
) -> None:
    fussy = make_fussy(stage, errno.EINVAL, 10**9)
    if refused:
        refuse(stage)
    stream = await stage.connect()
    await stage.recorded("accepts no more")
    await trio.sleep(60)
    assert fussy.tried == 1
    await stream.aclose()


@pytest.mark.parametrize("refused", [False, True])
@pytest.mark.parametrize("number", [errno.EMFILE, errno.EPERM])
async def test_an_accept_that_goes_on_failing_makes_nobody_spin(
    stage: Stage, autojump_clock: MockClock, refused: bool, number: int
) -> None:
    fussy = make_fussy(stage, number, 10**9)
    if refused:
        refuse(stage)
    stream = await stage.connect()
    await trio.sleep(5)
    assert 1 < fussy.tried < 50
    assert stage.records.count("short of something") == 1
    fussy.times = 0
    if refused:
        assert await sees_reset(stream)
    else:
        await stage.nth(1)
    await stream.aclose()


async def test_a_shortage_at_the_start_puts_off_no_stop(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """systemd waits TimeoutStopSec=, and kills."""
    stage = Stage(Settings())
    make_fussy(stage, errno.EMFILE, 10**9)
    async with await stage.connect():
        nursery.start_soon(stage.run)
        await stage.recorded("short of something")
        told_at = now()
        await stage.stop()
        assert now() - told_at < stage.daemon.settings.stop_timeout


class Full:
    """An epoll that has reached the user's limit of watches."""

    def __init__(self, epoll: select.epoll) -> None:
        self._epoll = epoll
        self.is_full = True
        self.tried = 0

    def register(self, fd: int, events: int) -> None:
        self.tried += 1
        assert self.tried < 1000
        if self.is_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._epoll.register(fd, events)

    def __getattr__(self, name: str) -> object:
        return getattr(self._epoll, name)


async def test_a_listener_is_served_once_there_is_room_to_watch_it(
    nursery: trio.Nursery,
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: MockClock,
) -> None:
    make = select.epoll
    with monkeypatch.context() as patch:
        patch.setattr(select, "epoll", lambda: Full(make()))
        stage = Stage(Settings())
    full = stage.daemon._ready
    assert isinstance(full, Full)
    stage.daemon._watch._epoll.is_full = False  # type: ignore[attr-defined]  # it is a pretend one
    nursery.start_soon(stage.run)
    stream = await stage.connect()
    await trio.sleep(5)
    assert 1 < full.tried < 50
    assert not stage.client.started
    assert stage.records.count("short of something") == 1
    full.is_full = False
    await stage.nth(1)
    await stream.aclose()
    await stage.stop()


async def test_adoption_goes_on_after_a_shortage(
    nursery: trio.Nursery,
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: MockClock,
) -> None:
    rounds, moments = [], set()

    def find(known: set[int]) -> Iterator[Orphan]:
        rounds.append(set(known))
        moments.add(now())
        yield pretend_orphan(pids)
        if len(rounds) < 3:
            raise OSError(errno.EMFILE, "Too many open files")

    pids: list[int] = []
    monkeypatch.setattr(succession, "find_orphans", find)
    stage = Stage(Settings())
    nursery.start_soon(stage.run)
    await stage.recorded("watching over 3 connections of an earlier daemon")
    assert [len(known) for known in rounds] == [0, 1, 2]
    # Looked at again and again at once, it would keep all others from going on.
    assert len(moments) == 3
    await stage.stop()
    for pid in pids:
        reap(pid)


async def test_who_looked_after_a_connection_is_relieved_once_it_is_held(
    nursery: trio.Nursery,
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: MockClock,
) -> None:
    """In between, the end of its qrexec-client-vm would be a clean one."""
    order = []

    def find_orphans(known: set[int]) -> Iterator[Orphan]:
        order.append("held")
        yield from ()

    def find_caretakers() -> Iterator[int]:
        order.append("relieved")
        yield from ()

    monkeypatch.setattr(succession, "find_orphans", find_orphans)
    monkeypatch.setattr(succession, "find_caretakers", find_caretakers)
    stage = Stage(Settings())
    nursery.start_soon(stage.run)
    await trio.sleep(1)
    assert order == ["held", "relieved"]
    await stage.stop()


def ended_process() -> int:
    """A process that has ended, and has a pid until that is asked for."""
    pid = os.posix_spawn("/bin/true", ["true"], {})
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    return pid


async def test_what_a_caretaker_has_started_is_adopted_once_that_has_gone(
    nursery: trio.Nursery,
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: MockClock,
) -> None:
    """It is the parent of those calls that it has made again."""
    # One that has ended by the time it is told to.
    caretaker = ended_process()
    pidfds, pids = [os.pidfd_open(caretaker)], []

    def find_orphans(known: set[int]) -> Iterator[Orphan]:
        if not pidfds and not pids:
            yield pretend_orphan(pids)

    def find_caretakers() -> Iterator[int]:
        if pidfds:
            yield pidfds.pop()

    monkeypatch.setattr(succession, "find_orphans", find_orphans)
    monkeypatch.setattr(succession, "find_caretakers", find_caretakers)
    stage = Stage(Settings())
    nursery.start_soon(stage.run)
    await stage.recorded("watching over 1 connection of an earlier daemon")
    await stage.stop()
    reap(caretaker)
    reap(pids[0])


async def test_a_stop_in_the_midst_of_adoption_leaves_nobody_alone(
    nursery: trio.Nursery,
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: MockClock,
) -> None:
    left, pids = [], []

    def find_orphans(known: set[int]) -> Iterator[Orphan]:
        yield pretend_orphan(pids)

    async def never() -> bool:
        await trio.sleep_forever()
        return False

    monkeypatch.setattr(succession, "find_orphans", find_orphans)
    monkeypatch.setattr(succession, "_relieve_caretakers", never)
    monkeypatch.setattr(
        daemon_module, "leave_caretaker", lambda: left.append(True)
    )
    stage = Stage(Settings())
    monkeypatch.setattr(type(stage.daemon._notifier), "wanted", True)
    nursery.start_soon(stage.run)
    await trio.sleep(1)
    await stage.stop()
    assert left == [True]
    reap(pids[0])


async def test_an_idle_daemon_leaves_nobody_alone_who_is_yet_to_be_seen_out(
    nursery: trio.Nursery,
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: MockClock,
) -> None:
    left, pids = [], []

    def find_orphans(known: set[int]) -> Iterator[Orphan]:
        if not pids:
            orphan = pretend_orphan(pids)
            assert orphan.sock is not None
            orphan.sock.close()
            yield replace(orphan, sock=None)

    monkeypatch.setattr(succession, "find_orphans", find_orphans)
    monkeypatch.setattr(succession, "find_caretakers", lambda: iter(()))
    # What its client sent before it went is not read yet.
    monkeypatch.setattr(succession, "left_to_read", lambda pidfd: 1)
    monkeypatch.setattr(
        daemon_module, "leave_caretaker", lambda: left.append(True)
    )
    stage = Stage(Settings(exit_idle_time=60))
    monkeypatch.setattr(type(stage.daemon._notifier), "wanted", True)
    nursery.start_soon(stage.run)
    await stage.recorded("no connection for 1 min 0 s")
    with trio.fail_after(3600):
        await stage.over.wait()
    await stage.stop()
    assert left == [True]
    reap(pids[0])


async def test_a_hang_up_is_seen_though_at_first_it_could_not_be_watched_for(
    stage: Stage, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """epoll has a limit of its own (ENOSPC)."""
    watch, tried = stage.daemon.watch, 0

    def fussy(fd: int, events: int, callback: Callable[[], None]) -> None:
        nonlocal tried
        tried += 1
        if tried <= 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        watch(fd, events, callback)

    monkeypatch.setattr(stage.daemon, "watch", fussy)
    stream = await stage.connect()
    started = await stage.nth(1)
    started.establish()
    await trio.sleep(5)
    assert started.is_alive()
    started.loses(stream)
    await stage.recorded("the client hung up")
    assert not started.is_alive()
    assert stage.records.count("short of something") == 1


async def test_bytes_that_the_pump_cannot_take_are_not_waited_for(
    stage: Stage, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They stay in the socket, whose error was taken for its end."""
    genuine = os.splice

    def splice(source: int, sink: int, *arguments: int, **named: int) -> int:
        if stat.S_ISSOCK(os.fstat(source).st_mode):
            raise OSError(errno.EHOSTUNREACH, os.strerror(errno.EHOSTUNREACH))
        return genuine(source, sink, *arguments, **named)

    monkeypatch.setattr(os, "splice", splice)
    stage.client.relay = Relay.SPLICE
    stream = await stage.connect()
    await stream.send_all(b"x")
    started = await stage.nth(1)
    started.establish()
    await trio.sleep(60)
    assert not started.is_alive()
    assert stage.records.count("the client hung up") == 1
    await stream.aclose()


def fail(patch: pytest.MonkeyPatch, name: str, number: int) -> None:
    """Let a function of os fail."""

    def failing(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    patch.setattr(os, name, failing)


async def test_a_call_that_cannot_be_watched_at_first_goes_on(
    stage: Stage, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        fail(patch, "pidfd_open", errno.ENODEV)
        stream = await stage.connect()
        started = await stage.nth(1)
        started.establish()
        await trio.sleep(5)
        assert stage.records.count("short of something") == 1
    started.exits(0)
    await stage.recorded(": ended")
    await stream.aclose()


async def test_a_call_without_pipes_is_the_only_one_that_fails(
    stage: Stage, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.client.relay = Relay.SPLICE
    with monkeypatch.context() as patch:
        fail(patch, "pipe2", errno.EINVAL)
        async with await stage.connect() as stream:
            assert await sees_reset(stream)
    await stage.recorded("cannot start qrexec-client-vm: Invalid argument")
    stream = await stage.connect()
    await stage.nth(1)
    await stream.aclose()


async def test_a_stop_leaves_the_last_words_of_a_service_their_time(
    stage: Stage, autojump_clock: MockClock
) -> None:
    """A client that goes on sending after the service has ended would be reset
    by a close before it has read them."""
    # The kernel is to move the bytes before the clock moves.
    autojump_clock.autojump_threshold = 0.05
    async with await stage.connect() as stream:
        started = await stage.nth(1)
        started.establish()
        service = socket.socket(fileno=os.dup(started._stdin))
        sent = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                sent += service.send(bytes(1 << 16))
        service.close()
        await stream.send_all(b"more")
        started.exits(0)
        await trio.sleep(0.2)
        stage.tell_to_stop()
        await trio.sleep(0.2)
        await stream.send_all(b"and more")
        received = 0
        while chunk := await stream.receive_some():
            received += len(chunk)
        assert received == sent
    await stage.recorded("ended, ")


@pytest.mark.parametrize("relay", [Relay.HAND_OVER, Relay.SPLICE])
@pytest.mark.parametrize("stops", [False, True])
async def test_a_slow_reader_has_all_of_an_answer_though_nobody_waits_for_it(
    stage: Stage, autojump_clock: MockClock, relay: Relay, stops: bool
) -> None:
    """And though there is input of it that no service has read."""
    autojump_clock.autojump_threshold = 0.05
    stage.client.relay = relay
    async with await stage.connect() as stream:
        started = await stage.nth(1)
        started.establish()
        await stream.send_all(b"more than is read")
        # More than its kernel takes, and less than that of the daemon.
        sent = 0
        while sent < 1_000_000:
            way = started._stdout if started.takes_pipes else started._stdin
            sent += os.write(way, bytes(50_000))
            await trio.sleep(0.2)
        if not started.takes_pipes:
            with socket.socket(fileno=os.dup(started._stdin)) as service:
                service.shutdown(socket.SHUT_RDWR)
        started.exits(0)
        await trio.sleep(1)
        autojump_clock.autojump_threshold = 0
        if stops:
            stage.tell_to_stop()
            with trio.fail_after(3600):
                await stage.over.wait()
            assert not stage.records.count("go on without it")
        else:
            await trio.sleep(3600)
        received = 0
        while chunk := await stream.receive_some():
            received += len(chunk)
        assert received == sent
    await stage.recorded("ended, ")


async def test_a_stop_that_cuts_last_bytes_off_is_recorded(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    autojump_clock.autojump_threshold = 0.05
    stage = Stage(Settings(), unix=True)
    stage.client.relay = Relay.SPLICE
    nursery.start_soon(stage.run)
    stream = await stage.connect()
    started = await stage.nth(1)
    started.establish()
    with trio.move_on_after(1):
        # More than every buffer on the way holds.
        await stream.send_all(bytes(10_000_000))
    await stream.aclose()
    await trio.sleep(1)
    autojump_clock.autojump_threshold = 0
    await stage.stop()
    assert stage.records.count("cut off by a stop of the daemon") == 1
    assert not stage.records.count("go on without it")


@pytest.mark.parametrize("unix", [False, True])
async def test_what_nobody_reads_any_more_does_not_reset_the_client(
    nursery: trio.Nursery, autojump_clock: MockClock, unix: bool
) -> None:
    """A close with unread input would, that of a unix socket at once."""
    stage = Stage(Settings(), unix=unix)
    nursery.start_soon(stage.run)
    async with await stage.connect() as stream:
        started = await stage.nth(1)
        started.establish()
        await stream.send_all(b"more than the service has read")
        await trio.sleep(1)
        started.exits(0)
        await stage.recorded(": ended")
        with trio.fail_after(3600):
            assert await stream.receive_some() == b""
    await stage.stop()


async def test_what_the_pump_has_taken_is_left_its_time_to_be_read(
    stage: Stage, autojump_clock: MockClock
) -> None:
    stage.client.relay = Relay.SPLICE
    stream = await stage.connect()
    await stream.send_all(b"last words")
    started = await stage.nth(1)
    started.establish()
    with trio.fail_after(3600):
        await trio.lowlevel.wait_readable(started._stdin)
    (connection,) = stage.daemon.connections
    vanish(stream)
    await_hang_up(connection._sock.fileno())
    await trio.sleep(2 * HANG_UP_GRACE)
    assert started.is_alive()
    assert started.reads(100) == b"last words"
    await stage.recorded("the client hung up")


@pytest.mark.parametrize("established", [False, True])
async def test_a_service_that_ends_like_an_old_client_is_not_run_again(
    stage: Stage, autojump_clock: MockClock, established: bool
) -> None:
    """With 2, as one ends that knows no --use-stdin-socket."""
    stage.client.relay = Relay.AUTO
    async with await stage.connect() as stream:
        first = await stage.nth(1)
        if established:
            first.establish()
        await trio.sleep(1)
        first.exits(2)
        if established:
            with trio.fail_after(3600):
                assert await stream.receive_some() == b""
            await stage.recorded("ended with the service's exit code 2")
            assert len(stage.client.started) == 1
            assert stage.client.relay is Relay.AUTO
        else:
            second = await stage.nth(2)
            assert second.takes_pipes
            second.exits(2)
            assert await sees_reset(stream)
            await stage.recorded("failed with exit code 2")
            assert len(stage.client.started) == 2


@pytest.mark.parametrize("said", [b"", b"half an answer"])
async def test_one_that_dies_after_its_output_does_not_seem_to_have_ended(
    stage: Stage, autojump_clock: MockClock, said: bytes
) -> None:
    """The kernel closes its descriptors before its end can be seen."""
    stage.client.relay = Relay.SPLICE
    async with await stage.connect() as stream:
        started = await stage.nth(1)
        started.establish()
        if said:
            started.writes(said)
        await trio.sleep(1)
        started.ends_its_output()
        # Longer, where it may still say by its exit code that no service ran.
        await trio.sleep(0.01 if said else 0.3)
        os.kill(started.pid, signal.SIGKILL)
        started.has_ended()
        if said:
            assert await stream.receive_some() == said
        assert await sees_reset(stream)


async def test_one_that_takes_long_to_die_does_not_seem_to_have_ended(
    stage: Stage, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Child, "is_ending", lambda self: True)
    stage.client.relay = Relay.SPLICE
    async with await stage.connect() as stream:
        started = await stage.nth(1)
        started.establish()
        await trio.sleep(1)
        started.ends_its_output()
        await trio.sleep(10)
        os.kill(started.pid, signal.SIGKILL)
        started.has_ended()
        assert await sees_reset(stream)


async def test_an_answer_that_comes_with_a_stop_is_not_reset_by_its_end(
    stage: Stage, autojump_clock: MockClock
) -> None:
    """A prompt is looked at five times a second, and by nobody until the
    caretaker has begun."""
    async with await stage.connect() as stream:
        started = await stage.nth(1)
        await trio.sleep(2 * PROMPT_AGE + 0.1)
        started.establish()
        stage.tell_to_stop()
        with trio.fail_after(3600):
            await stage.over.wait()
        with socket.socket(fileno=os.dup(started._stdin)) as service:
            service.sendall(b"answer")
        started.exits(0)
        with trio.fail_after(3600):
            assert await stream.receive_some() == b"answer"
            assert await stream.receive_some() == b""


async def test_what_a_stop_cuts_off_does_not_seem_to_have_ended(
    stage: Stage, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where qrexec-client-vm ends its output, and not itself."""
    stage.client.program = STUBBORN
    stage.client.relay = Relay.SPLICE
    async with await stage.connect() as stream:
        started = await stage.nth(1)
        started.establish()
        started.writes(b"half an answer")
        assert await stream.receive_some() == b"half an answer"

        def send_signal(pidfd: int, number: int) -> None:
            stage.client.signal(pidfd, number)
            if number == signal.SIGTERM:
                started.ends_its_output()

        monkeypatch.setattr(signal, "pidfd_send_signal", send_signal)
        stage.tell_to_stop()
        assert await sees_reset(stream)
    await stage.recorded("cut off by a stop of the daemon")
    assert stage.client.signals == [signal.SIGTERM, signal.SIGKILL]


async def test_an_earlier_daemons_connection_lasted_from_its_beginning(
    nursery: trio.Nursery,
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: MockClock,
) -> None:
    """And when it was established, nobody knows who is there now."""
    pids: list[int] = []

    def find(known: set[int]) -> Iterator[Orphan]:
        orphan = pretend_orphan(pids)
        assert orphan.sock is not None
        orphan.sock.setblocking(False)
        yield replace(orphan, age=100.0)

    monkeypatch.setattr(succession, "find_orphans", find)
    stage = Stage(Settings())
    nursery.start_soon(stage.run)
    await stage.recorded("watching over 1 connection of an earlier daemon")
    await trio.sleep(80)
    reap(pids[0])
    await stage.recorded("cut off: qrexec-client-vm was killed, lasted 3 min")
    await stage.stop()
