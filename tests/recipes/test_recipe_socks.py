"""SOCKS: in a real Tor network, streams of two qubes never share a circuit."""

from __future__ import annotations

import contextlib
import http.server
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from recipe import PATIENCE, Qube, Recipe, free_host, require
from tornet import tor_network, wait_ready

PORT = 8000


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"by Tor")

    def log_message(self, *words: object) -> None:
        pass


@contextlib.contextmanager
def web_server(host: str) -> Iterator[None]:
    server = http.server.ThreadingHTTPServer((host, PORT), Answer)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def open_stream(qube: Qube, host: str) -> socket.socket:
    """Connect by SOCKS 4 to the web server, and stay."""
    sock = socket.create_connection((qube.host, 9050), PATIENCE)
    sock.sendall(
        b"\x04\x01" + PORT.to_bytes(2, "big") + socket.inet_aton(host) + b"\0"
    )
    answer = b""
    while len(answer) < 8:
        answer += sock.recv(8 - len(answer)) or pytest.fail(
            "Tor ended the connection"
        )
    assert answer[1] == 0x5A, f"Tor refused: {answer!r}"
    return sock


def test_one_circuit_per_qube(tmp_path: Path) -> None:
    require("socks", "tor", "tor-gencert", "curl")
    server = free_host()
    with (
        tor_network(tmp_path) as network,
        web_server(server),
        # No name leads there without Tor's own network.
        Recipe(
            "socks",
            substitutes={"http://example.onion/": f"http://{server}:{PORT}/"},
        ) as recipe,
    ):
        anon = recipe["anon"]
        torrc = (anon.etc / "tor" / "torrc").read_text()
        assert f"SocksPort {anon.host}:9050 IsolateClientAddr" in torrc

        def systemctl(command: str) -> str:
            """The anon qube's system manager, as far as the page needs it."""
            assert command == "systemctl restart tor"
            assert Path("/usr/lib/systemd/system/tor.service").exists()
            network.start(
                "anon",
                torrc
                + network.common("anon")
                + f"ControlPort unix:{tmp_path}/anon/control\n",
            )
            wait_ready(network, "anon")
            return ""

        anon.as_root = systemctl
        recipe.follow("")
        *opening, work, home = recipe.commands("Reach it")
        for line in opening:
            recipe.type(line)
        assert [recipe.type(line) for line in (work, home)] == ["by Tor"] * 2

        with contextlib.ExitStack() as streams:
            for name in ("work", "home", "work", "home"):
                streams.enter_context(open_stream(recipe[name], server))
            status = network.control("anon", "GETINFO stream-status")
        lines = [
            line.split()
            for line in status.splitlines()
            if f" {server}:{PORT}" in line
        ]
        # Tor may take another circuit at any time, but never one that a stream
        # from another address was on.
        circuits = [
            circuit
            for _, state, circuit, _ in sorted(
                lines, key=lambda line: int(line[0])
            )
            if state == "SUCCEEDED"
        ]
        assert len(circuits) == 4
        assert not set(circuits[::2]) & set(circuits[1::2])
