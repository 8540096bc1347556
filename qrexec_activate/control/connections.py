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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePath

import psutil

from ..forward.outcome import DISCONNECT
from ..routing.address import address_key
from ..systemd.shown import plain_address
from ..systemd.unitdirs import unit_words
from .netproc import Holder, holders, process_name
from .sockdiag import end_key, tcp_ends
from .survey import Entry, Survey

__all__ = ["Connection", "Lookout", "end", "is_among", "open_connections"]

#: A set-up that takes longer is most likely waiting for a person, who has been
#: asked in dom0.
PROMPT_AGE = 2.0
#: From the first signal to SIGKILL, in seconds.
GRACE = 2.0

_UNIX_PEER = re.compile(r"pid (\d+) uid (\d+)", re.ASCII)


@dataclass(slots=True, eq=False)
class Connection:
    """An open connection. Bytes are None where the kernel does not count them,
    as on unix sockets."""

    id: str
    pid: int
    parent: int
    #: What psutil takes for the time of its start, which may be a second off;
    #: tells two processes of one pid apart.
    created: float
    #: When it began, by CLOCK_BOOTTIME.
    started: float
    listener: str
    target: str
    call: str
    unit: str
    peer: str
    #: What names its end in sock_diag; None for a unix socket.
    key: bytes | None
    #: "open", "setting up", or "waiting" for an answer to a prompt.
    state: str = ""
    #: "hand-over" or "splice".
    relay: str = ""
    peer_process: Holder | None = None
    bytes_to_qube: int | None = None
    bytes_from_qube: int | None = None
    #: Whose daemon began it: "user" or "system".
    manager: str = "user"

    @property
    def age(self) -> float:
        """Seconds since it began."""
        return max(time.clock_gettime(time.CLOCK_BOOTTIME) - self.started, 0.0)

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
        ) or word in unit_words(self.unit)

    def __str__(self) -> str:
        return (
            f"{self.id}: {self.peer} on {self.listener} → {self.target}"
            f" {self.call}"
        )


def is_among(connection: Connection, entries: Iterable[Entry]) -> bool:
    """Whether a connection is on one of these routes."""
    return any(
        connection.unit == entry.unit
        and connection.listener == entry.listener
        and connection.manager == entry.manager
        for entry in entries
    )


class Lookout:
    """Looks at the open connections of all managers' daemons, again and again:
    what cannot change is read once."""

    def __init__(self) -> None:
        self._known: dict[int, Connection | None] = {}
        #: Looked at once, and no connection: it may be about to become one.
        self._doubtful: set[int] = set()
        self._daemons: set[tuple[str, str]] = set()

    def look(self, surveys: Sequence[Survey]) -> list[Connection]:
        """Return the open connections, the oldest first."""
        daemons = {
            (survey.manager, name)
            for survey in surveys
            for name in survey.daemons
        }
        if self._daemons != daemons:
            self._known.clear()
            self._doubtful.clear()
            self._daemons = daemons
        pids = _pids()
        for pid in self._known.keys() - pids:
            del self._known[pid]
        new: list[Connection] = []
        for pid in (pids - self._known.keys()) | (self._doubtful & pids):
            one = self._known[pid] = next(
                filter(None, (_examine(survey, pid) for survey in surveys)),
                None,
            )
            if one is not None:
                new.append(one)
                self._doubtful.discard(pid)
            elif pid in self._doubtful:
                self._doubtful.discard(pid)
            else:
                self._doubtful.add(pid)
        # What qrexec-client-vm may have started itself has inherited its
        # environment. Nothing that only calls itself the same hides another.
        heirs = {
            one.pid for one in new if self._known.get(one.parent) is not None
        }
        self._known |= dict.fromkeys(heirs)
        found = [one for one in self._known.values() if one is not None]
        new = [one for one in new if one.pid not in heirs]
        self._bring_up_to_date(found, new)
        return sorted(found, key=lambda one: (one.started, one.id))

    def _bring_up_to_date(
        self, found: list[Connection], new: list[Connection]
    ) -> None:
        keys = {one.key for one in found if one.key is not None}
        ours, theirs = tcp_ends(keys) if keys else ({}, {})
        clients = holders(
            theirs[one.key].inode for one in new if one.key in theirs
        )
        for one in new:
            if one.key in theirs:
                one.peer_process = clients.get(theirs[one.key].inode)
            else:
                one.peer_process = _unix_peer(one.peer)
        for one in found:
            end = ours.get(one.key) if one.key else None
            if end is not None:
                one.bytes_to_qube, one.bytes_from_qube = end.received, end.sent
            # Once open, it stays so.
            if one.state != "open":
                _look_at(one)


def _pids() -> set[int]:
    return {int(name) for name in os.listdir("/proc") if name.isdigit()}


def open_connections(survey: Survey) -> list[Connection]:
    """Return the open connections of this manager's daemons, the oldest
    first."""
    return Lookout().look([survey])


def _examine(survey: Survey, pid: int) -> Connection | None:
    """Say for which connection a process is there; None if for none."""
    with contextlib.suppress(psutil.Error, OSError):
        if survey.user and os.stat(f"/proc/{pid}").st_uid != os.getuid():
            return None
        process = psutil.Process(pid)
        environment = process.environ()
        if "QREXEC_ACTIVATE_CONNECTION" not in environment or not _is_of(
            survey, pid
        ):
            return None
        words = process.cmdline()
        if len(words) < 3:
            return None

        def of(name: str) -> str:
            return environment.get(f"QREXEC_ACTIVATE_{name}", "")

        return Connection(
            id=of("CONNECTION"),
            pid=pid,
            parent=process.ppid(),
            created=process.create_time(),
            started=_started(pid),
            listener=plain_address(of("LISTENER")),
            target=words[-2],
            call=words[-1],
            unit=of("UNIT"),
            peer=of("PEER"),
            key=_key(of("PEER"), of("LISTENER")),
            manager=survey.manager,
        )
    return None


def _started(pid: int) -> float:
    with open(f"/proc/{pid}/stat", "rb") as file:
        # proc(5): what follows the name in parentheses are the fields from the
        # third on; starttime is the 22nd.
        started = int(file.read().rpartition(b")")[2].split()[19])
    return started / os.sysconf("SC_CLK_TCK")


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


def _key(peer: str, listener: str) -> bytes | None:
    """What names the daemon's end of a TCP connection: it looks at the peer."""
    theirs, ours = address_key(peer), address_key(listener)
    if not theirs or not ours or (theirs[0], ours[0]) != ("ip", "ip"):
        return None
    return end_key(theirs[1].partition("%")[0], theirs[2], ours[2])


def _unix_peer(peer: str) -> Holder | None:
    """The process at the other end of a unix socket, if it is still there;
    another may have its number by now."""
    match = _UNIX_PEER.fullmatch(peer)
    if match is None:
        return None
    name = process_name(int(match[1]))
    return Holder(int(match[1]), name) if name else None


def _look_at(one: Connection) -> None:
    handed_over, established = _descriptor(one.pid)
    one.state = (
        "open"
        if established
        else "setting up"
        if one.age < PROMPT_AGE
        else "waiting"
    )
    one.relay = "hand-over" if handed_over else "splice"


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
