"""``python3 -m bench.idle``: what 50 published services cost that nobody uses,
next to the same 50 while they run.

Memory is the PSS of all processes of a systemd user manager of its own, itself
and its bus included, less what these take before anything is published. A page
that several share counts once. Each program is a small web server in Python.
"""

from __future__ import annotations

import argparse
import socket
import sys
from pathlib import Path

import psutil

from qrexec_activate.loopback.machine import Machine

MIB = 2**20
#: A web server that takes its socket from systemd.
TAKES_SOCKET = """\
import http.server, socket
class Handler(http.server.SimpleHTTPRequestHandler):
    def address_string(self):
        return "somebody"
class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_UNIX
server = Server(("app", 0), Handler, bind_and_activate=False)
server.socket = socket.socket(fileno=3)
server.serve_forever()
"""
KINDS = {
    "takes systemd's socket": ["--exec", "/usr/bin/python3 app.py"],
    "takes systemd's socket, `--idle`": [
        "--exec",
        "/usr/bin/python3 app.py",
        "--idle",
        "5min",
    ],
    "listens on a port, `--idle`": [
        *("--exec", "/usr/bin/python3 -m http.server --bind 127.0.0.1 {port}"),
        *("--port", "21000", "--idle", "5min"),
    ],
}
TIMEOUT = 120.0


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python3 -m bench.idle", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--count", type=int, default=50, help="how many services [50]"
    )
    count = parser.parse_args().count
    print(
        f"| {count} programs, each of which | idle | running |\n|---|---|---|"
    )
    for kind, words in KINDS.items():
        # A manager of its own for each: one keeps what it once had for its
        # units.
        with Machine() as machine:
            (machine.home / "app.py").write_text(TAKES_SOCKET)
            empty = _memory(machine)
            idle, running = _measure(machine, count, words)
        print(
            f"| {kind} | {idle / MIB:.1f} MiB | {running / MIB:.0f} MiB |",
            flush=True,
        )
    print(
        f"\nA systemd user manager with its bus, and nothing else:"
        f" {empty / MIB:.1f} MiB."
    )


def _measure(machine: Machine, count: int, words: list[str]) -> tuple[int, int]:
    """Publish so many services, and return what they cost while nobody uses
    them, and while all run."""
    before = _memory(machine)
    _command(machine, "publish", "app", "--count", str(count), *words)
    idle = _memory(machine) - before
    clients = []
    try:
        for number in range(1, count + 1):
            client = socket.socket(socket.AF_UNIX)
            clients.append(client)
            client.settimeout(TIMEOUT)
            client.connect(
                str(machine.runtime / "qubes.ConnectUnix" / f"app-{number}")
            )
            client.sendall(b"HEAD / HTTP/1.0\r\n\r\n")
            if not client.recv(1 << 16).startswith(b"HTTP/1.0 200"):
                raise SystemExit(f"app-{number} does not answer")
        running = _memory(machine) - before
    finally:
        for client in clients:
            client.close()
    _command(
        machine,
        "unpublish",
        *(f"app-{number}" for number in range(1, count + 1)),
    )
    return idle, running


def _command(machine: Machine, *words: str) -> str:
    return machine.run(
        [sys.executable, "-m", "qrexec_activate", *words], timeout=TIMEOUT
    ).stdout


def _memory(machine: Machine) -> int:
    """The PSS of a manager and of all that it started, in bytes."""
    manager = psutil.Process(machine.pid)
    total = 0
    for process in (manager, *manager.children(recursive=True)):
        for line in (
            Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        ):
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total


if __name__ == "__main__":
    main()
