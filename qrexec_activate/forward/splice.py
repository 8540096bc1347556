"""The pump: bytes between a socket and a child's pipes, moved by the kernel and
never copied through Python.

Each direction waits for its own readiness and ends on its own: EOF shuts down
that direction only, an error on the socket ends both. One object owns the pipes
and closes each descriptor exactly once.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct
import termios

import trio

__all__ = ["ClientGone", "Splice", "discard", "half_close", "unread"]

#: What one call may move. More than a pipe holds, so that the pipe's size is
#: the limit.
CHUNK = 1 << 20
#: Pipes of this size where the kernel allows it (the sum per user is limited);
#: the default is 64 KiB.
PIPE_SIZE = 1 << 20
#: struct linger: what close() does. A reset destroys what the client has not
#: read yet, so not where all went well.
_RESET_AT_CLOSE, _NO_LINGER = struct.pack("ii", 1, 0), struct.pack("ii", 0, 0)
_FLAGS = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK
_GONE = {errno.ECONNRESET, errno.EPIPE, errno.ETIMEDOUT, errno.ENOTCONN}


class ClientGone(Exception):
    """The client's end of the socket is gone: nothing more can be delivered."""


def _pipe() -> tuple[int, int]:
    reader, writer = os.pipe2(os.O_CLOEXEC)
    # EPERM: this user's pipes are large enough already. It works with small
    # ones too.
    with contextlib.suppress(OSError):
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
    return reader, writer


class Splice:
    """Two pipes for one child, and what has been moved through them.

    The child's ends stay open here until release_child_ends(), so that a call
    that was never established can be tried again with another child on the same
    pipes and nothing is lost.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.to_qube = 0
        self.from_qube = 0
        self._ends: dict[str, int] = {}
        try:
            self._ends["child_in"], self._ends["up"] = _pipe()
            self._ends["down"], self._ends["child_out"] = _pipe()
            sock.setblocking(False)
            # If this daemon is killed, the kernel closes the socket: that must
            # not look like the end of the service.
            sock.setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, _RESET_AT_CLOSE
            )
            # Only our own ends: O_NONBLOCK on the child's would look as if the
            # call were established.
            os.set_blocking(self._ends["up"], False)
            os.set_blocking(self._ends["down"], False)
        except BaseException:
            self.close()
            raise

    @property
    def child_stdin(self) -> int:
        return self._ends["child_in"]

    @property
    def child_stdout(self) -> int:
        return self._ends["child_out"]

    def established(self) -> bool:
        """Whether the child has made its stdin non-blocking, which
        qrexec-client-vm does as the data phase begins."""
        stdin = self._ends.get("child_in")
        return stdin is None or bool(
            fcntl.fcntl(stdin, fcntl.F_GETFL) & os.O_NONBLOCK
        )

    def unread(self) -> int:
        """How many bytes are on their way to the child."""
        return unread(self._ends["up"]) if "up" in self._ends else 0

    def release_child_ends(self) -> None:
        """Leave the child's ends to the child, so that its going is seen as EOF
        and EPIPE."""
        self._close("child_in", "child_out")

    def close(self) -> None:
        self._close(*self._ends)

    def _close(self, *names: str) -> None:
        for name in names:
            if (fd := self._ends.pop(name, None)) is not None:
                os.close(fd)

    async def _drop(self, name: str) -> None:
        """Close an end that a pump of this object may be waiting on."""
        if name in self._ends:
            trio.lowlevel.notify_closing(self._ends[name])
            self._close(name)

    async def pump_up(self) -> None:
        """Move bytes from the client to the child until the client half-closes,
        then close the child's stdin."""
        source, sink = self._sock.fileno(), self._ends["up"]
        try:
            while count := await _move(source, sink, reading_socket=True):
                self.to_qube += count
                # However much there is to move, the other tasks have their
                # turn.
                await trio.lowlevel.checkpoint()
        except BrokenPipeError:
            # The child reads no more, but may still write. What the client goes
            # on sending is taken and dropped: unread bytes at close() would
            # turn into a reset that destroys what the client has yet to read.
            await self._drop("up")
            await discard(self._sock)
        finally:
            await self._drop("up")

    async def pump_down(self) -> None:
        """Move bytes from the child to the client until the child closes its
        stdout."""
        source, sink = self._ends["down"], self._sock.fileno()
        while count := await _move(source, sink, reading_socket=False):
            self.from_qube += count
            await trio.lowlevel.checkpoint()


async def _move(source: int, sink: int, *, reading_socket: bool) -> int:
    """Move what is there, waiting for both sides to be ready; returns 0 at EOF;
    raises ClientGone."""
    while True:
        try:
            return os.splice(source, sink, CHUNK, flags=_FLAGS)
        except BlockingIOError:
            # One of the two is not ready, and the kernel does not say which.
            # Waiting for the source first means that a full sink is waited for
            # only while there is something to move.
            await trio.lowlevel.wait_readable(source)
            await trio.lowlevel.wait_writable(sink)
        except OSError as error:
            if reading_socket and error.errno == errno.EPIPE:
                raise
            if error.errno in _GONE:
                raise ClientGone from error
            raise


def unread(fd: int) -> int:
    """How many bytes a read could take at once from a socket or a pipe."""
    return int(
        struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, b"\0" * 4))[0]
    )


async def discard(sock: socket.socket) -> None:
    """Take and drop what the client sends until it half-closes."""
    while True:
        try:
            if not sock.recv(1 << 16):
                return
        except BlockingIOError:
            await trio.lowlevel.wait_readable(sock)
        except OSError as error:
            raise ClientGone from error


def half_close(sock: socket.socket) -> bool:
    """Send FIN; False where the socket is closed both ways already. A client
    that is gone is no error here."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        sock.shutdown(socket.SHUT_WR)
    except OSError as error:
        if error.errno not in _GONE:
            raise
        return False
    return True
