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

from .watch import NO_MEMORY_PAUSE, readable, writable

__all__ = [
    "ClientGone",
    "Splice",
    "drop_input",
    "half_close",
    "is_stuck",
    "unread",
    "unsent",
]

#: What one call may move. No less than a pipe holds, so that the pipe's size is
#: the limit.
CHUNK = 1 << 20
#: Pipes to and from the child are of these sizes, as long as all of this
#: process stay within the budget: the kernel allows a user 64 MiB in all pipes
#: of more than one page (fs.pipe-user-pages-soft), and whoever comes after that
#: gets pipes of 4 KiB. From the child a larger one moves more at once.
UP_SIZE, DOWN_SIZE = 1 << 18, 1 << 20
PIPE_BUDGET = 16 << 20
#: struct linger: what close() does. A reset destroys what the client has not
#: read yet, so not where all went well.
RESET_AT_CLOSE, NO_LINGER = struct.pack("ii", 1, 0), struct.pack("ii", 0, 0)
INTERNET = (socket.AF_INET, socket.AF_INET6)
#: asm-generic/sockios.h: whether the next byte is an urgent one.
_SIOCATMARK = 0x8905
#: FIN_WAIT1 and FIN_WAIT2 in linux/tcp.h: the peer's has not come.
_FIN_SENT = (4, 5)
_FLAGS = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK

_enlarged = 0


class ClientGone(Exception):
    """The client's end of the socket is gone: nothing more can be delivered."""


class Splice:
    """Two pipes for one child, and what has been moved through them.

    The child's ends stay open here until release_child_ends(), so that a call
    that was never established can be tried again with another child on the same
    pipes and nothing is lost. Until then the end of what the client sends is
    kept back, too: it would be the end of what can be seen.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.to_qube = 0
        self.from_qube = 0
        self._ends: dict[str, int] = {}
        self._enlarged = 0
        self._released = False
        #: Whether nothing more is taken from the client.
        self.input_over = False
        try:
            self._ends["child_in"], self._ends["up"] = self._pipe(UP_SIZE)
            self._ends["down"], self._ends["child_out"] = self._pipe(DOWN_SIZE)
            sock.setblocking(False)
            # Our own ends; and what the child writes to. qrexec-client-vm makes
            # both of its ends non-blocking as the data phase begins, and
            # blocking again as it closes them (4.2.18 to 4.4.2). So the one is
            # seen to change while it runs, and the other is seen to have
            # changed when it has ended.
            os.set_blocking(self._ends["up"], False)
            os.set_blocking(self._ends["down"], False)
            os.set_blocking(self._ends["child_out"], False)
        except BaseException:
            self.close()
            raise

    def _pipe(self, size: int) -> tuple[int, int]:
        global _enlarged
        reader, writer = os.pipe2(os.O_CLOEXEC)
        if _enlarged + size <= PIPE_BUDGET:
            # EPERM: this user's pipes are large enough already.
            with contextlib.suppress(OSError):
                fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, size)
                _enlarged += size
                self._enlarged += size
        return reader, writer

    @property
    def child_ends(self) -> tuple[int, int]:
        """What are to be its stdin and its stdout."""
        return self._ends["child_in"], self._ends["child_out"]

    # ------------------------------------------------------------ what is seen

    def in_data_phase(self) -> bool:
        """Whether the child's ends tell that the data phase has begun."""
        if self._released:
            return True
        begun = fcntl.fcntl(self._ends["child_in"], fcntl.F_GETFL)
        ended = fcntl.fcntl(self._ends["child_out"], fcntl.F_GETFL)
        return bool(begun & os.O_NONBLOCK) or not ended & os.O_NONBLOCK

    def has_moved_data(self) -> bool:
        """Whether anything tells that the child has written or read bytes, or
        could."""
        return (
            self.in_data_phase()
            or self.from_qube > 0
            or unread(self._ends["down"]) > 0
            or self.to_qube > self.unread()
        )

    def unread(self) -> int:
        """How many bytes are on their way to the child."""
        for name in ("up", "rest"):
            if name in self._ends:
                return unread(self._ends[name])
        return 0

    @property
    def all_sent(self) -> bool:
        """Whether the child needs no pump for what the client has sent."""
        return self._released and "up" not in self._ends

    # ------------------------------------------------------------------- close

    def release_child_ends(self) -> None:
        """Leave the child's ends to the child, so that its going is seen as EOF
        and EPIPE."""
        self._released = True
        self._close("child_in", "child_out")
        if self.input_over:
            self._end_input()

    def close(self) -> None:
        global _enlarged
        self._close(*self._ends)
        _enlarged -= self._enlarged
        self._enlarged = 0

    def _close(self, *names: str) -> None:
        for name in names:
            if (fd := self._ends.pop(name, None)) is not None:
                os.close(fd)

    def _drop(self, name: str) -> None:
        """Close an end that a pump of this object may be waiting on."""
        if name in self._ends:
            trio.lowlevel.notify_closing(self._ends[name])
            self._close(name)

    def _end_input(self) -> None:
        """Let the child see that no more comes, as soon as it may."""
        self.input_over = True
        if not self._released or "up" not in self._ends:
            return
        with contextlib.suppress(OSError):
            # To see what it has yet to read: a reader of our own, as the
            # child's is closed here.
            path = f"/proc/self/fd/{self._ends['up']}"
            flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
            self._ends["rest"] = os.open(path, flags)
        self._drop("up")

    # -------------------------------------------------------------------- move

    async def pump_up(self) -> None:
        """Move bytes from the client to the child until the client half-closes,
        then close the child's stdin."""
        source, sink = self._sock.fileno(), self._ends["up"]
        try:
            while count := await _move(source, sink, self._sock):
                self.to_qube += count
                # However much there is to move, the other tasks have their
                # turn.
                await trio.lowlevel.checkpoint()
        except BrokenPipeError:
            # The child reads no more, but may still write. What the client goes
            # on sending is taken and dropped: unread bytes at close() would
            # turn into a reset that destroys what the client has yet to read.
            self._drop("up")
            while drop_input(self._sock):
                await readable(self._sock.fileno())
        except ClientGone:
            self._end_input()
            raise
        else:
            self._end_input()

    async def pump_down(self) -> None:
        """Move bytes from the child to the client until the child closes its
        stdout."""
        while count := await _move(self._ends["down"], self._sock.fileno()):
            self.from_qube += count
            await trio.lowlevel.checkpoint()


