"""The connections that are open now, whichever daemon began them.

Each is a qrexec-client-vm, which says in its environment what it is for and
goes on without its daemon; so /proc is asked, and not the daemon.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePath

import psutil

from ..forward.outcome import DISCONNECT
from ..routing.unitfile import address_key, plain_address
from .netproc import Holder, holders, process_name
from .sockdiag import TcpConnection, tcp_connections
from .survey import Survey

__all__ = ["Connection", "end", "open_connections"]

#: A set-up that takes longer is most likely waiting for a person, who has been
#: asked in dom0.
PROMPT_AGE = 2.0
#: From the first signal to SIGKILL, in seconds.
GRACE = 2.0

_UNIX_PEER = re.compile(r"pid (\d+) uid (\d+)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Connection:
    """An open connection. Bytes are None where the kernel does not count them,
    as on unix sockets."""

    id: str
    pid: int
    created: float
    #: Seconds since it began.
    age: float
    #: "open", "setting up", or "waiting" for an answer to a prompt.
    state: str
    #: "hand-over" or "splice".
    relay: str
    listener: str
    target: str
    call: str
    unit: str
    peer: str
    peer_process: Holder | None
    bytes_to_qube: int | None
    bytes_from_qube: int | None

    @property
    def began(self) -> float:
        """Seconds since the epoch."""
        return time.time() - self.age

    def matches(self, word: str) -> bool:
        """Whether a person who writes this word may mean this connection, or
        its route."""
        return word in (
            self.id,
            self.listener,
            self.target,
            self.call,
            self.unit,
            self.unit.removesuffix(".socket"),
        )

    def __str__(self) -> str:
        return (
            f"{self.id}: {self.peer} on {self.listener} → {self.target}"
            f" {self.call}"
        )


@dataclass(slots=True)
class _Found:
    process: psutil.Process
    environment: dict[str, str]
    words: list[str]
    parent: int
    #: What psutil takes for the time of its start, which may be a second off;
    #: tells two processes of one pid apart.
    created: float
    age: float


def open_connections(survey: Survey) -> list[Connection]:
    """Return the open connections of this manager's daemons, the oldest
    first."""
    found = list(_processes(survey))
    # What qrexec-client-vm may have started itself has inherited its
    # environment. Nothing that only calls itself the same hides another.
    pids = {one.process.pid for one in found}
    found = [one for one in found if one.parent not in pids]
    tcp = (
        tcp_connections()
        if any(address_key(_env(one, "PEER")) for one in found)
        else []
    )
    # The end that belongs to the daemon looks at the peer; the client's own end
    # is the other way round.
    ours = {(one.remote, one.local[1]): one for one in tcp}
    theirs = {(one.local, one.remote[1]): one for one in tcp}
    ends = {one.process.pid: _ends(one, ours, theirs) for one in found}
    clients = holders(
        their.inode for _, their in ends.values() if their is not None
    )
    connections = []
    for one in found:
        our, their = ends[one.process.pid]
        client = (
            clients.get(their.inode) if their else _unix_peer(_env(one, "PEER"))
        )
        connections.append(_connection(one, our, client))
    return sorted(connections, key=lambda one: (-one.age, one.id))


def _processes(survey: Survey) -> Iterable[_Found]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if survey.user and process.uids().real != os.getuid():
                continue
            environment = process.environ()
            if "QREXEC_ACTIVATE_CONNECTION" not in environment or not _is_of(
                survey, process.pid
            ):
                continue
            words = process.cmdline()
            if len(words) >= 3:
                yield _Found(
                    process,
                    environment,
                    words,
                    process.ppid(),
                    process.create_time(),
                    _age(process.pid),
                )


def _age(pid: int) -> float:
    with open(f"/proc/{pid}/stat", "rb") as file:
        # proc(5): what follows the name in parentheses are the fields from the
        # third on; starttime is the 22nd.
        started = int(file.read().rpartition(b")")[2].split()[19])
    return max(
        time.clock_gettime(time.CLOCK_BOOTTIME)
        - started / os.sysconf("SC_CLK_TCK"),
        0.0,
    )


def _is_of(survey: Survey, pid: int) -> bool:
    """Whether a process belongs to a daemon of the manager that was asked: to
    its unit's control group, which nobody else can join."""
    with open(
        f"/proc/{pid}/cgroup", encoding="utf-8", errors="surrogateescape"
    ) as lines:
        groups = [line.rstrip("\n").split(":", 2)[2] for line in lines]
    if survey.user and not survey.control_group:
        return True
    if not survey.user and any("/user@" in group for group in groups):
        return False
    return any(
        group.startswith(f"{survey.control_group.rstrip('/')}/")
        and PurePath(group).name in survey.daemons
        for group in groups
    )


