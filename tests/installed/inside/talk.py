"""talk.py HOST PORT | PATH: connect, and print a line that comes; then for each
line of stdin the answer.

An empty line stands for the end of the connection.
"""

import signal
import socket
import sys

# Whatever happens, no test waits for ever.
signal.alarm(120)
if len(sys.argv) == 3:
    sock = socket.create_connection((sys.argv[1], int(sys.argv[2])), 60)
else:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(60)
    sock.connect(sys.argv[1])
with sock, sock.makefile("rw") as stream:
    try:
        print(stream.readline().strip(), flush=True)
        for line in sys.stdin:
            stream.write(line)
            stream.flush()
            print(stream.readline().strip(), flush=True)
    except OSError as error:
        print(type(error).__name__, flush=True)
