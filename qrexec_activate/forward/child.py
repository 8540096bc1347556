"""qrexec-client-vm: how it is started, and what can be seen of one that runs.

A pid that cannot be mistaken for another's, its exit code, what it said, and
how far its call has come, as /proc shows it. Decides nothing.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass

from ..routing.claim import Route
from .settings import Relay
from .spawn import FileAction, Order, carry_out
from .watch import readable

__all__ = ["STARVED", "Child", "Client"]

#: Errors that say that the machine is short of something, and that pass.
STARVED = {
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.EAGAIN,
    errno.ENOBUFS,
    errno.ENOSPC,
}
#: A unix socket that listens: __SO_ACCEPTCON among the flags in /proc/net/unix.
_LISTENS = 1 << 16


@dataclass(slots=True)
class Client:
    """How to start qrexec-client-vm."""

    path: str
    #: AUTO: it takes a socket, as far as is known (--use-stdin-socket, since
    #: 4.2.19).
    relay: Relay
    environment: dict[str, str]

    def order(
        self,
        route: Route,
        environment: dict[str, str],
        stdin: int,
        stdout: int | None,
    ) -> Order:
        """What is to be started. `stdout` None: stdin is a socket that serves
        both ways."""
        argv = [self.path, route.target, route.call]
        actions: list[FileAction] = [(os.POSIX_SPAWN_DUP2, stdin, 0)]
        if stdout is None:
            argv.insert(1, "--use-stdin-socket")
            actions.append((os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0))
        else:
            actions.append((os.POSIX_SPAWN_DUP2, stdout, 1))
        variables = {**self.environment, **environment}
        return Order(self.path, argv, variables, actions)

    def start(self, orders: Sequence[Order]) -> None:
        """Start them all at once; each one's pid() tells what became of it."""
        carry_out(orders)


class Child:
    """A running qrexec-client-vm: a pid that cannot be mistaken for another's.

    One that comes with its pidfd was started by an earlier daemon, and is no
    child of this process.
    """

    __slots__ = ("_exit_code", "adopted", "pid", "pidfd")

    def __init__(self, pid: int, pidfd: int | None = None) -> None:
        self.pid = pid
        self.adopted = pidfd is not None
        self.pidfd = pidfd
        self._exit_code: int | None = None

    def open(self) -> int:
        """Open its pidfd, and return it. The pid stays its own until wait() has
        taken the exit code."""
        if self.pidfd is None:
            self.pidfd = os.pidfd_open(self.pid)
        return self.pidfd

    async def ended(self) -> None:
        await readable(self.open())

    def signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.open(), number)

    def wait(self) -> int | None:
        """Return the exit code of one that has ended, negative for a signal;
        None if only its parent can know."""
        if self._exit_code is None and not self.adopted:
            self._exit_code = os.waitstatus_to_exitcode(
                os.waitpid(self.pid, 0)[1]
            )
        return self._exit_code

    # ------------------------------------------------------- what can be seen

    def is_answered(self) -> bool:
        """Whether dom0 has answered: after that it opens its end of the vchan.

        On Xen that is /dev/xen/gntalloc and evtchn; a vchan over sockets (as in
        qrexec's own tests) is a unix socket that listens. Seen with 4.4.2.
        """
        sockets = set()
        try:
            with os.scandir(f"/proc/{self.pid}/fd") as entries:
                for entry in entries:
                    link = os.readlink(entry.path)
                    if link.startswith("/dev/xen/"):
                        return True
                    if link.startswith("socket:["):
                        sockets.add(link[len("socket:[") : -1])
            return bool(sockets & _listening(self.pid))
        except OSError:
            # It is ending, or may not be looked at.
            return False

    def is_ending(self) -> bool:
        """Whether it holds no descriptors any more: only its exit code is yet
        to come."""
        try:
            return not os.listdir(f"/proc/{self.pid}/fd")
        except OSError:
            return True

    def cpu_time(self) -> float:
        """Return the seconds of CPU that it has used."""
        try:
            # clock_getcpuclockid(3), which Python lacks: the clock of a pid.
            return time.clock_gettime(~self.pid << 3 | 2)
        except OSError:
            return 0.0

    def close(self) -> None:
        if self.pidfd is not None:
            os.close(self.pidfd)
            self.pidfd = None


def _listening(pid: int) -> set[str]:
    """Return the inodes of the unix sockets that listen where this process is.

    Anybody may put line feeds into an abstract name: a line that looks like
    another socket's counts only if the process has that socket open, too.
    """
    found = set()
    with open(f"/proc/{pid}/net/unix", "rb") as lines:
        for line in lines:
            fields = line.split(None, 7)
            with contextlib.suppress(ValueError, IndexError):
                if int(fields[3], 16) & _LISTENS:
                    found.add(fields[6].decode("ascii", "replace"))
    return found
