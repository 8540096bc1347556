"""Connections that outlived an earlier daemon, found in the service's control
group.

qrexec-client-vm goes on without the daemon, but somebody has to see its client
hang up: it would drain a service that goes on sending for ever (qrexec 4.4.2).
So the next daemon takes a duplicate of each one's socket again.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import socket
import stat
import time
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass

from ..routing.claim import Route
from .settings import CARETAKER
from .splice import unread

__all__ = ["Orphan", "find_caretakers", "find_orphans", "left_to_read"]


#: The same number on every architecture (Linux 5.6 up); Python has no function
#: for it.
_SYS_PIDFD_GETFD = 438


@dataclass(slots=True)
class Orphan:
    """A qrexec-client-vm of an earlier daemon; `sock` is None where it was
    spliced, and so lost its client."""

    pid: int
    pidfd: int
    sock: socket.socket | None
    route: Route
    connection: str
    peer: str
    #: Seconds since it was started, not counting any in which the machine may
    #: have been suspended.
    age: float


def _members() -> list[int]:
    """The processes in this one's control group, itself included; empty where
    that cannot be told."""
    with (
        contextlib.suppress(OSError, ValueError),
        open("/proc/self/cgroup", encoding="utf-8") as lines,
    ):
        for line in lines:
            _, controllers, path = line.rstrip("\n").split(":", 2)
            # Where both hierarchies are mounted, systemd keeps its services in
            # either.
            folders = {"": ("", "unified"), "name=systemd": ("systemd",)}.get(
                controllers, ()
            )
            for folder in folders:
                with (
                    contextlib.suppress(OSError),
                    open(f"/sys/fs/cgroup/{folder}{path}/cgroup.procs") as pids,
                ):
                    # 0 stands for those that a container does not see.
                    return [int(pid) for pid in pids if int(pid)]
    return []


def _read_zero_separated(path: str) -> list[str]:
    with open(path, "rb") as file:
        return [os.fsdecode(part) for part in file.read().split(b"\0")[:-1]]


def _duplicate(pidfd: int, fd: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    duplicate = int(libc.syscall(_SYS_PIDFD_GETFD, pidfd, fd, 0))
    if duplicate < 0:
        number = ctypes.get_errno()
        # What Linux before 6.9 says of a process that is ending.
        number = errno.ESRCH if number == errno.EBADF else number
        raise OSError(number, os.strerror(number))
    return duplicate


def find_orphans(known: Container[int] = ()) -> Iterator[Orphan]:
    """Yield what goes on without its daemon, but for those known already.

    Raises PermissionError where the kernel does not let us look, and other
    OSErrors where it is short of something.
    """
    members = _members()
    for pid in members:
        if pid == os.getpid() or pid in known:
            continue
        # The pidfd first: whatever is read after it can only be of this
        # process, or fail.
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            pidfd = os.pidfd_open(pid)
            try:
                orphan = _examine(pid, pidfd, members)
            except BaseException:
                os.close(pidfd)
                raise
            if orphan is None:
                os.close(pidfd)
            else:
                yield orphan


def find_caretakers() -> Iterator[int]:
    """Yield a pidfd of each process here that looks after orphans."""
    for pid in _members():
        if pid == os.getpid():
            continue
        with contextlib.suppress(OSError):
            pidfd = os.pidfd_open(pid)
            theirs = False
            with contextlib.suppress(OSError):
                names = _read_zero_separated(f"/proc/{pid}/environ")
                theirs = any(name.startswith(f"{CARETAKER}=") for name in names)
            if theirs:
                yield pidfd
            else:
                os.close(pidfd)


def _has_daemon(parent: int, members: Sequence[int]) -> bool:
    """Whether a process has a parent that sees to it: this daemon, or another
    one in the same control group (two in one terminal, or in a container)."""
    if parent == os.getpid():
        return True
    if parent not in members:
        return False
    try:
        return os.path.samefile(f"/proc/{parent}/exe", "/proc/self/exe")
    except OSError:
        return False


def _examine(pid: int, pidfd: int, members: Sequence[int]) -> Orphan | None:
    with open(f"/proc/{pid}/stat", "rb") as file:
        # proc(5): what follows the parenthesized name are the fields from the
        # third on; starttime is the 22nd.
        fields = file.read().rpartition(b")")[2].split()
        state, parent, started = fields[0], fields[1], int(fields[19])
    if state == b"Z" or _has_daemon(int(parent), members):
        return None
    try:
        environment = dict(
            entry.partition("=")[::2]
            for entry in _read_zero_separated(f"/proc/{pid}/environ")
        )
    except PermissionError:
        return None
    argv = _read_zero_separated(f"/proc/{pid}/cmdline")
    if "QREXEC_ACTIVATE_CONNECTION" not in environment or len(argv) < 3:
        return None
    service, _, argument = argv[-1].partition("+")
    address = environment.get("QREXEC_ACTIVATE_LISTENER", "")
    sock = None
    # Not what fd 0 is: one with pipes closes them at their end, and may get the
    # number again for something of its own.
    if "--use-stdin-socket" in argv[:-2]:
        sock = socket.socket(fileno=_duplicate(pidfd, 0))
    return Orphan(
        pid,
        pidfd,
        sock,
        Route(
            address,
            argv[-2],
            service,
            argument,
            environment.get("QREXEC_ACTIVATE_UNIT", ""),
        ),
        environment["QREXEC_ACTIVATE_CONNECTION"],
        environment.get("QREXEC_ACTIVATE_PEER", ""),
        # Both clocks start at boot; the other one does not stop at a suspend.
        max(time.monotonic() - started / os.sysconf("SC_CLK_TCK"), 0.0),
    )


def left_to_read(pidfd: int) -> int:
    """How many bytes its stdin, a pipe, still holds for a process that has
    begun to read it. A call that is not established will have none of them: its
    client has gone."""
    with contextlib.suppress(OSError):
        pipe = _duplicate(pidfd, 0)
        try:
            begun = fcntl.fcntl(pipe, fcntl.F_GETFL) & os.O_NONBLOCK
            fifo = stat.S_ISFIFO(os.fstat(pipe).st_mode)
            return unread(pipe) if begun and fifo else 0
        finally:
            os.close(pipe)
    return 0
