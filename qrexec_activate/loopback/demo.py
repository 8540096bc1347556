"""Show on one machine, without Qubes, that a local address reaches the qube
that its drop-in names.

Everything is real but the qubes and qrexec itself: the units, systemd, the
daemon, the qubes.ConnectUnix service. What is shown is what happened: an answer
that is not the expected one is an error, and so is anything left behind.
"""

from __future__ import annotations

import errno
import http.client
import http.server
import shutil
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click

from .machine import Machine, MachineError

__all__ = ["command", "demo"]

PORT = 1234
LISTENERS = {"gitweb": "127.0.0.1", "work": "127.0.0.2"}
UNIX_QUBE = "vault"
UNIX_NAME = "notes"
#: What dom0 opens, for the second of the qubes, and by which feature.
GIVEN_HOST = "127.0.0.3"
GIVEN_FEATURE = "connect-web"

DROP_IN = """\
[Socket]
ListenStream={address}
FileDescriptorName={qube}
"""
POLICY = """\
qubes.ConnectTCP  +{port} client gitweb allow
qubes.ConnectTCP  +{port} client work allow
qubes.ConnectUnix +notes client vault allow
"""
#: An answer takes some 0.2 s, most of it the start of the daemon; a busy
#: machine may need far longer.
ANSWER_TIMEOUT = 30.0
#: How often to look whether dom0's address is there, or gone.
LOOK = 0.02
#: The last connection is logged when its qrexec-client-vm has ended, which
#: takes some 10 ms.
LOG_TIMEOUT = 3.0


@click.command("demo")
@click.pass_context
def command(ctx: click.Context) -> None:
    """Show it working on this machine, without Qubes.

    A private user manager runs the units beside three pretend qubes, with a web
    server in each. Your own units are not touched, and everything is stopped
    and removed at the end.
    """
    ctx.exit(demo())


def demo() -> int:
    """Run the demonstration and print what happens; the exit code is 0 if every
    answer was the right one."""
    if shutil.which("socat") is None:
        raise MachineError(
            "qubes.ConnectUnix needs socat: install the package socat"
        )
    with Machine(qubesdb=True) as machine:
        wrong = _show(machine)
    if machine.directory.exists():
        wrong.append(f"{machine.directory} is left behind")
    for problem in wrong:
        print(f"Wrong: {problem}")
    if wrong:
        return 1
    print(
        "Each address reached its own qube. Everything that was started is"
        " stopped, and nothing is left behind."
    )
    return 0


def _show(machine: Machine) -> list[str]:
    """Everything that happens while the machine runs; what went wrong, a line
    each."""
    for qube in (*LISTENERS, UNIX_QUBE):
        machine.add_qube(qube)
    machine.add_rpc(UNIX_QUBE, "qubes.ConnectUnix")
    print(
        f"A private systemd user manager runs, with pretend qubes:"
        f" {', '.join(LISTENERS)} and {UNIX_QUBE}."
    )

    port = _free_port(
        [*LISTENERS.values(), GIVEN_HOST, *map(machine.address, LISTENERS)]
    )
    if port != PORT:
        print(f"Port {PORT} is taken on this machine, so this uses {port}.")
    unix_socket = machine.runtime / UNIX_NAME
    (machine.loopback / "policy").write_text(POLICY.format(port=port))

    with ExitStack() as stack:
        for qube in LISTENERS:
            stack.enter_context(
                _web_server(qube, (machine.address(qube), port))
            )
        folder = (
            machine.loopback / "qubes" / UNIX_QUBE / "run" / "qubes.ConnectUnix"
        )
        folder.mkdir()
        stack.enter_context(_web_server(UNIX_QUBE, folder / UNIX_NAME))

        tcp, unix = (
            f"qrexec-connect-tcp@{port}.socket",
            f"qrexec-connect-unix@{UNIX_NAME}.socket",
        )
        for qube, host in LISTENERS.items():
            _write(machine, tcp, qube, f"{host}:{port}")
        _write(machine, unix, UNIX_QUBE, f"%t/{UNIX_NAME}")
        print(f"\n$ systemctl --user enable --now {tcp} {unix}")
        machine.systemctl("enable", "--now", tcp, unix)

        print("\nWhat answers:")
        wrong = []
        for qube, host in LISTENERS.items():
            wrong += _check(
                f"http://{host}:{port}/", qube, socket.AF_INET, (host, port)
            )
        # %t in a unit of a user is this folder.
        wrong += _check(
            f"unix socket $XDG_RUNTIME_DIR/{UNIX_NAME}",
            UNIX_QUBE,
            socket.AF_UNIX,
            str(unix_socket),
        )
        wrong += _from_dom0(machine, port)

        print("\nWhat the daemons logged:")
        print("".join(f"  {line}\n" for line in _log_lines(machine)))
    return wrong


