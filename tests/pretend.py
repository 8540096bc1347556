"""Pretend qubes for the tests: a loopback root on disk, and calls made with its
qrexec-client-vm as a real process.

All waiting is bounded by PATIENCE: a test that would hang fails instead.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qrexec_activate.loopback.install import write_client

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

PATIENCE = 60.0


def wait_until(what: str, condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.005)


def read_all(sock: socket.socket) -> bytes:
    chunks = []
    # The far end of a unix socket that closes with something unread is told by
    # a reset, after all that it wrote.
    with contextlib.suppress(
        *[ConnectionResetError] if sock.family == socket.AF_UNIX else []
    ):
        while chunk := sock.recv(1 << 18):
            chunks.append(chunk)
    return b"".join(chunks)


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()
    return client, accepted


def bound_unix_socket(path: Path) -> socket.socket:
    """A socket at a path that may be longer than the address of a socket, as
    the folders of tests are."""
    sock = socket.socket(socket.AF_UNIX)
    folder = os.open(path.parent, os.O_PATH)
    sock.bind(f"/proc/self/fd/{folder}/.bound")
    os.close(folder)
    path.with_name(".bound").rename(path)
    return sock


class Server:
    """A listener that serves each connection in a thread, and collects what the
    handler returns."""

    def __init__(
        self, listener: socket.socket, handle: Callable[[socket.socket], object]
    ) -> None:
        self.listener = listener
        self.handle = handle
        self.peers: list[Any] = []
        self.results: list[object] = []
        self.threads = [threading.Thread(target=self._accept, daemon=True)]
        self.threads[0].start()

    @property
    def port(self) -> int:
        return int(self.listener.getsockname()[1])

    def _accept(self) -> None:
        while True:
            try:
                connection, peer = self.listener.accept()
            except OSError:
                return
            self.peers.append(peer)
            connection.settimeout(PATIENCE)
            thread = threading.Thread(
                target=self._serve, args=(connection,), daemon=True
            )
            self.threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            self.results.append(self.handle(connection))

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for thread in self.threads:
            thread.join(PATIENCE)


def echo(connection: socket.socket) -> None:
    buffer = memoryview(bytearray(1 << 18))
    while count := connection.recv_into(buffer):
        connection.sendall(buffer[:count])
    connection.shutdown(socket.SHUT_WR)


def late_reply(connection: socket.socket) -> bytes:
    """Answer only a while after the caller's half-close: what socat's default
    -t of 0.5 s cuts off."""
    question = read_all(connection)
    time.sleep(1.5)
    connection.sendall(b"late: " + question)
    return question


class Call:
    """A running qrexec-client-vm on one end of a stream; `sock` is the other
    end, `given` a duplicate of the first."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        sock: socket.socket,
        given: socket.socket,
    ) -> None:
        self.process = process
        self.sock = sock
        self.given = given
        sock.settimeout(PATIENCE)

    def has_begun(self) -> bool:
        """Has the data phase begun? O_NONBLOCK on the shared description is
        what tells."""
        return bool(fcntl.fcntl(self.given, fcntl.F_GETFL) & os.O_NONBLOCK)

    def wait_begun(self) -> None:
        wait_until("the data phase", self.has_begun)

    def wait(self) -> int:
        return self.process.wait(PATIENCE)

    def stderr(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.read().decode()

    def converse(self, data: bytes = b"") -> bytes:
        """Send all, half-close, and return all that comes back."""
        self.given.close()
        sender = threading.Thread(target=self._send, args=(data,), daemon=True)
        sender.start()
        received = read_all(self.sock)
        sender.join(PATIENCE)
        return received

    def _send(self, data: bytes) -> None:
        with contextlib.suppress(OSError):
            self.sock.sendall(data)
            self.sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)
        if self.process.stderr:
            self.process.stderr.close()
        self.sock.close()
        self.given.close()


class Pretend:
    """A loopback root, with the qubes `work` and `gitweb`, and a launcher of
    its own."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "loopback"
        self.client = folder / "qrexec-client-vm"
        self.resources = contextlib.ExitStack()
        for name in ("work", "gitweb"):
            self.add_qube(name)
        write_client(str(self.client), str(self.root), sys.executable)

    def add_qube(self, name: str) -> Path:
        qube = self.root / "qubes" / name
        (qube / "rpc").mkdir(parents=True)
        (qube / "rpc-config").mkdir()
        return qube

    def qube(self, name: str = "work") -> Path:
        return self.root / "qubes" / name

    def write(self, name: str, text: str) -> None:
        (self.root / name).write_text(text)

    def script(self, service: str, text: str, qube: str = "work") -> None:
        path = self.qube(qube) / "rpc" / service
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    def config(self, service: str, text: str, qube: str = "work") -> None:
        (self.qube(qube) / "rpc-config" / service).write_text(text)

    def link(
        self, service: str, target: str | Path, qube: str = "work"
    ) -> None:
        (self.qube(qube) / "rpc" / service).symlink_to(target)

    def serve_tcp(
        self,
        handle: Callable[[socket.socket], object],
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> Server:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return self._serve(
            socket.create_server((host, port), family=family), handle
        )

    def serve_unix(
        self, path: Path, handle: Callable[[socket.socket], object]
    ) -> Server:
        listener = bound_unix_socket(path)
        listener.listen()
        return self._serve(listener, handle)

    def _serve(
        self, listener: socket.socket, handle: Callable[[socket.socket], object]
    ) -> Server:
        server = Server(listener, handle)
        self.resources.callback(server.close)
        return server

    def log(self, event: str | None = None) -> list[dict[str, Any]]:
        path = self.root / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [
            record
            for record in map(json.loads, lines)
            if event in (None, record["event"])
        ]

    def run(
        self,
        *arguments: str,
        data: bytes = b"",
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[bytes]:
        """A call on pipes, from beginning to end."""
        return subprocess.run(
            [str(self.client), *arguments],
            input=data,
            capture_output=True,
            timeout=PATIENCE,
            check=False,
            env={**os.environ, **(env or {})},
        )

    def call(
        self,
        target: str,
        service: str,
        *options: str,
        pair: Callable[
            [], tuple[socket.socket, socket.socket]
        ] = socket.socketpair,
        env: Mapping[str, str] | None = None,
    ) -> Call:
        """A call on one socket for both directions, as the daemon makes it."""
        sock, given = pair()
        process = subprocess.Popen(
            [str(self.client), "--use-stdin-socket", *options, target, service],
            stdin=given.fileno(),
            stderr=subprocess.PIPE,
            env=dict(os.environ) | dict(env or {}),
        )
        call = Call(process, sock, given)
        self.resources.callback(call.close)
        return call


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def random_bytes(mebibytes: int) -> bytes:
    return os.urandom(1 << 20) * mebibytes
