"""Where a scene is played: qubes with services, one way to reach them, and
clients.

Nothing waits longer than PATIENCE, and nothing that a scene has made is left
after clean_up().
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from qrexec_activate.loopback.machine import Machine

from .ways import Address, Cannot, Seen, Way

__all__ = [
    "PATIENCE",
    "Handler",
    "Stage",
    "echo",
    "read_all",
    "read_exactly",
    "reason",
    "vanish",
]

#: Seconds without anything after which nothing comes any more.
PATIENCE = 30.0

#: A service: it is given a connection, which ends as it returns.
Handler = Callable[[socket.socket], object]


class Stage:
    """One way, and the qubes behind it."""

    def __init__(self, machine: Machine, way: Way) -> None:
        self.machine = machine
        self.way = way
        self.patience = PATIENCE
        self.port = _free_port()
        self._sockets: list[socket.socket] = []

    # Qubes

    def qube(self, name: str, handler: Handler | None) -> str:
        """Make a qube; without a handler nothing listens there."""
        self.machine.add_qube(name)
        if handler is not None:
            listener = socket.create_server(
                (self.machine.address(name), self.port), backlog=1024
            )
            self._sockets.append(listener)
            threading.Thread(
                target=self._accept, args=(listener, handler), daemon=True
            ).start()
        return name

    def _accept(self, listener: socket.socket, handler: Handler) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = listener.accept()
                self._sockets.append(sock)
                threading.Thread(
                    target=_serve, args=(sock, handler), daemon=True
                ).start()

    # What a person does

    def address(self) -> tuple[str, int]:
        """A local address that nothing else has."""
        host = f"127.{random.randint(16, 63)}.{random.randint(0, 255)}.1"
        return host, _free_port()

    def path(self) -> str:
        """A path for a unix socket."""
        return str(self.machine.runtime / f"compare-{random.randrange(10**9)}")

    def route(
        self,
        handler: Handler | None,
        qube: str = "work",
        address: Address | None = None,
    ) -> Address:
        """The usual: a qube with a service, and an address that leads there."""
        address = address or self.address()
        self.way.open(address, self.qube(qube, handler), self.port)
        return address

    def policy(self, line: str) -> None:
        self._loopback("policy", line)

    def answer(self, word: str) -> None:
        """Answer the prompts that are open."""
        self._loopback("answer", word)

    def fault(self, line: str) -> None:
        """Let calls go wrong, as loopback/faults.py says."""
        self._loopback("faults", line)

    def _loopback(self, name: str, line: str) -> None:
        if not self.way.makes_calls:
            raise Cannot("makes no call")
        (self.machine.loopback / name).write_text(f"{line}\n")

    # Clients

    def connect(self, address: Address) -> socket.socket:
        is_path = isinstance(address, str)
        family = (
            socket.AF_UNIX
            if is_path
            else socket.AF_INET6
            if ":" in address[0]
            else socket.AF_INET
        )
        sock = socket.socket(family)
        self._sockets.append(sock)
        sock.settimeout(self.patience)
        sock.connect(address)
        return sock

    def gets(self, address: Address, question: bytes, answer: bytes) -> None:
        """See that a client that sends this, and stays, gets this answer."""
        with self.connect(address) as sock:
            sock.sendall(question)
            self.same(read_exactly(sock, len(answer)), answer)

    def same(self, seen: bytes, right: bytes) -> None:
        if seen == right:
            return
        if not seen:
            raise Seen("an empty answer")
        if right.startswith(seen):
            raise Seen(f"{len(seen):,} of {len(right):,} bytes")
        raise Seen(_brief(seen) if len(seen) < 40 else "other bytes")

    def until(self, condition: Callable[[], object], otherwise: str) -> None:
        """Wait for something that comes in its own time."""
        deadline = time.monotonic() + self.patience
        while not condition():
            if time.monotonic() > deadline:
                raise Seen(otherwise)
            time.sleep(0.02)

    def clients(self) -> list[int]:
        """The processes of this machine's qrexec-client-vm."""
        return [
            one.pid
            for one in psutil.process_iter(["cmdline"])
            if str(self.machine.client) in (one.info["cmdline"] or ())
        ]

    def called(self, event: str) -> bool:
        """Whether a call has come so far, by what the stand-in writes down."""
        calls = self.machine.loopback / "calls"
        return calls.exists() and f'"{event}"' in calls.read_text()

    # The end

    def clean_up(self) -> None:
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        self._sockets.clear()
        self.way.clean_up()
        for pid in self.clients():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        top: Path = self.machine.loopback
        shutil.rmtree(top / ".faults", ignore_errors=True)
        for qube in (top / "qubes").iterdir():
            shutil.rmtree(qube)
        for name in ("policy", "answer", "faults", "calls", "setups"):
            (top / name).unlink(missing_ok=True)


def _serve(sock: socket.socket, handler: Handler) -> None:
    with sock, contextlib.suppress(OSError):
        handler(sock)


def echo(sock: socket.socket) -> None:
    while data := sock.recv(1 << 18):
        sock.sendall(data)


def read_all(sock: socket.socket) -> bytes:
    """Everything up to the end."""
    return read_exactly(sock, None)


def read_exactly(sock: socket.socket, count: int | None) -> bytes:
    """So many bytes, or all up to the end; what came before a reset is told
    with it."""
    data = bytearray()
    try:
        while count is None or len(data) < count:
            chunk = sock.recv(1 << 18 if count is None else count - len(data))
            if not chunk:
                break
            data += chunk
    except (ConnectionResetError, TimeoutError) as error:
        if not data:
            raise
        end = (
            "and no more" if isinstance(error, TimeoutError) else "then a reset"
        )
        raise Seen(f"{_brief(data)}, {end}") from None
    return bytes(data)


def _brief(data: bytes | bytearray) -> str:
    """What a person would have seen of a short text, else how much it was."""
    text = data.decode("ascii", "replace").strip()
    if len(text) < 40 and text.isprintable():
        return f"\u201c{text}\u201d"
    return f"{len(data):,} bytes"


def reason(error: Exception, patience: float) -> str:
    """What was seen, in words."""
    if isinstance(error, TimeoutError):
        return f"nothing came within {patience:.0f} s"
    if isinstance(error, ConnectionResetError):
        return "a reset"
    strerror = getattr(error, "strerror", None)
    return strerror.lower() if strerror else str(error)


def vanish(sock: socket.socket) -> None:
    """Go as a killed client goes that had unread input: by a reset."""
    sock.setsockopt(
        socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
    )
    sock.close()


def _free_port() -> int:
    """A port that is free on all addresses, outside the range of outgoing
    ones."""
    while True:
        port = random.randint(10_000, 30_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
