"""The pretend qubes of a container, and the agent that stand-in
qrexec-client-vm processes call.

It runs outside the sandboxes of callers, in a network of its own. Every pretend
qube answers on its ports and sockets with a line that names it and the address
of the caller, and then echoes.
"""

import array
import json
import os
import pwd
import select
import signal
import socket
import socketserver
import subprocess
import sys
import threading
from pathlib import Path

HERE = Path("/var/lib/pretend")
AGENT = Path("/run/qubes/qrexec-agent")
CLIENT = (
    "import sys; sys.path.insert(0, '/var/lib/pretend'); from"
    " qrexec_activate.loopback.client_vm import main; main()"
)


class Greeter(socketserver.BaseRequestHandler):
    """Says which qube it is and who calls, then echoes."""

    def handle(self):
        peer = (
            self.client_address[0] if self.client_address else "a unix socket"
        )
        self.request.sendall(f"{self.server.qube} to {peer}\n".encode())
        while data := self.request.recv(65536):
            self.request.sendall(data)


class TCPServer(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True


class UnixServer(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True


def serve(qube, address):
    if isinstance(address, tuple):
        server = TCPServer(address, Greeter)
    else:
        address.parent.mkdir(parents=True, exist_ok=True)
        address.unlink(missing_ok=True)
        server = UnixServer(str(address), Greeter)
    server.qube = qube
    threading.Thread(target=server.serve_forever, daemon=True).start()


def call(connection):
    """Make one call with the descriptors of the caller; kill it if the caller
    goes."""
    with connection:
        data, ancillary, _, _ = connection.recvmsg(
            65536, socket.CMSG_SPACE(3 * 4)
        )
        descriptors = array.array("i")
        for _, _, part in ancillary:
            descriptors.frombytes(part)
        arguments = json.loads(data[4:])
        _, uid, _ = array.array(
            "i",
            connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12),
        )
        with (HERE / "callers").open("a") as log:
            print(pwd.getpwuid(uid).pw_name, *arguments, file=log)
        stdin, stdout, stderr = descriptors
        process = subprocess.Popen(
            [sys.executable, "-IS", "-c", CLIENT, *arguments],
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            env={"PATH": os.environ["PATH"], "QREXEC_LOOPBACK": str(HERE)},
        )
        for descriptor in descriptors:
            os.close(descriptor)
        pidfd = os.pidfd_open(process.pid)
        ready, _, _ = select.select([pidfd, connection], [], [])
        if pidfd not in ready:
            process.send_signal(signal.SIGTERM)
        code = process.wait()
        os.close(pidfd)
        if pidfd in ready:
            connection.sendall(str(code if code >= 0 else 128 - code).encode())


def main():
    for qube, address in json.loads((HERE / "servers").read_text()):
        serve(
            qube, tuple(address) if isinstance(address, list) else Path(address)
        )
    AGENT.parent.mkdir(exist_ok=True)
    AGENT.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(AGENT))
        # As qrexec's own: every user of the qube may call.
        AGENT.chmod(0o666)
        listener.listen(128)
        while True:
            connection, _ = listener.accept()
            threading.Thread(
                target=call, args=(connection,), daemon=True
            ).start()


main()