def _write(machine: Machine, unit: str, qube: str, address: str) -> None:
    text = DROP_IN.format(address=address, qube=qube)
    machine.write_drop_in(unit, qube, text)
    print(f"\n~/.config/systemd/user/{unit}.d/{qube}.conf")
    print("".join(f"    {line}\n" for line in text.splitlines()), end="")


def _from_dom0(machine: Machine, port: int) -> list[str]:
    """Let the pretend dom0 open an address in the running qube, and take it
    away again; what went wrong, a line each."""
    qube = [*LISTENERS][-1]
    line = f"tcp {port} {qube} {GIVEN_HOST}:{port}"
    feature = f"client vm-config.{GIVEN_FEATURE}"
    url = f"http://{GIVEN_HOST}:{port}/"
    print(f"\nIn dom0:\n$ qvm-features {feature} '{line}'")
    machine.say(f"/vm-config/{GIVEN_FEATURE}", line)
    wrong = _check(url, qube, socket.AF_INET, (GIVEN_HOST, port))
    print(f"$ qvm-features --unset {feature}")
    machine.say(f"/vm-config/{GIVEN_FEATURE}", None)
    deadline = time.monotonic() + ANSWER_TIMEOUT
    while not (closed := _is_free(GIVEN_HOST, port)) and (
        time.monotonic() < deadline
    ):
        time.sleep(LOOK)
    print(f"  {url:<40} {'closed' if closed else 'still open'}")
    return wrong if closed else [*wrong, f"{url} was not closed"]


def _check(
    what: str,
    qube: str,
    family: socket.AddressFamily,
    address: str | tuple[str, int],
) -> list[str]:
    """Ask one listener which qube it reaches; print the answer, and return what
    is wrong with it."""
    try:
        answer = _get(family, address)
    except (OSError, http.client.HTTPException) as error:
        answer = f"no answer: {error or type(error).__name__}"
    print(f"  {what:<40} {answer}")
    return (
        []
        if answer == _page(qube)
        else [f"{what} did not reach {qube}: {answer}"]
    )


def _get(family: socket.AddressFamily, address: str | tuple[str, int]) -> str:
    with _connected(family, address) as sock:
        connection = http.client.HTTPConnection("qube")
        connection.sock = sock
        connection.request("GET", "/", headers={"Connection": "close"})
        return (
            connection.getresponse()
            .read()
            .decode(errors="backslashreplace")
            .strip()
        )


def _connected(
    family: socket.AddressFamily, address: str | tuple[str, int]
) -> socket.socket:
    """A connection, tried again while it is refused: what dom0 opens takes its
    time to be there."""
    deadline = time.monotonic() + ANSWER_TIMEOUT
    while True:
        sock = socket.socket(family)
        sock.settimeout(ANSWER_TIMEOUT)
        try:
            sock.connect(address)
        except OSError as error:
            sock.close()
            if error.errno != errno.ECONNREFUSED or time.monotonic() > deadline:
                raise
            time.sleep(LOOK)
        else:
            return sock


def _page(qube: str) -> str:
    return f"This is {qube}."


@contextmanager
def _web_server(qube: str, address: tuple[str, int] | Path) -> Iterator[None]:
    """A web server of a pretend qube, which says on every page which qube it
    is."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = f"{_page(qube)}\n".encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def address_string(self) -> str:
            return qube

        def log_message(self, *args: Any) -> None:
            pass

    server: socketserver.BaseServer
    if isinstance(address, Path):
        server = socketserver.ThreadingUnixStreamServer(str(address), Handler)
    else:
        server = http.server.ThreadingHTTPServer(address, Handler)
    with server:
        thread = threading.Thread(
            target=server.serve_forever, kwargs={"poll_interval": 0.05}
        )
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


def _free_port(hosts: list[str]) -> int:
    """PORT, or the next one that is free on all these addresses."""
    for port in range(PORT, 65536):
        if all(_is_free(host, port) for host in hosts):
            return port
    raise MachineError(f"no port from {PORT} up is free on {', '.join(hosts)}")


def _is_free(host: str, port: int) -> bool:
    with socket.socket() as sock:
        # As systemd and the web servers do: connections of an earlier run that
        # linger do not count.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, port))
            sock.listen()
        except OSError:
            return False
        return True


def _log_lines(machine: Machine) -> list[str]:
    """What the daemons logged, as soon as they have nothing to add."""
    deadline = time.monotonic() + LOG_TIMEOUT
    before, now = -1, machine.daemon_log.stat().st_size
    while now != before and time.monotonic() < deadline:
        time.sleep(0.3)
        before, now = now, machine.daemon_log.stat().st_size
    text = machine.daemon_log.read_text(errors="backslashreplace")
    # As a person would write them: the machine's folders have names that say
    # nothing.
    for folder, name in (
        (machine.home, "~"),
        (machine.runtime, "$XDG_RUNTIME_DIR"),
    ):
        text = text.replace(str(folder), name)
    return text.splitlines()
