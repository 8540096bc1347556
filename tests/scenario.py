"""What scenarios are made of: drop-ins, pretend qubes that answer, clients, and
a look at the daemon.

Nothing waits for ever: all I/O is bounded by PATIENCE, which is generous, as a
busy machine is no failure.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from contract.place import Place

from qrexec_activate.loopback.machine import Machine

PATIENCE = 120.0
SERVICE = "qrexec-connect-tcp.service"

Address = tuple[str, int] | str
Handler = Callable[[trio.SocketStream], Awaitable[None]]

#: Tests that run side by side, in processes of pytest-xdist, have ports and
#: addresses of their own.
SIDES = 16
_side = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % SIDES

_hosts = (
    f"127.{random.randrange(128 + _side, 250, SIDES)}.{high}.{low}"
    for high in itertools.count(1)
    for low in range(1, 255)
)
_ports = random.sample(range(10_000 + _side, 30_000, SIDES), 20_000 // SIDES)
_next_ports = itertools.cycle(_ports)


def measured() -> dict[str, str]:
    """What makes coverage measure the daemons, too."""
    return {
        key: value
        for key, value in os.environ.items()
        if key.startswith("COVERAGE_")
    }


def free_port() -> int:
    """A port that is free on every local address, outside the range from which
    clients get theirs, and another one each time."""
    for port in itertools.islice(_next_ports, len(_ports)):
        with socket.socket(socket.AF_INET6) as probe:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            with contextlib.suppress(OSError):
                probe.bind(("::", port))
                return port
    raise AssertionError("no port is free")


def written(address: Address) -> str:
    """An address as ListenStream= takes it."""
    if isinstance(address, str):
        return address
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def until(what: str, condition: Callable[[], object]) -> None:
    """Wait for something that comes in its own time."""
    deadline = trio.current_time() + PATIENCE
    while not condition():
        assert trio.current_time() < deadline, f"never happened: {what}"
        await trio.sleep(0.01)


# ---------------------------------------------------------------------- clients


async def connect(address: Address) -> trio.SocketStream:
    """Connect to a listener: (host, port), a path, or @ and an abstract
    name."""
    family = (
        socket.AF_UNIX
        if isinstance(address, str)
        else socket.AF_INET6
        if ":" in address[0]
        else socket.AF_INET
    )
    sock = trio.socket.socket(family)
    try:
        with trio.fail_after(PATIENCE):
            await sock.connect(
                "\0" + address[1:]
                if isinstance(address, str) and address[0] == "@"
                else address
            )
    except BaseException:
        sock.close()
        raise
    return trio.SocketStream(sock)


async def receive_all(stream: trio.SocketStream) -> bytes:
    """Everything up to the end of the stream; BrokenResourceError if it does
    not end cleanly."""
    with trio.fail_after(PATIENCE):
        return b"".join([chunk async for chunk in stream])


async def receive_exactly(stream: trio.SocketStream, count: int) -> bytes:
    received = b""
    with trio.fail_after(PATIENCE):
        while len(received) < count:
            chunk = await stream.receive_some(count - len(received))
            assert chunk, f"the stream ended after {received!r}"
            received += chunk
    return received


async def send(stream: trio.SocketStream, data: bytes) -> None:
    with trio.fail_after(PATIENCE):
        await stream.send_all(data)


async def ask(address: Address, question: bytes = b"who?") -> str:
    """Send a question, half-close, and return the whole answer."""
    async with await connect(address) as stream:
        with contextlib.suppress(trio.BrokenResourceError):
            await send(stream, question)
            await stream.send_eof()
        return (await receive_all(stream)).decode()


def is_reset_error(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and error.errno == errno.ECONNRESET


async def sees_reset(stream: trio.SocketStream, data: bytes = b"") -> bool:
    """Whether the stream ends by a reset, and not by an end of file that could
    be taken for an answer."""
    try:
        if data:
            await send(stream, data)
        rest = await receive_all(stream)
    except trio.BrokenResourceError as error:
        return is_reset_error(error.__cause__)
    assert rest == b"", f"an answer came: {rest!r}"
    return False


async def is_reset(address: Address, data: bytes = b"secret") -> bool:
    """Whether a connection there is accepted and then reset, with no answer."""
    try:
        stream = await connect(address)
    except ConnectionResetError:
        # It came before connect() looked.
        return True
    async with stream:
        return await sees_reset(stream, data)


async def echoes(stream: trio.SocketStream, word: bytes = b"ping") -> bool:
    """Whether an open connection to an echoing service still works."""
    await send(stream, word)
    return await receive_exactly(stream, len(word)) == word


def refuses(address: Address) -> bool:
    """Whether nothing listens there."""
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    with socket.socket(family) as sock:
        sock.settimeout(PATIENCE)
        return sock.connect_ex(address) in (errno.ECONNREFUSED, errno.ENOENT)


def vanish(stream: trio.SocketStream) -> None:
    """Go as a killed client goes that had unread input: by a reset."""
    stream.socket.setsockopt(
        socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
    )
    stream.socket.close()


BLOCK = 1 << 20


async def send_pattern(
    stream: trio.SocketStream, mebibytes: int, seed: int
) -> str:
    """Send so much that does not repeat soon, half-close, and return its
    hash."""
    digest = hashlib.sha256()
    block = bytearray(random.Random(seed).randbytes(BLOCK))
    for number in range(mebibytes):
        block[:8] = struct.pack("Q", number)
        digest.update(block)
        await stream.send_all(block)
    await stream.send_eof()
    return digest.hexdigest()


async def hash_of_all(stream: trio.SocketStream) -> str:
    digest = hashlib.sha256()
    while chunk := await stream.receive_some(BLOCK):
        digest.update(chunk)
    return digest.hexdigest()


# ---------------------------------------------------- services in pretend qubes


def write_script(path: Path, text: str) -> None:
    """Make a service that is a script, also where a link is in its place."""
    path.unlink(missing_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def says(name: str) -> Handler:
    """A service that reads all, and then says which qube it is in."""

    async def handler(stream: trio.SocketStream) -> None:
        async for _ in stream:
            pass
        await stream.send_all(name.encode())

    return handler


async def echo(stream: trio.SocketStream) -> None:
    async for chunk in stream:
        await stream.send_all(chunk)


async def flood(stream: trio.SocketStream) -> None:
    """Send without end, whatever the client does."""
    while True:
        await stream.send_all(bytes(1 << 16))


async def silent(stream: trio.SocketStream) -> None:
    """Take everything, say nothing, and stay until the caller goes."""
    async for _ in stream:
        pass


# ------------------------------------------------------- a qrexec of one's own


class Stack:
    """A qrexec that somebody has brought up on this machine, in place of the
    loopback; docs/testing.md says what its folder holds.

    All its qubes share the addresses of this machine, so each service of
    qubes.ConnectTCP connects to an address of its own: a link to it, or, before
    qrexec 4.2.19, which knows none, a script, as it was there.
    """

    SERVICE = "qubes.ConnectTCP+{}"
    #: Why a test is skipped: pytest-trio drops what pytest.skip says.
    lacking = ""
    CONFIG = "skip-service-descriptor=true\nexit-on-service-eof=true\n"
    SCRIPT = "#!/bin/sh\nexec socat -b 65536 -t 604800 STDIN!!STDOUT,shut-close TCP:{}:{}\n"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.client = folder / "bin" / "qrexec-client-vm"
        self._made: list[Path] = []
        self._folders: dict[Path, set[Path]] = {}
        Stack.lacking = ""

    @classmethod
    def given(cls) -> Stack | None:
        folder = os.environ.get("QREXEC_STACK")
        return cls(Path(folder)) if folder else None

    def lacks(self, what: str) -> None:
        Stack.lacking = f"the stack {self.folder} {what}"
        pytest.skip(Stack.lacking)

    def needs_hand_over(self) -> None:
        if not self.hands_over:
            self.lacks("has no --use-stdin-socket")

    def rpc(self, qube: str) -> Path:
        """Where the qube's services lie."""
        folder = self.folder / "qubes" / qube / "qubes-rpc"
        if not folder.is_dir():
            self.lacks(f"has no qube {qube}")
        return folder

    def serve(self, qube: str, port: int, host: str) -> None:
        """Let port of the qube be that port of host."""
        name = self.SERVICE.format(port)
        service = self.rpc(qube) / name
        self._made.append(service)
        if not self.hands_over:
            write_script(service, self.SCRIPT.format(host, port))
            return
        service.unlink(missing_ok=True)
        service.symlink_to(f"/dev/tcp/{host}")
        self._write(service.parent.parent / "rpc-config" / name, self.CONFIG)

    @functools.cached_property
    def hands_over(self) -> bool:
        """Whether its qrexec is 4.2.19 or newer."""
        return Place(str(self.client)).hands_over

    def policy(self, *lines: str) -> None:
        """These lines and no others."""
        text = "".join(f"{line}\n" for line in (*lines, "* * * * deny"))
        self._write(self.folder / "policy.d" / "10-scenario.policy", text)

    def answer(self, word: str) -> None:
        """Answer the prompt that is open."""
        if not (self.folder / "answer").exists():
            self.lacks("answers no prompts")
        (self.folder / "answer").write_text(word)

    def calls(self, event: str) -> Path:
        """The list of calls that the stack keeps, if it keeps one."""
        path = self.folder / "calls"
        if not path.exists():
            self.lacks("keeps no list of calls")
        if event != "call":
            self.lacks(f"lists no event {event}")
        return path

    def adopt(self, qube: str, folder: Path) -> None:
        """Let `folder`, a pretend qube of the loopback, be that of the stack,
        as far as its services go."""
        services = self.rpc(qube)
        for own, name in (
            (services, "rpc"),
            (services.with_name("rpc-config"), "rpc-config"),
        ):
            self._folders[own] = set(own.iterdir())
            (folder / name).rmdir()
            (folder / name).symlink_to(own)

    def _write(self, path: Path, text: str) -> None:
        path.write_text(text)
        self._made.append(path)

    def clean_up(self) -> None:
        for path in self._made:
            path.unlink(missing_ok=True)
        self._made.clear()
        for folder, before in self._folders.items():
            for path in set(folder.iterdir()) - before:
                path.unlink()
        self._folders.clear()
        for name in ("answer", "calls"):
            if (self.folder / name).exists():
                (self.folder / name).write_text("")


