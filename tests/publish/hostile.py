"""A program that was published, and tries all that it is told to: each line is
a way to try, and the answer says whether it is open.

It takes its socket from systemd, or, with an argument, listens on that port.
"""

import contextlib
import ctypes
import os
import socket
import sys

KINDS = (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET)


def reaches(family: int, address: object) -> bool:
    for kind in KINDS if family == socket.AF_UNIX else KINDS[:1]:
        with contextlib.suppress(OSError), socket.socket(family, kind) as sock:
            sock.settimeout(5)
            sock.connect(address)
            return True
    return False


def is_open(way: str) -> bool:
    kind, _, what = way.partition(" ")
    if kind == "tcp":
        host, port = what.split()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return reaches(family, (host, int(port)))
    if kind == "unix":
        return reaches(socket.AF_UNIX, what)
    if kind == "abstract":
        return reaches(socket.AF_UNIX, f"\0{what}")
    if kind == "write":
        with contextlib.suppress(OSError):
            os.close(os.open(what, os.O_WRONLY))
            return True
        return False
    if kind == "io_uring":
        # 425 is io_uring_setup on every architecture.
        ring = ctypes.CDLL(None, use_errno=True).syscall(425, 1, bytes(120))
        return ring >= 0
    raise ValueError(way)


def serve(listener: socket.socket) -> None:
    while True:
        with listener.accept()[0] as client, client.makefile("rw") as file:
            for line in file:
                answer = "open" if is_open(line.rstrip("\n")) else "closed"
                file.write(f"{answer}\n")
                file.flush()


if __name__ == "__main__":
    if sys.argv[1:]:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", int(sys.argv[1])))
        listener.listen()
    else:
        listener = socket.socket(fileno=3)
    serve(listener)
