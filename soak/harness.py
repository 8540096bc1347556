"""The load, the faults and the reckoning of soak/run."""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import trio

from qrexec_activate.loopback.machine import Machine, MachineError

__all__ = ["Calm", "Table", "calm", "with_faults"]

SERVICE = "qrexec-connect-tcp.service"
STREAMS = 8
QUBES = 20
#: The 20 routes are in so many units, each with a listener for several qubes.
INSTANCES = 5
#: A stream that is not over by then hangs. Set-ups that stall are ended after
#: SETUP_TIMEOUT.
PATIENCE = 90.0
SETUP_TIMEOUT = 15
#: What a service or a client sends at most, in bytes.
LARGEST = 1 << 20
#: How much memory the daemon may have gained in the calm run, and how much of
#: it is open.
GROWTH_KIB = 1024
CLIENT_SOURCE = Path(__file__).resolve().parent.parent / "bench" / "client.c"


class Wrong(Exception):
    """What must not happen; the text says what."""


def pattern(number: int, way: str, size: int) -> bytes:
    """The bytes that this stream must carry in this direction, and no other."""
    return random.Random(f"{number} {way}").randbytes(size)


@dataclass
class Plan:
    """What one stream does: known to both its ends, as the client sends it
    first."""

    number: int
    qube: str
    up: int
    down: int
    #: Who ends first: the client, the service (once it has all), or each as
    #: soon as it is done.
    order: str
    pause: float
    dies: bool

    def header(self) -> bytes:
        dies = int(self.dies)
        text = (
            f"{self.number} {self.qube} {self.up} {self.down} {self.order}"
            f" {self.pause:.4f} {dies}"
        )
        return text.ljust(99).encode() + b"\n"

    @classmethod
    def parse(cls, header: bytes) -> Plan:
        number, qube, up, down, order, pause, dies = header.decode().split()
        return cls(
            int(number),
            qube,
            int(up),
            int(down),
            order,
            float(pause),
            dies == "1",
        )


@dataclass
class Table:
    """What happened, and whether any of it may not."""

    seconds: float = 0.0
    endings: Counter[str] = field(default_factory=Counter)
    bytes_moved: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    misrouted: list[str] = field(default_factory=list)
    leaked: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return not (self.lost or self.misrouted or self.leaked)

    def __str__(self) -> str:
        rows = [
            ("seconds", f"{self.seconds:.0f}"),
            ("connections", f"{sum(self.endings.values()):,}"),
            *(
                (f"  {name}", f"{count:,}")
                for name, count in sorted(self.endings.items())
            ),
            ("bytes, both ways", f"{self.bytes_moved:,}"),
            ("faults", f"{sum(self.faults.values()):,}"),
            *(
                (f"  {name}", f"{count:,}")
                for name, count in sorted(self.faults.items())
            ),
            ("lost", str(len(self.lost))),
            ("misrouted", str(len(self.misrouted))),
            ("leaked", str(len(self.leaked))),
        ]
        lines = [f"{name:40} {value:>16}" for name, value in rows]
        return "\n".join(
            [*lines, *self.lost[:20], *self.misrouted[:20], *self.leaked[:20]]
        )


# -------------------------------------------------------- both ends of a stream