# -------------------------------------------------------- the machine of a test


class Scene:
    """A machine for one test: its own qubes, units and log. clean_up() leaves
    the machine as new."""

    def __init__(self, machine: Machine, nursery: trio.Nursery) -> None:
        self.machine = machine
        self.nursery = nursery
        self.stack = Stack.given()
        #: The instance, and so the port in every qube, unless a test says
        #: otherwise.
        self.port = free_port()
        self.unit = f"qrexec-connect-tcp@{self.port}.socket"
        self._options: dict[str, str] = {}
        self.clean_up()

    # What a person writes and does

    def address(self, port: int | None = None) -> tuple[str, int]:
        """A local address that nothing else in these tests listens on."""
        return next(_hosts), port or self.port

    def drop_in(
        self,
        name: str,
        listen: Address | None,
        target: str | None = None,
        *,
        unit: str | None = None,
    ) -> Path:
        """Write NAME.conf with one listener, and the qube that it reaches: NAME
        unless told otherwise; "": none."""
        lines = ["[Socket]"]
        if listen is not None:
            lines.append(f"ListenStream={written(listen)}")
        if target != "":
            lines.append(
                f"FileDescriptorName={name if target is None else target}"
            )
        return self.write(name, *lines, unit=unit)

    def write(self, name: str, *lines: str, unit: str | None = None) -> Path:
        return self.machine.write_drop_in(
            unit or self.unit, name, "".join(f"{line}\n" for line in lines)
        )

    def options(self, service: str = SERVICE, **options: str) -> None:
        """Give options to the daemon, as a person does: by a drop-in with
        Environment=."""
        self._options |= options
        lines = [
            f"Environment=QREXEC_ACTIVATE_{key}={value}"
            for key, value in self._options.items()
        ]
        self.write("options", "[Service]", *lines, unit=service)

    async def systemctl(self, *arguments: str, check: bool = True) -> str:
        return await trio.to_thread.run_sync(
            lambda: self.machine.systemctl(*arguments, check=check)
        )

    async def start(self, *units: str) -> None:
        """daemon-reload, then enable --now, by default the one socket unit of
        the test."""
        await self.systemctl("daemon-reload")
        await self.systemctl("enable", "--now", *(units or (self.unit,)))

    # Qubes

    async def qube(
        self, name: str, handler: Handler | None = None, port: int | None = None
    ) -> Path:
        """Make a pretend qube with a TCP service, which by default says the
        qube's name."""
        folder = self.add_qube(name)
        await self.serve(name, handler or says(name), port)
        return folder

    async def serve(
        self, qube: str, handler: Handler, port: int | None = None
    ) -> None:
        """Start a TCP service in a pretend qube."""

        async def forgiving(stream: trio.SocketStream) -> None:
            with contextlib.suppress(
                trio.BrokenResourceError, trio.ClosedResourceError
            ):
                await handler(stream)

        listeners = await trio.open_tcp_listeners(
            port or self.port, host=self.machine.address(qube), backlog=512
        )
        if self.stack:
            self.stack.serve(
                qube, port or self.port, self.machine.address(qube)
            )
        self.nursery.start_soon(trio.serve_listeners, forgiving, listeners)

    def add_qube(self, name: str) -> Path:
        """Make a pretend qube without a service; returns its folder, with the
        services in `rpc`."""
        folder = self.machine.add_qube(name)
        if self.stack:
            self.stack.adopt(name, folder)
        return folder

    async def route(
        self, handler: Handler | None = None, qube: str = "work"
    ) -> tuple[str, int]:
        """The usual scene: one qube with a service, one drop-in, all started;
        returns the local address."""
        address = self.address()
        await self.qube(qube, handler)
        self.drop_in(qube, address)
        await self.start()
        return address

    def faults(self, *lines: str) -> None:
        """Let calls go wrong; see qrexec_activate/loopback/faults.py."""
        (self.loopback / "faults").write_text(
            "".join(f"{line}\n" for line in lines)
        )

    @property
    def loopback(self) -> Path:
        """The loopback's root, for what only the loopback can do."""
        if self.stack:
            self.stack.lacks("has no faults on demand")
        return self.machine.loopback

    def answer(self, word: str) -> None:
        """Answer the prompts that are open."""
        if self.stack:
            self.stack.answer(word)
        else:
            (self.machine.loopback / "answer").write_text(f"{word}\n")

    def policy(self, *lines: str) -> None:
        if self.stack:
            self.stack.policy(*lines)
            return
        (self.machine.loopback / "policy").write_text(
            "".join(f"{line}\n" for line in lines)
        )

    def calls(self, event: str = "call") -> list[dict[str, Any]]:
        """What reached qrexec: every call, or what became of it."""
        path = (
            self.stack.calls(event)
            if self.stack
            else self.machine.loopback / "calls"
        )
        text = path.read_text() if path.exists() else ""
        # One that is being written is not yet there.
        lines = text[: text.rfind("\n") + 1].splitlines()
        return [
            record
            for record in map(json.loads, lines)
            if record["event"] == event
        ]

    # The daemon

    def log(self) -> str:
        return self.machine.daemon_log.read_text()

    def lines(self, *words: str) -> list[str]:
        """The lines of the daemon's log that hold all these words."""
        return [
            line
            for line in self.log().splitlines()
            if all(word in line for word in words)
        ]

    async def logged(self, *words: str, times: int = 1) -> list[str]:
        """Wait for so many lines that hold all these words."""
        try:
            await until(
                f"{times} lines with {words}",
                lambda: len(self.lines(*words)) >= times,
            )
        except AssertionError as error:
            raise AssertionError(f"{error}, but\n{self.log()}") from None
        return self.lines(*words)

    async def refusal(self, address: Address, *words: str) -> str:
        """The one line that says, with these words, that a listener is refused,
        as the daemon starts."""
        beginning = f"{written(address)} is refused: "
        (line,) = [
            line
            for line in await self.logged(beginning)
            if line.startswith(beginning)
        ]
        assert all(word in line for word in words), f"{words} in {line!r}"
        return line

    def state(self, unit: str = SERVICE) -> str:
        return self.machine.property(unit, "ActiveState")

    def pid(self, service: str = SERVICE) -> int:
        return int(self.machine.property(service, "MainPID"))

    def descriptors(self) -> int:
        """How many descriptors the daemon has open."""
        return len(os.listdir(f"/proc/{self.pid()}/fd"))

    def clients(self) -> list[int]:
        """The processes of this machine's qrexec-client-vm."""
        needle = os.fsencode(self.machine.client)
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                with contextlib.suppress(OSError):
                    if needle in (folder / "cmdline").read_bytes().split(b"\0"):
                        found.append(int(folder.name))
        return found

    async def nobody_stays(self) -> None:
        await until("every qrexec-client-vm ends", lambda: not self.clients())

    @contextlib.asynccontextmanager
    async def same_descriptors(self) -> AsyncIterator[None]:
        """After whatever happens in this block, the daemon has as many
        descriptors open as before."""
        await self.nobody_stays()
        await until("the daemon has nothing to do", self.is_idle)
        before, pid = self.descriptors(), self.pid()
        yield
        await self.nobody_stays()
        try:
            await until(
                "the daemon has closed everything",
                lambda: self.descriptors() == before,
            )
        except AssertionError:
            links = (
                f"/proc/{pid}/fd/{fd}" for fd in os.listdir(f"/proc/{pid}/fd")
            )
            open_now = sorted(os.readlink(link) for link in links)
            raise AssertionError(
                f"{before} descriptors were open, now: {open_now}"
            ) from None
        assert self.pid() == pid, "the daemon is another one"

    def is_idle(self) -> bool:
        """Whether every connection has come to its end, by the daemon's own
        account."""
        return " 0 connections open" in self.machine.property(
            SERVICE, "StatusText"
        )

    # The end

    def clean_up(self) -> None:
        """Leave the machine as it was: no unit, no process, no qube, no log."""
        machine = self.machine
        if self.stack:
            self.stack.clean_up()
        units = [
            line.split()[0]
            for line in machine.systemctl(
                "list-units", "--all", "--plain", "--no-legend", "--full"
            ).splitlines()
        ]
        ours = [unit for unit in units if self._is_ours(unit)]
        if ours:
            machine.systemctl(
                "kill",
                "--signal=KILL",
                *(unit for unit in ours if unit.endswith(".service")),
                check=False,
            )
        # Patterns stand for what is active: of names of which one is unknown,
        # systemd 262 stops none. Nor does it stop a target that orders sockets
        # and their service, even one that is inactive, together with these.
        machine.systemctl(
            "stop", "qrexec-*.socket", "qrexec-*.service", "my-*", check=False
        )
        machine.systemctl("stop", "qrexec-*.target", check=False)
        for pid in self.clients():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for folder in (
            machine.unit_dir,
            machine.loopback / "qubes",
            machine.loopback / ".faults",
        ):
            for path in folder.iterdir() if folder.is_dir() else ():
                shutil.rmtree(
                    path
                ) if path.is_dir() and not path.is_symlink() else path.unlink()
        for name in (
            "faults",
            "policy",
            "answer",
            "calls",
            "agent-down",
            "version",
            "setups",
        ):
            (machine.loopback / name).unlink(missing_ok=True)
        machine.systemctl("daemon-reload")
        machine.systemctl("reset-failed", check=False)
        machine.daemon_log.write_text("")

    def _is_ours(self, unit: str) -> bool:
        """Whether a test has started this unit; the manager's own stay. Users'
        own units begin with my-."""
        return unit.startswith(("qrexec-", "my-"))