async def _move(
    source: int, sink: int, client: socket.socket | None = None
) -> int:
    """Move what is there (`client`: of this socket), waiting for both sides to
    be ready; returns 0 at EOF; raises ClientGone."""
    while True:
        try:
            if client is not None and client.family in INTERNET:
                _drop_urgent(client)
            return os.splice(source, sink, CHUNK, flags=_FLAGS)
        except BlockingIOError:
            # One of the two is not ready, and the kernel does not say which.
            # Waiting for the source first means that a full sink is waited for
            # only while there is something to move.
            await readable(source)
            await writable(sink)
        except OSError as error:
            if error.errno == errno.ENOMEM:
                await trio.sleep(NO_MEMORY_PAUSE)
                continue
            if client is not None and error.errno == errno.EPIPE:
                raise
            # A route that is gone, a peer that is unreachable: whatever a
            # socket reports, it carries nothing any more.
            raise ClientGone from error


def _drop_urgent(sock: socket.socket) -> None:
    """Leave out what a client has sent out of band, as read(2) does:
    splice(2) comes to such a byte and never goes on."""
    # Multipath TCP has no such bytes, and no such question.
    with contextlib.suppress(OSError):
        if any(fcntl.ioctl(sock, _SIOCATMARK, bytes(4))):
            # In line, a read takes that byte and no other.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
            sock.recv(1)


def unread(fd: int) -> int:
    """How many bytes a read could take at once from a socket or a pipe."""
    return _count(fd, termios.FIONREAD)


def unsent(sock: socket.socket) -> int:
    """How many bytes a TCP client's kernel has yet to acknowledge; none where
    that is not told, as of SCTP."""
    try:
        return _count(sock.fileno(), termios.TIOCOUTQ)
    except OSError:
        return 0


def _count(fd: int, what: int) -> int:
    return int(struct.unpack("i", fcntl.ioctl(fd, what, bytes(4)))[0])


def drop_input(sock: socket.socket) -> bool:
    """Take and drop what has come; False once the client has half-closed, or is
    gone."""
    try:
        for _ in range(64):
            if not sock.recv(1 << 16, socket.MSG_DONTWAIT):
                return False
    except BlockingIOError:
        pass
    except OSError:
        return False
    return True


def is_stuck(sock: socket.socket) -> bool:
    """Whether input of a TCP client is here that nobody takes, and it may have
    more. Since qrexec-client-vm has shut reading down, the kernel tells it of
    no room: unless that input makes close() a reset, it waits for minutes."""
    with contextlib.suppress(OSError):
        state = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
        return state in _FIN_SENT and unread(sock.fileno()) > 0
    return False


def at_close(sock: socket.socket, what: bytes) -> None:
    """Say what becomes of a TCP connection as its socket is closed."""
    # Python sets no such option of a vsock.
    if sock.family in INTERNET:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, what)


def half_close(sock: socket.socket) -> bool:
    """Send FIN; False where the socket is closed both ways already. A client
    that is gone is no error here."""
    at_close(sock, NO_LINGER)
    try:
        sock.shutdown(socket.SHUT_WR)
    except OSError:
        return False
    return True