async def send_slowly(
    stream: trio.SocketStream, data: bytes, pause: float
) -> None:
    """Send in a few pieces, with pauses."""
    step = max(len(data) // 3, 1)
    for begin in range(0, len(data), step):
        await stream.send_all(data[begin : begin + step])
        await trio.sleep(pause)


async def receive_all(stream: trio.SocketStream) -> bytes:
    return b"".join([chunk async for chunk in stream])


async def receive_header(stream: trio.SocketStream) -> bytes:
    header = b""
    while len(header) < 100:
        chunk = await stream.receive_some(100 - len(header))
        if not chunk:
            break
        header += chunk
    return header


class Service:
    """The service of one pretend qube: does its part of the plan, and knows
    whose bytes it may see."""

    def __init__(self, qube: str, table: Table) -> None:
        self.qube = qube
        self.table = table

    async def serve(self, stream: trio.SocketStream) -> None:
        with contextlib.suppress(
            trio.BrokenResourceError, trio.ClosedResourceError
        ):
            header = await receive_header(stream)
            if len(header) < 100:
                return
            plan = Plan.parse(header)
            if plan.qube != self.qube:
                self.table.misrouted.append(
                    f"{self.qube} saw bytes that were for {plan.qube} (stream"
                    f" {plan.number})"
                )
                return
            await stream.send_all(self.qube.ljust(99).encode() + b"\n")
            if plan.dies:
                # In the midst of it, as a crashed service does.
                await send_slowly(
                    stream,
                    pattern(plan.number, "down", plan.down)[: plan.down // 2],
                    plan.pause,
                )
                return
            async with trio.open_nursery() as nursery:
                if plan.order != "client":
                    nursery.start_soon(self._send, stream, plan)
                try:
                    received = await receive_all(stream)
                except trio.BrokenResourceError:
                    nursery.cancel_scope.cancel()
                    return
                if (
                    received != pattern(plan.number, "up", plan.up)
                    and len(received) == plan.up
                ):
                    self.table.lost.append(
                        f"stream {plan.number}: {self.qube} got wrong bytes"
                    )
                if plan.order == "client":
                    await self._send(stream, plan)

    async def _send(self, stream: trio.SocketStream, plan: Plan) -> None:
        # Whoever goes away meanwhile is met by the reader.
        with contextlib.suppress(
            trio.BrokenResourceError, trio.ClosedResourceError
        ):
            await send_slowly(
                stream, pattern(plan.number, "down", plan.down), plan.pause
            )
            if plan.order != "service":
                await stream.send_eof()


# --------------------------------------------------------------------- the load


@dataclass
class Route:
    """A listener, and the qube that its file names; `up` while its unit is
    meant to be there and right."""

    unit: str
    address: tuple[str, int]
    qube: str
    up: bool = True


class Soak:
    """A machine under load, and what befalls it."""

    def __init__(
        self, machine: Machine, table: Table, rng: random.Random, relay: str
    ) -> None:
        self.machine = machine
        self.table = table
        self.rng = rng
        self.relay = relay
        self.routes: list[Route] = []
        self.over = False
        #: By the client's address: streams whose qrexec-client-vm was killed.
        #: Such a stream may end early.
        self.killed: set[str] = set()
        self.numbers = itertools.count(1)
        self._changes = trio.Lock()

    async def systemctl(self, *arguments: str, check: bool = True) -> str:
        return await trio.to_thread.run_sync(
            lambda: self.machine.systemctl(*arguments, check=check)
        )

    async def set_up(self, nursery: trio.Nursery) -> None:
        self.machine.write_drop_in(
            SERVICE,
            "soak",
            # A daemon that is killed as often as this would soon be over its
            # limit of starts.
            "[Unit]\nStartLimitIntervalSec=0\n[Service]\n"
            f"Environment=QREXEC_ACTIVATE_SETUP_TIMEOUT={SETUP_TIMEOUT}s"
            f" QREXEC_ACTIVATE_RELAY={self.relay}\n",
        )
        first = self.rng.randint(10_000, 30_000)
        for number in range(QUBES):
            qube = f"qube{number}"
            port = first + number % INSTANCES
            self.machine.add_qube(qube)
            listeners = await trio.open_tcp_listeners(
                port, host=self.machine.address(qube), backlog=512
            )
            nursery.start_soon(
                trio.serve_listeners, Service(qube, self.table).serve, listeners
            )
            route = Route(
                f"qrexec-connect-tcp@{port}.socket",
                (f"127.{self.rng.randint(2, 60)}.{number}.1", port),
                qube,
            )
            self.routes.append(route)
            self.write(route)
        await self.systemctl("daemon-reload")
        await self.systemctl(
            "enable", "--now", *{route.unit for route in self.routes}
        )

    def write(self, route: Route, qube: str | None = None) -> None:
        """Write the drop-in of a route; qube "": one that names none, and is
        broken."""
        name = route.qube if qube is None else qube
        host, port = route.address
        lines = [
            f"ListenStream={host}:{port}",
            *([f"FileDescriptorName={name}"] if name else []),
        ]
        self.machine.write_drop_in(
            route.unit, route.qube, "[Socket]\n" + "\n".join(lines) + "\n"
        )

    # The clients

    async def load(self) -> None:
        """Eight clients, until it is over; and meanwhile now and then one that
        starts the daemon if none runs.

        A call that qrexec has lost is found out by a daemon only, and the last
        fault may have stopped it.
        """
        async with trio.open_nursery() as reviving:
            reviving.start_soon(self._revive)
            async with trio.open_nursery() as clients:
                for _ in range(STREAMS):
                    clients.start_soon(self.client)
            reviving.cancel_scope.cancel()

    async def _revive(self) -> None:
        while True:
            await trio.sleep(2)
            route = self.rng.choice(self.routes)
            plan = Plan(
                next(self.numbers), route.qube, 1, 1, "both", 0, dies=False
            )
            self.table.endings[await self.stream(route, plan)] += 1

    async def client(self) -> None:
        while not self.over:
            route = self.rng.choice(self.routes)
            plan = Plan(
                next(self.numbers),
                route.qube,
                self.size(),
                self.size(),
                self.rng.choice(["client", "service", "both"]),
                self.rng.choice([0, 0, 0.001, 0.05]),
                dies=self.rng.random() < 0.03,
            )
            if plan.dies:
                self.table.faults["service dies"] += 1
            self.table.endings[await self.stream(route, plan)] += 1

    def size(self) -> int:
        return int(LARGEST ** self.rng.random()) - 1

    async def stream(self, route: Route, plan: Plan) -> str:
        """One stream from beginning to end; how it ended, in words."""
        was_up = route.up
        stream = None
        own = ""
        with trio.move_on_after(PATIENCE):
            try:
                stream = await trio.open_tcp_stream(
                    *route.address, happy_eyeballs_delay=PATIENCE
                )
                own = "{}:{}".format(*stream.socket.getsockname())
                return await self._talk(stream, plan)
            except Wrong as wrong:
                if own in self.killed:
                    return "ended early, its qrexec-client-vm was killed"
                if plan.dies:
                    return "ended early, its service died"
                self.table.lost.append(
                    f"stream {plan.number} from {own} to {plan.qube}"
                    f" ({'up' if was_up else 'down'}): {wrong}"
                )
                return "lost"
            except trio.BrokenResourceError:
                return "reset"
            except OSError as error:
                if error.errno in (
                    errno.ECONNREFUSED,
                    errno.ECONNRESET,
                ) or isinstance(error, ConnectionError):
                    return "not accepted: the port was closed"
                cause = error.__cause__ or error.__context__
                if isinstance(cause, OSError | BaseExceptionGroup):
                    return "not accepted: the port was closed"
                raise
            finally:
                if stream is not None:
                    with trio.CancelScope(shield=True):
                        await trio.aclose_forcefully(stream)
        self.table.lost.append(f"stream {plan.number} to {plan.qube} hangs")
        return "lost"

    async def _talk(self, stream: trio.SocketStream, plan: Plan) -> str:
        await stream.send_all(plan.header())
        greeting = await receive_header(stream)
        if len(greeting) < 100:
            raise Wrong(
                f"the stream ended after {len(greeting)} bytes, without an"
                f" error"
            )
        if (qube := greeting.decode().strip()) != plan.qube:
            self.table.misrouted.append(
                f"stream {plan.number} for {plan.qube} reached {qube}"
            )
            return "misrouted"
        wanted = pattern(plan.number, "down", plan.down)
        received = b""
        broken: trio.BrokenResourceError | None = None
        told: trio.BrokenResourceError | None = None

        async def send() -> None:
            nonlocal told
            # A service that has died, or ended first, takes no more: what it
            # sent is what counts.
            with contextlib.suppress(trio.ClosedResourceError):
                try:
                    await send_slowly(
                        stream, pattern(plan.number, "up", plan.up), plan.pause
                    )
                    await stream.send_eof()
                except trio.BrokenResourceError as error:
                    told = error

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            try:
                async for chunk in stream:
                    received += chunk
            except trio.BrokenResourceError as error:
                broken = error
            if plan.dies or broken:
                nursery.cancel_scope.cancel()
        self.table.bytes_moved += plan.up + len(received) + 200
        if not wanted.startswith(received):
            self.table.lost.append(f"stream {plan.number} got wrong bytes")
            return "lost"
        if broken:
            raise broken
        if len(received) < len(wanted) and told:
            # The kernel reports a reset once: here to whoever was sending, so
            # that reads see an end. It comes where a service ends while its
            # client goes on sending, and no daemon runs that could wait until
            # all has arrived.
            raise told
        if len(received) < len(wanted):
            raise Wrong(
                f"the stream ended after {len(received)} of {len(wanted)}"
                f" bytes, without an error"
            )
        return "right bytes"

    # The faults

    def pid(self) -> int:
        return int(self.machine.property(SERVICE, "MainPID") or 0)

    def clients(self) -> list[int]:
        """Those that make a call, not one that a daemon asks what it takes."""
        needle = os.fsencode(self.machine.client)
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                with contextlib.suppress(OSError):
                    argv = (folder / "cmdline").read_bytes().split(b"\0")
                    if needle in argv and b"--help" not in argv:
                        found.append(int(folder.name))
        return found

    async def daemon_is_stopped(self) -> None:
        await self.systemctl("stop", SERVICE, check=False)

    async def daemon_is_killed(self) -> None:
        await self.systemctl(
            "kill", "--kill-whom=main", "--signal=KILL", SERVICE, check=False
        )

    async def daemon_is_restarted(self) -> None:
        await self.systemctl("restart", SERVICE, check=False)

    async def daemon_is_upgraded(self) -> None:
        """As the package does it: units are read again, and the old daemon
        ends."""
        await self.systemctl("daemon-reload")
        await self.systemctl("stop", SERVICE, check=False)

    async def instance_goes_and_comes(self) -> None:
        async with self._changes:
            unit = self.rng.choice(self.routes).unit
            self._mark(unit, False)
            await self.systemctl("disable", "--now", unit)
            await trio.sleep(self.rng.random())
            await self._until_done("enable", "--now", unit)
            self._mark(unit, True)

    async def drop_in_goes_and_comes(self) -> None:
        async with self._changes:
            route = self.rng.choice(self.routes)
            route.up = False
            (
                self.machine.unit_dir / f"{route.unit}.d" / f"{route.qube}.conf"
            ).unlink()
            await self._reload(route.unit)
            await trio.sleep(self.rng.random())
            self.write(route)
            await self._reload(route.unit)
            route.up = True

    async def drop_in_breaks(self) -> None:
        """One names no qube, or one that cannot be; the others of its unit go
        on."""
        async with self._changes:
            route = self.rng.choice(self.routes)
            route.up = False
            self.write(
                route, self.rng.choice(["", "-x", "no qube", "@nothing"])
            )
            await self._reload(route.unit)
            await trio.sleep(self.rng.random())
            self.write(route)
            await self._reload(route.unit)
            route.up = True

    async def drop_in_changes_without_reload(self) -> None:
        async with self._changes:
            route = self.rng.choice(self.routes)
            route.up = False
            self.write(route, "")
            await self.systemctl("stop", SERVICE, check=False)
            await trio.sleep(self.rng.random())
            self.write(route)
            await self._reload(route.unit)
            route.up = True

    def _mark(self, unit: str, up: bool) -> None:
        for route in self.routes:
            if route.unit == unit:
                route.up = up

    async def _reload(self, unit: str) -> None:
        await self.systemctl("daemon-reload")
        await self._until_done("restart", unit)

    async def _until_done(self, *arguments: str) -> None:
        """Do as a person does whom systemctl tells that it failed: try again.

        Rarely, systemd 252 says `Socket service … already active, refusing`,
        where the daemon was just being started as units were read again.
        """
        for _ in range(3):
            try:
                await self.systemctl(*arguments)
            except MachineError:
                self.table.faults["systemd refuses a restart"] += 1
            else:
                return
        await self.systemctl(*arguments)

    async def _for_a_while(self, *lines: str) -> None:
        path = self.machine.loopback / "faults"
        new = path.with_suffix(".new")
        new.write_text("".join(f"{line}\n" for line in lines))
        new.rename(path)
        await trio.sleep(self.rng.uniform(0.5, 2))
        path.unlink()

    async def calls_are_refused(self) -> None:
        await self._for_a_while("refuse=0.5")

    async def calls_fail(self) -> None:
        await self._for_a_while("vchan-failure=0.4")

    async def calls_stall(self) -> None:
        await self._for_a_while(
            "delay=1", f"[{self.rng.choice(self.routes).qube}] delay=3"
        )

    async def calls_get_lost(self) -> None:
        await self._for_a_while("lose=0.1")

    async def a_call_dies(self) -> None:
        clients = self.clients()
        if not clients:
            return
        pid = self.rng.choice(clients)
        with contextlib.suppress(OSError):
            pidfd = os.pidfd_open(pid)
            self.killed.add(_peer_of(pid))
            signal.pidfd_send_signal(
                pidfd, self.rng.choice([signal.SIGKILL, signal.SIGTERM])
            )
            os.close(pidfd)

    async def _limit(self, which: int, limit: Callable[[int], int]) -> None:
        """Set a soft limit of the daemon for a while; what it has open or in
        use stays."""
        pid = self.pid()
        with contextlib.suppress(OSError, ValueError):
            soft, hard = resource.prlimit(pid, which)
            resource.prlimit(pid, which, (limit(pid), hard))
            await trio.sleep(self.rng.uniform(0.5, 2))
            resource.prlimit(pid, which, (soft, hard))

    async def descriptors_run_out(self) -> None:
        await self._limit(
            resource.RLIMIT_NOFILE,
            lambda pid: len(os.listdir(f"/proc/{pid}/fd")) + 1,
        )

    async def memory_runs_out(self) -> None:
        def now(pid: int) -> int:
            return (
                int(Path(f"/proc/{pid}/statm").read_text().split()[0])
                * resource.getpagesize()
            )

        await self._limit(resource.RLIMIT_AS, now)

    async def the_disk_of_the_log_is_full(self) -> None:
        folder = self.machine.daemon_log.parent / "disk"
        filler = folder / "filler"
        with (
            contextlib.suppress(OSError),
            filler.open("wb", buffering=0) as file,
        ):
            while True:
                file.write(bytes(4096))
        await trio.sleep(self.rng.uniform(0.5, 2))
        filler.unlink(missing_ok=True)

    async def the_clock_jumps(self) -> None:
        by = self.rng.choice([-3600, 3600])
        began, monotonic = time.time(), time.monotonic()
        time.clock_settime(time.CLOCK_REALTIME, began + by)
        await trio.sleep(1)
        time.clock_settime(
            time.CLOCK_REALTIME, began + time.monotonic() - monotonic
        )

    async def befall(self, faults: list[Callable[[], Awaitable[None]]]) -> None:
        """One fault after the other, each at least once in a while, as long as
        the load lasts."""
        while not self.over:
            for fault in self.rng.sample(faults, len(faults)):
                if self.over:
                    return
                await fault()
                self.table.faults[fault.__name__.replace("_", " ")] += 1
                await trio.sleep(self.rng.uniform(0, 0.5))

    # The reckoning

    async def reckon(self) -> None:
        """Say what is left that should not be: processes, and descriptors of a
        daemon that has nothing to do."""
        await until(lambda: not self.clients())
        self.table.leaked += [
            f"qrexec-client-vm {pid} is still running" for pid in self.clients()
        ]
        loaded = await self._idle_descriptors()
        await self.systemctl("stop", SERVICE)
        fresh = await self._idle_descriptors()
        if loaded != fresh:
            self.table.leaked.append(
                f"{loaded} descriptors are open after the load, {fresh} in a"
                f" fresh daemon"
            )

    async def _idle_descriptors(self) -> int:
        plan = Plan(
            next(self.numbers), self.routes[0].qube, 1, 1, "both", 0, dies=False
        )
        ending = await self.stream(self.routes[0], plan)
        if ending != "right bytes":
            self.table.lost.append(
                f"after all faults, a stream ended so: {ending}"
            )
        await until_idle(self.machine)
        return len(os.listdir(f"/proc/{self.pid()}/fd"))


def _peer_of(pid: int) -> str:
    """Whose call a qrexec-client-vm carries: the address of the daemon's
    client."""
    entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return dict(
        entry.decode(errors="replace").partition("=")[::2] for entry in entries
    ).get("QREXEC_ACTIVATE_PEER", "")


async def until_idle(machine: Machine) -> None:
    """Wait until the daemon has no connection, by its own account."""
    await until(
        lambda: " 0 connections open" in machine.property(SERVICE, "StatusText")
    )


async def until(condition: Callable[[], object]) -> None:
    for _ in range(int(PATIENCE / 0.05)):
        if condition():
            return
        await trio.sleep(0.05)


@contextlib.contextmanager
def small_disk(machine: Machine) -> Iterator[bool]:
    """Put the daemon's log on a disk of one MiB, if this user may mount one."""
    folder = machine.daemon_log.parent / "disk"
    folder.mkdir()
    mounted = not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "soak", str(folder)],
        capture_output=True,
        check=False,
    ).returncode
    log = folder / "log"
    machine.write_drop_in(
        SERVICE,
        "log",
        f"[Service]\nStandardOutput=append:{log}\nStandardError=append:{log}\n",
    )
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def with_faults(
    seconds: float,
    *,
    relay: str = "auto",
    clock: bool = False,
    seed: int | None = None,
) -> Table:
    """Run the load with faults for so long, and let it end."""
    seed = random.randrange(1 << 32) if seed is None else seed
    print(
        f"soak: {seconds:.0f} s of faults, --relay {relay} --seed {seed}",
        flush=True,
    )
    table = Table()

    async def run(machine: Machine, full_disk: bool) -> None:
        soak = Soak(machine, table, random.Random(seed), relay)
        faults = [
            *(
                soak.daemon_is_stopped,
                soak.daemon_is_killed,
                soak.daemon_is_restarted,
                soak.daemon_is_upgraded,
            ),
            *(
                soak.instance_goes_and_comes,
                soak.drop_in_goes_and_comes,
                soak.drop_in_breaks,
            ),
            *(
                soak.drop_in_changes_without_reload,
                soak.calls_are_refused,
                soak.calls_fail,
                soak.calls_stall,
            ),
            *(
                soak.calls_get_lost,
                soak.a_call_dies,
                soak.descriptors_run_out,
                soak.memory_runs_out,
            ),
        ]
        if full_disk:
            faults.append(soak.the_disk_of_the_log_is_full)
        if clock:
            faults.append(soak.the_clock_jumps)
        async with trio.open_nursery() as services:
            await soak.set_up(services)
            began = trio.current_time()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(soak.load)
                nursery.start_soon(soak.befall, faults)
                await trio.sleep(seconds)
                soak.over = True
            table.seconds = trio.current_time() - began
            await soak.reckon()
            services.cancel_scope.cancel()

    with Machine() as machine, small_disk(machine) as full_disk:
        trio.run(run, machine, full_disk)
        if not table.good:
            kept = Path(tempfile.mkdtemp(prefix="soak-"))
            for path in (
                machine.daemon_log.parent / "disk" / "log",
                machine.loopback / "calls",
            ):
                with contextlib.suppress(OSError):
                    shutil.copy(path, kept)
            print(f"soak: the log and the calls are in {kept}")
    return table


