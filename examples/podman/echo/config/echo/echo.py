"""Answer on every socket that systemd passes with what comes in."""

import os
import signal
import socket
import threading


def echo(connection: socket.socket) -> None:
    with connection:
        buffer = memoryview(bytearray(1 << 18))
        while count := connection.recv_into(buffer):
            connection.sendall(buffer[:count])


def serve(listener: socket.socket) -> None:
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=echo, args=(connection,)).start()


# A container's first process gets only the signals that it handles.
signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))

# systemd's passed sockets begin at 3; their kind and address family are
# whatever they are.
for fd in range(3, 3 + int(os.environ["LISTEN_FDS"])):
    threading.Thread(target=serve, args=(socket.socket(fileno=fd),)).start()

signal.pause()
