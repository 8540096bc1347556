"""The steps of `check` about qrexec in this qube: its client, its agent, and
what both need of Xen."""

from __future__ import annotations

import errno
import os
import shlex
import shutil
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ..forward.process import takes_sockets
from .daemons import Daemon
from .netproc import Listening
from .steps import PROGRAM_TIMEOUT, Context, Level, Step, output, sudo

__all__ = [
    "DEFAULT_CLIENT",
    "agent_steps",
    "client_steps",
    "clients",
    "package_version",
    "refuses",
    "xen_steps",
]

DEFAULT_CLIENT = "/usr/bin/qrexec-client-vm"
AGENT_SOCKET = "/run/qubes/qrexec-agent"
#: Things that only a qube has.
QUBES_SIGNS = (
    "/usr/bin/qrexec-client-vm",
    "/usr/bin/qubesdb-read",
    "/etc/qubes",
    "/var/run/qubes",
)
#: What qrexec-client-vm opens for each call.
XEN_DEVICES = ("gntalloc", "gntdev", "evtchn")
#: How many pages this qube may share with others: some thirty calls need a
#: thousand. Qubes' GUI agent writes the second number there.
GRANTS = Path("/sys/module/xen_gntalloc/parameters/limit")
FEW_GRANTS, ENOUGH_GRANTS = 1024, 1073741824


def clients(context: Context) -> Iterator[Step]:
    """Every qrexec-client-vm that a daemon would start."""
    found = {
        _client_of(context, daemon)
        for daemon in context.now.daemons.values()
        if not daemon.dead
    } or {DEFAULT_CLIENT}
    for client in sorted(found):
        yield from client_steps(client, context.now.listening)


def _client_of(context: Context, daemon: Daemon) -> str:
    for at, word in enumerate(daemon.argv):
        if word == "--client" and at + 1 < len(daemon.argv):
            return daemon.argv[at + 1]
        if word.startswith("--client="):
            return word.partition("=")[2]
    (row,) = context.manager.unit_properties(
        [daemon.unit], "Service", ["Environment"]
    )
    environment = context.environment | dict(
        one.partition("=")[::2] for one in row["Environment"] or ()
    )
    return environment.get("QREXEC_ACTIVATE_CLIENT") or DEFAULT_CLIENT


def client_steps(path: str, listening: Listening | None) -> Iterator[Step]:
    """What is to be said of one qrexec-client-vm, and of what it needs."""

    def wrong(text: str, mend: str = "", advice: str = "") -> Step:
        return Step("qrexec", Level.ERROR, text, mend, advice)

    if not os.path.exists(path):
        if path == DEFAULT_CLIENT and not any(map(os.path.exists, QUBES_SIGNS)):
            yield wrong(
                f"{path} is not there: this machine is no qube. Routes can be"
                f" made here, but reach nothing",
                "qrexec-activate demo",
            )
        elif path == DEFAULT_CLIENT:
            yield wrong(
                f"{path} is not there",
                advice="install the package qubes-core-qrexec in the template,"
                " and start this qube again",
            )
        else:
            yield wrong(
                f"{path} is not there",
                advice=f"take out what sets it: --client, or"
                f" QREXEC_ACTIVATE_CLIENT; without, it is {DEFAULT_CLIENT}",
            )
        return
    if not os.access(path, os.X_OK):
        yield wrong(
            f"{path} cannot be run",
            sudo(f"chmod a+x {shlex.quote(path)}", path),
        )
        return
    how = {
        True: "takes sockets (--use-stdin-socket)",
        False: "takes no sockets, so bytes go through pipes",
        None: "does not say whether it takes sockets: its first call shows it",
    }[takes_sockets(path, PROGRAM_TIMEOUT)]
    version = package_version(path)
    yield Step(
        "qrexec", Level.OK, f"{path}{f', {version},' if version else ''} {how}"
    )
    if path == DEFAULT_CLIENT:
        yield from agent_steps(
            os.path.exists(AGENT_SOCKET),
            not listening
            or listening.holds(AGENT_SOCKET)
            or not refuses(AGENT_SOCKET),
        )
        yield from xen_steps()


def refuses(path: str) -> bool:
    """Whether nobody is behind the file of a socket. The kernel's list has only
    sockets of this network namespace, and an agent may have its own."""
    kind = socket.SOCK_STREAM | socket.SOCK_NONBLOCK
    with socket.socket(socket.AF_UNIX, kind) as sock:
        return sock.connect_ex(path) == errno.ECONNREFUSED


def agent_steps(is_there: bool, listens: bool) -> Iterator[Step]:
    """What is to be said of qrexec-agent; its socket outlives it."""
    if is_there and listens:
        yield Step("qrexec", Level.OK, "qrexec-agent runs")
        return
    why = (
        f"nobody listens on {AGENT_SOCKET}"
        if is_there
        else f"{AGENT_SOCKET} is not there"
    )
    yield Step(
        "qrexec",
        Level.ERROR,
        f"qrexec-agent does not run: {why}",
        sudo("systemctl restart qubes-qrexec-agent"),
    )


def xen_steps(
    folder: Path = Path("/dev/xen"), grants: Path = GRANTS
) -> Iterator[Step]:
    """Whether this user can open what a call needs, and often enough."""
    for device in XEN_DEVICES:
        path = folder / device
        if path.exists() and not os.access(path, os.R_OK | os.W_OK):
            yield Step(
                "qrexec",
                Level.ERROR,
                f"{path} cannot be opened by this user, so every call fails",
                advice="add this user to the group qubes: usermod -aG qubes"
                " NAME, as root in the template; then start this qube again",
            )
            break
    with suppress(OSError, ValueError):
        limit = int(grants.read_text())
        if limit <= FEW_GRANTS:
            yield Step(
                "qrexec",
                Level.WARNING,
                f"{grants} is {limit}, so no more than about 30 calls can be"
                f" open at once",
                sudo(f"sh -c 'echo {ENOUGH_GRANTS} > {grants}'"),
            )


def package_version(path: str) -> str:
    """The package that a file is of, with its version; empty where no package
    manager knows it."""
    if shutil.which("dpkg-query"):
        found = output(["dpkg-query", "--search", path], must_succeed=True)
        words = ["dpkg-query", "--show", "--showformat=${Package} ${Version}"]
        words.append((found or "").partition(":")[0])
    elif shutil.which("rpm"):
        words = ["rpm", "--query", "--file", path]
    else:
        return ""
    return (output(words, must_succeed=True) or "").strip()