# ----------------------------------------------------------------- the calm run


@dataclass
class Calm:
    """Many short connections to one daemon, and what it had in use meanwhile:
    KiB of memory, descriptors."""

    connections: int
    wrong: int = 0
    memory: list[int] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)
    processes: int = 0

    @property
    def good(self) -> bool:
        # The first tenth fills caches and free lists.
        grown = self.memory[-1] - self.memory[1]
        return (
            not self.wrong
            and grown <= GROWTH_KIB
            and len(set(self.descriptors)) == 1
            and not self.processes
        )

    def __str__(self) -> str:
        return "\n".join(
            [
                f"{'connections, calm':40} {self.connections:>16,}",
                f"{'  wrong':40} {self.wrong:>16,}",
                f"  memory, KiB, after each tenth:"
                f" {' '.join(map(str, self.memory))}",
                f"  descriptors, after each tenth:"
                f" {' '.join(map(str, self.descriptors))}",
                f"{'  processes left':40} {self.processes:>16,}",
            ]
        )


def calm(connections: int) -> Calm:
    """Open so many connections, 16 at a time, to a stand-in client in C that
    echoes, so that it is quickly done."""
    result = Calm(connections)
    with (
        tempfile.TemporaryDirectory(prefix="soak-", dir="/tmp") as folder,
        Machine() as machine,
    ):
        client = Path(folder) / "qrexec-client-vm"
        subprocess.run(
            ["cc", "-O2", "-o", str(client), str(CLIENT_SOURCE)], check=True
        )
        machine.write_drop_in(
            SERVICE,
            "soak",
            f"[Service]\nEnvironment=QREXEC_ACTIVATE_CLIENT={client}\n",
        )
        port = random.randint(10_000, 30_000)
        address = ("127.61.0.1", port)
        # Its argument says what the stand-in does; 7 is the port of echo.
        unit = "qrexec-connect-tcp@7.socket"
        machine.write_drop_in(
            unit,
            "work",
            f"[Socket]\nListenStream={address[0]}:{port}\nFileDescriptorName=work\n",
        )
        machine.systemctl("daemon-reload")
        machine.systemctl("enable", "--now", unit)
        trio.run(functools.partial(_calm, machine, address, result))
        pid = machine.property(SERVICE, "MainPID")
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        result.processes = len(children)
    return result