def _env(one: _Found, name: str) -> str:
    return one.environment.get(f"QREXEC_ACTIVATE_{name}", "")


def _ends(
    one: _Found,
    ours: dict[tuple[tuple[str, int], int], TcpConnection],
    theirs: dict[tuple[tuple[str, int], int], TcpConnection],
) -> tuple[TcpConnection | None, TcpConnection | None]:
    peer, listener = (
        address_key(_env(one, "PEER")),
        address_key(_env(one, "LISTENER")),
    )
    if (
        peer is None
        or listener is None
        or peer[0] != "ip"
        or listener[0] != "ip"
    ):
        return None, None
    key = ((peer[1], peer[2]), listener[2])
    return ours.get(key), theirs.get(key)


def _unix_peer(peer: str) -> Holder | None:
    """The process at the other end of a unix socket, if it is still there;
    another may have its number by now."""
    match = _UNIX_PEER.fullmatch(peer)
    if match is None:
        return None
    name = process_name(int(match[1]))
    return Holder(int(match[1]), name) if name else None


def _connection(
    one: _Found, tcp: TcpConnection | None, client: Holder | None
) -> Connection:
    handed_over, established = _descriptor(one.process.pid)
    state = (
        "open"
        if established
        else "setting up"
        if one.age < PROMPT_AGE
        else "waiting"
    )
    return Connection(
        id=one.environment["QREXEC_ACTIVATE_CONNECTION"],
        pid=one.process.pid,
        created=one.created,
        age=one.age,
        state=state,
        relay="hand-over" if handed_over else "splice",
        listener=plain_address(_env(one, "LISTENER")),
        target=one.words[-2],
        call=one.words[-1],
        unit=_env(one, "UNIT"),
        peer=_env(one, "PEER"),
        peer_process=client,
        bytes_to_qube=tcp.received if tcp else None,
        bytes_from_qube=tcp.sent if tcp else None,
    )


def _descriptor(pid: int) -> tuple[bool, bool]:
    """Whether a qrexec-client-vm holds the socket itself, and whether its call
    is established.

    It makes its stdin non-blocking as the data phase begins (qrexec 4.4.2).
    """
    handed_over = established = False
    with contextlib.suppress(OSError, ValueError, LookupError):
        handed_over = stat.S_ISSOCK(os.stat(f"/proc/{pid}/fd/0").st_mode)
        with open(f"/proc/{pid}/fdinfo/0", encoding="ascii") as lines:
            flags = next(
                line.split()[1] for line in lines if line.startswith("flags:")
            )
        established = bool(int(flags, 8) & os.O_NONBLOCK)
    return handed_over, established


def end(connections: Iterable[Connection]) -> list[Connection]:
    """End connections, by force if need be; returns those that went on all the
    same."""
    processes = []
    for connection in connections:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(connection.pid)
            # Its number may belong to another process by now, which began at
            # another time.
            if process.create_time() == connection.created:
                process.send_signal(DISCONNECT)
                processes.append((process, connection))
    _, stubborn = psutil.wait_procs(
        [process for process, _ in processes], timeout=GRACE
    )
    for process in stubborn:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    _, left = psutil.wait_procs(stubborn, timeout=GRACE)
    return [connection for process, connection in processes if process in left]
