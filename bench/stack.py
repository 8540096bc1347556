"""A qrexec that somebody has brought up on this machine (QREXEC_STACK, see
docs/testing.md): calls go all the way to an echo service, which a qube of its
has while the bench runs."""

from __future__ import annotations

import contextlib
import socketserver
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from .rivals import ECHO

__all__ = ["END_TO_END", "client_of", "serving"]

#: What is measured: its qube has no other service.
END_TO_END = ("first-byte", "connections", "busy")
#: A call takes so much longer than with the stand-in that connections are
#: counted for so many times as long.
LONGER = 3
SERVICE = f"qubes.ConnectTCP+{ECHO}"
#: As of qubes.ConnectTCP since 4.2.19: the agent itself connects; before, a
#: script did.
CONFIG = "skip-service-descriptor=true\nexit-on-service-eof=true\n"
SCRIPT = """\
#!/bin/sh
exec socat -b 65536 STDIN!!STDOUT,shut-close UNIX-CONNECT:{}
"""


def client_of(folder: Path) -> Path:
    return folder / "bin" / "qrexec-client-vm"


class _Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        with contextlib.suppress(OSError):
            while data := self.request.recv(65536):
                self.request.sendall(data)


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    request_queue_size = 1024


@contextlib.contextmanager
def serving(folder: Path, qube: str, *, linked: bool) -> Iterator[None]:
    """Let the qube have the service, by a link or a script. Where it has one
    already, that is an error, and stays."""
    services = folder / "qubes" / qube / "qubes-rpc"
    if not services.is_dir():
        raise SystemExit(f"bench: {folder} has no qube {qube}")
    with contextlib.ExitStack() as made:
        place = Path(
            made.enter_context(tempfile.TemporaryDirectory(prefix="qa-echo-")),
            "socket",
        )
        server = made.enter_context(_Server(str(place), _Echo))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        made.callback(server.shutdown)
        service = services / SERVICE
        if linked:
            service.symlink_to(place)
            made.callback(service.unlink)
            config = services.with_name("rpc-config") / SERVICE
            _write(made, config, CONFIG)
        else:
            _write(made, service, SCRIPT.format(place))
            service.chmod(0o755)
        yield


def _write(made: contextlib.ExitStack, path: Path, text: str) -> None:
    with path.open("x") as file:
        made.callback(path.unlink)
        file.write(text)