async def _calm(
    machine: Machine, address: tuple[str, int], result: Calm
) -> None:
    async def converse(count: int) -> None:
        for _ in range(count):
            with trio.fail_after(PATIENCE):
                sock = trio.socket.socket(socket.AF_INET)
                stream = trio.SocketStream(sock)
                await sock.connect(address)
                word = os.urandom(8)
                await stream.send_all(word)
                await stream.send_eof()
                result.wrong += await receive_all(stream) != word
                await stream.aclose()

    await converse(1)
    pid = int(machine.property(SERVICE, "MainPID"))
    await _look(machine, pid, result)
    for _ in range(10):
        async with trio.open_nursery() as nursery:
            for _ in range(16):
                nursery.start_soon(converse, -(-result.connections // 160))
        await _look(machine, pid, result)


def _memory(pid: int) -> int:
    """What a process has of its own, in KiB."""
    status = dict(
        line.split(":", 1)
        for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    return int(status["RssAnon"].split()[0])


async def _look(machine: Machine, pid: int, result: Calm) -> None:
    await until_idle(machine)
    result.memory.append(_memory(pid))
    # The daemon tells systemd its status a moment later, by a socket of that
    # moment: the least of a few looks counts.
    looks = []
    for _ in range(5):
        looks.append(len(os.listdir(f"/proc/{pid}/fd")))
        await trio.sleep(0.02)
    result.descriptors.append(min(looks))
